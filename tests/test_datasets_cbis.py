"""CBIS-DDSM on small trees in both layouts, and the counts of the official case files.

The trees take their rows from the official case files in the folder CBIS_CASE_DIR or, if it is unset, from `trees.ROWS`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from datasets_cbis import CBISDDSM, cbis_records, read_case_files, survey_root
from files.splits import SPLITS
from helper import UserError
from hps import HPS_VQVAE, HParams
from loading.batches import Batch
from trees import PATIENTS, breast, image_paths, own_case_files, write_case_files, write_dicom, write_kaggle, write_tcia

CASE_DIR = os.environ.get("CBIS_CASE_DIR", "")
needs_case_files = pytest.mark.skipif(
    not CASE_DIR, reason="CBIS_CASE_DIR is unset: name the folder of the official case files"
)


def settings(**changes: object) -> HParams:
    return HPS_VQVAE["cbis-ddsm"].updated(image_shape=[1, 128, 96], validation_fraction=0.2, **changes)


# --- trees -----------------------------------------------------------------------------------------------------------


def official_case_files() -> dict[str, pd.DataFrame]:
    """The official rows of the same patients."""
    tables = {name: pd.read_csv(Path(CASE_DIR, name), dtype=str) for name in own_case_files()}
    return {name: table[table["patient_id"].isin(PATIENTS)] for name, table in tables.items()}


@pytest.fixture(scope="module")
def case_files() -> dict[str, pd.DataFrame]:
    return official_case_files() if CASE_DIR else own_case_files()


@pytest.fixture(scope="module", params=["uid", "descriptive", "inside", "kaggle", "kaggle-inside"])
def tree(request, tmp_path_factory, case_files) -> Path:
    """A complete data root: the folder that holds CBIS-DDSM, or that folder itself, in either layout."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "kaggle":
        write_kaggle(root / "CBIS-DDSM", case_files)
        write_case_files(root / "CBIS-DDSM" / "csv", case_files)
    elif request.param == "kaggle-inside":
        write_kaggle(root, case_files)
        write_case_files(root / "csv", case_files)
    elif request.param == "inside":
        write_tcia(root, case_files, uid_folders=False)
        write_case_files(root, case_files)
    else:
        write_tcia(root / "CBIS-DDSM", case_files, uid_folders=request.param == "uid")
        write_case_files(root / "tables" / "official", case_files)
    return root


@pytest.fixture
def bare(tmp_path, case_files) -> Path:
    """A data root with case files and one mammogram."""
    write_case_files(tmp_path, case_files)
    case = "Mass-Training_P_00001_LEFT_CC"
    write_dicom(tmp_path / "CBIS-DDSM" / case / "a" / "b" / "1-1.dcm", breast(), case, "full mammogram images")
    return tmp_path


def refusal(root: Path, **options: object) -> str:
    """The error message for a data root."""
    with pytest.raises(UserError) as caught:
        cbis_records(root, settings(), **options)
    return str(caught.value)


# --- official counts -------------------------------------------------------------------------------------------------


@needs_case_files
@pytest.mark.parametrize(
    ("split", "abnormality", "train", "test"),
    [
        ("patient", "all", 2356, 641),
        ("official", "all", 2458, 645),
        ("official", "mass", 1231, 361),
        ("official", "calc", 1227, 284),
    ],
)
def test_official_counts(split, abnormality, train, test):
    root = Path(CASE_DIR)
    hps = HPS_VQVAE["cbis-ddsm"].updated(split=split, abnormality=abnormality)
    rows = read_case_files(root, survey_root(root).tables, abnormality)
    records = cbis_records(root, hps, strict=True, images={case: root / case / "1-1.dcm" for case in rows["case"]})
    assert len(records["train"]) + len(records["validation"]) == train
    assert len(records["test"]) == test
    assert all(record.info["lesions"] for split in SPLITS for record in records[split])


@needs_case_files
def test_official_patients(capsys):
    root = Path(CASE_DIR)
    rows = read_case_files(root, survey_root(root).tables, "all")
    images = {case: root / case / "1-1.dcm" for case in rows["case"]}
    records = cbis_records(root, HPS_VQVAE["cbis-ddsm"], images=images)
    patients = {split: {record.patient for record in records[split]} for split in SPLITS}
    assert [len(patients[split]) for split in SPLITS] == [1095, 122, 349]
    assert not patients["train"] & patients["validation"]
    assert not (patients["train"] | patients["validation"]) & patients["test"]
    assert "left out 64 training images of 31 patients in both official halves" in capsys.readouterr().out
    views = [(r.patient, r.info["side"], r.info["view"]) for split in SPLITS for r in records[split]]
    assert len(views) == len(set(views)) == 2997
    # 2,864 + 704, less 45 lesions of the 35 views without an image in the test half
    assert sum(len(r.info["lesions"]) for split in SPLITS for r in records[split]) == 3523


# --- trees: what is found --------------------------------------------------------------------------------------------


def test_views_of_every_layout(tree, capsys):
    records = cbis_records(tree, settings(), strict=True)
    assert [len(records[split]) for split in SPLITS] == [8, 2, 11]
    out = capsys.readouterr().out
    assert out == f"{tree}: left out 3 training images of 2 patients in both official halves\n"
    patients = [{record.patient for record in records[split]} for split in SPLITS]
    assert [len(p) for p in patients] == [4, 1, 5]
    assert len(set.union(*patients)) == 10
    for split in SPLITS:
        for record in records[split]:
            assert record.path.is_file() and record.key == record.path.relative_to(tree).as_posix()
            with Image.open(record.path) if record.path.suffix == ".jpg" else pydicom.dcmread(record.path) as image:
                size = image.size if record.path.suffix == ".jpg" else (image.Columns, image.Rows)
            assert size == (120, 160)  # crops are 10 x 12


def test_official_split_keeps_the_files(tree, capsys):
    records = cbis_records(tree, settings(split="official"), strict=True)
    train = records["train"] + records["validation"]
    assert (len(train), len(records["test"])) == (16, 15)
    assert capsys.readouterr().out == ""
    assert {r.patient for r in train} & {r.patient for r in records["test"]} == {"P_00016", "P_00394"}
    assert not {r.patient for r in records["train"]} & {r.patient for r in records["validation"]}
    assert len({record.key for split in SPLITS for record in records[split]}) == 31


def test_one_kind_of_case(tree):
    counts = {}
    for kind in ("mass", "calc"):
        records = cbis_records(tree, settings(abnormality=kind), strict=True)
        counts[kind] = len(records["train"] + records["validation"]), len(records["test"])
        types = {lesion["abnormality_type"] for s in SPLITS for r in records[s] for lesion in r.info["lesions"]}
        assert types == {"mass" if kind == "mass" else "calcification"}
    assert counts == {"mass": (7, 7), "calc": (9, 8)}


def test_lesions_gather_in_a_view(tree):
    records = cbis_records(tree, settings())
    info = {(r.patient, r.info["side"], r.info["view"]): r.info["lesions"] for s in SPLITS for r in records[s]}
    lesions = [(le["abnormality_type"], le["lesion_id"], le["subtlety"]) for le in info["P_00208", "RIGHT", "MLO"]]
    assert lesions == [("calcification", 1, 5), ("calcification", 2, 4), ("mass", 3, 5)]
    assert [le["lesion_id"] for le in info["P_00202", "RIGHT", "CC"]] == [2, 1]
    assert info["P_00001", "LEFT", "CC"] == [
        {
            "abnormality_type": "mass",
            "pathology": "MALIGNANT",
            "assessment": 4,
            "subtlety": 4,
            "lesion_id": 1,
        }
    ]
    # a test view keeps the lesions of the training half, without the training image
    assert [le["abnormality_type"] for le in info["P_00016", "LEFT", "CC"]] == ["calcification", "mass"]
    assert ("P_00394", "LEFT", "MLO") not in info


def test_validation_is_deterministic(tree):
    first, again = (cbis_records(tree, settings()) for _ in range(2))
    assert first == again
    more = cbis_records(tree, settings().updated(validation_fraction=0.6))
    assert len({r.patient for r in more["validation"]}) == 3
    assert {r.key for r in first["validation"]} < {r.key for r in more["validation"]}
    for fraction, train, validation in ((0.0, 4, 1), (1.0, 1, 4)):
        cut = cbis_records(tree, settings().updated(validation_fraction=fraction))
        assert [len({r.patient for r in cut[split]}) for split in SPLITS[:2]] == [train, validation]


def test_item(tree):
    dataset = CBISDDSM(tree, settings(noise_level=0.2), "test")
    assert len(dataset) == 11
    item = dataset[0]
    assert isinstance(item, Batch)
    assert item.clean.shape == item.degraded.shape == item.mask.shape == (1, 1, 128, 96)
    assert 0 <= float(item.clean.min()) < 0.01 and 0.6 < float(item.clean.max()) <= 1
    assert 0.2 < float(item.mask.float().mean()) < 0.95
    assert float((item.clean - item.degraded).abs().mean()) > 0
    meta = item.meta[0]
    assert meta.patient == "P_00016" and meta.info["side"] == "LEFT" and meta.info["view"] == "CC"
    assert meta.path == dataset.records[0].key
    assert len(CBISDDSM(tree, settings(), "train")) == 8
    with pytest.raises(ValueError, match="split must be one of"):
        CBISDDSM(tree, settings(), "all")


def test_monochrome1_is_inverted(bare):
    first, second = "Mass-Training_P_00001_LEFT_CC", "Mass-Training_P_00001_LEFT_MLO"
    write_dicom(bare / "CBIS-DDSM" / second / "a" / "b" / "1-1.dcm", breast(), second, "full mammogram images", True)
    dataset = CBISDDSM(bare, settings(flip=False), "train")
    assert [record.key.split("/")[1] for record in dataset.records] == [first, second]
    assert np.allclose(dataset[0].clean, dataset[1].clean, rtol=0, atol=1.01 / 65535)
    assert float(dataset[1].clean[0, 0, 0, -1]) == 0


# --- trees: what is missing or wrong ---------------------------------------------------------------------------------


def test_missing_images_are_counted(bare, capsys):
    records = cbis_records(bare, settings())
    assert [len(records[split]) for split in SPLITS] == [1, 0, 0]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{bare}: 20 of 21 mammograms missing, such as Mass-Training_P_00001_LEFT_MLO, ")
    assert line.count("_P_") == 3
    assert "--data-root" in refusal(bare, strict=True) and "20 of 21" in refusal(bare, strict=True)


def test_missing_files_of_either_layout(bare, tmp_path_factory, case_files):
    broken = bare / "CBIS-DDSM" / "Mass-Training_P_00001_LEFT_MLO" / "a" / "b" / "1-1.dcm"
    broken.parent.mkdir(parents=True)
    broken.symlink_to(bare / "nowhere.dcm")
    (broken.parent / "around").symlink_to(bare, target_is_directory=True)
    assert "20 of 21 mammograms missing" in refusal(bare, strict=True)

    root = tmp_path_factory.mktemp("kaggle-missing")
    write_kaggle(root, case_files)
    write_case_files(root / "csv", case_files)
    records = cbis_records(root, settings(), strict=True)
    records["test"][0].path.unlink()
    assert "1 of 21 mammograms missing, such as Mass-Test_P_00016_LEFT_CC;" in refusal(root, strict=True)
    assert [r.key for r in cbis_records(root, settings())["test"]] == [r.key for r in records["test"][1:]]


def test_training_image_never_serves_a_test_view(bare):
    case = "Calc-Training_P_00016_LEFT_CC"
    write_dicom(bare / "CBIS-DDSM" / case / "a" / "b" / "1-1.dcm", breast(), case, "full mammogram images")
    assert cbis_records(bare, settings())["test"] == []
    assert len(cbis_records(bare, settings(split="official"))["validation"]) == 1


def test_no_image_at_all(bare):
    next(bare.rglob("*.dcm")).unlink()
    assert f"--data-root {bare}: neither DICOM files of the cases" in refusal(bare)
    (bare / "jpeg").mkdir()
    columns = ["image_path", "SeriesDescription", "PatientID"]
    pd.DataFrame([["jpeg/1.jpg", "", "x"]], columns=columns).to_csv(bare / "dicom_info.csv", index=False)
    assert f"--data-root {bare}: 21 of 21 mammograms missing" in refusal(bare)


def test_a_view_on_two_cases_needs_one_file(bare):
    calc, mass = "Calc-Training_P_00034_RIGHT_CC", "Mass-Training_P_00034_RIGHT_CC"
    for case in (mass, calc):
        write_dicom(bare / "CBIS-DDSM" / case / "a" / "b" / "1-1.dcm", breast(), case, "full mammogram images")
        records = cbis_records(bare, settings())
        (record,) = [r for r in records["train"] + records["validation"] if r.patient == "P_00034"]
        assert record.key == f"CBIS-DDSM/{case}/a/b/1-1.dcm"
        assert len(record.info["lesions"]) == 2


def test_crops_are_never_mammograms(bare):
    case = "Mass-Training_P_00001_LEFT_MLO"
    for folder, series in (
        (f"{case}_1", "b"),
        (case, "1.000000-ROI mask images-1"),
        (case, "1.000000-cropped images-1"),
    ):
        path = bare / "CBIS-DDSM" / folder / "a" / series / "1-1.dcm"
        write_dicom(path, np.full((12, 10), 65535, np.uint16), folder, "cropped images")
    assert [r.key.split("/")[1] for r in cbis_records(bare, settings())["train"]] == ["Mass-Training_P_00001_LEFT_CC"]


def moved(bare: Path, case: str, place: str) -> Path:
    """The one mammogram of `bare`, as that of `case` at another place."""
    source, target = next(bare.rglob("*.dcm")), bare / place
    target.parent.mkdir(parents=True, exist_ok=True)
    return source.rename(target)


@pytest.mark.parametrize(
    "place",
    [
        "CBIS-DDSM/{case}/a/b/1-1.DCM",
        "CBIS-DDSM/{case}/a/b/1-1",
        "CBIS-DDSM/{case}/000000.dicom",
        "manifest-1/CBIS-DDSM/deeper/{case}/a/b/c/1-1.dcm",
        "{series}/1-1.dcm",
        "manifest-1/CBIS-DDSM/{series}/00000001.dcm",
        "anything/1-1.dcm",
        "cbis_ddsm/{case}/1.2.3/MG_{series}/{series}.1.dcm",
        "all/{series}.dcm",
        "all/{case}.dcm",
    ],
)
def test_dicom_is_found_wherever_a_downloader_puts_it(bare, case_files, place):
    case = "Mass-Training_P_00001_LEFT_CC"
    mammograms, _ = image_paths(case_files)
    series = next(path.split("/")[2] for path in mammograms if path.startswith(case))
    target = moved(bare, case, place.format(case=case, series=series))
    # crops lie on either side of it
    for name, lesion in (("0-1.dcm", "_1"), ("2-1.dcm", ""), ("0/2-1.dcm", "_1")):
        path = target.parent / name
        write_dicom(path, np.full((12, 10), 65535, np.uint16), case + lesion, "cropped images")
    records = cbis_records(bare, settings())
    assert [record.path for record in records["train"]] == [target]


@pytest.mark.parametrize(
    "tells", ["description", "patient", "crop's series", "mammogram's series", "size", "size alone"]
)
@pytest.mark.parametrize("where", ["CBIS-DDSM/{case}/a/0/1-1.dcm", "CBIS-DDSM/{case}/a/b/0-1.dcm"])
def test_a_crop_in_the_folder_of_the_mammogram_is_not_taken(bare, case_files, where, tells):
    """It comes first in the alphabet, and one thing alone tells that it is a crop."""
    case = "Mass-Training_P_00001_LEFT_CC"
    mammograms, crops = image_paths(case_files)
    (full,), own = bare.rglob("*.dcm"), [path for path in crops if path.startswith(f"{case}_")]
    official = next(path for path in mammograms if path.startswith(case)).split("/")[2]
    crop = bare / where.format(case=case)
    write_dicom(crop, np.full((12, 10), 65535, np.uint16), case, "")
    for path, tags in (
        (full, {"SeriesDescription": ""}),
        (
            crop,
            {
                "description": {"SeriesDescription": "ROI mask images"},
                "patient": {"PatientID": f"{case}_1"},
                "crop's series": {"SeriesInstanceUID": own[0].split("/")[2]},
            }.get(tells, {}),
        ),
        (full, {"SeriesInstanceUID": official} if tells == "mammogram's series" else {}),
    ):  # fmt: skip
        header = pydicom.dcmread(path)
        header.SeriesInstanceUID = official if tells == "size alone" else "1.2.3"
        for name, value in tags.items():
            setattr(header, name, value)
        header.save_as(path)
    assert [record.path for record in cbis_records(bare, settings())["train"]] == [full]
    if tells in ("description", "patient", "crop's series"):
        full.unlink()
        assert "neither DICOM files of the cases" in refusal(bare)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_case_files_as_a_spreadsheet_saves_them(bare, case_files, separator):
    for name, table in case_files.items():
        table.to_csv(bare / name, index=False, sep=separator, encoding="utf-8-sig", lineterminator="\r\n")
    assert [len(records) for records in cbis_records(bare, settings()).values()] == [1, 0, 0]


def test_series_description_of_kaggle(tmp_path, case_files):
    write_case_files(tmp_path / "csv", case_files)
    write_kaggle(tmp_path, case_files)
    info = pd.read_csv(tmp_path / "csv" / "dicom_info.csv")
    case = "Mass-Training_P_00009_RIGHT_CC"
    info.loc[info["PatientID"] == case, "SeriesDescription"] = "cropped images"
    info.to_csv(tmp_path / "csv" / "dicom_info.csv", index=False)
    assert f"1 of 21 mammograms missing, such as {case};" in refusal(tmp_path, strict=True)

    # a described series comes before one without a description
    info.loc[info["PatientID"] == case, "SeriesDescription"] = "full mammogram images"
    described = info[info["PatientID"] == case].iloc[0]
    other = described.copy()
    other["image_path"], other["SeriesDescription"] = "CBIS-DDSM/jpeg/0/1-000.jpg", None
    (tmp_path / "jpeg" / "0").mkdir()
    Image.new("L", (10, 12), 255).save(tmp_path / "jpeg" / "0" / "1-000.jpg")
    table = pd.concat([pd.DataFrame([other]), info])
    table.to_csv(tmp_path / "csv" / "dicom_info.csv", index=False)
    keys = {"CBIS-DDSM/" + r.key for records in cbis_records(tmp_path, settings()).values() for r in records}
    assert described["image_path"] in keys and other["image_path"] not in keys


def test_line_break_in_a_mammogram_path(bare, case_files):
    name = "mass_case_description_train_set.csv"
    table = case_files[name].copy()
    paths = table["image file path"].str.strip()
    table["image file path"] = paths.str.slice(0, 12) + "\r\n" + paths.str.slice(12) + "\n"
    table.to_csv(bare / name, index=False)
    assert len(cbis_records(bare, settings())["train"]) == 1


@pytest.mark.parametrize("value", ["../x/y/z.dcm", "/data/x/y/z.dcm", "C:\\x\\z.dcm", "a/../../z.dcm"])
def test_path_that_leads_out(bare, case_files, tmp_path_factory, value):
    name = "calc_case_description_test_set.csv"
    table = case_files[name].copy()
    table.iloc[3, table.columns.get_loc("image file path")] = value
    table.to_csv(bare / name, index=False)
    assert refusal(bare).startswith(f"{bare / name}: the path {value!r} leads out")

    root = tmp_path_factory.mktemp("kaggle-out")
    write_case_files(root / "csv", case_files)
    (root / "jpeg").mkdir()
    info = pd.DataFrame(
        [[value, "full mammogram images", "x"]], columns=["image_path", "SeriesDescription", "PatientID"]
    )
    info.to_csv(root / "csv" / "dicom_info.csv", index=False)
    assert refusal(root).startswith(f"{root / 'csv' / 'dicom_info.csv'}: the path {value!r} leads out")


def test_path_of_a_crop_as_mammogram(bare, case_files):
    name = "mass_case_description_train_set.csv"
    case_files[name].assign(**{"image file path": "Mass-Training_P_00001_LEFT_CC_1/a/b/1.dcm"}).to_csv(bare / name)
    assert str(bare / name) in refusal(bare) and "not the path of a full mammogram" in refusal(bare)


def test_missing_root_and_layout(tmp_path, case_files):
    assert refusal(tmp_path / "none").startswith(f"--data-root {tmp_path / 'none'}: no such folder")
    write_case_files(tmp_path, case_files)
    sentence = refusal(tmp_path)
    assert sentence.startswith(f"--data-root {tmp_path}: ")
    assert "CBIS-DDSM/Mass-Training_P_00001_LEFT_CC" in sentence and "csv/dicom_info.csv" in sentence


def test_folders_that_cannot_be_read(bare, monkeypatch):
    closed, scandir = {str(bare / "lost+found")}, os.scandir

    def guarded(folder):
        if str(folder) in closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    (bare / "lost+found").mkdir()
    monkeypatch.setattr(os, "scandir", guarded)
    assert len(cbis_records(bare, settings())["train"]) == 1
    closed.add(str(bare))
    assert refusal(bare).startswith(f"--data-root {bare}: cannot be read (Permission denied)")


def test_missing_case_file(bare):
    (bare / "calc_case_description_test_set.csv").unlink()
    sentence = refusal(bare)
    assert sentence.startswith(f"--data-root {bare}: no calc_case_description_test_set.csv")
    assert "--hps abnormality=mass" in sentence
    assert len(cbis_records(bare, settings(abnormality="mass"))["train"]) == 1


@pytest.mark.parametrize("column", ["patient_id", "image file path", "abnormality id", "pathology"])
def test_missing_column(bare, case_files, column):
    path = bare / "mass_case_description_test_set.csv"
    case_files[path.name].drop(columns=column).to_csv(path, index=False)
    assert refusal(bare).startswith(f"{path}: has no column {column!r}")


def test_missing_column_of_kaggle(tmp_path, case_files):
    write_case_files(tmp_path / "csv", case_files)
    (tmp_path / "jpeg").mkdir()
    pd.DataFrame({"image_path": [], "PatientID": []}).to_csv(tmp_path / "csv" / "dicom_info.csv", index=False)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'csv' / 'dicom_info.csv'}: has no column 'SeriesDescription'")


def test_unreadable_case_files(bare, case_files):
    path = bare / "mass_case_description_test_set.csv"
    path.write_bytes(b"")
    assert refusal(bare).startswith(f"{path}: not a readable CSV file")
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert refusal(bare).startswith(f"{path}: not a readable CSV file")
    write_case_files(bare, {name: table.iloc[:0] for name, table in case_files.items()})
    assert refusal(bare).startswith(f"--data-root {bare}: its case files hold no rows")
