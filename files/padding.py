"""Padding of DICOM images: pixels that a header says are none (PS3.3 C.7.5.1.1.2), where what it says holds."""

from __future__ import annotations

import numpy as np
import pydicom
from scipy import ndimage

LEAST_TURNING = 0.56  # share of steps to the other side: white noise has 2/3, a scintillator's 0.6, fillings less
LEAST_STEPS = 200  # that tell it
LEAST_AREA = 1e-4  # of the image: a smaller patch of padding values is image
LEAST_SIDE = 7  # pixels of equal values, which noise that is cut off at one value does not have side by side
LEFT_OVER = "the padding declared does not fit into the bits; all pixels are read as image"
IN_THE_IMAGE = "have padding values where the image is, in noise or tissue; these are read as image"


def find_padding(
    header: pydicom.Dataset, raw: np.ndarray, stored: np.ndarray, limits: tuple[int, int]
) -> tuple[np.ndarray | None, dict[str, int]]:
    """Where padding is, (H, W) bool, None without any that holds; and what of its declaration does not hold, with pixels.

    `raw` (H, W) has the unused bits that `stored` lacks; `limits` are those of the bits stored. Values beyond these count as
    padding only as they stand in the file: otherwise they are left over from another depth. Padding is a filling. A
    patch smaller than `LEAST_AREA` is image. If neighbours go up and down as noise does, only constant areas are padding.
    """
    if header.get("PixelPaddingValue") is None:
        return None, {}
    value, limit = header.PixelPaddingValue, header.get("PixelPaddingRangeLimit")
    ends, held = np.array([int(value), int(value if limit is None else limit)]), np.iinfo(raw.dtype)
    # the elements have 16 bits, and some files write -1 as 65535 or the other way round
    ends[ends > held.max] -= 2**16 if held.min < 0 else 0
    ends[ends < held.min] += 0 if held.min < 0 else 2**16
    low, high = int(ends.min()), int(ends.max())
    is_held, is_beyond = limits[0] <= low and high <= limits[1], high < limits[0] or low > limits[1]
    values = stored if is_held else raw
    declared = (values >= low) & (values <= high)
    if not is_held and not (is_beyond and declared.any()):
        return None, {LEFT_OVER: 0}
    padding = _large(declared)
    if _is_noise(values, padding, low, high):
        padding = _large(_constant(values) & padding)
    refused = int(declared.sum() - padding.sum())
    return padding if padding.any() else None, {IN_THE_IMAGE: refused} if refused else {}


def _large(area: np.ndarray) -> np.ndarray:
    """An area (H, W) without patches below `LEAST_AREA`."""
    patches, _ = ndimage.label(area)
    return area & (np.bincount(patches.ravel()) >= LEAST_AREA * area.size)[patches]


def _constant(values: np.ndarray) -> np.ndarray:
    """Where values (H, W) lie in a square of `LEAST_SIDE` pixels a side that are all equal."""
    centres = ndimage.maximum_filter(values, LEAST_SIDE) == ndimage.minimum_filter(values, LEAST_SIDE)
    return ndimage.maximum_filter(centres, LEAST_SIDE)


def _is_noise(values: np.ndarray, area: np.ndarray, low: int, high: int) -> bool:
    """Whether values from `low` to `high`, which an area (H, W) holds, go up and down along its rows as noise does."""
    # beyond the range all values are alike, so that noise cut off at one value turns too
    near = values.clip(max(low - 1, np.iinfo(values.dtype).min), min(high + 1, np.iinfo(values.dtype).max))
    left, middle, right = near[:, :-2], near[:, 1:-1], near[:, 2:]
    moving = area[:, 1:-1] & (left != middle) & (middle != right)
    turns = (left < middle) != (middle < right)
    return np.count_nonzero(moving) >= LEAST_STEPS and turns[moving].mean() > LEAST_TURNING
