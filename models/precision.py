"""Networks whose weights are cast to half precision all at once, for a step or for good.

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


def call(module: nn.Module, weights: dict[str, Tensor | None], *args: Any) -> Any:
    """`module(*args)` with other weights, in single precision, by name; under autocast all of them are cast at once."""
    tensors = {name: weight for name, weight in weights.items() if weight is not None}
    device = next(iter(tensors.values())).device.type
    if torch.is_autocast_enabled(device):
        cast = _Cast.apply(torch.get_autocast_dtype(device), *tensors.values())
        weights = weights | dict(zip(tensors, cast, strict=True))
    return functional_call(module, weights, args, tie_weights=False)


def keep_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Keep in half precision what autocast would cast for every product, for a module that is not trained; results are the same."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            for parameter in layer.parameters():
                parameter.data = parameter.data.to(dtype)
