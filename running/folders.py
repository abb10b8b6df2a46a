"""Run folders: which one, who may write there, and the record of the run."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
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

from helper import UserError, explained
from hps import HParams
from running import distributed
from running.checkpoints import checkpoints_in
from running.scripts import LOCKS
from running.writing import write_json

try:
    import fcntl
except ImportError:  # not a POSIX system: there are no locks
    fcntl = None
_ROOT = Path(__file__).resolve().parents[1]


def open_run(args: argparse.Namespace, script: str, checkpoint: Path | None = None) -> Path | None:
    """The folder that a training writes to: --out, else that of the checkpoint it resumes, else a new one under runs/.

    None under --no-save, and in all but the main process. Raises UserError if it cannot be made, or holds the checkpoints
    of another run.
    """
    if args.no_save or not distributed.is_main():
        return None
    resumed = checkpoint if checkpoint is None or checkpoint.is_dir() else checkpoint.parent
    out = args.out or resumed
    with explained(f"--out {out or 'runs'}: cannot be made"):
        if out is None:
            return _new_folder(f"{script}-{args.task}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        out.mkdir(parents=True, exist_ok=True)
        if checkpoints_in(out) and (resumed is None or resumed.resolve() != out.resolve()):
            raise UserError(
                f"--out {out}: holds a run already; resume it with --load-path {out}, or choose another folder"
            )
    return out


def _new_folder(name: str) -> Path:
    """Make a folder under runs/, with a number behind its name if another run started in the same second."""
    folder, numbers = Path("runs", name), itertools.count(1)
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = folder.with_name(f"{name}-{next(numbers)}")


def hold(path: Path, out: Path) -> None:
    """Lock the file `path`, which stands for the folder `out`, until the script ends or is killed.

    On file systems without locks nothing is locked. The main process of a run locks for all. Raises UserError if another
    process holds the lock, or if the file cannot be made.
    """
    if not distributed.is_main():
        return
    with explained(f"--out {out}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    LOCKS.callback(file.close)
    if fcntl is None:
        return
    os.register_at_fork(after_in_child=file.close)  # a loader's worker outlives a killed script for some seconds
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError  # the process that held it has just removed it
    except BlockingIOError:
        raise UserError(
            f"--out {out}: another process is writing there; wait for it, or choose another folder"
        ) from None
    except OSError:  # no locks here
        pass
    LOCKS.enter_context(contextlib.suppress(OSError))
    LOCKS.callback(path.unlink)


def evaluation_folder(args: argparse.Namespace, checkpoint: Path) -> Path | None:
    """The folder of an evaluation: --out, else `evaluation` beside the checkpoint; None under --no-save."""
    if args.no_save:
        return None
    folder = args.out or (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "evaluation"
    with explained(f"--out {folder}: cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def record_run(folder: Path, hps: HParams, seed: int, name: str = "run.json", **more: Any) -> None:
    """Write command, settings, seed, git revision, package versions and `more` to the file `name`."""
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
    """Output of git on this code, empty if there is no git or no repository."""
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()


def _package_versions() -> dict[str, str | None]:
    """Versions of the packages in requirements.txt; None if a package is not installed under its name."""
    names = re.findall(r"^[\w.-]+", (_ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    versions: dict[str, str | None] = dict.fromkeys(names)
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
