"""A restored image with the noise of a higher dose, which readers are used to, instead of none."""

from __future__ import annotations

import numpy as np
import torch

from preprocessing.noise import NoiseModel
from preprocessing.stabilize import colour, whiten


def to_dose(
    measured: np.ndarray,
    restored: np.ndarray,
    noise: NoiseModel,
    factor: float,
    *,
    value: float | None = None,
    rescale: bool = False,
) -> np.ndarray:
    """Blend a restoration with its measurement, so that the noise is that of `factor` F times the dose, spectrum and all.

    With the measurement z = tau + s + n and its restoration yhat, the result is yhat + w (z - yhat), w^2 = (lambda s / F +
    sigma^2 / F^2) / (lambda s + sigma^2), lambda = |gain|: of s + w n the signal-to-noise ratio is that of F s, which has the
    variance lambda F s + sigma^2. In the usual form, w1 (z - tau) + w2 yhat + tau at the brightness F s of the other dose, w
    is w1 / F. Structural noise stays, as no dose averages it out.

    If the electronic noise is white and the rest is not, its share falls as the dose rises: then z - yhat is filtered by the
    root of the ratio of both spectra, those at `value`.

    Args:
        measured, restored: (H, W) floating point, in any units.
        noise: that of `measured`, in its units; pixels without noise stay as measured.
        factor: F, at least 1, which returns `measured` but for rounding.
        value: of the restored image, the one whose spectra count, such as the breast's mean; None: the mean of all.
        rescale: return what the detector would store at the other dose, F times as far from tau; else the brightness, and so
            a display's window, stays that of `measured`.

    Raises: ValueError for a factor below 1.
    Source: Brandao et al., "Exploring the impact of image restoration in simulating higher dose mammography", J. Med. Imaging
    12(S2), 2025.
    """
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor must be a finite number of at least 1, not {factor}")
    estimate, wanted = torch.from_numpy(restored), noise.of_dose(factor)
    residual = torch.from_numpy(measured) - estimate
    if noise.kernel is not None and noise.electronic_is_white:
        at_value = estimate.mean() if value is None else value
        residual = colour(whiten(residual, noise.at(at_value)), wanted.at(at_value))
    weight = (wanted.variance(estimate) / noise.variance(estimate)).sqrt().nan_to_num(nan=1.0)
    result = estimate + weight * residual
    return (result + (factor - 1) * (result - noise.offset) if rescale else result).to(estimate).numpy()
