"""Mammogram files: DICOM, PNG, JPEG, TIFF and PGM, read to [0, 1] and written back at their own depth."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import re
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.multival import MultiValue
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, generate_uid

from helper import ImageError, UserError
from running.writing import atomic_path

IMAGE_SUFFIXES = (".pgm", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
FORMATS = ("PNG", "JPEG", "TIFF", "PPM")  # of pictures; Pillow reads others, some by running other programs
MAX_PIXELS = 2**27  # four times the largest film digitised at 50 micrometres; more is taken for a trap
MAX_HEADER_BYTES = 2**24  # of a DICOM file, beside its pixels
SOFTWARE = "Low-dose mammography restoration"  # marks what `Mammogram.write` wrote, and pictures that this code drew
_PHOTOMETRIC_TAG, _BITS_TAG, _ORIENTATION_TAG, _RESOLUTION_TAG = 262, 258, 274, 282  # TIFF 6.0
# What holds no longer once the pixels are others: thumbnails, signatures, and where compressed frames begin.
_STALE_TAGS = (
    "IconImageSequence", "MACParametersSequence", "DigitalSignaturesSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)  # fmt: skip
# What speaks of stored values that have since gone through a modality LUT.
_LUT_TAGS = (
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType", "PixelPaddingValue",
    "PixelPaddingRangeLimit",
)  # fmt: skip
_EXTREMES = ("SmallestImagePixelValue", "LargestImagePixelValue")


@dataclass(frozen=True)
class Mammogram:
    """A mammogram as its file holds it."""

    path: Path
    pixels: np.ndarray  # (H, W) float32 in [0, 1], dense tissue bright
    bits: int  # of a picture file 8 or 16; of DICOM what it stores
    header: pydicom.Dataset | None = None  # of DICOM: everything beside the pixels, and them
    padding: np.ndarray | None = None  # (H, W) bool: pixels that DICOM says are none
    carried: dict[str, Any] = field(default_factory=dict)  # what a PNG of it should carry too: pixel pitch, orientation

    @property
    def suffix(self) -> str:
        """Of the file that `write` makes: `.dcm` for DICOM, else `.png`."""
        return ".png" if self.header is None else ".dcm"

    def write(self, path: Path, pixels: np.ndarray, description: str, *, series: str = "") -> None:
        """Write `pixels` (H, W) in [0, 1] in place of this mammogram's: its size, depth, orientation, and patient.

        DICOM becomes a derived image of a new series, with identifiers that depend on the source and on `description`
        alone; images with one description of their `series` (default: their own) share one. Anything else becomes a PNG.
        Raises UserError where the file cannot be written.
        """
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"pixels must be {self.pixels.shape}, not {pixels.shape}")
        if self.header is not None:
            content = self._dicom(pixels, description, series or description)
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
            return
        values = np.rint(pixels.astype(np.float64).clip(0, 1) * (2**self.bits - 1))
        text = PngInfo()
        text.add_itxt("Software", SOFTWARE)
        text.add_itxt("Description", description)
        picture = Image.fromarray(values.astype(np.uint8 if self.bits == 8 else np.uint16))
        with atomic_path(path) as temporary:
            picture.save(temporary, format="PNG", pnginfo=text, **self.carried)

    def _dicom(self, pixels: np.ndarray, description: str, series: str) -> bytes:
        buffer = io.BytesIO()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a header has wrong stays as it is
                self._derived(pixels, description, series).save_as(buffer, enforce_file_format=True)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  pydicom raises many kinds for a header that is not as it should be
            raise UserError(
                f"{self.path}: cannot be written back as DICOM ({_reason(error)}); repair or convert it"
            ) from None
        return buffer.getvalue()

    def _derived(self, pixels: np.ndarray, description: str, series: str) -> pydicom.Dataset:
        source = self.header
        meta = source.file_meta
        if not meta.get("TransferSyntaxUID", ExplicitVRLittleEndian).is_little_endian:
            raise UserError(
                f"{self.path}: big-endian DICOM, which is read but not written; convert it with dcmconv +te first"
            )
        derived = copy.deepcopy(source)
        scaling = _Scaling.of(source)
        unit = pixels.astype(np.float64)
        values = scaling.stored(1 - unit if _is_inverted(source) else unit)
        if self.padding is not None and not scaling.from_lut:
            values[self.padding] = source.pixel_array[self.padding]
        for tag in (*_STALE_TAGS, *(_LUT_TAGS if scaling.from_lut else ())):
            if tag in derived:
                delattr(derived, tag)
        photometric = str(source.get("PhotometricInterpretation", "MONOCHROME2"))
        derived.set_pixel_data(values, photometric, scaling.bits, generate_instance_uid=False)
        for tag, value in zip(_EXTREMES, (values.min(), values.max()), strict=True):
            if tag in derived:
                derived.add_new(tag, "SS" if scaling.signed else "US", int(value))
        place = self.path.resolve()
        own, group = source.get("SOPInstanceUID") or place, source.get("SeriesInstanceUID") or place.parent
        derived.SOPInstanceUID = generate_uid(entropy_srcs=[str(own), description])
        derived.SeriesInstanceUID = generate_uid(entropy_srcs=[str(group), series, "series"])
        derived.SOPClassUID = source.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID")
        derived.file_meta = FileMetaDataset()  # pydicom adds the identifiers, and that it wrote the file
        derived.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        derived.preamble = bytes(128)
        derived.ImageType = ["DERIVED", "SECONDARY", *_values(source, "ImageType")[2:]]
        derived.DerivationDescription = f"{SOFTWARE}: {description}"[:1024]
        if source.get("SOPInstanceUID"):
            derived.SourceImageSequence = [_reference(derived.SOPClassUID, source.SOPInstanceUID)]
        label = str(source.get("SeriesDescription") or "")
        derived.SeriesDescription = f"{label[:55]} restored".strip()
        return derived


def _values(header: pydicom.Dataset, tag: str) -> list:
    """The values of an element, of which there may be none, one or many."""
    value = header.get(tag)
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, MultiValue) else [value]


def _reference(sop_class: str, instance: str) -> pydicom.Dataset:
    """An item of SourceImageSequence: PS3.3 C.7.6.1, with code 121322 of PS3.16 CID 7202."""
    purpose = pydicom.Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item


def is_restored(path: Path) -> bool:
    """Whether this file was written by `Mammogram.write`, or is a picture that this code drew."""
    try:
        if is_dicom(path):
            return dicom_tag(path, "DerivationDescription").startswith(SOFTWARE)
        with Image.open(path, formats=FORMATS) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # noqa: BLE001  whatever cannot be read is not ours
        return False


def dicom_tag(path: Path, tag: str) -> str:
    """One element of a DICOM file as text, empty where it has none; raises what pydicom raises for a broken file."""
    _refuse_inflation(path)
    return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[tag]).get(tag) or "").strip()


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix or, where that tells nothing, by the mark at byte 128."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return path.suffix.lower() in (".dcm", ".dicom")
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_images(root: Path) -> list[Path]:
    """Image files below `root` in a fixed order, hidden ones left out; a file without a suffix counts if it is DICOM.

    Links to images that are not there are counted, with a line on stderr. Raises UserError where there are no images.
    """
    seen = sorted(
        path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    images = [
        path for path in seen if _is_file(path) and (path.suffix.lower() in IMAGE_SUFFIXES or _is_bare_dicom(path))
    ]
    lost = [path for path in seen if path.suffix.lower() in IMAGE_SUFFIXES and _is_lost_link(path)]
    if lost:
        print(
            f"warning: {root}: {len(lost)} links lead to no file, such as {lost[0].relative_to(root)}; left out",
            file=sys.stderr,
        )
    if not images:
        raise UserError(f"{root}: no images in it; looked for {', '.join(IMAGE_SUFFIXES)}")
    return images


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder may be listed but not looked into
        return False


def _is_lost_link(path: Path) -> bool:
    try:
        return path.is_symlink() and not path.exists()
    except OSError:
        return False


def _is_bare_dicom(path: Path) -> bool:
    # UIDs, which DICOM files without a suffix are often called, have dots
    return (not path.suffix.lstrip(".") or path.suffix[1:].isdigit()) and is_dicom(path)


def read_image(path: Path) -> np.ndarray:
    """The pixels of `read_mammogram`: (H, W) float32 in [0, 1]."""
    return read_mammogram(path).pixels


def read_mammogram(path: Path) -> Mammogram:
    """Read a grayscale mammogram: DICOM, PNG or TIFF of 8 or 16 bit, JPEG, PGM.

    DICOM values go through the modality LUT, not through a VOI window (which is for viewing and cannot be undone), are
    divided by what the stored bits can hold, and MONOCHROME1 is inverted; pixels with the padding value are background.
    More than `MAX_PIXELS`, as the file's header or a compressed stream in it declares them, are refused before they are
    decoded. Raises ImageError naming the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of either is an error below or does not matter
            return _read_dicom(path) if is_dicom(path) else _read_picture(path)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: declares more than {MAX_PIXELS:,} pixels; no mammogram, remove it") from None
    except (InvalidDicomError, UnidentifiedImageError) as error:
        lack = "no DICOM header" if isinstance(error, InvalidDicomError) else "of no known format"
        raise ImageError(f"{path}: not a readable image ({lack}); remove or replace it") from None
    except Exception as error:  # noqa: BLE001  decoders raise many kinds for a broken file
        raise ImageError(f"{path}: not a readable image ({_reason(error)}); remove or replace it") from None


def _reason(error: Exception) -> str:
    return str(error).split("\n")[0][:120] or type(error).__name__


def _refuse_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{path}: declares {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}; no mammogram, remove it"
        )


# --- pictures --------------------------------------------------------------------------------------------------------


def _read_picture(path: Path) -> Mammogram:
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: not a readable image (the file is empty); remove or replace it")
    # by its name Pillow would map the file, and scramble a TIFF that is to be turned
    with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        _refuse_size(path, *image.size)
        if getattr(image, "is_animated", False):  # to count them would be to look for each
            raise ImageError(f"{path}: holds several pages; only single images can be read")
        values, bits, full_scale = _grayscale(image, path)
        if image.mode.startswith("I") and image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC_TAG) == 0:
            values = full_scale - values  # white is zero; Pillow inverts that at 8 bits only
        pixels = values.astype(np.float32) / full_scale
        carried = _carried(image)
    return Mammogram(path, pixels, bits, carried=carried)


def _carried(image: Image.Image) -> dict[str, Any]:
    carried, exif = {}, image.getexif()
    dpi = tuple(float(value) for value in image.info.get("dpi", ()))
    # where TIFF or EXIF are silent Pillow makes a figure up
    stated = image.format == "PNG" or image.info.get("jfif_unit") or _RESOLUTION_TAG in exif
    if dpi and stated and all(1 <= value <= 1e6 for value in dpi):
        carried["dpi"] = dpi
    if exif.get(_ORIENTATION_TAG) in range(2, 9):  # the pixels stay as they lie; viewers turn both files alike
        turned = Image.Exif()
        turned[_ORIENTATION_TAG] = exif[_ORIENTATION_TAG]
        carried["exif"] = turned
    return carried


def _grayscale(image: Image.Image, path: Path) -> tuple[np.ndarray, int, int]:
    """Values (H, W), bits of the file to write, and the value of full scale."""
    if image.mode in ("RGB", "RGBA", "LA", "P"):
        layout = image.tile[0].args if image.tile else ""
        layout, *rest = (layout,) if isinstance(layout, str) else layout
        if ";16" in str(layout) or (image.format == "PPM" and rest and rest[0] > 255):
            raise ImageError(f"{path}: several channels of 16 bits, of which 8 would be lost; convert it to grayscale")
        channels = np.asarray(image.convert("RGB"))
        if (channels != channels[..., :1]).any():
            raise ImageError(f"{path}: a colour image; mammograms are grayscale, remove it or convert it")
        return channels[..., 0], 8, 255
    if image.mode == "L":
        return np.asarray(image), 8, 255
    if image.mode.startswith("I"):  # 16 bit, which Pillow opens as I;16 or, for PGM, as I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path}: its values do not fit 16 bits; convert it to 16-bit grayscale")
        stored = image.tag_v2.get(_BITS_TAG, (16,))[0] if image.format == "TIFF" else 16
        return values, 16, 2 ** min(16, stored) - 1
    raise ImageError(f"{path}: pixel format {image.mode} is not 8- or 16-bit grayscale; convert it")


# --- DICOM -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scaling:
    """How stored values, modality values and [0, 1] hang together (PS3.3 C.11.1)."""

    bits: int
    signed: bool
    falling: bool = False  # modality values fall as stored ones rise
    from_lut: bool = False  # values have gone through a modality LUT: a derived image stores what it gave

    @classmethod
    def of(cls, header: pydicom.Dataset) -> _Scaling:
        if header.get("ModalityLUTSequence"):
            return cls(int(header.ModalityLUTSequence[0].LUTDescriptor[2]), False, from_lut=True)
        # how steep the line is cancels out
        falling = float(header.get("RescaleSlope") or 1) < 0
        return cls(int(header.BitsStored), bool(header.get("PixelRepresentation", 0)), falling)

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest value that can be stored."""
        offset = 2 ** (self.bits - 1) if self.signed else 0
        return -offset, 2**self.bits - 1 - offset

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Stored values, or those of the modality LUT, to [0, 1]."""
        low, high = self.limits
        unit = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
        return 1 - unit if self.falling else unit

    def stored(self, unit: np.ndarray) -> np.ndarray:
        """[0, 1] to values to store."""
        low, high = self.limits
        unit = 1 - unit if self.falling else unit
        kind = ("i" if self.signed else "u") + ("1" if self.bits <= 8 else "2")
        return np.rint(low + unit.clip(0, 1) * (high - low)).astype(kind)


def _is_inverted(header: pydicom.Dataset) -> bool:
    return header.get("PhotometricInterpretation") == "MONOCHROME1"


def _read_dicom(path: Path) -> Mammogram:
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: not a readable image (the file is empty); remove or replace it")
    _refuse_inflation(path)
    header = pydicom.dcmread(path)
    if int(header.get("NumberOfFrames", 1) or 1) > 1 or int(header.get("SamplesPerPixel", 1)) > 1:
        raise ImageError(f"{path}: a multi-frame or colour DICOM; only single grayscale images can be read")
    if header.get("PhotometricInterpretation", "MONOCHROME2") not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(
            f"{path}: a {header.PhotometricInterpretation} DICOM; only single grayscale images can be read"
        )
    if "PixelData" not in header:
        raise ImageError(f"{path}: a DICOM file cut short or without pixel data; remove or replace it")
    _refuse_size(path, int(header.Columns), int(header.Rows))
    scaling = _Scaling.of(header)
    if not 1 <= scaling.bits <= 16 or int(header.get("HighBit", header.BitsStored - 1)) != header.BitsStored - 1:
        raise ImageError(
            f"{path}: {header.BitsStored} bits with high bit {header.get('HighBit')}; only up to 16, from bit 0 on, can be read"
        )
    stored = _decode(path, header)
    unit = scaling.unit(_through_lut(stored, header) if scaling.from_lut else stored)
    unit = (1 - unit if _is_inverted(header) else unit).astype(np.float32)
    padding = _padding(header, stored)
    if padding is not None:
        unit[padding] = 0
    return Mammogram(path, unit, scaling.bits, header, padding)


def _through_lut(stored: np.ndarray, header: pydicom.Dataset) -> np.ndarray:
    lut = copy.deepcopy(header.ModalityLUTSequence[0])
    # how wide its values are, not how wide their words: pydicom takes the one for the other
    lut.LUTDescriptor[2] = 8 if lut.LUTDescriptor[2] <= 8 else 16
    table = pydicom.Dataset()
    table.ModalityLUTSequence = [lut]
    return apply_modality_lut(stored, table)


def _padding(header: pydicom.Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Where the stored values are padding (PS3.3 C.7.5.1.1.2); None where the file has no such value."""
    if header.get("PixelPaddingValue") is None:
        return None
    value = int(header.PixelPaddingValue)
    limit = header.get("PixelPaddingRangeLimit")
    ends = np.array([value, value if limit is None else int(limit)]).astype(stored.dtype)  # some write -1 as 65535
    return (stored >= ends.min()) & (stored <= ends.max())


def _refuse_inflation(path: Path) -> None:
    """Raise ImageError for a DICOM file whose deflated data set grows past what a mammogram can take."""
    with path.open("rb") as file:
        read_preamble(file, force=False)
        meta = _read_file_meta_info(file)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while chunk := inflate.unconsumed_tail or file.read(2**16):
            size += len(inflate.decompress(chunk, 2**20))
            if size > 2 * MAX_PIXELS + MAX_HEADER_BYTES:
                raise ImageError(f"{path}: inflates to more than {size:,} bytes; no mammogram, remove it")


def _stream_size(stream: bytes) -> tuple[int, int]:
    """Width and height that a JPEG, JPEG-LS or JPEG 2000 stream declares; (0, 0) where it declares none.

    ISO/IEC 10918-1 B.2.2 (SOF), 14495-1 C.2.2, 15444-1 A.5.1 (SIZ).
    """
    sizes = []
    for siz in re.finditer(rb"\xff\x4f\xff\x51", stream):  # behind the boxes of a JP2 file, where there are any
        width, height, left, top = struct.unpack_from(">4I", stream, siz.start() + 8)
        sizes.append((width - left, height - top))
    if sizes:
        return max(sizes, key=math.prod)
    place = 2
    while place + 9 <= len(stream) and stream[place] == 0xFF:
        marker, length = stream[place + 1], int.from_bytes(stream[place + 2 : place + 4], "big")
        # start of frame: C0 to CF but for DHT, JPG and DAC; F7 is that of JPEG-LS
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack_from(">2H", stream, place + 5)
            return width, height
        place += 1 if marker == 0xFF else 2 + length
    return 0, 0


def _decode(path: Path, header: pydicom.Dataset) -> np.ndarray:
    """The stored values (H, W). Raises ImageError, naming the package to install, for what nothing installed decompresses."""
    syntax = header.file_meta.get("TransferSyntaxUID", ExplicitVRLittleEndian)
    if not syntax.is_compressed or syntax == RLELossless:
        return header.pixel_array
    wanted = "pylibjpeg pylibjpeg-libjpeg"
    if "2000" in syntax.name:
        wanted = "pylibjpeg pylibjpeg-openjpeg"
    elif "JPEG-LS" in syntax.name:
        wanted = "pyjpegls"
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise ImageError(
            f"{path}: {syntax.name} is a compression that cannot be read; convert it to uncompressed DICOM"
        ) from None
    with contextlib.suppress(ValueError):  # of what is not encapsulated, which the decoder says
        _refuse_size(path, *_stream_size(get_frame(header.PixelData, 0, number_of_frames=1)))
    if not available:
        raise ImageError(f"{path}: compressed as {syntax.name}, whose decoder is not installed; pip install {wanted}")
    try:
        return header.pixel_array
    except Exception:  # noqa: BLE001  Pillow decodes some images of a kind and not others
        raise ImageError(
            f"{path}: compressed as {syntax.name}, which the decoders here fail on; replace it if it is damaged, "
            f"else pip install {wanted}"
        ) from None
