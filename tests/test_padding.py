"""Padding of DICOM images, values past the bits stored, and what is said of them."""

import re

import numpy as np
import pydicom
import pytest
from PIL import Image

from datasets import get_datasets
from files.dicom import OVERLAY
from files.images import read_image, read_mammogram
from files.padding import IN_THE_IMAGE, LEFT_OVER
from helper import remark_lines
from hps import HPS_VQVAE
from scripts import call
from test_images import RAW, dicom_file, restored

SHAPE = 160, 120


def noisy_breast(offset=500):
    """A half disc of tissue in air (160, 120), 12 bits, white noise in both; and where the air is."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    air = np.hypot(y - 80, x) > 70
    noise = np.random.default_rng(0).normal(0, 35, SHAPE)
    return np.rint(np.where(air, offset, 2000) + noise).clip(0, 4095).astype(np.uint16), air


IMAGE, AIR = noisy_breast()
DARK, _ = noisy_breast(offset=0)  # half of its air is cut off at 0
BORDER = np.pad(np.zeros((130, 100), bool), ((20, 10), (0, 20)), constant_values=True)
FILLED = np.where(AIR, 0, IMAGE)


def padded_file(path, values, value, limit=None, **tags):
    """A DICOM file whose padding stands in elements of the sign that their values have."""
    dicom_file(path, values, **tags)
    dataset = pydicom.dcmread(path)
    for name, number in (("PixelPaddingValue", value), ("PixelPaddingRangeLimit", limit)):
        if number is not None:
            dataset.add_new(name, "SS" if number < 0 else "US", number)
    dataset.save_as(path)
    return path


EIGHT = {"bits": 8, "allocated": 8}
TISSUE = int(np.median(IMAGE[~AIR]))
# The stored values, value and limit of the padding, other tags, and where padding is.
HELD = {
    "noise in a range": (IMAGE, 0, 658, {}, None),
    "noise in a range, signed": (IMAGE.astype(int) - 2048, -2048, 658 - 2048, {}, None),
    "noise in a range, 16 bits": (IMAGE * 16, 0, 658 * 16, {"bits": 16}, None),
    "noise in a range, MONOCHROME1": (4095 - IMAGE, 4095, 4095 - 658, {"PhotometricInterpretation": "MONOCHROME1"}, None),
    "noise in a range, raw": (4095 - IMAGE, 4095, 4095 - 658, RAW, None),
    "noise in 8 bits": (IMAGE // 16, 0, 41, EIGHT, None),
    "noise cut off at the value": (DARK, 0, None, {}, None),
    "noise and a border": (np.where(BORDER, 0, IMAGE), 0, 658, {}, BORDER),
    "noise and a border of a value in it": (np.where(BORDER, 500, IMAGE), 500, 510, {}, BORDER),
    "a value in the tissue alone": (IMAGE, TISSUE, None, {}, None),
    "a value in the tissue and a filling": (np.where(AIR, TISSUE, IMAGE), TISSUE, None, {}, AIR),
    "a filling": (FILLED, 0, None, {}, AIR),
    "a filling in a small range": (FILLED, 0, 10, {}, AIR),
    "a filling of white": (np.where(AIR, 4095, IMAGE), 4095, None, {}, AIR),
    "a filling past the bits": (np.where(AIR, 65535, IMAGE), 65535, None, {}, AIR),
    "a filling past the bits, signed": (
        np.where(AIR, -32768, IMAGE.astype(int)), -32768, None, {"PixelRepresentation": 1, "bits": 13}, AIR),
    "a border of a raw image": (np.where(BORDER, 0, IMAGE), 0, None, RAW, BORDER),
}  # fmt: skip


@pytest.mark.parametrize("kind", HELD)
def test_padding_is_a_filling_and_neither_noise_nor_tissue(kind, tmp_path):
    values, value, limit, tags, expected = HELD[kind]
    path = padded_file(tmp_path / "a.dcm", values, value, limit, **tags)
    mammogram = read_mammogram(path)
    if expected is None:
        assert mammogram.padding is None
        plain = read_mammogram(dicom_file(tmp_path / "b.dcm", values, **tags))
        np.testing.assert_array_equal(mammogram.pixels, plain.pixels)
        low, high = sorted((value, value if limit is None else limit))
        assert mammogram.remarks == {IN_THE_IMAGE: int(((values >= low) & (values <= high)).sum())}
    else:
        # pixels of noise that touch a filling and have its value belong to it
        assert (
            (mammogram.padding & expected).sum()
            == expected.sum()
            <= mammogram.padding.sum()
            <= expected.sum() + 0.02 * values.size
        )
        assert LEFT_OVER not in mammogram.remarks
        filling = mammogram.pixels[~mammogram.padding].max() if "raw" in kind else 0
        assert (mammogram.pixels[expected] == filling).all()
    target, _ = restored(path)
    written = np.frombuffer(
        pydicom.dcmread(target).PixelData, f"<{'i' if values.min() < 0 else 'u'}{mammogram.filling.itemsize}"
    )
    np.testing.assert_array_equal(written.reshape(SHAPE), values)
    np.testing.assert_array_equal(read_image(target), mammogram.pixels)


@pytest.mark.parametrize("quality", [60, 90, 97])
def test_a_filling_stays_one_when_jpeg_has_blurred_it(quality, tmp_path):
    picture = tmp_path / "a.jpg"
    Image.fromarray((np.where(AIR, 400, IMAGE) // 16).astype(np.uint8)).save(picture, quality=quality)
    values = np.asarray(Image.open(picture))
    padding = read_mammogram(padded_file(tmp_path / "a.dcm", values, 20, 30, **EIGHT)).padding
    # blocks of 8 x 8 at the breast's edge hold both
    assert (padding & AIR).sum() > 0.85 * AIR.sum() and (padding & ~AIR).sum() < 0.05 * AIR.sum()


@pytest.mark.parametrize("allocated", [8, 16])
@pytest.mark.parametrize("value, limit", [(-2000, None), (1000, None), (65535, None), (4095, None), (0, 658)])
def test_padding_left_over_from_another_depth_is_none_and_said_so(value, limit, allocated, tmp_path):
    values = IMAGE // 16
    mammogram = read_mammogram(padded_file(tmp_path / "a.dcm", values, value, limit, bits=8, allocated=allocated))
    assert mammogram.padding is None and mammogram.remarks == {LEFT_OVER: 0}
    np.testing.assert_array_equal(mammogram.pixels, np.float32(values / 255))


# --- values past the bits stored ---------------------------------------------------------------------------------------

PAST = "more bits than BitsStored says"


def overlay(bit, data=None):
    """The elements of an overlay in a bit of the pixels, or in `data` of its own."""
    elements = {0x0010: ("US", SHAPE[0]), 0x0011: ("US", SHAPE[1]), 0x0040: ("CS", "G"), 0x0050: ("SS", [1, 1]),
                0x0100: ("US", 16 if data is None else 1), 0x0102: ("US", bit)}  # fmt: skip
    return elements if data is None else elements | {0x3000: ("OW", data)}


def with_overlay(path, group, elements):
    dataset = pydicom.dcmread(path)
    for element, (vr, value) in elements.items():
        dataset.add_new((group, element), vr, value)
    dataset.save_as(path)
    return path


def test_values_past_the_bits_stored_are_counted(tmp_path):
    values = IMAGE.copy()
    values[:3, :5] = 4096 + 77
    mammogram = read_mammogram(dicom_file(tmp_path / "a.dcm", values))
    assert [(words[: len(PAST)], pixels) for words, pixels in mammogram.remarks.items()] == [(PAST, 15)]
    np.testing.assert_array_equal(mammogram.pixels[:3, :5], np.float32(77 / 4095))
    signed = read_mammogram(dicom_file(tmp_path / "b.dcm", IMAGE.astype(int) - 2048))
    assert signed.remarks == {}  # a sign fills the bits above


def test_an_overlay_in_unused_bits_is_no_value_and_goes_with_its_declaration(tmp_path):
    values = IMAGE | (np.indices(SHAPE).sum(0) % 3 == 0).astype(np.uint16) << 15
    path = with_overlay(dicom_file(tmp_path / "a.dcm", values), 0x6002, overlay(15))
    with_overlay(path, 0x6000, overlay(0, bytes(SHAPE[0] * SHAPE[1] // 8)))
    target, mammogram = restored(path)
    assert mammogram.remarks == {OVERLAY: 0}
    written = pydicom.dcmread(target)
    np.testing.assert_array_equal(np.frombuffer(written.PixelData, "<u2").reshape(SHAPE), IMAGE)
    assert not written.group_dataset(0x6002)
    assert written.group_dataset(0x6000) == pydicom.dcmread(path).group_dataset(0x6000)
    assert read_mammogram(with_overlay(path, 0x6002, overlay(14))).remarks != {}


# --- what is said ------------------------------------------------------------------------------------------------------


def test_remarks_are_counted_over_images():
    remarks = {"a\n": {"x": 3, "y": 0}, "b": {}, "c": {"x": 1000}, "d": {"y": 0, "z": 1}, "e": {"w": 0}}
    assert remark_lines(remarks) == [
        "warning: 1,003 pixels of 2 images, such as a\\n: x", "warning: 2 images, such as a\\n: y",
        "warning: 1 pixel of 1 image, d: z", "warning: 1 image, e: w",
    ]  # fmt: skip


@pytest.mark.parametrize("flags", ["--no-cache", "--cache kept"])
def test_training_says_once_what_is_peculiar(flags, tmp_path, own_folder):
    root = tmp_path / "tree"
    root.mkdir()
    splits = ["train"] * 3 + ["validation", "validation", "test"]
    for i in range(6):
        padded_file(root / f"{i}.dcm", FILLED // 16, 0, 658, **EIGHT, PatientID=f"p{i}")
    (root / "split.csv").write_text("file,split\n" + "".join(f"{i},{split}\n" for i, split in enumerate(splits)))
    shape = "--hps image_shape=1,64,48 --hps crop_size=32 --hps flip=false"
    result = call(
        "main-vqvae", f"--task folder --data-root {root} {flags} {shape} --no-tqdm --num-workers 0 --epochs 2"
    )
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("warning")]
    assert [re.sub(r"such as .*?\d.dcm", "such as it", line) for line in lines] == [
        f"warning: {count} images, such as it: {LEFT_OVER}" for count in (2, 3)
    ]
    settings = HPS_VQVAE["folder"].updated(image_shape=[1, 64, 48], crop_size=32, nb_workers=0)
    test = get_datasets("folder", settings, ["test"], root, progress=False)[0]
    assert test[0].meta[0].info["remarks"] == {LEFT_OVER: 0}
