"""How good is the restoration of a detector's images? The product beside BM3D told the spectrum and the authors' own.

On `DETECTOR_DIR`: the error and its spectrum, its split into bias and noise, and d' of a model observer that looks for a
cluster of calcifications. On phantoms: d' of so many pairs that its standard error is small.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flags import DETECTOR_FILE, DETECTOR_PARTS, DOSES, detector_arguments

if __name__ == "__main__":
    ARGUMENTS = detector_arguments(__doc__.splitlines()[0])  # torch comes after the flags

import numpy as np
import pandas as pd
import torch

from evaluation import metrics
from evaluation.observer import cho_dprime, convolution_channels
from helper import UserError, counted, format_table, get_device, seeded_generator, tracked
from preprocessing.estimate import estimate_noise
from preprocessing.noise import KERNEL_SIDE, NoiseModel, kernel_of, unit_noise
from restoration.classical import vst_bm3d
from restoration.dose import to_dose
from restoration.restore import restore_image
from restoration.restorer import Restorer
from running.folders import record_run
from running.scripts import run_script
from running.writing import write_text

RECORD = "detector.json"
GE = NoiseModel(0.0315, 2.8, 1.9, electronic_is_white=False)  # Brandao et al.; the kernel is measured
PITCH = 0.1  # mm
PATCH = 64  # pixels a side of residuals whose spectrum is taken
BANDS = (0.1, 1.0, 2.0, 3.0, 5.0)  # 1/mm, edges
FAINT = 1e-3  # of the signal's peak: less is not there
SAME_NOISE = 0.5  # correlation of the noise of a pair from which on it is the same draw
WIDTH = 2.5  # pixels, of the observer's Laguerre-Gauss functions (Brandao et al.)
INPUT, WHITE, CORRELATED = "noisy", "BM3D, white (authors')", "BM3D, correlated (authors')"
BM3D, MEAN, AUTO, SAMPLE = "BM3D, told", "posterior mean, told", "posterior mean, auto", "posterior sample"
AUTHORS = {WHITE: "Denoised", CORRELATED: "Denoised_Ke"}
PHANTOM_SIDE = 96  # pixels
TEXTURE = 0.06  # deviation of a phantom's texture over its mean
PHANTOM_MEAN = 445.0  # signal at half the automatic exposure, as in the data
CONTRAST = 0.02  # of the calcifications: that of the data, 0.08, would take thousands of pairs
CLUSTER = ((30, 36), (44, 62), (52, 45), (60, 28), (66, 58))  # row and column in pixels
SPOT = 1.3  # pixels, deviation of a calcification of 0.31 mm

Stacks = dict[str, np.ndarray]  # methods to images (N, H, W)


# --- images ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Dose:
    """Regions (N, H, W) of one dose, in stored values; each key is a kind, and `absent` or `present`."""

    name: str
    arrays: dict[str, np.ndarray]
    told: list[NoiseModel]  # noise of each region; its kernel is measured on the other half of the regions
    signal: np.ndarray  # (H, W), what the calcifications change on average

    @classmethod
    def read(cls, folder: Path, name: str, most: int | None) -> Dose:
        """Read the first so many regions, all if None; raises UserError naming the file."""
        path, arrays = folder / DETECTOR_FILE, {}
        try:
            with np.load(path) as data:
                for kind in ("NoiseFree", "Noise", *AUTHORS.values()):
                    for side in ("absent", "present"):
                        arrays[f"{kind}_{side}"] = data[f"{name}_{kind}_{side}"].astype(np.float32)
        except KeyError:
            raise UserError(f"{path}: has no dose {name}; choose others by --doses") from None
        except (OSError, ValueError):
            raise UserError(f"{path}: cannot be read; set DETECTOR_DIR or --data to the folder of the data") from None
        noisy, clean = arrays["Noise_absent"], arrays["NoiseFree_absent"]
        half = np.arange(len(clean)) < len(clean) // 2
        kernels = [measured_kernel(noisy[half != side], clean[half != side]) for side in (False, True)]
        told = [dataclasses.replace(GE, kernel=kernels[side]) for side in half.astype(int)]
        signal = (arrays["NoiseFree_present"] - clean).mean(0, dtype=np.float64)
        return cls(name, {key: values[:most] for key, values in arrays.items()}, told[:most], signal)

    def of(self, kind: str) -> np.ndarray:
        """Images (2, N, H, W) without and with calcifications."""
        return np.stack([self.arrays[f"{kind}_{side}"] for side in ("absent", "present")])


def patches_of(images: np.ndarray, side: int) -> np.ndarray:
    """Images (N, H, W) cut into squares (P, side, side)."""
    rows, columns = (range(0, length - side + 1, side) for length in images.shape[1:])
    return np.concatenate([images[:, r : r + side, c : c + side] for r in rows for c in columns])


def measured_kernel(noisy: np.ndarray, clean: np.ndarray) -> torch.Tensor:
    """The kernel (21, 21) of the noise of images (N, H, W), whose clean versions are known, in units of `GE`."""
    deviation = GE.variance(torch.from_numpy(clean)).sqrt().numpy()
    patches = patches_of((noisy - clean) / deviation, PATCH)
    power = (np.abs(np.fft.fft2(patches - patches.mean((1, 2), keepdims=True))) ** 2).mean(0)
    power[0, 0] = (power[0, 1] + power[1, 0]) / 2  # the means are off
    return kernel_of(torch.from_numpy(power), KERNEL_SIDE)


def phantom_pairs(count: int, kernel: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Noisy phantoms (2, count, H, W) without and with a cluster of calcifications, and the signal (H, W).

    Their texture has a power spectrum of 1 / f^3 (Burgess, 2001); both of a pair have the same, and noise of their own.
    """
    side, generator = PHANTOM_SIDE, seeded_generator("detector phantoms")
    frequency = torch.fft.fftfreq(2 * side, dtype=torch.float64)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt().clamp(min=1 / (2 * side))
    white = torch.randn(count, 2 * side, 2 * side, generator=generator, dtype=torch.float64)
    texture = torch.fft.ifft2(torch.fft.fft2(white) * radius**-1.5).real
    # only a part of the periodic texture is shown
    texture = (texture / texture.std((-2, -1), keepdim=True))[:, :side, :side]
    mean = PHANTOM_MEAN * (1 + TEXTURE * texture).clamp(min=0.5)
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    spots = sum(torch.exp(-((rows - r) ** 2 + (columns - c) ** 2) / (2 * SPOT**2)) for r, c in CLUSTER)
    clean = torch.stack([mean, mean * (1 - CONTRAST * spots)]) + GE.offset
    noise = unit_noise(clean.shape, kernel, generator, dtype=clean.dtype)
    return (clean + GE.variance(clean).sqrt() * noise).float().numpy(), (clean[1] - clean[0]).mean(0).numpy()


# --- methods ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """What is compared."""

    args: argparse.Namespace
    restorer: Restorer

    def restorations(self, image: np.ndarray, noise: NoiseModel, name: str) -> dict[str, np.ndarray]:
        """What every method makes of an image (H, W), of which `noise` is told."""
        made = {INPUT: image, BM3D: vst_bm3d(image, noise)}
        made[MEAN] = restore_image(self.restorer, image, noise, name).pixels
        made[AUTO] = restore_image(self.restorer, image, estimate_noise(image).noise, name).pixels
        made |= {f"mean, to {f:g} x the dose": to_dose(image, made[MEAN], noise, f) for f in self.args.to_dose}
        if count := self.args.samples:
            sampler = self.restorer.drawing(count, "dpm++", self.args.steps)
            products = restore_image(sampler, image, noise, name).products
            made |= {SAMPLE: products[0], f"mean of {counted(count, 'sample')}": products.mean(0)}
        return made

    def restore(self, pairs: np.ndarray, told: Iterable[NoiseModel], what: str) -> Stacks:
        """Images (2, N, H, W) restored by every method."""
        rows = []
        for i, noise in enumerate(self.bar(list(told), what)):
            rows.append([self.restorations(pair[i], noise, f"{what} {i} {k}") for k, pair in enumerate(pairs)])
        return {method: np.stack([[own[k][method] for own in rows] for k in (0, 1)]) for method in rows[0][0]}

    def bar(self, items: list, what: str) -> Iterator:
        return tracked(items, what, "pair", not self.args.no_tqdm)

    def write(self, name: str, rows: list[dict]) -> pd.DataFrame:
        """Print rows as a table, and write them to a CSV file of that name."""
        frame = pd.DataFrame(rows)
        write_text(self.args.out / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
        shown = frame.map(lambda value: f"{value:.3f}" if isinstance(value, float) else value)
        print(f"{format_table(list(shown.columns), shown.itertuples(index=False))}")
        return frame


def centred(error: np.ndarray) -> np.ndarray:
    """Errors (..., H, W) less each region's mean: the authors' inverse leaves an offset."""
    return error - error.mean((-2, -1), keepdims=True)


def split_of(dose: Dose, restored: np.ndarray) -> dict[str, float]:
    """MNSE, residual noise and bias^2 in percent, at the brightness of the whole exposure, off the calcifications.

    Both images of a pair show the same tissue: they are two realisations, if their noise is not the same draw.
    """
    signal, clean = dose.signal, dose.of("NoiseFree")[0]
    off = np.abs(signal) < FAINT * np.abs(signal).max()
    noise = (dose.of("Noise") - dose.of("NoiseFree"))[:, :, off]
    splits = []
    for i, truth in enumerate(clean):
        if np.corrcoef(noise[0, i], noise[1, i])[0, 1] < SAME_NOISE:
            own = truth + centred(restored[:, i] - truth)
            peak = float(truth.max())
            parts = metrics.mnse_decomposition((own - GE.offset) / peak, (truth - GE.offset) / peak, off).overall()
            splits.append({name: 100 * value * peak / DOSES[dose.name] for name, value in parts.items()})
    return {f"{name} %": float(np.mean([split[name] for split in splits] or [np.nan])) for name in metrics.PARTS}


def band_ratios(error: np.ndarray, noise: np.ndarray) -> dict[str, float]:
    """Power of errors (N, H, W) over that of the noise, in `BANDS`."""
    own, given = (metrics.noise_power_spectrum(patches_of(part, PATCH), PITCH) for part in (error, noise))
    band = np.digitize(own.frequencies, BANDS)
    edges = list(zip(BANDS, BANDS[1:], strict=False))
    sums = [[(part.power * part.counts)[band == i + 1].sum() for i in range(len(edges))] for part in (own, given)]
    ratios = np.divide(*sums).tolist()
    return {f"NPS {low:g}-{high:g}/mm": ratio for (low, high), ratio in zip(edges, ratios, strict=True)}


def detectability(stacks: Stacks, signal: np.ndarray, rival: str) -> dict[str, dict[str, float]]:
    """d' of every method on images (2, N, H, W), and its difference from a rival's, with errors; nothing of too few pairs."""
    channels = convolution_channels(signal, WIDTH)
    try:
        found = {method: cho_dprime(*pairs, channels) for method, pairs in stacks.items()}
    except ValueError:
        return {method: {} for method in stacks}
    differences = {method: own - found[rival] for method, own in found.items()}
    return {
        method: {"d'": own.value, "+-": own.error, "d' more": more.value, "+- more": more.error}
        for (method, own), more in zip(found.items(), differences.values(), strict=True)
    }


# --- parts -----------------------------------------------------------------------------------------------------------


def run_data(bench: Bench) -> dict:
    """Every method on the data's regions at each dose."""
    rows = []
    for name in bench.args.doses:
        dose = Dose.read(bench.args.data, name, bench.args.regions)
        stacks = bench.restore(dose.of("Noise"), dose.told, name) | {"noise-free": dose.of("NoiseFree")}
        stacks |= {method: dose.of(kind) for method, kind in AUTHORS.items()}
        clean, own = dose.of("NoiseFree"), []
        seen = detectability(stacks, dose.signal, CORRELATED)
        for method, pairs in stacks.items():
            error = centred(pairs - clean)[0]
            row = {"dose": name, "method": method, "MSE": float((error**2).mean())}
            row |= split_of(dose, pairs) | seen[method]
            own.append(row | band_ratios(error, centred(stacks[INPUT] - clean)[0]))
        found = {row["method"]: row["MSE"] for row in own}
        for row in own:
            row |= {"/ BM3D": row["MSE"] / found[BM3D], "/ authors'": row["MSE"] / found[CORRELATED]}
        rows += own
        print(
            f"\n{name}: {counted(clean.shape[1], 'region')}; MSE without calcifications and means; d' against {CORRELATED}"
        )
        bench.write("detector", rows)
    return {"rows": rows}


def run_phantoms(bench: Bench) -> dict:
    """d' of every method on phantoms with the detector's noise at half the exposure."""
    if not bench.args.phantoms:
        return {}
    kernel = Dose.read(bench.args.data, "50prct", None).told[0].kernel
    pairs, signal = phantom_pairs(bench.args.phantoms, kernel)
    told = [dataclasses.replace(GE, kernel=kernel)] * len(pairs[0])
    found = detectability(bench.restore(pairs, told, "phantoms"), signal, BM3D)
    rows = [{"method": method} | row for method, row in found.items()]
    size = f"{PHANTOM_SIDE} x {PHANTOM_SIDE} pixels"
    print(f"\n{counted(len(told), 'pair')} of phantoms, {size}, contrast {CONTRAST:g}; d' against {BM3D}")
    bench.write("phantoms", rows)
    return {"pairs": len(told), "rows": rows}


PARTS = dict(zip(DETECTOR_PARTS, (run_data, run_phantoms), strict=True))


# --- the script ------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    for name in args.doses:
        Dose.read(args.data, name, args.regions)  # is it there? say so at once
    restorer = Restorer.load(args.vqvae_path, args.load_path, get_device(args.cpu, args.cuda))
    bench, parts = Bench(args, restorer), {}
    print(f"{restorer.name}; results go to {args.out}")
    for name in args.parts:
        parts[name] = PARTS[name](bench)
        record_run(args.out, restorer.hps, 0, RECORD, parts=parts)


if __name__ == "__main__":
    run_script(functools.partial(main, ARGUMENTS))
