#!/bin/sh
# bm3d takes a two-dimensional `sigma_psd` for a power spectrum in units of the unnormalised DFT: white noise of variance v
# in N pixels is N v in each entry. A map of deviations, or a spectrum of v in each entry, has the same shape and stands for
# nearly no noise: the image comes back as noisy as it was, without a warning. (The package is free for non-commercial use only.)
#
# Versions: bm3d 4.0.3, bm4d 4.2.5, scipy 1.15.3, PyWavelets 1.8.0, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   input: mean squared error 1.003
#   deviation 1: mean squared error 0.044
#   map of deviations, 1: mean squared error 1.002
#   spectrum, N: mean squared error 0.044
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check bm3d==4.0.3 bm4d==4.2.5 scipy==1.15.3 PyWavelets==1.8.0 numpy==2.2.6
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import bm3d
import numpy as np

rng = np.random.default_rng(0)
side = 96
down, right = np.mgrid[:side, :side] / side
clean = 10 * np.sin(6 * right) * np.cos(5 * down)
noisy = clean + rng.standard_normal(clean.shape)
profile = bm3d.BM3DProfile()
profile.num_threads = 1
error = {"input": float(((noisy - clean) ** 2).mean())}
for name, told in {
    "deviation 1": 1.0,
    "map of deviations, 1": np.ones_like(clean),
    "spectrum, N": np.full_like(clean, clean.size),
}.items():
    error[name] = float(((bm3d.bm3d(noisy, told, profile) - clean) ** 2).mean())
for name, value in error.items():
    print(f"{name}: mean squared error {value:.3f}")
assert error["deviation 1"] < 0.1 and abs(error["spectrum, N"] - error["deviation 1"]) < 0.001, error
assert error["map of deviations, 1"] > 0.95 * error["input"], error
PYTHON
