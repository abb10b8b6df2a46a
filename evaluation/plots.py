"""Training logs, and the plots of the page as SVG."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evaluation.metrics import BANDS, ErrorSplit, PowerSpectrum
from helper import UserError

CURVE_POINTS = 400  # drawn of a curve; a longer one is averaged over runs
# Okabe and Ito's colours without the yellow, which is lost on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d00", "#5b3a8e")
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#1d2126",
    "xtick.color": "#444b54",
    "ytick.color": "#444b54",
    "axes.grid": True,
    "grid.color": "#e6e6e2",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "axes.formatter.useoffset": False,
}
Line = tuple[Sequence[float], Sequence[float], dict[str, Any]]  # x, y, and how to draw it; its label is for the legend


@dataclass(frozen=True)
class Curve:
    """One logged quantity of a training, in the order of the log."""

    name: str  # of the training
    split: str  # "train" or "validation"
    quantity: str  # the column of log.csv
    steps: np.ndarray  # (n,) int64, optimiser steps
    values: np.ndarray  # (n,) float64


@dataclass(frozen=True)
class Power:
    """Power of a method's stabilised images over that of the clean ones: a smoother is below 1, a sampler at 1."""

    bands: np.ndarray  # (4,), in `metrics.BANDS`
    frequencies: np.ndarray  # (n,), cycles a pixel
    ratio: np.ndarray  # (n,)


def read_curves(log_csv: Path, name: str | None = None) -> list[Curve]:
    """Training loss and every validation figure of a `log.csv`, for the training `name` (default: its folder's).

    A missing file gives no curves, a missing column or cell no points. Raises UserError if the file is not text.
    """
    if not log_csv.is_file():
        return []
    try:
        rows = list(csv.DictReader(log_csv.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{log_csv}: not a readable training log ({error}); restore or remove it") from None
    points: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        split = row.get("split")
        for quantity, cell in row.items() if split in ("train", "validation") else ():
            if quantity in (None, "step", "epoch", "split") or (split == "train" and quantity != "loss"):
                continue
            try:
                point = int(row["step"]), float(cell)
            except (KeyError, TypeError, ValueError):
                continue
            points[split, quantity].append(point)
    name = log_csv.resolve().parent.name if name is None else name
    return [Curve(name, *key, *map(np.array, zip(*pairs, strict=True))) for key, pairs in points.items()]


def _plot(key: str, title: str, caption: str, lines: Sequence[Line], logarithmic: bool = True, **axes: Any) -> dict:
    """Draw `lines`, with a logarithmic vertical axis unless no value has a logarithm. `key` is unique in the page.

    Title, caption and legend (colour, name) are for HTML to write, where names need no care of fonts.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(4.8, 3.1), layout="constrained")
        plot = figure.add_subplot()
        for x, y, style in lines:
            plot.plot(x, y, **style)
        if logarithmic and any((np.asarray(y) > 0).any() for _, y, _ in lines):
            plot.set_yscale("log", nonpositive="mask")
        plot.set(**axes)
        text, metadata = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    view_box, body = re.search(r'<svg[^>]* viewBox="([^"]*)"[^>]*>(.*)</svg>', text.getvalue(), re.DOTALL).groups()
    # several SVGs share one document, hence one space of names
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body.replace("xlink:href", "href"))
    legend = [(style["color"], style["label"]) for _, _, style in lines if "label" in style]
    return {"title": title, "caption": caption, "legend": legend, "view_box": view_box, "body": body}


def power_plot(power: Mapping[str, Power], colours: Mapping[str, str]) -> dict:
    """Power over the clean images' by frequency."""
    lines: list[Line] = [((0, 0.5), (1, 1), {"color": "#1d2126", "linewidth": 1})]
    lines += [(own.frequencies, own.ratio, {"color": colours[name], "label": name}) for name, own in power.items()]
    return _plot(
        "power", "Power over the clean images’",
        "Of stabilised images, in which noise is alike at every intensity. A posterior sample lies on the line at 1; a "
        "posterior mean lies below it where it cannot know the grain, and noise above it.",
        lines, xlabel="spatial frequency, cycles/pixel", ylabel="power over clean’s", xlim=(0, 0.5), xticks=[0, *BANDS[1:]],
    )  # fmt: skip


def error_plot(splits: Mapping[str, ErrorSplit], colours: Mapping[str, str]) -> dict:
    """The error's two parts by clean intensity."""
    lines: list[Line] = []
    for name, split in splits.items():
        middle, colour = (np.array(split.edges[1:]) + split.edges[:-1]) / 2, {"color": colours[name]}
        lines.append((middle, split.residual_noise, colour | {"label": name, "marker": "o", "markersize": 3.5}))
        dashed = {"marker": "s", "markersize": 3, "linestyle": (0, (3, 2))}
        lines.append((middle, split.bias_squared, colour | dashed))
    below = any((np.asarray(split.bias_squared) <= 0).any() for split in splits.values())
    return _plot(
        "mnse", "Residual noise and bias² by intensity",
        "Squared error over clean intensity, in bins of it. Solid: residual noise, what changes from one noise "
        "realisation to the next. Dashed: bias², what a method gets wrong every time. Lower is better."
        + (" An estimate of bias² that is not above zero is left out." if below else ""),
        lines, xlabel="clean intensity", ylabel="normalised squared error",
    )  # fmt: skip


def spectrum_plot(spectra: Mapping[str, PowerSpectrum], colours: Mapping[str, str]) -> dict:
    """Noise power by frequency."""
    return _plot(
        "spectrum", "Noise power spectrum of the residual",
        "Power of what differs from the clean image, by spatial frequency. White noise is a level line.",
        [(own.frequencies, own.power, {"color": colours[name], "label": name}) for name, own in spectra.items()],
        xlabel="spatial frequency, 1/mm", ylabel="noise power, mm²",
    )  # fmt: skip


def _curve_plot(key: str, name: str, what: str, group: Sequence[Curve]) -> dict:
    lines: list[Line] = []
    for curve, colour in zip(group, itertools.cycle(COLOURS), strict=False):
        parts = min(len(curve.steps), CURVE_POINTS)
        steps, values = ([run.mean() for run in np.array_split(of, parts)] for of in (curve.steps, curve.values))
        marker = "o" if parts < 40 else None
        lines.append((steps, values, {"color": colour, "label": curve.quantity, "marker": marker, "markersize": 3}))
    ends = "; ".join(f"{curve.quantity} {curve.values[-1]:.4g}" for curve in group)
    caption, labels = f"At step {group[0].steps[-1]:,}: {ends}.", {"xlabel": "optimiser step", "ylabel": what}
    return _plot(key, f"{name}: {what}", caption, lines, "PSNR" not in what, **labels)


def training_plots(curves: Sequence[Curve]) -> list[dict]:
    """For every training its loss, and its validation figures, those in dB apart from the others."""
    plots: list[dict] = []
    for name in dict.fromkeys(curve.name for curve in curves):
        groups: dict[str, list[Curve]] = {"training loss": [], "validation PSNR, dB": [], "validation": []}
        for curve in curves:
            if curve.name == name and len(curve.steps):
                what = "training loss" if curve.split == "train" else "validation"
                groups["validation PSNR, dB" if curve.quantity.startswith("psnr") else what].append(curve)
        # the score is made of the other figures, with the sign turned if higher is better
        others = [curve for curve in groups["validation"] if curve.quantity != "score"]
        if others or groups["validation PSNR, dB"]:
            groups["validation"] = others
        shown = [(what, group) for what, group in groups.items() if group]
        plots += [_curve_plot(f"curve{len(plots) + i}", name, *part) for i, part in enumerate(shown)]
    return plots
