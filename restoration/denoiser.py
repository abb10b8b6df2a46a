"""The one signature of everything that restores an image: posterior mean, posterior samples, BM3D."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from preprocessing.noise import NoiseModel


@dataclass(frozen=True)
class Restoration:
    """A restored image, and how it was made."""

    products: np.ndarray  # (K, H, W) float32, in the image's units: one estimate of it, or K posterior samples
    level: float | None = None  # noise level of the image, as a model sees it
    factor: float = 1.0  # what the input was multiplied by to have the noise that the model knows
    strength: float = 1.0  # mean share of the model's correction that was applied, inside the breast

    @property
    def pixels(self) -> np.ndarray:
        """The estimate, or the mean of the samples: (H, W) float32."""
        return self.products.mean(0, dtype=np.float32)


# Restores a low dose (H, W), given its noise in the same units and a name, which keys whatever the denoiser draws.
Denoiser = Callable[[np.ndarray, NoiseModel, str], Restoration]
