"""How large a GPU, how large a batch and how long a training? Worked out without a GPU: memory, arithmetic, traffic and time.

The trainers' own steps run on fake tensors: every operator is seen, none is computed. A GPU's time is a roofline (Williams
et al., 2009): an operator takes as long as its arithmetic or its traffic, whichever is longer, and the time of its launch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flags import CBIS_TRAINING_IMAGES, plan_arguments

if __name__ == "__main__":
    ARGUMENTS = plan_arguments(__doc__.splitlines()[0])  # torch comes after the flags

from plan_trace import Operator, Setting, Trace, Tracer, Work, flops, trace_forward, traffic
from tqdm import tqdm

from helper import UserError, format_table, get_parameter_count
from hps import HPS_DIFFUSION, HPS_VQVAE, HParams, apply_overrides
from running.scripts import run_script
from running.writing import write_json

TITLES = {
    "1": "stage 1, VQ-VAE-2", "mean": "stage 2, posterior mean", "diffusion": "stage 2, diffusion around it",
    "sampling": "restoring",
}  # fmt: skip
GIB, GB, TERA, MICRO = 2**30, 1e9, 1e12, 1e-6


@dataclass(frozen=True)
class Machine:
    """Memory in bytes, bandwidth in bytes/s, rates in FLOP/s by number format, and seconds a launch."""

    name: str
    memory: float
    bandwidth: float
    rates: Mapping[str, float]
    source: str = ""
    launch: float = 0.0

    def arithmetic(self, op: Operator) -> float:
        """Seconds of an operator's arithmetic."""
        return op.flops / self.rates[op.format]

    def seconds(self, work: Work) -> float:
        """Time of operators one after the other."""
        roofline = sum(count * max(self.arithmetic(op), op.bytes / self.bandwidth) for op, count in work.items())
        return roofline + self.launches(work)

    def launches(self, work: Work) -> float:
        """The part of that time that launches take."""
        return self.launch * work.total()

    def bound_by_arithmetic(self, work: Work) -> float:
        """The part of that time that arithmetic takes, of operators in which it takes longer than their traffic."""
        times = ((self.arithmetic(op), op.bytes / self.bandwidth, count) for op, count in work.items())
        return sum(count * arithmetic for arithmetic, traffic, count in times if arithmetic > traffic)

    def reached(self, efficiency: float, bandwidth_efficiency: float, reserve: float, launch: float) -> Machine:
        """What is reached of it: shares of its rates and bandwidth, its memory less the share that is not for tensors, and
        the microseconds of a launch."""
        rates = {name: rate * efficiency for name, rate in self.rates.items()}
        memory, bandwidth = self.memory * (1 - reserve), self.bandwidth * bandwidth_efficiency
        return dataclasses.replace(self, memory=memory, bandwidth=bandwidth, rates=rates, launch=launch * MICRO)


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


# --- the plan --------------------------------------------------------------------------------------------------------


def largest_batch(peak: Callable[[int], int], memory: float) -> int:
    """The greatest batch whose `peak` bytes, which grow with the batch, fit into `memory`; 0 if not one sample does."""
    if peak(1) > memory:
        return 0
    low, high = 1, 2
    while peak(high) <= memory:  # the straight line through the last two is exact if the peak is one
        low, high = high, high + 1 + int((memory - peak(high)) / (peak(high) - peak(low)) * (high - low))
    halves = False
    while high - low > 1:  # by the line between the two, and every other time by half: lines alone may take many steps
        share = 0.5 if halves else (memory - peak(low)) / (peak(high) - peak(low))
        middle = min(low + max(1, int(share * (high - low))), high - 1)
        low, high = (middle, high) if peak(middle) <= memory else (low, middle)
        halves = not halves
    return low


def plan_stage(setting: Setting, cards: Sequence[Machine], samples: int, progress: bool = False) -> dict[str, Any]:
    """Everything of a stage with so many samples an epoch, as written to the JSON file."""
    result: dict[str, Any] = {key: getattr(setting, key) for key in ("task", "batch", "passes", "shape", "epochs")}
    result |= {"title": TITLES[setting.stage], "variants": {}}
    if setting.trains:
        here, there = (trace_forward(setting, device) for device in ("cpu", "cuda"))
        result["forward"] = {kind or "all": flops(here.work, kind) for kind in ("", "convolution", "attention")}
        result |= {"flops_on_cuda": flops(there.work), "kept": here.kept, "kept_on_cuda": there.kept}
        result["steps"] = math.ceil(samples / setting.hps.batch_size) * setting.epochs
    bar = tqdm(desc=TITLES[setting.stage], unit="trace", leave=False, disable=not progress)
    for name, variant in setting.variants.items():
        tracer = Tracer(variant)
        result["parameters"] = get_parameter_count(tracer.trainer.model)

        @functools.cache
        def trace(batch: int, tracer: Tracer = tracer, variant: Setting = variant) -> Trace:
            bar.update()
            return tracer.trace(variant.with_batch(batch))

        own = trace(setting.batch)
        figures = {"flops": flops(own.work), "bytes_moved": traffic(own.work), "operators": own.work.total()}
        figures |= {"peak": own.peak}
        result["variants"][name] = figures | {"peak_bytes": own.peak_bytes, "cards": {}}
        for card in cards:
            row = {"seconds": card.seconds(own.work)}
            for word, part in (("arithmetic", card.bound_by_arithmetic), ("launch", card.launches)):
                row[f"{word}_share"] = part(own.work) / row["seconds"]
            row["largest_batch"] = largest_batch(lambda batch, trace=trace: trace(batch).peak_bytes, card.memory)
            row["hours"] = result.get("steps", 0) * row["seconds"] / 3600
            result["variants"][name]["cards"][card.name] = row
    bar.close()
    return result


def print_plan(result: Mapping[str, Any]) -> None:
    """The tables of a stage."""
    variants, trains = result["variants"], "steps" in result
    passes = f" in {result['passes']} passes" if result["passes"] > 1 else ""
    batch, shape = result["batch"] * result["passes"], " x ".join(map(str, result["shape"]))
    print(f"\n{result['title']}, task {result['task']}: batch {batch}{passes} of {shape}")
    if trains:
        parts = ", ".join(f"{kind} {n / TERA:.3g}" for kind, n in result["forward"].items() if kind != "all" and n)
        print(
            f"{result['parameters'] / 1e6:.1f} M parameters; forward pass {result['forward']['all'] / TERA:.3g} TFLOP ({parts}), "
            f"keeps {result['kept'] / GIB:.2f} GiB; on fake CUDA tensors {result['flops_on_cuda'] / TERA:.3g} TFLOP, "
            f"{result['kept_on_cuda'] / GIB:.2f} GiB"
        )
    kinds = ("TFLOP", "flops", TERA, 2), ("GB moved", "bytes_moved", GB, 1), ("peak memory, GiB", "peak_bytes", GIB, 2)
    rows = [[title, *(f"{v[key] / unit:.{d}f}" for v in variants.values())] for title, key, unit, d in kinds]
    rows.insert(2, ["operators", *(v["operators"] for v in variants.values())])
    for part in dict.fromkeys(part for v in variants.values() for part in v["peak"]):
        rows.append([f"  {part}", *(f"{v['peak'].get(part, 0) / GIB:.2f}" for v in variants.values())])
    print(format_table(["", *(name or "a step" for name in variants)], rows))
    hours = [f"hours, {result['epochs']} epochs"] if trains else []
    rows = []
    for name, (card, row) in ((n, item) for n, v in variants.items() for item in v["cards"].items()):
        time_of = f"{1000 * row['seconds']:.1f}" if trains else f"{row['seconds'] / batch:.3g}"
        cells = [card, name, time_of, *(f"{100 * row[f'{part}_share']:.0f} %" for part in ("arithmetic", "launch"))]
        rows.append([*cells, *([f"{row['hours']:.1f}"] if trains else []), row["largest_batch"]])
    header = [
        "",
        "",
        "ms a step" if trains else "s an image",
        "bound by arithmetic",
        "launches",
        *hours,
        "largest batch",
    ]
    print("\n" + format_table(header, rows))


def print_training(phases: Sequence[Mapping[str, Any]]) -> None:
    """What the phases of a stage take together."""
    rows = []
    for name in phases[0]["variants"]:
        own = [phase["variants"][name] for phase in phases]
        work = sum(phase["steps"] * v["flops"] for phase, v in zip(phases, own, strict=True))
        hours = [sum(v["cards"][card]["hours"] for v in own) for card in own[0]["cards"]]
        peak = max(v["peak_bytes"] for v in own) / GIB
        rows.append([name, f"{work / 1e18:.2f}", f"{peak:.2f}", *(f"{value:.1f}" for value in hours)])
    print(f"\nstage 2, both phases: {sum(phase['steps'] for phase in phases):,} steps")
    print(format_table(["", "EFLOP", "peak memory, GiB", *(f"hours, {card}" for card in own[0]["cards"])], rows))


# --- the script ------------------------------------------------------------------------------------------------------


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
        if args.batch_size not in (None, size := tables[-1].batch_size):
            raise UserError(f"--batch-size and --hps batch_size={size} differ; leave one of them out")
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
        if not setting.trains:
            setting = dataclasses.replace(setting, passes=1).with_batch(args.batch_size or 1)
        settings += [setting] if setting.epochs or not setting.trains else []
    if not settings:
        raise UserError(f"--stage {args.stage[0]}: the settings give it no epochs")
    return settings


def main(args: argparse.Namespace) -> None:
    shares = {name: getattr(args, name) for name in ("efficiency", "bandwidth_efficiency", "reserve", "launch")}
    cards = [CARDS[name] for name in args.cards]
    results: dict[str, Any] = {}
    for setting in settings_of(args):
        hps = setting.hps
        own = hps.phantom_counts[0] if args.task == "phantom" else CBIS_TRAINING_IMAGES + hps.phantoms
        samples = (args.images or own) * hps.crops_per_image
        reached = [card.reached(**shares) for card in cards]
        results[setting.stage] = plan_stage(setting, reached, samples, not args.no_tqdm)
        print_plan(results[setting.stage])
    if {"mean", "diffusion"} <= results.keys():
        print_training([results["mean"], results["diffusion"]])
    print(
        f"\nassumed: {samples:,} training samples an epoch, fed as fast as they are used; validation not counted;\n"
        f"{args.launch} microseconds a launch; {args.efficiency:g} of the rates, {args.bandwidth_efficiency:g} of the bandwidth "
        f"and {1 - args.reserve:g} of the memory of"
    )
    for card in cards:
        rates = ", ".join(f"{name} {rate / TERA:g}" for name, rate in card.rates.items())
        memory = f"{card.bandwidth / GB:,.0f} GB/s, {card.memory / GIB:.0f} GiB"
        print(f"{card.name}: {rates} TFLOP/s, {memory} ({card.source})")
    if args.out:
        about = {name: dataclasses.asdict(CARDS[name]) for name in args.cards}
        write_json(args.out / "plan.json", {"stages": results, "cards": about, "assumed": shares})
        print(f"\nplan.json written to {args.out}")


if __name__ == "__main__":
    run_script(functools.partial(main, ARGUMENTS))
