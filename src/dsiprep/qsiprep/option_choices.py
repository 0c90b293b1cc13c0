"""Choose the options of a QSIPrep release for a group of subjects, each with its reason."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from dsiprep.errors import SettingsError
from dsiprep.qsiprep.dataset_cases import Case
from dsiprep.qsiprep.releases import Release

WORK = "/work"  # work folder inside the container

# The defaults of QSIPrep's eddy_params.json, except for `use_cuda`; `flm` was linear up to 0.24.0.
EDDY_CONFIG = {
    "flm": "quadratic", "slm": "linear", "fep": False, "interp": "spline", "nvoxhp": 1000, "fudge_factor": 10,
    "dont_sep_offs_move": False, "dont_peas": False, "niter": 5, "method": "jac", "repol": True, "num_threads": 1,
    "is_shelled": True, "use_cuda": True, "cnr_maps": True, "residuals": False, "output_type": "NIFTI_GZ", "args": "",
}  # fmt: skip


@dataclass(frozen=True)
class UserOptions:
    """Options numbers by the user.

    Attributes
    ----------
    gpu : bool
        Use a GPU for all steps that support it in the release.
    method : str
        "shoreline" or "tortoise", for data without shells.
    iterations : int
        Number of SHORELine iterations.
    resolution : float or None
        Output voxel size in mm; None uses that of the data.
    skip_normalization : bool
    nprocs : int
        Total number of threads.
    omp_nthreads : int or None
        Threads per step; by default all of them, but at most 8.
    sessions : tuple of str
        Labels.
    license, filters : Path or None
        FreeSurfer licence and BIDS filter file.
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
class Option:
    """Command-line arguments and the reason for them."""

    arguments: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class OptionPlan:
    """Everything that is plan for one group of subjects.

    Attributes
    ----------
    options : list of Option
        Options of QSIPrep.
    gpu : str
        Reason reason the container needs a GPU; empty if it does not.
    swaps : tuple of str
        Values of `dsiprep-tools qsiprep-image --swap` for the image; empty for the released image.
    config : dict of str to str
        Contents of configuration files in the work folder, by file name.
    """

    options: list[Option]
    gpu: str
    swaps: tuple[str, ...]
    config: dict[str, str]


def choose_options(release: Release, case: Case, user: UserOptions) -> OptionPlan:
    """Choose the options for one group of subjects.

    Parameters
    ----------
    release : Release
    case : Case
    user : UserOptions

    Returns
    -------
    OptionPlan

    Raises
    ------
    SettingsError
        If the release lacks a requested option, or if a number is not positive.
    """
    if user.method == "tortoise" and not release.has_method_options:
        raise SettingsError(
            f"--hmc-method tortoise requires QSIPrep 26.1.0 or later, not {release.version}; remove it or use "
            "--version 26.1.1"
        )
    numbers = {
        "--shoreline-iters": user.iterations,
        "--nprocs": user.nprocs,
        "--omp-nthreads": user.omp_nthreads,
        "--output-resolution": user.resolution,
    }
    for option, number in numbers.items():
        if number is not None and not number > 0:
            raise SettingsError(f"{option} {number}: must be greater than 0")
    plan = _shell_options(release, case, user) if case.shelled else _q_space_options(release, case, user)
    plan.options.extend(_anatomy_options(case, user))
    plan.options.extend(_resource_options(case, user))
    plan.options.extend(_selection_options(release, case, user))
    return plan


def _q_space_options(release: Release, case: Case, user: UserOptions) -> OptionPlan:
    """Options for data without shells: FSL eddy needs shells, and QSIPrep cannot combine SHORELine with TOPUP."""
    if not release.has_method_options:
        options = [
            Option(("--hmc-model", "3dSHORE"), "does not need shells; FSL eddy does"),
            Option(("--hmc-transform", "Rigid"), "head motion is rigid; Affine, the default, is not more accurate "
                   "(Cieslak et al. 2024, doi 10.1002/hbm.26570)"),
            Option(("--shoreline-iters", str(user.iterations)), _iterations_reason(user)),
            Option(("--pepolar-method", "DRBUDDI"), f"{_distortion_reason(case, 'DRBUDDI')} QSIPrep cannot "
                   "combine TOPUP, the default, with 3dSHORE"),
        ]  # fmt: skip
        uses_gpu = user.gpu and case.pairs
        reason = "for DRBUDDI_cuda; the released image runs DRBUDDI on the CPU, so a modified image is needed"
        return OptionPlan(options, reason if uses_gpu else "", ("DRBUDDI=DRBUDDI_cuda",) if uses_gpu else (), {})
    options, config = _motion_options(user)
    options.append(
        Option(("--sdc-method", "drbuddi"), f"{_distortion_reason(case, 'DRBUDDI')} QSIPrep runs TOPUP only with eddy")
    )
    tasks = (["diffprep"] if user.method == "tortoise" else []) + (["drbuddi"] if case.pairs else [])
    if not (user.gpu and tasks):
        return OptionPlan(options, "", (), config)
    options.append(Option(("--gpu", *tasks), "steps that use the GPU; synthstrip and synthseg can be added if "
                          "its memory suffices"))  # fmt: skip
    return OptionPlan(options, f"for --gpu {' '.join(tasks)}", (), config)


def _motion_options(user: UserOptions) -> tuple[list[Option], dict[str, str]]:
    if user.method == "tortoise":
        reason = "DIFFPREP corrects motion and eddy currents for any q-space sampling; FSL eddy needs shells"
        return [Option(("--hmc-method", "tortoise"), reason)], {}
    reason = (
        "SHORELine does not need shells; FSL eddy does. QSIPrep plans to remove SHORELine; --hmc-method tortoise is "
        "the other method that does not need shells"
    )
    settings = {"model": "3dshore", "iters": user.iterations, "transform": "Rigid"}
    return [
        Option(("--hmc-method", "shoreline"), reason),
        Option(("--shoreline-config", f"{WORK}/shoreline.json"), f"head motion is rigid; {_iterations_reason(user)}"),
    ], {"shoreline.json": json.dumps(settings)}


def _iterations_reason(user: UserOptions) -> str:
    if user.iterations == 1:
        return "one iteration takes half the time, but its predictions are still blurred by motion"
    return f"{user.iterations} iterations; each one after the first predicts from aligned volumes"


def _distortion_reason(case: Case, method: str) -> str:
    """Sentence about the available data for distortion correction."""
    if case.pairs:
        return f"{method} corrects distortion with the reversed phase encodings."
    if case.fieldmap:
        return "no reversed phase encodings; QSIPrep uses the gradient-echo fieldmap."
    return "no reversed phase encodings and no fieldmap, so distortion is not corrected."


def _shell_options(release: Release, case: Case, user: UserOptions) -> OptionPlan:
    reason = "shelled data; eddy corrects motion and eddy currents"
    if release.has_method_options:
        options = [
            Option(("--hmc-method", "eddy"), reason),
            Option(
                ("--sdc-method", "topup"), f"{_distortion_reason(case, 'TOPUP')} TOPUP is QSIPrep's method with eddy"
            ),
        ]
        if user.gpu:
            options.append(Option(("--gpu", "eddy"), "eddy on CUDA"))
        return OptionPlan(options, "for --gpu eddy" if user.gpu else "", (), {})
    options = [
        Option(("--hmc-model", "eddy"), reason),
        Option(
            ("--pepolar-method", "TOPUP"), f"{_distortion_reason(case, 'TOPUP')} TOPUP is QSIPrep's method with eddy"
        ),
    ]
    if not user.gpu:
        return OptionPlan(options, "", (), {})
    options.append(Option(("--eddy-config", f"{WORK}/eddy.json"), "QSIPrep's default settings of eddy, with use_cuda"))
    settings = EDDY_CONFIG | ({"flm": "linear"} if release.numbers < (1, 0, 0) else {})
    called, available = release.eddy_cuda_commands
    swaps = () if called == available else (f"{called}={available}",)
    return OptionPlan(options, "for eddy on CUDA", swaps, {"eddy.json": json.dumps(settings)})


def _anatomy_options(case: Case, user: UserOptions) -> list[Option]:
    options = []
    if case.anatomy == "T2w":
        options.append(Option(("--anat-modality", "T2w"), "no T1w image"))
    if case.anatomy == "none":
        options.append(Option(("--anat-modality", "none"), "no T1w or T2w image"))
    elif user.skip_normalization:
        options.append(
            Option(("--skip-anat-based-spatial-normalization",), "as requested; `dsiprep-tools add-normalization` "
                   "can add the transforms that QSIRecon's atlases need")
        )  # fmt: skip
    return options


def _resource_options(case: Case, user: UserOptions) -> list[Option]:
    size = case.spacing if user.resolution is None else user.resolution
    reason = "mm; smallest voxel edge of the data" if user.resolution is None else "mm; as requested"
    shoreline = not case.shelled and user.method == "shoreline"
    parallel = "; SHORELine registers as many volumes in parallel" if shoreline else ""
    steps = "eddy or ANTs" if case.shelled else "DRBUDDI or ANTs"
    return [
        Option(("--output-resolution", f"{size:g}"), reason),
        Option(("--nprocs", str(user.nprocs)), f"total threads{parallel}"),
        Option(
            ("--omp-nthreads", str(user.omp_nthreads or min(8, user.nprocs))),
            f"threads per step, such as {steps}",
        ),
    ]


def _selection_options(release: Release, case: Case, user: UserOptions) -> list[Option]:
    options = [Option(("--participant-label", *case.subjects), "subjects that need these options")]
    if user.sessions:
        if release.session_option is None:
            raise SettingsError(f"--session-label: QSIPrep {release.version} cannot select sessions; use 0.24.0 or "
                                "later, or --bids-filter-file")  # fmt: skip
        options.append(Option((release.session_option, *user.sessions), "as requested"))
    if user.filters:
        options.append(Option(("--bids-filter-file", "/filter.json"), "as requested"))
    if user.license and release.has_license_option:
        options.append(
            Option(("--fs-license-file", "/license.txt"), "licence for the FreeSurfer programs in the image")
        )
    return [*options, Option(("-w", WORK), "intermediate files, from which an interrupted run resumes")]
