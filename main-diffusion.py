"""Stage 2: train the latent diffusion model on a frozen VQ-VAE-2, or restore the test set with it."""

from __future__ import annotations

import argparse

from helper import UserError, get_device, seed_everything
from hps import ARCHITECTURE_DIFFUSION, HPS_DIFFUSION, TASKS
from running.command_line import base_parser, path_argument, refuse_missing
from running.scripts import finish_batch, refuse_torchrun, run_script


def parse_arguments() -> argparse.Namespace:
    parser = base_parser(__doc__, TASKS)
    parser.add_argument(
        "--vqvae-path", type=path_argument, required=True, help="path to pre-trained VQ-VAE-2 checkpoint"
    )
    parser.add_argument("--load-path", type=path_argument, help="resume diffusion training from a saved checkpoint")
    parser.add_argument(
        "--latents", type=path_argument, help="train from a latent data set of main-latents.py, not from images"
    )
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile before training")
    parser.add_argument("--save-jpg", action="store_true", help="save output images as JPEG instead of PNG")
    parser.add_argument(
        "--evaluate", action="store_true", help="restore the test set with the checkpoint of --load-path"
    )
    parser.add_argument(
        "--bm3d", action="store_true", help="with --evaluate: VST-BM3D in the table too (half a minute a megapixel)"
    )
    return parser.parse_args()


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError if flags do not go together."""
    if args.bm3d and not args.evaluate:
        raise UserError("--bm3d goes with --evaluate")
    if args.evaluate:
        refuse_torchrun("--evaluate")
        if args.latents is not None:
            raise UserError("--latents goes with training; --evaluate restores images")
        if args.load_path is None:
            raise UserError("--evaluate needs --load-path, the diffusion checkpoint to restore with")


def main() -> None:
    args = parse_arguments()
    check_flags(args)
    refuse_missing(args.vqvae_path, args.load_path if args.evaluate or args.load_path != args.out else None)
    # torch and all that stands on it come after the flags: a wrong one is answered at once
    from datasets import load_training_sets
    from diffusion import make_diffusion
    from models.samplers import dpm_timesteps
    from restoration.restorer import check_first_stage, load_averages
    from running.checkpoints import checkpoint_to_resume, weights_digest
    from running.settings import resolve_settings
    from trainer import DiffusionTrainer, run_training
    from vqvae2_wrapper import VQVAE2Wrapper, load_vqvae

    if args.bm3d:
        from restoration.classical import bm3d_is_there

        if not bm3d_is_there():
            raise UserError(
                "--bm3d: not installed; pip install -r requirements-benchmarks.txt (free for non-commercial use only)"
            )
    vqvae, vqvae_checkpoint = load_vqvae(args.vqvae_path)
    checkpoint = checkpoint_to_resume(args, "diffusion")
    hps = resolve_settings(
        args, HPS_DIFFUSION, checkpoint=checkpoint, architecture=ARCHITECTURE_DIFFUSION, first_stage=vqvae_checkpoint
    )
    first_stage, digest = VQVAE2Wrapper(vqvae), weights_digest(vqvae)
    if first_stage.latent_channels != hps.out_channels:
        raise UserError(
            f"--vqvae-path {args.vqvae_path}: its latents have {first_stage.latent_channels} channels, but the UNet of "
            f"task {args.task} takes {hps.out_channels}; pass that task's checkpoint, or "
            f"--hps in_channels={2 * first_stage.latent_channels} --hps out_channels={first_stage.latent_channels}"
        )
    if checkpoint is not None:
        check_first_stage(checkpoint, args.load_path, digest, args.vqvae_path)
    device = get_device(args.cpu, args.cuda)
    seed_everything(args.seed)
    model = make_diffusion(hps)
    try:
        dpm_timesteps(model.alphas_cumprod, hps.fast_steps)
    except ValueError as error:
        raise UserError(f"--hps fast_steps={hps.fast_steps}: {error}") from None
    if args.evaluate:
        load_averages(model, checkpoint, args.load_path)
        from restoration.evaluate import restore_test_set

        finish_batch(restore_test_set(args, hps, model, first_stage, (vqvae_checkpoint, checkpoint), device))
        return
    sets = load_training_sets(args, hps, digest)
    run_training(DiffusionTrainer, args, hps, model, device, *sets, checkpoint, first_stage=first_stage)


if __name__ == "__main__":
    run_script(main, parallel=True)
