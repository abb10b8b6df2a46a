"""The images of main-restore.py, one after the other: read, restored, written, and listed in tables."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from evaluation.metrics import ImageMetrics, image_metrics
from evaluation.pictures import comparison, save_picture
from evaluation.table import INPUT, Evaluation, write_evaluation
from evaluation.uncertainty import Calibration
from files.images import Mammogram, read_mammogram
from helper import UserError, format_table, seeded_generator
from preprocessing.breast import breast_mask
from preprocessing.degrade import simulate_low_dose
from preprocessing.estimate import estimate_noise, level_at
from preprocessing.grid import Grid
from preprocessing.noise import NoiseModel
from restoration.denoiser import Restoration
from restoration.outputs import TABLES, Job, remove_stale, write_maps
from restoration.restore import restore_image
from restoration.restorer import SHIPPED_CALIBRATION, Restorer
from running.writing import write_text

RESEARCH_USE = "research use only: a restored image is an estimate, not fit for diagnosis"
UNTOUCHED = 0.2  # mean share of the correction below which an image counts as left alone
CALIBRATION = SHIPPED_CALIBRATION.name  # in a model's folder
TABLE_ROWS = 16  # images that the table on the screen lists at most
LEAST_SIDE = 16  # pixels


def load_calibration(args: argparse.Namespace) -> Calibration | None:
    """The calibration of --calibration, or that of the model; None, and a line that says so, if that has none.

    Raises UserError if the file is not one.
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
class InputImage:
    """An image as it is restored: at its own pixels or, with --resize, on the training grid."""

    mammogram: Mammogram
    grid: Grid | None
    name: str  # a digest of the pixels, whatever the file is called
    reference: np.ndarray  # (H, W): the input
    image: np.ndarray  # (H, W): what is restored; with --degrade the low dose of the input
    mask: torch.Tensor  # (1, H, W) bool, the breast
    noise: NoiseModel | None  # None: that of the training, whatever it is

    @property
    def intensity(self) -> float:
        """Mean inside the breast of what is restored."""
        return float(self.image[self.mask[0].numpy()].mean())

    @property
    def is_noisy(self) -> bool:
        """Whether the noise is not known to be none."""
        return self.noise is None or self.noise.variance(1.0) > 0

    def at_own_size(self, pixels: np.ndarray) -> np.ndarray:
        """Restored pixels (H, W) at the size of the mammogram."""
        return pixels if self.grid is None else self.grid.add(pixels - self.reference, self.mammogram.pixels)


# What the tables list of an image: its row of restore.csv and, with --degrade, its figures by method, the low dose first.
Listed = tuple[dict, dict[str, ImageMetrics]]


@dataclass(frozen=True)
class BatchRestorer:
    """Restores files one after the other, as the arguments of main-restore.py ask for."""

    restorer: Restorer
    calibration: Calibration | None
    args: argparse.Namespace

    def restore(self, job: Job) -> Listed:
        """Restore an image, and write it and what belongs beside it. Raises UserError naming the file."""
        args, own = self.args, self._read(job)
        how = dict(tile=args.tile, progress=not args.no_tqdm)
        try:
            result = restore_image(self.restorer, own.image, own.noise, own.name, **how)
        except RuntimeError as error:  # how torch says that memory is short, on either device
            if "allocate" not in str(error):
                raise
            raise UserError(f"{job.source}: not enough memory for its tiles; pass a smaller --tile") from None
        self._write(job, own, result)
        images, figures = {self.restorer.product: result.pixels}, {}
        clean = torch.from_numpy(own.reference)[None]
        if args.degrade is not None:
            images = {INPUT: own.image} | images
            sample = {f"posterior sample, {self.restorer.sampling}": result.products[0]} if args.samples else {}
            for method, image in (images | sample).items():
                figures[method] = image_metrics(torch.from_numpy(image)[None], clean, own.mask)
        if args.compare:
            columns = {method: torch.from_numpy(image)[None] for method, image in images.items()}
            labels = {method: f"{figure.psnr_breast:.1f} dB in the breast" for method, figure in figures.items()}
            picture = comparison(clean, columns, own.mask, labels, "clean" if figures else "input")
            save_picture(picture, job.beside("compare"))
        return self._row(job, own, result), figures

    def _read(self, job: Job) -> InputImage:
        args, mammogram = self.args, read_mammogram(job.source)
        image, grid = mammogram.pixels, None
        if min(image.shape) < LEAST_SIDE:
            raise UserError(f"{job.source}: {image.shape[1]} x {image.shape[0]} pixels are too few; leave it out")
        if args.resize:
            grid = Grid.fit(image, breast_mask(torch.from_numpy(image)[None])[0].numpy(), self.restorer.shape)
            image = grid.apply(image)
        name = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        reference, mask = image, breast_mask(torch.from_numpy(image)[None])
        if args.degrade is not None:
            generator = seeded_generator("degrade", args.seed, name)
            image = simulate_low_dose(torch.from_numpy(reference), args.degrade, generator).numpy()
        if args.noise_level == "trained":
            noise = None
        elif args.noise_level == "auto":
            noise = estimate_noise(image, mask[0].numpy())
        else:
            noise = NoiseModel.from_level(args.noise_level)
        return InputImage(mammogram, grid, name, reference, image, mask, noise)

    def _write(self, job: Job, own: InputImage, result: Restoration) -> None:
        args, restorer = self.args, self.restorer
        # noise that was not seen may be there all the same, and nobody knows the error
        samples = args.samples if own.is_noisy or args.noise_level != "auto" else 0
        remove_stale(job)
        description = self._description(own, restorer.product)
        own.mammogram.write(job.target, own.at_own_size(result.pixels), description)
        for number, sample in enumerate(result.products[:samples], 1):
            said = self._description(own, f"posterior sample number {number} of {samples}, {restorer.sampling}")
            own.mammogram.write(job.sample(number), own.at_own_size(sample), said, series=description)
        if samples:
            level = restorer.level_of(own.noise or restorer.noise, own.intensity)
            factor = None if self.calibration is None else self.calibration.factor(level)
            clean = None if args.degrade is None else own.reference
            write_maps(job, own.mammogram, result.products, factor, description, clean)

    def _description(self, own: InputImage, product: str) -> str:
        """How an image is restored, and to what, in words."""
        args, parts = self.args, [self.restorer.name]
        if args.degrade is not None:
            parts.append(f"from a simulated low dose of noise level {args.degrade:g}")
        if own.noise is not None:
            how = "estimated" if args.noise_level == "auto" else "given"
            strength = f"{own.noise.quanta:.0f} quanta at full scale and sigma {own.noise.sigma:.5f}"
            parts.append(f"noise {how} as {strength if own.is_noisy else 'none'}")
        parts.append(product)
        if args.resize:
            parts.append(f"on a grid of {self.restorer.shape[1]} x {self.restorer.shape[0]}")
        return "; ".join([*parts, f"seed {args.seed}", RESEARCH_USE])

    def _row(self, job: Job, own: InputImage, result: Restoration) -> dict:
        height, width = own.mammogram.pixels.shape
        return {
            "path": printable(job.name),
            "output": printable(job.target.relative_to(self.args.out).as_posix()),
            "product": self.restorer.product,
            "width": width,
            "height": height,
            "bits": own.mammogram.bits,
            "quanta": None if own.noise is None else own.noise.quanta,
            "sigma": None if own.noise is None else own.noise.sigma,
            "level": None if own.noise is None else level_at(own.noise, own.intensity),
            "factor": result.factor,
            "strength": result.strength,
        }

    def report(self, done: Sequence[Listed]) -> None:
        """Write the tables and print them; with --degrade the figures stand beside the input's."""
        out, degrade = self.args.out, self.args.degrade
        images = pd.DataFrame([row for row, _ in done])
        write_text(out / "restore.csv", images.to_csv(index=False, lineterminator="\n"))
        lines = []
        for row in images.head(TABLE_ROWS).itertuples():
            level = "as trained" if pd.isna(row.level) else f"{row.level:.3f}"
            lines.append([row.path, f"{row.width} x {row.height}", row.bits, level, f"{row.strength:.2f}"])
        print(format_table(["image", "size", "bits", "noise level", "correction applied"], lines))
        if len(images) > TABLE_ROWS:
            print(f"... and {len(images) - TABLE_ROWS} more in {out / 'restore.csv'}")
        self._remark(images)
        if degrade is None:
            for name in TABLES[1:]:  # of an earlier run, on other images
                (out / name).unlink(missing_ok=True)
            return
        rows = [
            {"path": row["path"], "patient": "", "method": method, **dataclasses.asdict(figure)}
            for row, figures in done
            for method, figure in figures.items()
        ]
        result = Evaluation(pd.DataFrame(rows), {"noise_level": degrade})
        write_evaluation(result, out)
        print(f"\n{len(images)} images, low dose of noise level {degrade:g} simulated")
        print(result.table())

    def _remark(self, images: pd.DataFrame) -> None:
        """Print how many images show no noise, or are of a noise level that the model does not know."""
        is_estimated = self.args.noise_level == "auto"
        if is_estimated and (untouched := int((images["strength"] < UNTOUCHED).sum())):
            print(
                f"{untouched} images look free of noise and are as good as untouched; noise that was resized or compressed "
                "as JPEG does not show: give its --noise-level if you know it"
            )
        if not self.args.samples:
            return
        if is_estimated and (unseen := int((images["level"] == 0).sum())):
            print(
                f"{unseen} images show no noise to tell an expected error from: no samples and no maps are written of them"
            )
        low, high = self.restorer.level_range if self.restorer.stabilized else (0.0, math.inf)
        slack = 1e-3  # a level that was given comes back through its variance
        known = images["level"].between(low * (1 - slack), high * (1 + slack))
        if outside := int((images["level"].notna() & (images["level"] > 0) & ~known).sum()):
            print(
                f"{outside} images are of noise levels that the model was not trained at ({low:g} to {high:g}): "
                "their expected error and interval are not to be trusted"
            )


def printable(name: str) -> str:
    """A file's name for a table; what is not Unicode in it, or would break the line, is replaced."""
    name = os.fsencode(name).decode(errors="replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in name)
