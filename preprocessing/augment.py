"""What training crops are changed by: size, orientation, contrast, borders, calcifications."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from hps import HParams
from preprocessing.phantom import Calcification, add_calcifications

FAINTEST, BRIGHTEST = 0.01, 0.6  # contrast of calcifications drawn on training crops
FAINT_POWER = 1.5  # 1: uniform in the logarithm of the contrast; above it more are faint
TILT = 0.1  # radians: how far a border drawn on a training crop is at most off the rows or columns
BLACK, WHITE = 0.6, 0.2  # shares of these borders beyond which there is nothing, and a film's whitest; else a grey
CUT = 0.4  # share of a training crop's breast that a window drawn on it cuts off at either end at most
DIMMEST = 0.03  # intensity that the end of a window becomes at least
MOST_GAIN = 8.0  # of a window, and of an enhancement before it: more would make an 8 bit image's steps the picture
ENHANCED_SIGMA = (2.0, 24.0)  # pixels: what is finer has its contrast raised
# Settings that change the values of training images, and all that change the images before they are encoded.
CHANGES_OF_INTENSITIES = ("gamma_range", "part_edges", "calcifications", "borders", "windowing", "enhancement")
CHANGES_OF_IMAGES = ("flip", "dihedral", "scale_range", *CHANGES_OF_INTENSITIES)


def switched_on(hps: HParams, names: Iterable[str]) -> list[str]:
    """Those of the settings that do something; a range from 1 to 1 does nothing."""
    return [name for name in names if hps[name] and hps[name] != [1, 1]]


def log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A draw between `low` and `high`, both above 0, uniform in its logarithm."""
    return low * (high / low) ** float(torch.rand((), generator=generator))


def windowed(clean: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) in [0, 1] through a random window, as displays and detectors have them.

    Three coins are tossed: it begins at black, or at a quantile, up to `CUT`, of the intensities within the mask; it cuts up
    to `CUT` of them off at white, or ends at their maximum; and where it does, this may become a darker grey, log-uniform from
    `DIMMEST`, instead of full scale. The image is multiplied by `MOST_GAIN` at most.

    Source: linear windowing, DICOM PS3.3, C.11.2.1.2.
    """
    inside = clean[mask]
    if not len(inside):
        return clean
    low, high, dim, *halves = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    begins, cuts, dims = (half < 0.5 for half in halves)
    quantiles = inside.quantile(torch.tensor([CUT * low, 1 - CUT * high if cuts else 1.0])).tolist()
    floor, end = quantiles[0] if begins else 0.0, quantiles[1]
    top = DIMMEST**dim if dims and not cuts else 1.0
    return ((clean - floor) / max(end - floor, 1 / MOST_GAIN)).clamp(0, 1) * top


def enhanced(clean: Tensor, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) in [0, 1] whose local contrast is raised, as processing for display does.

    What differs from a Gaussian mean, of a sigma log-uniform in `ENHANCED_SIGMA` pixels, is multiplied by a gain log-uniform
    from 1 to `MOST_GAIN`.

    Source: unsharp masking, Gonzalez & Woods, Digital Image Processing, 4th ed., equations 3-55 and 3-56.
    """
    sigma, gain = log_uniform(*ENHANCED_SIGMA, generator), log_uniform(1, MOST_GAIN, generator)
    mean = torch.from_numpy(ndimage.gaussian_filter(clean[0].numpy(), sigma, mode="nearest", truncate=3.0))
    return (mean + gain * (clean - mean)).clamp(0, 1)


def calcified(clean: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of an image (1, H, W) with 4 to 40 calcifications of 1 to 3 pixels, most of them faint, within the mask."""
    count = int(torch.randint(4, 41, (), generator=generator))
    height, width = mask.shape[-2:]
    drawn = []
    for row, column, size, strength in torch.rand(count, 4, generator=generator, dtype=torch.float64).tolist():
        row, column = row * height, column * width
        if mask[0, int(row), int(column)]:
            drawn.append(
                Calcification(row, column, 1 + 2 * size, FAINTEST * (BRIGHTEST / FAINTEST) ** strength**FAINT_POWER)
            )
    image = clean[0].numpy().copy()
    add_calcifications(image, drawn, 1.0)
    return torch.from_numpy(image)[None]


def bordered(clean: Tensor, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) up to a straight line across it, beyond which there is one intensity, as at the border of a film.

    Half of the lines run along rows or columns, the others up to `TILT` off to either side; pixels on the line hold their
    share of both.
    """
    quarter, tilt, place, which, grey = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    angle = int(4 * quarter) * math.pi / 2 + (4 * tilt - 3 if tilt > 0.5 else 0.0) * TILT
    rows, columns = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in clean.shape[-2:])
    reach = (0.1 + 0.35 * place) * min(clean.shape[-2:])
    distance = math.sin(angle) * rows[:, None] + math.cos(angle) * columns + reach
    share = (distance + 0.5).clamp(0, 1).float()
    beyond = 0.0 if which < BLACK else 1.0 if which < BLACK + WHITE else grey
    return clean * share + beyond * (1 - share)


def oriented(image: Tensor, orientation: int) -> Tensor:
    """Orientation 0..7 of an image (..., H, W): mirrored by the lowest bit, upside down by the next, transposed by the third.

    0 is the image itself.
    """
    if orientation & 1:
        image = image.flip(-1)
    if orientation & 2:
        image = image.flip(-2)
    return image.transpose(-1, -2) if orientation & 4 else image


def resized(image: Tensor, side: int) -> Tensor:
    """A square crop (C, H, H) at `side` pixels a side, antialiased; a mask stays one."""
    resized = F.interpolate(image[None].float(), size=(side, side), mode="bilinear", antialias=True)[0]
    return resized > 0.5 if image.dtype == torch.bool else resized.clamp(0, 1)


def draw_crop(
    mask: Tensor, size: int, step: int, breast_fraction: float, generator: torch.Generator
) -> tuple[int, int]:
    """Top left corner, in multiples of `step`, of a random crop of a mask (H, W) that holds enough breast.

    The first of 8 draws with at least `breast_fraction` of it, or the best of them.
    """
    best, corner = -1.0, (0, 0)
    for _ in range(8):
        row, column = (
            step * int(torch.randint((side - size) // step + 1, (), generator=generator)) for side in mask.shape
        )
        fraction = float(mask[row : row + size, column : column + size].float().mean())
        if fraction > best:
            best, corner = fraction, (row, column)
        if fraction >= breast_fraction:
            break
    return corner
