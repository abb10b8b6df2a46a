"""Restoring mammograms of any size and noise: the two trained stages, tile by tile, and what fits them to the input."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffusion import LatentDiffusion, NoiseField, Sampling, dpm_timesteps, make_diffusion, sample_latents
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
PROBE = 0.1  # standard deviations by which an image is moved to see how its correction follows


# --- the trained model -----------------------------------------------------------------------------------------------


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
    # statistics are measured on the model, and its averages see them with the next step
    load_weights(model, ema | dict(model.named_buffers()), path)


@dataclass
class Restorer:
    """Both trained stages: degraded images in, their posterior mean or posterior samples out."""

    first_stage: VQVAE2Wrapper
    model: LatentDiffusion  # with the averaged weights
    hps: HParams  # of the diffusion checkpoint
    samples: int = 0  # posterior samples; 0: the posterior mean
    sampling: Sampling = Sampling()
    seed: int = 0
    name: str = ""  # of the model, for a derived image's description
    amp: torch.dtype | None = None  # half precision in the UNets, and nowhere else: the decoder alone would lose 2 dB

    def __post_init__(self):
        self.model.eval()

    @classmethod
    def load(
        cls,
        vqvae_path: Path,
        load_path: Path,
        device: torch.device,
        *,
        samples: int = 0,
        sampler: str = "ddim",
        steps: int | None = None,
        seed: int = 0,
        amp: torch.dtype | None = None,
    ) -> Restorer:
        """The stages of two checkpoints, on `device`, the UNets in `amp`.

        `steps` None is the checkpoint's number for the `sampler`, `ddim` or `dpm++`. Raises UserError where the checkpoints
        cannot be read or do not belong together, or the model does not have what is asked of it.
        """
        vqvae, _ = load_vqvae(vqvae_path)
        digest = weights_digest(vqvae)
        checkpoint = load_checkpoint(load_path, "diffusion", lazily=True)
        check_first_stage(checkpoint, load_path, digest, vqvae_path)
        model = build_model(make_diffusion, checkpoint, load_path)
        load_averages(model, checkpoint, load_path)
        if not samples and not model.has_mean:
            raise UserError(f"{load_path}: a plain diffusion (precondition=none) has no posterior mean; pass --sample")
        if samples and not model.has_samples:
            raise UserError(
                f"{load_path}: its training ended before the diffusion; go on with it, or leave --sample and --samples out"
            )
        name = f"VQ-VAE-2 {digest[:8]}, latent diffusion {weights_digest(model)[:8]}"
        sampling = sampling_of(checkpoint.hps, sampler, steps)
        if samples and sampler == "dpm++":
            try:
                dpm_timesteps(model.alphas_cumprod, sampling.steps)
            except ValueError as error:
                raise UserError(f"--steps {sampling.steps}: {error}") from None
        return cls(
            VQVAE2Wrapper(vqvae).to(device), model.to(device), checkpoint.hps, samples, sampling, seed, name, amp
        )

    @property
    def product(self) -> str:
        """What is made of an image, in words."""
        if not self.samples:
            return "posterior mean"
        what = "posterior sample" if self.samples == 1 else f"mean of {self.samples} posterior samples"
        return f"{what}, {self.sampling}"

    @property
    def evaluations(self) -> int:
        """Network evaluations that restoring takes, a tile: one of the posterior mean's, the others of the diffusion's."""
        return self.model.has_mean + self.samples * self.sampling.steps

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
        name: str,
        *,
        noise: NoiseModel | None = None,
        level: float | None = None,
        origin: tuple[int, int] = (0, 0),
        progress: bool = False,
    ) -> Tensor:
        """Restore an image (1, 1, H, W) in [0, 1]: returns (1, K, H, W), its posterior mean (K = 1) or K samples.

        `noise` is what a stabilised model is to take for noise, None what it was trained at; others always take that. The
        networks are told `level`, None: that of the noise at half of full scale. `name` keys the samplers' noise, `origin` is
        the place in pixels of the image's first row and column on it.
        """
        noise = noise or self.noise
        level = self.level_of(noise, 0.5) if level is None else level
        rate = self.first_stage.vqvae.scaling_rates[0]
        height, width = degraded.shape[-2:]
        padded = F.pad(degraded, (0, -width % self.scale, 0, -height % self.scale), mode="replicate")
        cond = self.model.normalize(self.first_stage.encode(padded, noise))
        field = NoiseField((self.seed, name), self.first_stage.latent_channels)
        with torch.autocast(degraded.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            view = self.model.view(cond, torch.full((1,), level, device=degraded.device))
            latents = [
                sample_latents(
                    self.model, view, [field], self.sampling, number=number, progress=progress,
                    origin=(origin[0] // rate, origin[1] // rate),
                )
                for number in range(self.samples)
            ] or [view.mean]  # fmt: skip
        images = [
            self.first_stage.decode(self.model.denormalize(z), shape=padded.shape[-2:], noise=noise) for z in latents
        ]
        return torch.cat(images, dim=1)[..., :height, :width]


def sampling_of(hps: HParams, sampler: str, steps: int | None = None) -> Sampling:
    """The sampler of a model, with its own number of steps or with `steps`; raises UserError where it has not so many."""
    if steps is not None and steps > hps.timesteps:
        raise UserError(f"--steps {steps}: the model has {hps.timesteps} timesteps; pass at most as many")
    own = hps.ddim_steps if sampler == "ddim" else hps.fast_steps
    return Sampling(sampler, steps or own, hps.ddim_eta, hps.ddim_spacing)


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


# Restores a tile (1, C, h, w), to (1, K, h, w), whose first pixel is at (row, column) of the image, or before its beginning.
TileFunction = Callable[[Tensor, tuple[int, int]], Tensor]


def restore_in_tiles(
    image: Tensor, function: TileFunction, tile: tuple[int, int], multiple: int, *, progress: bool = False
) -> Tensor:
    """Apply `function` to overlapping tiles of an image (1, C, H, W) and blend what it returns, (1, K, H, W), without seams.

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
    result = torch.zeros(())
    bar = tqdm(total=len(rows) * len(columns), desc="tiles", unit="tile", leave=False, disable=not progress)
    for row in rows:
        for column in columns:
            window = ..., slice(row.start, row.stop), slice(column.start, column.stop)
            share = row.weights[:, None] * column.weights
            part = function(padded[window], (row.start - MARGIN, column.start - MARGIN)) * share
            if not result.ndim:
                result = torch.zeros(1, part.shape[1], *padded.shape[-2:])
            result[window] += part
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

    products: np.ndarray  # (K, H, W) float32 in [0, 1]: the posterior mean, or K posterior samples
    factor: float = 1.0  # what the input was multiplied by to have the noise that the model knows
    strength: float = 1.0  # mean share of the model's correction that was applied, inside the breast

    @property
    def pixels(self) -> np.ndarray:
        """The posterior mean, the sample, or the mean of the samples: (H, W) float32 in [0, 1]."""
        return self.products.mean(0, dtype=np.float32)


@dataclass(frozen=True)
class TiledRestorer:
    """A restorer of whole images (H, W), of a noise (None: what an unstabilised model knows), tile by tile."""

    restorer: Restorer
    noise: NoiseModel | None
    level: float | None
    name: str
    tile: int = 0  # side in pixels; 0: the restorer's own
    progress: bool = False

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Products (K, H, W) of an image (H, W); at edges far above the noise its two sides are restored each by itself."""
        whole = torch.from_numpy(image)[None, None]
        sides = None
        if self.noise is not None:
            values = stabilize(whole[0, 0], self.noise).numpy()
            sides = part_sides(values, least_step(self.noise))
        if sides is None:
            return self._tiles(whole, self._one)
        drawn = torch.randn(values.shape, generator=seeded_generator("sides", self.restorer.seed, self.name)).numpy()
        parts = (torch.from_numpy(sides.side(values, bright, drawn)) for bright in (True, False))
        layers = self._tiles(torch.stack([unstabilize(part, self.noise) for part in parts])[None], self._both)
        bright, dark = np.split(layers, 2)
        return np.where(sides.is_bright, bright, dark)

    def _tiles(self, image: Tensor, function: TileFunction) -> np.ndarray:
        multiple = self.restorer.scale
        wanted = (self.tile, self.tile) if self.tile else self.restorer.tile
        tiles = tuple(max(2, math.ceil(side / multiple)) * multiple for side in wanted)
        return restore_in_tiles(image, function, tiles, multiple, progress=self.progress)[0].numpy()

    def _one(self, part: Tensor, origin: tuple[int, int]) -> Tensor:
        restorer = self.restorer
        return restorer.restore(
            part.to(restorer.device),
            self.name,
            noise=self.noise,
            level=self.level,
            origin=origin,
            progress=self.progress,
        ).cpu()

    def _both(self, part: Tensor, origin: tuple[int, int]) -> Tensor:
        bright = self._one(part[:, :1], origin)
        dark = bright.clone()
        if box := changed_box(part[0, 0], part[0, 1], EDGE_REACH * 2 + MARGIN, self.restorer.scale):
            # the other side is the same but around edges; it fades out to where the network looked past the box's end
            place = origin[0] + box[0].start, origin[1] + box[1].start
            weights = box_weights(box, part.shape[-2:], MARGIN)
            dark[..., box[0], box[1]].lerp_(self._one(part[:, 1:, box[0], box[1]], place), weights)
        return torch.cat([bright, dark], 1)


def restore_image(
    restorer: Restorer, image: np.ndarray, noise: NoiseModel | None, name: str, *, tile: int = 0, progress: bool = False
) -> Restoration:
    """Restore an image (H, W) in [0, 1] at its own size, given the noise it suffers from; None: as the model knows it.

    A stabilised model is told the noise. For another the image is multiplied so that its noise is what the model knows, but
    not past full scale, restored, and divided again. Of an image cleaner than the model was trained at, the share of the
    correction is applied that lowers the error of the posterior mean most (`stein_share`), which takes a second look at it.
    `tile` is the side of the tiles, 0 the restorer's own.
    """
    mask = breast_mask(torch.from_numpy(image)[None])[0].numpy()
    intensity, factor = float(image[mask].mean()), 1.0
    if noise is not None and noise.variance(intensity) <= 0:
        return Restoration(np.repeat(image[None], max(1, restorer.samples), 0), math.inf, 0.0)
    told = level = None
    if restorer.stabilized:
        told = noise or restorer.noise
        level = restorer.level_of(told, intensity)
        is_cleaner = level_at(told, intensity) < level
    elif noise is not None:
        wanted = matching_factor(noise, restorer.noise, intensity)
        factor = min(wanted, max(1.0, 1.0 / max(float(np.quantile(image[mask], PEAK_QUANTILE)), 1e-6)))
        is_cleaner = factor < wanted

    def products(pixels: np.ndarray, of: Restorer) -> np.ndarray:
        whole = TiledRestorer(of, told, level, name, tile, progress)
        return (whole(pixels * np.float32(factor)) / np.float32(factor)).clip(0, 1)

    restored = products(image, restorer)
    if noise is None or not is_cleaner or not restorer.model.has_mean:
        return Restoration(restored, factor)
    mean = dataclasses.replace(restorer, samples=0)
    deviation = np.sqrt(noise.variance(torch.from_numpy(restored.mean(0))).numpy())
    generator = seeded_generator("probe", restorer.seed, name)
    share = stein_share(lambda pixels: pixels - products(pixels, mean)[0], image, deviation, mask, generator)
    return Restoration((image + share * (restored - image)).clip(0, 1), factor, float(share))


def stein_share(
    correct: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    deviation: np.ndarray,
    mask: np.ndarray,
    generator: torch.Generator,
) -> np.float32:
    """The share a, in [0, 1], of a correction c = `correct(image)` at which the squared error of image - a c is least.

    That is E[n c] / E[c^2] over the mask. The covariance with the Gaussian noise n of standard deviation `deviation`, which
    nobody sees, is sum sd^2 dc/dy, and that divergence is measured by a random probe of the image: no clean one is needed.
    Arrays are (H, W).

    Source: Stein, Annals of Statistics 1981, lemma 2; Ramani, Blu & Unser, IEEE Transactions on Image Processing 2008, theorem 2.
    """
    own = correct(image)
    signs = (2 * torch.randint(2, image.shape, generator=generator) - 1).numpy()
    moved = correct(image + np.float32(PROBE) * deviation * signs.astype(np.float32))
    covariance = deviation * signs * (moved - own) / PROBE
    energy = max(float((own[mask] ** 2).sum()), np.finfo(np.float32).tiny)
    return np.float32(min(max(float(covariance[mask].sum()) / energy, 0.0), 1.0))
