"""Regularisation of a displacement field along the phase-encoding axis: smoothness penalties and a barrier to folding.

All arrays have the phase-encoding axis last, (a, b, y).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = [
    "BARRIER_WEIGHT",
    "Smoothness",
    "add_penalties",
    "barrier",
    "central_difference",
    "central_difference_transpose",
    "laplacian",
    "penalty_gradient",
    "roughness",
]

BARRIER_WEIGHT = 0.5


@dataclass(frozen=True)
class Smoothness:
    """Weights of the smoothness penalties at one voxel size.

    Attributes
    ----------
    gradient_weight, laplacian_weight : float
        Weights of the squared gradient and of the squared Laplacian.
    linear_from : float
        Absolute Laplacian beyond which its penalty is linear rather than quadratic, 1/mm.
    """

    gradient_weight: float
    laplacian_weight: float
    linear_from: float


def central_difference(field: torch.Tensor, axis: int) -> torch.Tensor:
    """Central difference per voxel; the outermost values are repeated beyond the edges."""
    n = field.shape[axis]
    if n == 1:
        return torch.zeros_like(field)
    ends = field.narrow(axis, 0, 1), field.narrow(axis, n - 1, 1)
    padded = torch.cat([ends[0], field, ends[1]], axis)
    return (padded.narrow(axis, 2, n) - padded.narrow(axis, 0, n)) / 2


def central_difference_transpose(values: torch.Tensor, axis: int = 2) -> torch.Tensor:
    """Transpose of `central_difference`."""
    total = torch.zeros_like(values)
    if values.shape[axis] == 1:
        return total
    half, out = (values / 2).movedim(axis, -1), total.movedim(axis, -1)
    out[..., 1:] += half[..., :-1]
    out[..., :-1] -= half[..., 1:]
    out[..., 0] -= half[..., 0]
    out[..., -1] += half[..., -1]
    return total


def laplacian(field: torch.Tensor, spacing: np.ndarray) -> torch.Tensor:
    """Sum of second differences per mm², without flux through the edges.

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
    """Penalty on the compression and expansion of voxels, infinite where a line would fold.

    The sum of d^4 / (1 - d^2), where d is the difference of neighbours along the last axis times `steepness`.

    Returns
    -------
    cost : Tensor, ()
        Infinite where d² >= 0.98 anywhere.
    slope, curvature : Tensor, (a, b, y - 1)
        First and second derivatives with respect to the difference of neighbours; not valid where the cost is infinite.

    References
    ----------
    Burger et al. 2013, doi 10.1137/110835955.
    """
    d = steepness * torch.diff(field, dim=2)
    square = d * d
    margin = 1 - square
    if field.shape[2] > 1 and float(margin.min()) <= 0.02:
        return torch.tensor(float("inf")), d, d
    slope = 2 * square * d * (2 - square) / (margin * margin)
    curvature = square * (12 - 10 * square) / (margin * margin) + 4 * d * slope / margin
    return (square * square / margin).sum(), steepness * slope, steepness**2 * curvature


def roughness(field: torch.Tensor, spacing: np.ndarray, smoothness: Smoothness) -> torch.Tensor:
    """Sum of the smoothness penalties of a field (a, b, y) in mm; parameters as in `add_penalties`."""
    lap, knee = laplacian(field, spacing), smoothness.linear_from
    of_laplacian = smoothness.laplacian_weight * knee**2 * (torch.sqrt(1 + (lap / knee) ** 2) - 1).sum()
    # the sum of -f lap(f) is that of the squared gradient
    return of_laplacian - 0.5 * smoothness.gradient_weight * (lap * field).sum()


def penalty_gradient(
    field: torch.Tensor, spacing: np.ndarray, smoothness: Smoothness
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of `roughness` with respect to the field, and the weight of the squared Laplacian, (a, b, y) each."""
    lap = laplacian(field, spacing)
    laplacian_weight = smoothness.laplacian_weight / torch.sqrt(1 + (lap / smoothness.linear_from) ** 2)
    return laplacian(laplacian_weight * lap - smoothness.gradient_weight * field, spacing), laplacian_weight


def add_penalties(
    gradient: torch.Tensor, field: torch.Tensor, spacing: np.ndarray, steepness: float, smoothness: Smoothness
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of the penalties to that of the misfit, and return their part of the normal equations.

    Parameters
    ----------
    gradient : Tensor, (a, b, y)
        Gradient of the misfit with respect to the field; modified in place.
    field : Tensor, (a, b, y)
        mm.
    spacing : ndarray, (3,)
        Voxel sizes, mm.
    steepness : float
        As in `barrier`.
    smoothness : Smoothness

    Returns
    -------
    curvature : Tensor, (a, b, y - 1)
    laplacian_weight : Tensor, (a, b, y)
        As in `NormalEquations`.
    """
    _, slope, curvature = barrier(field, steepness)
    of_smoothness, laplacian_weight = penalty_gradient(field, spacing, smoothness)
    gradient += of_smoothness
    gradient[..., 1:] += BARRIER_WEIGHT * slope
    gradient[..., :-1] -= BARRIER_WEIGHT * slope
    return BARRIER_WEIGHT * curvature, laplacian_weight
