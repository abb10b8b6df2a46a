"""Latent data sets: written by main-latents.py, read by training."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from files.splits import refuse_escape
from helper import UserError, counted, reason_of, seeded_generator, tracked
from hps import HParams
from loading.batches import Batch, LatentBatch, Meta, SampleKey, make_loader
from loading.mammograms import MammogramDataset
from preprocessing.augment import CHANGES_OF_IMAGES, draw_crop, switched_on
from running import distributed
from running.checkpoints import SETTINGS_ADDED
from running.folders import hold
from running.settings import DATA_IDENTITY
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

LATENT_FORMAT = 1  # raised when the layout of a latent data set changes


class LatentDataset(Dataset):
    """Latents that `main-latents.py` wrote, memory-mapped: a `LatentBatch` of one (clean, degraded) pair in float32.

    Training samples are crops of `crop_size` pixels' worth of latent, of one of the noise realisations, keyed by (seed,
    epoch, index). Raises UserError if the folder is no whole latent data set.
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

    def reseed(self, seed: int) -> None:
        """Take another seed, as a run that goes on does."""
        self.seed = seed

    def patients(self) -> list[str]:
        """Whose images these are, each once, in order."""
        return sorted({image["patient"] for image in self.images})

    def summary(self, name: str) -> str:
        """How many latents of how many patients, in words, and which settings of training images they leave unused."""
        words = f"{name}: {counted(len(self.images), 'latent')}, {counted(self.realisations, 'noise draw')} each"
        words += f", of {counted(len(self.patients()), 'patient')}"
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
            raise UserError(f"{path}: not readable ({reason_of(error)}); extract the latents again") from None
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

    def __getitem__(self, key: SampleKey | int) -> LatentBatch:
        if isinstance(key, int):
            key = SampleKey(0, key, key)
        if not 0 <= key.index < len(self):
            raise IndexError(key.index)
        image = key.index // self.hps.crops_per_image if self.train else key.index
        meta = Meta(self.images[image]["path"], key, self.images[image]["patient"])
        window, realisation = (slice(None),), 0
        if self.train:
            generator = seeded_generator("latent sample", self.seed, key.epoch, key.index)
            realisation = int(torch.randint(self.realisations, (), generator=generator))
            if self.crop:
                mask = torch.from_numpy(self.mask[image].copy())
                row, column = draw_crop(mask, self.crop, 1, self.hps.breast_fraction, generator)
                window = slice(None), slice(row, row + self.crop), slice(column, column + self.crop)
        clean, degraded = (
            torch.from_numpy(latent[window].astype(np.float32))[None]
            for latent in (self.clean[image], self.degraded[image, realisation])
        )
        return LatentBatch(clean, degraded, [meta], torch.tensor([float(self.hps.noise_level)]))


def read_latent_index(root: Path) -> dict:
    """The index of a latent data set; raises UserError if it is missing, damaged or of another format."""
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


@dataclass
class _Realisations(Dataset):
    """Whole training images with each noise draw in turn; validation and test images once, with their own noise."""

    images: MammogramDataset
    count: int

    def __len__(self) -> int:
        return self.images.image_count() * self.count

    def __getitem__(self, key: SampleKey) -> Batch:
        index, realisation = divmod(key.index, self.count)
        return self.images.whole(index, realisation) if self.images.train else self.images[index]


# Name of an array to the type and shape of an image's entry.
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]


def split_layout(
    first_stage: VQVAE2Wrapper, image_shape: list[int], dtype: np.dtype, realisations: int, codes_only: bool
) -> Layout:
    """The arrays of a split, and what each holds of an image."""
    vqvae, latent = first_stage.vqvae, first_stage.latent_shape(*image_shape[1:])
    layout: Layout = {}
    for level in range(vqvae.nb_levels):
        scale = math.prod(vqvae.scaling_rates[1 : level + 1])
        layout[f"codes_{level}"] = np.dtype(np.uint16), (latent[1] // scale, latent[2] // scale)
    if not codes_only:
        layout |= {"clean": (dtype, latent), "degraded": (dtype, (realisations, *latent))}
        layout["mask"] = np.dtype(np.bool_), latent[1:]
    return layout


def entry_bytes(layout: Layout, prefix: str = "") -> int:
    """Bytes of an image's entries in the arrays whose names begin with `prefix`."""
    return sum(dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.items() if name.startswith(prefix))


def check_room(out: Path, images: dict[str, MammogramDataset], layouts: dict[str, Layout], will_write: bool) -> None:
    """Say how much there is to write. Raises UserError if `out` exists or, if it will be written, has no room."""
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it or choose another folder")
    counts = ", ".join(f"{data.image_count()} {split}" for split, data in images.items())
    codes, latent = (entry_bytes(layouts["train"], prefix) for prefix in ("codes", "clean"))
    total = sum(data.image_count() * entry_bytes(layouts[split]) for split, data in images.items()) / 1e9
    free = shutil.disk_usage(next(path for path in out.absolute().parents if path.exists())).free / 1e9
    print(
        f"{counts} images: {codes:,} bytes of codes and {latent:,} bytes a latent, {total:.3f} GB in all; {free:.1f} GB free"
    )
    if will_write and total > 0.98 * free:
        raise UserError(f"--out {out}: {total:.3f} GB are needed and {free:.3f} GB are free; try --codes-only")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` at the end of the block; if that fails, nothing of it is left.

    Raises UserError if it cannot be written.
    """
    partial = out.with_name(f".{out.name}.part")
    hold(out.with_name(f".{out.name}.lock"), out)
    try:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        yield partial
        if distributed.is_main():
            partial.replace(out)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # standard output, not the folder
            raise
        reason = f"--out {out}: cannot be written ({reason_of(error)}); free space or choose another folder"
        raise UserError(reason) from None
    finally:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)


def _create_arrays(folder: Path, layout: Layout, images: int) -> None:
    folder.mkdir(parents=True)
    for name, (dtype, shape) in layout.items():
        path = folder / f"{name}.npy"
        np.lib.format.open_memmap(path, "w+", dtype, (images, *shape))
        if hasattr(os, "posix_fallocate"):
            # a disk that is full is an error now, and a signal that ends the process when a page is written
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def write_split(
    images: MammogramDataset, first_stage: VQVAE2Wrapper, folder: Path, layout: Layout, device: torch.device,
    *, realisations: int, workers: int, progress: bool,
) -> dict:  # fmt: skip
    """Write one split's arrays below `folder`; returns its entry in the index. Several processes share the images."""
    if distributed.is_main():
        _create_arrays(folder, layout, images.image_count())
    distributed.gather(None)  # the files are there
    arrays = {name: np.lib.format.open_memmap(folder / f"{name}.npy", "r+") for name in layout}
    entries: list[tuple[int, dict]] = []
    loader = make_loader(_Realisations(images, realisations), distributed.size(), workers=workers, shared=True)
    pairs = zip(loader.sampler, loader.once(), strict=True)
    for key, batch in tracked(pairs, images.split, "pair", progress, len(loader)):
        if not key.counts:
            continue
        index, realisation = divmod(key.index, realisations)
        batch = batch.to(device)
        if realisation == 0:
            entries.append((index, {"path": batch.meta[0].path, "patient": batch.meta[0].patient}))
            clean = first_stage.encode(batch.clean, batch.noise)
            found = {f"codes_{level}": codes for level, codes in enumerate(first_stage.codes(clean))}
            found |= {"clean": clean, "mask": _breast_latents(batch.mask, first_stage.vqvae)}
            for name in found.keys() & arrays.keys():
                arrays[name][index] = found[name][0].cpu().numpy()
        if "degraded" in arrays:
            arrays["degraded"][index, realisation] = first_stage.encode(batch.degraded, batch.noise)[0].cpu().numpy()
    for written in arrays.values():
        written.flush()
    entries = sorted(distributed.join(entries), key=lambda entry: entry[0])
    return {"images": [image for _, image in entries], "realisations": realisations}


def _breast_latents(mask: Tensor, vqvae: VQVAE) -> Tensor:
    """Which latents see a pixel of the mask (1, 1, H, W): (1, H', W') bool."""
    height, width = mask.shape[2:]
    padded = F.pad(mask[0].float(), (0, -width % vqvae.scale, 0, -height % vqvae.scale))
    return F.max_pool2d(padded, vqvae.scaling_rates[0]).bool()
