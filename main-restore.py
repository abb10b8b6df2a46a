"""Restore mammograms with a trained model: files or folders of DICOM, PNG, JPEG, TIFF and PGM, at their own size and depth."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

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
from images import find_images, is_dicom, is_restored, read_mammogram
from metrics import breast_mask, image_metrics
from prepared import Grid
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.estimate import estimate_noise, level_at
from restoration import SHIPPED_CALIBRATION, SHIPPED_DIFFUSION, SHIPPED_VQVAE, Restoration, Restorer, restore_image
from uncertainty import Calibration, predict
from uncertainty import picture as uncertainty_picture

RESEARCH_USE = "research use only: a restored image is an estimate, not fit for diagnosis"
RECORD = "restore.json"  # in the output folder: how its images were made
TABLES = ("restore.csv", "metrics.csv", "metrics.json", "table.txt")  # what else `report` writes there
UNTOUCHED = 0.2  # mean share of the correction below which an image counts as left alone
LEVELS = 1e-6, 1000.0  # least and greatest noise level: beyond them single precision, and the quanta, run out
CALIBRATION = SHIPPED_CALIBRATION.name  # in a model's folder
MAPS = ("std", "low", "high", "uncertainty")  # kinds of pictures that --samples writes beside an image
LEGENDS = {
    "std": "expected error, 65535 at a tenth of full scale",
    "low": "lower end of the 90 % interval, 65535 at full scale",
    "high": "upper end of the 90 % interval, 65535 at full scale",
}
STD_SCALE = 10.0  # the expected error is written so many times as bright, for 16 bits to hold it
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


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=f"{__doc__} For {RESEARCH_USE}.", allow_abbrev=False)
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="image files, or folders searched for them"
    )
    parser.add_argument("--vqvae-path", type=Path, help="VQ-VAE-2 checkpoint (default: the model in weights/)")
    parser.add_argument("--load-path", type=Path, help="diffusion checkpoint trained on it (default: that in weights/)")
    parser.add_argument("--out", type=Path, required=True, help="output folder; the inputs' tree is kept below it")
    parser.add_argument(
        "--noise-level",
        type=noise_level_or_word,
        help="noise of the inputs: a level; auto: estimated from each image (default, or that of --degrade); "
        "trained: as the model was trained, whatever it is",
    )
    parser.add_argument(
        "--degrade",
        type=noise_level,
        metavar="NOISE_LEVEL",
        help="simulate a low dose of full-dose inputs first, and report PSNR and SSIM against them",
    )
    parser.add_argument(
        "--resize", action="store_true", help="work on the training grid, not at the image's own pixels"
    )
    parser.add_argument(
        "--tile",
        type=positive_int,
        help="side of the tiles in pixels (default: seven training crops, or the training grid)",
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        help="network evaluations a sample (default: 1, the posterior mean; with --samples the checkpoint's DDIM steps)",
    )
    parser.add_argument(
        "--samples",
        type=positive_int,
        help="samples to average, and write the expected error and a 90 %% interval beside each image; 1: of the posterior mean",
    )
    parser.add_argument(
        "--views",
        type=int,
        choices=range(1, 9),
        metavar="1..8",
        help="orientations of the image that are restored and averaged (default: the checkpoint's, 1)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="uncertainty.json of an evaluation of the model, for --samples (default: that beside --load-path)",
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--half", action="store_true", help="on CUDA: the UNet in half precision")
    parser.add_argument("--compare", action="store_true", help="write a side-by-side PNG beside each restored image")
    device_arguments(parser)
    args = parser.parse_args()
    if (args.vqvae_path is None) != (args.load_path is None):
        given, missing = ("--vqvae-path", "--load-path") if args.load_path is None else ("--load-path", "--vqvae-path")
        parser.error(
            f"{given} needs {missing}: the two stages belong together; leave both out for the model in weights/"
        )
    if args.vqvae_path is None:
        args.vqvae_path, args.load_path = SHIPPED_VQVAE, SHIPPED_DIFFUSION
    if args.calibration and not args.samples:
        parser.error("--calibration goes with --samples, which writes the expected error")
    return args


# --- what goes where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """An image to restore."""

    source: Path
    name: str  # path below the inputs' common folder, with forward slashes
    target: Path  # what is written

    def beside(self, kind: str) -> Path:
        """Where a picture of a kind (`compare`, or one of `MAPS`) is written."""
        return self.target.with_name(f"{self.target.name.removesuffix('.png')}.{kind}.png")


def plan(inputs: list[Path], out: Path, *, kinds: Sequence[str] = ()) -> list[Job]:
    """The images of files and folders, each once, and where they go: the tree below the inputs' common folder is kept.

    Pictures become PNG, DICOM stays DICOM; where two would come to the same name, what changes keeps its suffix too. What
    lies in `out` is no input, nor are restored images in a folder. Raises UserError for an input that does not exist, a
    folder without images, or a target, pictures of the `kinds` beside it too, that is an input or not of this script's
    making.
    """
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
    roots = [(path if path.is_dir() else path.parent).resolve() for path in inputs]
    base = os.path.commonpath(roots)
    sources: dict[Path, Path] = {}
    names: dict[Path, str] = {}
    for path, root in zip(inputs, roots, strict=True):
        found = [path]
        if path.is_dir():
            if root.is_relative_to(out.resolve()):
                raise UserError(f"--out {out}: holds the input folder {path}; choose another folder")
            inside = [p for p in find_images(path) if not p.resolve().is_relative_to(out.resolve())]
            # a link does not take the place of the file it leads to
            found = sorted((p for p in inside if not is_restored(p)), key=Path.is_symlink)
            if earlier := len(inside) - len(found):
                print(f"{path}: {earlier} restored images in it are passed over")
            if not found:
                raise UserError(f"{path}: nothing but restored images in it; name a folder of mammograms")
        for source in found:
            # the name that a link has here, not that of what it leads to
            name = root / (source.relative_to(path) if path.is_dir() else source.name)
            names.setdefault(source.resolve(), name.relative_to(base).as_posix())
            sources.setdefault(source.resolve(), source)
    suffixes = {place: ".dcm" if is_dicom(place) else ".png" for place in sources}
    plain = {place: _stem(name) + suffixes[place] for place, name in names.items()}
    taken = Counter(plain.values())
    jobs, writers = [], dict[Path, Path]()
    for place, source in sources.items():
        below = plain[place]
        if taken[below] > 1 and below != names[place]:
            below = names[place] + suffixes[place]
        job = Job(source, names[place], out / below)
        known = job.target.exists() and is_restored(job.target)
        for target in (job.target, *(job.beside(kind) for kind in kinds)):
            other = writers.setdefault(target, source)
            if other is not source:
                raise UserError(f"{source}: would be written to {target}, as {other}; restore them into two folders")
            if target.resolve() in sources:
                raise UserError(f"--out: {target} is an input and is not overwritten; choose another folder")
            if target.exists() and not known:
                raise UserError(f"--out: {target} is no restored image and is not overwritten; choose another folder")
        jobs.append(job)
    return jobs


def _stem(name: str) -> str:
    suffix = Path(name).suffix[1:]
    # digits after a dot are part of a UID, which DICOM files without a suffix are called
    return name if not suffix or suffix.isdigit() else str(Path(name).with_suffix(""))


def is_beside_an_image(path: Path, kind: str) -> bool:
    """Whether a file is what this script writes as `kind` beside an image, and not a restored image that is called so."""
    if not is_restored(path):
        return False
    with Image.open(path) as picture:
        legend = LEGENDS.get(kind)
        return picture.mode == "RGB" if legend is None else picture.info.get("Description", "").startswith(legend)


# --- one image -------------------------------------------------------------------------------------------------------


def load_calibration(args: argparse.Namespace) -> Calibration | None:
    """The calibration of --calibration, or that of the model; None, and a line that says so, where that has none.

    Raises UserError where a file is none.
    """
    place = args.load_path if args.load_path.is_dir() else args.load_path.parent
    found = [path for path in (place / CALIBRATION, place / "evaluation" / CALIBRATION) if path.is_file()]
    if args.calibration is None and not found:
        print(
            f"no expected error is written: no {CALIBRATION} beside {args.load_path}; main-diffusion.py --evaluate makes one"
        )
        return None
    return Calibration.from_json(args.calibration or found[0])


def restore_job(job: Job, restorer: Restorer, calibration: Calibration | None, args: argparse.Namespace) -> list[dict]:
    """Restore and write one image; returns its rows of the table: one, or with --degrade one a method.

    Raises UserError naming the file.
    """
    mammogram = read_mammogram(job.source)
    if min(mammogram.pixels.shape) < 16:
        height, width = mammogram.pixels.shape
        raise UserError(f"{job.source}: {width} x {height} pixels are too few; leave it out")
    image, grid = mammogram.pixels, None
    if args.resize:
        mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
        grid = Grid.fit(image, mask, restorer.shape)
        image = grid.apply(image)
    name = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()  # whatever the file is called
    reference = image
    if args.degrade is not None:
        generator = seeded_generator("degrade", args.seed, name)
        image = simulate_low_dose(torch.from_numpy(reference), args.degrade, generator).numpy()
    mask = breast_mask(torch.from_numpy(reference)[None])
    noise = known_noise(args, image, mask[0].numpy())
    unseen = noise is not None and noise.variance(1.0) <= 0 and is_estimated(args)
    try:
        result = restore_image(restorer, image, noise, name, tile=args.tile or 0, progress=not args.no_tqdm)
    except RuntimeError as error:  # how torch says that memory is short, on either device
        if "allocate" not in str(error):
            raise
        raise UserError(f"{job.source}: not enough memory for its tiles; pass a smaller --tile") from None
    pixels = result.pixels if grid is None else grid.add(result.pixels - reference, mammogram.pixels)
    description = f"{describe(args, restorer, noise)}; {RESEARCH_USE}"
    # noise that was not seen may be there all the same, and nobody knows the error
    mapped = calibration is not None and not unseen
    for kind, is_made in {"compare": args.compare, **dict.fromkeys(MAPS, mapped)}.items():
        # of an earlier run: it would speak of another restoration than the one beside it
        if not is_made and is_beside_an_image(job.beside(kind), kind):
            job.beside(kind).unlink()
    if mapped:
        # images of another size than the file's, on the training grid, keep theirs
        interval = predict(calibration, image, result.pixels, noise or restorer.noise)
        plain = dataclasses.replace(mammogram, pixels=result.pixels, bits=16, header=None, padding=None)
        for kind, values in (("std", interval.std * STD_SCALE), ("low", interval.low), ("high", interval.high)):
            plain.write(job.beside(kind), values, f"{LEGENDS[kind]}; {description}")
        save_picture(
            uncertainty_picture(None if args.degrade is None else reference, interval), job.beside("uncertainty")
        )
    mammogram.write(job.target, pixels, description)
    height, width = mammogram.pixels.shape
    row = {
        "path": printable(job.name),
        "output": printable(job.target.relative_to(args.out).as_posix()),
        "width": width,
        "height": height,
        "bits": mammogram.bits,
        "quanta": None if noise is None else noise.quanta,
        "sigma": None if noise is None else noise.sigma,
        "level": None if noise is None else level_at(noise, float(image[mask[0].numpy()].mean())),
        "factor": result.factor,
        "strength": result.strength,
    }
    if args.compare:
        picture = compare(reference, image, result, mask, args)
        save_picture(picture, job.beside("compare"))
    if args.degrade is None:
        return [row]
    clean = torch.from_numpy(reference)[None]
    figures = {
        method: image_metrics(torch.from_numpy(values)[None], clean, mask)
        for method, values in ((INPUT, image), ("restored", result.pixels))
    }
    return [row | {"patient": "", "method": m, **dataclasses.asdict(figure)} for m, figure in figures.items()]


def is_estimated(args: argparse.Namespace) -> bool:
    """Whether the noise is read off each image."""
    return args.noise_level == "auto" or args.noise_level is args.degrade is None


def known_noise(args: argparse.Namespace, image: np.ndarray, mask: np.ndarray) -> NoiseModel | None:
    """The noise that an image suffers from; None where it is not to be matched."""
    level = args.noise_level if args.noise_level is not None else args.degrade
    if level == "trained":
        return None
    return estimate_noise(image, mask) if level in (None, "auto") else NoiseModel.from_level(level)


def describe(args: argparse.Namespace, restorer: Restorer, noise: NoiseModel | None) -> str:
    """How an image is restored, in words."""
    parts = [restorer.name]
    if args.degrade is not None:
        parts.append(f"from a simulated low dose of noise level {args.degrade:g}")
    if noise is not None:
        how = "estimated" if is_estimated(args) else "given"
        strength = f"{noise.quanta:.0f} quanta at full scale and sigma {noise.sigma:.5f}"
        parts.append(f"noise {how} as {strength if noise.variance(1.0) > 0 else 'none'}")
    evaluations = "1 evaluation" if restorer.steps == 1 else f"{restorer.steps} DDIM steps"
    evaluations += f", mean of {restorer.samples} samples" if restorer.samples > 1 else ""
    parts.append(f"{evaluations}, mean over {restorer.views} orientations" if restorer.views > 1 else evaluations)
    if args.resize:
        parts.append(f"on a grid of {restorer.shape[1]} x {restorer.shape[0]}")
    return "; ".join([*parts, f"seed {args.seed}"])


def compare(
    reference: np.ndarray, image: np.ndarray, result: Restoration, mask: torch.Tensor, args: argparse.Namespace
) -> torch.Tensor:
    """The side-by-side picture: input and restored, or with --degrade clean, low dose and restored; and the differences."""
    clean, low, restored = (torch.from_numpy(v)[None] for v in (reference, image, result.pixels))
    if args.degrade is None:
        return comparison(clean, {"restored": restored}, mask, {}, reference="input")
    images = {INPUT: low, "restored": restored}
    labels = {
        name: f"{image_metrics(picture, clean, mask).psnr_breast:.1f} dB in the breast"
        for name, picture in images.items()
    }
    return comparison(clean, images, mask, labels)


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
    untouched = [row["path"] for row in images.to_dict("records") if row["strength"] < UNTOUCHED]
    print(format_table(["image", "size", "bits", "noise level", "correction applied"], lines))
    if len(images) > TABLE_ROWS:
        print(f"... and {len(images) - TABLE_ROWS} more in {args.out / 'restore.csv'}")
    if untouched and is_estimated(args):
        print(
            f"{len(untouched)} images look free of noise and are as good as untouched; noise that was resized or compressed "
            "as JPEG does not show: give its --noise-level if you know it"
        )
    if unseen := int((images["level"] == 0).sum()) if args.samples and is_estimated(args) else 0:
        print(f"{unseen} images show no noise to tell an expected error from: no maps of it are written")
    slack = 1e-3  # a level that was given comes back through its variance
    known = images["level"].between(levels[0] * (1 - slack), levels[1] * (1 + slack))
    outside = images["level"].notna() & (images["level"] > 0) & ~known
    if args.samples and outside.any():
        print(
            f"{int(outside.sum())} images are of noise levels that the model was not trained at ({levels[0]:g} to {levels[1]:g}): "
            "their expected error and interval are not to be trusted"
        )
    if args.degrade is None:
        for name in TABLES[1:]:  # of an earlier run, on other images
            (args.out / name).unlink(missing_ok=True)
    else:
        table = pd.DataFrame(rows)
        result = Evaluation(table[["path", "patient", "method", *METRICS]], {"noise_level": args.degrade})
        write_evaluation(result, args.out)
        print(f"\n{len(images)} images, low dose of noise level {args.degrade:g} simulated")
        print(result.table())


def main() -> None:
    args = parse_arguments()
    print(RESEARCH_USE)
    calibration = load_calibration(args) if args.samples else None
    try:
        jobs = plan(args.inputs, args.out, kinds=(*(("compare",) * args.compare), *(MAPS if calibration else ())))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be looked at ({error.strerror}); leave it out") from None
    foreign = [name for name in TABLES if (args.out / name).exists() and not (args.out / RECORD).exists()]
    if foreign:
        raise UserError(f"--out: {args.out / foreign[0]} is not of this script's making; choose another folder")
    device = get_device(args.cpu, args.cuda)
    restorer = Restorer.load(
        args.vqvae_path, args.load_path, device, steps=args.steps, samples=args.samples or 1, views=args.views,
        seed=args.seed, amp=half_precision(device, args.half),
    )  # fmt: skip
    try:
        made = [folder for folder in (args.out, *args.out.parents) if not folder.exists()]
        args.out.mkdir(parents=True, exist_ok=True)
        if not os.access(args.out, os.W_OK):
            raise UserError(f"--out {args.out}: may not be written to; choose another folder")
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be made ({error.strerror}); choose another folder") from None
    rows: list[dict] = []
    failures: list[str] = []
    for job in tracked(jobs, "restore", "image", not args.no_tqdm):
        try:
            rows += restore_job(job, restorer, calibration, args)
        except UserError as error:
            failures.append(one_line(error))
    if rows:
        record_run(args.out, restorer.hps, args.seed, RECORD, model=restorer.name, failures=failures)
        report(rows, args, restorer.levels if restorer.stabilized else (0.0, math.inf))
        print(f"{len({row['path'] for row in rows})} images restored into {args.out}")
    else:
        with contextlib.suppress(OSError):  # something is in one of them
            for folder in made:
                folder.rmdir()
    finish_batch(failures, done=len(rows))


if __name__ == "__main__":
    run_script(main)
