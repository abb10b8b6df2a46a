"""Extract a latent data set from a trained VQ-VAE-2: clean and degraded latents, code indices and where they come from."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

import distributed
from datasets import (
    LATENT_FORMAT,
    SPLITS,
    Batch,
    MammogramDataset,
    RecordDataset,
    SampleKey,
    load_datasets,
    make_loader,
)
from helper import (
    UserError,
    base_parser,
    finish_batch,
    get_device,
    hold,
    positive_int,
    resolve_settings,
    run_script,
    tracked,
    weights_digest,
    write_json,
)
from hps import ARCHITECTURE_VQVAE, HPS_VQVAE, TASKS
from vqvae2_wrapper import VQVAE2Wrapper, load_vqvae


def parse_arguments() -> argparse.Namespace:
    parser = base_parser(__doc__, TASKS)
    parser.add_argument("checkpoint", type=Path, help="path to pre-trained VQ-VAE-2 checkpoint")
    parser.add_argument("--codes-only", action="store_true", help="write code indices alone, 16 bit")
    parser.add_argument(
        "--realisations", type=positive_int, default=1, help="noise draws per training image (default: 1)"
    )
    parser.add_argument("--float32", action="store_true", help="write latents in single precision, not half")
    return parser.parse_args()


@dataclass
class _Realisations(Dataset):
    """Whole training images with each noise draw in turn; validation and test images once, with their own noise."""

    images: MammogramDataset
    count: int

    def __len__(self) -> int:
        return self.images.image_count() * self.count

    def __getitem__(self, key: SampleKey) -> Batch:
        index, realisation = divmod(key.index, self.count)
        return self.images.whole(index, realisation) if self.images.train else self.images[index]


# Name of an array to the type and shape of an image's entry.
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]


def split_layout(
    first_stage: VQVAE2Wrapper, image_shape: list[int], dtype: np.dtype, realisations: int, codes_only: bool
) -> Layout:
    """The arrays of a split, and what each holds of an image."""
    vqvae, latent = first_stage.vqvae, first_stage.latent_shape(*image_shape[1:])
    layout: Layout = {}
    for level in range(vqvae.nb_levels):
        scale = math.prod(vqvae.scaling_rates[1 : level + 1])
        layout[f"codes_{level}"] = np.dtype(np.uint16), (latent[1] // scale, latent[2] // scale)
    if not codes_only:
        layout["clean"] = dtype, latent
        layout["degraded"] = dtype, (realisations, *latent)
        layout["mask"] = np.dtype(np.bool_), latent[1:]
    return layout


def entry_bytes(layout: Layout, prefix: str = "") -> int:
    """Bytes of an image's entries in the arrays whose names begin with `prefix`."""
    return sum(dtype.itemsize * math.prod(shape) for name, (dtype, shape) in layout.items() if name.startswith(prefix))


def write_split(
    images: MammogramDataset, first_stage: VQVAE2Wrapper, folder: Path, layout: Layout, device: torch.device,
    *, realisations: int, workers: int, progress: bool,
) -> dict:  # fmt: skip
    """Write one split's arrays below `folder`; returns its entry in the index. Several processes share the images."""
    n = images.image_count()
    if distributed.is_main():
        folder.mkdir(parents=True)
        for name, (dtype, shape) in layout.items():
            path = folder / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", dtype, (n, *shape))
            if hasattr(os, "posix_fallocate"):
                # a disk that is full is an error now, and a signal that ends the process when a page is written
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    distributed.gather(None)  # the files are there
    arrays = {name: np.lib.format.open_memmap(folder / f"{name}.npy", "r+") for name in layout}

    entries: list[tuple[int, dict]] = []
    loader = make_loader(_Realisations(images, realisations), distributed.size(), workers=workers, shared=True)
    pairs = zip(loader.sampler, loader, strict=True)
    for key, batch in tracked(pairs, images.split, "pair", progress, len(loader)):
        if not key.counts:
            continue
        index, realisation = divmod(key.index, realisations)
        batch = batch.to(device)
        if realisation == 0:
            meta = batch.meta[0]
            entries.append((index, {"path": meta.path, "patient": meta.patient}))
            clean = first_stage.encode(batch.clean, batch.noise)
            for level, codes in enumerate(first_stage.codes(clean)):
                arrays[f"codes_{level}"][index] = codes[0].cpu().numpy()
            if "clean" in arrays:
                arrays["clean"][index] = clean[0].cpu().numpy()
                rate = first_stage.vqvae.scaling_rates[0]
                padded = torch.zeros(1, clean.shape[2] * rate, clean.shape[3] * rate, dtype=torch.bool)
                padded[:, : batch.mask.shape[2], : batch.mask.shape[3]] = batch.mask[0].cpu()
                mask = padded.view(clean.shape[2], rate, clean.shape[3], rate).any(3).any(1)
                arrays["mask"][index] = mask.numpy()
        if "degraded" in arrays:
            degraded = first_stage.encode(batch.degraded, batch.noise)[0].cpu().numpy()
            arrays["degraded"][index, realisation] = degraded
    for written in arrays.values():
        written.flush()
    entries = sorted(distributed.join(entries), key=lambda entry: entry[0])
    return {"images": [image for _, image in entries], "realisations": realisations}


def main() -> None:
    args = parse_arguments()
    vqvae, checkpoint = load_vqvae(args.checkpoint)
    hps = resolve_settings(args, HPS_VQVAE, checkpoint=checkpoint, architecture=ARCHITECTURE_VQVAE)
    if hps.nb_entries > 2**16:
        raise UserError(f"{args.checkpoint}: {hps.nb_entries} codebook entries do not fit into 16-bit indices")
    if hps.native:
        raise UserError(
            f"{args.checkpoint}: takes images at their own pixels (native=True), but latents are kept on one grid; pass "
            "--hps native=false"
        )
    images = dict(zip(SPLITS, load_datasets(args, hps, *SPLITS), strict=True))
    if isinstance(images["train"], RecordDataset):
        images["train"].leave_out_unreadable(not args.no_tqdm)
    device = get_device(args.cpu, args.cuda)
    first_stage = VQVAE2Wrapper(vqvae.eval()).to(device)
    realisations = {split: args.realisations if split == "train" else 1 for split in SPLITS}

    dtype = np.dtype(np.float32 if args.float32 else np.float16)
    layouts = {
        split: split_layout(first_stage, hps.image_shape, dtype, count, args.codes_only)
        for split, count in realisations.items()
    }
    total = sum(images[split].image_count() * entry_bytes(layout) for split, layout in layouts.items())
    code_bytes, latent_bytes = (entry_bytes(layouts["train"], prefix) for prefix in ("codes", "clean"))
    counts = ", ".join(f"{d.image_count()} {split}" for split, d in images.items())
    out = args.out or Path("latents") / f"{args.task}-{weights_digest(vqvae)[:8]}"
    if out.exists():
        raise UserError(f"--out {out}: exists already; remove it or choose another folder")
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    print(
        f"{counts} images: {code_bytes:,} bytes of codes and {latent_bytes:,} bytes a latent, "
        f"{total / 1e9:.3f} GB in all; {free / 1e9:.1f} GB free"
    )
    if args.no_save:
        print("nothing written (--no-save)")
        return
    if total > 0.98 * free:
        raise UserError(
            f"--out {out}: {total / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB are free; try --codes-only"
        )

    partial = out.with_name(f".{out.name}.part")
    hold(out.with_name(f".{out.name}.lock"), out)
    try:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        index = {
            "format_version": LATENT_FORMAT,
            "checkpoint": str(args.checkpoint),
            "first_stage": weights_digest(vqvae),
            "task": args.task,
            "hps": dict(hps),
            "seed": args.seed,
            "codes_only": args.codes_only,
            "latent_shape": list(first_stage.latent_shape(*hps.image_shape[1:])),
            "image_shape": hps.image_shape,
            "rate": vqvae.scaling_rates[0],
            "scale": vqvae.scale,
            "splits": {
                split: write_split(
                    images[split], first_stage, partial / split, layouts[split], device,
                    realisations=realisations[split], workers=hps.nb_workers, progress=not args.no_tqdm,
                )
                for split in SPLITS
            },
        }  # fmt: skip
        if distributed.is_main():
            write_json(partial / "index.json", index)
            partial.replace(out)
    except BrokenPipeError:  # standard output, not the folder
        raise
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); free space or choose another folder"
        ) from None
    finally:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
    print(f"latents written to {out}")
    finish_batch([failure for split in SPLITS for failure in images[split].left_out])


if __name__ == "__main__":
    run_script(main, parallel=True)
