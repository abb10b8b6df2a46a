"""Restore mammograms with a trained model: files or folders of DICOM, PNG, JPEG, TIFF and PGM, at their own size and depth."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from helper import UserError, get_device, one_line, sampling_dtype, tracked
from restoration import RESEARCH_USE, SHIPPED_DIFFUSION, SHIPPED_VQVAE
from running.command_line import (
    Parser,
    device_arguments,
    dose_factor,
    non_negative_int,
    number,
    path_argument,
    positive_int,
    precision_arguments,
    refuse_missing,
)
from running.scripts import finish_batch, run_script

LEVEL_RANGE = 1e-6, 1000.0  # of noise levels: beyond it single precision, and the quanta, run out


def noise_level(*words: str) -> Callable[[str], float | str]:
    """An argparse type: a noise level, 0 for none, or one of some words."""
    least, most = LEVEL_RANGE
    said = f"0 or a number from {least:g} to {most:g}"
    return number(said, lambda level: level == 0 or least <= level <= most, *words)


def sample_count(text: str) -> int:
    """An argparse type: a number of samples that have a spread."""
    count = positive_int(text)
    if count == 1:
        raise argparse.ArgumentTypeError("must be at least 2, for their spread; --sample makes one")
    return count


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=f"{__doc__} For {RESEARCH_USE}.", allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", type=path_argument, metavar="INPUT", help="image files, or folders searched for them")
    add("--vqvae-path", type=path_argument, help="VQ-VAE-2 checkpoint (default: the model in weights/)")
    add("--load-path", type=path_argument, help="diffusion checkpoint trained on it (default: that in weights/)")
    add("--out", type=path_argument, required=True, help="output folder; the inputs' tree is kept below it")
    product = parser.add_mutually_exclusive_group()
    product.add_argument(
        "--sample", action="store_true", help="one posterior sample (default: the posterior mean, which is smoother)"
    )
    product.add_argument(
        "--samples", type=sample_count, metavar="N", default=0,
        help="the mean of N posterior samples, each of them, their expected error and a 90 %% interval beside each image",
    )  # fmt: skip
    add(
        "--sampler", choices=("ddim", "dpm++"),
        help="of samples: DDIM or DPM-Solver++ (default: ddim with --sample, dpm++ with --samples)",
    )  # fmt: skip
    add(
        "--steps", type=positive_int, metavar="N",
        help="network evaluations a sample (default: the checkpoint's ddim_steps or, with dpm++, fast_steps)",
    )  # fmt: skip
    add(
        "--calibration", type=path_argument, metavar="FILE",
        help="uncertainty.json of an evaluation of the model, for --samples (default: that beside --load-path)",
    )  # fmt: skip
    add(
        "--noise-level", type=noise_level("auto", "trained"),
        help="noise of the inputs: a level; auto: estimated from each image (default, or that of --degrade); "
        "trained: as the model was trained, whatever it is",
    )  # fmt: skip
    add(
        "--degrade", type=noise_level(), metavar="NOISE_LEVEL",
        help="simulate a low dose of full-dose inputs first, and report PSNR and SSIM against them",
    )  # fmt: skip
    add(
        "--detector", type=path_argument, metavar="FILE",
        help="noise of the inputs: detector.json of preprocessing/calibrate.py, which measures it on flat fields",
    )  # fmt: skip
    add(
        "--dose", type=number("a fraction from 0.01 to below 1", lambda f: 0.01 <= f < 1), metavar="FRACTION",
        help="simulate that fraction of the dose of full-dose inputs first, by their own noise, and report PSNR and SSIM",
    )  # fmt: skip
    add(
        "--to-dose", type=dose_factor, metavar="FACTOR",
        help="blend the restoration with the input, to the noise of so many times its dose (default: as little as there can be)",
    )  # fmt: skip
    add("--resize", action="store_true", help="work on the training grid, not at the image's own pixels")
    tile_help = "side of tiles in pixels, raised to a multiple of the model's (default: seven training crops, or the training grid)"
    add("--tile", type=positive_int, default=0, help=tile_help)
    add("--seed", type=non_negative_int, default=0, help="seed of everything random (default: 0)")
    add("--compare", action="store_true", help="write a side-by-side PNG beside each restored image")
    device_arguments(parser)
    precision_arguments(parser)
    return checked(parser, parser.parse_args())


def checked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the defaults that hang on others; what does not go together ends the script."""
    if (args.vqvae_path is None) != (args.load_path is None):
        given, missing = ("--vqvae-path", "--load-path") if args.load_path is None else ("--load-path", "--vqvae-path")
        parser.error(
            f"{given} needs {missing}: the two stages belong together; leave both out for the model in weights/"
        )
    if args.calibration and not args.samples:
        parser.error("--calibration goes with --samples, which writes the expected error")
    for flag, value in (("--sampler", args.sampler), ("--steps", args.steps)):
        if value and not (args.sample or args.samples):
            parser.error(f"{flag} goes with --sample or --samples; the posterior mean is not sampled")
    level = None if args.noise_level == "auto" else args.noise_level  # 0 is a level, and auto the default
    resize = args.resize or None
    noise = {"--noise-level": level, "--degrade": args.degrade, "--resize": resize}
    sampled = {"--sample": args.sample or None, "--samples": args.samples or None, "--resize": resize}
    exclusive = (
        ("--detector", args.detector, noise),
        ("--dose", args.dose, noise),
        ("--to-dose", args.to_dose, sampled),
    )
    for flag, value, others in exclusive:
        for other, given in others.items():
            if value is not None and given is not None:
                parser.error(f"{flag} does not go with {other}; leave one of them out")
    args.sampler = args.sampler or ("dpm++" if args.samples else "ddim")
    if args.noise_level is None:
        args.noise_level = "auto" if args.degrade is None else args.degrade
    return args


def main() -> None:
    args = parse_arguments()
    refuse_missing(args.vqvae_path, args.load_path)
    print(RESEARCH_USE)
    # torch and all that stands on it come after the flags: a wrong one is answered at once
    from preprocessing.detector import Detector
    from restoration.batch import BatchRestorer, Listed, load_calibration
    from restoration.outputs import MAPS, make_folder, plan
    from restoration.restorer import Restorer

    if args.vqvae_path is None:
        args.vqvae_path, args.load_path = SHIPPED_VQVAE, SHIPPED_DIFFUSION
    calibration = load_calibration(args) if args.samples else None
    detector = None if args.detector is None else Detector.from_json(args.detector)
    kinds = ("compare",) * args.compare + MAPS * bool(args.samples)
    try:
        jobs = plan(args.inputs, args.out, kinds=kinds, samples=args.samples)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be looked at ({error.strerror}); leave it out") from None
    device = get_device(args.cpu, args.cuda)
    restorer = Restorer.load(
        args.vqvae_path, args.load_path, device, samples=args.samples or int(args.sample), sampler=args.sampler,
        steps=args.steps, seed=args.seed, amp=sampling_dtype(device, args.amp, args.no_amp),
    )  # fmt: skip
    if 0 < args.tile < restorer.least_tile:
        raise UserError(
            f"--tile {args.tile}: this model takes tiles of at least {restorer.least_tile} pixels a side; pass more"
        )
    batch, made = BatchRestorer(restorer, calibration, detector, args), make_folder(args.out)
    done: list[Listed] = []
    failures: list[str] = []
    try:
        for job in tracked(jobs, "restore", "image", not args.no_tqdm):
            try:
                done.append(batch.restore(job))
            except UserError as error:
                failures.append(one_line(error))
    finally:  # what was restored before a signal is listed too
        batch.finish(done, failures, made)
    finish_batch(failures, done=len(done))


if __name__ == "__main__":
    run_script(main)
