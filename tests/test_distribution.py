"""What the wheel and the source distribution contain, and what they tell a package index."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with both."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def tracked(*folders: str) -> set[str]:
    listing = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return {name for name in listing.stdout.splitlines() if (ROOT / name).exists()}


def test_wheel_holds_the_package_alone(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
    assert path.stat().st_size < 3e6
    assert {name for name in names if ".dist-info/" not in name} >= {
        name.removeprefix("src/") for name in tracked("src/dsiprep")
    }
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dsiprep"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_source_distribution_holds_what_builds_and_tests_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= tracked("src", "tests", "pyproject.toml", "README.md", "LICENSE")
    assert not {name for name in names if name.startswith((".gpu", ".venv", "site", "demo"))}


def test_metadata_is_complete(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
        (scripts,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert metadata["Name"] == "dsiprep"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# ")
    assert {"cluster", "test", "dev", "docs"} <= set(metadata.get_all("Provides-Extra", []))
    urls = {url.split(", ")[0] for url in metadata.get_all("Project-URL", [])}
    assert urls == {"Documentation", "Source", "Issues", "Changelog"}
    classifiers = metadata.get_all("Classifier", [])
    assert all(f"Programming Language :: Python :: 3.{minor}" in classifiers for minor in (11, 12, 13))
    assert "dsiprep = dsiprep.cli.app:main" in scripts
    assert "dsiprep-tools = dsiprep.cli.tools:main" in scripts
