"""The options of a run as a TOML file, `logs/dsiprep.toml`, which --config-file takes back."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsiprep import __version__
from dsiprep.errors import SettingsError
from dsiprep.option import read_toml
from dsiprep.settings import Settings

__all__ = ["expand_config_file", "run_as_toml"]

LIBRARIES = ("numpy", "scipy", "numba", "torch", "nibabel", "SimpleITK", "qsiplan", "cs_dmri")
# Options of one call, which the next one should not repeat.
NOT_REPEATED = (
    "help",
    "version",
    "verbose",
    "dry_run",
    "json",
    "validate",
    "config_file",
    "reports_only",
    "boilerplate_only",
)
QSIPREP_SECTIONS = ("environment", "execution", "workflow", "nipype")  # of the config.toml that QSIPrep writes


def expand_config_file(arguments: Sequence[str]) -> list[str]:
    """Command line in which `--config-file FILE` is replaced by the options in the file.

    They come before the options that are given, which therefore take precedence.

    Raises
    ------
    SettingsError
        If the file cannot be used.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config-file", nargs="?", const="")
    found, rest = reader.parse_known_args(list(arguments))
    if found.config_file is None:
        return list(arguments)
    if not found.config_file:
        raise SettingsError("--config-file: give a file, such as the logs/dsiprep.toml of an earlier run")
    given = _options_of(Path(found.config_file))
    first_option = next((n for n, word in enumerate(rest) if word.startswith("-")), len(rest))
    return [*rest[:first_option], *given, *rest[first_option:]]


def _options_of(path: Path) -> list[str]:
    content = read_toml("--config-file", path, "give the dsiprep.toml of a run")
    options = content.get("options")
    if not isinstance(options, Mapping):
        found = ", ".join(content) or "nothing"
        whose = ", as QSIPrep's has: its settings cannot be taken over" if set(content) & set(QSIPREP_SECTIONS) else ""
        raise SettingsError(f"--config-file {path}: no [options] in it but {found}{whose}; give dsiprep's own file")
    return [word for name, value in options.items() for word in _as_words(path, f"--{name}", value)]


def _as_words(path: Path, flag: str, value: object) -> list[str]:
    """An option and its value as words of a command line."""
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    if isinstance(value, str | int | float):
        return [flag, str(value)]
    raise SettingsError(f"--config-file {path}: {flag[2:]} is a {type(value).__name__}; give text, a number or a list")


def run_as_toml(parser: argparse.ArgumentParser, options: argparse.Namespace, chosen: Settings, command: str) -> str:
    """Versions, command and every option of a run with its value, as TOML; options without a value are left out."""
    settings = {
        f"{part.name}.{entry.name}": getattr(getattr(chosen, part.name), entry.name)
        for part in dataclasses.fields(chosen)
        for entry in dataclasses.fields(getattr(chosen, part.name))
    }
    options = argparse.Namespace(**{**vars(options), **settings})
    entries = {"dsiprep": __version__, "python": platform.python_version(), "system": platform.platform()}
    entries |= {name: version(name) for name in LIBRARIES}
    lines = [
        "# A run of dsiprep. `dsiprep BIDS_DIR OUTPUT_DIR participant --config-file THIS_FILE` repeats it.",
        f"command = {_toml(command)}",
        "",
        "[versions]",
        *(f"{name} = {_toml(value)}" for name, value in entries.items()),
        "",
        "[options]",
    ]
    for action in parser._actions:
        if not action.option_strings or action.help == argparse.SUPPRESS or action.dest in NOT_REPEATED:
            continue
        value = _value_of(action, options)
        if value not in (None, "", [], ()):
            flag = next(name for name in action.option_strings if name.startswith("--"))
            lines.append(f"{flag[2:]} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _value_of(action: argparse.Action, options: argparse.Namespace) -> Any:
    """The value of an option, or for a switch whether it was given."""
    value = getattr(options, action.dest, None)
    if action.nargs == 0 and isinstance(action.const, bool):
        return value is not None and value == action.const
    return value


def _toml(value: object) -> str:
    """A value as TOML; strings of JSON are strings of TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(str(value))
