"""Data sets of (clean, degraded) mammograms: phantoms, folders, latents; CBIS-DDSM stands in `datasets_cbis.py`."""

from __future__ import annotations

import bisect
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import torch
from PIL import Image
from pydicom.pixels import apply_modality_lut
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from helper import DATA_IDENTITY, UserError, seed_of, seeded_generator
from hps import HParams
from metrics import breast_mask
from phantom import generate_phantom
from preprocessing.degrade import simulate_low_dose

SPLITS = ("train", "validation", "test")
IMAGE_SUFFIXES = (".pgm", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
LATENT_FORMAT = 1  # raised when the layout of a latent data set changes


# --- items and batches -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleKey:
    """What a sampler hands to a data set: all randomness of a training sample is keyed by it and the seed."""

    epoch: int
    position: int  # place in the epoch's order
    index: int


@dataclass(frozen=True)
class Meta:
    """Where a sample comes from."""

    path: str  # path relative to the data root, with forward slashes: the identity of the image
    key: SampleKey
    patient: str = ""
    info: dict = field(default_factory=dict)  # what a data set knows beyond that, e.g. lesions or the grid transform


@dataclass
class Batch:
    """Clean and degraded images (N, C, H, W) in [0, 1], or latents of both; `mask` (N, 1, H, W) is True in the breast."""

    clean: Tensor
    degraded: Tensor
    meta: list[Meta]
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.clean)

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; the copy does not block where the memory is pinned."""
        return replace(
            self,
            clean=self.clean.to(device, non_blocking=True),
            degraded=self.degraded.to(device, non_blocking=True),
            mask=None if self.mask is None else self.mask.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The batch in pinned memory (called by DataLoader)."""
        mask = None if self.mask is None else self.mask.pin_memory()
        return replace(self, clean=self.clean.pin_memory(), degraded=self.degraded.pin_memory(), mask=mask)

    @classmethod
    def collate(cls, items: Sequence[Batch]) -> Batch:
        """Join batches of one sample each."""
        masks = [item.mask for item in items]
        return cls(
            clean=torch.cat([item.clean for item in items]),
            degraded=torch.cat([item.degraded for item in items]),
            meta=[meta for item in items for meta in item.meta],
            mask=None if masks[0] is None else torch.cat(masks),
        )


class KeyedSampler(Sampler[SampleKey]):
    """Yields a `SampleKey` for every index of an epoch, in an order that depends on seed and epoch alone.

    `limit` keeps the first so many of them.
    """

    def __init__(self, length: int, seed: int = 0, shuffle: bool = False, limit: int | None = None):
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.count = length if limit is None else min(limit, length)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[SampleKey]:
        order = range(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=seeded_generator("order", self.seed, self.epoch)).tolist()
        for position, index in enumerate(order[: self.count]):
            yield SampleKey(self.epoch, position, index)


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = False,
    workers: int = 0,
    pin: bool = False,
    limit: int | None = None,
) -> DataLoader:
    """A DataLoader of `Batch` over a data set of this module; its sampler is a `KeyedSampler`.

    With `limit` it is for one pass over the first so many samples; else its workers live on from epoch to epoch.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, cores)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        generator=seeded_generator("workers", seed),  # else every pass draws a seed from the global generator
        sampler=KeyedSampler(len(dataset), seed, shuffle, limit),
        num_workers=workers,
        collate_fn=Batch.collate,
        pin_memory=pin,
        persistent_workers=workers > 0 and limit is None,
    )


# --- reading and geometry --------------------------------------------------------------------------------------------


def read_image(path: Path) -> np.ndarray:
    """Read a grayscale mammogram as (H, W) float32 in [0, 1]: DICOM, PNG or TIFF of 8 or 16 bit, JPEG, PGM.

    DICOM values go through the modality LUT, not through a VOI window (which is for viewing and cannot be undone), are
    divided by what the stored bits can hold, and MONOCHROME1 is inverted. Raises UserError naming the file.
    """
    try:
        if path.suffix.lower() in (".dcm", ".dicom"):
            return _read_dicom(path)
        with Image.open(path) as image:
            return _to_unit_range(image, path)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  decoders raise many kinds for a broken file
        reason = str(error).split("\n")[0][:120] or type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); remove or replace it") from None


def _to_unit_range(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode in ("RGB", "RGBA", "LA"):
        channels = np.asarray(image.convert("RGB"))
        if (channels != channels[..., :1]).any():
            raise UserError(f"{path}: a colour image; mammograms are grayscale, remove it or convert it")
        return channels[..., 0].astype(np.float32) / 255
    if image.mode == "L":
        return np.asarray(image, dtype=np.float32) / 255
    if image.mode.startswith("I"):  # 16 bit, which Pillow opens as I;16 or, for PGM, as I
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path}: its values do not fit 16 bits; convert it to 16-bit grayscale")
        return values.astype(np.float32) / 65535
    raise UserError(f"{path}: pixel format {image.mode} is not 8- or 16-bit grayscale; convert it")


def _read_dicom(path: Path) -> np.ndarray:
    dataset = pydicom.dcmread(path)
    if int(dataset.get("NumberOfFrames", 1) or 1) > 1 or int(dataset.get("SamplesPerPixel", 1)) > 1:
        raise UserError(f"{path}: a multi-frame or colour DICOM; only single grayscale images can be read")
    values = apply_modality_lut(dataset.pixel_array, dataset).astype(np.float32)
    if "ModalityLUTSequence" in dataset:
        low, high = 0, 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    else:
        offset = 2 ** (dataset.BitsStored - 1) if dataset.get("PixelRepresentation") else 0
        slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
        low, high = sorted(slope * v + intercept for v in (-offset, 2**dataset.BitsStored - 1 - offset))
    unit = ((values - low) / (high - low)).clip(0, 1).astype(np.float32)
    return 1 - unit if dataset.get("PhotometricInterpretation") == "MONOCHROME1" else unit


def _border(profile: np.ndarray, spare: int) -> int:
    """How many lines of film border a profile of mean intensities, from the edge inwards, begins with; at most 2 * spare.

    Lines whose mean is more than 15 % off that of the lines behind belong to the border, and so does one line more.
    """
    reference = float(np.median(profile[2 * spare : 4 * spare])) if len(profile) > 4 * spare else 0.0
    off = np.flatnonzero(np.abs(profile[: 2 * spare] - reference) > 0.15 * reference)
    return int(off[-1]) + 2 if reference and len(off) else 0


@dataclass(frozen=True)
class Grid:
    """How an image lies on the training grid: a box of it, scaled by one factor, with background on the far side."""

    box: tuple[int, int, int, int]  # top, left, bottom, right in the image's own pixels
    size: tuple[int, int]  # height, width of the scaled box
    offset: tuple[int, int]  # row, column of its top left corner on the grid
    shape: tuple[int, int]  # height, width of the grid

    @classmethod
    def fit(cls, image: np.ndarray, mask: np.ndarray, shape: tuple[int, int], margin: float = 0.02) -> Grid:
        """Fit the bounding box of the breast of an image (H, W) with its mask (H, W) into `shape`.

        The box keeps `margin` of its longer side around the skin and loses the film's border where that cuts the breast.
        The breast is scaled, never stretched; spare columns go to the side away from the chest wall, spare rows to both.
        """
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        spare = max(1, round(margin * max(bottom - top, right - left)))
        middle = (left + right) // 2
        wall_left = mask[:, left:middle].sum() > mask[:, middle:right].sum()
        means = [np.where(mask, image, 0).sum(axis) / mask.sum(axis).clip(1) for axis in (1, 0)]
        # the breast is cut off by the film where its mask ends in a wide straight edge: at the chest wall always
        wide = 0.2 * (right - left)
        top_cut, bottom_cut = mask[top + 1].sum() > wide, mask[bottom - 2].sum() > wide
        top = top + _border(means[0][top:bottom], spare) if top_cut else max(0, top - spare)
        bottom = bottom - _border(means[0][top:bottom][::-1], spare) if bottom_cut else min(len(mask), bottom + spare)
        if wall_left:
            left, right = left + _border(means[1][left:right], spare), min(mask.shape[1], right + spare)
        else:
            left, right = max(0, left - spare), right - _border(means[1][left:right][::-1], spare)
        height, width = bottom - top, right - left
        factor = min(shape[0] / height, shape[1] / width)
        size = min(shape[0], max(1, round(height * factor))), min(shape[1], max(1, round(width * factor)))
        offset = (shape[0] - size[0]) // 2, 0 if wall_left else shape[1] - size[1]
        return cls(tuple(int(v) for v in (top, left, bottom, right)), size, offset, tuple(shape))

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Bring an image (H, W) onto the grid: antialiased bilinear scaling, background 0."""
        top, left, bottom, right = self.box
        box = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right], dtype=np.float32))
        scaled = np.asarray(box.resize(self.size[::-1], Image.Resampling.BILINEAR))
        grid = np.zeros(self.shape, dtype=np.float32)
        row, column = self.offset
        grid[row : row + self.size[0], column : column + self.size[1]] = scaled.clip(0, 1)
        return grid


# --- data sets of images ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """An image on the training grid."""

    clean: Tensor  # (C, H, W) in [0, 1]
    mask: Tensor  # (1, H, W) bool, True in the breast
    degraded: Tensor | None = None  # (C, H, W): a real low-dose image in place of the simulation
    info: dict = field(default_factory=dict)


class MammogramDataset(Dataset):
    """Pairs of clean and simulated low-dose images, as a `Batch` of one sample.

    Training samples are crops with fresh noise, keyed by (seed, epoch, index); validation and test images are whole and
    always carry the same noise, seeded by their path. Subclasses say what the images are.
    """

    def __init__(self, hps: HParams, split: str, seed: int = 0):
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        self.hps, self.split, self.seed = hps, split, seed
        self.train = split == "train"
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
        index = key.index // self.hps.crops_per_image if self.train else key.index
        image, meta = self.prepared(index), self.meta(index, key)
        if not self.train:
            return self._sample(image, meta, seeded_generator("noise of", meta.path))
        generator = seeded_generator("sample", self.seed, key.epoch, key.index)
        return self._sample(self._augment(image, generator), meta, generator)

    def whole(self, index: int, realisation: int) -> Batch:
        """A training image uncropped, with noise draw number `realisation` (for latent extraction)."""
        image, meta = self.prepared(index), self.meta(index, SampleKey(0, index, index))
        return self._sample(image, meta, seeded_generator("realisation", self.seed, realisation, meta.path))

    def _sample(self, image: Prepared, meta: Meta, generator: torch.Generator) -> Batch:
        meta.info.update(image.info)
        degraded = image.degraded
        if degraded is None:
            degraded = simulate_low_dose(image.clean, self.hps.noise_level, generator)
        return Batch(image.clean[None], degraded[None], [meta], image.mask[None])

    def _augment(self, image: Prepared, generator: torch.Generator) -> Prepared:
        """A random crop, mirrored half of the time; its noise is drawn after it."""
        parts = [image.clean, image.mask, image.clean if image.degraded is None else image.degraded]
        if size := self.hps.crop_size:
            row, column = draw_crop(image.mask[0], size, 1, self.hps.breast_fraction, generator)
            parts = [part[:, row : row + size, column : column + size] for part in parts]
        if self.hps.flip and torch.rand((), generator=generator) < 0.5:
            parts = [part.flip(-1) for part in parts]
        clean, mask, degraded = parts
        return Prepared(clean, mask, None if image.degraded is None else degraded)


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


@dataclass(frozen=True)
class Record:
    """One image of a data set on disk."""

    path: Path  # full-dose image
    key: str  # path relative to the data root, with forward slashes
    patient: str
    degraded: Path | None = None  # its low-dose pair, where there is one
    info: dict = field(default_factory=dict)


class RecordDataset(MammogramDataset):
    """Images on disk, each brought onto the training grid by its breast mask."""

    def __init__(self, records: Sequence[Record], hps: HParams, split: str, seed: int = 0):
        super().__init__(hps, split, seed)
        self.records = list(records)

    @property
    def noise(self) -> str:
        """What degrades the images, in words."""
        real = any(record.degraded for record in self.records)
        return "real low-dose pairs" if real else super().noise

    def image_count(self) -> int:
        return len(self.records)

    def prepare(self, index: int) -> Prepared:
        record = self.records[index]
        image = read_image(record.path)
        if min(image.shape) < 16:
            raise UserError(f"{record.path}: {image.shape[1]} x {image.shape[0]} pixels are too few; remove it")
        mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
        grid = Grid.fit(image, mask, tuple(self.hps.image_shape[1:]))
        clean = torch.from_numpy(grid.apply(image))[None]
        degraded = None
        if record.degraded is not None:
            low = read_image(record.degraded)
            if low.shape != image.shape:
                raise UserError(
                    f"{record.degraded}: {low.shape[1]} x {low.shape[0]} pixels, "
                    f"but its full-dose pair has {image.shape[1]} x {image.shape[0]}"
                )
            degraded = torch.from_numpy(grid.apply(low))[None]
        return Prepared(clean, breast_mask(clean), degraded, {"grid": grid})

    def meta(self, index: int, key: SampleKey) -> Meta:
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
    if path.suffix.lower() in (".dcm", ".dicom"):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
            if patient := str(header.PatientID or "").strip():
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


def find_images(root: Path) -> list[Path]:
    """Image files below `root` in a fixed order, hidden ones left out. Raises UserError where there are none."""
    images = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    if not images:
        raise UserError(f"{root}: no images in it; looked for {', '.join(IMAGE_SUFFIXES)}")
    return images


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


def split_by_file(records: list[Record], path: Path) -> dict[str, list[Record]]:
    """Assign records by a CSV with columns file, split and optionally patient; a file may be named without its suffix.

    Records that are not in it are left out, and the number is printed. Raises UserError where the file does not fit.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"--hps split_csv={path}: no such file") from None
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: not a readable CSV file ({str(error).splitlines()[0]})") from None
    table = table.apply(lambda column: column.str.strip())
    for column in ("file", "split"):
        if column not in table:
            raise UserError(f"{path}: has no column {column!r}; it needs file and split, and may have patient")
    unknown = sorted(set(table["split"]) - set(SPLITS))
    if unknown:
        raise UserError(f"{path}: split {unknown[0]!r} is none of {', '.join(SPLITS)}")
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


class FolderDataset(RecordDataset):
    """A folder of mammograms of any kind, split by patient; see `folder_records`."""

    def __init__(self, root: Path, hps: HParams, split: str, seed: int = 0):
        super().__init__(folder_records(root, hps)[split], hps, split, seed)


def get_dataset(
    task: str, hps: HParams, split: str = "train", data_root: Path | None = None, seed: int = 0
) -> MammogramDataset:
    """The images of a task's split: "train", "validation" or "test".

    Raises UserError where the data root is missing, or holds no images for the split.
    """
    if hps.image_shape[0] != 1:
        raise UserError(f"--hps image_shape={hps.image_shape}: mammograms have one channel")
    if task == "phantom":
        if min(hps.image_shape[1:]) < 32:
            raise UserError(f"--hps image_shape={hps.image_shape}: phantoms need sides of at least 32")
        return PhantomDataset(hps, split, seed)
    if task == "cbis-ddsm":
        from datasets_cbis import CBISDDSM  # it builds on this module

        data_root = data_root or Path("data/cbis-ddsm")
        dataset = CBISDDSM(data_root, hps, split, seed)
    else:
        dataset = FolderDataset(_check_root(data_root, task), hps, split, seed)
    if not dataset.records:
        raise UserError(f"{data_root}: no images for {split}; see split_csv and the fractions in hps.py")
    return dataset


# --- latents ---------------------------------------------------------------------------------------------------------


class LatentDataset(Dataset):
    """Latents that `main-latents.py` wrote, memory-mapped, as a `Batch` of one (clean, degraded) pair in float32.

    Training samples are crops of `crop_size` pixels' worth of latent, of one of the noise realisations, keyed by (seed,
    epoch, index). Raises UserError where the folder is no whole latent data set.
    """

    def __init__(self, root: Path, split: str, hps: HParams, seed: int = 0):
        self.root, self.split, self.hps, self.seed = Path(root), split, hps, seed
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
        """How many latents of how many patients, in words."""
        return f"{name}: {len(self.images)} latents, {self.realisations} noise draws each, of {len(self.patients())} patients"

    def check(self, digest: str, path: Path) -> None:
        """Raises UserError unless the latents come from the first stage with this digest, of checkpoint `path`, and from
        the images, split and noise level of the settings."""
        for key in DATA_IDENTITY:
            if self.index["hps"].get(key) != self.hps[key]:
                raise UserError(
                    f"--latents {self.root}: extracted with {key}={self.index['hps'].get(key)}, but this run has "
                    f"{self.hps[key]}; extract them again or set --hps {key}"
                )
        if self.index["first_stage"] != digest:
            raise UserError(
                f"--latents {self.root}: extracted with {self.index['checkpoint']}, not with {path}; extract them again"
            )

    def _open(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.root / self.split / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable ({str(error).splitlines()[0]}); extract the latents again") from None
        if array.shape != shape:
            raise UserError(f"{path}: shape {array.shape}, but the index says {shape}; extract the latents again")
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
        return Batch(clean[None], degraded[None], [meta])


def read_latent_index(root: Path) -> dict:
    """The index of a latent data set; raises UserError where it is missing, damaged or of another format."""
    path = Path(root) / "index.json"
    if not path.is_file():
        raise UserError(f"--latents {root}: no index.json there; extract latents with main-latents.py")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format_version"]
        for key in ("codes_only", "latent_shape", "rate", "scale", "first_stage", "checkpoint", "hps"):
            index[key]
        for entry in index["splits"].values():
            entry["images"], entry["realisations"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged; extract the latents again") from None
    if version != LATENT_FORMAT:
        raise UserError(f"{path}: format {version}, this version reads {LATENT_FORMAT}; extract the latents again")
    return index
