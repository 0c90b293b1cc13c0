"""`dsiprep-tools qsiprep-image` and `qsiprep-command` on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """The options of `qsiprep-image`."""
    parser.add_argument("--version", required=True, metavar="V", help="release of QSIPrep, such as 1.0.1")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for what builds the image")
    parser.add_argument("--apptainer", action="store_true", help="an Apptainer definition, not a Dockerfile")
    parser.add_argument("--swap", action="append", default=[], metavar="COMMAND=REPLACEMENT",
                        help="another command to change, beside DRBUDDI=DRBUDDI_cuda; REPLACEMENT is a command, or gpu "
                        "for mri_synthseg and mri_synthstrip; may be given several times")  # fmt: skip
    parser.add_argument("--source", type=Path, metavar="FILE",
                        help="QSIPrep's source: a wheel, its package folder or one module such as tortoise.py "
                        "(default: an installed QSIPrep of that release, or else PyPI)")  # fmt: skip


def run_image(options: argparse.Namespace) -> int:
    """Write the image's files and say what was changed."""
    from dsiprep.qsiprep.image import explain_image, plan_image, write_image

    recipe = plan_image(options.version, options.swap, options.source, options.apptainer)
    if recipe.files:
        write_image(recipe, options.out)
    print(explain_image(recipe, options.out))
    return 0


def add_command_options(parser: argparse.ArgumentParser) -> None:
    """The options of `qsiprep-command`; those that QSIPrep has too are called as in its newest release."""
    from dsiprep.qsiprep.option_choices import Wishes

    usual = Wishes()
    parser.add_argument("bids_dir", type=Path, help="root of the dataset; it is looked at, not changed")
    parser.add_argument("output_dir", type=Path, help="where QSIPrep is to write")
    parser.add_argument("--version", required=True, metavar="V", help="release of QSIPrep, such as 26.1.1")
    parser.add_argument("--apptainer", action="store_true", help="for Apptainer, not Docker")
    parser.add_argument("--gpu", action="store_true", help="use a GPU wherever the release can")
    parser.add_argument("--participant-label", nargs="+", metavar="LABEL", help="with or without sub-; all by default")
    parser.add_argument("--session-label", nargs="+", default=[], metavar="LABEL", help="with or without ses-")
    parser.add_argument("--bids-filter-file", type=Path, metavar="FILE", help="JSON of PyBIDS entities")
    parser.add_argument("--output-resolution", type=float, metavar="MM", help="voxel size (default: that of the data)")
    parser.add_argument("--skip-anat-based-spatial-normalization", dest="skip_normalization", action="store_true",
                        help="no registration of the T1w to MNI space")  # fmt: skip
    parser.add_argument("--hmc-method", choices=("shoreline", "tortoise"), default=usual.method,
                        help="head motion of data without shells (default: %(default)s)")  # fmt: skip
    parser.add_argument("--shoreline-iters", type=int, default=usual.iterations, metavar="N",
                        help="rounds of SHORELine (default: %(default)s)")  # fmt: skip
    parser.add_argument("--nprocs", type=int, default=usual.nprocs, metavar="N", help="threads in all (default: cores)")
    parser.add_argument("--omp-nthreads", type=int, metavar="N", help="threads of one step (default: all, 8 at most)")
    parser.add_argument("-w", "--work-dir", type=Path, metavar="DIR", help="default: OUTPUT_DIR with _work")
    parser.add_argument("--fs-license-file", type=Path, metavar="FILE", help="FreeSurfer's licence, up to 26.0")
    parser.add_argument("--image", metavar="NAME", help="another image than that of the release")


def run_command(options: argparse.Namespace) -> int:
    """Print the script."""
    from dsiprep.qsiprep.command import Place, write_command
    from dsiprep.qsiprep.option_choices import Wishes

    out = options.output_dir
    place = Place(options.bids_dir, out, options.work_dir or out.with_name(f"{out.resolve().name}_work"),
                  options.apptainer, options.image)  # fmt: skip
    wishes = Wishes(
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
    print(write_command(options.version, place, wishes, options.participant_label), end="")
    return 0
