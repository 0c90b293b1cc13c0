"""`--bids-filter-file`: which files to take, by PyBIDS-style entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsiprep.errors import SettingsError

Filters = Mapping[str, Mapping[str, Any]]
KINDS = ("dwi", "fmap", "t1w", "t2w")
OTHER_KINDS = ("sbref", "flair", "roi")  # QSIPrep's; nothing here takes them
SHORT = {
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
    """The entities of a BIDS file name by their short names, in file order, and its suffix under "suffix"."""
    stem = Path(path).name.partition(".")[0]
    found: dict[str, str] = {}
    for chunk in stem.split("_"):
        key, dash, value = chunk.partition("-")
        found[key if dash else "suffix"] = value if dash else chunk
    return found


def check_filters(filters: Filters) -> None:
    """Raise a SettingsError for a filter that could never do what it says."""
    for kind, query in filters.items():
        if kind not in KINDS + OTHER_KINDS:
            raise SettingsError(f"--bids-filter-file: {kind!r} is no kind of file; use {', '.join(KINDS)}")
        if not isinstance(query, Mapping):
            raise SettingsError(f"--bids-filter-file: {kind!r} needs entities, as in {{'acquisition': 'dsi'}}")
        for key, wanted in query.items():
            if not isinstance(wanted, str | int | float | bool | list | tuple | type(None)):
                raise SettingsError(f"--bids-filter-file: {kind}: {key} is {wanted!r}; a value or a list is wanted")


def apply_filters(data: Mapping[str, Sequence[str]], filters: Filters | None) -> dict[str, list[str]]:
    """The files of each kind (`KINDS`) that meet its query."""
    return {
        kind: [path for path in paths if meets(path, (filters or {}).get(kind, {}))] for kind, paths in data.items()
    }


def meets(path: str, query: Mapping[str, Any]) -> bool:
    """Whether a file meets a query of PyBIDS entities.

    A list takes any of its values; null (or "Query.NONE") wants the entity absent, "*" (or "Query.ANY")
    present. Run numbers and echoes compare as numbers.
    """
    found: dict[str, str] = entities(path)
    found["extension"] = "." + Path(path).name.partition(".")[2]
    found["datatype"] = Path(path).parent.name
    return all(_agrees(found.get(SHORT.get(key, key)), wanted) for key, wanted in query.items())


def _agrees(value: str | None, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple):
        return any(_agrees(value, one) for one in wanted)
    if wanted is None or wanted == "Query.NONE":
        return value is None
    if wanted in ("*", "Query.ANY", "Query.REQUIRED"):
        return value is not None
    if wanted == "Query.OPTIONAL":
        return True
    if value is None:
        return False
    if value.isdigit() and str(wanted).isdigit():
        return value == str(wanted) or (isinstance(wanted, int) and int(value) == wanted)
    return value == _bare(str(wanted))


def _bare(label: str) -> str:
    head, dash, tail = label.partition("-")
    return tail if dash and head in ("sub", "ses") else label
