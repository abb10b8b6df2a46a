"""The training grid, and an image on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_GREY_VALUE = 2**16 - 1  # prepared images are rounded to 16 bits, so the cache loses nothing


def _bounding_box(mask: np.ndarray, margin: float) -> tuple[int, int, int, int, int]:
    """Top, left, bottom and right of a mask (H, W), and `margin` of its longer side, in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left, bottom, right = (int(v) for v in (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))
    return top, left, bottom, right, max(1, round(margin * max(bottom - top, right - left)))


def _border(profile: np.ndarray, spare: int) -> int:
    """Number of lines of film border, at most 2 * spare + 1, at the start of a profile of mean intensities from the edge inwards.

    A line belongs to the border if its mean is more than 15 % off that of the lines behind; one more line is added.
    """
    reference = float(np.median(profile[2 * spare : 4 * spare])) if len(profile) > 4 * spare else 0.0
    off = np.flatnonzero(np.abs(profile[: 2 * spare] - reference) > 0.15 * reference)
    return int(off[-1]) + 2 if reference and len(off) else 0


@dataclass(frozen=True)
class Grid:
    """The place of an image on the training grid: a box of it, scaled by one factor, with background on the far side."""

    box: tuple[int, int, int, int]  # top, left, bottom, right in the image's own pixels
    size: tuple[int, int]  # height, width of the scaled box
    offset: tuple[int, int]  # row, column of its top left corner on the grid
    shape: tuple[int, int]  # height, width of the grid

    @classmethod
    def fit(cls, image: np.ndarray, mask: np.ndarray, shape: tuple[int, int], margin: float = 0.02) -> Grid:
        """Fit the bounding box of the breast of an image (H, W) with its mask (H, W) into `shape`.

        The box keeps `margin` of its longer side around the skin, and loses the film's border if the film cuts the breast.
        The breast is scaled, never stretched; spare columns go to the side away from the chest wall, spare rows to both.
        """
        top, left, bottom, right, spare = _bounding_box(mask, margin)
        middle = (left + right) // 2
        wall_left = mask[:, left:middle].sum() > mask[:, middle:right].sum()
        means = [np.where(mask, image, 0).sum(axis) / mask.sum(axis).clip(1) for axis in (1, 0)]
        # a wide straight edge of the mask means that the film cuts the breast; at the chest wall it always does
        wide = 0.2 * (right - left)
        top_cut, bottom_cut = mask[top + 1].sum() > wide, mask[bottom - 2].sum() > wide
        top = top + _border(means[0][top:bottom], spare) if top_cut else max(0, top - spare)
        bottom = bottom - _border(means[0][top:bottom][::-1], spare) if bottom_cut else min(len(mask), bottom + spare)
        if wall_left:
            left, right = left + _border(means[1][left:right], spare), min(mask.shape[1], right + spare)
        else:
            left, right = max(0, left - spare), right - _border(means[1][left:right][::-1], spare)
        height, width = bottom - top, right - left
        factor = min(shape[0] / height, shape[1] / width)
        size = min(shape[0], max(1, round(height * factor))), min(shape[1], max(1, round(width * factor)))
        offset = (shape[0] - size[0]) // 2, 0 if wall_left else shape[1] - size[1]
        return cls(tuple(int(v) for v in (top, left, bottom, right)), size, offset, tuple(shape))

    @classmethod
    def native(cls, mask: np.ndarray, margin: float = 0.02) -> Grid:
        """The bounding box of a mask (H, W) on a grid of its own size, with `margin` of its longer side all around.

        The film's border stays, as in restoring.
        """
        top, left, bottom, right, spare = _bounding_box(mask, margin)
        top, left = max(0, top - spare), max(0, left - spare)
        bottom, right = min(len(mask), bottom + spare), min(mask.shape[1], right + spare)
        size = bottom - top, right - left
        return cls((top, left, bottom, right), size, (0, 0), size)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Bring an image (H, W) onto the grid: antialiased bilinear scaling, background 0."""
        top, left, bottom, right = self.box
        box = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right], dtype=np.float32))
        scaled = np.asarray(box.resize(self.size[::-1], Image.Resampling.BILINEAR))
        grid = np.zeros(self.shape, dtype=np.float32)
        row, column = self.offset
        grid[row : row + self.size[0], column : column + self.size[1]] = scaled.clip(0, 1)
        return grid

    def add(self, change: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Add a change on the grid (H, W) to a copy of `image`, in its own pixels: bicubic scaling, clamped to [0, 1]."""
        top, left, bottom, right = self.box
        row, column = self.offset
        box = Image.fromarray(np.ascontiguousarray(change[row : row + self.size[0], column : column + self.size[1]]))
        scaled = np.asarray(box.resize((right - left, bottom - top), Image.Resampling.BICUBIC))
        result = image.copy()
        result[top:bottom, left:right] = (result[top:bottom, left:right] + scaled).clip(0, 1)
        return result


@dataclass(frozen=True)
class Prepared:
    """An image on the training grid; its planes are in [0, 1], or grey values as the cache holds them: see `intensities`."""

    clean: Tensor  # (C, H, W)
    mask: Tensor  # (1, H, W) bool, True in the breast
    degraded: Tensor | None = None  # (C, H, W): a real low-dose image in place of the simulation
    info: dict = field(default_factory=dict)

    def as_floats(self) -> Prepared:
        """The image with its planes in [0, 1]."""
        degraded = None if self.degraded is None else intensities(self.degraded)
        return replace(self, clean=intensities(self.clean), degraded=degraded)


def intensities(images: Tensor) -> Tensor:
    """Bring 16-bit grey values to float32 in [0, 1], the same bits on any device; images in [0, 1] stay as they are.

    Grey values are unsigned, but their type is int16: torch mirrors it five times as fast as uint16.
    """
    if images.is_floating_point():
        return images
    images = images.view(torch.uint16).float()
    return images.div_(images.new_full((), MAX_GREY_VALUE))  # CUDA would multiply by a number's reciprocal, rounded
