#!/bin/sh
# scipy.ndimage's filters keep an integer type and cut fractions off, a separable one once an axis: a flat field of uint16 is
# darker by 1 stored value after a Gaussian. Its interpolation (`zoom`) rounds, and so does OpenCV's filter.
#
# Versions: scipy 1.15.3, opencv-python-headless 5.0.0.93, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   gaussian_filter: uint16, mean off by -1.00
#   uniform_filter: uint16, mean off by -0.80
#   convolve: uint16, mean off by -0.49
#   zoom: uint16, mean off by -0.00
#   cv2.GaussianBlur: uint16, mean off by -0.00
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check scipy==1.15.3 opencv-python-headless==5.0.0.93 numpy==2.2.6
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import cv2
import numpy as np
from scipy import ndimage

rng = np.random.default_rng(0)
flat = rng.poisson(400, (512, 512)).astype(np.uint16)
filters = {
    "gaussian_filter": lambda image: ndimage.gaussian_filter(image, 2),
    "uniform_filter": lambda image: ndimage.uniform_filter(image, 5),
    "convolve": lambda image: ndimage.convolve(image, np.full((5, 5), 1 / 25)),
    "zoom": lambda image: ndimage.zoom(image, 0.5, order=1),
    "cv2.GaussianBlur": lambda image: cv2.GaussianBlur(image, (0, 0), 2),
}
shift = {}
for name, smooth in filters.items():
    whole, real = smooth(flat), smooth(flat.astype(np.float64))
    shift[name] = float((whole - real).mean())
    print(f"{name}: {whole.dtype}, mean off by {shift[name]:+.2f}")
expected = {"gaussian_filter": -1.0, "uniform_filter": -0.8, "convolve": -0.48, "zoom": 0, "cv2.GaussianBlur": 0}
assert all(abs(shift[name] - value) < 0.02 for name, value in expected.items()), shift
PYTHON
