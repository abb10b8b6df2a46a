"""Small CBIS-DDSM trees in both layouts, with the rows of the official case files of ten patients."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

# kind, half, patient, side, view, lesion, assessment, pathology, subtlety: all official rows of ten patients
ROWS = """
calc train P_00005 RIGHT CC 1 3 MALIGNANT 3
calc train P_00005 RIGHT MLO 1 3 MALIGNANT 3
calc train P_00016 LEFT CC 2 5 MALIGNANT 5
calc train P_00016 LEFT MLO 2 5 MALIGNANT 5
calc train P_00034 RIGHT CC 2 4 MALIGNANT 4
calc train P_00034 RIGHT MLO 2 4 MALIGNANT 4
calc train P_00208 RIGHT CC 1 4 BENIGN 4
calc train P_00208 RIGHT CC 2 4 BENIGN 5
calc train P_00208 RIGHT MLO 1 4 BENIGN 5
calc train P_00208 RIGHT MLO 2 4 BENIGN 4
calc train P_00394 LEFT MLO 1 2 BENIGN_WITHOUT_CALLBACK 5
calc train P_00394 LEFT MLO 2 2 BENIGN_WITHOUT_CALLBACK 5
calc test P_00038 LEFT CC 1 4 BENIGN 2
calc test P_00038 LEFT MLO 1 4 BENIGN 2
calc test P_00038 RIGHT CC 1 2 BENIGN_WITHOUT_CALLBACK 5
calc test P_00038 RIGHT CC 2 2 BENIGN_WITHOUT_CALLBACK 5
calc test P_00038 RIGHT MLO 1 2 BENIGN_WITHOUT_CALLBACK 5
calc test P_00038 RIGHT MLO 2 2 BENIGN_WITHOUT_CALLBACK 5
calc test P_00202 RIGHT CC 2 5 MALIGNANT 5
calc test P_00202 RIGHT MLO 2 5 MALIGNANT 5
calc test P_01502 LEFT CC 2 5 MALIGNANT 4
calc test P_01502 LEFT MLO 2 5 MALIGNANT 4
mass train P_00001 LEFT CC 1 4 MALIGNANT 4
mass train P_00001 LEFT MLO 1 4 MALIGNANT 4
mass train P_00009 RIGHT CC 1 4 MALIGNANT 4
mass train P_00009 RIGHT MLO 1 4 MALIGNANT 4
mass train P_00034 RIGHT CC 1 5 MALIGNANT 4
mass train P_00034 RIGHT MLO 1 5 MALIGNANT 4
mass train P_00208 RIGHT MLO 3 3 BENIGN 5
mass test P_00016 LEFT CC 1 5 MALIGNANT 5
mass test P_00016 LEFT MLO 1 5 MALIGNANT 5
mass test P_00202 RIGHT CC 1 5 MALIGNANT 5
mass test P_00202 RIGHT MLO 1 5 MALIGNANT 5
mass test P_00394 RIGHT MLO 1 2 BENIGN_WITHOUT_CALLBACK 4
mass test P_01502 LEFT CC 1 4 BENIGN 3
mass test P_01502 LEFT MLO 1 4 BENIGN 5
"""
PATIENTS = sorted(set(re.findall(r"P_\d+", ROWS)))


def uid(*key: object) -> str:
    """A UID that depends on `key` alone."""
    return "1.3.6.1.4.1.9590.100.1.2." + str(int(hashlib.md5(repr(key).encode()).hexdigest(), 16))


def own_case_files() -> dict[str, pd.DataFrame]:
    """The rows of `ROWS` in the columns of the official files, with line breaks in the paths of the crops."""
    files: dict[str, list[dict]] = {}
    for line in ROWS.split("\n")[1:-1]:
        kind, half, patient, side, view, lesion, assessment, pathology, subtlety = line.split()
        case = f"{kind.title()}-{'Training' if half == 'train' else 'Test'}_{patient}_{side}_{view}"
        crops = f"{case}_{lesion}/{uid(case, lesion)}/{uid(case, lesion, 'series')}"
        row = {
            "patient_id": patient,
            "breast density" if kind == "calc" else "breast_density": "3",
            "left or right breast": side,
            "image view": view,
            "abnormality id": lesion,
            "abnormality type": "calcification" if kind == "calc" else "mass",
            "assessment": assessment,
            "pathology": pathology,
            "subtlety": subtlety,
            "image file path": f"{case}/{uid(case)}/{uid(case, 'series')}/000000.dcm",
            "cropped image file path": f"{crops}/000000.dcm\n",
            "ROI mask file path": f"{crops}/000001.dcm",
        }
        files.setdefault(f"{kind}_case_description_{half}_set.csv", []).append(row)
    return {name: pd.DataFrame(rows) for name, rows in files.items()}


def write_case_files(folder: Path, case_files: dict[str, pd.DataFrame]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in case_files.items():
        table.to_csv(folder / name, index=False)


def image_paths(case_files: dict[str, pd.DataFrame]) -> tuple[list[str], list[str]]:
    """Distinct paths of mammograms and of their crops and masks."""
    tables = pd.concat(case_files.values())
    crops = pd.concat([tables["cropped image file path"], tables["ROI mask file path"]])
    return sorted(set(tables["image file path"].str.strip())), sorted(set(crops.str.strip()))


def breast(height: int = 160, width: int = 120) -> np.ndarray:
    """(H, W) uint16: half an ellipse with its chest wall on the left, background 0."""
    y, x = np.mgrid[-1 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (np.clip(1 - y**2 - (x / 0.8) ** 2, 0, 1) ** 0.5 * 50000).astype(np.uint16)


def write_dicom(path: Path, pixels: np.ndarray, case: str, description: str, inverted: bool = False) -> None:
    """A 16-bit uncompressed mammogram with the tags that TCIA's files have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pydicom.Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = uid(path.as_posix())
    image.StudyInstanceUID, image.SeriesInstanceUID = uid(case), uid(case, "series")
    image.Modality, image.PatientID, image.PatientName, image.SeriesDescription = "MG", case, case, description
    image.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    image.SamplesPerPixel, image.PixelRepresentation = 1, 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.Rows, image.Columns = pixels.shape
    image.PixelData = (65535 - pixels if inverted else pixels).astype("<u2").tobytes()
    image.save_as(path, enforce_file_format=True)


def write_tcia(base: Path, case_files: dict[str, pd.DataFrame], uid_folders: bool) -> None:
    """TCIA's layout below `base`, with folders named by UID or by NBIA's descriptions."""
    mammograms, crops = image_paths(case_files)
    for path, description in [(m, "full mammogram images") for m in mammograms] + [
        (c, "cropped images") for c in crops
    ]:
        case, study, series, _ = path.split("/")
        if not uid_folders:
            study, series = f"07-20-2016-DDSM-{case[-5:]}", f"1.000000-{description}-{series[-5:]}"
        pixels = breast() if description.startswith("full") else np.full((12, 10), 65535, np.uint16)
        write_dicom(base / case / study / series / "1-1.dcm", pixels, case, description)


def write_kaggle(base: Path, case_files: dict[str, pd.DataFrame]) -> None:
    """Kaggle's layout below `base`; every third mammogram and every other crop has no SeriesDescription."""
    mammograms, crops = image_paths(case_files)
    rows = []
    for i, path in enumerate(mammograms):
        rows.append((path, "full mammogram images" if i % 3 else None, breast()))
    for i, path in enumerate(crops):
        rows.append(
            (path, (None, "cropped images", None, "ROI mask images")[i % 4], np.full((12, 10), 65535, np.uint16))
        )
    info = []
    for number, (path, description, pixels) in enumerate(rows):
        case, _, series, _ = path.split("/")
        file = f"jpeg/{series}/1-{number:03d}.jpg"
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels >> 8).astype(np.uint8)).save(base / file, quality=95)
        info.append((f"CBIS-DDSM/{file}", series, description, case))
    info.reverse()
    columns = ["image_path", "SeriesInstanceUID", "SeriesDescription", "PatientID"]
    (base / "csv").mkdir(parents=True, exist_ok=True)
    pd.DataFrame(info, columns=columns).to_csv(base / "csv" / "dicom_info.csv", index=False)
