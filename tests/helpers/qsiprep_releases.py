"""QSIPrep's own wheels from PyPI, for tests: fetched once, kept in pytest's cache, never in the project."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import pytest

from dsiprep.qsiprep.releases import CHECKED

UNREACHABLE: list[str] = []  # what pip said once, so that no other test waits for it again
__all__ = ["CHECKED", "parser_of", "wheel_of"]


def wheel_of(version: str, config: pytest.Config) -> Path:
    """The wheel of a release; the test is skipped where PyPI cannot be reached."""
    assert config.cache is not None
    kept = config.cache.mkdir("qsiprep") / f"qsiprep-{version}-py3-none-any.whl"
    if kept.is_file():
        return kept
    if UNREACHABLE:
        pytest.skip(UNREACHABLE[0])
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--retries",
            "1",
            "--no-deps",
            "--only-binary",
            ":all:",
        ]
        done = subprocess.run([*command, "-d", folder, f"qsiprep=={version}"], capture_output=True, text=True)
        found = list(Path(folder).glob("*.whl"))
        if not found:
            UNREACHABLE.append(f"QSIPrep {version} cannot be had from PyPI: {done.stderr.strip().splitlines()[-1:]}")
            pytest.skip(UNREACHABLE[0])
        found[0].replace(kept)
    return kept


def parser_of(wheel: Path, version: str, folder: Path) -> argparse.ArgumentParser:
    """The command line of a release, built by its own code; what that imports beside argparse is stood in for."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    name = f"qsiprep_{version.replace('.', '_')}"
    package = _package(name, folder / "qsiprep")
    config = types.ModuleType(f"{name}.config")
    config.environment = types.SimpleNamespace(version=version)  # type: ignore[attr-defined]
    config.DEBUG_MODES = ("fieldmaps", "pdb")  # type: ignore[attr-defined]
    package.config = config  # type: ignore[attr-defined]
    sys.modules[f"{name}.config"] = config
    for inner in ("cli", "utils", "data"):
        _package(f"{name}.{inner}", folder / "qsiprep" / inner)
    sys.modules[f"{name}.data"].load = lambda file: folder / "qsiprep" / "data" / file  # type: ignore[attr-defined]
    return importlib.import_module(f"{name}.cli.parser")._build_parser()


def _package(name: str, folder: Path) -> types.ModuleType:
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return package
