"""Options and values of QSIPrep that dsiprep refuses, each with a sentence on what to do instead."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dsiprep.errors import SettingsError
from dsiprep.settings import Settings

if TYPE_CHECKING:
    from dsiprep.data.acquisition import Unit

# Options that users of QSIPrep know and dsiprep has not, and what to do without them.
NOT_HERE = {
    "--bids-database-dir": "the dataset is indexed in a second or two without a database; leave it out",
    "--low-mem": "series are memory-mapped anyway; leave it out",
    "--gpu": "one option serves all stages: use --device cuda",
    "--infant": "ages are not read: name the template, as in --anatomical-template MNIInfant+2 --anat-modality T2w "
    "--subject-anatomical-reference sessionwise (cohorts 1 to 11 of TemplateFlow's MNIInfant: 0-2, 2-5, 5-8, 8-11, "
    "11-14, 14-17, 17-21, 21-27, 27-33, 33-44 and 44-60 months)",
    "--longitudinal": "its name is --subject-anatomical-reference unbiased now",
    "--use-syn-sdc": "there is no SyN in here: use --sdc-anat-reference auto, which takes the tissues of the "
    "structural image",
    "--sdc-fieldmapless-method": "there is one method, and it needs no program: leave it out, and say "
    "--sdc-anat-reference auto",
    "--force-syn": "a fieldmap is always better where there is one; use --ignore fieldmaps --sdc-anat-reference auto",
    "--dwiref-definition": "the dwiref is the unbiased b=0 template",
    "--report-output-level": "reports are written to the root of the output folder",
    "--eddy-config": "there is no eddy in here; see --hmc-method",
    "--recon-spec": "reconstruction is QSIRecon's work; give it this output folder",
}

# Values that upstream takes for options that dsiprep has, and why they are refused.
SHELLS_ONLY = (
    "eddy and TOPUP suit shelled data; DSI takes 3dSHORE and DRBUDDI: use --hmc-method shoreline --sdc-method drbuddi"
)
NOT_BUILT = {
    ("--hmc-method", "eddy"): "dsiprep has no FSL eddy: use --hmc-method shoreline, which serves shells too",
    (
        "--hmc-method",
        "tortoise",
    ): "TORTOISE serves distortion (--sdc-engine tortoise) alone: use --hmc-method shoreline",
    ("--hmc-model", "eddy"): "dsiprep has no FSL eddy: use --hmc-model 3dSHORE, which serves shells too",
    ("--hmc-model", "tortoise"): "TORTOISE serves distortion (--sdc-engine tortoise) alone: use --hmc-model 3dSHORE",
    ("--sdc-method", "topup"): "dsiprep has no TOPUP: use --sdc-method drbuddi, which serves shells too",
    ("--sdc-method", "topup+drbuddi"): "dsiprep has no TOPUP: use --sdc-method drbuddi",
    ("--sdc-anat-reference", "synb0"): "SynB0 is not built in: use --sdc-anat-reference auto",
    ("--denoise-method", "patch2self"): "Patch2Self is not built yet: use --denoise-method dwidenoise",
    ("--denoise-method", "dwidenoise2"): "dwidenoise2 is not built yet: use --denoise-method dwidenoise",
    ("--denoise-method", "svht"): "svht is not built yet: use --denoise-method dwidenoise",
    ("--unringing-method", "mrdegibbs"): "unringing is not built yet: use --unringing-method none",
    ("--unringing-method", "rpg"): "unringing is not built yet: use --unringing-method none",
    ("--unringing-method", "svht"): "unringing is not built yet: use --unringing-method none",
    ("--dwi-biascorrect", "auto"): "use --dwi-biascorrect n4 or none",
    ("--anat-biascorrect", "auto"): "use --anat-biascorrect n4 or none",
    ("--b1-biascorrect-stage", "legacy"): "use --b1-biascorrect-stage final or none",
}
SHELL_TOOLS = {("--hmc-method", "eddy"), ("--hmc-model", "eddy"), ("--sdc-method", "topup"),
               ("--sdc-method", "topup+drbuddi")}  # fmt: skip


class Refuse(argparse.Action):
    """An option of QSIPrep that is not here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        flag = self.option_strings[0]
        parser.error(f"{flag}: {NOT_HERE[flag]}")


def value_of(flag: str, kind: type, choices: tuple[Any, ...]) -> Callable[[str], Any]:
    """A converter for argparse that says which values there are, and why one that QSIPrep takes is not among them."""

    def convert(text: str) -> Any:
        if (flag, text) in SHELL_TOOLS:
            return text  # judged later, with the b-table at hand
        if (flag, text) in NOT_BUILT:
            raise argparse.ArgumentTypeError(NOT_BUILT[flag, text])
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, choices))}")
        return value

    return convert


def refuse_shell_tools(chosen: Settings, units: Sequence[Unit]) -> None:
    """Say why eddy and TOPUP are not the way, with the sampling scheme at hand.

    Raises
    ------
    SettingsError
        If one of them was asked for.
    """
    asked = [("--hmc-method", chosen.motion.method), ("--hmc-model", chosen.motion.model),
             ("--sdc-method", chosen.distortion.method)]  # fmt: skip
    wrong = [pair for pair in asked if pair in SHELL_TOOLS]
    if not wrong:
        return
    from dsiprep.io.bids import scheme_of

    for unit in units:
        scheme = scheme_of(unit, chosen.acquisition.b0_threshold)
        if scheme is not None and not scheme.shelled:
            flag, value = wrong[0]
            raise SettingsError(f"{flag} {value}: {unit.name} is {scheme.description}. {SHELLS_ONLY}")
    raise SettingsError(f"{wrong[0][0]} {wrong[0][1]}: {NOT_BUILT[wrong[0]]}")
