"""Measure a detector's noise on flat fields, and write it for `main-restore.py --detector`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helper import UserError, counted, format_table, reason_of, tracked
from running.command_line import Parser, number, path_argument
from running.scripts import run_script
from running.writing import atomic_path

if TYPE_CHECKING:
    from files.images import Mammogram
    from preprocessing.flats import Level

SAME = 0.01  # exposures that differ by less, relative to each other, are one
LEAST_BITS = 9  # of a pixel; with fewer, rounding hides the noise
EXPOSURE_RANGE = 1e-6, 1e9  # beside 0
exposure_number = number(
    "0 or a number from {:g} to {:g}".format(*EXPOSURE_RANGE),
    lambda value: value == 0 or EXPOSURE_RANGE[0] <= value <= EXPOSURE_RANGE[1],
)
EXPOSURE_TAGS = {"ExposureInuAs": 1e-3, "ExposureInmAs": 1.0, "Exposure": 1.0}  # to mAs, the finest first


def read_levels(paths: Sequence[Path], exposures: Sequence[float], progress: bool) -> tuple[list[Level], Mammogram]:
    """The flat fields by rising exposure, and one of the images, read a level at a time.

    Images that are clipped are left out with a line. Raises UserError for images of different sizes, that are too small, equal
    or without noise, or if all are clipped.
    """
    import numpy as np
    from tqdm import tqdm

    from files.images import read_mammogram
    from preprocessing.flats import Level, clipped_share

    order = sorted(zip(exposures, paths, strict=True))
    numbers, first = [0], order[0][0]
    for exposure, _ in order[1:]:
        if is_new := exposure - first > SAME * exposure:
            first = exposure
        numbers.append(numbers[-1] + is_new)
    items, levels, one, seen = [*zip(numbers, order, strict=True)], [], None, dict[int, Path]()
    # closed before an error is printed, or the line would begin behind the bar
    with contextlib.closing(tracked(items, "reading flats", "image", progress)) as images:
        for _, group in itertools.groupby(images, key=lambda item: item[0]):
            values, stated = [], []
            for _, (exposure, path) in group:
                mammogram = read_mammogram(path)
                _refuse(path, mammogram, one)
                one = one or mammogram
                stored = mammogram.pixels * np.float32(mammogram.scale.factor) + np.float32(mammogram.scale.shift)
                if share := clipped_share(stored):
                    line = f"warning: {path}: {100 * share:.1f} % of its pixels are clipped; left out"
                    tqdm.write(line, file=sys.stderr)
                    continue
                if (twin := seen.setdefault(hash(stored.tobytes()), path)) is not path:
                    raise UserError(f"{path}: the same image as {twin}; leave one of them out")
                values.append(stored)
                stated.append(exposure)
            if values:
                levels.append(Level.of(float(np.mean(stated)), np.stack(values)))
                if not np.median(levels[-1].variances) > 0:
                    remedy = "pass raw images, as they were taken"
                    raise UserError(f"{path}: no noise in the flats of its exposure; {remedy}")
    if not levels:
        raise UserError("all of the flats are clipped; pass flats of the whole field, from low to high mAs")
    return levels, one


def _refuse(path: Path, mammogram: Mammogram, first: Mammogram | None) -> None:
    """Raise UserError if an image is too small, not as large as the first, of too few bits, or processed for display."""
    from preprocessing.flats import SIDE

    height, width = mammogram.pixels.shape
    if min(height, width) < SIDE:
        raise UserError(f"{path}: {width} x {height} pixels are too few; flats need at least {SIDE} a side")
    if first is not None and first.pixels.shape != (height, width):
        size = f"{first.pixels.shape[1]} x {first.pixels.shape[0]}"
        contrary = f"{width} x {height} pixels, but {first.path} has {size}"
        raise UserError(f"{path}: {contrary}; pass flats of one detector and size")
    if mammogram.bits < LEAST_BITS:
        remedy = "export the raw image, with all of its bits"
        raise UserError(f"{path}: {mammogram.bits} bits a pixel are too few; {remedy}")
    if mammogram.is_processed:
        raise UserError(f"{path}: processed for display; export the raw image, FOR PROCESSING")


def exposure_of(path: Path) -> float:
    """The exposure that a DICOM header states, in mAs. Raises UserError, naming the flag to state it with, if there is none."""
    from files.dicom import dicom_tag, is_dicom

    try:
        for tag, unit in EXPOSURE_TAGS.items():
            if is_dicom(path) and (text := dicom_tag(path, tag)):
                return exposure_number(text) * unit
    except Exception as error:  # noqa: BLE001  pydicom raises many kinds of error for a broken file
        remedy = "replace it, or pass --exposures"
        raise UserError(f"{path}: its exposure cannot be read ({reason_of(error)}); {remedy}") from None
    raise UserError(f"{path}: states no exposure; pass --exposures with a number for each file, in their order")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Measure a detector's noise on flat fields.", allow_abbrev=False)
    add = parser.add_argument
    flats = "raw images of uniform exposures (docs/detectors.md)"
    add("flats", nargs="+", type=path_argument, metavar="FLATS", help=flats)
    add("--out", type=path_argument, required=True, metavar="FILE", help="JSON file to write, such as detector.json")
    stated = "exposure of each file, in their order, in any unit (default: the DICOM header's mAs); 0: a dark image"
    add("--exposures", type=exposure_number, nargs="+", metavar="MAS", help=stated)
    add("--pixel-mm", type=float, metavar="MM", help="pixel pitch (default: the DICOM header's)")
    add("--no-tqdm", action="store_true", help="disable the progress bar: at most a line a minute")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raise UserError for arguments that do not go together, and files that cannot be read or written."""
    from files.dicom import PITCH_RANGE

    if args.exposures is not None and len(args.exposures) != len(args.flats):
        raise UserError(
            f"--exposures: {len(args.exposures)} given for {counted(len(args.flats), 'file')}; pass one for each"
        )
    least, most = PITCH_RANGE
    if args.pixel_mm is not None and not least <= args.pixel_mm <= most:
        raise UserError(f"--pixel-mm must be from {least:g} to {most:g}, not {args.pixel_mm:g}")
    for path in args.flats:
        if path.is_dir():
            raise UserError(f"{path}: a folder; name the files in it")
        if not path.exists():
            raise UserError(f"{path}: no such file")
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: a folder; name a file in it, such as {args.out / 'detector.json'}")
    if args.out.exists() and any(args.out.samefile(path) for path in args.flats):
        raise UserError(f"--out {args.out}: is one of the flats; choose another file")


def main() -> None:
    """Read the flats, measure, write, and print what was found."""
    args = parse_arguments()
    check(args)
    from preprocessing.flats import calibrate, describe, exposed_regions

    exposures = args.exposures or [exposure_of(path) for path in args.flats]
    print(format_table(["file", "exposure"], [(path, f"{e:g}") for path, e in zip(args.flats, exposures, strict=True)]))
    with atomic_path(args.out) as temporary:  # made first: if it cannot be written, nothing is done in vain
        levels, one = read_levels(args.flats, exposures, not args.no_tqdm)
        pixel_mm = args.pixel_mm or one.pixel_mm
        detector, response = calibrate(levels, one.pixels.shape, one.detector, pixel_mm)
        detector.to_json(temporary)
    print(f"\n{describe(detector, response, levels)}")
    if not response.is_linear:
        curve = f"R^2 {response.r_squared:.4f}, off by up to {100 * response.deviation:.1f} %"
        remedy = "pass raw images of one kV, filter and distance, and leave out exposures near saturation"
        print(f"warning: stored values are not linear in the exposure ({curve}); {remedy}", file=sys.stderr)
    if (dark := ~exposed_regions(levels)).any():
        share = f"{100 * dark.mean():.0f} % of the field does not follow the exposure (a collimated edge?)"
        print(f"note: {share}; it is left out of the gain map, but not of the kernel: better expose the whole field")
    if all(level.count == 1 for level in levels):
        blurred = "what is fixed in the detector blurs the estimates"
        print(f"note: no exposure has two images, so {blurred}; take two at each")
    if pixel_mm is None:
        print("note: the pixel pitch is not known, so there is no NNPS; pass --pixel-mm for it")
    print(f"detector written to {args.out}")


if __name__ == "__main__":
    run_script(main)
