"""The trained VQ-VAE-2 as the frozen first stage of a latent diffusion model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from preprocessing.degrade import NoiseModel
from preprocessing.stabilize import stabilize, unstabilize
from running.checkpoints import Checkpoint, build_model, load_checkpoint, load_weights
from vqvae import VQVAE

REFERENCE_LEVEL = 0.2  # noise level at which a stabilised image is divided by its full scale, and lies in [0, 1] again
FULL_SCALE = float(stabilize(torch.ones(()), NoiseModel.from_level(REFERENCE_LEVEL)))


def to_domain(image: Tensor, noise: NoiseModel | None) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as a first stage of `stabilize=True` sees them: noise of unit variance, over a constant.

    With `noise` None, that of a first stage of `stabilize=False`, the image itself.
    """
    return image if noise is None else stabilize(image, noise) / FULL_SCALE


def from_domain(values: Tensor, noise: NoiseModel | None) -> Tensor:
    """Inverse of `to_domain`."""
    return values if noise is None else unstabilize(values * FULL_SCALE, noise)


def load_vqvae(path: Path) -> tuple[VQVAE, Checkpoint]:
    """The VQ-VAE-2 of a stage-1 checkpoint, built from the settings it carries; raises UserError where it is none."""
    checkpoint = load_checkpoint(path, "vqvae")
    vqvae = build_model(lambda hps: VQVAE(**hps.arguments(VQVAE)), checkpoint, path)
    load_weights(vqvae, checkpoint.model, path)
    return vqvae, checkpoint


class VQVAE2Wrapper(nn.Module):
    """Freezes a `VQVAE`; latents are its finest features before quantisation (Rombach et al., 2022, section 3.1).

    `noise` is what images suffer from, by image: a first stage trained with `stabilize` encodes them in units of it, others
    take no notice.
    """

    def __init__(self, vqvae: VQVAE):
        super().__init__()
        self.vqvae = vqvae.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VQVAE2Wrapper:
        """Stays in evaluation mode: training mode would go on updating the codebooks."""
        return super().train(False)

    @property
    def latent_channels(self) -> int:
        return self.vqvae.hidden_channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, H', W') of the latent of a height x width image."""
        scale, rate = self.vqvae.scale, self.vqvae.scaling_rates[0]
        return self.latent_channels, -(-height // scale) * scale // rate, -(-width // scale) * scale // rate

    @torch.no_grad()
    def encode(self, x: Tensor, noise: NoiseModel | None = None) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to latents (N, hidden_channels, H / r, W / r), r the finest scaling rate.

        Raises ValueError where a stabilised first stage is not told the noise.
        """
        return self.vqvae.encode(to_domain(x, self._known(noise)))

    @torch.no_grad()
    def decode(
        self,
        z: Tensor,
        quantize: bool = False,
        shape: tuple[int, int] | None = None,
        noise: NoiseModel | None = None,
    ) -> Tensor:
        """Latents back to images (N, C, H, W), past the codebooks or, with `quantize`, through them; see `VQVAE.decode`."""
        return from_domain(self.vqvae.decode(z, quantize, shape).reconstruction, self._known(noise))

    def _known(self, noise: NoiseModel | None) -> NoiseModel | None:
        if not self.vqvae.stabilize:
            return None
        if noise is None:
            raise ValueError("a stabilised first stage needs to know the noise")
        return noise

    @torch.no_grad()
    def codes(self, z: Tensor) -> list[Tensor]:
        """Code indices of latents: per level, finest first, (N, h, w) int64."""
        return self.vqvae.decode(z, True).indices
