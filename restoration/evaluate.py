"""A model evaluated on its test set: a table, how sure it is, what its error is made of, and a page to look at."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from datasets import load_datasets
from diffusion import LatentDiffusion
from evaluation.metrics import (
    BANDS,
    ErrorSplit,
    PowerSpectrum,
    band_power,
    image_metrics,
    mnse_decomposition,
    noise_power_spectrum,
)
from evaluation.page import PageCase, Power, Report, choose_close_ups, read_curves, write_report
from evaluation.pictures import save_picture, spread_picture
from evaluation.table import BM3D, INPUT, Evaluation, Method, picture_name, run_evaluation, spread
from evaluation.uncertainty import Calibration, Coverage, SampledImage, Tally, fit, interval
from helper import counted, format_table, sampling_dtype, seeded_generator, tracked
from hps import HParams
from loading.batches import Batch
from loading.mammograms import MammogramDataset
from preprocessing.degrade import simulate_low_dose
from preprocessing.noise import NoiseModel
from preprocessing.phantom import Calcification
from preprocessing.stabilize import stabilize
from restoration.classical import bm3d_is_there, restore_by_bm3d
from restoration.denoiser import Denoiser
from restoration.restore import restore_image
from restoration.restorer import Restorer
from running.checkpoints import Checkpoint
from running.folders import evaluation_folder
from running.writing import write_json
from vqvae2_wrapper import VQVAE2Wrapper

MEAN_OF = 8  # posterior samples of the table's mean, and of the spread that is shown
SPREAD_SAMPLES = 16  # of the calibration and of the coverage
CALIBRATION_SIDE = 192  # pixels of the squares of validation images that the uncertainty is calibrated on
CALIBRATION_LEVELS = (0.05, 0.2, 0.5, 1.0)  # noise levels: a square of every image for each that the model knows
CALIBRATION_IMAGES = 8  # validation images looked at, evenly spaced
COVERAGE_IMAGES, COVERAGE_SIDE = 4, 512  # test images, evenly spaced, and pixels of the square of each for the coverage
SPLIT_IMAGES, SPLIT_SIDE, REALISATIONS = 4, 256, 4  # of the split into noise and bias
SPECTRUM_SIDE = 64  # pixels of the residuals whose spectrum is taken
PIXEL_MM = 0.2  # pitch that frequencies are given at: that of mini-MIAS, and about that of the full training grid
CURVE_EDGES = tuple(np.linspace(0.02, 0.5, 33))  # cycles a pixel; bins of the curve of power over clean's
CASES = 3  # images on the page, and of the power over clean's
TEXTURE_SIDE = 192  # pixels of the close-up that is there to judge the texture
PASS, MEAN = "autoencoder pass", "posterior mean"
POWER = "power_over_clean"  # in metrics.json, by method and in the bands of `metrics.BANDS`

Window = tuple[slice, slice]  # rows and columns


def window_at(row: float, column: float, side: int, shape: tuple[int, ...]) -> Window:
    """The square of at most `side` pixels around a pixel, moved to lie inside an image of `shape` (H, W)."""
    side = min(side, *shape)
    starts = (int(np.clip(at - side // 2, 0, size - side)) for at, size in zip((row, column), shape, strict=True))
    return tuple(slice(start, start + side) for start in starts)


def middle_window(mask: np.ndarray, side: int) -> Window:
    """The square of at most `side` pixels in the middle of a breast (H, W)."""
    return window_at(*(np.median(places) for places in np.nonzero(mask)), side, mask.shape)


def breast_window(mask: np.ndarray, most: int | None = None) -> Window:
    """The largest square, of at most `most` pixels, that lies inside a breast (H, W)."""
    reach = ndimage.distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1]
    side = 2 * int(reach.max()) - 1
    return window_at(*np.unravel_index(reach.argmax(), reach.shape), min(side, most or side), mask.shape)


@dataclass(frozen=True)
class LowDosePair:
    """A clean image, and a low dose of it."""

    name: str  # path of the image
    clean: np.ndarray  # (H, W) in [0, 1]
    low: np.ndarray  # (H, W) in [0, 1]
    mask: np.ndarray  # (H, W) bool, the breast
    level: float  # noise level of the low dose
    calcifications: Sequence[Calcification] = ()  # of a phantom

    @classmethod
    def of(cls, batch: Batch) -> LowDosePair:
        """That of a batch of one."""
        planes = (v[0, 0].cpu().numpy() for v in (batch.clean, batch.degraded, batch.mask))
        meta = batch.meta[0]
        return cls(meta.path, *planes, float(batch.level[0]), meta.info.get("calcifications", ()))

    @property
    def noise(self) -> NoiseModel:
        """What degraded the low dose."""
        return NoiseModel.from_level(self.level)

    def crop(self, window: Window) -> LowDosePair:
        """A part of both."""
        clean, low, mask = (np.ascontiguousarray(v[window]) for v in (self.clean, self.low, self.mask))
        return dataclasses.replace(self, clean=clean, low=low, mask=mask)

    def simulate(self, level: float, generator: torch.Generator) -> np.ndarray:
        """Another low dose (H, W) of the clean image."""
        return simulate_low_dose(torch.from_numpy(self.clean), level, generator).numpy()


def some_pairs(dataset: MammogramDataset, most: int, what: str, progress: bool) -> Iterator[LowDosePair]:
    """At most `most` images of a data set, evenly spaced, under a progress bar."""
    for index in tracked(spread(len(dataset), most), what, "image", progress):
        yield LowDosePair.of(dataset[index])


# --- uncertainty -----------------------------------------------------------------------------------------------------


def calibrate(sampler: Restorer, validation: MammogramDataset, *, progress: bool = True) -> Calibration:
    """Fit how many times as wide intervals have to be as the samples' spread says, at noise levels that the model knows.

    On a square inside the breast of some validation images. Raises UserError if they have no breast.
    """
    low, high = sampler.level_range
    levels = [level for level in CALIBRATION_LEVELS if low <= level <= high] or [sampler.hps.noise_level]
    sampled = []
    for pair in some_pairs(validation, CALIBRATION_IMAGES, "calibrate", progress):
        generator = seeded_generator("calibrate", pair.name)
        inside = np.argwhere(pair.mask)
        for level in levels if len(inside) else ():
            centre = inside[int(torch.randint(len(inside), (), generator=generator))]
            part = pair.crop(window_at(*centre, CALIBRATION_SIDE, pair.clean.shape))
            degraded = part.simulate(level, generator)
            name = f"calibrate {pair.name} {level}"
            samples = restore_image(sampler, degraded, NoiseModel.from_level(level), name).products
            sampled.append(SampledImage(part.clean, samples, part.mask, level))
    calibration = fit(sampled)
    images = min(len(validation), CALIBRATION_IMAGES)
    about = {"images": images, "samples": sampler.samples, "sampler": str(sampler.sampling)}
    return dataclasses.replace(calibration, about=calibration.about | about)


def count_coverage(
    sampler: Restorer, test_set: MammogramDataset, calibration: Calibration, *, progress: bool = True
) -> tuple[Coverage | None, str]:
    """How the intervals do in the middle of the breast of a few test images; and on how much that is counted, in words."""
    tally = Tally()
    for pair in some_pairs(test_set, COVERAGE_IMAGES, "coverage", progress):
        part = pair.crop(middle_window(pair.mask, COVERAGE_SIDE))
        samples = restore_image(sampler, part.low, part.noise, f"coverage {part.name}").products
        tally.add(SampledImage(part.clean, samples, part.mask, part.level), calibration.factor(part.level))
    images = min(len(test_set), COVERAGE_IMAGES)
    measured = f"{sampler.samples} samples, {sampler.sampling}, of each of {counted(images, 'test image')}"
    return tally.coverage(), f"{measured}, squares of at most {COVERAGE_SIDE} pixels"


# --- error -----------------------------------------------------------------------------------------------------------


def noise_and_bias(
    test_set: MammogramDataset, denoisers: Mapping[str, Denoiser], *, progress: bool = True
) -> tuple[dict[str, ErrorSplit], dict[str, PowerSpectrum]]:
    """The normalised error split into residual noise and bias, and the residual's spectrum, by method and of the input.

    Over several realisations of the noise of a square in the middle of the breast of a few test images.
    """
    level = test_set.hps.noise_level
    noise = NoiseModel.from_level(level)
    splits: dict[str, list[ErrorSplit]] = {name: [] for name in (INPUT, *denoisers)}
    residuals: dict[str, list[np.ndarray]] = {name: [] for name in splits}
    for pair in some_pairs(test_set, SPLIT_IMAGES, "noise and bias", progress):
        part = pair.crop(middle_window(pair.mask, SPLIT_SIDE))
        centre = window_at(*(side // 2 for side in part.clean.shape), SPECTRUM_SIDE, part.clean.shape)
        draws = [seeded_generator("realisation", pair.name, r) for r in range(REALISATIONS)]
        images = {INPUT: [part.simulate(level, draw) for draw in draws]}
        for method, denoise in denoisers.items():
            lows = enumerate(images[INPUT])
            images[method] = [denoise(low, noise, f"{pair.name} {r}").pixels for r, low in lows]
        for method, restored in images.items():
            splits[method].append(mnse_decomposition(np.stack(restored), part.clean, part.mask))
            residuals[method] += [(image - part.clean)[centre] for image in restored]
    spectra = {name: noise_power_spectrum(np.stack(own), PIXEL_MM) for name, own in residuals.items()}
    return {name: ErrorSplit.pooled(own) for name, own in splits.items()}, spectra


# --- images to look at -----------------------------------------------------------------------------------------------


@dataclass
class Shown:
    """A test image to look at, and what was made of it."""

    pair: LowDosePair
    images: dict[str, np.ndarray]  # by method, (H, W), the low dose first
    std: np.ndarray | None = None  # expected error, (H, W)

    def page_case(self, estimate: str) -> PageCase:
        """What the page shows of it; the error drawn is that of the method `estimate`."""
        clean, mask = self.pair.clean, self.pair.mask
        truth, inside = torch.from_numpy(clean)[None], torch.from_numpy(mask)[None]
        figures = {name: image_metrics(torch.from_numpy(v)[None], truth, inside) for name, v in self.images.items()}
        said = "{0.psnr_breast:.2f} dB, SSIM {0.ssim_breast:.4f} in the breast"
        labels = {name: said.format(own) for name, own in figures.items()}
        rows, columns = breast_window(mask, TEXTURE_SIDE)
        close_ups = choose_close_ups(clean, mask, self.pair.calcifications)
        close_ups.append((rows.start, columns.start, rows.stop - rows.start))
        return PageCase(self.pair.name, clean, self.images, estimate, self.std, labels, close_ups)

    def power(self) -> dict[str, list[np.ndarray]]:
        """Power by method, and of the clean image, in `BANDS` and `CURVE_EDGES`, stabilised, inside the breast."""
        window, power = breast_window(self.pair.mask), {}
        for name, image in {"clean": self.pair.clean, **self.images}.items():
            values = stabilize(torch.from_numpy(image[window].copy()), self.pair.noise).numpy()
            power[name] = [band_power(values, edges) for edges in (BANDS, CURVE_EDGES)]
        return power


@dataclass
class Gallery:
    """Keeps, of a few test images, what denoisers make of them."""

    indices: Sequence[int]  # of the images
    names: Sequence[str]  # of the methods
    calibration: Calibration | None
    folder: Path | None  # where the pictures of the uncertainty go
    jpg: bool = False
    shown: dict[int, Shown] = field(default_factory=dict)

    def method(self, name: str, denoise: Denoiser) -> Method:
        """A denoiser as a method of that name for a table."""

        def method(batch: Batch) -> Tensor:
            pair, index = LowDosePair.of(batch), batch.meta[0].key.index
            made = denoise(pair.low, pair.noise, pair.name)
            if index in self.indices:
                shown = self.shown.setdefault(index, Shown(pair, {INPUT: pair.low}))
                if name in self.names:
                    shown.images[name] = made.pixels
                if len(made.products) > 1 and self.calibration is not None:
                    self._note_spread(shown, made.products)
            return torch.from_numpy(made.pixels)[None, None]

        return method

    def _note_spread(self, shown: Shown, samples: np.ndarray) -> None:
        own = interval(samples, self.calibration.factor(shown.pair.level))
        shown.std = own.std
        if self.folder is not None:
            picture = spread_picture(shown.pair.clean, own, samples[0])
            save_picture(picture, self.folder / f"uncertainty-{picture_name(shown.pair.name, self.jpg)}")

    def add_bm3d(self) -> None:
        """Put VST-BM3D beside the low dose if the table has not."""
        for shown in self.shown.values():
            if BM3D not in shown.images:
                classical = restore_by_bm3d(shown.pair.low, shown.pair.noise, shown.pair.name).pixels
                shown.images = {INPUT: shown.images[INPUT], BM3D: classical, **shown.images}

    def power(self) -> dict[str, Power]:
        """Power of the images over the clean ones', by method, in the largest square inside the breast, stabilised."""
        powers = [shown.power() for shown in self.shown.values()]
        total = {name: [sum(parts) for parts in zip(*(p[name] for p in powers), strict=True)] for name in powers[0]}
        bands, curve = total.pop("clean")
        middles = (np.array(CURVE_EDGES[1:]) + CURVE_EDGES[:-1]) / 2
        seen = curve > 0  # small images have no frequency in some bins
        with np.errstate(divide="ignore", invalid="ignore"):
            return {name: Power(a / bands, middles[seen], b[seen] / curve[seen]) for name, (a, b) in total.items()}


def signature_text(evaluation: Evaluation, power: Mapping[str, Power], samples: Mapping[str, int]) -> str:
    """What tells a sampler from a smoother: power over clean's by band, and the PSNR of the posterior mean less others'.

    `samples` says of how many samples the methods of the table that are compared with it are the mean.
    """
    text = []
    if power:
        *bands, last = (f"{low:g}-{high:g}" for low, high in itertools.pairwise(BANDS))
        rows = [[name, *(f"{value:.2f}" for value in own.bands)] for name, own in power.items()]
        text.append(format_table(["power over clean's at", *bands, f"{last} cycles/pixel"], rows))
    summary = evaluation.summary()
    for name, count in samples.items() if MEAN in summary else ():
        gap, ideal = summary[MEAN]["psnr_breast"] - summary[name]["psnr_breast"], 10 * math.log10(1 + 1 / count)
        text.append(f"{MEAN} less {name}: {gap:.2f} dB ({ideal:.2f} if mean and samples are right)")
    return "\n".join(text)


# --- the whole of it -------------------------------------------------------------------------------------------------


def products_of(mean: Restorer) -> list[Restorer]:
    """What a model makes: its posterior `mean`, a posterior sample, and the mean of some; prints which of them it lacks."""
    if not mean.model.has_samples:
        print("no posterior samples: the model's training ended before the diffusion")
        return [mean]
    sample, samples = mean.drawing(1, "ddim"), mean.drawing(MEAN_OF, "dpm++")
    if not mean.model.has_mean:
        print("no posterior mean: the model is a plain diffusion (precondition=none)")
        return [sample, samples]
    return [mean, sample, samples]


def table_methods(args: argparse.Namespace, gallery: Gallery, restorers: Sequence[Restorer]) -> dict[str, Method]:
    """The methods of the table, by name; `gallery` looks at what they make."""
    first_stage = restorers[0].first_stage

    def passed(batch: Batch) -> Tensor:
        latent = first_stage.encode(batch.degraded, batch.noise)
        return first_stage.decode(latent, shape=batch.clean.shape[-2:], noise=batch.noise)

    methods = {BM3D: gallery.method(BM3D, restore_by_bm3d)} if args.bm3d else {}
    methods[PASS] = passed
    for restorer in restorers:
        # a stabilised model as in main-restore.py: borders mirrored, edges taken apart
        of_any_size = functools.partial(restore_image, restorer)
        denoise = of_any_size if restorer.stabilized else restorer.restore_in_one_piece
        denoise = functools.partial(denoise, progress=not args.no_tqdm)
        methods[restorer.product] = gallery.method(restorer.product, denoise)
    return methods


def write_page(folder: Path, args: argparse.Namespace, hps: HParams, evaluation: Evaluation, **parts: Any) -> None:
    """Write `report.html` into an evaluation's folder; `parts` are the report's others."""
    if not bm3d_is_there():
        print("without BM3D beside it: pip install -r requirements-benchmarks.txt adds it to the page")
    logs = [("stage 1", args.vqvae_path), ("stage 2", args.load_path)]
    folders = [(name, path if path.is_dir() else path.parent) for name, path in logs]
    note = {key: value for key, value in evaluation.note.items() if key != POWER}
    report = Report(
        title=f"Restoration of {args.task} at noise level {hps.noise_level:g}",
        subtitle=f"{counted(evaluation.per_image['path'].nunique(), 'test image')}; each figure stands beside the low-dose input's",
        provenance=note | {"hyperparameters": dict(hps)},
        evaluation=evaluation,
        curves=[curve for name, place in folders for curve in read_curves(place / "log.csv", name)],
        **parts,
    )
    write_report(folder / "report.html", report)
    print(f"the page to look at: {folder / 'report.html'}")


def restore_test_set(
    args: argparse.Namespace,
    hps: HParams,
    model: LatentDiffusion,
    first_stage: VQVAE2Wrapper,
    checkpoints: tuple[Checkpoint, Checkpoint],
    device: torch.device,
) -> list[str]:
    """Table, files, pictures and page of the restored test set: posterior mean, posterior sample, and the mean of some.

    The samples' spread is calibrated on validation images first. Returns what was wrong with images that are left out.
    """
    validation_set, test_set = load_datasets(args, hps, "validation", "test")
    progress, folder = not args.no_tqdm, evaluation_folder(args, args.load_path)
    # what the network has seen does not change with the task that it is evaluated on
    seen = hps.updated(noise_levels=checkpoints[1].hps.noise_levels)
    amp = sampling_dtype(device, args.amp, args.no_amp)
    mean = Restorer(first_stage.to(device), model.to(device), seen, seed=args.seed, amp=amp)
    restorers = products_of(mean)
    estimate = restorers[0] if model.has_mean else restorers[-1]
    known = hps.noise_level > 0 and "real" not in test_set.noise  # nobody has told the noise of real pairs
    calibration, parts = None, {}
    if known and model.has_samples:
        sampler = dataclasses.replace(restorers[-1], samples=SPREAD_SAMPLES)
        calibration = calibrate(sampler, validation_set, progress=progress)
    names = [*(r.product for r in restorers if r.samples == 1), estimate.product]
    gallery = Gallery(spread(len(test_set), CASES), [BM3D, *names], calibration, folder, args.save_jpg)

    def note() -> dict:
        if folder is not None and bm3d_is_there():
            gallery.add_bm3d()
        parts["power"] = gallery.power() if known else {}
        settings = {key: hps[key] for key in ("ddim_steps", "ddim_eta", "ddim_spacing", "fast_steps")}
        bands = {name: power.bands.tolist() for name, power in parts["power"].items()}
        return {"vqvae": str(args.vqvae_path), "settings": settings, POWER: bands}

    methods, title = table_methods(args, gallery, restorers), f"stage 2 (EMA weights, eta {hps.ddim_eta})"
    evaluated = args, hps, test_set, methods, device, checkpoints
    result = run_evaluation(*evaluated, title=title, pictured=names, note=note)
    print(signature_text(result, parts["power"], {r.product: r.samples for r in restorers if r.samples}))
    if calibration is not None:
        coverage, counted = count_coverage(sampler, test_set, calibration, progress=progress)
        parts |= {"coverage": coverage, "coverage_note": counted}
        print(f"{coverage or 'no breast to count the coverage in'} ({counted})")
        if folder is not None:
            calibration.to_json(folder / "uncertainty.json")
            figures = {} if coverage is None else dataclasses.asdict(coverage)
            write_json(folder / "coverage.json", figures | {"counted": counted})
    if folder is not None:
        if known:
            denoisers = {estimate.product: functools.partial(restore_image, estimate)}
            denoisers |= {BM3D: restore_by_bm3d} if bm3d_is_there() else {}
            parts["mnse"], parts["spectrum"] = noise_and_bias(test_set, denoisers, progress=progress)
        cases = [shown.page_case(estimate.product) for shown in gallery.shown.values()]
        write_page(folder, args, hps, result, cases=cases, **parts)
    return [*validation_set.left_out, *test_set.left_out]
