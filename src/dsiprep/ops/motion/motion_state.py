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
    """Poses, eddy currents and outlier slices of a series, as estimated so far.

    Attributes
    ----------
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    eddy : EddyCurrents or None
        Of all volumes; None if eddy currents are not estimated.
    response : ndarray, (10, 3)
        Linear map from gradients to the coefficients of `eddy`, in mm; see `ops.motion.eddy_model`.
    deviation : ndarray, (n, 4)
        What the constant and linear coefficients of `eddy` have besides, in mm; see `ops.motion.field_shift` and
        `ops.motion.eddy_deviation`. Only the constant at b=0.
    outlier_slices : ndarray, (n, slices) bool, or None
        Slices with signal dropout, across voxel axis `slice_axis` of `grid`; None before they are detected.
    slice_axis : int
    grid : Grid
        Voxel grid of the series.
    """

    transforms: np.ndarray
    eddy: EddyCurrents | None
    response: np.ndarray
    deviation: np.ndarray
    outlier_slices: np.ndarray | None
    slice_axis: int
    grid: Grid

    def with_transforms(self, transforms: np.ndarray) -> MotionState:
        """Copy with other poses."""
        return replace(self, transforms=transforms)

    def shifted_transforms(self) -> np.ndarray:
        """Transforms with the field shift added as a translation: for b=0 all there is of `eddy`, (n, 4, 4)."""
        if self.eddy is None:
            return self.transforms
        transforms = self.transforms.copy()
        transforms[:, :3, 3] += self.deviation[:, :1] * self.eddy.axes[:, self.eddy.along]
        return transforms

    def eddy_of(self, volumes: np.ndarray) -> EddyCurrents | None:
        """Eddy currents of the given volumes."""
        return None if self.eddy is None else self.eddy.take(volumes)

    def outlier_points(self, volume: int, points: PointSet) -> np.ndarray:
        """Whether each point lies in an outlier slice of the volume, (m,) bool."""
        if self.outlier_slices is None or not self.outlier_slices[volume].any():
            return np.zeros(len(points), bool)
        row = (np.linalg.inv(self.grid.affine) @ self.transforms[volume])[self.slice_axis]
        slices = np.rint((points.world + points.centre) @ row[:3] + row[3]).astype(int)
        return self.outlier_slices[volume][slices.clip(0, self.outlier_slices.shape[1] - 1)]
