"""A standard space to normalise to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dsiprep.data.grid import Volume


@dataclass(frozen=True, eq=False)
class Template:
    """A template under its TemplateFlow name.

    Attributes
    ----------
    name : str
        "MNI152NLin2009cAsym", "MNIInfant+2", ...: a label of BIDS.
    brain : Volume
        T1w or T2w intensities inside the brain, zero outside.
    mask : Volume
        0 or 1.
    tissue : Tensor, (3, i, j, k), or None
        Prior probabilities of CSF, GM, WM on the same grid; None where a template has none.
    origin : str
        Where it came from, for log and report: "TemplateFlow", "nilearn", or a folder.
    files : tuple of Path
        What it was read from.
    note : str
        What a person should know of it; empty where it is the one that was asked for.
    """

    name: str
    brain: Volume
    mask: Volume
    tissue: torch.Tensor | None
    origin: str
    files: tuple[Path, ...] = ()
    note: str = ""
