"""Sampling of EPI images with derivatives, along phase-encoding lines and in three dimensions.

All arrays have the phase-encoding axis last, (a, b, y). The CPU runs compiled loops; other devices compute the same
sums with tensor operations, and a test compares the two.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.ops.image.bspline import cubic_slopes_of, cubic_weights_of, mirror_indices
from dsiprep.ops.image.interpolation import spline_coefficients
from dsiprep.ops.pepolar.blip_pair_kernels import lines_loop, volume_loop

__all__ = ["line_coefficients", "sample_lines", "sample_volume"]


def line_coefficients(image: torch.Tensor) -> torch.Tensor:
    """Cubic B-spline coefficients (a, b, y) of an image along its last axis only, for `sample_lines`."""
    return spline_coefficients(image.reshape(-1, 1, 1, image.shape[2])).reshape(image.shape)


def sample_lines(coefficients: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sample a volume at x + shift along its last axis.

    Parameters
    ----------
    coefficients : Tensor, (a, b, y), float32
        Cubic B-spline coefficients along the last axis only.
    shift : Tensor, (a, b, y), float32
        Voxels along the last axis.

    Returns
    -------
    value, slope, inside : Tensor, (a, b, y)
        Intensity, its derivative along the last axis per voxel, and 1 where the point is within the grid. All three are
        0 elsewhere.
    """
    if coefficients.device.type == "cpu":
        results = lines_loop(coefficients.numpy(), shift.numpy())
        return tuple(torch.from_numpy(r) for r in results)
    return _sample_lines_tensors(coefficients, shift)


def sample_volume(coefficients: torch.Tensor, matrix: np.ndarray, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sample a volume at matrix @ x, shifted along its last axis.

    Parameters
    ----------
    coefficients : Tensor, (a, b, y), float32
        Cubic B-spline coefficients along all axes.
    matrix : ndarray, (3, 4) or (4, 4)
        Voxels to voxels.
    shift : Tensor, (a, b, y), float32
        Voxels along the last axis.

    Returns
    -------
    value : Tensor, (a, b, y)
    gradient : Tensor, (3, a, b, y)
        Derivatives per voxel at the point.
    inside : Tensor, (a, b, y)
        1 where the point is within the grid; value, gradient and inside are 0 elsewhere.
    """
    if coefficients.device.type == "cpu":
        results = volume_loop(coefficients.numpy(), np.asarray(matrix, np.float64), shift.numpy())
        return tuple(torch.from_numpy(r) for r in results)
    return _sample_volume_tensors(coefficients, np.asarray(matrix), shift)


def _sample_lines_tensors(coefficients: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
    size = coefficients.shape[-1]
    position = torch.arange(size, device=shift.device) + shift
    inside = ((position >= -0.5) & (position <= size - 0.5)).float()
    base = torch.floor(position)
    weights, slopes = cubic_weights_of(position - base), cubic_slopes_of(position - base)
    value, slope = torch.zeros_like(shift), torch.zeros_like(shift)
    for tap in range(4):
        neighbour = torch.gather(coefficients, 2, mirror_indices(base.long() - 1 + tap, size))
        value += weights[tap] * neighbour
        slope += slopes[tap] * neighbour
    return value * inside, slope * inside, inside


def _sample_volume_tensors(
    coefficients: torch.Tensor, matrix: np.ndarray, shift: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    axes = [torch.arange(n, device=shift.device, dtype=torch.float32) for n in shift.shape]
    rows = [[float(m) for m in row] for row in matrix[:3]]
    position = [r[0] * axes[0][:, None, None] + r[1] * axes[1][:, None] + r[2] * axes[2] + r[3] for r in rows]
    position[2] = position[2] + shift
    sizes = coefficients.shape
    inside = torch.ones_like(shift)
    for x, n in zip(position, sizes, strict=True):
        inside *= (x >= -0.5) & (x <= n - 0.5)
    base = [torch.floor(x) for x in position]
    taps = [(cubic_weights_of(x - b), cubic_slopes_of(x - b)) for x, b in zip(position, base, strict=True)]
    total = torch.zeros((4, *shift.shape), device=shift.device)
    for i in range(4):
        for j in range(4):
            for k in range(4):
                index = [mirror_indices(b.long() - 1 + t, n) for b, t, n in zip(base, (i, j, k), sizes, strict=True)]
                neighbour = coefficients.reshape(-1)[(index[0] * sizes[1] + index[1]) * sizes[2] + index[2]]
                for d in range(4):
                    u, v, w = (taps[axis][1 if d == axis + 1 else 0][t] for axis, t in enumerate((i, j, k)))
                    total[d] += u * v * w * neighbour
    total *= inside
    return total[0], total[1:], inside
