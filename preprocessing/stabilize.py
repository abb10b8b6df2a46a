"""Noise of any kind to white noise of unit variance, and back: the generalised Anscombe transform, and a whitening filter."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.fft import next_fast_len
from torch import Tensor

from preprocessing.noise import NoiseModel, level_of_detail, power_spectrum, unit_energy

MIRRORED = 16  # pixels by which an image is mirrored at its borders before it is filtered
DETAIL_SIGMAS = 2.0, 8.0  # pixels; of the Gaussians between which the detail of an image is
LEAST_DETAIL = 1e-6  # variance in units of the noise's
NORMAL_MEDIAN = 0.6745  # of the magnitude of standard normal numbers
DARK_QUANTILE = 0.001  # of a smoothed image: the darkest, unless something is wrong with a few pixels
LEAST_POWER = 0.01  # of the noise's mean: where a kernel leaves less, whitening would blow up what is stored


def stabilize(image: Tensor, noise: NoiseModel) -> Tensor:
    """Images in units of their noise's standard deviation, rising with the exposure, 0 where there is no signal.

    It is the integral of 1 / sqrt(gain s + R^2 + structural^2 s^2) over the signal s, R^2 = sigma^2 + 3/8 gain^2; without
    structural noise 2 sqrt(s / gain + 3/8 + (sigma / gain)^2) less its value at s = 0. The form loses no digits if there is
    hardly any quantum noise. Below 0, where noise is all there is, it counts in R. `noise` must not be none.

    Source: Starck, Murtagh & Bijaoui, "Image Processing and Data Analysis", 1998, section 2.3; as written by Makitalo &
    Foi, "Optimal inversion of the generalized Anscombe transformation for Poisson-Gaussian noise", IEEE TIP 2013, eq. 3.
    """
    signal, dark, structural = noise.signal(image), noise.dark_deviation, noise.structural
    seen = signal.clamp(min=0)
    half = seen / ((abs(noise.gain) * seen + (structural * seen) ** 2 + dark**2).sqrt() + dark)
    half = torch.atanh(structural * half) / structural if structural else half
    return 2 * half + (signal - seen) / dark - noise.reference


def unstabilize(values: Tensor, noise: NoiseModel) -> Tensor:
    """Algebraic inverse of `stabilize`: right for an estimate of `stabilize(x)`, biased for one of E[stabilize(y)]."""
    dark, structural, values = noise.dark_deviation, noise.structural, values + noise.reference
    half = values.clamp(min=0) / 2
    half = torch.tanh(structural * half) / structural if structural else half
    signal = (abs(noise.gain) * half + 2 * dark) * half / (1 - (structural * half) ** 2)
    return (signal + dark * values.clamp(max=0)) * noise.sign + noise.offset


def full_scale_of(level: float) -> float:
    """Full scale of images in [0, 1] in units of the noise at a noise level."""
    return float(stabilize(torch.ones(()), NoiseModel.from_level(level)))


def placed(noise: NoiseModel, image: np.ndarray, mask: np.ndarray) -> NoiseModel:
    """The noise that an image (H, W) is stabilised by: correlated as at the mean in the mask, and likened to that of film.

    As on film, black is 0 and there is a noise level. If nobody knows them, the darkest of the image is black, and the level is
    the one at which a film has as much detail in units of the noise.
    """
    noise = noise.at(float(image[mask].mean()))
    if noise.level is not None:
        return noise
    values = stabilize(torch.from_numpy(image), noise).numpy()
    reference = float(np.quantile(ndimage.gaussian_filter(values, DETAIL_SIGMAS[0]), DARK_QUANTILE))
    return replace(noise, reference=reference, level=level_of_detail(_detail(values, mask, noise.kernel)))


def _detail(values: np.ndarray, mask: np.ndarray, kernel: Tensor | None) -> float:
    """Robust deviation, without the noise, of what is between `DETAIL_SIGMAS` in size in images (H, W) in units of the noise.

    Inside the mask, away from its border; at least `LEAST_DETAIL`.
    """

    def band(image: np.ndarray) -> np.ndarray:
        fine, coarse = (ndimage.gaussian_filter(image, sigma, mode="constant") for sigma in DETAIL_SIGMAS)
        return fine - coarse

    unit = np.ones((1, 1)) if kernel is None else unit_energy(kernel).numpy()
    noise = float((band(np.pad(unit, math.ceil(4 * DETAIL_SIGMAS[1]))) ** 2).sum())
    inside = ndimage.binary_erosion(mask, iterations=math.ceil(DETAIL_SIGMAS[1]), border_value=1)
    mean = values[mask].mean()
    found = np.median(np.abs(band(values - mean)[inside if inside.any() else mask])) / NORMAL_MEDIAN
    return max(LEAST_DETAIL, float(found) ** 2 - noise) ** 0.5


def whiten(values: Tensor, noise: NoiseModel) -> Tensor:
    """Stabilised images (..., H, W), or (N, C, H, W) of kernels (N, 1, k, k), filtered for their noise to be white.

    The filter has no phase, and 1 / sqrt(power spectrum of the noise) for a frequency response.
    """
    return _filtered(values, noise, -0.5)


def colour(values: Tensor, noise: NoiseModel) -> Tensor:
    """Inverse of `whiten`, but for what mirroring makes of the borders."""
    return _filtered(values, noise, 0.5)


def _filtered(values: Tensor, noise: NoiseModel, exponent: float) -> Tensor:
    if noise.kernel is None:
        return values
    height, width = values.shape[-2:]
    pad = [min(MIRRORED, side - 1) for side in (width, height)]
    # on the far side as much more as makes the transform fast
    far = [
        next_fast_len(max(side + 2 * p, noise.kernel.shape[-1]), real=True) - side - p
        for side, p in zip((width, height), pad, strict=True)
    ]
    mode = "reflect" if max(far[0] - width, far[1] - height) < 0 else "replicate"
    planes = values.reshape(-1, 1, height, width) if values.ndim < 4 else values
    padded = F.pad(planes, (pad[0], far[0], pad[1], far[1]), mode=mode)
    power = power_spectrum(noise.kernel.to(padded), padded.shape[-2:]).clamp(min=LEAST_POWER)
    response = power[..., : padded.shape[-1] // 2 + 1] ** exponent
    filtered = torch.fft.irfft2(torch.fft.rfft2(padded) * response, s=padded.shape[-2:])
    return filtered[..., pad[1] : pad[1] + height, pad[0] : pad[0] + width].reshape(values.shape)
