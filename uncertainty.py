"""How sure a restoration is: a predicted standard deviation at every pixel and a calibrated 90 % interval.

The spread is a predicted variance, not that of samples: a regression on what is known at inference, fitted on validation
images, says how large the error of the restored image is (heteroscedastic regression; Kendall & Gal, "What uncertainties
do we need in Bayesian deep learning for computer vision?", NeurIPS 2017, eq. 5), and multiples of it that are found on
images the regression was not fitted on make it an interval (conformal prediction; Angelopoulos & Bates, "A gentle
introduction to conformal prediction", 2021, section 2.3). Everything is counted in standard deviations of the noise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor

from helper import UserError, seed_of, write_json
from preprocessing.degrade import NoiseModel
from preprocessing.stabilize import stabilize

FORMAT = 1  # raised when the layout of a calibration file, or the meaning of a feature, changes
KIND = "uncertainty calibration"
MISS = 0.1  # share of the pixels that a 90 % interval may miss
HIDDEN = 16  # units in each of the two hidden layers
STEPS, BATCH, LEARNING_RATE = 500, 2048, 0.01  # of Adam, a fit
PIXELS = 240_000  # of all cases together that the fit looks at
FOLDS = 4  # of the images, for the multiples
NODES = 8  # of a multiple's curve along one axis
ROUNDS = 8  # of matching the curves to each other
LEAST_MULTIPLE = 0.02  # a side on which hardly any error lies, such as below black, keeps so much of an interval
LOG_RANGE = 12.0  # the predicted log variance, in noise variances, stays within +- this
MOST_QUANTA = 1e8  # noise without quanta is taken as so many: the transform is then linear to nine digits
ENERGY_FLOOR = 1e-4  # noise variances added to an energy before its logarithm
SCALES = (1.0, 2.0, 4.0)  # Gaussian sigmas, in pixels, of the fine structure looked at
NEAR = 8.0  # noise standard deviations from 0 or 1 within which the clamp is felt

FEATURES = (
    "log noise", "share of quanta", "intensity", "surrounding intensity", "above 0", "below 1", "surroundings above 0",
    "structure 1", "structure 2", "structure 4", "gradient", "correction", "correction 2", "correction 8",
    "coloured correction",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A restored image whose truth is known; arrays (H, W), intensities in [0, 1]."""

    clean: np.ndarray
    degraded: np.ndarray
    restored: np.ndarray
    noise: NoiseModel  # what `degraded` suffers from
    mask: np.ndarray  # bool, the breast
    group: str = (
        ""  # cases of a group, a patient's for example, stay together in the folds; empty: those of one clean image
    )


@dataclass(frozen=True)
class Interval:
    """A restored image and what is known of its error: arrays (H, W) float32, in units of the image."""

    restored: np.ndarray
    std: np.ndarray  # root mean square error that is expected
    low: np.ndarray  # in [0, restored]
    high: np.ndarray  # in [restored, 1]


# --- features --------------------------------------------------------------------------------------------------------


def noise_sd(image: np.ndarray, noise: NoiseModel) -> np.ndarray:
    """Derivative of the inverse of `stabilize` at an image (H, W): the noise's standard deviation, in units of the image."""
    noise = _finite(noise)
    offset = 0.375 + (noise.sigma * noise.quanta) ** 2
    return np.sqrt(np.maximum(image, 0) * noise.quanta + offset) / noise.quanta


def features(degraded: np.ndarray, restored: np.ndarray, noise: NoiseModel) -> np.ndarray:
    """What the error of a restored image is predicted from: (F, H, W) float32, named by `FEATURES`.

    Energies are local means of squares in the stabilised domain, where the noise has variance 1, as logarithms: of the
    restored image's differences of Gaussians and gradient, and of the correction that the restoration made, at a pixel,
    around it, and of its low frequencies, which hold little of white noise and more of structure taken for it.

    Args: degraded, restored: (H, W) in [0, 1]. noise: what `degraded` suffers from.
    Raises: ValueError where the two differ in shape or there is no noise, which is the unit.
    """
    if degraded.shape != restored.shape or restored.ndim != 2:
        raise ValueError(f"degraded {degraded.shape} and restored {restored.shape} must be (H, W) alike")
    if _is_none(noise):
        raise ValueError("the features are in units of the noise, and there is none")
    noise = _finite(noise)
    image = np.asarray(restored, dtype=np.float64)
    z, measured = (stabilize(torch.from_numpy(np.array(v, dtype=np.float64)), noise).numpy() for v in (image, degraded))
    white = float(stabilize(torch.ones((), dtype=torch.float64), noise))
    sd = noise_sd(image, noise)
    correction = measured - z
    blurred = {sigma: _blur(z, sigma) for sigma in SCALES}
    finer = [z, *(blurred[sigma] for sigma in SCALES[:-1])]
    structure = [_energy(fine - blurred[sigma], 2 * sigma) for fine, sigma in zip(finer, SCALES, strict=True)]
    down, across = np.gradient(blurred[SCALES[0]])
    around = _blur(image, 8.0)
    result = [
        np.log(sd),
        image / noise.quanta / sd**2,
        image,
        around,
        np.minimum(z, NEAR) / NEAR,
        np.minimum(white - z, NEAR) / NEAR,
        np.minimum(_blur(np.minimum(z, 4 * NEAR), 8.0), 4 * NEAR) / (4 * NEAR),
        *structure,
        _energy(np.hypot(down, across), 1.0),
        np.log(correction**2 + 0.1),
        _energy(correction, 2.0),
        _energy(correction, 8.0),
        _energy(_blur(correction, 1.5), 4.0),
    ]
    return np.stack(result).astype(np.float32)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(image, sigma, mode="nearest", truncate=3.0)


def _energy(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.log(_blur(image**2, sigma) + ENERGY_FLOOR)


def _is_none(noise: NoiseModel) -> bool:
    return math.isinf(noise.quanta) and noise.sigma == 0


def _finite(noise: NoiseModel) -> NoiseModel:
    return NoiseModel(min(noise.quanta, MOST_QUANTA), noise.sigma)


# --- calibration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A factor of the multiples along one axis, linear between nodes and constant beyond them."""

    nodes: list[float]  # ascending
    low: list[float]  # factor of what reaches below the restored value
    high: list[float]

    def at(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two factors at values of any shape."""
        return np.interp(values, self.nodes, self.low), np.interp(values, self.nodes, self.high)


# Of the curves: two features, the predicted deviation in units of the noise, and the noise at intensity 0.5.
AXES = ("intensity", "above 0", "log sd", "log noise")
SIDED = "above 0"  # the axis along which an interval leans: near black errors lie on one side


@dataclass(frozen=True)
class Calibration:
    """How the features of a pixel become a standard deviation and an interval."""

    features: list[str]
    lower: list[float]  # features are held between what the fit saw, then brought to mean 0 and variance 1
    upper: list[float]
    mean: list[float]
    scale: list[float]
    layers: list[dict[str, list]]  # "weight" (out, in) and "bias" (out,) of a perceptron with tanh between its layers
    curves: dict[str, Curve]  # by axis; a multiple is the product of its factors
    about: dict  # what it was fitted on

    def to_json(self, path: Path) -> None:
        """Write it. Raises UserError, naming the file, where that cannot be done."""
        write_json(path, {"kind": KIND, "format_version": FORMAT} | dataclasses.asdict(self))

    @classmethod
    def from_json(cls, path: Path) -> Calibration:
        """Read what `to_json` wrote, to the last bit.

        Raises UserError, naming the file, where it is missing, no calibration, or of another version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); name a calibration file") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path}: not a calibration, no JSON; fit one on validation images") from None
        if not isinstance(content, dict) or content.pop("kind", None) != KIND:
            raise UserError(f"{path}: not a calibration of the uncertainty; fit one on validation images")
        version = content.pop("format_version", None)
        if version != FORMAT or content.get("features") != list(FEATURES):
            raise UserError(
                f"{path}: a calibration of format {version} with other features than this version's (format {FORMAT}); "
                "fit it anew"
            )
        try:
            content["curves"] = {axis: Curve(**content["curves"][axis]) for axis in AXES}
            result = cls(**content)
            spread = result.log_variance(np.zeros((len(FEATURES), 1), np.float32))
            if not np.isfinite([*spread, *result.multiples([0.0] * len(AXES))]).all():
                raise ValueError
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(f"{path}: parts of the calibration are missing or wrong; fit it anew") from None
        return result

    def log_variance(self, values: np.ndarray) -> np.ndarray:
        """Predicted logarithm of the mean squared error, in noise variances, of features (F, ...) to (...)."""
        columns = values.reshape(len(values), -1)
        lower, upper, mean, scale = (
            np.array(v, dtype=np.float32)[:, None] for v in (self.lower, self.upper, self.mean, self.scale)
        )
        hidden = (np.clip(columns, lower, upper) - mean) / scale
        for i, layer in enumerate(self.layers):
            weight, bias = (np.array(layer[name], dtype=np.float32) for name in ("weight", "bias"))
            hidden = weight @ (np.tanh(hidden) if i else hidden) + bias[:, None]
        return np.clip(hidden[0], -LOG_RANGE, LOG_RANGE).reshape(values.shape[1:])

    def multiples(self, axes: Sequence[np.ndarray | float]) -> tuple[np.ndarray, np.ndarray]:
        """How many predicted deviations an interval reaches below and above, from the values along `AXES`, (...) each."""
        return _product([self.curves[axis] for axis in AXES], axes)


def _product(curves: Sequence[Curve], axes: Sequence[np.ndarray | float]) -> tuple[np.ndarray, np.ndarray]:
    low = high = 1.0
    for curve, values in zip(curves, axes, strict=True):
        below, above = curve.at(values)
        low, high = low * below, high * above
    return low, high


def _log_noise(noise: NoiseModel) -> float:
    return float(np.log(noise_sd(np.array(0.5), noise)))


def _along(values: np.ndarray, log_sd: np.ndarray, log_noise: np.ndarray | float) -> list[np.ndarray | float]:
    """The values along `AXES` of pixels whose features are (F, ...)."""
    return [*(values[FEATURES.index(axis)] for axis in AXES[:2]), log_sd, log_noise]


@dataclass(frozen=True)
class _Sample:
    """Pixels of the cases, N of them."""

    values: np.ndarray  # (F, N) features
    error: np.ndarray  # (N,) clean - restored, in noise standard deviations
    log_noise: np.ndarray  # (N,) at intensity 0.5
    fold: np.ndarray  # (N,)


def fit(cases: Sequence[Case], *, seed: int = 0) -> Calibration:
    """Fit the regression on all cases, and its multiples on folds of images that it was not fitted on (Barber et al., 2021).

    As many pixels of every case are drawn at random, over its whole area. Squared errors are regressed by a small
    perceptron on the Gaussian likelihood, in `FOLDS` folds of groups and once on everything; the multiples are those at
    which the folds' intervals miss a tenth of their pixels at every restored intensity, predicted deviation and noise level
    alike: half on either side, or where nearly all errors lie on one, as near black, on that. Give whole images, background
    included, as they are to be restored. Same cases and seed, same calibration.

    Source: Kendall & Gal (2017), eq. 5; cross-conformal intervals: Barber et al., "Predictive inference with the
    jackknife+", Annals of Statistics 2021, where they are called CV+.
    Raises: UserError where there are fewer than two groups of noisy cases.
    """
    groups = [case.group or hashlib.blake2b(np.ascontiguousarray(case.clean).tobytes()).hexdigest() for case in cases]
    usable = [(case, group) for case, group in zip(cases, groups, strict=True) if not _is_none(case.noise)]
    names = list(dict.fromkeys(group for _, group in usable))
    if len(names) < 2:
        raise UserError(
            f"{len(names)} noisy validation images or patients are too few to calibrate on; give at least two"
        )
    folds = min(FOLDS, len(names))
    sample = _draw(usable, {name: i % folds for i, name in enumerate(names)}, PIXELS // len(usable), seed)
    log_sd = np.empty(len(sample.error))
    for fold in range(folds):
        held = sample.fold == fold
        model = _regress(sample.values[:, ~held], sample.error[~held], seed_of(seed, "fold", fold))
        log_sd[held] = model.log_variance(sample.values[:, held]) / 2
    model = _regress(sample.values, sample.error, seed_of(seed, "all"))
    curves = _curves(sample.error / np.exp(log_sd), _along(sample.values, log_sd, sample.log_noise))
    about = {
        "cases": len(usable),
        "groups": len(names),
        "pixels": len(sample.error),
        "seed": seed,
        "interval": 1 - MISS,
    }
    return dataclasses.replace(model, curves=dict(zip(AXES, curves, strict=True)), about=about)


def _draw(cases: list[tuple[Case, str]], folds: dict[str, int], count: int, seed: int) -> _Sample:
    values, errors, noise, fold = [], [], [], []
    for i, (case, group) in enumerate(cases):
        generator = np.random.default_rng(seed_of(seed, "pixels", i))
        chosen = generator.choice(case.clean.size, min(count, case.clean.size), replace=False)
        restored = case.restored.ravel()[chosen].astype(np.float64)
        values.append(features(case.degraded, case.restored, case.noise).reshape(len(FEATURES), -1)[:, chosen])
        errors.append((case.clean.ravel()[chosen] - restored) / noise_sd(restored, case.noise))
        noise.append(np.full(len(chosen), _log_noise(case.noise)))
        fold.append(np.full(len(chosen), folds[group]))
    return _Sample(np.hstack(values), np.concatenate(errors), *(np.concatenate(v) for v in (noise, fold)))


def _regress(values: np.ndarray, error: np.ndarray, seed: int) -> Calibration:
    """A calibration without curves whose variance maximises the Gaussian likelihood of errors (N,) of features (F, N)."""
    lower, upper = np.quantile(values, [0.0005, 0.9995], axis=1).astype(np.float32)
    held = np.clip(values, lower[:, None], upper[:, None])
    mean, scale = held.mean(axis=1, dtype=np.float64), held.std(axis=1, dtype=np.float64)
    scale[scale < 1e-6] = 1.0  # a feature that does not vary, such as the noise of a single level, says nothing
    mean, scale = mean.astype(np.float32), scale.astype(np.float32)
    inputs = torch.from_numpy(((held - mean[:, None]) / scale[:, None]).T.copy())
    squares = torch.from_numpy(error**2).float()
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(FEATURES), HIDDEN, HIDDEN, 1]
    weights = [
        torch.randn(out, width, generator=generator).div_(width**0.5)
        for width, out in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    biases = [torch.zeros(out) for out in sizes[1:]]
    weights[-1].mul_(0.1)
    biases[-1].fill_(math.log(float(squares.mean()) + 1e-6))
    parameters = [p.requires_grad_() for p in (*weights, *biases)]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(squares), (min(BATCH, len(squares)),), generator=generator)
        hidden = inputs[chosen]
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            hidden = F.linear(hidden.tanh() if i else hidden, weight, bias)
        log_variance = hidden[:, 0].clamp(-LOG_RANGE, LOG_RANGE)
        # the square's share is capped: a calcification that was missed would throw the whole fit
        loss = (squares[chosen] * (-log_variance).exp()).clamp(max=50.0).add(log_variance).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    layers = [
        {"weight": weight.detach().tolist(), "bias": bias.detach().tolist()}
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return Calibration(list(FEATURES), *(v.tolist() for v in (lower, upper, mean, scale)), layers, {}, {})


def _curves(scores: np.ndarray, axes: Sequence[np.ndarray]) -> list[Curve]:
    """Curves along axes (N,) whose product misses a tenth of the scores (N,), errors over deviations, along each."""
    curves = [_flat_curve(values, 1.0 if axis == SIDED else math.inf) for axis, values in zip(AXES, axes, strict=True)]
    for _ in range(ROUNDS):
        for i, values in enumerate(axes):
            low, high = _product(curves, axes)
            nodes = np.array(curves[i].nodes)
            # a bin reaches half-way to the neighbouring nodes
            bins = np.searchsorted((nodes[1:] + nodes[:-1]) / 2, values)
            reach = np.where(scores < 0, low, high)
            # one axis alone tells the sides apart: where several do, each undoes what the others found
            share = _tails if AXES[i] == SIDED else _both_tails
            factors = np.array([share((scores / reach)[bins == b]) for b in range(len(nodes))])
            curves[i] = Curve(
                curves[i].nodes,
                np.maximum(np.array(curves[i].low) * factors[:, 0], LEAST_MULTIPLE).tolist(),
                np.maximum(np.array(curves[i].high) * factors[:, 1], LEAST_MULTIPLE).tolist(),
            )
    return curves


def _flat_curve(values: np.ndarray, end: float) -> Curve:
    """Nodes at the medians of equally populated bins of what is below `end`, and there; few distinct values themselves."""
    inner = values[values < end]
    nodes = np.unique(inner)
    if len(nodes) > NODES:
        nodes = np.unique(np.quantile(inner, (np.arange(NODES) + 0.5) / NODES))
    if len(inner) < len(values):
        nodes = np.append(nodes, end)
    return Curve(nodes.tolist(), [1.0] * len(nodes), [1.0] * len(nodes))


def _both_tails(scores: np.ndarray) -> tuple[float, float]:
    """How far an interval reaches on both sides of 0 to miss a tenth of the scores."""
    if len(scores) == 0:
        return 1.0, 1.0
    return (max(float(np.quantile(np.abs(scores), 1 - MISS)), LEAST_MULTIPLE),) * 2


def _tails(scores: np.ndarray) -> tuple[float, float]:
    """How far an interval reaches on either side of 0 to miss a tenth of the scores, half on either side if it can."""
    if len(scores) == 0:
        return 1.0, 1.0
    below, above = np.maximum(-scores, 0), np.maximum(scores, 0)
    miss_below, miss_above = (min(MISS / 2, float((side > LEAST_MULTIPLE).mean())) for side in (below, above))
    miss_below, miss_above = max(miss_below, MISS - miss_above), max(miss_above, MISS - miss_below)
    # the finite-sample correction of Angelopoulos & Bates (2021), eq. 2, is a rounding here: bins hold thousands
    return tuple(
        max(float(np.quantile(side, 1 - miss)), LEAST_MULTIPLE)
        for side, miss in ((below, miss_below), (above, miss_above))
    )


def predict(calibration: Calibration, degraded: np.ndarray, restored: np.ndarray, noise: NoiseModel) -> Interval:
    """The expected error of a restored image (H, W) and its 90 % interval; of an image without noise, none.

    Raises: ValueError where the two images differ in shape.
    """
    image = np.asarray(restored, dtype=np.float32)
    if _is_none(noise):
        return Interval(image, np.zeros_like(image), image, image)
    values = features(degraded, restored, noise)
    log_sd = calibration.log_variance(values) / 2
    std = np.exp(log_sd) * noise_sd(image.astype(np.float64), noise)
    low, high = calibration.multiples(_along(values, log_sd, _log_noise(noise)))
    return Interval(
        image,
        std.astype(np.float32),
        np.minimum(np.clip(image - low * std, 0, 1).astype(np.float32), image),
        np.maximum(np.clip(image + high * std, 0, 1).astype(np.float32), image),
    )


# --- figures ---------------------------------------------------------------------------------------------------------

SMOOTH = 4.0  # Gaussian sigma, in pixels, of the local root mean square error


@dataclass(frozen=True)
class Region:
    """Figures of the intervals of many images over some of their pixels."""

    pixels: int
    coverage: float  # share of the pixels whose clean value lies in its interval
    bin_upper: list[float]  # greatest clean intensity of each bin; the bins hold about as many pixels
    bin_coverage: list[float]
    bin_width: list[float]  # mean width in each bin
    width: float  # mean width of the intervals
    constant_width: float  # of the interval of constant width around the restored value that has the same coverage
    ratio: float  # width / constant_width
    ratio_clamped: float  # the same with the constant interval cut off at 0 and 1, as these intervals are
    oracle: float  # the same for widths in proportion to the true `local_error`, which nobody knows: no map so smooth does better
    calibration: float  # root of the mean squared error over the mean predicted variance: 1 where std is right


@dataclass(frozen=True)
class Coverage:
    """Figures over the whole images and inside the breast."""

    image: Region
    breast: Region | None  # None where the masks are empty


def local_error(restored: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Root mean square error around every pixel of a restored image (H, W), weighted by a Gaussian of sigma `SMOOTH`."""
    return np.sqrt(ndimage.gaussian_filter(np.square(clean - restored, dtype=np.float64), SMOOTH, mode="nearest"))


def assess(
    intervals: Sequence[Interval],
    cleans: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    bins: int = 5,
    local: Sequence[np.ndarray] | None = None,
) -> Coverage:
    """Compare intervals with clean images (H, W) over all pixels and inside masks (H, W) bool, all images together.

    Coverage is given overall and in `bins` bins of clean intensity. The constant interval of the same coverage reaches a
    quantile of the absolute error to either side. `local` (H, W) is the `local_error` of each image, None: that of the
    images given, where they are whole.

    Raises: ValueError without images or where shapes differ.
    """
    if not intervals:
        raise ValueError("there are no intervals to assess")
    shapes = [(i.std.shape, c.shape, m.shape) for i, c, m in zip(intervals, cleans, masks, strict=True)]
    if any(len(set(shape)) > 1 for shape in shapes):
        raise ValueError(f"intervals, clean images and masks differ in shape: {shapes}")
    inside = np.concatenate([mask.ravel() for mask in masks])
    clean = np.concatenate([image.ravel() for image in cleans])
    columns = {
        name: np.concatenate([getattr(interval, name).ravel() for interval in intervals])
        for name in ("restored", "std", "low", "high")
    }
    local = local or [local_error(i.restored, c) for i, c in zip(intervals, cleans, strict=True)]
    around = np.concatenate([image.ravel() for image in local])
    everywhere = np.ones_like(inside)
    image, breast = (
        _region(clean[own], Interval(**{name: column[own] for name, column in columns.items()}), bins, around[own])
        if own.any()
        else None
        for own in (everywhere, inside)
    )
    return Coverage(image, breast)


def _region(clean: np.ndarray, interval: Interval, bins: int, local: np.ndarray) -> Region:
    covered = (interval.low <= clean) & (clean <= interval.high)
    widths = (interval.high - interval.low).astype(np.float64)
    error = np.abs(clean.astype(np.float64) - interval.restored)
    half = float(np.quantile(error, covered.mean()))
    local = np.maximum(local, np.finfo(np.float32).tiny)
    oracle = float(np.quantile(error / local, covered.mean()) * local.mean())
    clamped = np.minimum(interval.restored + half, 1) - np.maximum(interval.restored - half, 0)
    upper = _bin_ends(clean, bins)
    of_bin = np.searchsorted(upper, clean)
    counts = np.bincount(of_bin)
    width, variance = float(widths.mean()), float(np.square(interval.std, dtype=np.float64).mean())
    return Region(
        pixels=clean.size,
        coverage=float(covered.mean()),
        bin_upper=upper.tolist(),
        bin_coverage=(np.bincount(of_bin, covered) / counts).tolist(),
        bin_width=(np.bincount(of_bin, widths) / counts).tolist(),
        width=width,
        constant_width=2 * half,
        ratio=width / (2 * half) if half else math.nan,
        ratio_clamped=width / float(clamped.mean(dtype=np.float64)) if half else math.nan,
        oracle=oracle / half if half else math.nan,
        calibration=math.sqrt(float((error**2).mean()) / variance) if variance else math.nan,
    )


def _bin_ends(values: np.ndarray, bins: int) -> np.ndarray:
    """Greatest value of each of at most `bins` bins; equal values share a bin, and the others share the rest alike."""
    ordered = np.sort(values, axis=None)
    ends, start = [], 0
    for left in range(bins, 0, -1):
        if start == len(ordered):
            break
        ends.append(ordered[start + math.ceil((len(ordered) - start) / left) - 1])
        start = int(np.searchsorted(ordered, ends[-1], side="right"))
    return np.array(ends)


# --- pictures --------------------------------------------------------------------------------------------------------

OVERVIEW = (1024, 768)  # height and width to which pictures of larger images are reduced
TITLE, GAP, BAR, BAR_LABEL = 34, 6, 14, 50  # pixels: labels, space between pictures, colour bar and its label
LEAST_CELL = 192  # width of a column in pixels: its labels need as many
GAUSSIAN_WIDTH = 3.29  # of the 90 % interval of a Gaussian, in standard deviations


def picture(clean: np.ndarray | None, interval: Interval, *, limit: float | None = None) -> Tensor:
    """The map of expected errors beside the errors it predicts: (3, H', W') uint8 with labels and a colour bar.

    With `clean` (H, W) the columns are restored, expected error, local root mean square error and absolute error; without,
    they are restored, expected error and the interval's width over that of a Gaussian of deviation 1. All maps are drawn
    from 0 to `limit`, in units of the image, by default one and a half times what 99 % of the expected errors stay below.
    Large images are reduced.
    """
    restored = interval.restored
    if limit is None:
        limit = max(1.5 * float(np.quantile(interval.std, 0.99)), 1e-6)
    columns = [("expected error", "standard deviation", interval.std)]
    if clean is None:
        width = (interval.high - interval.low) / GAUSSIAN_WIDTH
        columns.append(("interval", f"{1 - MISS:.0%}, width / {GAUSSIAN_WIDTH:g}", width))
    else:
        error = np.abs(clean - restored)
        local = local_error(restored, clean)
        covered = float(((interval.low <= clean) & (clean <= interval.high)).mean())
        columns += [
            ("local error", f"root mean square, sigma {SMOOTH:g}", local),
            ("absolute error", f"{covered:.1%} in the interval", error),
        ]
    reduced = math.ceil(max(side / most for side, most in zip(restored.shape, OVERVIEW, strict=True)))
    grey = Image.fromarray((np.clip(restored, 0, 1) * 255).round().astype(np.uint8)).convert("RGB").reduce(reduced)
    width, height = grey.size
    cell = max(width, LEAST_CELL)
    total = GAP + (1 + len(columns)) * (cell + GAP) + BAR + BAR_LABEL
    canvas = Image.new("RGB", (total, TITLE + height + GAP), (24, 24, 24))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    pictures = [grey, *(_coloured(values / limit).reduce(reduced) for _, _, values in columns)]
    labels = [("restored", ""), *((name, label) for name, label, _ in columns)]
    for i, (image, (name, label)) in enumerate(zip(pictures, labels, strict=True)):
        left = GAP + i * (cell + GAP)
        draw.text((left, 2), name, font=font, fill=(255, 255, 255))
        draw.text((left, 17), label, font=font, fill=(180, 200, 255))
        canvas.paste(image, (left, TITLE))
    left = GAP + len(pictures) * (cell + GAP)
    ramp = np.repeat(np.linspace(1, 0, height)[:, None], BAR, axis=1)
    canvas.paste(_coloured(ramp), (left, TITLE))
    draw.text((left + BAR + 3, TITLE), f"{limit:.3f}", font=font, fill=(180, 200, 255))
    draw.text((left + BAR + 3, TITLE + height - 15), "0", font=font, fill=(180, 200, 255))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _coloured(values: np.ndarray) -> Image.Image:
    """Values (H, W) in the colours of matplotlib's magma, from 0 to 1."""
    return Image.fromarray(matplotlib.colormaps["magma"](np.clip(values, 0, 1).astype(np.float64), bytes=True)[..., :3])
