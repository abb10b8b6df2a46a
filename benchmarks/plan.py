"""What training and sampling take on a GPU, worked out without one: memory, arithmetic, time and the largest batch.

The trainers' own steps run on fake tensors: every operator is seen, none is computed. A GPU's time is a roofline (Williams
et al., 2009): an operator takes as long as its arithmetic or its traffic, whichever is longer. `--check` holds the same
prediction for this machine's CPU against real steps.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from tqdm import tqdm

import trainer as trainer_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from diffusion import LatentDiffusion, make_diffusion
from helper import UserError, format_table, get_parameter_count
from hps import HPS_DIFFUSION, HPS_VQVAE, TASKS, HParams, apply_overrides
from loading.batches import Batch, Meta, SampleKey
from loading.mammograms import PhantomDataset
from models.samplers import DDIMSampler
from restoration.restorer import sampling_of
from running.command_line import Parser, positive_int
from running.scripts import run_script
from running.writing import atomic_path, write_json
from trainer import DiffusionTrainer, VQVAETrainer
from training.loop import Trainer
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

TITLES = {
    "1": "stage 1, VQ-VAE-2", "mean": "stage 2, posterior mean", "diffusion": "stage 2, diffusion around it",
    "sampling": "restoring",
}  # fmt: skip
CBIS_TRAINING_IMAGES = 2113  # breast views of CBIS-DDSM that `split=patient` and `validation_fraction=0.1` train on
GIB, GB, TERA = 2**30, 1e9, 1e12
GROWTH_SIDES = (0.25, 0.5, 0.75, 1.0, 1.25)  # of the image's sides
GROWTH_BATCHES = (1, 2, 4, 6, 8)
CHECK_SIDES = {"1": (1 / 4, 1 / 2), "mean": (1 / 8, 1 / 4), "diffusion": (1 / 8, 1 / 4)}  # of the image's sides
CHECK_BATCH = 2
MEMORY_TOLERANCE, TIME_TOLERANCE = 0.15, 0.25

aten = torch.ops.aten
# torch counts nothing for the CPU's fused attention
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
KINDS = {
    aten.convolution: "convolution",
    aten.convolution_backward: "convolution backward",
    **dict.fromkeys([f for f in FLOP_FORMULAS if "attention" in str(f)], "attention"),
    **dict.fromkeys([f for f in FLOP_FORMULAS if "attention" in str(f) and "backward" in str(f)], "attention backward"),
}
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


# --- machines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Memory in bytes, bandwidth in bytes/s, and rates in FLOP/s by kind of operator or else by number format."""

    name: str
    memory: float
    bandwidth: float
    rates: Mapping[str, float]
    source: str = ""

    def seconds(self, work: Work) -> float:
        """Time of operators one after the other."""
        return sum(count * max(self.arithmetic(op), op.bytes / self.bandwidth) for op, count in work.items())

    def arithmetic(self, op: Operator) -> float:
        """Seconds of an operator's arithmetic at the full rate."""
        rate = self.rates.get(op.kind) or self.rates.get(op.format)
        return op.flops / rate if op.flops else 0.0


# Dense rates of the tensor cores with float32 accumulation, without sparsity; float32 outside them.
CARDS = {
    "a100": Machine(
        "A100 80 GB SXM", 80 * GIB, 2039 * GB, {"bf16": 312 * TERA, "tf32": 156 * TERA, "fp32": 19.5 * TERA},
        "NVIDIA A100 Tensor Core GPU data sheet (2021)",
    ),
    "h100": Machine(
        "H100 80 GB SXM", 80 * GIB, 3350 * GB, {"bf16": 989 * TERA, "tf32": 494 * TERA, "fp32": 67 * TERA},
        "NVIDIA H100 Tensor Core GPU data sheet (2023), half of the rates it gives with sparsity",
    ),
    "4090": Machine(
        "RTX 4090", 24 * GIB, 1008 * GB, {"bf16": 165.2 * TERA, "tf32": 82.6 * TERA, "fp32": 82.6 * TERA},
        "NVIDIA Ada GPU architecture whitepaper (2022), appendix A",
    ),
}  # fmt: skip


# --- what a step does ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """One call of an operator: its kind, number format (bf16, tf32 or fp32), arithmetic and traffic."""

    kind: str
    format: str
    flops: int
    bytes: int


Work = Counter[Operator]


class Meter(TorchDispatchMode):
    """Watches operators: counts their FLOPs and bytes, and which storages live.

    A storage counts from the operator that returned it, or from `label`, until the last tensor on it is gone. Bytes moved
    are those of an operator's inputs and outputs, none for views. Temporary memory inside an operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: Work = Counter()
        self.live: Counter[str] = Counter()  # bytes by label
        self.peak: Counter[str] = Counter()  # `live` at its greatest
        self.repeat = 1  # how often what comes is counted
        self._storages: dict[int, tuple[weakref.ref, int, str]] = {}

    def label(self, tensors: Iterable[Tensor], name: str) -> None:
        """Count the storages of these tensors under `name` from now on."""
        for tensor in tensors:
            self._count(tensor, name)
        self._compare()

    def _count(self, tensor: Tensor, name: str, keep: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            if keep:
                return
            reference, size, old = self._storages[key]
            self.live[old] -= size
        else:
            reference, size = weakref.ref(storage, functools.partial(self._free, key)), storage.nbytes()
        self._storages[key] = reference, size, name
        self.live[name] += size

    def _free(self, key: int, _: weakref.ref) -> None:
        _, size, name = self._storages.pop(key)
        self.live[name] -= size

    def _compare(self) -> None:
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        packet = func._overloadpacket
        makes = any(t.untyped_storage()._cdata not in self._storages for t in outputs)
        for tensor in outputs:
            self._count(tensor, "activations", keep=True)
        self._compare()
        if packet not in ALLOCATIONS and (makes or func._schema.is_mutable):
            self._record(packet, inputs, outputs, args, kwargs or {}, out)
        return out

    def _record(
        self, packet: Any, inputs: list[Tensor], outputs: list[Tensor], args: tuple, kwargs: dict, out: Any
    ) -> None:
        formula = FLOP_FORMULAS.get(packet)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        kind = KINDS.get(packet, "matrix product") if formula else "other"
        half = bool(inputs) and inputs[0].dtype in (torch.bfloat16, torch.float16)
        # torch lets cuDNN's convolutions use TensorFloat-32 and keeps matrix products in float32
        number = "bf16" if half else "tf32" if kind.startswith("convolution") else "fp32"
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        self.work[Operator(kind, number, flops, moved)] += self.repeat


def flops(work: Work, kind: str = "") -> int:
    """FLOPs of operators, of those whose kind begins with `kind`."""
    return sum(count * op.flops for op, count in work.items() if op.kind.startswith(kind))


def traffic(work: Work) -> int:
    """Bytes that operators move."""
    return sum(count * op.bytes for op, count in work.items())


# --- the steps -------------------------------------------------------------------------------------------------------


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of a float32 input under the CPU's autocast."""

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    return run


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextlib.contextmanager
def fake_tensors(mode: FakeTensorMode, device: str = "cpu") -> Iterator[None]:
    """Inside the block tensors have shapes and no values, on the CPU or on a CUDA device that need not be there.

    Under autocast either has CUDA's number formats. A backward pass needs the CPU, or a driver.
    """
    patches = [
        # a module of fake tensors cannot be moved and need not be; its copies stay in the same mode
        mock.patch.object(nn.Module, "to", lambda self, *args, **kwargs: self),
        mock.patch.object(FakeTensorMode, "__deepcopy__", lambda self, memo: self, create=True),
        mock.patch.object(LatentDiffusion, "has_samples", True),  # values would say it
    ]
    if device == "cuda":
        torch._C._ensureCUDADeviceGuardSet()
        patches += [
            mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            mock.patch.object(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
            mock.patch.object(trainer_module, "seeded_generator", lambda *key, device=None: None),  # has no fake
            # torch asks the device which kernel it has, and without one takes the slow one
            mock.patch.object(F, "scaled_dot_product_attention", _fused_attention),
        ]
    else:  # where the models meet them, these are all the functions that CUDA's autocast runs in float32 and the CPU's not
        patches += [mock.patch.object(F, f.__name__, _in_float32(f)) for f in (F.group_norm, F.interpolate)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(mode)
        yield


@dataclass(frozen=True)
class Setting:
    """What is planned: a stage of a task, its settings and those of its first stage."""

    stage: str  # of TITLES: stage 2 is trained in two
    task: str
    hps: HParams
    hps_vqvae: HParams
    passes: int = 1  # forward and backward passes an optimiser step
    evaluations: int = 0  # of the diffusion's UNet, in restoring; 0: the posterior mean

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample; whole images are sampled."""
        channels, *sides = self.hps.image_shape
        crop = self.hps.crop_size
        return (channels, crop, crop) if crop and self.stage != "sampling" else (channels, *sides)

    @property
    def epochs(self) -> int:
        """Epochs that train it; of restoring, those that train the diffusion."""
        if self.stage == "1":
            return self.hps.max_epochs
        mean = min(self.hps.mean_epochs, self.hps.max_epochs) if self.hps.precondition == "residual" else 0
        return mean if self.stage == "mean" else self.hps.max_epochs - mean

    @property
    def variants(self) -> dict[str, Setting]:
        """The ways to go about it: with and without gradient checkpointing, or the products of restoring."""
        if self.stage == "1":
            return {"": self}
        if self.stage != "sampling":
            return {f"with{'' if on else 'out'} checkpointing": self.changed(use_checkpoint=on) for on in (True, False)}
        products = {"posterior mean": self} if self.hps.precondition == "residual" else {}
        for sampling in (sampling_of(self.hps, "ddim"), sampling_of(self.hps, "dpm++")) if self.epochs else ():
            products[f"sample, {sampling}"] = dataclasses.replace(self, evaluations=sampling.steps)
        return products

    @property
    def batch(self) -> int:
        """Samples a pass."""
        return self.hps.batch_size // self.passes

    def changed(self, **changes: Any) -> Setting:
        """The same with other settings, each in whichever table has it."""
        tables = self.hps, self.hps_vqvae
        hps, hps_vqvae = (table.updated(**{k: v for k, v in changes.items() if k in table}) for table in tables)
        return dataclasses.replace(self, hps=hps, hps_vqvae=hps_vqvae)

    def with_batch(self, batch: int) -> Setting:
        """The same at `batch` samples a pass."""
        return self.changed(batch_size=batch * self.passes)

    def with_sides(self, factor: float) -> Setting:
        """The same with the sides of its samples, and so of the images, times `factor`, in multiples of the total scaling."""
        multiple = math.prod(self.hps_vqvae.scaling_rates)
        channels, *sides = self.shape
        sides = [max(1, round(factor * side / multiple)) * multiple for side in sides]
        return self.changed(image_shape=[channels, *sides], crop_size=0)

    def make(self, device: torch.device, amp: torch.dtype | None) -> Trainer:
        """The stage's trainer, without data, in its phase of a training."""
        empty = PhantomDataset(HPS_VQVAE["phantom"], "train")
        vqvae = VQVAE(**self.hps_vqvae.arguments(VQVAE))
        common = (device, empty, empty)
        if self.stage == "1":
            return VQVAETrainer(self.task, self.hps, vqvae.train(), *common, amp=amp)
        model = make_diffusion(self.hps)
        if model.has_mean:
            model.variable.deviations.fill_(1)  # what is not measured is not sampled
        trainer = DiffusionTrainer(self.task, self.hps, model, *common, amp=amp, first_stage=VQVAE2Wrapper(vqvae))
        enter(trainer, 0 if self.stage == "mean" else trainer.mean_epochs)
        return trainer

    def samples(self, device: torch.device) -> Batch:
        """A batch of random images."""
        metas = [Meta(f"{i}.png", SampleKey(0, i, i)) for i in range(self.batch)]
        clean, degraded = torch.rand(2, self.batch, *self.shape, device=device)
        return Batch(clean, degraded, metas, torch.full((self.batch,), self.hps.noise_level, device=device))


def enter(trainer: Trainer, epoch: int) -> None:
    """Go on at an epoch, with what is trained in it."""
    trainer.epoch = epoch
    trainer.step = trainer.phase()[0]
    trainer.begin()
    trainer.model.train()


def forward(trainer: Trainer, batch: Batch) -> Tensor:
    """The loss of a batch, under autocast, as `Trainer.train_epoch` takes it."""
    with torch.autocast(trainer.device.type, trainer.amp or torch.bfloat16, enabled=trainer.amp is not None):
        return trainer.loss(batch).loss


def train_step(trainer: Trainer, batch: Batch, passes: int = 1) -> None:
    """One optimiser step of `passes` batches, as `Trainer.train_epoch` takes it."""
    if isinstance(trainer, DiffusionTrainer):
        # its value steers the update: a fake tensor made from a number knows it, until it is written to
        trainer.ema.averaged.n_averaged = torch.tensor(1)
    for _ in range(passes):
        trainer.scaler.scale(forward(trainer, batch) / passes).backward()
    trainer.optimizer_step()


def first_steps(trainer: Trainer, setting: Setting) -> None:
    """A small step of every phase up to the present one, so that the optimiser has the state of all."""
    small = setting.with_batch(1).with_sides(0)
    for epoch in sorted({0, trainer.epoch}):
        enter(trainer, epoch)
        train_step(trainer, small.samples(trainer.device))


@torch.no_grad()
def sample(trainer: DiffusionTrainer, batch: Batch, evaluations: int, meter: Meter) -> Tensor:
    """Restore a batch as `restoration.Restorer` does: encode, evaluate the posterior mean, sample around it, decode.

    The evaluations of the diffusion are alike: one runs, with DDIM's step, and is counted so often.
    """
    model, first_stage = trainer.model.eval(), trainer.first_stage
    view = model.view(model.normalize(first_stage.encode(batch.degraded, batch.noise)), batch.level)
    latents = view.mean
    if evaluations:
        z, t = torch.randn_like(latents), torch.zeros(len(latents), dtype=torch.long, device=latents.device)
        abar = model.alphas_cumprod[0]
        meter.repeat = evaluations
        z = DDIMSampler.step(z, model.predict(z, t, view), abar, abar, 0.0, None)
        meter.repeat = 1
        latents = model.variable.restored(z, view)
    return first_stage.decode(model.denormalize(latents), shape=batch.clean.shape[-2:], noise=batch.noise)


def state_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


@dataclass
class Trace:
    """What a step takes."""

    work: Work
    peak: dict[str, int]  # bytes at the moment of greatest memory, by what they are
    kept: int = 0  # bytes that a forward pass leaves for the backward pass

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


class Tracer:
    """Traces steps of one setting at several batches and sizes on fake tensors.

    With `gpu` the formats are those of autocast on CUDA, else all is as on the CPU.
    """

    def __init__(self, setting: Setting, gpu: bool = True):
        self.setting, self.gpu = setting, gpu
        self.mode = FakeTensorMode()

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The trainer, its optimiser with a state."""
        trainer = self.setting.make(torch.device("cpu"), torch.bfloat16 if self.gpu and self.setting.hps.amp else None)
        if self.setting.stage != "sampling":
            first_steps(trainer, self.setting)
        return trainer

    def trace(self, setting: Setting) -> Trace:
        """Trace a step of `setting`, which differs from the tracer's in batch and size alone."""
        with fake_tensors(self.mode):
            trainer = self.trainer
            batch, meter = setting.samples(trainer.device), Meter()
            training = setting.stage != "sampling"
            label(meter, trainer, batch, training)
            hooks = [
                p.register_post_accumulate_grad_hook(lambda p: meter.label([p.grad], "gradients"))
                for p in trainer.model.parameters()
                if training and p.requires_grad
            ]
            with meter:
                if training:
                    train_step(trainer, batch, setting.passes)
                else:
                    sample(trainer, batch, setting.evaluations, meter)
            for hook in hooks:
                hook.remove()
            return Trace(meter.work, dict(+meter.peak))


def label(meter: Meter, trainer: Trainer, batch: Batch, training: bool = True) -> None:
    """Tell a meter what lives before a step: parameters, optimiser and EMA, the first stage, the batch."""
    meter.label([t for t in vars(batch).values() if isinstance(t, Tensor)], "batch")
    if isinstance(trainer, DiffusionTrainer):
        meter.label(state_of(trainer.first_stage), "first stage")
        if training:
            meter.label(state_of(trainer.ema), "EMA")
    if training:
        state = tree_leaves([list(entries.values()) for entries in trainer.optimizer.state.values()])
        meter.label([t for t in state if isinstance(t, Tensor)], "optimiser")
    meter.label(state_of(trainer.model), "parameters")


def trace_forward(setting: Setting, device: str) -> Trace:
    """The forward pass of a training step on fake tensors of a device, "cpu" with CUDA's autocast or "cuda"."""
    with fake_tensors(FakeTensorMode(), device):
        where = torch.device(device)
        with where:
            trainer = setting.make(where, torch.bfloat16 if setting.hps.amp else None)
        batch, meter = setting.samples(where), Meter()
        label(meter, trainer, batch)
        with meter:
            loss = forward(trainer, batch)
        kept = meter.live["activations"]
        del loss
        return Trace(meter.work, dict(+meter.peak), kept)


# --- the plan --------------------------------------------------------------------------------------------------------


def largest_batch(peak: Callable[[int], int], memory: float) -> int:
    """The greatest batch whose `peak` bytes, which grow with the batch, fit into `memory`; 0 where not one sample does."""
    if peak(1) > memory:
        return 0
    guess = 1 + int((memory - peak(1)) / (peak(2) - peak(1)))  # exact where the peak is a straight line
    low, high, step = 1, guess + 1, 1
    if peak(guess) <= memory:
        low = guess
        while peak(high) <= memory:
            low, step = high, 2 * step
            high += step
    else:
        high = guess
    while high - low > 1:
        middle = (low + high) // 2 if high - low > 2 else low + 1
        low, high = (middle, high) if peak(middle) <= memory else (low, middle)
    return low


@dataclass(frozen=True)
class Assumptions:
    """What the plan takes for granted."""

    efficiency: float  # share of a card's rates that is reached
    bandwidth_efficiency: float  # share of its bandwidth
    reserve: float  # share of its memory that the CUDA context, workspaces and fragmentation take
    samples: int  # of an epoch

    def reached(self, card: Machine) -> Machine:
        """A card with what of it is reached."""
        rates = {name: rate * self.efficiency for name, rate in card.rates.items()}
        memory, bandwidth = card.memory * (1 - self.reserve), card.bandwidth * self.bandwidth_efficiency
        return dataclasses.replace(card, memory=memory, bandwidth=bandwidth, rates=rates)


class Planner:
    """Works out one stage in all its variants."""

    def __init__(self, setting: Setting, cards: Sequence[Machine], assumed: Assumptions, progress: bool):
        self.setting, self.cards, self.assumed = setting, [assumed.reached(card) for card in cards], assumed
        self.bar = tqdm(desc=TITLES[setting.stage], unit="trace", leave=False, disable=not progress)
        self.steps = math.ceil(assumed.samples / setting.hps.batch_size) * setting.epochs  # of a training
        self.variants = setting.variants
        self.tracers = {name: Tracer(variant) for name, variant in self.variants.items()}

    @functools.cache  # noqa: B019  one planner a stage
    def trace(self, name: str, batch: int, sides: float = 1.0) -> Trace:
        """Trace a variant at a batch and at a multiple of the image's sides."""
        setting = self.variants[name].with_batch(batch)
        self.bar.update()
        return self.tracers[name].trace(setting if sides == 1 else setting.with_sides(sides))

    def plan(self) -> dict[str, Any]:
        """Everything of a stage, as written to the JSON file."""
        setting = self.setting
        result: dict[str, Any] = {key: getattr(setting, key) for key in ("task", "batch", "passes", "shape")}
        result["title"] = TITLES[setting.stage]
        if setting.stage != "sampling":
            here, there = (trace_forward(setting, device) for device in ("cpu", "cuda"))
            result |= {"epochs": setting.epochs, "samples": self.assumed.samples, "steps": self.steps}
            result["forward"] = {
                "flops": {kind or "all": flops(here.work, kind) for kind in ("", "convolution", "attention")},
                "flops_on_cuda": flops(there.work), "kept": here.kept, "kept_on_cuda": there.kept,
            }  # fmt: skip
        result["variants"] = {name: self._variant(name) for name in self.variants}
        result["parameters"] = get_parameter_count(self.tracers[next(iter(self.variants))].trainer.model)
        return result

    def _variant(self, name: str) -> dict[str, Any]:
        trace = self.trace(name, self.setting.batch)
        cards = {}
        for card in self.cards:
            seconds = card.seconds(trace.work)
            bound = sum(n * t for op, n in trace.work.items() if (t := card.arithmetic(op)) > op.bytes / card.bandwidth)
            fits = largest_batch(lambda batch: self.trace(name, batch).peak_bytes, card.memory)
            cards[card.name] = {"seconds": seconds, "arithmetic_share": bound / seconds, "largest_batch": fits}
            if self.setting.stage != "sampling":
                cards[card.name]["hours"] = self.steps * seconds / 3600
        return {
            "flops": flops(trace.work), "bytes_moved": traffic(trace.work), "peak": trace.peak,
            "peak_bytes": trace.peak_bytes, "cards": cards,
        }  # fmt: skip

    def growth(self) -> dict[str, list[dict[str, Any]]]:
        """Peak memory, FLOPs and times by pixels, at the plan's batch, and by batch, at its size."""
        rows: dict[str, list[dict[str, Any]]] = {"pixels": [], "batch": []}
        points = [("pixels", self.setting.batch, sides) for sides in GROWTH_SIDES]
        points += [("batch", batch, 1.0) for batch in GROWTH_BATCHES]
        for name, (axis, batch, sides) in itertools.product(self.variants, points):
            setting = self.setting if sides == 1 else self.setting.with_sides(sides)
            trace = self.trace(name, batch, sides)
            rows[axis].append(
                {"variant": name, "batch": batch, "pixels": math.prod(setting.shape[1:]), "flops": flops(trace.work)}
                | {"peak_bytes": trace.peak_bytes}
                | {"seconds": {card.name: card.seconds(trace.work) for card in self.cards}}
            )
        return rows


def print_plan(result: Mapping[str, Any]) -> None:
    """The tables of a stage."""
    channels, height, width = result["shape"]
    passes = f" in {result['passes']} passes" if result["passes"] > 1 else ""
    batch = result["batch"] * result["passes"]
    print(f"\n{result['title']}, task {result['task']}: batch {batch}{passes} of {channels} x {height} x {width}")
    variants = result["variants"]
    if "forward" in result:
        ahead = result["forward"]
        parts = ", ".join(f"{kind} {n / TERA:.3g}" for kind, n in ahead["flops"].items() if kind != "all" and n)
        print(
            f"{result['parameters'] / 1e6:.1f} M parameters; forward pass {ahead['flops']['all'] / TERA:.3g} TFLOP ({parts}), "
            f"keeps {ahead['kept'] / GIB:.2f} GiB; on fake CUDA tensors {ahead['flops_on_cuda'] / TERA:.3g} TFLOP, "
            f"{ahead['kept_on_cuda'] / GIB:.2f} GiB"
        )
    rows = [
        ["TFLOP", *(f"{v['flops'] / TERA:.2f}" for v in variants.values())],
        ["GB moved", *(f"{v['bytes_moved'] / GB:.1f}" for v in variants.values())],
        ["peak memory, GiB", *(f"{v['peak_bytes'] / GIB:.2f}" for v in variants.values())],
    ]
    for part in dict.fromkeys(part for v in variants.values() for part in v["peak"]):
        rows.append([f"  {part}", *(f"{v['peak'].get(part, 0) / GIB:.2f}" for v in variants.values())])
    print(format_table(["", *(name or "a step" for name in variants)], rows))
    hours = [f"hours, {result['epochs']} epochs"] if "forward" in result else []
    header = ["", "", "ms a step" if hours else "s an image", "bound by arithmetic", *hours]
    rows = []
    for name, variant in variants.items():
        for card, row in variant["cards"].items():
            time_of = f"{1000 * row['seconds']:.1f}" if hours else f"{row['seconds'] / batch:.3g}"
            cells = [f"{row['hours']:.1f}"] if hours else []
            rows.append([card, name, time_of, f"{100 * row['arithmetic_share']:.0f} %", *cells, row["largest_batch"]])
    print("\n" + format_table([*header, "largest batch"], rows))


def print_training(phases: Sequence[Mapping[str, Any]]) -> None:
    """What the phases of a stage take together."""
    steps = [phase["steps"] for phase in phases]
    rows = []
    for name in phases[0]["variants"]:
        own = [phase["variants"][name] for phase in phases]
        work = sum(count * v["flops"] for count, v in zip(steps, own, strict=True))
        hours = [sum(v["cards"][card]["hours"] for v in own) for card in own[0]["cards"]]
        peak = max(v["peak_bytes"] for v in own) / GIB
        rows.append([name, f"{work / 1e18:.2f}", f"{peak:.2f}", *(f"{value:.1f}" for value in hours)])
    print(f"\nstage 2, both phases: {sum(steps):,} steps")
    header = ["", "EFLOP", "peak memory, GiB", *(f"hours, {card}" for card in own[0]["cards"])]
    print(format_table(header, rows))


def draw_growth(rows: Mapping[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Plot peak memory and step time against pixels and batch."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for column, (axis, word) in enumerate((("pixels", "million pixels"), ("batch", "batch"))):
        names = dict.fromkeys(row["variant"] for row in rows[axis])
        for name, style in zip(names, ("-", "--", ":"), strict=False):
            own = [row for row in rows[axis] if row["variant"] == name]
            x = [row[axis] / (1e6 if axis == "pixels" else 1) for row in own]
            suffix = f", {name}" if name else ""
            axes[0, column].plot(x, [row["peak_bytes"] / GIB for row in own], f"k{style}o", label=f"peak{suffix}")
            for color, card in enumerate(own[0]["seconds"]):
                y = [1000 * row["seconds"][card] for row in own]
                axes[1, column].plot(x, y, f"C{color}{style}o", label=f"{card}{suffix}")
        axes[1, column].set_xlabel(word)
        for row in axes:
            row[column].legend(fontsize="small")
    for row in axes:  # now that both columns are drawn: it fixes the top too
        row[0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("peak memory, GiB")
    axes[1, 0].set_ylabel("time, ms")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# --- the check on this CPU -------------------------------------------------------------------------------------------


def _status(entry: str) -> int:
    """An entry of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))


def warm_up() -> None:
    """Load what the first convolution, attention and optimiser step of a process load."""
    layer = nn.Conv2d(32, 32, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    x = layer(torch.rand(2, 32, 32, 32)).flatten(2)[:, None]
    F.scaled_dot_product_attention(x, x, x).sum().backward()
    optimizer.step()


def real_step(setting: Setting) -> Callable[[], None]:
    """A step on this CPU, in float32."""
    trainer = setting.make(torch.device("cpu"), None)
    first_steps(trainer, setting)
    return functools.partial(train_step, trainer, setting.samples(trainer.device), setting.passes)


def measure_memory(setting: Setting) -> dict[str, float]:
    """Growth of this process's greatest resident memory, in bytes, over two steps; Linux."""
    warm_up()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the greatest so far is forgotten
    before = _status("VmRSS")
    step = real_step(setting)
    for _ in range(2):
        step()
    return {"bytes": _status("VmHWM") - before}


def _cpu_seconds(function: Callable[[], object], runs: int) -> float:
    """Median processor time of a call, after one that does not count: that of other processes is not in it."""
    function()
    times = []
    for _ in range(runs):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2]


def measure_rates(setting: Setting) -> Machine:
    """Rates of this machine by kind of operator, each on one of the stage's width, and its bandwidth on an addition."""
    stage_1 = setting.stage == "1"
    channels = setting.hps_vqvae.hidden_channels if stage_1 else setting.hps.model_channels
    head = setting.hps_vqvae.embed_dim if stage_1 else setting.hps.num_head_channels
    x, weight, bias = torch.rand(2, channels, 64, 64), torch.rand(channels, channels, 3, 3), torch.rand(channels)
    ones, zeros = [1, 1], [0, 0]
    q = torch.rand(2, 4, 1024, head)
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    out, logsumexp = attention(q, q, q)
    rows, codes = torch.rand(16384, head), torch.rand(512, head)
    calls = [
        (aten.convolution, (x, weight, bias, ones, ones, ones, False, zeros, 1)),
        (aten.convolution_backward, (x, x, weight, [channels], ones, ones, ones, False, zeros, 1, [True] * 3)),
        (attention, (q, q, q)),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward, (q, q, q, q, out, logsumexp, 0.0, False)),
        (aten.addmm, (codes[:, 0], rows, codes.t())),
    ]
    rates = {}
    for packet, args in calls:
        kind = KINDS.get(packet, "matrix product")
        seconds = _cpu_seconds(lambda packet=packet, args=args: packet(*args), 5)
        rates[kind] = FLOP_FORMULAS[packet](*args, out_val=packet(*args)) / seconds
    large = torch.rand(2**24)
    bandwidth = 3 * large.nbytes / _cpu_seconds(lambda: large + large, 5)
    return Machine("this CPU", 0.0, bandwidth, rates)


def measure_time(setting: Setting) -> dict[str, Any]:
    """Seconds of a step on one core, and the rates and bandwidth of this machine, before and after."""
    torch.set_num_threads(1)
    before = measure_rates(setting)
    seconds = _cpu_seconds(real_step(setting), 3)
    after = measure_rates(setting)
    rates = {kind: (rate * after.rates[kind]) ** 0.5 for kind, rate in before.rates.items()}
    return {"seconds": seconds, "rates": rates, "bandwidth": (before.bandwidth * after.bandwidth) ** 0.5}


# An allocator that returns memory at once, so that resident memory is what lives; and one that keeps it, as CUDA's does.
ALLOCATORS = {
    "memory": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    "time": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}


def measured(setting: Setting, what: str) -> dict[str, Any]:
    """What a fresh process measures of a setting: "memory" or "time"."""
    command = [sys.executable, __file__, "--measure", what, json.dumps(vars(setting))]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"} | ALLOCATORS[what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--check: a step failed ({done.stderr.strip().splitlines()[-1]})")
    return json.loads(done.stdout)


def check(setting: Setting, progress: bool) -> list[dict[str, Any]]:
    """Predicted and measured memory and time of steps on this CPU at two sizes, in float32."""
    rows = []
    jobs = list(itertools.product(setting.variants.items(), CHECK_SIDES[setting.stage]))
    for (name, variant), sides in tqdm(jobs, desc="check", unit="step", leave=False, disable=not progress):
        small = variant.with_batch(CHECK_BATCH).with_sides(sides)
        trace = Tracer(small, gpu=False).trace(small)
        timing = measured(small, "time")
        machine = Machine("this CPU", 0.0, timing["bandwidth"], timing["rates"])
        rows.append(
            {"stage": setting.stage, "variant": name, "shape": small.shape}
            | {"predicted_bytes": trace.peak_bytes, "measured_bytes": measured(small, "memory")["bytes"]}
            | {"predicted_seconds": machine.seconds(trace.work), "measured_seconds": timing["seconds"]}
            | {"rates": timing["rates"], "bandwidth": timing["bandwidth"]}
        )
    return rows


def print_check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Predictions beside what was measured."""
    cells = []
    for row in rows:
        memory = row["predicted_bytes"] / row["measured_bytes"] - 1
        seconds = row["predicted_seconds"] / row["measured_seconds"] - 1
        within = abs(memory) <= MEMORY_TOLERANCE and abs(seconds) <= TIME_TOLERANCE
        name = ", ".join(filter(None, (TITLES[row["stage"]], row["variant"])))
        cells.append(
            [name, " x ".join(map(str, row["shape"]))]
            + [f"{row['predicted_bytes'] / GIB:.3f}", f"{row['measured_bytes'] / GIB:.3f}", f"{100 * memory:+.0f} %"]
            + [f"{row['predicted_seconds']:.2f}", f"{row['measured_seconds']:.2f}", f"{100 * seconds:+.0f} %"]
            + ["yes" if within else "NO"]
        )
    header = ["", "images", "GiB predicted", "measured", "error", "s predicted", "measured", "error", "within bounds"]
    print(f"\ncheck on this CPU: steps of batch {CHECK_BATCH}, float32, one core; bounds {100 * MEMORY_TOLERANCE:.0f} % "
          f"of memory, {100 * TIME_TOLERANCE:.0f} % of time")  # fmt: skip
    print(format_table(header, cells))


# --- the script ------------------------------------------------------------------------------------------------------


def _share(text: str) -> float:
    """An argparse type: a number above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and up to 1, not {text!r}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="cbis-ddsm", help="whose settings (default: cbis-ddsm)")
    parser.add_argument("--stage", nargs="+", choices=TITLES, default=list(TITLES), help="what to plan (default: all)")
    parser.add_argument("--cards", nargs="+", choices=list(CARDS), default=list(CARDS), help="for which (default: all)")
    parser.add_argument("--hps", action="append", default=[], metavar="KEY=VALUE", help="override an entry of hps.py")
    parser.add_argument("--batch-size", type=positive_int, help="override batch size from hps.py")
    parser.add_argument(
        "--images", type=positive_int, help=f"training images (default: {CBIS_TRAINING_IMAGES:,} or the task's)"
    )
    parser.add_argument("--efficiency", type=_share, default=0.5, help="share of a card's rates reached (default: 0.5)")
    parser.add_argument(
        "--bandwidth-efficiency", type=_share, default=0.8, help="share of its bandwidth (default: 0.8)"
    )
    parser.add_argument(
        "--reserve", type=_share, default=0.1, help="share of its memory not for tensors (default: 0.1)"
    )
    parser.add_argument("--out", type=Path, help="folder of plan.json and of the plots (default: none are written)")
    parser.add_argument("--check", action="store_true", help="hold the prediction against steps on this CPU")
    parser.add_argument("--no-tqdm", action="store_true", help="disable progress bars")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "SETTING"), help=argparse.SUPPRESS)
    return parser.parse_args()


def resolve_tables(args: argparse.Namespace) -> tuple[HParams, HParams]:
    """The settings of stage 1 and 2 with the overrides of the call, each in the tables that have it; raises UserError."""
    tables, both = [], (HPS_VQVAE[args.task], HPS_DIFFUSION[args.task])
    sizes = {} if args.batch_size is None else {"batch_size": args.batch_size, "mini_batch_size": 0}
    for table, other in (both, both[::-1]):
        own = [text for text in args.hps if (key := text.partition("=")[0].strip()) in table or key not in other]
        try:
            tables.append(apply_overrides(table.updated(**sizes), own)[0])
        except ValueError as error:
            raise UserError(str(error)) from None
    vqvae, diffusion = tables
    if vqvae.hidden_channels != diffusion.out_channels:
        raise UserError(
            f"--hps out_channels={diffusion.out_channels}: must be hidden_channels={vqvae.hidden_channels} of stage 1"
        )
    return vqvae, diffusion


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """What the call asks for, less phases without an epoch; images are restored one at a time unless --batch-size says so."""
    vqvae, diffusion = resolve_tables(args)
    settings = []
    for stage in args.stage:
        hps = vqvae if stage == "1" else diffusion
        setting = Setting(stage, args.task, hps, vqvae, hps.batch_size // (hps.mini_batch_size or hps.batch_size))
        if stage == "sampling":
            setting = dataclasses.replace(setting, passes=1).with_batch(args.batch_size or 1)
        settings.append(setting)
    settings = [s for s in settings if s.epochs or s.stage == "sampling"]
    if not settings:
        raise UserError(f"--stage {args.stage[0]}: the settings give it no epochs")
    return settings


def samples_of(args: argparse.Namespace, hps: HParams) -> int:
    """Training samples an epoch: images, and phantoms among them, times the crops drawn from each."""
    own = hps.phantom_counts[0] if args.task == "phantom" else CBIS_TRAINING_IMAGES + hps.phantoms
    return (args.images or own) * hps.crops_per_image


def main() -> None:
    args = parse_arguments()
    if args.measure:
        what, text = args.measure
        plain = {key: HParams(v) if isinstance(v, dict) else v for key, v in json.loads(text).items()}
        print(json.dumps({"memory": measure_memory, "time": measure_time}[what](Setting(**plain))))
        return
    settings = settings_of(args)
    results: dict[str, Any] = {}
    for setting in settings:
        samples = samples_of(args, setting.hps)
        assumed = Assumptions(args.efficiency, args.bandwidth_efficiency, args.reserve, samples)
        planner = Planner(setting, [CARDS[name] for name in args.cards], assumed, not args.no_tqdm)
        result = planner.plan()
        if args.out:
            result["growth"] = planner.growth()
            title = f"{result['title']}, task {args.task}"
            draw_growth(result["growth"], title, args.out / f"growth-{setting.stage}.png")
        planner.bar.close()
        print_plan(result)
        results[setting.stage] = result
    if {"mean", "diffusion"} <= results.keys():
        print_training([results["mean"], results["diffusion"]])
    print(
        f"\nassumed: {samples:,} training samples an epoch, fed as fast as they are used; validation "
        f"not counted;\n{args.efficiency:g} of the rates, {args.bandwidth_efficiency:g} of the bandwidth and "
        f"{1 - args.reserve:g} of the memory of"
    )
    for card in (CARDS[name] for name in args.cards):
        rates = ", ".join(f"{name} {rate / TERA:g}" for name, rate in card.rates.items())
        memory = f"{card.bandwidth / GB:,.0f} GB/s, {card.memory / GIB:.0f} GiB"
        print(f"{card.name}: {rates} TFLOP/s, {memory} ({card.source})")
    checks = []
    if args.check:
        for setting in (s for s in settings if s.stage != "sampling"):
            checks += check(setting, not args.no_tqdm)
        print_check(checks)
    if args.out:
        cards = {name: dataclasses.asdict(CARDS[name]) for name in args.cards}
        shares = {name: getattr(args, name) for name in ("efficiency", "bandwidth_efficiency", "reserve")}
        write_json(args.out / "plan.json", {"stages": results, "cards": cards, "assumed": shares, "check": checks})
        print(f"\nplan.json, {', '.join(f'growth-{stage}.png' for stage in results)} written to {args.out}")


if __name__ == "__main__":
    run_script(main)
