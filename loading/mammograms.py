"""Data sets of clean and low-dose mammograms: phantoms, and images on disk."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from files.cache import PreparedCache
from files.prepared import Record, prepare_record
from files.splits import SPLITS
from helper import ImageError, one_line, seeded_generator, tracked
from hps import HParams
from loading.batches import Batch, Meta, PendingNoise, SampleKey
from preprocessing.augment import (
    CHANGES_OF_INTENSITIES,
    bordered,
    calcified,
    draw_crop,
    enhanced,
    log_uniform,
    oriented,
    resized,
    switched_on,
    windowed,
)
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.grid import Prepared
from preprocessing.phantom import generate_phantom
from preprocessing.sides import least_step, part_sides
from preprocessing.stabilize import stabilize, unstabilize

STAND_INS = 8  # images tried in the place of one that cannot be read


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
                parts = [resized(part, size) for part in parts]
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
        return self.cache.load(record, as_grey_values=self.sends_levels)

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
