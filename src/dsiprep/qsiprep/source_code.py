"""QSIPrep's own source of one release as text: a wheel from PyPI, an installed package, or a file. Nothing is run."""

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
    """Modules of the package.

    Attributes
    ----------
    origin : str
        Where they came from, in words.
    modules : dict of str to bytes
        By path inside the package: "interfaces/tortoise.py".
    """

    origin: str
    modules: dict[str, bytes]

    def interfaces(self) -> dict[str, bytes]:
        """The modules that call programs, by path."""
        return {name: text for name, text in self.modules.items() if name.startswith("interfaces/")}


def find_source(release: Release, given: Path | None = None) -> Source:
    """The source of a release.

    Parameters
    ----------
    release : Release
    given : Path, optional
        A wheel or source archive, a `qsiprep` package folder, or one module of its `interfaces` (`tortoise.py`). By
        default the package installed beside dsiprep, if it is that release, or else PyPI's wheel.

    Returns
    -------
    Source

    Raises
    ------
    InputError
        If there is nothing to read, or it is another release.
    """
    if given is not None:
        return _of_file(release, given)
    return _installed(release) or _downloaded(release)


def _of_file(release: Release, given: Path) -> Source:
    if given.is_dir():
        return _of_folder(given)
    if not given.is_file():
        raise InputError(f"--source {given}: there is no such file; give a wheel, a module such as tortoise.py, or "
                         "the folder of the package")  # fmt: skip
    if given.suffix == ".py":
        return Source(str(given), {f"interfaces/{given.name}": given.read_bytes()})
    if f"-{release.version}-" not in given.name and f"-{release.version}." not in given.name:
        raise InputError(f"--source {given}: its name does not say {release.version}; give the archive of that release")
    return Source(str(given), _of_archive(given))


def _of_folder(folder: Path) -> Source:
    modules = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}
    if "interfaces/tortoise.py" not in modules:
        raise InputError(f"{folder}: no interfaces/tortoise.py in it; the folder of the qsiprep package is wanted")
    return Source(str(folder), modules)


def _installed(release: Release) -> Source | None:
    """From the environment that dsiprep runs in, if that very release is there."""
    try:
        found = importlib.metadata.distribution("qsiprep")
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = Path(str(found.locate_file("qsiprep")))
    if found.version != release.version or not folder.is_dir():
        return None
    return _of_folder(folder)


def _downloaded(release: Release) -> Source:
    """From PyPI's wheel: pip fetches it into a folder of its own and installs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--dest", folder, f"qsiprep=={release.version}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
            raise InputError(
                f"QSIPrep {release.version}: no wheel from PyPI ({said[-1] if said else 'pip failed'}). Without a "
                f"network, copy the module out of the image and give it with --source:\n  docker run --rm --entrypoint "
                f"cat {release.image} {release.site_packages}/qsiprep/interfaces/tortoise.py > tortoise.py"
            )
        return Source(f"PyPI's {wheels[0].name}", _of_archive(wheels[0]))


def _of_archive(path: Path) -> dict[str, bytes]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
        else:
            with tarfile.open(path) as archive:
                files = [entry for entry in archive if entry.isfile() and entry.name.endswith(".py")]
                members = {entry.name.partition("/")[2]: archive.extractfile(entry).read() for entry in files}  # type: ignore[union-attr]
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as problem:
        raise InputError(f"{path}: not readable as a wheel or source archive ({problem})") from None
    modules = {name.removeprefix(PACKAGE): text for name, text in members.items() if name.startswith(PACKAGE)}
    if "interfaces/tortoise.py" not in modules:
        raise SettingsError(f"{path}: no {PACKAGE}interfaces/tortoise.py in it; an archive of QSIPrep is wanted")
    return modules
