"""`dsiprep-tools`: phantom, score, demo, shoreline, drbuddi, convert-warp, qsiprep-image, qsiprep-command."""

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
from dsiprep.errors import DsiprepError, OutputError
from dsiprep.phantom.settings import PhantomSettings, demo_settings
from dsiprep.qsiprep.options import add_command_options, add_image_options, run_command, run_image
from dsiprep.settings import MotionSettings

if TYPE_CHECKING:
    Tools = argparse._SubParsersAction[Parser]


def build_parser() -> Parser:
    """All tools and their options."""
    parser = Parser(prog="dsiprep-tools", description="Companions of dsiprep.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dsiprep {__version__}")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    _add_phantom(tools)
    _add_score(tools)
    _add_demo(tools)
    _add_shoreline(tools)
    _add_finish(tools)
    _add_drbuddi(tools)
    _add_convert_warp(tools)
    _add_qsiprep(tools)
    return parser


def _add_phantom(tools: Tools) -> None:
    tool = tools.add_parser("phantom", help="write a digital DSI subject with known motion and distortion")
    tool.add_argument("out", type=Path, help="gets bids/ and truth/")
    for entry in dataclasses.fields(PhantomSettings):
        if entry.metadata.get("flags"):
            add_setting(tool, "", entry)
    tool.set_defaults(run=_phantom)


def _phantom(options: argparse.Namespace) -> int:
    from dsiprep.phantom.dataset import make_phantom

    chosen = PhantomSettings(**_said(options, PhantomSettings))
    where = make_phantom(options.out, chosen)
    print(f"Dataset: {where / 'bids'}\nTruth:   {where / 'truth'}")
    return 0


def _add_score(tools: Tools) -> None:
    tool = tools.add_parser("score", help="compare derivatives with the truth of a phantom")
    tool.add_argument("derivatives", type=Path)
    tool.add_argument("truth", type=Path)
    tool.set_defaults(run=_score)


def _score(options: argparse.Namespace) -> int:
    from dsiprep.score import print_scores, score

    print_scores(score(options.derivatives, options.truth))
    return 0


def _add_demo(tools: Tools) -> None:
    tool = tools.add_parser("demo", help="phantom, the whole pipeline, and the errors")
    tool.add_argument("out", type=Path, help="gets bids/, truth/ and derivatives/")
    tool.add_argument("--device", default="auto", help="where to compute")
    tool.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from dsiprep.phantom.dataset import make_phantom
    from dsiprep.score import print_scores, score

    out = options.out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / "truth").is_dir():
        raise OutputError(f"{out} holds other files; choose an empty or new folder for the demo")
    for part in ("bids", "truth", "derivatives", "work"):
        shutil.rmtree(out / part, ignore_errors=True)
    print("Building a digital DSI subject with known motion, distortion and noise ...", flush=True)
    make_phantom(out, demo_settings())
    derivatives = out / "derivatives"
    code = run_app(
        [str(out / "bids"), str(derivatives), "participant", "--output-resolution", "3", "--device",
         options.device, "--work-dir", str(out / "work")]
    )  # fmt: skip
    if code == 0:
        print_scores(score(derivatives, out / "truth"))
        print(f"Open the report: {derivatives / 'sub-01.html'}")
    return code


def _add_shoreline(tools: Tools) -> None:
    tool = tools.add_parser("shoreline", help="head motion, eddy currents and lost slices of one series")
    tool.add_argument("dwi", type=Path, help="4-D NIfTI series of one phase encoding")
    tool.add_argument("--bval", type=Path, metavar="FILE", help="b-values (default: beside the series)")
    tool.add_argument("--bvec", type=Path, metavar="FILE", help="b-vectors, FSL (default: beside the series)")
    tool.add_argument("--mask", type=Path, metavar="FILE", help="rough brain mask (default: found on the b=0)")
    tool.add_argument("--pe", metavar="i|j|k[-]", choices=("i", "j", "k", "i-", "j-", "k-"),
                      help="phase encoding, for eddy currents (default: from the .json beside it)")  # fmt: skip
    tool.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    tool.add_argument("--device", default="auto", help="where to compute")
    for entry in dataclasses.fields(MotionSettings):
        if entry.metadata.get("flags"):
            add_setting(tool, "", entry)
    tool.set_defaults(run=_shoreline)


def _shoreline(options: argparse.Namespace) -> int:
    from dsiprep.standalone.shoreline import run_on_files

    chosen = MotionSettings(**_said(options, MotionSettings))
    written = run_on_files(
        options.dwi, options.out, options.bval, options.bvec, options.mask, options.pe, chosen, options.device
    )
    print("\n".join(map(str, written)))
    return 0


def _add_finish(tools: Tools) -> None:
    tool = tools.add_parser("add-normalization", help="the transforms to a template for a run that skipped them")
    tool.add_argument("folder", type=Path, metavar="QSIPREP_DIR", help="derivatives of QSIPrep or dsiprep")
    tool.add_argument("--participant-label", required=True, metavar="LABEL", help="with or without sub-")
    tool.add_argument("--warp", type=Path, metavar="FILE", help="of mri_synthmorph -t, ACPC T1w to template")
    tool.add_argument("--inverse-warp", type=Path, metavar="FILE", help="of -T (default: computed from --warp)")
    tool.add_argument("--template", metavar="NAME", help="name of the template; needed with --warp")
    tool.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, cuda:N")
    tool.set_defaults(run=_finish)


def _finish(options: argparse.Namespace) -> int:
    from dsiprep.standalone.add_normalization import add_normalization

    added = add_normalization(
        options.folder,
        options.participant_label,
        warp=options.warp,
        inverse_warp=options.inverse_warp,
        template=options.template,
        device=options.device,
    )
    print("\n".join([*map(str, added.files), *added.said]))
    return 0


def _add_drbuddi(tools: Tools) -> None:
    tool = tools.add_parser("drbuddi", help="blip-up/blip-down distortion correction of two files")
    tool.add_argument("--up", type=Path, required=True, metavar="FILE", help="b=0 image or series")
    tool.add_argument("--down", type=Path, required=True, metavar="FILE", help="the same, phase encoding reversed")
    tool.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="folder for the results")
    tool.add_argument("--pe-dir", metavar="DIR", help="phase encoding of --up (j, i-); else from the sidecars")
    tool.add_argument("--readout-time", type=float, metavar="S", help="total readout time; else from the sidecars")
    tool.add_argument("--mask", type=Path, metavar="FILE", help="brain in --up; else found in it")
    tool.add_argument("--structural", type=Path, metavar="FILE", help="T2w or T1w: lets the two fields differ")
    tool.add_argument("--diffusion", action="store_true", help="compare volumes of low b, too: both files are "
                      "series with .bval and .bvec, corrected for motion and eddy currents")  # fmt: skip
    tool.add_argument("--device", default="auto", help="where to compute: auto, cpu, cuda, cuda:N")
    tool.set_defaults(run=_drbuddi)


def _drbuddi(options: argparse.Namespace) -> int:
    from dsiprep.standalone.blip_pair import correct_pair, write_pair

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


def _add_convert_warp(tools: Tools) -> None:
    tool = tools.add_parser("convert-warp", help="warps of FreeSurfer, FSL and ITK for other programs")
    tool.add_argument("file", type=Path, metavar="IN", help="warp or linear transform")
    tool.add_argument("out", type=Path, metavar="OUT", help=".h5; .nii.gz; or .mat, .txt for a linear transform")
    tool.add_argument("--affine", type=Path, metavar="FILE", help="linear transform that follows: x -> affine(warp(x))")
    tool.add_argument("--invert", action="store_true", help="write the inverse, and say how good it is")
    tool.add_argument("--source", type=Path, metavar="FILE", help="image that the warp brings over (for FSL, --invert)")
    tool.add_argument("--reference", type=Path, metavar="FILE", help="image that it is brought onto; gives the grid")
    tool.add_argument("--kind", choices=("itk", "freesurfer", "easyreg", "fsl", "fsl-absolute"),
                      help="what IN is, where it does not say")  # fmt: skip
    tool.add_argument("--to", choices=("itk", "freesurfer"), default="itk", help="for .nii.gz (default: itk)")
    tool.set_defaults(run=_convert_warp)


def _convert_warp(options: argparse.Namespace) -> int:
    from dsiprep.standalone.convert_warp import convert_warp

    said = convert_warp(
        options.file,
        options.out,
        affine=options.affine,
        invert=options.invert,
        source=options.source,
        reference=options.reference,
        kind=options.kind,
        to=options.to,
    )
    print("\n".join(said))
    return 0


def _add_qsiprep(tools: Tools) -> None:
    """Both tools for QSIPrep; what runs them is beside their options."""
    image = tools.add_parser("qsiprep-image", help="a QSIPrep image whose DRBUDDI, or other commands, use the GPU")
    add_image_options(image)
    image.set_defaults(run=run_image)
    command = tools.add_parser("qsiprep-command", help="QSIPrep's command for a dataset, with reasons")
    add_command_options(command)
    command.set_defaults(run=run_command)


def _said(options: argparse.Namespace, kind: type[PhantomSettings | MotionSettings]) -> dict[str, Any]:
    """What was said of some settings."""
    names = {entry.name for entry in dataclasses.fields(kind)}
    return {name: value for name, value in vars(options).items() if name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one tool; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except DsiprepError as error:
        print(f"dsiprep-tools: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
