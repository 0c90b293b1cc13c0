"""Templates for spatial normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dsiprep.data.grid import Volume
from dsiprep.data.summary import Summarised


@dataclass(frozen=True, eq=False, repr=False)
class Template(Summarised):
    """A template and its TemplateFlow name.

    Attributes
    ----------
    name : str
        Used as a BIDS label: "MNI152NLin2009cAsym", "MNIInfant+2", ...
    brain : Volume
        T1w or T2w intensities inside the brain, zero outside.
    mask : Volume
        0 or 1.
    tissue : Tensor, (3, i, j, k), or None
        Prior probabilities of CSF, GM, WM on the same grid; None if the template has none.
    origin : str
        Source for log and report: "TemplateFlow", "nilearn", or a folder.
    files : tuple of Path
        Files it was read from.
    note : str
        Remark for the user; empty for the requested template itself.
    """

    name: str
    brain: Volume
    mask: Volume
    tissue: torch.Tensor | None
    origin: str
    files: tuple[Path, ...] = ()
    note: str = ""
