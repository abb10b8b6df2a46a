"""Stage 1: train or evaluate the VQ-VAE-2 on clean mammograms."""

from __future__ import annotations

import argparse

from helper import UserError, get_device, seed_everything
from hps import ARCHITECTURE_VQVAE, HPS_VQVAE, TASKS
from running.command_line import base_parser, path_argument, refuse_missing
from running.scripts import refuse_torchrun, run_script
from running.settings import resolve_settings


def parse_arguments() -> argparse.Namespace:
    parser = base_parser(__doc__, TASKS)
    parser.add_argument(
        "--load-path", type=path_argument, help="resume training from a saved checkpoint (or its run folder)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile before training")
    parser.add_argument("--save-jpg", action="store_true", help="save output images as JPEG instead of PNG")
    parser.add_argument("--evaluate", action="store_true", help="run evaluation only (no training)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.evaluate:
        refuse_torchrun("--evaluate")
        if args.load_path is None:
            raise UserError("--evaluate needs --load-path, the checkpoint to evaluate")
    if args.evaluate or args.load_path != args.out:
        refuse_missing(args.load_path)
    if args.load_path is None:
        resolve_settings(args, HPS_VQVAE)  # what is wrong with them is told at once
    # torch and all that stands on it come after the flags: a wrong one is answered at once
    from datasets import load_datasets
    from running.checkpoints import checkpoint_to_resume, load_weights
    from trainer import VQVAETrainer, run_training
    from vqvae import VQVAE

    checkpoint = checkpoint_to_resume(args, "vqvae")
    hps = resolve_settings(args, HPS_VQVAE, checkpoint=checkpoint, architecture=ARCHITECTURE_VQVAE)
    device = get_device(args.cpu, args.cuda)
    seed_everything(args.seed)
    vqvae = VQVAE(**hps.arguments(VQVAE))
    if args.evaluate:
        load_weights(vqvae, checkpoint.model, args.load_path)
        from evaluation.codebooks import evaluate_vqvae

        evaluate_vqvae(args, hps, vqvae, checkpoint, device)
        return
    train_set, validation_set = load_datasets(args, hps, "train", "validation")
    run_training(VQVAETrainer, args, hps, vqvae, device, train_set, validation_set, checkpoint)


if __name__ == "__main__":
    run_script(main, parallel=True)
