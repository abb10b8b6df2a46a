#!/bin/sh
# SimpleITK takes the spacing of a mammogram from ImagerPixelSpacing, at the detector, although PixelSpacing, calibrated for the
# geometry, tells that in the breast. In a magnification view lengths come out 1.8 times too long. Of a secondary capture it
# takes PixelSpacing.
#
# Versions: SimpleITK 2.5.7, pydicom 3.0.2, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   mammogram: (0.09, 0.09) mm by SimpleITK; PixelSpacing [0.05, 0.05]
#   secondary capture: (0.05, 0.05) mm by SimpleITK; PixelSpacing [0.05, 0.05]
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check SimpleITK==2.5.7 pydicom==3.0.2 numpy==2.2.6
cd "$dir"
"$dir/venv/bin/python" - <<'PYTHON'
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    DigitalMammographyXRayImageStorageForProcessing,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

image = Dataset()
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
image.SOPClassUID, image.SOPInstanceUID, image.Modality = DigitalMammographyXRayImageStorageForProcessing, generate_uid(), "MG"
image.set_pixel_data(np.zeros((64, 64), np.uint16), "MONOCHROME2", 12, generate_instance_uid=False)
image.EstimatedRadiographicMagnificationFactor = "1.8"
image.ImagerPixelSpacing, image.PixelSpacing = ["0.09", "0.09"], ["0.05", "0.05"]
image.PixelSpacingCalibrationType = "GEOMETRY"
spacings = {}
for name, kind in (("mammogram", image.SOPClassUID), ("secondary capture", SecondaryCaptureImageStorage)):
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = kind
    image.save_as("a.dcm", enforce_file_format=True)
    spacings[name] = SimpleITK.ReadImage("a.dcm").GetSpacing()[:2]
    print(f"{name}: {spacings[name]} mm by SimpleITK; PixelSpacing {pydicom.dcmread('a.dcm').PixelSpacing}")
assert spacings == {"mammogram": (0.09, 0.09), "secondary capture": (0.05, 0.05)}, spacings
PYTHON
