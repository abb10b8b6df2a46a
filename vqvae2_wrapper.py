"""The trained VQ-VAE-2 as the frozen first stage of a latent diffusion model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from preprocessing.noise import NoiseModel
from running.checkpoints import Checkpoint, build_model, load_checkpoint, load_weights
from vqvae import VQVAE


def load_vqvae(path: Path) -> tuple[VQVAE, Checkpoint]:
    """The VQ-VAE-2 of a stage-1 checkpoint, built from the settings it carries; raises UserError if it is none."""
    checkpoint = load_checkpoint(path, "vqvae")
    vqvae = build_model(lambda hps: VQVAE(**hps.arguments(VQVAE)), checkpoint, path)
    load_weights(vqvae, checkpoint.model, path)
    return vqvae, checkpoint


class VQVAE2Wrapper(nn.Module):
    """Freezes a `VQVAE`; latents are its finest features before quantisation (Rombach et al., 2022, section 3.1).

    `noise` is that of the images: a first stage trained with `stabilize` must know it, others ignore it (`VQVAE.to_domain`).
    """

    def __init__(self, vqvae: VQVAE):
        super().__init__()
        self.vqvae = vqvae.requires_grad_(False)

    @property
    def latent_channels(self) -> int:
        return self.vqvae.hidden_channels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, H', W') of the latent of a height x width image."""
        scale, rate = self.vqvae.scale, self.vqvae.scaling_rates[0]
        return self.latent_channels, -(-height // scale) * scale // rate, -(-width // scale) * scale // rate

    @torch.no_grad()
    def encode(self, images: Tensor, noise: NoiseModel | None = None) -> Tensor:
        """Images (N, C, H, W) in [0, 1] to latents (N, hidden_channels, H / r, W / r), r the finest scaling rate."""
        return self.vqvae.encode(self.vqvae.to_domain(images, noise))

    @torch.no_grad()
    def decode(
        self, z: Tensor, quantize: bool = False, shape: tuple[int, int] | None = None, noise: NoiseModel | None = None
    ) -> Tensor:
        """Latents back to images (N, C, H, W), past the codebooks or, with `quantize`, through them; see `VQVAE.decode`."""
        return self.vqvae.from_domain(self.vqvae.decode(z, quantize, shape).reconstruction, noise)

    @torch.no_grad()
    def codes(self, z: Tensor) -> list[Tensor]:
        """Code indices of latents: per pyramid level, finest first, (N, h, w) int64."""
        return self.vqvae.decode(z, True).indices
