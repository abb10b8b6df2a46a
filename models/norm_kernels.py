"""Triton kernels of group normalisation in channels_last memory, where an image is a matrix of H W rows and C columns.

A program takes CHANNELS columns of some rows, and keeps its sums apart: they are added up in the same order every time, so that
a step can be repeated bit for bit. `grad` is None in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 32, 64  # of a tile: 64 channels in half precision fill a line of a GPU's cache
PROGRAMS = 2048  # that share an operation: several for each of a card's processors
SPLITS = 16  # of a column's sums that are added up at once
# Of the small kernels: one that is made for no number of them serves all layers, and is compiled once.
NUMBERS = ["splits", "pixels", "channels", "size"]
SCALE, CENTER, OFFSET, INVERSE, OWN = (
    tl.constexpr(row) for row in range(5)
)  # rows of the coefficients, see `statistics`


@triton.jit
def _row(matrix, row, channel, channels, inside, TYPE: tl.constexpr):
    return tl.load(matrix + row * channels + channel, mask=inside, other=0).to(TYPE)


@triton.jit
def _sigmoid(value):
    return 1 / (1 + tl.exp(-value))


@triton.jit
def _before_silu(grad, value, scale, offset, SILU: tl.constexpr):
    """The gradient of scale value + offset, from that of its SiLU."""
    if SILU:
        y = scale * value + offset
        grad *= _sigmoid(y) * (1 + y * (1 - _sigmoid(y)))
    return grad


@triton.jit
def _sum(
    grad, x, coefficients, shift, sums, pixels, channels, rows,
    TYPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Forward: sums of x + shift and of its square. Backward: of the gradient, and of it times x + shift - mean."""
    split, sample = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    center = tl.zeros((CHANNELS,), TYPE)
    if grad is not None:
        center = _row(coefficients, 5 * sample + CENTER, channel, channels, inside, TYPE)
        scale = _row(coefficients, 5 * sample + SCALE, channel, channels, inside, TYPE)
        offset = _row(coefficients, 5 * sample + OFFSET, channel, channels, inside, TYPE)
    elif shift is not None:
        center = -_row(shift, sample, channel, channels, inside, TYPE)
    total, product = tl.zeros((ROWS, CHANNELS), TYPE), tl.zeros((ROWS, CHANNELS), TYPE)
    tile = tl.arange(0, ROWS)[:, None] * channels + channel
    for first in range(split * rows, tl.minimum((split + 1) * rows, pixels), ROWS):
        here = (first + tl.arange(0, ROWS)[:, None] < pixels) & inside
        start = (sample.to(tl.int64) * pixels + first) * channels
        value = tl.load(x + start + tile, mask=here, other=0).to(TYPE) - center
        if grad is None:
            factor = tl.where(here, value, 0)
        else:
            factor = tl.load(grad + start + tile, mask=here, other=0).to(TYPE)
            factor = _before_silu(factor, value, scale, offset, SILU)
        total += factor
        product += factor * value
    place = sums + 2 * (sample * tl.num_programs(0) + split) * channels + channel
    tl.store(place, tl.sum(total, 0), inside)
    tl.store(place + channels, tl.sum(product, 0), inside)


@triton.jit
def _added(sums, splits, channel, channels, inside, WIDTH: tl.constexpr, TYPE: tl.constexpr, SPLITS: tl.constexpr):
    """The two sums of a sample over all programs, from (splits, 2, C)."""
    total, product = tl.zeros((SPLITS, WIDTH), TYPE), tl.zeros((SPLITS, WIDTH), TYPE)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)[:, None]
        place, here = sums + 2 * split * channels + channel, (split < splits) & inside
        total += tl.load(place, mask=here, other=0)
        product += tl.load(place + channels, mask=here, other=0)
    return tl.sum(total, 0), tl.sum(product, 0)


@triton.jit(do_not_specialize=NUMBERS)
def _statistics(
    sums, shift, gamma, beta, coefficients, splits, pixels, channels, size, eps,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    group, sample = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, WIDTH) < size
    channel, zeros = group * size + tl.arange(0, WIDTH), tl.zeros((WIDTH,), TYPE)
    sums += 2 * sample * splits * channels
    total, square = _added(sums, splits, channel, channels, inside, WIDTH, TYPE, SPLITS)
    mean = tl.sum(total, 0) / (pixels * size)
    variance = tl.maximum(tl.sum(square, 0) / (pixels * size) - mean * mean, 0)
    inverse = 1 / tl.sqrt(variance + eps)
    center = mean + zeros
    if shift is not None:
        center -= _row(shift, sample, channel, channels, inside, TYPE)
    place = coefficients + 5 * sample * channels + channel
    tl.store(place + SCALE * channels, inverse * _row(gamma, 0, channel, channels, inside, TYPE), inside)
    tl.store(place + CENTER * channels, center, inside)
    tl.store(place + OFFSET * channels, _row(beta, 0, channel, channels, inside, TYPE), inside)
    tl.store(place + INVERSE * channels, inverse + zeros, inside)
    tl.store(place + OWN * channels, total - pixels * mean, inside)


@triton.jit(do_not_specialize=NUMBERS)
def _slopes(
    sums, coefficients, gamma, slopes, splits, pixels, channels, size,
    TYPE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    group, sample = tl.program_id(0), tl.program_id(1)
    inside = tl.arange(0, WIDTH) < size
    channel = group * size + tl.arange(0, WIDTH)
    sums += 2 * sample * splits * channels
    total, product = _added(sums, splits, channel, channels, inside, WIDTH, TYPE, SPLITS)
    weight = _row(gamma, 0, channel, channels, inside, TYPE)
    scale = _row(coefficients, 5 * sample + SCALE, channel, channels, inside, TYPE)
    inverse = _row(coefficients, 5 * sample + INVERSE, channel, channels, inside, TYPE)
    own = _row(coefficients, 5 * sample + OWN, channel, channels, inside, TYPE)
    level = inverse * (tl.sum(total * weight, 0) / (pixels * size))
    slope = inverse * inverse * inverse * (tl.sum(product * weight, 0) / (pixels * size))
    place = slopes + 5 * sample * channels + channel
    tl.store(place, level, inside)
    tl.store(place + channels, slope, inside)
    tl.store(place + 2 * channels, scale * total - level * pixels - slope * own, inside)
    tl.store(place + 3 * channels, product * inverse, inside)
    tl.store(place + 4 * channels, total, inside)


@triton.jit
def _apply(
    grad, x, coefficients, slopes, result, pixels, channels, rows,
    TYPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Forward: SiLU of what is normalised. Backward: the gradient of x."""
    split, sample = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    center = _row(coefficients, 5 * sample + CENTER, channel, channels, inside, TYPE)
    scale = _row(coefficients, 5 * sample + SCALE, channel, channels, inside, TYPE)
    offset = _row(coefficients, 5 * sample + OFFSET, channel, channels, inside, TYPE)
    if grad is not None:
        level = _row(slopes, 5 * sample, channel, channels, inside, TYPE)
        slope = _row(slopes, 5 * sample + 1, channel, channels, inside, TYPE)
    tile = tl.arange(0, ROWS)[:, None] * channels + channel
    for first in range(split * rows, tl.minimum((split + 1) * rows, pixels), ROWS):
        here = (first + tl.arange(0, ROWS)[:, None] < pixels) & inside
        start = (sample.to(tl.int64) * pixels + first) * channels
        value = tl.load(x + start + tile, mask=here, other=0).to(TYPE) - center
        if grad is None:
            out = scale * value + offset
            if SILU:
                out *= _sigmoid(out)
        else:
            out = tl.load(grad + start + tile, mask=here, other=0).to(TYPE)
            out = scale * _before_silu(out, value, scale, offset, SILU) - level - slope * value
        tl.store(result + start + tile, out, mask=here)


def _tiles(x: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int], dict[str, Any]]:
    """The grid over the tiles of x (N, C, H, W), and the last arguments of a kernel that takes them."""
    count, channels, height, width = x.shape
    pixels, columns = height * width, triton.cdiv(channels, CHANNELS)
    tiles = triton.cdiv(pixels, ROWS)
    rows = ROWS * triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // (columns * count))))  # of a program
    grid = triton.cdiv(pixels, rows), columns, count
    return grid, (pixels, channels, rows), dict(TYPE=_type(x), ROWS=ROWS, CHANNELS=CHANNELS)


def _type(x: Tensor) -> tl.dtype:
    """What is summed and multiplied in."""
    return tl.float64 if x.dtype is torch.float64 else tl.float32


def _of_groups(
    kernel: Any, x: Tensor, summed: tuple[Tensor | None, ...], inputs: tuple[Tensor | None, ...], groups: int, silu: bool,
    *more: float,
) -> Tensor:  # fmt: skip
    """Sum over pixels, then let `kernel` make five values of every channel, (N, 5, C), from the sums of a group."""
    grid, shape, how = _tiles(x)
    (splits, _, count), (pixels, channels, _) = grid, shape
    wide = dict(dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    sums, values = torch.empty(count, splits, 2, channels, **wide), torch.empty(count, 5, channels, **wide)
    size = channels // groups
    _sum[grid](*summed, sums, *shape, **how, SILU=silu)
    how = dict(TYPE=_type(x), WIDTH=max(CHANNELS, triton.next_power_of_2(size)), SPLITS=SPLITS)
    kernel[groups, count](sums, *inputs, values, splits, pixels, channels, size, *more, **how)
    return values


def statistics(x: Tensor, shift: Tensor | None, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
    return _of_groups(_statistics, x, (None, x, None, shift), (shift, gamma, beta), groups, False, eps)


def slopes(grad: Tensor, x: Tensor, coefficients: Tensor, gamma: Tensor, groups: int, silu: bool) -> Tensor:
    return _of_groups(_slopes, x, (grad, x, coefficients, None), (coefficients, gamma), groups, silu)


def apply(grad: Tensor | None, x: Tensor, coefficients: Tensor, slopes: Tensor | None, silu: bool) -> Tensor:
    grid, shape, how = _tiles(x)
    result = torch.empty_like(x)
    _apply[grid](grad, x, coefficients, slopes, result, *shape, **how, SILU=silu)
    return result
