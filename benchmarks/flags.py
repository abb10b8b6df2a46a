"""The flags of the scripts beside this file, which read them before torch is imported: a wrong one is answered at once."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from hps import TASKS
from restoration import SHIPPED_CALIBRATION, SHIPPED_DIFFUSION, SHIPPED_VQVAE
from running.command_line import (
    Parser,
    device_arguments,
    dose_factor,
    non_negative_int,
    number,
    path_argument,
    positive_int,
)

QUALITY_PARTS = "calcifications", "mnse", "crops", "native"
DETECTOR_PARTS = "data", "phantoms"
STEPS = "unet", "stage1", "stage2", "lookup", "compile"  # what benchmarks/steps.py can measure
SPLIT_CSV = Path(__file__).resolve().parents[1] / "preprocessing" / "splits" / "mini-mias.csv"
LEAST_PAIRS = 12  # of images, which d' of five channels needs
MEAN_OF = 8  # samples whose mean has a row of its own
LEAST_CROP = 16  # pixels a side: SSIM's window has 11
DOSES = {"50prct": 0.5, "75prct": 0.75, "100prct": 1.0}  # of the automatic exposure
PLAN_STAGES, PLAN_CARDS = ("1", "mean", "diffusion", "sampling"), ("a100", "h100", "4090")
CBIS_TRAINING_IMAGES = 2113  # breast views of CBIS-DDSM that `split=patient` and `validation_fraction=0.1` train on
# Microseconds that the launch of an operator adds to a step: the one number that brings the roofline within 2.5 % of the stage-1
# steps that an H100 took at commit 3583a4d (docs/gpu-plan.md): batch 4 and 16, and without AMP.
LAUNCH = 29
DETECTOR_FILE = "iwbi2026.npz"
positive = number("a number above 0", lambda value: 0 < value < math.inf)
share = number("a number above 0 and up to 1", lambda value: 0 < value <= 1)
rest = number("a number from 0 to below 1", lambda value: 0 <= value < 1)


def correlation(text: str) -> float:
    """An argparse type: a correlation of neighbours that a kernel of three pixels can make."""
    value = 0.0 if text == "0" else positive(text)
    if value > 0.7:
        raise argparse.ArgumentTypeError(f"must be from 0 to 0.7, not {text!r}")
    return value


def pair_count(text: str) -> int:
    """An argparse type: a number of pairs that have a d', or 0 for none."""
    count = non_negative_int(text)
    if 0 < count < LEAST_PAIRS:
        raise argparse.ArgumentTypeError(f"must be 0 or, for d', at least {LEAST_PAIRS}, not {count}")
    return count


def quality_arguments(description: str) -> argparse.Namespace:
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--data-root", type=path_argument, required=True, help="folder of full-dose mammograms")
    add("--out", type=path_argument, required=True, help="folder of the tables and of what a second run reuses")
    add("--vqvae-path", type=path_argument, default=SHIPPED_VQVAE, help="first stage (default: the shipped one)")
    add("--load-path", type=path_argument, default=SHIPPED_DIFFUSION, help="checkpoint (default: the shipped one)")
    add("--split-csv", type=path_argument, default=SPLIT_CSV, help="whose test images are taken (default: mini-MIAS)")
    add("--parts", nargs="+", choices=QUALITY_PARTS, default=list(QUALITY_PARTS), help="what to measure (default: all)")
    add("--no-native", action="store_true", help="leave the part `native` out")
    add("--levels", type=positive, nargs="+", default=[0.2, 0.05, 0.5, 1.0], help="of the noise, `crops` and `native`")
    add("--crop", type=positive_int, default=256, help="side of the fixed crops (default: 256)")
    add("--images", type=positive_int, help="only the first so many test images")
    add("--samples", type=positive_int, default=16, help=f"by DPM-Solver++; at least {MEAN_OF} (default: 16)")
    add("--ddim-steps", type=positive_int, help="network evaluations of a sample by DDIM (default: the checkpoint's)")
    add("--fast-steps", type=positive_int, help="and of one by DPM-Solver++ (default: the checkpoint's)")
    calibration = "uncertainty.json (default: the shipped one)"
    add("--calibration", type=path_argument, default=SHIPPED_CALIBRATION, help=calibration)
    add("--correlation", type=correlation, default=0.0, help="of neighbours in the noise, part `crops` (default: 0)")
    add("--realisations", type=positive_int, default=8, help="of the noise, part `mnse` (default: 8)")
    add("--phantoms", type=positive_int, default=6, help="with calcifications (default: 6)")
    add("--pitch", type=positive, default=0.2, help="of the images' pixels in mm (default: 0.2)")
    add("--scale", type=positive, default=1.0, help="resize the images by this factor before all else (default: 1)")
    add("--workers", type=positive_int, default=2, help="processes for BM3D (default: 2)")
    device_arguments(parser)
    args = parser.parse_args()
    args.parts = [part for part in QUALITY_PARTS if part in args.parts and not (part == "native" and args.no_native)]
    if not args.parts:
        parser.error("--no-native leaves no part to measure")
    if args.realisations < 2:
        parser.error("--realisations must be at least 2: noise is told from bias by its variance")
    if args.samples < MEAN_OF:
        parser.error(f"--samples must be at least {MEAN_OF}")
    if args.crop < LEAST_CROP:
        parser.error(f"--crop must be at least {LEAST_CROP}")
    return args


def detector_arguments(description: str) -> argparse.Namespace:
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    folder = os.environ.get("DETECTOR_DIR") or None
    add("--data", type=path_argument, default=folder, help=f"folder of {DETECTOR_FILE} (DETECTOR_DIR)")
    add("--out", type=path_argument, required=True, help="folder of the tables")
    add("--vqvae-path", type=path_argument, default=SHIPPED_VQVAE, help="first stage (default: the shipped one)")
    add("--load-path", type=path_argument, default=SHIPPED_DIFFUSION, help="checkpoint (default: the shipped one)")
    parts = dict(choices=DETECTOR_PARTS, default=list(DETECTOR_PARTS))
    add("--parts", nargs="+", **parts, help="what to measure (default: all)")
    add("--doses", nargs="+", choices=DOSES, default=["50prct", "100prct"], help="(default: 50prct 100prct)")
    add("--regions", type=positive_int, help="only the first so many regions")
    add("--samples", type=non_negative_int, default=8, help="by DPM-Solver++; 0: none (default: 8)")
    add("--to-dose", nargs="*", type=dose_factor, default=[2], help="blends of the mean with its input (default: 2)")
    add("--steps", type=positive_int, help="network evaluations of a sample (default: the checkpoint's)")
    add("--phantoms", type=pair_count, default=400, help="pairs of phantoms; 0: none (default: 400)")
    device_arguments(parser)
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or the environment's DETECTOR_DIR must name the folder of the data")
    return args


def loading_arguments(description: str) -> argparse.Namespace:
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--count", type=positive_int, default=8, help="images to measure (default: 8)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data-root", type=path_argument, help="measure the first images of this CBIS-DDSM tree")
    source.add_argument(
        "--images", type=path_argument, metavar="DIR", help="make the sources of the mammograms in this folder"
    )
    parser.add_argument("--no-tqdm", action="store_true", help="disable progress bars")
    args = parser.parse_args()
    if args.images and not args.images.is_dir():
        parser.error(f"--images {args.images}: no such folder")
    return args


def steps_arguments(description: str) -> argparse.Namespace:
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--what", choices=STEPS, required=True, help="what to measure")
    parser.add_argument("--rounds", type=positive_int, default=5, help="measurements; their median counts (default: 5)")
    parser.add_argument("--busy", action="store_true", help="the machine does other work: one thread, processor time")
    return parser.parse_args()


def plan_arguments(description: str) -> argparse.Namespace:
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--task", choices=TASKS, default="cbis-ddsm", help="whose settings (default: cbis-ddsm)")
    add("--stage", nargs="+", choices=PLAN_STAGES, default=list(PLAN_STAGES), help="what to plan (default: all)")
    add("--cards", nargs="+", choices=PLAN_CARDS, default=list(PLAN_CARDS), help="for which (default: all)")
    add("--hps", action="append", default=[], metavar="KEY=VALUE", help="override an entry of hps.py")
    add("--batch-size", type=positive_int, help="override batch size from hps.py")
    add("--images", type=positive_int, help=f"training images (default: {CBIS_TRAINING_IMAGES:,} or the task's)")
    add("--efficiency", type=share, default=0.5, help="share of a card's rates reached (default: 0.5)")
    add("--bandwidth-efficiency", type=share, default=0.8, help="share of its bandwidth (default: 0.8)")
    add("--reserve", type=rest, default=0.1, help="share of its memory not for tensors (default: 0.1)")
    launch = f"microseconds that the launch of an operator adds (default: {LAUNCH})"
    add("--launch", type=non_negative_int, default=LAUNCH, help=launch)
    add("--out", type=path_argument, help="folder of plan.json (default: none is written)")
    add("--no-tqdm", action="store_true", help="disable progress bars")
    return parser.parse_args()
