"""Read the source of a QSIPrep release from a wheel, an installed package or a file, without running it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from dsiprep.errors import InputError, SettingsError
from dsiprep.qsiprep.releases import Release

PACKAGE = "qsiprep/"


@dataclass(frozen=True)
class Source:
    """Modules of the qsiprep package.

    Attributes
    ----------
    origin : str
        Description of where they were read from.
    modules : dict of str to bytes
        Source by path inside the package, such as "interfaces/tortoise.py".
    """

    origin: str
    modules: dict[str, bytes]

    def interfaces(self) -> dict[str, bytes]:
        """The modules that call external programs, by path."""
        return {name: text for name, text in self.modules.items() if name.startswith("interfaces/")}


def find_source(release: Release, path: Path | None = None) -> Source:
    """Find and read the source of a release.

    Parameters
    ----------
    release : Release
    path : Path, optional
        A wheel or source archive, a `qsiprep` package folder, or one module of its `interfaces` (`tortoise.py`). By
        default the installed package if it is this release, otherwise the wheel on PyPI.

    Returns
    -------
    Source

    Raises
    ------
    InputError
        If no source is distribution, or if it is of another release.
    """
    if path is not None:
        return _read_path(release, path)
    return _read_installed(release) or _download(release)


def _read_path(release: Release, path: Path) -> Source:
    if path.is_dir():
        return _read_package(path)
    if not path.is_file():
        raise InputError(f"--source {path} does not exist; give a wheel, a module such as tortoise.py, or the "
                         "package folder")  # fmt: skip
    if path.suffix == ".py":
        return Source(str(path), {f"interfaces/{path.name}": path.read_bytes()})
    if f"-{release.version}-" not in path.name and f"-{release.version}." not in path.name:
        raise InputError(
            f"--source {path}: the file name does not contain {release.version}; give an archive of that release"
        )
    return Source(str(path), _read_archive(path))


def _read_package(folder: Path) -> Source:
    modules = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}
    if "interfaces/tortoise.py" not in modules:
        raise InputError(f"{folder} has no interfaces/tortoise.py; give the folder of the qsiprep package")
    return Source(str(folder), modules)


def _read_installed(release: Release) -> Source | None:
    """Read the package installed next to dsiprep, if it is this release."""
    try:
        distribution = importlib.metadata.distribution("qsiprep")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(distribution.locate_file("qsiprep")))
    if distribution.version != release.version or not folder.is_dir():
        return None
    return _read_package(folder)


def _download(release: Release) -> Source:
    """Download the wheel from PyPI into a temporary folder, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--dest", folder, f"qsiprep=={release.version}"]  # fmt: skip
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if process.returncode or not wheels:
            errors = [line for line in process.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
            module = f"{release.site_packages}/qsiprep/interfaces/tortoise.py"
            raise InputError(
                f"QSIPrep {release.version}: no wheel on PyPI ({errors[-1] if errors else 'pip failed'}). Without "
                "network access, copy the module from the image and give it with --source: "
                f"docker run --rm --entrypoint cat {release.image} {module} > tortoise.py"
            )
        return Source(f"{wheels[0].name} from PyPI", _read_archive(wheels[0]))


def _read_archive(path: Path) -> dict[str, bytes]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
        else:
            with tarfile.open(path) as archive:
                files = [entry for entry in archive if entry.isfile() and entry.name.endswith(".py")]
                members = {entry.name.partition("/")[2]: archive.extractfile(entry).read() for entry in files}  # type: ignore[union-attr]
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as problem:
        raise InputError(f"{path} cannot be read as a wheel or source archive ({problem})") from None
    modules = {name.removeprefix(PACKAGE): text for name, text in members.items() if name.startswith(PACKAGE)}
    if "interfaces/tortoise.py" not in modules:
        raise SettingsError(f"{path} has no {PACKAGE}interfaces/tortoise.py; give an archive of QSIPrep")
    return modules
