"""The generalised Anscombe transform: Poisson-Gaussian noise to unit variance, and back."""

from __future__ import annotations

from torch import Tensor

from preprocessing.degrade import NoiseModel


def _dark_variance(noise: NoiseModel) -> Tensor | float:
    """What stands beside x / N under the root: 3 / (8 N^2) + sigma^2."""
    return 0.375 / noise.quanta**2 + noise.sigma**2


def stabilize(image: Tensor, noise: NoiseModel) -> Tensor:
    """Images in [0, 1] to units of their noise's standard deviation, 0 staying 0.

    2 sqrt(N x + 3/8 + (N sigma)^2) less its value at x = 0, in a form that loses no digits if N is large: without quantum
    noise it is x / sigma. `noise` holds floats, or tensors that broadcast against the image, and some noise: at noise level
    0 there is no unit.

    Source: Starck, Murtagh & Bijaoui, "Image Processing and Data Analysis", 1998, section 2.3; as written by Makitalo &
    Foi, "Optimal inversion of the generalized Anscombe transformation for Poisson-Gaussian noise", IEEE TIP 2013, eq. 3.
    """
    dark = _dark_variance(noise)
    return 2 * image / ((image / noise.quanta + dark).clamp(min=0).sqrt() + dark**0.5)


def unstabilize(values: Tensor, noise: NoiseModel) -> Tensor:
    """Algebraic inverse of `stabilize`: right for an estimate of `stabilize(x)`, biased for one of E[stabilize(y)].

    Below 0, where no image is, it goes on as an odd function.
    """
    return values * _dark_variance(noise) ** 0.5 + values.abs() * values / (4 * noise.quanta)
