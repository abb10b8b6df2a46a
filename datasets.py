"""Data sets of (clean, degraded) mammograms: phantoms, folders, latents; CBIS-DDSM stands in `datasets_cbis.py`."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

import distributed
from cache import PreparedCache
from helper import (
    DATA_IDENTITY,
    SETTINGS_ADDED,
    ImageError,
    UserError,
    one_line,
    seed_of,
    seeded_generator,
    tracked,
    worker_count,
)
from hps import HParams
from images import dicom_tag, find_images, is_dicom
from phantom import Calcification, add_calcifications, generate_phantom
from prepared import Prepared, Record, intensities, prepare_record
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.sides import least_step, part_sides
from preprocessing.stabilize import stabilize, unstabilize
from stopping import left_to_the_main_process

SPLITS = ("train", "validation", "test")
FAINTEST, BRIGHTEST = 0.01, 0.6  # contrast of calcifications drawn on training crops
FAINT_POWER = 1.5  # 1: uniform in the logarithm of the contrast; above it more are faint
TILT = 0.1  # radians: how far a border drawn on a training crop is at most off the rows or columns
BLACK, WHITE = 0.6, 0.2  # shares of these borders beyond which there is nothing, and a film's whitest; else a grey
CUT = 0.4  # share of a training crop's breast that a window drawn on it cuts off at either end at most
DIMMEST = 0.03  # intensity that the end of a window becomes at least
MOST_GAIN = 8.0  # of a window, and of an enhancement before it: more would make an 8 bit image's steps the picture
ENHANCED_SIGMA = (2.0, 24.0)  # pixels: what is finer has its contrast raised
# Settings that change the values of training images, and all that change the images before they are encoded.
CHANGES_OF_INTENSITIES = ("gamma_range", "part_edges", "calcifications", "borders", "windowing", "enhancement")
CHANGES_OF_IMAGES = ("flip", "dihedral", "scale_range", *CHANGES_OF_INTENSITIES)
STAND_INS = 8  # images tried in the place of one that cannot be read
LATENT_FORMAT = 1  # raised when the layout of a latent data set changes


# --- items and batches -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleKey:
    """What a sampler hands to a data set: all randomness of a training sample is keyed by it and the seed."""

    epoch: int
    position: int  # place in the epoch's order
    index: int
    counts: bool = True  # False: stands in where a process has no sample of a batch, and must not weigh in anything


@dataclass(frozen=True)
class Meta:
    """Where a sample comes from."""

    path: str  # path relative to the data root, with forward slashes: the identity of the image
    key: SampleKey
    patient: str = ""
    info: dict = field(default_factory=dict)  # what a data set knows beyond that, e.g. lesions or the grid transform
    failure: str = ""  # why the image that the key names could not be read, where this one stands in for it


@dataclass(frozen=True)
class PendingNoise:
    """A low dose that the loader leaves to the device to draw."""

    level: float
    state: bytes  # of the sample's generator, when it is the noise's turn


@dataclass
class Batch:
    """Clean and degraded images (N, C, H, W) in [0, 1], or latents of both; `mask` (N, 1, H, W) is True in the breast.

    `level` (N,) is the noise level of each degraded image. Images with `pending` noise are clean in `degraded` until
    `degrade` is called. Training images on their way to the device may be in 16 bits until `to` is called: `intensities`.
    """

    clean: Tensor
    degraded: Tensor
    meta: list[Meta]
    level: Tensor
    mask: Tensor | None = None
    pending: list[PendingNoise | None] = field(default_factory=list)  # by image; empty: nothing is left to draw

    def degrade(self) -> Batch:
        """The batch with the noise drawn that is pending, on the device where it is.

        On the CPU it is what the loader would have drawn. A GPU's generator draws other numbers: keyed by sample too.
        """
        if not self.pending:
            return self
        device, images = self.clean.device, list(self.degraded)
        for i, noise in enumerate(self.pending):
            if noise is None:
                continue
            if device.type == "cpu":
                generator = torch.Generator().set_state(torch.frombuffer(bytearray(noise.state), dtype=torch.uint8))
            else:
                generator = seeded_generator("low dose", noise.state, device=device)
            images[i] = simulate_low_dose(self.clean[i], noise.level, generator)
        return replace(self, degraded=torch.stack(images), pending=[])

    @property
    def noise(self) -> NoiseModel:
        """What degraded each image, as tensors (N, 1, 1, 1)."""
        return NoiseModel.of_levels(self.level)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def counts(self) -> list[bool]:
        """Which of the samples count, by sample; see `SampleKey`."""
        return [meta.key.counts for meta in self.meta]

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, its images in [0, 1]; the copy does not block where the memory is pinned."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return self._moved(move, lambda image: intensities(move(image)))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory (called by DataLoader)."""
        return self._moved(Tensor.pin_memory, Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor], move_image: Callable[[Tensor], Tensor]) -> Batch:
        clean = move_image(self.clean)
        return replace(
            self,
            clean=clean,
            degraded=clean if self.degraded is self.clean else move_image(self.degraded),  # pending: one copy will do
            level=move(self.level),
            mask=None if self.mask is None else move(self.mask),
        )

    @classmethod
    def collate(cls, items: Sequence[Batch]) -> Batch:
        """Join batches of one sample each."""

        def join(tensors: Iterable[Tensor]) -> Tensor:
            return default_collate([tensor[0] for tensor in tensors])  # in a worker, into the memory that is sent

        pending = [noise for item in items for noise in item.pending or [None]]
        clean = join(item.clean for item in items)
        return cls(
            clean=clean,
            degraded=clean if all(pending) else join(item.degraded for item in items),
            meta=[meta for item in items for meta in item.meta],
            level=join(item.level for item in items),
            mask=None if items[0].mask is None else join(item.mask for item in items),
            pending=pending if any(pending) else [],
        )


class KeyedSampler(Sampler[SampleKey]):
    """Yields a `SampleKey` for every index of an epoch, in an order that depends on seed and epoch alone.

    `limit` keeps the first `count` of them; `set_epoch` may leave out those that an epoch has seen already. Of several
    `processes` each takes its share of every `batch_size` samples in a row: process `rank` the `rank`-th part, all parts alike
    to one sample, and at least one, if only one that does not count.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        shuffle: bool = False,
        limit: int | None = None,
        *,
        batch_size: int = 1,
        rank: int = 0,
        processes: int = 1,
    ):
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.count = length if limit is None else min(limit, length)  # samples of an epoch, of all processes
        self.batch_size, self.rank, self.processes = batch_size, rank, processes
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch whose order the next iteration takes, and the position in it that it starts from."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return sum(max(1, len(part)) for part in self._parts())

    def __iter__(self) -> Iterator[SampleKey]:
        order = range(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=seeded_generator("order", self.seed, self.epoch)).tolist()
        for batch, part in enumerate(self._parts()):
            for position in part:
                yield SampleKey(self.epoch, position, order[position])
            if not part:
                first = self.start + batch * self.batch_size
                yield SampleKey(self.epoch, first, order[first], counts=False)

    def _parts(self) -> Iterator[range]:
        """Positions of this process's part of every batch."""
        for first in range(self.start, self.count, self.batch_size):
            share, extra = divmod(min(self.batch_size, self.count - first), self.processes)
            first += self.rank * share + min(self.rank, extra)
            yield range(first, first + share + (self.rank < extra))


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    pin: bool = False,
    limit: int | None = None,
    shared: bool = False,
) -> DataLoader:
    """A DataLoader of `Batch` over a data set of this module; its sampler is a `KeyedSampler`.

    With `limit` it is for one pass over the first so many samples; else its workers live on from epoch to epoch. `shared`
    batches, of a size that is a multiple of the number of processes, are dealt out to the processes of the run.
    """
    workers = worker_count(workers)
    rank, processes = (distributed.rank(), distributed.size()) if shared else (0, 1)
    return DataLoader(
        dataset,
        batch_size=batch_size // processes,
        generator=seeded_generator("workers", seed),  # else every pass draws a seed from the global generator
        sampler=KeyedSampler(len(dataset), seed, shuffle, limit, batch_size=batch_size, rank=rank, processes=processes),
        num_workers=workers,
        collate_fn=Batch.collate,
        pin_memory=pin,
        persistent_workers=workers > 0 and limit is None,
        worker_init_fn=left_to_the_main_process,
    )


# --- data sets of images ---------------------------------------------------------------------------------------------


class MammogramDataset(Dataset):
    """Pairs of clean and simulated low-dose images, as a `Batch` of one sample.

    Training samples are crops with fresh noise, keyed by (seed, epoch, index); validation and test images are whole and
    always carry the same noise, seeded by their path. A training image that cannot be read is replaced by another
    (`Meta.failure`), unless `strict`. Subclasses say what the images are.
    """

    def __init__(self, hps: HParams, split: str, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.hps, self.split, self.seed = hps, split, seed
        self.train = split == "train"
        self.strict = False  # an image that cannot be read is an error
        self.left_out: list[str] = []  # what was wrong with images that are left out
        self.degrade_on_device = hps.degrade_on_device
        self.unaltered = hps.updated(scale_range=[1.0, 1.0], gamma_range=[1.0, 1.0], windowing=0.0, enhancement=0.0)
        self._cache: dict[int, Prepared] = {}

    def image_count(self) -> int:
        """Number of images."""
        raise NotImplementedError

    def prepare(self, index: int) -> Prepared:
        """Image `index` on the training grid."""
        raise NotImplementedError

    def meta(self, index: int, key: SampleKey) -> Meta:
        """Where image `index` comes from."""
        raise NotImplementedError

    @property
    def noise(self) -> str:
        """What degrades the images, in words."""
        return f"noise level {self.hps.noise_level}"

    def patients(self) -> list[str]:
        """Whose images these are, each once, in order."""
        return sorted({self.meta(i, SampleKey(0, i, i)).patient for i in range(self.image_count())})

    def summary(self, name: str) -> str:
        """How many images of how many patients, in words."""
        return f"{name}: {self.image_count()} images of {len(self.patients())} patients"

    def prepared(self, index: int) -> Prepared:
        """Image `index` on the training grid, from memory where `cache_images` keeps it."""
        if index in self._cache:
            return self._cache[index]
        image = self.prepare(index)
        if self.hps.cache_images:
            self._cache[index] = image
        return image

    def __len__(self) -> int:
        return self.image_count() * (self.hps.crops_per_image if self.train else 1)

    def __getitem__(self, key: SampleKey | int) -> Batch:
        if isinstance(key, int):
            key = SampleKey(0, key, key)
        if not 0 <= key.index < len(self):
            raise IndexError(key.index)
        if not self.train:
            image, meta = self.prepared(key.index), self.meta(key.index, key)
            return self._sample(image, meta, seeded_generator("noise of", meta.path))
        image, meta = self._image_or_another(key)
        generator = seeded_generator("sample", self.seed, key.epoch, key.index)
        hps = self.unaltered if 0 < self.hps.altered_epochs <= key.epoch else self.hps
        sample = self._sample(self._augment(image, hps, generator), meta, generator, self.degrade_on_device)
        return one_side(sample, generator) if self.hps.part_edges else sample

    def _image_or_another(self, key: SampleKey) -> tuple[Prepared, Meta]:
        """The training image of a key or, where it cannot be read and not `strict`, another, drawn by the key.

        So batches keep their size, and epochs and processes stay in step. Raises ImageError where `STAND_INS` others cannot
        be read either.
        """
        index = key.index // self.hps.crops_per_image
        try:
            return self.prepared(index), self.meta(index, key)
        except ImageError as error:
            if self.strict:
                raise
            failure = one_line(error)
        generator = seeded_generator("instead of", self.seed, key.epoch, key.index)
        for other in torch.randint(self.image_count(), (STAND_INS,), generator=generator).tolist():
            with contextlib.suppress(ImageError):
                return self.prepared(other), replace(self.meta(other, key), failure=failure)
        raise ImageError(f"{failure}; nor can {STAND_INS} others be read")

    def whole(self, index: int, realisation: int) -> Batch:
        """A training image uncropped, with noise draw number `realisation` (for latent extraction)."""
        image, meta = self.prepared(index), self.meta(index, SampleKey(0, index, index))
        return self._sample(image.as_floats(), meta, seeded_generator("realisation", self.seed, realisation, meta.path))

    def _sample(self, image: Prepared, meta: Meta, generator: torch.Generator, on_device: bool = False) -> Batch:
        """The sample of an image; `on_device` leaves a simulated low dose to `Batch.degrade` and sends no mask."""
        meta.info.update(image.info)
        degraded, level, pending = image.degraded, self.hps.noise_level, []
        if degraded is None:
            if self.train and self.hps.noise_levels:
                level = log_uniform(*self.hps.noise_levels, generator)
            if on_device:
                degraded, pending = image.clean, [PendingNoise(level, generator.get_state().numpy().tobytes())]
            else:
                degraded = simulate_low_dose(image.clean, level, generator)
        level = torch.tensor([float(level)])
        mask = None if on_device else image.mask[None]  # no training step looks at it
        return Batch(image.clean[None], degraded[None], [meta], level, mask, pending)

    def _augment(self, image: Prepared, hps: HParams, generator: torch.Generator) -> Prepared:
        """A random crop, resized, turned, of another contrast and drawn on as the settings say; its noise is drawn after it."""
        parts = [part for part in (image.clean, image.mask, image.degraded) if part is not None]
        if size := hps.crop_size:
            side = size
            if image.degraded is None and hps.scale_range != [1, 1]:
                # half of the crops keep their pixels; a measured low dose would lose its noise
                factor = log_uniform(*hps.scale_range, generator)
                side = size if torch.rand((), generator=generator) < 0.5 else round(size / factor)
            short = [max(0, side - length) for length in image.mask.shape[-2:]]
            if any(short):  # padding by nothing would copy the whole image
                parts = [F.pad(part, (0, short[1], 0, short[0])) for part in parts]
            row, column = draw_crop(parts[1][0], side, 1, hps.breast_fraction, generator)
            parts = [part[:, row : row + side, column : column + side] for part in parts]
            if side != size:
                parts = [_resized(part, size) for part in parts]
        if image.degraded is None:  # a measured low dose has the intensities it has
            if hps.gamma_range != [1, 1]:
                gamma = log_uniform(*hps.gamma_range, generator)
                if torch.rand((), generator=generator) < 0.5:
                    parts[0] = parts[0] ** gamma
            if hps.enhancement and torch.rand((), generator=generator) < hps.enhancement:
                parts[0] = enhanced(parts[0], generator)
            if hps.windowing and torch.rand((), generator=generator) < hps.windowing:
                parts[0] = windowed(parts[0], parts[1], generator)
        if hps.dihedral:
            orientation = int(torch.randint(8, (), generator=generator))
            parts = [oriented(part, orientation) for part in parts]
        elif hps.flip and torch.rand((), generator=generator) < 0.5:
            parts = [part.flip(-1) for part in parts]
        clean, mask, *degraded = parts
        if image.degraded is None:  # a measured low dose would show neither; their contrast is the same in any window
            if hps.calcifications and torch.rand((), generator=generator) < hps.calcifications:
                clean = calcified(clean, mask, generator)
            if hps.borders and torch.rand((), generator=generator) < hps.borders:
                clean = bordered(clean, generator)
        return Prepared(clean, mask, *degraded)


def switched_on(hps: HParams, names: Iterable[str]) -> list[str]:
    """Those of the settings that do something; a range from 1 to 1 does nothing."""
    return [name for name in names if hps[name] and hps[name] != [1, 1]]


def log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A draw between `low` and `high`, both above 0, uniform in its logarithm."""
    return low * (high / low) ** float(torch.rand((), generator=generator))


def windowed(clean: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) in [0, 1] through a random window, as displays and detectors have them.

    Three coins are tossed: it begins at black, or at a quantile, up to `CUT`, of the intensities within the mask; it cuts up
    to `CUT` of them off at white, or ends at their maximum; and where it does, this may become a darker grey, log-uniform from
    `DIMMEST`, instead of full scale. The image is multiplied by `MOST_GAIN` at most.

    Source: linear windowing, DICOM PS3.3, C.11.2.1.2.
    """
    inside = clean[mask]
    if not len(inside):
        return clean
    low, high, dim, *halves = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
    begins, cuts, dims = (half < 0.5 for half in halves)
    quantiles = inside.quantile(torch.tensor([CUT * low, 1 - CUT * high if cuts else 1.0])).tolist()
    floor, end = quantiles[0] if begins else 0.0, quantiles[1]
    top = DIMMEST**dim if dims and not cuts else 1.0
    return ((clean - floor) / max(end - floor, 1 / MOST_GAIN)).clamp(0, 1) * top


def enhanced(clean: Tensor, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) in [0, 1] whose local contrast is raised, as processing for display does.

    What differs from a Gaussian mean, of a sigma log-uniform in `ENHANCED_SIGMA` pixels, is multiplied by a gain log-uniform
    from 1 to `MOST_GAIN`.

    Source: unsharp masking, Gonzalez & Woods, Digital Image Processing, 4th ed., equations 3-55 and 3-56.
    """
    sigma, gain = log_uniform(*ENHANCED_SIGMA, generator), log_uniform(1, MOST_GAIN, generator)
    mean = torch.from_numpy(ndimage.gaussian_filter(clean[0].numpy(), sigma, mode="nearest", truncate=3.0))
    return (mean + gain * (clean - mean)).clamp(0, 1)


def calcified(clean: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of an image (1, H, W) with 4 to 40 calcifications of 1 to 3 pixels, most of them faint, within the mask."""
    count = int(torch.randint(4, 41, (), generator=generator))
    height, width = mask.shape[-2:]
    drawn = []
    for row, column, size, strength in torch.rand(count, 4, generator=generator, dtype=torch.float64).tolist():
        row, column = row * height, column * width
        if mask[0, int(row), int(column)]:
            drawn.append(
                Calcification(row, column, 1 + 2 * size, FAINTEST * (BRIGHTEST / FAINTEST) ** strength**FAINT_POWER)
            )
    image = clean[0].numpy().copy()
    add_calcifications(image, drawn, 1.0)
    return torch.from_numpy(image)[None]


def bordered(clean: Tensor, generator: torch.Generator) -> Tensor:
    """An image (1, H, W) up to a straight line across it, beyond which there is one intensity, as at the border of a film.

    Half of the lines run along rows or columns, the others up to `TILT` off to either side; pixels on the line hold their
    share of both.
    """
    quarter, tilt, place, which, grey = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    angle = int(4 * quarter) * math.pi / 2 + (4 * tilt - 3 if tilt > 0.5 else 0.0) * TILT
    rows, columns = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2 for side in clean.shape[-2:])
    reach = (0.1 + 0.35 * place) * min(clean.shape[-2:])
    distance = math.sin(angle) * rows[:, None] + math.cos(angle) * columns + reach
    share = (distance + 0.5).clamp(0, 1).float()
    beyond = 0.0 if which < BLACK else 1.0 if which < BLACK + WHITE else grey
    return clean * share + beyond * (1 - share)


def one_side(sample: Batch, generator: torch.Generator) -> Batch:
    """A sample (1, 1, H, W) with the bright or the dark side alone of edges far above its noise, as restoring has them.

    The other side's pixels go on from this one's, with noise in the degraded image and without in the clean one. What has
    no such edge stays as it is.
    """
    noise = NoiseModel.from_level(float(sample.level))
    clean, degraded = (stabilize(image[0, 0], noise).numpy() for image in (sample.clean, sample.degraded))
    sides = part_sides(degraded, least_step(noise))
    if sides is None:
        return sample
    share = float(sides.is_bright[sides.near].mean())  # the larger side is seen more often
    bright = bool(torch.rand((), generator=generator) < share)
    drawn = torch.randn(degraded.shape, generator=generator).numpy()
    clean, degraded = (
        unstabilize(torch.from_numpy(image), noise)[None, None]
        for image in (sides.side(clean, bright), sides.side(degraded, bright, drawn))
    )
    return replace(sample, clean=clean, degraded=degraded)


def oriented(image: Tensor, orientation: int) -> Tensor:
    """Orientation 0..7 of an image (..., H, W): mirrored by the lowest bit, upside down by the next, transposed by the third.

    0 is the image itself.
    """
    if orientation & 1:
        image = image.flip(-1)
    if orientation & 2:
        image = image.flip(-2)
    return image.transpose(-1, -2) if orientation & 4 else image


def _resized(image: Tensor, side: int) -> Tensor:
    """A square crop (C, H, H) at `side` pixels a side, antialiased; a mask stays one."""
    resized = F.interpolate(image[None].float(), size=(side, side), mode="bilinear", antialias=True)[0]
    return resized > 0.5 if image.dtype == torch.bool else resized.clamp(0, 1)


def draw_crop(
    mask: Tensor, size: int, step: int, breast_fraction: float, generator: torch.Generator
) -> tuple[int, int]:
    """Top left corner, in multiples of `step`, of a random crop of a mask (H, W) that holds enough breast.

    The first of 8 draws with at least `breast_fraction` of it, or the best of them.
    """
    best, corner = -1.0, (0, 0)
    for _ in range(8):
        row, column = (
            step * int(torch.randint((side - size) // step + 1, (), generator=generator)) for side in mask.shape
        )
        fraction = float(mask[row : row + size, column : column + size].float().mean())
        if fraction > best:
            best, corner = fraction, (row, column)
        if fraction >= breast_fraction:
            break
    return corner


class PhantomDataset(MammogramDataset):
    """Breast phantoms made on the fly (`phantom.py`); no two splits share one."""

    def image_count(self) -> int:
        return self.hps.phantom_counts[SPLITS.index(self.split)]

    def prepare(self, index: int) -> Prepared:
        phantom = generate_phantom(SPLITS.index(self.split), index, tuple(self.hps.image_shape))
        return Prepared(phantom.image, phantom.mask, info={"calcifications": phantom.calcifications})

    def meta(self, index: int, key: SampleKey) -> Meta:
        name = f"{self.split}/{index:04d}"
        return Meta(name, key, patient=name)


class RecordDataset(MammogramDataset):
    """Images on disk, each brought onto the training grid by its breast mask; from `cache` where one is given."""

    def __init__(
        self,
        records: Sequence[Record],
        hps: HParams,
        split: str,
        seed: int = 0,
        cache: PreparedCache | None = None,
    ):
        super().__init__(hps, split, seed)
        self.records, self.cache = list(records), cache
        self.phantoms = (
            PhantomDataset(hps.updated(phantom_counts=[hps.phantoms] * 3), split, seed) if self.train else None
        )

    @property
    def noise(self) -> str:
        """What degrades the images, in words."""
        real = any(record.degraded for record in self.records)
        return "real low-dose pairs" if real else super().noise

    @property
    def sends_levels(self) -> bool:
        """Whether training images go to the device as the cache keeps them, half the bytes: where nothing is computed here."""
        computes = switched_on(self.hps, ("crop_size", "phantoms", *CHANGES_OF_INTENSITIES))
        return self.train and self.degrade_on_device and not computes

    def image_count(self) -> int:
        return len(self.records) + (self.phantoms.image_count() if self.train else 0)

    def prepare(self, index: int) -> Prepared:
        if index >= len(self.records):
            return self.phantoms.prepare(index - len(self.records))
        record = self.records[index]
        if self.cache is None:
            return prepare_record(record, self.hps.image_shape, self.hps.native)
        return self.cache.load(record, as_levels=self.sends_levels)

    def leave_out_unreadable(self, progress: bool = True) -> None:
        """Read every image; leave out what cannot be read, with a line on stderr each.

        Raises ImageError where nothing is left or, with `strict`, for the first of them.
        """
        kept = []
        for i, record in enumerate(tracked(self.records, f"checking {self.split}", "image", progress)):
            try:
                if self.cache is None:
                    self.prepared(i)
                elif record.path in self.cache.failures:
                    raise ImageError(self.cache.failures[record.path])
                kept.append(record)
            except ImageError as error:
                if self.strict:
                    raise
                self.left_out.append(one_line(error))
        if not self.left_out:
            return
        if not kept:
            raise ImageError(f"{self.left_out[0]} (and no other image for {self.split} can be read)")
        for failure in self.left_out:
            print(f"warning: {failure}; left out", file=sys.stderr)
        self.records, self._cache = kept, {}

    def meta(self, index: int, key: SampleKey) -> Meta:
        if index >= len(self.records):
            return self.phantoms.meta(index - len(self.records), key)
        record = self.records[index]
        return Meta(record.key, key, record.patient, dict(record.info))


# --- folders ---------------------------------------------------------------------------------------------------------

# Words of a file name that say which view of a patient it is, not which patient.
_VIEW_WORDS = re.compile(r"(?i)(?<![a-z])(left|right|l|r|cc|mlo|ml|lm|xccl|lcc|rcc|lmlo|rmlo|full|low|mask)(?![a-z])")


def patient_of(path: Path, root: Path, pattern: str = "") -> str:
    """The patient an image below `root` belongs to: DICOM PatientID, or what its name says.

    With `pattern`, the first group of that regular expression on the path below `root`. Without, the name less the words for side
    and view (LEFT, R, CC, MLO ...); mini-MIAS names (mdb001 ...), where an odd number and the next even one are the two
    breasts of a patient, by pair. Raises UserError where the pattern does not match.
    """
    name = path.relative_to(root).as_posix()
    if pattern:
        try:
            match = re.search(pattern, name)
        except re.error as error:
            raise UserError(f"--hps patient_pattern={pattern}: not a regular expression ({error})") from None
        if match is None or not match.groups() or match[1] is None:
            raise UserError(f"--hps patient_pattern={pattern}: its first group matches nothing in {name}")
        return match[1]
    if is_dicom(path):
        try:
            if patient := dicom_tag(path, "PatientID"):
                return patient
        except Exception:  # noqa: BLE001  an unreadable file is reported when it is loaded; until then its name serves
            pass
    if match := re.fullmatch(r"mdb(\d{3})", path.stem):
        return f"mdb pair {(int(match[1]) + 1) // 2:03d}"
    # a name that is nothing but a view leaves the patient to the folder above it
    for part in (path.stem, *reversed(path.relative_to(root).parts[:-1])):
        if patient := re.sub(r"[\W_]+", " ", _VIEW_WORDS.sub(" ", part.replace("_", " "))).strip():
            return patient
    return path.stem


def split_patients(patients: Sequence[str], validation: float, test: float) -> dict[str, str]:
    """Patient to split, deterministic: by the order of a hash, at least one patient in every split.

    Raises UserError with fewer than three patients.
    """
    unique = sorted(set(patients), key=lambda patient: (seed_of("split", patient), patient))
    if len(unique) < 3:
        raise UserError(
            f"--data-root: {len(unique)} patients are too few for train, validation and test; "
            "add images or set --hps patient_pattern"
        )
    n_test = min(max(1, round(test * len(unique))), len(unique) - 2)
    n_validation = min(max(1, round(validation * len(unique))), len(unique) - n_test - 1)
    ends = [n_test, n_test + n_validation]
    names = ("test", "validation", "train")
    return {patient: names[bisect.bisect_right(ends, i)] for i, patient in enumerate(unique)}


def _check_root(root: Path | None, task: str) -> Path:
    if root is None:
        raise UserError(f"--task {task} needs --data-root DIR, a folder of mammograms")
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder")
    return root


def folder_records(root: Path, hps: HParams) -> dict[str, list[Record]]:
    """Records of each split of a folder of mammograms; `low/` and `full/` with equal names make real pairs.

    Raises UserError for an empty folder, a pair without its other half, or a split file that does not fit.
    """
    halves = {p.name.lower(): p for p in root.iterdir() if p.is_dir() and p.name.lower() in ("full", "low")}
    if len(halves) == 1:
        raise UserError(f"{next(iter(halves.values()))}: stands alone; real pairs need both full/ and low/ in {root}")
    paired = len(halves) == 2
    base = halves["full"] if paired else root
    records = []
    low = (
        {p.relative_to(halves["low"]).with_suffix("").as_posix(): p for p in find_images(halves["low"])}
        if paired
        else {}
    )
    for path in find_images(base):
        name = path.relative_to(base)
        degraded = low.pop(name.with_suffix("").as_posix(), None)
        if paired and degraded is None:
            raise UserError(f"{path}: has no low-dose image of the same name in {halves['low']}")
        records.append(Record(path, name.as_posix(), patient_of(path, base, hps.patient_pattern), degraded))
    if low:
        raise UserError(f"{next(iter(low.values()))}: has no full-dose image of the same name in {base}")
    split_csv = Path(hps.split_csv) if hps.split_csv else root / "split.csv"
    if hps.split_csv or split_csv.is_file():
        return split_by_file(records, split_csv)
    of_patient = split_patients([r.patient for r in records], hps.validation_fraction, hps.test_fraction)
    return {split: [r for r in records if of_patient[r.patient] == split] for split in SPLITS}


def refuse_escape(value: str, file: Path) -> None:
    """Raise UserError for a path, that `file` holds, that is absolute or climbs: it could lead out of the data root.

    Links below the root are followed wherever they lead: whoever made the tree chose them.
    """
    if re.match(r"[/\\]|[A-Za-z]:", value) or ".." in re.split(r"[/\\]", value):
        raise UserError(f"{file}: the path {value!r} leads out of the data root; mend or download the file again")


def split_by_file(records: list[Record], path: Path) -> dict[str, list[Record]]:
    """Assign records by a CSV with columns file, split and optionally patient; a file may be named without its suffix.

    Records that are not in it are left out, and the number is printed. Raises UserError where the file does not fit.
    """
    if not path.is_file():  # a device or a pipe, which a checkpoint could name, would never end
        raise UserError(f"--hps split_csv={path}: no such file")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: not a readable CSV file ({str(error).splitlines()[0]})") from None
    table = table.apply(lambda column: column.str.strip())
    for column in ("file", "split"):
        if column not in table:
            raise UserError(f"{path}: has no column {column!r}; it needs file and split, and may have patient")
    unknown = sorted(set(table["split"]) - set(SPLITS))
    if unknown:
        raise UserError(f"{path}: split {unknown[0]!r} is none of {', '.join(SPLITS)}")
    for name in table["file"]:
        refuse_escape(name, path)
    twice = table["file"][table["file"].duplicated()]
    if len(twice):
        raise UserError(f"{path}: {twice.iloc[0]} stands in it twice")
    rows = {row["file"]: row for row in table.to_dict("records")}
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    homes: dict[str, str] = {}
    missing, found = 0, set()
    for record in records:
        row = rows.get(record.key) or rows.get(Path(record.key).with_suffix("").as_posix())
        if row is None:
            missing += 1
            continue
        found.add(row["file"])
        record = replace(record, patient=row.get("patient") or record.patient)
        if homes.setdefault(record.patient, row["split"]) != row["split"]:
            raise UserError(f"{path}: patient {record.patient} stands in {homes[record.patient]} and in {row['split']}")
        splits[row["split"]].append(record)
    if missing:
        print(f"{path}: {missing} of {len(records)} images are not in it and are left out")
    if absent := sorted(set(rows) - found):
        print(f"{path}: {len(absent)} of its {len(rows)} rows name no image there is, such as {absent[0]}")
    return splits


def get_datasets(
    task: str,
    hps: HParams,
    splits: Sequence[str],
    data_root: Path | None = None,
    seed: int = 0,
    *,
    strict: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> list[MammogramDataset]:
    """The images of some of a task's splits: "train", "validation", "test"; the disk is looked through once.

    Validation and test images are looked through first, and left out where they cannot be read. With `strict` an image that
    cannot be read, or that cbis-ddsm misses, is an error. With a `cache` folder, images on disk are prepared there first,
    with a bar where `progress` says so. Raises UserError where the data root is missing, or holds no images for a split,
    or the cache cannot be built.
    """
    if hps.image_shape[0] != 1:
        raise UserError(f"--hps image_shape={hps.image_shape}: mammograms have one channel")
    if task == "phantom":
        if min(hps.image_shape[1:]) < 32:
            raise UserError(f"--hps image_shape={hps.image_shape}: phantoms need sides of at least 32")
        return [PhantomDataset(hps, split, seed) for split in splits]
    if task == "cbis-ddsm":
        from datasets_cbis import cbis_records  # it builds on this module

        data_root = data_root or Path("data/cbis-ddsm")
        records = cbis_records(data_root, hps, strict)
    else:
        records = folder_records(_check_root(data_root, task), hps)
    for split in splits:
        if not records[split]:
            raise UserError(f"{data_root}: no images for {split}; see split_csv and the fractions in hps.py")
    images = None
    if cache is not None:
        images = PreparedCache(cache, hps.image_shape)
        every = [record for split in splits for record in records[split]]
        images.build(every, hps.nb_workers, progress, strict=strict)
    datasets = [RecordDataset(records[split], hps, split, seed, images) for split in splits]
    for dataset in datasets:
        dataset.strict = strict
        if not dataset.train:
            dataset.leave_out_unreadable(progress)
    return datasets


def get_dataset(
    task: str, hps: HParams, split: str = "train", data_root: Path | None = None, seed: int = 0, **options: Any
) -> MammogramDataset:
    """The images of one split; see `get_datasets`, which also takes the `options`."""
    return get_datasets(task, hps, [split], data_root, seed, **options)[0]


def load_datasets(args: argparse.Namespace, hps: HParams, *splits: str) -> list[MammogramDataset]:
    """The splits that a script needs of the data that its flags name; see `get_datasets`.

    Prepared images are kept in --cache; by default not under --no-save, nor where `cache_images` keeps them in memory.
    """
    cache = args.cache
    if cache is not None and hps.native:
        raise UserError(
            f"--cache {cache}: keeps images on the training grid, but native=True takes them as they are; leave it out"
        )
    if cache is None and not (args.no_cache or args.no_save or hps.cache_images or hps.native):
        cache = Path("cache")
    return get_datasets(
        args.task, hps, splits, args.data_root, args.seed,
        strict=args.strict, cache=cache, progress=not args.no_tqdm,
    )  # fmt: skip


# --- latents ---------------------------------------------------------------------------------------------------------


class LatentDataset(Dataset):
    """Latents that `main-latents.py` wrote, memory-mapped, as a `Batch` of one (clean, degraded) pair in float32.

    Training samples are crops of `crop_size` pixels' worth of latent, of one of the noise realisations, keyed by (seed,
    epoch, index). Raises UserError where the folder is no whole latent data set.
    """

    def __init__(self, root: Path, split: str, hps: HParams, seed: int = 0):
        self.root, self.split, self.hps, self.seed = Path(root), split, hps, seed
        self.left_out: list[str] = []
        self.train = split == "train"
        self.index = read_latent_index(self.root)
        if self.index["codes_only"]:
            raise UserError(f"--latents {root}: holds code indices only; extract it again without --codes-only")
        if split not in self.index["splits"]:
            raise UserError(f"--latents {root}: has no split {split}")
        entry = self.index["splits"][split]
        self.images, self.realisations = entry["images"], entry["realisations"]
        self.clean = self._open("clean", (len(self.images), *self.index["latent_shape"]))
        self.degraded = self._open("degraded", (len(self.images), self.realisations, *self.index["latent_shape"]))
        self.mask = self._open("mask", (len(self.images), *self.index["latent_shape"][1:]))
        rate = self.index["rate"]
        self.crop = hps.crop_size // rate if self.train else 0
        step = self.index["scale"] // rate
        if self.crop % step or self.crop > min(self.index["latent_shape"][1:]):
            raise UserError(
                f"--hps crop_size={hps.crop_size}: must be a multiple of {self.index['scale']} that fits the latents of {root}"
            )

    def patients(self) -> list[str]:
        """Whose images these are, each once, in order."""
        return sorted({image["patient"] for image in self.images})

    def summary(self, name: str) -> str:
        """How many latents of how many patients, in words, and which settings of training images they leave unused."""
        words = f"{name}: {len(self.images)} latents, {self.realisations} noise draws each, of {len(self.patients())} patients"
        unused = switched_on(self.hps, CHANGES_OF_IMAGES)
        return f"{words}; taken as they are, without {', '.join(unused)}" if self.train and unused else words

    def check(self, digest: str, path: Path) -> None:
        """Raises UserError unless the latents come from the first stage with this digest, of checkpoint `path`, and from
        the images, split and noise level of the settings."""
        for key in DATA_IDENTITY:
            own = self.index["hps"].get(key, SETTINGS_ADDED.get(key))
            if own != self.hps[key]:
                raise UserError(
                    f"--latents {self.root}: extracted with {key}={own}, but this run has "
                    f"{self.hps[key]}; extract them again or set --hps {key}"
                )
        if self.index["first_stage"] != digest:
            raise UserError(
                f"--latents {self.root}: extracted with {self.index['checkpoint']}, not with {path}; extract them again"
            )

    def _open(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.root / self.split / f"{name}.npy"
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # noqa: BLE001  numpy parses a literal in the header, and raises what that raises
            reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise UserError(f"{path}: not readable ({reason}); extract the latents again") from None
        if array.shape != shape:
            raise UserError(f"{path}: shape {array.shape}, but the index says {shape}; extract the latents again")
        kinds = ("bool",) if name == "mask" else ("float16", "float32")
        if array.dtype.name not in kinds or array.offset + array.nbytes != path.stat().st_size:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes of {array.dtype}, not what the shape takes in {' or '.join(kinds)}; "
                "extract the latents again"
            )
        return array

    def __len__(self) -> int:
        return len(self.images) * (self.hps.crops_per_image if self.train else 1)

    def __getitem__(self, key: SampleKey | int) -> Batch:
        if isinstance(key, int):
            key = SampleKey(0, key, key)
        if not 0 <= key.index < len(self):
            raise IndexError(key.index)
        image = key.index // self.hps.crops_per_image if self.train else key.index
        meta = Meta(self.images[image]["path"], key, self.images[image]["patient"])
        window, realisation = (slice(None), slice(None)), 0
        if self.train:
            generator = seeded_generator("latent sample", self.seed, key.epoch, key.index)
            realisation = int(torch.randint(self.realisations, (), generator=generator))
            if self.crop:
                mask = torch.from_numpy(self.mask[image].copy())
                row, column = draw_crop(mask, self.crop, 1, self.hps.breast_fraction, generator)
                window = slice(row, row + self.crop), slice(column, column + self.crop)
        clean = torch.from_numpy(self.clean[image][(slice(None), *window)].astype(np.float32))
        degraded = torch.from_numpy(self.degraded[image, realisation][(slice(None), *window)].astype(np.float32))
        return Batch(clean[None], degraded[None], [meta], torch.tensor([float(self.hps.noise_level)]))


def read_latent_index(root: Path) -> dict:
    """The index of a latent data set; raises UserError where it is missing, damaged or of another format."""
    path = Path(root) / "index.json"
    if not path.is_file():
        raise UserError(f"--latents {root}: no index.json there; extract latents with main-latents.py")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format_version"]
        kinds = dict(codes_only=bool, latent_shape=list, rate=int, scale=int, first_stage=str, checkpoint=str, hps=dict)
        numbers = [*index["latent_shape"], index["rate"], index["scale"]]
        for entry in index["splits"].values():
            numbers += [entry["realisations"], len(entry["images"])]
            for image in entry["images"]:
                if not isinstance(image["patient"], str):
                    raise ValueError
                refuse_escape(image["path"], path)
        if any(type(index[key]) is not kind for key, kind in kinds.items()) or len(index["latent_shape"]) != 3:
            raise ValueError
        if any(type(number) is not int or number < 1 for number in numbers) or index["scale"] % index["rate"]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged; extract the latents again") from None
    if version != LATENT_FORMAT:
        raise UserError(f"{path}: format {version}, this version reads {LATENT_FORMAT}; extract the latents again")
    return index
