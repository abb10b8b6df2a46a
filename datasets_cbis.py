"""CBIS-DDSM (Sawyer-Lee et al., 2016): the official case files joined with the mammograms found on disk.

One item per breast view. Two kinds of copy are recognised: TCIA's DICOM (16 bit), in whatever folders a downloader puts it, and
Kaggle's JPEG (8 bit).
"""

from __future__ import annotations

import itertools
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from files.dicom import dicom_tags, is_dicom
from files.prepared import Record
from files.splits import in_hash_order
from files.tables import read_table, refuse_escape
from helper import UserError, counted, explained
from hps import HParams
from loading.mammograms import RecordDataset

KINDS = ("calc", "mass")
HALVES = ("train", "test")
SEARCH_DEPTH = 2  # folders below the data root that are searched for case files and Kaggle's images
INFO_FILE = "dicom_info.csv"

# Columns of a case file that are read, and their names here.
CASE_COLUMNS = {
    "patient_id": "patient",
    "left or right breast": "side",
    "image view": "view",
    "image file path": "path",
    "abnormality type": "abnormality_type",
    "abnormality id": "lesion_id",
    "pathology": "pathology",
    "assessment": "assessment",
    "subtlety": "subtlety",
}
LESION_ENTRIES = ("abnormality_type", "pathology", "assessment", "subtlety", "lesion_id")
# Columns of a case file, if it has them, with the paths of what is no mammogram.
CROP_COLUMNS = ("cropped image file path", "ROI mask file path")
HEADER_TAGS = ("SeriesInstanceUID", "SeriesDescription", "PatientID", "Rows", "Columns")
INFO_COLUMNS = ("PatientID", "SeriesDescription", "image_path")

# A case folder; if a lesion's number ends its name, it holds crops and masks.
_CASE = re.compile(r"(?:Calc|Mass)-(?:Training|Test)_P_\d+_(?:LEFT|RIGHT)_(?:CC|MLO)(?P<lesion>_\d+)?")
_MAMMOGRAM = "full mammogram"  # in a SeriesDescription
_NO_MAMMOGRAM = re.compile(r"cropped|mask", re.IGNORECASE)


@dataclass
class Survey:
    """What lies at a data root."""

    tables: dict[str, Path] = field(default_factory=dict)  # CSV files by name
    dicoms: list[Path] = field(default_factory=list)  # DICOM files at any depth
    jpeg: Path | None = None  # Kaggle's image folder


class CBISDDSM(RecordDataset):
    """CBIS-DDSM with paired degradation; see `cbis_records` for the splits and the errors."""

    def __init__(self, root: Path, hps: HParams, split: str, seed: int = 0, strict: bool = False):
        records = cbis_records(Path(root), hps, strict).get(split, [])  # super refuses an unknown split
        super().__init__(records, hps, split, seed)


def cbis_records(
    root: Path, hps: HParams, strict: bool = False, images: Mapping[str, Path] | None = None
) -> dict[str, list[Record]]:
    """Records of CBIS-DDSM for "train", "validation" and "test", in the order of patient, side and view.

    `hps.abnormality` chooses the case files. With `hps.split` = "patient" an item is a breast view, and patients in both
    official halves keep only their test images; with "official" an item is a mammogram file, and the halves stay as they
    are. Validation is cut from the training half by patient. `images` maps case names to files instead of the disk.
    Missing images are reported and left out.

    Raises UserError for a missing folder, case file or column, case files without rows, a path that leads out of the
    root, a root with neither layout or no image at all, and with `strict` for any missing image.
    """
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds CBIS-DDSM and its case files")
    survey = survey_root(root)
    rows = read_case_files(root, survey.tables, hps.abnormality)
    if rows.empty:
        raise UserError(f"--data-root {root}: its case files hold no rows; download them again")
    by_file = hps.split == "official"
    if not by_file and (shared := shared_patients(rows)):
        dropped = rows[(rows["half"] == "train") & rows["patient"].isin(shared)]["case"].nunique()
        print(
            f"{root}: left out {counted(dropped, 'training image')} of {counted(len(shared), 'patient')} in both official halves"
        )
    views = list(select_views(rows, by_file))
    if images is None:
        images = locate_images(root, survey, rows)
    records, missing = {half: [] for half in HALVES}, []
    for half, patient, cases, info in views:
        path = next((images[case] for case in cases if case in images), None)
        if path is None:
            missing.append(cases[0])
        else:
            records[half].append(Record(path, path.relative_to(root).as_posix(), patient, info=info))
    if missing:
        named = f"{len(missing):,} of {counted(len(views), 'mammogram')} missing, such as {', '.join(missing[:3])}"
        if strict or len(missing) == len(views):
            raise UserError(f"--data-root {root}: {named}; download them, or name the folder that holds them")
        print(f"{root}: {named}")
    train, validation = cut_validation(records["train"], hps.validation_fraction)
    return {"train": train, "validation": validation, "test": records["test"]}


def cut_validation(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Split into (train, validation) by patient, in the order of a hash, at least one patient in either.

    A lone patient stays in train.
    """
    patients = in_hash_order(record.patient for record in records)
    chosen = patients[: min(max(1, round(fraction * len(patients))), max(0, len(patients) - 1))]
    return [r for r in records if r.patient not in chosen], [r for r in records if r.patient in chosen]


# --- case files ------------------------------------------------------------------------------------------------------


def read_case_files(root: Path, tables: Mapping[str, Path], abnormality: str) -> pd.DataFrame:
    """Rows of the official case files, one a lesion: the values of `CASE_COLUMNS`, `half`, `case`, `series` and `crops`.

    `series` is the mammogram's SeriesInstanceUID, `crops` is those of the lesion's crop and mask, parted by spaces.

    `tables` maps file names to paths, `abnormality` is "all", "mass" or "calc". Raises UserError for a missing file or
    column, a path that leads out of the root, or a path that is not a mammogram's.
    """
    parts = []
    for kind, half in itertools.product(KINDS if abnormality == "all" else (abnormality,), HALVES):
        name = f"{kind}_case_description_{half}_set.csv"
        if name not in tables:
            other = f", or set --hps abnormality={KINDS[kind == 'calc']}" if abnormality == "all" else ""
            raise UserError(
                f"--data-root {root}: no {name} in it or up to {SEARCH_DEPTH} folders below; put it there{other}"
            )
        table = read_table(tables[name], CASE_COLUMNS, "download the file again")
        # the official files have line breaks inside quoted paths
        table = table.apply(lambda values: values.str.replace(r"[\r\n]", "", regex=True))
        crops = table.reindex(columns=CROP_COLUMNS, fill_value="").itertuples(index=False)
        part = table[list(CASE_COLUMNS)].rename(columns=CASE_COLUMNS)
        cases = [_case_of(path, tables[name]) for path in part["path"]]
        crops = [" ".join(map(_series_of, paths)) for paths in crops]
        parts.append(part.assign(half=half, case=cases, series=[*map(_series_of, part["path"])], crops=crops))
    return pd.concat(parts, ignore_index=True)


def shared_patients(rows: pd.DataFrame) -> set[str]:
    """Patients in both official halves of the rows."""
    train = rows["half"] == "train"
    return set(rows["patient"][train]) & set(rows["patient"][~train])


def select_views(rows: pd.DataFrame, by_file: bool = False) -> Iterator[tuple[str, str, list[str], dict[str, Any]]]:
    """The mammograms of the rows, in the order of patient, side and view: half, patient, cases, and what is known of it.

    Any image of the cases will do. There is one mammogram a breast view, without the training images of patients in both
    halves; a test view keeps the lesions that the training half describes. With `by_file` there is one a file, and the
    halves stay as they are.
    """
    shared = set() if by_file else shared_patients(rows)
    key = operator.itemgetter("patient", "side", "view", *(["case"] if by_file else []))
    for (patient, side, view, *_), group in itertools.groupby(sorted(rows.to_dict("records"), key=key), key):
        group = list(group)
        half = "test" if any(row["half"] == "test" for row in group) else "train"
        if half == "test" or patient not in shared:
            cases = sorted({row["case"] for row in group if row["half"] == half})
            lesions = [
                {name: int(row[name]) if row[name].isdecimal() else row[name] for name in LESION_ENTRIES}
                for row in group
            ]
            yield half, patient, cases, {"side": side, "view": view, "lesions": lesions}


def _case_of(value: str, file: Path) -> str:
    """Case name of a mammogram's path in a case file, CASE/study/series/name."""
    refuse_escape(value, file)
    match = _CASE.fullmatch(value.split("/")[0])
    if match is None or match["lesion"]:
        raise UserError(f"{file}: {value!r} is not the path of a full mammogram; download the file again")
    return match[0]


def _series_of(value: str) -> str:
    """SeriesInstanceUID in a path CASE/study/series/name of a case file, empty if there is none."""
    return (value.split("/") + [""] * 3)[2]


# --- images ----------------------------------------------------------------------------------------------------------


def survey_root(root: Path) -> Survey:
    """Look for DICOM files in `root` and below, and for CSV files and Kaggle's `jpeg` up to two folders below.

    What lies higher, and then earlier in the alphabet, comes first. Hidden entries and folders that cannot be read are
    skipped. Raises UserError if the root cannot be read.
    """
    found, folders, seen, depth = Survey(), [root], {root.resolve()}, 0
    while folders:
        below = []
        for entry in (entry for folder in folders for entry in _entries(folder, root)):
            path = Path(entry.path)
            if entry.is_dir():
                if entry.name == "jpeg" and depth <= SEARCH_DEPTH:
                    found.jpeg = found.jpeg or path
                elif (place := path.resolve()) not in seen:  # links may go round
                    seen.add(place)
                    below.append(path)
            elif path.suffix == ".csv":
                if depth <= SEARCH_DEPTH:
                    found.tables.setdefault(entry.name, path)
            elif entry.is_file() and is_dicom(path):
                found.dicoms.append(path)
        folders, depth = below, depth + 1
    return found


def _entries(folder: Path, root: Path) -> list[os.DirEntry]:
    try:
        with explained(f"--data-root {root}: cannot be read", "check its permissions"), os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except UserError:
        if folder == root:
            raise
        return []  # such as lost+found at the top of a disk


def locate_images(root: Path, survey: Survey, rows: pd.DataFrame) -> dict[str, Path]:
    """Files of the mammograms of the rows' cases, as far as they exist; DICOM if both copies lie at the root.

    Raises UserError if neither does.
    """
    if images := dicom_images(root, survey.dicoms, rows):
        return images
    if survey.jpeg is not None and INFO_FILE in survey.tables:
        return jpeg_images(survey.tables[INFO_FILE], survey.jpeg, set(rows["case"]))
    raise UserError(
        f"--data-root {root}: neither DICOM files of the cases, in folders such as CBIS-DDSM/Mass-Training_P_00001_LEFT_CC "
        f"or one a series (TCIA), nor jpeg/ with csv/{INFO_FILE} (Kaggle) lie there; name the folder that holds CBIS-DDSM"
    )


def dicom_images(root: Path, paths: Sequence[Path], rows: pd.DataFrame) -> dict[str, Path]:
    """TCIA's files, in whatever folders: of each case of the rows the first that is sure to be its mammogram.

    A file's series tells, else the case that its folder or PatientID names, unless a folder, SeriesDescription or
    SeriesInstanceUID says crop or mask. Of files that are as sure, the largest comes first.
    """
    series = dict(zip(rows["series"], rows["case"], strict=True)) | dict.fromkeys(" ".join(rows["crops"]).split(), "")
    series.pop("", None)
    cases, best = set(rows["case"]), dict[str, tuple[tuple[int, int], Path]]()
    in_folder = Counter(path.parent for path in paths)
    for path in paths:
        case, doubt = _mammogram_at(path, path.relative_to(root).parts, series, in_folder[path.parent] == 1)
        if case in cases and (case not in best or doubt < best[case][0]):
            best[case] = doubt, path
    return {case: path for case, (_, path) in best.items()}


def _mammogram_at(
    path: Path, parts: Sequence[str], series: Mapping[str, str], is_alone: bool
) -> tuple[str, tuple[int, int]]:
    """The case whose mammogram a DICOM file is, empty if it is none, and how doubtful that is: a rank, less its pixels.

    `series` maps the official series to their cases, those of crops and masks to nothing. Only the folder of a file that
    `is_alone` in it makes its header needless.
    """
    folder, none = path.parent.name, ("", (0, 0))
    named = next((match for part in (*parts[-2::-1], path.stem) if (match := _CASE.fullmatch(part))), None)
    if _NO_MAMMOGRAM.search(folder) or (named and named["lesion"]):
        return none
    if is_alone and folder in series:
        return series[folder], (0, 0)
    if is_alone and named and _MAMMOGRAM in folder.lower():
        return named[0], (0, 0)
    try:
        own, description, patient, *sides = dicom_tags(path, *HEADER_TAGS)
    except Exception:  # noqa: BLE001  what cannot be read is reported when it is loaded
        return (named[0], (3, 0)) if named else none
    owner = _CASE.fullmatch(patient)
    if _NO_MAMMOGRAM.search(description) or (owner and owner["lesion"]):
        return none
    pixels = math.prod(int(side) for side in sides if side.isdecimal())
    for name in (own, folder, path.stem, path.name):
        if name in series:
            return series[name], (1, -pixels)
    named = named or owner
    return (named[0], (1 if _MAMMOGRAM in description.lower() else 2, -pixels)) if named else none


def jpeg_images(info: Path, folder: Path, cases: Iterable[str]) -> dict[str, Path]:
    """Kaggle's layout: the file that `info` (dicom_info.csv) names for a case, below the folder that holds `folder`.

    A series without a description is a mammogram if its case name has no lesion number. Raises UserError for a missing
    column, or a path that leads out of the root.
    """
    table = read_table(info, INFO_COLUMNS, "download the file again")
    for value in table["image_path"]:
        refuse_escape(value, info)
    described = table["SeriesDescription"].str.lower()
    table = table[table["PatientID"].isin(set(cases)) & described.isin((_MAMMOGRAM + " images", ""))]
    images: dict[str, Path] = {}
    # described series come before those without a description
    for row in table.sort_values(["SeriesDescription", "image_path"], ascending=[False, True]).to_dict("records"):
        path = folder.parent / row["image_path"].removeprefix("CBIS-DDSM/")
        if row["PatientID"] not in images and path.is_file():
            images[row["PatientID"]] = path
    return images
