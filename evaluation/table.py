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

from evaluation.metrics import SSIM_NOTE, ImageMetrics, image_metrics
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
PICTURES = 4  # images, evenly spaced, that pictures are written of
METRICS = tuple(field.name for field in dataclasses.fields(ImageMetrics))
DIGITS = {"psnr_breast": 2, "ssim_breast": 4, "psnr": 2, "ssim": 4}  # of the metrics in the table
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
        # at noise level 0 the input is the reference: from its infinite PSNR there is no gain to state
        gain = (mean - mean.loc[INPUT]).where(mean != mean.loc[INPUT], 0.0).replace(-np.inf, np.nan)
        parts = {"": mean, "_std": std, f"_{INPUT.replace(' ', '_')}": mean.loc[[INPUT] * len(mean)], "_gain": gain}
        return {
            method: {f"{m}{suffix}": float(part[m].iloc[i]) for m in METRICS for suffix, part in parts.items()}
            for i, method in enumerate(mean.index)
        }

    def table(self) -> str:
        """The summary as text: every row carries the low-dose input's own figure beside the method's. The last line says which
        SSIM it is."""
        names = [m.removesuffix("_breast").upper() + " breast" * m.endswith("_breast") for m in DIGITS]
        rows = []
        for method, row in self.summary().items():
            cells = [f"{row[m]:.{digits}f} ({row[f'{m}_low_dose']:.{digits}f})" for m, digits in DIGITS.items()]
            gain = row["psnr_breast_gain"]
            rows.append([method, *cells, "-" if np.isnan(gain) else f"{round(gain, 2) + 0.0:+.2f}"])  # -0 + 0 is 0
        table = format_table(["", *(f"{name} (input)" for name in names), "gain in breast, dB"], rows)
        return f"{table}\n{SSIM_NOTE}"


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices of `count`, evenly spaced."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def picture_name(path: str, jpg: bool) -> str:
    """The name of a picture of an image, from the image's path."""
    return f"{Path(path).with_suffix('').as_posix().replace('/', '_')}{'.jpg' if jpg else '.png'}"


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
    """Compare what each method makes of each image with the clean one, print the table under `title`, and write the files.

    The low-dose input is always measured beside them. Pictures of some images show the `pictured` methods. `note` is called
    at the end for what else belongs into metrics.json. Warns of test patients that `checkpoints` were trained on.
    """
    shared = warn_of_shared_patients(dataset.patients(), args.task, *checkpoints)
    folder = evaluation_folder(args, args.load_path)
    if folder is not None:
        hold(folder / ".lock", folder)
        remove_parts(folder, *(path for path in folder.iterdir() if path.is_dir()))
    shown = spread(len(dataset), PICTURES)
    loader, rows = make_loader(dataset, 1, workers=hps.nb_workers), []
    for i, batch in enumerate(tracked(loader.once(), "evaluate", "image", not args.no_tqdm, len(loader))):
        on_device = batch.to(device)
        images = {INPUT: batch.degraded}
        images |= {name: method(on_device).float().clamp(0, 1).cpu() for name, method in methods.items()}
        mask = torch.ones_like(batch.clean, dtype=torch.bool) if batch.mask is None else batch.mask
        figures = {name: image_metrics(image[0], batch.clean[0], mask[0]) for name, image in images.items()}
        path, patient = batch.meta[0].path, batch.meta[0].patient
        rows += [{"path": path, "patient": patient, "method": m, **dataclasses.asdict(f)} for m, f in figures.items()]
        if folder is not None and i in shown:
            columns = {name: images[name][0] for name in (INPUT, *pictured)}
            labels = {name: f"{figures[name].psnr_breast:.1f} dB in the breast" for name in columns}
            picture = comparison(batch.clean[0], columns, mask[0], labels)
            save_picture(picture, folder / picture_name(path, args.save_jpg))
    provenance = {"task": args.task, "checkpoint": str(args.load_path), "seed": args.seed, "noise": dataset.noise}
    provenance["test_patients_trained_on"] = shared
    result = Evaluation(pd.DataFrame(rows), provenance | note())
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
