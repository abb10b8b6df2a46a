"""Restoring a mammogram of any size and noise with a trained model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from helper import seeded_generator
from preprocessing.breast import breast_mask
from preprocessing.estimate import level_at
from preprocessing.noise import NoiseModel
from preprocessing.sides import EDGE_REACH, least_step, part_sides
from preprocessing.stabilize import stabilize, unstabilize
from restoration.denoiser import Restoration
from restoration.restorer import Restorer
from restoration.tiles import MARGIN, TileFunction, box_weights, changed_box, restore_in_tiles

PEAK_QUANTILE = 0.999  # of the breast's intensities: brought to full scale at most
PROBE = 0.1  # standard deviations by which an image is moved to see how its correction follows


def matching_factor(noise: NoiseModel, known: NoiseModel, intensity: float) -> float:
    """The factor a that gives an image the noise that the model knows: a^2 Var[y | x] = Var_known[y | a x] at x = `intensity`.

    Levels of `preprocessing/degrade.py` match at every x alike: level s times s_known / s is level s_known. Infinite if the
    image has no noise.
    """
    own = float(noise.variance(intensity))
    if own <= 0:
        return math.inf
    linear = intensity / known.quanta
    return (linear + math.sqrt(linear**2 + 4 * own * known.sigma**2)) / (2 * own)


@dataclass(frozen=True)
class TiledRestorer:
    """Restores whole images (H, W) of one noise tile by tile."""

    restorer: Restorer
    noise: NoiseModel | None  # that a stabilised model is told; None: the model is not stabilised
    level: float | None  # noise level that the networks are told; None: that of the training
    factor: float  # images are multiplied by it, and what is restored is divided by it
    name: str  # keys what is drawn
    tile: int  # side in pixels; 0: the restorer's own
    progress: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Products (K, H, W) in [0, 1] of an image (H, W)."""
        factor = np.float32(self.factor)
        return (self._restore(image * factor) / factor).clip(0, 1)

    def _restore(self, image: np.ndarray) -> np.ndarray:
        """Products (K, H, W) of an image (H, W); at edges far above the noise, each side is restored by itself."""
        sides, whole = None, torch.from_numpy(image)
        if self.noise is not None:
            values = stabilize(whole, self.noise).numpy()
            sides = part_sides(values, least_step(self.noise))
        if sides is None:
            return self._in_tiles(whole[None], self._one)
        drawn = torch.randn(values.shape, generator=seeded_generator("sides", self.restorer.seed, self.name)).numpy()
        parts = [torch.from_numpy(sides.side(values, bright, drawn)) for bright in (True, False)]
        layers = self._in_tiles(torch.stack([unstabilize(part, self.noise) for part in parts]), self._both)
        return np.where(sides.is_bright, *np.split(layers, 2))

    def _in_tiles(self, layers: Tensor, function: TileFunction) -> np.ndarray:
        multiple = self.restorer.scale
        wanted = (self.tile, self.tile) if self.tile else self.restorer.tile
        tile = tuple(max(2, math.ceil(side / multiple)) * multiple for side in wanted)
        return restore_in_tiles(layers[None], function, tile, multiple, progress=self.progress)[0].numpy()

    def _one(self, part: Tensor, origin: tuple[int, int]) -> Tensor:
        told = dict(noise=self.noise, level=self.level, origin=origin, progress=self.progress)
        return self.restorer.restore(part.to(self.restorer.device), self.name, **told).cpu()

    def _both(self, part: Tensor, origin: tuple[int, int]) -> Tensor:
        bright = self._one(part[:, :1], origin)
        dark = bright.clone()
        if box := changed_box(part[0, 0], part[0, 1], EDGE_REACH * 2 + MARGIN, self.restorer.scale):
            # the sides differ around edges only; the dark one fades out to where the network looked past the box's end
            place = origin[0] + box[0].start, origin[1] + box[1].start
            weights = box_weights(box, part.shape[-2:], MARGIN)
            dark[..., box[0], box[1]].lerp_(self._one(part[:, 1:, box[0], box[1]], place), weights)
        return torch.cat([bright, dark], 1)


def restore_image(
    restorer: Restorer, image: np.ndarray, noise: NoiseModel | None, name: str, *, tile: int = 0, progress: bool = False
) -> Restoration:
    """Restore an image (H, W) in [0, 1] at its own size, given its noise; None: that of the training, whatever it is.

    A stabilised model is told the noise. For another the image is multiplied so that its noise is what the model knows, but
    not past full scale, and divided again once restored. If an image is cleaner than those of the training, the share of the
    correction is applied that lowers the error of the posterior mean most (`stein_share`), which takes a second look at it.
    """
    mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
    intensity = float(image[mask].mean())
    if noise is not None and noise.variance(intensity) <= 0:
        return Restoration(np.repeat(image[None], max(1, restorer.samples), 0), math.inf, 0.0)
    told, level, factor, is_cleaner = None, None, 1.0, False
    if restorer.stabilized:
        told = noise or restorer.noise
        level = restorer.level_of(told, intensity)
        is_cleaner = noise is not None and level_at(told, intensity) < level
    elif noise is not None:
        wanted = matching_factor(noise, restorer.noise, intensity)
        factor = min(wanted, max(1.0, 1.0 / max(float(np.quantile(image[mask], PEAK_QUANTILE)), 1e-6)))
        is_cleaner = factor < wanted
    denoise = TiledRestorer(restorer, told, level, factor, name, tile, progress)
    restored = denoise(image)
    if not is_cleaner or not restorer.model.has_mean:
        return Restoration(restored, factor)
    mean = dataclasses.replace(denoise, restorer=dataclasses.replace(restorer, samples=0))
    deviation = np.sqrt(noise.variance(torch.from_numpy(restored.mean(0))).numpy())
    generator = seeded_generator("probe", restorer.seed, name)
    share = stein_share(lambda pixels: pixels - mean(pixels)[0], image, deviation, mask, generator)
    return Restoration((image + share * (restored - image)).clip(0, 1), factor, float(share))


def stein_share(
    correct: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    deviation: np.ndarray,
    mask: np.ndarray,
    generator: torch.Generator,
) -> np.float32:
    """The share a, in [0, 1], of a correction c = `correct(image)` at which the squared error of image - a c is least.

    That is E[n c] / E[c^2] over the mask. The covariance with the Gaussian noise n of standard deviation `deviation`, which
    nobody sees, is sum sd^2 dc/dy, and that divergence is measured by a random probe of the image: no clean one is needed.
    Arrays are (H, W).

    Source: Stein, Annals of Statistics 1981, lemma 2; Ramani, Blu & Unser, IEEE Transactions on Image Processing 2008, theorem 2.
    """
    own = correct(image)
    signs = (2 * torch.randint(2, image.shape, generator=generator) - 1).numpy()
    moved = correct(image + np.float32(PROBE) * deviation * signs.astype(np.float32))
    covariance = deviation * signs * (moved - own) / PROBE
    energy = max(float((own[mask] ** 2).sum()), np.finfo(np.float32).tiny)
    return np.float32(min(max(float(covariance[mask].sum()) / energy, 0.0), 1.0))
