"""Images on the training grid, kept on disk: each is decoded once, whichever subset, script or process asks for it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from files.prepared import Record, prepare_record
from helper import ImageError, UserError, counted, explained, one_line, seeded_generator, tracked
from preprocessing.grid import MAX_GREY_VALUE, Grid, Prepared
from running.distributed import worker_count
from running.loader import Loader
from running.writing import atomic_path, remove_parts

CACHE_FORMAT = 2  # raised when the layout of an entry or the result of `prepare_record` changes
_LEFT_OVER_SECONDS = 3600  # a temporary file this old belongs to a killed build
_HEADER_BYTES = 1024  # upper bound, to estimate the disk space
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # raised by a damaged entry


class PreparedCache:
    """Prepared images below `folder`, for a training grid of `image_shape` (1, H, W).

    An entry is one file: uint16 planes (clean, and degraded of a real pair), the mask in packed bits, and a JSON header at
    the end with format, grid, remarks, and the sources' sizes and times. It gets its name when it is complete, so processes need no
    locks and a reader never sees half an entry.
    """

    def __init__(self, folder: Path, image_shape: Sequence[int]):
        self.image_shape = list(image_shape)
        self.root, self.folder = folder, folder / f"{image_shape[1]}x{image_shape[2]}-v{CACHE_FORMAT}"
        self.failures: dict[Path, str] = {}  # of sources that `build` could not read
        self._paths: dict[tuple[Path, Path | None], Path] = {}

    def build(self, records: Sequence[Record], workers: int = 0, progress: bool = True, *, strict: bool = True) -> None:
        """Make the entries that are missing or stale, in `workers` processes beside this one (0: in this one).

        Raises UserError if the folder cannot be written, the disk is too small or, with `strict`, a source cannot be read.
        Without `strict`, `failures` says why, and `load` raises it.
        """
        records = list({self.path(record): record for record in records}.values())
        missing = [record for record in records if not self.holds(record)]
        if not missing:
            print(f"{self.folder}: all of {counted(len(records), 'image')} prepared")
            return
        if stale := sum(self.path(record).exists() for record in missing):
            print(f"{self.folder}: {counted(stale, 'stale entry is', 'stale entries are')} made anew")
        self._make_room(missing, len(records))
        # processes that build at the same time begin at different images, and so share the work
        random.Random(os.getpid()).shuffle(missing)
        loader = Loader(
            missing,
            batch_size=None,
            collate_fn=functools.partial(self._make_if_missing, strict=strict),
            generator=seeded_generator("workers"),  # otherwise it draws a seed from the global generator
            num_workers=worker_count(min(workers, len(missing))),
        )
        made = tracked(loader.once(), "preparing", "image", progress, len(missing))
        self.failures |= {path: why for path, why in made if why}

    def _make_if_missing(self, record: Record, strict: bool) -> tuple[Path, str]:
        """Make an entry unless another process has; returns its source and, if not `strict`, why that cannot be read."""
        try:
            if not self.holds(record):
                self.make(record)
        except ImageError as error:
            if strict:
                raise
            return record.path, one_line(error)
        return record.path, ""

    def load(self, record: Record, *, as_grey_values: bool = False) -> Prepared:
        """A record's image, equal to the last bit to the result of `prepare_record`; its sources are not looked at.

        With `as_grey_values` its planes stay 16-bit grey values: see `intensities`.
        Raises UserError naming the file if the entry is missing or damaged.
        """
        if record.path in self.failures:
            raise ImageError(self.failures[record.path])
        try:
            planes, mask, _, info = self._read(record)
        except _DAMAGED as error:
            reason = getattr(error, "strerror", None) or "damaged"
            remedy = "run again to make it anew, or use --no-cache"
            raise UserError(f"{self.path(record)}: not a readable cache entry ({reason}); {remedy}") from None
        values = torch.from_numpy(planes.astype(np.uint16).view(np.int16))
        bits = np.unpackbits(mask, count=planes[0].size).view(np.bool_).reshape(1, *planes.shape[1:])
        degraded = None if record.degraded is None else values[1:]
        image = Prepared(values[:1], torch.from_numpy(bits), degraded, info)
        return image if as_grey_values else image.as_floats()

    def path(self, record: Record) -> Path:
        """The file of a record's entry, whether it exists or not."""
        key = record.path, record.degraded
        if key not in self._paths:  # resolving a path reads the disk
            names = "\0".join(str(source.resolve()) for source in key if source is not None)
            self._paths[key] = self.folder / f"{hashlib.blake2b(names.encode(), digest_size=16).hexdigest()}.raw"
        return self._paths[key]

    def holds(self, record: Record) -> bool:
        """Whether there is a complete entry of a record that fits its sources as they are now."""
        try:
            return self._read(record)[2] == self._expected(record)
        except (ImageError, *_DAMAGED):
            return False

    def make(self, record: Record) -> None:
        """Write a record's entry; raises UserError if a source cannot be read or the entry cannot be written."""
        header = self._expected(record)  # first: if a source changes while it is read, the entry is stale
        image = prepare_record(record, self.image_shape)
        planes = image.clean if image.degraded is None else torch.cat([image.clean, image.degraded])
        header |= {"grid": dataclasses.asdict(image.info["grid"]), "remarks": image.info["remarks"]}
        with atomic_path(self.path(record), "--cache") as temporary, temporary.open("wb") as file:
            file.write(np.rint(planes.numpy() * np.float32(MAX_GREY_VALUE)).astype("<u2").tobytes())
            file.write(np.packbits(image.mask.numpy()).tobytes())
            file.write(json.dumps(header).encode())

    def _expected(self, record: Record) -> dict:
        """The header of an up-to-date entry, without the grid."""
        sources = []
        for source in filter(None, (record.path, record.degraded)):
            with explained(f"{source}: cannot be read", "put it back", ImageError):
                status = source.stat()
            sources.append([str(source.resolve()), status.st_size, status.st_mtime_ns])
        return {"format": CACHE_FORMAT, "image_shape": self.image_shape, "sources": sources}

    def _sizes(self, record: Record) -> tuple[int, int]:
        """Bytes of the planes and of the mask of a record's entry."""
        pixels = self.image_shape[1] * self.image_shape[2]
        return 2 * pixels * (1 if record.degraded is None else 2), -(-pixels // 8)

    def _read(self, record: Record) -> tuple[np.ndarray, np.ndarray, dict, dict]:
        """Planes (1 or 2, H, W), packed mask, header and info of a record's entry; raises one of `_DAMAGED`."""
        data = np.asarray(np.memmap(self.path(record), np.uint8, "r"))
        planes, mask, header = np.split(data, np.cumsum(self._sizes(record)))
        header = json.loads(header.tobytes())
        grid = Grid(**{name: tuple(values) for name, values in header.pop("grid").items()})
        info = {"grid": grid, "remarks": header.pop("remarks")}
        return planes.view("<u2").reshape(-1, *self.image_shape[1:]), mask, header, info

    def _make_room(self, missing: Sequence[Record], total: int) -> None:
        """Make the folder, remove what killed builds left in it, and say how much is written to which disk."""
        remedy = "choose another folder, or use --no-cache"
        with explained(f"--cache {self.root}: cannot be written", remedy):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_parts(self.folder, seconds=_LEFT_OVER_SECONDS)
            free = shutil.disk_usage(self.folder).free
        needed, free = sum(sum(self._sizes(record)) + _HEADER_BYTES for record in missing) / 1e9, free / 1e9
        if needed > 0.98 * free:
            raise UserError(f"--cache {self.root}: {needed:.1f} GB are needed and {free:.1f} GB are free; {remedy}")
        print(
            f"{self.folder}: preparing {len(missing)} of {counted(total, 'image')}, {needed:.3f} GB; {free:.1f} GB free"
        )
