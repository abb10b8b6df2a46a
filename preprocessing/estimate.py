"""Blind estimate of the noise in one mammogram: its variance over the intensities, its correlation, and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import dct, dctn
from scipy.special import gammaincinv

from preprocessing.breast import breast_mask
from preprocessing.noise import KERNEL_SIDE, NoiseModel, kernel_of

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

SIDE = 16  # of a block, in pixels
BLOCKS = 16384  # about so many are looked at in a large image
MIN_STRIDE = 2  # blocks overlap in small images, which narrows the estimate
MAX_CLAMPED = SIDE * SIDE // 4  # pixels of a block: with more it is background or saturation
CLASSES, GROUPS = 10, 3  # of intensity, and of texture in each of them
MIN_BLOCKS = 20  # in a class of intensity, counted without overlap; an image with fewer is not sure
LEAST_BLOCKS = 2  # with fewer nothing is estimated
SMOOTH_SHARE = 0.75  # of the blocks of a class, those with the least texture
FREEDOM = 0.6, 2.0  # independent blocks, per block and per area of a block, that a median over them is worth
MISFIT = 0.03, 0.25  # by which a right model misses a band's logarithm; the second at order 1, falling with the order
GRID = 128  # frequencies a side on which a spectrum is evaluated
FLOOR = 1e-14  # variance that rounding leaves, of intensities from 0 to 1
MAX_RATIO = 6.0  # of the logarithms of the variances at both ends
LOWEST = 12.0  # DCT order from which on white noise is measured
AT_ENDS = 0.1, 0.01  # of the logarithm of the corner: so near to an end, noise is not told from texture or from white
TOP = 16.0  # DCT order from which on resizing and compression leave nothing
CLEARLY = 5.0  # in the logarithm of the probability: the difference that tells white noise from correlated for sure
MAX_ERROR, MIN_TOP, MAX_MISFIT = 0.25, 0.4, 2.0  # what an estimate is still sure with

# Texture: slope of its power spectrum, 3 in Burgess 2001, logarithms of two anisotropies. Noise: logarithms of corner and
# power, white share as log odds, logarithm of the stretch, as in `draw_kernel`, whose range they keep to.
PRIOR = np.array([3.0, 0.0, 0.0, np.log(0.15), np.log(1.25), -1.8, 0.0])
SPREAD = np.array([0.15, 0.7, 0.7, 0.25, 0.15, 0.4, 0.03])
LEAST = np.array([2.3, -3.0, -3.0, np.log(0.08), np.log(0.75), -3.5, -0.15])
MOST = np.array([5.0, 3.0, 3.0, np.log(0.8), np.log(2.0), 0.0, 0.15])
TEXTURE = 3  # the first of them

_ROW, _COLUMN = np.indices((SIDE, SIDE))
_RADIUS, _ANGLE = np.hypot(_ROW, _COLUMN), np.arctan2(_ROW, _COLUMN)
_RINGS = np.array([2.2, 3.2, 4.4, 6, 8, 10, 12, 14, 16, 18, 22])
_INNER = np.minimum(_ROW, _COLUMN) > 0  # the rest, which slopes and edges leak into, tells the texture of a block
_SMOOTH = (~_INNER & (_RADIUS > 0) & (_RADIUS < 3.5)).ravel()
_RING, _SECTOR = np.digitize(_RADIUS, _RINGS), _ANGLE * 6 // np.pi
_BANDS = np.array([(_INNER & (i == _RING) & (j == _SECTOR)).ravel() for i in range(1, 11) for j in range(3)])
_BANDS = _BANDS[_BANDS.any(1)]
_COUNT = _BANDS.sum(1)
_AVERAGE = _BANDS / _COUNT[:, None]
_ORDER = _AVERAGE @ _RADIUS.ravel()
_AXIAL, _DIAGONAL = _AVERAGE @ np.cos(2 * _ANGLE).ravel(), _AVERAGE @ np.cos(4 * _ANGLE).ravel()
_MEDIAN = 2 * gammaincinv(_COUNT / 2, 0.5) / _COUNT  # of the mean of so many squared standard normal variables
_F = np.arange(GRID // 2 + 1) / GRID
# of frequencies into coefficients, with the negative ones
_LEAK = np.abs(np.fft.rfft(dct(np.eye(SIDE), axis=0, norm="ortho"), GRID)).T ** 2 / GRID
_LEAK[1:-1] *= 2
_DISTANCE = np.hypot(_F[:, None], _F)
_DISTANCE[0, 0] = np.inf


@dataclass(frozen=True)
class Estimate:
    """What one image tells of its noise."""

    noise: NoiseModel  # in the units of the image
    reason: str  # why it is not sure, or ''

    @property
    def is_sure(self) -> bool:
        return not self.reason


def estimate_noise(image: np.ndarray, mask: np.ndarray | None = None) -> Estimate:
    """Estimate the noise of a mammogram (H, W), in any units, inside its mask (H, W) bool, the breast if None.

    The DCT spectrum of 16 x 16 blocks is taken as noise, whose variance is affine in intensity, over texture that falls
    as a power of frequency. Blocks are grouped by intensity and by texture, told by coefficients that are not fitted;
    medians over blocks give the spectra, and the logarithms are fitted, errors weighted and with a prior on the slope of
    texture and on the noise's spectrum. Noise is correlated if that explains more than white noise does. The estimate for
    factor * image + shift is that for the image, `scaled`. Film grain counts as noise. Pixels at the extremes of the
    image, background and saturation, are left out as clamped, unless noise clamps pixels of nearly every block.

    Source: affine variance, Foi et al., "Practical Poissonian-Gaussian noise modeling and fitting for single-image
    raw-data", IEEE TIP 2008; texture, Burgess et al., "Human observer detection experiments with mammograms and power-law
    noise", Med. Phys. 2001; fit of spectra, Whittle, "Estimation and information in stationary time series", Ark. Mat. 1953.
    Raises: ValueError if the mask is not as large as the image.
    """
    image = np.asarray(image)
    if mask is None:
        mask = breast_mask(torch.from_numpy(image.astype(np.float32))[None])[0].numpy()
    if mask.shape != image.shape:
        raise ValueError(f"mask {mask.shape} and image {image.shape} differ in shape")
    blocks, weight = _blocks(image, mask)
    few = "too few pixels tell noise from texture" if len(blocks) * weight < MIN_BLOCKS else ""
    if len(blocks) * weight < LEAST_BLOCKS:
        return Estimate(NoiseModel(0.0, 0.0), few)
    low, high = float(image.min()), float(image.max())
    step = float(np.diff(np.unique(blocks[:: max(1, len(blocks) // 256)])).min(initial=np.inf)) / (high - low)
    blocks = (blocks.astype(np.float64) - low) / (high - low)
    is_dark = blocks.mean() < 0.5  # inverted, the same image gives the same blocks
    estimate = _judged(*_spectra(blocks if is_dark else 1 - blocks, weight), step)
    scale = (high - low, low) if is_dark else (low - high, high)
    return Estimate(estimate.noise.scaled(*scale), estimate.reason or few)


def _blocks(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float]:
    """Blocks (N, 16, 16) of an image inside its mask that are hardly clamped, and what each is worth of independent ones."""
    stride = max(MIN_STRIDE, int(np.sqrt(mask.sum() / BLOCKS)))
    weight = min(FREEDOM[0], FREEDOM[1] * (stride / SIDE) ** 2)
    none = np.empty((0, SIDE, SIDE), image.dtype), weight
    if min(image.shape) < SIDE or not image.max() > image.min():
        return none

    def windows(values: np.ndarray) -> np.ndarray:
        return sliding_window_view(values, (SIDE, SIDE))[::stride, ::stride]

    inside = windows(mask).all((2, 3))
    if not inside.any():
        return none
    clamped = windows((image <= image.min()) | (image >= image.max()))[inside].sum((1, 2))
    # any clamped pixel rules a block out, unless noise is so strong that few blocks are without
    keep = clamped <= min(np.quantile(clamped, 0.25), MAX_CLAMPED)
    return windows(image)[inside][keep], weight


def _spectra(blocks: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray, float, tuple[float, float]]:
    """Intensities (K,), robust spectra (K, B) of K groups in B bands, independent blocks in a group, the ends of intensity."""
    means = blocks.mean((1, 2))
    power = dctn(blocks - means[:, None, None], axes=(1, 2), norm="ortho").reshape(len(blocks), -1) ** 2
    texture, bands = power[:, _SMOOTH].sum(1), power @ _AVERAGE.T
    intensities, spectra = [], []
    classes = int(np.clip(len(means) * weight / MIN_BLOCKS / 2, 1, CLASSES))
    for group in np.array_split(np.argsort(means, kind="stable"), classes):
        smooth = group[np.argsort(texture[group], kind="stable")[: round(SMOOTH_SHARE * len(group))]]
        for part in np.array_split(smooth, GROUPS):
            intensities.append(means[part].mean())
            spectra.append(np.median(bands[part], axis=0) / _MEDIAN)
    count = len(means) * weight * SMOOTH_SHARE / len(intensities)
    return np.array(intensities), np.array(spectra), count, (means.min(), means.max())


def _noise_spectrum(frequency: np.ndarray, weight: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Power spectrum (F, F), of mean 1 under weights (F,), of noise of a shape (4,) as in `PRIOR`."""
    corner, power, odds, stretch = shape
    scaled = frequency * np.exp(-corner)
    blurred = (1 + (scaled[:, None] * np.exp(stretch)) ** 2 + (scaled * np.exp(-stretch)) ** 2) ** -np.exp(power)
    white = 1 / (1 + np.exp(-odds))
    return (1 - white) * blurred / (weight @ blurred @ weight) + white


def _shapes(free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What noise of unit variance, and texture, leave in the bands (B,)."""

    def bands(spectrum: np.ndarray) -> np.ndarray:
        return _AVERAGE @ (_LEAK.T @ spectrum @ _LEAK).ravel()

    white = len(free) == TEXTURE
    noise = np.ones(len(_COUNT)) if white else bands(_noise_spectrum(_F, _LEAK.sum(1) / SIDE, free[TEXTURE:]))
    return noise, bands((8 * _DISTANCE) ** -free[0]) * np.exp(free[1] * _AXIAL + free[2] * _DIAGONAL)


class _Fit:
    """The model of spectra (K, B): logarithms of the variance at both ends, of K amounts of texture, then as in `PRIOR`."""

    def __init__(self, place: np.ndarray, spectra: np.ndarray, count: float):
        self.place, self.groups = place, len(place)
        self.observed = np.log(np.maximum(spectra, FLOOR))
        self.error = np.sqrt(2 / (count * _COUNT) + (MISFIT[0] + MISFIT[1] / _ORDER) ** 2)

    def parts(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The noise's shares (K, B) of both ends, and the texture's."""
        noise, texture = _shapes(x[2 + self.groups :])
        low, high = np.exp(x[0]) * (1 - self.place), np.exp(x[1]) * self.place
        return low[:, None] * noise, high[:, None] * noise, np.exp(x[2 : 2 + self.groups, None]) * texture

    def residuals(self, x: np.ndarray) -> np.ndarray:
        free = x[2 + self.groups :]
        prior = (free - PRIOR[: len(free)]) / SPREAD[: len(free)]
        ratio = max(0.0, abs(x[0] - x[1]) - MAX_RATIO)
        return np.concatenate([((np.log(sum(self.parts(x))) - self.observed) / self.error).ravel(), prior, [ratio]])

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        first, tiny = 2 + self.groups, 1e-4
        free, number = x[first:], np.arange(self.groups)
        low, high, texture = self.parts(x)
        total = (low + high + texture) * self.error
        slope = np.zeros((*total.shape, len(x)))
        slope[..., 0], slope[..., 1] = low / total, high / total
        slope[number, :, 2 + number] = texture / total
        here = _shapes(free)
        for i in range(len(free)):
            there = _shapes(free + tiny * (np.arange(len(free)) == i))
            noise, pattern = (np.log(b / a) / tiny for a, b in zip(here, there, strict=True))
            slope[..., first + i] = ((low + high) * noise + texture * pattern) / total
        tail = np.zeros((len(free) + 1, len(x)))
        tail[:-1, first:] = np.diag(1 / SPREAD[: len(free)])
        tail[-1, :2] = np.array([1, -1]) * np.sign(x[0] - x[1]) * (abs(x[0] - x[1]) > MAX_RATIO)
        return np.concatenate([slope.reshape(-1, len(x)), tail])

    def solve(self, free: int) -> OptimizeResult:
        """The fit with the first `free` parameters of `PRIOR`."""
        spectra = np.exp(self.observed)
        noise = np.log(spectra[:, _ORDER > TOP].mean()) + (free > TEXTURE)
        start = np.r_[noise, noise, np.log(spectra[:, :3].mean(1)) - 3, PRIOR[:free]]
        least = np.r_[np.full(2 + self.groups, np.log(FLOOR) - 10), LEAST[:free]]
        most = np.r_[np.full(2 + self.groups, np.inf), MOST[:free]]
        from scipy.optimize import least_squares  # which no training needs

        return least_squares(self.residuals, start, self.jacobian, bounds=(least, most), ftol=1e-7, max_nfev=60)


def _judged(
    intensities: np.ndarray, spectra: np.ndarray, count: float, ends: tuple[float, float], step: float
) -> Estimate:
    """The estimate from spectra of intensities in [0, 1], stored in steps, and whether it is sure."""
    span = max(ends[1] - ends[0], FLOOR)
    fit = _Fit((intensities - ends[0]) / span, spectra, count)
    white, correlated = fit.solve(TEXTURE), fit.solve(len(PRIOR))
    # either cost holds its own prior; correlated as far as texture is texture, and hardly at all is white
    corner = correlated.x[2 + fit.groups + TEXTURE]
    is_told = LEAST[TEXTURE] + AT_ENDS[0] < corner < MOST[TEXTURE] - AT_ENDS[1]
    is_white = white.cost <= correlated.cost or not is_told
    if is_white:  # it shows best at high frequencies, where texture is least
        fit.error = np.where(LOWEST > _ORDER, 1e3, fit.error)
    best = fit.solve(TEXTURE) if is_white else correlated
    variance, frequency = np.exp(best.x[:2]), np.fft.fftfreq(2 * KERNEL_SIDE + 1)
    kernel = None
    if not is_white:
        shape = best.x[2 + fit.groups + TEXTURE :]
        spectrum = _noise_spectrum(frequency, np.full(len(frequency), 1 / len(frequency)), shape)
        kernel = kernel_of(torch.from_numpy(spectrum)).float()
    share = np.array([1 - fit.place.mean(), fit.place.mean()])
    mean = float(variance @ share)
    if mean < 10 * FLOOR:
        return Estimate(NoiseModel(0.0, 0.0), "no noise is seen; a filter that took it out would not show")
    gradient = np.r_[variance * share / mean, np.zeros(len(best.x) - 2)]
    error = float(np.sqrt(gradient @ np.linalg.pinv(best.jac.T @ best.jac) @ gradient))
    low, high, texture = fit.parts(best.x)
    top = _ORDER > TOP
    left = np.exp((fit.observed - np.log(low + high + texture))[:, top].mean())
    drowned = ((low + high) / (low + high + texture))[:, top].mean() < 0.5
    misfit = 2 * (white if is_white else correlated).cost / spectra.size
    checks = (
        (left < MIN_TOP, "noise that was resized or compressed does not show"),
        (mean < step**2 / 6, "no noise is seen but that of rounding"),
        (drowned or error > MAX_ERROR, "texture drowns the noise"),
        (abs(white.cost - correlated.cost) < CLEARLY, "texture hides whether the noise is correlated"),
        (misfit > MAX_MISFIT, "the spectrum is not that of noise over a breast's texture"),
    )
    reason = next((words for is_so, words in checks if is_so), "")
    offset = ends[int(variance[1] < variance[0])]
    gain = float(variance[1] - variance[0]) / span
    noise = NoiseModel(gain, float(variance.min() ** 0.5), float(offset), kernel=kernel, electronic_is_white=False)
    return Estimate(noise, reason)
