"""The split that each patient belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from files.images import find_images
from files.patients import patients_of
from files.prepared import Record
from files.tables import read_table, refuse_escape
from helper import UserError, counted, seed_of
from hps import HParams

SPLITS = ("train", "validation", "test")


def in_hash_order(patients: Iterable[str]) -> list[str]:
    """The patients, each once, in an order that looks random but never changes."""
    return sorted(set(patients), key=lambda patient: (seed_of("split", patient), patient))


def split_patients(patients: Sequence[str], validation: float, test: float) -> dict[str, str]:
    """Patient to split, in the order of a hash, at least one patient in every split.

    Raises UserError if there are fewer than three patients.
    """
    unique = in_hash_order(patients)
    if len(unique) < 3:
        remedy = "add images or set --hps patient_pattern"
        raise UserError(
            f"--data-root: {counted(len(unique), 'patient is', 'patients are')} too few for train, validation and test; {remedy}"
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

    Raises UserError if the folder is empty, a pair lacks one half, a split file does not fit, or patients cannot be told and
    no split file says which image goes where.
    """
    halves = {p.name.lower(): p for p in root.iterdir() if p.is_dir() and p.name.lower() in ("full", "low")}
    if len(halves) == 1:
        raise UserError(f"{next(iter(halves.values()))}: stands alone; real pairs need both full/ and low/ in {root}")
    base, low = halves.get("full", root), {}
    if halves:
        low = {path.relative_to(halves["low"]).with_suffix(""): path for path in find_images(halves["low"])}
    records, paths = [], find_images(base)
    patients, doubt = patients_of(root, base, paths, hps.patient_pattern)
    for path, patient in zip(paths, patients, strict=True):
        name = path.relative_to(base)
        degraded = low.pop(name.with_suffix(""), None)
        if halves and degraded is None:
            raise UserError(f"{path}: has no low-dose image of the same name in {halves['low']}")
        records.append(Record(path, name.as_posix(), patient, degraded))
    if low:
        raise UserError(f"{next(iter(low.values()))}: has no full-dose image of the same name in {base}")
    split_csv = Path(hps.split_csv) if hps.split_csv else root / "split.csv"
    if hps.split_csv or split_csv.is_file():
        return split_by_file(records, split_csv)
    if doubt:
        remedy = "add split.csv, or set --hps patient_pattern to a regular expression, or to file if each file is its own patient"
        raise UserError(f"--data-root {root}: its patients cannot be told ({doubt}); {remedy}")
    of_patient = split_patients([r.patient for r in records], hps.validation_fraction, hps.test_fraction)
    return {split: [r for r in records if of_patient[r.patient] == split] for split in SPLITS}


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
        print(f"{path}: leaves out {missing} of {counted(len(records), 'image')}")
    if absent := sorted(set(rows) - found):
        print(f"{path}: {counted(len(absent), 'row names', 'rows name')} no existing image, such as {absent[0]}")
    return splits
