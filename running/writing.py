"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from helper import explained


@contextlib.contextmanager
def atomic_path(path: Path, flag: str = "--out") -> Iterator[Path]:
    """A temporary path beside `path`, which takes its name if the block ends well and vanishes if it does not.

    Folders that are made for it vanish too.

    Raises UserError, naming the file and the `flag` that chose its folder, if the system refuses to write it.
    """
    with explained(f"{path}: cannot be written", f"free space or choose another {flag}"):
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(8)}.part")  # short, for a name may have 255 bytes
        try:
            temporary.touch(exist_ok=False)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            if hasattr(os, "O_DIRECTORY"):  # the new name has to outlive a power failure too
                handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
                with contextlib.suppress(OSError):  # some network disks cannot
                    os.fsync(handle)
                os.close(handle)
        finally:
            temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds the file, or another's
                for folder in made:
                    folder.rmdir()


def remove_parts(*folders: Path, seconds: float = 0) -> None:
    """Remove half-written files in `folders` that a killed process left at least `seconds` ago."""
    for part in (part for folder in folders for part in folder.glob(".*.part")):
        with contextlib.suppress(FileNotFoundError):  # another process has finished or removed it
            if not seconds or time.time() - part.stat().st_mtime > seconds:
                part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically; floats that are not finite become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    write_text(path, json.dumps(finite, indent=1) + "\n")
