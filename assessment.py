"""What an evaluation says beyond its table: how sure the restoration is, what its error is made of, and a page to look at."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from classical import vst_bm3d
from datasets import Batch, MammogramDataset, load_datasets
from diffusion import LatentDiffusion
from evaluation import BM3D, INPUT, Evaluation, run_evaluation, save_picture
from helper import Checkpoint, evaluation_folder, half_precision, seeded_generator, tracked, write_json
from hps import HParams
from metrics import ErrorSplit, PowerSpectrum, image_metrics, mnse_decomposition, noise_power_spectrum
from preprocessing.degrade import NoiseModel, simulate_low_dose
from report import Case as ReportCase
from report import Coverage as ReportCoverage
from report import CoverageBin, Report, choose_close_ups, read_curves, write_report
from restoration import Restorer, restore_image
from uncertainty import (
    MISS,
    SMOOTH,
    Calibration,
    Coverage,
    Interval,
    Region,
    assess,
    fit,
    local_error,
    picture,
    predict,
)
from uncertainty import Case as CalibrationCase
from vqvae2_wrapper import VQVAE2Wrapper

CALIBRATION_SIDE = 384  # pixels of the squares of validation images that the uncertainty is calibrated on
CALIBRATION_SQUARES = 3  # of an image and level; with one, intervals in the background held 84 %, not 87 %
CALIBRATION_LEVELS = (0.05, 0.2, 0.5, 1.0)  # noise levels, of those that the model knows
CALIBRATION_IMAGES = 16  # validation images looked at, evenly spaced
KEPT_PIXELS = 2**17  # of an image, for the coverage
SPLIT_IMAGES, SPLIT_SIDE, REALISATIONS = 4, 256, 4  # of the split into noise and bias
SPECTRUM_SIDE = 64  # pixels of the residuals whose spectrum is taken
PIXEL_MM = 0.2  # pitch that frequencies are given at: that of mini-MIAS, and about that of the full training grid
CASES = 3  # images on the page
RESTORED = "restored"


def bm3d_is_there() -> bool:
    """Whether the optional package of the classical comparison is installed."""
    return importlib.util.find_spec("bm3d") is not None


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, evenly spaced."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def square(image: np.ndarray, row: int, column: int, side: int) -> np.ndarray:
    """The square of an image (H, W) at a corner, cut off at its borders."""
    return np.ascontiguousarray(image[row : row + side, column : column + side])


def calibrate(restorer: Restorer, validation: MammogramDataset, *, progress: bool = True) -> Calibration:
    """Fit the predicted error and its 90 % interval on validation images, at the noise levels that the model knows.

    Raises UserError where there are too few of them.
    """
    low, high = restorer.levels
    levels = [level for level in CALIBRATION_LEVELS if low <= level <= high] or [restorer.hps.noise_level]
    cases = []
    indices = spread(len(validation), CALIBRATION_IMAGES)
    for index in tracked(indices, "calibrate", "image", progress):
        batch = validation[index]
        clean, mask = batch.clean[0, 0].numpy(), batch.mask[0, 0].numpy()
        generator = seeded_generator("calibrate", batch.meta[0].path)
        for _, level in itertools.product(range(CALIBRATION_SQUARES), levels):
            row, column = (
                int(torch.randint(max(1, length - CALIBRATION_SIDE + 1), (), generator=generator))
                for length in clean.shape
            )
            part, inside = (square(image, row, column, CALIBRATION_SIDE) for image in (clean, mask))
            noise = NoiseModel.from_level(level)
            degraded = simulate_low_dose(torch.from_numpy(part), level, generator).numpy()
            restored = restore_image(restorer, degraded, noise, f"calibrate {batch.meta[0].path} {level}").pixels
            cases.append(CalibrationCase(part, degraded, restored, noise, inside, batch.meta[0].patient))
    return fit(cases)


@dataclass
class Collector:
    """Takes note, image by image, of how the intervals do."""

    calibration: Calibration
    folder: Path | None  # where the maps of `shown` images go
    shown: set[int]
    suffix: str = ".png"
    intervals: list[Interval] = field(default_factory=list)
    cleans: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    local: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: Batch, restored: np.ndarray) -> None:
        """The restoration (H, W) of a batch of one."""
        noise = NoiseModel.from_level(float(batch.level[0]))
        clean, degraded = batch.clean[0, 0].cpu().numpy(), batch.degraded[0, 0].cpu().numpy()
        mask = batch.mask[0, 0].cpu().numpy()
        interval = predict(self.calibration, degraded, restored, noise)
        if self.folder is not None and batch.meta[0].key.index in self.shown:
            name = Path(batch.meta[0].path).with_suffix("").as_posix().replace("/", "_")
            save_picture(picture(clean, interval), self.folder / f"uncertainty-{name}{self.suffix}")
        # every n-th pixel is enough, and all of a large test set would not fit into memory
        step = max(1, round((clean.size / KEPT_PIXELS) ** 0.5))
        thin = slice(None, None, step), slice(None, None, step)
        kept = {part.name: getattr(interval, part.name)[thin].copy() for part in dataclasses.fields(interval)}
        self.intervals.append(Interval(**kept))
        self.cleans.append(clean[thin].copy())
        self.masks.append(mask[thin].copy())
        self.local.append(local_error(restored, clean)[thin])

    def coverage(self) -> Coverage:
        """How the intervals did on all of them."""
        return assess(self.intervals, self.cleans, self.masks, local=self.local)


def coverage_text(coverage: Coverage) -> str:
    """A line a region: coverage, by intensity too, and how wide the intervals are against a constant one."""
    lines = []
    for name, region in (("whole image", coverage.image), ("inside the breast", coverage.breast)):
        if region is None:
            continue
        bins = ", ".join(f"{share:.1%}" for share in region.bin_coverage)
        lines.append(
            f"{1 - MISS:.0%} interval, {name}: holds {region.coverage:.1%} (by intensity {bins}); mean width {region.width:.4f}, "
            f"{region.ratio:.2f} of a constant width of the same coverage ({region.constant_width:.4f}; {region.oracle:.2f} if the "
            f"error within {SMOOTH:g} pixels were known)"
        )
    return "\n".join(lines)


def _bins(region: Region, where: str) -> ReportCoverage:
    lower = [0.0, *region.bin_upper[:-1]]
    bins = [
        CoverageBin(low, high, coverage, width)
        for low, high, coverage, width in zip(
            lower, region.bin_upper, region.bin_coverage, region.bin_width, strict=True
        )
    ]
    overall = CoverageBin(0.0, region.bin_upper[-1], region.coverage, region.width, region.pixels)
    return ReportCoverage(1 - MISS, bins, overall, region.constant_width, where)


# Maps a low dose (H, W), its noise and a name to a restored image.
Restore = Callable[[np.ndarray, NoiseModel, str], np.ndarray]


def noise_and_bias(
    test_set: MammogramDataset, methods: Mapping[str, Restore], *, progress: bool = True
) -> tuple[dict[str, ErrorSplit], dict[str, PowerSpectrum]]:
    """The normalised error split into residual noise and bias, and the residual's spectrum, by method and of the input.

    Over several realisations of the noise of a square in the middle of the breast of a few test images.
    """
    level = test_set.hps.noise_level
    noise = NoiseModel.from_level(level)
    splits: dict[str, list[ErrorSplit]] = {name: [] for name in (INPUT, *methods)}
    patches: dict[str, list[np.ndarray]] = {name: [] for name in splits}
    for index in tracked(spread(len(test_set), SPLIT_IMAGES), "noise and bias", "image", progress):
        batch = test_set[index]
        clean, mask = batch.clean[0, 0].numpy(), batch.mask[0, 0].numpy()
        side = min(SPLIT_SIDE, *clean.shape)
        rows, columns = np.nonzero(mask)
        row, column = (
            int(min(max(0, np.median(places) - side // 2), length - side))
            for places, length in zip((rows, columns), clean.shape, strict=True)
        )
        part, inside = square(clean, row, column, side), square(mask, row, column, side)
        name = batch.meta[0].path
        lows = [
            simulate_low_dose(torch.from_numpy(part), level, seeded_generator("realisation", name, r)).numpy()
            for r in range(REALISATIONS)
        ]
        edge = min(SPECTRUM_SIDE, side)
        for method in splits:
            images = lows if method == INPUT else [methods[method](v, noise, f"{name} {r}") for r, v in enumerate(lows)]
            splits[method].append(mnse_decomposition(np.stack(images), part, inside))
            middle = (side - edge) // 2
            patches[method] += [square(image - part, middle, middle, edge) for image in images]
    spectra = {name: noise_power_spectrum(np.stack(own), PIXEL_MM) for name, own in patches.items()}
    return {name: ErrorSplit.pooled(own) for name, own in splits.items()}, spectra


def report_case(
    batch: Batch, restored: np.ndarray, calibration: Calibration | None, classical: np.ndarray | None
) -> ReportCase:
    """An image of the page: low dose, BM3D (H, W) where it is there, restored, and the expected error."""
    noise = NoiseModel.from_level(float(batch.level[0]))
    clean, low, mask = (v[0, 0].cpu().numpy() for v in (batch.clean, batch.degraded, batch.mask))
    images = {INPUT: low}
    if classical is not None:
        images[BM3D] = classical
    images[RESTORED] = restored
    truth, inside = torch.from_numpy(clean)[None], torch.from_numpy(mask)[None]
    labels = {}
    for name, image in images.items():
        figures = image_metrics(torch.from_numpy(np.asarray(image, np.float32))[None], truth, inside)
        labels[name] = f"{figures.psnr_breast:.2f} dB, SSIM {figures.ssim_breast:.4f} in the breast"
    std = None if calibration is None else predict(calibration, low, restored, noise).std
    close_ups = choose_close_ups(clean, mask, batch.meta[0].info.get("calcifications", ()))
    return ReportCase(batch.meta[0].path, clean, images, std, labels, close_ups)


def write_page(
    folder: Path,
    evaluation: Evaluation,
    *,
    title: str,
    provenance: dict,
    logs: Sequence[tuple[str, Path]],
    cases: Sequence[ReportCase],
    coverage: Coverage | None,
    splits: dict[str, ErrorSplit],
    spectra: dict[str, PowerSpectrum],
) -> Path:
    """Write `report.html` into an evaluation's folder; `logs` are the names and folders of the trainings."""
    curves = [curve for name, place in logs for curve in read_curves(place / "log.csv", name)]
    path = folder / "report.html"
    breast = None if coverage is None else coverage.breast or coverage.image
    where = "inside the breast" if coverage is not None and coverage.breast else "of whole images"
    images = evaluation.per_image["path"].nunique()
    write_report(
        path,
        Report(
            title,
            f"{images} test images; every figure stands beside the low-dose input's",
            provenance,
            evaluation,
            curves,
            splits,
            spectra,
            None if breast is None else _bins(breast, where),
            cases,
        ),
    )
    return path


def write_coverage(folder: Path, calibration: Calibration, coverage: Coverage) -> None:
    """Write `uncertainty.json`, the calibration that main-restore.py takes, and `coverage.json`."""
    calibration.to_json(folder / "uncertainty.json")
    write_json(folder / "coverage.json", dataclasses.asdict(coverage))


# --- the whole of it -------------------------------------------------------------------------------------------------


def restore_test_set(
    args: argparse.Namespace,
    hps: HParams,
    model: LatentDiffusion,
    first_stage: VQVAE2Wrapper,
    checkpoints: tuple[Checkpoint, Checkpoint],
    device: torch.device,
) -> list[str]:
    """Table, files, pictures and page of the restored test set: DDIM samples, and the mean that one evaluation gives.

    The expected error is calibrated on validation images first. Returns what was wrong with images that are left out.
    """
    validation_set, test_set = load_datasets(args, hps, "validation", "test")
    left_out = [*validation_set.left_out, *test_set.left_out]
    progress = not args.no_tqdm
    amp = half_precision(device, args.half)
    # what the network has seen does not change with the task that it is evaluated on
    seen = {key: checkpoints[1].hps[key] for key in ("noise_levels", "windowing")}
    sampler = Restorer(
        first_stage.to(device), model.to(device), hps.updated(**seen), hps.ddim_steps, seed=args.seed, amp=amp
    )
    mean = dataclasses.replace(sampler, steps=1)
    default = dataclasses.replace(mean, views=hps.views)

    def restore(restorer: Restorer, batch: Batch) -> Tensor:
        noise, name = NoiseModel.from_level(float(batch.level[0])), batch.meta[0].path
        if not restorer.stabilized:
            return restorer.restore(batch.degraded, [name], noise=noise, progress=progress)
        # as main-restore.py does, borders mirrored and edges taken apart
        image = batch.degraded[0, 0].cpu().numpy()
        pixels = restore_image(restorer, image, noise, name, progress=progress).pixels
        return torch.from_numpy(pixels)[None, None]

    def restore_part(image: np.ndarray, noise: NoiseModel, name: str) -> np.ndarray:
        return restore_image(default, image, noise, name).pixels

    # without noise there is no error to expect, and real pairs are of a noise that nobody has told
    simulated = hps.noise_level > 0 and "real" not in test_set.noise
    shown = set(spread(len(test_set), CASES))
    collector = None
    if simulated and len(validation_set.patients()) < 2:
        print("no expected error: its calibration takes the images of two validation patients at least")
    elif simulated:
        calibration = calibrate(default, validation_set, progress=progress)
        collector = Collector(
            calibration, evaluation_folder(args, args.load_path), shown, ".jpg" if args.save_jpg else ".png"
        )
    cases = []
    kept: dict[int, np.ndarray] = {}  # BM3D of shown images, which table and page both want

    def classical(batch: Batch) -> np.ndarray:
        index = batch.meta[0].key.index
        if index in kept:
            return kept[index]
        image = vst_bm3d(batch.degraded[0, 0].cpu().numpy(), NoiseModel.from_level(float(batch.level[0])))
        if index in shown:
            kept[index] = image
        return image

    def restore_default(batch: Batch) -> Tensor:
        pixels = restore(default, batch)[0, 0].clamp(0, 1).float().cpu().numpy()
        if collector is not None:
            collector.add(batch, pixels)
        if not args.no_save and batch.meta[0].key.index in shown:
            rival = classical(batch) if bm3d_is_there() else None
            cases.append(report_case(batch, pixels, collector and collector.calibration, rival))
        return torch.from_numpy(pixels)[None, None]

    restored = f"restored, DDIM {hps.ddim_steps}"
    methods = {
        "autoencoder pass": lambda batch: first_stage.decode(
            first_stage.encode(batch.degraded, batch.noise), shape=batch.clean.shape[-2:], noise=batch.noise
        ),
        "posterior mean, 1 step": restore_default if hps.views == 1 else lambda batch: restore(mean, batch),
        restored: lambda batch: restore(sampler, batch),
    }
    if args.bm3d:
        methods = {BM3D: lambda batch: torch.from_numpy(classical(batch))[None, None], **methods}
    if hps.views > 1:
        methods[f"default, {default.evaluations} evaluations"] = restore_default
    result = run_evaluation(
        args,
        hps,
        test_set,
        methods,
        device,
        checkpoints,
        title=f"stage 2 (EMA weights, eta {hps.ddim_eta})",
        pictured=("autoencoder pass", list(methods)[-1]),
        note=lambda: {
            "vqvae": str(args.vqvae_path),
            "settings": {key: hps[key] for key in ("ddim_steps", "ddim_eta", "ddim_spacing", "views")},
        },
    )
    coverage = None
    if collector is not None:
        coverage = collector.coverage()
        print(coverage_text(coverage))
    folder = evaluation_folder(args, args.load_path)
    if folder is None:
        return left_out
    if collector is not None:
        write_coverage(folder, collector.calibration, coverage)
    splits, spectra = {}, {}
    if simulated:
        parts = {"restored": restore_part} | (
            {BM3D: lambda image, noise, _: vst_bm3d(image, noise)} if bm3d_is_there() else {}
        )
        splits, spectra = noise_and_bias(test_set, parts, progress=progress)
    if not bm3d_is_there():
        print("without BM3D beside it: pip install -r requirements-benchmarks.txt adds it to the page")
    logs = [("stage 1", args.vqvae_path), ("stage 2", args.load_path)]
    page = write_page(
        folder,
        result,
        title=f"Restoration of {args.task} at noise level {hps.noise_level:g}",
        provenance=result.note | {"hyperparameters": dict(hps)},
        logs=[(name, path if path.is_dir() else path.parent) for name, path in logs],
        cases=cases,
        coverage=coverage,
        splits=splits,
        spectra=spectra,
    )
    print(f"the page to look at: {page}")
    return left_out
