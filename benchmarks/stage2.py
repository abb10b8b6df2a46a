"""What a stage-2 training step spends outside the UNets: loader, degradation, encoding, noise and logging, on the CPU.

In both phases epochs with the UNets of the reference values are set against epochs with 1 x 1 convolutions for them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rates import Ratio, parser, peak_memory, prepare, print_ratios, seconds

from diffusion import LatentDiffusion, make_diffusion
from hps import HPS_DIFFUSION, HPS_VQVAE
from loading.latents import LATENT_FORMAT, LatentDataset
from loading.mammograms import PhantomDataset
from logger import Logger
from running.scripts import run_script
from trainer import DiffusionTrainer
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

# pixels: a quarter of the reference size, which is fair to neither attention nor what is done once a step
SIDES = [256, 192]
STEPS = 2  # an epoch
HPS = HPS_DIFFUSION["cbis-ddsm"].updated(
    image_shape=[1, *SIDES],
    batch_size=1,
    nb_workers=0,
    cache_images=True,
    phantom_counts=[STEPS, 1, 1],
    log_frequency=1,
    statistics_batches=1,
)
# epochs of the posterior mean: without them the diffusion's come at once
PHASES = {"posterior mean": 1, "diffusion": 0}


class NoUNet(nn.Module):
    """Stands for a UNet where its time is not to count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(HPS.in_channels, HPS.out_channels, 1)
        self.out_channels = HPS.out_channels

    def forward(self, x: Tensor, t: Tensor, log_level: Tensor) -> Tensor:
        return self.layer(x)


def write_latents(root: Path, shape: tuple[int, ...]) -> None:
    """A latent data set of random numbers, of the layout of main-latents.py."""
    vqvae = HPS_VQVAE["cbis-ddsm"]
    counts = dict(zip(("train", "validation"), HPS.phantom_counts, strict=False))
    images = {s: [{"path": f"{s}/{i}", "patient": f"{s}/{i}"} for i in range(n)] for s, n in counts.items()}
    for split, count in counts.items():
        (root / split).mkdir()
        random = np.random.default_rng(0).standard_normal((count, *shape), np.float32).astype(np.float16)
        np.save(root / split / "clean.npy", random)
        np.save(root / split / "degraded.npy", random[:, None])
        np.save(root / split / "mask.npy", np.ones((count, *shape[1:]), bool))
    index = {
        "format_version": LATENT_FORMAT, "codes_only": False, "latent_shape": shape, "rate": vqvae.scaling_rates[0],
        "scale": int(np.prod(vqvae.scaling_rates)), "first_stage": "", "checkpoint": "", "hps": {},
        "splits": {split: {"images": entry, "realisations": 1} for split, entry in images.items()},
    }  # fmt: skip
    (root / "index.json").write_text(json.dumps(index), encoding="utf-8")


def measure(mean_epochs: int, rounds: int, root: Path, first_stage: VQVAE2Wrapper) -> list[Ratio]:
    """Shares of a step that go by outside the UNets, from images and from the latents in `root`, in one phase."""
    hps = HPS.updated(mean_epochs=mean_epochs)

    def trainer(model: LatentDiffusion, latents: bool) -> DiffusionTrainer:
        sets = [
            LatentDataset(root / "latents", split, hps) if latents else PhantomDataset(hps, split)
            for split in ("train", "validation")
        ]
        stage = DiffusionTrainer(
            "phantom", hps, model, torch.device("cpu"), *sets, progress=False, first_stage=first_stage, latents=latents
        )
        stage.logger = Logger(root)
        stage.begin()
        stage.parallelize()
        return stage

    def epoch(stage: DiffusionTrainer) -> float:
        """Seconds a step of a whole epoch."""
        stage.seen = 0
        return seconds(stage.train_epoch) / STEPS

    unets = trainer(make_diffusion(hps), latents=False)
    rest = [
        trainer(LatentDiffusion(NoUNet(), NoUNet(), **hps.arguments(LatentDiffusion)), latents)
        for latents in (False, True)
    ]
    shares = [Ratio("from images: rest over whole", 0.05), Ratio("from extracted latents", 0.02)]
    for i in range(rounds + 1):  # the first round prepares images and makes the optimisers' states
        outside, whole = [epoch(stage) for stage in rest], epoch(unets)
        for time, share in zip(outside, shares, strict=True):
            if i:
                share.add(time, whole - outside[0] + time)
        print(f"step {whole:.2f} s; without the UNets {', '.join(f'{t:.4f}' for t in outside)} s", flush=True)
    return shares


def main() -> None:
    args = parser(__doc__).parse_args()
    prepare(args)
    first_stage = VQVAE2Wrapper(VQVAE(**HPS_VQVAE["cbis-ddsm"].arguments(VQVAE)))
    with tempfile.TemporaryDirectory(prefix="stage2-benchmark-") as name:
        root = Path(name)
        (root / "latents").mkdir()
        write_latents(root / "latents", first_stage.latent_shape(*SIDES))
        for phase, mean_epochs in PHASES.items():
            print(phase, flush=True)
            print_ratios(measure(mean_epochs, args.rounds, root, first_stage))
    print(
        f"\nstage 2, {SIDES[0]} x {SIDES[1]} pixels, batch 1, no worker: all of the loader's time is in the step's; peak memory "
        f"{peak_memory():.2f} GB\nrest: a step with 1 x 1 convolutions for the UNets; whole: a step with the UNets"
    )


if __name__ == "__main__":
    run_script(main)
