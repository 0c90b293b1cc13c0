"""The off-resonance displacement that a turning head carries, in the frame of the distorted reference.

A point x of the undistorted head, in the pose of the reference, appears there at x' = x + u d, displaced along the
phase-encoding axis d. In a pose T with rotation R the head carries u, while d is fixed in the scanner: the point is at
T x + u d = T (x' + u r) with r = R' d - d. Poses alone, T x', miss u r, which is perpendicular to d for small rotations
and as long as u times the angle. Intensities are multiplied by the Jacobian determinant 1 + r . grad u.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.image.displacement_field import invert
from dsiprep.ops.image.epi_resampling import displacement_axis
from dsiprep.ops.image.filters import gradient
from dsiprep.ops.image.interpolation import resample_onto

__all__ = ["CarriedField", "axis_change", "carried_field"]


@dataclass(frozen=True, eq=False)
class CarriedField:
    """Displacement u of a head at points x' of the distorted reference.

    Attributes
    ----------
    table : ndarray, (i, j, k, 4), float32
        u in mm and its slopes per voxel along i, j, k.
    grid : Grid
    direction : ndarray, (3,)
        d, unit vector, RAS+.
    """

    table: np.ndarray
    grid: Grid
    direction: np.ndarray

    @cached_property
    def largest(self) -> float:
        """Largest absolute u, mm."""
        return float(np.abs(self.table[..., 0]).max())

    def turns(self, poses: np.ndarray) -> np.ndarray:
        """r of poses (..., 4, 4), in voxels of `grid` per mm of u, (..., 3)."""
        return axis_change(poses, self.direction) @ np.linalg.inv(self.grid.affine[:3, :3]).T

    def largest_bend(self, poses: np.ndarray) -> np.ndarray:
        """Largest length (mm) over the grid of what poses (..., 4, 4) alone miss, (...)."""
        return np.linalg.norm(self.turns(poses) @ self.grid.affine[:3, :3].T, axis=-1) * self.largest

    def around(self, low: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The table on a box of voxels that starts at the voxel `low` (3,); beyond the grid, values at its edge."""
        sizes = zip(low, shape, self.grid.shape, strict=True)
        index = (np.clip(first + np.arange(count), 0, size - 1) for first, count, size in sizes)
        return np.ascontiguousarray(self.table[np.ix_(*index)])


def axis_change(poses: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """How an axis (3,) of the scanner, a unit vector, changes in the frame of a head in poses (..., 4, 4), (..., 3)."""
    return np.asarray(np.einsum("...ba,b->...a", poses[..., :3, :3], axis) - axis)


def carried_field(field: DisplacementField, pose: np.ndarray, grid: Grid) -> CarriedField:
    """The displacement of the head at points of the distorted reference of a blip.

    Parameters
    ----------
    field : DisplacementField
        u d on the undistorted reference.
    pose : ndarray, (4, 4)
        Points of the undistorted reference to those of the head in the pose of the blip, before the displacement.
    grid : Grid
        Of the distorted reference.
    """
    direction = displacement_axis(field)
    posed = resample_onto(field.data.cpu().float(), field.grid, grid, np.linalg.inv(pose))
    back = invert(DisplacementField(posed, grid)).data
    u = -torch.einsum("a,aijk->ijk", torch.as_tensor(direction).float(), back)
    table = torch.cat([u[None], gradient(u[None])[0]]).permute(1, 2, 3, 0)
    return CarriedField(np.ascontiguousarray(table.numpy()), grid, direction)
