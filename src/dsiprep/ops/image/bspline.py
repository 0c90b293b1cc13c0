"""Cubic B-spline weights, their slopes, and mirrored indices, for Numba loops and for tensors.

The spline at x is the sum over t of weights[t] * c[i - 1 + t] with i = floor(x) and f = x - i; its derivative is the
same sum with the slopes in place of the weights. The Numba and tensor versions agree, which a test verifies.

References
----------
Unser et al. 1993, doi 10.1109/78.193220.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.compiled import inlined

Real = float | np.floating  # weights and slopes have the type of f

__all__ = ["cubic_slopes", "cubic_slopes_of", "cubic_weights", "cubic_weights_of", "mirror_indices", "mirrored"]


@inlined
def cubic_weights(f: Real) -> tuple[Real, Real, Real, Real]:
    """Weights of the four nearest coefficients at 0 <= f < 1 (Numba; `cubic_weights_of` for tensors)."""
    kind = type(f)
    one, half, sixth, two_thirds = kind(1), kind(0.5), kind(1 / 6), kind(2 / 3)
    g = one - f
    return (
        g * g * g * sixth,
        two_thirds - f * f * (one - half * f),
        two_thirds - g * g * (one - half * g),
        f * f * f * sixth,
    )


@inlined
def cubic_slopes(f: Real) -> tuple[Real, Real, Real, Real]:
    """Derivatives of `cubic_weights` with respect to f (Numba; `cubic_slopes_of` for tensors)."""
    kind = type(f)
    half, three_halves, two = kind(0.5), kind(1.5), kind(2)
    g = kind(1) - f
    return -half * g * g, f * (three_halves * f - two), g * (two - three_halves * g), half * f * f


@inlined
def mirrored(index: int, size: int) -> int:
    """Mirror an index about the outermost voxel centres (Numba; `mirror_indices` for tensors)."""
    if size == 1:
        return 0
    if index < 0:
        index = -index
    if index >= size:
        index = 2 * size - 2 - index
    return min(max(index, 0), size - 1)


def cubic_weights_of(f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensor version of `cubic_weights`, for any shape."""
    g = 1 - f
    return g**3 / 6, 2 / 3 - f**2 * (1 - f / 2), 2 / 3 - g**2 * (1 - g / 2), f**3 / 6


def cubic_slopes_of(f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tensor version of `cubic_slopes`, for any shape."""
    g = 1 - f
    return -(g**2) / 2, f * (1.5 * f - 2), g * (2 - 1.5 * g), f**2 / 2


def mirror_indices(index: torch.Tensor, size: int | torch.Tensor) -> torch.Tensor:
    """Tensor version of `mirrored`; `size` is a single number or broadcasts against `index`."""
    size = torch.as_tensor(size, device=index.device)
    index = index.abs()
    index = torch.where(index >= size, 2 * size - 2 - index, index)
    return torch.minimum(index.clamp(min=0), size - 1)
