"""CBIS-DDSM (Sawyer-Lee et al., 2016): the official case files joined with the mammograms found on disk.

One item per breast view. Either of two layouts is found by looking: TCIA's DICOM (16 bit) or Kaggle's JPEG (8 bit).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from files.prepared import Record
from files.splits import refuse_escape
from helper import UserError, seed_of
from hps import HParams
from loading.mammograms import RecordDataset

KINDS = ("calc", "mass")
HALVES = ("train", "test")
SEARCH_DEPTH = 2  # folders below the data root in which case files and case folders may lie
INFO_FILE = "dicom_info.csv"

# Columns of a case file that are read, and what they are called here.
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
INFO_COLUMNS = ("PatientID", "SeriesDescription", "image_path")

# A case folder; with a lesion's number at its end it holds crops and masks.
_CASE = re.compile(r"(?:Calc|Mass)-(?:Training|Test)_P_\d+_(?:LEFT|RIGHT)_(?:CC|MLO)(?P<lesion>_\d+)?")
_NO_MAMMOGRAM = re.compile(r"cropped|mask", re.IGNORECASE)


@dataclass
class Survey:
    """What lies at a data root."""

    tables: dict[str, Path] = field(default_factory=dict)  # CSV files by name
    cases: dict[str, list[Path]] = field(default_factory=dict)  # case folders by name
    jpeg: Path | None = None  # Kaggle's image folder


@dataclass(frozen=True)
class View:
    """One mammogram that the case files describe."""

    half: str  # "train" or "test": the official half it belongs to
    patient: str
    side: str
    view: str
    cases: tuple[str, ...]  # case names of its image files; any of them will do
    lesions: tuple[dict[str, Any], ...]


class CBISDDSM(RecordDataset):
    """CBIS-DDSM dataset class with paired degradation; see `cbis_records` for the splits and what is raised."""

    def __init__(self, root: Path, hps: HParams, split: str, seed: int = 0, strict: bool = False):
        records = cbis_records(Path(root), hps, strict).get(split, [])  # super refuses an unknown split
        super().__init__(records, hps, split, seed)


def cbis_records(
    root: Path, hps: HParams, strict: bool = False, images: Mapping[str, Path] | None = None
) -> dict[str, list[Record]]:
    """Records of CBIS-DDSM for "train", "validation" and "test", in the order of patient, side and view.

    `hps.abnormality` chooses the case files. With `hps.split` = "patient" an item is a breast view, and patients that
    stand in both official halves keep their test images alone; with "official" an item is a mammogram file and the
    halves stay as they are. Validation is cut from the training half by patient. `images` maps case names to files in
    place of a look at the disk. Missing images are reported and left out.

    Raises UserError for a missing folder, case file or column, case files without rows, a path that leads out of the
    root, a root with neither layout or no image at all, and with `strict` for any missing image.
    """
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds CBIS-DDSM and its case files")
    survey = survey_root(root)
    rows = read_case_files(root, survey.tables, hps.abnormality)
    views = select_views(rows, by_file=hps.split == "official")
    if not views:
        raise UserError(f"--data-root {root}: its case files hold no rows; download them again")
    if hps.split == "patient" and (shared := shared_patients(rows)):
        dropped = rows[(rows["half"] == "train") & rows["patient"].isin(shared)]["case"].nunique()
        print(f"{root}: left out {dropped} training images of {len(shared)} patients in both official halves")
    if images is None:
        images = locate_images(root, survey, {case for view in views for case in view.cases})
    records, missing = {half: [] for half in HALVES}, []
    for view in views:
        path = next((images[case] for case in view.cases if case in images), None)
        if path is None:
            missing.append(view.cases[0])
            continue
        info = {"side": view.side, "view": view.view, "lesions": list(view.lesions)}
        records[view.half].append(Record(path, path.relative_to(root).as_posix(), view.patient, info=info))
    _report_missing(root, missing, len(views), strict)
    train, validation = cut_validation(records["train"], hps.validation_fraction)
    return {"train": train, "validation": validation, "test": records["test"]}


def _report_missing(root: Path, missing: list[str], total: int, strict: bool) -> None:
    """Say how many of `total` mammograms are missing; raises UserError where none is left, or for any with `strict`."""
    if not missing:
        return
    named = f"{len(missing):,} of {total:,} mammograms are missing, such as {', '.join(missing[:3])}"
    if strict or len(missing) == total:
        raise UserError(f"--data-root {root}: {named}; download them, or name the folder that holds them")
    print(f"{root}: {named}")


def cut_validation(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Cut `fraction` of the patients off: (train, validation), deterministic, at least one patient in either.

    A lone patient stays in train.
    """
    patients = sorted({r.patient for r in records}, key=lambda patient: (seed_of("split", patient), patient))
    chosen = set(patients[: min(max(1, round(fraction * len(patients))), max(0, len(patients) - 1))])
    return [r for r in records if r.patient not in chosen], [r for r in records if r.patient in chosen]


# --- case files ------------------------------------------------------------------------------------------------------


def read_case_files(root: Path, tables: Mapping[str, Path], abnormality: str) -> pd.DataFrame:
    """Rows of the official case files, one a lesion: the values of `CASE_COLUMNS`, `half` and `case`.

    `tables` maps file names to paths, `abnormality` is "all", "mass" or "calc". Raises UserError for a missing file or
    column, a path that leads out of the root, or one that is not a mammogram's.
    """
    parts = []
    for kind in KINDS if abnormality == "all" else (abnormality,):
        for half in HALVES:
            name = f"{kind}_case_description_{half}_set.csv"
            if name not in tables:
                other = f", or set --hps abnormality={KINDS[kind == 'calc']}" if abnormality == "all" else ""
                raise UserError(
                    f"--data-root {root}: no {name} in it or up to {SEARCH_DEPTH} folders below; put it there{other}"
                )
            part = _read_table(tables[name], CASE_COLUMNS).rename(columns=CASE_COLUMNS)
            part["case"] = [_case_of(value, tables[name]) for value in part["path"]]
            parts.append(part.assign(half=half))
    return pd.concat(parts, ignore_index=True)


def shared_patients(rows: pd.DataFrame) -> set[str]:
    """Patients that stand in both official halves of the rows."""
    train = rows["half"] == "train"
    return set(rows["patient"][train]) & set(rows["patient"][~train])


def select_views(rows: pd.DataFrame, by_file: bool = False) -> list[View]:
    """The mammograms of the rows, in the order of patient, side and view, each with its lesions.

    One a breast view, without the training images of patients that stand in both halves; what the training half says of
    the lesions in a test view is kept. With `by_file` one a file, as the halves stand.
    """
    shared = set() if by_file else shared_patients(rows)
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows.to_dict("records"):
        key = (row["patient"], row["side"], row["view"], row["case"] if by_file else "")
        groups.setdefault(key, []).append(row)
    views = []
    for (patient, side, view, _), group in sorted(groups.items()):
        half = "test" if any(row["half"] == "test" for row in group) else "train"
        if half == "train" and patient in shared:
            continue
        cases = sorted({row["case"] for row in group if row["half"] == half})
        lesions = tuple({entry: _number(row[entry]) for entry in LESION_ENTRIES} for row in group)
        views.append(View(half, patient, side, view, tuple(cases), lesions))
    return views


def _read_table(path: Path, columns: Collection[str]) -> pd.DataFrame:
    """The named columns of a CSV file as text, empty where a value is missing; raises UserError without one of them."""
    try:
        table = pd.read_csv(path, dtype=str)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: not a readable CSV file ({str(error).splitlines()[0]}); download it again") from None
    for column in columns:
        if column not in table:
            raise UserError(f"{path}: has no column {column!r}; download the file again")
    # line breaks stand inside quoted paths of the official files
    table = table[list(columns)].fillna("")
    return table.apply(lambda values: values.str.replace(r"[\r\n]", "", regex=True).str.strip())


def _case_of(value: str, file: Path) -> str:
    """Case name of a mammogram's path in a case file, CASE/study/series/name."""
    refuse_escape(value, file)
    case = value.split("/")[0]
    match = _CASE.fullmatch(case)
    if match is None or match["lesion"]:
        raise UserError(f"{file}: {value!r} is not the path of a full mammogram; download the file again")
    return case


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


# --- images ----------------------------------------------------------------------------------------------------------


def survey_root(root: Path) -> Survey:
    """Look for CSV files, case folders and Kaggle's `jpeg` in `root` and up to two folders below, once a folder.

    What lies higher, and then earlier in the alphabet, comes first; hidden entries and folders that cannot be read are
    passed over. Raises UserError for a root that cannot be read.
    """
    found = Survey()
    level = [root]
    for _ in range(SEARCH_DEPTH + 1):
        below = []
        for entry in (entry for folder in level for entry in _entries(folder, root)):
            path = Path(entry.path)
            if not entry.is_dir():
                if path.suffix == ".csv":
                    found.tables.setdefault(entry.name, path)
            elif _CASE.fullmatch(entry.name):
                found.cases.setdefault(entry.name, []).append(path)
            elif entry.name == "jpeg":
                found.jpeg = found.jpeg or path
            else:
                below.append(path)
        level = below
    return found


def _entries(folder: Path, root: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        if folder == root:
            raise UserError(f"--data-root {root}: cannot be read ({error.strerror}); check its permissions") from None
        return []  # such as lost+found at the top of a disk


def locate_images(root: Path, survey: Survey, cases: Iterable[str]) -> dict[str, Path]:
    """Files of the named cases' mammograms, where there are any; DICOM where both layouts lie at the root.

    Raises UserError where neither does.
    """
    if survey.cases:
        return dicom_images(survey.cases, cases)
    if survey.jpeg is not None and INFO_FILE in survey.tables:
        return jpeg_images(survey.tables[INFO_FILE], survey.jpeg, cases)
    raise UserError(
        f"--data-root {root}: neither case folders such as CBIS-DDSM/Mass-Training_P_00001_LEFT_CC (TCIA) nor jpeg/ "
        f"with csv/{INFO_FILE} (Kaggle) lie there; name the folder that holds CBIS-DDSM"
    )


def dicom_images(folders: Mapping[str, list[Path]], cases: Iterable[str]) -> dict[str, Path]:
    """TCIA's layout: the first `.dcm` file in CASE/study/series/, whatever the two folders are called."""
    images = {}
    for case in cases:
        paths = sorted(path for folder in folders.get(case, []) for path in folder.glob("*/*/[!.]*.dcm"))
        path = next((p for p in paths if not _NO_MAMMOGRAM.search(p.parent.name) and p.is_file()), None)
        if path is not None:
            images[case] = path
    return images


def jpeg_images(info: Path, folder: Path, cases: Iterable[str]) -> dict[str, Path]:
    """Kaggle's layout: the file that `info` (dicom_info.csv) names for a case, below the folder that holds `folder`.

    A series without a description is a mammogram if its case name has no lesion number. Raises UserError for a missing
    column, or a path that leads out of the root.
    """
    table = _read_table(info, INFO_COLUMNS)
    for value in table["image_path"]:
        refuse_escape(value, info)
    described = table["SeriesDescription"].str.lower()
    table = table[table["PatientID"].isin(set(cases)) & described.isin(("full mammogram images", ""))]
    images: dict[str, Path] = {}
    # described series come before those without a description
    for row in table.sort_values(["SeriesDescription", "image_path"], ascending=[False, True]).to_dict("records"):
        path = folder.parent / row["image_path"].removeprefix("CBIS-DDSM/")
        if row["PatientID"] not in images and path.is_file():
            images[row["PatientID"]] = path
    return images
