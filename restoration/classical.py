"""The best classical restoration of Poisson-Gaussian noise: variance-stabilised BM3D with an exact unbiased inverse."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from scipy.special import gammaln, xlogy

from helper import UserError
from preprocessing.noise import NoiseModel, power_spectrum
from preprocessing.stabilize import stabilize, unstabilize
from restoration.denoiser import Restoration

Limits = tuple[float, float]  # what stored values are clamped to
UNLIMITED: Limits = (-math.inf, math.inf)
FILM_LIMITS: Limits = (0.0, 1.0)  # of the specification's simulated low dose
TABLE_STEP = 0.1  # of the inverse's table, in standard deviations of the noise
TABLE_ENTRIES = (65, 10_001)  # their least and greatest number
TABLE_END = 100.0  # standard deviations; 2,500 quanta, from which on the root bends by less than 0.005 of one
EXACT_QUANTA = 100  # expected quanta up to which the Poisson distribution is summed count by count
REACH = 8.0  # standard deviations on either side of the mean that an expectation covers
SMALLEST = 16  # pixels; least side of an image that BM3D is given
NODES_PER_SIGMA = 20  # of the Gaussian; the trapezoidal rule meets a kink where the clamp is


def _stabilized(values: np.ndarray, noise: NoiseModel) -> np.ndarray:
    return stabilize(torch.from_numpy(values), noise).numpy()


def _quanta(mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts and their probabilities under the Poisson distribution of `mean`."""
    deviation = math.sqrt(mean)
    if mean <= EXACT_QUANTA:
        counts = np.arange(0.0, math.ceil(mean + REACH * deviation) + 10)
    else:  # so smooth that every fourth of a standard deviation may stand for what lies around it
        counts = mean + deviation * np.arange(-REACH, REACH + 0.125, 0.25)
    logarithm = xlogy(counts, mean) - mean - gammaln(counts + 1)
    weights = np.exp(logarithm - logarithm.max())
    return counts, weights / weights.sum()


def expected_stabilized(clean: np.ndarray, noise: NoiseModel, limits: Limits = UNLIMITED) -> np.ndarray:
    """E[stabilize(clamp(z))] of measurements z of each value x of `clean` (K,): (K,) float64. `noise` holds numbers.

    z has Poisson quanta and Gaussian noise, electronic and structural; it is clamped to `limits`. By quadrature, to about
    1e-4 of a standard deviation. It is what a perfect denoiser of the stabilised image returns, and neither `stabilize(x)`,
    for the root is concave, nor the expectation without the clamp, which lifts black and lowers full scale.
    """
    nodes = np.linspace(-REACH, REACH, int(2 * REACH * NODES_PER_SIGMA) + 1)
    density = np.exp(-(nodes**2) / 2)
    density /= density.sum()
    expected = np.empty(len(clean))
    for i, signal in enumerate((noise.sign * (clean - noise.offset)).clip(0)):
        drawn, probabilities = np.array([signal]), np.ones(1)
        if noise.gain:
            counts, probabilities = _quanta(float(signal) / abs(noise.gain))
            drawn = counts * abs(noise.gain)
        seen = drawn[:, None] + math.hypot(noise.sigma, noise.structural * signal) * nodes
        expected[i] = probabilities @ _stabilized((noise.sign * seen + noise.offset).clip(*limits), noise) @ density
    return expected


@lru_cache(maxsize=32)
def inverse_table(noise: NoiseModel, limits: Limits = UNLIMITED) -> tuple[np.ndarray, np.ndarray]:
    """Stabilised expectations (K,), increasing, and the stabilised values (K,) that have them; `noise` holds numbers.

    The values begin where there is no signal, or at a limit above it, and end at the other limit, or without limits at `TABLE_END`.
    """
    first, last = 0.0, TABLE_END
    if limits != UNLIMITED:
        first, last = (max(0.0, float(end)) for end in sorted(_stabilized(np.array(limits), noise)))
    entries = int(np.clip(math.ceil((last - first) / TABLE_STEP) + 1, *TABLE_ENTRIES))
    values = np.linspace(first, last, entries)
    clean = unstabilize(torch.from_numpy(values), noise).numpy().clip(*limits)
    return expected_stabilized(clean, noise, limits), values


def unbiased_inverse(values: np.ndarray, noise: NoiseModel, limits: Limits = UNLIMITED) -> np.ndarray:
    """Values (H, W) in `limits` whose stabilised measurement, clamped to them, has the expectations `values` (H, W).

    What the concave root and the clamp take from an expectation is added to it before the algebraic inverse; it is that of
    the mean gain, if the gain is a map.

    Source: Makitalo & Foi, "Optimal inversion of the generalized Anscombe transformation for Poisson-Gaussian noise", IEEE
    TIP 2013, section III, with the clamp of `preprocessing/degrade.py` within the expectation.
    """
    numbers = {
        name: float(torch.as_tensor(getattr(noise, name)).double().mean()) for name in ("gain", "sigma", "offset")
    }
    expected, clean = inverse_table(replace(noise, **numbers, kernel=None), limits)
    whole = values + np.interp(values, expected, clean - expected)
    return unstabilize(torch.from_numpy(whole), noise).numpy().clip(*limits)


def vst_bm3d(image: np.ndarray, noise: NoiseModel, limits: Limits = UNLIMITED) -> np.ndarray:
    """Restore an image (H, W) that suffers from `noise`, in the same units: returns (H, W) float32 in `limits`.

    Generalised Anscombe transform, BM3D for unit noise, which is told the spectrum of noise that is not white (Makinen, Azzari
    & Foi, IEEE TIP 2020, by the authors' package), exact unbiased inverse. In one thread, with the same result every time. An
    image without noise comes back as it is. Raises UserError if the package is missing, or NumPy does not fit it.
    """
    if noise.is_none:
        return image.astype(np.float32)
    try:
        import bm3d  # its licence forbids commercial use: an extra of the benchmarks
    except ImportError:
        remedy = "pip install -r requirements-benchmarks.txt (free for non-commercial use only)"
        raise UserError(f"BM3D is not installed: {remedy}") from None
    if noise.kernel is not None and not hasattr(np, "trapz"):
        raise UserError(f'BM3D of correlated noise fails with NumPy {np.__version__}: pip install "numpy<2.4"')
    noise = replace(noise, reference=0.0)  # the inverse counts from where there is no signal
    profile = bm3d.BM3DProfile()
    profile.num_threads = 1  # more of them add in an order that varies
    stabilized = _stabilized(image.astype(np.float64), noise)
    least = SMALLEST if noise.kernel is None else max(SMALLEST, noise.kernel.shape[-1])
    padding = [(0, max(0, least - side)) for side in image.shape]  # it crashes on images as small as its blocks
    padded = np.pad(stabilized - stabilized.mean(), padding, mode="symmetric")
    known = 1.0
    if noise.kernel is not None:
        kernel = noise.at(float(image.mean())).kernel.double()
        known = power_spectrum(kernel, padded.shape).numpy() * padded.size
    denoised = bm3d.bm3d(padded, known, profile)[: image.shape[0], : image.shape[1]] + stabilized.mean()
    return unbiased_inverse(denoised, noise, limits).astype(np.float32)


def restore_by_bm3d(image: np.ndarray, noise: NoiseModel, name: str) -> Restoration:
    """The `Denoiser` VST-BM3D of simulated low doses in [0, 1], which draws nothing."""
    return Restoration(vst_bm3d(image, noise, FILM_LIMITS)[None])


def bm3d_is_there() -> bool:
    """Whether the optional package of BM3D is installed."""
    return importlib.util.find_spec("bm3d") is not None
