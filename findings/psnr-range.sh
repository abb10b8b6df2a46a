#!/bin/sh
# scikit-image's `peak_signal_noise_ratio` takes the peak from the type and sign of the true image, without a warning: for floats
# 1, or 2 if one of its pixels is below 0, which adds 6.02 dB; for uint16 65535, which adds 24.08 dB to 12-bit data.
#
# Versions: scikit-image 0.25.2, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   floats from 0 on: 26.03 dB; one pixel at -0.000001: 32.05 dB
#   12 bits in uint16: 50.25 dB; with data_range=4095: 26.17 dB
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check scikit-image==0.25.2 numpy==2.2.6
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import warnings

import numpy as np
from skimage.metrics import peak_signal_noise_ratio

warnings.simplefilter("error")
rng = np.random.default_rng(0)
clean = np.tile(np.linspace(0, 0.8, 256), (256, 1))
noisy = clean + 0.05 * rng.standard_normal(clean.shape)
below = clean.copy()
below[0, 0] = -1e-6
deep, deep_noisy = (np.rint(4095 * image.clip(0, 1)).astype(np.uint16) for image in (clean, noisy))

plain, one = peak_signal_noise_ratio(clean, noisy), peak_signal_noise_ratio(below, noisy)
print(f"floats from 0 on: {plain:.2f} dB; one pixel at -0.000001: {one:.2f} dB")
guessed, told = peak_signal_noise_ratio(deep, deep_noisy), peak_signal_noise_ratio(deep, deep_noisy, data_range=4095)
print(f"12 bits in uint16: {guessed:.2f} dB; with data_range=4095: {told:.2f} dB")
assert abs(one - plain - 20 * np.log10(2)) < 0.001
assert abs(guessed - told - 20 * np.log10(65535 / 4095)) < 0.001
PYTHON
