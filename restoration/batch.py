"""The images of main-restore.py, one after the other: read, restored, written, and listed in tables."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from evaluation.metrics import image_metrics
from evaluation.pictures import comparison, save_picture
from evaluation.table import INPUT, METRICS, Evaluation, write_evaluation
from evaluation.uncertainty import Calibration
from files.images import Mammogram, read_mammogram
from helper import UserError, format_table, seeded_generator
from preprocessing.breast import breast_mask
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.estimate import estimate_noise, level_at
from preprocessing.grid import Grid
from restoration.outputs import Job, remove_stale, write_maps
from restoration.restore import Restoration, restore_image
from restoration.restorer import SHIPPED_CALIBRATION, Restorer
from running.writing import write_text

RESEARCH_USE = "research use only: a restored image is an estimate, not fit for diagnosis"
RECORD = "restore.json"  # in the output folder: how its images were made
TABLES = ("restore.csv", "metrics.csv", "metrics.json", "table.txt")  # what else `report` writes there
UNTOUCHED = 0.2  # mean share of the correction below which an image counts as left alone
CALIBRATION = SHIPPED_CALIBRATION.name  # in a model's folder
TABLE_ROWS = 16  # images that the table on the screen lists at most


def load_calibration(args: argparse.Namespace) -> Calibration | None:
    """The calibration of --calibration, or that of the model; None, and a line that says so, where that has none.

    Raises UserError where a file is none.
    """
    place = args.load_path if args.load_path.is_dir() else args.load_path.parent
    found = [path for path in (place / CALIBRATION, place / "evaluation" / CALIBRATION) if path.is_file()]
    if args.calibration is None and not found:
        print(
            f"the expected error and the interval are not calibrated: no {CALIBRATION} beside {args.load_path}; "
            "main-diffusion.py --evaluate makes one"
        )
        return None
    return Calibration.from_json(args.calibration or found[0])


@dataclass(frozen=True)
class Case:
    """An image as it is restored: at its own pixels or, with --resize, on the training grid."""

    mammogram: Mammogram
    grid: Grid | None
    name: str  # a digest of the pixels, whatever the file is called
    reference: np.ndarray  # (H, W): the input
    image: np.ndarray  # (H, W): what is restored; with --degrade the low dose of the input
    mask: torch.Tensor  # (1, H, W) bool, the breast
    noise: NoiseModel | None  # None: not to be matched

    @property
    def intensity(self) -> float:
        """Mean inside the breast of what is restored."""
        return float(self.image[self.mask[0].numpy()].mean())

    def at_own_size(self, pixels: np.ndarray) -> np.ndarray:
        """Restored pixels (H, W) at the size of the mammogram."""
        return pixels if self.grid is None else self.grid.add(pixels - self.reference, self.mammogram.pixels)


def read_case(job: Job, restorer: Restorer, args: argparse.Namespace) -> Case:
    """Read an image, and degrade it where that is asked for. Raises UserError naming the file."""
    mammogram = read_mammogram(job.source)
    image, grid = mammogram.pixels, None
    if min(image.shape) < 16:
        raise UserError(f"{job.source}: {image.shape[1]} x {image.shape[0]} pixels are too few; leave it out")
    if args.resize:
        grid = Grid.fit(image, breast_mask(torch.from_numpy(image)[None])[0].numpy(), restorer.shape)
        image = grid.apply(image)
    name = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
    reference, mask = image, breast_mask(torch.from_numpy(image)[None])
    if args.degrade is not None:
        generator = seeded_generator("degrade", args.seed, name)
        image = simulate_low_dose(torch.from_numpy(reference), args.degrade, generator).numpy()
    return Case(mammogram, grid, name, reference, image, mask, known_noise(args, image, mask[0].numpy()))


def restore_job(job: Job, restorer: Restorer, calibration: Calibration | None, args: argparse.Namespace) -> list[dict]:
    """Restore and write one image; returns its rows of the table: one, or with --degrade one a method.

    Raises UserError naming the file.
    """
    case = read_case(job, restorer, args)
    tile, progress = args.tile or 0, not args.no_tqdm
    try:
        result = restore_image(restorer, case.image, case.noise, case.name, tile=tile, progress=progress)
    except RuntimeError as error:  # how torch says that memory is short, on either device
        if "allocate" not in str(error):
            raise
        raise UserError(f"{job.source}: not enough memory for its tiles; pass a smaller --tile") from None
    unseen = case.noise is not None and case.noise.variance(1.0) <= 0 and is_estimated(args)
    # noise that was not seen may be there all the same, and nobody knows the error
    samples = 0 if unseen else args.samples or 0
    remove_stale(job)
    description = describe(args, restorer, case.noise, restorer.product)
    case.mammogram.write(job.target, case.at_own_size(result.pixels), description)
    for number, sample in enumerate(result.products[:samples], 1):
        what = f"posterior sample number {number} of {samples}, {restorer.sampling}"
        said = describe(args, restorer, case.noise, what)
        case.mammogram.write(job.sample(number), case.at_own_size(sample), said, series=description)
    if samples:
        level = restorer.level_of(case.noise or restorer.noise, case.intensity)
        factor = None if calibration is None else calibration.factor(level)
        clean = None if args.degrade is None else case.reference
        write_maps(job, case.mammogram, result.products, factor, description, clean)
    if args.compare:
        save_picture(compare(case, result, restorer.product, args), job.beside("compare"))
    row = row_of(job, case, result, restorer, args)
    if args.degrade is None:
        return [row]
    images = {INPUT: case.image, restorer.product: result.pixels}
    if args.samples:
        images[f"posterior sample, {restorer.sampling}"] = result.products[0]
    clean = torch.from_numpy(case.reference)[None]
    figures = {name: image_metrics(torch.from_numpy(image)[None], clean, case.mask) for name, image in images.items()}
    return [row | {"patient": "", "method": m, **dataclasses.asdict(figure)} for m, figure in figures.items()]


def row_of(job: Job, case: Case, result: Restoration, restorer: Restorer, args: argparse.Namespace) -> dict:
    """An image's row of restore.csv."""
    height, width = case.mammogram.pixels.shape
    return {
        "path": printable(job.name),
        "output": printable(job.target.relative_to(args.out).as_posix()),
        "product": restorer.product,
        "width": width,
        "height": height,
        "bits": case.mammogram.bits,
        "quanta": None if case.noise is None else case.noise.quanta,
        "sigma": None if case.noise is None else case.noise.sigma,
        "level": None if case.noise is None else level_at(case.noise, case.intensity),
        "factor": result.factor,
        "strength": result.strength,
    }


def is_estimated(args: argparse.Namespace) -> bool:
    """Whether the noise is read off each image."""
    return args.noise_level == "auto" or args.noise_level is args.degrade is None


def known_noise(args: argparse.Namespace, image: np.ndarray, mask: np.ndarray) -> NoiseModel | None:
    """The noise that an image suffers from; None where it is not to be matched."""
    level = args.noise_level if args.noise_level is not None else args.degrade
    if level == "trained":
        return None
    return estimate_noise(image, mask) if level in (None, "auto") else NoiseModel.from_level(level)


def describe(args: argparse.Namespace, restorer: Restorer, noise: NoiseModel | None, product: str) -> str:
    """How an image is restored, and to what, in words."""
    parts = [restorer.name]
    if args.degrade is not None:
        parts.append(f"from a simulated low dose of noise level {args.degrade:g}")
    if noise is not None:
        how = "estimated" if is_estimated(args) else "given"
        strength = f"{noise.quanta:.0f} quanta at full scale and sigma {noise.sigma:.5f}"
        parts.append(f"noise {how} as {strength if noise.variance(1.0) > 0 else 'none'}")
    parts.append(product)
    if args.resize:
        parts.append(f"on a grid of {restorer.shape[1]} x {restorer.shape[0]}")
    return "; ".join([*parts, f"seed {args.seed}", RESEARCH_USE])


def compare(case: Case, result: Restoration, product: str, args: argparse.Namespace) -> torch.Tensor:
    """The side-by-side picture: input and restored, or with --degrade clean, low dose and restored; and the differences."""
    clean, low, restored = (torch.from_numpy(v)[None] for v in (case.reference, case.image, result.pixels))
    if args.degrade is None:
        return comparison(clean, {product: restored}, case.mask, {}, reference="input")
    images = {INPUT: low, product: restored}
    labels = {
        name: f"{image_metrics(picture, clean, case.mask).psnr_breast:.1f} dB in the breast"
        for name, picture in images.items()
    }
    return comparison(clean, images, case.mask, labels)


def printable(name: str) -> str:
    """A file's name for a table; what is not Unicode in it, or would break the line, is replaced."""
    name = os.fsencode(name).decode(errors="replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in name)


def report(rows: list[dict], args: argparse.Namespace, levels: tuple[float, float]) -> None:
    """Write the tables and print them; with --degrade the figures stand beside the input's."""
    images = pd.DataFrame(rows).drop_duplicates("path")
    own = list(images.columns[: list(images.columns).index("strength") + 1])
    write_text(args.out / "restore.csv", images[own].to_csv(index=False, lineterminator="\n"))
    lines = [
        [
            row["path"],
            f"{row['width']} x {row['height']}",
            row["bits"],
            "as trained" if pd.isna(row["level"]) else f"{row['level']:.3f}",
            f"{row['strength']:.2f}",
        ]
        for row in images.head(TABLE_ROWS).to_dict("records")
    ]
    print(format_table(["image", "size", "bits", "noise level", "correction applied"], lines))
    if len(images) > TABLE_ROWS:
        print(f"... and {len(images) - TABLE_ROWS} more in {args.out / 'restore.csv'}")
    remark(images, args, levels)
    if args.degrade is None:
        for name in TABLES[1:]:  # of an earlier run, on other images
            (args.out / name).unlink(missing_ok=True)
        return
    table = pd.DataFrame(rows)
    result = Evaluation(table[["path", "patient", "method", *METRICS]], {"noise_level": args.degrade})
    write_evaluation(result, args.out)
    print(f"\n{len(images)} images, low dose of noise level {args.degrade:g} simulated")
    print(result.table())


def remark(images: pd.DataFrame, args: argparse.Namespace, levels: tuple[float, float]) -> None:
    """Say what is to be known of images whose noise is not seen, or of a level beyond those that were trained."""
    untouched = int((images["strength"] < UNTOUCHED).sum()) if is_estimated(args) else 0
    if untouched:
        print(
            f"{untouched} images look free of noise and are as good as untouched; noise that was resized or compressed "
            "as JPEG does not show: give its --noise-level if you know it"
        )
    if not args.samples:
        return
    if is_estimated(args) and (unseen := int((images["level"] == 0).sum())):
        print(
            f"{unseen} images show no noise to tell an expected error from: no samples and no maps are written of them"
        )
    slack = 1e-3  # a level that was given comes back through its variance
    known = images["level"].between(levels[0] * (1 - slack), levels[1] * (1 + slack))
    if outside := int((images["level"].notna() & (images["level"] > 0) & ~known).sum()):
        print(
            f"{outside} images are of noise levels that the model was not trained at ({levels[0]:g} to {levels[1]:g}): "
            "their expected error and interval are not to be trusted"
        )
