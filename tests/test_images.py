"""Mammogram files: an image is written back to the last bit, in a file that says what it is."""

import copy
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scipy import ndimage

from files import dicom, images
from files.images import Mammogram, find_images, is_dicom, is_restored, read_image, read_mammogram
from helper import ImageError, UserError
from preprocessing.noise import NoiseModel

SHAPE = 5, 7  # an odd number of pixels
VALUES = {bits: (np.arange(35).reshape(SHAPE) * (2**bits - 1) // 34).astype(np.uint16) for bits in range(1, 17)}
MAMMOGRAPHY = "1.2.840.10008.5.1.4.1.1.1.2"


def restored(path, description="a model", change=None):
    """Write the image of `path` beside it, as it is or with changed pixels; returns the new file and the mammogram."""
    mammogram = read_mammogram(path)
    target = path.with_name(f"restored-{path.name}{'.png' if mammogram.header is None else '.dcm'}")
    mammogram.write(target, mammogram.pixels if change is None else change(mammogram.pixels), description)
    return target, mammogram


# --- pictures --------------------------------------------------------------------------------------------------------


def png_file(path, values, bits, colour):
    """A PNG of any depth and colour type (2 RGB, 4 gray and alpha), which Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values.reshape(height, -1))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def tiff_file(path, data, bits, *, white_is_zero=False, order="<", resolution=None, orientation=None, more=None):
    """An uncompressed TIFF of SHAPE; `bits` of every sample."""
    photometric, samples = (2, len(bits)) if isinstance(bits, tuple) else (0 if white_is_zero else 1, 1)
    height, width = SHAPE
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: samples, 278: height,
               279: len(data), **(more or {})}  # fmt: skip
    if orientation:
        entries[274] = orientation
    if resolution:
        entries |= {282: resolution, 283: resolution, 296: 2}
    start = 8 + len(data) + len(data) % 2
    base, far = start + 2 + 12 * len(entries) + 4, b""
    body = struct.pack(f"{order}H", len(entries))
    for tag, value in sorted(entries.items()):
        kind, count = (5, 1) if tag in (282, 283) else (3, len(value) if isinstance(value, tuple) else 1)
        packed = struct.pack(f"{order}{2 if kind == 5 else count}{'I' if kind == 5 else 'H'}", *np.atleast_1d(value))
        if len(packed) > 4:
            far, packed = far + packed, struct.pack(f"{order}I", base + len(far))
        body += struct.pack(f"{order}HHI", tag, kind, count) + packed.ljust(4, b"\0")
    mark = b"II" if order == "<" else b"MM"
    content = mark + struct.pack(f"{order}HI", 42, start) + data.ljust(start - 8, b"\0") + body + bytes(4) + far
    path.write_bytes(content)
    return path


def packed_12_bit(values):
    rows = ("".join(f"{value:012b}" for value in row) for row in values.tolist())
    return b"".join(int(row.ljust(88, "0"), 2).to_bytes(11, "big") for row in rows)


def pgm_file(path, values, full_scale):
    header = b"P5\n%d %d\n%d\n" % (*values.shape[::-1], full_scale)
    path.write_bytes(header + values.astype(">u2" if full_scale > 255 else "u1").tobytes())
    return path


def pillow_file(path, image, **options):
    image.save(path, **options)
    return path


V8, V12, V16 = VALUES[8].astype(np.uint8), VALUES[12], VALUES[16]
# The file, its values and full scale, and the bits of the PNG that it becomes.
PICTURES = {
    "8-bit PNG": (lambda p: pillow_file(p / "a.png", Image.fromarray(V8)), V8, 255, 8),
    "16-bit PNG": (lambda p: pillow_file(p / "a.png", Image.fromarray(V16)), V16, 65535, 16),
    "gray RGB": (lambda p: pillow_file(p / "a.png", Image.fromarray(np.stack([V8] * 3, -1))), V8, 255, 8),
    "palette": (lambda p: pillow_file(p / "a.png", Image.fromarray(V8).convert("P")), V8, 255, 8),
    "alpha": (lambda p: pillow_file(p / "a.png", Image.fromarray(np.stack([V8, V8 // 2], -1), "LA")), V8, 255, 8),
    "8-bit PGM": (lambda p: pgm_file(p / "a.pgm", V8, 255), V8, 255, 8),
    "7-bit PGM": (lambda p: pgm_file(p / "a.pgm", VALUES[7], 127), VALUES[7], 127, 8),
    "12-bit PGM": (lambda p: pgm_file(p / "a.pgm", V12, 4095), V12, 4095, 16),
    "16-bit PGM": (lambda p: pgm_file(p / "a.pgm", V16, 65535), V16, 65535, 16),
    "8-bit TIFF": (lambda p: tiff_file(p / "a.tif", V8.tobytes(), 8), V8, 255, 8),
    "12-bit TIFF": (lambda p: tiff_file(p / "a.tif", packed_12_bit(V12), 12), V12, 4095, 16),
    "16-bit TIFF": (lambda p: tiff_file(p / "a.tif", V16.tobytes(), 16), V16, 65535, 16),
    "32-bit TIFF": (lambda p: tiff_file(p / "a.tif", V16.astype("<u4").tobytes(), 32), V16, 65535, 16),
    "big-endian TIFF": (lambda p: tiff_file(p / "a.tif", V16.astype(">u2").tobytes(), 16, order=">"), V16, 65535, 16),
    "white is zero at 8 bits": (
        lambda p: tiff_file(p / "a.tif", (255 - V8).tobytes(), 8, white_is_zero=True), V8, 255, 8),
    "white is zero at 16 bits": (
        lambda p: tiff_file(p / "a.tif", (65535 - V16).tobytes(), 16, white_is_zero=True), V16, 65535, 16),
    "JPEG": (lambda p: pillow_file(p / "a.jpg", Image.fromarray(np.full(SHAPE, 77, np.uint8))), 77, 255, 8),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_is_written_back_has_the_values_it_had(kind, tmp_path):
    make, values, full_scale, bits = PICTURES[kind]
    target, mammogram = restored(make(tmp_path))
    assert mammogram.bits == bits and mammogram.header is None and mammogram.pixels.dtype == np.float32
    # Pillow spreads what a PGM holds over its own 8 or 16 bits
    exact = 0 if full_scale in (255, 65535) or kind == "12-bit TIFF" else 0.51 / (2**bits - 1)
    np.testing.assert_allclose(
        mammogram.pixels, np.broadcast_to(np.float32(values) / full_scale, SHAPE), rtol=0, atol=exact
    )
    with Image.open(target) as image:
        assert image.format == "PNG" and image.mode == ("L" if bits == 8 else "I;16")
        stored = np.asarray(image).astype(np.float64)
    np.testing.assert_array_equal(np.rint(stored * full_scale / (2**bits - 1)), np.broadcast_to(values, SHAPE))


def test_pixels_are_rounded_and_clipped_to_the_depth(tmp_path):
    for values, bits in ((V8, 8), (V16, 16)):
        path = pillow_file(tmp_path / f"{bits}.png", Image.fromarray(values))
        unit = np.linspace(-0.2, 1.2, 35, dtype=np.float32).reshape(SHAPE)
        with Image.open(restored(path, change=lambda _, unit=unit: unit)[0]) as image:
            expected = np.rint(unit.astype(np.float64).clip(0, 1) * (2**bits - 1))
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_a_png_says_what_made_it(tmp_path):
    path = pillow_file(tmp_path / "a.png", Image.fromarray(V8))
    target, _ = restored(path, "Modell é, seed 3")
    with Image.open(target) as image:
        assert image.info["Software"] == images.SOFTWARE and image.info["Description"] == "Modell é, seed 3"
        assert "dpi" not in image.info and "exif" not in image.info
    assert is_restored(target) and not is_restored(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_the_pixel_pitch_is_kept(name, tmp_path):
    path = pillow_file(tmp_path / name, Image.fromarray(V8), dpi=(508, 254))
    with Image.open(restored(path)[0]) as image:
        assert image.info["dpi"] == pytest.approx((508, 254), abs=0.02)


def test_no_pixel_pitch_is_made_up(tmp_path):
    """Without a resolution Pillow takes 1 dpi for a TIFF and 72 for EXIF, and passes on values that no PNG can hold."""
    exif = Image.Exif()
    exif[271] = "a maker"
    paths = [pillow_file(tmp_path / "exif.jpg", Image.fromarray(V8), exif=exif)]
    for resolution in (None, (0, 0), (0, 1), (1, 0), (2**32 - 1, 1)):
        paths.append(tiff_file(tmp_path / f"{len(paths)}.tif", V8.tobytes(), 8, resolution=resolution))
    for path in paths:
        with Image.open(restored(path)[0]) as image:
            assert "dpi" not in image.info


@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_viewers_turn_both_files_alike(name, orientation, tmp_path):
    exif = Image.Exif()
    exif[274], exif[271] = orientation, "a maker"
    path = pillow_file(tmp_path / name, Image.fromarray(V8), exif=exif)
    with Image.open(restored(path)[0]) as image:
        assert dict(image.getexif()) == ({274: orientation} if orientation in (3, 6) else {})
        assert image.size == SHAPE[::-1]


def test_a_turned_tiff_becomes_an_upright_png(tmp_path):
    path = tiff_file(tmp_path / "a.tif", (65535 - V16).tobytes(), 16, white_is_zero=True, orientation=6)
    with Image.open(restored(path)[0]) as image:
        assert not image.getexif()
        np.testing.assert_array_equal(np.asarray(image), np.rot90(V16, -1))


SIXTEEN = "several channels of 16 bits, of which 8 would be lost"
BROKEN_PICTURES = {
    "16-bit RGB": (lambda p: png_file(p / "a.png", np.stack([V16] * 3, -1), 16, 2), SIXTEEN),
    "16 bits and alpha": (lambda p: png_file(p / "a.png", np.stack([V16] * 2, -1), 16, 4), SIXTEEN),
    "16-bit RGB TIFF": (
        lambda p: tiff_file(p / "a.tif", np.stack([V16] * 3, -1).tobytes(), (16, 16, 16)), SIXTEEN),
    "16-bit PPM": (
        lambda p: (p / "a.pgm").write_bytes(b"P6\n7 5\n65535\n" + bytes(210)) and p / "a.pgm", SIXTEEN),
    "photo": (lambda p: pillow_file(p / "a.jpg", Image.new("RGB", (8, 8), (200, 90, 10))), "a colour image"),
    "signed": (lambda p: pillow_file(p / "a.tif", Image.fromarray(np.full(SHAPE, -1, np.int32))), "do not fit 16 bits"),
    "too great": (
        lambda p: pillow_file(p / "a.tif", Image.fromarray(np.full(SHAPE, 65536, np.int32))), "do not fit 16 bits"),
    "float": (lambda p: pillow_file(p / "a.tif", Image.new("F", (8, 8))), "pixel format F is not"),
    "pages": (
        lambda p: pillow_file(p / "a.tif", Image.fromarray(V8), save_all=True, append_images=[Image.fromarray(V8)]),
        "holds several pages"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_PICTURES)
def test_a_picture_that_would_lose_something_is_refused(kind, tmp_path):
    make, sentence = BROKEN_PICTURES[kind]
    path = make(tmp_path)
    with pytest.raises(UserError) as error:
        read_mammogram(path)
    assert str(error.value).startswith(f"{path}: ") and sentence in str(error.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.pgm", "a.tif"])
def test_a_picture_cut_short_is_refused(name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    path = pillow_file(tmp_path / name, Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=rf"^{path}: not a readable image"):
        read_mammogram(path)


def test_other_sizes_and_places_that_cannot_be_written_are_refused(tmp_path):
    path = pillow_file(tmp_path / "a.png", Image.fromarray(V8))
    with pytest.raises(ValueError, match="pixels must be"):
        restored(path, change=lambda pixels: pixels[:-1])
    with pytest.raises(UserError, match="cannot be written"):
        read_mammogram(path).write(path / "b.png", V8 / np.float32(255), "")
    assert sorted(tmp_path.iterdir()) == [path]


# --- DICOM -----------------------------------------------------------------------------------------------------------


def dicom_file(path, values=V12, *, bits=12, allocated=16, syntax=ExplicitVRLittleEndian, without=(), **tags):
    """A DICOM file as a mammography unit writes it, with other `tags`; a tag of None has no value."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MAMMOGRAPHY
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3.4"
    dataset.file_meta.ImplementationVersionName = "A UNIT"
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "1.2.3", "1.2"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, bits, bits - 1
    dataset.PixelRepresentation = int(values.min() < 0)
    with disable_value_validation():
        for name, value in tags.items():
            setattr(dataset, name, value)
        order = "<" if syntax.is_little_endian else ">"
        kind = np.dtype(f"{'i' if dataset.PixelRepresentation else 'u'}{allocated // 8}").newbyteorder(order)
        data = values.astype(kind).tobytes()
        dataset.PixelData = data + bytes(len(data) % 2)
        dataset["PixelData"].VR = "OB" if allocated == 8 else "OW"
        for name in without:
            delattr(dataset, name)
        dataset.save_as(path, enforce_file_format=True)
    return path


def lut(bits, first=0, step=1, vr="US"):
    """A falling modality LUT over 12 bits: value v becomes the greatest value minus step * v."""
    item = Dataset()
    with disable_value_validation():
        item.add_new("LUTDescriptor", vr, [4096, first, bits])
        item.ModalityLUTType = "US"
        item.add_new("LUTData", "US", [(2**bits - 1) - (step * v >> 12 - min(bits, 12)) for v in range(4096)])
    return [item]


S12, S16 = V12.astype(int) - 2048, V16.astype(int) - 32768
SPECKLED = np.where(np.arange(35).reshape(SHAPE) % 3 == 0, 60000, V16)
# Stored values, the tags of the file, and the function from the values to [0, 1].
DICOMS = {
    "8 bits": (V8, {"bits": 8, "allocated": 8}, lambda v: v / 255),
    "8 bits in 16": (V8, {"bits": 8}, lambda v: v / 255),
    "10 bits": (VALUES[10], {"bits": 10}, lambda v: v / 1023),
    "12 bits": (V12, {}, lambda v: v / 4095),
    "14 bits": (VALUES[14], {"bits": 14}, lambda v: v / 16383),
    "16 bits": (V16, {"bits": 16}, lambda v: v / 65535),
    "signed": (S12, {}, lambda v: (v + 2048) / 4095),
    "signed at 16 bits": (S16, {"bits": 16}, lambda v: (v + 32768) / 65535),
    "signed at 8 bits": (V8.astype(int) - 128, {"bits": 8, "allocated": 8}, lambda v: (v + 128) / 255),
    "MONOCHROME1": (V12, {"PhotometricInterpretation": "MONOCHROME1"}, lambda v: 1 - v / 4095),
    "slope": (V12, {"RescaleSlope": 2, "RescaleIntercept": -100}, lambda v: v / 4095),
    "negative slope": (V12, {"RescaleSlope": -1, "RescaleIntercept": 4095}, lambda v: 1 - v / 4095),
    "fractional slope": (V12, {"RescaleSlope": "-0.37", "RescaleIntercept": "0.25"}, lambda v: 1 - v / 4095),
    "slope alone": (V12, {"RescaleSlope": 2}, lambda v: v / 4095),
    "slope without a value": (V12, {"RescaleSlope": None, "RescaleIntercept": None}, lambda v: v / 4095),
    "slope of 0": (V12, {"RescaleSlope": 0, "RescaleIntercept": 0}, lambda v: v / 4095),
    "far intercept": (
        V16, {"bits": 16, "RescaleSlope": "0.001", "RescaleIntercept": "1000000"}, lambda v: v / 65535),
    "negative slope, MONOCHROME1, signed": (
        S16, {"bits": 16, "RescaleSlope": -3, "RescaleIntercept": 7, "PhotometricInterpretation": "MONOCHROME1"},
        lambda v: (v + 32768) / 65535),
    "window": (V12, {"WindowCenter": 500, "WindowWidth": 10, "VOILUTFunction": "SIGMOID"}, lambda v: v / 4095),
    "padding": (V12, {"PixelPaddingValue": 0}, lambda v: v / 4095),
    "padding in white": (V12, {"PixelPaddingValue": 4095}, lambda v: np.where(v == 4095, 0, v / 4095)),
    "padding in a range": (
        V12, {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": 2000},
        lambda v: np.where((v >= 2000) & (v <= 4000), 0, v / 4095)),
    "padding, MONOCHROME1": (
        SPECKLED, {"bits": 16, "PixelPaddingValue": 60000, "PhotometricInterpretation": "MONOCHROME1"},
        lambda v: np.where(v == 60000, 0, 1 - v / 65535)),
    "negative padding": (
        S12, {"PixelPaddingValue": -2048, "PixelPaddingRangeLimit": -1000},
        lambda v: np.where(v <= -1000, 0, (v + 2048) / 4095)),
    "empty padding": (V12, {"PixelPaddingValue": None}, lambda v: v / 4095),
    "empty modality LUT": (V12, {"ModalityLUTSequence": []}, lambda v: v / 4095),
    "implicit VR": (V12, {"syntax": ImplicitVRLittleEndian, "PixelPaddingValue": 0}, lambda v: v / 4095),
    "deflated": (V12, {"syntax": DeflatedExplicitVRLittleEndian}, lambda v: v / 4095),
    "one frame": (V12, {"NumberOfFrames": 1}, lambda v: v / 4095),
    "overlay in unused bits": (V12 | 0x8000, {}, lambda v: (v & 0xFFF) / 4095),
    "no class": (V12, {"without": ["SOPClassUID"]}, lambda v: v / 4095),
    "no identifiers": (V12, {"without": ["SOPInstanceUID", "SeriesInstanceUID"]}, lambda v: v / 4095),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICOMS)
def test_a_dicom_that_is_written_back_has_the_stored_values_it_had(kind, tmp_path):
    values, tags, expected = DICOMS[kind]
    source = dicom_file(tmp_path / "a.dcm", values, **tags)
    target, mammogram = restored(source)
    np.testing.assert_allclose(mammogram.pixels, expected(values), rtol=0, atol=6e-8)
    assert mammogram.pixels.dtype == np.float32 and mammogram.header is not None
    before, after = pydicom.dcmread(source), pydicom.dcmread(target)
    assert mammogram.bits == after.BitsStored == before.BitsStored and after.HighBit == after.BitsStored - 1
    assert after.BitsAllocated == (8 if after.BitsStored <= 8 else 16)
    assert after.PixelRepresentation == before.PixelRepresentation
    assert after.PhotometricInterpretation == before.PhotometricInterpretation
    np.testing.assert_array_equal(after.pixel_array, before.pixel_array)
    assert len(after.PixelData) % 2 == 0
    kept = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelPaddingValue")
    for name in kept:
        assert after.get(name) == before.get(name) and (name in after) == (name in before)
    np.testing.assert_array_equal(read_image(target), mammogram.pixels)


def test_restored_pixels_are_rounded_clipped_and_turned_around_and_padding_stays(tmp_path):
    unit = np.linspace(-0.2, 1.2, 35, dtype=np.float32).reshape(SHAPE)
    inside = unit.astype(np.float64).clip(0, 1)
    for name, tags, expected in (
        ("plain", {}, inside * 4095),
        ("inverted", {"PhotometricInterpretation": "MONOCHROME1"}, (1 - inside) * 4095),
        ("falling", {"RescaleSlope": -2, "RescaleIntercept": 1}, (1 - inside) * 4095),
        ("padded", {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 900}, np.where(V12 <= 900, V12, inside * 4095)),
    ):
        source = dicom_file(tmp_path / f"{name}.dcm", SmallestImagePixelValue=7, LargestImagePixelValue=8, **tags)
        written = pydicom.dcmread(restored(source, change=lambda _: unit)[0])
        np.testing.assert_array_equal(written.pixel_array, np.rint(expected), err_msg=name)
        assert written.SmallestImagePixelValue == written.pixel_array.min()
        assert written.LargestImagePixelValue == written.pixel_array.max()
    signed = dicom_file(tmp_path / "signed.dcm", S12, SmallestImagePixelValue=0)
    assert pydicom.dcmread(restored(signed)[0]).SmallestImagePixelValue == -2048


def test_negative_padding_that_is_written_as_unsigned_is_found(tmp_path):
    path = dicom_file(tmp_path / "a.dcm", S16, bits=16)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "US", 65536 + int(S16[2, 2]))
    dataset.save_as(path)
    expected = np.where(S16[2, 2] == S16, 0, (S16 + 32768) / 65535)
    np.testing.assert_allclose(read_image(path), expected, rtol=0, atol=6e-8)
    np.testing.assert_array_equal(pydicom.dcmread(restored(path)[0]).pixel_array, S16)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 16])
def test_values_go_through_the_modality_lut_once(bits, signed, tmp_path):
    values, first = (S12, -2048) if signed else (V12, 0)
    source = dicom_file(
        tmp_path / "a.dcm", values, ModalityLUTSequence=lut(bits, first, vr="SS" if signed else "US"),
        PixelPaddingValue=first, PixelPaddingRangeLimit=first, SmallestImagePixelValue=first,
        LargestImagePixelValue=first, RescaleType="OD",
    )  # fmt: skip
    target, mammogram = restored(source)
    through = (2**bits - 1) - (V12.astype(int) >> 12 - min(bits, 12))
    expected = np.where(V12 == 0, 0, through / (2**bits - 1))
    np.testing.assert_allclose(mammogram.pixels, expected, rtol=0, atol=6e-8)
    written = pydicom.dcmread(target)
    np.testing.assert_array_equal(written.pixel_array, np.where(V12 == 0, 0, through))
    assert (written.BitsStored, written.PixelRepresentation, mammogram.bits) == (bits, 0, bits)
    assert (written.SmallestImagePixelValue, written.LargestImagePixelValue) == (0, written.pixel_array.max())
    # these tags describe values before the LUT
    assert not {"ModalityLUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleType"} & set(
        written.dir()
    )
    np.testing.assert_array_equal(read_image(target), mammogram.pixels)
    assert "ModalityLUTSequence" in mammogram.header  # another file can be written


RAW = {"PresentationIntentType": "FOR PROCESSING"}
# Tags of a detector's own image, and whether its stored values fall as the exposure rises.
RAWS = {
    "intent": (RAW, False),
    "class": ({"SOPClassUID": f"{MAMMOGRAPHY}.1"}, False),
    "MONOCHROME1": (RAW | {"PhotometricInterpretation": "MONOCHROME1"}, False),
    "sign of 1": (RAW | {"PixelIntensityRelationshipSign": 1, "PhotometricInterpretation": "MONOCHROME1"}, False),
    "sign of -1": (RAW | {"PixelIntensityRelationshipSign": -1}, True),
    "negative slope": (RAW | {"RescaleSlope": -1, "RescaleIntercept": 4095}, True),
    "both": (RAW | {"PixelIntensityRelationshipSign": -1, "RescaleSlope": -1, "RescaleIntercept": 4095}, True),
    "signed": (RAW | {"PixelRepresentation": 1, "PixelIntensityRelationshipSign": -1}, True),
}


@pytest.mark.parametrize("kind", RAWS)
def test_a_raw_image_rises_with_the_exposure_and_is_written_as_it_was(kind, tmp_path):
    tags, falls = RAWS[kind]
    signed = "PixelRepresentation" in tags
    values = S12 if signed else V12
    source = dicom_file(tmp_path / "a.dcm", values, **tags)
    target, mammogram = restored(source)
    assert mammogram.is_raw and not mammogram.is_processed
    rising = (V12 if not falls else 4095 - V12) / 4095
    np.testing.assert_allclose(mammogram.pixels, rising, rtol=0, atol=6e-8)
    scale = mammogram.scale
    assert scale.factor == (-4095 if falls else 4095)
    assert scale.shift == (4095 if falls else 0) - (2048 if signed else 0)
    np.testing.assert_allclose(scale.factor * mammogram.pixels + scale.shift, values, rtol=0, atol=1e-3)
    before, after = pydicom.dcmread(source), pydicom.dcmread(target)
    np.testing.assert_array_equal(after.pixel_array, before.pixel_array)
    for name in ("SOPClassUID", "PhotometricInterpretation", *tags):
        assert after.get(name) == before.get(name), name


@pytest.mark.parametrize(
    "tags, raw, processed",
    [
        ({}, False, True),  # by its class
        ({"without": ["SOPClassUID"]}, False, False),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, False, False),  # secondary capture
        ({"SOPClassUID": f"{MAMMOGRAPHY}.1", "PresentationIntentType": "FOR PRESENTATION"}, False, True),
        ({"PresentationIntentType": "FOR PROCESSING"}, True, False),
        ({"PixelIntensityRelationship": "LIN"}, False, True),
    ],
)
def test_the_intent_tells_raw_and_processed_apart_and_the_class_stands_in_for_it(tags, raw, processed, tmp_path):
    mammogram = read_mammogram(dicom_file(tmp_path / "a.dcm", **tags))
    assert (mammogram.is_raw, mammogram.is_processed) == (raw, processed)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_padding_of_a_raw_image_is_as_bright_as_its_brightest_pixel(sign, tmp_path):
    tags = RAW | {"PixelIntensityRelationshipSign": sign, "PixelPaddingValue": 0}
    values = V12.copy()
    values[1:3, 2:5], values[values > 3000] = 0, 3000
    target, mammogram = restored(dicom_file(tmp_path / "a.dcm", values, **tags))
    brightest = (3000 if sign > 0 else 4095 - values[values > 0].min()) / 4095
    np.testing.assert_allclose(mammogram.pixels[values == 0], brightest, atol=1e-7)
    np.testing.assert_array_equal(pydicom.dcmread(target).pixel_array, values)


@pytest.mark.parametrize(
    "names, words",
    [
        ({"Manufacturer": "GE MEDICAL  SYSTEMS ", "ManufacturerModelName": "Senographe\tPristina"},
         "GE MEDICAL SYSTEMS Senographe Pristina"),
        ({"Manufacturer": "HOLOGIC, Inc."}, "HOLOGIC, Inc."),
        ({"Manufacturer": None, "ManufacturerModelName": "\x1b[31mred"}, "[31mred"),
        ({}, ""),
    ],
)  # fmt: skip
def test_the_detector_is_named_in_printable_words(names, words, tmp_path):
    assert read_mammogram(dicom_file(tmp_path / "a.dcm", **names)).detector == words


def test_a_noise_model_of_stored_values_becomes_one_of_pixels(tmp_path):
    stored = NoiseModel(gain=0.08, sigma=3.0, offset=53.0)
    for tags in ({}, {"PhotometricInterpretation": "MONOCHROME1"}, RAW | {"PixelIntensityRelationshipSign": -1}):
        mammogram = read_mammogram(dicom_file(tmp_path / "a.dcm", **tags))
        factor = mammogram.scale.factor
        noise = stored.scaled(1 / factor, -mammogram.scale.shift / factor)
        expected = (0.08 * np.maximum(V12 - 53.0, 0) + 9) / 4095**2
        np.testing.assert_allclose(noise.variance(torch.from_numpy(mammogram.pixels)), expected, rtol=1e-4)
    for bits in (8, 16):
        picture = Mammogram(Path("x"), np.zeros(SHAPE, np.float32), bits)
        assert (picture.scale.factor, picture.scale.shift) == (2**bits - 1, 0)
        assert (picture.is_raw, picture.is_processed, picture.detector) == (False, False, "")


@pytest.mark.parametrize("value, limit", [(-2000, None), (1000, None), (65535, None), (4095, None), (0, 658)])
def test_padding_that_eight_bits_cannot_hold_is_none(value, limit, tmp_path):
    path = dicom_file(tmp_path / "a.dcm", V8, bits=8, allocated=8)
    dataset = pydicom.dcmread(path)
    for name, number in (("PixelPaddingValue", value), ("PixelPaddingRangeLimit", limit)):
        if number is not None:
            dataset.add_new(name, "SS" if number < 0 else "US", number)
    dataset.save_as(path)
    mammogram = read_mammogram(path)
    assert mammogram.padding is None
    np.testing.assert_array_equal(mammogram.pixels, np.float32(V8 / 255))


@pytest.mark.parametrize("blur", [0.0, 0.6])
def test_a_padding_range_that_reaches_into_the_noise_is_image_and_one_of_fillings_is_not(blur, tmp_path):
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((64, 48)), blur)
    air = np.rint(530 + 35 * (noise / noise.std()).clip(-0.8)).astype(np.uint16)
    air[20:40, :30] += 1500
    tags = {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 658}
    assert read_mammogram(dicom_file(tmp_path / "a.dcm", air, **tags)).padding is None
    air[:10], air[-10:] = 0, 600
    filled = np.where(air < 700, np.where(np.arange(48) < 20, 0, 600), air)
    padding = read_mammogram(dicom_file(tmp_path / "b.dcm", filled, **tags)).padding
    np.testing.assert_array_equal(padding, filled <= 658)


def compressed(path, syntax, values=V12, bits=12):
    dataset = pydicom.dcmread(dicom_file(path, values, bits=bits))
    if syntax == RLELossless:
        dataset.compress(RLELossless, generate_instance_uid=False)
    else:
        file = io.BytesIO()
        picture = Image.fromarray(values.astype(np.uint16))
        picture.save(file, "JPEG2000", irreversible=False, no_jp2=True)
        frames, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(
            [file.getvalue()]
        )
        dataset.PixelData, dataset.file_meta.TransferSyntaxUID = frames, syntax
        dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_a_compressed_dicom_is_written_uncompressed_and_says_so(syntax, bits, tmp_path):
    values = np.tile(VALUES[bits], (8, 8))
    source = compressed(tmp_path / "a.dcm", syntax, values, bits)
    assert pydicom.dcmread(source).file_meta.TransferSyntaxUID == syntax
    written = pydicom.dcmread(restored(source)[0])
    assert written.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert written["PixelData"].VR == "OW" and len(written.PixelData) == 2 * values.size
    np.testing.assert_array_equal(np.frombuffer(written.PixelData, "<u2").reshape(values.shape), values)
    assert "ExtendedOffsetTable" not in written and "ExtendedOffsetTableLengths" not in written


@pytest.mark.parametrize(
    "syntax, sentence",
    [
        (JPEGLosslessSV1, "whose decoder is not installed; pip install pylibjpeg pylibjpeg-libjpeg"),
        (JPEGLSLossless, "whose decoder is not installed; pip install pyjpegls"),
        (
            JPEGExtended12Bit,
            "and no installed decoder can read it; replace it if it is damaged, else pip install pylibjpeg",
        ),
        (JPEG2000Lossless, "else pip install pylibjpeg pylibjpeg-openjpeg"),
        (RLELossless, "not a readable image ("),
        (MPEG2MPML, "MPEG2 Main Profile / Main Level is a compression that cannot be read"),
    ],
)
def test_a_compression_that_cannot_be_undone_names_the_package(syntax, sentence, tmp_path, monkeypatch):
    path = dicom_file(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.PixelData, dataset.file_meta.TransferSyntaxUID = encapsulate([b"no image"]), syntax
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    decoder = dicom.get_decoder
    if "not installed" in sentence:  # it may be installed here
        monkeypatch.setattr(
            dicom,
            "get_decoder",
            lambda s: copy.copy(decoder(s)) if s != syntax else type("", (), {"is_available": False}),
        )
    with pytest.raises(UserError) as error:
        read_mammogram(path)
    assert str(error.value).startswith(f"{path}: ") and sentence in str(error.value) and "\n" not in str(error.value)


LONG = "x" * 60


def test_a_derived_dicom_tells_its_origin_and_keeps_patient_study_and_view(tmp_path):
    stale = ("IconImageSequence", "MACParametersSequence", "DigitalSignaturesSequence")
    thumbnail = Dataset()
    thumbnail.Rows = 1
    tags = {
        "PatientName": "Müller^Ada", "PatientID": "P 1", "SpecificCharacterSet": "ISO_IR 100", "StudyDate": "20200101",
        "StudyID": "S1", "AccessionNumber": "A1", "Laterality": "L", "ImageLaterality": "L", "ViewPosition": "MLO",
        "PatientOrientation": ["A", "FR"], "ImagerPixelSpacing": [0.07, 0.07], "WindowCenter": [2000, 1000],
        "WindowWidth": [4000, 2000], "FrameOfReferenceUID": "1.9", "SOPClassUID": MAMMOGRAPHY, "Modality": "MG",
    }  # fmt: skip
    source = dicom_file(
        tmp_path / "a.dcm", SeriesDescription=LONG, **dict.fromkeys(stale, [thumbnail]), **tags,
        ImageType=["ORIGINAL", "PRIMARY", "", "THIRD"],
    )  # fmt: skip
    raw = source.read_bytes()
    source.write_bytes(b"II*\0" + raw[4:])  # also a TIFF, whose offsets would be wrong in the copy
    target, mammogram = restored(source, "the model")
    before, after = pydicom.dcmread(source), pydicom.dcmread(target)
    for name in (*tags, "StudyInstanceUID"):
        assert after[name] == before[name], name
    assert after.ImageType == ["DERIVED", "SECONDARY", "", "THIRD"]
    assert after.DerivationDescription == f"{images.SOFTWARE}: the model"
    assert after.SeriesDescription == f"{LONG[:55]} restored" and not set(stale) & set(after.dir())
    reference = after.SourceImageSequence[0]
    assert (reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID) == (MAMMOGRAPHY, "1.2.3.4")
    assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    assert after.file_meta.MediaStorageSOPInstanceUID == after.SOPInstanceUID
    assert after.file_meta.MediaStorageSOPClassUID == after.SOPClassUID == MAMMOGRAPHY
    assert after.file_meta.ImplementationVersionName.startswith("PYDICOM")
    assert target.read_bytes()[:132] == bytes(128) + b"DICM"
    assert is_restored(target) and not is_restored(source)
    assert mammogram.header.file_meta.ImplementationVersionName == "A UNIT"  # the source is left as it was
    assert mammogram.header.SOPInstanceUID == "1.2.3.4" and "IconImageSequence" in mammogram.header


@pytest.mark.parametrize(
    "tags, kinds",
    [
        ({"ImageType": "ORIGINAL"}, []),
        ({"ImageType": None}, []),
        ({"without": ["ImageType"]}, []),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMO", "NONE"]}, ["TOMO", "NONE"]),
    ],
)
def test_image_types_of_any_number_become_derived(tags, kinds, tmp_path):
    assert pydicom.dcmread(restored(dicom_file(tmp_path / "a.dcm", **tags))[0]).ImageType == [
        "DERIVED", "SECONDARY", *kinds,
    ]  # fmt: skip


def identifiers(path, description="a model"):
    written = pydicom.dcmread(restored(path, description)[0])
    return written.SOPInstanceUID, written.SeriesInstanceUID


def test_identifiers_are_valid_and_depend_on_source_and_description_alone(tmp_path):
    (tmp_path / "moved").mkdir()
    one = dicom_file(tmp_path / "1.dcm")
    moved = dicom_file(tmp_path / "moved" / "9.dcm")
    two = dicom_file(tmp_path / "2.dcm", SOPInstanceUID="1.2.3.5")
    other = dicom_file(tmp_path / "3.dcm", SOPInstanceUID="1.2.3.6", SeriesInstanceUID="1.2.4")
    first = identifiers(one)
    assert all(UID(uid).is_valid for uid in first) and len({*first, "1.2.3", "1.2.3.4"}) == 4
    assert identifiers(one) == first and identifiers(moved) == first
    assert identifiers(two)[0] != first[0] and identifiers(two)[1] == first[1]
    assert identifiers(other)[1] != first[1]
    assert not set(identifiers(one, "another model")) & set(first)
    assert len(set(identifiers(dicom_file(tmp_path / "4.dcm", SOPInstanceUID="1.2.3")))) == 2  # the series' own


@pytest.mark.parametrize("there", [True, False])
def test_files_without_identifiers_get_their_own(there, tmp_path, monkeypatch):
    names = ("SOPInstanceUID", "SeriesInstanceUID")
    how = dict.fromkeys(names) if there else {"without": names}
    (tmp_path / "b").mkdir()
    paths = [dicom_file(tmp_path / name, **how) for name in ("1.dcm", "2.dcm", "b/1.dcm")]
    found = [identifiers(path) for path in paths]
    assert len({uid for uid, _ in found}) == 3 and found[0][1] == found[1][1] != found[2][1]
    assert all(UID(uid).is_valid for pair in found for uid in pair)
    monkeypatch.chdir(tmp_path)
    assert identifiers(Path("1.dcm")) == found[0]
    assert "SourceImageSequence" not in pydicom.dcmread(tmp_path / "restored-1.dcm.dcm")


@pytest.mark.filterwarnings("ignore:Invalid value", "ignore:The value length", "ignore:Unknown encoding")
def test_what_is_wrong_in_a_header_does_not_stand_in_the_way(tmp_path):
    tags = {
        "SOPInstanceUID": "1.02.not-one", "SeriesInstanceUID": "x" * 70, "PatientBirthDate": "long ago",
        "ImageType": ["ORIGINAL", "PRIMARY", "lower case, and much too long"], "SpecificCharacterSet": "NONE",
        "SeriesDescription": "y" * 80, "SOPClassUID": "0.1.2",
    }  # fmt: skip
    source = dicom_file(tmp_path / "a.dcm", **tags)
    written = pydicom.dcmread(restored(source)[0])
    assert written.SOPInstanceUID.is_valid and written.SeriesInstanceUID.is_valid
    np.testing.assert_array_equal(written.pixel_array, V12)
    assert written.PatientBirthDate == "long ago" and written.file_meta.MediaStorageSOPClassUID == "0.1.2"


def no_class(path):
    dataset = pydicom.dcmread(dicom_file(path, without=["SOPClassUID"]))
    dataset.file_meta.MediaStorageSOPClassUID = None
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda path: dicom_file(path, syntax=ExplicitVRBigEndian), "big-endian DICOM can be read but not written"),
        (no_class, "cannot be written back as DICOM ("),
    ],
)
def test_what_cannot_be_written_is_said_in_one_line_and_leaves_nothing(make, sentence, tmp_path):
    path = make(tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_image(path), np.float32(V12 / 4095))
    with pytest.raises(UserError) as error:
        restored(path)
    assert str(error.value).startswith(f"{path}: {sentence}") and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


BROKEN_DICOMS = {
    "frames": ({"NumberOfFrames": 2}, "a multi-frame or colour DICOM"),
    "colour": ({"SamplesPerPixel": 3}, "a multi-frame or colour DICOM"),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "a PALETTE COLOR DICOM"),
    "no pixels": ({"without": ["PixelData"]}, "cut short or without pixel data"),
    "high bit": ({"HighBit": 15}, "12 bits with high bit 15; only up to 16, from bit 0 on"),
    "32 bits": ({"bits": 32, "allocated": 32}, "32 bits with high bit 31; only up to 16"),
    "no depth": ({"without": ["BitsStored"]}, "not a readable image ("),
    "more rows": ({"Rows": 9}, "not a readable image ("),
    "two depths": ({"BitsStored": [12, 12]}, "not a readable image ("),
}


@pytest.mark.parametrize("kind", BROKEN_DICOMS)
def test_a_dicom_that_is_no_single_image_is_refused(kind, tmp_path):
    tags, sentence = BROKEN_DICOMS[kind]
    path = dicom_file(tmp_path / "a.dcm", **tags)
    with pytest.raises(UserError) as error:
        read_mammogram(path)
    assert str(error.value).startswith(f"{path}: ") and sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_a_dicom_cut_short_is_refused_wherever_it_ends(syntax, tmp_path):
    path = dicom_file(tmp_path / "a.dcm") if not syntax.is_compressed else compressed(tmp_path / "a.dcm", syntax)
    content = path.read_bytes()
    # the last eight bytes of a compressed file are a delimiter; the image is whole without them
    for length in (
        1,
        131,
        132,
        200,
        len(content) // 2,
        len(content) - 40,
        len(content) - (9 if syntax.is_compressed else 1),
    ):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"^{path}: ") as error:
            read_mammogram(path)
        assert "\n" not in str(error.value)


# --- names -----------------------------------------------------------------------------------------------------------


def test_dicom_is_told_by_suffix_or_by_its_mark(tmp_path):
    names = ["1.2.840.113619", "IM0001", "a.ima", "b.DCM", "c.dicom"]
    for name in names:
        dicom_file(tmp_path / name)
    assert all(is_dicom(tmp_path / name) for name in names)
    for name in names:
        np.testing.assert_array_equal(read_image(tmp_path / name), np.float32(V12 / 4095))
    pillow_file(tmp_path / "p.png", Image.fromarray(V8))
    (tmp_path / "short").write_bytes(b"DICM")
    (tmp_path / "folder").mkdir()
    for name in ("p.png", "short", "missing", "folder"):
        assert not is_dicom(tmp_path / name)
    assert {path.name for path in find_images(tmp_path)} == {*names, "p.png"}


OTHER_CLASSES = {  # of DICOM objects that lie beside mammograms and are none
    "DICOMDIR": "1.2.840.10008.1.3.10", "state.dcm": "1.2.840.10008.5.1.4.1.1.11.1",
    "cad.dcm": "1.2.840.10008.5.1.4.1.1.88.50", "dose.IMA": "1.2.840.10008.5.1.4.1.1.88.67",
    "key": "1.2.840.10008.5.1.4.1.1.88.59", "report.dic": "1.2.840.10008.5.1.4.1.1.104.1",
    "raw.dcm": "1.3.12.2.1107.5.9.1",
}  # fmt: skip


def other_object(path, kind):
    """A DICOM object without pixels, as a unit writes it."""
    size = ("Rows", "Columns", "PixelData", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
    dicom_file(path, without=(*size, "SamplesPerPixel", "PhotometricInterpretation"), SOPClassUID=kind)
    header = pydicom.dcmread(path)
    header.file_meta.MediaStorageSOPClassUID = kind
    header.save_as(path)
    return path


def test_dicom_objects_that_hold_no_image_are_passed_over_and_counted(tmp_path, capsys):
    for name, kind in OTHER_CLASSES.items():
        other_object(tmp_path / name, kind)
    mask = dicom_file(tmp_path / "mask.dcm", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4")
    header = pydicom.dcmread(mask)
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.save_as(mask)
    with pytest.raises(UserError, match="no images in it"):
        find_images(tmp_path)
    capsys.readouterr()
    dicom_file(tmp_path / "a.dic")
    dicom_file(tmp_path / "odd", SOPClassUID="1.2.840.10008.1.2.1")  # a converter's mistake: a transfer syntax
    cut = dicom_file(tmp_path / "cut.dcm")
    cut.write_bytes(cut.read_bytes()[:700])
    assert [path.name for path in find_images(tmp_path)] == ["a.dic", "cut.dcm", "odd"]
    said = f"{tmp_path}: 8 DICOM files that hold no image are passed over, such as DICOMDIR\n"
    assert capsys.readouterr() == (said, "")
    assert read_image(tmp_path / "odd").shape == SHAPE


def test_a_dicom_object_that_holds_no_image_is_called_that_if_it_is_named(tmp_path):
    path = other_object(tmp_path / "cad.dcm", OTHER_CLASSES["cad.dcm"])
    with pytest.raises(
        ImageError, match=rf"^{path}: a DICOM file of class Mammography CAD SR Storage, which holds no image;"
    ):
        read_mammogram(path)


def test_folders_are_searched_past_what_is_no_image(tmp_path, monkeypatch):
    (tmp_path / "x.png").mkdir()
    pillow_file(tmp_path / "x.png" / "y.PNG", Image.fromarray(V8))
    pillow_file(tmp_path / ".hidden.png", Image.fromarray(V8))
    (tmp_path / "broken.png").symlink_to("nowhere")
    (tmp_path / "self.png").symlink_to("self.png")
    (tmp_path / "link.png").symlink_to("x.png/y.PNG")
    (tmp_path / "1.2.3").write_text("no DICOM")
    (tmp_path / "trailing.").write_text("no DICOM")
    for name in ("forbidden.png", "forbidden"):
        (tmp_path / name).touch()
    stat, opened = os.stat, Path.open

    def denied(function):
        def guarded(path, *args, **kwargs):
            if Path(path).name.startswith("forbidden"):
                raise PermissionError(13, "Permission denied")
            return function(path, *args, **kwargs)

        return guarded

    monkeypatch.setattr(Path, "open", denied(opened))
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["forbidden.png", "link.png", "x.png/y.PNG"]
    assert not is_dicom(tmp_path / "forbidden")
    monkeypatch.setattr(os, "stat", denied(stat))
    assert [path.name for path in find_images(tmp_path)] == ["link.png", "y.PNG"]
    with pytest.raises(UserError, match="no images in it"):
        find_images(tmp_path / "missing")


def test_whatever_cannot_be_read_is_not_restored(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.dcm").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    pillow_file(tmp_path / "other.png", Image.fromarray(V8))
    dicom_file(tmp_path / "other.dcm", DerivationDescription="something else")
    for name in ("text.png", "text.dcm", "folder.png", "other.png", "other.dcm", "missing.png"):
        assert not is_restored(tmp_path / name)


@pytest.mark.parametrize(
    "name, reason", [("a.png", "of no known format"), ("a", "of no known format"), ("a.dcm", "no DICOM header")]
)
def test_a_file_that_is_empty_or_of_another_kind_is_called_that(name, reason, tmp_path):
    path = tmp_path / name
    for text, said in (("no image", reason), ("", "the file is empty")):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"^{path}: not a readable image \({said}\); remove or replace it$"):
            read_mammogram(path)


def jpeg_bytes(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


V8_RGB = Image.fromarray(np.stack([V8] * 3, -1))
CONVERT = "convert it to 8- or 16-bit grayscale"
# What a file of a name holds, and what is said of it.
STRANGERS = {
    "TIFF of 14 bits": ("a.tif", lambda p: tiff_file(p, bytes(70), 14).read_bytes(), rf"\(TIFF, .*{CONVERT} PNG"),
    "TIFF of 64 bits": ("a.tif", lambda p: tiff_file(p, bytes(280), 64).read_bytes(), rf"\(TIFF, .*{CONVERT} PNG"),
    "BigTIFF": ("a.tif", lambda p: b"II+\0\x08\0\0\0" + bytes(60), rf"\(BigTIFF, .*{CONVERT} PNG"),
    "JPEG of 12 bits": ("a.jpg", lambda p: b"\xff\xd8" + SOF, rf"\(JPEG of 12 bits, .*{CONVERT} PNG"),
    "lossless JPEG": ("a.jpg", lambda p: b"\xff\xd8" + SOF.replace(b"\xc1", b"\xc3"), rf"\(JPEG of 12 bits, .*{CONVERT} PNG"),
    "JPEG-LS": ("a.jpg", lambda p: b"\xff\xd8" + SOF.replace(b"\xc1", b"\xf7"), rf"\(JPEG-LS of 12 bits, .*{CONVERT} PNG"),
    "JPEG 2000": ("a.jpg", lambda p: jpeg_bytes(V8_RGB, format="JPEG2000"), rf"\(JPEG 2000, .*{CONVERT} PNG"),
    "JPEG 2000 stream": ("a.png", lambda p: jpeg_bytes(V8_RGB, format="JPEG2000", no_jp2=True), r"\(JPEG 2000, "),
    "JPEG XL": ("a.jpg", lambda p: b"\xff\x0a" + bytes(40), r"\(JPEG XL, "),
    "JPEG XL in a box": ("a.jpg", lambda p: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), r"\(JPEG XL, "),
    "BMP": ("a.png", lambda p: jpeg_bytes(V8_RGB, format="BMP"), rf"\(BMP, .*{CONVERT} PNG"),
    "WebP": ("a.jpg", lambda p: jpeg_bytes(V8_RGB, format="WEBP"), r"\(WebP, "),
    "DICOM as a picture": ("a.png", lambda p: dicom_file(p).read_bytes(), r"\(DICOM under the name of a picture\); rename it"),
    "picture as DICOM": ("a.dcm", lambda p: jpeg_bytes(V8_RGB, format="PNG"), r"\(PNG under the name of DICOM\); give it a suffix"),
    "no preamble": (
        "a.dcm", lambda p: dicom_file(p).read_bytes()[132:],
        r"\(DICOM without its preamble\); mend it with dcmconv \+te$"),
    "no preamble, implicit": (
        "1.2.3", lambda p: dicom_file(p, syntax=ImplicitVRLittleEndian).read_bytes()[META_BYTES:],
        r"\(DICOM without its preamble\); mend it with dcmconv \+te$"),
}  # fmt: skip
SOF = b"\xff\xc1\0\x0b\x0c\0\x05\0\x07\1\1\x11\0\xff\xd9"
META_BYTES = 286  # of the file header of `dicom_file`


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_file_of_a_kind_that_is_not_read_is_called_that(kind, tmp_path):
    name, make, words = STRANGERS[kind]
    path = tmp_path / name
    path.write_bytes(make(path))
    assert find_images(tmp_path) == [path]
    with pytest.raises(UserError, match=rf"^{path}: not a readable image {words}"):
        read_mammogram(path)


def test_planes_of_16_bits_and_signed_values_of_8_are_not_taken_for_others(tmp_path):
    planar = tiff_file(tmp_path / "a.tif", np.stack([V16] * 3, -1).tobytes(), (16, 16, 16), more={284: 2})
    with pytest.raises(UserError, match="several channels of 16 bits"):
        read_mammogram(planar)
    signed = tiff_file(tmp_path / "b.tif", V8.tobytes(), 8, more={339: 2})
    with pytest.raises(UserError, match=f"^{signed}: signed values of 8 bits; {CONVERT}"):
        read_mammogram(signed)


@pytest.mark.parametrize("name", ["a.png", "a.dcm", "a"])
def test_a_missing_file_is_called_missing(name, tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path / name}: no such file$"):
        read_mammogram(tmp_path / name)


def test_a_mammogram_of_pixels_alone_becomes_a_png(tmp_path):
    Mammogram(Path("x"), np.zeros(SHAPE, np.float32), 16).write(tmp_path / "a" / "b.png", V16 / np.float32(65535), "d")
    with Image.open(tmp_path / "a" / "b.png") as image:
        np.testing.assert_array_equal(np.asarray(image), V16)


def test_links_to_no_file_are_named(tmp_path, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    for name in ("b.png", "c.dcm", "notes.txt", ".hidden.png"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    assert [path.name for path in find_images(tmp_path)] == ["a.png"]
    assert capsys.readouterr().err == f"warning: {tmp_path}: 2 links lead to no file, such as b.png; left out\n"
