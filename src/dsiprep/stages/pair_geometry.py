"""Grids and phase-encoding axes of a blip-up/blip-down pair, in the order and direction that the pair model expects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.acquisition import LEAST_ANGLE, PhaseEncoding, displacement_angle
from dsiprep.data.grid import Grid
from dsiprep.data.results import Blip
from dsiprep.errors import InputError, SettingsError
from dsiprep.ops.image.interpolation import resample_onto

__all__ = ["PairGeometry", "pair_geometry"]


@dataclass(frozen=True, eq=False)
class PairGeometry:
    """How the images of both blips become arrays with the phase-encoding axis last.

    Attributes
    ----------
    encodings : two PhaseEncoding
    grids : two Grid
        As stored.
    orders : two list of int
        Voxel axes of each, phase-encoding axis last.
    flipped : bool
        Whether the phase-encoding axis of blip 1 runs backwards, so that the scales have opposite signs.
    scales : two float
        Displacement in mm along the last axis per unit of the field.
    mm_per_hz : float or None
        Mean displacement of both blips; None without readout times.
    """

    encodings: tuple[PhaseEncoding, PhaseEncoding]
    grids: tuple[Grid, Grid]
    orders: tuple[list[int], list[int]]
    flipped: bool
    scales: tuple[float, float]
    mm_per_hz: float | None

    @property
    def same_grid(self) -> bool:
        """Whether both blips share the grid and the phase-encoding axis."""
        return self.grids[0] is self.grids[1] and self.orders[0] == self.orders[1]

    def grid(self, blip: int) -> Grid:
        """Grid of `ordered` images."""
        grid = self.grids[blip].permuted(self.orders[blip])
        if not (blip and self.flipped):
            return grid
        affine = grid.affine.copy()
        affine[:3, 3] += affine[:3, 2] * (grid.shape[2] - 1)
        affine[:3, 2] *= -1
        return Grid(grid.shape, affine)

    def ordered(self, image: torch.Tensor, blip: int) -> torch.Tensor:
        """An image (i, j, k) of a blip as (a, b, y)."""
        out = image.permute(self.orders[blip])
        return (out.flip(2) if blip and self.flipped else out).contiguous()

    def stored(self, data: torch.Tensor) -> torch.Tensor:
        """Data (a, b, y) on the points of blip 0 as (i, j, k)."""
        return data.permute(np.argsort(self.orders[0]).tolist()).contiguous()

    def direction(self, blip: int) -> np.ndarray:
        """Unit vector, (3,), of the last axis of `grid`, world RAS+."""
        return self.grid(blip).directions[:, 2]

    def onto_first(self, image: torch.Tensor) -> torch.Tensor:
        """An image of blip 1 on the grid of blip 0, by scanner coordinates."""
        first, second = self.grids
        return image if second is first else resample_onto(image[None], second, first, cubic=True)[0].clamp(min=0)


def pair_geometry(blips: tuple[Blip, ...], grid: Grid) -> PairGeometry:
    """Geometry of two blips, the first of them on `grid`.

    Raises
    ------
    SettingsError
        If the blips displace into the same direction.
    InputError
        If the phase encoding of a blip is unknown, or the readout time of one only or not positive.
    """
    first, second = (blip.pe for blip in blips)
    if first is None or second is None:
        raise InputError("a blip has no PhaseEncodingDirection; add it to its sidecar, or use --sdc-method none")
    other = blips[1].grid
    other = grid if other is None or other.matches(grid) else other
    if displacement_angle((first, grid), (second, other)) < LEAST_ANGLE:
        raise SettingsError(
            f"phase encodings {first.direction} and {second.direction} are not opposite; correction needs both "
            "polarities of one axis, such as j and j-, or two axes"
        )
    if (first.readout_time is None) != (second.readout_time is None):
        raise InputError("only one of the two blips has a TotalReadoutTime; give both or neither")
    for pe in (first, second):
        if pe.readout_time is not None and not pe.readout_time > 0:
            raise InputError(f"TotalReadoutTime of {pe.direction} is {pe.readout_time}; it must be above 0 s")
    lengths = [first.mm_per_hz(grid), second.mm_per_hz(other)]
    mean = (lengths[0] + lengths[1]) / 2
    orders = [[*(a for a in range(3) if a != pe.axis), pe.axis] for pe in (first, second)]
    scales = (first.polarity * lengths[0] / mean, -first.polarity * lengths[1] / mean)
    known = first.readout_time is not None
    flipped = second.polarity == first.polarity
    return PairGeometry(
        (first, second), (grid, other), (orders[0], orders[1]), flipped, scales, mean if known else None
    )
