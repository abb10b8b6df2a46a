"""Group normalisation with what stands around it in a UNet: a shift by channel before it, SiLU after it.

On CUDA, PyTorch's own returns contiguous memory whatever it is given, and float32 under autocast: a network in channels_last
and half precision pays for both with copies. `_Normalised` keeps layout and type, and saves its input alone for the backward
pass. On a CPU, and where a compiler fuses operators itself, PyTorch's own is faster.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """scale x + shift, of (N, C) each, in float32 and written in the type of x (N, C, H, W): one pass over memory."""
    return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None], out=torch.empty_like(x))


class _Normalised(torch.autograd.Function):
    """y = act(scale x + offset), scale = gamma / deviation, offset = beta + scale (shift - mean), act SiLU or nothing.

    Mean and deviation are those of x + shift over a group's channels and pixels (Wu and He, 2018, arXiv:1803.08494, eq. 1
    and 6), from sums by channel in float32. Types: x (N, C, H, W) of any; shift (N, C), gamma and beta (C,).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        shift, gamma, beta = (v.to(wide) for v in (shift, gamma, beta))
        pixels = x[0, 0].numel()
        own = x.sum((2, 3), dtype=wide) / pixels  # (N, C)
        square = torch.linalg.vector_norm(x, dim=(2, 3), dtype=wide).square() / pixels
        square = square + shift * (2 * own + shift)
        mean = (own + shift).unflatten(1, (groups, -1)).mean(2)  # (N, G)
        deviation = (square.unflatten(1, (groups, -1)).mean(2) - mean.square()).clamp(min=0).add(eps).sqrt()
        per_channel = x.shape[1] // groups
        mean, inverse = (v.repeat_interleave(per_channel, 1) for v in (mean, 1 / deviation))  # (N, C)
        scale = inverse * gamma
        offset = beta + scale * (shift - mean)
        ctx.save_for_backward(x, shift, gamma, own, mean, inverse, scale, offset)
        ctx.groups, ctx.silu = groups, silu
        y = _affine(x, scale, offset)
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, gamma, own, mean, inverse, scale, offset = ctx.saved_tensors
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, _affine(x, scale, offset))
        pixels = x[0, 0].numel()
        total = grad.sum((2, 3), dtype=scale.dtype)  # (N, C)
        product = (grad * x).sum((2, 3), dtype=scale.dtype) + shift * total - mean * total  # with x + shift - mean

        def over_group(values: Tensor) -> Tensor:
            means = (values * gamma).unflatten(1, (ctx.groups, -1)).mean(2, keepdim=True) / pixels
            return means.expand(-1, -1, values.shape[1] // ctx.groups).flatten(1)

        slope = -over_group(product) * inverse**3
        level = -over_group(total) * inverse + slope * (shift - mean)
        grad_x = _affine(x, slope, level)
        grad_x = torch.addcmul(grad_x, grad, scale[:, :, None, None], out=grad_x)
        grad_shift = scale * total + pixels * (slope * own + level)
        return grad_x, grad_shift, (product * inverse).sum(0), total.sum(0), None, None, None


class GroupNorm(nn.GroupNorm):
    """Group normalisation of x + shift, x (N, C, H, W) and shift (N, C), then SiLU (Elfwing et al., 2018) if `silu`.

    It may overwrite x, which nothing else must look at if there is a shift.
    """

    def __init__(self, groups: int, channels: int, *, silu: bool = False):
        super().__init__(groups, channels)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        if x.is_cuda and not torch.compiler.is_compiling():
            with torch.autocast(x.device.type, enabled=False):
                shift = x.new_zeros(x.shape[:2]) if shift is None else shift
                return _Normalised.apply(x, shift, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        if shift is not None:
            x += shift.to(x.dtype)[:, :, None, None]  # no backward pass looks at what a convolution returned
        y = super().forward(x)
        return F.silu(y, inplace=not torch.is_grad_enabled()) if self.silu else y
