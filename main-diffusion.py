"""Stage 2: train the latent diffusion model on a frozen VQ-VAE-2, or restore the test set with it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from datasets import Batch, LatentDataset, load_datasets
from diffusion import LatentDiffusion
from evaluation import run_evaluation
from helper import (
    Checkpoint,
    UserError,
    base_parser,
    get_device,
    load_checkpoint,
    resolve_settings,
    run_script,
    weights_digest,
)
from hps import ARCHITECTURE_DIFFUSION, HPS_DIFFUSION, TASKS, HParams
from restoration import Restorer, check_first_stage, load_averages, make_diffusion
from trainer import DiffusionTrainer, run_training
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
    sampler = Restorer(first_stage.to(device), model.to(device), hps, hps.ddim_steps, seed=args.seed)
    mean = replace(sampler, steps=1)

    def restore(restorer: Restorer, batch: Batch) -> Tensor:
        return restorer.restore(batch.degraded, [meta.path for meta in batch.meta], progress=not args.no_tqdm)

    restored = f"restored, DDIM {hps.ddim_steps}"
    methods = {
        "autoencoder pass": lambda batch: first_stage.decode(
            first_stage.encode(batch.degraded), shape=batch.clean.shape[-2:]
        ),
        "posterior mean, 1 step": lambda batch: restore(mean, batch),
        restored: lambda batch: restore(sampler, batch),
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
    if checkpoint is not None:
        check_first_stage(checkpoint, args.load_path, weights_digest(vqvae), args.vqvae_path)
    device = get_device(args.cpu)
    torch.manual_seed(args.seed)
    model = make_diffusion(hps)
    if args.evaluate:
        load_averages(model, checkpoint, args.load_path)
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
