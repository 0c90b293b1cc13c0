"""Which of QSIPrep's options suit a dataset, in the words of one release, each with its reason."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dsiprep.errors import SettingsError
from dsiprep.qsiprep.dataset_cases import Case
from dsiprep.qsiprep.releases import Release

WORK = "/work"  # where the container sees the work folder

# The defaults of QSIPrep's own eddy_params.json, but for CUDA; `flm` was linear up to 0.24.0.
EDDY = {
    "flm": "quadratic", "slm": "linear", "fep": False, "interp": "spline", "nvoxhp": 1000, "fudge_factor": 10,
    "dont_sep_offs_move": False, "dont_peas": False, "niter": 5, "method": "jac", "repol": True, "num_threads": 1,
    "is_shelled": True, "use_cuda": True, "cnr_maps": True, "residuals": False, "output_type": "NIFTI_GZ", "args": "",
}  # fmt: skip


@dataclass(frozen=True)
class Wishes:
    """What the user asked for.

    Attributes
    ----------
    gpu : bool
        Use one wherever the release can.
    method : str
        "shoreline" or "tortoise", for data without shells.
    iterations : int
        Of SHORELine.
    resolution : float or None
        mm; None takes that of the data.
    skip_normalization : bool
    nprocs : int
        Threads in all.
    omp_nthreads : int or None
        Threads of one step; by default all of them, 8 at most.
    sessions : tuple of str
        Labels.
    license, filters : Path or None
        FreeSurfer's licence; a BIDS filter file.
    """

    gpu: bool = False
    method: str = "shoreline"
    iterations: int = 2
    resolution: float | None = None
    skip_normalization: bool = False
    nprocs: int = os.cpu_count() or 1
    omp_nthreads: int | None = None
    sessions: tuple[str, ...] = ()
    license: Path | None = None
    filters: Path | None = None


@dataclass(frozen=True)
class Choice:
    """Words of the command line, and why."""

    words: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Choices:
    """All that was decided for one case.

    Attributes
    ----------
    options : list of Choice
        QSIPrep's.
    gpu : str
        Why the container gets a GPU; empty if it does not.
    changed : tuple of str
        Swaps that the image needs, as `dsiprep-tools qsiprep-image` takes them.
    config : dict of str to str
        Files that the options name, by name; they go into the work folder.
    """

    options: list[Choice]
    gpu: str
    changed: tuple[str, ...]
    config: dict[str, str]


def choose_options(release: Release, case: Case, wishes: Wishes) -> Choices:
    """Decide for one case.

    Parameters
    ----------
    release : Release
    case : Case
    wishes : Wishes

    Returns
    -------
    Choices

    Raises
    ------
    SettingsError
        If the release has not what was asked for.
    """
    if wishes.method == "tortoise" and not release.has_methods:
        raise SettingsError(
            f"--hmc-method tortoise: QSIPrep has it from 26.1.0 on, not in {release.version}; leave it out, or take "
            "--version 26.1.1"
        )
    given = {
        "--shoreline-iters": wishes.iterations,
        "--nprocs": wishes.nprocs,
        "--omp-nthreads": wishes.omp_nthreads,
        "--output-resolution": wishes.resolution,
    }
    for option, number in given.items():
        if number is not None and not number > 0:
            raise SettingsError(f"{option} {number}: more than 0 is wanted")
    chosen = _shells(release, case, wishes) if case.shelled else _q_space(release, case, wishes)
    chosen.options.extend([*_anatomy(case, wishes), *_shape(case, wishes), *_selection(release, case, wishes)])
    return chosen


def _q_space(release: Release, case: Case, wishes: Wishes) -> Choices:
    """Never eddy, never TOPUP."""
    if not release.has_methods:
        options = [
            Choice(("--hmc-model", "3dSHORE"), "without shells in q-space; eddy would fit shells to what has none"),
            Choice(("--hmc-transform", "Rigid"), "a head is rigid; Affine, the default, is not more accurate (Cieslak "
                   "et al. 2024, doi 10.1002/hbm.26570)"),
            Choice(("--shoreline-iters", str(wishes.iterations)), _iterations(wishes)),
            Choice(("--pepolar-method", "DRBUDDI"), f"{_field(case, 'DRBUDDI')} TOPUP, the default, "
                   "goes with eddy: with 3dSHORE QSIPrep stops at it"),
        ]  # fmt: skip
        uses_gpu = wishes.gpu and case.pairs
        reason = "for DRBUDDI_cuda; the released image calls the CPU's DRBUDDI, so this one is built with it"
        return Choices(options, reason if uses_gpu else "", ("DRBUDDI=DRBUDDI_cuda",) if uses_gpu else (), {})
    options, config = _motion_methods(wishes)
    options.append(Choice(("--sdc-method", "drbuddi"), f"{_field(case, 'DRBUDDI')} TOPUP goes with eddy alone"))
    tasks = (["diffprep"] if wishes.method == "tortoise" else []) + (["drbuddi"] if case.pairs else [])
    if not (wishes.gpu and tasks):
        return Choices(options, "", (), config)
    options.append(Choice(("--gpu", *tasks), "these steps; synthstrip and synthseg can be added where the card has "
                          "the memory"))  # fmt: skip
    return Choices(options, f"for --gpu {' '.join(tasks)}", (), config)


def _motion_methods(wishes: Wishes) -> tuple[list[Choice], dict[str, str]]:
    if wishes.method == "tortoise":
        why = "DIFFPREP: motion and eddy currents on any q-space sampling; eddy would fit shells to what has none"
        return [Choice(("--hmc-method", "tortoise"), why)], {}
    why = ("SHORELine: without shells in q-space; eddy would fit shells to what has none. QSIPrep is going to drop it: "
           "--hmc-method tortoise is the other method without shells")  # fmt: skip
    settings = {"model": "3dshore", "iters": wishes.iterations, "transform": "Rigid"}
    return [
        Choice(("--hmc-method", "shoreline"), why),
        Choice(("--shoreline-config", f"{WORK}/shoreline.json"), f"a head is rigid; {_iterations(wishes)}"),
    ], {"shoreline.json": json.dumps(settings)}


def _iterations(wishes: Wishes) -> str:
    if wishes.iterations == 1:
        return "one round: half the time, and targets that are still blurred by motion"
    return f"{wishes.iterations} rounds; each later one predicts from volumes that were aligned before"


def _field(case: Case, corrector: str) -> str:
    """What there is to correct distortion with."""
    if case.pairs:
        return f"there are reversed phase encodings, from which {corrector} corrects distortion."
    if case.fieldmap:
        return "no reversed phase encodings; QSIPrep uses the gradient-echo fieldmap."
    return "no reversed phase encodings and no fieldmap: distortion stays."


def _shells(release: Release, case: Case, wishes: Wishes) -> Choices:
    why = "shells, whose signal eddy models, with its eddy currents"
    if release.has_methods:
        options = [
            Choice(("--hmc-method", "eddy"), why),
            Choice(("--sdc-method", "topup"), f"{_field(case, 'TOPUP')} It goes with eddy"),
        ]
        if wishes.gpu:
            options.append(Choice(("--gpu", "eddy"), "eddy on CUDA"))
        return Choices(options, "for --gpu eddy" if wishes.gpu else "", (), {})
    options = [
        Choice(("--hmc-model", "eddy"), why),
        Choice(("--pepolar-method", "TOPUP"), f"{_field(case, 'TOPUP')} It goes with eddy"),
    ]
    if not wishes.gpu:
        return Choices(options, "", (), {})
    options.append(Choice(("--eddy-config", f"{WORK}/eddy.json"), "QSIPrep's own settings of eddy, with use_cuda"))
    settings = EDDY | ({"flm": "linear"} if release.numbers < (1, 0, 0) else {})
    called, there = release.eddy_cuda
    changed = () if called == there else (f"{called}={there}",)
    return Choices(options, "for eddy on CUDA", changed, {"eddy.json": json.dumps(settings)})


def _anatomy(case: Case, wishes: Wishes) -> list[Choice]:
    options = []
    if case.anatomy == "T2w":
        options.append(Choice(("--anat-modality", "T2w"), "there is no T1w"))
    if case.anatomy == "none":
        options.append(Choice(("--anat-modality", "none"), "there is neither T1w nor T2w"))
    elif wishes.skip_normalization:
        options.append(
            Choice(("--skip-anat-based-spatial-normalization",), "as asked; `dsiprep-tools add-normalization` makes "
                   "the transforms later that QSIRecon's atlases need")
        )  # fmt: skip
    return options


def _shape(case: Case, wishes: Wishes) -> list[Choice]:
    size = case.spacing if wishes.resolution is None else wishes.resolution
    why = "mm; the smallest edge of the voxels" if wishes.resolution is None else "mm; as asked"
    shoreline = not case.shelled and wishes.method == "shoreline"
    side_by_side = "; SHORELine registers so many volumes side by side" if shoreline else ""
    steps = "eddy or ANTs" if case.shelled else "DRBUDDI or ANTs"
    return [
        Choice(("--output-resolution", f"{size:g}"), why),
        Choice(("--nprocs", str(wishes.nprocs)), f"threads in all{side_by_side}"),
        Choice(
            ("--omp-nthreads", str(wishes.omp_nthreads or min(8, wishes.nprocs))),
            f"threads of one step, such as {steps}",
        ),
    ]


def _selection(release: Release, case: Case, wishes: Wishes) -> list[Choice]:
    options = [Choice(("--participant-label", *case.subjects), "those that these options suit")]
    if wishes.sessions:
        if release.session_option is None:
            raise SettingsError(f"--session-label: QSIPrep {release.version} cannot choose sessions; 0.24.0 and later "
                                "can, and --bids-filter-file can always")  # fmt: skip
        options.append(Choice((release.session_option, *wishes.sessions), "as asked"))
    if wishes.filters:
        options.append(Choice(("--bids-filter-file", "/filter.json"), "as asked"))
    if wishes.license and release.takes_license:
        options.append(Choice(("--fs-license-file", "/license.txt"), "FreeSurfer's programs in the image"))
    return [*options, Choice(("-w", WORK), "intermediate files; keep it to go on after a stop")]
