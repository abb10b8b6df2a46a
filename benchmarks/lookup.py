"""A codebook lookup at the reference size against its matrix product, and against one that keeps the distances."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rates import Ratio, parser, prepare, print_ratios, seconds

from hps import HPS_VQVAE
from running.scripts import run_script
from vqvae import LOOKUP_ROWS, VectorQuantizer

HPS = HPS_VQVAE["cbis-ddsm"]
VECTORS = HPS.image_shape[1] * HPS.image_shape[2] // HPS.scaling_rates[0] ** 2  # of an image, on the finest level
CALLS = 5  # a round


def main() -> None:
    args = parser(__doc__).parse_args()
    prepare(args)
    quantizer = VectorQuantizer(HPS.nb_entries, HPS.embed_dim)
    vectors, entries = torch.randn(VECTORS, HPS.embed_dim), quantizer.codebook
    product = torch.empty(VECTORS, HPS.nb_entries)

    def multiply() -> None:
        torch.mm(vectors, entries.t(), out=product)

    def plain() -> None:
        (vectors.square().sum(1, keepdim=True) - 2 * vectors @ entries.t() + entries.square().sum(1)).argmin(1)

    lookup = Ratio("lookup over matrix product", 1.5)
    against = Ratio("lookup over plain lookup", None)
    for i in range(args.rounds + 1):
        base, own, other = (seconds(f, CALLS) for f in (multiply, lambda: quantizer.lookup(vectors), plain))
        if i:  # the first round warms up
            lookup.add(own, base)
            against.add(own, other)
    kept, chunk = (rows * HPS.nb_entries * 4 / 1e6 for rows in (VECTORS, LOOKUP_ROWS))
    print(
        f"{VECTORS} vectors of {HPS.embed_dim} against {HPS.nb_entries} entries; distances held at once: {chunk:.0f} MB, "
        f"plain {kept:.0f} MB\nplain: all distances, |v|^2 - 2 v.e + |e|^2, then their argmin"
    )
    print_ratios([lookup, against])


if __name__ == "__main__":
    run_script(main)
