"""Either UNet at the reference values against what its FLOPs take at the machine's rates, on the CPU in single precision."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rates import Ratio, count, measure_rates, parser, peak_memory, prepare, print_ratios, seconds

from diffusion import LitEma
from hps import HPS_DIFFUSION, HPS_VQVAE
from models.unet import UNet
from running.scripts import run_script

HPS = HPS_DIFFUSION["cbis-ddsm"]
LATENT = [side // HPS_VQVAE["cbis-ddsm"].scaling_rates[0] for side in HPS.image_shape[1:]]
CROP = [side // 4 for side in LATENT]  # the training step is measured on these
PASSES = 4  # of a checkpointed step, in forward passes: forward, forward again, and twice as much backward


def main() -> None:
    args = parser(__doc__).parse_args()
    prepare(args)
    t = torch.tensor([500])
    model = UNet(**HPS.arguments(UNet)).eval()
    whole, crop = (torch.randn(1, HPS.in_channels, *side) for side in (LATENT, CROP))
    target = torch.randn(1, HPS.out_channels, *CROP)

    @torch.no_grad()
    def restore() -> None:
        model(whole, t)

    restore()
    memory = peak_memory()  # before counting and the rates' own work take any
    with torch.device("meta"):
        counted = UNet(**HPS.arguments(UNet)).eval()
        forward, small = (
            count(counted, torch.empty(1, HPS.in_channels, *side), t.to("meta")) for side in (LATENT, CROP)
        )
    restoring = Ratio(f"forward at {LATENT[0]} x {LATENT[1]}", 1.25)
    for _ in range(args.rounds):
        rates = measure_rates()
        restoring.add(seconds(restore), forward.floor(rates))
        print(f"{rates}; forward {restoring.times[-1]:.2f} s", flush=True)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=HPS.learning_rate, weight_decay=HPS.weight_decay, fused=True)
    ema = LitEma(model, HPS.ema_decay)

    def backward() -> None:
        F.mse_loss(model(crop, t), target).backward()

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), HPS.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema(model)

    in_training = Ratio(f"training step at {CROP[0]} x {CROP[1]}", 1.5)
    without_update = Ratio("of it, forward and backward", None)
    for i in range(args.rounds + 1):
        rates = measure_rates()
        first, second = seconds(backward), seconds(update)
        if i:  # the first step makes the optimiser's state
            in_training.add(first + second, PASSES * small.floor(rates))
            without_update.add(first, PASSES * small.floor(rates))
            print(f"{rates}; training step {first:.2f} + {second:.2f} s", flush=True)
    print(
        f"\nforward: {forward.convolution / 1e12:.2f} TFLOP of convolutions and {forward.attention / 1e12:.2f} of attention; "
        f"peak memory of the process {memory:.2f} GB (bar 2.0)\n"
        f"training step, checkpointed: {PASSES} x {small.total / 1e12:.3f} TFLOP; AdamW, clipping and EMA are in it; "
        f"peak memory {peak_memory():.2f} GB\nbaseline: the FLOPs at the rates of the same round"
    )
    print_ratios([restoring, in_training, without_update])


if __name__ == "__main__":
    run_script(main)
