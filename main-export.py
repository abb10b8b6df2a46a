"""Write both trained stages as small files that restore without anything else.

Of stage 2 the averaged weights, its matrices in half precision; the weights of stage 1 as they are.
"""

from __future__ import annotations

import argparse

from helper import UserError
from hps import apply_overrides
from running.command_line import Parser, path_argument, refuse_missing
from running.scripts import run_script

SAMPLER = ("ddim_steps", "ddim_eta", "ddim_spacing", "fast_steps")  # entries that no weight depends on


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--vqvae-path", type=path_argument, required=True, help="path to the VQ-VAE-2 checkpoint")
    parser.add_argument(
        "--load-path", type=path_argument, required=True, help="path to the diffusion checkpoint trained on it"
    )
    parser.add_argument(
        "--hps",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"override how the model samples by default: {', '.join(SAMPLER)}; repeatable",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder for vqvae.pt and diffusion.pt")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    refuse_missing(args.vqvae_path, args.load_path)
    # torch and all that stands on it come after the flags: a wrong one is answered at once
    from diffusion import make_diffusion
    from restoration.restorer import check_first_stage, load_averages
    from running.checkpoints import build_model, load_checkpoint, save_checkpoint, slim, weights_digest
    from vqvae2_wrapper import load_vqvae

    vqvae, stage_1 = load_vqvae(args.vqvae_path)
    stage_2 = load_checkpoint(args.load_path, "diffusion")
    check_first_stage(stage_2, args.load_path, weights_digest(vqvae), args.vqvae_path)
    try:
        stage_2.hps, changed = apply_overrides(stage_2.hps, args.hps)
    except ValueError as error:
        raise UserError(str(error)) from None
    if fixed := sorted(changed - set(SAMPLER)):
        raise UserError(f"--hps {fixed[0]}: the weights were trained with it; only {', '.join(SAMPLER)} can be changed")
    model = build_model(make_diffusion, stage_2, args.load_path)
    load_averages(model, stage_2, args.load_path)
    paths = args.out / "vqvae.pt", args.out / "diffusion.pt"
    if existing := [path for path in paths if path.exists()]:
        raise UserError(f"--out: {existing[0]} exists already; remove it or choose another folder")
    # stage 2 was trained on the very latents of stage 1, and knows them by its digest: its few weights stay as they are
    save_checkpoint(paths[0], slim(stage_1, vqvae, half=False))
    save_checkpoint(paths[1], slim(stage_2, model, half=True))
    sizes = " and ".join(f"{path.stat().st_size / 1e6:.1f} MB" for path in paths)
    trained = "" if model.has_samples else "; the diffusion is not trained: they restore to the posterior mean alone"
    print(f"both stages written to {args.out}: {sizes}{trained}")


if __name__ == "__main__":
    run_script(main)
