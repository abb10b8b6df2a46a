#!/bin/sh
# A grayscale TIFF whose 0 is white (PhotometricInterpretation 0) is inverted by depth: Pillow and OpenCV invert 8 bits and leave
# 16 bits as stored. tifffile inverts neither.
#
# Versions: pillow 12.2.0, opencv-python-headless 5.0.0.93, tifffile 2025.5.10, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   8 bits, Pillow: inverted
#   8 bits, OpenCV: inverted
#   8 bits, tifffile: as stored
#   16 bits, Pillow: as stored
#   16 bits, OpenCV: as stored
#   16 bits, tifffile: as stored
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==12.2.0 opencv-python-headless==5.0.0.93 tifffile==2025.5.10 numpy==2.2.6
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import cv2
import numpy as np
import tifffile
from PIL import Image

deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
seen = {}
for bits, stored in ((8, (deep >> 8).astype(np.uint8)), (16, deep)):
    tifffile.imwrite("a.tif", stored, photometric="miniswhite")
    readers = {
        "Pillow": np.asarray(Image.open("a.tif")),
        "OpenCV": cv2.imread("a.tif", cv2.IMREAD_UNCHANGED),
        "tifffile": tifffile.imread("a.tif"),
    }
    for name, read in readers.items():
        inverted = np.array_equal(read, np.iinfo(stored.dtype).max - stored)
        assert inverted or np.array_equal(read, stored)
        seen[name, bits] = inverted
        print(f"{bits} bits, {name}: {'inverted' if inverted else 'as stored'}")
assert [key for key, inverted in seen.items() if inverted] == [("Pillow", 8), ("OpenCV", 8)], seen
PYTHON
