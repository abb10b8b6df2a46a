"""Measures the modules of one checkout, for `gpu.py`: `python gpu_rows.py CHECKOUT RESULT.json ROW ...`

A process serves one checkout, which may be older than this file: `find` knows where it keeps things.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from gpu_profile import profiled
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

PROFILED_STEPS = 3
EPOCH = 1000  # steps that a trainer takes its epochs for: its learning rate depends on them


def find(name: str, *modules: str) -> Any:
    """What a checkout calls `name`, from the first of these modules that has it. Raises AttributeError if none has."""
    for module in modules:
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"this checkout has no {name}")


# --- time and memory -------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Marks moments, and tells the seconds between successive ones."""

    def mark(self) -> Any: ...

    def seconds(self, marks: list[Any]) -> list[float]: ...


class CudaClock:
    """The device's clock, by events: the host does not wait."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list[torch.cuda.Event]) -> list[float]:
        torch.cuda.synchronize()
        return [first.elapsed_time(second) / 1000 for first, second in zip(marks, marks[1:], strict=False)]


class HostClock:
    """The host's clock, for a device that computes at once."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: list[float]) -> list[float]:
        return [second - first for first, second in zip(marks, marks[1:], strict=False)]


@dataclass
class Bench:
    """What is measured, and with what."""

    hps_vqvae: Any  # settings of both stages, as the checkout's `hps.py` has them
    hps_diffusion: Any
    device: torch.device
    clock: Clock
    warm: int = 5  # steps before those that count
    steps: int = 20
    evaluations: int = 50  # a sample
    matrix: int = 8192  # rows and columns
    copied: int = 2**30  # bytes

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """The most memory that tensors took since; None on a device that does not count it."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def timed(self, function: Callable[[], object], warm: int, calls: int) -> float:
        """Median seconds of a call."""
        for _ in range(warm):
            function()
        self.reset_peak()
        marks = [self.clock.mark()]
        for _ in range(calls):
            function()
            marks.append(self.clock.mark())
        return statistics.median(self.clock.seconds(marks))


def flops_of(function: Callable[[], object]) -> int:
    """FLOPs of a call: two a multiplication and addition; what checkpointing computes again counts."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def rates(bench: Bench) -> dict[str, float]:
    """What the device does: FLOP/s of a bf16 matrix product, and bytes/s that a copy reads and writes."""
    a, b = torch.randn(2, bench.matrix, bench.matrix, device=bench.device).to(torch.bfloat16)
    product = torch.empty_like(a)
    multiply = bench.timed(lambda: torch.mm(a, b, out=product), 30, bench.steps)
    source, target = (torch.ones(bench.copied, dtype=torch.uint8, device=bench.device) for _ in range(2))
    copy = bench.timed(lambda: target.copy_(source), bench.warm, bench.steps)
    return {"matrix_rate": 2 * bench.matrix**3 / multiply, "copy_rate": 2 * bench.copied / copy}


# --- training steps --------------------------------------------------------------------------------------------------


class Feed:
    """Stands for a trainer's loader and its sampler: an epoch of one batch over and over, on the device already."""

    def __init__(self, batch: Any):
        self.batch, self.sampler, self.count, self.start = batch, self, EPOCH * len(batch), 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch, (self.count - self.start) // len(self.batch))


def samples(bench: Bench, hps: Any, count: int) -> Any:
    """A batch of random images."""
    Batch, Meta, Key = (find(name, "loading.batches", "datasets") for name in ("Batch", "Meta", "SampleKey"))
    clean = torch.rand(count, *hps.image_shape, device=bench.device)
    degraded = (clean + 0.05 * torch.randn_like(clean)).clamp(0, 1)
    metas = [Meta(f"{i}.png", Key(0, i, i)) for i in range(count)]
    return Batch(clean, degraded, metas, torch.full((count,), hps.noise_level, device=bench.device))


def make_vqvae(bench: Bench) -> torch.nn.Module:
    kind = find("VQVAE", "vqvae")
    return kind(**bench.hps_vqvae.arguments(kind)).to(bench.device)


def make_model(hps: Any) -> torch.nn.Module:
    return find("make_diffusion", "diffusion", "restoration")(hps)


def make_trainer(bench: Bench, stage: str, batch_size: int, amp: bool = True, **changes: Any) -> Any:
    """The trainer of a stage, "1" or "2", before its first step; it initialises itself from one image."""
    hps = (bench.hps_vqvae if stage == "1" else bench.hps_diffusion).updated(
        batch_size=batch_size, nb_workers=0, **changes
    )
    empty = find("PhantomDataset", "loading.mammograms", "datasets")(hps, "train")
    half = find("amp_dtype", "helper")(bench.device, amp)
    common, more = (bench.device, empty, empty), dict(amp=half, progress=False)
    vqvae = make_vqvae(bench)
    if stage == "1":
        trainer = find("VQVAETrainer", "trainer")("phantom", hps, vqvae, *common, **more)
    else:
        first_stage = find("VQVAE2Wrapper", "vqvae2_wrapper")(vqvae)
        kind = find("DiffusionTrainer", "trainer")
        trainer = kind("phantom", hps, make_model(hps), *common, **more, first_stage=first_stage)
    trainer.loader = Feed(samples(bench, hps, batch_size))
    trainer.logger = SimpleNamespace(log=lambda *args: None)
    first = samples(bench, hps, 1)
    trainer.first_batches = lambda count: [first]
    trainer.setup()
    begin(trainer)
    return trainer


def begin(trainer: Any) -> None:
    """What `fit` does before its first epoch."""
    getattr(trainer, "begin", lambda: None)()  # older ones have one phase
    trainer.parallelize()


def take_steps(trainer: Any, count: int) -> None:
    """Train the last `count` steps of an epoch."""
    trainer.seen = trainer.loader.count - count * len(trainer.loader.batch)
    trainer.train_epoch()


def begin_diffusion(trainer: Any) -> None:
    """Go on to the phase that trains the diffusion, with the state that a step of the posterior mean leaves."""
    take_steps(trainer, 1)
    trainer.epoch = trainer.mean_epochs
    trainer.step = trainer.phase()[0]
    begin(trainer)


def training(
    bench: Bench, stage: str, batch_size: int = 4, diffusion: bool = False, compiled: bool = False, **how: Any
) -> dict:
    """A training step: seconds between the ends of successive ones, on the device."""
    trainer = make_trainer(bench, stage, batch_size, **how)
    if diffusion:
        begin_diffusion(trainer)
    flops = flops_of(lambda: take_steps(trainer, 1))
    if compiled:
        trainer.compile()
        trainer.parallelize()
    take_steps(trainer, bench.warm)
    marks, own = [], trainer.optimizer_step

    def marked(*args: Any) -> Tensor:
        finite = own(*args)
        marks.append(bench.clock.mark())
        return finite

    bench.reset_peak()
    trainer.optimizer_step = marked
    take_steps(trainer, bench.steps + 1)
    trainer.optimizer_step = own
    seconds = statistics.median(bench.clock.seconds(marks))
    result = {"seconds": seconds, "peak_bytes": bench.peak_bytes(), "flops": flops}
    result |= profiled(lambda: take_steps(trainer, PROFILED_STEPS), bench.device, PROFILED_STEPS)
    if compiled:
        torch.compiler.reset()  # or its caches keep the model, which would count in the next row
    return result


# --- evaluations and samples -----------------------------------------------------------------------------------------


def evaluation(bench: Bench, amp: torch.dtype | None = None, products: str = "highest") -> dict:
    """An evaluation of the diffusion's UNet, one image; `products` is torch's precision of float32 matrix products."""
    kind, hps, rate = find("UNet", "diffusion"), bench.hps_diffusion, bench.hps_vqvae.scaling_rates[0]
    unet = kind(**hps.arguments(kind)).to(bench.device).eval()
    x = torch.randn(1, hps.in_channels, *(side // rate for side in hps.image_shape[1:]), device=bench.device)
    t = torch.full((1,), hps.timesteps // 2, device=bench.device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        with torch.no_grad(), torch.autocast(bench.device.type, amp or torch.bfloat16, enabled=amp is not None):
            result = {"flops": flops_of(lambda: unet(x, t)), "seconds": bench.timed(lambda: unet(x, t), 3, bench.steps)}
            result["peak_bytes"] = bench.peak_bytes()
            return result | profiled(lambda: unet(x, t), bench.device, 1)
    finally:
        torch.set_float32_matmul_precision(before)


def sample(bench: Bench, single: bool = False) -> dict:
    """An image restored as one posterior sample, by `Restorer`, in its precision on CUDA or in `single`."""
    hps, model = bench.hps_diffusion, make_model(bench.hps_diffusion).to(bench.device)
    if getattr(model, "has_mean", False):
        model.variable.deviations.fill_(1)  # what is not measured is not sampled
    first_stage = find("VQVAE2Wrapper", "vqvae2_wrapper")(make_vqvae(bench))
    kind = find("Restorer", "restoration.restorer", "restoration")
    try:
        amp = find("sampling_dtype", "helper")(bench.device, amp=False, no_amp=single)
    except AttributeError:  # of an older checkout the default is single precision
        amp = None
    if "sampling" in {field.name for field in dataclasses.fields(kind)}:
        how = dict(samples=1, sampling=find("Sampling", "models.samplers")("ddim", bench.evaluations))
        name: Any = "benchmark"
    else:
        how, name = dict(steps=bench.evaluations), ["benchmark"]
    restorer = kind(first_stage, model, hps, amp=amp, **how)
    image = samples(bench, hps, 1).degraded

    def restore() -> Tensor:
        return restorer.restore(image, name)

    flops = flops_of(restore)  # which warms up
    return {"flops": flops, "seconds": bench.timed(restore, 0, 3), "peak_bytes": bench.peak_bytes()}


ROWS: dict[str, Callable[[Bench], dict]] = {
    "stage1": functools.partial(training, stage="1"),
    "stage1-no-amp": functools.partial(training, stage="1", amp=False),
    "stage1-batch16": functools.partial(training, stage="1", batch_size=16),
    "stage1-compiled": functools.partial(training, stage="1", compiled=True),
    "mean": functools.partial(training, stage="2", use_checkpoint=True),
    "mean-no-checkpoint": functools.partial(training, stage="2", use_checkpoint=False),
    "mean-compiled": functools.partial(training, stage="2", use_checkpoint=True, compiled=True),
    "diffusion": functools.partial(training, stage="2", use_checkpoint=True, diffusion=True),
    "diffusion-no-checkpoint": functools.partial(training, stage="2", use_checkpoint=False, diffusion=True),
    "unet-float32": evaluation,
    "unet-tf32": functools.partial(evaluation, products="high"),
    "unet-bf16": functools.partial(evaluation, amp=torch.bfloat16),
    "unet-fp16": functools.partial(evaluation, amp=torch.float16),
    "sample": sample,
    "sample-float32": functools.partial(sample, single=True),
}


def measure(bench: Bench, names: list[str]) -> dict[str, Any]:
    """The device's rates, and every row or, under "errors", why there is none: one that fails leaves the others."""
    result: dict[str, Any] = {"torch": torch.__version__, **rates(bench), "rows": {}, "errors": {}}
    for name in names:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what trainers tell a user
                result["rows"][name] = ROWS[name](bench)
        except Exception as error:
            result["errors"][name] = f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
    return result


def main() -> None:
    checkout, path, *names = sys.argv[1:]
    sys.path[0] = checkout  # for this folder: what it holds must not stand for what the checkout calls the same
    hps_vqvae, hps_diffusion = (find(name, "hps")["cbis-ddsm"] for name in ("HPS_VQVAE", "HPS_DIFFUSION"))
    bench = Bench(hps_vqvae, hps_diffusion, torch.device("cuda"), CudaClock())
    result = {"device": torch.cuda.get_device_name()} | measure(bench, names)
    Path(path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
