"""Low-dose simulation: of clean images in [0, 1] at a noise level, and of real full-dose images at a fraction of their dose."""

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


def simulate_dose(
    image: torch.Tensor, fraction: float, noise: NoiseModel, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Bring a measured image to a fraction g of its dose: its signal times g, and the noise that is missing then.

    The missing noise has the variance g (1 - g) |gain| s of the quanta, correlated as they are, and (1 - g^2) sigma^2 of the
    electronics. s is the measured signal with its own noise, at least 0: it is so in the binomial thinning of Poisson counts,
    and the variance, which is linear in s, has no bias. Structural noise scales with the signal. Gain and electronics know of
    no dose: the result has the noise of the same `noise`, in mean, variance and spectrum.

    Args:
        image: (..., H, W) in any units, floating point.
        fraction: g, above 0 and at most 1, which returns the values as they are.
        noise: that of the image, in its units; its kernel is (k, k), if it has one.
        generator: source of randomness, on the image's device; the global one if None.

    Returns: a tensor like `image`, not rounded or clamped; at the brightness of the whole dose its noise is `noise.of_dose`.
    Raises: ValueError for an impossible fraction, or an image that is not floating point.
    Source: Borges et al., "Method for simulating dose reduction in digital mammography using the Anscombe transformation",
    Med. Phys. 2016.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
    if not image.is_floating_point():
        raise ValueError(f"simulate_dose needs a floating-point image, not {image.dtype}")
    like = dict(generator=generator, device=image.device, dtype=image.dtype)
    quantum = (fraction * (1 - fraction) * abs(noise.gain) * noise.signal(image).clamp(min=0)).sqrt()
    electronic = (1 - fraction**2) ** 0.5 * noise.sigma
    missing = quantum * unit_noise(image.shape, noise.kernel, **like)
    missing += electronic * unit_noise(image.shape, None if noise.electronic_is_white else noise.kernel, **like)
    return image - (1 - fraction) * (image - noise.offset) + noise.sign * missing
