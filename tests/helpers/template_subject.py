"""Synthetic subject made from the packaged template by a known smooth deformation, at 5 mm."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.io.templates import load_template
from dsiprep.ops.image.filters import resample_to_spacing
from dsiprep.ops.image.interpolation import resample_onto

MM = 5.0
NAME = "MNI152NLin2009aSym"
GRID = Grid((40, 48, 42), np.array([[-MM, 0, 0, 97], [0, -MM, 0, 113], [0, 0, MM, -93], [0, 0, 0, 1]]))


def template_to_subject(points: np.ndarray) -> np.ndarray:
    """Points of the template to points of the subject: scaled by 4 %, shifted and smoothly deformed."""
    return points * 1.04 + np.array([2.0, -3, 1]) + 3 * np.sin(points[..., [1, 2, 0]] / 25)


def subject_to_template(points: np.ndarray) -> np.ndarray:
    """Inverse of `template_to_subject`, by fixed-point iteration."""
    guess = points.copy()
    for _ in range(60):
        guess = guess + (points - template_to_subject(guess)) / 1.04
    return guess


@cache
def make_template() -> Template:
    """The packaged template resampled to 5 mm."""
    full = load_template(NAME)

    def coarse(data: torch.Tensor) -> torch.Tensor:
        return resample_to_spacing(Volume(data, full.brain.grid), MM).data

    mask = (coarse(full.mask.data) > 0.5).float()
    brain = Volume(coarse(full.brain.data) * mask, full.brain.grid.at_spacing(MM))
    return Template(NAME, brain, Volume(mask, brain.grid), torch.stack([coarse(t) for t in full.tissue]), "test")


@cache
def make_subject() -> tuple[Volume, Volume]:
    """Brain image and brain mask of the subject, on an LPS+ grid."""
    full = load_template(NAME)
    points = GRID.to_world(np.moveaxis(np.indices(GRID.shape), 0, -1))
    shift = torch.from_numpy(np.moveaxis(subject_to_template(points) - points, -1, 0).astype(np.float32))
    brain, mask = resample_onto(
        torch.stack([full.brain.data, full.mask.data]), full.brain.grid, GRID, displacement=shift
    )
    return Volume(brain, GRID), Volume((mask > 0.5).float(), GRID)
