"""Whose images they are: names of data sets, DICOM headers and tables; where nothing tells, no split is made."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from files.patients import KNOWN_NAMES, Patients, patients_of
from files.splits import folder_records
from helper import UserError
from hps import HPS_VQVAE
from test_datasets import write_pngs
from test_images import dicom_file

FOLDER = HPS_VQVAE["folder"]
ROOT = Path("x")
VIEWS = list(itertools.product(("L", "R"), ("CC", "MLO")))
LONG = {"L": "LEFT", "R": "RIGHT"}


def patients_by_name(*names, pattern=""):
    return patients_of(ROOT, ROOT, [ROOT / name for name in names], pattern)


def hexed(length, *key):
    return hashlib.md5(repr(key).encode()).hexdigest()[:length]


def number(digits, *key):
    return 10 ** (digits - 1) + int(hexed(12, *key), 16) % (9 * 10 ** (digits - 1))


def uid(*key):
    return f"1.2.840.113681.{number(9, *key)}.954.{number(10, *key, 1)}.{number(4, *key, 2)}"


def four_images(name):
    """The names of twelve patients' four images, of patient p's image i with its side and view, and the right patients."""
    made = [(name(p, i, *view), p) for p in range(12) for i, view in enumerate(VIEWS)]
    names, owners = zip(*made, strict=True)
    assert len(set(names)) == 48
    return names, owners


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, patient",
    [
        ("mdb001.pgm", "mdb pair 001"), ("mdb002.png", "mdb pair 001"), ("mdb003.pgm", "mdb pair 002"),
        ("P_00001_LEFT_CC.png", "P 00001"), ("P_00001_RIGHT_MLO.png", "P 00001"), ("case7-R-mlo.tif", "case7"),
        ("12_lcc.png", "12"), ("12RMLO.png", "12"), ("Miller.png", "Miller"), ("CC.png", "CC"), ("0004 L.png", "0004"),
        ("patient_07/L_CC.png", "patient 07"), ("patient_07/RIGHT-MLO.png", "patient 07"), ("p/views/lcc.png", "views"),
        ("left/p3.png", "p3"), ("L_CC_p3.png", "p3"), ("p3_2019-04-02_L.png", "p3"), ("Birads4/b4/p3_L.png", "p3"),
        ("p3x_L_CC_raw.png", "p3x"), ("2012_R.png", "2012"),
    ],
)  # fmt: skip
def test_a_patient_is_read_off_the_name_of_a_file(name, patient):
    assert patients_by_name(name, name).names == [patient] * 2


@pytest.mark.parametrize(
    "data_set, name",
    [
        ("INbreast", lambda p, i, s, v: f"{20586900 + 4 * p + i}_{hexed(16, p)}_MG_{s}_{v[:2]}_ANON.png"),
        ("RSNA", lambda p, i, s, v: f"{10000 + p}_{number(9, p, i)}.png"),
        ("RSNA", lambda p, i, s, v: f"train_images/{10 + p}/{number(9, p, i)}.png"),
        ("CMMD", lambda p, i, s, v: f"D1-{p:04d}/07-18-2010-NA-NA-{49150 + p % 3}/1.000000-NA-92061/1-{i + 1}.png"),
        ("CMMD", lambda p, i, s, v: f"CMMD/D2-{p:04d}/1-{i + 1}.png"),
        ("VinDr-Mammo", lambda p, i, s, v: f"images/{hexed(32, p)}/{hexed(32, p, i)}.png"),
        ("VinDr-Mammo", lambda p, i, s, v: f"{hexed(32, p)}_{hexed(32, p, i)}.png"),
        ("CBIS-DDSM", lambda p, i, s, v: f"{('Mass-Training', 'Calc-Training')[i % 2]}_P_{p:05d}_{LONG[s]}_{v}.png"),
        ("CBIS-DDSM", lambda p, i, s, v: f"Mass-Test_P_{p:05d}_{LONG[s]}_{v}/07-20-2016-DDSM-{p}/1.0-full/1-1.png"),
        ("DDSM", lambda p, i, s, v: f"cancer/cancer_0{i}/D_{4000 + p}_1.{LONG[s]}_{v}.png"),
        ("mini-MIAS", lambda p, i, s, v: f"{i // 2}/mdb{2 * p + 1 + i % 2:03d}.png"),
        ("KAU-BCMD", lambda p, i, s, v: f"Birad{i}/b{i}/20{13 + i}_BC{2000 + p:06d}{i}_ {v}_{s}.jpg"),
        ("CSAW-CC", lambda p, i, s, v: f"{p:05d}_20{90 + i}0909_{s}_{v}_{i}.png"),
        ("OPTIMAM", lambda p, i, s, v: f"images/demd{100 + p}/{uid(p, i)}/{uid(p, i, 3)}.png"),
        ("OPTIMAM", lambda p, i, s, v: f"OPTIMAM_IMAGES_optm{p}_{uid(p, i)}_{uid(p, i, 3)}.png"),
        ("EMBED", lambda p, i, s, v: f"cohort_{p % 2}/{10000000 + p}/{number(16, p, i)}/{hexed(24, p, i)}_conv.png"),
        ("EMBED", lambda p, i, s, v: f"cohort_{p % 2}/{10000000 + p}/{uid(p, i)}/{uid(p, i, 3)}/{uid(p, i, 4)}.png"),
        ("BCDR", lambda p, i, s, v: f"patient_{p}/study_{9 + i}/img_{p}_{9 + i}_1_{s}{v.replace('ML', '')}.png"),
        ("BCS-DBT", lambda p, i, s, v: f"DBT-P{p:05d}/01-01-2000-DBT-S{i}-MAMMO/{i}.0-{s}{v}/1-1.png"),
        ("patient_07, case12, P1", lambda p, i, s, v: f"{('DM', 'CM')[i % 2]}/P{p}_{s}_{('DM', 'CM')[i % 2]}_{v}.jpg"),
        ("patient_07, case12, P1", lambda p, i, s, v: f"site/Patient {p}/visit_{i}/{hexed(8, p, i)}.png"),
        ("a folder of dated ones", lambda p, i, s, v: f"QIN/{hexed(6, p)}/{1 + i:02d}-02-1999-STUDY-1/s/1-{i}.png"),
        ("a folder of UIDs", lambda p, i, s, v: f"{hexed(6, p)}/{uid(p, i)}/{uid(p, i, 1)}/1-1.png"),
        ("", lambda p, i, s, v: f"Doe{chr(97 + p)}_{('14032019', '22112021')[i // 2]}_{s}_{v}.png"),
        ("", lambda p, i, s, v: f"{hexed(6, p)}x_{2018 + i // 2}_{s}_{v}.png"),
        ("", lambda p, i, s, v: f"{hexed(6, p)}x/{s}/{v}.png"),
        ("", lambda p, i, s, v: f"{LONG[s]}/{v}/{hexed(6, p)}.png"),
    ],
)
def test_names_of_data_sets_tell_their_patients(data_set, name):
    names, owners = four_images(name)
    patients, doubt = patients_by_name(*names)
    assert doubt == "" and (not data_set or data_set in KNOWN_NAMES)
    assert len(set(patients)) == 12 and len(set(zip(patients, owners, strict=True))) == 12


@pytest.mark.parametrize(
    "name, why",
    [
        (lambda p, i, s, v: f"{hexed(12, p, i)}.png", r"48 images, such as \w+.png, would be of 48 patients"),
        (lambda p, i, s, v: f"scan_{4 * p + i:04d}.png", "48 images, .* would be of 48 patients"),
        (lambda p, i, s, v: f"{hexed(6, p)}/{i}.png", "files called '0' lie in several folders"),
        (
            lambda p, i, s, v: f"{p:03d}_{i // 2}_{'LR'[i % 2]}_CC.png",
            "'000 0' and others that begin with '000' may be one",
        ),
        (
            lambda p, i, s, v: f"Doe{chr(97 + p)}_{790252 + 97 * (2 * p + i // 2)}_{s}_{v}.png",
            "'Doea 790252' and others",
        ),
        (
            lambda p, i, s, v: f"{('CM', 'AK', 'BD')[p % 3]}{'xyzw'[p // 3] * (p > 2)}_2019_{s}_{v}.png",
            "'2019' is a date",
        ),
        (lambda p, i, s, v: f"class {'abcd'[i]}/{p:04d}.png", "files called '0000' lie in several folders"),
        (lambda p, i, s, v: f"mdb{2 * (4 * p + i):03d}.png", "48 images, .* would be of 48 patients"),
        (
            lambda p, i, s, v: f"{10000 + p}_{number(9, p, i)}.png" if p < 11 else f"x{i}.png",
            "4 images, such as x0.png",
        ),
    ],
    ids=[
        "hashes",
        "numbers",
        "numbers in folders",
        "exams",
        "accessions",
        "initials",
        "folders by class",
        "one breast each",
        "strays",
    ],
)
def test_where_names_tell_no_patients_no_split_is_made(name, why, tmp_path):
    names, owners = four_images(name)
    write_pngs(tmp_path, names)
    with pytest.raises(
        UserError, match=rf"^--data-root {tmp_path}: its patients cannot be told \({why}.*add split.csv"
    ):
        folder_records(tmp_path, FOLDER)
    records = folder_records(tmp_path, FOLDER.updated(patient_pattern="file"))
    patients = [record.patient for split in records.values() for record in split]
    assert len(patients) == len(set(patients)) == 48
    halves = [f"{file},{'train' if p % 2 else 'test'}" for file, p in zip(names, owners, strict=True)]
    (tmp_path / "split.csv").write_text("\n".join(["file,split", *halves]))
    assert [len(records) for records in folder_records(tmp_path, FOLDER).values()] == [24, 0, 24]
    (tmp_path / "split.csv").write_text(f"file,split,patient\n{names[0]},train,7\n")
    assert [record.patient for record in folder_records(tmp_path, FOLDER)["train"]] == ["7"]


def test_each_file_is_a_patient_by_its_path_without_suffix():
    names = "a/b.png", "c.png", "1.2.3", "1.2.4"
    assert patients_by_name(*names, pattern="file") == Patients(["a/b", "c", "1.2.3", "1.2.4"], "")


def test_the_patient_of_a_pattern_is_its_first_group():
    assert patients_by_name("x12-3.png", pattern=r"x(\d+)-").names == ["12"]
    assert patients_by_name("p7/L_CC.png", pattern=r"^p(\d+)/").names == ["7"]
    for pattern in (r"y(\d+)", r"x\d+", r"x(q)?", "(x"):
        with pytest.raises(UserError, match="patient_pattern"):
            patients_by_name("x12-3.png", pattern=pattern)


# --- DICOM headers ---------------------------------------------------------------------------------------------------


def write_dicoms(root, name, tags):
    """Twelve patients' four images, with the tags that `tags` makes of (p, i)."""
    paths = []
    for (file, p), i in zip(zip(*four_images(name), strict=True), itertools.cycle(range(4))):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        paths.append(dicom_file(root / file, np.zeros((8, 8), np.uint16), **tags(p, i)))
    return paths


@pytest.mark.parametrize(
    "tags",
    [
        lambda p, i: {"PatientID": f"Q{p}", "StudyInstanceUID": uid(p, i)},
        lambda p, i: {"PatientID": f"Mass-Training_P_{p:05d}_{LONG[VIEWS[i][0]]}_{VIEWS[i][1]}"},
        lambda p, i: {"StudyInstanceUID": uid(p)},
        lambda p, i: {"PatientID": f"Q{p}" if i % 3 else "", "StudyInstanceUID": uid(p, i // 2)},
        lambda p, i: {"PatientID": ("", "removed", "ANONYMOUS", "Anon^Patient", "---", "XXXX")[p % 6], "StudyInstanceUID": uid(p)},
    ],
    ids=["PatientID", "a case of CBIS-DDSM", "study", "another image of the study", "a word in place of the patient"],
)  # fmt: skip
def test_dicom_headers_tell_their_patients(tags, tmp_path):
    paths = write_dicoms(tmp_path, lambda p, i, s, v: f"{hexed(9, p, i)}.dcm", tags)
    patients, doubt = patients_of(tmp_path, tmp_path, paths)
    assert doubt == "" and [len(set(patients[4 * p : 4 * p + 4])) for p in range(12)] == [1] * 12
    assert len(set(patients)) == 12


def test_a_study_for_each_file_leaves_the_patient_to_the_name_or_untold(tmp_path):
    def each_its_own(p, i):
        return {"StudyInstanceUID": uid(p, i)}

    paths = write_dicoms(tmp_path / "told", lambda p, i, s, v: f"q{p}_{s}_{v}.dcm", each_its_own)
    assert len(set(patients_of(tmp_path, tmp_path, paths).names)) == 12
    paths = write_dicoms(tmp_path / "untold", lambda p, i, s, v: f"{hexed(9, p, i)}.dcm", each_its_own)
    assert "would be of 48 patients" in patients_of(tmp_path, tmp_path, paths).doubt


def test_dicom_files_that_cannot_be_read_raise_no_doubt(tmp_path):
    paths = write_dicoms(tmp_path, lambda p, i, s, v: f"{hexed(9, p, i)}.dcm", lambda p, i: {"PatientID": f"Q{p}"})
    paths[5].write_text("no DICOM")
    patients, doubt = patients_of(tmp_path, tmp_path, paths)
    assert doubt == "" and patients[4:8] == ["Q1", paths[5].stem, "Q1", "Q1"]


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, header, row",
    [
        ("train.csv", "site_id,patient_id,image_id", lambda p, name: f"2,{100 + p},{name}"),
        ("breast-level_annotations.csv", "study_id,series_id,image_id", lambda p, name: f"{hexed(32, p)},1,{name}"),
        ("csv/meta.CSV", "Anon PatientID;anon_filename", lambda p, name: f"{p:05d};{name}.dcm"),
        ("tables/m.csv", "empi_anon\tanon_dicom_path", lambda p, name: f"{p}a\t/mnt/a/{name}.dcm"),
        ("a.csv", "File Name, Patient ID ,study_id", lambda p, name: f'"x\\{name}.png"," Q{p} ",{name}'),
    ],
)
def test_tables_beside_the_images_tell_their_patients(file, header, row, tmp_path):
    names, owners = four_images(lambda p, i, s, v: f"images/{hexed(20, p, i)}.png")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    lines = [row(p, Path(name).stem) for name, p in zip(names, owners, strict=True)]
    (tmp_path / file).write_text("\n".join([header, *lines, lines[0]]), encoding="utf-8-sig")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "other.csv").write_text("patient_id,age\n1,50\n")
    patients, doubt = patients_of(tmp_path, tmp_path, [tmp_path / name for name in names])
    assert doubt == "" and len(set(patients)) == 12
    assert len(set(zip(patients, owners, strict=True))) == 12


def test_a_table_whose_patients_were_taken_out_leaves_them_to_the_names(tmp_path):
    names, owners = four_images(lambda p, i, s, v: f"{20586900 + 4 * p + i}_{hexed(16, p)}_MG_{s}_{v[:2]}_ANON.png")
    lines = [f"removed;{name[:8]};{s}" for name, s in zip(names, owners, strict=True)]
    (tmp_path / "INbreast.csv").write_text("\n".join(["Patient ID;File Name;Laterality", *lines]))
    patients = patients_of(tmp_path, tmp_path, [tmp_path / name for name in names]).names
    assert patients == [hexed(16, p) for p in owners]


def test_a_name_that_a_table_gives_to_two_patients_tells_neither(tmp_path):
    (tmp_path / "a.csv").write_text("patient,image\n1,a/1-1.png\n2,b/1-1.png\n2,b/1-2.png\n")
    paths = [tmp_path / name for name in ("a/1-1.png", "b/1-1.png", "b/1-2.png")]
    patients, doubt = patients_of(tmp_path, tmp_path, paths)
    assert patients[2] == "2" and "files called '1 1' lie in several folders" in doubt
