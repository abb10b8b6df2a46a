"""What a benchmark sets its times against: the machine's rates in the same run, a work's FLOPs, and the peak memory."""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from helper import format_table
from running.command_line import Parser, positive_int

_clock = time.perf_counter


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the machine."""

    matmul: float  # 2048 x 2048 matrices
    convolution: float  # 3 x 3, 192 channels, channels_last
    attention: float  # fused, 12,288 tokens of 64 channels

    def __str__(self) -> str:
        parts = (f"{name} {value / 1e9:.0f}" for name, value in vars(self).items())
        return f"{', '.join(parts)} GFLOP/s"


@dataclass(frozen=True)
class Work:
    """FLOPs of a forward pass."""

    convolution: int  # and other products of weights
    attention: int

    @property
    def total(self) -> int:
        return self.convolution + self.attention

    def floor(self, rates: Rates) -> float:
        """Seconds that it takes at the machine's rates, if everything else is free."""
        return self.convolution / rates.convolution + self.attention / rates.attention


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with --rounds and --busy."""
    result = Parser(description=description, allow_abbrev=False)
    result.add_argument("--rounds", type=positive_int, default=5, help="measurements; their median counts (default: 5)")
    result.add_argument("--busy", action="store_true", help="the machine does other work: one thread, processor time")
    return result


def prepare(args: argparse.Namespace) -> None:
    """Seeds, and with --busy goes on in one thread and counts its processor time from now on."""
    global _clock
    torch.manual_seed(0)
    if args.busy:
        torch.set_num_threads(1)
        _clock = time.process_time


def seconds(function: Callable[[], object], calls: int = 0) -> float:
    """Mean time of `calls` calls by all threads that torch uses, after two to warm up; 0: of one that needs no warming up."""
    if calls:
        timer = Timer("f()", globals={"f": function}, timer=_clock, num_threads=torch.get_num_threads())
        return timer.timeit(calls).mean
    start = _clock()
    function()
    return _clock() - start


@torch.no_grad()
def measure_rates() -> Rates:
    """The machine's rates now; a second or so."""
    a = torch.randn(2048, 2048)
    x, weight = (
        v.to(memory_format=torch.channels_last) for v in (torch.randn(1, 192, 128, 96), torch.randn(192, 192, 3, 3))
    )
    q = torch.randn(1, 2, 12288, 64)
    return Rates(
        2 * a.shape[0] ** 3 / seconds(lambda: a @ a, 3),
        2 * 9 * 192 * x.numel() / seconds(lambda: F.conv2d(x, weight, padding=1), 3),
        4 * q.numel() * q.shape[2] / seconds(lambda: F.scaled_dot_product_attention(q, q, q), 1),
    )


def count(model: nn.Module, *inputs: torch.Tensor) -> Work:
    """FLOPs of a forward pass; of a model with attention on the meta device, for the CPU's fused one counts as none."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    by_kind = counter.get_flop_counts()["Global"]
    attention = sum(flops for kind, flops in by_kind.items() if "bmm" in str(kind) or "attention" in str(kind))
    return Work(counter.get_total_flops() - attention, attention)


def peak_memory() -> float:
    """The most memory that this process has held so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@dataclass
class Ratio:
    """Times of a work, each over what stands beside it in the same round; their median is what counts."""

    name: str
    bar: float | None  # the most that the ratio may be
    times: list[float] = field(default_factory=list)
    baselines: list[float] = field(default_factory=list)

    HEADER: ClassVar = ("", "seconds", "baseline, s", "ratio (least, most)", "bar")

    def add(self, time: float, baseline: float) -> None:
        """A round's."""
        self.times.append(time)
        self.baselines.append(baseline)

    def cells(self) -> tuple[str, ...]:
        """A row of a table under `HEADER`."""
        ratios = [time / baseline for time, baseline in zip(self.times, self.baselines, strict=True)]
        middle = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"
        seconds = (f"{statistics.median(values):.4g}" for values in (self.times, self.baselines))
        return self.name, *seconds, middle, "" if self.bar is None else f"{self.bar:.3g}"


def print_ratios(ratios: Sequence[Ratio]) -> None:
    """The table of a benchmark, and what it was measured on."""
    print(format_table(Ratio.HEADER, [ratio.cells() for ratio in ratios]))
    clock = "wall-clock" if _clock is time.perf_counter else "processor"
    print(
        f"{len(ratios[0].times)} rounds; {clock} time, threads: {torch.get_num_threads()}, single precision, "
        f"torch {torch.__version__}"
    )
