"""A series on voxels of one size, read where its volumes are known to be."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.align import read
from dsiprep.ops.points import PointSet, average_blocks, point_set

__all__ = ["CHUNK", "Level", "Place", "levels_of"]

CHUNK = 16  # volumes worked on at a time
FEWEST = 500  # voxels of brain below which a coarse level says nothing


@dataclass(frozen=True, eq=False)
class Place:
    """Where every volume is, as far as it is known, and what of it cannot be used.

    Attributes
    ----------
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    eddy : EddyCurrents or None
        Of all volumes.
    response : ndarray, (10, 3)
        What `eddy` follows from: mm per gradient, see `ops.eddy`.
    lost : ndarray, (n, slices) bool, or None
        Slices without their signal, across voxel axis `slice_axis` of `grid`.
    """

    transforms: np.ndarray
    eddy: EddyCurrents | None
    response: np.ndarray
    lost: np.ndarray | None
    slice_axis: int
    grid: Grid

    def at(self, transforms: np.ndarray) -> Place:
        """The same with other poses."""
        return replace(self, transforms=transforms)

    def eddy_of(self, volumes: np.ndarray) -> EddyCurrents | None:
        """Eddy currents of some volumes."""
        return None if self.eddy is None else self.eddy.take(volumes)

    def lost_points(self, volume: int, points: PointSet) -> np.ndarray:
        """Which of the points lie in a lost slice of a volume, (m,) bool."""
        if self.lost is None or not self.lost[volume].any():
            return np.zeros(len(points), bool)
        row = (np.linalg.inv(self.grid.affine) @ self.transforms[volume])[self.slice_axis]
        where = np.rint((points.world + points.centre) @ row[:3] + row[3]).astype(int)
        return self.lost[volume][where.clip(0, self.lost.shape[1] - 1)]


@dataclass(frozen=True, eq=False)
class Level:
    """The series on voxels of one size; `points` are the brain of the reference."""

    data: torch.Tensor
    grid: Grid
    points: PointSet
    name: str

    def take(self, index: np.ndarray) -> torch.Tensor:
        """Some volumes."""
        return self.data[torch.as_tensor(index, device=self.data.device)]

    def read(self, index: np.ndarray, place: Place, fill: torch.Tensor | None = None) -> torch.Tensor:
        """Some volumes at the points, (len(index), m); where they do not reach or are lost, `fill`, or zero."""
        filled = torch.zeros(len(index), len(self.points), device=self.data.device) if fill is None else fill
        parts = []
        for first in range(0, len(index), CHUNK):
            part = slice(first, first + CHUNK)
            some = index[part]
            eddy = place.eddy_of(some)
            parts.append(read(self.take(some), self.grid, self.points, place.transforms[some], filled[part], eddy))
        seen = torch.cat(parts)
        if fill is not None and place.lost is not None:
            for row in np.flatnonzero(place.lost[index].any(axis=1)):
                gone = torch.as_tensor(place.lost_points(int(index[row]), self.points), device=seen.device)
                seen[row] = torch.where(gone, fill[row], seen[row])
        return seen

    def few(self) -> np.ndarray:
        """A few hundred world points of the brain, for measuring movement."""
        world = self.points.world[:: max(1, len(self.points) // 300)]
        return world.astype(float) + self.points.centre


def levels_of(dwi: DWI, mask: Volume, spacings: tuple[float, ...]) -> list[Level]:
    """From coarse voxels (mm) to the volumes' own; sizes that the volumes have already are left out."""
    levels = []
    for spacing in spacings:
        data, grid = average_blocks(dwi.data, dwi.grid, spacing)
        inside, _ = average_blocks(mask.data[None].float(), dwi.grid, spacing)
        if data is not dwi.data and (inside > 0.5).sum() >= FEWEST:
            levels.append(Level(data, grid, point_set(inside[0], grid), f"{spacing:g} mm"))
    return [*levels, Level(dwi.data, dwi.grid, point_set(mask.data, dwi.grid), "full")]
