"""Command-line interface of `dsiprep-tools qsiprep-image` and `qsiprep-command`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qsiprep-image`."""
    parser.add_argument("--version", required=True, metavar="V", help="QSIPrep release, such as 1.0.1")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the build files")
    parser.add_argument(
        "--apptainer", action="store_true", help="write an Apptainer definition instead of a Dockerfile"
    )
    parser.add_argument("--swap", action="append", default=[], metavar="COMMAND=REPLACEMENT",
                        help="further command to replace, in addition to DRBUDDI=DRBUDDI_cuda; REPLACEMENT is a "
                        "command, or gpu for mri_synthseg and mri_synthstrip; can be repeated")  # fmt: skip
    parser.add_argument("--source", type=Path, metavar="FILE",
                        help="source of QSIPrep: a wheel, the package folder or one module such as tortoise.py "
                        "(default: the installed QSIPrep if it is this release, otherwise PyPI)")  # fmt: skip


def run_image(options: argparse.Namespace) -> int:
    """Write the build files and print what was changed."""
    from dsiprep.qsiprep.image import explain_image, plan_image, write_image

    recipe = plan_image(options.version, options.swap, options.source, options.apptainer)
    if recipe.files:
        write_image(recipe, options.out)
    print(explain_image(recipe, options.out))
    return 0


def add_command_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `qsiprep-command`; options shared with QSIPrep have the names of its newest release."""
    from dsiprep.qsiprep.option_choices import UserOptions

    defaults = UserOptions()
    parser.add_argument("bids_dir", type=Path, help="root of the BIDS dataset (read only)")
    parser.add_argument("output_dir", type=Path, help="output folder of QSIPrep")
    parser.add_argument("--version", required=True, metavar="V", help="QSIPrep release, such as 26.1.1")
    parser.add_argument("--apptainer", action="store_true", help="use Apptainer instead of Docker")
    parser.add_argument("--gpu", action="store_true", help="use a GPU for all steps that support it in this release")
    parser.add_argument(
        "--participant-label", nargs="+", metavar="LABEL", help="subjects, with or without sub- (default: all)"
    )
    parser.add_argument(
        "--session-label", nargs="+", default=[], metavar="LABEL", help="sessions, with or without ses-"
    )
    parser.add_argument("--bids-filter-file", type=Path, metavar="FILE", help="JSON file of PyBIDS filters")
    parser.add_argument(
        "--output-resolution", type=float, metavar="MM", help="output voxel size (default: that of the data)"
    )
    parser.add_argument("--skip-anat-based-spatial-normalization", dest="skip_normalization", action="store_true",
                        help="do not register the T1w to MNI space")  # fmt: skip
    parser.add_argument("--hmc-method", choices=("shoreline", "tortoise"), default=defaults.method,
                        help="head-motion correction of data without shells (default: %(default)s)")  # fmt: skip
    parser.add_argument("--shoreline-iters", type=int, default=defaults.iterations, metavar="N",
                        help="number of SHORELine iterations (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--nprocs", type=int, default=defaults.nprocs, metavar="N", help="total threads (default: all cores)"
    )
    parser.add_argument("--omp-nthreads", type=int, metavar="N", help="threads per step (default: all, at most 8)")
    parser.add_argument("-w", "--work-dir", type=Path, metavar="DIR", help="work folder (default: OUTPUT_DIR_work)")
    parser.add_argument(
        "--fs-license-file", type=Path, metavar="FILE", help="FreeSurfer licence, for releases up to 26.0"
    )
    parser.add_argument("--image", metavar="NAME", help="image to run instead of the released one")


def run_command(options: argparse.Namespace) -> int:
    """Print the script that runs QSIPrep."""
    from dsiprep.qsiprep.command import ContainerSetup, write_command
    from dsiprep.qsiprep.option_choices import UserOptions

    out = options.output_dir
    work = options.work_dir or out.with_name(f"{out.resolve().name}_work")
    setup = ContainerSetup(options.bids_dir, out, work, options.apptainer, options.image)
    user_options = UserOptions(
        gpu=options.gpu,
        method=options.hmc_method,
        iterations=options.shoreline_iters,
        resolution=options.output_resolution,
        skip_normalization=options.skip_normalization,
        nprocs=options.nprocs,
        omp_nthreads=options.omp_nthreads,
        sessions=tuple(label.removeprefix("ses-") for label in options.session_label),
        license=options.fs_license_file,
        filters=options.bids_filter_file,
    )
    print(write_command(options.version, setup, user_options, options.participant_label), end="")
    return 0
