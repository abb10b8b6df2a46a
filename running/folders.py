"""Run folders: who may write there, and the record of how it was made."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helper import UserError
from hps import (
    HParams,
)
from running import distributed
from running.checkpoints import checkpoints_in
from running.scripts import HELD
from running.writing import write_json

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not locked there
    fcntl = None
_ROOT = Path(__file__).resolve().parents[1]


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
    HELD.callback(file.close)
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
    HELD.callback(_remove, path)


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
