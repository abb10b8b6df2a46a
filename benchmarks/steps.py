"""How long does a step take? Each time is a ratio to a named baseline in the same round, on the CPU in single precision.

`unet`, an evaluation and a training step of either UNet at the reference values; `stage1`, a training step at the reference
values; `stage2`, what a training step spends outside the UNets; `lookup`, a codebook lookup; `compile`, training steps with
--compile.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flags import STEPS, steps_arguments

if __name__ == "__main__":
    ARGUMENTS = steps_arguments(__doc__.splitlines()[0])  # torch comes after the flags

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion import LatentDiffusion, LitEma, make_diffusion
from helper import counted, format_table, seeded_generator
from hps import HPS_DIFFUSION, HPS_VQVAE, HParams
from loading.batches import Batch
from loading.mammograms import PhantomDataset
from logger import Logger
from models.unet import UNet
from running.scripts import run_script
from trainer import DiffusionTrainer, VQVAETrainer
from training.loop import Trainer
from vqvae import VQVAE, VectorQuantizer
from vqvae2_wrapper import VQVAE2Wrapper

SMALL = dict(batch_size=1, cache_images=True)
REFERENCE = HPS_VQVAE["cbis-ddsm"].updated(**SMALL, warmup_steps=1, phantom_counts=[1, 1, 1], quantize_probability=1.0)
# a quarter of the reference size, which is fair to neither attention nor what is done once a step
QUARTER = HPS_DIFFUSION["cbis-ddsm"].updated(
    **SMALL, image_shape=[1, 256, 192], nb_workers=0, phantom_counts=[2, 1, 1], statistics_batches=1
)
LATENT = [side // REFERENCE.scaling_rates[0] for side in REFERENCE.image_shape[1:]]
FLOOR = "its FLOPs at the rates of one convolution and one attention"
# of stage 2, with the epochs that train the posterior mean: without them the diffusion's come at once
PHASES = {"posterior mean": 1, "diffusion": 0}

clock = time.perf_counter
Timed = Callable[[], float]  # returns seconds
Comparison = tuple[str, Timed, str, Timed]  # a work, and the baseline that it is set against, both with their names


def timed(function: Callable[[], object], calls: int = 1) -> Timed:
    """The mean time of a call."""

    def measure() -> float:
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls

    return measure


def row(comparison: Comparison, rounds: int) -> list[str]:
    """Medians over the rounds, after one that warms up, and the ratio with its least and most."""
    name, own, baseline_name, baseline = comparison
    times = [(own(), baseline()) for _ in range(rounds + 1)][1:]
    ratios = [a / b for a, b in times]
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f})"
    return [name, baseline_name, *(f"{statistics.median(v):.4g}" for v in zip(*times, strict=True)), ratio]


def floor(model: nn.Module, inputs: tuple[Tensor, ...], passes: int = 1) -> Timed:
    """Seconds of a model's forward FLOPs, `passes` times, at the machine's rates now.

    A model with attention has to be on the meta device: the CPU's fused one counts as none.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    by_kind = counter.get_flop_counts()["Global"]
    attention = sum(flops for kind, flops in by_kind.items() if "bmm" in str(kind) or "attention" in str(kind))
    rest = counter.get_total_flops() - attention
    print(f"forward pass: {rest / 1e12:.2f} TFLOP of convolutions, {attention / 1e12:.2f} of attention")
    x, weight = (torch.randn(s).to(memory_format=torch.channels_last) for s in ((1, 192, 128, 96), (192, 192, 3, 3)))
    q = torch.randn(1, 2, 12288, 64)
    convolve = timed(torch.no_grad()(lambda: F.conv2d(x, weight, padding=1)), 3)
    attend = timed(torch.no_grad()(lambda: F.scaled_dot_product_attention(q, q, q)))

    def at_rates() -> float:
        own = rest * convolve() / (2 * 9 * 192 * x.numel())
        own += attention * attend() / (4 * q.numel() * q.shape[2]) if attention else 0
        return passes * own

    return at_rates


def trainer_of(hps: HParams, vqvae: VQVAE, model: LatentDiffusion | None = None) -> Trainer:
    """The trainer of a first stage or, with a `model`, of the second stage on it; on phantoms."""
    data = PhantomDataset(hps, "train")
    common = (torch.device("cpu"), data, data)
    if model is None:
        return VQVAETrainer("phantom", hps, vqvae, *common, progress=False)
    stage = DiffusionTrainer("phantom", hps, model, *common, progress=False, first_stage=VQVAE2Wrapper(vqvae))
    stage.begin()
    return stage


def step_of(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    """A training step on a batch."""
    trainer.model.train()

    def step() -> None:
        trainer.loss(batch).loss.backward()
        trainer.optimizer_step()

    return step


def of_unet() -> Iterator[Comparison]:
    """Either UNet: an evaluation at the reference latent, and a checkpointed training step on a sixteenth of it."""
    hps, t = HPS_DIFFUSION["cbis-ddsm"], torch.tensor([500])
    crop = [side // 4 for side in LATENT]
    model = UNet(**hps.arguments(UNet))
    whole, part = (torch.randn(1, hps.in_channels, *side) for side in (LATENT, crop))
    target, ema = torch.randn(1, hps.out_channels, *crop), LitEma(model, hps.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=hps.learning_rate, weight_decay=hps.weight_decay, fused=True)

    @torch.no_grad()
    def evaluate() -> None:
        model.eval()(whole, t)

    def step() -> None:
        F.mse_loss(model.train()(part, t), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), hps.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema(model)

    def at(side: list[int], passes: int) -> Timed:
        with torch.device("meta"):
            empty = UNet(**hps.arguments(UNet)).eval()
            inputs = torch.empty(1, hps.in_channels, *side), torch.zeros(1, dtype=torch.long)
        return floor(empty, inputs, passes)

    yield f"evaluation at {LATENT}", timed(evaluate), FLOOR, at(LATENT, 1)
    # a checkpointed step: forward, forward again, and twice as much backward
    yield f"training step at {crop}, with AdamW and EMA", timed(step), f"4 x {FLOOR}", at(crop, 4)


def of_stage1() -> Iterator[Comparison]:
    """A training step at the reference values; its backward pass takes two forward passes."""
    stage = trainer_of(REFERENCE, VQVAE(**REFERENCE.arguments(VQVAE)))
    batch = stage.loader.dataset[0]
    at_rates = floor(stage.model.eval(), (batch.clean,), 3)
    stage.model.initialise_codebooks([batch.clean], seeded_generator("codebooks"))
    yield "training step", timed(step_of(stage, batch)), f"3 x {FLOOR}", at_rates


class NoUNet(nn.Conv2d):
    """Stands for a UNet if its time is not to count."""

    def forward(self, x: Tensor, t: Tensor, log_level: Tensor) -> Tensor:
        return super().forward(x)


def of_stage2() -> Iterator[Comparison]:
    """Epochs without the UNets: loader, degradation, encoding, noise and logging, against whole ones."""
    vqvae = VQVAE(**REFERENCE.arguments(VQVAE))
    for phase, mean_epochs in PHASES.items():
        hps = QUARTER.updated(mean_epochs=mean_epochs)
        unets = (NoUNet(hps.in_channels, hps.out_channels, 1) for _ in range(2))
        bare = LatentDiffusion(*unets, **hps.arguments(LatentDiffusion))
        epochs = []
        for model in (bare, make_diffusion(hps)):
            stage = trainer_of(hps, vqvae, model)
            stage.logger = Logger(None)
            stage.parallelize()

            def epoch(stage: Trainer = stage) -> None:
                stage.seen = 0
                stage.train_epoch()

            epochs.append(timed(epoch))
        name = f"{phase}: an epoch with 1 x 1 convolutions for the UNets"
        yield name, epochs[0], "an epoch with them", epochs[1]


def of_lookup() -> Iterator[Comparison]:
    """The codebook lookup of an image on the finest pyramid level."""
    quantizer = VectorQuantizer(REFERENCE.nb_entries, REFERENCE.embed_dim)
    vectors, entries = torch.randn(LATENT[0] * LATENT[1], REFERENCE.embed_dim), quantizer.codebook
    product = torch.empty(len(vectors), REFERENCE.nb_entries)

    def plain() -> Tensor:
        return (vectors.square().sum(1, keepdim=True) - 2 * vectors @ entries.t() + entries.square().sum(1)).argmin(1)

    def multiply() -> Tensor:
        return torch.mm(vectors, entries.t(), out=product)

    lookup = timed(lambda: quantizer.lookup(vectors), 5)
    for name, baseline in (("its matrix product", multiply), ("all distances, then their argmin", plain)):
        yield f"lookup of {len(vectors)} vectors", lookup, name, timed(baseline, 5)


def of_compile() -> Iterator[Comparison]:
    """Compiled steps of every stage of task `phantom`; the round that warms up compiles."""
    for phase, mean_epochs in {"stage 1": None, **PHASES}.items():
        steps = []
        for compiled in (True, False):
            torch.manual_seed(0)
            hps, model = HPS_VQVAE["phantom"], None
            vqvae = VQVAE(**hps.arguments(VQVAE))
            if mean_epochs is not None:
                hps = HPS_DIFFUSION["phantom"].updated(mean_epochs=mean_epochs, statistics_batches=1)
                model = make_diffusion(hps)
            stage = trainer_of(hps, vqvae, model)
            if compiled:
                stage.compile()
            batch = Batch.collate([stage.loader.dataset[i] for i in range(hps.batch_size)])
            steps.append(timed(step_of(stage, batch), 5))
        yield f"{phase}: a compiled step", steps[0], "a plain step", steps[1]


WHAT = dict(zip(STEPS, (of_unet, of_stage1, of_stage2, of_lookup, of_compile), strict=True))


def main(args: argparse.Namespace) -> None:
    global clock
    torch.manual_seed(0)
    if args.busy:
        torch.set_num_threads(1)
        clock = time.process_time
    rows = [row(comparison, args.rounds) for comparison in WHAT[args.what]()]
    print(format_table(["", "baseline", "seconds", "baseline, s", "ratio (least, most)"], rows))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    print(
        f"{counted(args.rounds, 'round')}; {'processor' if args.busy else 'wall-clock'} time, threads: {torch.get_num_threads()}, "
        f"single precision, torch {torch.__version__}; peak memory of the process {memory:.2f} GB"
    )


if __name__ == "__main__":
    run_script(functools.partial(main, ARGUMENTS))
