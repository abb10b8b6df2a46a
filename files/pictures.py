"""Picture files: PNG, TIFF, JPEG and PGM are read, PNG is written."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from helper import ImageError
from running.writing import atomic_path

PICTURE_SUFFIXES = (".pgm", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "TIFF", "PPM")  # Pillow reads others, some by running other programs
MAX_PIXELS = 2**27  # four times the largest film digitised at 50 micrometres
SOFTWARE = "Low-dose mammography restoration"  # marks restored images and drawings
_PHOTOMETRIC_TAG, _BITS_TAG, _ORIENTATION_TAG, _RESOLUTION_TAG, _SIGN_TAG = 262, 258, 274, 282, 339  # TIFF 6.0
# The bytes that files of a kind begin with, from a place on.
_MARKS = (
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"II+\0", "BigTIFF"), (0, b"MM\0+", "BigTIFF"),
    (0, b"\xff\xd8\xff", "JPEG"), (0, b"\xff\x4f\xff\x51", "JPEG 2000"), (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL ", "JPEG XL"), (0, b"II\xbc\x01", "JPEG XR"), (0, b"\x89PNG", "PNG"),
    (0, b"P7\n", "PAM"), (0, b"BM", "BMP"), (0, b"GIF8", "GIF"), (8, b"WEBP", "WebP"), (4, b"ftyp", "HEIF or AVIF"),
)  # fmt: skip


def read_picture(path: Path) -> tuple[np.ndarray, int, dict[str, Any]]:
    """Pixels (H, W) float32 in [0, 1], bits of the PNG to write (8 or 16), and what else to write it with.

    Raises ImageError if the picture is not a single grayscale image, and what Pillow raises for a broken file.
    """
    # Pillow would map a file given by its name, and scramble a TIFF that has to be turned
    with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
        refuse_size(path, *image.size)
        if getattr(image, "is_animated", False):  # counting the pages would mean reading them all
            raise ImageError(f"{path}: holds several pages; only single images can be read")
        values, bits, white = _grayscale(image, path)
        if image.mode.startswith("I") and image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC_TAG) == 0:
            values = white - values  # zero is white; Pillow inverts only 8-bit images
        return values.astype(np.float32) / white, bits, _carried(image)


def kind_of(path: Path) -> str:
    """The kind of picture that a file is by its first bytes, empty if none is known; of a JPEG with its bits, if not 8."""
    with path.open("rb") as file:
        head = file.read(2**16)
    kind = next((kind for place, mark, kind in _MARKS if head.startswith(mark, place)), "")
    if kind != "JPEG":
        return kind
    header = StreamHeader.of(head)
    return f"{'JPEG-LS' if header.is_jpeg_ls else 'JPEG'} of {header.bits} bits" if header.bits else kind


def write_picture(path: Path, pixels: np.ndarray, bits: int, description: str, carried: dict[str, Any]) -> None:
    """Write `pixels` (H, W) in [0, 1] as a PNG of 8 or 16 bits; raises UserError if it cannot be written."""
    values = np.rint(pixels.astype(np.float64).clip(0, 1) * (2**bits - 1))
    text = PngInfo()
    text.add_itxt("Software", SOFTWARE)
    text.add_itxt("Description", description)
    with atomic_path(path) as temporary:
        picture = Image.fromarray(values.astype(np.uint8 if bits == 8 else np.uint16))
        picture.save(temporary, format="PNG", pnginfo=text, **carried)


def refuse_size(path: Path, width: int, height: int) -> None:
    """Raise ImageError if a file declares more than `MAX_PIXELS` pixels."""
    if width * height > MAX_PIXELS:
        size = f"{width:,} x {height:,} pixels, more than {MAX_PIXELS:,}"
        raise ImageError(f"{path}: declares {size}; not a mammogram, remove it")


@dataclass(frozen=True)
class StreamHeader:
    """What a JPEG, JPEG-LS or JPEG 2000 stream declares; of a stream that declares nothing, nothing."""

    width: int = 0
    height: int = 0
    bits: int = 0  # a sample
    signed: bool | None = None  # of JPEG 2000
    is_jpeg_ls: bool = False

    @classmethod
    def of(cls, stream: bytes) -> StreamHeader:
        """The largest of the stream's headers.

        ISO/IEC 10918-1 B.2.2 (SOF), 14495-1 C.2.2, 15444-1 A.5.1 (SIZ).
        """
        found = []
        for siz in re.finditer(rb"\xff\x4f\xff\x51", stream):  # a JP2 file has boxes before it
            width, height, left, top = struct.unpack_from(">4I", stream, siz.start() + 8)
            depth = stream[siz.start() + 42] if siz.start() + 42 < len(stream) else 0
            found.append(cls(width - left, height - top, (depth & 0x7F) + 1, depth >= 0x80))
        if found:
            return max(found, key=lambda header: header.width * header.height)
        place = 2
        while place + 9 <= len(stream) and stream[place] == 0xFF:
            marker, length = stream[place + 1], int.from_bytes(stream[place + 2 : place + 4], "big")
            # start of frame: C0 to CF except DHT, JPG and DAC; F7 in JPEG-LS
            if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
                bits, height, width = struct.unpack_from(">B2H", stream, place + 4)
                return cls(width, height, bits, is_jpeg_ls=marker == 0xF7)
            place += 1 if marker == 0xFF else 2 + length
        return cls()


def _carried(image: Image.Image) -> dict[str, Any]:
    """Pixel pitch and orientation, as options of Pillow's `save`."""
    carried, exif = {}, image.getexif()
    dpi = tuple(float(value) for value in image.info.get("dpi", ()))
    # Pillow makes up a value if TIFF or EXIF have none
    stated = image.format == "PNG" or image.info.get("jfif_unit") or _RESOLUTION_TAG in exif
    if dpi and stated and all(1 <= value <= 1e6 for value in dpi):
        carried["dpi"] = dpi
    if exif.get(_ORIENTATION_TAG) in range(2, 9):  # the pixels are not turned: viewers turn both files alike
        carried["exif"] = Image.Exif()
        carried["exif"][_ORIENTATION_TAG] = exif[_ORIENTATION_TAG]
    return carried


def _grayscale(image: Image.Image, path: Path) -> tuple[np.ndarray, int, int]:
    """Grey values (H, W), bits of the PNG to write, and the grey value of white."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "L" and 2 in np.atleast_1d(tags.get(_SIGN_TAG, 1)):
        raise ImageError(f"{path}: signed values of 8 bits; convert it to 8- or 16-bit grayscale")
    if image.mode in ("RGB", "RGBA", "LA", "P"):
        layout = image.tile[0].args if image.tile else ""
        layout, *rest = (layout,) if isinstance(layout, str) else layout
        is_deep = max(np.atleast_1d(tags.get(_BITS_TAG, 8))) > 8  # Pillow takes the planes of such a TIFF for 8 bits
        if is_deep or ";16" in str(layout) or (image.format == "PPM" and rest and rest[0] > 255):
            raise ImageError(f"{path}: several channels of 16 bits, of which 8 would be lost; convert it to grayscale")
        channels = np.asarray(image.convert("RGB"))
        if (channels != channels[..., :1]).any():
            raise ImageError(f"{path}: a colour image; mammograms are grayscale, remove it or convert it")
        return channels[..., 0], 8, 255
    if image.mode == "L":
        return np.asarray(image), 8, 255
    if image.mode.startswith("I"):  # Pillow opens 16 bits as I;16 or, from PGM, as I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{path}: its values do not fit 16 bits; convert it to 16-bit grayscale")
        stored = tags.get(_BITS_TAG, (16,))[0]
        return values, 16, 2 ** min(16, stored) - 1
    raise ImageError(f"{path}: pixel format {image.mode} is not 8- or 16-bit grayscale; convert it")
