"""A series on voxels of one size, read where its volumes are known to be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.ops.image.point_set import PointSet, average_blocks, point_set
from dsiprep.ops.motion.gauss_newton import sample_volumes
from dsiprep.ops.motion.motion_state import MotionState

__all__ = ["CHUNK", "PyramidLevel", "build_pyramid"]

CHUNK = 16  # volumes worked on at a time
FEWEST = 500  # voxels of brain below which a coarse level says nothing


@dataclass(frozen=True, eq=False)
class PyramidLevel:
    """The series on voxels of one size; `points` are the brain of the reference."""

    data: torch.Tensor
    grid: Grid
    points: PointSet
    name: str

    def take(self, index: np.ndarray) -> torch.Tensor:
        """Some volumes."""
        return self.data[torch.as_tensor(index, device=self.data.device)]

    def sample(self, index: np.ndarray, state: MotionState, fill: torch.Tensor | None = None) -> torch.Tensor:
        """Some volumes at the points, (len(index), m); where they do not reach or are lost, `fill`, or zero."""
        filled = torch.zeros(len(index), len(self.points), device=self.data.device) if fill is None else fill
        parts = []
        for first in range(0, len(index), CHUNK):
            part = slice(first, first + CHUNK)
            some = index[part]
            eddy = state.eddy_of(some)
            parts.append(
                sample_volumes(self.take(some), self.grid, self.points, state.transforms[some], filled[part], eddy)
            )
        observed = torch.cat(parts)
        if fill is not None and state.outlier_slices is not None:
            for row in np.flatnonzero(state.outlier_slices[index].any(axis=1)):
                gone = torch.as_tensor(state.outlier_points(int(index[row]), self.points), device=observed.device)
                observed[row] = torch.where(gone, fill[row], observed[row])
        return observed

    def probe_points(self) -> np.ndarray:
        """A few hundred world points of the brain, for measuring movement."""
        world = self.points.world[:: max(1, len(self.points) // 300)]
        return world.astype(float) + self.points.centre


def build_pyramid(dwi: DWI, mask: Volume, spacings: tuple[float, ...]) -> list[PyramidLevel]:
    """From coarse voxels (mm) to the volumes' own; sizes that the volumes have already are left out."""
    levels = []
    for spacing in spacings:
        data, grid = average_blocks(dwi.data, dwi.grid, spacing)
        inside, _ = average_blocks(mask.data[None].float(), dwi.grid, spacing)
        if data is not dwi.data and (inside > 0.5).sum() >= FEWEST:
            levels.append(PyramidLevel(data, grid, point_set(inside[0], grid), f"{spacing:g} mm"))
    return [*levels, PyramidLevel(dwi.data, dwi.grid, point_set(mask.data, dwi.grid), "full")]
