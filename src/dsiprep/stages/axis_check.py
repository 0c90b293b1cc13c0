"""Whether the images of a pair agree with the phase-encoding axis that their sidecars give."""

from __future__ import annotations

from dataclasses import replace

import torch

from dsiprep.data.acquisition import AxisCheck
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip
from dsiprep.stages.distortion import coarse_misfit
from dsiprep.stages.pair_geometry import pair_geometry

__all__ = ["check_axis"]


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
        Only with the given axis if the blips do not share one grid.
    """
    geometry = pair_geometry(blips, grid)
    given = geometry.encodings[0].axis
    axes = sorted(range(3), key=lambda axis: axis != given) if geometry.same_grid else [given]
    fitted = {axis: tuple(_along(blip, axis) for blip in blips) for axis in axes}
    return AxisCheck(tuple(axes), tuple(coarse_misfit(pair, b0s, grid, mask) for pair in fitted.values()))


def _along(blip: Blip, axis: int) -> Blip:
    return blip if blip.pe is None else replace(blip, pe=replace(blip.pe, axis=axis))
