"""Restore mammograms with a trained model: files or folders of DICOM, PNG, JPEG, TIFF and PGM, at their own size and depth."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from pathlib import Path

from helper import UserError, get_device, half_precision, one_line, tracked
from restoration.batch import RECORD, RESEARCH_USE, TABLES, load_calibration, report, restore_job
from restoration.outputs import MAPS, make_folder, plan
from restoration.restorer import SHIPPED_DIFFUSION, SHIPPED_VQVAE, Restorer
from running.command_line import Parser, device_arguments, non_negative_int, positive_int
from running.folders import record_run
from running.scripts import finish_batch, run_script

LEVELS = 1e-6, 1000.0  # least and greatest noise level: beyond them single precision, and the quanta, run out


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
