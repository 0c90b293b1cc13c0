"""Derivatives of an image with respect to a rigid head pose without translation along the phase-encoding axis.

That translation is left out because a constant field has the same effect.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid

__all__ = ["rigid_derivatives", "transverse_axes"]


def rigid_derivatives(gradient: torch.Tensor, lever_arms: np.ndarray, grid: Grid) -> torch.Tensor:
    """Derivatives with respect to a rotation vector and two translations across the last axis, (5, a, b, y).

    Parameters
    ----------
    gradient : Tensor, (3, a, b, y)
        Derivatives with respect to the world coordinates of a point, per mm.
    lever_arms : ndarray, (3, 4) or (4, 4)
        Affine from voxels to the offset of their points from the centre of rotation, mm.
    grid : Grid
        Phase-encoding axis last.
    """
    axes = [torch.arange(n, device=gradient.device, dtype=torch.float32) for n in gradient.shape[1:]]
    x, y, z = (
        float(r[0]) * axes[0][:, None, None] + float(r[1]) * axes[1][:, None] + float(r[2]) * axes[2] + float(r[3])
        for r in lever_arms[:3]
    )
    rotations = [
        y * gradient[2] - z * gradient[1],
        z * gradient[0] - x * gradient[2],
        x * gradient[1] - y * gradient[0],
    ]
    across = torch.as_tensor(transverse_axes(grid), dtype=torch.float32, device=gradient.device)
    return torch.stack([*rotations, *torch.einsum("am,aijk->mijk", across, gradient)])


def transverse_axes(grid: Grid) -> np.ndarray:
    """Two unit vectors orthogonal to the last axis of the grid and to each other, (3, 2)."""
    return np.linalg.svd(grid.directions[:, 2:])[0][:, 1:]
