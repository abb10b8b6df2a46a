"""One self-contained HTML page about an evaluation: table, curves, power, coverage, and cases to zoom into side by side."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import itertools
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy import ndimage

from evaluation.metrics import BANDS, ErrorSplit, PowerSpectrum
from evaluation.table import BM3D, INPUT, METRICS, Evaluation
from evaluation.uncertainty import MISS, Coverage
from helper import UserError
from running.writing import write_text

DISCLAIMER = "Research use only; a restored image is an estimate, not fit for diagnosis."
LARGEST_SIDE = 1024  # pixels of an image in the viewer; larger ones are averaged down by a whole factor
ERROR_SCALE = 0.02  # absolute and expected error drawn in the brightest colour, alike in every report
CLOSE_UP_SIDE = 32  # pixels
CLOSE_UP_SHOWN = 192  # screen pixels that the side of a close-up is brought to at least, by a whole factor
CURVE_POINTS = 400  # of a curve that are drawn; longer ones are averaged over runs of equal length
SPECK_SIGMA = 1.2  # pixels; scale at which specks are looked for
SPECK_MARGIN = 8  # pixels inside the edge of the breast: the skin line glitters too
DIGITS = {"psnr": 2, "ssim": 4}  # of a metric, by what its name begins with
LONG_LIST = 8  # entries of the provenance from which a group is folded
# Okabe and Ito's colours without the yellow, which is lost on white; the input is grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d00", "#5b3a8e")
INPUT_COLOUR = "#808080"
PLOT_STYLE = {
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

CloseUp = tuple[int, int, int]  # row, column and side in pixels of a square


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
    """Power of a method's stabilised images over that of the clean ones: below 1 where it smooths, 1 for a sampler."""

    bands: np.ndarray  # (4,), in `metrics.BANDS`
    frequencies: np.ndarray  # (n,), cycles a pixel
    ratio: np.ndarray  # (n,)


@dataclass(frozen=True)
class PageCase:
    """One image and what was made of it, (H, W) arrays in [0, 1].

    Raises ValueError where shapes differ, values are not finite, or a close-up leaves the image.
    """

    name: str
    clean: np.ndarray
    images: Mapping[str, np.ndarray]  # by name, such as low dose, BM3D, posterior mean, posterior sample
    estimate: str  # the name of the image whose error is drawn
    std: np.ndarray | None = None  # expected error of the posterior mean, from the spread of the samples
    labels: Mapping[str, str] = field(default_factory=dict)  # by name of an image, such as its PSNR
    close_ups: Sequence[CloseUp] = ()

    def __post_init__(self):
        if self.estimate not in self.images:
            raise ValueError(f"{self.name}: a case needs an image of the name {self.estimate!r}")
        arrays = {"clean": self.clean, **self.images}
        if self.std is not None:
            arrays["std"] = self.std
        for name, image in arrays.items():
            if np.ndim(image) != 2 or np.shape(image) != np.shape(self.clean):
                raise ValueError(f"{self.name}: {name} is {np.shape(image)}, but clean is {np.shape(self.clean)}")
            if not np.isfinite(image).all():
                raise ValueError(f"{self.name}: {name} holds values that are not finite")
        height, width = np.shape(self.clean)
        for row, column, side in self.close_ups:
            if not (side > 0 <= min(row, column) and row + side <= height and column + side <= width):
                raise ValueError(f"{self.name}: close-up {row, column, side} leaves the image of {height} x {width}")


@dataclass(frozen=True)
class Report:
    """What a page tells. Optional parts that are left out leave no trace."""

    title: str
    subtitle: str
    provenance: Mapping[str, Any]  # checkpoints, settings, noise, seed, revision, versions; nested as you like
    evaluation: Evaluation
    curves: Sequence[Curve] = ()
    mnse: Mapping[str, ErrorSplit] | None = None  # by method
    spectrum: Mapping[str, PowerSpectrum] | None = None  # by method
    power: Mapping[str, Power] | None = None  # by method
    coverage: Coverage | None = None
    coverage_note: str = ""  # on how much it was counted
    cases: Sequence[PageCase] = ()


# --- what is shown ---------------------------------------------------------------------------------------------------


def read_curves(log_csv: Path, name: str | None = None) -> list[Curve]:
    """Training loss and every validation figure of a `log.csv`, for the training `name` (default: its folder's).

    A missing file gives no curves, a missing column or cell no points. Raises UserError where the file is no text.
    """
    if not log_csv.is_file():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(log_csv.read_text(encoding="utf-8"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{log_csv}: not a readable training log ({error}); restore or remove it") from None
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        split = row.get("split")
        if split not in ("train", "validation") or not (row.get("step") or "").isdigit():
            continue
        for quantity, cell in row.items():
            if quantity in (None, "step", "epoch", "split") or (split == "train" and quantity != "loss"):
                continue
            try:
                value = float(cell)
            except (TypeError, ValueError):
                continue
            points.setdefault((split, quantity), []).append((int(row["step"]), value))
    name = log_csv.resolve().parent.name if name is None else name
    return [
        Curve(name, split, quantity, np.array([s for s, _ in pairs]), np.array([v for _, v in pairs]))
        for (split, quantity), pairs in points.items()
    ]


def find_specks(
    clean: np.ndarray, mask: np.ndarray, count: int, separation: float = CLOSE_UP_SIDE
) -> list[tuple[int, int]]:
    """Row and column of up to `count` bright specks of a few pixels inside the breast, the strongest first.

    Looks in `clean` (H, W) for maxima of the weaker of the two curvatures, which ducts and the skin line do not have, and
    keeps `separation` pixels between them. `mask` (H, W) bool is the breast.
    """
    image = np.asarray(clean, dtype=np.float64)
    rr, cc, rc = (ndimage.gaussian_filter(image, SPECK_SIGMA, order) for order in ((2, 0), (0, 2), (1, 1)))
    weaker = -(rr + cc) / 2 - np.hypot((rr - cc) / 2, rc)
    inside = ndimage.binary_erosion(mask, iterations=SPECK_MARGIN)
    peaks = inside & (weaker > 0) & (weaker == ndimage.maximum_filter(weaker, 5))
    rows, columns = np.nonzero(peaks)
    order = np.argsort(-weaker[rows, columns], kind="stable")
    return _spread(((int(rows[i]), int(columns[i])) for i in order), count, separation)


def _spread(points: Iterable[tuple[int, int]], count: int, separation: float) -> list[tuple[int, int]]:
    """The first `count` points that keep their distance from those before them."""
    chosen: list[tuple[int, int]] = []
    for row, column in points:
        if len(chosen) == count:
            break
        if all(math.hypot(row - r, column - c) >= separation for r, c in chosen):
            chosen.append((row, column))
    return chosen


def choose_close_ups(
    clean: np.ndarray, mask: np.ndarray, calcifications: Sequence[Any] = (), count: int = 2, side: int = CLOSE_UP_SIDE
) -> list[CloseUp]:
    """Squares around the calcifications of most contrast, or, where none are known, around specks that look like some.

    `calcifications` are `phantom.Calcification`s of the image `clean` (H, W); `mask` (H, W) bool is the breast.
    """
    height, width = clean.shape
    side = min(side, height, width)
    known = sorted(calcifications, key=lambda c: -c.contrast)
    points = _spread(((round(c.row), round(c.column)) for c in known), count, side)
    points = points or find_specks(clean, mask, count, side)
    return [
        (min(max(0, row - side // 2), height - side), min(max(0, column - side // 2), width - side), side)
        for row, column in points
    ]


def write_report(path: Path, report: Report) -> None:
    """Write the page, atomically. It holds everything it needs and forbids itself to fetch anything.

    Raises UserError where the file cannot be written.
    """
    colours = _method_colours(report)
    sections = [
        ("results", "Results", _results(report.evaluation)),
        ("cases", "Cases", "".join(_case(case) for case in report.cases)),
        ("power", "Sampler or smoother?", _power(report.power, colours)),
        ("uncertainty", "Does the uncertainty hold?", _coverage(report.coverage, report.coverage_note)),
        ("noise", "Noise and bias", _noise(report, colours)),
        ("training", "Training", _training(report.curves)),
        ("provenance", "Where this comes from", _facts(report.provenance)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{heading}</h2>{content}</section>\n' for key, heading, content in sections)
    script = string.Template(SCRIPT).substitute(palette=_PALETTE.tobytes().hex())
    page = string.Template(PAGE).substitute(
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        disclaimer=DISCLAIMER,
        links=links,
        body=body,
        style=STYLE.replace("$bar", _gradient()),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    # a lone surrogate of an odd file name cannot be written as UTF-8
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


# --- tables ----------------------------------------------------------------------------------------------------------


def _metric_name(metric: str) -> str:
    words = metric.removesuffix("_breast").upper().replace("_", "-")
    where = "breast" if metric.endswith("_breast") else "whole image"
    return f'{escape(words)}<span class="quiet">{where}{", dB" if words == "PSNR" else ""}</span>'


def _number(value: float, digits: int, sign: str = "") -> str:
    """A figure with a true minus sign; ∞ and – for what is none."""
    if math.isnan(value):
        return "–"
    text = "∞" if math.isinf(value) else f"{abs(value):.{digits}f}"
    minus = "−" if value < 0 else sign
    return minus + text


def _digits(metric: str) -> int:
    return next((digits for prefix, digits in DIGITS.items() if metric.startswith(prefix)), 4)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """An HTML table of cells that are HTML already, the first of a row its heading, in a box that scrolls sideways."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    # focusable, so that a keyboard can scroll it
    return (
        f'<div class="table {kind}" tabindex="0" role="region" aria-label="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _results(evaluation: Evaluation) -> str:
    """The table by method, every figure with the low-dose input's beside it, and the one by image, folded."""
    frame, summary = evaluation.per_image, evaluation.summary()
    metrics = sorted(METRICS, key=lambda metric: not metric.endswith("_breast"))
    first = metrics[0]
    by_image = frame.pivot(index="path", columns="method", values=first)[list(summary)]
    count, patients = frame["path"].nunique(), frame["patient"].nunique()
    rows = []
    for method, row in summary.items():
        cells = [escape(str(method))]
        for metric in metrics:
            digits = _digits(metric)
            cells.append(
                f'{_number(row[metric], digits)} <span class="input">({_number(row[f"{metric}_low_dose"], digits)})</span>'
                f'<span class="quiet">± {_number(row[f"{metric}_std"], digits)}</span>'
            )
        better = "" if method == INPUT else f"{int((by_image[method] > by_image[INPUT]).sum())} of {count}"
        if BM3D in by_image and method not in (INPUT, BM3D):
            better += f'<span class="quiet">{int((by_image[method] > by_image[BM3D]).sum())} than {BM3D}</span>'
        # what the eye looks for stands beside the figure it is made of
        cells[2:2] = [f"<b>{_number(row[f'{first}_gain'], _digits(first), '+')}</b>", better]
        rows.append(cells)
    header = ["Method", *(_metric_name(metric) for metric in metrics)]
    header[2:2] = ['Gain<span class="quiet">breast, dB</span>', 'Better<span class="quiet">than the input</span>']
    image_rows = [
        [escape(str(path)), *(_number(value, _digits(first)) for value in values)]
        for path, values in zip(by_image.index, by_image.to_numpy(), strict=True)
    ]
    return (
        f'<p class="note">Means over {count} test images of {patients} patients, ± standard deviation between images; '
        "in brackets the low-dose input’s own figure, which a restoration has to beat. <i>Breast</i> counts the pixels "
        "inside the breast mask alone; <i>gain</i> is that of the mean PSNR there.</p>"
        + _table(header, rows)
        + "<details><summary>PSNR inside the breast, image by image</summary>"
        + _table(["Image", *(escape(str(method)) for method in summary)], image_rows, "tall")
        + "</details>"
    )


def _coverage(coverage: Coverage | None, counted: str) -> str:
    if coverage is None:
        return ""
    nominal = f"{1 - MISS:.0%}".replace("%", " %")
    bins = itertools.pairwise([0.0, *coverage.bin_upper])
    names = [f"pixels of intensity {low:.2f} – {high:.2f}" for low, high in bins]
    rows = list(zip(names, coverage.bin_coverage, strict=True))
    rows.append(("all pixels", coverage.coverage))
    rows += [(f"means over {side} × {side} pixels", share) for side, share in coverage.regions.items()]
    header = ["Clean value", f'Coverage<span class="quiet">should be {nominal}</span>']
    return (
        f'<p class="note">How often the clean value lies inside the {nominal} interval that the posterior samples give: fewer '
        "than that means that the spread promises too much, more that it is too timid. Errors that hang together show in the "
        f"means over regions. Counted are {coverage.pixels:,} pixels inside the breast{escape(counted and f', {counted}')}. "
        f"The intervals are {coverage.width:.4f} of full scale wide on average; expected over actual error, both root mean "
        f"square, is {coverage.spread_over_error:.2f}.</p>"
        + _table(header, [[name, f"{100 * share:.1f} %"] for name, share in rows])
    )


def _facts(value: Mapping[str, Any]) -> str:
    """A nested mapping as description lists; long groups are folded."""
    if not value:
        return ""
    lines = []
    for key, entry in value.items():
        name = escape(str(key))
        if isinstance(entry, Mapping) and entry:
            inner = _facts(entry)
            if len(entry) >= LONG_LIST:
                inner = f"<details><summary>{len(entry)} entries</summary>{inner}</details>"
            lines.append(f"<div><dt>{name}</dt><dd>{inner}</dd></div>")
        else:
            lines.append(f"<div><dt>{name}</dt><dd>{_fact(entry)}</dd></div>")
    return f"<dl>{''.join(lines)}</dl>"


def _fact(entry: Any) -> str:
    if entry is None or (isinstance(entry, (str, list, tuple, Mapping)) and not len(entry)):
        return "–"
    if isinstance(entry, (list, tuple)):
        return ", ".join(escape(str(part)) for part in entry)
    return escape(str(entry))


# --- plots -----------------------------------------------------------------------------------------------------------


def _method_colours(report: Report) -> dict[str, str]:
    """A colour for every method, the same in all plots."""
    names = list(report.evaluation.per_image["method"].unique())
    for part in (report.mnse or {}, report.spectrum or {}, report.power or {}):
        names += [name for name in part if name not in names]
    others = [name for name in names if name != INPUT]
    return {INPUT: INPUT_COLOUR} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}


def _plot(
    draw: Callable[[Axes], None], prefix: str, title: str, legend: Sequence[tuple[str, str]], caption: str
) -> str:
    """A figure with an inline SVG; title, legend (colour, name) and caption are HTML, where names need no care of fonts."""
    with matplotlib.rc_context({**PLOT_STYLE, "svg.hashsalt": prefix}):
        figure = Figure(figsize=(4.8, 3.1), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)[0]
    # several SVGs share one document, hence one space of names
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = re.sub(r'(xlink:)?href="#', f'href="#{prefix}-', rest).replace("url(#", f"url(#{prefix}-")
    names = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for colour, name in legend)
    alt = escape(f"{title}: {', '.join(name for _, name in legend)}")
    return (
        f'<figure class="plot"><h3>{escape(title)}</h3><div class="legend">{names}</div>'
        f'<svg {box} role="img" aria-label="{alt}">{rest.rstrip()}<figcaption>{caption}</figcaption></figure>\n'
    )


def _logarithmic(axes: Axes, values: Iterable[np.ndarray]) -> None:
    """A logarithmic vertical axis, unless no value has a logarithm."""
    if any((np.asarray(part) > 0).any() for part in values):
        axes.set_yscale("log", nonpositive="mask")


def _power(power: Mapping[str, Power] | None, colours: Mapping[str, str]) -> str:
    """The plot of power over the clean images' by frequency, and the table of the bands."""
    if not power:
        return ""

    def draw(axes: Axes) -> None:
        axes.axhline(1, color="#1d2126", linewidth=1)
        for name, own in power.items():
            axes.plot(own.frequencies, own.ratio, color=colours[name])
        _logarithmic(axes, [own.ratio for own in power.values()])
        axes.set(xlabel="spatial frequency, cycles/pixel", ylabel="power over clean’s", xlim=(0, 0.5))
        axes.set_xticks([0, *BANDS[1:]])

    plot = _plot(
        draw, "power", "Power over the clean images’", [(colours[name], name) for name in power],
        "Of stabilised images, in which noise is alike at every intensity. A posterior sample lies on the line at 1; a posterior "
        "mean lies below it where it cannot know the grain, and noise above it.",
    )  # fmt: skip
    header = ["Cycles a pixel", *(f"{low:g} – {high:g}" for low, high in itertools.pairwise(BANDS))]
    rows = [[escape(name), *(_number(value, 2) for value in own.bands)] for name, own in power.items()]
    return f'<div class="plots">{plot}</div>{_table(header, rows)}'


def _noise(report: Report, colours: Mapping[str, str]) -> str:
    """Plots of the error's two parts by intensity and of the noise power by frequency."""
    plots = ""
    if report.mnse:
        splits = report.mnse

        def draw_mnse(axes: Axes) -> None:
            for name, split in splits.items():
                middle = (np.array(split.edges[1:]) + split.edges[:-1]) / 2
                axes.plot(middle, split.residual_noise, color=colours[name], marker="o", markersize=3.5)
                axes.plot(
                    middle, split.bias_squared, color=colours[name], marker="s", markersize=3, linestyle=(0, (3, 2))
                )
            _logarithmic(axes, [part for s in splits.values() for part in (s.residual_noise, s.bias_squared)])
            axes.set(xlabel="clean intensity", ylabel="normalised squared error")

        below = any((np.asarray(split.bias_squared) <= 0).any() for split in splits.values())
        plots += _plot(
            draw_mnse, "mnse", "Residual noise and bias² by intensity", [(colours[name], name) for name in splits],
            "Squared error over clean intensity, in bins of it. Solid: residual noise, what changes from one noise "
            "realisation to the next. Dashed: bias², what a method gets wrong every time. Lower is better."
            + (" An estimate of bias² that is not above zero is left out." if below else ""),
        )  # fmt: skip
    if report.spectrum:
        spectra = report.spectrum

        def draw_spectrum(axes: Axes) -> None:
            for name, spectrum in spectra.items():
                axes.plot(spectrum.frequencies, spectrum.power, color=colours[name])
            _logarithmic(axes, [spectrum.power for spectrum in spectra.values()])
            axes.set(xlabel="spatial frequency, 1/mm", ylabel="noise power, mm²")

        plots += _plot(
            draw_spectrum, "spectrum", "Noise power spectrum of the residual", [(colours[n], n) for n in spectra],
            "Power of what differs from the clean image, by spatial frequency. White noise is a level line.",
        )  # fmt: skip
    return f'<div class="plots">{plots}</div>' if plots else ""


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a curve, averaged over runs of equal length where it is too long to draw."""
    run = math.ceil(len(curve.steps) / CURVE_POINTS)
    starts = np.arange(0, len(curve.steps), run)
    lengths = np.diff([*starts, len(curve.steps)])
    steps, values = (np.asarray(part, dtype=np.float64) for part in (curve.steps, curve.values))
    return np.add.reduceat(steps, starts) / lengths, np.add.reduceat(values, starts) / lengths


def _training(curves: Sequence[Curve]) -> str:
    """For every training its loss, and its validation figures, those in dB apart from the others."""
    plots = []
    for name in dict.fromkeys(curve.name for curve in curves):
        own = [curve for curve in curves if curve.name == name and len(curve.steps)]
        validation = [curve for curve in own if curve.split == "validation"]
        # the score is made of the other figures, with the sign turned where higher is better
        validation = [curve for curve in validation if curve.quantity != "score"] or validation
        groups = {
            "training loss": [curve for curve in own if curve.split == "train"],
            "validation PSNR, dB": [curve for curve in validation if curve.quantity.startswith("psnr")],
            "validation": [curve for curve in validation if not curve.quantity.startswith("psnr")],
        }
        for what, group in groups.items():
            if group:
                plots.append(_curve_plot(name, what, group, f"curve{len(plots)}"))
    return f'<div class="plots">{"".join(plots)}</div>' if plots else ""


def _curve_plot(name: str, what: str, group: Sequence[Curve], prefix: str) -> str:
    def draw(axes: Axes) -> None:
        for i, curve in enumerate(group):
            few = len(curve.steps) < 40
            axes.plot(*_thinned(curve), color=COLOURS[i % len(COLOURS)], marker="o" if few else None, markersize=3)
        if "PSNR" not in what:
            _logarithmic(axes, [curve.values for curve in group])
        axes.set(xlabel="optimiser step", ylabel=what)

    legend = [(COLOURS[i % len(COLOURS)], curve.quantity) for i, curve in enumerate(group)]
    ends = "; ".join(f"{escape(curve.quantity)} {curve.values[-1]:.4g}" for curve in group)
    return _plot(draw, prefix, f"{name}: {what}", legend, f"At step {group[0].steps[-1]:,}: {ends}.")


# --- images ----------------------------------------------------------------------------------------------------------

_PALETTE = (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)  # (256, 3)


def _gradient() -> str:
    stops = ",".join("#" + bytes(_PALETTE[i]).hex() for i in range(0, 256, 15))
    return f"linear-gradient(90deg,{stops})"


def _png(image: np.ndarray, colour: bool) -> str:
    """A data URI of an image (H, W) in [0, 1], grey or in magma: lossless, 256 levels."""
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    if colour:
        picture.putpalette(_PALETTE.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class _Panel:
    name: str
    label: str
    image: np.ndarray  # (H, W), divided by scale
    scale: float | None = None  # of a map in colours; None: a grey image


def _panels(case: PageCase) -> list[_Panel]:
    images = {"clean": case.clean, **case.images}
    panels = [_Panel(name, case.labels.get(name, ""), np.asarray(image, np.float32)) for name, image in images.items()]
    maps = {f"|error| of {case.estimate}": np.abs(np.asarray(case.images[case.estimate], np.float32) - panels[0].image)}
    if case.std is not None:
        maps["expected error"] = np.asarray(case.std, np.float32)
    return panels + [_Panel(name, "", values / ERROR_SCALE, ERROR_SCALE) for name, values in maps.items()]


def _bar(scale: float) -> str:
    return f'<span class="bar"><span>0</span><i></i><span>≥ {scale:g}</span></span>'


def _case(case: PageCase) -> str:
    """A case: the viewer with all its panels, and the close-ups below."""
    height, width = case.clean.shape
    factor = math.ceil(max(height, width) / LARGEST_SIDE)
    panels = _panels(case)
    figures = []
    for panel in panels:
        small = np.asarray(Image.fromarray(np.clip(panel.image, 0, 1)).reduce(factor))
        alt = escape(f"{panel.name}, {case.name}")
        caption = f"<b>{escape(panel.name)}</b>" + (f" <span>{escape(panel.label)}</span>" if panel.label else "")
        figures.append(
            f'<figure class="panel" data-scale="{panel.scale or 0:g}"><div class="stage" '
            f'style="aspect-ratio:{small.shape[1]}/{small.shape[0]}">'
            f'<img src="{_png(small, panel.scale is not None)}" width="{small.shape[1]}" height="{small.shape[0]}" '
            f'alt="{alt}"></div><figcaption>{caption}{_bar(panel.scale) if panel.scale else ""}'
            "<output></output></figcaption></figure>"
        )
    std_note = "; the expected error is the spread of the posterior samples, calibrated" if case.std is not None else ""
    boxes = ";".join(",".join(str(part) for part in close_up) for close_up in case.close_ups)
    reduced = (
        f" Shown at 1/{factor} of their {width} × {height} pixels, averaged, which hides noise: judge it by the close-ups."
        if factor > 1
        else ""
    )
    close_ups = "".join(_close_up(panels, close_up, i) for i, close_up in enumerate(case.close_ups))
    return (
        f'<article><h3>{escape(case.name)}</h3><div class="viewer" tabindex="0" role="group" data-reduced="{factor}" '
        f'data-boxes="{boxes}" aria-label="{escape(case.name)}: images side by side">{CONTROLS}'
        f'<div class="panels">{"".join(figures)}</div></div>'
        '<p class="note">All images of a case move together: wheel, pinch or + and − to zoom, drag or arrow keys to move, '
        "1 for one screen pixel a pixel, F to fit. Window and level speak for the grey images; the maps "
        f"keep their scales{std_note}.{reduced}</p>{close_ups}</article>\n"
    )


def _close_up(panels: Sequence[_Panel], close_up: CloseUp, index: int) -> str:
    """The same square of every panel, enlarged, windowed by the clean image's range there."""
    row, column, side = close_up
    parts = [panel.image[row : row + side, column : column + side] for panel in panels]
    low, high = np.quantile(parts[0], (0.005, 0.995)).tolist()
    high = max(high, low + 0.02)
    zoom = max(1, CLOSE_UP_SHOWN // side)
    enlarged = f"enlarged {zoom} times" if zoom > 1 else "pixel by pixel"
    size, figures = zoom * side, []
    for panel, part in zip(panels, parts, strict=True):
        shown = part if panel.scale else (part - low) / (high - low)
        figures.append(
            f'<figure style="width:{size}px"><img src="{_png(shown, panel.scale is not None)}" width="{size}" '
            f'height="{size}" alt="{escape(f"Close-up {index + 1}: {panel.name}")}">'
            f"<figcaption>{escape(panel.name)}{_bar(panel.scale) if panel.scale else ''}</figcaption></figure>"
        )
    return (
        f'<div class="closeup"><p><b>Close-up {index + 1}</b> rows {row}–{row + side - 1}, columns {column}–'
        f"{column + side - 1}, {enlarged}; black is {low:.3f}, white {high:.3f}, the clean image’s range "
        f'there. <button type="button" class="show" data-box="{index}" hidden>Show in the images</button></p>'
        f'<div class="strip">{"".join(figures)}</div></div>'
    )


# --- the page --------------------------------------------------------------------------------------------------------

CONTROLS = """<div class="controls" hidden>
<span class="group"><button type="button" data-do="out" aria-label="zoom out" title="zoom out (−)">−</button>\
<button type="button" data-do="in" aria-label="zoom in" title="zoom in (+)">+</button>\
<button type="button" data-do="one" title="one screen pixel a pixel (1)">1:1</button>\
<button type="button" data-do="fit" title="the whole image (F)">Fit</button></span>
<output class="zoom"></output>
<label>Level<input type="range" class="level" min="0" max="1" step="0.005" value="0.5"></label>
<label>Window<input type="range" class="window" min="0.02" max="1" step="0.005" value="1"></label>
<span class="group"><button type="button" data-do="auto" title="the clean image’s range in what is shown">Auto</button>\
<button type="button" data-do="reset" title="black 0, white 1">Reset</button></span>
<output class="range"></output><output class="place"></output></div>
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'sha256-$digest'; base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="subtitle">$subtitle</p>
<p class="warning" role="note">$disclaimer</p>
<nav aria-label="sections">$links</nav>
</header>
<noscript><p class="note">Without JavaScript the images stand still: no zoom and no windowing.</p></noscript>
<main>
$body</main>
<footer>$disclaimer</footer>
<script>$script</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light; --ink: #1d2126; --quiet: #616973; --line: #dedfdb; --accent: #0b5d7c; --dark: #0d0e10; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1440px; padding: 2rem 1.25rem 3rem; background: #fafaf8; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3 { line-height: 1.2; letter-spacing: -0.01em; overflow-wrap: anywhere; text-wrap: balance; }
h1 { font-size: clamp(1.6rem, 4vw, 2.3rem); margin: 0 0 .4rem; }
h2 { font-size: 1.45rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.05rem; margin: 0 0 .6rem; }
.subtitle { margin: 0 0 1rem; color: var(--quiet); font-size: 1.1rem; overflow-wrap: anywhere; }
.warning { margin: 0 0 1rem; padding: .6rem .9rem; background: #fff4d6; border-left: 4px solid #d99a00; font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
a { color: var(--accent); }
.note { color: var(--quiet); max-width: 82ch; margin: 0 0 1rem; font-size: .94rem; }
.quiet { display: block; color: var(--quiet); font-weight: 400; font-size: .82em; }
.input { color: var(--quiet); }
.table { overflow-x: auto; margin: 0 0 1rem; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
.table.tall { max-height: 30rem; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .5rem .9rem; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child { text-align: left; }
tbody th { font-weight: 600; white-space: normal; min-width: 9rem; max-width: 22rem; overflow-wrap: anywhere; }
thead th { border-bottom: 1px solid var(--ink); vertical-align: bottom; font-weight: 600; }
tr > th:first-child { position: sticky; left: 0; background: #fff; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
details { margin: 0 0 1rem; }
details > .table, details > dl { margin-top: .6rem; }
summary { cursor: pointer; color: var(--accent); }
dl { margin: 0; }
dl > div { display: grid; grid-template-columns: minmax(7rem, 14rem) 1fr; gap: .2rem 1rem; padding: .25rem 0;
  border-top: 1px solid var(--line); }
dl dl > div:first-child { border-top: 0; }
dt { color: var(--quiet); overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; min-width: 0; }
figure { margin: 0; }
.plots { display: grid; margin-bottom: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1rem; }
.plot { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .9rem 1rem; }
.plot svg { display: block; width: 100%; height: auto; }
.plot svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
.plot figcaption { color: var(--quiet); font-size: .86rem; margin-top: .4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .86rem; margin-bottom: .4rem; overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 1.3em; height: .28em; margin-right: .4em; vertical-align: .22em; border-radius: 2px; }
article { margin: 0 0 2.4rem; }
.viewer { background: var(--dark); color: #e8e8e6; border-radius: 8px; padding: .6rem; margin-bottom: .6rem; }
.viewer:focus-visible, .table:focus-visible, button:focus-visible { outline: 3px solid #4aa3c7; outline-offset: 2px; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: .4rem 1rem; padding: 0 0 .6rem; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
.controls[hidden] { display: none; }
.controls label { display: inline-flex; align-items: center; gap: .4rem; }
.controls input { width: 8.5rem; accent-color: #7cc4e0; }
.controls output { color: #b9bec4; }
.controls .zoom { min-width: 3.4em; }
.place { margin-left: auto; }
.group { display: inline-flex; }
button { font: inherit; cursor: pointer; border: 1px solid var(--line); background: #fff; color: var(--accent);
  padding: .15rem .6rem; border-radius: 5px; }
button[hidden] { display: none; }
.controls button { background: #26292e; color: #f2f2f0; border-color: #474c54;
  min-width: 2.4rem; min-height: 2rem; border-radius: 0; }
.controls button:hover { background: #3a3f47; }
.group button + button { border-left: 0; }
.controls .group button:first-child { border-radius: 5px 0 0 5px; }
.controls .group button:last-child { border-radius: 0 5px 5px 0; }
.panels { display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; }
.panel { min-width: 0; }
.stage { position: relative; overflow: hidden; width: 100%; max-height: 75vh; background: #000; }
.stage img { display: block; width: 100%; height: 100%; object-fit: contain; }
.stage img[hidden] { display: none; }
.stage canvas { position: absolute; inset: 0; width: 100%; height: 100%; cursor: grab; touch-action: pan-y; }
.stage canvas.moving { cursor: grabbing; }
.zoomed .stage canvas { touch-action: none; }
.panel figcaption { display: flex; flex-wrap: wrap; gap: 0 .6rem; padding-top: .25rem; font-size: .86rem; line-height: 1.35;
  overflow-wrap: anywhere; }
.panel figcaption > span { color: #b9bec4; }
.panel output { margin-left: auto; font-variant-numeric: tabular-nums; min-height: 1.35em; }
.bar { display: inline-flex; align-items: center; gap: .3em; font-variant-numeric: tabular-nums; }
.bar i { width: 4.2em; height: .7em; background: $bar; border: 1px solid #666; }
.closeup { margin: 1rem 0 0; }
.closeup p { margin: 0 0 .4rem; font-size: .94rem; color: var(--quiet); }
.closeup b { color: var(--ink); }
.strip { display: flex; flex-wrap: wrap; gap: 6px; background: var(--dark); color: #e8e8e6; padding: 6px; border-radius: 8px; }
.strip figure { min-width: 0; max-width: 100%; }
.strip img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
.strip figcaption { display: flex; flex-wrap: wrap; gap: 0 .7em; font-size: .8rem; line-height: 1.35; padding-top: .2rem;
  overflow-wrap: anywhere; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--quiet); font-size: .9rem; }
@media (max-width: 640px) {
  body { padding: 1.2rem .8rem 2rem; }
  th, td { padding: .45rem .6rem; }
  tbody th { min-width: 6rem; max-width: 8.5rem; }
  .panels { grid-template-columns: repeat(2, 1fr); gap: .4rem; }
  .controls label { flex: 1 1 40%; }
  .controls input { flex: 1; width: 4rem; min-width: 0; }
  .controls .zoom { margin-left: auto; text-align: right; }
  .controls button { min-height: 2.5rem; min-width: 2.8rem; }
  .place { margin-left: 0; }
  .panel figcaption, .controls { font-size: .8rem; }
  .strip figure { flex: 0 1 calc((100% - 12px) / 3); }
  dl > div { grid-template-columns: 1fr; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print { .controls, nav { display: none; } .plot, .closeup, tr { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
(() => {
  const errors = [];
  const note = message => {
    errors.push(String(message));
    document.body.dataset.errors = JSON.stringify(errors);
  };
  addEventListener("error", event => note(event.message));
  document.body.dataset.errors = "[]";

  // what a colour of the map stands for: 0 to 255
  const palette = "$palette".match(/.{6}/g).map(hex => parseInt(hex, 16));
  const indexOf = new Map(palette.map((colour, i) => [colour, i]));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), Math.max(low, high));
  let scrolled = -1e9;  // when the wheel last moved the page
  addEventListener("wheel", event => { if (!event.defaultPrevented) scrolled = event.timeStamp; }, { passive: true });

  // the values of an image, one byte a pixel, and a canvas that holds what is shown of it
  function read(figure) {
    const stage = figure.querySelector(".stage"), image = stage.querySelector("img");
    const width = image.naturalWidth, height = image.naturalHeight, scale = Number(figure.dataset.scale);
    const buffer = document.createElement("canvas");
    buffer.width = width;
    buffer.height = height;
    const context = buffer.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, width, height), bytes = pixels.data;
    const values = new Uint8Array(width * height);
    for (let i = 0, j = 0; i < values.length; i++, j += 4)
      values[i] = scale ? indexOf.get(bytes[j] << 16 | bytes[j + 1] << 8 | bytes[j + 2]) ?? 0 : bytes[j];
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", image.alt);
    stage.append(canvas);
    image.hidden = true;
    return { canvas, buffer, context, pixels, values, width, height, scale, output: figure.querySelector("output") };
  }

  function open(root) {
    const panels = [...root.querySelectorAll(".panel")].map(read);
    const reduced = Number(root.dataset.reduced), { width, height } = panels[0];
    const boxes = root.dataset.boxes ? root.dataset.boxes.split(";").map(box => box.split(",").map(Number)) : [];
    const find = name => root.querySelector(name);
    const level = find(".level"), span = find(".window");
    const view = { x: width / 2, y: height / 2, scale: 0 };  // scale: CSS pixels a pixel; x and y: what is in the middle
    let pointer = null, waiting = false, stale = false;  // pointer: CSS pixels off the middle of its panel
    let cursor = null;  // the pixel that it is on

    const size = () => ({ w: panels[0].canvas.clientWidth, h: panels[0].canvas.clientHeight });
    const fit = () => { const { w, h } = size(); return Math.min(w / width, h / height); };
    const request = () => { if (!waiting) { waiting = true; requestAnimationFrame(draw); } };

    function settle() {
      const { w, h } = size(), least = fit();
      view.scale = clamp(view.scale, least, 40);
      const halfWidth = w / view.scale / 2, halfHeight = h / view.scale / 2;
      view.x = 2 * halfWidth >= width ? width / 2 : clamp(view.x, halfWidth, width - halfWidth);
      view.y = 2 * halfHeight >= height ? height / 2 : clamp(view.y, halfHeight, height - halfHeight);
      root.classList.toggle("zoomed", view.scale > least * 1.001);
    }

    // zoom so that what lies (dx, dy) CSS pixels off the middle stays there
    function zoom(factor, dx = 0, dy = 0) {
      const x = view.x + dx / view.scale, y = view.y + dy / view.scale;
      view.scale = clamp(view.scale * factor, fit(), 40);
      view.x = x - dx / view.scale;
      view.y = y - dy / view.scale;
      request();
    }

    function range() {
      const low = level.value - span.value / 2;
      return [low, low + Number(span.value)];
    }

    function applyWindow() {
      const [low, high] = range(), table = new Uint8ClampedArray(256);
      for (let i = 0; i < 256; i++) table[i] = 255 * (i / 255 - low) / (high - low);
      for (const panel of panels) {
        if (panel.scale) continue;
        const bytes = panel.pixels.data, values = panel.values;
        for (let i = 0, j = 0; i < values.length; i++, j += 4)
          bytes[j] = bytes[j + 1] = bytes[j + 2] = table[values[i]];
        panel.context.putImageData(panel.pixels, 0, 0);
      }
      find(".range").value = `black $${low.toFixed(2)}, white $${high.toFixed(2)}`;
    }

    function draw() {
      waiting = false;
      if (stale) { applyWindow(); stale = false; }
      settle();
      cursor = pointer && { x: view.x + pointer.dx / view.scale, y: view.y + pointer.dy / view.scale };
      const ratio = devicePixelRatio || 1, scale = view.scale * ratio;
      for (const panel of panels) {
        const { canvas } = panel, w = Math.round(canvas.clientWidth * ratio), h = Math.round(canvas.clientHeight * ratio);
        if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
        const paper = canvas.getContext("2d");
        paper.setTransform(1, 0, 0, 1, 0, 0);
        paper.clearRect(0, 0, w, h);
        // pixels stay squares when they are enlarged
        paper.imageSmoothingEnabled = scale < 1;
        paper.imageSmoothingQuality = "high";
        paper.setTransform(scale, 0, 0, scale, w / 2 - view.x * scale, h / 2 - view.y * scale);
        paper.drawImage(panel.buffer, 0, 0);
        paper.lineWidth = 1.25 * ratio / scale;
        paper.strokeStyle = "#ffc400";
        for (const [row, column, side] of boxes)
          paper.strokeRect(column / reduced, row / reduced, side / reduced, side / reduced);
        if (cursor) {
          const arm = 7 * ratio / scale, gap = 2.5 * ratio / scale;
          paper.strokeStyle = "#4fd0ff";
          paper.beginPath();
          for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
            paper.moveTo(cursor.x + dx * gap, cursor.y + dy * gap);
            paper.lineTo(cursor.x + dx * arm, cursor.y + dy * arm);
          }
          paper.stroke();
        }
      }
      tell();
      find(".zoom").value = `$${Math.round(100 * scale / reduced)} %`;
    }

    function tell() {
      const column = cursor && Math.floor(cursor.x), row = cursor && Math.floor(cursor.y);
      const inside = cursor && column >= 0 && row >= 0 && column < width && row < height;
      find(".place").value = inside ? `row $${row * reduced}, column $${column * reduced}` : "";
      for (const { values, scale, output } of panels) {
        const value = inside ? values[row * width + column] : 0;
        output.value = !inside ? "" : scale ? (value === 255 ? "≥ " : "") + (value / 255 * scale).toFixed(4)
          : (value / 255).toFixed(3);
      }
    }

    // the clean image's range in what is shown
    function automatic() {
      const { w, h } = size(), counts = new Uint32Array(256);
      const left = Math.max(0, Math.floor(view.x - w / view.scale / 2)), right = Math.min(width, view.x + w / view.scale / 2);
      const top = Math.max(0, Math.floor(view.y - h / view.scale / 2)), bottom = Math.min(height, view.y + h / view.scale / 2);
      let total = 0;
      for (let row = top; row < bottom; row++)
        for (let column = left; column < right; column++, total++) counts[panels[0].values[row * width + column]]++;
      const quantile = share => {
        let i = 0;
        for (let sum = counts[0]; i < 255 && sum < share * total; sum += counts[++i]);
        return i / 255;
      };
      const low = quantile(0.005), high = Math.max(low + 0.02, quantile(0.995));
      setWindow((low + high) / 2, high - low);
    }

    function setWindow(middle, width) {
      level.value = middle;
      span.value = width;
      stale = true;
      request();
    }

    const actions = {
      in: () => zoom(1.5),
      out: () => zoom(1 / 1.5),
      one: () => zoom(reduced / (devicePixelRatio || 1) / view.scale),
      fit: () => zoom(1e-9),
      auto: automatic,
      reset: () => setWindow(0.5, 1),
    };
    for (const button of root.querySelectorAll("[data-do]")) button.addEventListener("click", actions[button.dataset.do]);
    for (const slider of [level, span]) slider.addEventListener("input", () => { stale = true; request(); });

    const keys = { "+": "in", "=": "in", "-": "out", "1": "one", "f": "fit", "F": "fit", "0": "fit" };
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    root.addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
      if (keys[event.key]) actions[keys[event.key]]();
      else if (arrows[event.key] && root.classList.contains("zoomed")) {
        view.x += 40 * arrows[event.key][0] / view.scale;
        view.y += 40 * arrows[event.key][1] / view.scale;
        request();
      } else return;
      event.preventDefault();
    });

    const fingers = new Map();
    for (const { canvas } of panels) {
      const off = event => {
        const box = canvas.getBoundingClientRect();
        return { dx: event.clientX - box.left - box.width / 2, dy: event.clientY - box.top - box.height / 2 };
      };
      canvas.addEventListener("wheel", event => {
        const outwards = event.deltaY > 0 && !root.classList.contains("zoomed");
        // a page on the move goes on moving
        if (event.ctrlKey === false && (outwards || event.timeStamp - scrolled < 300)) return;
        event.preventDefault();
        const { dx, dy } = off(event), lines = event.deltaMode ? 30 : 1;
        zoom(Math.exp(-clamp(event.deltaY * lines, -250, 250) / 400), dx, dy);
      }, { passive: false });
      canvas.addEventListener("pointerdown", event => {
        fingers.set(event.pointerId, off(event));
        canvas.setPointerCapture(event.pointerId);
        canvas.classList.add("moving");
      });
      canvas.addEventListener("pointermove", event => {
        const now = off(event), before = fingers.get(event.pointerId);
        pointer = now;
        if (before) {
          view.x -= (now.dx - before.dx) / view.scale / fingers.size;
          view.y -= (now.dy - before.dy) / view.scale / fingers.size;
          const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
          if (other) {
            const length = Math.hypot(before.dx - other.dx, before.dy - other.dy) || 1;
            zoom(Math.hypot(now.dx - other.dx, now.dy - other.dy) / length, (now.dx + other.dx) / 2, (now.dy + other.dy) / 2);
          }
          fingers.set(event.pointerId, now);
        }
        request();
      });
      const lift = event => {
        fingers.delete(event.pointerId);
        canvas.classList.remove("moving");
      };
      canvas.addEventListener("pointerup", lift);
      canvas.addEventListener("pointercancel", lift);
      canvas.addEventListener("pointerleave", () => { pointer = null; request(); });
      canvas.addEventListener("dblclick", event => {
        const { dx, dy } = off(event);
        zoom(3, dx, dy);
      });
    }

    for (const button of root.parentElement.querySelectorAll(".show")) {
      button.hidden = false;
      button.addEventListener("click", () => {
        const [row, column, side] = boxes[button.dataset.box].map(value => value / reduced), { w, h } = size();
        view.scale = Math.min(w, h) / side / 2;
        view.x = column + side / 2;
        view.y = row + side / 2;
        request();
        root.scrollIntoView({ block: "nearest" });
      });
    }

    find(".controls").hidden = false;
    new ResizeObserver(request).observe(panels[0].canvas);
    applyWindow();
    draw();
    return panels.length;
  }

  addEventListener("load", () => {
    let drawn = 0;
    for (const root of document.querySelectorAll(".viewer")) drawn += open(root);
    document.body.dataset.panels = drawn;
    document.body.dataset.ready = "1";
  });
})();
"""
