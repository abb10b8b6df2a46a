"""Restore mammograms with a trained model: files or folders of DICOM, PNG, JPEG, TIFF and PGM, at their own size and depth."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from evaluation import INPUT, METRICS, Evaluation, comparison, save_picture, write_evaluation
from helper import (
    Parser,
    UserError,
    device_arguments,
    finish_batch,
    format_table,
    get_device,
    half_precision,
    non_negative_int,
    one_line,
    positive_int,
    record_run,
    run_script,
    seeded_generator,
    tracked,
    write_text,
)
from images import Mammogram, read_mammogram
from metrics import breast_mask, image_metrics
from outputs import MAPS, Job, make_folder, plan, remove_stale, write_maps
from prepared import Grid
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.estimate import estimate_noise, level_at
from restoration import SHIPPED_CALIBRATION, SHIPPED_DIFFUSION, SHIPPED_VQVAE, Restoration, Restorer, restore_image
from uncertainty import Calibration

RESEARCH_USE = "research use only: a restored image is an estimate, not fit for diagnosis"
RECORD = "restore.json"  # in the output folder: how its images were made
TABLES = ("restore.csv", "metrics.csv", "metrics.json", "table.txt")  # what else `report` writes there
UNTOUCHED = 0.2  # mean share of the correction below which an image counts as left alone
LEVELS = 1e-6, 1000.0  # least and greatest noise level: beyond them single precision, and the quanta, run out
CALIBRATION = SHIPPED_CALIBRATION.name  # in a model's folder
TABLE_ROWS = 16  # images that the table on the screen lists at most


def noise_level(text: str) -> float:
    """An argparse type: a noise level, 0 for none."""
    try:
        level = float(text)
    except ValueError:
        level = math.nan
    if level == 0 or LEVELS[0] <= level <= LEVELS[1]:
        return level
    raise argparse.ArgumentTypeError(f"must be 0 or a number from {LEVELS[0]:g} to {LEVELS[1]:g}, not {text!r}")


def noise_level_or_word(text: str) -> float | str:
    """An argparse type: a noise level, or one of two words."""
    if text in ("auto", "trained"):
        return text
    try:
        return noise_level(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(str(error).replace("must be", "must be auto, trained,")) from None


def sample_count(text: str) -> int:
    """An argparse type: a number of samples that have a spread."""
    count = positive_int(text)
    if count == 1:
        raise argparse.ArgumentTypeError("must be at least 2, for their spread; --sample makes one")
    return count


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=f"{__doc__} For {RESEARCH_USE}.", allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, or folders searched for them")
    add("--vqvae-path", type=Path, help="VQ-VAE-2 checkpoint (default: the model in weights/)")
    add("--load-path", type=Path, help="diffusion checkpoint trained on it (default: that in weights/)")
    add("--out", type=Path, required=True, help="output folder; the inputs' tree is kept below it")
    product = parser.add_mutually_exclusive_group()
    product.add_argument(
        "--sample", action="store_true", help="one posterior sample (default: the posterior mean, which is smoother)"
    )
    product.add_argument(
        "--samples",
        type=sample_count,
        metavar="N",
        help="the mean of N posterior samples, each of them, their expected error and a 90 %% interval beside each image",
    )
    add(
        "--sampler",
        choices=("ddim", "dpm++"),
        help="of samples: DDIM or DPM-Solver++ (default: ddim with --sample, dpm++ with --samples)",
    )
    add(
        "--steps",
        type=positive_int,
        metavar="N",
        help="network evaluations a sample (default: the checkpoint's ddim_steps or, with dpm++, fast_steps)",
    )
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="uncertainty.json of an evaluation of the model, for --samples (default: that beside --load-path)",
    )
    add(
        "--noise-level",
        type=noise_level_or_word,
        help="noise of the inputs: a level; auto: estimated from each image (default, or that of --degrade); "
        "trained: as the model was trained, whatever it is",
    )
    add(
        "--degrade",
        type=noise_level,
        metavar="NOISE_LEVEL",
        help="simulate a low dose of full-dose inputs first, and report PSNR and SSIM against them",
    )
    add("--resize", action="store_true", help="work on the training grid, not at the image's own pixels")
    add(
        "--tile",
        type=positive_int,
        help="side of tiles in pixels (default: seven training crops, or the training grid)",
    )
    add("--seed", type=non_negative_int, default=0, help="seed of everything random (default: 0)")
    add("--half", action="store_true", help="on CUDA: the UNets in half precision")
    add("--compare", action="store_true", help="write a side-by-side PNG beside each restored image")
    device_arguments(parser)
    return checked(parser, parser.parse_args())


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the defaults that hang on others; what does not go together ends the script."""
    if (args.vqvae_path is None) != (args.load_path is None):
        given, missing = ("--vqvae-path", "--load-path") if args.load_path is None else ("--load-path", "--vqvae-path")
        parser.error(
            f"{given} needs {missing}: the two stages belong together; leave both out for the model in weights/"
        )
    if args.vqvae_path is None:
        args.vqvae_path, args.load_path = SHIPPED_VQVAE, SHIPPED_DIFFUSION
    if args.calibration and not args.samples:
        parser.error("--calibration goes with --samples, which writes the expected error")
    for flag, value in (("--sampler", args.sampler), ("--steps", args.steps)):
        if value and not (args.sample or args.samples):
            parser.error(f"{flag} goes with --sample or --samples; the posterior mean is not sampled")
    args.sampler = args.sampler or ("dpm++" if args.samples else "ddim")
    return args


# --- one image -------------------------------------------------------------------------------------------------------


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


# --- all of them -----------------------------------------------------------------------------------------------------


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


def main() -> None:
    args = parse_arguments()
    print(RESEARCH_USE)
    calibration = load_calibration(args) if args.samples else None
    try:
        kinds = ("compare",) * args.compare + MAPS * bool(args.samples)
        jobs = plan(args.inputs, args.out, kinds=kinds, samples=args.samples or 0)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be looked at ({error.strerror}); leave it out") from None
    foreign = [name for name in TABLES if (args.out / name).exists() and not (args.out / RECORD).exists()]
    if foreign:
        raise UserError(f"--out: {args.out / foreign[0]} is not of this script's making; choose another folder")
    device = get_device(args.cpu, args.cuda)
    restorer = Restorer.load(
        args.vqvae_path, args.load_path, device, samples=args.samples or int(args.sample), sampler=args.sampler,
        steps=args.steps, seed=args.seed, amp=half_precision(device, args.half),
    )  # fmt: skip
    made = make_folder(args.out)
    rows: list[dict] = []
    failures: list[str] = []
    for job in tracked(jobs, "restore", "image", not args.no_tqdm):
        try:
            rows += restore_job(job, restorer, calibration, args)
        except UserError as error:
            failures.append(one_line(error))
    if rows:
        sampling = dataclasses.asdict(restorer.sampling) if restorer.samples else None
        what = {"model": restorer.name, "product": restorer.product, "sampling": sampling}
        record_run(args.out, restorer.hps, args.seed, RECORD, **what, failures=failures)
        report(rows, args, restorer.levels if restorer.stabilized else (0.0, math.inf))
        print(f"{len({row['path'] for row in rows})} images restored into {args.out}: {restorer.product}")
    else:
        with contextlib.suppress(OSError):  # something is in one of them
            for folder in made:
                folder.rmdir()
    finish_batch(failures, done=len(rows))


if __name__ == "__main__":
    run_script(main)
