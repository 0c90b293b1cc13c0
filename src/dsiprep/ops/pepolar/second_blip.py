"""Geometry of the second blip of a pair, which keeps its own grid: other voxels, tilted planes, another axis.

Point x of the head lies in blip 1 at P x + u(x) e1, where e1 is the phase-encoding axis of that blip, at any angle to
that of blip 0. Grids have the phase-encoding axis last.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.pepolar.pose_derivatives import rigid_derivatives
from dsiprep.ops.pepolar.regularisation import central_difference_transpose

__all__ = ["PARALLEL", "jacobian_direction", "pose_derivatives", "spread_across", "voxel_matrix"]

PARALLEL = 1e-3  # rad between phase-encoding axes, below which derivatives across the axis of blip 0 are negligible


def voxel_matrix(grid: Grid, second: Grid, pose: np.ndarray) -> np.ndarray:
    """Voxels of `grid` to voxels of `second`, (4, 4), for the pose (4, 4) of the head in blip 1."""
    return np.linalg.inv(second.affine) @ pose @ grid.affine


def jacobian_direction(grid: Grid, second: Grid, pose: np.ndarray) -> np.ndarray:
    """Vector d, (3,), for which the Jacobian determinant of blip 1 is 1 + d · (differences of u per voxel of `grid`).

    It follows from det(R + e1 grad(u)') = 1 + grad(u)' R' e1.
    """
    return np.linalg.inv(grid.affine[:3, :3]) @ pose[:3, :3].T @ second.directions[:, 2]


def pose_derivatives(
    gradient: torch.Tensor, grid: Grid, second: Grid, pose: np.ndarray, centre: np.ndarray
) -> torch.Tensor:
    """Derivatives of a sampled image with respect to the pose parameters, (5, a, b, y), as in `rigid_derivatives`.

    Parameters
    ----------
    gradient : Tensor, (3, a, b, y)
        Per voxel of `second`.
    grid, second : Grid
    pose : ndarray, (4, 4)
    centre : ndarray, (3,)
        Of the rotation, in blip 0, mm.
    """
    linear = np.linalg.inv(second.affine[:3, :3]).T
    to_world = torch.as_tensor(linear, dtype=torch.float32, device=gradient.device)
    lever_arms = pose @ grid.affine
    lever_arms[:3, 3] -= (pose @ np.append(centre, 1))[:3]
    return rigid_derivatives(torch.einsum("ab,bijk->aijk", to_world, gradient), lever_arms, second)


def spread_across(across: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor | float:
    """Transpose of the differences across the phase-encoding axis of blip 0, weighted by `across` (2, a, b, y)."""
    if across is None:
        return 0.0
    return sum(
        (central_difference_transpose(across[axis] * values, axis) for axis in range(2)), torch.zeros_like(values)
    )
