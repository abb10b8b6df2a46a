"""Stage 1 on the test set: reconstructions past and through the codebooks, and how these are used."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from datasets import load_datasets
from evaluation.table import run_evaluation
from hps import HParams
from loading.batches import Batch
from running.checkpoints import Checkpoint
from running.scripts import finish_batch
from vqvae import VQVAE, VQVAEOutput, perplexity
from vqvae2_wrapper import from_domain, to_domain


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
