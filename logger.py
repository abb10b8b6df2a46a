"""One call logs to the console, to `log.csv` and to TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from helper import UserError
from running.writing import write_text


class Logger:
    """Logs scalars and pictures of a run; `folder=None` logs to the console alone.

    `log.csv` has one row a call: step, epoch, split, then a column for every name seen. Rows written after `step` and, of
    validations, after `epoch` (a run that is resumed from an older checkpoint) are dropped, so that nothing stands in it
    twice. Raises UserError where it cannot be read or written.
    """

    def __init__(self, folder: Path | None, step: int = 0, epoch: int = 0):
        self.start = step, epoch
        self.stale = True  # rows on disk may go beyond `start`
        self.path = folder / "log.csv" if folder else None
        self.columns = ["step", "epoch", "split"]
        if self.path:
            self._rows()  # what cannot be read is said now
        self.writer = (
            SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None) if folder else None
        )

    def _rows(self) -> list[dict[str, str]]:
        """What is on disk and not stale; nothing is kept in memory, for a run may be long."""
        if self.start[0] == 0 and self.stale or not self.path.is_file():
            return []
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if not self.stale or _is_before(row, *self.start)]
                if self.stale:
                    self.columns = list(reader.fieldnames or self.columns)
        except (ValueError, csv.Error):
            raise UserError(f"{self.path}: not a readable log; remove it to go on without the figures so far") from None
        return rows

    def log(self, split: str, step: int, epoch: int, values: Mapping[str, float], echo: bool = True) -> None:
        """Log named scalars of a split at a step; `echo` prints them too."""
        if echo:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            tqdm.write(f"epoch {epoch:3d}  step {step:6d}  {split:10s}  {numbers}")
        if self.path is None:
            return
        row = {"step": str(step), "epoch": str(epoch), "split": split} | {k: repr(float(v)) for k, v in values.items()}
        new = [name for name in row if name not in self.columns]
        try:
            if self.stale or new or not self.path.is_file():
                rows = [*self._rows(), row]
                self.columns += new
                write_text(self.path, self._lines([dict(zip(self.columns, self.columns, strict=True)), *rows]))
                self.stale = False
            else:
                with self.path.open("a", newline="", encoding="utf-8") as file:
                    file.write(self._lines([row]))
            for name, value in values.items():
                self.writer.add_scalar(f"{split}/{name}", value, step)
        except OSError as error:
            raise UserError(
                f"{self.path.parent}: the log cannot be written ({error.strerror or error}); free space"
            ) from None

    def _lines(self, rows: list[dict[str, str]]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue()

    def picture(self, name: str, image: Tensor, step: int) -> None:
        """Show a picture (3, H, W) uint8 in TensorBoard."""
        if self.writer:
            self.writer.add_image(name, image.to(torch.uint8), step)

    def close(self) -> None:
        """Flush what is still held back."""
        if self.writer:
            self.writer.close()


def _is_before(row: dict[str, str], step: int, epoch: int) -> bool:
    """Whether a run that stands at `step`, after `epoch` epochs, has written a row of its log."""
    name, end = ("epoch", epoch) if row.get("split") == "validation" else ("step", step)
    return (row.get(name) or "").isdigit() and int(row[name]) <= end
