"""Low-dose simulation: Poisson quanta and Gaussian electronic noise of full-dose images in [0, 1]."""

from __future__ import annotations

import torch

from preprocessing.noise import QUANTA_AT_LEVEL_ONE, NoiseModel, unit_noise


def simulate_low_dose(
    image: torch.Tensor,
    noise_level: float,
    generator: torch.Generator | None = None,
    kernel: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw a low-dose version of a full-dose image: Poisson(N x) / N + sigma n, clamped to [0, 1].

    Args:
        image: linear intensity in [0, 1], any shape, floating point; (..., H, W) with a kernel.
        noise_level: at level s the mean number of quanta at full scale is N = 1000 / s and sigma = 0.05 s; 0 returns the
            image itself.
        generator: source of randomness, on the image's device; the global one if None.
        kernel: (k, k) that correlates the noise, which is Gaussian then, of the same variance; None: it is white.

    Returns: a tensor like `image`, in [0, 1].
    Raises: ValueError for a negative or infinite noise level, or an image that is not floating point.
    Source: the Poisson-Gaussian model of Foi et al. (2008), eq. 1-3.
    """
    if not image.is_floating_point():
        raise ValueError(f"simulate_low_dose needs a floating-point image in [0, 1], not {image.dtype}")
    model = NoiseModel.from_level(noise_level)
    if noise_level == 0:
        return image
    like = dict(generator=generator, device=image.device, dtype=image.dtype)
    if kernel is not None:
        return (image + model.variance(image).sqrt() * unit_noise(image.shape, kernel, **like)).clamp_(0, 1)
    quanta = QUANTA_AT_LEVEL_ONE / noise_level
    counts = torch.poisson(image.clamp(min=0) * quanta, generator=generator)
    return (counts / quanta + model.sigma * unit_noise(image.shape, None, **like)).clamp_(0, 1)
