"""Patients, and the split that each belongs to."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from files.images import dicom_tag, find_images, is_dicom
from files.prepared import Record
from helper import UserError, reason_of, seed_of
from hps import HParams

SPLITS = ("train", "validation", "test")
# Words of a file name that name the view, not the patient.
_VIEW_WORDS = re.compile(r"(?i)(?<![a-z])(left|right|l|r|cc|mlo|ml|lm|xccl|lcc|rcc|lmlo|rmlo|full|low|mask)(?![a-z])")


def patient_of(path: Path, root: Path, pattern: str = "") -> str:
    """The patient of an image below `root`: DICOM PatientID, or a part of its name.

    With `pattern`, the first group of that regular expression on the path below `root`. Without, the name less the words for
    side and view (LEFT, R, CC, MLO ...). mini-MIAS names (mdb001 ...) go by pair: an odd number and the next even one are the
    two breasts of a patient. Raises UserError if the pattern does not match.
    """
    name = path.relative_to(root)
    if pattern:
        try:
            match = re.search(pattern, name.as_posix())
        except re.error as error:
            raise UserError(f"--hps patient_pattern={pattern}: not a regular expression ({error})") from None
        if match is None or not match.groups() or match[1] is None:
            raise UserError(f"--hps patient_pattern={pattern}: its first group matches nothing in {name.as_posix()}")
        return match[1]
    if is_dicom(path):
        with contextlib.suppress(
            Exception
        ):  # an unreadable file is reported when it is loaded; until then its name serves
            if patient := dicom_tag(path, "PatientID"):
                return patient
    if match := re.fullmatch(r"mdb(\d{3})", path.stem):
        return f"mdb pair {(int(match[1]) + 1) // 2:03d}"
    # if a name only names a view, the folder above it names the patient
    for part in (path.stem, *reversed(name.parts[:-1])):
        if patient := re.sub(r"[\W_]+", " ", _VIEW_WORDS.sub(" ", part.replace("_", " "))).strip():
            return patient
    return path.stem


def in_hash_order(patients: Iterable[str]) -> list[str]:
    """The patients, each once, in an order that looks random but never changes."""
    return sorted(set(patients), key=lambda patient: (seed_of("split", patient), patient))


def split_patients(patients: Sequence[str], validation: float, test: float) -> dict[str, str]:
    """Patient to split, in the order of a hash, at least one patient in every split.

    Raises UserError if there are fewer than three patients.
    """
    unique = in_hash_order(patients)
    if len(unique) < 3:
        raise UserError(
            f"--data-root: {len(unique)} patients are too few for train, validation and test; "
            "add images or set --hps patient_pattern"
        )
    n_test = min(max(1, round(test * len(unique))), len(unique) - 2)
    n_validation = min(max(1, round(validation * len(unique))), len(unique) - n_test - 1)
    names = ["test"] * n_test + ["validation"] * n_validation + ["train"] * (len(unique) - n_test - n_validation)
    return dict(zip(unique, names, strict=True))


def check_root(root: Path | None, task: str) -> Path:
    """The folder of a task's images; raises UserError if it is not given or does not exist."""
    if root is None:
        raise UserError(f"--task {task} needs --data-root DIR, a folder of mammograms")
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds the images of task {task}")
    return root


def folder_records(root: Path, hps: HParams) -> dict[str, list[Record]]:
    """Records of each split of a folder of mammograms; `low/` and `full/` with equal names make real pairs.

    Raises UserError if the folder is empty, a pair lacks one half, or a split file does not fit.
    """
    halves = {p.name.lower(): p for p in root.iterdir() if p.is_dir() and p.name.lower() in ("full", "low")}
    if len(halves) == 1:
        raise UserError(f"{next(iter(halves.values()))}: stands alone; real pairs need both full/ and low/ in {root}")
    base, low = halves.get("full", root), {}
    if halves:
        low = {path.relative_to(halves["low"]).with_suffix(""): path for path in find_images(halves["low"])}
    records = []
    for path in find_images(base):
        name = path.relative_to(base)
        degraded = low.pop(name.with_suffix(""), None)
        if halves and degraded is None:
            raise UserError(f"{path}: has no low-dose image of the same name in {halves['low']}")
        records.append(Record(path, name.as_posix(), patient_of(path, base, hps.patient_pattern), degraded))
    if low:
        raise UserError(f"{next(iter(low.values()))}: has no full-dose image of the same name in {base}")
    split_csv = Path(hps.split_csv) if hps.split_csv else root / "split.csv"
    if hps.split_csv or split_csv.is_file():
        return split_by_file(records, split_csv)
    of_patient = split_patients([r.patient for r in records], hps.validation_fraction, hps.test_fraction)
    return {split: [r for r in records if of_patient[r.patient] == split] for split in SPLITS}


def refuse_escape(value: str, file: Path) -> None:
    """Raise UserError if a path in `file` is absolute or climbs: it could lead out of the data root.

    Links below the root may lead anywhere: whoever made them chose to.
    """
    if re.match(r"[/\\]|[A-Za-z]:", value) or ".." in re.split(r"[/\\]", value):
        raise UserError(f"{file}: the path {value!r} leads out of the data root; mend or download the file again")


def read_table(path: Path, columns: Collection[str], remedy: str) -> pd.DataFrame:
    """A CSV file as stripped text, empty if a value is missing; raises UserError, with the `remedy`, if it lacks a column."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: not a readable CSV file ({reason_of(error)}); {remedy}") from None
    for column in columns:
        if column not in table:
            raise UserError(f"{path}: has no column {column!r}; {remedy}")
    return table.apply(lambda values: values.str.strip())


def split_by_file(records: list[Record], path: Path) -> dict[str, list[Record]]:
    """Assign records by a CSV with columns file, split and optionally patient; a file may be named without its suffix.

    Records that are not in it are left out, and their number is printed. Raises UserError if the file does not fit.
    """
    if not path.is_file():  # a checkpoint could name a device or a pipe, which never ends
        raise UserError(f"--hps split_csv={path}: no such file")
    table = read_table(path, ("file", "split"), "it needs the columns file and split, and may have patient")
    if unknown := sorted(set(table["split"]) - set(SPLITS)):
        raise UserError(f"{path}: split {unknown[0]!r} is none of {', '.join(SPLITS)}")
    for name in table["file"]:
        refuse_escape(name, path)
    if twice := list(table["file"][table["file"].duplicated()]):
        raise UserError(f"{path}: {twice[0]} stands in it twice")
    rows = {row["file"]: row for row in table.to_dict("records")}
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    homes: dict[str, str] = {}
    found = set()
    for record in records:
        row = rows.get(record.key) or rows.get(Path(record.key).with_suffix("").as_posix())
        if row is None:
            continue
        found.add(row["file"])
        record = replace(record, patient=row.get("patient") or record.patient)
        if homes.setdefault(record.patient, row["split"]) != row["split"]:
            raise UserError(f"{path}: patient {record.patient} stands in {homes[record.patient]} and in {row['split']}")
        splits[row["split"]].append(record)
    if missing := len(records) - sum(map(len, splits.values())):
        print(f"{path}: {missing} of {len(records)} images are not in it and are left out")
    if absent := sorted(set(rows) - found):
        print(f"{path}: {len(absent)} of its {len(rows)} rows name no existing image, such as {absent[0]}")
    return splits
