"""Bounds of the checks in a report: the file that ships with dsiprep, and files of laboratories in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsiprep.errors import SettingsError
from dsiprep.option import read_toml

DEFAULT_FILE = Path(__file__).with_name("verdict_bounds.toml")
KEYS = ("look", "bad", "source")


@dataclass(frozen=True)
class Bound:
    """Values beyond which a check is "look" or "bad", and where they come from; None sets no bound."""

    look: float | None
    bad: float | None
    source: str


def read_bounds(path: Path | str = "") -> dict[str, Bound]:
    """Bounds by the key of the check.

    Parameters
    ----------
    path : Path or str
        A file in place of dsiprep's own. Checks that it does not name keep dsiprep's bounds.

    Raises
    ------
    SettingsError
        If the file cannot be read, or names a check or an entry that does not exist.
    """
    bounds = _parse(DEFAULT_FILE)
    if path:
        given = _parse(Path(path))
        if unknown := sorted(set(given) - set(bounds)):
            raise SettingsError(
                f"--report-bounds {path}: unknown check {', '.join(unknown)}; there are {', '.join(bounds)}"
            )
        bounds |= given
    return bounds


def _parse(path: Path) -> dict[str, Bound]:
    content = read_toml("--report-bounds", path, "give a TOML file")
    return {key: _bound(key, entry, path) for key, entry in content.items()}


def _bound(key: str, entry: object, path: Path) -> Bound:
    if not isinstance(entry, Mapping) or set(entry) - set(KEYS):
        raise SettingsError(f"--report-bounds {path}: [{key}] may hold {', '.join(KEYS)} only")
    limits = [entry.get(name) for name in ("look", "bad")]
    if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in limits):
        raise SettingsError(f"--report-bounds {path}: look and bad of [{key}] must be numbers")
    look, bad = (None if value is None else float(value) for value in limits)
    return Bound(look, bad, str(entry.get("source", f"set in {path.name}")))
