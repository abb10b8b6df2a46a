"""Training steps with --compile over steps without it, of both stages of task `phantom`, on the CPU."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rates import Ratio, parser, prepare, print_ratios, seconds

from datasets import Batch, PhantomDataset
from diffusion import LatentDiffusion, UNet
from helper import run_script
from hps import HPS_DIFFUSION, HPS_VQVAE
from trainer import DiffusionTrainer, Trainer, VQVAETrainer
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

STEPS = 5  # a round


def make(stage: str) -> Trainer:
    """A trainer of a stage, its model as it is before the first step."""
    torch.manual_seed(0)
    hps = (HPS_VQVAE if stage == "stage 1" else HPS_DIFFUSION)["phantom"].updated(cache_images=True, nb_workers=0)
    data, cpu = PhantomDataset(hps, "train"), torch.device("cpu")
    vqvae = VQVAE(**HPS_VQVAE["phantom"].arguments(VQVAE))
    if stage == "stage 1":
        return VQVAETrainer("phantom", hps, vqvae, cpu, data, data, progress=False)
    model = LatentDiffusion(
        UNet(**hps.arguments(UNet)), latent_channels=hps.out_channels, **hps.arguments(LatentDiffusion)
    )
    return DiffusionTrainer("phantom", hps, model, cpu, data, data, progress=False, first_stage=VQVAE2Wrapper(vqvae))


def train(trainer: Trainer, batch: Batch) -> None:
    """`STEPS` steps."""
    for _ in range(STEPS):
        trainer.loss(batch).loss.backward()
        trainer.optimizer_step(1000)


def main() -> None:
    args = parser(__doc__).parse_args()
    prepare(args)
    ratios = []
    for stage in ("stage 1", "stage 2"):
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
