"""main-restore.py on a detector's own images: told its noise, at a fraction of their dose, and to a higher one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from scipy import ndimage

from preprocessing.breast import breast_mask
from preprocessing.detector import Detector
from preprocessing.noise import draw_kernel, unit_noise
from scripts import call, succeed
from test_images import dicom_file

pytestmark = pytest.mark.usefixtures("own_folder")
SHAPE, CLIPPED = (160, 128), 3000
KERNEL = draw_kernel(1.0, torch.Generator().manual_seed(3)).double()
DETECTOR = Detector("test", gain=0.5, sigma=3.0, offset=50.0, kernel=KERNEL.numpy(), electronic_is_white=False)


@pytest.fixture(scope="module")
def exposure():
    """Clean stored values of a breast, darker than the air around it."""
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    inside = np.clip((1 - np.hypot((rows - 80) / 75, columns / 100)) * 12, 0, 1)
    texture = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), 6)
    return 50 + 4000 * np.exp(-inside * (1.8 + 6 * texture))


@pytest.fixture
def raw(exposure):
    """A file of such an image, FOR PROCESSING, with a clipped background."""
    noise = unit_noise(SHAPE, KERNEL, torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    deviation = DETECTOR.noise(SHAPE).variance(torch.from_numpy(exposure)).sqrt().numpy()
    stored = np.rint(exposure + deviation * noise).clip(0, CLIPPED).astype(np.uint16)
    DETECTOR.to_json(Path("detector.json"))
    tags = dict(PresentationIntentType="FOR PROCESSING", PhotometricInterpretation="MONOCHROME1")
    return dicom_file(Path("raw.dcm"), stored, bits=14, **tags)


def pixels(path):
    return pydicom.dcmread(path).pixel_array.astype(float)


def test_a_raw_image_is_restored_by_the_noise_of_its_detector(raw, exposure):
    result = succeed("main-restore", f"{raw} --detector detector.json --out out")
    low, restored = pixels(raw), pixels("out/raw.dcm")
    breast = exposure < 1500
    before, after = (((image - exposure)[breast] ** 2).mean() for image in (low, restored))
    assert after < 0.4 * before
    air = low == CLIPPED
    assert air.mean() > 0.2 and (restored[ndimage.binary_erosion(air, iterations=4)] == CLIPPED).all()
    derived = pydicom.dcmread("out/raw.dcm")
    assert derived.PresentationIntentType == "FOR PROCESSING"
    assert derived.PhotometricInterpretation == "MONOCHROME1"
    assert "noise calibrated as" in derived.DerivationDescription
    row = pd.read_csv("out/restore.csv").iloc[0]
    assert row["correlation"] == pytest.approx(DETECTOR.noise(SHAPE).correlation, abs=1e-3)
    assert "processed for presentation" not in result.out


def test_it_is_brought_to_twice_the_dose(raw, exposure):
    succeed("main-restore", f"{raw} --detector detector.json --out mean")
    succeed("main-restore", f"{raw} --detector detector.json --to-dose 2 --out out")
    breast = exposure < 1200
    mean, blended, low = (pixels(path)[breast] for path in ("mean/raw.dcm", "out/raw.dcm", raw))
    # what is left of the noise: (gain s / 2 + sigma^2 / 4) / (gain s + sigma^2) of its variance
    signal = exposure[breast].mean() - 50
    share = (0.5 * signal / 2 + 9 / 4) / (0.5 * signal + 9)
    assert (blended - mean).var() / (low - mean).var() == pytest.approx(share, rel=0.02)


def test_half_of_the_dose_is_simulated_and_measured(raw, exposure):
    result = succeed("main-restore", f"{raw} --detector detector.json --dose 0.5 --out out")
    assert "low dose of 50 % of the dose simulated" in result.out and "noise of its own" in result.out
    figures = json.loads(Path("out/metrics.json").read_text())["methods"]
    # at half of the dose, brought back to its brightness, gain s + 3 sigma^2 is added
    mask = breast_mask(torch.from_numpy(pixels(raw))[None])[0].numpy()
    added = (0.5 * (exposure[mask] - 50) + 27).mean() / 16383**2
    assert figures["low dose"]["psnr_breast"] == pytest.approx(-10 * np.log10(added), abs=0.5)
    assert figures["posterior mean"]["psnr_breast"] > figures["low dose"]["psnr_breast"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--detector missing.json", "missing.json"),
        ("--detector detector.json --noise-level 0.2", "--detector does not go with --noise-level"),
        ("--dose 0.5 --degrade 0.2", "--dose does not go with --degrade"),
        ("--to-dose 2 --sample", "--to-dose does not go with --sample"),
        ("--dose 1.5", "--dose: must be a fraction"),
        ("--to-dose 0.5", "--to-dose: must be a number above 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(raw, flags, words):
    result = call("main-restore", f"{raw} {flags} --out out")
    assert result.code == 2 and words in result.err and "Traceback" not in result.err
    assert not Path("out").exists()
