"""Stage 2: train the latent diffusion model on a frozen VQ-VAE-2, or restore the test set with it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from datasets import Batch, LatentDataset, load_datasets
from diffusion import LatentDiffusion, UNet
from evaluation import run_evaluation
from helper import (
    Checkpoint,
    UserError,
    base_parser,
    get_device,
    load_checkpoint,
    load_weights,
    resolve_settings,
    run_script,
    weights_digest,
)
from hps import ARCHITECTURE_DIFFUSION, HPS_DIFFUSION, TASKS, HParams
from trainer import DiffusionTrainer, run_training, sample_latents
from vqvae2_wrapper import VQVAE2Wrapper, load_vqvae


def parse_arguments() -> argparse.Namespace:
    parser = base_parser(__doc__, TASKS)
    parser.add_argument("--vqvae-path", type=Path, required=True, help="path to pre-trained VQ-VAE-2 checkpoint")
    parser.add_argument("--load-path", type=Path, help="resume diffusion training from a saved checkpoint")
    parser.add_argument("--latents", type=Path, help="train from a latent data set of main-latents.py, not from images")
    parser.add_argument("--save-jpg", action="store_true", help="save output images as JPEG instead of PNG")
    parser.add_argument(
        "--evaluate", action="store_true", help="restore the test set with the checkpoint of --load-path"
    )
    return parser.parse_args()


def make_diffusion(hps: HParams) -> LatentDiffusion:
    """The UNet and the diffusion around it that the settings describe."""
    return LatentDiffusion(
        UNet(**hps.arguments(UNet)), latent_channels=hps.out_channels, **hps.arguments(LatentDiffusion)
    )


def restore_test_set(
    args: argparse.Namespace,
    hps: HParams,
    model: LatentDiffusion,
    first_stage: VQVAE2Wrapper,
    checkpoints: tuple[Checkpoint, Checkpoint],
    device: torch.device,
) -> None:
    """Table, files and pictures of the restored test set: DDIM samples, and the mean that one evaluation gives."""
    (test_set,) = load_datasets(args, hps, "test")
    model, first_stage = model.to(device).eval(), first_stage.to(device)

    def restore(batch: Batch, steps: int, eta: float, spacing: str) -> Tensor:
        cond = model.normalize(first_stage.encode(batch.degraded))
        names = [meta.path for meta in batch.meta]
        z = sample_latents(model, cond, names, steps, eta, spacing, args.seed, progress=not args.no_tqdm)
        return first_stage.decode(model.denormalize(z), shape=batch.clean.shape[-2:])

    restored = f"restored, DDIM {hps.ddim_steps}"
    methods = {
        "autoencoder pass": lambda batch: first_stage.decode(
            first_stage.encode(batch.degraded), shape=batch.clean.shape[-2:]
        ),
        "posterior mean, 1 step": lambda batch: restore(batch, 1, 0.0, "trailing"),
        restored: lambda batch: restore(batch, hps.ddim_steps, hps.ddim_eta, hps.ddim_spacing),
    }
    run_evaluation(
        args,
        hps,
        test_set,
        methods,
        device,
        checkpoints,
        title=f"stage 2 (EMA weights, eta {hps.ddim_eta})",
        pictured=("autoencoder pass", restored),
        note=lambda: {
            "vqvae": str(args.vqvae_path),
            "settings": {key: hps[key] for key in ("ddim_steps", "ddim_eta", "ddim_spacing")},
        },
    )


def main() -> None:
    args = parse_arguments()
    if args.evaluate and args.load_path is None:
        raise UserError("--evaluate needs --load-path, the diffusion checkpoint to restore with")
    vqvae, vqvae_checkpoint = load_vqvae(args.vqvae_path)
    checkpoint = load_checkpoint(args.load_path, "diffusion") if args.load_path else None
    hps = resolve_settings(
        args, HPS_DIFFUSION, checkpoint=checkpoint, architecture=ARCHITECTURE_DIFFUSION, first_stage=vqvae_checkpoint
    )
    first_stage = VQVAE2Wrapper(vqvae)
    if first_stage.latent_channels != hps.out_channels:
        raise UserError(
            f"--vqvae-path {args.vqvae_path}: its latents have {first_stage.latent_channels} channels, but the UNet of "
            f"task {args.task} takes {hps.out_channels}; pass that task's checkpoint, or "
            f"--hps in_channels={2 * first_stage.latent_channels} --hps out_channels={first_stage.latent_channels}"
        )
    if checkpoint is not None and checkpoint.extra.get("first_stage") != weights_digest(vqvae):
        raise UserError(
            f"--vqvae-path {args.vqvae_path}: {args.load_path} was trained on another VQ-VAE-2; pass that one"
        )
    device = get_device(args.cpu)
    torch.manual_seed(args.seed)
    model = make_diffusion(hps)
    if args.evaluate:
        load_weights(model, checkpoint.model, args.load_path)
        ema = {k.removeprefix("averaged.module."): v for k, v in checkpoint.training["ema"].items() if ".module." in k}
        load_weights(model.model, ema, args.load_path)
        restore_test_set(args, hps, model, first_stage, (vqvae_checkpoint, checkpoint), device)
        return
    if args.latents:
        train_set, validation_set = (
            LatentDataset(args.latents, split, hps, args.seed) for split in ("train", "validation")
        )
        train_set.check(weights_digest(vqvae), args.vqvae_path)
    else:
        train_set, validation_set = load_datasets(args, hps, "train", "validation")
    run_training(
        DiffusionTrainer,
        args,
        hps,
        model,
        device,
        train_set,
        validation_set,
        checkpoint,
        first_stage=first_stage,
        latents=args.latents is not None,
    )


if __name__ == "__main__":
    run_script(main)
