"""The breast mask of a real mammogram."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

MASK_SIDE = 512  # longest side, in pixels, at which the breast mask is computed


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
    """Breast mask of a real mammogram: (1, H, W) in [0, 1] to (1, H, W) bool.

    The image is brought to at most 512 pixels a side and smoothed (Gaussian, sigma 2); pixels above a quarter of Otsu's
    threshold, at least 0.02 over the darkest percentile, are kept; after an opening that cuts thin bridges to labels and
    film borders, the largest connected component with its holes filled is the breast. If there is none, all is True.
    """
    height, width = image.shape[-2:]
    factor = min(1.0, MASK_SIDE / max(height, width))
    size = max(1, round(height * factor)), max(1, round(width * factor))
    small = F.interpolate(image[None].float(), size=size, mode="area")[0, 0].numpy()
    smooth = ndimage.gaussian_filter(small, 2.0, mode="nearest")
    threshold = max(float(np.percentile(smooth, 1)) + 0.02, otsu_threshold(smooth) / 4)
    margin = 6  # the chest wall lies on the image border: repeated, it survives the opening
    padded = np.pad(smooth > threshold, margin, mode="edge")
    opened = ndimage.binary_opening(padded, iterations=margin)[margin:-margin, margin:-margin]
    labels, count = ndimage.label(opened)
    if count == 0:
        return torch.ones(1, height, width, dtype=torch.bool)
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    mask = torch.from_numpy(ndimage.binary_fill_holes(labels == largest))
    return F.interpolate(mask[None, None].float(), size=(height, width), mode="nearest")[0] > 0.5
