"""Resident memory of trainings of many steps: its slope, which must not be told from zero.

`python tests/memory.py --steps 2000` trains both stages at a small size, with log, validations, pictures and checkpoints, and
regresses the resident size on the step. `test_faults.py` runs a short part.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from helper import format_table
from running.command_line import Parser, non_negative_int, positive_int
from running.scripts import run_script
from test_trainer import stage_1, stage_2
from training.loop import Trainer

PARTS = 12  # sizes in a row are alike: the means of so many parts are regressed, not the sizes
STUDENT = 2.23  # 97.5 % quantile of Student's t with PARTS - 2 degrees of freedom
STEPS_AN_EPOCH = 50


@dataclass
class Slope:
    """Resident size (bytes) against the step, in its second half."""

    slope: float  # bytes a step
    error: float  # half of its 95 % confidence interval
    last: float  # mean size at the end, bytes

    @classmethod
    def of(cls, sizes: list[int]) -> Slope:
        """Least squares on the means of `PARTS` equal parts of the second half of the sizes, one a step."""
        kept = sizes[len(sizes) // 2 :]
        length = len(kept) // PARTS
        means = np.array(kept[-length * PARTS :], float).reshape(PARTS, length).mean(1)
        x = (np.arange(PARTS) - (PARTS - 1) / 2) * length
        slope = (x * means).sum() / (x**2).sum()
        rest = means - means.mean() - slope * x
        error = STUDENT * math.sqrt((rest**2).sum() / (PARTS - 2) / (x**2).sum())
        return cls(float(slope), error, float(means[-1]))

    @property
    def grows(self) -> bool:
        """Whether the size grows for certain, by more than a page in a hundred steps."""
        return self.slope - self.error > 0 and self.slope > 41


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(
    make: Callable[..., Trainer], steps: int, workers: int = 0, each_step: Callable[[], None] = lambda: None
) -> Slope:
    """Train a stage for `steps` steps, and more for it to settle, in a folder that is removed."""
    epochs = math.ceil(steps / STEPS_AN_EPOCH)
    # the half that is regressed is the diffusion's
    phases = {"mean_epochs": epochs // 4} if make is stage_2 else {}
    stage = make(
        max_epochs=epochs, **phases, crops_per_image=STEPS_AN_EPOCH // 2, log_frequency=1, checkpoint_frequency=10**6,
        checkpoint_minutes=0.05, nb_workers=workers, cache_images=True,
    )  # fmt: skip
    sizes: list[int] = []
    step = stage.optimizer_step

    def counted() -> torch.Tensor:
        result = step()
        each_step()
        sizes.append(resident())
        return result

    stage.optimizer_step = counted
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        stage.folder = Path(name)
        stage.fit()
    return Slope.of(sizes)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=positive_int, default=2000, help="of each stage (default: 2000)")
    parser.add_argument("--num-workers", type=non_negative_int, default=0, help="loader processes (default: 0)")
    args = parser.parse_args()
    rows, grows = [], False
    for name, make in (("stage 1", stage_1), ("stage 2", stage_2)):
        found = measure(make, args.steps, args.num_workers)
        grows |= found.grows
        cells = (f"{value * 1000 / 1e6:.3f}" for value in (found.slope, found.error))
        rows.append((name, f"{found.last / 1e6:.1f}", *cells, "yes" if found.grows else "no"))
    print(format_table(("", "MB", "MB a 1,000 steps", "+-", "grows"), rows))
    print(f"{args.steps} steps, the second half of them regressed; +-: half of the 95 % confidence interval")
    if grows:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
