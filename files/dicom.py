"""DICOM files: the image of one, and a derived image in place of it.

Reading: `read_dicom`, then `Scaling`, `_decode`, `_padding`. Writing: `derived_dicom`. Sections PS3.x are of the DICOM standard.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_file_meta_info, read_preamble
from pydicom.multival import MultiValue
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, generate_uid

from files.pictures import MAX_PIXELS, PICTURE_SUFFIXES, SOFTWARE, refuse_size, stream_size
from helper import ImageError, UserError, reason_of

DICOM_SUFFIXES = (".dcm", ".dicom")
MAX_HEADER_BYTES = 2**24  # of a data set, beside its pixels
FOR_PROCESSING, FOR_PRESENTATION = "FOR PROCESSING", "FOR PRESENTATION"  # PresentationIntentType
PITCH_RANGE = 0.001, 10.0  # mm; a pixel pitch beyond it is a slip
LEAST_TURNING = -0.2  # correlation of neighbouring steps: white noise has -0.5, a scintillator's -0.3, fillings none
# Elements that are wrong once the pixels change: thumbnails, signatures, and where compressed frames begin.
_STALE_TAGS = (
    "IconImageSequence", "MACParametersSequence", "DigitalSignaturesSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)  # fmt: skip
# Elements that describe stored values before the modality LUT.
_LUT_TAGS = (
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue",
    "PixelPaddingRangeLimit",
)  # fmt: skip


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix or, if that does not tell, by the mark at byte 128."""
    if (suffix := path.suffix.lower()) in (*DICOM_SUFFIXES, *PICTURE_SUFFIXES):
        return suffix in DICOM_SUFFIXES
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_image(path: Path) -> bool:
    """Whether a DICOM file is an image, not a directory, report, presentation state or the like, by its class (PS3.4 B.5).

    Of a class that the standard does not know, by whether it has rows. A file that cannot be read counts: it is reported
    when it is loaded.
    """
    try:
        kind = str(read_file_meta_info(path).get("MediaStorageSOPClassUID") or "") or dicom_tag(path, "SOPClassUID")
        return not _other_class(kind) and ("Storage" in UID(kind).name or dicom_tag(path, "Rows") != "")
    except Exception:  # noqa: BLE001  pydicom raises many kinds of error for a broken file
        return True


def _other_class(kind: str) -> str:
    """The name of a class of what is no image; empty if it is one, or not known."""
    name = UID(kind).name
    return name if "Storage" in name and "Image Storage" not in name else ""


def dicom_tags(path: Path, *tags: str) -> tuple[str, ...]:
    """Elements of a DICOM file as text, empty if they are missing; raises what pydicom raises for a broken file."""
    _refuse_inflation(path)
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*tags])
    return tuple(str(header.get(tag) or "").strip() for tag in tags)


def dicom_tag(path: Path, tag: str) -> str:
    """One element of a DICOM file, as `dicom_tags` gives it."""
    return dicom_tags(path, tag)[0]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_dicom(path: Path) -> tuple[np.ndarray, int, pydicom.Dataset, np.ndarray | None]:
    """Pixels (H, W) float32 in [0, 1], bits, the whole data set, and where the padding is: (H, W) bool or None.

    Raises ImageError if the file is not a single grayscale image of at most 16 bits, and what pydicom raises for a broken one.
    """
    _refuse_inflation(path)
    header = pydicom.dcmread(path)
    if other := _other_class(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID") or "")):
        raise ImageError(f"{path}: a DICOM file of class {other}, which holds no image; leave it out")
    if int(header.get("NumberOfFrames", 1) or 1) > 1 or int(header.get("SamplesPerPixel", 1)) > 1:
        raise ImageError(f"{path}: a multi-frame or colour DICOM; only single grayscale images can be read")
    photometric = header.get("PhotometricInterpretation", "MONOCHROME2")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(f"{path}: a {photometric} DICOM; only single grayscale images can be read")
    if "PixelData" not in header:
        raise ImageError(f"{path}: a DICOM file cut short or without pixel data; remove or replace it")
    refuse_size(path, int(header.Columns), int(header.Rows))
    scaling = Scaling.of(header)
    if not 1 <= scaling.bits <= 16 or int(header.get("HighBit", header.BitsStored - 1)) != header.BitsStored - 1:
        raise ImageError(
            f"{path}: {header.BitsStored} bits with high bit {header.get('HighBit')}; only up to 16, from bit 0 on, can be read"
        )
    stored = _decode(path, header)
    pixels = scaling.unit(_through_lut(stored, header) if scaling.from_lut else stored).astype(np.float32)
    padding = _padding(header, stored)
    if padding is not None:  # the background of a detector's own image is bright
        is_raw = intent_of(header) == FOR_PROCESSING
        pixels[padding] = pixels[~padding].max(initial=0) if is_raw else 0
    return pixels, scaling.bits, header, padding


@dataclass(frozen=True)
class Scaling:
    """How stored values, modality values and [0, 1] are related (PS3.3 C.11.1): stored = factor * unit + shift.

    A noise model of stored values is that of [0, 1] by `noise.scaled(1 / factor, -shift / factor)`.
    """

    bits: int
    signed: bool = False
    falling: bool = False  # [0, 1] falls as stored values rise
    from_lut: bool = False  # the values come from a modality LUT: a derived image stores those

    @classmethod
    def of(cls, header: pydicom.Dataset) -> Scaling:
        """The scaling that a data set declares."""
        if header.get("ModalityLUTSequence"):
            bits, signed = int(header.ModalityLUTSequence[0].LUTDescriptor[2]), False
        else:
            bits, signed = int(header.BitsStored), bool(header.get("PixelRepresentation", 0))
        return cls(bits, signed, _falls(header), from_lut=bool(header.get("ModalityLUTSequence")))

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest value that can be stored."""
        offset = 2 ** (self.bits - 1) if self.signed else 0
        return -offset, 2**self.bits - 1 - offset

    @property
    def factor(self) -> float:
        """What [0, 1] is multiplied by to give stored values; below 0 if they fall as it rises."""
        low, high = self.limits
        return float(low - high if self.falling else high - low)

    @property
    def shift(self) -> float:
        """The stored value of 0."""
        return float(self.limits[1 if self.falling else 0])

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Bring stored values, or those of the modality LUT, to [0, 1]."""
        return ((values.astype(np.float64) - self.shift) / self.factor).clip(0, 1)

    def stored(self, unit: np.ndarray) -> np.ndarray:
        """Bring [0, 1] to values to store."""
        kind = ("i" if self.signed else "u") + ("1" if self.bits <= 8 else "2")
        return np.rint(self.factor * unit.clip(0, 1) + self.shift).astype(kind)


def intent_of(header: pydicom.Dataset) -> str:
    """FOR PROCESSING, which is a detector's own image, FOR PRESENTATION, or empty if neither intent nor class tells.

    PS3.3 C.8.11.1; the class (PS3.4 B.5) stands in for an intent that is missing.
    """
    words = str(header.get("PresentationIntentType") or "").strip() or UID(str(header.get("SOPClassUID") or "")).name
    return next((known for known in (FOR_PROCESSING, FOR_PRESENTATION) if words.upper().endswith(known)), "")


def detector_of(header: pydicom.Dataset) -> str:
    """Manufacturer and model in printable words; empty if the data set names neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of letters that it does not know
        words = " ".join(str(header.get(tag) or "") for tag in ("Manufacturer", "ManufacturerModelName"))
    return " ".join("".join(letter if letter.isprintable() else " " for letter in words).split())


def pitch_of(header: pydicom.Dataset) -> float | None:
    """The pixel pitch, in mm, that a data set states at the detector; None if it states none that can be."""
    least, most = PITCH_RANGE
    for tag in ("ImagerPixelSpacing", "PixelSpacing"):
        with contextlib.suppress(TypeError, ValueError, IndexError):
            if least <= (pitch := float(header.get(tag)[0])) <= most:
                return pitch
    return None


def _falls(header: pydicom.Dataset) -> bool:
    """Whether [0, 1] falls as stored values rise.

    It rises with the exposure if the image is a detector's own, as PS3.3 C.8.11.3.1.2 says of stored values whatever their
    photometric interpretation is; else from black to white. Of a slope only the sign matters, for the range of the stored
    values is brought to [0, 1].
    """
    slope_falls = not header.get("ModalityLUTSequence") and float(header.get("RescaleSlope") or 1) < 0
    if intent_of(header) == FOR_PROCESSING:
        sign = header.get("PixelIntensityRelationshipSign")
        return slope_falls if sign is None else int(sign) < 0
    return (header.get("PhotometricInterpretation") == "MONOCHROME1") != slope_falls


def _through_lut(stored: np.ndarray, header: pydicom.Dataset) -> np.ndarray:
    lut = copy.deepcopy(header.ModalityLUTSequence[0])
    # the descriptor says how wide the values are, but pydicom takes it for the width of a word
    lut.LUTDescriptor[2] = 8 if lut.LUTDescriptor[2] <= 8 else 16
    table = pydicom.Dataset()
    table.ModalityLUTSequence = [lut]
    return apply_modality_lut(stored, table)


def _padding(header: pydicom.Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Where the stored values are padding (PS3.3 C.7.5.1.1.2); None if the file declares no padding value that holds.

    A value that the stored type cannot hold is left over from another depth. A range in which neighbours go up
    and down as noise does reaches into the air: that is image.
    """
    if header.get("PixelPaddingValue") is None:
        return None
    value, limit = header.PixelPaddingValue, header.get("PixelPaddingRangeLimit")
    ends, held = np.array([int(value), int(value if limit is None else limit)]), np.iinfo(stored.dtype)
    # the elements have 16 bits, and some files write -1 as 65535 or the other way round
    ends[ends > held.max] -= 2**16 if held.min < 0 else 0
    ends[ends < held.min] += 0 if held.min < 0 else 2**16
    if ends.min() < held.min or ends.max() > held.max:
        return None
    padding = (stored >= ends.min()) & (stored <= ends.max())
    step = np.diff(stored.astype(np.float64), axis=1)
    steps = np.stack([step[:, :-1], step[:, 1:]])[:, padding[:, :-2] & padding[:, 1:-1] & padding[:, 2:]]
    return None if steps.prod(0).sum() < LEAST_TURNING * (steps**2).sum() / 2 else padding


def _refuse_inflation(path: Path) -> None:
    """Raise ImageError if a deflated data set grows beyond the size of a mammogram."""
    if read_file_meta_info(path).get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    with path.open("rb") as file:
        read_preamble(file, force=False)
        # reading all elements leaves the file at the first deflated byte
        list(read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2))
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflate.unconsumed_tail or file.read(2**16):
            size += len(inflate.decompress(chunk, 2**20))
            if size > 2 * MAX_PIXELS + MAX_HEADER_BYTES:
                raise ImageError(f"{path}: inflates to more than {size:,} bytes; not a mammogram, remove it")


def _decode(path: Path, header: pydicom.Dataset) -> np.ndarray:
    """The stored values (H, W). Raises ImageError, naming the package to install, if no installed decoder can read them."""
    syntax = header.file_meta.get("TransferSyntaxUID", ExplicitVRLittleEndian)
    if not syntax.is_compressed or syntax == RLELossless:
        return header.pixel_array
    plugin = "openjpeg" if "2000" in syntax.name else "libjpeg"
    wanted = "pyjpegls" if "JPEG-LS" in syntax.name else f"pylibjpeg pylibjpeg-{plugin}"
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise ImageError(
            f"{path}: {syntax.name} is a compression that cannot be read; convert it to uncompressed DICOM"
        ) from None
    with contextlib.suppress(ValueError):  # the decoder complains if the data are not encapsulated
        refuse_size(path, *stream_size(get_frame(header.PixelData, 0, number_of_frames=1)))
    if not available:
        raise ImageError(f"{path}: compressed as {syntax.name}, whose decoder is not installed; pip install {wanted}")
    try:
        return header.pixel_array
    except Exception:  # noqa: BLE001  Pillow decodes some images of a kind and not others
        raise ImageError(
            f"{path}: compressed as {syntax.name}, and no installed decoder can read it; replace it if it is damaged, "
            f"else pip install {wanted}"
        ) from None


# --- writing ---------------------------------------------------------------------------------------------------------


def derived_dicom(
    path: Path, source: pydicom.Dataset, padding: np.ndarray | None, pixels: np.ndarray, description: str, series: str
) -> bytes:
    """A DICOM file with `pixels` (H, W) in [0, 1] in place of those of the file `path`, which `read_dicom` gave as `source`.

    It becomes a derived image, with a new identifier from the source's and `description`, and a new series from the
    source's and `series`. Raises UserError if the source cannot be written back.
    """
    if not source.file_meta.get("TransferSyntaxUID", ExplicitVRLittleEndian).is_little_endian:
        raise UserError(f"{path}: big-endian DICOM can be read but not written; convert it with dcmconv +te first")
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # faults of the header stay as they are
            derived = _with_pixels(source, padding, pixels)
            _identify(derived, source, path.resolve(), description, series)
            derived.save_as(buffer, enforce_file_format=True)
    except Exception as error:  # noqa: BLE001  pydicom raises many kinds of error for a faulty header
        raise UserError(f"{path}: cannot be written back as DICOM ({reason_of(error)}); repair or convert it") from None
    return buffer.getvalue()


def _with_pixels(source: pydicom.Dataset, padding: np.ndarray | None, pixels: np.ndarray) -> pydicom.Dataset:
    """A copy of a data set with other pixels; padding stays."""
    derived, scaling = copy.deepcopy(source), Scaling.of(source)
    values = scaling.stored(pixels.astype(np.float64))
    if padding is not None and not scaling.from_lut:
        values[padding] = source.pixel_array[padding]
    for tag in (*_STALE_TAGS, *(_LUT_TAGS if scaling.from_lut else ())):
        if tag in derived:
            delattr(derived, tag)
    photometric = str(source.get("PhotometricInterpretation", "MONOCHROME2"))
    derived.set_pixel_data(values, photometric, scaling.bits, generate_instance_uid=False)
    for tag, value in (("SmallestImagePixelValue", values.min()), ("LargestImagePixelValue", values.max())):
        if tag in derived:
            derived.add_new(tag, "SS" if scaling.signed else "US", int(value))
    return derived


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
