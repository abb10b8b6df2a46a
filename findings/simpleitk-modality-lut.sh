#!/bin/sh
# SimpleITK applies RescaleSlope and RescaleIntercept, but passes over a Modality LUT Sequence without a word: it gives stored
# values. pydicom's `apply_modality_lut` applies whichever the data set has (PS3.3 C.11.1).
#
# Versions: SimpleITK 2.5.7, pydicom 3.0.2, numpy 2.2.6
# Seen on 2026-11-28, Python 3.11 (wheels exist for 3.10 to 3.13):
#   rescale: 1000 becomes 2010 by pydicom, 2010 by SimpleITK
#   table: 1000 becomes 6917 by pydicom, 1000 by SimpleITK
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
from pydicom.uid import SecondaryCaptureImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.pixels import apply_modality_lut

image = Dataset()
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
image.SOPClassUID, image.SOPInstanceUID, image.Modality = SecondaryCaptureImageStorage, generate_uid(), "MG"
stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
image.set_pixel_data(stored, "MONOCHROME2", 12, generate_instance_uid=False)


def read(name):
    image.save_as("a.dcm", enforce_file_format=True)
    by_pydicom = apply_modality_lut(stored, pydicom.dcmread("a.dcm"))
    by_itk = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("a.dcm"))[0]
    print(f"{name}: 1000 becomes {by_pydicom.flat[1000]:.0f} by pydicom, {by_itk.flat[1000]:.0f} by SimpleITK")
    return by_pydicom, by_itk


image.RescaleSlope, image.RescaleIntercept, image.RescaleType = "2", "10", "US"
by_pydicom, by_itk = read("rescale")
assert np.array_equal(by_pydicom, by_itk) and by_itk.flat[1000] == 2010

# A film digitiser's table from optical density, 0 to 4 in steps of 1/1024, to transmission.
del image.RescaleSlope, image.RescaleIntercept, image.RescaleType
table = Dataset()
table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], "US"
table.add_new("LUTData", "OW", np.rint(65535 * 10 ** (-np.arange(4096) / 1024)).astype("<u2").tobytes())
image.ModalityLUTSequence = [table]
by_pydicom, by_itk = read("table")
assert by_pydicom.flat[1000] == 6917 and np.array_equal(by_itk, stored)
PYTHON
