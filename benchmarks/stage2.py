"""What a stage-2 training step spends outside the UNet: loader, degradation, encoding, noise and logging, on the CPU.

Epochs with the UNet of the reference values are set against epochs in which a 1 x 1 convolution stands for it.
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

from datasets import LATENT_FORMAT, LatentDataset, PhantomDataset
from diffusion import LatentDiffusion, UNet
from helper import run_script
from hps import HPS_DIFFUSION, HPS_VQVAE
from logger import Logger
from trainer import DiffusionTrainer
from vqvae import VQVAE
from vqvae2_wrapper import VQVAE2Wrapper

SIDES = [
    256,
    192,
]  # pixels: a quarter of the reference size, which is fair to neither attention nor what is done once a step
STEPS = 2  # an epoch
HPS = HPS_DIFFUSION["cbis-ddsm"].updated(
    image_shape=[1, *SIDES],
    batch_size=1,
    nb_workers=0,
    cache_images=True,
    phantom_counts=[STEPS, 1, 1],
    log_frequency=1,
)


class NoUNet(nn.Module):
    """Stands for the UNet where its time is not to count."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(HPS.in_channels, HPS.out_channels, 1)
        self.out_channels = HPS.out_channels

    def normalize_within(self, window: int) -> None:
        """It has nothing to normalise."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
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


def main() -> None:
    args = parser(__doc__).parse_args()
    prepare(args)
    vqvae = HPS_VQVAE["cbis-ddsm"]
    first_stage = VQVAE2Wrapper(VQVAE(**vqvae.arguments(VQVAE)))
    with tempfile.TemporaryDirectory(prefix="stage2-benchmark-") as name:
        root = Path(name)
        (root / "latents").mkdir()
        write_latents(root / "latents", first_stage.latent_shape(*SIDES))

        def trainer(model: nn.Module, latents: bool) -> DiffusionTrainer:
            sets = [
                LatentDataset(root / "latents", split, HPS) if latents else PhantomDataset(HPS, split)
                for split in ("train", "validation")
            ]
            diffusion = LatentDiffusion(model, latent_channels=HPS.out_channels, **HPS.arguments(LatentDiffusion))
            stage = DiffusionTrainer(
                "phantom", HPS, diffusion, torch.device("cpu"), *sets, progress=False, first_stage=first_stage, latents=latents
            )  # fmt: skip
            stage.logger = Logger(root)
            stage.parallelize()
            return stage

        def epoch(stage: DiffusionTrainer) -> float:
            """Seconds a step of a whole epoch."""
            stage.seen = 0
            return seconds(stage.train_epoch) / STEPS

        unet = trainer(UNet(**HPS.arguments(UNet)), latents=False)
        rest = {"images": trainer(NoUNet(), latents=False), "extracted latents": trainer(NoUNet(), latents=True)}
        shares = {
            "images": Ratio("from images: rest over whole", 0.05),
            "extracted latents": Ratio("from extracted latents", 0.02),
        }
        for i in range(args.rounds + 1):  # the first round prepares images and makes the optimisers' states
            outside = {source: epoch(stage) for source, stage in rest.items()}
            whole = epoch(unet)
            for source, share in shares.items():
                if i:
                    share.add(outside[source], whole - outside["images"] + outside[source])
            print(
                f"step {whole:.2f} s; without the UNet {', '.join(f'{t:.4f}' for t in outside.values())} s", flush=True
            )
    print(
        f"\nstage 2, {SIDES[0]} x {SIDES[1]} pixels, batch 1, no worker: all of the loader's time is in the step's; peak memory "
        f"{peak_memory():.2f} GB\nrest: a step with a 1 x 1 convolution for the UNet; whole: a step with the UNet"
    )
    print_ratios(list(shares.values()))


if __name__ == "__main__":
    run_script(main)
