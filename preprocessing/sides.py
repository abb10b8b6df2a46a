"""Edges far above the noise: an image taken apart at them, so that either side can be restored as if it went on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from preprocessing.noise import unit_energy

EDGE_SHARE = 0.25  # of full scale in units of the noise: least step across 5 pixels of an edge that is taken apart ...
EDGE_RANGE = 7.0, 20.0  # ... within these: below is noise and texture, above every filter fails
SMALL = 9  # pixels: what is narrower, such as a calcification, is no edge
EDGE_REACH = 24  # pixels around such an edge in which its two sides are told apart: what local means reach


@dataclass(frozen=True)
class Sides:
    """Where an image (H, W) has edges to take apart, and what each side goes on as in place of the other.

    Out of reach of edges both sides are the image itself.
    """

    is_bright: np.ndarray  # (H, W) bool: which of the two a pixel belongs to
    near: np.ndarray  # (H, W) bool: in reach of an edge
    fills: tuple[np.ndarray, np.ndarray]  # (H, W) float64: what the dark and the bright side go on as, without noise

    def side(self, values: np.ndarray, bright: bool, noise: np.ndarray | float = 0.0) -> np.ndarray:
        """One side of an image (H, W) of the same edges: its own pixels, and what it goes on as, plus `noise`, on the other's."""
        other = self.near & (self.is_bright != bright)
        return np.where(other, self.fills[bright] + noise, values).astype(np.float32)


def least_step(full_scale: float, kernel: Tensor | None = None) -> float:
    """The least step of an edge that is taken apart; like `full_scale` in units of the noise, which a kernel (k, k) correlates.

    The range grows with the noise that is left in means of 3 x 3 pixels, a third of it if it is white.
    """
    left = 1.0
    if kernel is not None:
        unit = unit_energy(kernel).numpy()
        left = 3 * float(np.sqrt((ndimage.uniform_filter(np.pad(unit, 1), 3, mode="constant") ** 2).sum()))
    return float(np.clip(EDGE_SHARE * full_scale, *(left * limit for limit in EDGE_RANGE)))


def part_sides(values: np.ndarray, step: float) -> Sides | None:
    """Take an image (H, W) in units of its noise apart at edges of more than `step`; None if it has none.

    Next to a film's border or a lead label every filter that reaches across sees that step and no noise. Within `EDGE_REACH`
    pixels of such a step, pixels are told apart by the middle of the range around them, and what is missing of a side is
    the mean of the nearest of its own (normalised convolution; Knutsson & Westin, CVPR 1993).
    """
    smooth = ndimage.median_filter(values, 3, mode="nearest")  # a noisy pixel is no edge ...
    padded = np.pad(smooth, SMALL, mode="edge")  # a narrow band along the image's end goes on beyond it
    large = ndimage.grey_closing(ndimage.grey_opening(padded, SMALL), SMALL)[SMALL:-SMALL, SMALL:-SMALL]
    edges = ndimage.maximum_filter(large, 5, mode="nearest") - ndimage.minimum_filter(large, 5, mode="nearest") > step
    if not edges.any():  # ... and no calcification is
        return None
    reach = 2 * EDGE_REACH + 1
    most, least = (f(smooth, reach, mode="nearest") for f in (ndimage.maximum_filter, ndimage.minimum_filter))
    near = ndimage.maximum_filter(edges, reach, mode="nearest") & (most - least > step)
    is_bright = smooth >= (most + least) / 2
    return Sides(is_bright, near, tuple(_extended(values, own | ~near) for own in (~is_bright, is_bright)))


def _extended(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Local means of the known pixels of an image (H, W): of the nearest, over windows that count the less the wider they are."""
    total, weight = np.zeros(values.shape), np.zeros(values.shape)
    for share, sigma in ((1.0, 2.0), (1e-2, 6.0), (1e-4, 18.0), (1e-6, 54.0)):
        for sums, part in ((total, np.where(known, values, 0.0)), (weight, known.astype(np.float64))):
            sums += share * ndimage.gaussian_filter(part.astype(np.float64), sigma, mode="nearest", truncate=3.0)
    return np.where(weight > 0, total / np.maximum(weight, np.finfo(float).tiny), values)
