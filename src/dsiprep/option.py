"""Dataclass fields that are command-line options, and classes that check them."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

from dsiprep.errors import SettingsError

__all__ = ["Checked", "option", "read_toml"]

KINDS: dict[type, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
}


def option(
    default: Any,
    help: str,
    *flags: str,
    choices: tuple[Any, ...] = (),
    metavar: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
) -> Any:
    """A dataclass field that is also a command-line option.

    Parameters
    ----------
    default
    help : str
        For the command line and the docs.
    flags : str
        Names of the option, the preferred one first; none for a setting of the library alone.
    choices : tuple
        Values that are accepted; any by default.
    metavar : str
        Placeholder for the value in the help.
    least, above, most : float, optional
        Smallest accepted value, a bound that has to be exceeded, and the largest accepted value.
    """
    bounds = {"least": least, "above": above, "most": most}
    return field(
        default=default, metadata={"help": help, "flags": flags, "choices": choices, "metavar": metavar, **bounds}
    )


class Checked:
    """Settings that refuse values of the wrong type or out of range when they are made."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            value, default = getattr(self, entry.name), cast(Any, entry.default)
            if problem := _problem(value, default, entry.metadata):
                flags = entry.metadata["flags"]
                shown = f" ({flags[0]})" if flags else ""
                raise SettingsError(f"{type(self).__name__}.{entry.name}{shown}: {problem}")
            object.__setattr__(self, entry.name, type(default)(value))  # 2 and numpy.float32(2) become 2.0


def _problem(value: Any, default: Any, metadata: Any) -> str:
    """What is wrong with a value, or nothing."""
    kind, name = KINDS[type(default)]
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        return f"{value!r} is not {name}"
    if metadata["choices"] and value not in metadata["choices"]:
        return f"{value!r} is not one of {', '.join(map(str, metadata['choices']))}"
    if kind not in (bool, str) and abs(cast(float, value)) > sys.float_info.max:
        return "the value is not a finite number"
    least, above, most = (metadata[bound] for bound in ("least", "above", "most"))
    if least is not None and not value >= least:
        return f"{value:g} is too small; the smallest accepted value is {least:g}"
    if above is not None and not value > above:
        return f"{value:g} is too small; a value above {above:g} is needed"
    if most is not None and not value <= most:
        return f"{value:g} is too large; the largest accepted value is {most:g}"
    return ""


def read_toml(flag: str, path: Path, remedy: str) -> dict[str, Any]:
    """The content of the TOML file that an option names.

    Raises
    ------
    SettingsError
        If it is not a file or cannot be read; `remedy` says what to give instead.
    """
    if path.exists() and not path.is_file():
        raise SettingsError(f"{flag} {path}: not a file; {remedy}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{flag} {path}: {error.strerror}; {remedy}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{flag} {path}: not a TOML file: {error}") from error
