"""The UNet of the latent diffusion and of the posterior mean.

It has the structure and the parameter names of the published latent-diffusion UNet (Rombach et al., 2022,
arXiv:2112.10752; Dhariwal and Nichol, 2021, arXiv:2105.05233), so its state dicts load.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.norms import GroupNorm

NOISE_STEP = 100.0  # timesteps that an octave of the noise level counts as in its embedding


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


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, the timestep embedding added between; (N, C_in, H, W) to (N, C_out, H, W)."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, dropout: float):
        super().__init__()
        # nn.Identity stands where the published network has its SiLU, for the names that follow
        self.in_layers = nn.Sequential(
            GroupNorm(32, channels, silu=True), nn.Identity(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(32, out_channels, silu=True),
            nn.Identity(),
            nn.Dropout(dropout),
            _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, *others = self.out_layers
        h = norm(self.in_layers(x), self.emb_layers(emb))  # (N, C_out, H, W)
        for layer in others:
            h = layer(h)
        h += self.skip_connection(x)  # no backward pass looks at what a convolution returned
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
        # D has to be contiguous, or the fused kernels are passed over; in channels_last nothing is copied there and back
        positions = self.norm(x).flatten(2).transpose(1, 2)  # (N, L, C), L = H W
        qkv = F.linear(positions, self.qkv.weight.squeeze(-1), self.qkv.bias)  # (N, L, 3 C)
        q, k, v = qkv.unflatten(2, (-1, 3, self.head_channels)).permute(3, 0, 2, 1, 4)  # (N, heads, L, D) each
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (N, L, C)
        out = F.linear(out, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + out.transpose(1, 2).unflatten(2, x.shape[-2:])  # (N, C, H, W)


class Downsample(nn.Module):
    """Strided 3x3 convolution: halves H and W."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # (N, C, H / 2, W / 2)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # (N, C, 2 H, 2 W)


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
        middle = [ResBlock(channels, emb, channels, dropout), AttentionBlock(channels, num_head_channels)]
        self.middle_block = nn.ModuleList([*middle, ResBlock(channels, emb, channels, dropout)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for block in range(num_res_blocks + 1):
                layers = stage(channels + skips.pop(), mult * model_channels, level)
                channels = mult * model_channels
                if level and block == num_res_blocks:
                    layers.append(Upsample(channels))
                self.output_blocks.append(nn.ModuleList(layers))
        last = _zero(nn.Conv2d(channels, out_channels, 3, padding=1))
        self.out = nn.Sequential(GroupNorm(32, channels, silu=True), nn.Identity(), last)
        for parameter in self.parameters():
            if parameter.dim() == 4:  # Module.to would swap fake tensors, which other references forbid
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

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
            h = F.pad(h, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")  # (N, in, H', W')
        emb = self.time_embed(timestep_embedding(t, self.model_channels))  # (N, 4 model_channels)
        if self.noise_embed is not None:
            emb = emb + self.noise_embed(timestep_embedding(NOISE_STEP * log_level, self.model_channels))
        skips = []
        for layers in self.input_blocks:
            h = self._run(layers, h, emb)  # (N, C_l, H' / 2**l, W' / 2**l), l from 0 up
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for layers in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)  # frees both before the layers run
            h = self._run(layers, h, emb)  # (N, C_l, H' / 2**l, W' / 2**l), l down to 0
        return self.out(h)[..., :height, :width]  # (N, out, H, W)
