"""Changes of training crops: size, orientation, contrast, borders, calcifications."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from hps import HParams
from preprocessing.grid import Prepared
from preprocessing.noise import NoiseModel, draw_kernel, unit_noise
from preprocessing.phantom import Calcification, add_calcifications

# Settings that change the values of training images, and all that change the images before they are encoded.
CHANGES_OF_INTENSITIES = (
    "gamma_range", "part_edges", "calcifications", "borders", "windowing", "enhancement", "grain", "negatives",
)  # fmt: skip
CHANGES_OF_IMAGES = ("flip", "dihedral", "scale_range", *CHANGES_OF_INTENSITIES)


def augment(image: Prepared, hps: HParams, generator: torch.Generator) -> Prepared:
    """A random crop of a training image in [0, 1], resized, turned, of another contrast and drawn on as the settings say.

    A measured low dose is only cropped and turned: its noise and intensities stay. A simulated one is drawn afterwards.
    """
    simulated = image.degraded is None
    parts = [image.clean, image.mask] if simulated else [image.clean, image.mask, image.degraded]
    if hps.crop_size:
        parts = _cropped(parts, hps, simulated, generator)
    if simulated:
        if hps.gamma_range != [1, 1]:
            gamma = log_uniform(*hps.gamma_range, generator)
            if toss(0.5, generator):
                parts[0] = parts[0] ** gamma
        if toss(hps.enhancement, generator):
            parts[0] = enhanced(parts[0], hps.enhancement_sigma, hps.most_gain, generator)
        if toss(hps.windowing, generator):
            parts[0] = windowed(*parts, hps.most_gain, generator)
    if hps.dihedral:
        orientation = int(torch.randint(8, (), generator=generator))
        parts = [oriented(part, orientation) for part in parts]
    elif hps.flip and toss(0.5, generator):
        parts = [part.flip(-1) for part in parts]
    if simulated:  # drawn last: their contrast is the same in any window
        if toss(hps.calcifications, generator):
            parts[0] = calcified(*parts, hps.calcification_contrast, generator)
        if toss(hps.borders, generator):
            parts[0] = bordered(parts[0], generator)
        if toss(hps.negatives, generator):  # with dark calcifications
            parts[0] = 1 - parts[0]
    return Prepared(*parts)


def toss(share: float, generator: torch.Generator) -> bool:
    """True with a probability of `share`; if it is 0, nothing is drawn."""
    return share > 0 and bool(torch.rand((), generator=generator) < share)


def _cropped(parts: list[Tensor], hps: HParams, resizes: bool, generator: torch.Generator) -> list[Tensor]:
    """The same random crop of all parts (., H, W), the second of which is the mask; `resizes` allows `scale_range`."""
    side = hps.crop_size
    if resizes and hps.scale_range != [1, 1]:
        factor = log_uniform(*hps.scale_range, generator)
        side = side if toss(0.5, generator) else round(side / factor)
    short = [max(0, side - length) for length in parts[1].shape[-2:]]
    if any(short):  # padding by nothing would copy the whole image
        parts = [F.pad(part, (0, short[1], 0, short[0])) for part in parts]
    row, column = draw_crop(parts[1][0], side, 1, hps.breast_fraction, generator)
    parts = [part[:, row : row + side, column : column + side] for part in parts]
    return parts if side == hps.crop_size else [resized(part, hps.crop_size) for part in parts]


def switched_on(hps: HParams, names: Iterable[str]) -> list[str]:
    """Those of the settings that do something; a range from 1 to 1 does nothing."""
    return [name for name in names if hps[name] and hps[name] != [1, 1]]


def log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A draw between `low` and `high`, both above 0, uniform in its logarithm."""
    return low * (high / low) ** float(torch.rand((), generator=generator))


def windowed(clean: Tensor, mask: Tensor, most_gain: float, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) in [0, 1] through a random window, as displays and detectors have them.

    Of the intensities within the mask up to 40 % are cut off at black, half of the time, and up to 40 % at white, half of the
    time. Otherwise they end at their maximum, which becomes full scale or, half of the time, a darker grey, log-uniform from
    0.03. No intensity is multiplied by more than `most_gain`.

    Source: linear windowing, DICOM PS3.3, C.11.2.1.2.
    """
    inside = clean[mask]
    if not len(inside):
        return clean
    low, high, dim, *halves = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    begins, cuts, dims = (half < 0.5 for half in halves)
    quantiles = inside.quantile(torch.tensor([0.4 * low, 1 - 0.4 * high if cuts else 1.0])).tolist()
    floor, end = quantiles[0] if begins else 0.0, quantiles[1]
    top = 0.03**dim if dims and not cuts else 1.0
    return ((clean - floor) / max(end - floor, 1 / most_gain)).clamp(0, 1) * top


def enhanced(clean: Tensor, sigmas: list[float], most_gain: float, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) in [0, 1] whose local contrast is raised, as processing for display does.

    The difference from a Gaussian mean, of a sigma log-uniform between the two `sigmas` in pixels, is multiplied by a gain
    log-uniform from 1 to `most_gain`.

    Source: unsharp masking, Gonzalez & Woods, Digital Image Processing, 4th ed., equations 3-55 and 3-56.
    """
    sigma, gain = log_uniform(*sigmas, generator), log_uniform(1, most_gain, generator)
    mean = torch.from_numpy(ndimage.gaussian_filter(clean[0].numpy(), sigma, mode="nearest", truncate=3.0))
    return (mean + gain * (clean - mean)).clamp(0, 1)


def grained(clean: Tensor, noise_level: float, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) in [0, 1] with grain that counts as its own, and so strong that it is not taken for noise.

    Its deviation is log-uniform from 1.5 to 4 times that of the noise at half of full scale; half of the time it is correlated.
    """
    noise = float(NoiseModel.from_level(noise_level).variance(torch.tensor(0.5))) ** 0.5
    deviation, kernel = noise * log_uniform(1.5, 4, generator), draw_kernel(0.5, generator)
    return (clean + deviation * unit_noise(clean.shape, kernel, generator)).clamp(0, 1)


def calcified(clean: Tensor, mask: Tensor, contrasts: list[float], generator: torch.Generator) -> Tensor:
    """A copy of an image (1, H, W) with 4 to 40 calcifications of 1 to 3 pixels within the mask.

    Their contrasts lie between the two `contrasts`; more of them are faint than if the logarithm was uniform.
    """
    count = int(torch.randint(4, 41, (), generator=generator))
    (height, width), (faintest, strongest) = mask.shape[-2:], contrasts
    drawn = []
    for row, column, size, strength in torch.rand(count, 4, generator=generator, dtype=torch.float64).tolist():
        row, column = row * height, column * width
        if mask[0, int(row), int(column)]:
            contrast = faintest * (strongest / faintest) ** strength**1.5
            drawn.append(Calcification(row, column, 1 + 2 * size, contrast))
    image = clean[0].numpy().copy()
    add_calcifications(image, drawn, 1.0)
    return torch.from_numpy(image)[None]


def bordered(clean: Tensor, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) up to a straight line across it, beyond which there is one intensity, as at the border of a film.

    Half of the lines run along rows or columns, the others are up to 0.1 radians off. Beyond the line it is black with a
    probability of 0.6, white with 0.2, else grey; pixels on the line hold their share of both.
    """
    quarter, tilt, place, which, grey = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    angle = int(4 * quarter) * math.pi / 2 + (4 * tilt - 3 if tilt > 0.5 else 0.0) * 0.1
    rows, columns = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in clean.shape[-2:])
    reach = (0.1 + 0.35 * place) * min(clean.shape[-2:])
    distance = math.sin(angle) * rows[:, None] + math.cos(angle) * columns + reach
    share = (distance + 0.5).clamp(0, 1).float()
    beyond = 0.0 if which < 0.6 else 1.0 if which < 0.6 + 0.2 else grey
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
