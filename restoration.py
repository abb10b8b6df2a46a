"""Restoring mammograms of any size and noise: the two trained stages, tile by tile, and what fits them to the input."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.stats import norm
from torch import Tensor
from tqdm import tqdm

from datasets import oriented, upright
from diffusion import LatentDiffusion, NoiseField, UNet, sample_latents
from helper import Checkpoint, UserError, build_model, load_checkpoint, load_weights, seeded_generator, weights_digest
from hps import HParams
from metrics import breast_mask
from preprocessing.degrade import NoiseModel
from preprocessing.estimate import level_at
from preprocessing.sides import EDGE_REACH, least_step, part_sides
from preprocessing.stabilize import stabilize, unstabilize
from vqvae2_wrapper import VQVAE2Wrapper, load_vqvae

# the model in the box: trained on the first 72 images of mini-MIAS and on phantoms; see weights/README.md
SHIPPED_VQVAE, SHIPPED_DIFFUSION, SHIPPED_CALIBRATION = (
    Path(__file__).resolve().parent / "weights" / name for name in ("vqvae.pt", "diffusion.pt", "uncertainty.json")
)
MARGIN = 32  # pixels by which an image is mirrored at its borders
TILE_CROPS = 7  # sides of training crops that make the side of a tile: overlaps cost the less the larger it is
PEAK_QUANTILE = 0.999  # of the breast's intensities: brought to full scale at most
GUARD_WIDTH = 4.0  # pixels; sigma of the window in which a correction is weighed against the noise
GUARD_SIGMAS = 6.0  # standard deviations; a correction fades out over the last of them
CLAMP_REACH, CLAMP_ENTRIES = 4.0, 257  # standard deviations below 1 at which the clamp is felt, and steps in between
PROBE = 0.1  # standard deviations by which an image is moved to see how its correction follows


# --- the trained model -----------------------------------------------------------------------------------------------


def make_diffusion(hps: HParams) -> LatentDiffusion:
    """The UNet and the diffusion around it that the settings describe."""
    return LatentDiffusion(
        UNet(**hps.arguments(UNet)), latent_channels=hps.out_channels, **hps.arguments(LatentDiffusion)
    )


def check_first_stage(checkpoint: Checkpoint, path: Path, digest: str, vqvae_path: Path) -> None:
    """Raises UserError unless the diffusion checkpoint at `path` was trained on the first stage with this digest."""
    if checkpoint.extra.get("first_stage") != digest:
        raise UserError(f"--vqvae-path {vqvae_path}: {path} was trained on another VQ-VAE-2; pass that one")


def load_averages(model: LatentDiffusion, checkpoint: Checkpoint, path: Path) -> None:
    """Load a diffusion checkpoint with the EMA of its weights in place of the weights; raises UserError where they do not fit."""
    load_weights(model, checkpoint.model, path)
    if checkpoint.extra.get("averaged"):  # main-export.py has done it
        return
    prefix = "averaged.module."
    try:
        ema = {key.removeprefix(prefix): v for key, v in checkpoint.training["ema"].items() if key.startswith(prefix)}
    except (KeyError, AttributeError):
        raise UserError(f"{path}: holds no EMA weights; use the checkpoint before it") from None
    load_weights(model.model, ema, path)


@dataclass
class Restorer:
    """Both trained stages: degraded images in, restored ones out."""

    first_stage: VQVAE2Wrapper
    model: LatentDiffusion  # with the averaged weights
    hps: HParams  # of the diffusion checkpoint
    steps: int = 1  # network evaluations a sample; 1: the posterior mean, from timestep T - 1
    samples: int = 1  # samples averaged
    views: int = 1  # orientations of the image whose restorations are averaged
    seed: int = 0
    name: str = ""  # of the model, for a derived image's description
    amp: torch.dtype | None = None  # half precision in the UNet, and nowhere else: the decoder alone would lose 2 dB

    def __post_init__(self):
        self.model.eval().model.normalize_within(self.hps.crop_size // self.first_stage.vqvae.scaling_rates[0])

    @classmethod
    def load(
        cls,
        vqvae_path: Path,
        load_path: Path,
        device: torch.device,
        *,
        steps: int | None = None,
        samples: int = 1,
        views: int | None = None,
        seed: int = 0,
        amp: torch.dtype | None = None,
    ) -> Restorer:
        """The stages of two checkpoints, on `device`, the UNet in `amp`.

        `steps` None is 1, or the checkpoint's where `samples` are averaged; `views` None is the checkpoint's of one
        evaluation, else 1. Raises UserError where the checkpoints cannot
        be read or do not belong together, or for steps that the model does not have.
        """
        vqvae, _ = load_vqvae(vqvae_path)
        digest = weights_digest(vqvae)
        checkpoint = load_checkpoint(load_path, "diffusion", lazily=True)
        check_first_stage(checkpoint, load_path, digest, vqvae_path)
        hps = checkpoint.hps
        model = build_model(make_diffusion, checkpoint, load_path)
        load_averages(model, checkpoint, load_path)
        if steps is None:
            steps = 1 if samples == 1 else hps.ddim_steps
        if steps > hps.timesteps:
            raise UserError(f"--steps {steps}: the model has {hps.timesteps} timesteps; pass at most as many")
        if samples > 1 and steps == 1:
            raise UserError(
                f"--samples {samples}: one step gives the mean of all samples already; pass --steps 2 or more"
            )
        name = f"VQ-VAE-2 {digest[:8]}, latent diffusion {weights_digest(model)[:8]}"
        first_stage = VQVAE2Wrapper(vqvae).to(device)
        if views is None:
            views = hps.views if steps == 1 else 1  # samples differ by themselves
        return cls(first_stage, model.to(device), hps, steps, samples, views, seed, name, amp)

    @property
    def evaluations(self) -> int:
        """Network evaluations that restoring takes, a tile."""
        return self.steps * self.samples * self.views

    @property
    def noise(self) -> NoiseModel:
        """What degraded the images that the model was trained on."""
        return NoiseModel.from_level(self.hps.noise_level)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the training grid."""
        return tuple(self.hps.image_shape[1:])

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width up to which an image is restored in one piece: the training grid, or some crops of training."""
        return (TILE_CROPS * self.hps.crop_size,) * 2 if self.hps.crop_size else self.shape

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.alphas_cumprod.device

    @property
    def scale(self) -> int:
        """Tiles start at multiples of so many pixels, that every level sees them as it sees the whole image."""
        return math.lcm(self.first_stage.vqvae.scale, self.first_stage.vqvae.scaling_rates[0] * self.model.model.stride)

    @property
    def stabilized(self) -> bool:
        """Whether the model works in units of the noise, and so restores images of any noise it is told."""
        return self.first_stage.vqvae.stabilize

    @property
    def levels(self) -> tuple[float, float]:
        """Least and greatest noise level that the model was trained at."""
        return tuple(self.hps.noise_levels) or (self.hps.noise_level,) * 2

    def level_of(self, noise: NoiseModel, intensity: float) -> float:
        """The noise level that the network is told for an image of this noise and mean intensity: at most what it knows."""
        return min(max(level_at(noise, intensity), self.levels[0]), self.levels[1])

    @torch.no_grad()
    def restore(
        self,
        degraded: Tensor,
        names: Sequence[str],
        *,
        noise: NoiseModel | None = None,
        level: float | None = None,
        origin: tuple[int, int] = (0, 0),
        progress: bool = False,
    ) -> Tensor:
        """Restore images (N, C, H, W) in [0, 1]; returns the like.

        `noise` is what a stabilised model is to take for noise, None what it was trained at; others always take that. The
        network is told `level`, None: that of the noise at half of full scale. `names` key the sampler's noise, `origin` is
        the place in pixels of the images' first row and column on it.
        """
        noise = noise or self.noise
        level = self.level_of(noise, 0.5) if level is None else level
        levels = torch.full((len(degraded),), level, device=degraded.device)
        rate = self.first_stage.vqvae.scaling_rates[0]
        place = origin[0] // rate, origin[1] // rate
        height, width = degraded.shape[-2:]
        padded = F.pad(degraded, (0, -width % self.scale, 0, -height % self.scale), mode="replicate")
        fields = [NoiseField((self.seed, name), self.first_stage.latent_channels) for name in names]
        spacing = "trailing" if self.steps == 1 else self.hps.ddim_spacing
        total = torch.zeros_like(padded)
        for view, sample in itertools.product(range(self.views), range(self.samples)):
            image = oriented(padded, view)
            cond = self.model.normalize(self.first_stage.encode(image, noise))
            with torch.autocast(degraded.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
                z = sample_latents(
                    self.model, cond, fields, self.steps, self.hps.ddim_eta, spacing, origin=place,
                    first_draw=sample * (self.steps + 1), progress=progress, level=levels,
                    orient=functools.partial(oriented, orientation=view),
                )  # fmt: skip
            z = self.model.denormalize(z)
            total += upright(self.first_stage.decode(z, shape=image.shape[-2:], noise=noise), view)
        return total[..., :height, :width] / (self.views * self.samples)


# --- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A tile's extent along one axis, and its share in every pixel of it."""

    start: int
    weights: Tensor  # (length,); over all tiles they add up to 1 at every pixel

    @property
    def stop(self) -> int:
        return self.start + len(self.weights)


def tile_spans(size: int, tile: int, overlap: int, multiple: int) -> list[Span]:
    """Cut `size` pixels into spans of `tile` that start at multiples of `multiple` and share at least `overlap`.

    A quarter of an overlap at either end of it has no weight: it is there for the network to look at. Between the two the
    weights cross over smoothly. `size` and `tile` must be multiples of `multiple`, `overlap` at most half of `tile`; one
    span covers a `size` of at most `tile`. Raises ValueError otherwise.
    """
    if size % multiple or tile % multiple or not 4 <= overlap <= tile // 2:
        raise ValueError(f"a tile of {tile} with an overlap of {overlap} does not suit {size} in steps of {multiple}")
    if size <= tile:
        return [Span(0, torch.ones(size))]
    count = math.ceil((size - tile) / (tile - overlap))
    starts = [0, size]
    while max(b - a for a, b in itertools.pairwise(starts)) > tile - overlap:  # rounding can cost some of an overlap
        count += 1
        starts = [round_down(i * (size - tile) / (count - 1), multiple) for i in range(count)]
    weights = torch.zeros(count, size, dtype=torch.float64)
    weights[0, : starts[0] + tile] = 1
    for i in range(1, count):
        low, high = starts[i], starts[i - 1] + tile
        margin = (high - low) // 4
        at = torch.arange(low + margin, high - margin, dtype=torch.float64)
        ramp = torch.sin((at + 0.5 - low - margin) / (high - low - 2 * margin) * (math.pi / 2)) ** 2
        rise = torch.cat([torch.zeros(margin), ramp, torch.ones(margin)]).double()
        weights[i, low : starts[i] + tile] = 1
        weights[i, low:high] = rise
        # what a third tile holds here already is shared out alike
        weights[:i, low:high] *= 1 - rise
        weights[:i, high:] = 0
    return [Span(start, weights[i, start : start + tile].float()) for i, start in enumerate(starts)]


def round_down(value: float, multiple: int) -> int:
    """The greatest multiple of `multiple` that is not above `value`."""
    return int(value // multiple) * multiple


# Restores a tile (1, C, h, w) whose first pixel is at (row, column) of the image, less than 0 before its beginning.
TileFunction = Callable[[Tensor, tuple[int, int]], Tensor]


def restore_in_tiles(
    image: Tensor, function: TileFunction, tile: tuple[int, int], multiple: int, *, progress: bool = False
) -> Tensor:
    """Apply `function` to overlapping tiles of an image (1, C, H, W) and blend what it returns without seams.

    Where `function` at a pixel depends on less than a quarter of the overlap around it, the result is that of the whole
    image. The overlap is a quarter of the tile. The image is mirrored at its borders, by `MARGIN` and up to a multiple of
    `multiple`: convolutions that ran into its end would draw lines along it.
    """
    height, width = image.shape[-2:]
    beyond = [(MARGIN, MARGIN + -(side + 2 * MARGIN) % multiple) for side in (height, width)]
    padded = torch.from_numpy(np.pad(image.numpy(), [(0, 0), (0, 0), *beyond], mode="reflect"))
    rows, columns = (
        tile_spans(size, side, max(4, side // 4), multiple) for size, side in zip(padded.shape[-2:], tile, strict=True)
    )
    result = torch.zeros_like(padded)
    bar = tqdm(total=len(rows) * len(columns), desc="tiles", unit="tile", leave=False, disable=not progress)
    for row in rows:
        for column in columns:
            window = ..., slice(row.start, row.stop), slice(column.start, column.stop)
            share = row.weights[:, None] * column.weights
            result[window] += function(padded[window], (row.start - MARGIN, column.start - MARGIN)) * share
            bar.update()
    bar.close()
    return result[..., MARGIN : MARGIN + height, MARGIN : MARGIN + width]


# --- an image of its own noise ---------------------------------------------------------------------------------------


def matching_factor(noise: NoiseModel, known: NoiseModel, intensity: float) -> float:
    """The factor a that gives an image the noise that the model knows: a^2 Var[y | x] = Var_known[y | a x] at x = `intensity`.

    Levels of `preprocessing/degrade.py` are matched at every x alike: level s times s_known / s is level s_known. Infinite
    where the image has no noise.
    """
    own = noise.variance(torch.tensor(intensity, dtype=torch.float64)).item()
    if own <= 0:
        return math.inf
    linear = intensity / known.quanta
    return (linear + math.sqrt(linear**2 + 4 * own * known.sigma**2)) / (2 * own)


def changed_box(a: Tensor, b: Tensor, margin: int, multiple: int) -> tuple[slice, slice] | None:
    """Rows and columns around all pixels in which images (H, W) differ, and `margin` more; they start and, inside the
    image, stop at multiples of `multiple`. None where nothing differs."""
    differs = a != b
    if not differs.any():
        return None
    box = []
    for dim, size in ((1, a.shape[0]), (0, a.shape[1])):
        places = differs.any(dim).nonzero().flatten()
        start = max(0, int(places[0]) - margin) // multiple * multiple
        box.append(slice(start, min(size, -(-(int(places[-1]) + 1 + margin) // multiple) * multiple)))
    return box[0], box[1]


def box_weights(box: tuple[slice, slice], shape: tuple[int, int], margin: int) -> Tensor:
    """Weights (h, w) of a box in an image of `shape` (H, W): 1, and to 0 over `margin` pixels to its sides within the image."""
    rows, columns = (torch.ones(span.stop - span.start) for span in box)
    ramp = (torch.arange(margin) + 0.5) / margin
    for weights, span, size in zip((rows, columns), box, shape, strict=True):
        if span.start > 0:
            weights[:margin] = ramp
        if span.stop < size:
            weights[-margin:] = torch.minimum(weights[-margin:], ramp.flip(0))
    return rows[:, None] * columns


@dataclass(frozen=True)
class Restoration:
    """A restored image, and how it was come by."""

    pixels: np.ndarray  # (H, W) float32 in [0, 1]
    factor: float  # what the input was multiplied by to have the noise that the model knows
    strength: float  # mean share of the model's correction that was applied, inside the breast


def restore_image(
    restorer: Restorer, image: np.ndarray, noise: NoiseModel | None, name: str, *, tile: int = 0, progress: bool = False
) -> Restoration:
    """Restore an image (H, W) in [0, 1] at its own size, given the noise it suffers from.

    A stabilised model is told the noise. For another the image is multiplied so that its noise is what the model knows, but
    not past full scale, restored, and divided again. The correction is then cut to what the noise can explain
    (`explained_share`), of stabilised models only where the image is cleaner than they were trained at, and there to the
    share that lowers the error most (`stein_share`), which takes a second restoration. `noise` None takes the image as the
    model knows it. `tile` is the side of the tiles, 0 the restorer's own.
    """
    mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
    factor, level = 1.0, None
    intensity = float(image[mask].mean())
    if noise is not None and restorer.stabilized:
        if noise.variance(intensity) <= 0:
            return Restoration(image.copy(), math.inf, 0.0)
        level = restorer.level_of(noise, intensity)
    elif noise is not None:
        factor = matching_factor(noise, restorer.noise, intensity)
        if math.isinf(factor):
            return Restoration(image.copy(), factor, 0.0)
        factor = min(factor, max(1.0, 1.0 / max(float(np.quantile(image[mask], PEAK_QUANTILE)), 1e-6)))

    told = (noise or restorer.noise) if restorer.stabilized else None

    def function(part: Tensor, origin: tuple[int, int]) -> Tensor:
        def restore(side: Tensor, at: tuple[int, int]) -> Tensor:
            return restorer.restore(side.to(restorer.device), [name], noise=told, level=level, origin=at).cpu()

        bright = restore(part[:, :1], origin)
        if part.shape[1] == 1:
            return bright
        dark = bright.clone()
        if box := changed_box(part[0, 0], part[0, 1], EDGE_REACH * 2 + MARGIN, restorer.scale):
            # the other side is the same but around edges; it fades out to where the network looked past the box's end
            place = origin[0] + box[0].start, origin[1] + box[1].start
            weights = box_weights(box, part.shape[-2:], MARGIN)
            dark[..., box[0], box[1]].lerp_(restore(part[:, 1:, box[0], box[1]], place), weights)
        return torch.cat([bright, dark], 1)

    multiple = restorer.scale
    wanted = (tile, tile) if tile else restorer.tile
    tiles = tuple(max(2, math.ceil(side / multiple)) * multiple for side in wanted)

    def restore_whole(pixels: np.ndarray) -> np.ndarray:
        scaled = torch.from_numpy(pixels * np.float32(factor))[None, None]
        sides = None
        if told is not None:
            values = stabilize(scaled[0, 0], told).numpy()
            sides = part_sides(values, least_step(told))
        if sides is not None:
            drawn = torch.randn(values.shape, generator=seeded_generator("sides", restorer.seed, name)).numpy()
            parts = (sides.side(values, bright, drawn) for bright in (True, False))
            scaled = torch.stack([unstabilize(torch.from_numpy(part), told) for part in parts])[None]
        layers = restore_in_tiles(scaled, function, tiles, multiple, progress=progress)[0].numpy() / np.float32(factor)
        whole = layers[0] if sides is None else np.where(sides.is_bright, layers[0], layers[1])
        # a network that was shown windows has learned what full scale cuts off
        return whole if told is None or restorer.hps.windowing else unclamped(whole, told)

    restored = restore_whole(image)
    if noise is None or (restorer.stabilized and level_at(noise, intensity) >= restorer.levels[0]):
        return Restoration(restored.clip(0, 1), factor, 1.0)
    deviation = np.sqrt(noise.variance(torch.from_numpy(restored.clip(0, 1))).numpy())
    share = explained_share(image - restored, deviation**2)
    if restorer.stabilized:

        def correct(pixels: np.ndarray) -> np.ndarray:
            correction = pixels - restore_whole(pixels)
            return correction * explained_share(correction, deviation**2)

        own = (image - restored) * share
        share = share * stein_share(
            own, correct, image, deviation, mask, seeded_generator("probe", restorer.seed, name)
        )
    pixels = (image + share * (restored - image)).clip(0, 1).astype(np.float32)
    return Restoration(pixels, factor, float(share[mask].mean()))


def unclamped(image: np.ndarray, noise: NoiseModel) -> np.ndarray:
    """Intensities (H, W) whose noisy measurement, clamped at 1, has the expectation `image` (H, W).

    A mean of measured pixels near full scale is too low, by 0.4 standard deviations where the truth is 1: a network whose
    training images are hardly saturated (`windowing=0`) returns that mean. Of a Gaussian of mean x and standard deviation s, with
    a = (1 - x) / s, it is x - s (phi(a) - a Phi(-a)). Black needs none of this: every training image has
    some. `classical.unbiased_inverse` also undoes the bias of the root and of black, which the network has learned to.
    """
    reach = CLAMP_REACH * float(np.sqrt(noise.variance(1.0)))
    clean = np.linspace(max(1 / CLAMP_ENTRIES, 1 - reach), 1, CLAMP_ENTRIES)  # black may have no deviation to divide by
    deviation = np.sqrt(noise.variance(clean))
    a = (1 - clean) / deviation
    expected = clean - deviation * (norm.pdf(a) - a * norm.sf(a))
    return np.where(image > expected[0], np.interp(image, expected, clean), image).astype(np.float32)


def stein_share(
    own: np.ndarray,
    correct: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    deviation: np.ndarray,
    mask: np.ndarray,
    generator: torch.Generator,
) -> np.float32:
    """The share a, in [0, 1], of a correction c = `correct(image)` = `own` at which the squared error of image - a c is least.

    That is E[n c] / E[c^2] over the mask. The covariance with the Gaussian noise n of standard deviation `deviation`, which
    nobody sees, is sum sd^2 dc/dy, and that divergence is measured by a random probe of the image: no clean one is needed.
    Arrays are (H, W).

    Source: Stein, Annals of Statistics 1981, lemma 2; Ramani, Blu & Unser, IEEE Transactions on Image Processing 2008, theorem 2.
    """
    signs = (2 * torch.randint(2, image.shape, generator=generator) - 1).numpy()
    step = np.float32(PROBE) * deviation * signs.astype(np.float32)
    moved = correct(image + step)
    covariance = deviation * signs * (moved - own) / PROBE
    energy = max(float((own[mask] ** 2).sum()), np.finfo(np.float32).tiny)
    return np.float32(min(max(float(covariance[mask].sum()) / energy, 0.0), 1.0))


def explained_share(correction: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """The share, in [0, 1], of a correction (H, W) that noise of `variance` (H, W) can explain.

    Around every pixel the energy of what is left of it is at most the noise's, and no pixel moves by more than
    `GUARD_SIGMAS` standard deviations: what stands out more, such as a calcification, is no noise and stays as measured.
    """
    energy = ndimage.gaussian_filter(correction**2, GUARD_WIDTH, mode="nearest")
    noise = ndimage.gaussian_filter(variance, GUARD_WIDTH, mode="nearest")
    tiny = np.finfo(np.float32).tiny
    share = (noise / np.maximum(energy, tiny)).clip(0, 1)
    deviations = np.abs(correction) / np.sqrt(np.maximum(variance, tiny))
    return (share * (GUARD_SIGMAS - deviations).clip(0, 1)).astype(np.float32)
