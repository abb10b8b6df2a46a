"""Kinds of DICOM that real archives hold, beside those of test_images.py: how they are read, and what is written of them."""

import importlib.metadata
import io
import struct

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import (
    JPEG2000,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    RLELossless,
)

from files.images import read_mammogram
from files.padding import LEFT_OVER
from helper import ImageError, UserError
from restoration.outputs import plan
from scripts import call
from test_images import dicom_file, restored

SHAPE = 40, 30
V12 = np.linspace(0, 4095, 1200).reshape(SHAPE).round().astype(np.uint16)


def stream_file(path, stream, syntax, values=V12, **tags):
    """A DICOM file of a compressed `stream`, with the header of `values`."""
    dataset = pydicom.dcmread(dicom_file(path, values, **tags))
    dataset.PixelData, dataset.file_meta.TransferSyntaxUID = encapsulate([stream]), syntax
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


def jpeg_2000(values, **how):
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(file, "JPEG2000", no_jp2=True, **({"irreversible": False} | how))
    return file.getvalue()


def flipped(stream):
    """A JPEG 2000 stream whose sign bit says the opposite: its values move by half of their range."""
    place = stream.index(b"\xff\x4f\xff\x51") + 42
    return stream[:place] + bytes([stream[place] ^ 0x80]) + stream[place + 1 :]


# --- a stream's sign and its header's -----------------------------------------------------------------------------------

SIGNS = {
    "both unsigned": (jpeg_2000(V12), 0, 12),
    "both signed": (jpeg_2000(V12, signed=True), 1, 13),
    "signed stream": (jpeg_2000(V12, signed=True), 0, 12),
    "signed stream by its bit": (flipped(jpeg_2000(V12 + 32768)), 0, 12),
    "unsigned stream": (jpeg_2000(V12), 1, 13),
    "unsigned stream in 16 bits": (jpeg_2000(V12), 1, 16),
}


@pytest.mark.parametrize("kind", SIGNS)
def test_a_stream_says_its_own_sign(kind, tmp_path):
    stream, signed, bits = SIGNS[kind]
    path = stream_file(tmp_path / "a.dcm", stream, JPEG2000Lossless, bits=bits, PixelRepresentation=signed)
    target, mammogram = restored(path)
    scale, written = mammogram.scale, pydicom.dcmread(target)
    np.testing.assert_allclose(mammogram.pixels * scale.factor + scale.shift, V12, rtol=0, atol=0.01)
    np.testing.assert_array_equal(written.pixel_array, V12)
    assert (written.PixelRepresentation, written.BitsStored, mammogram.remarks) == (signed, bits, {})


@pytest.mark.parametrize(
    "stream, signed, words",
    [
        (jpeg_2000(V12), 1, "unsigned values that do not fit its header, which says signed"),
        (flipped(jpeg_2000(V12)), 0, "signed values that do not fit its header, which says unsigned"),
    ],
)
def test_a_stream_whose_sign_and_header_cannot_both_be_right_is_refused(stream, signed, words, tmp_path):
    path = stream_file(tmp_path / "a.dcm", stream, JPEG2000, PixelRepresentation=signed)
    with pytest.raises(ImageError) as error:
        read_mammogram(path)
    assert str(error.value) == f"{path}: its stream has {words}; convert it to uncompressed DICOM"


# --- faults that other readers pass over --------------------------------------------------------------------------------


def under_syntax(path, written, said, **tags):
    """A DICOM file whose data set is not in the transfer syntax that its file header says."""
    content = dicom_file(path, V12, syntax=written, **tags).read_bytes()
    header = pydicom.dcmread(path).file_meta
    meta, header.TransferSyntaxUID = 144 + header.FileMetaInformationGroupLength, said
    file = DicomBytesIO()
    write_file_meta_info(file, header)
    path.write_bytes(content[:132] + file.getvalue() + content[meta:])
    return path


def inserted(path, elements, place=None):
    """A DICOM file with bytes at the beginning of its data set or at a `place` in it."""
    content = dicom_file(path, V12).read_bytes()
    at = 144 + pydicom.dcmread(path).file_meta.FileMetaInformationGroupLength
    at = at if place is None else content.index(place)
    path.write_bytes(content[:at] + elements + content[at:])
    return path


def appended(path, rest):
    path.write_bytes(dicom_file(path, V12).read_bytes() + rest)
    return path


def lengthened(path, count):
    dataset = pydicom.dcmread(dicom_file(path, V12))
    dataset.PixelData += bytes(range(1, 9)) * (count // 8)
    dataset.save_as(path)
    return path


VIEW = Dataset()
VIEW.CodeValue, VIEW.CodeMeaning = "R-10242", "cranio-caudal"
COMMAND = struct.pack("<HH2sHH", 0, 0x100, b"US", 2, 1)
FAULTS = {
    "zeros behind": lambda p: appended(p, bytes(512)),
    "a byte behind": lambda p: appended(p, b"\0"),
    "text behind": lambda p: appended(p, b"written by an archive, 2004"),
    "noise behind": lambda p: appended(p, np.random.default_rng(0).bytes(999)),
    "padding behind": lambda p: appended(p, b"\xfc\xff\xfc\xffOB\0\0" + struct.pack("<I8x", 8)),
    "a delimiter behind": lambda p: appended(p, b"\xfe\xff\xdd\xe0" + bytes(4)),
    "a header behind": lambda p: appended(p, dicom_file(p, V12).read_bytes()[132:]),
    "more pixel data": lambda p: lengthened(p, 16),
    "twice the pixel data": lambda p: lengthened(p, 2 * V12.size),
    "implicit under explicit": lambda p: under_syntax(
        p, ImplicitVRLittleEndian, ExplicitVRLittleEndian, ViewCodeSequence=[VIEW], PixelPaddingValue=5000),
    "explicit under implicit": lambda p: under_syntax(
        p, ExplicitVRLittleEndian, ImplicitVRLittleEndian, ViewCodeSequence=[VIEW], PixelPaddingValue=5000),
    "a command": lambda p: inserted(p, COMMAND),
    "a command amid": lambda p: inserted(p, COMMAND, b"\x28\0\x02\0"),
    "a file header amid": lambda p: inserted(p, struct.pack("<HH2sH", 2, 0x13, b"SH", 4) + b"UNIT", b"\x28\0\x02\0"),
    "a group length": lambda p: inserted(p, struct.pack("<HH2sHI", 8, 0, b"UL", 4, 8)),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_what_other_readers_pass_over_is_read_and_not_written(kind, tmp_path):
    path = FAULTS[kind](tmp_path / "a.dcm")
    target, mammogram = restored(path)
    np.testing.assert_array_equal(mammogram.pixels, np.float32(V12 / 4095))
    written = pydicom.dcmread(target)
    np.testing.assert_array_equal(written.pixel_array, V12)
    assert len(written.PixelData) == 2 * V12.size
    assert (written.StudyInstanceUID, written.file_meta.TransferSyntaxUID) == ("1.2", ExplicitVRLittleEndian)
    if "plicit" in kind:
        assert written.ViewCodeSequence[0].CodeMeaning == "cranio-caudal"
        assert written.PixelPaddingValue == 5000 and mammogram.remarks == {LEFT_OVER: 0}
    # no longer than its source, but for what tells its origin
    assert target.stat().st_size < 2 * V12.size + 2000


@pytest.mark.parametrize("said", [JPEG2000Lossless, RLELossless])
def test_data_that_are_not_compressed_though_their_syntax_says_so_are_called_that(said, tmp_path):
    path = under_syntax(tmp_path / "a.dcm", ExplicitVRLittleEndian, said)
    with pytest.raises(
        ImageError, match=rf"^{path}: its transfer syntax says .*, but its pixel data are not compressed"
    ):
        read_mammogram(path)


def test_what_cannot_be_written_is_not_restored_first(tmp_path, own_folder, monkeypatch):
    path = dicom_file(tmp_path / "a.dcm", V12, syntax=ExplicitVRBigEndian)
    monkeypatch.setattr("restoration.batch.restore_image", lambda *_, **__: pytest.fail("restored"))
    result = call("main-restore", f"{path} --out out --no-tqdm")
    assert result.code == 2 and "big-endian DICOM can be read but not written" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 251 + ".dcm", "é" * 125 + "a.dcm", "x" * 251 + ".tif"])
def test_the_longest_names_are_written_and_longer_ones_refused_before_the_work(name, tmp_path):
    path = tmp_path / name
    if path.suffix == ".dcm":
        dicom_file(path, V12)
    else:
        Image.fromarray(V12).save(path)
    (job,) = plan([path], tmp_path / "out")
    read_mammogram(path).write(job.target, V12 / np.float32(4095), "")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [path.with_suffix(job.target.suffix).name]
    for how in ({"kinds": ["compare"]}, {"samples": 2}):
        with pytest.raises(UserError, match="too long a name for .*; shorten it$"):
            plan([path], tmp_path / "out", **how)
    bare = path.rename(path.with_name("1." + "2" * 253))
    if path.suffix == ".dcm":
        with pytest.raises(UserError, match="too long a name for '2*.dcm' to be made of it"):
            plan([bare], tmp_path / "out")


# --- compressed in other bits than the header says ----------------------------------------------------------------------

V8 = (V12 >> 4).astype(np.uint8)


def jpeg(values, **how):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "JPEG", quality=95, **how)
    return file.getvalue() + bytes(file.tell() % 2)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit])
def test_a_stream_of_8_bits_under_a_header_of_16_is_called_that(syntax, bits, tmp_path):
    path = stream_file(tmp_path / "a.dcm", jpeg(V8), syntax, V8.astype(np.uint16), bits=bits)
    with pytest.raises(ImageError) as error:
        read_mammogram(path)
    said = f"compressed as {syntax.name}, in 8 bits, but its header has BitsAllocated 16; convert it with dcmdjpeg"
    assert str(error.value) == f"{path}: {said}"


def test_no_package_is_named_that_is_installed(tmp_path, monkeypatch):
    path = stream_file(tmp_path / "a.dcm", b"\xff\xd8no image", JPEGBaseline8Bit, V8, bits=8, allocated=8)
    installed = {"pylibjpeg": "2.0"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    for words in ("else pip install pylibjpeg pylibjpeg-libjpeg", "replace it, or convert it to uncompressed DICOM"):
        with pytest.raises(ImageError, match=f"no installed decoder can read it; .*{words}$"):
            read_mammogram(path)
        installed["pylibjpeg-libjpeg"] = "2.0"


# --- what is written ----------------------------------------------------------------------------------------------------

# The stream, its syntax, what the source says of loss, and what is written: flag, ratios, methods.
NOTHING = None, None, None
LOSSY = {
    "JPEG that says nothing": (jpeg(V8), JPEGBaseline8Bit, {}, ("01", None, "ISO_10918_1")),
    "JPEG that says 00": (jpeg(V8), JPEGBaseline8Bit, {"LossyImageCompression": "00"}, ("01", None, "ISO_10918_1")),
    "JPEG 2000": (jpeg_2000(V12, irreversible=True), JPEG2000, {}, ("01", None, "ISO_15444_1")),
    "JPEG 2000 that says so": (
        jpeg_2000(V12, irreversible=True), JPEG2000,
        {"LossyImageCompression": "01", "LossyImageCompressionRatio": 12, "LossyImageCompressionMethod": "ISO_15444_1"},
        ("01", 12, "ISO_15444_1")),
    "lossless JPEG 2000": (jpeg_2000(V12), JPEG2000Lossless, {}, NOTHING),
    "lossless JPEG 2000 that says 00": (jpeg_2000(V12), JPEG2000Lossless, {"LossyImageCompression": "00"}, ("00", None, None)),
    "lossy once": (
        None, None, {"LossyImageCompression": "01", "LossyImageCompressionRatio": [9, 2],
                     "LossyImageCompressionMethod": ["ISO_10918_1", "ISO_15444_1"]},
        ("01", [9, 2], ["ISO_10918_1", "ISO_15444_1"])),
    "lossy once, though 00": (
        None, None, {"LossyImageCompression": "00", "LossyImageCompressionRatio": 9}, ("01", 9, None)),
    "never lossy": (None, None, {"LossyImageCompression": "00"}, ("00", None, None)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSY)
def test_a_lossy_source_stays_called_lossy(kind, tmp_path):
    stream, syntax, tags, expected = LOSSY[kind]
    small = {"bits": 8, "allocated": 8} if "JPEG that" in kind else {}
    values = V8 if small else V12
    if stream is None:
        path = dicom_file(tmp_path / "a.dcm", values, **tags)
    else:
        path = stream_file(tmp_path / "a.dcm", stream, syntax, values, **small, **tags)
    written = pydicom.dcmread(restored(path)[0])
    said = [written.get(f"LossyImageCompression{name}") for name in ("", "Ratio", "Method")]
    if expected[0] == "01" and expected[1] is None:
        # the item has 16 bytes of its own before the stream, and an end of 8
        assert float(said[1]) == pytest.approx(values.nbytes / len(stream), rel=0.1)
        said[1] = None
    assert tuple(said) == expected


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("kind", ["plain", "signed", "padded", "RLE", "JPEG 2000", "JPEG"])
def test_simpleitk_reads_a_written_file_as_its_source(kind, photometric, tmp_path):
    """It turns MONOCHROME1 over, so pydicom's values are not its own."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    path, tags = tmp_path / "a.dcm", {"PhotometricInterpretation": photometric}
    if kind == "JPEG 2000":
        stream_file(path, jpeg_2000(V12), JPEG2000Lossless, bits=16, **tags)
    elif kind == "JPEG":
        stream_file(path, jpeg(V8), JPEGBaseline8Bit, V8, bits=8, allocated=8, **tags)
    elif kind == "signed":
        dicom_file(path, V12.astype(int) - 2048, bits=16, **tags)
    elif kind == "padded":
        dicom_file(path, np.where(V12 < 800, 0, V12), PixelPaddingValue=0, **tags)
    else:
        dicom_file(path, V12, **tags)
        if kind == "RLE":
            dataset = pydicom.dcmread(path)
            dataset.compress(RLELossless, generate_instance_uid=False)
            dataset.save_as(path)
    source, ours = (sitk.GetArrayFromImage(sitk.ReadImage(str(file)))[0] for file in (path, restored(path)[0]))
    np.testing.assert_array_equal(ours, source)
    stored = pydicom.dcmread(path).pixel_array.astype(int)
    # falling if it is turned over: the least value becomes the greatest
    assert np.corrcoef(source.ravel(), stored.ravel())[0, 1] == pytest.approx(-1 if photometric == "MONOCHROME1" else 1)
