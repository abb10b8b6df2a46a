"""Stage 1: train or evaluate the VQ-VAE-2 on clean mammograms."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from datasets import Batch, load_datasets
from evaluation import run_evaluation
from helper import (
    Checkpoint,
    UserError,
    base_parser,
    checkpoint_to_resume,
    finish_batch,
    get_device,
    load_weights,
    refuse_torchrun,
    resolve_settings,
    run_script,
    seed_everything,
)
from hps import ARCHITECTURE_VQVAE, HPS_VQVAE, TASKS, HParams
from trainer import VQVAETrainer, run_training
from vqvae import VQVAE, VQVAEOutput, perplexity
from vqvae2_wrapper import from_domain, to_domain


def parse_arguments() -> argparse.Namespace:
    parser = base_parser(__doc__, TASKS)
    parser.add_argument("--load-path", type=Path, help="resume training from a saved checkpoint (or its run folder)")
    parser.add_argument("--compile", action="store_true", help="compile the model with torch.compile before training")
    parser.add_argument("--save-jpg", action="store_true", help="save output images as JPEG instead of PNG")
    parser.add_argument("--evaluate", action="store_true", help="run evaluation only (no training)")
    return parser.parse_args()


def evaluate_vqvae(
    args: argparse.Namespace, hps: HParams, vqvae: VQVAE, checkpoint: Checkpoint, device: torch.device
) -> None:
    """Table, files and pictures of reconstructions of the test set, past and through the codebooks."""
    (test_set,) = load_datasets(args, hps, "test")
    vqvae = vqvae.to(device).eval()
    counts = torch.zeros(hps.nb_levels, hps.nb_entries, device=device)
    vectors = [0] * hps.nb_levels

    def run(image: Tensor, batch: Batch, quantize: bool) -> VQVAEOutput:
        noise = batch.noise if vqvae.stabilize else None
        with torch.no_grad():
            output = vqvae(to_domain(image, noise), quantize)
        return replace(output, reconstruction=from_domain(output.reconstruction, noise))

    def quantized(batch: Batch) -> Tensor:
        output = run(batch.clean, batch, True)
        for level, indices in enumerate(output.indices):
            counts[level] += torch.bincount(indices.flatten(), minlength=hps.nb_entries)
            vectors[level] += indices.numel()
        return output.reconstruction

    def codebooks() -> dict:
        return {
            "codebooks": [
                {
                    "level": i,
                    "perplexity": float(perplexity(row)),
                    "vectors": vectors[i],
                    "entries_used": int((row > 0).sum()),
                }
                for i, row in enumerate(counts)
            ],
        }

    methods = {
        "clean, continuous": lambda batch: run(batch.clean, batch, False).reconstruction,
        "clean, quantised": quantized,
        "low dose, continuous": lambda batch: run(batch.degraded, batch, False).reconstruction,
        "low dose, quantised": lambda batch: run(batch.degraded, batch, True).reconstruction,
    }
    result = run_evaluation(
        args,
        hps,
        test_set,
        methods,
        device,
        [checkpoint],
        title="stage 1",
        pictured=("clean, continuous", "clean, quantised"),
        note=codebooks,
    )
    for book in result.note["codebooks"]:
        print(
            f"codebook {book['level']}: perplexity {book['perplexity']:.1f}, "
            f"{book['entries_used']} of {hps.nb_entries} entries used by {book['vectors']} vectors"
        )
    finish_batch(test_set.left_out)


def main() -> None:
    args = parse_arguments()
    if args.evaluate:
        refuse_torchrun("--evaluate")
        if args.load_path is None:
            raise UserError("--evaluate needs --load-path, the checkpoint to evaluate")
    checkpoint = checkpoint_to_resume(args, "vqvae")
    hps = resolve_settings(args, HPS_VQVAE, checkpoint=checkpoint, architecture=ARCHITECTURE_VQVAE)
    device = get_device(args.cpu, args.cuda)
    seed_everything(args.seed)
    vqvae = VQVAE(**hps.arguments(VQVAE))
    if args.evaluate:
        load_weights(vqvae, checkpoint.model, args.load_path)
        evaluate_vqvae(args, hps, vqvae, checkpoint, device)
        return
    train_set, validation_set = load_datasets(args, hps, "train", "validation")
    run_training(VQVAETrainer, args, hps, vqvae, device, train_set, validation_set, checkpoint)


if __name__ == "__main__":
    run_script(main, parallel=True)
