"""Every hyperparameter of both stages: `HPS_VQVAE[task]` and `HPS_DIFFUSION[task]`.

Tasks: `cbis-ddsm` (the reference values), `phantom` (small, data made on the fly), `folder` (any folder of mammograms, at
the reference values), `folder-small` (a narrower model on crops, for two CPU cores) and `mammogram` (the model in the box).
Any entry can be overridden from
the shell with `--hps key=value`; values are read with the type they have here.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
from collections.abc import Callable
from typing import Any


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


# The data, and the loop around it: entries that both stages share.
_DATA = HParams(
    image_shape=[1, 1024, 768],  # C, H, W of the training grid: the breast is scaled onto it, never stretched
    noise_level=0.2,  # low-dose degradation: 1000 / noise_level quanta at full scale, electronic sigma 0.05 * noise_level
    noise_levels=[],  # least and greatest level of training samples, drawn log-uniformly; empty: noise_level alone
    stabilize=False,  # work in units of the noise's standard deviation (generalised Anscombe); one model serves all levels
    crop_size=0,  # side of the square training crops in pixels, best a multiple of the product of scaling_rates; 0: whole images
    crops_per_image=1,  # crops drawn from each image in an epoch
    breast_fraction=0.5,  # a training crop holds at least this fraction of breast (best of 8 draws)
    flip=True,  # mirror training images left-right at random (the two breasts are mirror images)
    dihedral=False,  # turn training crops into any of the eight orientations of a square
    native=False,  # images at their own pixels, cut to the breast, not scaled onto the training grid
    scale_range=[
        1.0,
        1.0,
    ],  # training crops are resized by a factor between these, drawn log-uniformly, half of the time
    part_edges=False,  # training crops go on past edges far above the noise, as restoring has them (preprocessing/sides.py)
    calcifications=0.0,  # share of training crops in which simulated calcifications are drawn
    borders=0.0,  # share of training crops that end at a straight line, as at a film's border
    gamma_range=[1.0, 1.0],  # training crops are raised to a power between these, drawn log-uniformly, half of the time
    windowing=0.0,  # share of training crops seen through a random window: dark or bright tissue cut off, or all of it dimmed
    enhancement=0.0,  # share of training crops whose local contrast is raised, as in images processed for display
    altered_epochs=0,  # epochs with scale_range, gamma_range, windowing and enhancement, which samples would imitate; 0: all
    phantoms=0,  # folder: phantoms at the size of image_shape, added to the training images for their calcifications
    degrade_on_device=False,  # draw a training sample's low dose in the step, on the GPU if there is one, not in the loader
    cache_images=False,  # keep prepared images in memory after their first use (small sets only)
    nb_workers=4,  # data loader processes, of each process of a run
    split="patient",  # cbis-ddsm: `patient` keeps the official split with shared patients out of train; `official` as is
    abnormality="all",  # cbis-ddsm: `all`, `mass` or `calc` cases
    split_csv="",  # folder: a CSV with columns file, split and optionally patient; empty: DATA_ROOT/split.csv if it is there
    patient_pattern="",  # folder: regular expression on the file name whose first group is the patient; empty: see README
    validation_fraction=0.1,  # share of the patients set aside for validation where no split file says so
    test_fraction=0.2,  # folder: share of the patients set aside for test where no split file says so
    phantom_counts=[64, 8, 16],  # phantom: number of train, validation and test breasts
)

# The optimisation loop of either stage.
_LOOP = HParams(
    batch_size=4,  # samples per optimiser step, of all processes together
    mini_batch_size=0,  # samples per forward pass, the rest of batch_size is accumulated (codebooks learn per pass); 0: all at once
    warmup_steps=100,  # linear learning-rate warm-up
    lr_schedule="cosine",  # to zero at the last step: the last epochs gain most; `constant`: off
    log_frequency=10,  # steps between readings of the loss (each one synchronises with the device)
    checkpoint_frequency=10,  # epochs between kept checkpoints; `last` and `best` are written besides
    checkpoint_minutes=10.0,  # minutes after which `last` is written inside an epoch too; 0: only at the end of each
    image_frequency=5,  # epochs between sample pictures
    validation_frequency=1,  # epochs between validations
)

HPS_VQVAE: dict[str, HParams] = {}
HPS_VQVAE["cbis-ddsm"] = HParams(
    **copy.deepcopy(_DATA)
    | copy.deepcopy(_LOOP)
    | dict(
        in_channels=1,  # image channels (grayscale)
        hidden_channels=128,  # width of encoders and decoders, and channels of the stage-2 latent
        res_channels=32,  # width inside a residual block
        nb_res_layers=2,  # residual layers per block
        nb_levels=5,  # hierarchical levels
        scaling_rates=[4, 2, 2, 2, 2],  # downscaling of each level, finest first
        embed_dim=64,  # dimension of a codebook entry
        nb_entries=512,  # entries per codebook
        codebook_decay=0.99,  # EMA decay of the codebooks
        revive_threshold=0.02,  # a code used less than this share of (vectors / codes) is re-seeded from the batch; 0: off
        residual_type="rezero",  # ReZero residual blocks (Bachlechner et al., 2020)
        quantize_probability=0.5,  # share of the samples that go through the quantisers in training; the rest goes past them
        learning_rate=1e-4,  # Adam
        beta=0.25,  # commitment loss weight
        recon_loss="mse",  # reconstruction loss
        grad_clip_norm=0.05,  # clip the gradient norm: at higher values the loss spikes; 0: off
        codebook_batches=8,  # batches from which the codebooks are initialised
        max_epochs=100,  # epochs
        amp=True,  # mixed precision on CUDA
    )
)

HPS_DIFFUSION: dict[str, HParams] = {}
HPS_DIFFUSION["cbis-ddsm"] = HParams(
    **copy.deepcopy(_DATA)
    | copy.deepcopy(_LOOP)
    | dict(
        timesteps=1000,  # diffusion timesteps T
        beta_schedule="linear",  # LDM's "linear": linear in sqrt(beta)
        linear_start=0.0015,  # beta_0
        linear_end=0.0195,  # beta_{T-1}
        in_channels=256,  # UNet input: what is diffused and the degraded latent, concatenated
        out_channels=128,  # UNet output: channels of the latent
        model_channels=192,  # base width of the UNet
        channel_mult=[1, 2, 4],  # width multiplier of each resolution
        num_res_blocks=2,  # residual blocks per resolution
        attention_levels=[1, 2],  # resolutions with self-attention, 0 the finest
        num_head_channels=64,  # channels of an attention head
        dropout=0.0,  # dropout in residual blocks
        use_checkpoint=True,  # gradient checkpointing: activations are recomputed in the backward pass
        conditioning="concat",  # the degraded latent is concatenated to the noisy one
        learning_rate=2e-4,  # AdamW
        weight_decay=0.01,  # AdamW
        max_epochs=200,  # epochs
        grad_clip_norm=1.0,  # clip the gradient norm
        l_simple_weight=1.0,  # weight of L_simple, the MSE on the predicted noise
        original_elbo_weight=0.0,  # weight of the variational bound (VLB); 0: disabled
        parameterization="eps",  # what the network predicts: `eps`, `v` or `x0`
        precondition="residual",  # diffuse what the posterior mean leaves unknown, in units of its deviation; `none`: the latent
        noise_conditioning=False,  # tell the UNets the noise level; needed where noise_levels names a range
        mean_epochs=100,  # of max_epochs: the first train the posterior mean, the rest the diffusion around it
        mean_channels=192,  # base width of the posterior mean's UNet
        mean_res_blocks=2,  # its residual blocks per resolution
        ema_decay=0.9999,  # EMA of the UNet's weights, warmed up as min(decay, (1 + n) / (10 + n))
        ddim_steps=50,  # DDIM sampling steps
        ddim_eta=0.0,  # DDIM eta; 0: deterministic
        ddim_spacing="leading",  # timesteps of the sampler: `leading` (LDM) or `trailing` (starts at T - 1)
        fast_steps=8,  # network evaluations a sample of DPM-Solver++, the fast sampler
        statistics_batches=32,  # batches from which the latent's statistics are measured, before each of the two phases
        amp=True,  # mixed precision on CUDA
    )
)

# Small: phantoms made on the fly; both stages train in minutes on two CPU cores.
_PHANTOM = dict(
    image_shape=[1, 256, 192],  # pixels of 0.8 mm
    crop_size=128,  # train on crops: more breasts a minute
    crops_per_image=4,
    cache_images=True,
    nb_workers=0,
    batch_size=8,
    warmup_steps=50,
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
    in_channels=128,
    out_channels=64,
    model_channels=64,
    channel_mult=[1, 2],
    num_res_blocks=1,
    attention_levels=[1],
    use_checkpoint=False,
    parameterization="v",
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
_FOLDER_SMALL = dict(
    image_shape=[1, 512, 384],
    crop_size=128,
    crops_per_image=8,
    breast_fraction=0.7,
    cache_images=True,
    nb_workers=0,
    batch_size=8,
    warmup_steps=50,
)
HPS_VQVAE["folder-small"] = HPS_VQVAE["cbis-ddsm"].updated(
    **_FOLDER_SMALL | {"breast_fraction": 0.2},  # skin line, film border and labels need codes too
    hidden_channels=64,
    max_epochs=8,
)
HPS_DIFFUSION["folder-small"] = HPS_DIFFUSION["cbis-ddsm"].updated(
    **_FOLDER_SMALL,
    in_channels=128,
    out_channels=64,
    model_channels=96,
    channel_mult=[1, 2],
    num_res_blocks=1,
    attention_levels=[],
    use_checkpoint=False,
    parameterization="v",
    learning_rate=5e-4,
    mean_epochs=24,
    mean_channels=96,
    mean_res_blocks=1,
    max_epochs=36,
    ema_decay=0.99,
    validation_frequency=3,
)

# The model in the box (weights/): real mammograms at their own pixels and phantoms, all noise levels, two CPU cores.
_MAMMOGRAM = dict(
    native=True,
    stabilize=True,
    noise_levels=[0.04, 1.25],
    crop_size=96,
    crops_per_image=16,
    breast_fraction=0.6,
    dihedral=True,
    scale_range=[0.3, 2.0],
    gamma_range=[0.7, 1.4],
    phantoms=18,
    cache_images=True,
    nb_workers=0,
    batch_size=8,
    warmup_steps=50,
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
    in_channels=64,
    out_channels=32,
    model_channels=64,
    channel_mult=[1, 2, 2],
    num_res_blocks=1,
    attention_levels=[],
    use_checkpoint=False,
    parameterization="v",
    learning_rate=1e-3,
    noise_conditioning=True,
    mean_epochs=147,
    altered_epochs=147,  # at level 0.2 samples had half of the fine texture of film when the diffusion saw resized crops too
    mean_channels=64,
    mean_res_blocks=2,
    part_edges=True,
    calcifications=0.8,  # at 0.4, with a third as many a crop, the faintest kept less of their contrast than BM3D leaves them
    borders=0.2,
    windowing=0.5,  # without it tissue cut off at black or white, or far below full scale, was restored worse than by BM3D
    enhancement=0.2,  # before it images of equalised local contrast were restored worse than by BM3D at level 0.2
    ema_decay=0.999,
    max_epochs=158,
    statistics_batches=32,
    validation_frequency=7,
    image_frequency=21,
)

TASKS = tuple(HPS_VQVAE)

# Entries that fix the shapes of the weights: a checkpoint's own values always hold.
ARCHITECTURE_VQVAE = (
    "in_channels", "hidden_channels", "res_channels", "nb_res_layers", "nb_levels", "scaling_rates", "embed_dim",
    "nb_entries", "residual_type", "stabilize",
)  # fmt: skip
ARCHITECTURE_DIFFUSION = (
    "timesteps", "beta_schedule", "linear_start", "linear_end", "in_channels", "out_channels", "model_channels",
    "channel_mult", "num_res_blocks", "attention_levels", "num_head_channels", "parameterization", "precondition",
    "noise_conditioning", "mean_channels", "mean_res_blocks",
)  # fmt: skip

# Entries that take one of a few words.
CHOICES = {
    "split": ("patient", "official"),
    "abnormality": ("all", "mass", "calc"),
    "lr_schedule": ("constant", "cosine"),
    "residual_type": ("rezero",),
    "recon_loss": ("mse", "l1"),
    "beta_schedule": ("linear",),
    "conditioning": ("concat",),
    "parameterization": ("eps", "v", "x0"),
    "precondition": ("residual", "none"),
    "ddim_spacing": ("leading", "trailing"),
}


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
        if not equals:
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
    for key, words in CHOICES.items():
        if key in hps and hps[key] not in words:
            raise ValueError(f"--hps {key}={hps[key]}: must be one of {', '.join(words)}")
    positive = (
        "batch_size", "max_epochs", "crops_per_image", "log_frequency", "checkpoint_frequency", "image_frequency",
        "validation_frequency", "learning_rate", "hidden_channels", "res_channels", "nb_levels", "embed_dim",
        "nb_entries", "codebook_batches", "timesteps", "linear_start", "linear_end", "model_channels", "num_res_blocks",
        "num_head_channels", "ddim_steps", "fast_steps", "statistics_batches", "mean_channels",
        "mean_res_blocks", "in_channels", "out_channels",
    )  # fmt: skip
    for key in positive:
        if key in hps and not hps[key] > 0:
            raise ValueError(f"--hps {key}={hps[key]}: must be greater than 0")
    non_negative = ("mini_batch_size", "checkpoint_minutes", "crop_size", "nb_workers", "warmup_steps", "nb_res_layers", "beta",
                    "grad_clip_norm", "weight_decay", "phantoms", "altered_epochs",
                    "mean_epochs", "ddim_eta", "revive_threshold", "noise_level")  # fmt: skip
    for key in non_negative:
        if key in hps and not hps[key] >= 0:
            raise ValueError(f"--hps {key}={hps[key]}: must not be negative")
    fractions = ("breast_fraction", "validation_fraction", "test_fraction", "quantize_probability", "codebook_decay", "ddim_eta",
                 "calcifications", "ema_decay", "dropout", "borders", "windowing", "enhancement")  # fmt: skip
    for key in fractions:
        if key in hps and not 0 <= hps[key] <= 1:
            raise ValueError(f"--hps {key}={hps[key]}: must lie between 0 and 1")
    for key, value in hps.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--hps {key}={value}: must be finite")
    if "linear_end" in hps and not hps.linear_start <= hps.linear_end < 1:
        raise ValueError(f"--hps linear_end={hps.linear_end}: must lie between linear_start and 1")
    if len(hps.image_shape) != 3 or min(hps.image_shape) < 1:
        raise ValueError(f"--hps image_shape={hps.image_shape}: must be channels, height, width")
    if len(hps.phantom_counts) != 3 or min(hps.phantom_counts) < 1:
        raise ValueError(f"--hps phantom_counts={hps.phantom_counts}: must be three counts: train, validation, test")
    for key in ("noise_levels", "scale_range", "gamma_range"):
        pair = hps[key]
        if pair and (len(pair) != 2 or not 0 < pair[0] <= pair[1]) or (key != "noise_levels" and not pair):
            raise ValueError(f"--hps {key}={pair}: must be two numbers greater than 0, the lesser first")
    if hps.stabilize and not hps.noise_level:
        raise ValueError("--hps stabilize=True: needs a noise_level greater than 0")
    if hps.part_edges and hps.degrade_on_device:
        raise ValueError("--hps degrade_on_device=True: edges are taken apart in the loader; pass part_edges=False too")
    if hps.noise_levels and not hps.stabilize:
        raise ValueError(
            f"--hps noise_levels={hps.noise_levels}: one model serves several levels with stabilize=True alone"
        )
    if hps.mini_batch_size and hps.batch_size % hps.mini_batch_size:
        raise ValueError(f"--hps mini_batch_size={hps.mini_batch_size}: must divide batch_size {hps.batch_size}")
    if hps.crop_size > min(hps.image_shape[1:]):
        raise ValueError(f"--hps crop_size={hps.crop_size}: larger than image_shape {hps.image_shape}")
    if "scaling_rates" in hps:
        if len(hps.scaling_rates) != hps.nb_levels or min(hps.scaling_rates, default=0) < 1:
            raise ValueError(
                f"--hps scaling_rates={hps.scaling_rates}: must hold nb_levels={hps.nb_levels} rates, one a level"
            )
        if hps.embed_dim > hps.hidden_channels:
            raise ValueError(f"--hps embed_dim={hps.embed_dim}: must not exceed hidden_channels={hps.hidden_channels}")
        if hps.image_shape[0] != hps.in_channels:
            raise ValueError(f"--hps in_channels={hps.in_channels}: image_shape has {hps.image_shape[0]} channels")
    if "channel_mult" in hps:
        if not hps.channel_mult or min(hps.channel_mult) < 1:
            raise ValueError(f"--hps channel_mult={hps.channel_mult}: must be a list of positive multipliers")
        if any(level not in range(len(hps.channel_mult)) for level in hps.attention_levels):
            raise ValueError(
                f"--hps attention_levels={hps.attention_levels}: channel_mult has {len(hps.channel_mult)} levels"
            )
        if hps.in_channels != 2 * hps.out_channels:
            raise ValueError(
                f"--hps in_channels={hps.in_channels}: must be twice out_channels={hps.out_channels} (concat)"
            )
        if hps.precondition == "residual" and not hps.noise_level:
            raise ValueError(
                f"--hps noise_level={hps.noise_level}: leaves nothing unknown to sample; train at a level above 0, or with "
                "--hps precondition=none"
            )
        for key in ("ddim_steps", "fast_steps"):
            if hps[key] > hps.timesteps:
                raise ValueError(f"--hps {key}={hps[key]}: more than timesteps={hps.timesteps}")
        for key in ("model_channels", "mean_channels"):
            if hps[key] % 32:
                raise ValueError(f"--hps {key}={hps[key]}: must be a multiple of 32 (GroupNorm)")
            # the middle block, at the coarsest resolution, always attends
            for level in [*hps.attention_levels, len(hps.channel_mult) - 1]:
                channels = hps.channel_mult[level] * hps[key]
                if channels % hps.num_head_channels:
                    raise ValueError(
                        f"--hps num_head_channels={hps.num_head_channels}: does not divide {channels} channels"
                    )
