"""QSIPrep options and values that dsiprep does not support, each with a message that names the alternative."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dsiprep.errors import SettingsError
from dsiprep.settings import Settings

if TYPE_CHECKING:
    from dsiprep.data.acquisition import Unit

# QSIPrep options that dsiprep does not have, and the alternative.
UNSUPPORTED_OPTIONS = {
    "--bids-database-dir": "not needed, because indexing takes a second or two; remove the option",
    "--low-mem": "not needed, because series are always memory-mapped; remove the option",
    "--gpu": "one option selects the device for all stages: use --device cuda",
    "--infant": "ages are not read from the dataset: choose a template instead, for example "
    "--anatomical-template MNIInfant+2 --anat-modality T2w --subject-anatomical-reference sessionwise "
    "(TemplateFlow's MNIInfant cohorts 1 to 11: 0-2, 2-5, 5-8, 8-11, 11-14, 14-17, 17-21, 21-27, 27-33, 33-44 and "
    "44-60 months)",
    "--longitudinal": "renamed: use --subject-anatomical-reference unbiased",
    "--use-syn-sdc": "SyN is not available: use --sdc-anat-reference auto, which corrects distortion with the tissue "
    "classes of the structural image",
    "--sdc-fieldmapless-method": "there is only one fieldmapless method: remove the option and use "
    "--sdc-anat-reference auto",
    "--force-syn": "a fieldmap is preferred where there is one: to ignore it, use --ignore fieldmaps "
    "--sdc-anat-reference auto",
    "--dwiref-definition": "the b=0 reference (dwiref) is always the unbiased b=0 template",
    "--report-output-level": "reports are always written to the root of the output folder",
    "--eddy-config": "FSL eddy is not available; see --hmc-method",
    "--recon-spec": "dsiprep does no reconstruction: run QSIRecon on the output folder of dsiprep",
}

EDDY_NEEDS_SHELLS = "FSL eddy needs shelled data and is not available in dsiprep: use --hmc-method shoreline"
# Values of shared options that QSIPrep accepts and dsiprep does not, and the alternative.
UNSUPPORTED_VALUES = {
    ("--hmc-method", "eddy"): "dsiprep does not run FSL eddy: use --hmc-method shoreline, which also handles shells",
    (
        "--hmc-method",
        "tortoise",
    ): "TORTOISE is available only for distortion correction (--sdc-engine tortoise): use --hmc-method shoreline",
    ("--hmc-model", "eddy"): "dsiprep does not run FSL eddy: use --hmc-model 3dSHORE, which also handles shells",
    (
        "--hmc-model",
        "tortoise",
    ): "TORTOISE is available only for distortion correction (--sdc-engine tortoise): use --hmc-model 3dSHORE",
    ("--sdc-method", "topup"): "TOPUP is not offered by dsiprep: use --sdc-method drbuddi",
    ("--sdc-method", "topup+drbuddi"): "TOPUP is not offered by dsiprep: use --sdc-method drbuddi",
    ("--sdc-anat-reference", "synb0"): "SynB0 is not available: use --sdc-anat-reference auto",
    ("--unringing-method", "mrdegibbs"): "Gibbs unringing is not available: use --unringing-method none",
    ("--unringing-method", "rpg"): "Gibbs unringing is not available: use --unringing-method none",
    ("--unringing-method", "svht"): "Gibbs unringing is not available: use --unringing-method none",
    ("--dwi-biascorrect", "auto"): "use --dwi-biascorrect n4 or none",
    ("--anat-biascorrect", "auto"): "use --anat-biascorrect n4 or none",
    ("--b1-biascorrect-stage", "legacy"): "use --b1-biascorrect-stage final or none",
}
# Accepted by the parser because the message depends on the sampling scheme; `reject_eddy` raises the error.
EDDY_VALUES = {("--hmc-method", "eddy"), ("--hmc-model", "eddy")}


class RejectOption(argparse.Action):
    """Exit with the message of an unsupported option."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        flag = self.option_strings[0]
        parser.error(f"{flag}: {UNSUPPORTED_OPTIONS[flag]}")


def value_converter(flag: str, value_type: type, choices: tuple[Any, ...]) -> Callable[[str], Any]:
    """Return an argparse converter whose error message lists the valid values or explains an unsupported one."""

    def convert(text: str) -> Any:
        if (flag, text) in EDDY_VALUES:
            return text
        if (flag, text) in UNSUPPORTED_VALUES:
            raise argparse.ArgumentTypeError(UNSUPPORTED_VALUES[flag, text])
        try:
            value = value_type(text)
        except ValueError:
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number")
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, choices))}")
        return value

    return convert


def take_eddy(values: dict[str, Any]) -> tuple[str, str] | None:
    """Remove a request for FSL eddy from option values by setting, and return its flag and value."""
    for flag, setting in (("--hmc-method", "motion.method"), ("--hmc-model", "motion.model")):
        if (flag, values.get(setting)) in EDDY_VALUES:
            return flag, str(values.pop(setting))
    return None


def reject_eddy(requested: tuple[str, str] | None, chosen: Settings, units: Sequence[Unit]) -> None:
    """Reject FSL eddy, with a message that depends on the sampling scheme of the units.

    Parameters
    ----------
    requested : (str, str) or None
        From `take_eddy`.

    Raises
    ------
    SettingsError
        If eddy was requested.
    """
    if requested is None:
        return
    from dsiprep.io.bids import scheme_of

    flag, value = requested
    for unit in units:
        scheme = scheme_of(unit, chosen.acquisition.b0_threshold)
        if scheme is not None and not scheme.shelled:
            raise SettingsError(f"{flag} {value}: {unit.name} is {scheme.description}. {EDDY_NEEDS_SHELLS}")
    raise SettingsError(f"{flag} {value}: {UNSUPPORTED_VALUES[requested]}")
