"""Group normalisation with what stands around it in a UNet: a shift by channel before it, SiLU after it.

On CUDA, PyTorch's own returns contiguous memory whatever it is given, and float32 under autocast: a network in channels_last
and half precision pays for both with copies. `_Normalised` keeps layout and type, passes over memory as seldom as it can, and
saves its input alone for the backward pass. On a CPU, and where a compiler fuses operators itself, PyTorch's own is faster.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import custom_op

HAS_TRITON = importlib.util.find_spec("triton") is not None  # where torch has CUDA it comes with torch, but for Windows


def _by_channel(x: Tensor) -> Tensor:
    return x.new_empty((len(x), 5, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))


@custom_op("restoration::norm_statistics", mutates_args=())
def norm_statistics(x: Tensor, shift: Tensor | None, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
    """By channel of x (N, C, H, W): scale, center, beta, 1 / deviation, and the sum of x + shift - mean; (N, 5, C).

    Mean and deviation are those of x + shift over a group's channels and pixels (Wu and He, 2018, arXiv:1803.08494, eq. 1
    and 6), from sums in float32; scale = gamma / deviation, center = mean - shift. Shift is (N, C), gamma and beta are (C,).
    """
    from models import norm_kernels

    return norm_kernels.statistics(x, shift, gamma, beta, groups, eps)


@custom_op("restoration::norm_slopes", mutates_args=())
def norm_slopes(grad: Tensor, x: Tensor, coefficients: Tensor, gamma: Tensor, groups: int, silu: bool) -> Tensor:
    """By channel, from the gradient of y: level and slope for `norm_apply`; gradients of shift, gamma and beta; (N, 5, C)."""
    from models import norm_kernels

    return norm_kernels.slopes(grad, x, coefficients, gamma, groups, silu)


@custom_op("restoration::norm_apply", mutates_args=())
def norm_apply(grad: Tensor | None, x: Tensor, coefficients: Tensor, slopes: Tensor | None, silu: bool) -> Tensor:
    """y = act(scale (x - center) + beta), act SiLU or nothing, of x (N, C, H, W) and what `norm_statistics` returned.

    With the gradient of y that of x: scale act' grad - level - slope (x - center).
    """
    from models import norm_kernels

    return norm_kernels.apply(grad, x, coefficients, slopes, silu)


norm_statistics.register_fake(lambda x, *others: _by_channel(x))
norm_slopes.register_fake(lambda grad, x, *others: _by_channel(x))
norm_apply.register_fake(lambda grad, x, *others: torch.empty_like(x))


class _Normalised(torch.autograd.Function):
    """act(gamma (x + shift - mean) / deviation + beta) in the type of x (N, C, H, W), act SiLU or nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        coefficients = norm_statistics(x, shift, gamma, beta, groups, eps)
        ctx.save_for_backward(x, shift, gamma, coefficients)
        ctx.groups, ctx.silu = groups, silu
        return norm_apply(None, x, coefficients, None, silu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, gamma, coefficients = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        slopes = norm_slopes(grad, x, coefficients, gamma, ctx.groups, ctx.silu)
        of_shift = None if shift is None else slopes[:, 2].to(shift.dtype)
        of_gamma, of_beta = slopes[:, 3:].sum(0).to(gamma.dtype)
        return norm_apply(grad, x, coefficients, slopes, ctx.silu), of_shift, of_gamma, of_beta, None, None, None


class GroupNorm(nn.GroupNorm):
    """Group normalisation of x + shift, x (N, C, H, W) and shift (N, C), then SiLU (Elfwing et al., 2018) if `silu`.

    It may overwrite x, which nothing else must look at if there is a shift.
    """

    def __init__(self, groups: int, channels: int, *, silu: bool = False):
        super().__init__(groups, channels)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        if x.is_cuda and HAS_TRITON and not torch.compiler.is_compiling():
            return _Normalised.apply(x, shift, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        if shift is not None:
            x += shift.to(x.dtype)[:, :, None, None]  # no backward pass looks at what a convolution returned
        y = super().forward(x)
        return F.silu(y, inplace=not torch.is_grad_enabled()) if self.silu else y
