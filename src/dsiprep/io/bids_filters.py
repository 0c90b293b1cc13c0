"""Select files by PyBIDS-style entities, as in a `--bids-filter-file`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsiprep.errors import SettingsError

Filters = Mapping[str, Mapping[str, Any]]
KINDS = ("dwi", "fmap", "t1w", "t2w")
OTHER_KINDS = ("sbref", "flair", "roi")  # accepted because QSIPrep has them; only "sbref" is used
EXTENSION = re.compile(r"\.(nii\.gz|nii|json|bval|bvec)$")  # a label may hold a dot, though BIDS forbids it
SHORT_NAMES = {
    "subject": "sub",
    "session": "ses",
    "acquisition": "acq",
    "direction": "dir",
    "reconstruction": "rec",
    "ceagent": "ce",
    "task": "task",
    "run": "run",
    "echo": "echo",
    "part": "part",
    "space": "space",
    "sample": "sample",
}


def entities(path: Path | str) -> dict[str, str]:
    """Entities of a BIDS file name by short name, in file order, with the suffix under "suffix"."""
    name = Path(path).name
    stem = EXTENSION.sub("", name) if EXTENSION.search(name) else name.partition(".")[0]
    parts: dict[str, str] = {}
    for chunk in stem.split("_"):
        key, dash, value = chunk.partition("-")
        parts[key if dash else "suffix"] = value if dash else chunk
    return parts


def check_filters(filters: Filters) -> None:
    """Raise a SettingsError for filters of unknown kinds or with invalid queries."""
    for kind, query in filters.items():
        if kind not in KINDS + OTHER_KINDS:
            raise SettingsError(f"--bids-filter-file: {kind!r} is not a kind of file; use {', '.join(KINDS)}")
        if not isinstance(query, Mapping):
            raise SettingsError(f"--bids-filter-file: {kind!r} needs entities, for example {{'acquisition': 'dsi'}}")
        for key, value in query.items():
            if not isinstance(value, str | int | float | bool | list | tuple | type(None)):
                raise SettingsError(f"--bids-filter-file: {kind}: {key} is {value!r}; expected a value or a list")


def apply_filters(data: Mapping[str, Sequence[str]], filters: Filters | None) -> dict[str, list[str]]:
    """The files of each kind that match its query, or that of "sbref" or "fmap" if they only serve as references."""

    def query(kind: str, path: str) -> Mapping[str, Any]:
        if kind == "reference":
            kind = "fmap" if Path(path).parent.name == "fmap" else "sbref"
        return (filters or {}).get(kind, {})

    return {kind: [path for path in paths if matches(path, query(kind, path))] for kind, paths in data.items()}


def matches(path: str, query: Mapping[str, Any]) -> bool:
    """Whether a file matches a query of PyBIDS entities.

    A list matches any of its values; null (or "Query.NONE") requires the entity to be absent, "*" (or "Query.ANY") to
    be present. An integer is compared with the entity as a number: 1 matches run-01.
    """
    values: dict[str, str] = entities(path)
    name = Path(path).name
    values["extension"] = found.group() if (found := EXTENSION.search(name)) else "." + name.partition(".")[2]
    values["datatype"] = Path(path).parent.name
    return all(_value_matches(values.get(SHORT_NAMES.get(key, key)), expected) for key, expected in query.items())


def _value_matches(value: str | None, expected: Any) -> bool:
    if isinstance(expected, list | tuple):
        return any(_value_matches(value, option) for option in expected)
    if expected is None or expected == "Query.NONE":
        return value is None
    if expected in ("*", "Query.ANY", "Query.REQUIRED"):
        return value is not None
    if expected == "Query.OPTIONAL":
        return True
    if value is None:
        return False
    if value.isdecimal() and str(expected).isdecimal():
        return value == str(expected) or (isinstance(expected, int) and int(value) == expected)
    return value == _without_prefix(str(expected))


def _without_prefix(label: str) -> str:
    head, dash, tail = label.partition("-")
    return tail if dash and head in ("sub", "ses") else label
