"""What a training or sampling step does, seen on fake tensors: its operators and the memory that lives."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

import trainer as trainer_module
from diffusion import LatentDiffusion, make_diffusion
from hps import HPS_VQVAE, HParams
from loading.batches import Batch, Meta, SampleKey
from loading.mammograms import PhantomDataset
from models import precision
from models.samplers import DDIMSampler
from restoration.restorer import sampling_of
from trainer import DiffusionTrainer, VQVAETrainer
from training.loop import Trainer
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

aten = torch.ops.aten
# torch counts nothing for the CPU's fused attention
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


@dataclass(frozen=True)
class Operator:
    """One call of an operator: its kind, number format (bf16, tf32 or fp32), FLOPs and bytes moved."""

    kind: str
    format: str
    flops: int
    bytes: int


Work = Counter[Operator]


def flops(work: Work, kind: str = "") -> int:
    """FLOPs of operators whose kind begins with `kind`."""
    return sum(count * op.flops for op, count in work.items() if op.kind.startswith(kind))


def traffic(work: Work) -> int:
    """Bytes that operators move."""
    return sum(count * op.bytes for op, count in work.items())


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

    def label(self, tensors: Iterable[Any], name: str, keep: bool = False) -> None:
        """Count the storages of these tensors under `name` from now on; with `keep` only those not counted yet."""
        for tensor in (t for t in tensors if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._storages:
                reference = weakref.ref(storage, functools.partial(self._free, key))
            elif keep:
                continue
            else:
                reference, size, old = self._storages[key]
                self.live[old] -= size
            self._storages[key] = reference, size, name
            self.live[name] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _free(self, key: int, _: weakref.ref) -> None:
        _, size, name = self._storages.pop(key)
        self.live[name] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return out
        read = args, {name: value for name, value in (kwargs or {}).items() if name != "out"}
        inputs, outputs = ([t for t in tree_leaves(v) if isinstance(t, Tensor)] for v in (read, out))
        packet = func._overloadpacket
        makes = any(t.untyped_storage()._cdata not in self._storages for t in outputs)
        self.label(outputs, "activations", keep=True)
        if packet in ALLOCATIONS or not (makes or func._schema.is_mutable):
            return out
        formula, kind = FLOP_FORMULAS.get(packet), "other"
        if formula:
            names = ("convolution", "attention")
            kind = next((name for name in names if name in str(packet)), "matrix product")
            kind += " backward" if "backward" in str(packet) else ""
        half = bool(inputs) and inputs[0].dtype in (torch.bfloat16, torch.float16)
        # torch lets cuDNN's convolutions use TensorFloat-32 and keeps matrix products in float32
        number = "bf16" if half else "tf32" if kind.startswith("convolution") else "fp32"
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        count = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        self.work[Operator(kind, number, count, moved)] += self.repeat
        return out


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of a float32 input under the CPU's autocast."""
    return lambda x, *args, **kwargs: function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)


@contextlib.contextmanager
def fake_tensors(mode: FakeTensorMode, device: str = "cpu") -> Iterator[None]:
    """Inside the block tensors have shapes and no values, on the CPU or on a CUDA device that need not be there.

    Under autocast either has CUDA's number formats. A backward pass needs the CPU, or a driver.
    """
    patch = mock.patch.object
    patches = [
        # a module of fake tensors cannot be moved and need not be; its copies stay in the same mode
        patch(nn.Module, "to", lambda self, *args, **kwargs: self),
        patch(FakeTensorMode, "__deepcopy__", lambda self, memo: self, create=True),
        patch(LatentDiffusion, "has_samples", True),  # values would say it
    ]
    if device == "cuda":
        torch._C._ensureCUDADeviceGuardSet()
        attention = aten._scaled_dot_product_flash_attention
        patches += [
            patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            patch(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True),
            patch(trainer_module, "seeded_generator", lambda *key, device=None: None),  # has no fake
            # torch asks the device which kernels and layouts it has, and without one takes the slow ones
            patch(F, "scaled_dot_product_attention", lambda q, k, v: attention(q, k, v)[0]),
            patch(torch._C, "_conv_determine_backend_memory_format", lambda *args: torch.channels_last),
        ]
    else:  # CUDA's way where models and torch part by device, and the one function that its autocast runs in float32
        patches += [
            patch(FakeTensor, "is_cuda", True, create=True),
            patch(nn.utils, "clip_grad_norm_", functools.partial(nn.utils.clip_grad_norm_, foreach=True)),
            patch(F, "interpolate", _in_float32(F.interpolate)),
        ]
    with contextlib.ExitStack() as stack:
        for context in (*patches, warnings.catch_warnings()):
            stack.enter_context(context)
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(mode)
        yield


# --- the steps -------------------------------------------------------------------------------------------------------


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
    def trains(self) -> bool:
        return self.stage != "sampling"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample; whole images are sampled."""
        channels, *sides = self.hps.image_shape
        crop = self.hps.crop_size
        return (channels, crop, crop) if crop and self.trains else (channels, *sides)

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
        if self.trains:
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

    @property
    def smallest(self) -> Setting:
        """The same at one sample a pass, of the least size that the first stage takes."""
        side = math.prod(self.hps_vqvae.scaling_rates)
        return self.with_batch(1).changed(image_shape=[self.shape[0], side, side], crop_size=0)

    def make(self, device: torch.device) -> Trainer:
        """The stage's trainer, without data, in its phase of a training."""
        empty = PhantomDataset(HPS_VQVAE["phantom"], "train")
        vqvae = VQVAE(**self.hps_vqvae.arguments(VQVAE))
        common, amp = (device, empty, empty), torch.bfloat16 if self.hps.amp else None
        if self.stage == "1":
            return VQVAETrainer(self.task, self.hps, vqvae.train(), *common, amp=amp)
        model = make_diffusion(self.hps)
        if model.has_mean:
            model.variable.deviations.fill_(1)  # what is not measured is not sampled
        trainer = DiffusionTrainer(self.task, self.hps, model, *common, amp=amp, first_stage=VQVAE2Wrapper(vqvae))
        enter(trainer, 0 if self.stage == "mean" else trainer.mean_epochs)
        if not self.trains and amp is not None:
            for unet in model.unets:
                precision.keep_in(unet, amp)
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


@torch.no_grad()
def sample(trainer: DiffusionTrainer, batch: Batch, evaluations: int, meter: Meter) -> Tensor:
    """Restore a batch as `restoration.Restorer` does: encode, evaluate the posterior mean, sample around it, decode.

    Evaluations of the diffusion are alike: one runs, with DDIM's step, and is counted for all. Half precision is that of
    `trainer.amp`: bfloat16 moves and multiplies as fast as float16.
    """
    model, first_stage = trainer.model.eval(), trainer.first_stage
    cond = model.normalize(first_stage.encode(batch.degraded, batch.noise))
    with torch.autocast(trainer.device.type, trainer.amp or torch.bfloat16, enabled=trainer.amp is not None):
        view = model.view(cond, batch.level)
        latents = view.mean
        if evaluations:
            z, t = torch.randn_like(latents), torch.zeros(len(latents), dtype=torch.long, device=latents.device)
            abar = model.alphas_cumprod[0]
            meter.repeat = evaluations
            z = DDIMSampler.step(z, model.predict(z, t, view), abar, abar, 0.0, None)
            meter.repeat = 1
            latents = model.variable.restored(z, view)
    return first_stage.decode(model.denormalize(latents), shape=batch.clean.shape[-2:], noise=batch.noise)


@dataclass
class Trace:
    """What a step takes."""

    work: Work
    peak: dict[str, int]  # bytes at the moment of greatest memory, by what they are
    kept: int = 0  # bytes that a forward pass leaves for the backward pass

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


def meter_of(trainer: Trainer, batch: Batch, training: bool = True) -> Meter:
    """A meter that knows what lives before a step: parameters, optimiser and EMA, the first stage, the batch."""

    def state(module: nn.Module) -> list[Tensor]:
        return [*module.parameters(), *module.buffers()]

    meter = Meter()
    meter.label(vars(batch).values(), "batch")
    if isinstance(trainer, DiffusionTrainer):
        meter.label(state(trainer.first_stage), "first stage")
        meter.label(state(trainer.ema) if training else (), "EMA")
    if training:
        meter.label(tree_leaves([list(entries.values()) for entries in trainer.optimizer.state.values()]), "optimiser")
    meter.label(state(trainer.model), "parameters")
    return meter


class Tracer:
    """Traces steps of one setting at several batches on fake tensors, in the formats of autocast on CUDA."""

    def __init__(self, setting: Setting):
        self.mode = FakeTensorMode()
        with fake_tensors(self.mode):
            self.trainer = trainer = setting.make(torch.device("cpu"))
            # a small step of every phase up to the present one, so that the optimiser has the state of all
            for epoch in sorted({0, trainer.epoch}) if setting.trains else ():
                enter(trainer, epoch)
                train_step(trainer, setting.smallest.samples(trainer.device))

    def trace(self, setting: Setting) -> Trace:
        """Trace a step of `setting`, which differs from the tracer's in the batch alone."""
        with fake_tensors(self.mode):
            trainer, batch = self.trainer, setting.samples(self.trainer.device)
            meter = meter_of(trainer, batch, setting.trains)
            hooks = [
                p.register_post_accumulate_grad_hook(lambda p: meter.label([p.grad], "gradients"))
                for p in trainer.model.parameters()
                if setting.trains and p.requires_grad
            ]
            with meter:
                if setting.trains:
                    train_step(trainer, batch, setting.passes)
                else:
                    sample(trainer, batch, setting.evaluations, meter)
            for hook in hooks:
                hook.remove()
            return Trace(meter.work, dict(+meter.peak))


def trace_forward(setting: Setting, device: str) -> Trace:
    """The forward pass of a training step on fake tensors of a device, "cpu" with CUDA's autocast or "cuda"."""
    with fake_tensors(FakeTensorMode(), device):
        where = torch.device(device)
        with where:
            trainer = setting.make(where)
        batch = setting.samples(where)
        with meter_of(trainer, batch) as meter:
            loss = forward(trainer, batch)
        kept = meter.live["activations"]
        del loss
        return Trace(meter.work, dict(+meter.peak), kept)
