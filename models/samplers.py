"""Samplers of a diffusion: DDIM and DPM-Solver++, and the noise they start from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from helper import seeded_generator


@dataclass
class ConditioningView:
    """What is known of degraded latents at every timestep alike."""

    seen: Tensor  # (N, C, H, W): what the network sees beside z_t
    level: Tensor  # (N,): noise level
    mean: Tensor  # (N, C, H, W): posterior mean; 0 for the plain diffusion
    scale: Tensor  # (N, C, 1, 1): deviation of the residual's principal components, 0 if it is not diffused; else 1


@dataclass
class Prediction:
    """What the network's output says about z_t, in float32."""

    x_start: Tensor  # (N, C, H, W): z_0, the diffused variable without noise
    eps: Tensor  # (N, C, H, W): the noise in z_t


def ddim_timesteps(timesteps: int, steps: int, spacing: str = "leading") -> Tensor:
    """The `steps` timesteps of a sampler out of `timesteps`, descending, (steps,) int64.

    "leading" is LDM's: multiples of T // steps, plus 1 if that leaves room, so it suits steps of at most T / 2;
    "trailing" counts down from T - 1 (Lin et al., 2024, arXiv:2305.08891, table 2). Raises ValueError for steps outside
    1..timesteps or an unknown spacing.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"DDIM needs between 1 and {timesteps} steps, not {steps}")
    if spacing == "leading":
        ratio = timesteps // steps
        return torch.arange(steps).flip(0) * ratio + (1 if ratio > 1 else 0)
    if spacing == "trailing":
        return (timesteps - torch.arange(steps, dtype=torch.float64) * timesteps / steps).round().long() - 1
    raise ValueError(f"DDIM spacing must be leading or trailing, not {spacing!r}")


class DDIMSampler:
    """DDIM (Song et al., 2021, arXiv:2010.02502, eq. 12) over a model with `alphas_cumprod` and `predict(z, t, view)`.

    `final_alpha_cumprod` is abar after the last step: 1 returns the predicted z_0; LDM's own sampler keeps
    alphas_cumprod[0], which leaves noise of 0.039 in the result.
    """

    def __init__(self, model: nn.Module, spacing: str = "leading", final_alpha_cumprod: float = 1.0):
        self.model, self.spacing, self.final_alpha_cumprod = model, spacing, final_alpha_cumprod

    @staticmethod
    def step(
        x: Tensor, prediction: Prediction, abar: Tensor, previous: Tensor, eta: float, noise: Tensor | None
    ) -> Tensor:
        """One step from abar_t to abar of the previous timestep (scalars); `noise` like x, needed if eta > 0."""
        sigma = eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)).sqrt()
        x = previous.sqrt() * prediction.x_start + (1 - previous - sigma**2).clamp(min=0).sqrt() * prediction.eps
        return x if noise is None else x + sigma * noise

    @torch.no_grad()
    def sample(
        self,
        cond: ConditioningView,
        x_T: Tensor,
        steps: int = 50,
        eta: float = 0.0,
        draw: Callable[[], Tensor] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples (N, C, H, W) of z from unit noise x_T alike, by `steps` network evaluations.

        `eta` 0 is deterministic, 1 has the variance of the ancestral sampler; above 0, `draw` returns unit noise like x_T for
        every step. Raises ValueError for an impossible number of steps, or `eta` above 0 without `draw`.
        """
        if eta > 0 and draw is None:
            raise ValueError("DDIM with eta > 0 needs a source of noise")
        alphas_cumprod = self.model.alphas_cumprod
        schedule = ddim_timesteps(len(alphas_cumprod), steps, self.spacing)
        # one transfer ahead of the loop: indexing by a host number inside it would not synchronise, reading back would
        abars = alphas_cumprod[schedule.to(alphas_cumprod.device)]
        previous = F.pad(abars[1:], (0, 1), value=self.final_alpha_cumprod)
        x = x_T
        for i, t in enumerate(tqdm(schedule.tolist(), desc="DDIM", leave=False, disable=not progress)):
            prediction = self.model.predict(x, torch.full((len(x),), t, device=x.device), cond)
            x = self.step(x, prediction, abars[i], previous[i], eta, draw() if eta > 0 else None)
        return x


def dpm_timesteps(alphas_cumprod: Tensor, steps: int) -> Tensor:
    """The `steps` timesteps, descending from the last, (steps,) int64, evenly spaced in half the logarithm of the SNR.

    Raises ValueError for steps of which two would meet at one timestep.
    """
    half_log_snr = torch.logit(alphas_cumprod.double()).cpu() / 2  # descending
    wanted = torch.linspace(float(half_log_snr[-1]), float(half_log_snr[0]), steps, dtype=torch.float64)
    timesteps = (half_log_snr - wanted[:, None]).abs().argmin(1)
    if not 1 <= steps <= len(alphas_cumprod) or len(timesteps.unique()) < steps:
        raise ValueError(f"DPM-Solver++ has no {steps} different timesteps to take; ask for fewer")
    return timesteps


class DPMSolverSampler:
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv:2211.01095, algorithm 2): few steps, each with what the last one saw.

    With lambda = log(sqrt(abar) / sqrt(1 - abar)), h the step in it and r the last step over this one,
    D = (1 + 1 / (2 r)) z_0 - 1 / (2 r) z_0' and z' = sigma' / sigma z - alpha' (exp(-h) - 1) D.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def sample(self, cond: ConditioningView, x_T: Tensor, steps: int = 8, progress: bool = False) -> Tensor:
        """Samples (N, C, H, W) of z from unit noise x_T alike, by `steps` network evaluations; see `DDIMSampler.sample`."""
        alphas_cumprod = self.model.alphas_cumprod
        schedule = dpm_timesteps(alphas_cumprod, steps)
        abars = alphas_cumprod.double().cpu()[schedule]
        alpha, sigma, lambdas = abars.sqrt().tolist(), (1 - abars).sqrt().tolist(), (torch.logit(abars) / 2).tolist()
        x, last = x_T, None
        for i, t in enumerate(tqdm(schedule.tolist(), desc="DPM-Solver++", leave=False, disable=not progress)):
            x_start = self.model.predict(x, torch.full((len(x),), t, device=x.device), cond).x_start
            if i == steps - 1:
                return x_start  # the step to no noise at all
            h, estimate = lambdas[i + 1] - lambdas[i], x_start
            if last is not None:
                inverse_2r = h / (lambdas[i] - lambdas[i - 1]) / 2
                estimate = (1 + inverse_2r) * x_start - inverse_2r * last
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * estimate
            last = x_start
        return x


@dataclass(frozen=True)
class NoiseField:
    """Unit Gaussian noise over an unbounded lattice of latents, keyed by `key` and by position.

    A latent's noise is the same in whichever window or tile it is drawn, and no other image's.
    """

    key: tuple[object, ...]
    channels: int

    BLOCK: ClassVar[int] = 32  # side of the squares that are drawn at once

    def window(self, draw: int, top: int, left: int, height: int, width: int, device: torch.device) -> Tensor:
        """Draw number `draw` of rows top..top + height and columns left..left + width: (channels, height, width)."""
        block = self.BLOCK
        rows, columns = (range(at // block, -(-(at + side) // block)) for at, side in ((top, height), (left, width)))
        lattice = torch.cat([torch.cat([self._block(draw, r, c, device) for c in columns], 2) for r in rows], 1)
        top, left = top - rows[0] * block, left - columns[0] * block
        return lattice[:, top : top + height, left : left + width]

    def _block(self, draw: int, row: int, column: int, device: torch.device) -> Tensor:
        generator = seeded_generator("noise field", *self.key, draw, row, column, device=device)
        return torch.randn(self.channels, self.BLOCK, self.BLOCK, generator=generator, device=device)


@dataclass(frozen=True)
class Sampling:
    """How posterior samples are drawn."""

    sampler: str = "ddim"  # or "dpm++"
    steps: int = 50  # network evaluations a sample
    eta: float = 0.0  # of DDIM
    spacing: str = "leading"  # of DDIM

    def __str__(self) -> str:
        return f"{'DDIM' if self.sampler == 'ddim' else 'DPM-Solver++'} {self.steps}"
