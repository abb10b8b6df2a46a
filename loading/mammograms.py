"""Data sets of clean and low-dose mammograms: phantoms, and images on disk."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.utils.data import Dataset

from files.cache import PreparedCache
from files.prepared import Record, prepare_record
from files.splits import SPLITS
from helper import ImageError, counted, one_line, remark_lines, seeded_generator, tracked
from hps import HParams
from loading.batches import Batch, Meta, PackedBatch, PendingNoise, SampleKey
from preprocessing.augment import CHANGES_OF_INTENSITIES, augment, grained, log_uniform, switched_on, toss
from preprocessing.degrade import simulate_dose, simulate_low_dose
from preprocessing.estimate import estimate_noise
from preprocessing.grid import Prepared
from preprocessing.noise import WHITE_KERNEL, NoiseModel, draw_kernel, unit_noise
from preprocessing.phantom import generate_phantom
from preprocessing.sides import least_step, part_sides
from preprocessing.stabilize import full_scale_of, placed, stabilize, unstabilize

STAND_INS = 8  # images tried in the place of one that cannot be read


class MammogramDataset(Dataset):
    """Pairs of clean and simulated low-dose images, as a `Batch` of one sample.

    Training samples are crops with fresh noise, keyed by (seed, epoch, index); validation and test images are whole and
    always carry the same noise, seeded by their path. A training image that cannot be read is replaced by another
    (`Meta.failure`); with `strict` it is an error. Subclasses say what the images are.
    """

    def __init__(self, hps: HParams, split: str, seed: int = 0, strict: bool = False):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.hps, self.split, self.seed, self.strict = hps, split, seed, strict
        self.train = split == "train"
        self.left_out: list[str] = []  # what was wrong with images that are left out
        self.degrade_on_device = hps.degrade_on_device and self.train
        self.unaltered = hps.updated(scale_range=[1.0, 1.0], gamma_range=[1.0, 1.0], windowing=0.0, enhancement=0.0)
        self._cache: dict[int, Prepared] = {}
        self._noises: dict[int, NoiseModel] = {}

    def without_noise(self) -> None:
        """Leave the low dose to the device, and undrawn if no step asks for it."""
        self.degrade_on_device = True

    def reseed(self, seed: int) -> None:
        """Key training samples by another seed, as a resumed training does."""
        self.seed = seed

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
        fraction = self.hps.dose_fraction
        return f"{fraction:g} of the dose of real images" if fraction else f"noise level {self.hps.noise_level}"

    def patients(self) -> list[str]:
        """Whose images these are, each once, in order."""
        return sorted({self.meta(i, SampleKey(0, i, i)).patient for i in range(self.image_count())})

    def summary(self, name: str) -> str:
        """How many images of how many patients, in words."""
        return f"{name}: {counted(self.image_count(), 'image')} of {counted(len(self.patients()), 'patient')}"

    def prepared(self, index: int) -> Prepared:
        """Image `index` on the training grid, from memory if `cache_images` keeps it."""
        if index in self._cache:
            return self._cache[index]
        image = self.prepare(index)
        if self.hps.dose_fraction:
            # as a measured pair is, it is only cropped and turned: nothing else leaves its noise as it is
            image = replace(image, degraded=image.clean, info=image.info | {"noise": self._noise_of(index, image)})
        if self.hps.cache_images:
            self._cache[index] = image
        return image

    def _noise_of(self, index: int, image: Prepared) -> NoiseModel:
        """The noise of a full-dose image, estimated once. Raises ImageError naming the image if it shows none."""
        if index not in self._noises:
            self._noises[index] = estimate_noise(image.clean[0].numpy(), image.mask[0].numpy()).noise
        if self._noises[index].is_none:
            path = self.meta(index, SampleKey(0, index, index)).path
            raise ImageError(f"{path}: shows no noise of its own, of which dose_fraction could make more; leave it out")
        return self._noises[index]

    def __len__(self) -> int:
        return self.image_count() * (self.hps.crops_per_image if self.train else 1)

    def __getitem__(self, key: SampleKey | int) -> Batch:
        if isinstance(key, int):
            key = SampleKey(0, key, key)
        if not 0 <= key.index < len(self):
            raise IndexError(key.index)
        if not self.train:
            image, meta = self.prepared(key.index), self.meta(key.index, key)
            return self._sample(image, meta, seeded_generator("noise of", meta.path), self.degrade_on_device)
        image, meta = self._image_or_another(key)
        generator = seeded_generator("sample", self.seed, key.epoch, key.index)
        hps = self.unaltered if 0 < self.hps.altered_epochs <= key.epoch else self.hps
        crop = replace(
            augment(image, hps, generator), info={k: image.info[k] for k in image.info.keys() & {"noise", "remarks"}}
        )
        sample = self._sample(crop, meta, generator, self.degrade_on_device)
        return one_side(sample, generator) if self.hps.part_edges else sample

    def _image_or_another(self, key: SampleKey) -> tuple[Prepared, Meta]:
        """The training image of a key or, if it cannot be read, another, drawn by the key.

        So batches keep their size, and epochs and processes stay in step. Raises ImageError if `STAND_INS` others cannot
        be read either, or with `strict`.
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
        """The sample of an image; `on_device` leaves a simulated low dose to `Batch.degrade`."""
        meta.info.update(image.info)
        if "noise" in image.info:
            return self._fraction_of_dose(image, meta, generator)
        degraded, level, pending, kernel = image.degraded, self.hps.noise_level, [], None
        if degraded is None:
            if self.train and self.hps.noise_levels:
                level = log_uniform(*self.hps.noise_levels, generator)
            if self.train and toss(self.hps.grain, generator):
                image = replace(image, clean=grained(image.clean, level, generator))
            if self.train and self.hps.correlation:
                kernel = draw_kernel(self.hps.correlation, generator)
            if on_device:
                pending = [PendingNoise(level, generator.get_state().numpy().tobytes())]
            else:
                degraded = simulate_low_dose(image.clean, level, generator, kernel)
        images = [None if each is None else each[None] for each in (image.clean, degraded)]
        mask = None if on_device and self.train else image.mask[None]  # no training step looks at it
        kind = Batch if image.clean.is_floating_point() else PackedBatch
        kernel = None if kernel is None else kernel[None, None]
        return kind(*images, [meta], torch.tensor([float(level)]), mask, pending, kernel)

    def _fraction_of_dose(self, image: Prepared, meta: Meta, generator: torch.Generator) -> Batch:
        """The sample of a full-dose image of its own noise: a fraction of its dose, brought back to its brightness.

        The networks are told the level of a film with as much detail in units of the noise, within the range of training.
        """
        fraction, full = self.hps.dose_fraction, image.info["noise"]
        low = simulate_dose(image.clean, fraction, full, generator)
        degraded = full.offset + (low - full.offset) / fraction
        noise = placed(full.of_dose(fraction), degraded[0].numpy(), image.mask[0].numpy())
        kernel = WHITE_KERNEL if noise.kernel is None else noise.kernel
        least, most = self.hps.noise_levels or [self.hps.noise_level] * 2
        level = min(max(noise.level, least), most)
        told = torch.tensor([[float(v) for v in (noise.gain, noise.sigma, noise.offset, noise.reference)]])
        images = image.clean[None], degraded[None], [meta], torch.tensor([level]), image.mask[None]
        return Batch(*images, kernel=kernel.float()[None, None], told=told)


def one_side(sample: Batch, generator: torch.Generator) -> Batch:
    """A sample (1, 1, H, W) with only the bright or the dark side of edges far above its noise, as in restoring.

    The pixels of this side continue on the other one, with noise in the degraded image and without in the clean one. If no
    such edge is found, the sample stays as it is; edges are looked for in the clean image if noise is pending.
    """
    noise = NoiseModel.from_level(float(sample.level), None if sample.kernel is None else sample.kernel[0, 0])
    images = sample.clean, sample.clean if sample.degraded is None else sample.degraded
    clean, degraded = (stabilize(image[0, 0], noise).numpy() for image in images)
    sides = part_sides(degraded, least_step(full_scale_of(float(sample.level)), noise.kernel))
    if sides is None:
        return sample
    share = float(sides.is_bright[sides.near].mean())  # the larger side is seen more often
    bright = bool(torch.rand((), generator=generator) < share)
    drawn = unit_noise(degraded.shape, noise.kernel, generator).numpy()
    clean, degraded = (
        unstabilize(torch.from_numpy(image), noise)[None, None]
        for image in (sides.side(clean, bright), sides.side(degraded, bright, drawn))
    )
    return replace(sample, clean=clean, degraded=None if sample.pending else degraded)


class PhantomDataset(MammogramDataset):
    """Breast phantoms made on the fly (`preprocessing/phantom.py`); no two splits share one."""

    def image_count(self) -> int:
        return self.hps.phantom_counts[SPLITS.index(self.split)]

    def prepare(self, index: int) -> Prepared:
        phantom = generate_phantom(SPLITS.index(self.split), index, tuple(self.hps.image_shape))
        return Prepared(phantom.image, phantom.mask, info={"calcifications": phantom.calcifications})

    def meta(self, index: int, key: SampleKey) -> Meta:
        name = f"{self.split}/{index:04d}"
        return Meta(name, key, patient=name)


class RecordDataset(MammogramDataset):
    """Images on disk, each brought onto the training grid by its breast mask; from `cache` if one is given.

    Training adds `hps.phantoms` phantoms to them.
    """

    def __init__(
        self, records: Sequence[Record], hps: HParams, split: str, seed: int = 0, cache: PreparedCache | None = None,
        strict: bool = False,
    ):  # fmt: skip
        super().__init__(hps, split, seed, strict)
        self.records, self.cache = list(records), cache
        self.phantoms = PhantomDataset(hps.updated(phantom_counts=[hps.phantoms if self.train else 0] * 3), split)

    @property
    def noise(self) -> str:
        """What degrades the images, in words."""
        real = any(record.degraded for record in self.records)
        return "real low-dose pairs" if real else super().noise

    @property
    def sends_grey_values(self) -> bool:
        """Whether training images go to the device as the cache keeps them, half the bytes: if nothing is computed here."""
        computes = switched_on(self.hps, ("dose_fraction", "crop_size", "phantoms", *CHANGES_OF_INTENSITIES))
        return self.train and self.degrade_on_device and not computes

    def image_count(self) -> int:
        return len(self.records) + self.phantoms.image_count()

    def prepare(self, index: int) -> Prepared:
        if index >= len(self.records):
            return self.phantoms.prepare(index - len(self.records))
        record = self.records[index]
        if self.cache is None:
            return prepare_record(record, self.hps.image_shape, self.hps.native)
        return self.cache.load(record, as_grey_values=self.sends_grey_values)

    def leave_out_unreadable(self, progress: bool = True) -> None:
        """Read every image; leave out what cannot be read, with a line on stderr each, and one for each peculiarity.

        Raises ImageError if nothing is left or, with `strict`, for the first of them.
        """
        kept, remarks = [], {}
        for i, record in enumerate(tracked(self.records, f"checking {self.split}", "image", progress)):
            try:
                remarks[str(record.path)] = self.prepared(i).info["remarks"]
                kept.append(record)
            except ImageError as error:
                if self.strict:
                    raise
                self.left_out.append(one_line(error))
        for line in remark_lines(remarks):
            print(line, file=sys.stderr)
        if not self.left_out:
            return
        if not kept:
            raise ImageError(f"{self.left_out[0]} (and no other image for {self.split} can be read)")
        for failure in self.left_out:
            print(f"warning: {failure}; left out", file=sys.stderr)
        self.records, self._cache, self._noises = kept, {}, {}

    def meta(self, index: int, key: SampleKey) -> Meta:
        if index >= len(self.records):
            return self.phantoms.meta(index - len(self.records), key)
        record = self.records[index]
        return Meta(record.key, key, record.patient, dict(record.info))
