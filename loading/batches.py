"""Batches of mammograms, in an order and with noise that depend on the seed alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from helper import seeded_generator
from preprocessing.degrade import simulate_low_dose
from preprocessing.grid import intensities
from preprocessing.noise import NoiseModel
from running import distributed
from running.distributed import worker_count
from running.loader import Loader


@dataclass(frozen=True)
class SampleKey:
    """What a sampler hands to a data set: all randomness of a training sample is keyed by it and the seed."""

    epoch: int
    position: int  # place in the epoch's order
    index: int
    counts: bool = True  # False: stands in if a process has no sample of a batch, and must not weigh in anything


@dataclass(frozen=True)
class Meta:
    """Where a sample comes from."""

    path: str  # path relative to the data root, with forward slashes: the identity of the image
    key: SampleKey
    patient: str = ""
    info: dict = field(default_factory=dict)  # what a data set knows beyond that, e.g. lesions or the grid transform
    failure: str = ""  # why the image that the key names could not be read, if this one stands in for it


@dataclass(frozen=True)
class PendingNoise:
    """The noise of one image that is still to be drawn, on the device."""

    level: float
    state: bytes  # of the sample's generator, when it is the noise's turn

    def low_dose(self, clean: Tensor, kernel: Tensor | None) -> Tensor:
        """The low dose of a clean image (C, H, W) in [0, 1], its noise correlated by a kernel (k, k), if there is one.

        On the CPU it is what the loader would have drawn. A GPU's generator draws other numbers, keyed by sample too.
        """
        if clean.device.type == "cpu":
            generator = torch.Generator().set_state(torch.frombuffer(bytearray(self.state), dtype=torch.uint8))
        else:
            generator = seeded_generator("low dose", self.state, device=clean.device)
        return simulate_low_dose(clean, self.level, generator, kernel)


@dataclass
class Samples:
    """What batches of images and of latents share."""

    clean: Tensor  # (N, C, H, W)
    degraded: Tensor | None  # like `clean`
    meta: list[Meta]
    level: Tensor  # (N,): noise level of every degraded sample

    @property
    def noise(self) -> NoiseModel:
        """What degraded each sample, as tensors (N, 1, 1, 1)."""
        return NoiseModel.of_levels(self.level)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def counts(self) -> list[bool]:
        """Which of the samples count, by sample; see `SampleKey`."""
        return [meta.key.counts for meta in self.meta]

    def to(self, device: torch.device) -> Samples:
        """The batch on `device`; the copy does not block if the memory is pinned."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Samples:
        """The batch in pinned memory (called by DataLoader)."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Samples:
        return replace(self, **{name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)})

    @staticmethod
    def collate(items: Sequence[Samples]) -> Samples:
        """Join batches of one sample each, all of one kind."""
        if isinstance(items[0], Batch) and any(item.pending for item in items):
            items = [replace(item, degraded=None, pending=item.pending or [item.degraded[0]]) for item in items]

        def join(values: list) -> Any:
            if isinstance(values[0], Tensor):
                return default_collate([value[0] for value in values])  # in a worker, into the memory that is sent
            return None if values[0] is None else list(itertools.chain(*values))

        return type(items[0])(**{name: join([getattr(item, name) for item in items]) for name in vars(items[0])})


@dataclass
class Batch(Samples):
    """Clean and degraded images (N, C, H, W) in [0, 1]; `degraded` is None until all noise that is `pending` is drawn."""

    mask: Tensor | None = None  # (N, 1, H, W): True in the breast
    # by image: the noise that `degrade` is to draw, or a measured low dose (C, H, W) among such images; or empty
    pending: list[PendingNoise | Tensor] = field(default_factory=list)
    kernel: Tensor | None = None  # (N, 1, k, k): what correlates the noise of each image; None: it is white
    told: Tensor | None = None  # (N, 4): gain, sigma, offset and reference of each noise; None: those of its level

    @property
    def noise(self) -> NoiseModel:
        """What degraded each image, as tensors (N, 1, 1, 1)."""
        if self.told is None:
            return NoiseModel.of_levels(self.level, self.kernel)
        gain, sigma, offset, reference = self.told.T[..., None, None, None]
        how = dict(kernel=self.kernel, electronic_is_white=False, reference=reference)
        return NoiseModel(gain, sigma, offset, **how)

    def degrade(self) -> Batch:
        """The batch with its pending noise drawn, on its own device."""
        if not self.pending:
            return self
        kernels = [None] * len(self) if self.kernel is None else self.kernel[:, 0]
        images = [
            each.low_dose(clean, kernel) if isinstance(each, PendingNoise) else each
            for each, clean, kernel in zip(self.pending, self.clean, kernels, strict=True)
        ]
        return replace(self, degraded=torch.stack(images), pending=[])

    def _with(self, change: Callable[[Tensor], Tensor]) -> Samples:
        pending = [change(each) if isinstance(each, Tensor) else each for each in self.pending]
        return replace(super()._with(change), pending=pending)


@dataclass
class PackedBatch(Batch):
    """A `Batch` on its way to the device: its images are 16-bit grey values (`intensities`), half the bytes."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, its images in [0, 1]."""
        return Batch(**vars(super().to(device)._with(intensities)))


class LatentBatch(Samples):
    """Clean and degraded latents of the first stage, (N, C, H, W), not normalised."""


class KeyedSampler(Sampler[SampleKey]):
    """Yields a `SampleKey` for every index of an epoch, in an order that depends on seed and epoch alone.

    `limit` keeps the first `count` of them; `set_epoch` may leave out those that an epoch has seen already. Of several
    `processes` each takes its share of every `batch_size` samples in a row: process `rank` the `rank`-th part, all parts alike
    to one sample, and at least one, if only one that does not count.
    """

    def __init__(
        self, length: int, seed: int = 0, shuffle: bool = False, limit: int | None = None, *,
        batch_size: int = 1, rank: int = 0, processes: int = 1,
    ):  # fmt: skip
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
    dataset: Dataset, batch_size: int, *, seed: int = 0, shuffle: bool = False, workers: int = 0, pin: bool = False,
    limit: int | None = None, shared: bool = False,
) -> Loader:  # fmt: skip
    """A loader of a data set of single samples; its sampler is a `KeyedSampler`.

    With `limit` it is for one pass over the first so many samples; else its workers live on from epoch to epoch. `shared`
    batches, of a size that is a multiple of the number of processes, are dealt out to the processes of the run.
    """
    workers = worker_count(workers)
    rank, processes = (distributed.rank(), distributed.size()) if shared else (0, 1)
    return Loader(
        dataset,
        batch_size=batch_size // processes,
        generator=seeded_generator("workers", seed),  # else every pass draws a seed from the global generator
        sampler=KeyedSampler(len(dataset), seed, shuffle, limit, batch_size=batch_size, rank=rank, processes=processes),
        num_workers=workers,
        collate_fn=Batch.collate,
        pin_memory=pin,
        persistent_workers=workers > 0 and limit is None,
    )
