"""Utilities that both stages share: errors, devices, keyed randomness, files, checkpoints and run folders."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import distributed
import stopping
from hps import (
    ARCHITECTURE_DIFFUSION,
    ARCHITECTURE_VQVAE,
    HPS_DIFFUSION,
    HPS_VQVAE,
    TASKS,
    HParams,
    apply_overrides,
    check,
)

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not locked there
    fcntl = None

# Settings that came after the first checkpoints, at what those were trained with.
SETTINGS_ADDED = {
    "noise_levels": [], "stabilize": False, "dihedral": False, "native": False, "scale_range": [1.0, 1.0], "phantoms": 0,
    "noise_conditioning": False, "part_edges": False, "calcifications": 0.0,
    "borders": 0.0, "altered_epochs": 0, "gamma_range": [1.0, 1.0], "windowing": 0.0, "enhancement": 0.0,
    "degrade_on_device": False, "checkpoint_minutes": 10.0,
}  # fmt: skip
CHECKPOINT_FORMAT = {"vqvae": 1, "diffusion": 2}  # raised when the layout of a kind of checkpoint changes
SILENCE = 60.0  # seconds after which work without a progress bar prints how far it is
_ROOT = Path(__file__).resolve().parent
_HELD = contextlib.ExitStack()  # locks, which a script keeps until it ends


class UserError(Exception):
    """Something the user can mend. Its text is one sentence that names the file or flag and the remedy."""


class ImageError(UserError):
    """An image that cannot be used, where others may be."""


class DamagedCheckpoint(UserError):
    """A checkpoint file that is not whole, where the one before it may be."""


def one_line(error: Exception | str) -> str:
    """The sentence of an error, on one line whatever the names in it hold."""
    # a loader worker hands its error over wrapped in a traceback: the sentence is what follows the last marker
    sentence = re.split(r"(?:User|Image)Error: ", str(error))[-1].strip()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: match[0].encode("unicode_escape").decode(), sentence)


def run_script(main: Callable[[], None], *, parallel: bool = False) -> None:
    """Run a script's `main`: what the user can mend becomes one line on stderr and exit status 2, a signal 128 and its number.

    Of several processes the first to fail says why. Scripts that are not `parallel` refuse to be one of several.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # file names need not be Unicode; lines reach a file or a pipe when they are said
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        with stopping.obeyed():
            _run(main, parallel)
    except SystemExit as stop:
        _HELD.close()
        distributed.leave(stop.code)
    except stopping.Stopped as stop:  # it came while an error was dealt with
        _HELD.close()
        distributed.leave(stop.status)
    finally:
        _HELD.close()


def _run(main: Callable[[], None], parallel: bool) -> None:
    try:
        distributed.start()
        if not parallel:
            refuse_torchrun("this script")
        main()
        distributed.end()
    except UserError as error:
        fail(f"error: {one_line(error)}", 2)
    except BrokenPipeError:
        _to_nowhere(sys.stdout)
        fail("error: standard output was closed while the script ran; send it to a file, or to /dev/null", 2)
    except OSError as error:
        sentence = f"{error.filename or 'a file'}: {error.strerror or error}; free space, or see that it can be used"
        fail(f"error: {one_line(sentence)}", 2)
    except stopping.Stopped as stop:
        fail(stop.line, stop.status)
    except Exception as error:
        if str(error).startswith("DataLoader worker"):
            # the cause, where there is one, knows the signal or the status
            known = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error
            reason = str(known).split("\n")[0].strip().rstrip(".")
            fail(f"error: {reason}; if memory was short, pass a smaller --num-workers", 2)
        if distributed.is_lost_connection(error):
            fail(
                "error: a process of this run ended without a reason (killed, or out of memory?); start again, a training "
                "with --load-path",
                1,
            )
        if distributed.size() == 1:
            raise
        distributed.is_first_to_fail()  # the traceback is the reason
        traceback.print_exc()
        sys.exit(1)


def _to_nowhere(stream: TextIO) -> None:
    """Nobody listens: what is left to say must not fail again when the interpreter ends, and change the status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(line: str, status: int) -> NoReturn:
    """End the script with one line on stderr, unless another process of the run has said why it ends."""
    if distributed.is_first_to_fail():
        try:
            print(line, file=sys.stderr)
        except BrokenPipeError:
            _to_nowhere(sys.stderr)
    sys.exit(status)


def finish_batch(failures: Sequence[str], done: int = 1) -> None:
    """End a script that went on past `failures`: their sentences on stderr and exit status 1, or 2 where nothing was `done`.

    Does nothing without failures.
    """
    if distributed.is_main():
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
    if failures:
        sys.exit(1 if done else 2)


def refuse_torchrun(what: str) -> None:
    """Raises UserError where this process is one of several."""
    if distributed.size() > 1:
        raise UserError(f"{what} runs in one process; call it with python, not torchrun")


class Silence:
    """How long nothing was said, for scripts that show no progress bar."""

    def __init__(self):
        self.since = time.monotonic()

    def is_long(self) -> bool:
        """Whether `SILENCE` seconds have gone by since this was made or was last true."""
        if time.monotonic() - self.since < SILENCE:
            return False
        self.since = time.monotonic()
        return True


T = TypeVar("T")


def tracked(items: Iterable[T], what: str, unit: str, progress: bool, total: int | None = None) -> Iterator[T]:
    """The items under a progress bar or, without one, with a line a minute on how many are done.

    `total` is their number, where they have no length.
    """
    if progress:
        yield from tqdm(items, desc=what, total=total, unit=unit)
        return
    total, silence = len(items) if total is None else total, Silence()
    for done, item in enumerate(items):
        if silence.is_long():
            print(f"{what}: {done} of {total} {unit}s")
        yield item


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        """A wrong call: one line on stderr and exit status 2, without the usage block."""
        fail(f"error: {message} (see {self.prog} --help)", 2)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def non_negative_int(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, not {text!r}")
    if int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, not {text}")
    return int(text)


def base_parser(description: str, tasks: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts take."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--task", choices=tasks, help="settings and data set (default: the checkpoint's, else phantom)")
    parser.add_argument("--data-root", type=Path, help="folder of the data set (default for cbis-ddsm: data/cbis-ddsm)")
    parser.add_argument("--strict", action="store_true", help="an image that is missing or cannot be read is an error")
    parser.add_argument("--out", type=Path, help="output folder (default: a new one under runs/)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--epochs", type=positive_int, help="override max_epochs from hps.py")
    parser.add_argument("--batch-size", type=positive_int, help="override batch size from hps.py")
    parser.add_argument("--num-workers", type=non_negative_int, help="override nb_workers from hps.py")
    parser.add_argument("--hps", action="append", default=[], metavar="KEY=VALUE", help="override any entry of hps.py")
    device_arguments(parser)
    parser.add_argument("--no-save", action="store_true", help="disable saving checkpoints and images")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder of prepared images, for tasks that read from disk (default: cache)",
    )
    cache.add_argument("--no-cache", action="store_true", help="decode the sources anew each time")
    amp = parser.add_mutually_exclusive_group()
    amp.add_argument("--no-amp", action="store_true", help="disable Automatic Mixed Precision")
    amp.add_argument("--amp", action="store_true", help="mixed precision on the CPU too (bfloat16)")
    return parser


def device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --cpu, --cuda and --no-tqdm."""
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--cpu", action="store_true", help="disable GPU, run on CPU")
    device.add_argument("--cuda", action="store_true", help="no CUDA device is an error (default: run on the CPU then)")
    # of several processes one shows its progress
    silent = not distributed.is_main()
    parser.add_argument(
        "--no-tqdm", action="store_true", default=silent, help="disable progress bars: at most a line a minute"
    )


# --- devices and numbers ---------------------------------------------------------------------------------------------


def get_device(cpu: bool = False, cuda: bool = False) -> torch.device:
    """CUDA where there is a device and `cpu` does not forbid it, else the CPU; says so when it falls back.

    Raises UserError where `cuda` asks for a device and there is none, or a machine has fewer GPUs than processes.
    """
    if not cpu and torch.cuda.is_available():
        if not distributed.use_own_gpu():
            raise UserError(
                f"--nproc-per-node {distributed.local_size()}: this machine has {torch.cuda.device_count()} GPUs; start "
                "as many processes, or pass --cpu"
            )
        return torch.device("cuda")
    if cuda:
        raise UserError("--cuda: no CUDA device found; check the driver and CUDA_VISIBLE_DEVICES, or leave it out")
    if not cpu:
        print("no CUDA device found: running on the CPU")
    return torch.device("cpu")


def amp_dtype(device: torch.device, enabled: bool) -> torch.dtype | None:
    """Precision of autocast: bfloat16 where the device has it, else float16; None where it is off."""
    if not enabled:
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def half_precision(device: torch.device, half: bool) -> torch.dtype | None:
    """Precision that `--half` runs the UNet in; raises UserError on the CPU, whose half precision is slower than single."""
    if half and device.type == "cpu":
        raise UserError("--half: needs a CUDA device; leave it out on the CPU, where single precision is faster")
    return amp_dtype(device, half)


def worker_count(wanted: int) -> int:
    """Of `wanted` worker processes, as many as there are cores for; the run's processes on a machine share its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, max(1, cores // distributed.local_size()))


def get_parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def seed_of(*key: object) -> int:
    """A 63-bit seed that depends on every part of `key` and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and python; what training draws has keyed ones of its own."""
    torch.manual_seed(seed)
    np.random.seed(seed_of("numpy", seed) % 2**32)
    random.seed(seed_of("python", seed))


def seeded_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator keyed by `key`: what it draws depends on neither order, worker nor process."""
    return torch.Generator(device).manual_seed(seed_of(*key))


def randn_by_sample(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Unit Gaussian noise (N, *shape), one generator a sample, so that a sample's noise does not depend on its batch."""
    return torch.stack([torch.randn(*shape, generator=g, device=device) for g in generators])


def rng_state() -> dict[str, Any]:
    """State of the global generators of torch, CUDA, numpy and python, in types that a checkpoint can hold."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; CUDA states only where as many devices are there."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


# --- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: Path, flag: str = "--out") -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well and vanishes when it does not.

    Raises UserError, naming the file and the `flag` that chose its folder, where the system refuses to write it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files for their owner alone
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another {flag}"
        ) from None


def _sync_folder(folder: Path) -> None:
    """See that the names in a folder outlive a power failure, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with contextlib.suppress(OSError):  # some network disks cannot
                os.fsync(handle)
        finally:
            os.close(handle)


def remove_parts(*folders: Path) -> None:
    """Remove what a killed process had begun to write in `folders`, which this one holds."""
    for folder in folders:
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically; floats that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's state, hexadecimal: tells which first stage a latent belongs to."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Checkpoint:
    """What a checkpoint file holds."""

    kind: str  # "vqvae" or "diffusion"
    task: str
    hps: HParams
    model: dict[str, Tensor]
    epoch: int  # epochs completed
    step: int  # optimiser steps taken
    best: float  # best validation score so far
    training: dict[str, Any]  # ema, optimizer, scaler and RNG states, seed
    extra: dict[str, Any]  # what a kind adds, e.g. the digest of its first stage
    seen: int = 0  # samples of the epoch after those completed


LAST, PREVIOUS = "last.pt", "previous.pt"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; a `last.pt` that was there is `previous.pt` then."""
    payload = {"format_version": CHECKPOINT_FORMAT[checkpoint.kind]} | {
        field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)
    }
    payload["hps"] = dict(checkpoint.hps)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:  # torch's own complaint when a write fails; what the system said stands behind it
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error).split("\n")[0]) from None
        if path.name == LAST and path.exists():
            _keep_as(path, path.with_name(PREVIOUS))


def _keep_as(path: Path, name: Path) -> None:
    """Give a file a second name, or where the file system has no hard links that name alone."""
    second = name.with_name(f".{name.name}.part")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        path.replace(name)
        return
    second.replace(name)
    second.unlink(missing_ok=True)  # of two names of one file nothing is replaced


def checkpoints_in(run: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first."""
    others = set(run.glob("*.pt")) - {run / LAST, run / PREVIOUS}
    newest_first = sorted(others, key=lambda path: (path.stat().st_mtime, path.name), reverse=True)
    return [path for path in (run / LAST, run / PREVIOUS, *newest_first) if path.is_file()]


def load_checkpoint(path: Path, kind: str, *, lazily: bool = False) -> Checkpoint:
    """Read a checkpoint of the given kind onto the CPU; `lazily` leaves on disk what nobody looks at.

    A run folder stands for its newest whole checkpoint. Raises UserError, naming the file, where it is missing, unreadable, of
    another kind or of another format version.
    """
    if not path.is_dir():
        return _load_checkpoint(path, kind, lazily)
    files = checkpoints_in(path)
    if not files:
        raise UserError(f"{path}: holds no checkpoint; name a .pt file or the folder of a run")
    for number, file in enumerate(files, 1):
        try:
            return _load_checkpoint(file, kind, lazily)
        except DamagedCheckpoint as error:
            reason = str(error).split(";")[0]
        if number < len(files) and distributed.is_main():
            print(f"warning: {reason}; {files[number]} is used instead", file=sys.stderr)
    raise DamagedCheckpoint(f"{reason}, nor is any before it; train anew in another folder")


def checkpoint_to_resume(args: argparse.Namespace, kind: str) -> Checkpoint | None:
    """The checkpoint that --load-path names; None where a training starts anew.

    It does without --load-path, and where that is a run folder of this call (--out) or of an earlier one that ended before its
    first checkpoint. Raises UserError as `load_checkpoint` does.
    """
    path = args.load_path
    if path is None:
        return None
    is_run = path == args.out or (path / "run.json").is_file()
    if not args.evaluate and is_run and not path.is_file() and not checkpoints_in(path):
        print(f"{path}: holds no checkpoint yet; the training starts from the beginning")
        return None
    return load_checkpoint(path, kind)


def _load_checkpoint(path: Path, kind: str, lazily: bool) -> Checkpoint:
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; name a .pt file or the folder of a run")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch compresses nothing: what is compressed may grow past all memory; and it does not look at the checksums
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()) or archive.testzip():
                raise ValueError("compressed or damaged")
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except Exception as error:  # noqa: BLE001  torch raises many kinds for a broken file
        raise DamagedCheckpoint(
            f"{path}: not a readable checkpoint of this project ({type(error).__name__}); use the one before it, as its run "
            "folder does"
        ) from None
    if not isinstance(payload, dict) or "format_version" not in payload or "kind" not in payload:
        raise UserError(f"{path}: not a checkpoint of this project; train one with main-vqvae.py or main-diffusion.py")
    version, other = payload["format_version"], str(payload["kind"])[:40]
    scripts = {"vqvae": "main-vqvae.py (stage 1)", "diffusion": "main-diffusion.py (stage 2)"}
    if other != kind:
        raise UserError(
            f"{path}: a checkpoint of {scripts.get(other, other)}, but one of {scripts[kind]} is needed here"
        )
    if type(version) is not int or version != CHECKPOINT_FORMAT[kind]:
        raise UserError(
            f"{path}: checkpoint format {str(version)[:40]}, but this version reads {CHECKPOINT_FORMAT[kind]}; train it anew "
            f"with {scripts[kind]}, or use the version it came from"
        )
    del payload["format_version"]
    try:
        payload["hps"] = HParams(SETTINGS_ADDED | payload["hps"])
        checkpoint = Checkpoint(**payload)
        wrong = _wrong_part(checkpoint, path.stat().st_size)
    except (KeyError, TypeError, ValueError):
        raise DamagedCheckpoint(f"{path}: parts of the checkpoint are missing; use the one before it") from None
    if wrong:
        raise DamagedCheckpoint(f"{path}: parts of the checkpoint are damaged ({wrong}); use the one before it")
    return checkpoint


def _wrong_part(checkpoint: Checkpoint, size: int) -> str:
    """The first part of a checkpoint, in a file of `size` bytes, that is not what it should be; empty where all are."""
    table = HPS_VQVAE if checkpoint.kind == "vqvae" else HPS_DIFFUSION
    if checkpoint.task not in TASKS:
        return f"task {str(checkpoint.task)[:40]!r}"
    for key, value in checkpoint.hps.items():
        if not isinstance(key, str):
            return "settings"
        if key in table[checkpoint.task] and not _is_like(value, table[checkpoint.task][key]):
            return f"setting {key}"
    for key in (*ARCHITECTURE_VQVAE, *ARCHITECTURE_DIFFUSION):
        values = checkpoint.hps.get(key)
        # no width or count is greater than the weights have bytes: to build such a model would take all memory
        if any(isinstance(v, int) and v > size for v in (values if isinstance(values, list) else [values])):
            return f"setting {key}={values}"
    for name in ("epoch", "step", "seen"):
        if type(getattr(checkpoint, name)) is not int or getattr(checkpoint, name) < 0:
            return name
    if not isinstance(checkpoint.best, (int, float)):
        return "best"
    for name in ("model", "training", "extra"):
        if not isinstance(getattr(checkpoint, name), dict):
            return name
    for name, value in checkpoint.model.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return "model"
    patients = checkpoint.extra.get("patients", [])
    if not isinstance(patients, list) or not all(isinstance(patient, str) for patient in patients):
        return "patients"
    return ""


def _is_like(value: object, default: object) -> bool:
    """Whether a setting has the type of its default; a whole number may stand for a fraction."""
    if isinstance(default, list):
        return isinstance(value, list) and all(type(v) in (int, float) for v in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def build_model(make: Callable[[HParams], nn.Module], checkpoint: Checkpoint, path: Path) -> nn.Module:
    """What `make` builds of a checkpoint's settings; raises UserError where these make no model."""
    try:
        check(checkpoint.hps)
        return make(checkpoint.hps)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0][:160] or type(error).__name__
        raise UserError(f"{path}: no model can be built of its settings ({reason}); use the one before it") from None


def warn_of_shared_patients(patients: list[str], task: str, *checkpoints: Checkpoint) -> list[str]:
    """The patients of a test set that a model of the same task was trained on; a line on stderr where there are any."""
    seen = {p for checkpoint in checkpoints if checkpoint.task == task for p in checkpoint.extra.get("patients", [])}
    shared = sorted(seen & set(patients))
    if shared:
        print(
            f"warning: {len(shared)} of {len(patients)} test patients were trained on, such as {shared[0]}: "
            "the figures say nothing about new patients",
            file=sys.stderr,
        )
    return shared


def load_weights(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict strictly; raises UserError with the first thing that does not fit."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path}: the weights do not fit the model of its settings: {reason}") from None
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: the weights are damaged ({name} is not finite); use the one before it")


# --- run folders -----------------------------------------------------------------------------------------------------


def open_run(args: argparse.Namespace, script: str, checkpoint: Path | None = None) -> Path | None:
    """The folder that a training writes to: --out, else that of the checkpoint it resumes, else a new one under runs/.

    None under --no-save, and in all but the main process. Raises UserError where it cannot be made, or holds another run's
    checkpoints.
    """
    if args.no_save or not distributed.is_main():
        return None
    resumed = checkpoint if checkpoint is None or checkpoint.is_dir() else checkpoint.parent
    out = args.out or resumed
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            if checkpoints_in(out) and (resumed is None or resumed.resolve() != out.resolve()):
                raise UserError(
                    f"--out {out}: holds a run already; resume it with --load-path {out}, or choose another folder"
                )
            return out
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            folder = Path("runs") / f"{script}-{args.task}-{stamp}{f'-{attempt}' if attempt else ''}"
            folder.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(
            f"--out {error.filename or out}: cannot be made ({error.strerror}); choose another folder"
        ) from None
    raise UserError(f"runs/: a thousand runs of {script} started in the same second; name one with --out")


def hold(path: Path, out: Path) -> None:
    """Lock the file `path`, which stands for the folder `out`, until the script ends; the system lifts a dead process's lock.

    File systems without locks go without, and of several processes of a run the main one locks for all. Raises UserError
    where another has it, or it cannot be made.
    """
    if not distributed.is_main():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    _HELD.callback(file.close)
    if fcntl is None:
        return
    os.register_at_fork(after_in_child=file.close)  # a loader's worker outlives a killed script for some seconds
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError  # the process that had it has just removed it
    except BlockingIOError:
        raise UserError(
            f"--out {out}: another process is writing there; wait for it, or choose another folder"
        ) from None
    except OSError:
        pass
    _HELD.callback(_remove, path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def evaluation_folder(args: argparse.Namespace, checkpoint: Path) -> Path | None:
    """Where an evaluation goes: --out, else `evaluation` beside the checkpoint; None under --no-save."""
    if args.no_save:
        return None
    folder = args.out or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "evaluation"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); choose another folder") from None
    return folder


def record_run(folder: Path, hps: HParams, seed: int, name: str = "run.json", **more: Any) -> None:
    """Write command, settings, seed, git revision, package versions and what is `more` to the file `name`."""
    revision = _git("rev-parse", "HEAD")
    write_json(
        folder / name,
        {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "hps": dict(hps),
            "seed": seed,
            "revision": revision or None,
            "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")) if revision else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "packages": _package_versions(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "started": datetime.datetime.now().isoformat(timespec="seconds"),
            **more,
        },
    )


def _git(*words: str) -> str:
    """What git says of the code, empty where there is no git or no repository."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()


def _package_versions() -> dict[str, str | None]:
    """Versions of the packages in requirements.txt; None for what is not installed under its name."""
    versions = {}
    for line in (_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"[\w.-]+", line):
            try:
                versions[match[0]] = metadata.version(match[0])
            except metadata.PackageNotFoundError:
                versions[match[0]] = None
    return versions


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned text columns: the first to the left, the others to the right; floats with the digits they are given as."""
    cells = [[str(c) for c in header], *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# --- settings --------------------------------------------------------------------------------------------------------

# Entries that say which images there are and which split they are in: stage 2 takes them from its first stage's checkpoint,
# so that no image tested on was trained on by either.
DATA_IDENTITY = (
    "image_shape", "noise_level", "native", "stabilize", "split", "abnormality", "split_csv", "patient_pattern",
    "validation_fraction",
    "test_fraction", "phantom_counts",
)  # fmt: skip


def resolve_settings(
    args: argparse.Namespace,
    table: dict[str, HParams],
    *,
    checkpoint: Checkpoint | None = None,
    architecture: Sequence[str] = (),
    first_stage: Checkpoint | None = None,
) -> HParams:
    """The settings of a call: the task's, then the checkpoint's, then what the flags override.

    A checkpoint's `architecture` entries always hold; of another task's checkpoint nothing else does. Data entries follow
    the first stage's checkpoint. Sets `args.task` where it was left out. Raises UserError naming the flag.
    """
    source = checkpoint or first_stage
    args.task = args.task or (source.task if source else "phantom")
    resumes = checkpoint is not None and not getattr(args, "evaluate", True)
    if resumes and checkpoint.task != args.task:
        raise UserError(
            f"--task {args.task}: {args.load_path} was trained on {checkpoint.task}; leave --task out to resume"
        )
    hps = table[args.task].updated()
    if first_stage is not None and first_stage.task == args.task:
        hps = hps.updated(**{key: first_stage.hps[key] for key in DATA_IDENTITY if key in first_stage.hps})
    if checkpoint is not None:
        kept = [key for key in checkpoint.hps if key in hps and (checkpoint.task == args.task or key in architecture)]
        hps = hps.updated(**{key: checkpoint.hps[key] for key in kept})
    flags = {"batch_size": args.batch_size, "max_epochs": args.epochs, "nb_workers": args.num_workers}
    set_flags = {key: value for key, value in flags.items() if value is not None and key in hps}
    if "batch_size" in set_flags and hps.mini_batch_size and set_flags["batch_size"] % hps.mini_batch_size:
        set_flags["mini_batch_size"] = 0
    try:
        hps, overridden = apply_overrides(hps.updated(**set_flags), args.hps)
    except ValueError as error:
        raise UserError(str(error)) from None
    if checkpoint is not None:
        for key in overridden & set(architecture):
            if hps[key] != checkpoint.hps.get(key, hps[key]):
                raise UserError(
                    f"--hps {key}={hps[key]}: the checkpoint was trained with {checkpoint.hps[key]}; leave it out"
                )
    return hps
