#!/bin/sh
# SimpleITK inverts MONOCHROME1 as it reads: v becomes 2^BitsStored - 1 - v. pydicom gives stored values. SimpleITK's metadata
# still say MONOCHROME1, so code that inverts by that tag inverts twice. (What the tag means: PS3.3 C.7.6.3.1.2.)
#
# Versions: SimpleITK 2.5.7, pydicom 3.0.2, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   MONOCHROME2 file, MONOCHROME2 in SimpleITK's metadata
#     pydicom: mean 100, variance 101
#     pydicom: mean 900, variance 973
#     SimpleITK: mean 100, variance 101
#     SimpleITK: mean 900, variance 973
#   MONOCHROME1 file, MONOCHROME1 in SimpleITK's metadata
#     pydicom: mean 100, variance 101
#     pydicom: mean 900, variance 973
#     SimpleITK: mean 3995, variance 101
#     SimpleITK: mean 3195, variance 973
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
from pydicom.uid import DigitalMammographyXRayImageStorageForProcessing, ExplicitVRLittleEndian, generate_uid

rng = np.random.default_rng(0)
quanta = rng.poisson(np.repeat([100, 900], 2048).reshape(64, 64)).astype(np.uint16)
image = Dataset()
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
image.SOPClassUID, image.SOPInstanceUID = DigitalMammographyXRayImageStorageForProcessing, generate_uid()
image.Modality, image.PresentationIntentType = "MG", "FOR PROCESSING"
image.PixelIntensityRelationship, image.PixelIntensityRelationshipSign = "LIN", 1
image.RescaleSlope, image.RescaleIntercept, image.RescaleType = "1", "0", "US"
for photometric in ("MONOCHROME2", "MONOCHROME1"):
    image.set_pixel_data(quanta, photometric, 12, generate_instance_uid=False)
    image.save_as("a.dcm", enforce_file_format=True)
    stored, read = pydicom.dcmread("a.dcm").pixel_array, SimpleITK.ReadImage("a.dcm")
    pixels = SimpleITK.GetArrayFromImage(read)[0]
    print(photometric, "file,", read.GetMetaData("0028|0004").strip(), "in SimpleITK's metadata")
    for name, values in (("pydicom", stored), ("SimpleITK", pixels)):
        for half in (values[:32], values[32:]):
            print(f"  {name}: mean {half.mean():.0f}, variance {half.var():.0f}")
    assert read.GetMetaData("0028|0004").strip() == photometric
    assert np.array_equal(stored, quanta)
    assert np.array_equal(pixels, 4095 - quanta if photometric == "MONOCHROME1" else quanta)
PYTHON
