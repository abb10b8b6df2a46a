"""A model observer that looks for a known signal: the channelised Hotelling observer, and its detectability d'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.signal import fftconvolve
from scipy.special import eval_laguerre

CHANNELS = 5  # of Diaz et al.
FOLDS = 24  # parts into which pairs fall: one is judged by what the others teach


@dataclass(frozen=True)
class Detectability:
    """d' of an observer, or a difference of two, and what its standard error is told by."""

    value: float
    left_out: np.ndarray  # (folds,) the value without each fold

    @property
    def error(self) -> float:
        """Standard error, the jackknife's over folds."""
        count = len(self.left_out)
        return float(np.sqrt((count - 1) / count * ((self.left_out - self.left_out.mean()) ** 2).sum()))

    def __sub__(self, other: Detectability) -> Detectability:
        """The difference on the same pairs, whose error is less than those of both tell."""
        return Detectability(self.value - other.value, self.left_out - other.left_out)


def lg_channels(side: int, width: float, count: int = CHANNELS) -> np.ndarray:
    """Laguerre-Gauss functions (count, side, side) of a `width` in pixels, centred, of unit energy; `side` is odd.

    sqrt(2) / a exp(-pi r^2 / a^2) L_n(2 pi r^2 / a^2), a = width.

    Source: Gallas & Barrett, "Validating the use of channels to estimate the ideal linear observer", JOSA A 20 (2003), eq. 15.
    """
    axis = (np.arange(side) - side // 2) / width
    squared = np.pi * (axis[:, None] ** 2 + axis**2)
    return np.sqrt(2) / width * np.exp(-squared) * np.stack([eval_laguerre(n, 2 * squared) for n in range(count)])


def convolution_channels(signal: np.ndarray, width: float, count: int = CHANNELS) -> np.ndarray:
    """Channels (count, H, W): the signal (H, W), wherever it is in the image, convolved with Laguerre-Gauss functions.

    So their outputs, images times channels, follow a signal of any shape, such as a cluster of calcifications.

    Source: Diaz et al., "Derivation of an observer model adapted to irregular signals based on convolution channels", IEEE
    TMI 34(7), 2015.
    """
    functions = lg_channels(2 * int(np.ceil(3 * width)) + 1, width, count)
    return np.stack([fftconvolve(signal, function, mode="same") for function in functions])


def channel_outputs(images: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """Outputs (N, K) of channels (K, H, W) on images (N, H, W)."""
    return images.reshape(len(images), -1).astype(np.float64) @ channels.reshape(len(channels), -1).T


def template(absent: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The Hotelling template (K,) that outputs (N, K) without and with the signal teach: K^-1 (mean difference)."""
    covariance = (np.cov(absent, rowvar=False) + np.cov(present, rowvar=False)) / 2
    return np.linalg.solve(covariance, present.mean(0) - absent.mean(0))


def _of_folds(absent: np.ndarray, present: np.ndarray, fold: np.ndarray, folds: np.ndarray) -> float:
    """d' of the pairs in `folds`, each judged by the template of the other folds."""
    without, with_signal = [], []
    for own in folds:
        taught = np.isin(fold, folds) & (fold != own)
        weights = template(absent[taught], present[taught])
        means = absent[taught].mean(0), present[taught].mean(0)
        # one scale and one origin for the templates of all folds
        weights, middle = weights / (weights @ (means[1] - means[0])), (means[0] + means[1]) / 2
        without.append((absent[fold == own] - middle) @ weights)
        with_signal.append((present[fold == own] - middle) @ weights)
    low, high = np.concatenate(without), np.concatenate(with_signal)
    return float((high.mean() - low.mean()) / np.sqrt((low.var(ddof=1) + high.var(ddof=1)) / 2))


def cho_dprime(absent: np.ndarray, present: np.ndarray, channels: np.ndarray) -> Detectability:
    """d' of the channelised Hotelling observer on images (N, H, W) without and with the signal of `channels` (K, H, W).

    Difference of the mean decision variables over the root of the mean of their variances. A pair of images is judged by the
    template of those outside its fold: few pairs lower d', as they teach little. Image n of both stacks may share its
    background. Raises ValueError with fewer than 2 K + 2 pairs.

    Source: Barrett & Myers, "Foundations of Image Science", 2004, section 14.3; Diaz et al. (2015).
    """
    if len(absent) != len(present) or len(absent) < 2 * len(channels) + 2:
        raise ValueError(f"{len(channels)} channels need at least {2 * len(channels) + 2} pairs")
    outputs = channel_outputs(absent, channels), channel_outputs(present, channels)
    count = min(FOLDS, len(absent))
    fold, folds = np.arange(len(absent)) % count, np.arange(count)
    left_out = np.array([_of_folds(*outputs, fold, folds[folds != own]) for own in folds])
    return Detectability(_of_folds(*outputs, fold, folds), left_out)
