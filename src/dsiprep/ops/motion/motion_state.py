"""Current estimates of motion, eddy currents and signal dropout for every volume of a series."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.point_set import PointSet

__all__ = ["MotionState"]


@dataclass(frozen=True, eq=False)
class MotionState:
    """Where every volume is, as far as it is known, and what of it cannot be used.

    Attributes
    ----------
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    eddy : EddyCurrents or None
        Of all volumes.
    response : ndarray, (10, 3)
        What `eddy` follows from: mm per gradient, see `ops.eddy`.
    outlier_slices : ndarray, (n, slices) bool, or None
        Slices without their signal, across voxel axis `slice_axis` of `grid`.
    """

    transforms: np.ndarray
    eddy: EddyCurrents | None
    response: np.ndarray
    outlier_slices: np.ndarray | None
    slice_axis: int
    grid: Grid

    def with_transforms(self, transforms: np.ndarray) -> MotionState:
        """The same with other poses."""
        return replace(self, transforms=transforms)

    def eddy_of(self, volumes: np.ndarray) -> EddyCurrents | None:
        """Eddy currents of some volumes."""
        return None if self.eddy is None else self.eddy.take(volumes)

    def outlier_points(self, volume: int, points: PointSet) -> np.ndarray:
        """Which of the points lie in a lost slice of a volume, (m,) bool."""
        if self.outlier_slices is None or not self.outlier_slices[volume].any():
            return np.zeros(len(points), bool)
        row = (np.linalg.inv(self.grid.affine) @ self.transforms[volume])[self.slice_axis]
        where = np.rint((points.world + points.centre) @ row[:3] + row[3]).astype(int)
        return self.outlier_slices[volume][where.clip(0, self.outlier_slices.shape[1] - 1)]
