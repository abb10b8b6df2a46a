"""A stage-1 training step at the reference size against a straightforward VQ-VAE-2 of the same settings, on the CPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rates import Ratio, count, measure_rates, parser, peak_memory, prepare, print_ratios, seconds

from helper import seeded_generator
from hps import HPS_VQVAE, HParams
from loading.mammograms import PhantomDataset
from running.scripts import run_script
from trainer import VQVAETrainer
from vqvae import VQVAE

HPS = HPS_VQVAE["cbis-ddsm"].updated(
    batch_size=1, warmup_steps=1, phantom_counts=[1, 1, 1], cache_images=True, quantize_probability=1.0
)
PASSES = 3  # of a training step, in forward passes
# The bars: 3.2 s where a plain one took 6.5 s, on a machine of 134 GFLOP/s in contiguous convolutions.
STEP_OVER_PLAIN, STEP_OVER_FLOOR = 3.2 / 6.5, 3.2 / (PASSES * 0.099e12 / 134e9)


class PlainQuantizer(nn.Module):
    """Codebook as the equations stand: all distances, one-hot codes, products with them for counts and sums."""

    def __init__(self, hps: HParams):
        super().__init__()
        self.decay = hps.codebook_decay
        self.register_buffer("codebook", torch.randn(hps.embed_dim, hps.nb_entries))
        self.register_buffer("ema_count", torch.ones(hps.nb_entries))
        self.register_buffer("ema_sum", self.codebook.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D, H, W) to the same, quantised, and the commitment loss."""
        x = x.permute(0, 2, 3, 1)
        flat = x.reshape(-1, x.shape[-1])
        distances = flat.square().sum(1, keepdim=True) - 2 * flat @ self.codebook + self.codebook.square().sum(0)
        indices = distances.argmin(1)
        codes = F.one_hot(indices, self.codebook.shape[1]).type(flat.dtype)
        quantized = F.embedding(indices.view(x.shape[:-1]), self.codebook.t())
        with torch.no_grad():
            self.ema_count.lerp_(codes.sum(0), 1 - self.decay)
            self.ema_sum.lerp_(flat.t() @ codes, 1 - self.decay)
            self.codebook.copy_(self.ema_sum / self.ema_count.clamp(min=1e-5))
        loss = (quantized - x).square().mean()
        return (x + (quantized - x).detach()).permute(0, 3, 1, 2), loss


class PlainBlock(nn.Module):
    """x + alpha * f(x) (ReZero)."""

    def __init__(self, hps: HParams):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(hps.hidden_channels, hps.res_channels, 3, padding=1), nn.BatchNorm2d(hps.res_channels),
            nn.ReLU(), nn.Conv2d(hps.res_channels, hps.hidden_channels, 1), nn.BatchNorm2d(hps.hidden_channels),
        )  # fmt: skip
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.layers(x)


class PlainVQVAE(nn.Module):
    """VQ-VAE-2 as Razavi et al. (2019) draw it: convolutions of stride 2, one a factor of 2, on either side."""

    def __init__(self, hps: HParams):
        super().__init__()
        hidden, levels = hps.hidden_channels, range(hps.nb_levels)
        self.encoders, self.projections, self.quantizers, self.decoders, self.ups = (nn.ModuleList() for _ in range(5))

        def blocks() -> list[nn.Module]:
            return [PlainBlock(hps) for _ in range(hps.nb_res_layers)]

        for level in levels:
            halvings = round(math.log2(hps.scaling_rates[level]))
            widths = [hidden if level else hps.in_channels, *[hidden // 2] * (halvings - 1), hidden]
            down: list[nn.Module] = []
            up: list[nn.Module] = []
            for a, b in zip(widths[:-1], widths[1:], strict=True):
                down += [nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
                up = [nn.ConvTranspose2d(b, a, 4, 2, 1), *([nn.BatchNorm2d(a), nn.ReLU()] if up else []), *up]
            above = level < hps.nb_levels - 1
            self.encoders.append(nn.Sequential(*down, nn.Conv2d(hidden, hidden, 3, padding=1), *blocks()))
            self.projections.append(nn.Conv2d(hidden * (1 + above), hps.embed_dim, 1))
            self.quantizers.append(PlainQuantizer(hps))
            entry = nn.Conv2d(hps.embed_dim + hidden * above, hidden, 3, padding=1)
            self.decoders.append(nn.Sequential(entry, *blocks()))
            self.ups.append(nn.Sequential(*up))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) to their reconstruction and the commitment loss."""
        features = []
        for encoder in self.encoders:
            x = encoder(x)
            features.append(x)
        above: list[Tensor] = []
        loss = x.new_zeros(())
        for level in reversed(range(len(features))):
            code, commitment = self.quantizers[level](self.projections[level](torch.cat([features[level], *above], 1)))
            loss = loss + commitment
            above = [self.ups[level](self.decoders[level](torch.cat([code, *above], 1)))]
        return above[0], loss


def main() -> None:
    args = parser(__doc__).parse_args()
    prepare(args)
    data = PhantomDataset(HPS, "train")
    batch = data[0]
    with torch.device("meta"):
        plain_work = count(PlainVQVAE(HPS), torch.empty(1, *HPS.image_shape))
    stage = VQVAETrainer("phantom", HPS, VQVAE(**HPS.arguments(VQVAE)), torch.device("cpu"), data, data, progress=False)
    work = count(stage.model.eval(), batch.clean)
    stage.model.initialise_codebooks([batch.clean], seeded_generator("codebooks"))
    stage.model.train()

    def step() -> None:
        stage.loss(batch).loss.backward()
        stage.optimizer_step()

    plain = PlainVQVAE(HPS)
    optimizer = torch.optim.Adam(plain.parameters(), lr=HPS.learning_rate)

    def plain_step() -> None:
        reconstruction, commitment = plain(batch.clean)
        (F.mse_loss(reconstruction, batch.clean) + HPS.beta * commitment).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), HPS.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # both first steps make their optimisers' state
    memory = peak_memory()
    plain_step()
    plain_memory = peak_memory()
    against, over_floor = (
        Ratio("step over a plain one's", STEP_OVER_PLAIN),
        Ratio("step over its floor", STEP_OVER_FLOOR),
    )
    for _ in range(args.rounds):
        rates = measure_rates()
        own, other = seconds(step), seconds(plain_step)
        against.add(own, other)
        over_floor.add(own, PASSES * work.floor(rates))
        print(f"{rates}; step {own:.2f} s, plain {other:.2f} s", flush=True)
    print(
        f"\nstage 1 at {' x '.join(map(str, HPS.image_shape))}, batch 1: {work.total / 1e12:.3f} TFLOP forward, plain "
        f"{plain_work.total / 1e12:.3f}; peak memory of the process {memory:.2f} GB, with the plain one's {plain_memory:.2f}\n"
        f"floor: {PASSES} x the forward FLOPs at the convolution rate of the same round"
    )
    print_ratios([against, over_floor])


if __name__ == "__main__":
    run_script(main)
