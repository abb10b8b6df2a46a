"""The posterior mean and posterior samples against input, first stage, a regression CNN and VST-BM3D, on images no training saw.

Parts, the cheap ones first: `calcifications`, contrast kept on phantoms; `mnse`, error split into noise and bias, and its
spectrum; `crops`, every method on one fixed crop an image at several noise levels, with what tells a sampler from a smoother;
`native`, the posterior mean and BM3D on whole breasts at several levels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before the other: `restoration` is the module there

import regression

from evaluation.metrics import (
    BANDS,
    INTENSITY_BINS,
    MS_SSIM_SIDE,
    ErrorSplit,
    PowerSpectrum,
    band_power,
    calcification_contrast,
    image_metrics,
    mnse_decomposition,
    ms_ssim,
    noise_power_spectrum,
)
from evaluation.table import BM3D, INPUT
from evaluation.uncertainty import Calibration, Tally
from evaluation.uncertainty import SampledImage as Sampled
from files.images import read_image
from files.prepared import Record
from files.splits import folder_records
from helper import UserError, format_table, get_device, seeded_generator, tracked
from hps import HPS_VQVAE
from preprocessing.breast import breast_mask
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.phantom import (
    FILM_HEIGHT_MM,
    Calcification,
    Phantom,
    calcification_sigma,
    generate_phantom,
    pixel_means,
)
from preprocessing.stabilize import stabilize
from restoration.classical import inverse_table, vst_bm3d
from restoration.restore import restore_image
from restoration.restorer import SHIPPED_CALIBRATION, SHIPPED_DIFFUSION, SHIPPED_VQVAE, Restorer, sampling_of
from running.command_line import Parser, device_arguments, positive_int
from running.distributed import worker_count
from running.folders import record_run
from running.scripts import run_script
from running.writing import atomic_path, write_text

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("calcifications", "mnse", "crops", "native")
SPLIT_CSV = ROOT / "preprocessing" / "splits" / "mini-mias.csv"
LEVEL = 0.2  # noise level of the parts `calcifications` and `mnse`, and of what the CNN is trained at
MEAN = "posterior mean"
MEAN_OF = 8  # samples whose mean has a row of its own
FIGURES = ("psnr_breast", "ssim_breast", "ms_ssim", "psnr", "ssim")
TESTED = ("psnr_breast", "ssim_breast")
MUSCLE = 1 / 3  # of a breast's rows, from the top: where the pectoral muscle is, brighter than any gland
PATCH = 64  # pixels a side of the residuals whose spectrum is taken
LEAST_CROP = 16  # pixels a side: SSIM's window has 11
PHANTOM_SHAPE = (1, 1024, 768)
PHANTOM_SEED = 2  # that of the test split
DIAMETERS = (1.0, 3.0)  # pixels
SHARES = (
    1.0,
    0.25,
)  # of their contrast at which calcifications are shown: drawn as they are, all stand out of the noise
CNR_BINS = (0.0, 2.5, 5.0, 10.0, 20.0, np.inf)  # edges


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of full-dose mammograms")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables and of what a second run reuses")
    parser.add_argument("--vqvae-path", type=Path, default=SHIPPED_VQVAE, help="first stage (default: the shipped one)")
    parser.add_argument("--load-path", type=Path, default=SHIPPED_DIFFUSION, help="diffusion checkpoint (as above)")
    parser.add_argument(
        "--untrained-path", type=Path, nargs=2, metavar=("VQVAE", "DIFFUSION"),
        help="a diffusion checkpoint trained on an untrained first stage, and that one",
    )  # fmt: skip
    parser.add_argument("--split-csv", type=Path, default=SPLIT_CSV, help="whose test images are taken")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    parser.add_argument("--no-native", action="store_true", help="leave the part `native` out")
    parser.add_argument(
        "--levels",
        type=_positive,
        nargs="+",
        default=[0.2, 0.05, 0.5, 1.0],
        help="noise levels of the parts `crops` and `native`",
    )
    parser.add_argument("--crop", type=positive_int, default=256, help="side of the fixed crops (default: 256)")
    parser.add_argument("--images", type=positive_int, help="only the first so many test images")
    parser.add_argument(
        "--samples",
        type=positive_int,
        default=16,
        help=f"of the posterior, by DPM-Solver++; at least {MEAN_OF} (default: 16)",
    )
    parser.add_argument(
        "--ddim-steps", type=positive_int, help="network evaluations of a sample by DDIM (default: the checkpoint's)"
    )
    parser.add_argument(
        "--fast-steps", type=positive_int, help="network evaluations of one by DPM-Solver++ (default: the checkpoint's)"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        default=SHIPPED_CALIBRATION,
        help="uncertainty.json of the model (default: the shipped one)",
    )
    parser.add_argument("--realisations", type=positive_int, default=8, help="of the noise, part `mnse` (default: 8)")
    parser.add_argument("--phantoms", type=positive_int, default=6, help="with calcifications (default: 6)")
    parser.add_argument("--pitch", type=_positive, default=0.2, help="of the images' pixels in mm (default: 0.2)")
    parser.add_argument(
        "--scale", type=_positive, default=1.0,
        help="resize the images by this factor before all else, as if of another pitch (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes",
        type=_non_negative,
        default=0.0,
        help="training time of the regression CNN (default: 0, without it)",
    )
    parser.add_argument("--workers", type=positive_int, default=2, help="processes for BM3D (default: 2)")
    device_arguments(parser)
    args = parser.parse_args()
    args.parts = [part for part in PARTS if part in args.parts and not (part == "native" and args.no_native)]
    if not args.parts:
        parser.error("--no-native leaves no part to measure")
    if args.realisations < 2:
        parser.error("--realisations must be at least 2: noise is told from bias by its variance")
    if args.samples < MEAN_OF:
        parser.error(f"--samples must be at least {MEAN_OF}")
    if args.crop < LEAST_CROP:
        parser.error(f"--crop must be at least {LEAST_CROP}")
    return args


def _non_negative(text: str) -> float:
    """An argparse type: 0 or a finite number above it."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or a number above it, not {text!r}")
    return value


def _positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = _non_negative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


# --- what is restored ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A clean image, and where the breast is on it."""

    key: str  # path relative to the data root: it seeds the noise
    clean: np.ndarray  # (H, W) float32 in [0, 1]
    mask: np.ndarray  # (H, W) bool

    def low_dose(self, level: float, *realisation: int) -> np.ndarray:
        """The image with the noise that belongs to its name, a level and, where there are several, a realisation."""
        generator = seeded_generator("benchmark", self.key, level, *realisation)
        return simulate_low_dose(torch.from_numpy(self.clean), level, generator).numpy()

    def window(self, image: np.ndarray, place: tuple[int, int, int]) -> np.ndarray:
        """The square at row, column and of side `place` of an image of this case's size."""
        row, column, side = place
        return np.ascontiguousarray(image[row : row + side, column : column + side])


def read_case(record: Record, scale: float = 1.0) -> Case:
    """A record at its own pixels, or at `scale` times as many a side, cropped to the bounding box of its breast mask.

    Raises UserError naming the file.
    """
    image = read_image(record.path)
    if scale != 1:
        shape = tuple(max(1, round(scale * side)) for side in image.shape)
        resized = F.interpolate(torch.from_numpy(image)[None, None], shape, mode="bicubic", antialias=True)
        image = resized[0, 0].clamp(0, 1).numpy()
    mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return Case(record.key, np.ascontiguousarray(image[box]), np.ascontiguousarray(mask[box]))


def densest_crop(image: np.ndarray, mask: np.ndarray, side: int, muscle: float = MUSCLE) -> tuple[int, int, int]:
    """Row, column and side of the square of an image (H, W) with the highest mean among those fully in the mask (H, W).

    Squares that begin in the first `muscle` of the rows count only where there are no others. Where the breast has room
    for no square, the one with the most of it. Raises ValueError where the image has none.
    """
    if side > min(image.shape):
        raise ValueError(f"no square of {side} pixels in an image of {image.shape}")

    def means(values: np.ndarray) -> np.ndarray:
        sums = np.pad(values.astype(np.float64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
        return (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]) / side**2

    coverage = np.rint(means(mask) * side**2).astype(int)
    below = coverage.copy()
    below[: min(int(muscle * len(image)), len(below) - 1)] = -1
    allowed = below if below.max() == side**2 else coverage
    best = np.where(allowed == allowed.max(), means(image), -1.0)
    row, column = np.unravel_index(int(best.argmax()), best.shape)
    return int(row), int(column), side


def crop_case(case: Case, side: int) -> tuple[Case, tuple[int, int, int]]:
    """The fixed crop of a case, and its place; raises UserError where it has no room."""
    try:
        place = densest_crop(case.clean, case.mask, side)
    except ValueError:
        height, width = case.clean.shape
        raise UserError(f"--crop {side}: the breast of {case.key} spans {width} x {height} pixels only") from None
    return Case(case.key, case.window(case.clean, place), case.window(case.mask, place)), place


# --- the methods -----------------------------------------------------------------------------------------------------


def restore(restorer: Restorer, image: np.ndarray, noise: NoiseModel, name: str) -> np.ndarray:
    """Restore an image (H, W) as main-restore.py does."""
    return restore_image(restorer, image, noise, name).pixels


@torch.no_grad()
def autoencode(restorer: Restorer, image: np.ndarray, noise: NoiseModel, quantize: bool) -> np.ndarray:
    """An image (H, W) through the first stage alone, past its codebooks or through them."""
    stage = restorer.first_stage
    x = torch.from_numpy(image)[None, None].to(restorer.device)
    decoded = stage.decode(stage.encode(x, noise), quantize, x.shape[-2:], noise)
    return decoded[0, 0].clamp(0, 1).cpu().numpy()


def bm3d_path(folder: Path, image: np.ndarray, noise: NoiseModel) -> Path:
    """Where the BM3D of an image is kept: everything that it depends on is in the name."""
    digest = hashlib.blake2b(repr((image.shape, noise, importlib.metadata.version("bm3d"))).encode(), digest_size=16)
    for part in (np.ascontiguousarray(image), *inverse_table(noise)):
        digest.update(part.tobytes())
    return folder / f"{digest.hexdigest()}.npy"


def bm3d_all(images: Sequence[np.ndarray], noise: NoiseModel, args: argparse.Namespace, what: str) -> list[np.ndarray]:
    """VST-BM3D of images (H, W) with the same noise, from --out/bm3d where a run before this one has left it."""
    paths = [bm3d_path(args.out / "bm3d", image, noise) for image in images]
    missing = {path: image for path, image in zip(paths, images, strict=True) if not path.exists()}
    workers, progress = worker_count(args.workers), not args.no_tqdm
    done = tracked(_bm3d(missing, noise, workers), f"BM3D, {what}", "image", progress, len(missing)) if missing else ()
    for path, restored in done:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, restored)
    try:
        return [np.load(path) for path in paths]
    except (OSError, ValueError):
        raise UserError(f"--out {args.out}: a file in its folder bm3d is damaged; delete that folder") from None


def _bm3d(images: dict[Path, np.ndarray], noise: NoiseModel, workers: int) -> Iterator[tuple[Path, np.ndarray]]:
    workers = min(workers, len(images))
    if workers == 1:
        yield from ((path, vst_bm3d(image, noise)) for path, image in images.items())
        return
    # a forked process would inherit torch's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        jobs = {pool.submit(vst_bm3d, image, noise): path for path, image in images.items()}
        try:
            yield from ((jobs[job], job.result()) for job in as_completed(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# --- figures and tables ----------------------------------------------------------------------------------------------


def figures_of(case: Case, image: np.ndarray, **row: object) -> dict:
    """A row of the per-image table: what `row` says, and the figures of an image (H, W) against the clean one."""
    restored, clean, mask = (torch.from_numpy(v)[None] for v in (image, case.clean, case.mask))
    figures = dataclasses.asdict(image_metrics(restored, clean, mask)) | {"ms_ssim": ms_ssim(restored, clean)}
    return {"path": case.key, **row} | {name: figures[name] for name in FIGURES}


def paired_test(values: np.ndarray, rival: np.ndarray) -> dict[str, float]:
    """A method's figures (N,) against a rival's on the same images: their difference, and how sure it is.

    `t_p` and `wilcoxon_p` are two-sided; nan with fewer than two images, or where no figure differs.
    """
    difference = values - rival
    t_p = wilcoxon_p = float("nan")
    if len(difference) > 1 and np.any(difference != 0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # differences that are all alike: p is 0, and scipy warns
            t_p = float(stats.ttest_rel(values, rival).pvalue)
            wilcoxon_p = float(stats.wilcoxon(values, rival).pvalue)
    return {
        "difference": float(difference.mean()),
        "difference_std": float(difference.std(ddof=1)) if len(difference) > 1 else float("nan"),
        "at_least": int((difference >= 0).sum()),
        "images": len(difference),
        "t_p": t_p,
        "wilcoxon_p": wilcoxon_p,
    }


def summarise(frame: pd.DataFrame) -> dict[str, dict]:
    """By method, in order: mean and standard deviation of each figure, the input's mean, and the paired tests against BM3D."""
    wide = frame.pivot(index="path", columns="method", values=list(FIGURES))
    summary = {}
    for method, rows in frame.groupby("method", sort=False):
        row: dict = {"evaluations": int(rows["evaluations"].iloc[0])}
        for figure in FIGURES:
            values = wide[figure][method].to_numpy()
            row[figure] = float(values.mean())
            row[f"{figure}_std"] = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
            row[f"{figure}_input"] = float(wide[figure][INPUT].mean())
        if method != BM3D:
            row["against_bm3d"] = {
                figure: paired_test(wide[figure][method].to_numpy(), wide[figure][BM3D].to_numpy()) for figure in TESTED
            }
        summary[method] = row
    return summary


def quality_table(summary: dict[str, dict]) -> str:
    """Mean +- standard deviation of each figure and, in brackets, the input's mean."""
    digits = {"psnr_breast": 2, "psnr": 2}
    names = {
        "psnr_breast": "PSNR breast",
        "ssim_breast": "SSIM breast",
        "ms_ssim": "MS-SSIM",
        "psnr": "PSNR",
        "ssim": "SSIM",
    }
    lines = []
    for method, row in summary.items():
        cells = [method, row["evaluations"]]
        for figure in FIGURES:
            if figure == "ms_ssim" and math.isnan(row[figure]):
                cells.append(f"none below {MS_SSIM_SIDE} pixels")
                continue
            d = digits.get(figure, 4)
            cells.append(f"{row[figure]:.{d}f} +- {row[f'{figure}_std']:.{d}f} ({row[f'{figure}_input']:.{d}f})")
        lines.append(cells)
    return format_table(["", "evaluations", *(f"{names[figure]} (input)" for figure in FIGURES)], lines)


def paired_table(summary: dict[str, dict]) -> str:
    """Every method's difference from BM3D inside the breast, in how many images it is at least as good, and p-values."""
    lines = []
    for method, row in summary.items():
        if method == BM3D:
            continue
        cells = [method]
        for figure, d in zip(TESTED, (2, 4), strict=True):
            test = row["against_bm3d"][figure]
            cells += [
                f"{test['difference']:+.{d}f} +- {test['difference_std']:.{d}f}",
                f"{test['at_least']} of {test['images']}",
                f"{test['t_p']:.2g}",
                f"{test['wilcoxon_p']:.2g}",
            ]
        lines.append(cells)
    columns = [(f"{name} - BM3D", f"{name} >= BM3D", "p (t)", "p (Wilcoxon)") for name in ("PSNR", "SSIM")]
    return format_table([f"inside the breast, against {BM3D}", *columns[0], *columns[1]], lines)


# --- parts -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """What the parts share."""

    args: argparse.Namespace
    restorer: Restorer
    records: dict[str, list[Record]]

    @functools.cached_property
    def cases(self) -> list[Case]:
        """The test images."""
        records = self.records["test"][: self.args.images]
        return [read_case(record, self.args.scale) for record in self.bar(records, "test images", "image")]

    def bar(self, items: Iterable, what: str, unit: str, total: int | None = None) -> Iterator:
        """The items under a progress bar, or with a line a minute."""
        return tracked(items, what, unit, not self.args.no_tqdm, total)

    def write_rows(self, name: str, rows: list[dict]) -> pd.DataFrame:
        """Rows as a table, which is also written to a CSV file of that name."""
        frame = pd.DataFrame(rows)
        write_text(self.args.out / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
        return frame


def regression_cnn(bench: Bench) -> tuple[regression.RegressionCNN, int] | None:
    """The CNN of --minutes, from --out where a run before this one has left it; None without."""
    args = bench.args
    if not args.minutes:
        print("regression CNN: left out; give it the wall time of the model's training with --minutes")
        return None
    size = "" if args.scale == 1 else f"-scale-{args.scale:g}"
    path = args.out / f"regression-{args.minutes:g}-minutes{size}.pt"
    if path.exists():
        return regression.load(path, LEVEL, bench.restorer.device)
    cases = [read_case(record, args.scale) for record in bench.bar(bench.records["train"], "training images", "image")]
    model, steps = regression.train(
        [case.clean for case in cases], [case.mask for case in cases], LEVEL, args.minutes, bench.restorer.device,
        progress=not args.no_tqdm,
    )  # fmt: skip
    regression.save(model, steps, path)
    return model, steps


def run_crops(bench: Bench) -> dict:
    """Every method on the fixed crop of every image, at each level."""
    args = bench.args
    untrained = Restorer.load(*args.untrained_path, bench.restorer.device) if args.untrained_path else None
    if untrained is None:
        print("untrained first stage: left out; name such a pair of checkpoints with --untrained-path")
    cnn = regression_cnn(bench)
    calibration = Calibration.from_json(args.calibration)
    whole = [(case, *crop_case(case, args.crop)) for case in bench.cases]
    levels, rows = {}, []
    for level in args.levels:
        lows = [case.window(case.low_dose(level), place) for case, _, place in whole]
        classical = bm3d_all(lows, NoiseModel.from_level(level), args, f"crops, level {level:g}")
        result = CropLevel(level, calibration.factor(level))
        given = [(crop, low, rival) for (_, crop, _), low, rival in zip(whole, lows, classical, strict=True)]
        for crop, low, rival in bench.bar(given, f"crops, level {level:g}", "image"):
            result.add(
                crop, {INPUT: (low, 0), BM3D: (rival, 0)} | point_methods(bench, crop, low, level, cnn, untrained)
            )
            result.add_samples(bench, crop, low)
        rows += result.rows
        bench.write_rows("crops", rows)
        print(f"\ncrops: {len(whole)} images, {args.crop} x {args.crop} native pixels, noise level {level:g}")
        levels[f"{level:g}"] = result.report()
    return {
        "levels": levels,
        "crop": args.crop,
        "places": {case.key: place for case, _, place in whole},
        "regression_steps": None if cnn is None else cnn[1],
    }


def point_methods(
    bench: Bench,
    crop: Case,
    low: np.ndarray,
    level: float,
    cnn: tuple[regression.RegressionCNN, int] | None,
    untrained: Restorer | None,
) -> dict[str, tuple[np.ndarray, int]]:
    """What the methods that sample nothing make of a crop (H, W), and their network evaluations."""
    restorer, noise = bench.restorer, NoiseModel.from_level(level)
    images = {"autoencoder pass": (autoencode(restorer, low, noise, False), 0)}
    if level == LEVEL:  # the noise that these know, or do not see
        images["clean, continuous"] = autoencode(restorer, crop.clean, noise, False), 0
        images["clean, quantised"] = autoencode(restorer, crop.clean, noise, True), 0
        if cnn is not None:
            images[f"regression CNN, {bench.args.minutes:g} min"] = cnn[0].restore(low), 1
        if untrained is not None:
            images[f"{MEAN}, untrained latent"] = restore(untrained, low, noise, crop.key), untrained.evaluations
    images[MEAN] = restore(restorer, low, noise, crop.key), restorer.evaluations
    return images


@dataclasses.dataclass
class CropLevel:
    """What is measured on the crops at one noise level."""

    level: float
    factor: float  # of the calibration
    rows: list[dict] = dataclasses.field(default_factory=list)
    power: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # sums of `band_power` by method
    tally: Tally = dataclasses.field(default_factory=Tally)

    def add(self, crop: Case, images: dict[str, tuple[np.ndarray, int]]) -> None:
        """Take note of images (H, W) of a crop, and of their network evaluations."""
        for method, (image, count) in images.items():
            self.rows.append(figures_of(crop, image, level=self.level, method=method, evaluations=count))
            self.add_power(method, image)

    def add_power(self, method: str, image: np.ndarray) -> None:
        """Take note of the power of an image (H, W), stabilised."""
        noise = NoiseModel.from_level(self.level)
        power = band_power(stabilize(torch.from_numpy(image).double(), noise).numpy())
        self.power[method] = self.power.get(method, 0) + power

    def add_samples(self, bench: Bench, crop: Case, low: np.ndarray) -> None:
        """Draw samples of a crop's noisy image (H, W), and take note of them, of their mean and of their spread."""
        args, noise, samples = bench.args, NoiseModel.from_level(self.level), {}
        for sampler, steps, count in (("ddim", args.ddim_steps, 1), ("dpm++", args.fast_steps, args.samples)):
            sampling = sampling_of(bench.restorer.hps, sampler, steps)
            drawing = dataclasses.replace(bench.restorer, samples=count, sampling=sampling)
            samples[sampler] = sampling, restore_image(drawing, low, noise, crop.key).products
        (ddim, [exact]), (fast, many) = samples.values()
        self.add(
            crop,
            {
                f"posterior sample, {ddim}": (exact, 1 + ddim.steps),
                f"posterior sample, {fast}": (many[0], 1 + fast.steps),
                f"mean of {MEAN_OF} posterior samples": (many[:MEAN_OF].mean(0), 1 + MEAN_OF * fast.steps),
            },
        )
        self.add_power("clean", crop.clean)
        self.tally.add(Sampled(crop.clean, many, crop.mask, self.level), self.factor)

    def report(self) -> dict:
        """Print the tables; what belongs into the record."""
        summary, coverage = summarise(pd.DataFrame(self.rows)), self.tally.coverage()
        shares = {method: power / self.power["clean"] for method, power in self.power.items() if method != "clean"}
        print(f"{quality_table(summary)}\n\n{paired_table(summary)}\n\n{sampler_table(summary, shares)}\n{coverage}")
        return {
            "methods": summary,
            "power_over_clean": {method: share.tolist() for method, share in shares.items()},
            "coverage": dataclasses.asdict(coverage),
        }


def sampler_table(summary: dict[str, dict], power: dict[str, np.ndarray]) -> str:
    """What tells a sampler from a smoother: power over clean's by frequency, and PSNR in the breast below the posterior mean's."""
    bands = [f"{low:g}-{high:g}" for low, high in itertools.pairwise(BANDS)]
    lines = [
        [
            method,
            *(f"{share:.2f}" for share in power[method]),
            f"{summary[MEAN]['psnr_breast'] - row['psnr_breast']:+.2f}",
        ]
        for method, row in summary.items()
    ]
    return format_table(["power over clean's, cycles/pixel", *bands, f"PSNR below the {MEAN}'s"], lines)


def run_native(bench: Bench) -> dict:
    """Input, BM3D and the posterior mean on whole breasts at each level."""
    args, restorer = bench.args, bench.restorer
    rows, summaries = [], {}
    for level in args.levels:
        noise = NoiseModel.from_level(level)
        lows = [case.low_dose(level) for case in bench.cases]
        classical = bm3d_all(lows, noise, args, f"native, level {level:g}")
        own = []
        given = list(zip(bench.cases, lows, classical, strict=True))
        for case, low, rival in bench.bar(given, f"{MEAN}, native, level {level:g}", "image"):
            restored = restore(restorer, low, noise, case.key)
            for method, image, count in ((INPUT, low, 0), (BM3D, rival, 0), (MEAN, restored, restorer.evaluations)):
                own.append(figures_of(case, image, level=level, method=method, evaluations=count))
        rows += own
        bench.write_rows("native", rows)
        summaries[f"{level:g}"] = summary = summarise(pd.DataFrame(own))
        print(f"\nnative: {len(bench.cases)} images, noise level {level:g}")
        print(f"{quality_table(summary)}\n\n{paired_table(summary)}")
    return {"levels": summaries}


def patches_of(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W) cut into as many squares (P, side, side) as it has room for, from its top left corner."""
    rows, columns = (length // side for length in image.shape)
    return (
        image[: rows * side, : columns * side]
        .reshape(rows, side, columns, side)
        .transpose(0, 2, 1, 3)
        .reshape(-1, side, side)
    )


def run_mnse(bench: Bench) -> dict:
    """The split of the normalised error over realisations of the noise, and the spectrum of what is left."""
    args, restorer = bench.args, bench.restorer
    noise, pitch = NoiseModel.from_level(LEVEL), args.pitch / args.scale
    crops = [crop_case(case, args.crop)[0] for case in bench.cases]
    lows = [[crop.low_dose(LEVEL, r) for r in range(args.realisations)] for crop in crops]
    classical = bm3d_all([low for own in lows for low in own], noise, args, "realisations")
    splits: dict[str, list[ErrorSplit]] = {INPUT: [], BM3D: [], MEAN: []}
    spectra: dict[str, list[PowerSpectrum]] = {method: [] for method in splits}
    rows = []
    for i, crop in enumerate(bench.bar(crops, f"{MEAN}, {args.realisations} realisations", "image")):
        restored = [restore(restorer, low, noise, f"{crop.key} {r}") for r, low in enumerate(lows[i])]
        rival = classical[i * args.realisations : (i + 1) * args.realisations]
        for method, images in ((INPUT, lows[i]), (BM3D, rival), (MEAN, restored)):
            stack = np.stack(images)
            split = mnse_decomposition(stack, crop.clean, crop.mask)
            splits[method].append(split)
            residual = np.concatenate([patches_of(image, min(PATCH, args.crop)) for image in stack - crop.clean])
            spectra[method].append(noise_power_spectrum(residual, pitch))
            rows.append({"path": crop.key, "method": method, **split.overall()})
    frame = bench.write_rows("mnse", rows)
    print(
        f"\nmean normalised squared error in units of 1e-4: {len(crops)} crops, {args.realisations} realisations, noise "
        f"level {LEVEL:g}"
    )
    pooled = {method: ErrorSplit.pooled(own) for method, own in splits.items()}
    print(mnse_table(pooled))
    power = {method: np.mean([own.power for own in spectrum], axis=0) for method, spectrum in spectra.items()}
    frequencies = spectra[INPUT][0].frequencies
    print("\nnoise power of restored - clean in units of 1e-7 mm^2")
    print(spectrum_table(frequencies, power))
    wide = frame.pivot(index="path", columns="method", values="bias_squared")
    return {
        "level": LEVEL,
        "realisations": args.realisations,
        "overall": {method: split.overall() for method, split in pooled.items()},
        "images_with_no_more_bias_squared_than_bm3d": int((wide[MEAN] <= wide[BM3D]).sum()),
        "by_intensity": {
            "edges": list(INTENSITY_BINS),
            "pixels": pooled[INPUT].counts.tolist(),
            "methods": {
                method: {name: getattr(split, name).tolist() for name in ("mnse", "residual_noise", "bias_squared")}
                for method, split in pooled.items()
            },
        },
        "noise_power": {
            "pitch_mm": pitch,
            "frequencies_per_mm": frequencies.tolist(),
            "power_mm2": {method: values.tolist() for method, values in power.items()},
        },
    }


def mnse_table(splits: dict[str, ErrorSplit]) -> str:
    """Total, residual noise and squared bias in units of 1e-4, overall and by clean intensity."""
    first = next(iter(splits.values()))
    shown = np.flatnonzero(first.counts)
    header = ["", "total", "noise", "bias^2"]
    header += [f"noise + bias^2, x {first.edges[b]:g}-{first.edges[b + 1]:g}" for b in shown]
    lines = []
    for method, split in splits.items():
        cells = [method, *(f"{1e4 * value:.2f}" for value in split.overall().values())]
        cells += [f"{1e4 * split.residual_noise[b]:.2f} + {1e4 * split.bias_squared[b]:.2f}" for b in shown]
        lines.append(cells)
    return format_table(header, lines)


def spectrum_table(frequencies: np.ndarray, power: dict[str, np.ndarray]) -> str:
    """Noise power in units of 1e-7 mm^2 in eight bands of frequency."""
    bands = [band for band in np.array_split(np.arange(len(frequencies)), 8) if len(band)]
    header = ["1/mm", *(f"{frequencies[band[0]]:.2f}-{frequencies[band[-1]]:.2f}" for band in bands)]
    return format_table(
        header, [[method, *(f"{1e7 * values[band].mean():.2f}" for band in bands)] for method, values in power.items()]
    )


def faded(image: np.ndarray, calcifications: Sequence[Calcification], share: float, pixel_mm: float) -> np.ndarray:
    """A phantom's image (H, W) with its calcifications at a `share` of their contrast."""

    result = image.astype(np.float64)
    for c in calcifications:
        sigma = calcification_sigma(c.diameter * pixel_mm, pixel_mm)
        blob = np.outer(
            *(pixel_means(at, sigma, 0, size) for at, size in zip((c.row, c.column), image.shape, strict=True))
        )
        result -= (1 - share) * c.contrast * blob / blob.max()
    return result.clip(0, 1).astype(np.float32)


def calcified_phantoms(count: int) -> Iterator[tuple[int, Phantom]]:
    """The first `count` test phantoms that have calcifications, with their numbers."""
    index = 0
    while count:
        phantom = generate_phantom(PHANTOM_SEED, index, PHANTOM_SHAPE)
        if phantom.calcifications:
            yield index, phantom
            count -= 1
        index += 1


def cluster_crop(phantom: Phantom, side: int) -> tuple[int, int, list[Calcification]]:
    """Row and column of the square around most of a phantom's calcifications, and all of them in its own pixels."""
    centres = np.array([(c.row, c.column) for c in phantom.calcifications])
    corners = [
        np.clip(np.rint(centre) - side // 2, 0, np.array(phantom.image.shape[1:]) - side).astype(int)
        for centre in centres
    ]
    inside = [int(((centres > corner) & (centres < corner + side)).all(1).sum()) for corner in corners]
    row, column = (int(v) for v in corners[int(np.argmax(inside))])
    moved = [dataclasses.replace(c, row=c.row - row, column=c.column - column) for c in phantom.calcifications]
    return row, column, moved


def run_calcifications(bench: Bench) -> dict:
    """Contrast of phantom calcifications of 1 to 3 pixels, restored over clean, by their CNR in the clean image."""
    args, restorer = bench.args, bench.restorer
    noise, pixel = NoiseModel.from_level(LEVEL), FILM_HEIGHT_MM / PHANTOM_SHAPE[1]
    if args.crop > min(PHANTOM_SHAPE[1:]):
        raise UserError(f"--crop {args.crop}: phantoms have {PHANTOM_SHAPE[2]} x {PHANTOM_SHAPE[1]} pixels")
    scenes = []
    phantoms = calcified_phantoms(args.phantoms)
    for index, phantom in bench.bar(phantoms, "phantoms", "phantom", args.phantoms):
        row, column, moved = cluster_crop(phantom, args.crop)
        whole = phantom.image[0].numpy()
        for share in SHARES:
            clean = faded(whole, phantom.calcifications, share, pixel)
            crop = np.ascontiguousarray(clean[row : row + args.crop, column : column + args.crop])
            case = Case(f"phantom {index} x {share:g}", crop, np.ones_like(crop, dtype=bool))
            scenes.append((index, share, case, case.low_dose(LEVEL), moved))
    classical = bm3d_all([low for *_, low, _ in scenes], noise, args, "calcifications")
    sampling = sampling_of(restorer.hps, "ddim", args.ddim_steps)
    sampler = dataclasses.replace(restorer, samples=1, sampling=sampling)
    rows = []
    for (index, share, case, low, moved), rival in zip(bench.bar(scenes, MEAN, "image"), classical, strict=True):
        images = {INPUT: low, BM3D: rival, MEAN: restore(restorer, low, noise, case.key)}
        images[sampler.product] = restore(sampler, low, noise, case.key)
        for method, image in images.items():
            figures = calcification_contrast(image, case.clean, moved)
            rows += [
                {"phantom": index, "share": share, "row": c.row, "column": c.column, "diameter": c.diameter}
                | {"method": method, **dataclasses.asdict(figure)}
                for c, figure in zip(moved, figures, strict=True)
                if figure is not None and DIAMETERS[0] <= c.diameter <= DIAMETERS[1]
            ]
    if not rows:
        raise UserError(f"--phantoms {args.phantoms}: none has a calcification to measure; ask for more")
    frame = bench.write_rows("calcifications", rows)
    kept = contrast_kept(frame)
    count = int((frame["method"] == INPUT).sum())
    print(
        f"\ncontrast kept, restored over clean: {count} calcifications of {DIAMETERS[0]:g} to {DIAMETERS[1]:g} pixels on "
        f"{args.phantoms} phantoms, at full contrast and at {SHARES[1]:g} of it, noise level {LEVEL:g}"
    )
    print(contrast_table(kept))
    return {"level": LEVEL, "phantoms": args.phantoms, "pixel_mm": pixel, "kept": kept}


def contrast_kept(frame: pd.DataFrame) -> dict[str, dict]:
    """By group of calcifications: their number and, by method, the sum of their contrasts over that in the clean images.

    The groups are all, those at each share of their contrast, and bins of the CNR in the clean image.
    """
    groups = {"all": np.ones(len(frame), dtype=bool)}
    groups |= {f"contrast x {share:g}": frame["share"] == share for share in frame["share"].unique()}
    for low, high in zip(CNR_BINS[:-1], CNR_BINS[1:], strict=True):
        name = f"clean CNR {low:g}-{high:g}" if np.isfinite(high) else f"clean CNR from {low:g}"
        groups[name] = (frame["clean_cnr"] >= low) & (frame["clean_cnr"] < high)
    kept = {}
    for name, chosen in groups.items():
        if not chosen.any():
            continue
        by_method = frame[chosen].groupby("method", sort=False)
        sums = by_method[["contrast", "clean_contrast"]].sum()
        kept[name] = {"calcifications": int(by_method.size().iloc[0])} | {
            method: float(row["contrast"] / row["clean_contrast"]) for method, row in sums.iterrows()
        }
    return kept


def contrast_table(kept: dict[str, dict]) -> str:
    """The contrasts kept, a row a group."""
    header = ["", *next(iter(kept.values()))]
    lines = [
        [group, row["calcifications"], *(f"{v:.3f}" for k, v in row.items() if k != "calcifications")]
        for group, row in kept.items()
    ]
    return format_table(header, lines)


RUN: dict[str, Callable[[Bench], dict]] = {
    "calcifications": run_calcifications,
    "mnse": run_mnse,
    "crops": run_crops,
    "native": run_native,
}


def earlier_parts(path: Path) -> dict[str, dict]:
    """What a run before this one measured; raises UserError where its file cannot be read."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not of this script's making; choose another --out") from None


def main() -> None:
    args = parse_arguments()
    vst_bm3d(np.full((16, 16), 0.5, dtype=np.float32), NoiseModel.from_level(LEVEL))  # is it there? say so at once
    if not args.data_root.is_dir():
        raise UserError(f"--data-root {args.data_root}: no such folder")
    if not args.split_csv.is_file():
        raise UserError(f"--split-csv {args.split_csv}: no such file")
    records = folder_records(args.data_root, HPS_VQVAE["folder"].updated(split_csv=str(args.split_csv)))
    if not records["test"]:
        raise UserError(f"--split-csv {args.split_csv}: none of its test images is in {args.data_root}")
    parts = earlier_parts(args.out / "restoration.json")
    bench = Bench(args, Restorer.load(args.vqvae_path, args.load_path, get_device(args.cpu)), records)
    for flag, steps in (("--ddim-steps", args.ddim_steps), ("--fast-steps", args.fast_steps)):
        if (steps or 0) > (most := bench.restorer.hps.timesteps):
            raise UserError(f"{flag} {steps}: the model has {most} timesteps; pass at most as many")
    print(f"{bench.restorer.name}; results go to {args.out}")
    for name in args.parts:
        # every part says what it was measured with: others may be of an earlier run
        made = {
            "model": bench.restorer.name,
            "settings": json.loads(json.dumps(vars(args), default=str)),
        }
        parts[name] = made | RUN[name](bench)
        record_run(args.out, bench.restorer.hps, 0, "restoration.json", parts=parts)
    print(f"\nrestoration.json and {', '.join(f'{name}.csv' for name in args.parts)} written to {args.out}")


if __name__ == "__main__":
    run_script(main)
