"""Images on the training grid, kept on disk: each is decoded once, whatever subset, script or process asks for it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from files.prepared import Record, prepare_record
from helper import ImageError, UserError, one_line, seeded_generator, tracked
from preprocessing.grid import LEVELS, Grid, Prepared
from running.distributed import worker_count
from running.stopping import left_to_the_main_process
from running.writing import atomic_path

CACHE_FORMAT = 1  # raised when the layout of an entry changes, or what `prepare_record` makes of an image
_LEFT_OVER_SECONDS = 3600  # a temporary file this old belongs to a build that was killed
_HEADER_BYTES = 1024  # generous, for the estimate of disk space


class PreparedCache:
    """Prepared images below `folder`, for a training grid of `image_shape` (1, H, W).

    An entry is one file: uint16 planes (clean, and degraded of a real pair), the mask in packed bits, and a JSON header at
    the end with format, grid and the sources' sizes and times. It takes its name when it is whole, so that processes need no
    locks and a reader never sees parts of two entries.
    """

    def __init__(self, folder: Path, image_shape: Sequence[int]):
        self.image_shape = list(image_shape)
        self.root, self.folder = folder, folder / f"{image_shape[1]}x{image_shape[2]}-v{CACHE_FORMAT}"
        self.failures: dict[Path, str] = {}  # of sources that `build` could not read
        self._paths: dict[tuple[Path, Path | None], Path] = {}

    def build(self, records: Sequence[Record], workers: int = 0, progress: bool = True, *, strict: bool = True) -> None:
        """Make the entries that are missing or stale, in `workers` processes beside this one (0: in this one).

        Raises UserError for a folder that cannot be written, too little disk space and, with `strict`, a source that cannot
        be read; else `failures` says what was wrong with it, and so does `load`.
        """
        records = list({self.path(record): record for record in records}.values())
        missing = []
        for record in records:
            try:
                if not self.holds(record):
                    missing.append(record)
            except ImageError as error:
                if strict:
                    raise
                self.failures[record.path] = one_line(error)
        if not missing:
            print(f"{self.folder}: all {len(records)} images are prepared")
            return
        if stale := sum(self.path(record).exists() for record in missing):
            print(f"{self.folder}: {stale} entries were stale and are made anew")
        self._make_room(missing, len(records))
        # processes that build at once begin at different images, and so share the work
        random.Random(os.getpid()).shuffle(missing)
        loader = DataLoader(
            _Entries(self, missing, strict),
            batch_size=None,
            generator=seeded_generator("workers"),  # else it draws a seed from the global generator
            num_workers=worker_count(min(workers, len(missing))),
            worker_init_fn=left_to_the_main_process,
        )
        for index, failure in tracked(loader, "preparing", "image", progress):
            if failure:
                self.failures[missing[index].path] = failure

    def load(self, record: Record, *, as_levels: bool = False) -> Prepared:
        """A record's image, equal to the last bit to what `prepare_record` makes of it; its sources are not looked at.

        `as_levels` leaves its planes as they are kept: see `intensities`.
        Raises UserError naming the file where the entry is missing or damaged.
        """
        path = self.path(record)
        if record.path in self.failures:
            raise ImageError(self.failures[record.path])
        try:
            planes, mask, _, grid = self._read(record)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "damaged"
            raise UserError(
                f"{path}: not a readable cache entry ({reason}); run again to make it anew, or use --no-cache"
            ) from None
        levels = torch.from_numpy(planes.astype(np.uint16).view(np.int16))
        bits = np.unpackbits(mask, count=planes[0].size).view(np.bool_).reshape(1, *planes.shape[1:])
        degraded = None if record.degraded is None else levels[1:]
        image = Prepared(levels[:1], torch.from_numpy(bits), degraded, {"grid": grid})
        return image if as_levels else image.as_floats()

    def path(self, record: Record) -> Path:
        """The file of a record's entry, there or not."""
        key = record.path, record.degraded
        if key not in self._paths:  # once a record: resolving a path asks the disk of the sources
            names = "\0".join(str(source.resolve()) for source in key if source is not None)
            self._paths[key] = self.folder / f"{hashlib.blake2b(names.encode(), digest_size=16).hexdigest()}.raw"
        return self._paths[key]

    def holds(self, record: Record) -> bool:
        """Whether there is a whole entry of a record that fits its sources as they are now.

        Raises UserError where a source is missing.
        """
        expected = self._expected(record)
        try:
            return self._read(record)[2] == expected
        except (OSError, ValueError):
            return False

    def make(self, record: Record) -> None:
        """Write a record's entry; raises UserError for a source that cannot be read or an entry that cannot be written."""
        header = self._expected(record)  # before the sources are read: a change meanwhile makes the entry stale
        image = prepare_record(record, self.image_shape)
        planes = image.clean if image.degraded is None else torch.cat([image.clean, image.degraded])
        header["grid"] = dataclasses.asdict(image.info["grid"])
        with atomic_path(self.path(record), "--cache") as temporary, temporary.open("wb") as file:
            file.write(np.rint(planes.numpy() * np.float32(LEVELS)).astype("<u2").tobytes())
            file.write(np.packbits(image.mask.numpy()).tobytes())
            file.write(json.dumps(header).encode())

    def _expected(self, record: Record) -> dict:
        """What the header of a record's entry must say, but for the grid."""
        sources = []
        for source in (record.path, record.degraded):
            if source is not None:
                try:
                    status = source.stat()
                except OSError as error:
                    raise ImageError(f"{source}: cannot be read ({error.strerror}); put it back") from None
                sources.append([str(source.resolve()), status.st_size, status.st_mtime_ns])
        return {"format": CACHE_FORMAT, "image_shape": self.image_shape, "sources": sources}

    def _sizes(self, record: Record) -> tuple[int, int]:
        """Bytes of the planes and of the mask of a record's entry."""
        pixels = self.image_shape[1] * self.image_shape[2]
        return 2 * pixels * (1 if record.degraded is None else 2), -(-pixels // 8)

    def _read(self, record: Record) -> tuple[np.ndarray, np.ndarray, dict, Grid]:
        """Planes (1 or 2, H, W), packed mask, header and grid of a record's entry; raises OSError or ValueError."""
        data = np.asarray(np.memmap(self.path(record), np.uint8, "r"))
        image_bytes, mask_bytes = self._sizes(record)
        planes = data[:image_bytes].view("<u2").reshape(-1, *self.image_shape[1:])
        header = json.loads(data[image_bytes + mask_bytes :].tobytes())
        try:
            grid = Grid(**{name: tuple(values) for name, values in header.pop("grid").items()})
        except (KeyError, TypeError, AttributeError):
            raise ValueError("no grid in the header") from None
        return planes, data[image_bytes : image_bytes + mask_bytes], header, grid

    def _make_room(self, missing: Sequence[Record], total: int) -> None:
        """Make the folder, remove what killed builds left in it, and say what is to be written where."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*.part"):
                with contextlib.suppress(FileNotFoundError):  # another process has finished or removed it
                    if time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS:
                        path.unlink()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(
                f"--cache {self.root}: cannot be written ({error.strerror}); choose another folder, or use --no-cache"
            ) from None
        needed = sum(sum(self._sizes(record)) + _HEADER_BYTES for record in missing)
        if needed > 0.98 * free:
            raise UserError(
                f"--cache {self.root}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; "
                "choose a folder on a larger disk, or use --no-cache"
            )
        print(
            f"{self.folder}: preparing {len(missing)} of {total} images, {needed / 1e9:.3f} GB; "
            f"{free / 1e9:.1f} GB free"
        )


@dataclasses.dataclass
class _Entries(Dataset):
    """Makes entry number i when asked for it, unless another process has made it meanwhile.

    Returns i and what was wrong with its sources, where not `strict`.
    """

    cache: PreparedCache
    records: list[Record]
    strict: bool

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, str]:
        try:
            if not self.cache.holds(self.records[index]):
                self.cache.make(self.records[index])
        except ImageError as error:
            if self.strict:
                raise
            return index, one_line(error)
        return index, ""
