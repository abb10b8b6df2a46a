"""Kill the scripts at any moment, start them again with the same command, and compare what comes out with an undisturbed run.

`python tests/chaos.py --kills 200` trains both stages, extracts latents and evaluates over and over, from a folder of images
through the cache. `test_faults.py` runs a short, seeded part. Each life of a script is a forked process, so that no time goes
into importing; most are killed (SIGKILL) where a file is begun, half-written, renamed, or in a step, the others when a clock
says so; some are asked to stop (SIGTERM, SIGINT, SIGUSR1). What is compared, to the last bit: weights, averages, optimiser,
scaler, generator, log, latents and figures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchmetrics.functional.image  # noqa: F401  scripts import it late, which every life would pay for
from PIL import Image
from tqdm import tqdm

import restoration.evaluate  # noqa: F401  as above
import trainer
from files import cache
from helper import UserError
from preprocessing.phantom import generate_phantom
from running.checkpoints import checkpoints_in, load_checkpoint
from running.command_line import Parser, non_negative_int, positive_int
from running.scripts import run_script
from scripts import arguments, load_script
from training import loop
from vqvae2_wrapper import VQVAE2Wrapper

TRAINING = "--no-tqdm --no-amp --epochs 3 --hps checkpoint_frequency=2 --hps log_frequency=1 --hps lr_schedule=cosine"
SHAPE = (64, 48)
MOST_LIVES = 12  # of a script, before one is left alone
# Where a life ends: what is called, and whether it dies before the call, within it or after it; at which call is drawn.
PLACES = [
    (tempfile, "mkstemp", "after"),
    (torch, "save", "within"),
    (os, "fsync", "before"),
    (os, "link", "after"),
    (Path, "replace", "before"),
    (Path, "replace", "after"),
    (loop.Trainer, "optimizer_step", "before"),
    (loop.Trainer, "optimizer_step", "after"),
    (loop.Trainer, "setup", "after"),
    (trainer.DiffusionTrainer, "begin_diffusion", "before"),
    (trainer.DiffusionTrainer, "begin_diffusion", "after"),
    (loop.Trainer, "validation_batches", "after"),
    (loop, "save_picture", "before"),
    (VQVAE2Wrapper, "encode", "after"),
    (cache, "prepare_record", "after"),
]
MAINS = {script: load_script(script).main for script in ("main-vqvae", "main-latents", "main-diffusion")}
STOPS = [signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM)]


@dataclass
class Work:
    """A script's call, which starts it anew or goes on with it; `out` is what it makes."""

    name: str
    script: str
    line: str
    out: str


@dataclass
class Summary:
    """What the lives came to."""

    kills: Counter[str] = field(default_factory=Counter)  # by the script's name and the place
    stops: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    compared: Counter[bool] = field(default_factory=Counter)  # whether a finished work equals the undisturbed one


def works() -> list[Work]:
    """The works of one round, in order; paths are relative to the round's folder."""
    first, second = "--out first --load-path first", "--out second --load-path second"
    images = "--data-root ../images --cache ../cache"
    # every step writes a checkpoint
    data = f"--task folder-small {images} --hps patient_pattern=file --hps checkpoint_minutes=1e-9"
    shape = f"--hps image_shape=1,{SHAPE[0]},{SHAPE[1]} --hps validation_fraction=0.2"
    models = f"--vqvae-path first/last.pt {images}"
    return [
        Work("stage 1", "main-vqvae", f"{TRAINING} {data} {shape} {first}", "first"),
        Work("latents", "main-latents", "first/last.pt --data-root ../images --no-tqdm --out latents", "latents"),
        Work("stage 2", "main-diffusion", f"{TRAINING} {models} --hps checkpoint_minutes=1e-9 {second}", "second"),
        Work("stage 2 of latents", "main-diffusion",
             f"{TRAINING} {models} --latents latents --hps crop_size=0 --out third --load-path third", "third"),
        Work("evaluation of stage 1", "main-vqvae",
             f"{images} --load-path first --evaluate --no-tqdm --out evaluation-1", "evaluation-1"),
        Work("evaluation of stage 2", "main-diffusion",
             f"{models} --load-path second --evaluate --no-tqdm --out evaluation-2", "evaluation-2"),
    ]  # fmt: skip


def write_images(folder: Path, count: int = 10) -> None:
    """Phantoms as 16-bit PNG files."""
    folder.mkdir()
    for i in range(count):
        image = generate_phantom(0, i, (1, *SHAPE)).image[0]
        Image.fromarray((np.asarray(image) * 65535).astype(np.uint16)).save(folder / f"p{i:02d}.png")


# --- a life ----------------------------------------------------------------------------------------------------------


def die_at(owner: object, name: str, when: str, count: int) -> None:
    """In this process: the `count`-th call of a function is the last thing that happens."""
    function, calls, main = getattr(owner, name), iter(range(1, count + 1)), os.getpid()

    def die() -> None:
        for process in (main, os.getpid()):  # a worker takes the script with it
            os.kill(process, signal.SIGKILL)

    def deadly(*args: object, **kwargs: object) -> object:
        last = next(calls, 0) == count
        if last and when == "within":  # half of a checkpoint
            content = io.BytesIO()
            function(args[0], content, *args[2:], **kwargs)
            args[1].write(content.getvalue()[: len(content.getvalue()) // 2])
            args[1].flush()
        if last and when in ("before", "within"):
            die()
        result = function(*args, **kwargs)
        if last:
            die()
        return result

    setattr(owner, name, deadly)


def live(work: Work, folder: Path, workers: int, end: Callable[[], None]) -> int:
    """Run a script in a forked process, after calling `end` in it; returns its identifier. It prints to the file `log`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of the others, and would wait for them
    process = os.fork()
    if process:
        torch.set_num_threads(threads)
        return process
    status = 70
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(i, "w", buffering=1) for i in (1, 2))
        os.chdir(folder)
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        sys.argv = [work.script, *arguments(work.script, f"{work.line} --num-workers {workers}")]
        end()
        run_script(MAINS[work.script], parallel=True)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:  # noqa: BLE001  the log tells
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def ended(process: int) -> int:
    """Exit status of a process, as a shell says it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) % 256


# --- comparing -------------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, object]:
    """What a finished work's folder holds, but for paths, times and settings that may differ."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".pt" and path.name != "previous.pt":
            content = torch.load(path, weights_only=True)
            del content["hps"]["nb_workers"]
            found[name] = content
        elif path.suffix in (".npy", ".csv", ".png"):
            found[name] = path.read_bytes()
        elif path.name == "table.txt":
            found[name] = path.read_text()
    return found


def difference(a: object, b: object, where: str = "") -> str:
    """The first place where two states differ in any bit; empty where they do not."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(map(str, a.keys() ^ b.keys()))}"
        parts = ((a[key], b[key], f"{where}/{key}") for key in a)
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        parts = ((x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if torch.equal(a, b) else where
    else:
        return "" if a == b else where
    return next((found for part in parts if (found := difference(*part))), "")


# --- chaos -----------------------------------------------------------------------------------------------------------


class Chaos:
    """Rounds of works in `root`, ended `kills` times by SIGKILL, with every draw from `seed`."""

    def __init__(self, root: Path, kills: int, seed: int, progress: bool = True):
        self.root, self.kills, self.random = root, kills, random.Random(seed)
        self.summary, self.took = Summary(), {}
        self.bar = tqdm(total=kills, unit="kill", disable=not progress)
        self.reference: dict[str, dict[str, object]] = {}

    def run(self) -> Summary:
        """The undisturbed works, and then rounds until all kills are spent, the first of them to its end."""
        write_images(self.root / "images")
        folder = self.root / "undisturbed"
        folder.mkdir()
        for work in works():
            start = time.monotonic()
            status = ended(live(work, folder, 0, lambda: None))
            self.took[work.name] = time.monotonic() - start
            if status:
                raise UserError(f"{work.name}: ends with {status} undisturbed: {(folder / 'log').read_text()[-2000:]}")
            self.reference[work.name] = state(folder / work.out)
        number = 0
        while self.summary.kills.total() < self.kills and not self.summary.findings:
            number += 1
            folder = self.root / f"round-{number}"
            folder.mkdir()
            shutil.rmtree(self.root / "cache", ignore_errors=True)
            for work in works():
                spent = number > 1 and self.summary.kills.total() >= self.kills
                if not (spent or self.finish(work, folder)):
                    break
            else:
                shutil.rmtree(folder)  # what differs is kept
        self.bar.close()
        return self.summary

    def finish(self, work: Work, folder: Path) -> bool:
        """Start a work until it is done, and compare; False where something was found."""
        for life in range(MOST_LIVES + 1):
            left_alone = life == MOST_LIVES or self.summary.kills.total() >= self.kills
            status, planned = self.life(work, folder, left_alone)
            for path in checkpoints_in(folder / work.out):
                try:
                    load_checkpoint(path, "vqvae" if work.script == "main-vqvae" else "diffusion")
                except UserError as error:
                    self.summary.unreadable.append(str(error))
            if status == 0:
                break
            if status not in planned:
                log = (folder / "log").read_text()[-2000:]
                self.summary.findings.append(f"{folder.name}, {work.name}: ended with {status}: {log}")
                return False
        found = difference(self.reference[work.name], state(folder / work.out))
        self.summary.compared[not found] += 1
        if found:
            self.summary.findings.append(f"{folder.name}, {work.name}: differs in {found}")
        if parts := [path for path in (folder / work.out).rglob("*.part") if path.parent.name != "tensorboard"]:
            self.summary.findings.append(f"{folder.name}, {work.name}: left {parts[0].name}")
        return not found

    def life(self, work: Work, folder: Path, left_alone: bool) -> tuple[int, list[int]]:
        """One life of a work: its exit status, and those it may end with."""
        workers, way = self.random.choice([0, 0, 1]), self.random.random()
        if left_alone:
            return ended(live(work, folder, workers, lambda: None)), [0]
        if way < 0.6:
            place = self.random.choice(PLACES)
            count = 1 + int(self.random.random() ** 2 * 8)
            status = ended(live(work, folder, workers, lambda: die_at(*place, count)))
            self._count(work, f"{place[2]} {place[1]}", status == 256 - signal.SIGKILL)
            return status, [0, 256 - signal.SIGKILL]
        number = signal.SIGKILL if way < 0.85 else self.random.choice(STOPS)
        wait = self.random.random() * 1.1 * self.took[work.name]
        process = live(work, folder, workers, lambda: None)
        time.sleep(wait)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        status = ended(process)
        if number == signal.SIGKILL:
            self._count(work, "by the clock", status == 256 - number)
        elif status:
            self.summary.stops[work.name] += 1
        # a signal before the script has begun to listen, or after it has ceased, ends it at once
        return status, [0, 256 - number, 128 + number]

    def _count(self, work: Work, place: str, killed: bool) -> None:
        if killed:
            self.summary.kills[f"{work.name}, {place}"] += 1
            self.bar.update()


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=positive_int, default=200, help="how often a script is killed (default: 200)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of where and when (default: 0)")
    parser.add_argument("--keep", type=Path, help="a new folder for what is written (default: one that is removed)")
    parser.add_argument("--no-tqdm", action="store_true", help="disable the progress bar")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        root = args.keep or Path(name)
        root.mkdir(parents=True, exist_ok=True)
        summary = Chaos(root, args.kills, args.seed, not args.no_tqdm).run()
    report(summary, args)


def report(summary: Summary, args: argparse.Namespace) -> None:
    """Print the summary; exit status 1 where there is a finding."""
    for place, count in sorted(summary.kills.items()):
        print(f"{count:4d}  {place}")
    print(
        f"{summary.kills.total()} kills and {summary.stops.total()} stops by a signal, seed {args.seed}: "
        f"{summary.compared[True]} of {summary.compared.total()} finished works bit-identical to the undisturbed ones, "
        f"{len(summary.unreadable)} unreadable checkpoints"
    )
    for finding in summary.unreadable + summary.findings:
        print(f"finding: {finding}")
    if summary.unreadable or summary.findings:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
