"""Voxel grids in world space, and volumes on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from nibabel.orientations import io_orientation

from dsiprep.data.summary import Summarised


@dataclass(frozen=True, eq=False, repr=False)
class Grid(Summarised):
    """Shape and affine of an image.

    Attributes
    ----------
    shape : (int, int, int)
        Number of voxels along i, j, k, the axes of the NIfTI file.
    affine : ndarray, (4, 4), float64
        Maps voxel indices (integers at voxel centres) to world RAS+ mm.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def voxel_sizes(self) -> np.ndarray:
        """Voxel size along i, j, k in mm, (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def directions(self) -> np.ndarray:
        """Unit vectors of the i, j, k axes in world RAS+, as columns, (3, 3)."""
        return self.affine[:3, :3] / self.voxel_sizes

    @property
    def centre(self) -> np.ndarray:
        """World position of the centre of the grid in mm, (3,)."""
        return self.to_world((np.asarray(self.shape, float) - 1) / 2)

    @property
    def likely_slice_axis(self) -> int:
        """Voxel axis across slices: k, unless voxels are clearly longest along another axis."""
        sizes = self.voxel_sizes
        longest = int(sizes.argmax())
        return longest if sizes[longest] > 1.2 * sizes[2] else 2

    def to_world(self, voxels: np.ndarray) -> np.ndarray:
        """Convert voxel coordinates (..., 3) to world RAS+ mm (..., 3)."""
        return np.asarray(voxels, float) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_voxels(self, points: np.ndarray) -> np.ndarray:
        """Convert world RAS+ mm (..., 3) to voxel coordinates (..., 3)."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(points, float) @ inverse[:3, :3].T + inverse[:3, 3]

    def contains(self, points: np.ndarray) -> np.ndarray:
        """Whether each world point (..., 3) is in the field of view, outer voxel faces included; (...) bool."""
        voxels = self.to_voxels(points)
        return np.asarray(((voxels >= -0.5) & (voxels <= np.asarray(self.shape) - 0.5)).all(-1))

    def matches(self, other: Grid, tolerance: float = 1e-3) -> bool:
        """Whether both grids have the same shape and, within `tolerance` mm, the same affine and corners."""
        corner = np.asarray(self.shape, float) - 1
        return self.shape == other.shape and bool(
            np.allclose(self.affine[:3, 3], other.affine[:3, 3], atol=tolerance)
            and np.allclose(self.to_world(corner), other.to_world(corner), atol=tolerance)
            and np.allclose(self.affine[:3, :3], other.affine[:3, :3], atol=tolerance)
        )

    def ras_axes(self) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
        """The voxel axes closest to R, A and S, and whether each runs in the opposite direction."""
        orientation = io_orientation(self.affine)
        order = [int(np.flatnonzero(orientation[:, 0] == world)[0]) for world in range(3)]
        flipped = [bool(orientation[axis, 1] < 0) for axis in order]
        return (order[0], order[1], order[2]), (flipped[0], flipped[1], flipped[2])

    def permuted(self, order: list[int]) -> Grid:
        """Reorder the voxel axes; world positions are unchanged."""
        i, j, k = (self.shape[axis] for axis in order)
        return Grid((i, j, k), self.affine[:, [*order, 3]])

    def at_spacing(self, spacing: float | tuple[float, float, float]) -> Grid:
        """The same field of view (outer faces) with voxels of about `spacing` mm."""
        extent = self.voxel_sizes * self.shape
        shape = np.maximum(1, np.round(extent / np.broadcast_to(spacing, 3))).astype(int)
        factor = np.asarray(self.shape) / shape
        affine = self.affine.copy()
        affine[:3, :3] = self.affine[:3, :3] * factor
        affine[:3, 3] = self.to_world((factor - 1) / 2)
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


@dataclass(frozen=True, eq=False, repr=False)
class Volume(Summarised):
    """One 3-D image: `data` (i, j, k) on `grid`."""

    data: torch.Tensor
    grid: Grid

    def numpy(self) -> np.ndarray:
        """Voxel values as a NumPy array on the CPU, (i, j, k)."""
        return self.data.detach().cpu().numpy()

    def to(self, device: torch.device | str) -> Volume:
        """Move the data to a device."""
        return Volume(self.data.to(device), self.grid)
