"""Restoring a mammogram of any size, units and noise with a trained model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from helper import seeded_generator
from preprocessing.breast import breast_mask, clipped_background
from preprocessing.noise import UNIT_NOISE, NoiseModel, filtered, unit_noise
from preprocessing.sides import EDGE_REACH, least_step, part_sides
from preprocessing.stabilize import colour, full_scale_of, placed, stabilize, unstabilize, whiten
from restoration.denoiser import Restoration
from restoration.restorer import Restorer
from restoration.tiles import MARGIN, OVERLAP, TileFunction, box_weights, changed_box, restore_in_tiles

PEAK_QUANTILE = 0.999  # of the breast's intensities: brought to full scale at most
STRIP = 192  # rows of an image on which the share of its correction is measured
PROBE = 0.1  # standard deviations by which an image is moved to see how its correction follows


@dataclass(frozen=True)
class Domain:
    """What a model sees of images (..., H, W), and back.

    A stabilised model sees them in units of their noise, whatever it is and whatever they are stored in. The noise is
    correlated still: `whiten` and `colour` stand around the networks, once edges are taken apart. Another model sees images
    in [0, 1], multiplied so that their noise is what it knows.
    """

    level: float  # noise level that the networks are told
    own_level: float | None  # noise level of the image, which they may not know; None: nobody knows
    noise: NoiseModel | None  # of its values; None: nobody knows
    is_cleaner: bool = False  # the image has less noise than those of the training
    factor: float = 1.0  # of `Restoration`
    stored: NoiseModel | None = None  # in the units of the images, `placed`; None: the model is not stabilised

    @classmethod
    def of(cls, image: np.ndarray, noise: NoiseModel | None, mask: np.ndarray, restorer: Restorer) -> Domain:
        """That of an image (H, W), of which nothing is multiplied past full scale."""
        known, level = restorer.noise, restorer.hps.noise_level
        if restorer.stabilized:
            stored, (least, most) = placed(noise or known, image, mask), restorer.level_range
            white, own = replace(UNIT_NOISE, kernel=stored.kernel), stored.level
            return cls(float(np.clip(own, least, most)), own, white, own < least, stored=stored)
        if noise is None:
            return cls(level, None, None)
        wanted = matching_factor(noise, known, float(image[mask].mean()))
        factor = min(wanted, max(1.0, 1.0 / max(float(np.quantile(image[mask], PEAK_QUANTILE)), 1e-6)))
        return cls(level, level / wanted, noise.scaled(factor), factor < wanted, factor)

    def values(self, image: Tensor) -> Tensor:
        return stabilize(image, self.stored) if self.stored else image * self.factor

    def image(self, values: Tensor) -> Tensor:
        return unstabilize(values, self.stored) if self.stored else values / self.factor


def matching_factor(noise: NoiseModel, known: NoiseModel, intensity: float) -> float:
    """The factor a that gives an image the noise that the model knows: a^2 Var[y | x] = Var_known[y | a x] at x = `intensity`.

    Levels of `NoiseModel.from_level` match at every x alike: level s times s_known / s is level s_known. Infinite if the
    image has no noise.
    """
    own = float(noise.variance(torch.tensor(intensity)).mean())
    if own <= 0:
        return math.inf
    linear = intensity * known.gain
    return (linear + math.sqrt(linear**2 + 4 * own * known.sigma**2)) / (2 * own)


@dataclass(frozen=True)
class TiledRestorer:
    """Restores whole images (H, W) in the model's domain tile by tile."""

    restorer: Restorer
    domain: Domain
    name: str  # keys what is drawn
    tile: int  # side in pixels; 0: the restorer's own
    progress: bool

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Products (K, H, W) of values (H, W); at edges far above the noise, each side is restored by itself."""
        sides = None
        if self.restorer.stabilized:
            sides = part_sides(values, least_step(full_scale_of(self.domain.level), self.domain.noise.kernel))
        if sides is None:
            return self._in_tiles(torch.from_numpy(values)[None], self._one)
        generator = seeded_generator("sides", self.restorer.seed)
        drawn = unit_noise(values.shape, self.domain.noise.kernel, generator).numpy()
        parts = [torch.from_numpy(sides.side(values, bright, drawn)) for bright in (True, False)]
        return np.where(sides.is_bright, *np.split(self._in_tiles(torch.stack(parts), self._both), 2))

    def _in_tiles(self, layers: Tensor, function: TileFunction) -> np.ndarray:
        """Products of layers (C, H, W): of all of one, then of all of the next."""
        multiple = self.restorer.scale
        wanted = (self.tile, self.tile) if self.tile else self.restorer.tile
        tile = tuple(max(self.restorer.least_tile, math.ceil(side / multiple) * multiple) for side in wanted)
        if self.restorer.stabilized:
            layers = whiten(layers, self.domain.noise)
        products = restore_in_tiles(layers[None], function, tile, multiple, progress=self.progress)[0]
        return (colour(products, self.domain.noise) if self.restorer.stabilized else products).numpy()

    def _one(self, part: Tensor, origin: tuple[int, int]) -> Tensor:
        told = dict(level=self.domain.level, origin=origin, progress=self.progress)
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
    """Restore an image (H, W) at its own size, given its noise in the same units; None: that of the training, whatever it is.

    For a stabilised model the units are whatever they are: factor, offset and sign of the stored values change nothing. For
    another they are [0, 1], and the image is multiplied so that its noise is what the model knows. If an image is cleaner
    than those of the training, the share of the correction is applied that lowers the error of the posterior mean most
    (`stein_share`), which takes a second look at a strip of it. A background that is clipped stays as it is.
    """
    mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
    if noise is not None and noise.is_none:
        return Restoration(np.repeat(image[None], max(1, restorer.samples), 0), 0.0, math.inf, 0.0)
    domain = Domain.of(image, noise, mask, restorer)
    denoise = TiledRestorer(restorer, domain, name, tile, progress)
    values, clipped = domain.values(torch.from_numpy(image)).numpy(), clipped_background(image, mask)
    window = _window(~clipped)
    restored, share = np.repeat(values[None], max(1, restorer.samples), 0), 1.0
    restored[(slice(None), *window)] = denoise(values[window])
    if domain.is_cleaner and noise is not None and restorer.model.has_mean:
        mean = replace(denoise, restorer=replace(restorer, samples=0))
        strip = _strip(mask)
        deviation = domain.noise.variance(torch.from_numpy(restored.mean(0))).sqrt().numpy()[strip]
        generator = seeded_generator("probe", restorer.seed)
        signs = filtered(
            lambda size: 2.0 * torch.randint(2, size, generator=generator) - 1, deviation.shape, domain.noise.kernel
        )
        probe = (deviation * signs.numpy()).astype(np.float32)
        share = stein_share(lambda at: at - mean(at)[0], values[strip], probe, mask[strip])
        restored = values + np.float32(share) * (restored - values)
    products = domain.image(torch.from_numpy(restored)).numpy().clip(image.min(), image.max())
    products = np.where(clipped, image, products.astype(np.float32))
    return Restoration(products, domain.own_level, domain.factor, float(share))


def _window(kept: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns around all pixels of `kept` (H, W), and a margin more for the network to look at."""
    places = [np.flatnonzero(kept.any(axis)) for axis in (1, 0)]
    rows, columns = (slice(max(0, at[0] - OVERLAP), at[-1] + 1 + OVERLAP) if len(at) else slice(None) for at in places)
    return rows, columns


def _strip(mask: np.ndarray) -> slice:
    """Rows of a breast (H, W), through its middle, that a share is measured on: from the chest wall to the skin."""
    rows = np.flatnonzero(mask.any(1))
    middle = int(np.median(rows)) if len(rows) else len(mask) // 2
    first = max(0, min(middle - STRIP // 2, len(mask) - STRIP))
    return slice(first, first + STRIP)


def stein_share(
    correct: Callable[[np.ndarray], np.ndarray], image: np.ndarray, probe: np.ndarray, mask: np.ndarray
) -> np.float32:
    """The share a, in [0, 1], of a correction c = `correct(image)` at which the squared error of image - a c is least.

    That is E[n c] / E[c^2] over the mask. The covariance with the Gaussian noise n, which nobody sees, is the expectation of
    p (c(image + e p) - c(image)) / e over noise p like n, of which `probe` is a draw: no clean image is needed. Arrays are (H, W).

    Source: Stein, Annals of Statistics 1981, lemma 2; Ramani, Blu & Unser, IEEE Transactions on Image Processing 2008, theorem 2.
    """
    own = correct(image)
    covariance = probe * (correct(image + np.float32(PROBE) * probe) - own) / PROBE
    energy = max(float((own[mask] ** 2).sum()), np.finfo(np.float32).tiny)
    return np.float32(min(max(float(covariance[mask].sum()) / energy, 0.0), 1.0))
