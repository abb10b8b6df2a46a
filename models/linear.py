"""A Wiener filter of latents: where the posterior mean starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def local_mean(x: Tensor) -> Tensor:
    """Mean of (N, C, H, W) around every position: a box of 9 x 9 latents, twice, borders repeated."""
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x, (4, 4, 4, 4), mode="replicate"), 9, stride=1)
    return x


def _compressed(x: Tensor) -> Tensor:
    """2 asinh(x / 2): 50 standard deviations still tell where an edge is, and do not drown the rest."""
    return 2 * torch.asinh(x / 2)


def mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """A matrix (K, C) applied to the channels of (N, C, H, W)."""
    return F.conv2d(x, matrix[:, :, None, None])


def level_shares(level: Tensor, knots: Tensor) -> Tensor:
    """Shares (N, K) of the levels at the `knots` (K,), their log2, in noise levels (N,): linear between the two nearest."""
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
    """A Wiener filter of normalised latents, fitted by least squares at 5 noise levels from the least to the greatest.

    It looks at the deviations of 5 x 5 latents from their local mean. If it would take away far more than the noise, as on an
    edge, the degraded latent stands.
    """

    taps = 5  # side of the neighbourhood, in latents

    def __init__(self, channels: int, levels: tuple[float, float]):
        super().__init__()
        low, high = levels
        knots = 5 if high > low else 1
        self.register_buffer("log_levels", torch.linspace(math.log2(low), math.log2(high), knots))
        self.register_buffer("degradation_scale", torch.ones(()))  # rms of degraded - clean
        self.register_buffer("whitening", torch.eye(channels))  # of degraded latents
        self.register_buffer("local_whitening", torch.eye(channels))  # of deviations from the local mean
        self.register_buffer("noise_filter", torch.zeros(knots, channels, self.taps**2 * channels))
        self.register_buffer("error", torch.ones(knots))  # rms error of the estimate

    def forward(self, cond: Tensor, level: Tensor) -> LinearView:
        """The view of degraded latents (N, C, H, W) of noise levels (N,)."""
        mean, share = local_mean(cond), level_shares(level, self.log_levels)
        noise = self._noise(cond - mean, share)
        fine, coarse = mixed(cond - mean, self.local_whitening), mixed(mean, self.whitening)
        # what the filter takes away is no noise if its mean square is 16 times the noise's
        excess = noise.square().mean(1, keepdim=True) / (16 * self.degradation_scale**2)
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
        filters = filters.unflatten(2, (c, self.taps, self.taps)).flatten(0, 1)
        padded = F.pad(deviations, (self.taps // 2,) * 4, mode="replicate")
        return F.conv2d(padded.flatten(0, 1)[None], filters, groups=n).view(n, c, h, w)

    def fit(self, pairs: list[tuple[Tensor, Tensor]], levels: Sequence[Tensor]) -> None:
        """Fit to (clean, degraded) latents, each (N, C, H, W), of noise levels (N,), and measure the error.

        Weighted least squares from the neighbourhoods of deviations from the local mean to the noise, every position
        counting in inverse proportion to its own energy: edges are rare and large, and not what the filter is for.
        """
        knots, channels, taps = self.noise_filter.shape
        # sums stay on the device: at the reference values a sample's Gram matrix takes 82 MB
        double = dict(dtype=torch.float64, device=self.noise_filter.device)
        gram, cross = torch.zeros(knots, taps, taps, **double), torch.zeros(knots, channels, taps, **double)
        second = torch.zeros(channels, channels, **double)
        floor = self.degradation_scale**2
        for (clean, degraded), level in zip(pairs, levels, strict=True):
            deviations = degraded - local_mean(degraded)
            rows = F.unfold(deviations, self.taps, padding=self.taps // 2)
            noise = (degraded - clean).flatten(2)
            weight = floor / (floor + rows.square().mean(1, keepdim=True))
            shares = level_shares(level, self.log_levels).tolist()
            for i in range(len(rows)):
                weighted, own = rows[i] * weight[i], deviations[i].flatten(1)
                a, b = weighted @ rows[i].t(), noise[i] @ weighted.t()
                second += (((own * weight[i]) @ own.t()) / (weight[i].sum() + 1e-12)).double()
                for knot, share in enumerate(shares[i]):
                    if share:
                        gram[knot].add_(a, alpha=share)
                        cross[knot].add_(b, alpha=share)
        # the latent fills but some directions of its channels: a ridge keeps the others at zero
        ridge = 1e-4 * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
        gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        solution = torch.linalg.solve(gram, cross.transpose(1, 2)).transpose(1, 2)
        self.noise_filter.copy_(solution)
        values, vectors = torch.linalg.eigh(second / max(1, sum(len(level) for level in levels)))
        least = 0.1 * values.clamp(min=0).mean() + 1e-12  # directions that the latent hardly fills stay small
        self.local_whitening.copy_((vectors * (values.clamp(min=0) + least).rsqrt()) @ vectors.t())
        squared = (self(d, level).estimate - c for (c, d), level in zip(pairs, levels, strict=True))
        error = by_level([e.square().mean((1, 2, 3)) for e in squared], levels, self.log_levels)
        self.error.copy_(error.clamp(min=1e-8).sqrt())


def by_level(values: Sequence[Tensor], levels: Sequence[Tensor], knots: Tensor) -> Tensor:
    """Means (K, ...) at knots of the noise level of values (N, ...) at levels (N,); at a knot that has none, that of all."""
    values, share = torch.cat(list(values)).float(), torch.cat([level_shares(v, knots) for v in levels])
    total = share.sum(0).view(-1, *[1] * (values.ndim - 1))
    means = torch.einsum("nk,n...->k...", share, values) / total.clamp(min=1e-6)
    return torch.where(total > 0, means, values.mean(0))
