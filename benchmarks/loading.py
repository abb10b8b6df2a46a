"""What do the cache of prepared images and the loader's workers give? Ratios to decoding the sources in one process.

The sources are a CBIS-DDSM tree: full-size 16-bit DICOM made of phantoms (or of --images), or your own (--data-root).
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flags import loading_arguments

if __name__ == "__main__":
    ARGUMENTS = loading_arguments(__doc__.splitlines()[0])  # torch comes after the flags

import numpy as np
import pandas as pd
import torch
from PIL import Image

from datasets_cbis import CASE_COLUMNS, cbis_records
from files.cache import PreparedCache
from files.images import find_images, read_image
from files.prepared import Record
from helper import counted, format_table, tracked
from hps import HPS_VQVAE
from loading.batches import SampleKey, make_loader
from loading.mammograms import RecordDataset
from preprocessing.phantom import generate_phantom
from running.distributed import worker_count
from running.scripts import run_script
from trees import write_case_files, write_dicom

HPS = HPS_VQVAE["cbis-ddsm"]
HEIGHT, WIDTH = 3328, 2560  # pixels of a source
PHANTOM_SHAPE = (1, HEIGHT // 4, WIDTH // 4)  # as phantoms are drawn
EPOCHS = 8  # of the images, in the loader's


def write_tree(root: Path, args: argparse.Namespace) -> None:
    """Write a tree of mammograms, one a patient."""
    paths = find_images(args.images)[: args.count] if args.images else [None] * args.count
    rows = []
    for i, path in enumerate(tracked(paths, "making sources", "image", not args.no_tqdm)):
        case = f"Mass-Training_P_{i:05d}_LEFT_CC"
        values = read_image(path) if path else generate_phantom(0, i, PHANTOM_SHAPE).image[0].numpy()
        values = np.asarray(Image.fromarray(values).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).clip(0, 1)
        pixels = np.rint(values * 65535).astype(np.uint16)
        write_dicom(root / "CBIS-DDSM" / case / "study" / "series" / "1-1.dcm", pixels, case, "full mammogram images")
        entries = {"patient_id": f"P_{i:05d}", "image file path": f"{case}/study/series/000000.dcm"}
        rows.append(dict.fromkeys(CASE_COLUMNS, "") | entries)
    train = pd.DataFrame(rows)
    halves = {"train": train, "test": train.iloc[:0]}
    write_case_files(root, {f"mass_case_description_{half}_set.csv": table for half, table in halves.items()})


def seconds(function: Callable[[int], object], count: int) -> float:
    """Mean time of a call with 0, 1, ... count - 1."""
    start = time.perf_counter()
    for i in range(count):
        function(i)
    return (time.perf_counter() - start) / count


def loader_seconds(data: RecordDataset, workers: int) -> float:
    """Time a sample of a training loader, from its second epoch on."""
    loader = make_loader(data, HPS.batch_size, shuffle=True, workers=workers)
    for _ in loader:  # starts the workers
        pass
    return seconds(lambda _: [None for _ in loader], 1) / len(data)


def measure(records: list[Record], folder: Path) -> None:
    """Print how long images and training samples take from the sources and through a cache below `folder`."""
    count, cache = len(records), PreparedCache(folder, HPS.image_shape)
    sources, cached = RecordDataset(records, HPS, "train"), RecordDataset(records, HPS, "train", cache=cache)
    sources.prepare(0)  # the first image pays for imports and memory
    decoding = seconds(sources.prepare, count)
    building = seconds(lambda _: cache.build(records, progress=False), 1) / count
    first, second = (seconds(cached.prepare, count) for _ in range(2))
    decoded, loaded = (seconds(lambda i, data=data: data[SampleKey(1, i, i)], count) for data in (sources, cached))
    workers, size = worker_count(HPS.nb_workers), sum(cache.path(record).stat().st_size for record in records) / count
    print(
        f"\n{counted(count, 'image')} of {sum(r.path.stat().st_size for r in records) / count / 1e6:.1f} MB, on a grid of "
        f"{HPS.image_shape[1]} x {HPS.image_shape[2]}; files as the system keeps them in memory\n"
        f"building the cache: {building:.3f} s an image, {size / 1e6:.2f} MB each"
    )
    repeated = RecordDataset(records * EPOCHS, HPS, "train", cache=cache)
    alone, together = (loader_seconds(repeated, count) for count in (0, workers))
    rows = [
        ("image from the cache, epoch 1", first, "from its source", decoding),
        ("image from the cache, epoch 2", second, "from its source", decoding),
        ("training sample through the cache", loaded, "from its source", decoded),
        (f"loader, {counted(workers, 'worker')}, a sample", together, "no workers", alone),
    ]
    cells = [[name, base, f"{own:.4f}", f"{other:.4f}", f"{other / own:.1f}"] for name, own, base, other in rows]
    print(format_table(("", "baseline", "seconds", "baseline, s", "times faster"), cells))


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # as in a data loader's worker
    with tempfile.TemporaryDirectory(prefix="loading-benchmark-") as name:
        root = args.data_root or Path(name) / "tree"
        if args.data_root is None:
            write_tree(root, args)
        splits = cbis_records(root, HPS.updated(abnormality="all" if args.data_root else "mass"))
        measure([record for records in splits.values() for record in records][: args.count], Path(name) / "cache")


if __name__ == "__main__":
    run_script(functools.partial(main, ARGUMENTS))
