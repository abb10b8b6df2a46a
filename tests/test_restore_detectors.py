"""main-restore.py on a detector's own images: told its noise, at a fraction of their dose, and to a higher one."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from scipy import ndimage

from evaluation.metrics import image_metrics
from files.images import read_image
from preprocessing.breast import breast_mask
from preprocessing.detector import Detector
from preprocessing.noise import draw_kernel, unit_noise
from scripts import call, load_script, succeed
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


@pytest.fixture
def still(monkeypatch):
    """The networks leave everything as it is, which is quick."""
    monkeypatch.setattr("restoration.restorer.Restorer.restore", lambda self, values, name, **_: values)


def described(path):
    return pydicom.dcmread(path).DerivationDescription


def test_the_figures_of_a_dose_are_those_of_the_file(exposure, still):
    """Air that is clipped at full scale is brighter than that in the simulation, before it is clipped too."""
    DETECTOR.to_json(Path("detector.json"))
    tags = dict(PresentationIntentType="FOR PROCESSING", PhotometricInterpretation="MONOCHROME1")
    raw = dicom_file(Path("raw.dcm"), np.rint(1.5 * exposure).clip(0, 4095).astype(np.uint16), **tags)
    assert (read_image(raw) == 1).mean() > 0.2
    low = math.nan  # at first the file holds the low dose as it is
    for flags, method in (("", "posterior mean"), ("--to-dose 2", "posterior mean, blended to 2 x the dose")):
        succeed("main-restore", f"{raw} --detector detector.json --dose 0.5 --out out {flags}")
        clean, made = (torch.from_numpy(read_image(path))[None] for path in (raw, Path("out/raw.dcm")))
        figures, own = (
            json.loads(Path("out/metrics.json").read_text())["methods"],
            image_metrics(made, clean, clean < 2),
        )
        assert figures[method]["psnr"] == pytest.approx(own.psnr, abs=0.01)
        assert figures["low dose"]["psnr"] == pytest.approx(low := low if flags else own.psnr, abs=0.01)


def test_a_blend_is_named_everywhere_and_only_where_it_is_one(raw, still):
    product = "posterior mean, blended to 2 x the dose"
    result = succeed("main-restore", f"{raw} --detector detector.json --to-dose 2 --out out")
    assert result.out.endswith(f"\n1 image restored into out: {product}\n")
    assert f"; {product}; seed 0; " in described("out/raw.dcm")
    assert pd.read_csv("out/restore.csv")["product"].tolist() == [product]
    assert json.loads(Path("out/restore.json").read_text())["product"] == product
    for flags in ("--noise-level 0", ""):
        source = raw
        if not flags:  # no noise is seen
            source = dicom_file(Path("flat.dcm"), np.full(SHAPE, 700), PresentationIntentType="FOR PROCESSING")
        result = succeed("main-restore", f"{source} {flags} --to-dose 2 --out none")
        assert "\n1 image shows no noise, so nothing is blended\n" in result.out
        assert result.out.endswith("restored into none: posterior mean\n")
        assert "blended" not in described(Path("none") / source.name)


def test_images_that_a_detector_s_file_does_not_describe_are_counted(raw, exposure, still):
    known = dict(gain_map=np.ones((2, 2)), pixel_mm=0.1, shape=SHAPE, name="Maker Model")
    dataclasses.replace(DETECTOR, **known).to_json(Path("detector.json"))
    tags = dict(PresentationIntentType="FOR PROCESSING", Manufacturer="Maker", ManufacturerModelName="Model")
    values = np.rint(exposure).astype(np.uint16)
    Path("in").mkdir()
    dicom_file(Path("in/own.dcm"), values, bits=14, ImagerPixelSpacing=[0.1, 0.1], **tags)
    line = "in --detector detector.json --out"
    assert "does not describe" not in succeed("main-restore", f"{line} own").out
    dicom_file(Path("in/other.dcm"), values, bits=14, ImagerPixelSpacing=[0.1, 0.1], **tags | {"Manufacturer": "An"})
    fine = tags | {"PresentationIntentType": "FOR PRESENTATION"}
    dicom_file(Path("in/fine.dcm"), values[:100], bits=14, ImagerPixelSpacing=[0.05, 0.05], **fine)
    dicom_file(Path("in/small.dcm"), values[:, :90] // 16, bits=8, allocated=8, **tags)
    lines = succeed("main-restore", f"{line} out").out.splitlines()
    assert [line for line in lines if "does not describe" in line] == [
        "detector.json does not describe 1 image: processed for presentation; restore the image FOR PROCESSING",
        "detector.json does not describe 1 image: of another detector than Maker Model; calibrate that one",
        "detector.json does not describe 1 image: of another pixel pitch than 0.1 mm; calibrate at that pitch",
        "detector.json does not describe 2 images: of another size than its flats, 128 x 160, so the gain map is stretched; "
        "take flats of the image's size",
        "detector.json does not describe 1 image: of 8 bits, which no detector stores; restore the raw image",
    ]


def test_a_breast_on_the_dark_side_of_the_offset_is_refused(raw, still):
    dataclasses.replace(DETECTOR, gain=-0.5).to_json(Path("detector.json"))
    result = call("main-restore", f"{raw} --detector detector.json --out out")
    assert result.code == 2 and result.err.count("\n") == 1
    assert result.err.startswith("error: raw.dcm: its breast, at ")
    assert "lies on the dark side of the offset 50 of detector.json; calibrate on flats" in result.err


def test_what_is_not_finite_is_not_written(raw, monkeypatch):
    monkeypatch.setattr("restoration.restorer.Restorer.restore", lambda self, values, name, **_: values * np.nan)
    for flags in ("", "--to-dose 2"):
        result = call("main-restore", f"{raw} --detector detector.json --out out {flags}")
        assert result.code == 2 and not Path("out").exists()
        assert (
            result.err
            == "error: raw.dcm: its restoration is not finite; check its noise, --detector or --noise-level\n"
        )


def test_the_noise_in_the_table_is_that_of_tissue_without_clipped_air(raw, still, monkeypatch):
    monkeypatch.setattr("restoration.batch.breast_mask", lambda image: torch.ones(image.shape, dtype=torch.bool))
    succeed("main-restore", f"{raw} --detector detector.json --out out")
    tissue = pixels(raw)[pixels(raw) < CLIPPED].mean()
    row = pd.read_csv("out/restore.csv").iloc[0]
    assert row["deviation"] == pytest.approx((0.5 * (tissue - 50) + 9) ** 0.5, rel=0.02)


def test_no_gain_is_stated_over_an_input_that_is_the_truth(raw, still, exposure):
    result = succeed("main-restore", f"{raw} --degrade 0 --noise-level 0.2 --out out")
    row = next(line.split() for line in result.out.splitlines() if line.startswith("posterior mean "))
    assert "(inf)" in row and row[-1] == "-"


@pytest.mark.parametrize(
    "flags, level",
    [
        ("--dose 0.5 --noise-level auto", "auto"),
        ("--detector d --noise-level auto", "auto"),
        ("--to-dose 2 --degrade 0", 0),
    ],
)
def test_the_default_and_0_go_with_others(flags, level, monkeypatch):
    monkeypatch.setattr(sys, "argv", f"main-restore.py a --out b {flags}".split())
    assert load_script("main-restore").parse_arguments().noise_level == level


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--detector detector.json --noise-level 0", "--detector does not go with --noise-level"),
        ("--detector detector.json --degrade 0", "--detector does not go with --degrade"),
        ("--dose 0.5 --degrade 0", "--dose does not go with --degrade"),
        ("--dose 0.5 --noise-level trained", "--dose does not go with --noise-level"),
        ("--to-dose 2 --samples 2", "--to-dose does not go with --samples"),
        ("--to-dose 2 --resize", "--to-dose does not go with --resize"),
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
