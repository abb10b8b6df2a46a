"""What is written of DICOM of every kind, as others judge it: dciodvfy of dicom3tools and dcm2pnm of dcmtk."""

import re
import shutil
import subprocess

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, RLELossless

from test_dicom_kinds import FAULTS, LOSSY, SIGNS, V8, V12, VIEW, dicom_file, stream_file
from test_images import DICOMS, RAWS, compressed, lut, restored
from test_padding import HELD, IMAGE, overlay, padded_file, with_overlay


def of_stream(stream, syntax, tags):
    """A maker of a file: of a compressed stream if there is one, else as it is."""
    small = {"bits": 8, "allocated": 8} if stream and stream[:2] == b"\xff\xd8" else {}
    values = V8 if small else V12
    if stream is None:
        return lambda path: dicom_file(path, values, **tags)
    return lambda path: stream_file(path, stream, syntax, values, **small, **tags)


needs_dciodvfy = pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy of dicom3tools is not installed")
MAKERS = {
    **{f"values, {name}": lambda p, v=v, t=t: dicom_file(p, v, **t) for name, (v, t, _) in DICOMS.items()},
    **{
        f"raw, {name}": lambda p, t=t: dicom_file(p, V12.astype(int) - 2048 * ("PixelRepresentation" in t), **t)
        for name, (t, _) in RAWS.items()
    },
    **{f"padding, {name}": lambda p, h=h: padded_file(p, *h[:3], **h[3]) for name, h in HELD.items()},
    **{f"fault, {name}": make for name, make in FAULTS.items()},
    **{f"loss, {name}": of_stream(*kind[:3]) for name, kind in LOSSY.items()},
    **{
        f"sign, {name}": of_stream(stream, JPEG2000Lossless, {"PixelRepresentation": signed, "bits": bits})
        for name, (stream, signed, bits) in SIGNS.items()
    },
    **{f"compressed, {s.name}": lambda p, s=s: compressed(p, s) for s in (RLELossless, JPEG2000Lossless)},
    "modality LUT": lambda p: dicom_file(p, V12, ModalityLUTSequence=lut(16)),
    "overlay": lambda p: with_overlay(dicom_file(p, IMAGE), 0x6000, overlay(0, bytes(IMAGE.size // 8))),
    "overlay in unused bits": lambda p: with_overlay(dicom_file(p, IMAGE | 0x8000), 0x6000, overlay(15)),
}


def code(value, scheme, meaning, **more):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    for name, content in more.items():
        setattr(item, name, content)
    return item


# All that a mammogram FOR PRESENTATION has to say (PS3.3 A.27).
COMPLETE = {
    **dict.fromkeys(("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber")),
    **dict.fromkeys(("ReferringPhysicianName", "StudyID", "SeriesNumber", "Manufacturer", "DetectorType")),
    "PatientID": "P1", "InstanceNumber": 1, "Modality": "MG", "ImageLaterality": "L", "PatientOrientation": ["A", "FR"],
    "PresentationIntentType": "FOR PRESENTATION", "BurnedInAnnotation": "NO", "PresentationLUTShape": "IDENTITY",
    "PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": -1, "LossyImageCompression": "00",
    "RescaleIntercept": 0, "RescaleSlope": 1, "RescaleType": "US", "ImagerPixelSpacing": [0.07, 0.07],
    "PositionerType": "MAMMOGRAPHIC", "OrganExposed": "BREAST", "AcquisitionContextSequence": [],
    "SOPInstanceUID": "1.2.3.4", "WindowCenter": 2000, "WindowWidth": 3000,
    "AnatomicRegionSequence": [code("76752008", "SCT", "Breast")],
    "ViewCodeSequence": [code("399162004", "SCT", "cranio-caudal", ViewModifierCodeSequence=[])],
}  # fmt: skip


def errors(path):
    """What dciodvfy calls errors."""
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace", check=False)
    return {line for line in said.stderr.splitlines() if line.startswith("Error")}


@pytest.fixture(scope="module")
def plain_errors(tmp_path_factory):
    """Those of a header without what the kinds leave out, for sources that are too faulty to be looked at."""
    path = tmp_path_factory.mktemp("plain") / "a.dcm"
    return errors(dicom_file(path, V12)) | errors(dicom_file(path, V12, ViewCodeSequence=[VIEW]))


@needs_dciodvfy
@pytest.mark.parametrize("kind", MAKERS)
def test_dciodvfy_finds_no_error_that_the_source_has_not(kind, tmp_path, plain_errors):
    path = MAKERS[kind](tmp_path / "a.dcm")
    assert errors(restored(path)[0]) <= errors(path) | plain_errors


@needs_dciodvfy
@pytest.mark.parametrize("photometric, shape", [("MONOCHROME1", "INVERSE"), ("MONOCHROME2", "IDENTITY")])
@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_dciodvfy_finds_no_error_in_what_is_made_of_a_complete_mammogram(bits, photometric, shape, tmp_path):
    tags = COMPLETE | {"PhotometricInterpretation": photometric, "PresentationLUTShape": shape}
    path = dicom_file(tmp_path / "a.dcm", V12 >> max(12 - bits, 0), bits=bits, PixelPaddingValue=0, **tags)
    assert errors(path) == set()
    with_overlay(path, 0x6000, overlay(15))  # which is retired
    assert any("OverlayData" in line for line in errors(path)) and errors(restored(path)[0]) == set()


@pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="dcm2pnm of dcmtk is not installed")
@pytest.mark.parametrize("kind", MAKERS)
def test_dcm2pnm_reads_what_is_written(kind, tmp_path):
    target, _ = restored(MAKERS[kind](tmp_path / "a.dcm"))
    picture = tmp_path / "a.pgm"
    said = subprocess.run(["dcm2pnm", str(target), str(picture)], capture_output=True, text=True, check=False)
    assert said.returncode == 0 and not re.search("^[EF]: ", said.stderr, re.MULTILINE), said.stderr
    assert picture.stat().st_size > 0
