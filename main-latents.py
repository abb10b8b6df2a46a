"""Extract a latent data set from a trained VQ-VAE-2: clean and degraded latents, code indices and where they come from."""

from __future__ import annotations

import argparse
from pathlib import Path

from helper import UserError, get_device
from hps import ARCHITECTURE_VQVAE, HPS_VQVAE, TASKS
from running.command_line import base_parser, path_argument, positive_int, refuse_missing
from running.scripts import finish_batch, run_script


def parse_arguments() -> argparse.Namespace:
    parser = base_parser(__doc__, TASKS)
    parser.add_argument("checkpoint", type=path_argument, help="path to pre-trained VQ-VAE-2 checkpoint")
    parser.add_argument("--codes-only", action="store_true", help="write code indices alone, 16 bit")
    parser.add_argument(
        "--realisations", type=positive_int, default=1, help="noise draws per training image (default: 1)"
    )
    parser.add_argument("--float32", action="store_true", help="write latents in single precision, not half")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    refuse_missing(args.checkpoint)
    # torch and all that stands on it come after the flags: a wrong one is answered at once
    import numpy as np

    from datasets import load_datasets
    from files.splits import SPLITS
    from loading.latents import LATENT_FORMAT, check_room, split_layout, whole_folder, write_split
    from loading.mammograms import RecordDataset
    from running import distributed
    from running.checkpoints import weights_digest
    from running.settings import resolve_settings
    from running.writing import write_json
    from vqvae2_wrapper import VQVAE2Wrapper, load_vqvae

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
    first_stage = VQVAE2Wrapper(vqvae).to(device)
    realisations = {split: args.realisations if split == "train" else 1 for split in SPLITS}
    dtype = np.dtype(np.float32 if args.float32 else np.float16)
    layouts = {
        split: split_layout(first_stage, hps.image_shape, dtype, count, args.codes_only)
        for split, count in realisations.items()
    }
    digest = weights_digest(vqvae)
    out = args.out or Path("latents") / f"{args.task}-{digest[:8]}"
    check_room(out, images, layouts, will_write=not args.no_save)
    if args.no_save:
        print("nothing written (--no-save)")
        return
    about = dict(
        format_version=LATENT_FORMAT, checkpoint=str(args.checkpoint), first_stage=digest, task=args.task, hps=dict(hps),
        seed=args.seed, codes_only=args.codes_only, latent_shape=list(first_stage.latent_shape(*hps.image_shape[1:])),
        image_shape=hps.image_shape, rate=vqvae.scaling_rates[0], scale=vqvae.scale,
    )  # fmt: skip
    with whole_folder(out) as folder:
        about["splits"] = {
            split: write_split(
                images[split], first_stage, folder / split, layouts[split], device,
                realisations=realisations[split], workers=hps.nb_workers, progress=not args.no_tqdm,
            )
            for split in SPLITS
        }  # fmt: skip
        if distributed.is_main():
            write_json(folder / "index.json", about)
    print(f"latents written to {out}")
    finish_batch([failure for split in SPLITS for failure in images[split].left_out])


if __name__ == "__main__":
    run_script(main, parallel=True)
