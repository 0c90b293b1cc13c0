"""Regularisation of a displacement field along the phase-encoding axis: derivatives, Laplacian, and a barrier against folding.

All arrays have the phase-encoding axis last, (a, b, y).
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["BARRIER", "add_penalties", "along", "barrier", "laplacian", "transposed_along"]
BARRIER = 0.5  # weight of the barrier against folding


def along(field: torch.Tensor, axis: int) -> torch.Tensor:
    """Central difference per voxel; beyond the edges the outermost value is repeated."""
    n = field.shape[axis]
    if n == 1:
        return torch.zeros_like(field)
    ends = field.narrow(axis, 0, 1), field.narrow(axis, n - 1, 1)
    padded = torch.cat([ends[0], field, ends[1]], axis)
    return (padded.narrow(axis, 2, n) - padded.narrow(axis, 0, n)) / 2


def laplacian(field: torch.Tensor, spacing: np.ndarray) -> torch.Tensor:
    """Sum of second differences per mm², no flux through the edges.

    Parameters
    ----------
    field : Tensor, (a, b, y)
    spacing : ndarray, (3,)
        mm.
    """
    total = torch.zeros_like(field)
    for axis in range(3):
        n = field.shape[axis]
        if n > 1:
            rise = torch.diff(field, dim=axis) / float(spacing[axis]) ** 2
            total.narrow(axis, 0, n - 1).add_(rise)
            total.narrow(axis, 1, n - 1).sub_(rise)
    return total


def barrier(field: torch.Tensor, steepness: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cost of squeezing voxels, infinite where a line would fold.

    d^4 / (1 - d^2) of d = steepness times the difference of neighbours along the last axis, as in Burger et al. 2013
    (doi 10.1137/110835955).

    Returns
    -------
    cost : Tensor, ()
        Infinite where |d| >= 1 anywhere.
    slope, curvature : Tensor, (a, b, y - 1)
        Derivatives by the difference of neighbours.
    """
    d = steepness * torch.diff(field, dim=2)
    square = d * d
    left = 1 - square
    if field.shape[2] > 1 and float(left.min()) <= 0.02:
        return torch.tensor(float("inf")), d, d
    slope = 2 * square * d * (2 - square) / (left * left)
    curvature = square * (12 - 10 * square) / (left * left) + 4 * d * slope / left
    return (square * square / left).sum(), steepness * slope, steepness**2 * curvature


def transposed_along(values: torch.Tensor) -> torch.Tensor:
    """The transpose of `along` on the last axis."""
    out = torch.zeros_like(values)
    if values.shape[2] == 1:
        return out
    half = values / 2
    out[..., 1:] += half[..., :-1]
    out[..., :-1] -= half[..., 1:]
    out[..., 0] -= half[..., 0]
    out[..., -1] += half[..., -1]
    return out


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
        As in `NormalEquations`.
    """
    weak, stiff, kink = smoothness
    _, slope, curvature = barrier(field, steepness)
    bend = laplacian(field, sizes)
    bent = stiff / torch.sqrt(1 + (bend / kink) ** 2)
    force += laplacian(bent * bend - weak * field, sizes)
    force[..., 1:] += BARRIER * slope
    force[..., :-1] -= BARRIER * slope
    return BARRIER * curvature, bent
