"""Restored images against their references: a table, `metrics.json`, `metrics.csv` and side-by-side pictures."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from datasets import Batch, MammogramDataset, make_loader
from helper import (
    Checkpoint,
    atomic_path,
    evaluation_folder,
    format_table,
    hold,
    remove_parts,
    tracked,
    warn_of_shared_patients,
    write_json,
    write_text,
)
from hps import HParams
from images import SOFTWARE
from metrics import ImageMetrics, image_metrics
from uncertainty import Interval

INPUT = "low dose"
BM3D = "VST-BM3D"  # the classical method that a restoration has to beat
METRICS = tuple(field.name for field in dataclasses.fields(ImageMetrics))
OVERVIEW = (1024, 768)  # height and width to which pictures of larger images are reduced
TITLE, GAP, BAR = 34, 6, 14  # pixels: labels of a picture, space between its parts, width of a colour bar
ERROR_RANGE = 0.05  # errors are drawn from black (-0.05) over grey (0) to white (+0.05)

# A method maps a batch of images to (N, C, H, W) images to be compared with `batch.clean`.
Method = Callable[[Batch], Tensor]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of every method on every image."""

    per_image: pd.DataFrame  # columns path, patient, method and the metrics; the input is one of the methods
    note: dict  # what else belongs into metrics.json

    def summary(self) -> dict[str, dict[str, float]]:
        """Per method: mean and standard deviation of each metric, and the gain of its mean over the low-dose input."""
        grouped = self.per_image.groupby("method", sort=False)[list(METRICS)]
        mean, std = grouped.mean(), grouped.std(ddof=0)
        rows = {}
        for method in mean.index:
            row = {}
            for metric in METRICS:
                row[metric] = float(mean.loc[method, metric])
                row[f"{metric}_std"] = float(std.loc[method, metric])
                row[f"{metric}_{INPUT.replace(' ', '_')}"] = float(mean.loc[INPUT, metric])
                value, own = mean.loc[method, metric], mean.loc[INPUT, metric]
                row[f"{metric}_gain"] = float(value - own) if value != own else 0.0  # noise level 0: inf - inf
            rows[method] = row
        return rows

    def table(self) -> str:
        """The summary as text: every row carries the low-dose input's own figure beside the method's."""
        rows = []
        for method, row in self.summary().items():
            cells = [method]
            for metric, digits in (("psnr_breast", 2), ("ssim_breast", 4), ("psnr", 2), ("ssim", 4)):
                cells.append(f"{row[metric]:.{digits}f} ({row[f'{metric}_low_dose']:.{digits}f})")
            gain = row["psnr_breast_gain"]
            rows.append([*cells, f"{gain:+.2f}"])
        header = [
            "",
            "PSNR breast (input)",
            "SSIM breast (input)",
            "PSNR (input)",
            "SSIM (input)",
            "gain in breast, dB",
        ]
        return format_table(header, rows)


def evaluate(
    dataset: MammogramDataset,
    methods: Mapping[str, Method],
    device: torch.device,
    *,
    pictured: Sequence[str] = (),
    picture_folder: Path | None = None,
    picture_count: int = 4,
    suffix: str = ".png",
    note: Callable[[], dict] = dict,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Apply each method to each image of a validation or test set, one at a time, and compare with the clean image.

    The low-dose input is always measured beside them. Pictures of `picture_count` evenly spaced images, with the columns
    clean, low dose, `pictured` methods and the errors of input and last method, go to `picture_folder`. `note` is called
    at the end for what else belongs into metrics.json.
    """
    rows = []
    shown = set(np.linspace(0, len(dataset) - 1, min(picture_count, len(dataset))).round().astype(int).tolist())
    loader = make_loader(dataset, 1, workers=workers)
    for i, batch in enumerate(tracked(loader, "evaluate", "image", progress)):
        on_device = batch.to(device)
        images = {INPUT: batch.degraded}
        images |= {name: method(on_device).float().clamp(0, 1).cpu() for name, method in methods.items()}
        mask = torch.ones_like(batch.clean, dtype=torch.bool) if batch.mask is None else batch.mask
        figures = {name: image_metrics(image[0], batch.clean[0], mask[0]) for name, image in images.items()}
        meta = batch.meta[0]
        rows += [
            {"path": meta.path, "patient": meta.patient, "method": name, **dataclasses.asdict(figure)}
            for name, figure in figures.items()
        ]
        if picture_folder is not None and i in shown:
            columns = {name: images[name][0] for name in (INPUT, *pictured)}
            labels = {name: f"{figures[name].psnr_breast:.1f} dB in the breast" for name in columns}
            picture = comparison(batch.clean[0], columns, mask[0], labels)
            name = Path(meta.path).with_suffix("").as_posix().replace("/", "_")
            save_picture(picture, picture_folder / f"{name}{suffix}")
    return Evaluation(pd.DataFrame(rows), note())


def run_evaluation(
    args: argparse.Namespace,
    hps: HParams,
    dataset: MammogramDataset,
    methods: Mapping[str, Method],
    device: torch.device,
    checkpoints: Sequence[Checkpoint],
    *,
    title: str,
    pictured: Sequence[str],
    note: Callable[[], dict],
) -> Evaluation:
    """What an evaluating script does once it has data and methods: measure, print the table under `title`, write the
    files and say where they lie. A test patient that `checkpoints` were trained on is named."""
    shared = warn_of_shared_patients(dataset.patients(), args.task, *checkpoints)
    folder = evaluation_folder(args, args.load_path)
    if folder is not None:
        hold(folder / ".lock", folder)
        remove_parts(folder, *(path for path in folder.iterdir() if path.is_dir()))

    def provenance() -> dict:
        return {
            "task": args.task,
            "checkpoint": str(args.load_path),
            "seed": args.seed,
            "noise": dataset.noise,
            "test_patients_trained_on": shared,
            **note(),
        }

    result = evaluate(
        dataset,
        methods,
        device,
        pictured=pictured,
        picture_folder=folder,
        suffix=".jpg" if args.save_jpg else ".png",
        note=provenance,
        workers=hps.nb_workers,
        progress=not args.no_tqdm,
    )
    print(f"{title} on {len(dataset)} test images of {args.task}, {dataset.noise}")
    print(result.table())
    if folder is not None:
        write_evaluation(result, folder)
        print(f"evaluation written to {folder}")
    return result


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write metrics.json (means by method), metrics.csv (a row an image, a column a method and metric) and table.txt."""
    count = int(evaluation.per_image["path"].nunique())
    write_json(folder / "metrics.json", {"images": count, "methods": evaluation.summary(), **evaluation.note})
    wide = evaluation.per_image.set_index(["path", "patient", "method"])[list(METRICS)].unstack("method", sort=False)
    wide.columns = [f"{method} {metric}" for metric, method in wide.columns]
    methods = list(evaluation.per_image["method"].unique())
    wide = wide[[f"{method} {metric}" for method in methods for metric in METRICS]]
    write_text(folder / "metrics.csv", wide.reset_index().to_csv(index=False, lineterminator="\n"))
    write_text(folder / "table.txt", evaluation.table() + "\n")


# --- pictures --------------------------------------------------------------------------------------------------------


def _close_up(clean: Tensor, mask: Tensor, largest: int) -> tuple[int, int, int]:
    """Row, column and side of the square inside the breast with the most fine structure, a quarter of the shorter side, at
    most `largest`."""
    height, width = clean.shape[-2:]
    side = min(max(16, min(height, width) // 4), height, width, largest)
    stride = max(1, side // 8)
    image, inside = clean.mean(0)[None, None].float(), mask[None].float()
    detail = (image - F.avg_pool2d(image, 9, 1, 4, count_include_pad=False)).square()
    structure = F.avg_pool2d(detail, side, stride)
    coverage = F.avg_pool2d(inside, side, stride)
    # a square that leaves the breast, with the skin line or a label in it, counts only where there is no other
    best = int(torch.where(coverage >= min(1.0, float(coverage.max())), structure, -1.0).argmax())
    columns = structure.shape[-1]
    return best // columns * stride, best % columns * stride, side


def to_grey(image: np.ndarray) -> Image.Image:
    """An image (H, W) in [0, 1], grey."""
    return Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")


def to_magma(values: np.ndarray) -> Image.Image:
    """Values (H, W) in the colours of matplotlib's magma, from 0 to 1."""
    return Image.fromarray(matplotlib.colormaps["magma"](np.clip(values, 0, 1).astype(np.float64), bytes=True)[..., :3])


def reduction(shape: tuple[int, ...]) -> int:
    """The factor by which a picture of an image (H, W) is reduced."""
    return math.ceil(max(side / most for side, most in zip(shape, OVERVIEW, strict=True)))


def side_by_side(columns: Sequence[tuple[str, str, Sequence[Image.Image]]]) -> Tensor:
    """Columns of pictures, alike in height, under a name and a label: (3, H, W) uint8."""
    font = ImageFont.load_default(13)
    widths = [
        max(*(image.width for image in images), *(math.ceil(font.getlength(text)) for text in (name, label)))
        for name, label, images in columns
    ]
    height = TITLE + sum(image.height + GAP for image in columns[0][2])
    canvas = Image.new("RGB", (GAP + sum(width + GAP for width in widths), height), (24, 24, 24))
    draw, left = ImageDraw.Draw(canvas), GAP
    for (name, label, images), width in zip(columns, widths, strict=True):
        draw.text((left, 2), name, font=font, fill=(255, 255, 255))
        draw.text((left, 17), label, font=font, fill=(180, 200, 255))
        top = TITLE
        for image in images:
            canvas.paste(image, (left, top))
            top += image.height + GAP
        left += width + GAP
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def comparison(
    clean: Tensor, images: Mapping[str, Tensor], mask: Tensor, labels: Mapping[str, str], reference: str = "clean"
) -> Tensor:
    """Side by side, (3, H', W') uint8: clean, the images, and the errors of the first and the last of them.

    All are (C, H, W) in [0, 1]; `reference` names the clean one. Below each stands a close-up of the part with the most fine
    structure, windowed by the clean image's range there, alike in all columns. Large images are reduced, close-ups never.
    """
    columns = [(reference, clean.mean(0), "")]
    columns += [(name, image.mean(0), labels.get(name, "")) for name, image in images.items()]
    ends = list(dict.fromkeys([next(iter(images)), list(images)[-1]]))
    errors = [(f"{name} - {reference}", (images[name] - clean).mean(0), f"+-{ERROR_RANGE}") for name in ends]
    reduced = reduction(clean.shape[-2:])
    least = max(192, -(-clean.shape[-1] // reduced))
    row, column, side = _close_up(clean, mask, least)
    window = slice(row, row + side), slice(column, column + side)
    low, high = torch.quantile(clean.mean(0)[window].flatten().float(), torch.tensor([0.005, 0.995])).tolist()
    high = max(high, low + 0.02)
    box = [column // reduced, row // reduced, (column + side) // reduced - 1, (row + side) // reduced - 1]
    pictures = []
    for i, (name, image, label) in enumerate(columns + errors):
        part = (image[window] - low) / (high - low)
        if i >= len(columns):
            image = 0.5 + image / (2 * ERROR_RANGE)
            part = image[window]
        whole = to_grey(image.cpu().numpy()).reduce(reduced)
        ImageDraw.Draw(whole).rectangle(box, outline=(255, 200, 0))
        zoom = (side * max(1, least // side),) * 2
        pictures.append((name, label, [whole, to_grey(part.cpu().numpy()).resize(zoom, Image.Resampling.NEAREST)]))
    return side_by_side(pictures)


def spread_picture(clean: np.ndarray | None, own: Interval, sample: np.ndarray) -> Tensor:
    """The mean of posterior samples, one of them, and the expected error: (3, H', W') uint8 with labels and a colour bar.

    With `clean` (H, W) the absolute error of the mean stands beside. Maps are drawn from 0 to one and a half times what 99 %
    of the expected errors stay below; large images are reduced.
    """
    limit = max(1.5 * float(np.quantile(own.std, 0.99)), 1e-6)
    columns = [("mean of the samples", "", to_grey(own.mean)), ("posterior sample", "the first", to_grey(sample))]
    columns.append(("expected error", "standard deviation", to_magma(own.std / limit)))
    if clean is not None:
        covered = f"{own.holds(clean).mean():.1%} in the interval"
        columns.append(("absolute error", covered, to_magma(np.abs(clean - own.mean) / limit)))
    columns = [(name, label, [image.reduce(reduction(own.mean.shape))]) for name, label, image in columns]
    bar = to_magma(np.repeat(np.linspace(1, 0, columns[0][2][0].height)[:, None], BAR, axis=1))
    return side_by_side([*columns, (f"{limit:.3f}", "to 0", [bar])])


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture (3, H, W) uint8 atomically, in the format of the path's suffix.

    A PNG says what made it, so that it is not taken for a mammogram.
    """
    text = PngInfo()
    text.add_itxt("Software", SOFTWARE)
    form = dict(format="JPEG", quality=95) if path.suffix == ".jpg" else dict(format="PNG", pnginfo=text)
    with atomic_path(path) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(temporary, **form)
