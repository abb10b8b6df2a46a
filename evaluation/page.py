"""One self-contained HTML page about an evaluation: table, curves, power, coverage, and cases to zoom into side by side."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from PIL import Image
from scipy import ndimage

from evaluation import plots
from evaluation.metrics import BANDS, SSIM_NOTE, ErrorSplit, PowerSpectrum
from evaluation.plots import Curve, Power
from evaluation.plots import read_curves as read_curves
from evaluation.table import BM3D, DIGITS, INPUT, Evaluation
from evaluation.uncertainty import MISS, Coverage
from running.writing import write_text

DISCLAIMER = "Research use only; a restored image is an estimate, not fit for diagnosis."
LARGEST_SIDE = 1024  # pixels of an image in the viewer; larger ones are averaged down by a whole factor
ERROR_SCALE = 0.02  # absolute and expected error drawn in the brightest colour, alike in every report
CLOSE_UP_SIDE = 32  # pixels
CLOSE_UP_SHOWN = 192  # screen pixels that the side of a close-up is brought to at least, by a whole factor
SPECK_SIGMA = 1.2  # pixels; scale at which specks are looked for
SPECK_MARGIN = 8  # pixels inside the edge of the breast: the skin line glitters too
INPUT_COLOUR = "#808080"  # of the input in the plots
PALETTE = (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)  # (256, 3)

CloseUp = tuple[int, int, int]  # row, column and side in pixels of a square


@dataclass(frozen=True)
class PageCase:
    """One image and what was made of it, (H, W) arrays in [0, 1].

    Raises ValueError if shapes differ, values are not finite, or a close-up leaves the image.
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
        arrays = {"clean": self.clean, **self.images} | ({} if self.std is None else {"std": self.std})
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
    peaks = np.argwhere(inside & (weaker > 0) & (weaker == ndimage.maximum_filter(weaker, 5)))
    order = np.argsort(-weaker[tuple(peaks.T)], kind="stable")
    return _spread(map(tuple, peaks[order].tolist()), count, separation)


def _spread(points: Iterable[tuple[int, int]], count: int, separation: float) -> list[tuple[int, int]]:
    """The first `count` points that keep their distance from those before them."""
    chosen: list[tuple[int, int]] = []
    for point in points:
        if len(chosen) < count and all(math.dist(point, other) >= separation for other in chosen):
            chosen.append(point)
    return chosen


def choose_close_ups(
    clean: np.ndarray, mask: np.ndarray, calcifications: Sequence[Any] = (), count: int = 2, side: int = CLOSE_UP_SIDE
) -> list[CloseUp]:
    """Squares around the calcifications of most contrast or, if none are known, around specks that look like some.

    `calcifications` are the `Calcification`s of the image `clean` (H, W); `mask` (H, W) bool is the breast.
    """
    height, width = clean.shape
    side = min(side, height, width)
    known = sorted(calcifications, key=lambda c: -c.contrast)
    points = _spread(((round(c.row), round(c.column)) for c in known), count, side)
    return [
        (min(max(0, row - side // 2), height - side), min(max(0, column - side // 2), width - side), side)
        for row, column in points or find_specks(clean, mask, count, side)
    ]


def write_report(path: Path, report: Report) -> None:
    """Write the page, atomically. It holds everything it needs and forbids itself to fetch anything.

    Raises UserError if the file cannot be written.
    """
    folder = Path(__file__).parent
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("viewer.js", "page.css"))
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, **options)
    environment.filters["number"] = _number
    colours = _method_colours(report)
    noise = ((plots.error_plot, report.mnse), (plots.spectrum_plot, report.spectrum))
    page = environment.get_template("page.html").render(
        report=report,
        disclaimer=DISCLAIMER,
        results=_results(report.evaluation),
        cases=[_case(case) for case in report.cases],
        power_plot=report.power and plots.power_plot(report.power, colours),
        bands=[f"{low:g} – {high:g}" for low, high in itertools.pairwise(BANDS)],
        intervals=f"{100 * (1 - MISS):.0f} %",
        coverage=_coverage(report.coverage),
        noise_plots=[draw(part, colours) for draw, part in noise if part],
        training_plots=plots.training_plots(report.curves),
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        palette=[bytes(colour).hex() for colour in PALETTE],
    )
    # a lone surrogate of an odd file name cannot be written as UTF-8
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))


def _number(value: float, digits: int, sign: str = "") -> str:
    """A figure with a true minus sign; ∞ if infinite, – if missing."""
    if math.isnan(value):
        return "–"
    return ("−" if value < 0 else sign) + ("∞" if math.isinf(value) else f"{abs(value):.{digits}f}")


def _results(evaluation: Evaluation) -> dict[str, Any]:
    """The summary by method, PSNR inside the breast by image, and on how many images a method is better than others."""
    frame, summary = evaluation.per_image, evaluation.summary()
    by_image = frame.pivot(index="path", columns="method", values="psnr_breast")[list(summary)]
    better = {than: by_image.gt(by_image[than], axis=0).sum() for than in (INPUT, BM3D) if than in by_image}
    compared = [name for name in summary if name not in (INPUT, BM3D)]
    return {
        "summary": summary,
        "digits": DIGITS,
        "ssim": SSIM_NOTE,
        "by_image": list(zip(by_image.index, by_image.to_numpy(), strict=True)),
        "patients": frame["patient"].nunique(),
        "better": {name: f"{better[INPUT][name]} of {len(by_image)}" for name in summary if name != INPUT},
        "than_bm3d": {name: f"{better[BM3D][name]} than {BM3D}" for name in compared if BM3D in better},
    }


def _coverage(coverage: Coverage | None) -> dict[str, float]:
    """Coverage by what it is counted over; {} if there is none."""
    if coverage is None:
        return {}
    bins = itertools.pairwise([0.0, *coverage.bin_upper])
    names = [f"pixels of intensity {low:.2f} – {high:.2f}" for low, high in bins]
    regions = {f"means over {side} × {side} pixels": share for side, share in coverage.regions.items()}
    return dict(zip(names, coverage.bin_coverage, strict=True)) | {"all pixels": coverage.coverage} | regions


def _method_colours(report: Report) -> dict[str, str]:
    """A colour for every method, the same in all plots."""
    parts = (report.evaluation.per_image["method"], report.mnse or (), report.spectrum or (), report.power or ())
    others = [name for name in dict.fromkeys(itertools.chain(*parts)) if name != INPUT]
    return {INPUT: INPUT_COLOUR} | dict(zip(others, itertools.cycle(plots.COLOURS), strict=False))


@dataclass(frozen=True)
class _Panel:
    name: str
    label: str
    values: np.ndarray  # (H, W) float32, divided by the scale if there is one
    scale: float = 0  # of a map in colours; 0: a grey image

    def png(self, values: np.ndarray) -> str:
        """A data URI of values (H, W) in [0, 1], grey or in magma: lossless, 256 grey values or colours."""
        picture = Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))
        if self.scale:
            picture.putpalette(PALETTE.tobytes())
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _panels(case: PageCase) -> list[_Panel]:
    images = {name: np.asarray(image, np.float32) for name, image in {"clean": case.clean, **case.images}.items()}
    maps = {f"|error| of {case.estimate}": np.abs(images[case.estimate] - images["clean"])}
    if case.std is not None:
        maps["expected error"] = np.asarray(case.std, np.float32)
    panels = [_Panel(name, case.labels.get(name, ""), image) for name, image in images.items()]
    return panels + [_Panel(name, "", values / ERROR_SCALE, ERROR_SCALE) for name, values in maps.items()]


def _case(case: PageCase) -> tuple:
    """The case, the factor it is averaged down by, its width and height, the panels with pictures and their sizes, close-ups."""
    height, width = case.clean.shape
    factor = math.ceil(max(height, width) / LARGEST_SIDE)
    panels, shown = _panels(case), []
    for panel in panels:
        reduced = Image.fromarray(np.clip(panel.values, 0, 1)).reduce(factor)
        shown.append((panel, panel.png(np.asarray(reduced)), reduced.size))
    return case, factor, (width, height), shown, [_close_up(panels, *close_up) for close_up in case.close_ups]


def _close_up(panels: Sequence[_Panel], row: int, column: int, side: int) -> tuple:
    """The same square of every panel: its place and side, enlargement, black, white, and the panels with their pictures.

    It is windowed by the clean image's range there.
    """
    parts = [panel.values[row : row + side, column : column + side] for panel in panels]
    low, high = np.quantile(parts[0], (0.005, 0.995)).tolist()
    high = max(high, low + 0.02)
    windowed = [part if panel.scale else (part - low) / (high - low) for panel, part in zip(panels, parts, strict=True)]
    pictures = [(panel, panel.png(part)) for panel, part in zip(panels, windowed, strict=True)]
    return row, column, side, max(1, CLOSE_UP_SHOWN // side), low, high, pictures
