"""Training steps with --compile over steps without it, of stage 1 and both phases of stage 2 of task `phantom`, on the CPU."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rates import Ratio, parser, prepare, print_ratios, seconds

from diffusion import make_diffusion
from hps import HPS_DIFFUSION, HPS_VQVAE
from loading.batches import Batch
from loading.mammograms import PhantomDataset
from running.scripts import run_script
from trainer import DiffusionTrainer, VQVAETrainer
from training.loop import Trainer
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

STEPS = 5  # a round
# of the posterior mean; without them the diffusion's phase comes at once
MEAN_EPOCHS = {"stage 2, posterior mean": 1, "stage 2, diffusion": 0}


def make(stage: str) -> Trainer:
    """A trainer of a stage, its model as it is before the first step."""
    torch.manual_seed(0)
    hps = HPS_VQVAE["phantom"]
    if stage != "stage 1":
        hps = HPS_DIFFUSION["phantom"].updated(mean_epochs=MEAN_EPOCHS[stage], statistics_batches=1)
    data, cpu = PhantomDataset(hps, "train"), torch.device("cpu")
    vqvae = VQVAE(**HPS_VQVAE["phantom"].arguments(VQVAE))
    if stage == "stage 1":
        return VQVAETrainer("phantom", hps, vqvae, cpu, data, data, progress=False)
    first_stage = VQVAE2Wrapper(vqvae)
    trainer = DiffusionTrainer(
        "phantom", hps, make_diffusion(hps), cpu, data, data, progress=False, first_stage=first_stage
    )
    trainer.begin()
    return trainer


def train(trainer: Trainer, batch: Batch) -> None:
    """`STEPS` steps."""
    for _ in range(STEPS):
        trainer.loss(batch).loss.backward()
        trainer.optimizer_step()


def main() -> None:
    args = parser(__doc__).parse_args()
    prepare(args)
    ratios = []
    for stage in ("stage 1", *MEAN_EPOCHS):
        plain, compiled = make(stage), make(stage)
        compiled.compile()
        batch = Batch.collate([plain.loader.dataset[i] for i in range(plain.hps.batch_size)])
        first = []
        for trainer in (plain, compiled):
            trainer.model.train()
            first.append(seconds(partial(train, trainer, batch)))
        print(f"{stage}: first {STEPS} steps {first[0]:.1f} s, compiled {first[1]:.1f} s", flush=True)
        ratio = Ratio(f"{stage}: compiled step over a plain one", None)
        for _ in range(args.rounds):
            own, other = (seconds(partial(train, trainer, batch)) / STEPS for trainer in (compiled, plain))
            ratio.add(own, other)
        ratios.append(ratio)
    print_ratios(ratios)


if __name__ == "__main__":
    run_script(main)
