"""Mammogram files of any kind: find them, read them to [0, 1], write them back at their own depth."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError
from pydicom.errors import InvalidDicomError

from files.dicom import (
    DICOM_SUFFIXES,
    FOR_PRESENTATION,
    FOR_PROCESSING,
    Scaling,
    detector_of,
    dicom_tag,
    has_mark,
    holds_image,
    intent_of,
    is_dicom,
    lacks_preamble,
    pitch_of,
    read_dicom,
)
from files.dicom_writing import derived_dicom
from files.pictures import FORMATS, MAX_PIXELS, PICTURE_SUFFIXES, SOFTWARE, kind_of, read_picture, write_picture
from helper import ImageError, UserError, counted, reason_of
from running.writing import atomic_path

IMAGE_SUFFIXES = (*PICTURE_SUFFIXES, *DICOM_SUFFIXES)


@dataclass(frozen=True)
class Mammogram:
    """A mammogram and what is needed to write it back."""

    path: Path
    pixels: np.ndarray  # (H, W) float32 in [0, 1]; dense tissue is bright unless `is_raw`
    bits: int  # 8 or 16 in a picture, the bits stored in DICOM
    header: pydicom.Dataset | None = None  # of DICOM: the data set up to its pixels
    padding: np.ndarray | None = None  # of DICOM: (H, W) bool, True outside the image
    filling: np.ndarray | None = None  # of DICOM: what is stored there, in its order
    remarks: dict[str, int] = field(default_factory=dict)  # what a header says and its pixels do not: `remark_lines`
    carried: dict[str, Any] = field(default_factory=dict)  # of a picture: pixel pitch and orientation, kept in a PNG

    @property
    def scale(self) -> Scaling:
        """How stored values follow from pixels: factor * pixels + shift. A picture's are those of the PNG to write."""
        return Scaling(self.bits) if self.header is None else Scaling.of(self.header)

    @property
    def is_raw(self) -> bool:
        """Whether it is a detector's own image, FOR PROCESSING: pixels rise with the exposure, and air is bright."""
        return self.header is not None and intent_of(self.header) == FOR_PROCESSING

    @property
    def is_processed(self) -> bool:
        """Whether it is processed FOR PRESENTATION; neither this nor `is_raw` if the file does not say, as of film."""
        return self.header is not None and intent_of(self.header) == FOR_PRESENTATION

    @property
    def detector(self) -> str:
        """Manufacturer and model in words; empty if the file names none."""
        return "" if self.header is None else detector_of(self.header)

    @property
    def pixel_mm(self) -> float | None:
        """The pixel pitch at the detector; None if the file is not DICOM or states none."""
        return None if self.header is None else pitch_of(self.header)

    def write(self, path: Path, pixels: np.ndarray, description: str, *, series: str = "") -> None:
        """Write `pixels` (H, W) in [0, 1] in place of this mammogram's: its size, depth, orientation, and patient.

        DICOM becomes a derived image of a new series, with identifiers that depend only on the source and `description`;
        images of equal `series` (default: `description`) share a series. Other files become PNG. Raises UserError if the
        file cannot be written.
        """
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"pixels must be {self.pixels.shape}, not {pixels.shape}")
        if self.header is None:
            write_picture(path, pixels, self.bits, description, self.carried)
            return
        content = self._derived(pixels, description, series or description)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def check_writable(self) -> None:
        """Raise UserError if DICOM cannot be written back, whatever the pixels."""
        if self.header is not None:
            self._derived(self.pixels, "", "")

    def _derived(self, pixels: np.ndarray, description: str, series: str) -> bytes:
        return derived_dicom(self.path, self.header, self.padding, self.filling, pixels, description, series)


def read_image(path: Path) -> np.ndarray:
    """The pixels of `read_mammogram`: (H, W) float32 in [0, 1]."""
    return read_mammogram(path).pixels


def read_mammogram(path: Path) -> Mammogram:
    """Read a grayscale mammogram: DICOM, PNG or TIFF of 8 or 16 bits, JPEG, PGM.

    DICOM values go through the modality LUT but through no VOI window, which is for viewing and cannot be undone. The range
    that the stored bits can hold becomes [0, 1]; MONOCHROME1 is inverted, but a detector's own image (FOR PROCESSING) rises
    with the exposure in any case; padding becomes background. If a file declares more than `MAX_PIXELS`, it is refused
    before it is decoded. Raises ImageError naming the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever matters is an error below
            if path.stat().st_size == 0:
                raise ImageError(f"{path}: not a readable image (the file is empty); remove or replace it")
            if is_dicom(path):
                return Mammogram(path, **read_dicom(path))
            pixels, bits, carried = read_picture(path)
            return Mammogram(path, pixels, bits, carried=carried)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{path}: declares more than {MAX_PIXELS:,} pixels; not a mammogram, remove it") from None
    except (InvalidDicomError, UnidentifiedImageError):
        raise ImageError(f"{path}: not a readable image {_what_it_is(path)}") from None
    except Exception as error:  # noqa: BLE001  decoders raise many kinds of error for a broken file
        raise ImageError(f"{path}: not a readable image ({reason_of(error)}); remove or replace it") from None


def _what_it_is(path: Path) -> str:
    """What a file is that neither pydicom nor Pillow takes for its own, and the remedy."""
    if has_mark(path):
        return "(DICOM under the name of a picture); rename it to .dcm"
    if lacks_preamble(path):
        return "(DICOM without its preamble); mend it with dcmconv +te"
    kind = kind_of(path)
    if kind and is_dicom(path):
        return f"({kind} under the name of DICOM); give it a suffix of its own"
    if kind:
        remedy = "convert it to 8- or 16-bit grayscale PNG, or replace it"
        return f"({kind}, of a kind that is not read, or damaged); {remedy}"
    return f"({'no DICOM header' if is_dicom(path) else 'of no known format'}); remove or replace it"


def is_restored(path: Path) -> bool:
    """Whether this project wrote the file: `Mammogram.write`, or a drawing."""
    try:
        if is_dicom(path):
            return dicom_tag(path, "DerivationDescription").startswith(SOFTWARE)
        with Image.open(path, formats=FORMATS) as image:
            return image.info.get("Software") == SOFTWARE
    except Exception:  # noqa: BLE001  a file that cannot be read is not ours
        return False


def find_images(root: Path) -> list[Path]:
    """Image files below `root` in a fixed order, without hidden ones; a file of another suffix counts if it is DICOM.

    Links to missing images are counted on stderr, DICOM files that hold no image on stdout. Raises UserError if there are no
    images.
    """
    images, others, lost = [], [], []
    for path in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        # DICOM files without a suffix are often named by a UID, which has dots
        named, bare = path.suffix.lower() in IMAGE_SUFFIXES, not path.suffix.lstrip(".") or path.suffix[1:].isdigit()
        # pathlib raises an error if a folder may be listed but not searched; os.path says no
        if os.path.isfile(path):  # noqa: PTH113
            if is_dicom(path):
                (images if holds_image(path) else others).append(path)
            elif named or (bare and lacks_preamble(path)):
                images.append(path)
        elif named and os.path.lexists(path) and not os.path.exists(path):  # noqa: PTH110
            lost.append(path)
    if lost:
        what = counted(len(lost), "link leads", "links lead")
        example = f"such as {lost[0].relative_to(root)}"
        print(f"warning: {root}: {what} to no file, {example}; left out", file=sys.stderr)
    if others:
        what = counted(len(others), "DICOM file that holds no image is", "DICOM files that hold no image are")
        print(f"{root}: {what} passed over, such as {others[0].relative_to(root)}")
    if not images:
        kinds = f"{', '.join(IMAGE_SUFFIXES)} and DICOM files of other names"
        raise UserError(f"{root}: no images in it; looked for {kinds}")
    return images


def stem_of(name: str) -> str:
    """A file's name or path without its suffix; digits after a dot are part of a UID, which DICOM files are called by."""
    return name if PurePosixPath(name).suffix[1:].isdigit() else name.removesuffix(PurePosixPath(name).suffix)
