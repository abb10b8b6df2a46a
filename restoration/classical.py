"""The best classical restoration of Poisson-Gaussian noise: variance-stabilised BM3D with an exact unbiased inverse."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache

import numpy as np
import torch
from scipy.special import gammaln, xlogy

from helper import UserError
from preprocessing.noise import NoiseModel
from preprocessing.stabilize import stabilize, unstabilize
from restoration.denoiser import Restoration

TABLE_STEP = 0.1  # of the inverse's table, in standard deviations of the noise
TABLE_ENTRIES = (65, 10_001)  # their least and greatest number
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


def expected_stabilized(clean: np.ndarray, noise: NoiseModel) -> np.ndarray:
    """E[stabilize(clamp(Poisson(N x) / N + sigma n, 0, 1))] at each x in [0, 1] of `clean` (K,): (K,) float64.

    By quadrature, to about 1e-4 of a standard deviation. It is what a perfect denoiser of the stabilised image returns,
    and neither `stabilize(x)`, for the root is concave, nor the expectation without the clamp, which lifts black and
    lowers full scale.
    """
    nodes = np.linspace(-REACH, REACH, int(2 * REACH * NODES_PER_SIGMA) + 1)
    density = np.exp(-(nodes**2) / 2)
    density /= density.sum()
    expected = np.empty(len(clean))
    for i, x in enumerate(clean):
        counts, probabilities = _quanta(float(x) * noise.quanta)
        measured = counts[:, None] / noise.quanta + noise.sigma * nodes
        expected[i] = probabilities @ _stabilized(measured.clip(0, 1), noise) @ density
    return expected


@lru_cache(maxsize=32)
def inverse_table(noise: NoiseModel) -> tuple[np.ndarray, np.ndarray]:
    """Stabilised expectations (K,), increasing, and the intensities (K,) from 0 to 1 that have them."""
    largest = float(_stabilized(np.ones(1), noise)[0])
    entries = int(np.clip(math.ceil(largest / TABLE_STEP) + 1, *TABLE_ENTRIES))
    clean = unstabilize(torch.linspace(0, largest, entries, dtype=torch.float64), noise).numpy().clip(0, 1)
    clean[[0, -1]] = 0, 1  # what rounding makes of the ends would leave black or full scale out
    return expected_stabilized(clean, noise), clean


def unbiased_inverse(values: np.ndarray, noise: NoiseModel) -> np.ndarray:
    """Intensities in [0, 1] whose stabilised noisy measurement, clamped to [0, 1], has the expectations `values` (any shape).

    Values under that of black become 0, values over that of full scale 1.

    Source: Makitalo & Foi, "Optimal inversion of the generalized Anscombe transformation for Poisson-Gaussian noise", IEEE
    TIP 2013, section III, with the clamp of `preprocessing/degrade.py` within the expectation.
    """
    return np.interp(values, *inverse_table(noise))


def vst_bm3d(image: np.ndarray, noise: NoiseModel) -> np.ndarray:
    """Restore an image (H, W) in [0, 1] that suffers from `noise`: returns (H, W) float32 in [0, 1].

    Generalised Anscombe transform, BM3D for unit noise (Dabov et al., IEEE TIP 2007, by the authors' package), exact unbiased
    inverse. In one thread, with the same result every time. An image without noise comes back as it is. Raises UserError
    if the package is missing, and ValueError for noise without quanta, which needs no stabilisation.
    """
    if math.isinf(noise.quanta):
        if noise.sigma == 0:
            return image.astype(np.float32)
        raise ValueError("the generalised Anscombe transform needs a finite number of quanta")
    try:
        import bm3d  # its licence forbids commercial use: an extra of the benchmarks
    except ImportError:
        raise UserError(
            "BM3D is not installed: pip install -r requirements-benchmarks.txt (free for non-commercial use only)"
        ) from None
    profile = bm3d.BM3DProfile()
    profile.num_threads = 1  # more of them add in an order that varies
    height, width = image.shape
    padding = [(0, max(0, SMALLEST - side)) for side in image.shape]  # it crashes on images as small as its blocks
    padded = np.pad(image.astype(np.float64), padding, mode="symmetric")
    denoised = bm3d.bm3d(_stabilized(padded, noise), 1.0, profile)[:height, :width]
    return unbiased_inverse(denoised, noise).astype(np.float32)


def restore_by_bm3d(image: np.ndarray, noise: NoiseModel, name: str) -> Restoration:
    """The `Denoiser` VST-BM3D, which draws nothing."""
    return Restoration(vst_bm3d(image, noise)[None])


def bm3d_is_there() -> bool:
    """Whether the optional package of BM3D is installed."""
    return importlib.util.find_spec("bm3d") is not None
