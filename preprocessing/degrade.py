"""Low-dose simulation in the signal domain: Poisson quanta and Gaussian electronic noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

QUANTA_AT_LEVEL_ONE = 1000.0  # mean quanta per pixel at full scale when noise_level is 1
ELECTRONIC_SIGMA_AT_LEVEL_ONE = 0.05  # standard deviation of the electronic noise, in units of full scale


@dataclass(frozen=True)
class NoiseModel:
    """Poisson-Gaussian noise of a given level: Var[y | x] = x / quanta + sigma**2, for x in [0, 1].

    Source: the Poisson-Gaussian model of Foi et al., "Practical Poissonian-Gaussian noise modeling and fitting for
    single-image raw-data", IEEE TIP 2008, eq. 1-3. Both may be tensors that broadcast against the image.
    """

    quanta: float | torch.Tensor  # mean quanta per pixel at full scale; infinite at noise level 0
    sigma: float | torch.Tensor  # standard deviation of the electronic noise

    @classmethod
    def from_level(cls, noise_level: float) -> NoiseModel:
        """The model at `noise_level` >= 0: 1000 / level quanta, sigma 0.05 * level. Raises ValueError if negative."""
        if not 0 <= noise_level < float("inf"):
            raise ValueError(f"noise_level must be a finite number of at least 0, not {noise_level}")
        quanta = QUANTA_AT_LEVEL_ONE / noise_level if noise_level else float("inf")
        return cls(quanta, ELECTRONIC_SIGMA_AT_LEVEL_ONE * noise_level)

    @classmethod
    def of_levels(cls, levels: torch.Tensor) -> NoiseModel:
        """The models at noise levels (N,), all above 0, as tensors (N, 1, 1, 1) that broadcast against (N, C, H, W)."""
        levels = levels.float()[:, None, None, None]
        return cls(QUANTA_AT_LEVEL_ONE / levels, ELECTRONIC_SIGMA_AT_LEVEL_ONE * levels)

    def variance(self, image: torch.Tensor) -> torch.Tensor:
        """Noise variance at every pixel of a clean `image` of any shape, before clamping."""
        return image / self.quanta + self.sigma**2


def simulate_low_dose(
    image: torch.Tensor, noise_level: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw a low-dose version of a full-dose image: Poisson(N x) / N + sigma n, clamped to [0, 1].

    Args:
        image: linear intensity in [0, 1], any shape, floating point.
        noise_level: at level s the mean number of quanta at full scale is N = 1000 / s and sigma = 0.05 s; 0 returns the
            image itself.
        generator: source of randomness, on the image's device; the global one if None.

    Returns: a tensor like `image`, in [0, 1].
    Raises: ValueError for a negative or infinite noise level, or an image that is not floating point.
    Source: the Poisson-Gaussian model of Foi et al. (2008), eq. 1-3.
    """
    if not image.is_floating_point():
        raise ValueError(f"simulate_low_dose needs a floating-point image in [0, 1], not {image.dtype}")
    model = NoiseModel.from_level(noise_level)
    if noise_level == 0:
        return image
    quanta = torch.poisson(image.clamp(min=0) * model.quanta, generator=generator)
    noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
    return (quanta / model.quanta + model.sigma * noise).clamp_(0, 1)
