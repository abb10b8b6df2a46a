"""Stage 2: `UNet`, `LatentDiffusion`, `DDIMSampler` and `LitEma`.

The UNet has the structure and the parameter names of the published latent-diffusion UNet (Rombach et al., 2022,
arXiv:2112.10752; Dhariwal and Nichol, 2021, arXiv:2105.05233), so its state dicts load. What goes beyond it, such as the
preconditioned output, stands around it in `LatentDiffusion`.
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from helper import seeded_generator

NOISE_STEP = 100.0  # timesteps that an octave of the noise level counts as in its embedding
WIENER_TAPS = 5  # side, in latents, of the neighbourhood that the linear estimate looks at
WIENER_LEVELS = 5  # noise levels between the least and the greatest at which it is fitted
LOCAL_RADIUS = 4  # latents; radius of the box whose mean, taken twice, is the local mean
OUTLIER = 16.0  # mean square, in units of the noise's, from which on what the linear estimate takes away is no noise
WHITENED_LIMIT = 4.0  # standard deviations; what the network sees of the whitened conditioning latent


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps (N,) as (N, dim): cosines, then sines (Vaswani et al., 2017, section 3.5)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, dim - 2 * half))


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He, 2018) of (N, C, H, W) that measures, on larger maps, around every position.

    A network trained on crops has never seen the statistics of a whole image, and one bright speck there changes all of
    it. With `window` set, in evaluation mode, mean and variance are those of the square of that side around a position,
    moved to lie inside the map: on a crop of that side they are the crop's own (Chu et al., 2022, arXiv:2112.04491).
    """

    window = 0  # side in positions; 0: the whole map

    def forward(self, x: Tensor) -> Tensor:
        height, width = (min(self.window or side, side) for side in x.shape[-2:])
        if self.training or (height, width) == x.shape[-2:]:
            return super().forward(x)
        groups = x.unflatten(1, (self.num_groups, -1))
        mean = _window_mean(groups.mean(2), height, width)
        variance = (_window_mean(groups.square().mean(2), height, width) - mean.square()).clamp(min=0)
        scale = (variance + self.eps).rsqrt()
        normalised = ((groups - mean.to(x.dtype)[:, :, None]) * scale.to(x.dtype)[:, :, None]).flatten(1, 2)
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]


def _window_mean(x: Tensor, height: int, width: int) -> Tensor:
    """Means of (N, C, H, W) over windows of `height` x `width` around every position, moved to lie inside, in float64."""
    sums = F.pad(
        x.double().cumsum(-1).cumsum(-2), (1, 0, 1, 0)
    )  # float32 would lose the small difference of large sums
    sums = sums[..., height:, :] - sums[..., :-height, :]
    means = (sums[..., width:] - sums[..., :-width]) / (height * width)
    before = (width - 1) // 2, (height - 1) // 2
    return F.pad(means, (before[0], width - 1 - before[0], before[1], height - 1 - before[1]), mode="replicate")


class SiLU(nn.SiLU):
    """SiLU (Elfwing et al., 2018) of what nothing else looks at; without gradients it takes no memory of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, the timestep embedding added between; (N, C_in, H, W) to (N, C_out, H, W)."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(32, channels), SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(32, out_channels),
            SiLU(),
            nn.Dropout(dropout),
            _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        h += self.emb_layers(emb).to(h.dtype)[:, :, None, None]  # no backward pass looks at what a convolution returned
        h = self.out_layers(h)
        h += self.skip_connection(x)
        return h


class AttentionBlock(nn.Module):
    """Self-attention over all positions of (N, C, H, W), heads of `num_head_channels`, added to its input."""

    def __init__(self, channels: int, num_head_channels: int):
        super().__init__()
        if channels % num_head_channels:
            raise ValueError(f"num_head_channels {num_head_channels} does not divide {channels} channels")
        self.head_channels = num_head_channels
        self.norm = GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # (N, L, 3C) to three (N, heads, L, D) with D contiguous, or the fused kernels are passed over; in channels_last
        # nothing is copied on the way there and back
        positions = self.norm(x).flatten(2).transpose(1, 2)
        qkv = F.linear(positions, self.qkv.weight.squeeze(-1), self.qkv.bias)
        q, k, v = qkv.unflatten(2, (-1, 3, self.head_channels)).permute(3, 0, 2, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = F.linear(out, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + out.transpose(1, 2).unflatten(2, x.shape[-2:])


class Downsample(nn.Module):
    """Strided 3x3 convolution: halves H and W."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """The latent-diffusion UNet (Rombach et al., 2022): (N, in_channels, H, W), timesteps (N,) to (N, out_channels, H, W).

    Constructor words as in `hps.py`. Sides that are no multiple of 2**(levels - 1) are padded inside and cropped. With
    `noise_conditioning` the logarithm of the noise level (N,), to the base 2, is embedded like a timestep and added to it.
    """

    def __init__(
        self,
        in_channels: int = 256,
        out_channels: int = 128,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 2,
        attention_levels: Sequence[int] = (1, 2),
        num_head_channels: int = 64,
        dropout: float = 0.0,
        use_checkpoint: bool = True,
        noise_conditioning: bool = False,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.model_channels = in_channels, out_channels, model_channels
        self.use_checkpoint = use_checkpoint
        self.stride = 2 ** (len(channel_mult) - 1)
        emb = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.noise_embed = None
        if noise_conditioning:
            self.noise_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), _zero(nn.Linear(emb, emb)))

        def stage(channels: int, out: int, level: int) -> list[nn.Module]:
            attention = [AttentionBlock(out, num_head_channels)] if level in attention_levels else []
            return [ResBlock(channels, emb, out, dropout), *attention]

        channels = model_channels
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        skips = [channels]
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                self.input_blocks.append(nn.ModuleList(stage(channels, mult * model_channels, level)))
                channels = mult * model_channels
                skips.append(channels)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                skips.append(channels)
        self.middle_block = nn.ModuleList(
            [
                ResBlock(channels, emb, channels, dropout),
                AttentionBlock(channels, num_head_channels),
                ResBlock(channels, emb, channels, dropout),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for block in range(num_res_blocks + 1):
                layers = stage(channels + skips.pop(), mult * model_channels, level)
                channels = mult * model_channels
                if level and block == num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            GroupNorm(32, channels), SiLU(), _zero(nn.Conv2d(channels, out_channels, 3, padding=1))
        )
        for parameter in self.parameters():
            if parameter.dim() == 4:  # Module.to would swap fake tensors, which other references forbid
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def normalize_within(self, window: int) -> None:
        """Let every `GroupNorm` measure, in evaluation, over windows of `window` latents; 0: over the whole map."""
        level = 0
        for blocks in (self.input_blocks, [self.middle_block], self.output_blocks, [nn.ModuleList([self.out])]):
            for layers in blocks:
                for layer in layers:
                    if isinstance(layer, Upsample):
                        level -= 1
                    for module in layer.modules():
                        if isinstance(module, GroupNorm):
                            module.window = -(-window // 2**level)
                    if isinstance(layer, Downsample):
                        level += 1

    def _run(self, layers: nn.ModuleList, h: Tensor, emb: Tensor) -> Tensor:
        for layer in layers:
            if not isinstance(layer, (ResBlock, AttentionBlock)):
                h = layer(h)
            elif self.use_checkpoint and self.training and torch.is_grad_enabled():
                h = checkpoint(layer, h, emb, use_reentrant=False)
            else:
                h = layer(h, emb)
        return h

    def forward(self, x: Tensor, t: Tensor, log_level: Tensor | None = None) -> Tensor:
        height, width = x.shape[-2:]
        h = x.contiguous(memory_format=torch.channels_last)
        if height % self.stride or width % self.stride:
            h = F.pad(h, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        emb = self.time_embed(timestep_embedding(t, self.model_channels))
        if self.noise_embed is not None:
            emb = emb + self.noise_embed(timestep_embedding(NOISE_STEP * log_level, self.model_channels))
        skips = []
        for layers in self.input_blocks:
            h = self._run(layers, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for layers in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # frees both before the layers run
            h = self._run(layers, h, emb)
        return self.out(h)[..., :height, :width]


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


@dataclass
class Prediction:
    """What the network's output says about x_t, in float32."""

    x_start: Tensor  # (N, C, H, W): the clean latent, normalised
    eps: Tensor  # (N, C, H, W): the noise in x_t


@dataclass
class ConditioningView:
    """What the network is shown of a degraded latent, and what it adds to."""

    seen: Tensor  # (N, C', H, W): its input beside x_t
    base: Tensor | None  # (N, C, H, W): the degraded latent or a linear estimate; None for the plain network
    log_level: Tensor  # (N,): logarithm of the noise level, to the base 2


def _compressed(x: Tensor) -> Tensor:
    """2 asinh(x / 2): 50 standard deviations still tell where an edge is, and do not drown the rest."""
    return 2 * torch.asinh(x / 2)


@dataclass
class DiffusionLoss:
    """Training loss and what is worth logging beside it."""

    loss: Tensor  # scalar: what is minimised
    l_simple: Tensor  # scalar: unweighted MSE on what the parameterisation predicts
    latent_error: Tensor  # scalar: mean squared error of the clean latent over that of the conditioning latent


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Entries (N, 1, 1, 1) of a table (T,) at timesteps (N,)."""
    return table[t][:, None, None, None]


class LatentDiffusion(nn.Module):
    """Conditional diffusion of normalised latents (Ho et al., 2020, arXiv:2006.11239; Rombach et al., 2022).

    The degraded latent c is concatenated to the noisy one. With `precondition="conditioning"` the network F stands between
    an input and an output transform, in the spirit of Karras et al. (2022, arXiv:2206.00364), eq. 7. It sees c whitened,
    (C + s^2)^(-1/2) c with C the covariance of clean latents and s the rms of the degradation, and what x_t says beyond c,
    (x_t - sqrt(abar_t) c) / sqrt(abar_t s^2 + 1 - abar_t), both of unit variance, the former clamped. It predicts the
    degradation in units of s: x_start = c - s F, hence eps = (x_t - sqrt(abar_t) x_start) / sqrt(1 - abar_t): it adds to the
    noise that c implies. With "wiener" it adds to a linear estimate instead: c less what a filter takes for noise, fitted by
    least squares at several noise levels to what the degraded latent deviates from its local mean; where that is far more
    than the noise, as on an edge, c stands. The network then sees, beside x_t, those deviations and the local mean, whitened,
    and what the filter took for noise: three times the channels of the latent; s is the rms error of the linear estimate at
    the noise level of the image. With "none" it sees x_t and c and predicts eps, v or x_start itself.

    `loss_weighting` multiplies L_simple (Hang et al., 2023, arXiv:2303.09556): "latent" gives every t the same weight in
    the error of the clean latent, over s^2 (for eps: 1 / SNR); "min_snr" gives it the weight min(SNR, 5); "none" is L_simple.
    """

    def __init__(
        self,
        model: nn.Module,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        linear_start: float = 0.0015,
        linear_end: float = 0.0195,
        parameterization: str = "eps",
        precondition: str = "conditioning",
        loss_weighting: str = "latent",
        l_simple_weight: float = 1.0,
        original_elbo_weight: float = 0.0,
        learn_logvar: bool = False,
        latent_channels: int | None = None,
        noise_level: float = 0.2,
        noise_levels: Sequence[float] = (),
    ):
        super().__init__()
        for name, value, words in (
            ("parameterization", parameterization, ("eps", "v", "x0")),
            ("precondition", precondition, ("conditioning", "wiener", "none")),
            ("loss_weighting", loss_weighting, ("latent", "min_snr", "none")),
        ):
            if value not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {value!r}")
        self.model = model
        self.timesteps = timesteps
        self.parameterization, self.precondition = parameterization, precondition
        self.loss_weighting = loss_weighting
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
        self.register_buffer("degradation_scale", torch.ones(()))  # rms of degraded - clean, in normalised latents
        self.register_buffer(
            "whitening", torch.eye(channels)
        )  # of degraded normalised latents, for the network's input
        self.noise_level = noise_level  # of images whose level is not given
        low, high = noise_levels or (noise_level, noise_level)
        if precondition == "wiener":
            knots = WIENER_LEVELS if high > low else 1
            taps = WIENER_TAPS**2 * channels
            self.register_buffer("log_levels", torch.linspace(math.log2(low), math.log2(high), knots))
            self.register_buffer("local_whitening", torch.eye(channels))  # of deviations from the local mean
            self.register_buffer("noise_filter", torch.zeros(knots, channels, taps))  # deviations to the noise in them
            self.register_buffer("wiener_error", torch.ones(knots))  # rms error of the estimate, in normalised latents
        self.logvar = nn.Parameter(torch.zeros(timesteps), requires_grad=learn_logvar)

    def normalize(self, z: Tensor) -> Tensor:
        """First-stage latents (N, C, H, W) to zero mean by channel and unit variance overall."""
        return (z - self.latent_shift[:, None, None]) / self.latent_scale

    def denormalize(self, x: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return x * self.latent_scale + self.latent_shift[:, None, None]

    @torch.no_grad()
    def measure_statistics(
        self, pairs: Iterable[tuple[Tensor, Tensor]], levels: Sequence[Tensor] | None = None
    ) -> None:
        """Set shift, scale and degradation scale from (clean, degraded) first-stage latents, each (N, C, H, W).

        With `precondition="wiener"` the linear estimate too, at the noise `levels` (N,) of each pair; None: all at
        `noise_level`. Raises ValueError where there are none or the latents are constant.
        """
        count, total, square, noise = 0, 0.0, 0.0, 0.0
        if self.precondition == "wiener":
            pairs = list(pairs)  # its filter is fitted to what is normalised by all of them
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
        rms = (noise / (count * len(mean)) / variance).sqrt().clamp(min=1e-3)  # noise level 0 must not divide by zero
        self.degradation_scale.copy_(rms)
        values, vectors = torch.linalg.eigh(covariance / variance)
        self.whitening.copy_((vectors * (values.clamp(min=0) + rms**2).rsqrt()) @ vectors.t())
        if self.precondition == "wiener":
            levels = levels or [torch.full((len(clean),), self.noise_level) for clean, _ in pairs]
            self._fit_wiener([(self.normalize(c), self.normalize(d)) for c, d in pairs], levels)

    def _fit_wiener(self, pairs: list[tuple[Tensor, Tensor]], levels: Sequence[Tensor]) -> None:
        """Fit the linear estimate and measure its error on (clean, degraded) normalised latents.

        Weighted least squares from the neighbourhoods of deviations from the local mean to the noise, every position
        counting in inverse proportion to its own energy: edges are rare and large, and not what the filter is for.
        """
        knots, channels, taps = self.noise_filter.shape
        gram = torch.zeros(knots, taps, taps, dtype=torch.float64)
        cross = torch.zeros(knots, channels, taps, dtype=torch.float64)
        second = torch.zeros(channels, channels, dtype=torch.float64)
        floor = self.degradation_scale**2
        for (clean, degraded), level in zip(pairs, levels, strict=True):
            mean = local_mean(degraded)
            rows = F.unfold(degraded - mean, WIENER_TAPS, padding=WIENER_TAPS // 2)
            noise = (degraded - clean).flatten(2)
            deviations = (degraded - mean).flatten(2)
            weight = floor / (floor + rows.square().mean(1, keepdim=True))
            share = self._knots(level)
            for i in range(len(rows)):
                weighted = rows[i] * weight[i]
                a, b = weighted @ rows[i].t(), noise[i] @ weighted.t()
                second += ((deviations[i] * weight[i]) @ deviations[i].t()).double().cpu() / (
                    weight[i].sum().cpu() + 1e-12
                )
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
        error, shares = torch.zeros(knots), torch.zeros(knots)
        for (clean, degraded), level in zip(pairs, levels, strict=True):
            share = self._knots(level).cpu()
            base = self.view(degraded, level).base
            squared = (base - clean).square().mean((1, 2, 3))
            error += share.t() @ squared.cpu()
            shares += share.sum(0)
        mean_error = (error / shares.clamp(min=1e-6)).clamp(min=1e-8)
        self.wiener_error.copy_(torch.where(shares > 0, mean_error, floor.cpu()).sqrt())

    def _log_level(self, x: Tensor, level: Tensor | None) -> Tensor:
        """Logarithm of the noise levels (N,), those of `noise_level` where they are None."""
        if level is None:
            level = torch.full((len(x),), self.noise_level, device=x.device)
        return level.float().log2()

    def _knots(self, level: Tensor) -> Tensor:
        """Shares (N, knots) of the fitted noise levels in levels (N,): linear between the two nearest in the logarithm."""
        knots = self.log_levels
        if len(knots) == 1:
            return torch.ones(len(level), 1, device=knots.device)
        place = (level.to(knots).log2() - knots[0]) / (knots[1] - knots[0])
        place = place.clamp(0, len(knots) - 1)
        return (1 - (place[:, None] - torch.arange(len(knots), device=knots.device)).abs()).clamp(min=0)

    def _linear_noise(self, cond: Tensor, log_level: Tensor) -> Tensor:
        """What the linear filter takes for noise in the degraded latent (N, C, H, W), normalised."""
        share = self._knots(log_level.exp2())
        filters = torch.einsum("nk,kct->nct", share, self.noise_filter)
        filters = filters.unflatten(2, (cond.shape[1], WIENER_TAPS, WIENER_TAPS)).flatten(0, 1)
        n, c, h, w = cond.shape
        deviations = F.pad(cond - local_mean(cond), (WIENER_TAPS // 2,) * 4, mode="replicate")
        return F.conv2d(deviations.flatten(0, 1)[None], filters, groups=n).view(n, c, h, w)

    def _wiener(self, cond: Tensor, noise: Tensor) -> Tensor:
        """The estimate of the clean latent that the degraded one (N, C, H, W) and the noise seen in it make."""
        excess = noise.square().mean(1, keepdim=True) / (OUTLIER * self.degradation_scale**2)
        return cond - noise * (1 - excess).clamp(min=0).square()  # the biweight of Beaton and Tukey (1974)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_start + sqrt(1 - abar_t) noise (Ho et al., 2020, eq. 4)."""
        abar = _at(self.alphas_cumprod, t)
        return abar.sqrt() * x_start + (1 - abar).sqrt() * noise

    def _scale(self, log_level: Tensor) -> Tensor:
        """Rms error of what the network adds to, in normalised latents (N, 1, 1, 1)."""
        if self.precondition == "wiener":
            return (self._knots(log_level.exp2()) @ self.wiener_error.log()).exp()[:, None, None, None]
        return self.degradation_scale

    def view(self, cond: Tensor, level: Tensor | None = None) -> ConditioningView:
        """What the network sees of a conditioning latent (N, C, H, W), normalised, at every timestep alike; see `predict`."""
        cond, log_level = cond.float(), self._log_level(cond, level)
        with torch.autocast(cond.device.type, enabled=False):
            if self.precondition == "none":
                return ConditioningView(cond, None, log_level)
            if self.precondition == "conditioning":
                # unclamped, one bright speck or film edge shifts the GroupNorm statistics, and with them the whole image
                seen = F.conv2d(cond, self.whitening[:, :, None, None]).clamp(-WHITENED_LIMIT, WHITENED_LIMIT)
                return ConditioningView(seen, cond, log_level)
            mean, noise = local_mean(cond), self._linear_noise(cond, log_level)
            fine = F.conv2d(cond - mean, self.local_whitening[:, :, None, None])
            coarse = F.conv2d(mean, self.whitening[:, :, None, None])
            # next to an edge the deviations are too large to show noise; what the filter took for it reaches less far
            seen = torch.cat([_compressed(fine) + coarse, _compressed(noise / self.degradation_scale)], dim=1)
            return ConditioningView(seen, self._wiener(cond, noise), log_level)

    def _network(self, x: Tensor, t: Tensor, view: ConditioningView) -> Tensor:
        if view.base is not None:
            abar = _at(self.alphas_cumprod, t)
            x = (x - abar.sqrt() * view.base) / (abar * self._scale(view.log_level) ** 2 + 1 - abar).sqrt()
        told = (view.log_level,) if self.model_knows_noise else ()
        return self.model(torch.cat([x, view.seen], dim=1), t, *told).float()

    @property
    def model_knows_noise(self) -> bool:
        """Whether the network is told the noise level."""
        return getattr(self.model, "noise_embed", None) is not None

    def _x_start(self, output: Tensor, x: Tensor, t: Tensor, view: ConditioningView) -> Tensor:
        """The clean latent that a network output stands for."""
        if view.base is not None:
            return view.base - self._scale(view.log_level) * output
        abar = _at(self.alphas_cumprod, t)
        if self.parameterization == "eps":
            return (x - (1 - abar).sqrt() * output) / abar.sqrt()
        if self.parameterization == "v":  # Salimans and Ho (2022), appendix D
            return abar.sqrt() * x - (1 - abar).sqrt() * output
        return output

    def predict(self, x: Tensor, t: Tensor, cond: Tensor | ConditioningView, level: Tensor | None = None) -> Prediction:
        """Clean latent and noise predicted from x_t (N, C, H, W), t (N,) and the conditioning latent, all normalised.

        `level` (N,) is the noise level of the degraded images; None: `noise_level`. Whoever asks more than once hands over
        `view(cond, level)` in place of both.
        """
        x = x.float()
        view = cond if isinstance(cond, ConditioningView) else self.view(cond, level)
        output = self._network(x, t, view)
        x_start = self._x_start(output, x, t, view)
        if self.precondition == "none" and self.parameterization == "eps":
            return Prediction(x_start, output)
        abar = _at(self.alphas_cumprod, t)
        return Prediction(x_start, (x - abar.sqrt() * x_start) / (1 - abar).sqrt())

    def p_losses(
        self, x_start: Tensor, cond: Tensor, t: Tensor, noise: Tensor, level: Tensor | None = None
    ) -> DiffusionLoss:
        """Loss at timesteps t (N,) for normalised clean and conditioning latents and unit noise, all (N, C, H, W).

        L_simple is Ho et al. (2020), eq. 14, on what `parameterization` names; a squared error of the clean latent counts
        SNR times in eps, SNR + 1 times in v, once in x0.
        """
        x = self.q_sample(x_start, t, noise)
        view = self.view(cond, level)
        output = self._network(x, t, view)
        abar = self.alphas_cumprod[t]
        snr = abar / (1 - abar)
        factor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[self.parameterization]
        if view.base is not None:
            latent_error = (self._x_start(output, x, t, view) - x_start).square().mean((1, 2, 3))
            simple = factor * latent_error
        else:
            target = {"eps": noise, "x0": x_start}.get(self.parameterization)
            if target is None:
                root = _at(self.alphas_cumprod, t)
                target = root.sqrt() * noise - (1 - root).sqrt() * x_start
            simple = (output - target).square().mean((1, 2, 3))
            latent_error = simple / factor
        weight = {
            "latent": 1 / (factor * self._scale(view.log_level).flatten() ** 2),
            "min_snr": snr.clamp(max=5) / factor,
            "none": torch.ones_like(snr),
        }[self.loss_weighting]
        logvar = self.logvar[t]
        loss = self.l_simple_weight * (weight * simple / logvar.exp() + logvar).mean()
        if self.original_elbo_weight:
            # the bound weighs the error of eps, whatever the network predicts
            loss = loss + self.original_elbo_weight * (self.elbo_weights[t] * snr / factor * simple).mean()
        ratio = latent_error.detach().mean() / self.degradation_scale**2
        return DiffusionLoss(loss, simple.detach().mean(), ratio)


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
    """DDIM (Song et al., 2021, arXiv:2010.02502, eq. 12) over a model with `alphas_cumprod` and `predict(x, t, cond)`.

    `final_alpha_cumprod` is abar after the last step: 1 returns the predicted clean latent; LDM's own sampler keeps
    alphas_cumprod[0], which leaves noise of 0.039 in the result, as much as the degradation itself.
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
        cond: Tensor | ConditioningView,
        x_T: Tensor,
        steps: int = 50,
        eta: float = 0.0,
        draw: Callable[[], Tensor] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample clean latents given conditioning latents, both (N, C, H, W) and normalised.

        Args:
            cond: conditioning latents, or what the model's `predict` takes in their place.
            x_T: unit Gaussian noise to start from, like cond.
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


@torch.no_grad()
def sample_latents(
    model: LatentDiffusion,
    cond: Tensor,
    fields: Sequence[NoiseField],
    steps: int,
    eta: float = 0.0,
    spacing: str = "leading",
    *,
    origin: tuple[int, int] = (0, 0),
    first_draw: int = 0,
    progress: bool = False,
    level: Tensor | None = None,
    orient: Callable[[Tensor], Tensor] = lambda noise: noise,
) -> Tensor:
    """DDIM samples of normalised latents given normalised conditioning latents (N, C, H, W), one noise field an image.

    `origin` is the place of the latents' first row and column on the field; sample k of an image has its own draws with
    `first_draw` = k * (steps + 1). `orient` turns the noise into the latents' orientation, of which `origin` knows nothing.
    """
    draws = itertools.count(first_draw)
    size = orient(cond[:1, :1]).shape[-2:]  # a transposition is its own inverse

    def draw() -> Tensor:
        number = next(draws)
        return orient(torch.stack([field.window(number, *origin, *size, cond.device) for field in fields]))

    view = model.view(cond, level)  # the same at every step
    return DDIMSampler(model, spacing).sample(view, draw(), steps, eta, draw, progress)


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
        self.averaged.n_averaged.fill_(1)  # the copy made here counts as the first: n = 1 at the first update

    @torch.no_grad()
    def _average(self, averages: list[Tensor], parameters: list[Tensor], _: Tensor) -> None:
        # the counter lives on the host, so reading it does not synchronise with the device
        n = int(self.averaged.n_averaged)
        torch._foreach_lerp_(averages, parameters, 1 - min(self.decay, (1 + n) / (10 + n)))

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
