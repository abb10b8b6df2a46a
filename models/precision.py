"""A network whose weights are all cast to half precision at once.

Autocast casts them one by one, and their gradients back: on a GPU two launches a tensor, which take longer than the casts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class _Cast(torch.autograd.Function):
    """Float32 tensors of any shapes in another number format, and their gradients back in float32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(cast, tensors)
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Cast.forward(ctx, torch.float32, *gradients)


def call(module: nn.Module, *args: Any) -> Any:
    """`module(*args)` as it is without autocast and, under it, with all weights cast at once.

    Scalars stay in float32, in which operators use them also beside tensors in half precision.
    """
    weights = {name: parameter for name, parameter in module.named_parameters() if parameter.dim()}
    device = next(iter(weights.values())).device.type
    if not torch.is_autocast_enabled(device):
        return module(*args)
    cast = _Cast.apply(torch.get_autocast_dtype(device), *weights.values())
    return functional_call(module, dict(zip(weights, cast, strict=True)), args)
