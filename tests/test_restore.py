"""main-restore.py from the shell: any mammogram in, the same file restored out, and nothing else touched."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1
from scipy import stats

from evaluation.metrics import image_metrics
from evaluation.uncertainty import Calibration, region_means
from files.images import SOFTWARE, is_restored, read_image, read_mammogram
from helper import sampling_dtype
from preprocessing.breast import breast_mask
from preprocessing.degrade import simulate_low_dose
from preprocessing.grid import Grid
from preprocessing.phantom import generate_phantom
from restoration.restorer import Restorer
from running.checkpoints import weights_digest
from scripts import ROOT, call, shell, written
from test_images import dicom_file
from vqvae2_wrapper import load_vqvae

pytestmark = pytest.mark.usefixtures("own_folder")


def noisy(height=80, width=70, index=0, level=0.2):
    """A phantom (height, width) in [0, 1] with the noise that the models are trained on; its middle where it is small."""
    image = generate_phantom(5, index, (1, max(64, height), max(48, width))).image[0]
    middle = (image.shape[0] - height) // 2
    image = image[middle : middle + height, :width].contiguous()
    return simulate_low_dose(image, level, torch.Generator().manual_seed(index)).numpy()


def png(path, values=None, bits=8):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = noisy() if values is None else values
    Image.fromarray(np.rint(values * (2**bits - 1)).astype(f"uint{bits}")).save(path)
    return path


def dcm(path, index=0, **tags):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return dicom_file(path, np.rint(noisy(index=index) * 4095).astype(np.uint16), **tags)


@pytest.fixture
def restore(vqvae, diffusion):
    """A call of the script with the trained models."""
    return lambda line: call("main-restore", f"--vqvae-path {vqvae} --load-path {diffusion} {line}")


@pytest.fixture
def restored(restore):
    """A call that has to succeed in silence; the table of its images."""

    def run(line):
        result = restore(line)
        assert (result.code, result.err) == (0, ""), result.err
        return pd.read_csv(Path(line.split("--out ")[1].split()[0]) / "restore.csv")

    return run


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in written(Path(folder))}


RECORDS = ["restore.csv", "restore.json"]


# --- what is written -------------------------------------------------------------------------------------------------


def test_restored_files_say_what_made_them(vqvae, diffusion):
    png("in/a.png", bits=16)
    dcm("in/b.dcm")
    result = shell("main-restore", f"in --vqvae-path {vqvae} --load-path {diffusion} --out out --seed 3")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("research use only") and result.out.endswith(
        "2 images restored into out: posterior mean\n"
    )
    assert written(Path("out")) == sorted(["a.png", "b.dcm", *RECORDS])
    restorer = Restorer.load(vqvae, diffusion, torch.device("cpu"))
    with Image.open("out/a.png") as image:
        said = image.info["Description"]
    assert said.startswith(f"VQ-VAE-2 {weights_digest(load_vqvae(vqvae)[0])[:8]}, latent diffusion ")
    assert restorer.name in said and "noise estimated as" in said and "; posterior mean; seed 3; " in said
    assert "research use only" in said
    derived = pydicom.dcmread("out/b.dcm")
    assert derived.DerivationDescription.startswith(f"{SOFTWARE}: {restorer.name}")
    assert "research use only" in derived.DerivationDescription and list(derived.ImageType) == ["DERIVED", "SECONDARY"]
    run = json.loads(Path("out/restore.json").read_text())
    assert run["seed"] == 3 and run["model"] == restorer.name and run["failures"] == []
    assert "--seed 3" in run["command"] and run["hps"]["timesteps"] == 1000
    assert run["product"] == "posterior mean" and run["sampling"] is None
    assert pd.read_csv("out/restore.csv")["product"].tolist() == ["posterior mean"] * 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [(80, 70), (64, 48), (33, 17), (16, 131), (151, 97)])
def test_size_and_depth_are_kept_and_the_image_is_restored(size, bits, restored):
    values = noisy(*size)
    png("in/a.png", values, bits)
    table = restored("in --out out --noise-level 0.2")
    assert table[["width", "height", "bits"]].values.tolist() == [[size[1], size[0], bits]]
    before, after = read_mammogram(Path("in/a.png")), read_mammogram(Path("out/a.png"))
    assert after.bits == bits and after.pixels.shape == size
    moved = np.abs(after.pixels - before.pixels)
    assert 5e-4 < moved.mean() < 0.2 and table["factor"][0] > 0 and 0 < table["strength"][0] <= 1


def test_a_dicom_keeps_its_patient_depth_and_polarity(restored):
    dcm("in/a.dcm", PatientID="P7")
    inverted = dicom_file(
        Path("in/b.dcm"), 4095 - np.rint(noisy() * 4095).astype(int), PatientID="P7", SOPInstanceUID="1.2.3.5",
        PhotometricInterpretation="MONOCHROME1",
    )  # fmt: skip
    table = restored("in --out out --noise-level 0.2")
    assert table["bits"].tolist() == [12, 12]
    plain, turned = (pydicom.dcmread(f"out/{name}.dcm") for name in "ab")
    np.testing.assert_array_equal(turned.pixel_array, 4095 - plain.pixel_array)
    assert (turned.PatientID, turned.PhotometricInterpretation) == ("P7", "MONOCHROME1")
    assert plain.SeriesInstanceUID == turned.SeriesInstanceUID != pydicom.dcmread(inverted).SeriesInstanceUID
    assert plain.SOPInstanceUID != turned.SOPInstanceUID


# --- where it is written ---------------------------------------------------------------------------------------------


def test_the_tree_below_several_folders_is_kept(restored):
    for name in ("a/x/1-1.dcm", "b/x/1-1.dcm", "b/2.png"):
        dcm(name) if name.endswith("dcm") else png(name)
    table = restored("a b --out out")
    assert written(Path("out")) == sorted(["a/x/1-1.dcm", "b/x/1-1.dcm", "b/2.png", *RECORDS])
    assert table["path"].tolist() == table["output"].tolist() == ["a/x/1-1.dcm", "b/2.png", "b/x/1-1.dcm"]


def test_one_folder_is_not_named_again(restored):
    dcm("data/a/x/1-1.dcm")
    dcm("data/b/x/1-1.dcm")
    restored("data --out out")
    assert written(Path("out")) == sorted(["a/x/1-1.dcm", "b/x/1-1.dcm", *RECORDS])


def test_files_folders_and_both_at_once(restored):
    for name in ("a/1.png", "a/2.png", "a/b/3.png"):
        png(name)
    restored("a/1.png --out one")
    assert written(Path("one")) == sorted(["1.png", *RECORDS])
    table = restored("a/../a/1.png a/b a/1.png --out both")
    assert written(Path("both")) == sorted(["1.png", "b/3.png", *RECORDS]) and len(table) == 2


def test_a_folder_that_is_a_link_keeps_its_tree_and_a_file_that_is_one_its_name(restored):
    for name in ("store/deep/a/1-1.dcm", "store/deep/b/1-1.dcm"):
        dcm(name)
    png("blobs/7f3a.png")
    Path("data").symlink_to("store/deep")
    Path("store/deep/named.png").symlink_to(Path("blobs/7f3a.png").resolve())
    restored("data --out out")
    assert written(Path("out")) == sorted(["a/1-1.dcm", "b/1-1.dcm", "named.png", *RECORDS])


def test_names_that_would_meet_keep_their_suffix(restored):
    png("in/x.png")
    Image.fromarray(np.rint(noisy() * 255).astype(np.uint8)).save("in/x.jpg")
    Image.fromarray(np.rint(noisy() * 255).astype(np.uint8)).save("in/x.tif")
    Image.fromarray(np.rint(noisy() * 255).astype(np.uint8)).save("in/y.tif")
    dcm("in/x.dcm")
    dcm("in/1.2.840.7")
    table = restored("in --out out --compare")
    images = {"x.png": "x.png", "x.jpg": "x.jpg.png", "x.tif": "x.tif.png", "y.tif": "y.png", "x.dcm": "x.dcm",
              "1.2.840.7": "1.2.840.7.dcm"}  # fmt: skip
    assert dict(table[["path", "output"]].values.tolist()) == images
    pictures = [f"{name.removesuffix('.png')}.compare.png" for name in images.values()]
    assert written(Path("out")) == sorted([*images.values(), *pictures, *RECORDS])
    assert all(is_restored(Path("out") / name) for name in images.values())


def test_output_inside_the_input_is_no_input_of_the_next_run(restored):
    png("in/a.png")
    png("in/b/c.png")
    for _ in range(2):
        table = restored("in --out in/out --compare")
        assert table["path"].tolist() == ["a.png", "b/c.png"]
    names = ["a.png", "a.compare.png", "b/c.png", "b/c.compare.png", *RECORDS]
    assert written(Path("in/out")) == sorted(names)


def test_names_that_are_not_unicode(restored):
    png("in/a.png")
    Path("in/a.png").rename(os.fsdecode(b"in/caf\xe9.png"))
    table = restored("in --out out")
    assert table["path"].tolist() == ["caf\ufffd.png"] and Path("out", os.fsdecode(b"caf\xe9.png")).exists()


def line_of(result, code=2):
    """The one line on stderr of a call that was refused."""
    assert result.code == code and result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    return result.err


def test_inputs_are_never_overwritten(restore):
    png("in/a.png")
    png("in/b/c.png")
    png("other/a.png", 1 - noisy())
    Path("alias").symlink_to("in")
    Path("linked").mkdir()
    Path("linked/a.png").symlink_to(Path("in/a.png").resolve())
    before = contents(".")
    assert "holds the input folder in" in line_of(restore("in --out in"))
    assert "holds the input folder in" in line_of(restore("in --out alias"))
    assert "a.png is an input and is not overwritten" in line_of(restore("in/a.png --out in"))
    assert "a.png is an input and is not overwritten" in line_of(restore("in/a.png --out alias"))
    assert "a.png is an input and is not overwritten" in line_of(restore("in/a.png --out linked"))
    assert "in/b/c.png is an input and is not overwritten" in line_of(restore("in/b/c.png --out in/b"))
    assert contents(".") == before


def test_files_of_others_are_never_overwritten(restore, restored):
    png("in/a.png")
    png("copy/a.png")
    png("compared/a.compare.png")
    png("in2/x.png")
    png("in2/x.compare.png")
    png("in2/x.sample-02.png")
    png("sampled/a.sample-02.png")
    Path("measured").mkdir()
    Path("measured/metrics.csv").write_text("another evaluation's")
    before = contents(".")
    assert "copy/a.png is no restored image and is not overwritten" in line_of(restore("in --out copy"))
    assert "a.compare.png is no restored image" in line_of(restore("in --out compared --compare"))
    assert "measured/metrics.csv is not of this script's making" in line_of(restore("in --out measured"))
    assert "x.compare.png, as in2/x.compare.png; restore them" in line_of(restore("in2 --out out --compare"))
    assert "a.sample-02.png is no restored image" in line_of(restore("in --out sampled --samples 2"))
    assert "out/x.sample-02.png, as in2/x.png; restore them" in line_of(restore("in2 --out out --samples 2"))
    assert contents(".") == before
    restored("in2 --out out")


def test_two_files_that_would_become_one_are_refused(restore):
    png("in/x.png")
    Image.fromarray(np.rint(noisy() * 255).astype(np.uint8)).save("in/x.jpg")
    png("in/x.jpg.png")
    assert "in/x.jpg.png: would be written to out/x.jpg.png, as in/x.jpg" in line_of(restore("in --out out"))
    assert not Path("out").exists()


# --- how it is restored ----------------------------------------------------------------------------------------------


def test_a_restored_image_depends_on_seed_and_file_alone(restored):
    png("in/a.png", bits=16)
    dcm("in/b.dcm")
    png("apart/c.png", bits=16)
    flags = "--sample --steps 2 --noise-level 0.2"
    for line in (
        f"in --out 1 {flags}",
        f"in --out 2 {flags}",
        f"apart --out 3 {flags}",
        f"in --out 4 {flags} --seed 1",
    ):
        restored(line)
    first, again, apart, other = (contents(str(i)) for i in (1, 2, 3, 4))
    assert first["a.png"] == again["a.png"] == apart["c.png"] and first["b.dcm"] == again["b.dcm"]
    for name in ("a.png", "b.dcm"):
        images = [read_image(Path(folder) / name) for folder in "14"]
        assert not np.array_equal(*images)
    assert first["restore.csv"] == again["restore.csv"]


def test_noise_level_0_leaves_every_value_as_it_was(restored):
    png("in/a.png", bits=8)
    png("in/b.png", bits=16)
    values = np.rint(noisy() * 4095).clip(1).astype(np.uint16)
    values[:16] = 0
    dicom_file(Path("in/c.dcm"), values, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0)
    table = restored("in --out out --noise-level 0")
    for name in ("a.png", "b.png"):
        with Image.open(f"in/{name}") as before, Image.open(f"out/{name}") as after:
            assert before.mode == after.mode
            np.testing.assert_array_equal(np.asarray(before), np.asarray(after))
    np.testing.assert_array_equal(*(pydicom.dcmread(f"{folder}/c.dcm").pixel_array for folder in ("in", "out")))
    assert table["strength"].tolist() == [0, 0, 0] and table["level"].tolist() == [0, 0, 0]


def test_the_noise_is_estimated_given_or_that_of_the_training(restored, restore):
    png("in/a.png", noisy(160, 120, level=0.3), bits=16)
    tables = {word: restored(f"in --out {word} --noise-level {word}") for word in ("auto", "0.3", "0.05", "trained")}
    default = restored("in --out default")
    assert default.equals(tables["auto"]) and contents("default")["a.png"] == contents("auto")["a.png"]
    level = {word: table["level"][0] for word, table in tables.items()}
    assert level["auto"] == pytest.approx(0.3, rel=0.35) and level["0.3"] == pytest.approx(0.3, abs=1e-6)
    assert level["0.05"] == pytest.approx(0.05, abs=1e-6) and np.isnan(level["trained"])
    assert tables["0.3"]["quanta"][0] == pytest.approx(1000 / 0.3) and tables["0.3"]["sigma"][0] == pytest.approx(0.015)
    factor = {word: table["factor"][0] for word, table in tables.items()}
    assert factor["0.3"] < 1 == factor["trained"] < factor["0.05"]
    images = {word: read_image(Path(word) / "a.png") for word in tables}
    moved = {word: float(np.abs(image - read_image(Path("in/a.png"))).mean()) for word, image in images.items()}
    assert 0 < moved["0.05"] < moved["0.3"] and moved["trained"] > 0
    said = {word: Image.open(f"{word}/a.png").info["Description"] for word in tables}
    assert "noise estimated as" in said["auto"] and "noise given as" in said["0.3"]
    assert "noise" not in said["trained"].replace("noise level", "")
    assert "as trained" in restore("in --out trained --noise-level trained").out


def description(path):
    """What a restored file says of how it was made."""
    if path.suffix == ".dcm":
        return pydicom.dcmread(path, stop_before_pixels=True).DerivationDescription
    return Image.open(path).info["Description"]


def sampling_of(sampler, steps):
    return {"sampler": sampler, "steps": steps, "eta": 0.0, "spacing": "leading"}


def test_what_is_made_is_named_everywhere(restored, restore):
    png("in/a.png", bits=16)
    made = {
        "mean": ("", "posterior mean", None),
        "sample": ("--sample", "posterior sample, DDIM 3", sampling_of("ddim", 3)),  # steps of the checkpoint
        "longer": ("--sample --steps 4", "posterior sample, DDIM 4", sampling_of("ddim", 4)),
        "fast": ("--sample --sampler dpm++", "posterior sample, DPM-Solver++ 2", sampling_of("dpm++", 2)),
        "samples": ("--samples 2", "mean of 2 posterior samples, DPM-Solver++ 2", sampling_of("dpm++", 2)),
        "both": ("--samples 3 --sampler ddim --steps 4", "mean of 3 posterior samples, DDIM 4", sampling_of("ddim", 4)),
    }
    for out, (flags, product, sampling) in made.items():
        table = restored(f"in --out {out} --noise-level trained {flags}")
        assert table["product"].tolist() == [product]
        assert f"; {product}; seed 0; research use only" in description(Path(out) / "a.png")
        run = json.loads(Path(out, "restore.json").read_text())
        assert (run["product"], run["sampling"]) == (product, sampling)
        assert restore(f"in --out {out} --noise-level trained {flags}").out.endswith(f"into {out}: {product}\n")
    images = {out: read_image(Path(out) / "a.png") for out in made}
    assert len({image.tobytes() for image in images.values()}) == len(made)
    assert "--steps 1001: the model has 1000 timesteps" in line_of(restore("in --out x --sample --steps 1001"))
    refused = line_of(restore("in --out x --samples 2 --steps 400"))
    assert "--steps 400: DPM-Solver++ has no 400 different timesteps" in refused and not Path("x").exists()


MAPS = ("high", "low", "std", "std-32x32", "std-8x8", "uncertainty")


def beside(name, samples, *kinds):
    """What stands beside a restored image of this name."""
    path = Path(name)
    names = [f"{path.stem}.sample-{number:02d}{path.suffix}" for number in range(1, samples + 1)]
    return names + [f"{name.removesuffix('.png')}.{kind}.png" for kind in kinds]


def test_samples_are_files_beside_their_mean_and_their_spread_is_mapped(restored, restore):
    png("in/a.png", bits=16)
    dcm("in/b.dcm", SeriesInstanceUID="1.2.9")
    flags = "--noise-level 0.2 --samples 3"
    table = restored(f"in --out out {flags}")
    names = [name for image in ("a.png", "b.dcm") for name in (image, *beside(image, 3, *MAPS))]
    assert written(Path("out")) == sorted([*names, *RECORDS])
    assert table["output"].tolist() == ["a.png", "b.dcm"]  # a row an image
    for name, bits in (("a.png", 16), ("b.dcm", 12)):
        samples = np.stack([read_image(Path("out") / other) for other in beside(name, 3)]).astype(np.float64)
        rounding = 0.5 / (2**bits - 1)
        np.testing.assert_allclose(read_image(Path("out") / name), samples.mean(0), rtol=0, atol=2.001 * rounding)
        assert min(np.abs(samples[i] - samples[i - 1]).max() for i in range(3)) > 1e-3
        maps = {kind: np.asarray(Image.open(f"out/{name.removesuffix('.png')}.{kind}.png")) for kind in MAPS[:-1]}
        assert {values.dtype for values in maps.values()} == {np.dtype(np.uint16)}
        # one more sample lies so far from the mean of three
        scale, reach = math.sqrt(1 + 1 / 3), stats.t.ppf(0.95, 2)
        for kind, side, shape in (("std", 1, (80, 70)), ("std-8x8", 8, (10, 8)), ("std-32x32", 32, (2, 2))):
            std = scale * region_means(samples, side).std(0, ddof=1, dtype=np.float64)
            assert maps[kind].shape == std.shape == shape
            slack = scale * 1.5**0.5 * rounding + 0.5 / 655350  # of three roundings, and of the map's
            np.testing.assert_allclose(maps[kind] / 655350, std, rtol=0, atol=1.01 * slack)
        std = scale * samples.std(0, ddof=1)
        for kind, sign in (("low", -1), ("high", 1)):
            expected = (samples.mean(0) + sign * reach * std).clip(0, 1)
            np.testing.assert_allclose(maps[kind] / 65535, expected, rtol=0, atol=(2 + 2 * reach) * rounding)
    # so does every file that says what it is
    assert description(Path("out/a.std-8x8.png")).startswith(
        "expected error of means over 8 x 8 pixels, one a pixel of "
    )
    assert "; not calibrated; " in description(Path("out/a.low.png"))
    said = [description(Path("out") / name) for name in beside("b.dcm", 3)]
    for number, text in enumerate(said, 1):
        assert f"; posterior sample number {number} of 3, DPM-Solver++ 2; seed 0; " in text
    out = restore(f"in --out again {flags}").out
    assert "the expected error and the interval are not calibrated: no uncertainty.json beside" in out
    assert {name: contents("again")[name] for name in names} == {name: contents("out")[name] for name in names}


def test_dicom_samples_are_instances_of_one_new_series(restored):
    dcm("in/b.dcm", PatientID="P7", SeriesInstanceUID="1.2.9")
    restored("in --out out --noise-level 0.2 --samples 3")
    source = pydicom.dcmread("in/b.dcm")
    files = [pydicom.dcmread(Path("out") / name) for name in ("b.dcm", *beside("b.dcm", 3))]
    assert len({file.SOPInstanceUID for file in (source, *files)}) == 5
    assert {file.SeriesInstanceUID for file in files} == {files[0].SeriesInstanceUID} != {source.SeriesInstanceUID}
    assert {
        (file.PatientID, file.BitsStored, file.SourceImageSequence[0].ReferencedSOPInstanceUID) for file in files
    } == {("P7", 12, source.SOPInstanceUID)}
    assert all(file.SOPInstanceUID == file.file_meta.MediaStorageSOPInstanceUID for file in files)
    # the mean alone is another series
    restored("in --out mean --noise-level 0.2")
    assert pydicom.dcmread("mean/b.dcm").SeriesInstanceUID not in (files[0].SeriesInstanceUID, source.SeriesInstanceUID)


def test_the_first_of_many_samples_is_the_one_of_sample(restored):
    png("in/a.png", bits=16)
    restored("in --out one --sample --noise-level 0.2")
    restored("in --out many --samples 2 --sampler ddim --noise-level 0.2")
    first, second = (read_image(Path("many") / name) for name in beside("a.png", 2))
    one = read_image(Path("one/a.png"))
    np.testing.assert_array_equal(one, first)
    assert np.abs(one - second).max() > 5e-3


def test_a_calibration_widens_the_spread_by_its_factor(restored):
    png("in/a.png", bits=16)
    Calibration([0.1, 0.4], [1.0, 3.0], {}).to_json(Path("c.json"))
    restored("in --out plain --noise-level 0.2 --samples 2")
    restored("in --out wide --noise-level 0.2 --samples 2 --calibration c.json")
    for kind in ("std", "std-8x8"):
        plain, wide = (np.asarray(Image.open(f"{out}/a.{kind}.png")).astype(float) for out in ("plain", "wide"))
        assert plain.max() > 100
        np.testing.assert_allclose(wide, (2 * plain).clip(max=65535), atol=1.6)  # half way, on a logarithmic scale
    assert "; calibrated by a factor of 2.000; " in description(Path("wide/a.std.png"))
    assert contents("plain")["a.png"] == contents("wide")["a.png"]


def test_noise_that_is_not_seen_has_no_samples_and_no_maps(restored, restore):
    png("in/a.png", bits=16)
    restored("in --out out --samples 2")
    png("in/a.png", np.full((96, 96), 0.4), bits=16)
    result = restore("in --out out --samples 2")
    assert "1 image shows no noise to tell an expected error from: no samples and no maps are written" in result.out
    assert written(Path("out")) == ["a.png", *RECORDS]
    restored("in --out out --samples 2 --noise-level 0")  # who says that there is none is believed
    assert written(Path("out")) == sorted(["a.png", *beside("a.png", 2, *MAPS), *RECORDS])
    assert np.asarray(Image.open("out/a.std.png")).max() == 0


def test_tiles_of_any_side(restored):
    png("in/a.png", noisy(151, 97), bits=16)
    tables = {side: restored(f"in --out {side} --noise-level trained --tile {side}") for side in (16, 50, 256, 9999)}
    images = {side: read_image(Path(str(side)) / "a.png") for side in tables}
    np.testing.assert_array_equal(images[256], images[9999])  # one tile
    inside = breast_mask(torch.from_numpy(images[256])[None])[0].numpy()
    for side in (16, 50):
        apart = np.abs(images[side] - images[256])[inside]
        assert 0 < apart.mean() < 0.05


def test_degrade_measures_the_restored_image_beside_its_input(restored, restore):
    clean = generate_phantom(5, 0, (1, 80, 70)).image[0].numpy()
    png("in/a.png", clean, bits=16)
    png("in/b.png", noisy(90, 60, level=0), bits=8)
    table = restored("in --out out --degrade 0.4")
    assert table["level"].tolist() == pytest.approx([0.4, 0.4], abs=1e-6)  # known, not estimated
    rows = pd.read_csv("out/metrics.csv")
    assert rows["path"].tolist() == ["a.png", "b.png"]
    figures = json.loads(Path("out/metrics.json").read_text())
    assert (
        figures["images"] == 2
        and figures["noise_level"] == 0.4
        and list(figures["methods"]) == ["low dose", "posterior mean"]
    )
    reference = read_image(Path("in/a.png"))
    mask = breast_mask(torch.from_numpy(reference)[None])
    own = image_metrics(torch.from_numpy(read_image(Path("out/a.png")))[None], torch.from_numpy(reference)[None], mask)
    assert rows["posterior mean psnr"][0] == pytest.approx(own.psnr, abs=0.01)
    assert rows["posterior mean psnr_breast"][0] == pytest.approx(own.psnr_breast, abs=0.01)
    # Var = x / 2500 + 0.02 ** 2
    variance = float(torch.from_numpy(reference)[mask[0]].mean()) / 2500 + 4e-4
    assert rows["low dose psnr_breast"][0] == pytest.approx(-10 * np.log10(variance), abs=0.4)
    row = figures["methods"]["posterior mean"]
    assert row["psnr"] == pytest.approx(rows["posterior mean psnr"].mean())
    assert row["psnr_gain"] == pytest.approx(row["psnr"] - rows["low dose psnr"].mean())
    out = restore("in --out out --degrade 0.4").out
    assert Path("out/table.txt").read_text().strip() in out and "low dose of noise level 0.4 simulated" in out
    first = contents("out")
    restored("in --out out --degrade 0.4 --seed 1")
    assert pd.read_csv("out/metrics.csv")["low dose psnr"][0] != rows["low dose psnr"][0]  # another draw of the noise
    restored("in --out out --degrade 0.4")
    assert contents("out")["metrics.csv"] == first["metrics.csv"]
    assert "from a simulated low dose of noise level 0.4" in Image.open("out/a.png").info["Description"]


def test_degrade_measures_the_mean_of_samples_and_one_of_them(restored, restore):
    png("in/a.png", generate_phantom(5, 0, (1, 80, 70)).image[0].numpy(), bits=16)
    out = restore("in --out out --degrade 0.4 --samples 2 --compare").out
    methods = ["low dose", "mean of 2 posterior samples, DPM-Solver++ 2", "posterior sample, DPM-Solver++ 2"]
    figures = json.loads(Path("out/metrics.json").read_text())["methods"]
    assert list(figures) == methods
    reference = torch.from_numpy(read_image(Path("in/a.png")))[None]
    for method, name in zip(methods[1:], ("a.png", "a.sample-01.png"), strict=True):
        own = image_metrics(torch.from_numpy(read_image(Path("out") / name))[None], reference, breast_mask(reference))
        assert figures[method]["psnr_breast"] == pytest.approx(own.psnr_breast, abs=0.01)
        low, line = figures["low dose"]["psnr_breast"], next(v for v in out.splitlines() if v.startswith(method))
        assert f"{own.psnr_breast:.2f} ({low:.2f})" in line
    assert restored("in --out one --degrade 0.4 --sample")["product"][0] == "posterior sample, DDIM 3"
    assert list(json.loads(Path("one/metrics.json").read_text())["methods"]) == ["low dose", "posterior sample, DDIM 3"]


def test_degrade_with_a_noise_level_of_its_own(restored):
    png("in/a.png", noisy(160, 120, level=0), bits=16)
    assert restored("in --out auto --degrade 0.4 --noise-level auto")["level"][0] == pytest.approx(0.4, rel=0.35)
    assert restored("in --out given --degrade 0.4 --noise-level 0.1")["level"][0] == pytest.approx(0.1, abs=1e-6)
    restored("in --out none --degrade 0")
    assert contents("none")["a.png"] and np.array_equal(read_image(Path("none/a.png")), read_image(Path("in/a.png")))


def test_compare_shows_input_and_output_side_by_side(restored):
    png("in/a.png", noisy(64, 256))
    restored("in --out plain --compare")
    restored("in --out degraded --compare --degrade 0.3")
    widths = []
    for out in ("plain", "degraded"):
        with Image.open(f"{out}/a.compare.png") as picture:
            picture.load()
            assert picture.mode == "RGB"
            widths.append(picture.width)
            # the first column is the input, whole, or with --degrade what it was
            column = np.asarray(picture)[34 : 34 + 64, 6 : 6 + 256, 0]
        expected = np.rint(read_image(Path("in/a.png")) * 255)
        assert (column == expected).mean() > 0.95
    assert widths == [3 * 262 + 6, 5 * 262 + 6]


def test_what_an_earlier_run_left_beside_an_image_goes_where_this_one_makes_none(restored):
    png("in/a.png")
    dcm("in/d.dcm")
    restored("in --out out --compare --degrade 0.3 --samples 3")
    both = [name for image in ("a.png", "d.dcm") for name in (image, *beside(image, 3, "compare", *MAPS))]
    assert written(Path("out")) == sorted([*both, "metrics.csv", "metrics.json", "table.txt", *RECORDS])
    png("out/b.low.png")
    restored("in --out out --samples 2")
    fewer = [name for image in ("a.png", "d.dcm") for name in (image, *beside(image, 2, *MAPS))]
    assert written(Path("out")) == sorted([*fewer, "b.low.png", *RECORDS])
    restored("in --out out --sample")
    assert written(Path("out")) == sorted(["a.png", "b.low.png", "d.dcm", *RECORDS])
    # images that are called like what this script writes stay, its own and those of others
    named = ["a.compare.png", "a.std.png", "a.std-8x8.png", "a.sample-01.png"]
    for name in (*(f"in/{name}" for name in named), "out/a.low.png", "out/a.sample-02.png"):
        png(name)
    dcm("in/d.sample-02.dcm")
    for flags in ("", "", "--sample"):
        restored(f"in --out out {flags}")
        assert written(Path("out")) == sorted(
            ["a.png", *named, "a.low.png", "a.sample-02.png", "d.dcm", "d.sample-02.dcm", "b.low.png", *RECORDS]
        )


def test_pictures_beside_restored_images_are_no_inputs(restore):
    png("in/a.png")
    assert restore("in --out in/earlier --compare --samples 2").code == 0
    png("in/b.png")
    result = restore("in --out out")
    assert (result.code, result.err) == (0, "") and "10 restored images in it are passed over" in result.out
    assert written(Path("out")) == ["a.png", "b.png", *RECORDS]


def test_resize_changes_nothing_outside_of_the_breast_s_box(restored):
    values = np.pad(noisy(100, 60), ((30, 25), (0, 50)), constant_values=0.01)
    png("in/a.png", values, bits=16)
    restored("in --out out --resize --noise-level 0.2")
    before, after = read_image(Path("in/a.png")), read_image(Path("out/a.png"))
    grid = Grid.fit(before, breast_mask(torch.from_numpy(before)[None])[0].numpy(), (64, 48))
    top, left, bottom, right = grid.box
    outside = np.ones(before.shape, dtype=bool)
    outside[top:bottom, left:right] = False
    assert 0.1 < outside.mean() < 0.9
    np.testing.assert_array_equal(before[outside], after[outside])
    assert np.abs(before - after)[~outside].mean() > 0.002
    assert "on a grid of 48 x 64" in Image.open("out/a.png").info["Description"]


@pytest.mark.parametrize("value", [0, 100, 255])
@pytest.mark.parametrize("flags", ["", "--resize", "--degrade 0.2 --compare", "--noise-level trained"])
def test_images_without_anything_in_them_go_through(value, flags, restored):
    png("in/a.png", np.full((48, 50), value / 255))
    table = restored(f"in --out out {flags}")
    assert read_image(Path("out/a.png")).shape == (48, 50)
    if not flags:  # no noise to be found, nothing to be done
        assert table["strength"][0] == 0 and (read_image(Path("out/a.png")) == np.float32(value / 255)).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def broken_files(folder):
    """Files that cannot be restored, and what is said of each."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "whole.jpg").unlink()
    cut = dcm(folder / "cut.dcm")
    cut.write_bytes(cut.read_bytes()[:5000])
    packed = pydicom.dcmread(dcm(folder / "packed.dcm"))
    packed.PixelData, packed.file_meta.TransferSyntaxUID = encapsulate([b"\xff\xd8"]), JPEGLosslessSV1
    packed["PixelData"].is_undefined_length = True
    packed.save_as(folder / "packed.dcm")
    dcm(folder / "frames.dcm", NumberOfFrames=2)
    dcm(folder / "no-pixels.dcm", without=["PixelData"])
    Image.new("RGB", (64, 64), (200, 90, 10)).save(folder / "photo.jpg")
    for name in ("empty.png", "empty.dcm"):
        (folder / name).touch()
    (folder / "text.png").write_text("no image")
    png(folder / "thin.png", noisy(15, 200))
    return {
        "cut.jpg": "not a readable image", "cut.dcm": "not a readable image", "packed.dcm": "pip install pylibjpeg",
        "frames.dcm": "a multi-frame or colour DICOM", "no-pixels.dcm": "without pixel data",
        "photo.jpg": "a colour image", "empty.png": "the file is empty", "empty.dcm": "the file is empty",
        "text.png": "not a readable image", "thin.png": "200 x 15 pixels are too few",
    }  # fmt: skip


def test_a_bad_file_alone_is_one_line_and_exit_status_2(restore):
    for name, sentence in broken_files("in").items():
        err = line_of(restore(f"in/{name} --out out"))
        assert err.startswith(f"error: in/{name}: ") and sentence in err
        assert written(Path("out")) == []


def test_a_batch_goes_on_past_bad_files_and_names_them_at_the_end(restore):
    bad = broken_files("in")
    dcm("in/a/1-1.dcm")
    png("in/z.png")
    result = restore("in --out out --degrade 0.2 --compare")
    assert result.code == 1 and "2 images restored into out" in result.out
    lines = result.err.splitlines()
    assert len(lines) == len(bad)
    for line, name in zip(lines, sorted(bad), strict=True):
        assert line.startswith(f"error: in/{name}: ") and bad[name] in line
    tables = ["metrics.csv", "metrics.json", "table.txt"]
    restored = ["a/1-1.dcm", "a/1-1.dcm.compare.png", "z.png", "z.compare.png"]
    assert written(Path("out")) == sorted([*restored, *tables, *RECORDS])
    assert [f"error: {line}" for line in json.loads(Path("out/restore.json").read_text())["failures"]] == lines


def test_a_batch_without_a_good_file_writes_nothing(restore):
    bad = broken_files("in")
    Path("empty").mkdir()
    for out in ("new/deep/out", "empty"):
        result = restore(f"in --out {out}")
        assert result.code == 2 and len(result.err.splitlines()) == len(bad)
        assert all(line.startswith("error: in/") for line in result.err.splitlines())
    assert not Path("new").exists() and list(Path("empty").iterdir()) == []


def test_an_end_that_nobody_hears_keeps_its_status(vqvae, diffusion):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / "main-restore.py", "missing", "--out", "out"]
    done = subprocess.run(command, stdout=writer, stderr=writer, timeout=300, check=False)
    os.close(writer)
    assert done.returncode == 2


def test_bad_input_reaches_the_shell_without_a_traceback(vqvae, diffusion):
    broken_files("in")
    models = f"--vqvae-path {vqvae} --load-path {diffusion}"
    assert "in/cut.dcm: not a readable image" in line_of(shell("main-restore", f"in/cut.dcm --out out {models}"))


BAD_CALLS = """
missing.png --out out | missing.png: no such file or folder
empty --out out | empty: no images in it
broken.png --out out | broken.png: no such file or folder
in {long} --out out | cannot be looked at (File name too long)
in/a.png --out in/a.png | --out in/a.png: cannot be made
in --out in/a.png/below | --out in/a.png/below: cannot be made
in --out {long} | (File name too long)
in --out out --noise-level nan | argument --noise-level: must be auto, trained, 0 or a number from 1e-06 to 1000
in --out out --noise-level -1 | argument --noise-level
in --out out --noise-level=-0.1 | argument --noise-level: must be auto, trained, 0 or
in --out out --noise-level inf | argument --noise-level: must be
in --out out --noise-level 1e300 | argument --noise-level: must be
in --out out --noise-level 1e-300 | argument --noise-level: must be
in --out out --noise-level often | argument --noise-level: must be
in --out out --degrade nan | argument --degrade: must be 0 or a number
in --out out --degrade=-1 | argument --degrade: must be 0 or a number
in --out out --degrade auto | argument --degrade: must be 0 or a number
in --out out --degrade 1e300 | argument --degrade: must be 0 or a number
in --out out --tile 0 | argument --tile: must be a whole number of at least 1
in --out out --tile 15 | --tile 15: this model takes tiles of at least 16 pixels a side; pass more
in --out out --tile wide | argument --tile: must be
in --out out --steps 0 | argument --steps: must be
in --out out --steps -3 | argument --steps
in --out out --steps 2.5 | argument --steps: must be
in --out out --samples 0 | argument --samples: must be
in --out out --samples nan | argument --samples: must be
in --out out --samples 1 | argument --samples: must be at least 2, for their spread; --sample makes one
in --out out --samples 2 --sample | argument --sample: not allowed with argument --samples
in --out out --sampler ddim | --sampler goes with --sample or --samples
in --out out --steps 3 | --steps goes with --sample or --samples
in --out out --sample --sampler euler | argument --sampler: invalid choice: 'euler'
in --out out --views 2 | unrecognized arguments: --views 2
in --out out --sample --calibration x | --calibration goes with --samples
in --out out --samples 2 --calibration missing.json | missing.json: cannot be read
in --out out --seed -1 | argument --seed
in --out out --colour | unrecognized arguments: --colour
in | the following arguments are required: --out
--out out | the following arguments are required: INPUT
in --out out --vqvae-path missing.pt | missing.pt: no such checkpoint
in --out out --load-path missing.pt | missing.pt: no such checkpoint
in --out out --vqvae-path in/a.png | in/a.png: not a readable checkpoint
in --out out --vqvae-path {diffusion} | {diffusion}: a checkpoint of main-diffusion.py (stage 2)
in --out out --load-path {vqvae} | {vqvae}: a checkpoint of main-vqvae.py (stage 1)
in --out out --vqvae-path {diffusion} --load-path {vqvae} | {diffusion}: a checkpoint of main-diffusion.py (stage 2)
in --out out --vqvae-path {other} | {diffusion} was trained on another VQ-VAE-2
"""


@pytest.mark.parametrize("case", BAD_CALLS.split("\n")[1:-1])
def test_a_wrong_call_gives_one_clear_line_and_writes_nothing(case, restore, vqvae, diffusion, other_vqvae):
    png("in/a.png")
    Path("empty").mkdir()
    Path("broken.png").symlink_to("nowhere")
    line, sentence = (
        part.format(vqvae=vqvae, diffusion=diffusion, other=other_vqvae, long="x" * 300) for part in case.split(" | ")
    )
    assert sentence in line_of(restore(line))
    assert written(Path()) == ["in/a.png"] and not Path("out").exists()


def test_a_folder_that_may_not_be_written_to_is_refused_first(restore, monkeypatch):
    png("in/a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "--out out: may not be written to" in line_of(restore("in --out out"))


def test_a_target_that_cannot_be_written_fails_alone(restore):
    png("in/a.png")
    png("in/b/c.png")
    Path("out").mkdir()
    Path("out/b").touch()
    result = restore("in --out out")
    assert "out/b/c.png: cannot be written" in line_of(result, code=1)
    assert written(Path("out")) == sorted(["a.png", "b", *RECORDS])


def test_short_memory_is_a_sentence(vqvae, diffusion, tmp_path, monkeypatch):
    def allocate(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 41235251200 bytes.")

    monkeypatch.setattr("restoration.restorer.Restorer.restore", allocate)
    Image.new("L", (64, 64), 90).save(tmp_path / "a\nb.png")
    line = (
        f"--vqvae-path {vqvae} --load-path {diffusion} '{tmp_path}/a\nb.png' --out {tmp_path / 'out'} --noise-level 0.2"
    )
    result = call("main-restore", line)
    assert result.code == 2
    assert result.err == f"error: {tmp_path}/a\\nb.png: not enough memory for its tiles; pass a smaller --tile\n"


def test_half_precision_is_for_cuda_and_can_be_turned_off():
    cpu, cuda = map(torch.device, ("cpu", "cuda"))
    assert (
        sampling_dtype(cuda, False, no_amp=False) is torch.float16 and sampling_dtype(cuda, False, no_amp=True) is None
    )
    assert (
        sampling_dtype(cpu, False, no_amp=False) is None and sampling_dtype(cpu, True, no_amp=False) is torch.bfloat16
    )
