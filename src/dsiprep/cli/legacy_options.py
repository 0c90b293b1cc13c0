"""Older QSIPrep names of options and values, converted to the current settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dsiprep.cli.unsupported import UNSUPPORTED_VALUES, value_converter


def add_legacy_options(parser: argparse.ArgumentParser) -> None:
    """Add hidden options under which older releases of QSIPrep knew a setting, converted to its current value."""
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    parser.add_argument("--pepolar-method", dest="distortion.method", type=_sdc_method_from_pepolar, **hidden)
    parser.add_argument("--b0-to-anat-transform", dest="coregister.dof", type=_dof_from_transform, **hidden)
    parser.add_argument("--b1-biascorrect-stage", dest="denoise.biascorrect", type=_biascorrect_from_stage, **hidden)
    parser.add_argument("--shoreline-config", type=Path, metavar="JSON", help=argparse.SUPPRESS)


def _sdc_method_from_pepolar(text: str) -> str:
    return str(value_converter("--sdc-method", str, ("drbuddi",))(text.lower()))


def _dof_from_transform(text: str) -> int:
    if text not in ("Rigid", "Affine"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of Rigid, Affine")
    return 6 if text == "Rigid" else 12


def _biascorrect_from_stage(text: str) -> str:
    if ("--b1-biascorrect-stage", text) in UNSUPPORTED_VALUES:
        raise argparse.ArgumentTypeError(UNSUPPORTED_VALUES["--b1-biascorrect-stage", text])
    if text not in ("final", "none"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of final, none")
    return "n4" if text == "final" else "none"
