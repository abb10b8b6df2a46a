"""DICOM files: a derived image in place of one that was read. Sections PS3.x are of the DICOM standard."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
    generate_uid,
)

from files.dicom import Scaling, overlays_in_pixels
from files.pictures import SOFTWARE
from helper import UserError, reason_of

# Elements that are wrong once the pixels change: thumbnails, signatures, and where compressed frames begin.
_STALE_TAGS = (
    "IconImageSequence", "MACParametersSequence", "DigitalSignaturesSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)  # fmt: skip
# What the lossy transfer syntaxes, and those that may be, stand for (PS3.3 C.7.6.1.1.5.1).
LOSSY_METHODS = {
    JPEGBaseline8Bit: "ISO_10918_1",
    JPEGExtended12Bit: "ISO_10918_1",
    JPEGLSNearLossless: "ISO_14495_1",
    JPEG2000: "ISO_15444_1",
    HTJ2K: "ISO_15444_15",
}
# Elements that describe stored values before the modality LUT.
_LUT_TAGS = (
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue",
    "PixelPaddingRangeLimit",
)  # fmt: skip


def derived_dicom(
    path: Path,
    source: pydicom.Dataset,
    padding: np.ndarray | None,
    filling: np.ndarray | None,
    pixels: np.ndarray,
    description: str,
    series: str,
) -> bytes:
    """A DICOM file with `pixels` (H, W) in [0, 1] in place of those of the file `path`.

    `read_dicom` gave `source`, its data set, `padding` and `filling`. It becomes a derived image, with a new identifier from
    the source's and `description`, and a new series from the source's and `series`. Raises UserError if the source cannot be
    written back.
    """
    if not source.file_meta.get("TransferSyntaxUID", ExplicitVRLittleEndian).is_little_endian:
        raise UserError(f"{path}: big-endian DICOM can be read but not written; convert it with dcmconv +te first")
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # faults of the header stay as they are
            derived = _with_pixels(source, padding, filling, pixels)
            _mark_lossy(derived, source)
            _identify(derived, source, path.resolve(), description, series)
            derived.save_as(buffer, enforce_file_format=True)
    except Exception as error:  # noqa: BLE001  pydicom raises many kinds of error for a faulty header
        raise UserError(f"{path}: cannot be written back as DICOM ({reason_of(error)}); repair or convert it") from None
    return buffer.getvalue()


def _with_pixels(
    source: pydicom.Dataset, padding: np.ndarray | None, filling: np.ndarray | None, pixels: np.ndarray
) -> pydicom.Dataset:
    """A copy of a data set with other pixels; padding stays, and nothing of what lay in unused bits."""
    derived, scaling = copy.deepcopy(source), Scaling.of(source)
    values = scaling.stored(pixels.astype(np.float64))
    for tag in (*_STALE_TAGS, *(_LUT_TAGS if scaling.from_lut else ())):
        if tag in derived:
            delattr(derived, tag)
    # a command or a second file header in the data set is none of it
    for group in (0x0000, 0x0002, *overlays_in_pixels(source)):
        for element in derived.group_dataset(group):
            del derived[element.tag]
    is_kept = padding is not None and not scaling.from_lut
    values = values.astype(filling.dtype) if is_kept else values
    photometric = str(source.get("PhotometricInterpretation", "MONOCHROME2"))
    derived.set_pixel_data(values, photometric, scaling.bits, generate_instance_uid=False)
    if is_kept:
        values[padding] = filling  # a value past the bits stored too, which pydicom would refuse
        derived.PixelData = values.tobytes() + bytes(values.nbytes % 2)
    for tag, value in (("SmallestImagePixelValue", values.min()), ("LargestImagePixelValue", values.max())):
        if tag in derived:
            derived.add_new(tag, "SS" if scaling.signed else "US", int(value))
    return derived


def _mark_lossy(derived: pydicom.Dataset, source: pydicom.Dataset) -> None:
    """Say that an image was compressed lossily (PS3.3 C.7.6.1.1.5), if the header or the transfer syntax of its source does."""
    said = "LossyImageCompressionRatio", "LossyImageCompressionMethod"
    method = LOSSY_METHODS.get(source.file_meta.get("TransferSyntaxUID"))
    if method is None and not any(source.get(tag) for tag in said):
        return
    derived.LossyImageCompression = "01"
    if method is None:
        return
    size = source.Rows * source.Columns * source.BitsAllocated / 8
    for tag, value in zip(said, (f"{size / len(source.PixelData):.6g}", method), strict=True):
        if not source.get(tag):
            setattr(derived, tag, value)


def _identify(derived: pydicom.Dataset, source: pydicom.Dataset, place: Path, description: str, series: str) -> None:
    """Give a derived image its identifiers and its origin; `place` stands in for identifiers that the source lacks."""
    own, group = source.get("SOPInstanceUID") or place, source.get("SeriesInstanceUID") or place.parent
    derived.SOPInstanceUID = generate_uid(entropy_srcs=[str(own), description])
    derived.SeriesInstanceUID = generate_uid(entropy_srcs=[str(group), series, "series"])
    derived.SOPClassUID = source.get("SOPClassUID") or source.file_meta.get("MediaStorageSOPClassUID")
    derived.file_meta = FileMetaDataset()  # pydicom adds the identifiers and its own name
    derived.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    derived.preamble = bytes(128)
    kinds = source.get("ImageType")
    derived.ImageType = ["DERIVED", "SECONDARY", *(kinds[2:] if isinstance(kinds, MultiValue) else [])]
    derived.DerivationDescription = f"{SOFTWARE}: {description}"[:1024]
    derived.SeriesDescription = f"{str(source.get('SeriesDescription') or '')[:55]} restored".strip()
    if source.get("SOPInstanceUID"):
        purpose, item = pydicom.Dataset(), pydicom.Dataset()  # PS3.3 C.7.6.1, with code 121322 of PS3.16 CID 7202
        purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
        purpose.CodeMeaning = "Source image for image processing operation"
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = derived.SOPClassUID, source.SOPInstanceUID
        item.PurposeOfReferenceCodeSequence = [purpose]
        derived.SourceImageSequence = [item]
