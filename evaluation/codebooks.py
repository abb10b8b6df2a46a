"""Stage 1 on the test set: reconstructions past and through the codebooks, and how these are used."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from datasets import load_datasets
from evaluation.table import run_evaluation
from hps import HParams
from loading.batches import Batch
from running.checkpoints import Checkpoint
from running.scripts import finish_batch
from vqvae import VQVAE, perplexity


def evaluate_vqvae(
    args: argparse.Namespace, hps: HParams, vqvae: VQVAE, checkpoint: Checkpoint, device: torch.device
) -> None:
    """Table, files and pictures of reconstructions of the test set, past and through the codebooks."""
    (test_set,) = load_datasets(args, hps, "test")
    vqvae = vqvae.to(device).eval()
    counts = torch.zeros(hps.nb_levels, hps.nb_entries, device=device)
    vectors = [0] * hps.nb_levels

    @torch.no_grad()
    def reconstructed(image: Tensor, batch: Batch, quantize: bool) -> tuple[Tensor, list[Tensor]]:
        output = vqvae(vqvae.to_domain(image, batch.noise), quantize)
        return vqvae.from_domain(output.reconstruction, batch.noise), output.indices

    def counted(batch: Batch) -> Tensor:
        image, codes = reconstructed(batch.clean, batch, True)
        for level, indices in enumerate(codes):
            counts[level] += torch.bincount(indices.flatten(), minlength=hps.nb_entries)
            vectors[level] += indices.numel()
        return image

    def figures_of(level: int, row: Tensor) -> dict:
        used = int((row > 0).sum())
        return {"level": level, "perplexity": float(perplexity(row)), "vectors": vectors[level], "entries_used": used}

    def note() -> dict:
        return {"codebooks": [figures_of(*pair) for pair in enumerate(counts)]}

    past, through = "clean, continuous", "clean, quantised"
    methods = {
        past: lambda batch: reconstructed(batch.clean, batch, False)[0],
        through: counted,
        "low dose, continuous": lambda batch: reconstructed(batch.degraded, batch, False)[0],
        "low dose, quantised": lambda batch: reconstructed(batch.degraded, batch, True)[0],
    }
    how = dict(title="stage 1", pictured=(past, through), note=note)
    result = run_evaluation(args, hps, test_set, methods, device, [checkpoint], **how)
    for book in result.note["codebooks"]:
        print(
            f"codebook {book['level']}: perplexity {book['perplexity']:.1f}, "
            f"{book['entries_used']} of {hps.nb_entries} entries used by {book['vectors']} vectors"
        )
    finish_batch(test_set.left_out)
