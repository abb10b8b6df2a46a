"""Stage 2: `UNet`, `LatentDiffusion`, `DDIMSampler`, `DPMSolverSampler` and `LitEma`.

`LatentDiffusion` diffuses what a first network, the posterior mean, leaves unknown of the clean latent. The `UNet` of both
stands in `unet.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from helper import seeded_generator
from hps import HParams
from unet import UNet

FILTER_TAPS = 5  # side, in latents, of the neighbourhood that the linear estimate looks at
LEVEL_KNOTS = 5  # noise levels, between the least and the greatest, at which statistics are measured
LOCAL_RADIUS = 4  # latents; radius of the box whose mean, taken twice, is the local mean
OUTLIER = 16.0  # mean square, in units of the noise's, from which on what the linear estimate takes away is no noise
LEAST_DEVIATION = 1e-2  # of the largest: principal components of the residual below it are not diffused


def make_betas(schedule: str, timesteps: int, linear_start: float, linear_end: float) -> Tensor:
    """Noise variances beta_t, (timesteps,) float64. "linear" is LDM's: linear in sqrt(beta). Raises ValueError otherwise."""
    if schedule != "linear":
        raise ValueError(f"beta_schedule must be linear, not {schedule!r}")
    return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2


def local_mean(x: Tensor) -> Tensor:
    """Mean of (N, C, H, W) around every position: a box of radius `LOCAL_RADIUS`, twice, borders repeated."""
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x, (LOCAL_RADIUS,) * 4, mode="replicate"), 2 * LOCAL_RADIUS + 1, stride=1)
    return x


def _compressed(x: Tensor) -> Tensor:
    """2 asinh(x / 2): 50 standard deviations still tell where an edge is, and do not drown the rest."""
    return 2 * torch.asinh(x / 2)


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """A matrix (K, C) applied to the channels of (N, C, H, W)."""
    return F.conv2d(x, matrix[:, :, None, None])


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Entries (N, 1, 1, 1) of a table (T,) at timesteps (N,)."""
    return table[t][:, None, None, None]


def _level_shares(level: Tensor, knots: Tensor) -> Tensor:
    """Shares (N, K) of noise levels in levels (N,), `knots` (K,) being their logarithms: linear between the two nearest."""
    if len(knots) == 1:
        return torch.ones(len(level), 1, device=knots.device)
    place = (level.to(knots).log2() - knots[0]) / (knots[1] - knots[0])
    place = place.clamp(0, len(knots) - 1)
    return (1 - (place[:, None] - torch.arange(len(knots), device=knots.device)).abs()).clamp(min=0)


@dataclass
class LinearView:
    """What a linear filter says about a degraded latent; all normalised."""

    degraded: Tensor  # (N, C, H, W): the degraded latent, whitened
    noise: Tensor  # (N, C, H, W): what the filter takes for noise, in deviations of the noise
    estimate: Tensor  # (N, C, H, W): the clean latent by its account
    error: Tensor  # (N, 1, 1, 1): rms error of that estimate


class LinearEstimate(nn.Module):
    """A Wiener filter of normalised latents, fitted by least squares at several noise levels.

    It looks at what the degraded latent deviates from its local mean. Where it would take away far more than the noise, as
    on an edge, the degraded latent stands.
    """

    def __init__(self, channels: int, levels: tuple[float, float]):
        super().__init__()
        low, high = levels
        knots = LEVEL_KNOTS if high > low else 1
        self.register_buffer("log_levels", torch.linspace(math.log2(low), math.log2(high), knots))
        self.register_buffer("degradation_scale", torch.ones(()))  # rms of degraded - clean
        self.register_buffer("whitening", torch.eye(channels))  # of degraded latents
        self.register_buffer("local_whitening", torch.eye(channels))  # of deviations from the local mean
        self.register_buffer("noise_filter", torch.zeros(knots, channels, FILTER_TAPS**2 * channels))
        self.register_buffer("error", torch.ones(knots))  # rms error of the estimate

    def forward(self, cond: Tensor, level: Tensor) -> LinearView:
        """The view of degraded latents (N, C, H, W) of noise levels (N,)."""
        mean, share = local_mean(cond), _level_shares(level, self.log_levels)
        noise = self._noise(cond - mean, share)
        fine, coarse = _mixed(cond - mean, self.local_whitening), _mixed(mean, self.whitening)
        excess = noise.square().mean(1, keepdim=True) / (OUTLIER * self.degradation_scale**2)
        return LinearView(
            # next to an edge deviations are too large to show noise
            degraded=_compressed(fine) + coarse,
            noise=_compressed(noise / self.degradation_scale),
            estimate=cond - noise * (1 - excess).clamp(min=0).square(),  # the biweight of Beaton and Tukey (1974)
            error=(share @ self.error.log()).exp()[:, None, None, None],
        )

    def _noise(self, deviations: Tensor, share: Tensor) -> Tensor:
        n, c, h, w = deviations.shape
        filters = torch.einsum("nk,kct->nct", share, self.noise_filter)
        filters = filters.unflatten(2, (c, FILTER_TAPS, FILTER_TAPS)).flatten(0, 1)
        padded = F.pad(deviations, (FILTER_TAPS // 2,) * 4, mode="replicate")
        return F.conv2d(padded.flatten(0, 1)[None], filters, groups=n).view(n, c, h, w)

    def fit(self, pairs: list[tuple[Tensor, Tensor]], levels: Sequence[Tensor]) -> None:
        """Fit to (clean, degraded) latents, each (N, C, H, W), of noise levels (N,), and measure the error.

        Weighted least squares from the neighbourhoods of deviations from the local mean to the noise, every position
        counting in inverse proportion to its own energy: edges are rare and large, and not what the filter is for.
        """
        knots, channels, taps = self.noise_filter.shape
        gram = torch.zeros(knots, taps, taps, dtype=torch.float64)
        cross = torch.zeros(knots, channels, taps, dtype=torch.float64)
        second = torch.zeros(channels, channels, dtype=torch.float64)
        floor = self.degradation_scale**2
        for (clean, degraded), level in zip(pairs, levels, strict=True):
            deviations = degraded - local_mean(degraded)
            rows = F.unfold(deviations, FILTER_TAPS, padding=FILTER_TAPS // 2)
            noise = (degraded - clean).flatten(2)
            weight = floor / (floor + rows.square().mean(1, keepdim=True))
            share = _level_shares(level, self.log_levels)
            for i in range(len(rows)):
                weighted, own = rows[i] * weight[i], deviations[i].flatten(1)
                a, b = weighted @ rows[i].t(), noise[i] @ weighted.t()
                second += (((own * weight[i]) @ own.t()) / (weight[i].sum() + 1e-12)).double().cpu()
                for knot in share[i].nonzero().flatten().tolist():
                    gram[knot] += float(share[i, knot]) * a.double().cpu()
                    cross[knot] += float(share[i, knot]) * b.double().cpu()
        # the latent fills but some directions of its channels: a ridge keeps the others at zero
        ridge = 1e-4 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(taps, dtype=torch.float64)
        solution = torch.linalg.solve(gram + ridge + 1e-12 * torch.eye(taps), cross.transpose(1, 2)).transpose(1, 2)
        self.noise_filter.copy_(solution)
        values, vectors = torch.linalg.eigh(second / max(1, sum(len(level) for level in levels)))
        least = 0.1 * values.clamp(min=0).mean() + 1e-12  # directions that the latent hardly fills stay small
        self.local_whitening.copy_((vectors * (values.clamp(min=0) + least).rsqrt()) @ vectors.t())
        squared = (self(d, level).estimate - c for (c, d), level in zip(pairs, levels, strict=True))
        error = _by_level([e.square().mean((1, 2, 3)) for e in squared], levels, self.log_levels)
        self.error.copy_(error.clamp(min=1e-8).sqrt())


def _by_level(values: Sequence[Tensor], levels: Sequence[Tensor], knots: Tensor) -> Tensor:
    """Means (K, ...) at knots of the noise level of values (N, ...) at levels (N,); at a knot that has none, that of all."""
    values, share = torch.cat(list(values)).float(), torch.cat([_level_shares(v, knots) for v in levels])
    total = share.sum(0).view(-1, *[1] * (values.ndim - 1))
    means = torch.einsum("nk,n...->k...", share, values) / total.clamp(min=1e-6)
    return torch.where(total > 0, means, values.mean(0))


@dataclass
class Prediction:
    """What the network's output says about z_t, in float32."""

    x_start: Tensor  # (N, C, H, W): z_0, the diffused variable without noise
    eps: Tensor  # (N, C, H, W): the noise in z_t


@dataclass
class ConditioningView:
    """What is known of degraded latents at every timestep alike."""

    seen: Tensor  # (N, C, H, W): what the network sees beside z_t
    level: Tensor  # (N,): noise level
    mean: Tensor  # (N, C, H, W): posterior mean; 0 for the plain diffusion
    scale: Tensor  # (N, C, 1, 1): deviation of the residual's principal components, 0 where none is diffused; else 1


@dataclass
class DiffusionLoss:
    """Training loss and what is worth logging beside it."""

    loss: Tensor  # scalar: what is minimised
    l_simple: Tensor  # scalar: unweighted MSE on what the parameterisation predicts


class Plain(nn.Module):
    """The diffused variable of the plain LDM: z = x, the normalised clean latent itself."""

    def view(self, cond: Tensor, level: Tensor) -> ConditioningView:
        """The network sees the degraded latent (N, C, H, W) as it is."""
        return ConditioningView(cond, level, torch.zeros_like(cond), torch.ones_like(cond[..., :1, :1]))

    def diffused(self, clean: Tensor, view: ConditioningView) -> Tensor:
        """z (N, C, H, W) of clean latents."""
        return clean

    def restored(self, z: Tensor, view: ConditioningView) -> Tensor:
        """The clean latents that z (N, C, H, W) stands for."""
        return z


class Residual(nn.Module):
    """The diffused variable z = U^T (x - m(c)) / s: what the posterior mean m of the degraded latent c leaves unknown.

    U holds the principal components of x - m(c), s their deviations at the noise level: of unit variance, z needs the
    schedule's whole range, where normalised latents, of deviation 1 and a residual of 0.01, make no use of it. The mean is a
    network of its own that adds to a linear estimate, x = linear(c) - error * F, and is trained first (predict and refine:
    Whang et al., CVPR 2022; posterior mean first: Ohayon et al., PMRF, 2024, arXiv:2410.00418, section 4).
    """

    def __init__(self, mean_model: nn.Module, channels: int, levels: tuple[float, float]):
        super().__init__()
        self.linear = LinearEstimate(channels, levels)
        self.mean_model = mean_model
        self.register_buffer("components", torch.eye(channels))  # U^T, a component a row
        self.register_buffer("deviations", torch.zeros(len(self.linear.log_levels), channels))  # s; 0: not measured yet

    def train(self, mode: bool = True) -> Residual:
        """Training mode, unless the posterior mean is frozen: dropout must not move what the residual is measured around."""
        return super().train(mode and any(p.requires_grad for p in self.mean_model.parameters()))

    def mean(self, cond: Tensor, level: Tensor) -> tuple[Tensor, LinearView]:
        """The posterior mean (N, C, H, W) of degraded latents of noise levels (N,), and the linear view it adds to."""
        with torch.autocast(cond.device.type, enabled=False):
            linear = self.linear(cond.float(), level)
        seen = torch.cat([linear.degraded, linear.noise], dim=1)
        output = self.mean_model(seen, torch.zeros_like(level), level.log2()).float()
        return linear.estimate - linear.error * output, linear

    def mean_loss(self, clean: Tensor, cond: Tensor, level: Tensor) -> Tensor:
        """Mean squared error of the posterior mean, in units of the linear estimate's: what the first phase minimises."""
        mean, linear = self.mean(cond, level)
        return ((mean - clean) / linear.error).square().mean()

    def view(self, cond: Tensor, level: Tensor) -> ConditioningView:
        """The network sees the degraded latent (N, C, H, W) whitened."""
        mean, linear = self.mean(cond, level)
        scale = (_level_shares(level, self.linear.log_levels) @ self.deviations)[:, :, None, None]
        return ConditioningView(linear.degraded, level, mean, scale)

    def diffused(self, clean: Tensor, view: ConditioningView) -> Tensor:
        """z (N, C, H, W) of clean latents."""
        z = _mixed(clean - view.mean, self.components) / view.scale.clamp(min=1e-12)
        return z * (view.scale > 0)

    def restored(self, z: Tensor, view: ConditioningView) -> Tensor:
        """The clean latents that z (N, C, H, W) stands for."""
        return view.mean + _mixed(view.scale * z, self.components.t())

    def measure(self, pairs: Iterable[tuple[Tensor, Tensor]], levels: Sequence[Tensor]) -> None:
        """Measure U and s on (clean, degraded) normalised latents, each (N, C, H, W), of noise levels (N,)."""
        covariances, seen = [], []
        for (clean, cond), level in zip(pairs, levels, strict=True):
            residual = (clean - self.mean(cond, level)[0]).flatten(2).double()
            covariances.append(residual @ residual.transpose(1, 2) / residual.shape[2])
            seen.append(level)
        by_level = _by_level(covariances, seen, self.linear.log_levels).double()
        # what is left at strong noise must not decide alone: every level counts by its own variance
        total = (by_level / by_level.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-12)[:, None, None]).mean(0)
        components = torch.linalg.eigh(total)[1].flip(1).t()
        variances = torch.einsum("pc,kcd,pd->kp", components, by_level, components).clamp(min=0)
        largest = variances.amax(1, keepdim=True)
        if not (largest > 0).all():
            raise ValueError(
                "nothing is unknown of these latents once the degraded ones are: there is nothing to sample"
            )
        self.components.copy_(components)
        self.deviations.copy_(variances.sqrt() * (variances.amax(0) > LEAST_DEVIATION**2 * largest.max()))


class LatentDiffusion(nn.Module):
    """Conditional diffusion of normalised latents (Ho et al., 2020, arXiv:2006.11239; Rombach et al., 2022).

    What is diffused, z, is a `Residual` around the posterior mean, which `mean_model` predicts, or with
    `precondition="none"` the latent itself (`Plain`). The network sees z_t and the degraded latent, concatenated, and predicts
    eps, v or z_0, as `parameterization` says.
    """

    def __init__(
        self,
        model: nn.Module,
        mean_model: nn.Module | None = None,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 0.0015,
        linear_end: float = 0.0195,
        parameterization: str = "eps",
        precondition: str = "residual",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        latent_channels: int | None = None,
        noise_level: float = 0.2,
        noise_levels: Sequence[float] = (),
    ):
        super().__init__()
        for name, value, words in (
            ("parameterization", parameterization, ("eps", "v", "x0")),
            ("precondition", precondition, ("residual", "none")),
        ):
            if value not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {value!r}")
        if (mean_model is None) == (precondition == "residual"):
            raise ValueError("precondition residual needs a network for the posterior mean, and none takes none")
        self.model = model
        self.parameterization = parameterization
        self.l_simple_weight, self.original_elbo_weight = l_simple_weight, original_elbo_weight
        betas = make_betas(beta_schedule, timesteps, linear_start, linear_end)
        alphas_cumprod = (1 - betas).cumprod(0)
        previous = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # weight of the bound at t: Ho et al. (2020), eq. 12; at t = 0, where the posterior has no variance, that of t = 1
        elbo = betas**2 / (2 * posterior_variance * (1 - betas) * (1 - alphas_cumprod))
        if timesteps > 1:
            elbo[0] = elbo[1]
        for name, value in dict(betas=betas, alphas_cumprod=alphas_cumprod, elbo_weights=elbo).items():
            self.register_buffer(name, value.float())
        channels = latent_channels or getattr(model, "out_channels", 1)
        self.register_buffer("latent_shift", torch.zeros(channels))  # mean of each latent channel
        self.register_buffer("latent_scale", torch.ones(()))  # standard deviation of the latent
        self.noise_level = noise_level  # of images whose level is not given
        levels = tuple(noise_levels) or (noise_level, noise_level)
        self.variable = Plain() if mean_model is None else Residual(mean_model, channels, levels)

    @property
    def unets(self) -> list[nn.Module]:
        """The networks: of the diffusion and, where there is one, of the posterior mean."""
        return [self.model, self.variable.mean_model] if self.has_mean else [self.model]

    @property
    def has_mean(self) -> bool:
        """Whether there is a network for the posterior mean."""
        return isinstance(self.variable, Residual)

    @property
    def has_samples(self) -> bool:
        """Whether what is to be sampled has been measured: the posterior mean is trained before."""
        return not self.has_mean or bool(self.variable.deviations.any())

    def normalize(self, latent: Tensor) -> Tensor:
        """First-stage latents (N, C, H, W) to zero mean by channel and unit variance overall."""
        return (latent - self.latent_shift[:, None, None]) / self.latent_scale

    def denormalize(self, x: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return x * self.latent_scale + self.latent_shift[:, None, None]

    @torch.no_grad()
    def measure_statistics(
        self, pairs: Iterable[tuple[Tensor, Tensor]], levels: Sequence[Tensor] | None = None
    ) -> None:
        """Set shift and scale, and fit the linear estimate, from (clean, degraded) first-stage latents, each (N, C, H, W).

        `levels` (N,) are the noise levels of each pair; None: all are `noise_level`. Raises ValueError where there are no
        pairs or the latents are constant.
        """
        count, total, square, noise = 0, 0.0, 0.0, 0.0
        pairs = list(pairs)  # what is fitted is normalised by all of them
        for clean, degraded in pairs:
            vectors = clean.double().transpose(0, 1).flatten(1)
            count += vectors.shape[1]
            total = total + vectors.sum(1)
            square = square + vectors @ vectors.t()
            noise = noise + (degraded - clean).double().square().sum()
        if count == 0:
            raise ValueError("no latents to measure the normalisation on")
        mean = total / count
        covariance = square / count - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0).mean()
        if variance <= 0:
            raise ValueError("the latents are constant: nothing to normalise")
        self.latent_shift.copy_(mean)
        self.latent_scale.copy_(variance.sqrt())
        if not self.has_mean:
            return
        linear = self.variable.linear
        rms = (noise / (count * len(mean)) / variance).sqrt().clamp(min=1e-3)  # noise level 0 must not divide by zero
        linear.degradation_scale.copy_(rms)
        values, vectors = torch.linalg.eigh(covariance / variance)
        linear.whitening.copy_((vectors * (values.clamp(min=0) + rms**2).rsqrt()) @ vectors.t())
        levels = levels or [torch.full((len(clean),), self.noise_level) for clean, _ in pairs]
        linear.fit([(self.normalize(c), self.normalize(d)) for c, d in pairs], levels)

    def q_sample(self, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """z_t = sqrt(abar_t) z + sqrt(1 - abar_t) noise (Ho et al., 2020, eq. 4)."""
        abar = _at(self.alphas_cumprod, t)
        return abar.sqrt() * z + (1 - abar).sqrt() * noise

    def view(self, cond: Tensor, level: Tensor | None = None) -> ConditioningView:
        """What is known of degraded latents (N, C, H, W), normalised; `level` (N,) is their noise level, None: `noise_level`."""
        if level is None:
            level = torch.full((len(cond),), self.noise_level, device=cond.device)
        return self.variable.view(cond.float(), level.float())

    def _network(self, z: Tensor, t: Tensor, view: ConditioningView) -> Tensor:
        output = self.model(torch.cat([z, view.seen], dim=1), t, view.level.log2())
        return output.float() * (view.scale > 0)

    def predict(self, z: Tensor, t: Tensor, view: ConditioningView) -> Prediction:
        """z_0 and the noise predicted from z_t (N, C, H, W), t (N,) and what is known of the degraded latents."""
        z = z.float()
        output, abar = self._network(z, t, view), _at(self.alphas_cumprod, t)
        if self.parameterization == "eps":
            return Prediction((z - (1 - abar).sqrt() * output) / abar.sqrt(), output)
        # v: Salimans and Ho (2022), appendix D
        x_start = output if self.parameterization == "x0" else abar.sqrt() * z - (1 - abar).sqrt() * output
        return Prediction(x_start, (z - abar.sqrt() * x_start) / (1 - abar).sqrt())

    def p_losses(self, clean: Tensor, view: ConditioningView, t: Tensor, noise: Tensor) -> DiffusionLoss:
        """Loss at timesteps t (N,) for normalised clean latents and unit noise, both (N, C, H, W).

        L_simple is Ho et al. (2020), eq. 14, on what `parameterization` names, over the components that are diffused; a squared
        error of z_0 counts SNR times in eps, SNR + 1 times in v, once in x0.
        """
        z, active = self.variable.diffused(clean, view), (view.scale > 0).float()
        noise = noise * active
        output = self._network(self.q_sample(z, t, noise), t, view)
        root = _at(self.alphas_cumprod, t)
        targets = {"eps": noise, "x0": z, "v": root.sqrt() * noise - (1 - root).sqrt() * z}
        simple = (output - targets[self.parameterization]).square().mean((1, 2, 3)) / active.mean()
        loss = self.l_simple_weight * simple.mean()
        if self.original_elbo_weight:
            # the bound weighs the error of eps, whatever the network predicts
            abar = self.alphas_cumprod[t]
            share = {"eps": 1, "v": abar, "x0": abar / (1 - abar)}[self.parameterization]
            loss = loss + self.original_elbo_weight * (self.elbo_weights[t] * share * simple).mean()
        return DiffusionLoss(loss, simple.detach().mean())


def make_diffusion(hps: HParams) -> LatentDiffusion:
    """The two UNets and the diffusion around them that the settings describe."""
    mean_model = None
    if hps.precondition == "residual":
        of_mean = hps.updated(model_channels=hps.mean_channels, num_res_blocks=hps.mean_res_blocks)
        mean_model = UNet(**of_mean.arguments(UNet))
    return LatentDiffusion(
        UNet(**hps.arguments(UNet)), mean_model, latent_channels=hps.out_channels, **hps.arguments(LatentDiffusion)
    )


# --- samplers --------------------------------------------------------------------------------------------------------


def ddim_timesteps(timesteps: int, steps: int, spacing: str = "leading") -> Tensor:
    """The `steps` timesteps of a sampler out of `timesteps`, descending, (steps,) int64.

    "leading" is LDM's: multiples of T // steps, plus 1 where that leaves room, so it suits steps of at most T / 2;
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

    def __init__(self, model: LatentDiffusion, spacing: str = "leading", final_alpha_cumprod: float = 1.0):
        self.model = model
        self.spacing = spacing
        self.final_alpha_cumprod = final_alpha_cumprod

    @staticmethod
    def step(
        x: Tensor, prediction: Prediction, abar: Tensor, previous: Tensor, eta: float, noise: Tensor | None
    ) -> Tensor:
        """One step from abar_t to abar of the previous timestep (scalars); `noise` like x, needed where eta > 0."""
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
        """Samples (N, C, H, W) of z.

        Args:
            cond: what the model's `predict` is to know of the degraded latents.
            x_T: unit Gaussian noise to start from, (N, C, H, W).
            steps: number of network evaluations.
            eta: 0 is deterministic, 1 has the variance of the ancestral sampler.
            draw: returns unit noise like x_T, called once a step where eta > 0.
        Raises: ValueError for an impossible number of steps, or eta > 0 without `draw`.
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

    def __init__(self, model: LatentDiffusion):
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


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    view: ConditioningView,
    fields: Sequence[NoiseField],
    sampling: Sampling,
    *,
    origin: tuple[int, int] = (0, 0),
    number: int = 0,
    progress: bool = False,
) -> Tensor:
    """Posterior samples of normalised latents (N, C, H, W), one noise field an image, from what is known of the degraded ones.

    `origin` is the place of the latents' first row and column on the field; sample `number` of an image has its own draws.
    """
    draws = itertools.count(number * (sampling.steps + 1))
    size, device, active = view.seen.shape[-2:], view.seen.device, view.scale > 0

    def draw() -> Tensor:
        at = next(draws)
        return torch.stack([field.window(at, *origin, *size, device) for field in fields]) * active

    if sampling.sampler == "ddim":
        sampler = DDIMSampler(model, sampling.spacing)
        z = sampler.sample(view, draw(), sampling.steps, sampling.eta, draw, progress)
    else:
        z = DPMSolverSampler(model).sample(view, draw(), sampling.steps, progress)
    return model.variable.restored(z, view)


class LitEma(nn.Module):
    """Exponential moving average of a model's parameters with LDM's warm-up, decay_n = min(decay, (1 + n) / (10 + n)).

    n counts the updates from 1. Stands on `torch.optim.swa_utils.AveragedModel`, which also averages no buffers.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA decay must lie between 0 and 1, not {decay}")
        self.decay = decay
        self.averaged = AveragedModel(model, multi_avg_fn=self._average).requires_grad_(False).eval()
        self.restart()  # the copy made here counts as the first

    @torch.no_grad()
    def _average(self, averages: list[Tensor], parameters: list[Tensor], _: Tensor) -> None:
        # the counter lives on the host, so reading it does not synchronise with the device
        n = int(self.averaged.n_averaged)
        torch._foreach_lerp_(averages, parameters, 1 - min(self.decay, (1 + n) / (10 + n)))

    def restart(self) -> None:
        """Count the updates from 1 again, and with them the warm-up."""
        self.averaged.n_averaged.fill_(1)

    def forward(self, model: nn.Module) -> None:
        """One update towards the parameters of `model`."""
        self.averaged.update_parameters(model)

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        return self.averaged.module

    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into the parameters of `model`."""
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), self.model.parameters(), strict=True):
                parameter.copy_(average)

    @contextlib.contextmanager
    def average_parameters(self, model: nn.Module) -> Iterator[None]:
        """Inside the block `model` carries the averages; afterwards its own parameters again."""
        kept = [parameter.detach().clone() for parameter in model.parameters()]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, own in zip(model.parameters(), kept, strict=True):
                    parameter.copy_(own)
