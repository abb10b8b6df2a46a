"""Checkpoints: written whole, read with care, and what is checked of them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from helper import UserError
from hps import ARCHITECTURE_DIFFUSION, ARCHITECTURE_VQVAE, HPS_DIFFUSION, HPS_VQVAE, TASKS, HParams, check
from running import distributed
from running.command_line import no_checkpoint
from running.writing import atomic_path

# Settings that came after the first checkpoints, at the values that those were trained with.
SETTINGS_ADDED = {
    "noise_levels": [], "stabilize": False, "dihedral": False, "native": False, "scale_range": [1.0, 1.0], "phantoms": 0,
    "noise_conditioning": False, "part_edges": False, "calcifications": 0.0, "calcification_contrast": [0.01, 0.6],
    "borders": 0.0, "altered_epochs": 0, "gamma_range": [1.0, 1.0], "windowing": 0.0, "most_gain": 8.0, "enhancement": 0.0,
    "enhancement_sigma": [2.0, 24.0], "grain": 0.0, "negatives": 0.0, "correlation": 0.0, "dose_fraction": 0.0,
    "degrade_on_device": False, "checkpoint_minutes": 10.0,
}  # fmt: skip
CHECKPOINT_FORMAT = {"vqvae": 1, "diffusion": 2}  # raised when the layout of a kind of checkpoint changes


class DamagedCheckpoint(UserError):
    """A checkpoint file that is not whole; the one before it may be."""


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's state, hexadecimal: tells which first stage a latent belongs to."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
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


def save_checkpoint(path: Path, checkpoint: Checkpoint, written: Path | None = None) -> None:
    """Write a checkpoint atomically, or give the file `written`, which holds it, a second name.

    A `last.pt` that was there is `previous.pt` then.
    """
    with atomic_path(path) as temporary:
        temporary.unlink()
        if written is not None:
            with contextlib.suppress(OSError):  # of file systems without hard links
                os.link(written, temporary)
        if not temporary.exists():
            _write(checkpoint, temporary)
        if path.name == LAST and path.exists():
            _keep_as(path, path.with_name(PREVIOUS))


def _write(checkpoint: Checkpoint, path: Path) -> None:
    payload = {"format_version": CHECKPOINT_FORMAT[checkpoint.kind]} | vars(checkpoint) | {"hps": dict(checkpoint.hps)}
    with path.open("wb") as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:  # torch hides what the system said when a write fails
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error).split("\n")[0]) from None


class CheckpointWriter:
    """Writes checkpoints one after the other, at once or `behind` the training, in a thread.

    What is written behind it is copied to the host first: it is the state at the call. Its errors are raised by the next call.
    """

    def __init__(self, *, behind: bool):
        self.thread = ThreadPoolExecutor(1) if behind else None
        self.pending: Future[None] | None = None

    def write(self, paths: Sequence[Path], checkpoint: Checkpoint) -> None:
        """Write a checkpoint under each of these names, in their order; waits for the one before."""
        self.close()
        if self.thread is None:
            _save_as(paths, checkpoint)
        else:
            self.pending = self.thread.submit(_save_as, paths, _on_host(checkpoint))

    def close(self) -> None:
        """Wait until all is written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def _save_as(paths: Sequence[Path], checkpoint: Checkpoint) -> None:
    written = None
    for path in paths:
        save_checkpoint(path, checkpoint, written)
        written = path


def _on_host(checkpoint: Checkpoint) -> Checkpoint:
    """A copy that a training does not change; tensors that share their memory still do."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        key = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in copies:
            copies[key] = tensor.to("cpu", non_blocking=True, copy=True)  # of a GPU's into pinned memory
        return copies[key]

    model, training = tree_map_only(Tensor, copy, (dict(checkpoint.model), checkpoint.training))
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return replace(checkpoint, model=model, training=training)


def _keep_as(path: Path, name: Path) -> None:
    """Give a file a second name; it loses the first one if the file system has no hard links."""
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

    A run folder stands for its newest whole checkpoint. Raises UserError, naming the file, if it is missing, unreadable, of
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
    """The checkpoint that --load-path names; None if the training starts anew.

    It does without --load-path, and if that is a run folder of this call (--out) or of an earlier one that ended before its
    first checkpoint. Raises UserError as `load_checkpoint` does, and if a
    training is to go on from weights alone.
    """
    path = args.load_path
    if path is None:
        return None
    is_run = path == args.out or (path / "run.json").is_file()
    if not args.evaluate and is_run and not path.is_file() and not checkpoints_in(path):
        print(f"{path}: holds no checkpoint yet; the training starts from the beginning")
        return None
    checkpoint = load_checkpoint(path, kind)
    if not args.evaluate and not checkpoint.training:
        remedy = "go on from a run folder, or train anew without --load-path"
        raise UserError(f"{path}: holds weights alone, as main-export.py writes them; {remedy}")
    return checkpoint


def _load_checkpoint(path: Path, kind: str, lazily: bool) -> Checkpoint:
    if not path.is_file():
        raise no_checkpoint(path)
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
    """The first part of a checkpoint, in a file of `size` bytes, that is not as it should be; empty if all are."""
    if checkpoint.task not in TASKS:
        return f"task {str(checkpoint.task)[:40]!r}"
    defaults = (HPS_VQVAE if checkpoint.kind == "vqvae" else HPS_DIFFUSION)[checkpoint.task]
    for key, value in checkpoint.hps.items():
        if key in defaults and not _is_like(value, defaults[key]):
            return f"setting {key}"
        # no width or count is greater than the weights have bytes: to build such a model would take all memory
        values = value if isinstance(value, list) else [value]
        if key in (*ARCHITECTURE_VQVAE, *ARCHITECTURE_DIFFUSION) and any(type(v) is int and v > size for v in values):
            return f"setting {key}={value}"
    state, extra = checkpoint.model, checkpoint.extra
    patients = extra.get("patients", []) if isinstance(extra, dict) else []
    counts = {name: getattr(checkpoint, name) for name in ("epoch", "step", "seen")}
    sound = {name: type(count) is int and count >= 0 for name, count in counts.items()} | {
        "best": isinstance(checkpoint.best, (int, float)),
        "model": isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values()),
        "training": isinstance(checkpoint.training, dict),
        "extra": isinstance(extra, dict),
        "patients": isinstance(patients, list) and all(isinstance(patient, str) for patient in patients),
        "settings": all(isinstance(key, str) for key in checkpoint.hps),
    }
    return next((name for name, is_sound in sound.items() if not is_sound), "")


def _is_like(value: object, default: object) -> bool:
    """Whether a setting has the type of its default; a whole number may stand for a fraction."""
    if isinstance(default, list):
        return isinstance(value, list) and all(type(v) in (int, float) for v in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def slim(checkpoint: Checkpoint, model: nn.Module, *, half: bool) -> Checkpoint:
    """A checkpoint of `model` without what only training needs; with `half` its weight matrices in half precision.

    Buffers, biases and other vectors stay as they are: they take no room, and the noise schedule would suffer.
    """
    matrices = {name for name, parameter in model.named_parameters() if half and parameter.ndim > 1}
    state = {name: value.half() if name in matrices else value for name, value in model.state_dict().items()}
    return Checkpoint(
        checkpoint.kind, checkpoint.task, checkpoint.hps, state, checkpoint.epoch, checkpoint.step, checkpoint.best,
        training={}, extra=checkpoint.extra | {"averaged": True},
    )  # fmt: skip


def build_model(make: Callable[[HParams], nn.Module], checkpoint: Checkpoint, path: Path) -> nn.Module:
    """The model that `make` builds from a checkpoint's settings; raises UserError if they make none."""
    try:
        check(checkpoint.hps)
        return make(checkpoint.hps)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0][:160] or type(error).__name__
        raise UserError(f"{path}: no model can be built of its settings ({reason}); use the one before it") from None


def warn_of_shared_patients(patients: list[str], task: str, *checkpoints: Checkpoint) -> list[str]:
    """The patients of a test set that a model of the same task was trained on; a line on stderr if there are any."""
    seen = {p for checkpoint in checkpoints if checkpoint.task == task for p in checkpoint.extra.get("patients", [])}
    shared = sorted(seen & set(patients))
    if shared:
        print(
            f"warning: {len(shared)} of {len(patients)} test patients {'was' if len(shared) == 1 else 'were'} trained on, "
            f"such as {shared[0]}: "
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
