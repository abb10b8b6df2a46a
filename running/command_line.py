"""Command-line arguments that several scripts take."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from helper import UserError
from running import distributed
from running.scripts import fail


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        """End the script with one line on stderr and exit status 2, without the usage block."""
        fail(f"error: {message} (see {self.prog} --help)", 2)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return _whole_number(text, 1)


def non_negative_int(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    return _whole_number(text, 0)


def number(said: str, holds: Callable[[float], bool], *words: str) -> Callable[[str], float | str]:
    """An argparse type: a number that `holds`, as is `said` of it, or one of some words."""

    def read(text: str) -> float | str:
        if text in words:
            return text
        with contextlib.suppress(ValueError):
            if holds(value := float(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {', '.join([*words, said])}, not {text!r}")

    return read


dose_factor = number("a number above 1, up to 100", lambda factor: 1 < factor <= 100)


def path_argument(text: str) -> Path:
    """An argparse type: a path. An empty one, as of a shell variable that is not set, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def no_checkpoint(path: Path) -> UserError:
    """What is wrong with a path to a checkpoint where there is none."""
    return UserError(f"{path}: no such checkpoint; name a .pt file or the folder of a run")


def refuse_missing(*paths: Path | None) -> None:
    """Raise UserError for the first path to a checkpoint where there is nothing: before torch is imported, to read it."""
    for path in paths:
        if path is not None and not path.exists():
            raise no_checkpoint(path)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
    if int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, not {text}")
    return int(text)


def base_parser(description: str, tasks: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts take."""
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--task", choices=tasks, help="settings and data set (default: the checkpoint's, else phantom)")
    add("--data-root", type=path_argument, help="folder of the data set (default for cbis-ddsm: data/cbis-ddsm)")
    add("--strict", action="store_true", help="an image that is missing or cannot be read is an error")
    add(
        "--out",
        type=path_argument,
        help="output folder (default: a new one under runs/ or latents/, or evaluation/ beside the checkpoint)",
    )
    add("--seed", type=non_negative_int, default=0, help="seed of everything random (default: 0)")
    add("--epochs", type=positive_int, help="override max_epochs from hps.py")
    add("--batch-size", type=positive_int, help="override batch size from hps.py")
    add("--num-workers", type=non_negative_int, help="override nb_workers from hps.py")
    add("--hps", action="append", default=[], metavar="KEY=VALUE", help="override any entry of hps.py")
    device_arguments(parser)
    precision_arguments(parser)
    add("--no-save", action="store_true", help="disable saving checkpoints and images")
    cache = parser.add_mutually_exclusive_group()
    kept = "folder of prepared images, for tasks that read from disk (default: cache)"
    cache.add_argument("--cache", type=path_argument, metavar="DIR", help=kept)
    cache.add_argument("--no-cache", action="store_true", help="decode the sources anew each time")
    return parser


def precision_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --amp and --no-amp."""
    amp = parser.add_mutually_exclusive_group()
    amp.add_argument("--no-amp", action="store_true", help="disable Automatic Mixed Precision, also when restoring")
    amp.add_argument("--amp", action="store_true", help="mixed precision on the CPU too (bfloat16)")


def device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --cpu, --cuda and --no-tqdm."""
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="disable GPU, run on CPU")
    device.add_argument("--cuda", action="store_true", help="no CUDA device is an error (default: run on the CPU then)")
    silent = not distributed.is_main()  # only the main process shows its progress
    said = "disable progress bars: at most a line a minute"
    parser.add_argument("--no-tqdm", action="store_true", default=silent, help=said)
