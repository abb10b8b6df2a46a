"""Every hyperparameter of both stages: `HPS_VQVAE[task]` and `HPS_DIFFUSION[task]`.

Tasks: `cbis-ddsm` (the reference values), `phantom` (small, images made on the fly), `folder` (any folder of mammograms, at
the reference values), `folder-small` (a narrower model on crops, for two CPU cores) and `mammogram` (the model in the box).
An entry is declared once, as its reference value or as (value, range). Tasks change values alone, and so does
`--hps key=value`, which is read with the type that the value has here.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class HParams(dict):
    """A dictionary of settings whose entries also read as attributes (`hps.batch_size`)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter named {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def updated(self, **changes: Any) -> HParams:
        """A deep copy with `changes` applied; raises KeyError for a name that is not there yet."""
        unknown = sorted(set(changes) - set(self))
        if unknown:
            raise KeyError(f"unknown hyperparameter {unknown[0]!r}")
        return HParams(copy.deepcopy({**self, **changes}))

    def arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The entries that `function` (or a class's constructor) takes by name."""
        return {name: self[name] for name in inspect.signature(function).parameters if name in self}


class Range(NamedTuple):
    """The values that an entry may have."""

    words: str  # what an entry must do, as in "must be greater than 0"
    holds: Callable[[Any], bool]


def one_of(*words: str) -> Range:
    """The range of an entry that takes one of a few words."""
    return Range(f"be one of {', '.join(words)}", words.__contains__)


POSITIVE = Range("be greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Range("not be negative", lambda v: v >= 0)
FRACTION = Range("lie between 0 and 1", lambda v: 0 <= v <= 1)
PAIR = Range("be two numbers greater than 0, the lesser first", lambda v: len(v) == 2 and 0 < v[0] <= v[1] < math.inf)
PAIR_OR_EMPTY = Range(f"{PAIR.words}, or empty", lambda v: not v or PAIR.holds(v))
FACTORS = Range("be a list of numbers greater than 0", lambda v: min(v, default=0) > 0)
SHAPE = Range("be channels, height, width", lambda v: len(v) == 3 and min(v) > 0)
COUNTS = Range("be three counts: train, validation, test", lambda v: len(v) == 3 and min(v) > 0)

RANGES: dict[str, Range] = {}  # of every entry declared below with one


def _declared(**entries: Any) -> HParams:
    """The values of entries that are given as a value or as (value, range); their ranges go to RANGES."""
    for key, entry in entries.items():
        if isinstance(entry, tuple):
            entries[key], RANGES[key] = entry
    return HParams(entries)


# The data: entries that both stages share.
_DATA = _declared(
    image_shape=([1, 1024, 768], SHAPE),  # C, H, W of the training grid: the breast is scaled onto it, never stretched
    noise_level=(0.2, NOT_NEGATIVE),  # low dose: 1000 / level quanta at full scale, electronic sigma 0.05 * level
    noise_levels=([], PAIR_OR_EMPTY),  # range of training samples, drawn log-uniformly; empty: noise_level alone
    dose_fraction=(0.0, FRACTION),  # low dose: this share of the images' own dose, by their own noise; 0: noise_level
    stabilize=False,  # work in units of the noise's deviation (generalised Anscombe), so that one model serves all levels
    crop_size=(0, NOT_NEGATIVE),  # pixels; side of training crops, a multiple of the product of scaling_rates; 0: none
    crops_per_image=(1, POSITIVE),  # crops drawn from each image in an epoch
    breast_fraction=(0.5, FRACTION),  # a training crop holds at least this fraction of breast (best of 8 draws)
    flip=True,  # mirror training images left-right at random (the two breasts are mirror images)
    dihedral=False,  # turn training crops into any of the eight orientations of a square
    native=False,  # images at their own pixels, cut to the breast, not scaled onto the training grid
    scale_range=([1.0, 1.0], PAIR),  # resize half of the training crops by a factor drawn log-uniformly from it
    gamma_range=([1.0, 1.0], PAIR),  # raise half of the training crops to a power drawn log-uniformly from it
    part_edges=False,  # continue training crops past edges far above the noise, as restoring does (preprocessing/sides.py)
    calcifications=(0.0, FRACTION),  # share of training crops in which simulated calcifications are drawn
    calcification_contrast=([0.01, 0.6], PAIR),  # contrast of the faintest and of the strongest of them
    borders=(0.0, FRACTION),  # share of training crops that end at a straight line, as at a film's border
    windowing=(0.0, FRACTION),  # share seen through a random window: dark or bright tissue cut off, or all of it dimmed
    enhancement=(0.0, FRACTION),  # share whose local contrast is raised, as in images processed for display
    enhancement_sigma=([2.0, 24.0], PAIR),  # pixels: detail finer than this is raised, drawn log-uniformly
    grain=(
        0.0,
        FRACTION,
    ),  # share with strong grain that counts as the image's own, as processing for display leaves it
    negatives=(0.0, FRACTION),  # share turned into their negatives, as a detector's own image is: dense tissue is dark
    correlation=(0.0, FRACTION),  # share whose noise is correlated, by kernels drawn at random (preprocessing/noise.py)
    most_gain=(8.0, POSITIVE),  # of a window or an enhancement: a greater one shows the steps of 8-bit images
    altered_epochs=(0, NOT_NEGATIVE),  # epochs with scale, gamma, windows, enhancement, or samples imitate them; 0: all
    phantoms=(0, NOT_NEGATIVE),  # folder: phantoms of image_shape added to training images for calcifications
    degrade_on_device=False,  # draw the low dose of training samples in the step, on the GPU if there is one
    cache_images=False,  # keep prepared images in memory after their first use (small sets only)
    nb_workers=(4, NOT_NEGATIVE),  # data loader processes, of each process of a run
    split=("patient", one_of("patient", "official")),  # cbis-ddsm: `patient`: official, shared patients out of train
    abnormality=("all", one_of("all", "mass", "calc")),  # cbis-ddsm: cases
    split_csv="",  # folder: a CSV with columns file, split and optionally patient; empty: DATA_ROOT/split.csv if it is there
    patient_pattern="",  # folder: regular expression on the path, its first group the patient; `file`: each file is one
    validation_fraction=(0.1, FRACTION),  # share of patients set aside for validation, unless a split file decides
    test_fraction=(0.2, FRACTION),  # folder: share of patients set aside for test, unless a split file decides
    phantom_counts=([64, 8, 16], COUNTS),  # phantom: number of train, validation and test breasts
)

# The optimisation loop of either stage.
_LOOP = _declared(
    batch_size=(4, POSITIVE),  # samples per optimiser step, of all processes together
    mini_batch_size=(0, NOT_NEGATIVE),  # samples a forward pass, accumulated (codebooks learn per pass); 0: batch_size
    warmup_steps=(100, NOT_NEGATIVE),  # linear learning-rate warm-up
    lr_schedule=("cosine", one_of("constant", "cosine")),  # cosine: to zero at the last step, the last epochs gain most
    log_frequency=(10, POSITIVE),  # steps between readings of the loss (each one synchronises with the device)
    checkpoint_frequency=(10, POSITIVE),  # epochs between kept checkpoints; `last` and `best` are written besides
    checkpoint_minutes=(10.0, NOT_NEGATIVE),  # minutes after which `last` is written inside an epoch too; 0: never
    image_frequency=(5, POSITIVE),  # epochs between sample pictures
    validation_frequency=(1, POSITIVE),  # epochs between validations
)

HPS_VQVAE: dict[str, HParams] = {}
HPS_VQVAE["cbis-ddsm"] = HParams(
    _DATA
    | _LOOP
    | _declared(
        in_channels=(1, POSITIVE),  # image channels (grayscale)
        hidden_channels=(128, POSITIVE),  # width of encoders and decoders, and channels of the stage-2 latent
        res_channels=(32, POSITIVE),  # width inside a residual block
        nb_res_layers=(2, NOT_NEGATIVE),  # residual layers per block
        nb_levels=(5, POSITIVE),  # hierarchical levels
        scaling_rates=([4, 2, 2, 2, 2], FACTORS),  # downscaling of each level, finest first
        embed_dim=(64, POSITIVE),  # dimension of a codebook entry
        nb_entries=(512, POSITIVE),  # entries per codebook
        codebook_decay=(0.99, FRACTION),  # EMA decay of the codebooks
        revive_threshold=(0.02, NOT_NEGATIVE),  # re-seed codes used less than this share of (vectors / codes); 0: off
        quantize_probability=(0.5, FRACTION),  # share of training samples that are quantised; the rest goes past
        learning_rate=(1e-4, POSITIVE),  # Adam
        beta=(0.25, NOT_NEGATIVE),  # commitment loss weight
        recon_loss=("mse", one_of("mse", "l1")),  # reconstruction loss
        grad_clip_norm=(0.05, NOT_NEGATIVE),  # clip the gradient norm: at higher values the loss spikes; 0: off
        codebook_batches=(8, POSITIVE),  # batches from which the codebooks are initialised
        max_epochs=(100, POSITIVE),  # epochs
        amp=True,  # mixed precision on CUDA
    )
).updated()

HPS_DIFFUSION: dict[str, HParams] = {}
HPS_DIFFUSION["cbis-ddsm"] = HParams(
    _DATA
    | _LOOP
    | _declared(
        timesteps=(1000, POSITIVE),  # diffusion timesteps T
        linear_start=(0.0015, POSITIVE),  # beta_0; between the two, linear in sqrt(beta), as LDM's "linear"
        linear_end=(0.0195, POSITIVE),  # beta_{T-1}
        in_channels=(256, POSITIVE),  # UNet input: what is diffused and the degraded latent, concatenated
        out_channels=(128, POSITIVE),  # UNet output: channels of the latent
        model_channels=(192, POSITIVE),  # base width of the UNet
        channel_mult=([1, 2, 4], FACTORS),  # width multiplier of each resolution
        num_res_blocks=(2, POSITIVE),  # residual blocks per resolution
        attention_levels=[1, 2],  # resolutions with self-attention, 0 the finest
        num_head_channels=(64, POSITIVE),  # channels of an attention head
        dropout=(0.0, FRACTION),  # dropout in residual blocks
        use_checkpoint=True,  # gradient checkpointing: activations are recomputed in the backward pass
        learning_rate=(2e-4, POSITIVE),  # AdamW
        weight_decay=(0.01, NOT_NEGATIVE),  # AdamW
        max_epochs=(200, POSITIVE),  # epochs
        grad_clip_norm=(1.0, NOT_NEGATIVE),  # clip the gradient norm
        l_simple_weight=1.0,  # weight of L_simple, the MSE on the predicted noise
        original_elbo_weight=0.0,  # weight of the variational bound (VLB); 0: disabled
        parameterization=("eps", one_of("eps", "v", "x0")),  # what the network predicts
        precondition=("residual", one_of("residual", "none")),  # diffuse what the posterior mean leaves unknown, scaled
        noise_conditioning=False,  # tell the UNets the noise level, as they must be if noise_levels is a range
        mean_epochs=(100, NOT_NEGATIVE),  # of max_epochs: the first train the posterior mean, the rest the diffusion
        mean_channels=(192, POSITIVE),  # base width of the posterior mean's UNet
        mean_res_blocks=(2, POSITIVE),  # its residual blocks per resolution
        ema_decay=(0.9999, FRACTION),  # EMA of the UNet's weights, warmed up as min(decay, (1 + n) / (10 + n))
        ddim_steps=(50, POSITIVE),  # DDIM sampling steps
        ddim_eta=(0.0, FRACTION),  # DDIM eta; 0: deterministic
        ddim_spacing=("leading", one_of("leading", "trailing")),  # sampled timesteps: as LDM, or starting at T - 1
        fast_steps=(8, POSITIVE),  # network evaluations a sample of DPM-Solver++, the fast sampler
        statistics_batches=(32, POSITIVE),  # batches that measure the latent's statistics, before each of the phases
        amp=True,  # mixed precision on CUDA
    )
).updated()

# What the tasks for two CPU cores share: small batches of crops, images kept in memory, and a narrow UNet.
_TWO_CORES = dict(cache_images=True, nb_workers=0, batch_size=8, warmup_steps=50)
_TWO_CORES_UNET = dict(num_res_blocks=1, use_checkpoint=False, parameterization="v")

# Small: phantoms made on the fly; both stages train in minutes.
_PHANTOM = _TWO_CORES | dict(
    image_shape=[1, 256, 192],  # pixels of 0.8 mm
    crop_size=128,  # train on crops: more breasts a minute
    crops_per_image=4,
)
HPS_VQVAE["phantom"] = HPS_VQVAE["cbis-ddsm"].updated(
    **_PHANTOM,
    hidden_channels=64,
    nb_levels=3,
    scaling_rates=[4, 2, 2],
    max_epochs=8,
)
HPS_DIFFUSION["phantom"] = HPS_DIFFUSION["cbis-ddsm"].updated(
    **_PHANTOM,
    **_TWO_CORES_UNET,
    in_channels=128,
    out_channels=64,
    model_channels=64,
    channel_mult=[1, 2],
    attention_levels=[1],
    learning_rate=5e-4,
    mean_epochs=16,
    mean_channels=64,
    mean_res_blocks=1,
    max_epochs=30,
    ema_decay=0.99,
)

# Any folder of mammograms, at the reference values.
HPS_VQVAE["folder"] = HPS_VQVAE["cbis-ddsm"].updated()
HPS_DIFFUSION["folder"] = HPS_DIFFUSION["cbis-ddsm"].updated()

# A folder of real mammograms on two CPU cores in an hour: half the grid, crops, a narrow UNet.
_FOLDER_SMALL = _TWO_CORES | dict(image_shape=[1, 512, 384], crop_size=128, crops_per_image=8)
HPS_VQVAE["folder-small"] = HPS_VQVAE["cbis-ddsm"].updated(
    **_FOLDER_SMALL,
    breast_fraction=0.2,  # skin line, film border and labels need codes too
    hidden_channels=64,
    max_epochs=8,
)
HPS_DIFFUSION["folder-small"] = HPS_DIFFUSION["cbis-ddsm"].updated(
    **_FOLDER_SMALL,
    **_TWO_CORES_UNET,
    breast_fraction=0.7,
    in_channels=128,
    out_channels=64,
    model_channels=96,
    channel_mult=[1, 2],
    attention_levels=[],
    learning_rate=5e-4,
    mean_epochs=24,
    mean_channels=96,
    mean_res_blocks=1,
    max_epochs=36,
    ema_decay=0.99,
    validation_frequency=3,
)

# The model in the box (weights/): real mammograms at their own pixels and phantoms, all noise levels, two CPU cores.
_MAMMOGRAM = _TWO_CORES | dict(
    native=True,
    stabilize=True,
    noise_levels=[0.04, 1.25],
    crop_size=96,
    crops_per_image=16,
    breast_fraction=0.6,
    dihedral=True,
    scale_range=[0.3, 2.0],
    gamma_range=[0.7, 1.4],
    phantoms=36,
)
HPS_VQVAE["mammogram"] = HPS_VQVAE["cbis-ddsm"].updated(
    **_MAMMOGRAM,
    hidden_channels=32,
    res_channels=16,
    embed_dim=32,
    scaling_rates=[2, 2, 2, 2, 2],
    max_epochs=3,
)
HPS_DIFFUSION["mammogram"] = HPS_DIFFUSION["cbis-ddsm"].updated(
    **_MAMMOGRAM,
    **_TWO_CORES_UNET,
    in_channels=64,
    out_channels=32,
    model_channels=64,
    channel_mult=[1, 2, 2],
    attention_levels=[],
    learning_rate=1e-3,
    noise_conditioning=True,
    mean_epochs=147,
    altered_epochs=147,  # if the diffusion sees resized crops too, samples at level 0.2 have half of film's fine texture
    mean_channels=64,
    part_edges=True,
    calcifications=0.8,  # at 0.4, with a third as many a crop, the faintest kept less contrast than BM3D leaves them
    borders=0.2,
    windowing=0.5,  # without it BM3D restored better if tissue was cut off at black or white, or far below full scale
    grain=0.07,
    negatives=0.3,
    correlation=0.5,
    enhancement=0.2,  # without it BM3D restored images of equalised local contrast better at level 0.2
    ema_decay=0.999,
    max_epochs=158,
    validation_frequency=7,
    image_frequency=21,
)

TASKS = tuple(HPS_VQVAE)

# Entries that fix the shapes of the weights, or what they mean: a checkpoint's own values always hold.
ARCHITECTURE_VQVAE = (
    "in_channels", "hidden_channels", "res_channels", "nb_res_layers", "nb_levels", "scaling_rates", "embed_dim",
    "nb_entries", "stabilize",
)  # fmt: skip
ARCHITECTURE_DIFFUSION = (
    "timesteps", "linear_start", "linear_end", "in_channels", "out_channels", "model_channels", "channel_mult",
    "num_res_blocks", "attention_levels", "num_head_channels", "parameterization", "precondition", "noise_conditioning",
    "mean_channels", "mean_res_blocks",
)  # fmt: skip


def _parse(key: str, text: str, default: Any) -> Any:
    """Read `text` with the type of `default`; raises ValueError with a sentence."""
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is list:
            value = json.loads(text if text.lstrip().startswith("[") else f"[{text}]")
            item = type(default[0]) if default else None  # an empty list takes whole numbers and fractions
            if not all(type(v) in (int, item or float) for v in value):
                raise ValueError(text)
            return [item(v) if item else v for v in value]
        return kind(text)
    except (ValueError, KeyError, RecursionError):
        wanted = f"a list such as {json.dumps(default)}" if kind is list else f"of type {kind.__name__}"
        raise ValueError(f"--hps {key}={text}: the value must be {wanted}") from None


def apply_overrides(hps: HParams, overrides: list[str]) -> tuple[HParams, set[str]]:
    """Apply `key=value` strings to `hps`, each read with the type of the entry it replaces.

    Returns the new settings and the names that were set. Raises ValueError, with one sentence naming the flag, for an
    unknown name, a value of the wrong type or a word that the entry does not take.
    """
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not (equals and key):
            raise ValueError(f"--hps {override}: write it as key=value")
        if key not in hps:
            close = difflib.get_close_matches(key, hps, n=1)
            hint = f"did you mean {close[0]}?" if close else "hps.py lists them all"
            raise ValueError(f"--hps {key}: no such hyperparameter; {hint}")
        changes[key] = _parse(key, text.strip(), hps[key])
    hps = hps.updated(**changes)
    check(hps)
    return hps, set(changes)


def check(hps: HParams) -> None:
    """Refuse settings that cannot work; raises ValueError with one sentence naming the entry."""
    for key, value in hps.items():
        if key in RANGES and not RANGES[key].holds(value):
            raise ValueError(f"--hps {key}={value}: must {RANGES[key].words}")
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
        if not all(math.isfinite(v) for v in numbers):
            raise ValueError(f"--hps {key}={value}: must be finite")
        if any(isinstance(v, int) and abs(v) >= 2**31 for v in numbers):
            raise ValueError(f"--hps {key}={str(value)[:40]}: must be below 2**31")
    for clashes, key, words in _clashes(hps):
        if clashes:
            raise ValueError(f"--hps {key}={hps[key]}: {words}")


def _clashes(hps: HParams) -> Iterator[tuple[bool, str, str]]:
    """The rules that join settings: whether they clash, the entry to name, and what is wrong with it."""
    yield hps.stabilize and not hps.noise_level, "stabilize", "needs a noise_level greater than 0"
    words = "edges are taken apart in the loader; pass part_edges=False too"
    yield hps.degrade_on_device and hps.part_edges, "degrade_on_device", words
    for key, usable in {"native": hps.native, "stabilize": hps.stabilize, "phantoms": not hps.phantoms}.items():
        words = f"dose_fraction needs {key}={0 if key == 'phantoms' else True}: it takes images with their own noise"
        yield hps.dose_fraction and not usable, key, words
    words = "a fraction of the dose of one's own images is drawn in the loader, as it is; pass {0}=False too"
    for key in ("part_edges", "degrade_on_device"):
        yield hps.dose_fraction and hps[key], "dose_fraction", words.format(key)
    words = "one model serves several levels with stabilize=True alone"
    yield hps.noise_levels and not hps.stabilize, "noise_levels", words
    rest = hps.batch_size % (hps.mini_batch_size or hps.batch_size)
    yield rest, "mini_batch_size", f"must divide batch_size {hps.batch_size}"
    yield hps.crop_size > min(hps.image_shape[1:]), "crop_size", f"larger than image_shape {hps.image_shape}"
    if "scaling_rates" in hps:
        words = f"must hold nb_levels={hps.nb_levels} rates, one a level"
        yield len(hps.scaling_rates) != hps.nb_levels, "scaling_rates", words
        words = f"must not exceed hidden_channels={hps.hidden_channels}"
        yield hps.embed_dim > hps.hidden_channels, "embed_dim", words
        channels = hps.image_shape[0]
        yield hps.in_channels != channels, "in_channels", f"image_shape has {channels} channels"
    if "channel_mult" in hps:
        yield from _diffusion_clashes(hps)


def _diffusion_clashes(hps: HParams) -> Iterator[tuple[bool, str, str]]:
    """As `_clashes`, of the second stage alone."""
    yield not hps.linear_start <= hps.linear_end < 1, "linear_end", "must lie between linear_start and 1"
    levels = range(len(hps.channel_mult))
    absent = any(level not in levels for level in hps.attention_levels)
    yield absent, "attention_levels", f"the levels of channel_mult are 0 to {len(levels) - 1}"
    words = f"must be twice out_channels={hps.out_channels} (concat)"
    yield hps.in_channels != 2 * hps.out_channels, "in_channels", words
    words = "leaves nothing unknown to sample; train at a level above 0, or with --hps precondition=none"
    yield hps.precondition == "residual" and not hps.noise_level, "noise_level", words
    for key in ("ddim_steps", "fast_steps"):
        yield hps[key] > hps.timesteps, key, f"more than timesteps={hps.timesteps}"
    for key in ("model_channels", "mean_channels"):
        yield hps[key] % 32, key, "must be a multiple of 32 (GroupNorm)"
        # the middle block, at the coarsest resolution, always attends
        for level in [*hps.attention_levels, levels[-1]]:
            channels = hps.channel_mult[level] * hps[key]
            yield channels % hps.num_head_channels, "num_head_channels", f"does not divide {channels} channels"
