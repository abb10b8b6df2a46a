#!/bin/sh
# Both stages on phantoms, from nothing to a table and a picture: minutes on two CPU cores, and on CUDA unchanged.
set -eu
cd "$(dirname "$0")"
. ./setup.sh

out=runs/demo-$(date +%Y%m%d-%H%M%S)-$$
python main-vqvae.py --task phantom --out "$out/vqvae" "$@"
python main-vqvae.py --load-path "$out/vqvae/best.pt" --evaluate "$@"
python main-latents.py "$out/vqvae/best.pt" --out "$out/latents" "$@"
python main-diffusion.py --vqvae-path "$out/vqvae/best.pt" --out "$out/diffusion" "$@"
python main-diffusion.py --vqvae-path "$out/vqvae/best.pt" --load-path "$out/diffusion/best.pt" --evaluate "$@"
echo "one picture: $out/diffusion/evaluation/test_0000.png"
