"""How good is the restoration? Posterior mean and posterior samples beside the input and VST-BM3D, on images no training saw.

Parts, the cheap ones first: `calcifications`, contrast kept on phantoms; `mnse`, error split into noise and bias, and its
spectrum; `crops`, every method on one fixed crop an image at several noise levels, with what tells a sampler from a smoother;
`native`, the posterior mean and BM3D on whole breasts at several levels.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flags import MEAN_OF, QUALITY_PARTS, quality_arguments

if __name__ == "__main__":
    ARGUMENTS = quality_arguments(__doc__.splitlines()[0])  # torch comes after the flags

import numpy as np
import pandas as pd
import quality_tables as tables
import torch
from quality_images import (
    PHANTOM_PITCH,
    SHARES,
    Case,
    KeptBM3D,
    Scene,
    crop_place,
    kernel_of_correlation,
    read_case,
    window,
)
from quality_tables import MEAN

from evaluation import metrics
from evaluation.table import BM3D, INPUT
from evaluation.uncertainty import Calibration, SampledImage, Tally
from files.prepared import Record
from files.splits import folder_records
from helper import UserError, counted, get_device, tracked
from hps import HPS_VQVAE
from preprocessing.noise import NoiseModel
from preprocessing.stabilize import stabilize
from restoration.classical import vst_bm3d
from restoration.restore import restore_image
from restoration.restorer import Restorer
from running.folders import record_run
from running.scripts import run_script
from running.writing import write_text

RECORD = "restoration.json"
LEVEL = 0.2  # noise level of the parts `calcifications` and `mnse`
PATCH = 64  # pixels a side of the residuals whose spectrum is taken
DIAMETERS = (1.0, 3.0)  # pixels


@dataclasses.dataclass
class Bench:
    """What the parts share."""

    args: argparse.Namespace
    restorer: Restorer
    records: list[Record]  # of the test set

    @functools.cached_property
    def cases(self) -> list[Case]:
        """The test images."""
        return [read_case(record, self.args.scale) for record in self.bar(self.records, "test images")]

    @property
    def bm3d(self) -> KeptBM3D:
        return KeptBM3D(self.args.out / "bm3d", self.args.workers, not self.args.no_tqdm)

    def mean(self, image: np.ndarray, noise: NoiseModel, name: str) -> np.ndarray:
        """The posterior mean of an image (H, W)."""
        return restore_image(self.restorer, image, noise, name).pixels

    def bar(self, items: Iterable, what: str, total: int | None = None) -> Iterator:
        """The items under a progress bar, or with a line a minute."""
        return tracked(items, what, "image", not self.args.no_tqdm, total)

    def write_rows(self, name: str, rows: list[dict]) -> pd.DataFrame:
        """Rows as a table, which is also written to a CSV file of that name."""
        frame = pd.DataFrame(rows)
        write_text(self.args.out / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
        return frame


def figures_of(case: Case, image: np.ndarray, **row: object) -> dict:
    """A row of the per-image table: what `row` says, and the figures of an image (H, W) against the clean one."""
    restored, clean, mask = (torch.from_numpy(v)[None] for v in (image, case.clean, case.mask))
    figures = dataclasses.asdict(metrics.image_metrics(restored, clean, mask))
    figures["ms_ssim"] = metrics.ms_ssim(restored, clean)
    return {"path": case.key, **row} | {name: figures[name] for name in tables.FIGURES}


# --- parts -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def autoencode(restorer: Restorer, image: np.ndarray, noise: NoiseModel, quantize: bool) -> np.ndarray:
    """An image (H, W) through the first stage alone, past its codebooks or through them."""
    stage = restorer.first_stage
    x = torch.from_numpy(image)[None, None].to(restorer.device)
    decoded = stage.decode(stage.encode(x, noise), quantize, x.shape[-2:], noise)
    return decoded[0, 0].clamp(0, 1).cpu().numpy()


@dataclasses.dataclass
class CropLevel:
    """What is measured on the crops at one noise level."""

    level: float
    factor: float  # of the calibration
    kernel: torch.Tensor | None = None  # of the noise
    rows: list[dict] = dataclasses.field(default_factory=list)
    power: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # sums of `band_power` by method
    tally: Tally = dataclasses.field(default_factory=Tally)

    @property
    def noise(self) -> NoiseModel:
        return NoiseModel.from_level(self.level, self.kernel)

    def add(self, bench: Bench, crop: Case, low: np.ndarray, rival: np.ndarray) -> None:
        """Take note of what every method makes of a crop's noisy image (H, W); `rival` is its BM3D."""
        restorer, noise, args = bench.restorer, self.noise, bench.args
        images = {INPUT: (low, 0), BM3D: (rival, 0), "autoencoder pass": (autoencode(restorer, low, noise, False), 0)}
        if self.level == LEVEL:  # these do not see the noise
            images["clean, continuous"] = autoencode(restorer, crop.clean, noise, False), 0
            images["clean, quantised"] = autoencode(restorer, crop.clean, noise, True), 0
        images[MEAN] = bench.mean(low, noise, crop.key), restorer.evaluations
        ddim = restorer.drawing(1, "ddim", args.ddim_steps)
        fast = restorer.drawing(args.samples, "dpm++", args.fast_steps)
        exact, many = (restore_image(sampler, low, noise, crop.key).products for sampler in (ddim, fast))
        steps = fast.sampling.steps
        images[f"posterior sample, {ddim.sampling}"] = exact[0], 1 + ddim.sampling.steps
        images[f"posterior sample, {fast.sampling}"] = many[0], 1 + steps
        images[f"mean of {MEAN_OF} posterior samples"] = many[:MEAN_OF].mean(0), 1 + MEAN_OF * steps
        for method, (image, count) in images.items():
            self.rows.append(figures_of(crop, image, level=self.level, method=method, evaluations=count))
            self.add_power(method, image)
        self.add_power("clean", crop.clean)
        self.tally.add(SampledImage(crop.clean, many, crop.mask, self.level), self.factor)

    def add_power(self, method: str, image: np.ndarray) -> None:
        """Take note of the power of an image (H, W), stabilised."""
        power = metrics.band_power(stabilize(torch.from_numpy(image).double(), self.noise).numpy())
        self.power[method] = self.power.get(method, 0) + power

    def report(self) -> dict:
        """Print the tables; what belongs into the record."""
        summary, coverage = tables.summarise(pd.DataFrame(self.rows)), self.tally.coverage()
        shares = {method: power / self.power["clean"] for method, power in self.power.items() if method != "clean"}
        print(f"{tables.quality_table(summary)}\n\n{tables.paired_table(summary)}\n")
        print(f"{tables.sampler_table(summary, shares)}\n{coverage}")
        return {
            "methods": summary,
            "power_over_clean": {method: share.tolist() for method, share in shares.items()},
            "coverage": dataclasses.asdict(coverage),
        }


def run_crops(bench: Bench) -> dict:
    """Every method on the fixed crop of every image, at each level."""
    args, calibration = bench.args, Calibration.from_json(bench.args.calibration)
    places = {case.key: crop_place(case, args.crop) for case in bench.cases}
    levels, rows, kernel = {}, [], kernel_of_correlation(args.correlation)
    for level in args.levels:
        lows = [window(case.low_dose(level, kernel=kernel), places[case.key]) for case in bench.cases]
        result = CropLevel(level, calibration.factor(level), kernel)
        rivals = bench.bm3d.restore(lows, result.noise, f"crops, level {level:g}")
        given = list(zip(bench.cases, lows, rivals, strict=True))
        for case, low, rival in bench.bar(given, f"crops, level {level:g}"):
            result.add(bench, case.crop(places[case.key]), low, rival)
        rows += result.rows
        bench.write_rows("crops", rows)
        noise = f"noise level {level:g}, correlation {args.correlation:g}"
        print(f"\ncrops: {counted(len(places), 'image')}, {args.crop} x {args.crop} native pixels, {noise}")
        levels[f"{level:g}"] = result.report()
    return {"levels": levels, "crop": args.crop, "places": places}


def run_native(bench: Bench) -> dict:
    """Input, BM3D and the posterior mean on whole breasts at each level."""
    rows, summaries = [], {}
    for level in bench.args.levels:
        noise = NoiseModel.from_level(level)
        lows = [case.low_dose(level) for case in bench.cases]
        rivals = bench.bm3d.restore(lows, noise, f"native, level {level:g}")
        own = []
        given = list(zip(bench.cases, lows, rivals, strict=True))
        for case, low, rival in bench.bar(given, f"{MEAN}, native, level {level:g}"):
            mean = bench.mean(low, noise, case.key), bench.restorer.evaluations
            for method, (image, count) in {INPUT: (low, 0), BM3D: (rival, 0), MEAN: mean}.items():
                own.append(figures_of(case, image, level=level, method=method, evaluations=count))
        rows += own
        bench.write_rows("native", rows)
        summaries[f"{level:g}"] = summary = tables.summarise(pd.DataFrame(own))
        print(f"\nnative: {counted(len(bench.cases), 'image')}, noise level {level:g}")
        print(f"{tables.quality_table(summary)}\n\n{tables.paired_table(summary)}")
    return {"levels": summaries}


def patches_of(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W) cut into as many squares (P, side, side) as it has room for, from its top left corner."""
    rows, columns = (length // side for length in image.shape)
    grid = image[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return grid.transpose(0, 2, 1, 3).reshape(-1, side, side)


def run_mnse(bench: Bench) -> dict:
    """The split of the normalised error over realisations of the noise, and the spectrum of what is left."""
    args, noise, pitch = bench.args, NoiseModel.from_level(LEVEL), bench.args.pitch / bench.args.scale
    crops = [case.crop(crop_place(case, args.crop)) for case in bench.cases]
    lows = [[crop.low_dose(LEVEL, r) for r in range(args.realisations)] for crop in crops]
    rivals = iter(bench.bm3d.restore([low for own in lows for low in own], noise, "realisations"))
    splits: dict[str, list[metrics.ErrorSplit]] = {INPUT: [], BM3D: [], MEAN: []}
    spectra: dict[str, list[metrics.PowerSpectrum]] = {method: [] for method in splits}
    rows = []
    for crop, own in bench.bar(list(zip(crops, lows, strict=True)), f"{MEAN}, {args.realisations} realisations"):
        images = {INPUT: own, BM3D: list(itertools.islice(rivals, args.realisations))}
        images[MEAN] = [bench.mean(low, noise, f"{crop.key} {r}") for r, low in enumerate(own)]
        for method, stack in ((method, np.stack(made)) for method, made in images.items()):
            splits[method].append(split := metrics.mnse_decomposition(stack, crop.clean, crop.mask))
            residual = np.concatenate([patches_of(image, min(PATCH, args.crop)) for image in stack - crop.clean])
            spectra[method].append(metrics.noise_power_spectrum(residual, pitch))
            rows.append({"path": crop.key, "method": method, **split.overall()})
    wide = bench.write_rows("mnse", rows).pivot(index="path", columns="method", values="bias_squared")
    pooled = {method: metrics.ErrorSplit.pooled(own) for method, own in splits.items()}
    power = {method: np.mean([own.power for own in spectrum], axis=0) for method, spectrum in spectra.items()}
    frequencies = spectra[INPUT][0].frequencies
    on = f"{counted(len(crops), 'crop')}, {args.realisations} realisations, noise level {LEVEL:g}"
    print(f"\nmean normalised squared error in units of 1e-4: {on}\n{tables.mnse_table(pooled)}")
    print(f"\nnoise power of restored - clean in units of 1e-7 mm^2\n{tables.spectrum_table(frequencies, power)}")
    by_bin = {m: {name: getattr(split, name).tolist() for name in metrics.PARTS} for m, split in pooled.items()}
    power_mm2 = {method: values.tolist() for method, values in power.items()}
    return {
        "level": LEVEL, "realisations": args.realisations,
        "overall": {method: split.overall() for method, split in pooled.items()},
        "images_with_no_more_bias_squared_than_bm3d": int((wide[MEAN] <= wide[BM3D]).sum()),
        "by_intensity": {"edges": list(metrics.INTENSITY_BINS), "pixels": pooled[INPUT].counts.tolist(), "methods": by_bin},
        "noise_power": {"pitch_mm": pitch, "frequencies_per_mm": frequencies.tolist(), "power_mm2": power_mm2},
    }  # fmt: skip


def run_calcifications(bench: Bench) -> dict:
    """Contrast of phantom calcifications of 1 to 3 pixels, restored over clean, by their CNR in the clean image."""
    args, noise = bench.args, NoiseModel.from_level(LEVEL)
    scenes = list(bench.bar(Scene.draw(args.phantoms, args.crop), "phantoms", total=args.phantoms * len(SHARES)))
    lows = [scene.case.low_dose(LEVEL) for scene in scenes]
    rivals = bench.bm3d.restore(lows, noise, "calcifications")
    sampler = bench.restorer.drawing(1, "ddim", args.ddim_steps)
    rows = []
    for scene, low, rival in bench.bar(list(zip(scenes, lows, rivals, strict=True)), MEAN):
        name, drawn = scene.case.key, scene.calcifications
        images = {INPUT: low, BM3D: rival, MEAN: bench.mean(low, noise, name)}
        images[sampler.product] = restore_image(sampler, low, noise, name).pixels
        for method, image in images.items():
            rows += [
                {"phantom": scene.phantom, "share": scene.share}
                | {name: getattr(c, name) for name in ("row", "column", "diameter")}
                | {"method": method, **dataclasses.asdict(figure)}
                for c, figure in zip(drawn, metrics.calcification_contrast(image, scene.case.clean, drawn), strict=True)
                if figure is not None and DIAMETERS[0] <= c.diameter <= DIAMETERS[1]
            ]
    if not rows:
        raise UserError(f"--phantoms {args.phantoms}: none has a calcification to measure; ask for more")
    frame = bench.write_rows("calcifications", rows)
    kept = tables.contrast_kept(frame)
    print(
        f"\ncontrast kept, restored over clean: {counted((frame['method'] == INPUT).sum(), 'calcification')} of "
        f"{DIAMETERS[0]:g} to {DIAMETERS[1]:g} pixels on {counted(args.phantoms, 'phantom')}, at full contrast and at "
        f"{SHARES[1]:g} of it, noise level {LEVEL:g}\n{tables.contrast_table(kept)}"
    )
    return {"level": LEVEL, "phantoms": args.phantoms, "pixel_mm": PHANTOM_PITCH, "kept": kept}


PARTS = dict(zip(QUALITY_PARTS, (run_calcifications, run_mnse, run_crops, run_native), strict=True))


# --- the script ------------------------------------------------------------------------------------------------------


def earlier_parts(path: Path) -> dict[str, dict]:
    """What a run before this one measured; raises UserError if its file cannot be read."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not of this script's making; choose another --out") from None


def make_bench(args: argparse.Namespace) -> Bench:
    """Read the test set's file names and the model; raises UserError for what is missing or does not fit."""
    vst_bm3d(np.full((16, 16), 0.5, dtype=np.float32), NoiseModel.from_level(LEVEL))  # is it there? say so at once
    if not args.data_root.is_dir():
        raise UserError(f"--data-root {args.data_root}: no such folder")
    if not args.split_csv.is_file():
        raise UserError(f"--split-csv {args.split_csv}: no such file")
    records = folder_records(args.data_root, HPS_VQVAE["folder"].updated(split_csv=str(args.split_csv)))["test"]
    if not records:
        raise UserError(f"--split-csv {args.split_csv}: none of its test images is in {args.data_root}")
    restorer = Restorer.load(args.vqvae_path, args.load_path, get_device(args.cpu, args.cuda))
    for flag, steps in (("--ddim-steps", args.ddim_steps), ("--fast-steps", args.fast_steps)):
        if (steps or 0) > (most := restorer.hps.timesteps):
            raise UserError(f"{flag} {steps}: the model has {most} timesteps; pass at most as many")
    return Bench(args, restorer, records[: args.images])


def main(args: argparse.Namespace) -> None:
    parts = earlier_parts(args.out / RECORD)
    bench = make_bench(args)
    print(f"{bench.restorer.name}; results go to {args.out}")
    settings = json.loads(json.dumps(vars(args), default=str))
    for name in args.parts:
        # every part says what it was measured with: others may be of an earlier run
        parts[name] = {"model": bench.restorer.name, "settings": settings} | PARTS[name](bench)
        record_run(args.out, bench.restorer.hps, 0, RECORD, parts=parts)
    print(f"\n{RECORD} and {', '.join(f'{name}.csv' for name in args.parts)} written to {args.out}")


if __name__ == "__main__":
    run_script(functools.partial(main, ARGUMENTS))
