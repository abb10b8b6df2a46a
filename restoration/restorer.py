"""The two trained stages: degraded images in, their posterior mean or posterior samples out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import LatentDiffusion, LatentEncoder, make_diffusion, sample_latents
from helper import UserError
from hps import HParams
from models import precision
from models.samplers import NoiseField, Sampling, dpm_timesteps
from preprocessing.noise import UNIT_NOISE, NoiseModel
from restoration.denoiser import Restoration
from running.checkpoints import Checkpoint, build_model, load_checkpoint, load_weights, weights_digest
from vqvae2_wrapper import VQVAE2Wrapper, load_vqvae

TILE_CROPS = 7  # sides of training crops that make the side of a tile: the larger it is, the less overlaps cost


def check_first_stage(checkpoint: Checkpoint, path: Path, digest: str, vqvae_path: Path) -> None:
    """Raises UserError unless the diffusion checkpoint at `path` was trained on the first stage with this digest."""
    if checkpoint.extra.get("first_stage") != digest:
        raise UserError(f"--vqvae-path {vqvae_path}: {path} was trained on another VQ-VAE-2; pass that one")


def load_averages(model: LatentDiffusion, checkpoint: Checkpoint, path: Path) -> None:
    """Load a diffusion checkpoint with the EMA of its weights in place of the weights. Raises UserError if they do not fit."""
    load_weights(model, checkpoint.model, path)
    if checkpoint.extra.get("averaged"):  # main-export.py has done it
        return
    prefix = "averaged.module."
    try:
        ema = {key.removeprefix(prefix): v for key, v in checkpoint.training["ema"].items() if key.startswith(prefix)}
    except (KeyError, AttributeError):
        raise UserError(f"{path}: holds no EMA weights; use the checkpoint before it") from None
    # statistics are measured on the model, and its averages see them with the next step
    load_weights(model, ema | dict(model.named_buffers()), path)


@dataclass
class Restorer:
    """Both trained stages: degraded images in, their posterior mean or posterior samples out."""

    first_stage: VQVAE2Wrapper
    model: LatentDiffusion  # with the averaged weights
    hps: HParams  # of the diffusion checkpoint
    samples: int = 0  # posterior samples; 0: the posterior mean
    sampling: Sampling = Sampling()
    seed: int = 0
    name: str = ""  # of the model, for a derived image's description
    amp: torch.dtype | None = None  # half precision in the UNets, and nowhere else: the decoder alone would lose 2 dB

    def __post_init__(self):
        self.model.eval()
        if self.amp is not None:
            for unet in self.model.unets:
                precision.keep_in(unet, self.amp)

    @classmethod
    def load(
        cls,
        vqvae_path: Path,
        load_path: Path,
        device: torch.device,
        *,
        samples: int = 0,
        sampler: str = "ddim",
        steps: int | None = None,
        seed: int = 0,
        amp: torch.dtype | None = None,
    ) -> Restorer:
        """The stages of two checkpoints. `steps` None is the checkpoint's number for the `sampler`, `ddim` or `dpm++`.

        Raises UserError if the checkpoints cannot be read or do not belong together, or the model lacks what is asked of it.
        """
        vqvae, _ = load_vqvae(vqvae_path)
        digest = weights_digest(vqvae)
        checkpoint = load_checkpoint(load_path, "diffusion", lazily=True)
        check_first_stage(checkpoint, load_path, digest, vqvae_path)
        model = build_model(make_diffusion, checkpoint, load_path)
        load_averages(model, checkpoint, load_path)
        if not samples and not model.has_mean:
            raise UserError(f"{load_path}: a plain diffusion (precondition=none) has no posterior mean; pass --sample")
        if samples and not model.has_samples:
            remedy = "go on with it, or leave --sample and --samples out"
            raise UserError(f"{load_path}: its training ended before the diffusion; {remedy}")
        name = f"VQ-VAE-2 {digest[:8]}, latent diffusion {weights_digest(model)[:8]}"
        sampling = sampling_of(checkpoint.hps, sampler, steps)
        if samples and sampler == "dpm++":
            try:
                dpm_timesteps(model.alphas_cumprod, sampling.steps)
            except ValueError as error:
                raise UserError(f"--steps {sampling.steps}: {error}") from None
        restorer = cls(VQVAE2Wrapper(vqvae), model, checkpoint.hps, samples, sampling, seed, name, amp)
        for module in (restorer.first_stage, model):  # once half precision has halved the UNets
            module.to(device)
        return restorer

    def drawing(self, samples: int, sampler: str, steps: int | None = None) -> Restorer:
        """The restorer that draws so many posterior samples by a `sampler`, in its own number of steps or in `steps`."""
        return replace(self, samples=samples, sampling=sampling_of(self.hps, sampler, steps))

    @property
    def product(self) -> str:
        """What is made of an image, in words."""
        if not self.samples:
            return "posterior mean"
        what = "posterior sample" if self.samples == 1 else f"mean of {self.samples} posterior samples"
        return f"{what}, {self.sampling}"

    @property
    def evaluations(self) -> int:
        """Network evaluations a tile: one of the posterior mean's, the others of the diffusion's."""
        return self.model.has_mean + self.samples * self.sampling.steps

    @property
    def noise(self) -> NoiseModel:
        """What degraded the images that the model was trained on."""
        return NoiseModel.from_level(self.hps.noise_level)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the training grid."""
        return tuple(self.hps.image_shape[1:])

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width up to which an image is restored in one piece: the training grid, or some crops of training."""
        return (TILE_CROPS * self.hps.crop_size,) * 2 if self.hps.crop_size else self.shape

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.alphas_cumprod.device

    @property
    def scale(self) -> int:
        """Pixels whose multiples tiles start at, for every pyramid level to see a tile as it sees the whole image."""
        return math.lcm(self.first_stage.vqvae.scale, self.first_stage.vqvae.scaling_rates[0] * self.model.model.stride)

    @property
    def least_tile(self) -> int:
        """Least side of a tile in pixels."""
        return 2 * self.scale

    @property
    def stabilized(self) -> bool:
        """Whether the model works in units of the noise, and so restores images of any noise it is told."""
        return self.first_stage.vqvae.stabilize

    @property
    def level_range(self) -> tuple[float, float]:
        """Least and greatest noise level that the model was trained at."""
        return tuple(self.hps.noise_levels) or (self.hps.noise_level,) * 2

    @torch.no_grad()
    def restore(
        self,
        values: Tensor,
        name: str,
        *,
        level: float | None = None,
        origin: tuple[int, int] = (0, 0),
        progress: bool = False,
    ) -> Tensor:
        """Restore values (1, 1, H, W): returns (1, K, H, W), their posterior mean (K = 1) or K samples.

        They are an image in units of its noise, which is white, or for models that are not stabilised in [0, 1]. The networks
        are told `level`; None: that of the training. `name` keys the samplers' noise, `origin` is the place in pixels of the
        first row and column on it.
        """
        level = self.hps.noise_level if level is None else level
        rate = self.first_stage.vqvae.scaling_rates[0]
        height, width = values.shape[-2:]
        padded = F.pad(values, (0, -width % self.scale, 0, -height % self.scale), mode="replicate")
        encoder = LatentEncoder(self.first_stage, self.model)
        cond = encoder.encode(padded, UNIT_NOISE)
        field = NoiseField((self.seed, name), self.first_stage.latent_channels)
        with torch.autocast(values.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            view = self.model.view(cond, torch.full((1,), level, device=values.device))
            drawn = dict(origin=(origin[0] // rate, origin[1] // rate), progress=progress)
            latents = [
                sample_latents(self.model, view, [field], self.sampling, number=number, **drawn)
                for number in range(self.samples)
            ] or [view.mean]
        images = [encoder.decode(z, padded.shape[-2:], UNIT_NOISE) for z in latents]
        return torch.cat(images, dim=1)[..., :height, :width]

    def restore_in_one_piece(
        self, image: np.ndarray, noise: NoiseModel, name: str, *, progress: bool = False
    ) -> Restoration:
        """The `Denoiser` of images (H, W) like those of the training, in size and noise, for models that are not stabilised."""
        products = self.restore(torch.from_numpy(image)[None, None].to(self.device), name, progress=progress)
        return Restoration(products[0].float().clamp(0, 1).cpu().numpy(), self.hps.noise_level)


def sampling_of(hps: HParams, sampler: str, steps: int | None = None) -> Sampling:
    """The sampler of a model, with its own number of steps or with `steps`. Raises UserError if it has not so many."""
    if steps is not None and steps > hps.timesteps:
        raise UserError(f"--steps {steps}: the model has {hps.timesteps} timesteps; pass at most as many")
    own = hps.ddim_steps if sampler == "ddim" else hps.fast_steps
    return Sampling(sampler, steps or own, hps.ddim_eta, hps.ddim_spacing)
