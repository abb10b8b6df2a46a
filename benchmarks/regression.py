"""A plain regression CNN in the variance-stabilised domain: what a network of the day makes of the same images and time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from helper import Silence, UserError, seeded_generator
from preprocessing.degrade import NoiseModel, simulate_low_dose
from preprocessing.stabilize import stabilize, unstabilize
from running.writing import atomic_path

LAYERS, CHANNELS = 7, 48
CROP, BATCH = 64, 16  # pixels a side, crops a step
LEARNING_RATE = 1e-3  # Adam, cosine to zero over the time given


class RegressionCNN(nn.Module):
    """Seven 3 x 3 convolutions with ReLU that predict the noise in a stabilised image.

    Source: the residual learning of Zhang et al., "Beyond a Gaussian denoiser: residual learning of deep CNN for image
    denoising", IEEE TIP 2017, without batch normalisation.
    """

    def __init__(self, noise: NoiseModel):
        super().__init__()
        self.noise = noise
        self.full_scale = float(stabilize(torch.ones(()), noise))
        widths = [1, *[CHANNELS] * (LAYERS - 1), 1]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect"), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, u: Tensor) -> Tensor:
        """Stabilised noisy images (N, 1, H, W), in standard deviations of the noise, to stabilised clean ones."""
        return u - self.layers(u / self.full_scale)

    @torch.no_grad()
    def restore(self, image: np.ndarray) -> np.ndarray:
        """Restore an image (H, W) in [0, 1] that suffers from the noise it was made for."""
        u = stabilize(torch.from_numpy(image)[None, None].to(next(self.parameters()).device), self.noise)
        return unstabilize(self(u), self.noise)[0, 0].clamp(0, 1).cpu().numpy()


def train(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    level: float,
    minutes: float,
    device: torch.device,
    *,
    progress: bool = True,
) -> tuple[RegressionCNN, int]:
    """Train on random crops of clean images (H, W) in [0, 1] whose centre lies in their breast mask (H, W), for so long.

    Returns the network and the number of steps it took, which depends on the machine.
    """
    noise = NoiseModel.from_level(level)
    torch.manual_seed(0)
    model = RegressionCNN(noise).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = seeded_generator("regression CNN")
    centres = [np.argwhere(mask) for mask in masks]
    step, start, elapsed = 0, time.perf_counter(), 0.0
    bar, silence = tqdm(total=round(60 * minutes), desc="regression CNN", unit="s", disable=not progress), Silence()
    while elapsed < 60 * minutes:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * elapsed / (60 * minutes))) / 2
        clean = torch.stack([_crop(images, centres, generator) for _ in range(BATCH)])[:, None]
        noisy = simulate_low_dose(clean, level, generator)
        u, target = (stabilize(x.to(device), noise) for x in (noisy, clean))
        loss = F.mse_loss(model(u), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        elapsed = time.perf_counter() - start
        bar.update(min(int(elapsed), bar.total) - bar.n)
        if not progress and silence.is_long():
            print(f"regression CNN: {elapsed / 60:.0f} of {minutes:g} minutes")
    bar.close()
    return model.eval(), step


def _crop(images: Sequence[np.ndarray], centres: Sequence[np.ndarray], generator: torch.Generator) -> Tensor:
    """A crop of one of the images in one of eight orientations."""
    which, place, orientation = torch.randint(2**31, (3,), generator=generator).tolist()
    which %= len(images)
    row, column = centres[which][place % len(centres[which])]
    top, left = (
        int(np.clip(at - CROP // 2, 0, size - CROP))
        for at, size in zip((row, column), images[which].shape, strict=True)
    )
    crop = np.rot90(images[which][top : top + CROP, left : left + CROP], orientation % 4)
    return torch.from_numpy((crop[:, ::-1] if orientation % 8 >= 4 else crop).copy())


def save(model: RegressionCNN, steps: int, path: Path) -> None:
    """Write the weights and how many steps they took."""
    with atomic_path(path) as temporary:
        torch.save({"model": model.state_dict(), "steps": steps}, temporary)


def load(path: Path, level: float, device: torch.device) -> tuple[RegressionCNN, int]:
    """The network of `save` for noise of `level`; raises UserError where the file is none."""
    model = RegressionCNN(NoiseModel.from_level(level))
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(payload["model"])
        steps = int(payload["steps"])
    except Exception as error:  # noqa: BLE001  torch raises many kinds for a broken file
        raise UserError(f"{path}: not the weights of the regression CNN ({type(error).__name__}); delete it") from None
    return model.to(device).eval(), steps
