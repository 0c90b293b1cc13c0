"""Write the QSIPrep command for a dataset as a shell script: `dsiprep-tools qsiprep-command`.

Comments in the script give the reason for each option. The script can be piped to sh.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as version_of
from pathlib import Path

from dsiprep.errors import InputError, SettingsError
from dsiprep.io.bids_filters import Filters
from dsiprep.io.files import read_json
from dsiprep.qsiprep.dataset_cases import Case, find_cases
from dsiprep.qsiprep.image import DRBUDDI
from dsiprep.qsiprep.option_choices import WORK, OptionPlan, UserOptions, choose_options
from dsiprep.qsiprep.releases import Release

DATA, OUT = "/data", "/out"


@dataclass(frozen=True)
class ContainerSetup:
    """How the container runs.

    Attributes
    ----------
    bids, out, work : Path
        Host folders of the dataset, the outputs and the intermediate files.
    apptainer : bool
        Use Apptainer instead of Docker.
    image : str or None
        Image to run instead of the released one.
    """

    bids: Path
    out: Path
    work: Path
    apptainer: bool = False
    image: str | None = None


def write_command(
    version: str, setup: ContainerSetup, user: UserOptions, participants: Sequence[str] | None = None
) -> str:
    """Return a shell script that runs QSIPrep on a dataset, with the reason for each option.

    Parameters
    ----------
    version : str
        Release of QSIPrep.
    setup : ContainerSetup
    user : UserOptions
    participants : sequence of str, optional
        Subject labels; all by default.

    Returns
    -------
    str
        One container command for each group of subjects with the same options.

    Raises
    ------
    InputError, MetadataError
        If the dataset cannot be used.
    SettingsError
        If the release lacks a requested option, or if QSIPrep would reject a folder.
    """
    release = Release.of(version)
    setup = replace(setup, bids=setup.bids.resolve(), out=setup.out.resolve(), work=setup.work.resolve())
    _check_folders(setup)
    cases = find_cases(setup.bids, participants, user.sessions or None, _read_filters(user.filters))
    lines = [
        "#!/bin/sh",
        f"# QSIPrep {release.version} on {setup.bids}, written by dsiprep {version_of('dsiprep')}.",
    ]
    if not release.checked:
        lines.append("# This release is unknown to dsiprep: compare the options with its --help.")
    lines += ["set -eu", f"mkdir -p {shlex.quote(str(setup.out))} {shlex.quote(str(setup.work))}"]
    for case in cases:
        lines += ["", *_section(release, case, choose_options(release, case, user), setup, user)]
    return "\n".join(lines) + "\n"


def _check_folders(setup: ContainerSetup) -> None:
    if setup.out == setup.bids:
        raise SettingsError(f"{setup.out}: QSIPrep rejects the dataset itself as the output folder; choose another, "
                            f"such as {setup.bids / 'derivatives' / 'qsiprep'}")  # fmt: skip
    if setup.bids == setup.work or setup.bids in setup.work.parents:
        raise SettingsError(
            f"--work-dir {setup.work}: QSIPrep rejects a work folder inside the dataset; choose another"
        )


def _read_filters(path: Path | None) -> Filters | None:
    if path is None:
        return None
    try:
        return read_json(path)
    except InputError as problem:
        raise InputError(f"--bids-filter-file: {problem}") from None


def _section(release: Release, case: Case, plan: OptionPlan, setup: ContainerSetup, user: UserOptions) -> list[str]:
    """Comments, configuration files and container command for one group of subjects."""
    image, note = _image(release, plan, setup)
    comments = [f"{', '.join(f'sub-{label}' for label in case.subjects)}: {'; '.join(case.schemes)}"]
    comments += [f"  {' '.join(option.arguments)}: {option.reason}" for option in plan.options]
    if plan.gpu:
        comments.append(f"  {'--nv' if setup.apptainer else '--gpus all'}: {plan.gpu}")
    elif user.gpu:
        comments.append("  no GPU: none of these steps uses one in this release")
    comments += [f"  {image}: {note}"] if note else []
    lines = [line for comment in comments for line in _comment(comment)]
    for name, content in plan.config.items():
        lines.append(f"printf '%s\\n' {shlex.quote(content)} > {shlex.quote(str(setup.work / name))}")
    arguments = [(DATA, OUT, "participant"), *(option.arguments for option in plan.options)]
    groups = [*_container(release, setup, user, bool(plan.gpu)), (image,), *arguments]
    return [*lines, " \\\n    ".join(shlex.join(group) for group in groups)]


def _image(release: Release, plan: OptionPlan, setup: ContainerSetup) -> tuple[str, str]:
    """Return the image to run, and for an image that is not released how to build it."""
    if setup.image:
        return setup.image, "as requested"
    if not plan.swaps:
        return (f"docker://{release.image}" if setup.apptainer else release.image), ""
    swaps = [f"--swap {swap}" for swap in plan.swaps if swap != f"{DRBUDDI.command}={DRBUDDI.replacement}"]
    build = " ".join(["dsiprep-tools qsiprep-image --version", release.version, *swaps, "-o DIR"])
    image = release.gpu_image
    if setup.apptainer:
        image = f"qsiprep-{release.version}-gpu.sif"
        build += " --apptainer"
    move = f" && mv DIR/{image} ." if setup.apptainer else ""
    return image, f"modified image; build it first: {build} && sh DIR/build.sh{move}"


def _container(release: Release, setup: ContainerSetup, user: UserOptions, gpu: bool) -> list[tuple[str, ...]]:
    mounts = [(setup.bids, DATA, True), (setup.out, OUT, False), (setup.work, WORK, False)]
    mounts += [(user.filters.resolve(), "/filter.json", True)] if user.filters else []
    mounts += [(user.license.resolve(), "/license.txt", True)] if user.license and release.has_license_option else []
    bind = "-B" if setup.apptainer else "-v"
    program = ("apptainer", "run", "--containall", "--writable-tmpfs") if setup.apptainer else ("docker", "run", "--rm")
    gpu_flags = [("--nv",) if setup.apptainer else ("--gpus", "all")] if gpu else []
    return [
        program,
        *gpu_flags,
        *((bind, f"{path}:{inside}{':ro' if read_only else ''}") for path, inside, read_only in mounts),
    ]


def _comment(text: str) -> list[str]:
    """Wrap a text into comment lines."""
    indent = len(text) - len(text.lstrip())
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# " + " " * (indent + 4),
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip
