"""Figures of `quality.py`, summed up over images, and the tables that show them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats

from evaluation.metrics import BANDS, INTENSITY_BINS, MS_SSIM_SIDE, SSIM_NOTE, ErrorSplit
from evaluation.table import BM3D, INPUT
from helper import format_table

MEAN = "posterior mean"
FIGURES = {  # their names in tables, and decimals
    "psnr_breast": ("PSNR breast", 2), "ssim_breast": ("SSIM breast", 4), "ms_ssim": ("MS-SSIM", 4), "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 4),
}  # fmt: skip
TESTED = ("psnr_breast", "ssim_breast")
CNR_BINS = (0.0, 2.5, 5.0, 10.0, 20.0, np.inf)  # edges


def deviation(values: np.ndarray) -> float:
    """Standard deviation of values (N,); nan if there is one only."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def paired_test(values: np.ndarray, rival: np.ndarray) -> dict[str, float]:
    """A method's figures (N,) against a rival's on the same images: their difference, and how sure it is.

    `t_p` and `wilcoxon_p` are two-sided; nan with fewer than two images, or if no figure differs.
    """
    difference = values - rival
    t_p = wilcoxon_p = math.nan
    if len(difference) > 1 and np.any(difference != 0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # if differences are all alike, p is 0 and scipy warns
            t_p, wilcoxon_p = (float(test(values, rival).pvalue) for test in (stats.ttest_rel, stats.wilcoxon))
    return {
        "difference": float(difference.mean()), "difference_std": deviation(difference),
        "at_least": int((difference >= 0).sum()), "images": len(difference), "t_p": t_p, "wilcoxon_p": wilcoxon_p,
    }  # fmt: skip


def summarise(frame: pd.DataFrame) -> dict[str, dict]:
    """By method, in order: mean and standard deviation of each figure, the input's mean, and the paired tests against BM3D."""
    wide = frame.pivot(index="path", columns="method", values=list(FIGURES))
    summary = {}
    for method, rows in frame.groupby("method", sort=False):
        row: dict = {"evaluations": int(rows["evaluations"].iloc[0])}
        for figure in FIGURES:
            values = wide[figure][method].to_numpy()
            row[figure], row[f"{figure}_std"] = float(values.mean()), deviation(values)
            row[f"{figure}_input"] = float(wide[figure][INPUT].mean())
        if method != BM3D:
            row["against_bm3d"] = {
                figure: paired_test(wide[figure][method].to_numpy(), wide[figure][BM3D].to_numpy()) for figure in TESTED
            }
        summary[method] = row
    return summary


def quality_table(summary: Mapping[str, dict]) -> str:
    """Mean +- standard deviation of each figure and, in brackets, the input's mean; a line says which SSIM it is."""

    def cell(row: dict, figure: str, d: int) -> str:
        if figure == "ms_ssim" and math.isnan(row[figure]):
            return f"none below {MS_SSIM_SIDE} pixels"
        return f"{row[figure]:.{d}f} +- {row[f'{figure}_std']:.{d}f} ({row[f'{figure}_input']:.{d}f})"

    lines = [
        [method, row["evaluations"], *(cell(row, figure, d) for figure, (_, d) in FIGURES.items())]
        for method, row in summary.items()
    ]
    table = format_table(["", "evaluations", *(f"{name} (input)" for name, _ in FIGURES.values())], lines)
    return f"{table}\n{SSIM_NOTE}"


def paired_table(summary: Mapping[str, dict]) -> str:
    """Every method's difference from BM3D inside the breast, in how many images it is at least as good, and p-values."""
    header = [f"inside the breast, against {BM3D}"]
    lines: dict[str, list[str]] = {method: [method] for method in summary if method != BM3D}
    for figure in TESTED:
        name, d = FIGURES[figure][0].removesuffix(" breast"), FIGURES[figure][1]
        header += [f"{name} - BM3D", f"{name} >= BM3D", "p (t)", "p (Wilcoxon)"]
        for method, cells in lines.items():
            test = summary[method]["against_bm3d"][figure]
            cells += [
                f"{test['difference']:+.{d}f} +- {test['difference_std']:.{d}f}",
                f"{test['at_least']} of {test['images']}",
                *(f"{test[p]:.2g}" for p in ("t_p", "wilcoxon_p")),
            ]
    return format_table(header, lines.values())


def sampler_table(summary: Mapping[str, dict], power: Mapping[str, np.ndarray]) -> str:
    """What tells a sampler from a smoother: power over clean's by frequency, and PSNR in the breast below the posterior mean's."""
    best, lines = summary[MEAN]["psnr_breast"], []
    for method, row in summary.items():
        shares = (f"{share:.2f}" for share in power[method])
        lines.append([method, *shares, f"{best - row['psnr_breast']:+.2f}"])
    bands = (f"{low:g}-{high:g}" for low, high in itertools.pairwise(BANDS))
    return format_table(["power over clean's, cycles/pixel", *bands, f"PSNR below the {MEAN}'s"], lines)


def mnse_table(splits: Mapping[str, ErrorSplit]) -> str:
    """Total, residual noise and squared bias in units of 1e-4, overall and by clean intensity."""
    shown = np.flatnonzero(splits[INPUT].counts)
    header = ["", "total", "noise", "bias^2"]
    header += [f"noise + bias^2, x {INTENSITY_BINS[b]:g}-{INTENSITY_BINS[b + 1]:g}" for b in shown]
    lines = [
        [method, *(f"{1e4 * value:.2f}" for value in split.overall().values())]
        + [f"{1e4 * split.residual_noise[b]:.2f} + {1e4 * split.bias_squared[b]:.2f}" for b in shown]
        for method, split in splits.items()
    ]
    return format_table(header, lines)


def spectrum_table(frequencies: np.ndarray, power: Mapping[str, np.ndarray]) -> str:
    """Noise power in units of 1e-7 mm^2 in eight bands of frequency."""
    bands = [band for band in np.array_split(np.arange(len(frequencies)), 8) if len(band)]
    header = ["1/mm", *(f"{frequencies[band[0]]:.2f}-{frequencies[band[-1]]:.2f}" for band in bands)]
    lines = [[method, *(f"{1e7 * values[band].mean():.2f}" for band in bands)] for method, values in power.items()]
    return format_table(header, lines)


def contrast_kept(frame: pd.DataFrame) -> dict[str, dict]:
    """By group of calcifications: their number and, by method, the sum of their contrasts over that in the clean images.

    The groups are all, those at each share of their contrast, and bins of the CNR in the clean image.
    """
    groups = {"all": np.ones(len(frame), dtype=bool)}
    groups |= {f"contrast x {share:g}": frame["share"] == share for share in frame["share"].unique()}
    for low, high in itertools.pairwise(CNR_BINS):
        name = f"clean CNR {low:g}-{high:g}" if np.isfinite(high) else f"clean CNR from {low:g}"
        groups[name] = (frame["clean_cnr"] >= low) & (frame["clean_cnr"] < high)
    kept = {}
    for name, chosen in groups.items():
        if chosen.any():
            by_method = frame[chosen].groupby("method", sort=False)
            sums = by_method[["contrast", "clean_contrast"]].sum()
            kept[name] = {"calcifications": int(by_method.size().iloc[0])}
            kept[name] |= (sums["contrast"] / sums["clean_contrast"]).to_dict()
    return kept


def contrast_table(kept: Mapping[str, dict]) -> str:
    """The contrasts kept, a row a group."""
    lines = [[group, *(v if isinstance(v, int) else f"{v:.3f}" for v in row.values())] for group, row in kept.items()]
    return format_table(["", *next(iter(kept.values()))], lines)
