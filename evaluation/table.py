"""Restored images against their references: a table, `metrics.json` and `metrics.csv`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from evaluation.metrics import ImageMetrics, image_metrics
from evaluation.pictures import comparison, save_picture
from helper import format_table, tracked
from hps import HParams
from loading.batches import Batch, make_loader
from loading.mammograms import MammogramDataset
from running.checkpoints import Checkpoint, warn_of_shared_patients
from running.folders import evaluation_folder, hold
from running.writing import remove_parts, write_json, write_text

INPUT = "low dose"
BM3D = "VST-BM3D"  # the classical method that a restoration has to beat
METRICS = tuple(field.name for field in dataclasses.fields(ImageMetrics))
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
