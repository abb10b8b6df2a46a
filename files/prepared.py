"""From a mammogram's file to the training grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from files.images import read_mammogram
from helper import ImageError
from preprocessing.breast import breast_mask
from preprocessing.grid import MAX_GREY_VALUE, Grid, Prepared


@dataclass(frozen=True)
class Record:
    """One image of a data set on disk."""

    path: Path  # full-dose image
    key: str  # path relative to the data root, with forward slashes
    patient: str
    degraded: Path | None = None  # its low-dose image, if there is one
    info: dict = field(default_factory=dict)


def prepare_record(record: Record, image_shape: Sequence[int], native: bool = False) -> Prepared:
    """A record's image, and its low-dose image if it has one, on the training grid of `image_shape` (C, H, W).

    With `native`, the breast's box in its own pixels, of any size. Raises ImageError naming the file if it cannot be read,
    is too small, or does not fit its pair.
    """
    mammogram = read_mammogram(record.path)
    image, remarks = mammogram.pixels, mammogram.remarks
    if min(image.shape) < 16:
        raise ImageError(f"{record.path}: {image.shape[1]} x {image.shape[0]} pixels are too few; remove it")
    mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
    grid = Grid.native(mask) if native else Grid.fit(image, mask, tuple(image_shape[1:]))
    clean, degraded = _on_grid(image, grid), None
    if record.degraded is not None:
        mammogram = read_mammogram(record.degraded)
        low, remarks = mammogram.pixels, remarks | mammogram.remarks
        if low.shape != image.shape:
            sizes = [f"{width} x {height}" for height, width in (low.shape, image.shape)]
            raise ImageError(f"{record.degraded}: {sizes[0]} pixels, but its full-dose pair has {sizes[1]}")
        degraded = _on_grid(low, grid)
    return Prepared(clean, breast_mask(clean), degraded, {"grid": grid, "remarks": remarks})


def _on_grid(image: np.ndarray, grid: Grid) -> Tensor:
    white = np.float32(MAX_GREY_VALUE)
    return torch.from_numpy(np.rint(grid.apply(image) * white) / white)[None]
