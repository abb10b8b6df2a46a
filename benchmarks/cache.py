"""Time of an epoch through the prepared cache against one that decodes the sources, in one run on one core.

The sources are a CBIS-DDSM tree: full-size 16-bit DICOM made of phantoms (or of --images), or your own (--data-root).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets_cbis import CASE_COLUMNS, cbis_records
from files.cache import PreparedCache
from files.images import find_images, read_image
from files.prepared import Record
from helper import UserError, format_table
from hps import HPS_VQVAE
from loading.batches import SampleKey
from loading.mammograms import RecordDataset
from preprocessing.phantom import generate_phantom
from running.command_line import Parser, positive_int
from running.scripts import run_script
from trees import write_case_files, write_dicom

HEIGHT, WIDTH = 3328, 2560  # pixels of a source
PHANTOM_SCALE = 4  # phantoms are drawn this much smaller


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--count", type=positive_int, default=8, help="images to measure (default: 8)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data-root", type=Path, help="measure the first images of this CBIS-DDSM tree")
    source.add_argument("--images", type=Path, metavar="DIR", help="make the sources of the mammograms in this folder")
    parser.add_argument("--no-tqdm", action="store_true", help="disable progress bars")
    return parser.parse_args()


def write_tree(root: Path, count: int, images: Path | None, progress: bool) -> None:
    """Write a tree of `count` mammograms, one a patient."""
    paths = find_images(images)[:count] if images else range(count)
    rows = []
    for i, path in enumerate(tqdm(paths, desc="making sources", disable=not progress, unit="image")):
        case = f"Mass-Training_P_{i:05d}_LEFT_CC"
        if images:
            values = read_image(path)
        else:
            values = generate_phantom(0, i, (1, HEIGHT // PHANTOM_SCALE, WIDTH // PHANTOM_SCALE)).image[0].numpy()
        values = np.asarray(Image.fromarray(values).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).clip(0, 1)
        pixels = np.rint(values * 65535).astype(np.uint16)
        write_dicom(root / "CBIS-DDSM" / case / "study" / "series" / "1-1.dcm", pixels, case, "full mammogram images")
        entries = {"patient_id": f"P_{i:05d}", "image file path": f"{case}/study/series/000000.dcm"}
        rows.append(dict.fromkeys(CASE_COLUMNS, "") | entries)
    train = pd.DataFrame(rows)
    names = [f"mass_case_description_{half}_set.csv" for half in ("train", "test")]
    write_case_files(root, dict(zip(names, (train, train.iloc[:0]), strict=True)))


def seconds(function: Callable[[int], object], count: int) -> float:
    """Mean time of a call with 0, 1, ... count - 1."""
    start = time.perf_counter()
    for i in range(count):
        function(i)
    return (time.perf_counter() - start) / count


def measure(records: list[Record], folder: Path) -> None:
    """Print how long images and training samples take from the sources and through a cache below `folder`."""
    hps = HPS_VQVAE["cbis-ddsm"]
    count = len(records)
    cache = PreparedCache(folder, hps.image_shape)
    sources = RecordDataset(records, hps, "train")
    cached = RecordDataset(records, hps, "train", cache=cache)
    sources.prepare(0)  # the first image pays for imports and memory

    decoding = seconds(sources.prepare, count)
    building = seconds(lambda _: cache.build(records, progress=False), 1) / count
    first, second = (seconds(cached.prepare, count) for _ in range(2))
    decoded, loaded = (
        seconds(lambda i, images=images: images[SampleKey(1, i, i)], count) for images in (sources, cached)
    )
    size = sum(cache.path(record).stat().st_size for record in records) / count
    print(
        f"\n{count} images of {sum(r.path.stat().st_size for r in records) / count / 1e6:.1f} MB, on a grid of "
        f"{hps.image_shape[1]} x {hps.image_shape[2]}, one core; files as the system keeps them in memory\n"
        f"building the cache: {building:.3f} s an image, {size / 1e6:.2f} MB each\n"
    )
    rows = [
        ("image", f"{decoding:.4f}", f"{first:.4f}", f"{second:.4f}", f"{decoding / second:.0f}"),
        ("training sample", f"{decoded:.4f}", "", f"{loaded:.4f}", f"{decoded / loaded:.1f}"),
    ]
    print(format_table(("seconds of", "from sources", "cache, epoch 1", "cache, epoch 2", "sources / epoch 2"), rows))
    print(
        "image: loaded onto the grid, without noise; training sample: whole image with simulated low dose (crop_size 0)"
    )


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # as in a data loader's worker
    with tempfile.TemporaryDirectory(prefix="cache-benchmark-") as name:
        root = args.data_root or Path(name) / "tree"
        if args.images and not args.images.is_dir():
            raise UserError(f"--images {args.images}: no such folder")
        if args.data_root is None:
            write_tree(root, args.count, args.images, not args.no_tqdm)
        splits = cbis_records(root, HPS_VQVAE["cbis-ddsm"].updated(abnormality="all" if args.data_root else "mass"))
        measure([record for records in splits.values() for record in records][: args.count], Path(name) / "cache")
    print(f"temporary files lay in {name} and are removed")


if __name__ == "__main__":
    run_script(main)
