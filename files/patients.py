"""Whose images they are: by tables beside them, DICOM headers, and the names that data sets are known by."""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from files.dicom import dicom_tags, is_dicom
from files.images import stem_of
from files.tables import read_table
from helper import UserError

EACH_FILE = "file"  # as patient_pattern: each file is a patient of its own
MOST_PATIENTS = 0.75  # an image; if there are more, the names tell images from each other, not patients

# Data sets by what their paths below the data root hold; the first group is the patient, `pair` the number of one breast of
# two that follow each other. What is particular to one data set stands above what is common to many.
KNOWN_NAMES = {
    "CBIS-DDSM": r"(P_\d{5})_(?:LEFT|RIGHT)_(?:CC|MLO)",
    "DDSM": r"(?<![^/_])([A-D]_\d{4})_\d[._](?:LEFT|RIGHT)_(?:CC|MLO)",
    "INbreast": r"\d{8}_([0-9a-f]{16})_MG_[LR]_",
    "VinDr-Mammo": r"(?<![^/])([0-9a-f]{32})[/_][0-9a-f]{32}(?![^.])",  # a study; there is one a patient
    "CMMD": r"(?<![^/_])(D[12]-\d{4})(?!\d)",
    "CSAW-CC": r"(?<![^/])(\d{5})_\d{8}_[LR]_(?:CC|MLO)_\d",
    "KAU-BCMD": r"(?<![^/])\d{4}_(BC\d{6})\d?_ ?(?:CC|MLO)_[LR]",
    "OPTIMAM": r"(?<![^/_])((?:demd|optm)\d+)(?!\d)",
    "EMBED": r"(?<![^/])(\d{8})[/_]\d{12,17}[/_]",
    "BCDR": r"(?<![^/])img_(\d+)_\d+_\d+_[LR](?:CC|M?L?O)",
    "BCS-DBT": r"(DBT-P\d{5})",
    "RSNA": r"(?<![^/])(\d{1,5})[/_]\d{6,10}(?![^.])",
    "mini-MIAS": r"(?<![^/_])mdb(?P<pair>\d{3})(?!\d)",
    "a folder of dated ones": r"(?<![^/])([^/]+)/(?:\d\d-\d\d-\d{4}|\d{4}-\d\d-\d\d|(?:19|20)\d{6})(?!\d)[^/]*/",
    "a folder of UIDs": r"(?<![^/])([^/.]+)/\d+(?:\.\d+){2,}/",
    "patient_07, case12, P1": r"(?i)(?<![^/_ -])((?:patient|subject|participant|case|subj?|pat|pt|p)[_ -]?\d+)(?=[/_ -])",
}
# Words of a name that tell side, view, kind, class or split, not the patient.
_OTHER_WORDS = re.compile(
    r"(?i)(?<![a-z])(left|right|[lr]|[lr]?(cc|mlo?|lmo?|xcc[lm]?|fb|sio|cv)|full|low|mask|dm|cm|ffdm|raw|normal|benign|"
    r"malignant|cancer|bi-?rads?[ _-]?\d*|train(ing)?|val(idation)?|test|images?|mammograms?|png|dicom)(?![a-z])"
)
_DATE = re.compile(  # the year first, alone, or last
    r"(?<!\d)((19|20)\d\d([-_.]?(0[1-9]|1[0-2])[-_.]?(0[1-9]|[12]\d|3[01]))?|[0-3]?\d[-_.]?[0-3]\d[-_.]?(19|20)\d\d)(?!\d)"
)
# What stands in a table or header in place of a patient who was taken out.
_NOBODY = re.compile(
    r"(?i)[\W_]*(x+|anon[a-z]*|removed|unknown|none|nan|null|n/?a|deidentified|patient)?[\W_]*(patient|name|id)?"
)
# Columns by their letters alone, in small ones. Of a patient's columns those of a study come last.
_IMAGE_COLUMNS = (
    "imageid", "image", "imagename", "imagefilename", "file", "filename", "filepath", "path", "imagepath",
    "anonfilename", "anondicompath", "pngpath", "pngfilename", "sopinstanceuid", "sopuid",
)  # fmt: skip
_PATIENT_COLUMNS = ("patientid", "patient", "anonpatientid", "empianon", "clientid", "subjectid", "subject")
_STUDY_COLUMNS = ("studyid", "studyinstanceuid", "accanon", "examid")


class Patients(NamedTuple):
    """The patient of each of some images."""

    names: list[str]
    doubt: str  # why they cannot be told, empty if they can; then each file of which nothing tells is its own patient


def patients_of(root: Path, base: Path, paths: Sequence[Path], pattern: str = "") -> Patients:
    """The patients of images below `base`, a folder of the data root.

    With `pattern`, the first group of that regular expression on the path below `base`; if it is `file`, each file is its
    own patient. Without, the first that tells: a table below `root`, DICOM PatientID, `KNOWN_NAMES`, another image of the
    same study; then, as far as these give fewer patients than images, DICOM StudyInstanceUID, or the name less the words for
    side and view. Raises UserError if the pattern does not match.
    """
    names = [path.relative_to(base) for path in paths]
    if pattern == EACH_FILE:
        return Patients([stem_of(name.as_posix()) for name in names], "")
    if pattern:
        return Patients([_by_pattern(pattern, name.as_posix()) for name in names], "")
    tables, headers = _in_tables(root), [_header(path) for path in paths]
    told = [
        tables.get(stem_of(name.name)) or patient or _by_name(name)
        for name, (patient, _) in zip(names, headers, strict=True)
    ]
    studies = [study for _, study in headers]
    owners = {study: patient for study, patient in zip(studies, told, strict=True) if patient}
    told = [patient or (study and owners.get(study, "")) for study, patient in zip(studies, told, strict=True)]
    untold = [i for i, patient in enumerate(told) if not patient]
    guesses, doubt = _guessed(names, studies, untold)
    if doubt:
        guesses, doubt = _guessed(names, [""] * len(names), untold)
    each = guesses if not doubt else [stem_of(name.as_posix()) for name in names]
    patients = [patient or each[i] for i, patient in enumerate(told)]
    return Patients(patients, doubt or _crowd(patients, names))


def _by_pattern(pattern: str, name: str) -> str:
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise UserError(f"--hps patient_pattern={pattern}: not a regular expression ({error})") from None
    if match is None or not match.groups() or match[1] is None:
        raise UserError(f"--hps patient_pattern={pattern}: its first group matches nothing in {name}")
    return match[1]


def _in_tables(root: Path) -> dict[str, str]:
    """Patients by file name without suffix, as tables in the root or a folder below name both."""
    patients, studies = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for path in sorted(p for p in (*root.glob("*.[cC][sS][vV]"), *root.glob("*/*.[cC][sS][vV]")) if p.is_file()):
        with contextlib.suppress(UserError):  # not every CSV file is a table of the images
            names = [*read_table(path, (), "", nrows=0)]
            places = {re.sub(r"[^a-z]", "", name.lower()): place for place, name in enumerate(names)}
            image = next((places[name] for name in _IMAGE_COLUMNS if name in places), None)
            owner = next((name for name in (*_PATIENT_COLUMNS, *_STUDY_COLUMNS) if name in places), None)
            if image is None or owner is None:
                continue
            table = read_table(path, (), "", usecols=[image, places[owner]])
            found = studies if owner in _STUDY_COLUMNS else patients
            for file, patient in zip(table[names[image]], table[names[places[owner]]], strict=True):
                if patient := _somebody(patient):
                    found[stem_of(re.split(r"[/\\]", file)[-1])].add(patient)
    # a name that stands for images of several patients tells none
    return {file: min(owners) for file, owners in (studies | patients).items() if len(owners) == 1}


def _header(path: Path) -> tuple[str, str]:
    """DICOM PatientID and StudyInstanceUID, empty if there are none; of a file that cannot be read, its name stands in."""
    if not is_dicom(path):
        return "", ""
    try:
        patient, study = dicom_tags(path, "PatientID", "StudyInstanceUID")
    except Exception:  # noqa: BLE001  what cannot be read is reported when it is loaded
        return stem_of(path.name), ""
    return _somebody(patient), study


def _somebody(patient: str) -> str:
    """An identifier of a patient, empty if it stands for one who was taken out; CBIS-DDSM has its cases for patients."""
    if case := re.search(KNOWN_NAMES["CBIS-DDSM"], patient):
        return case[1].replace("_", " ")
    return "" if _NOBODY.fullmatch(patient) else patient


def _by_name(name: Path) -> str:
    """The patient as a known data set's names tell it, empty if none does."""
    for pattern in KNOWN_NAMES.values():
        if match := re.search(pattern, name.as_posix()):
            pair = match.groupdict().get("pair")
            return f"mdb pair {(int(pair) + 1) // 2:03d}" if pair else match[1].replace("_", " ")
    return ""


def _guessed(names: Sequence[Path], studies: Sequence[str], untold: Sequence[int]) -> tuple[dict[int, str], str]:
    """Patients by the index of images of which nothing tells, by study or by words of the name, and why they are doubtful."""
    guesses, homes = dict[int, str](), defaultdict[str, set[tuple[str, ...]]](set)
    for i in untold:
        if studies[i]:
            guesses[i] = studies[i]
            continue
        parts = [*names[i].parts[:-1], stem_of(names[i].name)]
        # if a name only names a view, the folder above it names the patient
        *folders, guesses[i] = [words for words in map(_own_words, parts) if words] or parts[-1:]
        homes[guesses[i]].add(tuple(folders))
    if twice := next((patient for patient, folders in homes.items() if len(folders) > 1), None):
        return guesses, f"files called {twice!r} lie in several folders"
    heads = {guess: guess.split(" ")[0] for guess in homes}
    shared = Counter(heads.values())
    # a word that all begin with, such as "scan", tells nothing
    if exam := len(shared) > 1 and next((guess for guess, head in heads.items() if shared[head] > 1), ""):
        return guesses, f"{exam!r} and others that begin with {heads[exam]!r} may be one"
    dates = [guess for guess in homes if not _plain(_DATE.sub(" ", guess))]
    if dates and not all(re.search(r"\d", guess) for guess in homes):
        return guesses, f"{dates[0]!r} is a date"
    return guesses, _crowd(list(guesses.values()), [names[i] for i in untold])


def _crowd(patients: Sequence[str], names: Sequence[Path]) -> str:
    """Why patients are doubtful: there are about as many as images."""
    count = len(set(patients))
    if count <= MOST_PATIENTS * len(patients):
        return ""
    return f"{len(patients):,} images, such as {names[0].as_posix()}, would be of {count:,} patients"


def _own_words(part: str) -> str:
    """A part of a path less what names no patient: what follows a word for side or view, and dates."""
    before = _OTHER_WORDS.split(part, maxsplit=1)[0]
    words = before if re.search(r"\d", before) else _OTHER_WORDS.sub(" ", part)
    return _plain(_DATE.sub(" ", words)) or _plain(words)


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip()
