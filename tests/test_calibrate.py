"""Calibration on simulated flat fields returns what was put in."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import DigitalMammographyXRayImageStorageForProcessing, ExplicitVRLittleEndian, generate_uid
from scipy import signal

from helper import UserError
from preprocessing import calibrate
from preprocessing.detector import Detector
from preprocessing.flats import Level
from preprocessing.flats import calibrate as fit
from preprocessing.noise import NoiseModel, power_spectrum
from scripts import ROOT

SIDE, MAS, REPEATS = 384, (5, 20, 60, 140), 3


def kernel(centre, columns, rows, tail):
    """A kernel (21, 21) of a centre, its neighbours in a row and in a column, and a tail that falls off slowly."""
    y, x = np.mgrid[-10:11, -10:11]
    values = tail * np.exp(-np.hypot(y, x) / 3)
    values[10, 10], values[10, [9, 11]], values[[9, 11], 10] = centre, columns, rows
    return values / np.sqrt(np.square(values).sum())


# an indirect and a direct detector: centre and neighbours as Brandao et al. (IWBI 2026) have them, the tail is made up
GE, HOLOGIC = kernel(0.898, 0.188, 0.159, 0.07), kernel(0.997, 0.021, 0.044, 0)


def simulated(
    blur, gain=0.05, sigma=2.8, offset=40.0, slope=20.0, structural=0.005, shading=0.1, repeats=REPEATS, seed=0
):
    """Flat fields (len(MAS), repeats, SIDE, SIDE) uint16. A negative slope is that of inverted storage."""
    rng, reach = np.random.default_rng(seed), len(blur) - 1
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    fixed = 1 + structural * rng.standard_normal((SIDE, SIDE))
    images = []
    for mas in MAS:
        mean = abs(slope) * mas * (1 + shading * x - shading * y**2)
        for _ in range(repeats):
            output = 1 + 0.003 * rng.standard_normal()  # of the tube
            quantum = signal.fftconvolve(rng.standard_normal((SIDE + reach, SIDE + reach)), blur, "valid")
            exposed = output * mean * fixed + np.sqrt(gain * mean) * quantum + sigma * rng.standard_normal((SIDE, SIDE))
            images.append(np.rint(offset + np.copysign(1, slope) * exposed).clip(0, 65535).astype(np.uint16))
    return np.array(images).reshape(len(MAS), repeats, SIDE, SIDE)


def measured(images):
    levels = [Level.of(mas, stack) for mas, stack in zip(MAS, images, strict=True)]
    return fit(levels, (SIDE, SIDE), "simulated", 0.1)


@pytest.fixture(scope="module")
def ge():
    return measured(simulated(GE))[0]


def correlations(blur):
    """Autocorrelation at lags 0 to 3 in either direction, (4, 4)."""
    full = signal.correlate(blur, blur)
    centre = len(blur) - 1
    return full[centre : centre + 4, centre : centre + 4] / full[centre, centre]


@pytest.mark.parametrize(
    "blur, slope, offset", [(GE, 20.0, 40.0), (HOLOGIC, -20.0, 16383.0)], ids=["GE", "Hologic, inverted"]
)
def test_the_estimate_is_what_was_put_in(blur, slope, offset):
    detector, response = measured(simulated(blur, slope=slope, offset=offset))
    assert detector.gain == pytest.approx(np.copysign(0.05, slope), rel=0.02)
    assert detector.sigma == pytest.approx(np.sqrt(2.8**2 + 1 / 12), rel=0.05)  # 1/12: rounding to whole numbers
    assert detector.offset == pytest.approx(offset, abs=2)
    assert detector.structural == pytest.approx(0.005, rel=0.1)
    assert detector.gain_map is None
    np.testing.assert_allclose(correlations(detector.kernel), correlations(blur), atol=0.02)
    assert response.is_linear and response.slope == pytest.approx(slope, rel=0.01)


def test_white_noise_filtered_by_the_kernel_has_the_true_spectrum(ge):
    own, true = (power_spectrum(torch.as_tensor(k), (64, 64)) for k in (ge.kernel, GE))
    assert float((own - true).abs().mean()) < 0.03


def test_one_image_at_each_exposure_is_enough_for_the_curve():
    detector, _ = measured(simulated(HOLOGIC, structural=0.02, repeats=1))
    assert detector.structural == pytest.approx(0.02, rel=0.05)
    assert detector.gain == pytest.approx(0.05, rel=0.2)


def test_a_gain_that_varies_becomes_a_map():
    x = np.linspace(-1, 1, SIDE)
    varied = 0.05 * (1 + 0.15 * x) * np.ones((SIDE, 1))
    detector, _ = measured(simulated(GE, gain=varied, repeats=4))
    gain = detector.noise((SIDE, SIDE)).gain.numpy()
    assert np.abs(gain / varied - 1).max() < 0.05
    assert gain.mean() == pytest.approx(0.05, rel=0.02)
    half = detector.noise((SIDE // 2, SIDE // 2), flipped=True)
    np.testing.assert_allclose(
        half.gain.numpy(), gain.reshape(SIDE // 2, 2, SIDE // 2, 2).mean((1, 3))[:, ::-1], rtol=0.01
    )


def test_the_nnps_is_the_variance_by_the_signal_and_the_pixel_area():
    """Its integral over frequency is the relative variance, and for white noise it is flat: gain x area / signal."""
    detector, _ = measured(simulated(kernel(1, 0, 0, 0), sigma=0, structural=0))
    expected = 0.05 * 0.01 / (20 * np.array(MAS))
    np.testing.assert_allclose(detector.nnps.mean(1), expected, rtol=0.03)
    assert detector.frequencies[-1] == pytest.approx(5, abs=0.2)  # Nyquist's of 0.1 mm
    assert np.abs(detector.nnps / detector.nnps.mean(1, keepdims=True) - 1).max() < 0.15


def test_values_that_are_not_linear_are_told():
    images = simulated(HOLOGIC).astype(float)
    _, response = measured(images - 2e-5 * images**2)
    assert not response.is_linear and response.deviation > 0.02


# --- the file --------------------------------------------------------------------------------------------------------


def small():
    return Detector("d", 0.03, 2.8, 1.9, 0.01, np.eye(3), gain_map=np.array([[0.9, 1.1]]), pixel_mm=0.1)


def test_a_detector_survives_its_file(ge, tmp_path):
    ge.to_json(tmp_path / "d.json")
    back = Detector.from_json(tmp_path / "d.json")
    for name in ("gain", "sigma", "offset", "structural", "kernel", "nnps", "frequencies", "exposures", "variances"):
        np.testing.assert_array_equal(getattr(back, name), getattr(ge, name))
    noise = small().noise((2, 4))
    assert isinstance(noise, NoiseModel)
    # bilinear between the tiles' centres, which lie at 0.5 and 2.5 of the 4 pixels
    np.testing.assert_allclose(noise.gain.numpy(), 0.03 * np.array([[0.9, 0.95, 1.05, 1.1]] * 2), rtol=1e-6)
    assert (noise.sigma, noise.offset, noise.structural, noise.electronic_is_white) == (2.8, 1.9, 0.01, True)


ENTRIES = {
    "gain": [0.0, None, "0.1", True, [0.1], 1e300], "sigma": [-1], "structural": [-0.1, 1.1], "pixel_mm": [0, -0.1],
    "kernel": [[[0.0]], [[1, 2], [3, 4]], [[1, 2, 3]], [1], [[[1]]], [[1], [1, 2]], np.ones((33, 33)).tolist()],
    "gain_map": [[[0.0]], [[]], [[1, -1]], np.ones((2, 40)).tolist()], "name": [3], "electronic_is_white": [1],
    "exposures": [[1.0]], "nnps": [[[1.0]]], "extra": [1], "offset": [-(2**63), 1e7], "shape": [3, [3], [0, 4], [[3, 4]]],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, value) for name, values in ENTRIES.items() for value in values])
def test_a_file_that_cannot_be_a_detector_is_refused(tmp_path, name, value):
    path = tmp_path / "d.json"
    small().to_json(path)
    entries = json.loads(path.read_text()) | {name: value} | ({"sigma": 0} if name == "gain" and value == 0 else {})
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"d\.json: not the calibration of a detector.*preprocessing/calibrate\.py"):
        Detector.from_json(path)


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"gain": "0.1"}, "gain must be a number up to 1e+06"),
        ({"exposures": 3}, "exposures must be a list of numbers"),
        ({"kernel": [[1], [1, 2]]}, "kernel must be a table of numbers"),
        ({"kernel": [[1e-30]]}, "kernel must have squares that add up to about 1"),
        ({"gain": 1e-300, "sigma": 1e-300}, "neither quantum nor electronic noise"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_plain_words(tmp_path, entries, words):
    path = tmp_path / "d.json"
    small().to_json(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(UserError) as refusal:
        Detector.from_json(path)
    assert words in str(refusal.value)
    for text in ("[1]", "{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match=r"\(no JSON object\)"):
            Detector.from_json(path)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{}", b"\xff\xfe", b"NaN", b"[" * 100_000])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "d.json").write_bytes(text)
    with pytest.raises(UserError, match=r"d\.json: not the calibration"):
        Detector.from_json(tmp_path / "d.json")
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        Detector.from_json(tmp_path / "none.json")


def test_not_a_number_is_refused(tmp_path):
    small().to_json(tmp_path / "d.json")
    text = (tmp_path / "d.json").read_text().replace('"sigma": 2.8', '"sigma": NaN')
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(UserError, match="sigma"):
        Detector.from_json(tmp_path / "d.json")


# --- the script ------------------------------------------------------------------------------------------------------


def write_dicom(path, stored, **tags):
    header = pydicom.Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = DigitalMammographyXRayImageStorageForProcessing, generate_uid()
    header.Manufacturer, header.ManufacturerModelName = "Maker", "Model"
    header.PresentationIntentType = "FOR PROCESSING"
    for name, value in tags.items():
        setattr(header, name, value)
    header.set_pixel_data(stored, "MONOCHROME2", 14)
    header.save_as(path, enforce_file_format=True)
    return str(path)


@pytest.fixture(scope="module")
def flats(tmp_path_factory):
    """Two flats at each of two exposures, as PNG, and their exposures."""
    folder, paths = tmp_path_factory.mktemp("flats"), []
    for mas, stack in zip(MAS[::2], simulated(HOLOGIC, repeats=2)[::2, :, :200, :256], strict=True):
        for i, image in enumerate(stack):
            paths.append(folder / f"{mas}-{i}.png")
            Image.fromarray(image).save(paths[-1])
    return SimpleNamespace(folder=folder, paths=[*map(str, paths)], mas=["5", "5", "60", "60"])


def refused(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, arguments)])
    with pytest.raises(UserError) as refusal:
        calibrate.main()
    return str(refusal.value)


def test_the_script_runs_from_the_root(flats, tmp_path):
    command = [
        sys.executable,
        "preprocessing/calibrate.py",
        *flats.paths,
        "--exposures",
        *flats.mas,
        "--pixel-mm",
        "0.1",
    ]
    out = tmp_path / "detector.json"
    done = subprocess.run(
        [*command, "--out", str(out), "--no-tqdm"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"detector written to {out}" in done.stdout and "NNPS u" in done.stdout
    assert Detector.from_json(out).gain == pytest.approx(0.05, rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["detector.json"]


def test_a_header_states_exposure_pitch_and_name(tmp_path, monkeypatch, capsys):
    paths = []
    for mas, stack in zip(MAS, simulated(HOLOGIC, repeats=2)[..., :200, :256], strict=True):
        stated = {"ExposureInuAs": 1000 * mas, "Exposure": 1, "ImagerPixelSpacing": [0.07, 0.07]}
        paths += [write_dicom(tmp_path / f"{mas}-{i}.dcm", image, **stated) for i, image in enumerate(stack)]
    saturated = np.full((200, 256), 16383, np.uint16)
    paths.append(write_dicom(tmp_path / "saturated.dcm", saturated, ExposureInuAs=900_000))
    out = tmp_path / "new" / "detector.json"
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *paths, "--out", str(out), "--no-tqdm"])
    calibrate.main()
    detector = Detector.from_json(out)
    assert (detector.name, detector.pixel_mm, detector.exposures) == ("Maker Model", 0.07, [*map(float, MAS)])
    assert detector.offset == pytest.approx(40, abs=2)
    assert "saturated.dcm: 100.0 % of its pixels are clipped; left out" in capsys.readouterr().err


def test_wrong_calls_are_refused_in_a_line(flats, tmp_path, monkeypatch):
    out = ["--out", tmp_path / "d.json", "--no-tqdm"]
    assert "one exposure" in refused(monkeypatch, flats.paths[0], "--exposures", 5, *out)
    assert "one exposure" in refused(monkeypatch, *flats.paths[:2], "--exposures", 5, 5.001, *out)
    assert "two images at each" in refused(monkeypatch, *flats.paths[::2], "--exposures", 5, 60, *out)
    assert "5-0.png: states no exposure; pass --exposures" in refused(monkeypatch, *flats.paths, *out)
    assert "--exposures: 1 given for 4 files" in refused(monkeypatch, *flats.paths, "--exposures", 5, *out)
    assert "does not follow the exposure" in refused(monkeypatch, *flats.paths, "--exposures", 1, 4, 2, 3, *out)
    assert "noise does not rise" in refused(monkeypatch, *flats.paths, "--exposures", 60, 60, 5, 5, *out)
    Image.fromarray(np.zeros((300, 256), np.uint16)).save(tmp_path / "other.png")
    Image.fromarray(np.zeros((64, 256), np.uint16)).save(tmp_path / "small.png")
    sizes = refused(monkeypatch, flats.paths[0], tmp_path / "other.png", "--exposures", 5, 60, *out)
    assert "other.png: 256 x 300 pixels, but" in sizes and "256 x 200" in sizes
    assert "small.png: 256 x 64 pixels are too few" in refused(
        monkeypatch, tmp_path / "small.png", "--exposures", 5, *out
    )
    assert not (tmp_path / "d.json").exists()


def test_an_out_that_cannot_be_written_is_found_before_the_work(flats, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "read_levels", lambda *_: pytest.fail("worked in vain"))
    (tmp_path / "file").write_text("")
    call = [*flats.paths, "--exposures", *flats.mas, "--out"]
    assert "cannot be written" in refused(monkeypatch, *call, tmp_path / "file" / "d.json")
    assert "a folder; name a file" in refused(monkeypatch, *call, tmp_path)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["calibrate.py", *map(str, arguments)])
    calibrate.main()


def test_a_flat_is_never_overwritten(flats, monkeypatch):
    before = Path(flats.paths[1]).read_bytes()
    said = refused(monkeypatch, *flats.paths, "--exposures", *flats.mas, "--out", flats.folder / "." / "5-1.png")
    assert said.endswith("5-1.png: is one of the flats; choose another file")
    assert Path(flats.paths[1]).read_bytes() == before


def test_flats_that_are_no_file_are_named(flats, tmp_path, monkeypatch):
    out = ["--exposures", 5, "--out", tmp_path / "d.json"]
    assert refused(monkeypatch, tmp_path, *out) == f"{tmp_path}: a folder; name the files in it"
    assert refused(monkeypatch, tmp_path / "no.dcm", *out) == f"{tmp_path / 'no.dcm'}: no such file"


def test_equal_flats_are_named_and_nothing_is_left_behind(flats, tmp_path, monkeypatch, capsys):
    """Their difference is no noise. The line of the error does not begin behind the progress bar."""
    one, _, three, _ = flats.paths
    out = ["--out", tmp_path / "new" / "deep" / "d.json"]
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(one).read_bytes())
    for paths, exposures in (([one, three, one], [5, 60, 5]), ([one, copy, three], [5, 5, 60])):
        said = refused(monkeypatch, *paths, "--exposures", *exposures, *out)
        assert said == f"{paths[-1] if paths[-1] == one else copy}: the same image as {one}; leave one of them out"
        assert capsys.readouterr().err.endswith("\n")
    assert not (tmp_path / "new").exists()
    pixel = np.asarray(Image.open(one)).copy()
    pixel[0, 0] += 1
    Image.fromarray(pixel).save(copy)
    assert "copy.png: no noise in the flats of its exposure" in refused(
        monkeypatch, one, copy, three, "--exposures", 5, 5, 60, *out
    )


def test_clipped_flats_are_left_out_wherever_they_are_clipped(flats, tmp_path, monkeypatch, capsys):
    paths = []
    for i, path in enumerate(flats.paths):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[:, :2] = 65535  # 0.8 %
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    out = ["--out", tmp_path / "d.json", "--no-tqdm"]
    said = refused(monkeypatch, *paths, "--exposures", *flats.mas, *out)
    assert said.startswith("all of the flats are clipped; pass ")
    assert "0.png: 0.8 % of its pixels are clipped" in capsys.readouterr().err
    run(monkeypatch, *flats.paths, paths[3], "--exposures", *flats.mas, 60, *out)
    assert "3.png: 0.8 % of its pixels are clipped" in capsys.readouterr().err
    assert Detector.from_json(tmp_path / "d.json").gain == pytest.approx(0.05, rel=0.1)


def test_a_collimated_edge_is_no_gain(tmp_path, monkeypatch, capsys):
    images = simulated(HOLOGIC, structural=0)
    dark = np.random.default_rng(1).normal(40, 2.8, images[..., :100].shape)
    images[..., :100] = np.rint(dark).clip(0)
    levels = [Level.of(mas, stack) for mas, stack in zip(MAS, images, strict=True)]
    assert fit(levels, (SIDE, SIDE), "", None)[0].gain_map is None
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, image in zip(paths, images[::2, :2].reshape(4, SIDE, SIDE), strict=True):
        Image.fromarray(image).save(path)
    run(monkeypatch, *paths, "--exposures", 5, 5, 60, 60, "--out", tmp_path / "d.json", "--no-tqdm")
    # the outermost of five columns of regions, and the next
    assert "note: 40 % of the field does not follow the exposure" in capsys.readouterr().out


def test_flats_of_too_few_bits_are_refused(flats, tmp_path, monkeypatch):
    Image.fromarray(np.full((200, 256), 9, np.uint8)).save(tmp_path / "8.png")
    said = refused(monkeypatch, tmp_path / "8.png", "--exposures", 5, "--out", tmp_path / "d.json", "--no-tqdm")
    assert "8.png: 8 bits a pixel are too few" in said


def test_numbers_beyond_reason_are_refused(flats, tmp_path, monkeypatch):
    for text in ("1.4e-298", "-1", "1e10", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be 0 or a number from 1e-06 to 1e"):
            calibrate.exposure_number(text)
    call = [*flats.paths, "--exposures", *flats.mas, "--out", tmp_path / "d.json", "--no-tqdm"]
    for pitch in ("1e8", "0", "1e-300", "nan"):
        assert "--pixel-mm must be from 0.001 to 10" in refused(monkeypatch, *call, "--pixel-mm", pitch)
    dim, *_, bright = simulated(HOLOGIC, repeats=2)[..., :128, :128]
    with pytest.raises(UserError, match=r"the flats make no detector \(offset must be a number up to 1e\+06\)"):
        fit([Level.of(1000, dim), Level.of(1010.2, bright * 20.0)], (128, 128), "", None)


def test_files_exposures_and_size_are_told(flats, tmp_path, monkeypatch, capsys):
    run(monkeypatch, *flats.paths, "--exposures", *flats.mas, "--out", tmp_path / "d.json", "--no-tqdm")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [[path, mas] in lines for path, mas in zip(flats.paths, flats.mas, strict=True)] == [True] * 4
    detector = Detector.from_json(tmp_path / "d.json")
    assert (detector.shape, detector.name) == ([200, 256], "")


def test_an_image_for_display_is_refused(tmp_path, monkeypatch):
    path = write_dicom(
        tmp_path / "p.dcm", np.zeros((200, 256), np.uint16), Exposure=5, PresentationIntentType="FOR PRESENTATION"
    )
    assert "p.dcm: processed for display" in refused(monkeypatch, path, "--out", tmp_path / "d.json", "--no-tqdm")
