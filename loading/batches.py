"""Batches of mammograms, in an order and with noise that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from helper import seeded_generator
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.grid import intensities
from running import distributed
from running.distributed import worker_count
from running.stopping import left_to_the_main_process


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
