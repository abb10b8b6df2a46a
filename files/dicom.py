"""DICOM files: the image of one. Sections PS3.x are of the DICOM standard; `dicom_writing.py` writes."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset, read_file_meta_info, read_partial, read_preamble
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless

from files.padding import find_padding
from files.pictures import MAX_PIXELS, PICTURE_SUFFIXES, StreamHeader, refuse_size
from helper import ImageError

DICOM_SUFFIXES = (".dcm", ".dicom")
MAX_HEADER_BYTES = 2**24  # of a data set, beside its pixels
FOR_PROCESSING, FOR_PRESENTATION = "FOR PROCESSING", "FOR PRESENTATION"  # PresentationIntentType
PITCH_RANGE = 0.001, 10.0  # mm; a pixel pitch beyond it is a slip
PIXEL_DATA = 0x7FE00010
BEGIN_OF_FRAMES = b"\xfe\xff\x00\xe0"  # the first item of compressed pixel data (PS3.5 A.4)
OVERLAY = "an overlay in unused bits of the pixels, which a restored image does not keep"
TO_UNCOMPRESSED = "convert it to uncompressed DICOM"
PAST_THE_BITS = "more bits than BitsStored says, such as values too great for it; these bits are ignored"


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix or, if that does not tell, by the mark at byte 128."""
    if (suffix := path.suffix.lower()) in (*DICOM_SUFFIXES, *PICTURE_SUFFIXES):
        return suffix in DICOM_SUFFIXES
    return has_mark(path)


def has_mark(path: Path) -> bool:
    """Whether a file has the mark of DICOM at byte 128 (PS3.10 7.1)."""
    return _head(path)[128:] == b"DICM"


def lacks_preamble(path: Path) -> bool:
    """Whether a file begins as DICOM does behind its preamble and mark: with group 2 or 8, a low element, and a length."""
    head = _head(path).ljust(8)
    group, element, length = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little"), head[4:8]
    return group in (2, 8) and element <= 0x18 and (length[:2].isupper() or length[2:] == bytes(2))


def _head(path: Path) -> bytes:
    """The first 132 bytes of a file, none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(132)
    except OSError:
        return b""


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


def read_dicom(path: Path) -> dict[str, Any]:
    """What a `Mammogram` holds of a DICOM file.

    Raises ImageError if the file is not a single grayscale image of at most 16 bits, and what pydicom raises for a broken one.
    """
    _refuse_inflation(path)
    with path.open("rb") as file:
        header = read_partial(file, stop_when=_behind_the_pixels())
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
    element = header.get_item(PIXEL_DATA)  # which the transfer syntax may contradict, and pydicom reads as it is
    header.set_original_encoding(element.is_implicit_VR, element.is_little_endian)
    scaling = Scaling.of(header)
    if not 1 <= scaling.bits <= 16 or int(header.get("HighBit", header.BitsStored - 1)) != header.BitsStored - 1:
        bits = f"{header.BitsStored} bits with high bit {header.get('HighBit')}"
        raise ImageError(f"{path}: {bits}; only up to 16, from bit 0 on, can be read")
    raw = _decode(path, header)
    unused = max(8 * raw.itemsize - header.BitsStored, 0)
    stored = raw << unused >> unused
    pixels = scaling.unit(_through_lut(stored, header) if scaling.from_lut else stored).astype(np.float32)
    limits = Scaling(header.BitsStored, bool(header.get("PixelRepresentation", 0))).limits
    padding, remarks = find_padding(header, raw, stored, limits)
    if overlays := sum(1 << bit for bit in set(overlays_in_pixels(header).values())):
        remarks[OVERLAY] = 0
    past = ((raw ^ stored).astype(np.int32) & ~overlays) != 0
    if padding is not None:
        past &= ~padding
        is_raw = intent_of(header) == FOR_PROCESSING  # the background of a detector's own image is bright
        pixels[padding] = pixels[~padding].max(initial=0) if is_raw else 0
    if past.any():
        remarks[PAST_THE_BITS] = int(past.sum())
    filling = raw[np.zeros_like(past) if padding is None else padding]
    return dict(pixels=pixels, bits=scaling.bits, header=header, padding=padding, filling=filling, remarks=remarks)


def _behind_the_pixels() -> Callable[..., bool]:
    """A condition of pydicom to stop reading: what follows the pixels is no image, nor always DICOM."""
    seen = set()

    def stops(tag: int, *_: object) -> bool:
        is_behind = PIXEL_DATA in seen
        seen.add(tag)
        return is_behind

    return stops


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
        if luts := header.get("ModalityLUTSequence"):
            return cls(int(luts[0].LUTDescriptor[2]), False, _falls(header), from_lut=True)
        return cls(int(header.BitsStored), bool(header.get("PixelRepresentation", 0)), _falls(header))

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


def overlays_in_pixels(header: pydicom.Dataset) -> dict[int, int]:
    """Groups 60xx of overlays without data of their own, which lie in unused bits, and their bits (PS3.3 C.9.2, retired)."""
    groups = [group for group in range(0x6000, 0x6020, 2) if header.group_dataset(group)]
    bits = {group: header.get((group, 0x0102)) for group in groups if (group, 0x3000) not in header}
    return {group: int(bit.value or 0) if bit else 0 for group, bit in bits.items()}


def _decode(path: Path, header: pydicom.Dataset) -> np.ndarray:
    """The stored values (H, W) with the bits that are not used.

    Raises ImageError, naming the remedy, if no installed decoder can read them or a stream contradicts its header.
    """
    syntax = header.file_meta.get("TransferSyntaxUID", ExplicitVRLittleEndian)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        reason = f"{syntax.name} is a compression that cannot be read"
        raise ImageError(f"{path}: {reason}; {TO_UNCOMPRESSED}") from None
    if syntax.is_compressed and not header.PixelData.startswith(BEGIN_OF_FRAMES):
        contrary = f"its transfer syntax says {syntax.name}, but its pixel data are not compressed"
        raise ImageError(f"{path}: {contrary}; correct the syntax")
    if not syntax.is_compressed or syntax == RLELossless:
        return decoder.as_array(header, index=0, correct_unused_bits=False)[0]
    stream = StreamHeader()
    with contextlib.suppress(ValueError):  # the decoder complains of data that are cut short
        stream = StreamHeader.of(get_frame(header.PixelData, 0, number_of_frames=1))
    refuse_size(path, stream.width, stream.height)
    plugin = "openjpeg" if "2000" in syntax.name else "libjpeg"
    wanted = "pyjpegls" if "JPEG-LS" in syntax.name else f"pylibjpeg pylibjpeg-{plugin}"
    if not decoder.is_available:
        raise ImageError(f"{path}: compressed as {syntax.name}, whose decoder is not installed; pip install {wanted}")
    is_signed = bool(header.get("PixelRepresentation", 0))
    how = {} if stream.signed in (None, is_signed) else {"pixel_representation": int(stream.signed)}
    try:
        values = decoder.as_array(header, index=0, correct_unused_bits=False, **how)[0]
    except Exception:  # noqa: BLE001  Pillow decodes some images of a kind and not others
        if 0 < stream.bits <= 8 < header.BitsAllocated:
            reason = f"in {stream.bits} bits, but its header has BitsAllocated {header.BitsAllocated}; convert it with dcmdjpeg"
        elif all(map(_is_installed, wanted.split())):
            reason = f"and no installed decoder can read it; replace it, or {TO_UNCOMPRESSED}"
        else:
            reason = f"and no installed decoder can read it; replace it if it is damaged, else pip install {wanted}"
        raise ImageError(f"{path}: compressed as {syntax.name}, {reason}") from None
    if not how:
        return values
    low, high = Scaling(header.BitsStored, is_signed).limits
    if values.min() < low or values.max() > high:
        sign = ("unsigned", "signed")
        contrary = f"{sign[not is_signed]} values that do not fit its header, which says {sign[is_signed]}"
        raise ImageError(f"{path}: its stream has {contrary}; {TO_UNCOMPRESSED}")
    return values.view(values.dtype.str.replace(*("iu" if stream.signed else "ui")))


def _is_installed(package: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(package))
    return False
