"""Eddy-current displacement in voxel coordinates of a grid, for Numba loops and for tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.compiled import inlined
from dsiprep.data.grid import Grid
from dsiprep.data.transform import EDDY_MM, EddyCurrents, eddy_terms

__all__ = ["EddyDisplacement", "displace_points", "displace_voxel", "eddy_on_grid", "eddy_polynomial"]


@dataclass(frozen=True, eq=False)
class EddyDisplacement:
    """Eddy-current displacement of n volumes, in voxel coordinates of a grid.

    Attributes
    ----------
    coefficients : ndarray, (n, 10), float32
        Polynomial coefficients in voxels; (0, 10) without eddy currents.
    frame : ndarray, (2, 3), float32
        Scanner coordinates in units of 100 mm are frame[0] * voxel + frame[1].
    along : int
        The displaced voxel axis (phase encoding).
    """

    coefficients: np.ndarray
    frame: np.ndarray
    along: int


def eddy_on_grid(eddy: EddyCurrents | None, grid: Grid) -> EddyDisplacement:
    """Express `eddy` in voxel coordinates of a grid whose axes are `eddy.axes`; None gives no displacement."""
    if eddy is None:
        return EddyDisplacement(np.zeros((0, 10), np.float32), np.zeros((2, 3), np.float32), 0)
    sizes = grid.voxel_sizes
    frame = np.stack([sizes, (grid.affine[:3, 3] - eddy.centre) @ eddy.axes]) / EDDY_MM
    return EddyDisplacement(
        (eddy.coefficients / sizes[eddy.along]).astype(np.float32), frame.astype(np.float32), eddy.along
    )


@inlined
def displace_voxel(c: np.ndarray, frame: np.ndarray, along: int, at: np.ndarray) -> np.floating:
    """Displace one voxel coordinate `at` (3,) in place by the polynomial `c` (10,); return the Jacobian determinant.

    Numba version of the polynomial of `dsiprep.data.transform.eddy_terms`; a test verifies that both agree.
    """
    x = frame[0, 0] * at[0] + frame[1, 0]
    y = frame[0, 1] * at[1] + frame[1, 1]
    z = frame[0, 2] * at[2] + frame[1, 2]
    even = c[0] + c[1] * x + c[2] * y + c[3] * z + c[4] * x * x + c[5] * y * y + c[6] * z * z
    at[along] += even + c[7] * x * y + c[8] * x * z + c[9] * y * z
    if along == 0:
        slope = c[1] + 2 * c[4] * x + c[7] * y + c[8] * z
    elif along == 1:
        slope = c[2] + 2 * c[5] * y + c[7] * x + c[9] * z
    else:
        slope = c[3] + 2 * c[6] * z + c[8] * x + c[9] * y
    return np.float32(1) + slope * frame[0, along]


def displace_points(eddy: EddyDisplacement, at: torch.Tensor) -> torch.Tensor:
    """Displace voxel coordinates (n, 3, m) in place; return the Jacobian determinants, (n, m)."""
    frame = torch.as_tensor(eddy.frame, device=at.device)
    coefficients = torch.as_tensor(eddy.coefficients, device=at.device)
    terms, slopes = eddy_polynomial(frame[0, :, None] * at + frame[1, :, None], eddy.along)
    at[:, eddy.along] += torch.einsum("nt,tnm->nm", coefficients, terms)
    return 1 + torch.einsum("nt,tnm->nm", coefficients, slopes) * float(eddy.frame[0, eddy.along])


def eddy_polynomial(s: torch.Tensor, along: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ten polynomial terms at scanner coordinates (n, 3, m), and their derivatives along one axis; (10, n, m)."""
    x, y, z = s.unbind(1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    terms = torch.stack(eddy_terms(x, y, z))
    slopes = (
        [zero, one, zero, zero, 2 * x, zero, zero, y, z, zero],
        [zero, zero, one, zero, zero, 2 * y, zero, x, zero, z],
        [zero, zero, zero, one, zero, zero, 2 * z, zero, x, y],
    )
    return terms, torch.stack(slopes[along])
