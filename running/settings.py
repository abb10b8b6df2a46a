"""The settings of a call: the task's, the checkpoint's and those of the flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from helper import UserError
from hps import HParams, apply_overrides

if TYPE_CHECKING:
    from running.checkpoints import Checkpoint

# Entries that say which images there are and which split they are in: stage 2 takes them from its first stage's checkpoint,
# so that no image tested on was trained on by either.
DATA_IDENTITY = (
    "image_shape", "noise_level", "native", "stabilize", "split", "abnormality", "split_csv", "patient_pattern",
    "validation_fraction", "test_fraction", "phantom_counts", "dose_fraction",
)  # fmt: skip


def resolve_settings(
    args: argparse.Namespace,
    table: dict[str, HParams],
    *,
    checkpoint: Checkpoint | None = None,
    architecture: Sequence[str] = (),
    first_stage: Checkpoint | None = None,
) -> HParams:
    """The settings of a call: the task's, then the checkpoint's, then what the flags override.

    A checkpoint's `architecture` entries always hold; of another task's checkpoint nothing else does. Data entries follow
    the first stage's checkpoint. Sets `args.task` if it was left out. Raises UserError naming the flag, also if another
    sets the same entry otherwise.
    """
    source = checkpoint or first_stage
    args.task = args.task or (source.task if source else "phantom")
    resumes = checkpoint is not None and not getattr(args, "evaluate", True)
    if resumes and checkpoint.task != args.task:
        raise UserError(
            f"--task {args.task}: {args.load_path} was trained on {checkpoint.task}; leave --task out to resume"
        )
    hps = table[args.task].updated()
    if first_stage is not None and first_stage.task == args.task:
        hps = hps.updated(**{key: first_stage.hps[key] for key in DATA_IDENTITY if key in first_stage.hps})
    if checkpoint is not None:
        kept = [key for key in checkpoint.hps if key in hps and (checkpoint.task == args.task or key in architecture)]
        hps = hps.updated(**{key: checkpoint.hps[key] for key in kept})
    flags = {
        "--batch-size": ("batch_size", args.batch_size), "--epochs": ("max_epochs", args.epochs),
        "--num-workers": ("nb_workers", args.num_workers),
    }  # fmt: skip
    set_flags = {key: value for key, value in flags.values() if value is not None and key in hps}
    if "batch_size" in set_flags and hps.mini_batch_size and set_flags["batch_size"] % hps.mini_batch_size:
        set_flags["mini_batch_size"] = 0
    try:
        hps, overridden = apply_overrides(hps.updated(**set_flags), args.hps)
    except ValueError as error:
        raise UserError(str(error)) from None
    flags |= {"--amp": ("amp", args.amp or None), "--no-amp": ("amp", False if args.no_amp else None)}
    for flag, (key, value) in flags.items():
        if key in overridden and value not in (None, hps[key]):
            raise UserError(f"{flag} and --hps {key}={hps[key]} differ; leave one of them out")
    trained = checkpoint.hps if checkpoint is not None else {}
    for key in overridden & set(architecture) & set(trained):
        if hps[key] != trained[key]:
            raise UserError(f"--hps {key}={hps[key]}: the checkpoint was trained with {trained[key]}; leave it out")
    return hps
