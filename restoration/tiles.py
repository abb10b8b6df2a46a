"""Large images in overlapping tiles that are blended without seams."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

LEAST_CHANGE = 1e-3  # standard deviations of the noise; a whitening filter reaches across the image, ever less
OVERLAP = 64  # pixels that neighbouring tiles share at least, if a quarter of a tile is not less
MARGIN = 32  # pixels by which an image is mirrored at its borders


@dataclass(frozen=True)
class Span:
    """A tile's extent along one axis, and its share in every pixel of it."""

    start: int
    weights: Tensor  # (length,); over all tiles they add up to 1 at every pixel

    @property
    def stop(self) -> int:
        return self.start + len(self.weights)


def tile_spans(size: int, tile: int, overlap: int, multiple: int) -> list[Span]:
    """Cut `size` pixels into as few spans of at most `tile` as can be, and these as short as can be, that start at multiples
    of `multiple` and share at least `overlap`.

    A quarter of an overlap at either end of it has no weight: it is there for the network to look at. Between the two the
    weights cross over smoothly. `size` and `tile` must be multiples of `multiple`, `overlap` at most half of `tile`; one
    span covers a `size` of at most `tile`. Raises ValueError otherwise.
    """
    if size % multiple or tile % multiple or not 4 <= overlap <= tile // 2:
        raise ValueError(f"a tile of {tile} with an overlap of {overlap} does not suit {size} in steps of {multiple}")
    if size <= tile:
        return [Span(0, torch.ones(size))]
    count, starts = 1, []
    while not starts:
        count += 1
        starts = _starts(size, tile, overlap, multiple, count)
    while tile - multiple >= 2 * overlap and (closer := _starts(size, tile - multiple, overlap, multiple, count)):
        tile, starts = tile - multiple, closer
    weights = torch.zeros(count, size, dtype=torch.float64)
    weights[0, : starts[0] + tile] = 1
    for i in range(1, count):
        low, high = starts[i], starts[i - 1] + tile
        margin = (high - low) // 4
        at = torch.arange(low + margin, high - margin, dtype=torch.float64)
        ramp = torch.sin((at + 0.5 - low - margin) / (high - low - 2 * margin) * (math.pi / 2)) ** 2
        rise = torch.cat([torch.zeros(margin), ramp, torch.ones(margin)]).double()
        weights[i, low : starts[i] + tile] = 1
        weights[i, low:high] = rise
        # what a third tile holds here already is shared out alike
        weights[:i, low:high] *= 1 - rise
        weights[:i, high:] = 0
    return [Span(start, weights[i, start : start + tile].float()) for i, start in enumerate(starts)]


def _starts(size: int, tile: int, overlap: int, multiple: int, count: int) -> list[int]:
    """Where `count` tiles start, evenly spread; empty if that leaves less than `overlap` between two."""
    starts = [i * (size - tile) // (count - 1) // multiple * multiple for i in range(count)]
    return starts if all(b - a <= tile - overlap for a, b in itertools.pairwise(starts)) else []


# Restores a tile (1, C, h, w), to (1, K, h, w), whose first pixel is at (row, column) of the image, or before its beginning.
TileFunction = Callable[[Tensor, tuple[int, int]], Tensor]


def restore_in_tiles(
    image: Tensor, function: TileFunction, tile: tuple[int, int], multiple: int, *, progress: bool = False
) -> Tensor:
    """Apply `function` to overlapping tiles of an image (1, C, H, W) and blend what it returns, (1, K, H, W), without seams.

    If `function` at a pixel depends on less than a quarter of the overlap around it, the result is that of the whole image.
    The overlap is a quarter of the tile, up to `OVERLAP`. The image is mirrored at its borders, by `MARGIN` and up to a multiple of
    `multiple`: convolutions that ran into its end would draw lines along it.
    """
    height, width = image.shape[-2:]
    beyond = [(MARGIN, MARGIN + -(side + 2 * MARGIN) % multiple) for side in (height, width)]
    padded = torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), *beyond], mode="reflect"))
    rows, columns = (
        tile_spans(size, side, max(4, min(OVERLAP, side // 4)), multiple)
        for size, side in zip(padded.shape[-2:], tile, strict=True)
    )
    result = torch.zeros(())
    bar = tqdm(total=len(rows) * len(columns), desc="tiles", unit="tile", leave=False, disable=not progress)
    for row in rows:
        for column in columns:
            window = ..., slice(row.start, row.stop), slice(column.start, column.stop)
            share = row.weights[:, None] * column.weights
            part = function(padded[window], (row.start - MARGIN, column.start - MARGIN)) * share
            if not result.ndim:
                result = torch.zeros(1, part.shape[1], *padded.shape[-2:])
            result[window] += part
            bar.update()
    bar.close()
    return result[..., MARGIN : MARGIN + height, MARGIN : MARGIN + width]


def changed_box(a: Tensor, b: Tensor, margin: int, multiple: int) -> tuple[slice, slice] | None:
    """Rows and columns around all pixels in which images (H, W) in units of their noise differ by more than `LEAST_CHANGE`,
    and `margin` more; they start and, inside the image, stop at multiples of `multiple`. None if nothing differs."""
    differs = (a - b).abs() > LEAST_CHANGE
    if not differs.any():
        return None
    box = []
    for dim, size in ((1, a.shape[0]), (0, a.shape[1])):
        places = differs.any(dim).nonzero().flatten()
        start = max(0, int(places[0]) - margin) // multiple * multiple
        box.append(slice(start, min(size, -(-(int(places[-1]) + 1 + margin) // multiple) * multiple)))
    return box[0], box[1]


def box_weights(box: tuple[slice, slice], shape: tuple[int, int], margin: int) -> Tensor:
    """Weights (h, w) of a box in an image of `shape` (H, W): 1, and to 0 over `margin` pixels to its sides within the image."""
    rows, columns = (torch.ones(span.stop - span.start) for span in box)
    ramp = (torch.arange(margin) + 0.5) / margin
    for weights, span, size in zip((rows, columns), box, shape, strict=True):
        if span.start > 0:
            weights[:margin] = ramp
        if span.stop < size:
            weights[-margin:] = torch.minimum(weights[-margin:], ramp.flip(0))
    return rows[:, None] * columns
