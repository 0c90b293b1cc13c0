"""QSIPrep wheels from PyPI for the tests, downloaded once into pytest's cache."""

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

from dsiprep.qsiprep.releases import CHECKED_RELEASES

DOWNLOAD_ERRORS: list[str] = []  # the first error, so that no other test tries again
__all__ = ["CHECKED_RELEASES", "parser_of", "wheel_of"]


def wheel_of(version: str, config: pytest.Config) -> Path:
    """Path of the wheel of a release; the test is skipped if PyPI cannot be reached."""
    assert config.cache is not None
    wheel = config.cache.mkdir("qsiprep") / f"qsiprep-{version}-py3-none-any.whl"
    if wheel.is_file():
        return wheel
    if DOWNLOAD_ERRORS:
        pytest.skip(DOWNLOAD_ERRORS[0])
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--retries", "1", "--no-deps",
                   "--only-binary", ":all:"]  # fmt: skip
        process = subprocess.run([*command, "-d", folder, f"qsiprep=={version}"], capture_output=True, text=True)
        downloaded = list(Path(folder).glob("*.whl"))
        if not downloaded:
            DOWNLOAD_ERRORS.append(
                f"QSIPrep {version} cannot be downloaded from PyPI: {process.stderr.strip().splitlines()[-1:]}"
            )
            pytest.skip(DOWNLOAD_ERRORS[0])
        downloaded[0].replace(wheel)
    return wheel


def parser_of(wheel: Path, version: str, folder: Path) -> argparse.ArgumentParser:
    """The parser of a release, built by its own code; the modules it imports from QSIPrep are replaced by stubs."""
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
