"""The breast mask of a real mammogram."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

MASK_SIDE = 512  # longest side, in pixels, at which the breast mask is computed
OUTLIERS = 0.1  # percent of the pixels at either end that do not count for the range of an image
PEAK_SHARE = 0.05  # of the pixels: the narrowest range that holds so many tells how flat a background is
FLATNESS = 0.25  # a background's peak is narrower than this share of any of the tissue; a crop of tissue has none such
FLAT_SIDE = 5  # pixels: noise that is clamped at 0 half of the time leaves no such square constant
LEAST_SHARE = 0.01  # of the pixels, in a background that is clipped


def otsu_threshold(values: np.ndarray, bins: int = 256) -> float:
    """Threshold that maximises the between-class variance of values in [0, 1] (Otsu, 1979, eq. 18)."""
    counts, edges = np.histogram(values, bins=bins, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * centres).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[int(np.nanargmax(np.where((below > 0) & (above > 0), between, -1.0)))])


def breast_mask(image: Tensor) -> Tensor:
    """Breast mask of a real mammogram: (1, H, W) in any units, dense tissue bright or dark, to (1, H, W) bool.

    The image is brought to at most 512 pixels a side, smoothed (Gaussian, sigma 2) and brought to its own range. The
    background is what is flattest, at the dark end on film and at the bright end of an image that is linear in exposure.
    Pixels farther from it than a quarter of Otsu's threshold, at least 0.02, are kept; after an opening that cuts thin
    bridges to labels and film borders, the largest connected component with its holes filled is the breast. If there is
    none, or no background, all is True. An image and its negative have the same mask.
    """
    height, width = image.shape[-2:]
    whole = torch.ones(1, height, width, dtype=torch.bool)
    factor = min(1.0, MASK_SIDE / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    small = F.interpolate(image[None].double(), size=size, mode="area")[0, 0].numpy()
    smooth = ndimage.gaussian_filter(small, 2.0, mode="nearest")
    unit = _background_dark(smooth)
    if unit is None:
        return whole
    threshold = max(float(np.percentile(unit, 1)) + 0.02, otsu_threshold(unit) / 4)
    margin = 6  # the chest wall lies on the image border: repeated, it survives the opening
    padded = np.pad(unit > threshold, margin, mode="edge")
    opened = ndimage.binary_opening(padded, iterations=margin)[margin:-margin, margin:-margin]
    labels, count = ndimage.label(opened)
    if count == 0:
        return whole
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    mask = torch.from_numpy(ndimage.binary_fill_holes(labels == largest))
    return F.interpolate(mask[None, None].float(), size=(height, width), mode="nearest")[0] > 0.5


def clipped_background(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Where an image (H, W) is constant outside the breast's mask (H, W), at its least or greatest value: (H, W) bool.

    Only areas count that are connected and hold flat squares of at least 1 % of the pixels; noise that is clamped has none.
    """
    clipped = np.zeros(image.shape, bool)
    for extreme in (image.min(), image.max()):
        at = (image == extreme) & ~mask
        flat = ndimage.minimum_filter(at.astype(np.uint8), FLAT_SIDE, mode="nearest")
        labels, _ = ndimage.label(ndimage.maximum_filter(flat, FLAT_SIDE, mode="nearest"))
        large = np.bincount(labels.ravel()) >= LEAST_SHARE * image.size
        large[0] = False
        clipped |= ndimage.binary_propagation(large[labels], np.ones((3, 3)), at)
    return clipped


def _background_dark(smooth: np.ndarray) -> np.ndarray | None:
    """A smoothed image (H, W) in [0, 1] of its own range, turned round if its background is bright; None without one."""
    low, high = np.percentile(smooth, [OUTLIERS, 100 - OUTLIERS])
    if not high > low:
        return None
    unit = ((smooth - low) / (high - low)).clip(0, 1)
    values = np.sort(unit, axis=None)
    count = max(1, int(PEAK_SHARE * values.size))
    spans, centres = values[count:] - values[:-count], (values[count:] + values[:-count]) / 2
    ends = centres < 0.25, centres > 0.75, (centres >= 0.25) & (centres <= 0.75)
    dark, bright, middle = (spans.min(where=end, initial=1.0) for end in ends)
    border = np.concatenate([unit[[0, -1]].ravel(), unit[:, [0, -1]].ravel()]).mean()
    if (bright, 1 - border) < (dark, border):  # of two that are equally flat, the background holds more of the border
        unit, dark, bright = 1 - unit, bright, dark
    return unit if dark <= FLATNESS * min(bright, middle) else None
