"""Whether the images of a pair agree with the phase-encoding axis that their sidecars give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.acquisition import AxisCheck, displacement_angle
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip
from dsiprep.stages.distortion import coarse_misfit
from dsiprep.stages.pair_geometry import PairGeometry, pair_geometry

__all__ = ["check_axis"]

OPPOSITE = 135.0  # degrees between displacements


def check_axis(blips: tuple[Blip, ...], b0s: tuple[torch.Tensor, ...], grid: Grid, mask: Volume) -> AxisCheck:
    """Fit the pair along each voxel axis at coarse resolution.

    Images displaced along one axis cannot be made to agree by displacements along another. A wrong sign of both
    polarities changes the sign of the field and nothing else, so it does no harm to a pair.

    Parameters
    ----------
    blips, b0s, grid, mask
        As in `dsiprep.stages.distortion.correct_distortion`.

    Returns
    -------
    AxisCheck
        Only with the given axis if the encodings are not opposite: nothing is known then about other pairs of axes.
    """
    geometry = pair_geometry(blips, grid)
    (first, second), grids = geometry.encodings, geometry.grids
    given, checked = first.axis, [blips]
    if displacement_angle((first, grids[0]), (second, grids[1])) > OPPOSITE:
        checked += [_along(blips, geometry, axis) for axis in range(3) if axis != given]
    axes = tuple(pair[0].pe.axis for pair in checked if pair[0].pe)
    return AxisCheck(axes, tuple(coarse_misfit(pair, b0s, grid, mask) for pair in checked))


def _along(blips: tuple[Blip, ...], geometry: PairGeometry, axis: int) -> tuple[Blip, Blip]:
    """The blips with opposite phase encodings along another voxel axis of the first, and the nearest of the second."""
    first, second = geometry.encodings
    along = geometry.grids[1].directions.T @ geometry.grids[0].directions[:, axis]
    nearest = int(np.argmax(np.abs(along)))
    polarity = -first.polarity if along[nearest] > 0 else first.polarity
    return (
        replace(blips[0], pe=replace(first, axis=axis)),
        replace(blips[1], pe=replace(second, axis=nearest, polarity=polarity)),
    )
