"""Multi-resolution pyramid of a series, sampled at the current motion estimates."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.point_set import PointSet, average_blocks, point_set
from dsiprep.ops.motion.gauss_newton import MovingVolumes, sample_volumes
from dsiprep.ops.motion.motion_state import MotionState

__all__ = ["COARSE_MM", "VOLUMES_PER_CHUNK", "PyramidLevel", "build_pyramid", "chunks"]

COARSE_MM = (8.0, 5.0)  # voxel sizes of the levels above that of the series itself
VOLUMES_PER_CHUNK = 16  # processed at a time, to bound memory
MIN_VOXELS = 500  # of brain; coarser levels are skipped
FULL = "full"  # name of the level on the voxels of the series itself


@dataclass(frozen=True, eq=False)
class PyramidLevel:
    """The series at one voxel size.

    Attributes
    ----------
    data : Tensor, (n, i, j, k)
    grid : Grid
    points : PointSet
        The brain in the reference.
    name : str
        Voxel size, or "full" for that of the series itself.
    spacing : float
        Voxel size that was asked for, mm; 0 for that of the series itself.
    filled : dict of int to Tensor, (i, j, k)
        Volumes whose lost slices were filled, which stand in for those of `data`.
    """

    data: torch.Tensor
    grid: Grid
    points: PointSet
    name: str
    spacing: float = 0.0
    filled: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, volumes: np.ndarray, eddy: EddyCurrents | None = None) -> MovingVolumes:
        """The given volumes, with their eddy currents if `eddy` (of these volumes) is given."""
        data = self.data[torch.as_tensor(volumes, device=self.data.device)]
        for row, volume in enumerate(volumes):
            if int(volume) in self.filled:
                data[row] = self.filled[int(volume)]
        return MovingVolumes(data, self.grid, eddy)

    def sample(self, volumes: np.ndarray, state: MotionState, fill: torch.Tensor | None = None) -> torch.Tensor:
        """Sample the given volumes at the points, (len(volumes), m).

        Outside the volume, values are those of `fill`, or zero without it.
        """
        filled = torch.zeros(len(volumes), len(self.points), device=self.data.device) if fill is None else fill
        parts = []
        for part, some in chunks(volumes):
            moving = self.take(some, state.eddy_of(some))
            parts.append(sample_volumes(moving, self.points, state.transforms[some], filled[part]))
        return torch.cat(parts)

    def probe_points(self) -> np.ndarray:
        """A few hundred world points of the brain at which displacements are measured, (m, 3), mm."""
        world = self.points.world[:: max(1, len(self.points) // 300)]
        return world.astype(float) + self.points.centre


def chunks(volumes: np.ndarray) -> list[tuple[slice, np.ndarray]]:
    """Split volume indices into chunks of `VOLUMES_PER_CHUNK`: positions in `volumes`, and the indices there."""
    parts = [slice(first, first + VOLUMES_PER_CHUNK) for first in range(0, len(volumes), VOLUMES_PER_CHUNK)]
    return [(part, volumes[part]) for part in parts]


def build_pyramid(dwi: DWI, mask: Volume, spacings: tuple[float, ...]) -> list[PyramidLevel]:
    """Build the pyramid of a series: the given voxel sizes (mm, coarse to fine), then the voxels of the series itself.

    A coarse level is skipped if the series already has voxels of that size, or if the brain has fewer than 500 of them.
    """
    levels = []
    for spacing in spacings:
        data, grid = average_blocks(dwi.data, dwi.grid, spacing)
        inside, _ = average_blocks(mask.data[None].float(), dwi.grid, spacing)
        if data is not dwi.data and (inside > 0.5).sum() >= MIN_VOXELS:
            levels.append(PyramidLevel(data, grid, point_set(inside[0], grid), f"{spacing:g} mm", spacing))
    return [*levels, PyramidLevel(dwi.data, dwi.grid, point_set(mask.data, dwi.grid), FULL)]
