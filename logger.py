"""One call logs to the console, to `log.csv` and to TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from helper import UserError, explained
from running.writing import write_text


class Logger:
    """Logs scalars and pictures of a run; with `folder=None` only to the console.

    `log.csv` has one row a call: step, epoch, split, then a column for every name seen. A run that resumes from an older
    checkpoint drops the rows after its `step` and, of validations, after its `epoch`. Raises UserError if the file cannot be
    read or written.
    """

    def __init__(self, folder: Path | None, step: int = 0, epoch: int = 0):
        self.step, self.epoch = step, epoch
        self.path = folder / "log.csv" if folder else None
        self.columns: list[str] = []  # of the file, as soon as this run has written to it
        self.writer = None
        if folder:
            self._rows()  # an unreadable file is an error now
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def _rows(self) -> list[dict[str, str]]:
        """The rows on disk that this run continues; they are not kept in memory, because a run may be long."""
        if not self.path.is_file() or not (self.columns or self.step):
            return []
        try:
            table = pd.read_csv(self.path, dtype=str, keep_default_na=False)
            validations = table["split"] == "validation"
            place = pd.to_numeric(table["epoch"].where(validations, table["step"]), errors="coerce")
            earlier = place <= np.where(validations, self.epoch, self.step)
        except (ValueError, KeyError):  # pandas' parser errors are ValueErrors
            raise UserError(f"{self.path}: not a readable log; remove it to go on without the figures so far") from None
        return (table if self.columns else table[earlier]).to_dict("records")

    def log(self, split: str, step: int, epoch: int, values: Mapping[str, float], echo: bool = True) -> None:
        """Log named scalars of a split at a step; `echo` prints them too."""
        if echo:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            tqdm.write(f"epoch {epoch:3d}  step {step:6d}  {split:10s}  {numbers}")
        if self.path is None:
            return
        row = {"step": step, "epoch": epoch, "split": split} | {name: repr(float(v)) for name, v in values.items()}
        with explained(f"{self.path.parent}: the log cannot be written", "free space"):
            if set(row) <= set(self.columns) and self.path.is_file():
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(row)
            else:  # the first row of this run, or a new column
                table = pd.DataFrame([*self._rows(), row])
                write_text(self.path, table.to_csv(index=False, lineterminator="\n"))
                self.columns = list(table.columns)
            for name, value in values.items():
                self.writer.add_scalar(f"{split}/{name}", value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG or JPEG file in TensorBoard, as it is: to encode it once more would take longer than many an epoch."""
        if self.writer:
            with Image.open(path) as image:
                size = dict(width=image.width, height=image.height, colorspace=len(image.getbands()))
            shown = Summary.Image(**size, encoded_image_string=path.read_bytes())
            self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=shown)]), step)

    def close(self) -> None:
        """Write what is still buffered."""
        if self.writer:
            self.writer.close()
