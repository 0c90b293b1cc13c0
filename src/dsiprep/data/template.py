"""A standard space to normalise to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsiprep.data.grid import Volume


@dataclass(frozen=True, eq=False)
class Template:
    """A template under its TemplateFlow name.

    Attributes
    ----------
    name : str
        "MNI152NLin2009cAsym", "MNI152NLin2009aSym", ...
    brain : Volume
        T1w intensities inside the brain, zero outside.
    mask : Volume
        0 or 1.
    tissue : Tensor, (3, i, j, k)
        Prior probabilities of CSF, GM, WM on the same grid.
    origin : str
        Where it came from, for log and report: "TemplateFlow", "nilearn".
    """

    name: str
    brain: Volume
    mask: Volume
    tissue: torch.Tensor
    origin: str
