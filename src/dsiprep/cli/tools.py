"""The `dsiprep-tools` command line: phantom, score, demo, single processing steps, and tools for QSIPrep."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsiprep import __version__
from dsiprep.cli.app import Parser, add_setting
from dsiprep.cli.app import main as run_app
from dsiprep.cli.array import add_array_options, run_array
from dsiprep.errors import DsiprepError, OutputError
from dsiprep.phantom.settings import PhantomSettings, demo_settings
from dsiprep.qsiprep.options import add_command_options, add_image_options, run_command, run_image
from dsiprep.settings import MotionSettings

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Parser]

DEVICE_HELP = "compute device: auto, cpu, cuda, cuda:N (default: auto)"


def build_parser() -> Parser:
    """Return the parser of the `dsiprep-tools` command."""
    parser = Parser(
        prog="dsiprep-tools",
        description="Additional tools of dsiprep: phantoms, scores, single processing steps, and tools for QSIPrep.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsiprep {__version__}")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    _add_phantom(tools)
    _add_score(tools)
    _add_demo(tools)
    _add_shoreline(tools)
    _add_normalization(tools)
    _add_drbuddi(tools)
    _add_convert_warp(tools)
    _add_array(tools)
    _add_qsiprep(tools)
    return parser


def _add_phantom(tools: Subparsers) -> None:
    tool = tools.add_parser("phantom", help="simulate a DSI subject with known motion and distortion")
    tool.add_argument("out", type=Path, help="output folder; bids/ and truth/ are written to it")
    for entry in dataclasses.fields(PhantomSettings):
        if entry.metadata.get("flags"):
            add_setting(tool, "", entry)
    tool.set_defaults(run=_phantom)


def _phantom(options: argparse.Namespace) -> int:
    from dsiprep.phantom.dataset import make_phantom

    chosen = PhantomSettings(**_given_settings(options, PhantomSettings))
    out = make_phantom(options.out, chosen)
    print(f"Dataset: {out / 'bids'}\nTruth:   {out / 'truth'}")
    return 0


def _add_score(tools: Subparsers) -> None:
    tool = tools.add_parser("score", help="compare derivatives with the ground truth of a phantom")
    tool.add_argument("derivatives", type=Path, help="output folder of dsiprep or QSIPrep")
    tool.add_argument("truth", type=Path, help="truth/ folder of the phantom")
    tool.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    from dsiprep.score import print_scores, score

    print_scores(score(options.derivatives, options.truth))
    return 0


def _add_demo(tools: Subparsers) -> None:
    tool = tools.add_parser("demo", help="simulate a subject, preprocess it and print the scores")
    tool.add_argument("out", type=Path, help="output folder; bids/, truth/ and derivatives/ are written to it")
    tool.add_argument("--device", default="auto", help=DEVICE_HELP)
    tool.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from dsiprep.phantom.dataset import make_phantom
    from dsiprep.phantom.head import TEMPLATE
    from dsiprep.score import print_scores, score

    out = options.out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / "truth").is_dir():
        raise OutputError(f"{out} contains other files; choose a new or empty folder for the demo")
    for part in ("bids", "truth", "derivatives", "work"):
        shutil.rmtree(out / part, ignore_errors=True)
    print("Simulating a DSI subject with known motion, distortion and noise ...", flush=True)
    make_phantom(out, demo_settings())
    derivatives = out / "derivatives"
    code = run_app(
        [str(out / "bids"), str(derivatives), "participant", "--output-resolution", "3", "--device",
         options.device, "--work-dir", str(out / "work"), "--anatomical-template", TEMPLATE]
    )  # fmt: skip
    if code == 0:
        print_scores(score(derivatives, out / "truth"))
        print(f"Report: {derivatives / 'sub-01.html'}")
    return code


def _add_shoreline(tools: Subparsers) -> None:
    tool = tools.add_parser("shoreline", help="estimate head motion, eddy currents and outlier slices of one series")
    tool.add_argument("dwi", type=Path, help="4-D NIfTI series with a single phase encoding")
    tool.add_argument("--bval", type=Path, metavar="FILE", help="b-values (default: .bval file next to the series)")
    tool.add_argument(
        "--bvec",
        type=Path,
        metavar="FILE",
        help="b-vectors in FSL's convention, as those written (default: .bvec file next to the series)",
    )
    tool.add_argument("--mask", type=Path, metavar="FILE", help="approximate brain mask (default: computed from b=0)")
    tool.add_argument("--pe", metavar="i|j|k[-]", choices=("i", "j", "k", "i-", "j-", "k-"),
                      help="phase-encoding direction, for eddy currents (default: from the JSON sidecar)")  # fmt: skip
    tool.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="output folder")
    tool.add_argument("--device", default="auto", help=DEVICE_HELP)
    for entry in dataclasses.fields(MotionSettings):
        if entry.metadata.get("flags"):
            add_setting(tool, "", entry)
    tool.set_defaults(run=_shoreline)


def _shoreline(options: argparse.Namespace) -> int:
    from dsiprep.api.shoreline import run_on_files

    chosen = MotionSettings(**_given_settings(options, MotionSettings))
    written = run_on_files(
        options.dwi, options.out, options.bval, options.bvec, options.mask, options.pe, chosen, options.device
    )
    print("\n".join(map(str, written)))
    return 0


def _add_normalization(tools: Subparsers) -> None:
    tool = tools.add_parser("add-normalization", help="add template transforms to a run that skipped normalisation")
    tool.add_argument("folder", type=Path, metavar="QSIPREP_DIR", help="output folder of QSIPrep or dsiprep")
    tool.add_argument("--participant-label", required=True, metavar="LABEL", help="subject, with or without sub-")
    tool.add_argument(
        "--warp",
        type=Path,
        metavar="FILE",
        help="warp of mri_synthmorph -t, from the ACPC T1w to the template (default: registration by dsiprep)",
    )
    tool.add_argument(
        "--inverse-warp",
        type=Path,
        metavar="FILE",
        help="inverse warp of mri_synthmorph -T (default: computed from --warp)",
    )
    tool.add_argument("--template", metavar="NAME", help="template name; required with --warp")
    tool.add_argument("--device", default="auto", help=DEVICE_HELP)
    tool.set_defaults(run=_normalization)


def _normalization(options: argparse.Namespace) -> int:
    from dsiprep.api.add_normalization import add_normalization

    result = add_normalization(
        options.folder,
        options.participant_label,
        warp=options.warp,
        inverse_warp=options.inverse_warp,
        template=options.template,
        device=options.device,
    )
    print("\n".join([*map(str, result.files), *result.notes]))
    return 0


def _add_drbuddi(tools: Subparsers) -> None:
    tool = tools.add_parser("drbuddi", help="blip-up/blip-down (PEPOLAR) distortion correction of two files")
    tool.add_argument("--up", type=Path, required=True, metavar="FILE", help="b=0 image or series")
    tool.add_argument("--down", type=Path, required=True, metavar="FILE", help="the same with reversed phase encoding")
    tool.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="output folder")
    tool.add_argument(
        "--pe-dir", metavar="DIR", help="phase encoding of --up, such as j or i- (default: from the sidecars)"
    )
    tool.add_argument(
        "--readout-time", type=float, metavar="S", help="total readout time in s (default: from the sidecars)"
    )
    tool.add_argument("--mask", type=Path, metavar="FILE", help="brain mask of --up (default: computed from it)")
    tool.add_argument(
        "--structural", type=Path, metavar="FILE", help="T2w or T1w image; allows the two displacement fields to differ"
    )
    tool.add_argument("--diffusion", action="store_true", help="also compare low-b volumes; both files must be "
                      "series with .bval and .bvec, corrected for motion and eddy currents")  # fmt: skip
    tool.add_argument("--device", default="auto", help=DEVICE_HELP)
    tool.set_defaults(run=_drbuddi)


def _drbuddi(options: argparse.Namespace) -> int:
    from dsiprep.api.blip_pair import correct_pair, write_pair

    result = correct_pair(
        options.up,
        options.down,
        pe_dir=options.pe_dir,
        readout_time=options.readout_time,
        mask=options.mask,
        structural=options.structural,
        diffusion=options.diffusion,
        device=options.device,
    )
    write_pair(result, options.out)
    print(f"Corrected: {options.out / 'dwiref.nii.gz'}")
    return 0


def _add_convert_warp(tools: Subparsers) -> None:
    tool = tools.add_parser("convert-warp", help="convert warps and linear transforms of FreeSurfer, FSL and ITK")
    tool.add_argument("file", type=Path, metavar="IN", help="warp or linear transform")
    tool.add_argument(
        "out", type=Path, metavar="OUT", help="output file: .h5, .nii.gz, or for linear transforms .mat or .txt"
    )
    tool.add_argument(
        "--affine", type=Path, metavar="FILE", help="linear transform applied after the warp: x -> affine(warp(x))"
    )
    tool.add_argument("--invert", action="store_true", help="write the inverse and report its accuracy")
    tool.add_argument(
        "--source",
        type=Path,
        metavar="FILE",
        help="moving image of the warp (required for FSL; gives the grid with --invert)",
    )
    tool.add_argument(
        "--reference", type=Path, metavar="FILE", help="fixed image of the warp; gives the grid without --invert"
    )
    tool.add_argument("--kind", choices=("itk", "freesurfer", "easyreg", "fsl", "fsl-absolute"),
                      help="format of IN, if its header does not identify it")  # fmt: skip
    tool.add_argument(
        "--to", choices=("itk", "freesurfer"), default="itk", help="format of .nii.gz output (default: itk)"
    )
    tool.set_defaults(run=_convert_warp)


def _convert_warp(options: argparse.Namespace) -> int:
    from dsiprep.api.convert_warp import convert_warp

    messages = convert_warp(
        options.file,
        options.out,
        affine=options.affine,
        invert=options.invert,
        source=options.source,
        reference=options.reference,
        kind=options.kind,
        to=options.to,
    )
    print("\n".join(messages))
    return 0


def _add_array(tools: Subparsers) -> None:
    tool = tools.add_parser("array", help="write a job array that processes the subjects of a dataset")
    add_array_options(tool)
    tool.set_defaults(run=run_array)


def _add_qsiprep(tools: Subparsers) -> None:
    image = tools.add_parser("qsiprep-image", help="write build files for a QSIPrep image that uses the GPU")
    add_image_options(image)
    image.set_defaults(run=run_image)
    command = tools.add_parser(
        "qsiprep-command", help="write the QSIPrep command for a dataset and explain its options"
    )
    add_command_options(command)
    command.set_defaults(run=run_command)


def _given_settings(
    options: argparse.Namespace, settings_class: type[PhantomSettings | MotionSettings]
) -> dict[str, Any]:
    """Settings that were given on the command line, by field name."""
    names = {entry.name for entry in dataclasses.fields(settings_class)}
    return {name: value for name, value in vars(options).items() if name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one tool and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except DsiprepError as error:
        print(f"dsiprep-tools: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
