#!/bin/sh
# Pillow rotates 16-bit images (mode I;16) with BILINEAR or BICUBIC byte by byte: of stored values from 1000 to 3520, none above
# 255 is left, without a warning. NEAREST is right, and so is `resize` with any filter. Mode F rotates rightly.
#
# Versions: pillow 12.2.0, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   mode I;16 stored values 1000 to 3520
#   NEAREST: rotate gives up to 3470, wrong by up to 0; resize by 0.0
#   BILINEAR: rotate gives up to 249, wrong by up to 2806; resize by 1.0
#   BICUBIC: rotate gives up to 255, wrong by up to 2815; resize by 1.0
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==12.2.0 numpy==2.2.6
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import numpy as np
from PIL import Image

down, right = np.mgrid[:64, :64]
ramp = (1000 + 30 * right + 10 * down).astype(np.uint16)
image, real = Image.fromarray(ramp), Image.fromarray(ramp.astype(np.float32))
inner = slice(16, 48)


def worst(turned, expected):
    return float(np.abs(np.asarray(turned, float)[inner, inner] - np.asarray(expected, float)[inner, inner]).max())


print("mode", image.mode, "stored values", ramp.min(), "to", ramp.max())
for name in ("NEAREST", "BILINEAR", "BICUBIC"):
    method = Image.Resampling[name]
    turned, expected = image.rotate(3, method), real.rotate(3, method)
    small = worst(image.resize((128, 128), method), real.resize((128, 128), method))
    print(f"{name}: rotate gives up to {np.asarray(turned).max()}, wrong by up to {worst(turned, expected):.0f}; resize by {small:.1f}")
    assert small <= 2
    if name == "NEAREST":
        assert worst(turned, expected) == 0
    else:
        assert np.asarray(turned).max() <= 255 and worst(turned, expected) > 1000
PYTHON
