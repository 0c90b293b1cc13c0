"""Derivatives of an image by a rigid pose of the head: rotations, and translations across the phase-encoding axis."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid

__all__ = ["across_axis", "rigid_columns"]


def across_axis(grid: Grid) -> np.ndarray:
    """Two unit vectors across the last axis of the grid, (3, 2)."""
    return np.linalg.svd(grid.directions[:, 2:])[0][:, 1:]


def rigid_columns(slopes: torch.Tensor, arms: np.ndarray, grid: Grid) -> torch.Tensor:
    """Derivatives by a rigid pose, (5, a, b, y): a rotation vector, and two translations across the last axis.

    Parameters
    ----------
    slopes : Tensor, (3, a, b, y)
        Derivatives by the world coordinates of a point, per mm.
    arms : ndarray, (3, 4) or (4, 4)
        Voxels to where their points lie from the point that is turned about, mm.
    grid : Grid
    """
    axes = [torch.arange(n, device=slopes.device, dtype=torch.float32) for n in slopes.shape[1:]]
    x, y, z = (
        float(r[0]) * axes[0][:, None, None] + float(r[1]) * axes[1][:, None] + float(r[2]) * axes[2] + float(r[3])
        for r in arms[:3]
    )
    turns = [y * slopes[2] - z * slopes[1], z * slopes[0] - x * slopes[2], x * slopes[1] - y * slopes[0]]
    across = torch.as_tensor(across_axis(grid), dtype=torch.float32, device=slopes.device)
    return torch.stack([*turns, *torch.einsum("am,aijk->mijk", across, slopes)])
