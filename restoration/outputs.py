"""Where restored images go, and what is written beside them: samples, and maps of their spread."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.pictures import save_picture, spread_picture
from evaluation.uncertainty import REGIONS, interval, region_means
from files.dicom import dicom_tag, is_dicom
from files.images import Mammogram, find_images, is_restored, stem_of
from helper import UserError, counted, explained

REGION_MAPS = {f"std-{side}x{side}": side for side in REGIONS}
LEGENDS = {  # of the maps that --samples writes beside an image
    "std": "expected error, 65535 at a tenth of full scale",
    "low": "lower end of the 90 % interval, 65535 at full scale",
    "high": "upper end of the 90 % interval, 65535 at full scale",
    **{
        kind: f"expected error of means over {side} x {side} pixels, one a pixel of this map, 65535 at a tenth of full scale"
        for kind, side in REGION_MAPS.items()
    },
}
MAPS = (*LEGENDS, "uncertainty")  # kinds of pictures that --samples writes beside an image
STD_SCALE = 10.0  # the expected error is written so many times as bright, for 16 bits to hold it
SAMPLE_MARK = "; posterior sample number "  # in the description of each of --samples
RECORD = "restore.json"  # in the output folder: how its images were made
MOST_NAME_BYTES = 255  # that file systems take
TABLES = ("restore.csv", "metrics.csv", "metrics.json", "table.txt")  # what else is written there


@dataclass(frozen=True)
class Job:
    """An image to restore."""

    source: Path
    name: str  # path below the inputs' common folder, with forward slashes
    target: Path  # what is written

    def beside(self, kind: str) -> Path:
        """Where a picture of a kind (`compare`, or one of `MAPS`) is written."""
        return self.target.with_name(f"{self.target.name.removesuffix('.png')}.{kind}.png")

    def sample(self, number: int) -> Path:
        """Where a posterior sample, counted from 1, is written."""
        return self.target.with_name(f"{self.target.stem}.sample-{number:02d}{self.target.suffix}")


def find_sources(inputs: Sequence[Path], out: Path) -> dict[Path, tuple[Path, str]]:
    """The images of files and folders, each once: by the place it lies at, its path as given and its name below the inputs'
    common folder.

    What lies in `out` is no input, nor are restored images in a folder. Raises UserError for an input that does not exist or
    a folder without images.
    """
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    roots = [(path if path.is_dir() else path.parent).resolve() for path in inputs]
    base, own = os.path.commonpath(roots), out.resolve()
    sources: dict[Path, tuple[Path, str]] = {}
    for path, root in zip(inputs, roots, strict=True):
        found = [path]
        if path.is_dir():
            if root.is_relative_to(own):
                raise UserError(f"--out {out}: holds the input folder {path}; choose another folder")
            inside = [p for p in find_images(path) if not p.resolve().is_relative_to(own)]
            # a link does not take the place of the file it leads to
            found = sorted((p for p in inside if not is_restored(p)), key=Path.is_symlink)
            if earlier := len(inside) - len(found):
                print(f"{path}: {counted(earlier, 'restored image in it is', 'restored images in it are')} passed over")
            if not found:
                raise UserError(f"{path}: nothing but restored images in it; name a folder of mammograms")
        for source in found:
            # the name that a link has here, not that of what it leads to
            name = root / (source.relative_to(path) if path.is_dir() else source.name)
            sources.setdefault(source.resolve(), (source, name.relative_to(base).as_posix()))
    return sources


def plan(inputs: Sequence[Path], out: Path, *, kinds: Sequence[str] = (), samples: int = 0) -> list[Job]:
    """The images of files and folders, and where they go: the tree below the inputs' common folder is kept.

    Pictures become PNG, DICOM stays DICOM; if two would come to the same name, what changes keeps its suffix too. Raises
    UserError as `find_sources` does, and if a target, or a picture of the `kinds` or a sample beside it, is an input, not of
    this script's making, or too long a name.
    """
    sources = find_sources(inputs, out)
    suffixes = {place: ".dcm" if is_dicom(place) else ".png" for place in sources}
    plain = {place: stem_of(name) + suffixes[place] for place, (_, name) in sources.items()}
    taken = Counter(plain.values())
    jobs, writers = [], dict[Path, Path]()
    for place, (source, name) in sources.items():
        below = plain[place]
        if taken[below] > 1 and below != name:
            below = name + suffixes[place]
        job = Job(source, name, out / below)
        for target in (job.target, *map(job.beside, kinds), *map(job.sample, range(1, samples + 1))):
            if len(os.fsencode(target.name)) > MOST_NAME_BYTES:
                raise UserError(f"{source}: too long a name for {target.name[-24:]!r} to be made of it; shorten it")
            other = writers.setdefault(target, source)
            if other is not source:
                raise UserError(f"{source}: would be written to {target}, as {other}; restore them into two folders")
            if target.resolve() in sources:
                raise UserError(f"--out: {target} is an input and is not overwritten; choose another folder")
            if target.exists() and not is_restored(target):
                raise UserError(f"--out: {target} is no restored image and is not overwritten; choose another folder")
        jobs.append(job)
    for name in TABLES:
        if (out / name).exists() and not (out / RECORD).exists():
            raise UserError(f"--out: {out / name} is not of this script's making; choose another folder")
    return jobs


def _is_beside_an_image(path: Path, kind: str) -> bool:
    """Whether a file is what this script writes as `kind` beside an image, and not a restored image of such a name."""
    if not is_restored(path):
        return False
    if is_dicom(path):
        return SAMPLE_MARK in dicom_tag(path, "DerivationDescription")
    with Image.open(path) as picture:
        said = picture.info.get("Description", "")
        if kind == "sample":
            return SAMPLE_MARK in said
        return said.startswith(LEGENDS[kind]) if kind in LEGENDS else picture.mode == "RGB"


def remove_stale(job: Job) -> None:
    """Remove what an earlier run wrote beside an image: it would speak of another restoration than the one beside it."""
    samples = job.target.parent.glob(f"{glob.escape(job.target.stem)}.sample-*{job.target.suffix}")
    for path, kind in [(path, "sample") for path in samples] + [(job.beside(k), k) for k in ("compare", *MAPS)]:
        if _is_beside_an_image(path, kind):
            path.unlink()


def make_folder(out: Path) -> list[Path]:
    """Make the output folder; returns those that were not there. Raises UserError if it cannot be written to."""
    with explained(f"--out {out}: cannot be made"):
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out}: may not be written to; choose another folder")
    return made


def write_maps(
    job: Job,
    mammogram: Mammogram,
    samples: np.ndarray,
    factor: float | None,
    description: str,
    clean: np.ndarray | None = None,
) -> None:
    """Write what the spread of samples (K, H, W) of a mammogram says, and a picture of it; with `clean` (H, W) of the error too.

    The spread is `factor` times as wide; None: it is not calibrated. Maps of samples on the training grid stay on that grid.
    Raises UserError if a file cannot be written.
    """
    own = interval(samples, factor or 1.0)
    maps = {"std": own.std * STD_SCALE, "low": own.low, "high": own.high}
    for kind, side in REGION_MAPS.items():
        if min(own.std.shape) >= side:
            maps[kind] = interval(region_means(samples, side), factor or 1.0).std * STD_SCALE
    how = "not calibrated" if factor is None else f"calibrated by a factor of {factor:.3f}"
    for kind, values in maps.items():
        carried = {} if kind in REGION_MAPS else mammogram.carried  # a pixel's pitch
        plain = dataclasses.replace(mammogram, pixels=values, bits=16, header=None, padding=None, carried=carried)
        plain.write(job.beside(kind), values, f"{LEGENDS[kind]}; {how}; {description}")
    save_picture(spread_picture(clean, own, samples[0]), job.beside("uncertainty"))
