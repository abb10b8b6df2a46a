#!/bin/sh
# Pillow and OpenCV scale 12-bit grayscale, 0 to 4095, in opposite formats. Pillow multiplies a PGM of maxval 4095 by 65535/4095
# and JPEG 2000 by 16, and leaves TIFF; OpenCV multiplies TIFF by 16, and leaves the others.
#
# Versions: pillow 12.2.0, opencv-python-headless 5.0.0.93, pylibjpeg-openjpeg 2.6.0, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   a.pgm 4095 comes back as 65535 from Pillow, 4095 from OpenCV
#   a.jp2 4095 comes back as 65520 from Pillow, 4095 from OpenCV
#   a.tif 4095 comes back as 4095 from Pillow, 65520 from OpenCV
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==12.2.0 opencv-python-headless==5.0.0.93 pylibjpeg-openjpeg==2.6.0 numpy==2.2.6
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import struct
from pathlib import Path

import cv2
import numpy as np
from openjpeg.utils import encode_array
from PIL import Image

values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
Path("a.pgm").write_bytes(b"P5 64 64 4095\n" + values.astype(">u2").tobytes())
Path("a.jp2").write_bytes(encode_array(values, bits_stored=12, photometric_interpretation=2, codec_format=1))

# A TIFF of 12 bits a sample: two samples in three bytes, high bits first.
first, second = values.ravel()[::2], values.ravel()[1::2]
packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
LONG, SHORT = 4, 3
tags = [
    (256, LONG, 64), (257, LONG, 64), (258, SHORT, 12), (259, SHORT, 1), (262, SHORT, 1), (273, LONG, 8),
    (277, SHORT, 1), (278, LONG, 64), (279, LONG, len(packed)),
]
entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
Path("a.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory)

greatest = {}
for name in ("a.pgm", "a.jp2", "a.tif"):
    by_pillow, by_opencv = np.asarray(Image.open(name)), cv2.imread(name, cv2.IMREAD_UNCHANGED)
    assert len(np.unique(by_pillow)) == len(np.unique(by_opencv)) == 4096
    greatest[name] = int(by_pillow.max()), int(by_opencv.max())
    print(name, "4095 comes back as", greatest[name][0], "from Pillow,", greatest[name][1], "from OpenCV")
assert greatest == {"a.pgm": (65535, 4095), "a.jp2": (65520, 4095), "a.tif": (4095, 65520)}, greatest
PYTHON
