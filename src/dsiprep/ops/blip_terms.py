"""What every estimate of a displacement along the phase-encoding axis shares, be it of a pair or of one image.

All arrays have the phase-encoding axis last, (a, b, y).
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.blip import barrier, laplacian
from dsiprep.ops.sample import spline_coefficients

__all__ = ["BARRIER", "across_axis", "add_penalties", "line_coefficients", "nearly_largest", "rigid_columns"]

BARRIER = 0.5  # weight of the barrier against folding


def line_coefficients(image: torch.Tensor) -> torch.Tensor:
    """Cubic B-spline coefficients (a, b, y) of an image along its last axis only, as `sample_lines` takes them."""
    return spline_coefficients(image.reshape(-1, 1, 1, image.shape[2])).reshape(image.shape)


def add_penalties(
    force: torch.Tensor,
    field: torch.Tensor,
    sizes: np.ndarray,
    steepness: float,
    smoothness: tuple[float, float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What smoothness and the barrier add to the equations of the next step.

    Parameters
    ----------
    force : Tensor, (a, b, y)
        Gradient of the misfit by the field; that of the penalties is added to it in place.
    field : Tensor, (a, b, y)
        mm.
    sizes : ndarray, (3,)
        Of voxels, mm.
    steepness : float
        As of `barrier`.
    smoothness : (float, float, float)
        Weights of the squared gradient and of the squared Laplacian, and the Laplacian (1/mm) beyond which it costs in
        proportion only.

    Returns
    -------
    curvature, stiffness : Tensor, (a, b, y - 1) and (a, b, y)
        As in `Normal`.
    """
    weak, stiff, kink = smoothness
    _, slope, curvature = barrier(field, steepness)
    bend = laplacian(field, sizes)
    bent = stiff / torch.sqrt(1 + (bend / kink) ** 2)
    force += laplacian(bent * bend - weak * field, sizes)
    force[..., 1:] += BARRIER * slope
    force[..., :-1] -= BARRIER * slope
    return BARRIER * curvature, bent


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


def nearly_largest(values: torch.Tensor) -> float:
    """What 99 % of values (n,) do not exceed."""
    return float(values.kthvalue(int(0.99 * (values.numel() - 1)) + 1).values)
