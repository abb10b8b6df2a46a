"""How sure a restoration is: the spread of posterior samples, per pixel and over regions, and a 90 % interval of it.

Samples of a right posterior and the truth are exchangeable. So the truth lies as far from the mean of K samples as one more
sample would: sqrt(1 + 1 / K) standard deviations, and in a Student interval of K - 1 degrees of freedom. One factor per noise
level, fitted on validation images, says how many times as wide these have to be.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from helper import UserError, explained
from running.writing import write_json

FORMAT = 2  # raised when the layout of a calibration file, or the meaning of a factor, changes
KIND = "uncertainty calibration"
MISS = 0.1  # share of the pixels that a 90 % interval may miss
REGIONS = (8, 32)  # pixels; sides of the squares whose means have intervals of their own
BINS = 5  # of clean intensity, with equally many pixels
KEPT_PIXELS = 2**18  # of an image, for the coverage
LEAST_STD = 1e-7  # of full scale: if all samples agree to the last bit, on black, there is no spread to divide by


@dataclass(frozen=True)
class Interval:
    """What posterior samples say of an image, or of the means of its regions: arrays (H, W), in units of the image."""

    mean: np.ndarray  # of the samples
    std: np.ndarray  # root mean square error that the mean is expected to have
    low: np.ndarray  # ends of the 90 % interval, in [0, 1]
    high: np.ndarray

    def holds(self, clean: np.ndarray) -> np.ndarray:
        """Where clean values (H, W) lie in the interval: (H, W) bool."""
        return (self.low <= clean) & (clean <= self.high)


@dataclass(frozen=True)
class Calibration:
    """How many times as wide as the samples' spread says an interval has to be, by noise level."""

    levels: list[float]  # ascending
    factors: list[float]
    about: dict  # what it was fitted on

    def factor(self, level: float) -> float:
        """The factor at a noise level: linear between the fitted ones in its logarithm, and constant beyond them."""
        return float(np.interp(math.log(level), np.log(self.levels), self.factors))

    def to_json(self, path: Path) -> None:
        """Write it. Raises UserError, naming the file, if that fails."""
        write_json(path, {"kind": KIND, "format_version": FORMAT} | dataclasses.asdict(self))

    @classmethod
    def from_json(cls, path: Path) -> Calibration:
        """Read what `to_json` wrote. Raises UserError, naming the file, if it is missing, damaged or of another version."""
        advice = "main-diffusion.py --evaluate makes one"
        with explained(f"{path}: cannot be read", "name a calibration file"):
            written = path.read_bytes()
        try:
            content = json.loads(written)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: not a calibration, no JSON; {advice}") from None
        if not isinstance(content, dict) or content.pop("kind", None) != KIND:
            raise UserError(f"{path}: not a calibration of the uncertainty; {advice}")
        version = content.pop("format_version", None)
        if version != FORMAT:
            raise UserError(f"{path}: a calibration of format {version}, not {FORMAT} as here; {advice}")
        try:
            levels, factors = values = np.array([content.pop("levels"), content.pop("factors")], dtype=float)
            if values.ndim != 2 or not values.size or not (np.isfinite(values) & (values > 0)).all():
                raise ValueError
            if (np.diff(levels) <= 0).any():
                raise ValueError
            return cls(levels.tolist(), factors.tolist(), **content)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: parts of the calibration are missing or wrong; {advice}") from None


@dataclass(frozen=True)
class SampledImage:
    """Posterior samples of an image whose truth is known. Raises ValueError if shapes differ."""

    clean: np.ndarray  # (H, W) in [0, 1]
    samples: np.ndarray  # (K, H, W) in [0, 1]
    mask: np.ndarray  # (H, W) bool, the breast
    level: float  # noise level

    def __post_init__(self):
        shapes = self.clean.shape, self.mask.shape, self.samples.shape[1:]
        if len(set(shapes)) > 1:
            raise ValueError(f"clean image, mask and samples differ in shape: {shapes}")


def region_means(image: np.ndarray, side: int) -> np.ndarray:
    """Means of images (..., H, W) over squares of `side` pixels, from the top left corner on: (..., H // side, W // side)."""
    return F.avg_pool2d(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None], side)[0].numpy()


def interval(samples: np.ndarray, factor: float = 1.0) -> Interval:
    """The mean of posterior samples (K, H, W), its expected error and the 90 % interval of the truth.

    Raises ValueError for fewer than two samples.
    """
    count = len(samples)
    if count < 2:
        raise ValueError("the spread of posterior samples takes two of them at least")
    mean = samples.mean(0, dtype=np.float64)
    # sample by sample: numpy's own would hold all of them in double precision
    variance = sum((sample - mean) ** 2 for sample in samples) / (count - 1)
    std = factor * math.sqrt(1 + 1 / count) * np.sqrt(variance).clip(min=LEAST_STD)
    half = _reach(count) * std
    parts = (mean, std, (mean - half).clip(0, 1), (mean + half).clip(0, 1))
    return Interval(*(part.astype(np.float32) for part in parts))


def _reach(count: int) -> float:
    """Half the width of a 90 % interval of `count` samples, in expected errors."""
    from scipy import stats  # which takes a second to import, and no training needs

    return stats.t.ppf(1 - MISS / 2, count - 1)


def fit(images: Sequence[SampledImage]) -> Calibration:
    """The factor, by noise level, at which intervals hold 90 % of the breast's pixels of validation images.

    Raises UserError if there is no pixel to fit on.
    """
    ratios: dict[float, list[np.ndarray]] = {}
    for image in images:
        own = interval(image.samples)
        ratio = np.abs(image.clean - own.mean) / (own.std * _reach(len(image.samples)))
        ratios.setdefault(image.level, []).append(ratio[image.mask])
    pooled = {level: np.concatenate(parts) for level, parts in sorted(ratios.items())}
    if not pooled or not all(parts.size for parts in pooled.values()):
        raise UserError("no breast in the validation images to calibrate the uncertainty on; give images with one")
    about = {"cases": len(images), "pixels": sum(parts.size for parts in pooled.values()), "interval": 1 - MISS}
    return Calibration(list(pooled), [float(np.quantile(parts, 1 - MISS)) for parts in pooled.values()], about)


@dataclass(frozen=True)
class Coverage:
    """Figures of the intervals of many images inside the breast."""

    pixels: int
    coverage: float  # share of the pixels whose clean value lies in its interval
    bin_upper: list[float]  # greatest clean intensity of each bin; the bins hold about as many pixels
    bin_coverage: list[float]
    width: float  # mean width of the intervals
    spread_over_error: float  # rms expected error over the rms error of the samples' mean: 1 if the spread is right
    regions: dict[str, float]  # side of a square in pixels to the share of their means that lie in their intervals

    def __str__(self) -> str:
        bins = ", ".join(f"{share:.1%}" for share in self.bin_coverage)
        regions = ", ".join(f"{share:.1%} of means over {side} x {side}" for side, share in self.regions.items())
        return (
            f"{1 - MISS:.0%} interval, inside the breast: holds {self.coverage:.1%} of the pixels (by intensity {bins}), "
            f"{regions}; mean width {self.width:.4f}, spread over error {self.spread_over_error:.2f}"
        )


@dataclass
class Tally:
    """Takes note, image by image, of how intervals do."""

    rows: list[np.ndarray] = field(default_factory=list)  # (5, N): clean, held, width, expected and own squared error
    regions: dict[int, list[np.ndarray]] = field(default_factory=lambda: {side: [] for side in REGIONS})

    def add(self, image: SampledImage, factor: float) -> None:
        """Look at the intervals, `factor` times as wide, of an image."""
        clean, own = image.clean, interval(image.samples, factor)
        step = max(1, round((clean.size / KEPT_PIXELS) ** 0.5))  # all pixels of a large test set would not fit
        thin = slice(None, None, step), slice(None, None, step)
        parts = (clean, own.holds(clean), own.high - own.low, own.std**2, (clean - own.mean) ** 2)
        self.rows.append(np.stack([part[thin][image.mask[thin]] for part in parts]).astype(np.float32))
        for side, held in self.regions.items():
            if min(clean.shape) >= side:
                inside = region_means(image.mask, side) == 1
                of_means = interval(region_means(image.samples, side), factor)
                held.append(of_means.holds(region_means(clean, side))[inside])

    def coverage(self) -> Coverage | None:
        """How the intervals did on all of them; None if no pixel lies in a breast."""
        if not any(row.size for row in self.rows):
            return None
        clean, held, width, variance, error = np.concatenate(self.rows, axis=1).astype(np.float64)
        upper = _bin_ends(clean)
        of_bin = np.searchsorted(upper, clean)
        regions = {side: np.concatenate(parts) for side, parts in self.regions.items() if parts}
        return Coverage(
            pixels=clean.size,
            coverage=float(held.mean()),
            bin_upper=upper.tolist(),
            bin_coverage=(np.bincount(of_bin, held) / np.bincount(of_bin)).tolist(),
            width=float(width.mean()),
            spread_over_error=math.sqrt(variance.mean() / error.mean()) if error.any() else math.inf,
            regions={str(side): float(parts.mean()) for side, parts in regions.items() if parts.size},
        )


def _bin_ends(values: np.ndarray) -> np.ndarray:
    """Greatest value of each of at most `BINS` bins; equal values share a bin, and the others share the rest alike."""
    ordered, ends, start = np.sort(values), [], 0
    for left in range(BINS, 0, -1):
        if start < len(ordered):
            ends.append(ordered[start + math.ceil((len(ordered) - start) / left) - 1])
            start = int(np.searchsorted(ordered, ends[-1], side="right"))
    return np.array(ends)
