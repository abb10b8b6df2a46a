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
        ctx: Any, x: Tensor, shift: Tensor | None, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        gamma, beta = (v.to(wide).view(groups, -1) for v in (gamma, beta))  # (G, C / G)
        count, pixels = len(x), x[0, 0].numel()
        own = total = x.sum((2, 3), dtype=wide)  # (N, C)
        square = torch.linalg.vector_norm(x, dim=(2, 3), dtype=wide).square_()
        if shift is not None:  # of x + shift
            shift = shift.to(wide)
            square.addcmul_(shift, torch.add(shift * pixels, own, alpha=2))
            total = torch.add(own, shift, alpha=pixels)
        share = 1 / (pixels * gamma.shape[1])
        mean, inverse = (
            v.view(count, groups, -1).sum(2, keepdim=True).mul_(share) for v in (total, square)
        )  # (N, G, 1)
        inverse.addcmul_(mean, mean, value=-1).clamp_(min=0).add_(eps).rsqrt_()  # 1 / deviation
        scale = inverse * gamma  # (N, G, C / G)
        offset = torch.addcmul(beta, scale, mean, value=-1).flatten(1)  # (N, C)
        scale = scale.flatten(1)
        if shift is not None:
            offset.addcmul_(scale, shift)
        ctx.save_for_backward(x, shift, gamma, own, mean, inverse, scale, offset)
        ctx.silu = silu
        y = _affine(x, scale, offset)
        return F.silu(y, inplace=True) if silu else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, gamma, own, mean, inverse, scale, offset = ctx.saved_tensors
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, _affine(x, scale, offset))
        (count, groups, _), pixels = mean.shape, x[0, 0].numel()
        total = grad.sum((2, 3), dtype=scale.dtype)  # (N, C)
        product = (grad * x).sum((2, 3), dtype=scale.dtype)
        if shift is not None:
            product.addcmul_(shift, total)
        by_group = total.view(count, groups, -1)  # (N, G, C / G)
        product = product.view_as(by_group).addcmul_(by_group, mean, value=-1)  # grad times x + shift - mean
        share = -1 / (pixels * gamma.shape[1])
        slope = (product * gamma).sum(2, keepdim=True).mul_(inverse.pow(3)).mul_(share)  # (N, G, 1)
        level = (by_group * gamma).sum(2, keepdim=True).mul_(inverse).mul_(share).addcmul_(slope, mean, value=-1)
        slope, level = (v.expand_as(by_group).reshape(count, -1) for v in (slope, level))  # (N, C)
        grad_shift = None
        if shift is not None:
            level = level.addcmul(slope, shift)
            grad_shift = (scale * total).addcmul_(slope, own).add_(level, alpha=pixels)
        grad_x = _affine(x, slope, level)
        grad_x = torch.addcmul(grad_x, grad, scale[:, :, None, None], out=grad_x)
        grad_gamma = (product * inverse).sum(0).flatten()
        return grad_x, grad_shift, grad_gamma, total.sum(0), None, None, None


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
                return _Normalised.apply(x, shift, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        if shift is not None:
            x += shift.to(x.dtype)[:, :, None, None]  # no backward pass looks at what a convolution returned
        y = super().forward(x)
        return F.silu(y, inplace=not torch.is_grad_enabled()) if self.silu else y
