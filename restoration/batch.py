"""The images of main-restore.py, one after the other: read, restored, written, and listed in tables."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from evaluation.metrics import ImageMetrics, image_metrics
from evaluation.pictures import comparison, save_picture
from evaluation.table import INPUT, Evaluation, write_evaluation
from evaluation.uncertainty import Calibration
from files.images import Mammogram, read_mammogram
from helper import UserError, counted, format_table, remark_lines, seeded_generator
from preprocessing.breast import breast_mask, clipped_background
from preprocessing.degrade import simulate_dose, simulate_low_dose
from preprocessing.detector import Detector
from preprocessing.estimate import estimate_noise
from preprocessing.grid import Grid
from preprocessing.noise import NoiseModel
from restoration import RESEARCH_USE, SHIPPED_CALIBRATION
from restoration.denoiser import Restoration
from restoration.dose import to_dose
from restoration.outputs import RECORD, TABLES, Job, remove_stale, write_maps
from restoration.restore import restore_image
from restoration.restorer import Restorer
from running.folders import record_run
from running.writing import write_text

CALIBRATION = SHIPPED_CALIBRATION.name  # in a model's folder
TABLE_ROWS = 16  # images that the table on the screen lists at most
LEAST_SIDE = 16  # pixels
SAME_PITCH = 0.01  # of a pixel pitch: what differs by more is another


def load_calibration(args: argparse.Namespace) -> Calibration | None:
    """The calibration of --calibration, or that of the model; None, and a line that says so, if that has none.

    Raises UserError if the file is not one.
    """
    place = args.load_path if args.load_path.is_dir() else args.load_path.parent
    found = [path for path in (place / CALIBRATION, place / "evaluation" / CALIBRATION) if path.is_file()]
    if args.calibration is None and not found:
        missing = f"no {CALIBRATION} beside {args.load_path}; main-diffusion.py --evaluate makes one"
        print(f"the expected error and the interval are not calibrated: {missing}")
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
    mean: float  # of the breast, without clipped air
    noise: NoiseModel | None  # of it, in [0, 1]; None: that of the training, whatever it is
    doubt: str = ""  # why the estimate of the noise is not sure

    @property
    def is_noisy(self) -> bool:
        """Whether the noise is not known to be none."""
        return self.noise is None or not self.noise.is_none

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the noise at the breast's mean, in stored values."""
        if self.noise is None:
            return None
        return abs(self.mammogram.scale.factor) * float(self.noise.variance(torch.tensor(self.mean)).mean()) ** 0.5

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
    detector: Detector | None  # that of --detector
    args: argparse.Namespace
    remarks: dict[str, dict[str, int]] = field(default_factory=dict)  # of the images, by name: see `remark_lines`

    @property
    def simulated(self) -> str:
        """What low dose is made of the inputs, which they are the truth of; empty if none is made."""
        if self.args.dose is not None:
            return f"{100 * self.args.dose:g} % of the dose"
        return "" if self.args.degrade is None else f"noise level {self.args.degrade:g}"

    @property
    def product(self) -> str:
        """What is made of images that show noise, in words."""
        factor = None if self.args.noise_level == 0 else self.args.to_dose
        return self.restorer.product + (f", blended to {factor:g} x the dose" if factor else "")

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
        if args.to_dose is not None and own.is_noisy:
            noise = own.noise or self.restorer.noise
            pixels = to_dose(own.image, result.pixels, noise, args.to_dose, value=own.mean)
            result = dataclasses.replace(result, products=pixels[None].clip(0, 1))  # as it is written
        if not np.isfinite(result.products).all():
            remedy = "check its noise, --detector or --noise-level"
            raise UserError(f"{job.source}: its restoration is not finite; {remedy}")
        self._write(job, own, result)
        images, figures = {self.product: result.pixels}, {}
        clean = torch.from_numpy(own.reference)[None]
        if self.simulated:
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
        mammogram.check_writable()
        self.remarks[str(job.source)] = mammogram.remarks
        image, grid = mammogram.pixels, None
        if min(image.shape) < LEAST_SIDE:
            raise UserError(f"{job.source}: {image.shape[1]} x {image.shape[0]} pixels are too few; leave it out")
        if args.resize:
            grid = Grid.fit(image, breast_mask(torch.from_numpy(image)[None])[0].numpy(), self.restorer.shape)
            image = grid.apply(image)
        name = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        reference, mask = image, breast_mask(torch.from_numpy(image)[None])
        generator = seeded_generator("degrade", args.seed, name)
        if args.degrade is not None:
            image = simulate_low_dose(torch.from_numpy(reference), args.degrade, generator).numpy()
        noise, doubt = self._noise(mammogram, image, mask[0].numpy())
        tissue = mask[0].numpy() & ~clipped_background(reference, np.zeros(image.shape, bool))
        mean = float(image[tissue if tissue.any() else mask[0].numpy()].mean())
        if self.detector is not None and noise.signal(torch.tensor(mean)).mean() < 0:
            stored = f"{mammogram.scale.factor * mean + mammogram.scale.shift:.4g}"
            raise UserError(
                f"{job.source}: its breast, at {stored}, lies on the dark side of the offset {self.detector.offset:.4g} of "
                f"{args.detector}; calibrate on flats that are stored as this image is, or leave --detector out"
            )
        if args.dose is not None:
            if noise is None or noise.is_none:
                reason = doubt or "its noise is not known"
                raise UserError(f"{job.source}: {reason}, so no dose can be simulated; pass --detector")
            low = simulate_dose(torch.from_numpy(reference), args.dose, noise, generator)
            # as bright as the full dose, for both to be compared, and in the range of what can be stored
            image = (noise.offset + (low - noise.offset) / args.dose).numpy().astype(np.float32).clip(0, 1)
            noise = noise.of_dose(args.dose)
        return InputImage(mammogram, grid, name, reference, image, mask, mean, noise, doubt)

    def _noise(self, mammogram: Mammogram, image: np.ndarray, mask: np.ndarray) -> tuple[NoiseModel | None, str]:
        """The noise of an image (H, W) in [0, 1], and why it is not sure, if it is not."""
        args, scale = self.args, mammogram.scale
        if self.detector is not None:
            stored = self.detector.noise(image.shape)
            return stored.scaled(1 / scale.factor, -scale.shift / scale.factor), ""
        if args.noise_level == "trained":
            return None, ""
        if args.noise_level != "auto":
            return NoiseModel.from_level(args.noise_level), ""
        estimate = estimate_noise(image, mask)
        return estimate.noise, estimate.reason

    def _write(self, job: Job, own: InputImage, result: Restoration) -> None:
        args, restorer = self.args, self.restorer
        # noise that was not seen may be there all the same, and nobody knows the error
        samples = args.samples if own.is_noisy or args.noise_level != "auto" else 0
        remove_stale(job)
        description = self._description(own, self._product(own))
        own.mammogram.write(job.target, own.at_own_size(result.pixels), description)
        for number, sample in enumerate(result.products[:samples], 1):
            said = self._description(own, f"posterior sample number {number} of {samples}, {restorer.sampling}")
            own.mammogram.write(job.sample(number), own.at_own_size(sample), said, series=description)
        if samples:
            level, calibration = result.level or restorer.hps.noise_level, self.calibration
            factor = None if calibration is None else calibration.factor(level)
            clean = own.reference if self.simulated else None
            write_maps(job, own.mammogram, result.products, factor, description, clean)

    def _product(self, own: InputImage) -> str:
        """What is made of an image: without noise there is nothing to blend."""
        return self.product if own.is_noisy else self.restorer.product

    def _description(self, own: InputImage, product: str) -> str:
        """How an image is restored, and to what, in words."""
        args, parts = self.args, [self.restorer.name]
        if self.simulated:
            parts.append(f"from a simulated {'low dose of ' * (args.dose is None)}{self.simulated}")
        if own.noise is not None:
            how = "calibrated" if args.detector else "estimated" if args.noise_level == "auto" else "given"
            strength = f"{own.deviation:.3g} stored values at the breast's mean"
            strength = f"{strength}, correlation {own.noise.correlation:.2f}" if own.is_noisy else "none"
            parts.append(f"noise {how} as {strength}")
        parts.append(product)
        if args.resize:
            parts.append(f"on a grid of {self.restorer.shape[1]} x {self.restorer.shape[0]}")
        return "; ".join([*parts, f"seed {args.seed}", RESEARCH_USE])

    def _row(self, job: Job, own: InputImage, result: Restoration) -> dict:
        image, noise, output = own.mammogram, own.noise, job.target.relative_to(self.args.out).as_posix()
        return {
            "path": printable(job.name), "output": printable(output), "product": self._product(own),
            "width": image.pixels.shape[1], "height": image.pixels.shape[0], "bits": image.bits,
            "quanta": noise and noise.quanta, "sigma": noise and noise.sigma, "deviation": own.deviation,
            "correlation": noise and noise.correlation, "level": result.level, "doubt": own.doubt,
            "detector": printable(image.detector), "processed": image.is_processed, "pixel_mm": image.pixel_mm,
            "factor": result.factor, "strength": result.strength,
        }  # fmt: skip

    def finish(self, done: Sequence[Listed], failures: Sequence[str], made: Sequence[Path]) -> None:
        """Write the record and the tables of what was `done`; if it is nothing, remove the folders that were `made` for it."""
        restorer, out = self.restorer, self.args.out
        if not done:
            with contextlib.suppress(OSError):  # something is in one of them
                for folder in made:
                    folder.rmdir()
            return
        sampling = dataclasses.asdict(restorer.sampling) if restorer.samples else None
        product = "; ".join(dict.fromkeys(row["product"] for row, _ in done))
        what = {"model": restorer.name, "product": product, "sampling": sampling}
        record_run(out, restorer.hps, self.args.seed, RECORD, **what, failures=list(failures))
        self.report(done)
        print(f"{counted(len(done), 'image')} restored into {out}: {product}")

    def report(self, done: Sequence[Listed]) -> None:
        """Write the tables and print them; if a low dose was simulated, the figures stand beside the input's."""
        args = self.args
        images = pd.DataFrame([row for row, _ in done])
        write_text(args.out / "restore.csv", images.to_csv(index=False, lineterminator="\n"))
        lines = []
        for row in images.head(TABLE_ROWS).itertuples():
            noise = [row.deviation, row.correlation, row.level]
            noise = ["as trained"] * 3 if pd.isna(row.deviation) else [f"{value:.3g}" for value in noise]
            size = f"{row.width} x {row.height}"
            lines.append([row.path, row.detector, size, row.bits, *noise, f"{row.strength:.2f}"])
        noise = ["noise, stored values", "correlation", "noise level"]
        print(format_table(["image", "detector", "size", "bits", *noise, "correction applied"], lines))
        if len(images) > TABLE_ROWS:
            print(f"... and {len(images) - TABLE_ROWS} more in {args.out / 'restore.csv'}")
        self._remark(images)
        for line in remark_lines(self.remarks):
            print(line, file=sys.stderr)
        if not self.simulated:
            for name in TABLES[1:]:  # of an earlier run, on other images
                (args.out / name).unlink(missing_ok=True)
            return
        rows = [
            {"path": row["path"], "patient": "", "method": method, **dataclasses.asdict(figure)}
            for row, figures in done
            for method, figure in figures.items()
        ]
        what = {"noise_level": args.degrade} if args.dose is None else {"dose": args.dose}
        result = Evaluation(pd.DataFrame(rows), what)
        write_evaluation(result, args.out)
        print(f"\n{counted(len(images), 'image')}, low dose of {self.simulated} simulated")
        print(result.table())
        if args.dose is not None:
            print("the full dose that these figures compare with is no truth: it has noise of its own")

    def _remark(self, images: pd.DataFrame) -> None:
        """Print what is not known of images: their noise, or how to restore its level."""
        args = self.args
        if self.detector is not None:
            for words, marked in self._unlike(images, self.detector).items():
                if count := int(marked.sum()):
                    print(f"{args.detector} does not describe {counted(count, 'image')}: {words}")
        is_estimated = self.detector is None and args.noise_level == "auto"
        for reason, doubtful in images[images["doubt"] != ""].groupby("doubt") if is_estimated else ():
            remedy = "give --detector, or --noise-level if you know it"
            print(f"the noise of {counted(len(doubtful), 'image')} is not sure: {reason}; {remedy}")
        low, high = self.restorer.level_range if self.restorer.stabilized else (0.0, math.inf)
        level, deviation = images["level"].astype(float), images["deviation"].astype(float)
        # a level that was given comes back through its variance
        outside = level.notna() & (deviation > 0) & ~level.between(low * 0.999, high * 1.001)
        unseen, sampled = deviation == 0, args.samples > 0
        are, show = ("image is", "images are"), ("image shows", "images show")
        for marked, what, words in (
            (images["processed"] & is_estimated, are, "processed for presentation: the estimate takes the noise as it stands, "
             "but processing leaves it neither Poisson nor alike all over; restore the FOR PROCESSING image if you have it"),
            (unseen & (args.to_dose is not None), show, "no noise, so nothing is blended"),
            (unseen & sampled, show, "no noise to tell an expected error from: no samples and no maps are written of them"),
            (outside & sampled, are, f"of noise levels that the model was not trained at ({low:g} to {high:g}): their expected "
             "error and interval are not to be trusted"),
        ):  # fmt: skip
            if count := int(marked.sum()):
                print(f"{counted(count, *what)} {words}")

    def _unlike(self, images: pd.DataFrame, detector: Detector) -> dict[str, pd.Series]:
        """Which images are not what the detector's file describes, by why."""
        pitch, (rows, columns) = detector.pixel_mm or math.nan, detector.shape or (math.nan, math.nan)
        apart = (images["pixel_mm"].astype(float) - pitch).abs()
        moved = (images["height"] - rows).abs() + (images["width"] - columns).abs()
        name, names = printable(detector.name), images["detector"]
        stretched = f"{columns} x {rows}, so the gain map is stretched; take flats of the image's size"
        return {
            "processed for presentation; restore the image FOR PROCESSING": images["processed"],
            f"of another detector than {name}; calibrate that one": (names != "") & (names != name) & (name != ""),
            f"of another pixel pitch than {pitch:g} mm; calibrate at that pitch": apart > SAME_PITCH * pitch,
            f"of another size than its flats, {stretched}": (moved > 0) & (detector.gain_map is not None),
            "of 8 bits, which no detector stores; restore the raw image": images["bits"] <= 8,
        }


def printable(name: str) -> str:
    """A file's name for a table; what is not Unicode in it, or would break the line, is replaced."""
    name = os.fsencode(name).decode(errors="replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in name)
