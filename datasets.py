"""The one place that picks the images of a task: phantoms, a folder, CBIS-DDSM."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from datasets_cbis import cbis_records
from files.cache import PreparedCache
from files.splits import check_root, folder_records
from helper import UserError
from hps import HParams
from loading.latents import LatentDataset as LatentDataset
from loading.mammograms import MammogramDataset, PhantomDataset, RecordDataset

# A task whose images lie on disk, to its default data root and to what finds the records of its splits there:
# (root, settings, strict) to records by split. A new data set takes one line here, and its settings in hps.py.
_FOLDER = None, lambda root, hps, strict: folder_records(root, hps)
ON_DISK = {
    "cbis-ddsm": (Path("data/cbis-ddsm"), cbis_records),
    "folder": _FOLDER,
    "folder-small": _FOLDER,
    "mammogram": _FOLDER,
}


def get_datasets(
    task: str, hps: HParams, splits: Sequence[str], data_root: Path | None = None, seed: int = 0, *,
    strict: bool = False, cache: Path | None = None, progress: bool = True,
) -> list[MammogramDataset]:  # fmt: skip
    """The images of some of a task's splits: "train", "validation", "test"; the disk is looked through once.

    Validation and test images are read first, and left out if they are unreadable. With `strict` an image that is unreadable,
    or that cbis-ddsm misses, is an error. With a `cache` folder, images on disk are prepared there first, with a bar if
    `progress`. Raises UserError if the data root is missing or holds no images for a split, or the cache cannot be built.
    """
    if hps.image_shape[0] != 1:
        raise UserError(f"--hps image_shape={hps.image_shape}: mammograms have one channel")
    if task == "phantom":
        if min(hps.image_shape[1:]) < 32:
            raise UserError(f"--hps image_shape={hps.image_shape}: phantoms need sides of at least 32")
        return [PhantomDataset(hps, split, seed) for split in splits]
    default_root, find_records = ON_DISK[task]
    data_root = check_root(data_root or default_root, task)
    records = find_records(data_root, hps, strict)
    for split in splits:
        if not records[split]:
            raise UserError(f"{data_root}: no images for {split}; see split_csv and the fractions in hps.py")
    images = None
    if cache is not None:
        images = PreparedCache(cache, hps.image_shape)
        every = [record for split in splits for record in records[split]]
        images.build(every, hps.nb_workers, progress, strict=strict)
    datasets = [RecordDataset(records[split], hps, split, seed, images, strict) for split in splits]
    for dataset in datasets:
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

    Prepared images are kept in --cache. By default they are not, if nothing is saved or `cache_images` keeps them in memory.
    """
    cache, root = args.cache, args.data_root
    if root is not None and args.task not in ON_DISK:
        raise UserError(
            f"--data-root {root}: task {args.task} makes its own images; pass --task folder, or leave it out"
        )
    if cache is not None and hps.native:
        raise UserError(
            f"--cache {cache}: keeps images on the training grid, but native=True takes them as they are; leave it out"
        )
    if cache is None and not (args.no_cache or args.no_save or hps.cache_images or hps.native):
        cache = Path("cache")
    options = dict(strict=args.strict, cache=cache, progress=not args.no_tqdm)
    return get_datasets(args.task, hps, splits, root, args.seed, **options)


def load_training_sets(args: argparse.Namespace, hps: HParams, digest: str) -> list[Dataset]:
    """Training and validation set of stage 2: images, or the latents of --latents, which the first stage with this digest
    has made."""
    if not args.latents:
        return load_datasets(args, hps, "train", "validation")
    if hps.noise_levels:
        raise UserError(
            f"--latents {args.latents}: holds one noise level, but the model is trained at {hps.noise_levels}; train it from "
            "images, or with --hps noise_levels=[]"
        )
    sets = [LatentDataset(args.latents, split, hps, args.seed) for split in ("train", "validation")]
    sets[0].check(digest, args.vqvae_path)
    return sets
