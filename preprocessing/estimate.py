"""Blind estimate of the Poisson-Gaussian noise in one mammogram."""

from __future__ import annotations

import numpy as np
import torch
from scipy.fft import dctn
from scipy.optimize import nnls
from scipy.special import gammaincinv

from preprocessing.breast import breast_mask
from preprocessing.noise import ELECTRONIC_SIGMA_AT_LEVEL_ONE, QUANTA_AT_LEVEL_ONE, NoiseModel

SIDE = 8  # of a block, in pixels
BLOCKS = 16384  # about so many are looked at in a large image
MIN_STRIDE = 2  # blocks overlap in small images, which narrows the estimate
MAX_CLAMPED = SIDE * SIDE // 4  # pixels of a block: with more it is background or saturation
CLASSES = 10  # of intensity, with equally many blocks
MIN_BLOCKS = 50  # in a class
SMOOTH_SHARE = 0.5  # of the blocks of a class, those with the least texture
SPLIT = 6  # DCT orders i + j below it tell texture, those from it on noise
MIN_ORDER = 2  # of i and of j alone: edges along rows and columns leak into the lowest
SLOPES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)  # of the texture spectrum; 3 is the parenchyma's (Burgess 2001)
SLOPE_TOLERANCE = 6.0  # rise of the deviance over the best slope's, in units of that per degree of freedom
ROUNDS = 2  # of weighting; the first, by the observed spectra, favours the low values among them
FLOOR = 1e-13  # variance that float32 rounding leaves, for a brightest pixel of 1

_ROW, _COLUMN = np.indices((SIDE, SIDE))
_ORDER = _ROW + _COLUMN
_TEXTURE = (_ORDER > 0) & (_ORDER < SPLIT)
_BANDS = [(order == _ORDER) & (np.minimum(_ROW, _COLUMN) >= MIN_ORDER) for order in range(SPLIT, 2 * SIDE - 1)]
_FREQUENCY = np.array([np.hypot(_ROW, _COLUMN)[band].mean() / SIDE for band in _BANDS])  # in units of Nyquist's
_COUNT = np.array([band.sum() for band in _BANDS])
_MEDIAN = 2 * gammaincinv(_COUNT / 2, 0.5) / _COUNT  # of the mean of so many squared standard normal variables


def estimate_noise(image: np.ndarray, mask: np.ndarray | None = None) -> NoiseModel:
    """Estimate the noise of a mammogram (H, W) in [0, 1] inside its mask (H, W) bool, the breast if None.

    The spectrum of 8 x 8 blocks is taken as white noise, whose variance is affine in intensity, over texture that falls
    as a power of frequency: the noise is the floor that the highest frequencies tend to. Blocks are grouped by
    intensity; their smoother half is told by low frequencies, which are independent of the noise at high ones; medians
    over blocks give the spectra, and a non-negative weighted least-squares fit the model. Of the slopes that explain the
    spectra about equally well the steepest is taken, so that doubt ends in more noise, not in less.

    White film grain and detector noise count as noise. Noise that is not white is under-estimated, down to none: enlarging
    and JPEG compression take the high frequencies from it. Noise so strong that much of it is clamped is under-estimated
    too, by a fifth at level 5. Pixels at the extremes of the image, background and saturation, are left out as clamped. If
    no block of pixels is left, as in a constant image, there is no noise.

    Source: the noise model is Foi et al. (2008), eq. 1-3, who fit it to local variances too, those of wavelet details;
    the median as a robust scale is Donoho & Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika 1994.
    Raises: ValueError if the mask is not as large as the image.
    """
    image = np.asarray(image, dtype=np.float32)
    if mask is None:
        mask = breast_mask(torch.from_numpy(image.copy())[None])[0].numpy()  # torch warns of read-only arrays
    if mask.shape != image.shape:
        raise ValueError(f"mask {mask.shape} and image {image.shape} differ in shape")
    blocks, peak = _blocks(image, mask)
    if len(blocks) == 0:
        return NoiseModel(float("inf"), 0.0)
    gain, variance = _fit(*_spectra(blocks / peak))
    return NoiseModel(1 / (gain * peak) if gain else float("inf"), float(np.sqrt(variance) * peak))


def level_at(model: NoiseModel, intensity: float) -> float:
    """The noise level of `simulate_low_dose` whose variance at `intensity`, in [0, 1], is the model's.

    It is the positive root s of (0.05 s)^2 + s intensity / 1000 = variance.
    """
    square, half = ELECTRONIC_SIGMA_AT_LEVEL_ONE**2, intensity / QUANTA_AT_LEVEL_ONE / 2
    variance = model.variance(intensity)
    # the root's form without a difference of near equals
    return float(variance / (half + np.sqrt(half**2 + square * variance))) if variance > 0 else 0.0


def _blocks(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, float]:
    """Blocks (N, 8, 8) of an image inside its mask that are hardly clamped, and the image's maximum."""
    none = np.empty((0, SIDE, SIDE), np.float32)
    if min(image.shape) < SIDE or not image.max() > 0:
        return none, 1.0
    stride = max(MIN_STRIDE, int(np.sqrt(mask.sum() / BLOCKS)))

    def windows(values: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(values, (SIDE, SIDE))[::stride, ::stride]

    inside = windows(mask).all((2, 3))
    if not inside.any():
        return none, 1.0
    clamped = windows((image <= image.min()) | (image >= image.max()))[inside].sum((1, 2))
    # any clamped pixel rules a block out, unless noise is so strong that few blocks are without
    keep = clamped <= min(np.quantile(clamped, 0.25), MAX_CLAMPED)
    return windows(image)[inside][keep], float(image.max())


def _spectra(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean intensities (K,), robust power spectra (K, B) and numbers of blocks (K,) of K classes in B bands."""
    means = blocks.mean((1, 2), dtype=np.float64)
    power = dctn(blocks, axes=(1, 2), norm="ortho") ** 2
    texture = power[:, _TEXTURE].sum(1)
    bands = np.stack([power[:, band].mean(1) for band in _BANDS], axis=1)
    intensities, spectra, counts = [], [], []
    for group in np.array_split(np.argsort(means, kind="stable"), np.clip(len(means) // MIN_BLOCKS, 1, CLASSES)):
        smooth = group[np.argsort(texture[group], kind="stable")[: max(1, round(SMOOTH_SHARE * len(group)))]]
        intensities.append(means[smooth].mean())
        spectra.append(np.median(bands[smooth], axis=0) / _MEDIAN)
        counts.append(len(smooth))
    return np.array(intensities), np.array(spectra, dtype=np.float64), np.array(counts)


def _fit(intensities: np.ndarray, spectra: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Gain and constant, both non-negative, of the noise variance gain * intensity + constant under the texture.

    Spectrum k in band f is gain * intensity_k + constant + texture_k * f^-slope.
    """
    classes, bands = spectra.shape
    freedom = counts[:, None] * _COUNT  # of each value: its relative variance is in inverse proportion
    observed = np.maximum(spectra, FLOOR)
    fits = []
    for slope in SLOPES:
        design = np.zeros((classes, bands, 2 + classes))
        design[..., 0] = intensities[:, None]
        design[..., 1] = 1
        design[np.arange(classes), :, 2 + np.arange(classes)] = _FREQUENCY**-slope
        expected = observed
        for _ in range(ROUNDS):
            weight = np.sqrt(freedom) / expected
            solution, _ = nnls((design * weight[..., None]).reshape(-1, 2 + classes), (spectra * weight).ravel())
            expected = np.maximum(design @ solution, FLOOR)
        ratio = observed / expected
        deviance = float(((ratio - 1 - np.log(ratio)) * freedom).sum())  # of gamma distributed values
        fits.append((deviance, float(solution[0]), float(solution[1])))
    limit = max(0.0, min(fits)[0]) * (1 + SLOPE_TOLERANCE / (spectra.size - classes - 3))
    return [fit[1:] for fit in fits if fit[0] <= limit][-1]
