"""How long is it from the start of a training to its first step, and how much longer than its steps is an epoch?

The scripts train as from a shell, on phantoms that are written as PNG files first, on CUDA if there is any. A run before the one
that counts builds the cache of prepared images. No data is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helper import UserError, explained, format_table
from hps import HPS_DIFFUSION, HPS_VQVAE, apply_overrides
from running.command_line import Parser, non_negative_int, path_argument, positive_int
from running.scripts import run_script
from running.writing import write_json

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"1": "main-vqvae.py", "2": "main-diffusion.py"}
LEAST_EPOCHS = 3  # the first gives the time of a step, the last one begins no other

# Runs a script, and notes the ends of steps and epochs. In the first epoch the host waits for the device after every step.
RUNNER = """
import json, runpy, sys, time
script, path, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
import torch
imported = time.monotonic()
from training.loop import Trainer
steps, epochs = [], []
take, end = Trainer.optimizer_step, Trainer.end_epoch
def optimizer_step(self):
    norm = take(self)
    if self.epoch == 0:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        steps.append(time.monotonic())
    return norm
def end_epoch(self):
    end(self)
    epochs.append(time.monotonic())
Trainer.optimizer_step, Trainer.end_epoch = optimizer_step, end_epoch
try:
    runpy.run_path(script, run_name="__main__")
finally:
    with open(path, "w") as file:
        json.dump({"imported": imported, "steps": steps, "epochs": epochs}, file)
"""

Result = dict[str, float]


def result_of(start: float, marks: dict[str, Any]) -> Result:
    """Seconds, from moments: the start of the process, torch's import, the steps of epoch 1, the ends of all epochs.

    A step is the median of epoch 1 without its first one; an epoch, of those after it.
    """
    steps, epochs = marks["steps"], marks["epochs"]
    step = statistics.median(b - a for a, b in zip(steps, steps[1:], strict=False))
    epoch = statistics.median(b - a for a, b in zip(epochs, epochs[1:], strict=False))
    torch, first = marks["imported"] - start, steps[0] - start
    ratio = epoch / (len(steps) * step)
    return {"import": torch, "first": first, "beyond": first - torch, "step": step, "epoch": epoch, "ratio": ratio}


def table(results: dict[str, Result]) -> str:
    """The results by stage, in words."""
    header = ["", "import torch", "start to first step", "beyond the import", "step", "epoch", "epoch / its steps"]
    rows = []
    for stage, own in results.items():
        seconds = (f"{own[key]:.2f} s" for key in ("import", "first", "beyond"))
        rows.append(
            [f"stage {stage}", *seconds, f"{1000 * own['step']:.1f} ms", f"{own['epoch']:.2f} s", f"{own['ratio']:.2f}"]
        )
    return format_table(header, rows)


def train(script: str, arguments: Sequence[str], marks: Path) -> Result:
    """Run a training script to its end; raises UserError with its last line if it fails."""
    start = time.monotonic()
    command = [sys.executable, "-c", RUNNER, str(ROOT / script), str(marks), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        line = (run.stderr.strip().splitlines() or ["without a word"])[-1]
        raise UserError(f"{script} ended with exit status {run.returncode}: {line.removeprefix('error: ')}")
    return result_of(start, json.loads(marks.read_text(encoding="utf-8")))


def make_images(folder: Path, count: int, shape: Sequence[int]) -> None:
    """Write phantoms as 16-bit PNG files."""
    import numpy as np
    from PIL import Image

    from preprocessing.phantom import generate_phantom

    folder.mkdir()
    for index in range(count):
        image = generate_phantom(0, index, (1, *shape)).image[0].numpy()
        Image.fromarray((65535 * image).round().astype(np.uint16)).save(folder / f"phantom-{index:03d}.png")


def measure(args: argparse.Namespace, work: Path) -> dict[str, Result]:
    """Train the stages, each twice."""
    make_images(work / "images", args.images, args.shape)
    shape = f"image_shape=[1,{args.shape[0]},{args.shape[1]}]"
    common = ["--task", args.task, "--data-root", str(work / "images"), "--cache", str(work / "cache"), "--no-tqdm"]
    settings = shape, "patient_pattern=file", *args.hps
    common += ["--num-workers", str(args.workers), *(x for entry in settings for x in ("--hps", entry))]
    results = {}
    for stage, script in STAGES.items():
        own = [*common, *(("--vqvae-path", str(work / "1-counts" / "best.pt")) if stage == "2" else ())]
        for name, epochs in (("caches", 2), ("counts", args.epochs)):
            print(f"stage {stage}: {epochs} epochs", file=sys.stderr)
            out = work / f"{stage}-{name}"
            results[stage] = train(script, [*own, "--epochs", str(epochs), "--out", str(out)], work / "marks.json")
    return results


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--task", choices=("folder", "folder-small"), default="folder", help="whose settings (default: folder)")
    add("--images", type=positive_int, default=80, help="phantoms, a tenth of them for validation (default: 80)")
    add("--shape", type=positive_int, nargs=2, default=[1024, 768], metavar=("H", "W"), help="(default: 1024 768)")
    add("--epochs", type=positive_int, default=4, help=f"of the run that counts, at least {LEAST_EPOCHS} (default: 4)")
    add("--workers", type=non_negative_int, default=8, help="loader processes (default: 8)")
    add("--hps", action="append", default=[], metavar="KEY=VALUE", help="override an entry of hps.py, of both stages")
    add("--out", type=path_argument, help="folder of epochs.json (default: none is written)")
    args = parser.parse_args()
    if args.epochs < LEAST_EPOCHS:
        parser.error(f"--epochs must be at least {LEAST_EPOCHS}")
    return args


def main() -> None:
    args = parse_arguments()
    for table in (HPS_VQVAE, HPS_DIFFUSION):
        try:
            apply_overrides(table[args.task], args.hps)
        except ValueError as error:
            raise UserError(str(error)) from None
    if args.out:
        with explained(f"--out {args.out}: cannot be written"):
            args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        results = measure(args, Path(work))
    print(table(results))
    if args.out:
        write_json(args.out / "epochs.json", results)
        print(f"epochs.json written to {args.out}")


if __name__ == "__main__":
    run_script(main)
