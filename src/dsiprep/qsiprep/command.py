"""QSIPrep's command for a dataset, as a shell script: `dsiprep-tools qsiprep-command`.

The reasons are comments of the script, so it explains itself when it is kept, and can be piped to sh.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as version_of
from pathlib import Path

from dsiprep.errors import InputError, SettingsError
from dsiprep.io.bids_filters import Filters
from dsiprep.qsiprep.dataset_cases import Case, find_cases
from dsiprep.qsiprep.image import DRBUDDI
from dsiprep.qsiprep.option_choices import WORK, Choices, Wishes, choose_options
from dsiprep.qsiprep.releases import Release

DATA, OUT = "/data", "/out"


@dataclass(frozen=True)
class Place:
    """Where it runs.

    Attributes
    ----------
    bids, out, work : Path
        Folders of the machine.
    apptainer : bool
        Apptainer, not Docker.
    image : str or None
        In place of the release's own.
    """

    bids: Path
    out: Path
    work: Path
    apptainer: bool = False
    image: str | None = None


def write_command(version: str, place: Place, wishes: Wishes, participants: Sequence[str] | None = None) -> str:
    """The script that runs QSIPrep on a dataset, with its reasons.

    Parameters
    ----------
    version : str
        QSIPrep's.
    place : Place
    wishes : Wishes
    participants : sequence of str, optional
        Labels; all by default.

    Returns
    -------
    str
        One container command for every group of subjects that the same options suit.

    Raises
    ------
    InputError, MetadataError
        If the dataset cannot be used.
    SettingsError
        If the release has not what was asked for, or folders lie where QSIPrep refuses them.
    """
    release = Release.of(version)
    place = replace(place, bids=place.bids.resolve(), out=place.out.resolve(), work=place.work.resolve())
    _check_places(place)
    cases = find_cases(place.bids, participants, wishes.sessions or None, _filters(wishes.filters))
    lines = [
        "#!/bin/sh",
        f"# QSIPrep {release.version} on {place.bids}, by dsiprep {version_of('dsiprep')}. Nothing was run yet.",
    ]
    if not release.checked:
        lines.append("# This release is not among those that dsiprep knows: compare the options with its --help.")
    lines += ["set -eu", f"mkdir -p {shlex.quote(str(place.out))} {shlex.quote(str(place.work))}"]
    for case in cases:
        lines += ["", *_section(release, case, choose_options(release, case, wishes), place, wishes)]
    return "\n".join(lines) + "\n"


def _check_places(place: Place) -> None:
    if place.out == place.bids:
        raise SettingsError(f"{place.out}: the output folder is the dataset itself, which QSIPrep refuses; choose "
                            f"{place.bids / 'derivatives' / 'qsiprep'}, for example")  # fmt: skip
    if place.bids == place.work or place.bids in place.work.parents:
        raise SettingsError(f"--work-dir {place.work}: inside the dataset, which QSIPrep refuses; choose another")


def _filters(path: Path | None) -> Filters | None:
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise InputError(f"--bids-filter-file {path}: not readable as JSON ({problem})") from None
    if not isinstance(found, dict):
        raise InputError(f'--bids-filter-file {path}: an object is wanted, as in {{"dwi": {{"acquisition": "dsi"}}}}')
    return found


def _section(release: Release, case: Case, chosen: Choices, place: Place, wishes: Wishes) -> list[str]:
    """Reasons, files and command for one case."""
    image, note = _image(release, chosen, place)
    remarks = [f"{', '.join(f'sub-{label}' for label in case.subjects)}: {'; '.join(case.schemes)}"]
    remarks += [f"  {' '.join(choice.words)}: {choice.reason}" for choice in chosen.options]
    if chosen.gpu:
        remarks.append(f"  {'--nv' if place.apptainer else '--gpus all'}: {chosen.gpu}")
    elif wishes.gpu:
        remarks.append("  no GPU: none of these steps uses one in this release")
    remarks += [f"  {image}: {note}"] if note else []
    lines = [line for remark in remarks for line in _comment(remark)]
    for name, content in chosen.config.items():
        lines.append(f"printf '%s\\n' {shlex.quote(content)} > {shlex.quote(str(place.work / name))}")
    arguments = [(DATA, OUT, "participant"), *(choice.words for choice in chosen.options)]
    words = [*_container(release, place, wishes, bool(chosen.gpu)), (image,), *arguments]
    return [*lines, " \\\n    ".join(shlex.join(group) for group in words)]


def _image(release: Release, chosen: Choices, place: Place) -> tuple[str, str]:
    """The image to run, and how to get it where it is not the released one."""
    if place.image:
        return place.image, "as asked"
    if not chosen.changed:
        return (f"docker://{release.image}" if place.apptainer else release.image), ""
    swaps = [f"--swap {swap}" for swap in chosen.changed if swap != f"{DRBUDDI.command}={DRBUDDI.replacement}"]
    build = " ".join(["dsiprep-tools qsiprep-image --version", release.version, *swaps, "-o DIR"])
    made = release.custom
    if place.apptainer:
        made = f"qsiprep-{release.version}-gpu.sif"
        build += " --apptainer"
    fetch = f" && mv DIR/{made} ." if place.apptainer else ""
    return made, f"the released image with other commands; make it first: {build} && sh DIR/build.sh{fetch}"


def _container(release: Release, place: Place, wishes: Wishes, gpu: bool) -> list[tuple[str, ...]]:
    mounts = [(place.bids, DATA, True), (place.out, OUT, False), (place.work, WORK, False)]
    mounts += [(wishes.filters.resolve(), "/filter.json", True)] if wishes.filters else []
    mounts += [(wishes.license.resolve(), "/license.txt", True)] if wishes.license and release.takes_license else []
    bind = "-B" if place.apptainer else "-v"
    head = ("apptainer", "run", "--containall", "--writable-tmpfs") if place.apptainer else ("docker", "run", "--rm")
    card = [("--nv",) if place.apptainer else ("--gpus", "all")] if gpu else []
    return [head, *card, *((bind, f"{path}:{inside}{':ro' if only else ''}") for path, inside, only in mounts)]


def _comment(text: str) -> list[str]:
    """A remark as comment lines."""
    depth = len(text) - len(text.lstrip())
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# " + " " * (depth + 4),
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip
