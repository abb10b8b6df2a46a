"""Tables that lie beside images."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from helper import UserError, reason_of

SEPARATORS = ",;\t|"
LONGEST_HEADER = 2**16  # characters of a table's first line that are looked at


def read_table(path: Path, columns: Collection[str], remedy: str, **options: Any) -> pd.DataFrame:
    """A CSV file as stripped text, empty if a value is missing; `options` go to pandas.

    Its separator is the one that its first line has most of: spreadsheets save semicolons or tabs in many countries.
    Raises UserError, with the `remedy`, if it cannot be read or lacks one of the `columns`.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            separator = max(SEPARATORS, key=file.readline(LONGEST_HEADER).count)
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", **options)
    except (ValueError, OSError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path}: not a readable CSV file ({reason_of(error)}); {remedy}") from None
    table = table.rename(columns=str.strip)
    for column in columns:
        if column not in table:
            raise UserError(f"{path}: has no column {column!r}; {remedy}")
    return table.apply(lambda values: values.str.strip())


def refuse_escape(value: str, file: Path) -> None:
    """Raise UserError if a path in `file` is absolute or climbs: it could lead out of the data root.

    Links below the root may lead anywhere: whoever made them chose to.
    """
    if re.match(r"[/\\]|[A-Za-z]:", value) or ".." in re.split(r"[/\\]", value):
        raise UserError(f"{file}: the path {value!r} leads out of the data root; mend or download the file again")
