"""Mammogram files: DICOM, PNG, JPEG, TIFF and PGM, read to [0, 1] and written back at their own depth."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.pixels import apply_modality_lut, get_decoder
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from helper import UserError, atomic_path

IMAGE_SUFFIXES = (".pgm", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
SOFTWARE = "Low-dose mammography restoration"  # marks what `Mammogram.write` wrote
_PHOTOMETRIC_TAG, _BITS_TAG = 262, 258  # TIFF 6.0
_LUT_TAGS = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType")
# What holds no longer once the pixels are others: thumbnails and signatures.
_STALE_TAGS = ("IconImageSequence", "MACParametersSequence", "DigitalSignaturesSequence")
_SIGNED_VALUES = ("SmallestImagePixelValue", "LargestImagePixelValue")


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

    def write(self, path: Path, pixels: np.ndarray, description: str) -> None:
        """Write `pixels` (H, W) in [0, 1] in place of this mammogram's: its size, depth, orientation, and patient.

        DICOM becomes a derived image of a new series, with identifiers that depend on the source and on `description`
        alone; anything else becomes a PNG. Raises UserError where the file cannot be written.
        """
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"pixels must be {self.pixels.shape}, not {pixels.shape}")
        if self.header is not None:
            derived = self._derived(pixels, description)
            with atomic_path(path) as temporary:
                derived.save_as(temporary, enforce_file_format=True)
            return
        values = np.rint(pixels.astype(np.float64).clip(0, 1) * (2**self.bits - 1))
        text = PngInfo()
        text.add_itxt("Software", SOFTWARE)
        text.add_itxt("Description", description)
        picture = Image.fromarray(values.astype(np.uint8 if self.bits == 8 else np.uint16))
        with atomic_path(path) as temporary:
            picture.save(temporary, format="PNG", pnginfo=text, **self.carried)

    def _derived(self, pixels: np.ndarray, description: str) -> pydicom.Dataset:
        source = self.header
        derived = copy.deepcopy(source)
        scaling = _Scaling.of(source)
        unit = 1 - pixels if _is_inverted(source) else pixels
        values = np.rint(scaling.stored(unit.astype(np.float64).clip(0, 1)))
        kind = ("i" if scaling.signed else "u") + ("1" if scaling.bits <= 8 else "2")
        values = values.clip(*scaling.limits).astype(kind)
        if self.padding is not None and not scaling.from_lut:
            values[self.padding] = source.pixel_array[self.padding]
        for tag in (*_STALE_TAGS, *(_LUT_TAGS if scaling.from_lut else ())):
            if tag in derived:
                delattr(derived, tag)
        photometric = str(source.get("PhotometricInterpretation", "MONOCHROME2"))
        derived.set_pixel_data(values, photometric, scaling.bits, generate_instance_uid=False)
        for tag, value in zip(_SIGNED_VALUES, (values.min(), values.max()), strict=True):
            if tag in derived:
                derived[tag].value = int(value)
        derived.SOPInstanceUID = generate_uid(entropy_srcs=[str(source.get("SOPInstanceUID", self.path)), description])
        series = str(source.get("SeriesInstanceUID", self.path.parent))
        derived.SeriesInstanceUID = generate_uid(entropy_srcs=[series, description, "series"])
        derived.file_meta.MediaStorageSOPInstanceUID = derived.SOPInstanceUID
        derived.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        kinds = source.get("ImageType", [])
        derived.ImageType = ["DERIVED", "SECONDARY", *list(kinds)[2:]]
        derived.DerivationDescription = f"{SOFTWARE}: {description}"[:1024]
        if "SOPInstanceUID" in source and "SOPClassUID" in source:
            derived.SourceImageSequence = [_reference(source)]
        label = str(source.get("SeriesDescription", "") or "").strip()
        derived.SeriesDescription = f"{label[:55]} restored".strip()
        return derived


def _reference(source: pydicom.Dataset) -> pydicom.Dataset:
    """An item of SourceImageSequence: PS3.3 C.7.6.1, with code 121322 of PS3.16 CID 7202."""
    purpose = pydicom.Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [purpose]
    return item


def is_restored(path: Path) -> bool:
    """Whether `Mammogram.write` wrote this file."""
    try:
        if is_dicom(path):
            tag = "DerivationDescription"
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[tag])
            return str(header.get(tag, "")).startswith(SOFTWARE)
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # noqa: BLE001  whatever cannot be read is not ours
        return False


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix or, where it has none, by the mark at byte 128."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return path.suffix.lower() in (".dcm", ".dicom")
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def find_images(root: Path) -> list[Path]:
    """Image files below `root` in a fixed order, hidden ones left out; a file without a suffix counts if it is DICOM.

    Raises UserError where there are none.
    """
    images = sorted(
        path
        for path in root.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and (path.suffix.lower() in IMAGE_SUFFIXES or _is_bare_dicom(path))
    )
    if not images:
        raise UserError(f"{root}: no images in it; looked for {', '.join(IMAGE_SUFFIXES)}")
    return images


def _is_bare_dicom(path: Path) -> bool:
    # UIDs, which DICOM files without a suffix are often called, have dots
    if path.suffix.lstrip(".") and not path.suffix[1:].isdigit():
        return False
    try:
        return is_dicom(path)
    except OSError:
        return False


def read_image(path: Path) -> np.ndarray:
    """The pixels of `read_mammogram`: (H, W) float32 in [0, 1]."""
    return read_mammogram(path).pixels


def read_mammogram(path: Path) -> Mammogram:
    """Read a grayscale mammogram: DICOM, PNG or TIFF of 8 or 16 bit, JPEG, PGM.

    DICOM values go through the modality LUT, not through a VOI window (which is for viewing and cannot be undone), are
    divided by what the stored bits can hold, and MONOCHROME1 is inverted; pixels with the padding value are background.
    Raises UserError naming the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of either is an error below or does not matter
            return _read_dicom(path) if is_dicom(path) else _read_picture(path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # noqa: BLE001  decoders raise many kinds for a broken file
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); remove or replace it") from None


# --- pictures --------------------------------------------------------------------------------------------------------


def _read_picture(path: Path) -> Mammogram:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: not a readable image (the file is empty); remove or replace it")
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{path}: holds {image.n_frames} pages; only single images can be read")
        values, bits, full_scale = _grayscale(image, path)
        pixels = values.astype(np.float32) / full_scale
        if image.mode.startswith("I") and image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC_TAG) == 0:
            pixels = 1 - pixels  # white is zero; Pillow inverts that at 8 bits only
        carried = {"dpi": image.info["dpi"]} if "dpi" in image.info else {}
        exif = image.getexif()
        if exif.get(0x0112, 1) != 1:  # the pixels stay as they lie; viewers turn both files alike
            turned = Image.Exif()
            turned[0x0112] = exif[0x0112]
            carried["exif"] = turned
    return Mammogram(path, pixels, bits, carried=carried)


def _grayscale(image: Image.Image, path: Path) -> tuple[np.ndarray, int, int]:
    """Values (H, W), bits of the file to write, and the value of full scale."""
    if image.mode in ("RGB", "RGBA", "LA", "P"):
        channels = np.asarray(image.convert("RGB"))
        if (channels != channels[..., :1]).any():
            raise UserError(f"{path}: a colour image; mammograms are grayscale, remove it or convert it")
        return channels[..., 0], 8, 255
    if image.mode == "L":
        return np.asarray(image), 8, 255
    if image.mode.startswith("I"):  # 16 bit, which Pillow opens as I;16 or, for PGM, as I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path}: its values do not fit 16 bits; convert it to 16-bit grayscale")
        stored = image.tag_v2.get(_BITS_TAG, (16,))[0] if image.format == "TIFF" else 16
        return values, 16, 2 ** min(16, stored) - 1
    raise UserError(f"{path}: pixel format {image.mode} is not 8- or 16-bit grayscale; convert it")


# --- DICOM -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scaling:
    """How stored values, modality values and [0, 1] hang together (PS3.3 C.11.1)."""

    bits: int
    signed: bool
    slope: float = 1.0
    intercept: float = 0.0
    from_lut: bool = False  # values have gone through a modality LUT: a derived image stores what it gave

    @classmethod
    def of(cls, header: pydicom.Dataset) -> _Scaling:
        if "ModalityLUTSequence" in header:
            return cls(int(header.ModalityLUTSequence[0].LUTDescriptor[2]), False, from_lut=True)
        slope, intercept = (
            float(header.get(tag, default)) for tag, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        return cls(int(header.BitsStored), bool(header.get("PixelRepresentation", 0)), slope or 1.0, intercept)

    @property
    def limits(self) -> tuple[int, int]:
        """Least and greatest value that can be stored."""
        offset = 2 ** (self.bits - 1) if self.signed else 0
        return -offset, 2**self.bits - 1 - offset

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest modality value."""
        low, high = sorted(self.slope * value + self.intercept for value in self.limits)
        return low, high

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Modality values to [0, 1]."""
        low, high = self.range
        return ((values - low) / (high - low)).clip(0, 1).astype(np.float32)

    def stored(self, unit: np.ndarray) -> np.ndarray:
        """[0, 1] to values to store, before rounding."""
        low, high = self.range
        return (low + unit * (high - low) - self.intercept) / self.slope


def _is_inverted(header: pydicom.Dataset) -> bool:
    return header.get("PhotometricInterpretation") == "MONOCHROME1"


def _read_dicom(path: Path) -> Mammogram:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: not a readable image (the file is empty); remove or replace it")
    header = pydicom.dcmread(path)
    if int(header.get("NumberOfFrames", 1) or 1) > 1 or int(header.get("SamplesPerPixel", 1)) > 1:
        raise UserError(f"{path}: a multi-frame or colour DICOM; only single grayscale images can be read")
    if header.get("PhotometricInterpretation", "MONOCHROME2") not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{path}: a {header.PhotometricInterpretation} DICOM; only single grayscale images can be read")
    if "PixelData" not in header:
        raise UserError(f"{path}: a DICOM file without pixel data; remove or replace it")
    _check_decoder(path, header)
    stored = header.pixel_array
    scaling = _Scaling.of(header)
    unit = scaling.unit(apply_modality_lut(stored, header).astype(np.float32))
    if _is_inverted(header):
        unit = 1 - unit
    padding = _padding(header, stored)
    if padding is not None:
        unit[padding] = 0
    return Mammogram(path, unit, scaling.bits, header, padding)


def _padding(header: pydicom.Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Where the stored values are padding (PS3.3 C.7.5.1.1.2); None where the file has no such value."""
    if header.get("PixelPaddingValue") is None:
        return None
    ends = int(header.PixelPaddingValue), int(header.get("PixelPaddingRangeLimit", header.PixelPaddingValue))
    return (stored >= min(ends)) & (stored <= max(ends))


def _check_decoder(path: Path, header: pydicom.Dataset) -> None:
    """Raises UserError, naming the package to install, for a compression that nothing installed can undo."""
    syntax = header.file_meta.get("TransferSyntaxUID", ExplicitVRLittleEndian)
    if not syntax.is_compressed:
        return
    package = "pylibjpeg-libjpeg"
    if "2000" in syntax.name:
        package = "pylibjpeg-openjpeg"
    elif "JPEG-LS" in syntax.name:
        package = "pyjpegls"
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        raise UserError(
            f"{path}: {syntax.name} is a compression that cannot be read; convert it to uncompressed DICOM"
        ) from None
    if not available:
        wanted = package if package == "pyjpegls" else f"pylibjpeg {package}"
        raise UserError(f"{path}: compressed as {syntax.name}, whose decoder is not installed; pip install {wanted}")
