"""The displacement of eddy currents in the voxels of a grid, for fused loops and for tensors."""

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
    """Eddy currents of n volumes on a grid.

    Attributes
    ----------
    voxels : ndarray, (n, 10), float32
        Coefficients of the displacement in voxels; (0, 10) where there is none.
    frame : ndarray, (2, 3), float32
        Scanner coordinates are frame[0] * voxel + frame[1].
    along : int
        The voxel axis that is displaced.
    """

    voxels: np.ndarray
    frame: np.ndarray
    along: int


def eddy_on_grid(eddy: EddyCurrents | None, grid: Grid) -> EddyDisplacement:
    """`eddy` on a grid whose axes run along those of the scanner."""
    if eddy is None:
        return EddyDisplacement(np.zeros((0, 10), np.float32), np.zeros((2, 3), np.float32), 0)
    sizes = grid.voxel_sizes
    frame = np.stack([sizes, (grid.affine[:3, 3] - eddy.centre) @ eddy.axes]) / EDDY_MM
    return EddyDisplacement(
        (eddy.coefficients / sizes[eddy.along]).astype(np.float32), frame.astype(np.float32), eddy.along
    )


@inlined
def displace_voxel(c: np.ndarray, frame: np.ndarray, along: int, at: np.ndarray) -> np.floating:
    """Displace one voxel coordinate `at` (3,) in place by the polynomial `c` (10,); gives the Jacobian."""
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


def displace_points(bend: EddyDisplacement, at: torch.Tensor) -> torch.Tensor:
    """Displace voxel coordinates (n, 3, m) in place; gives the Jacobians, (n, m)."""
    frame = torch.as_tensor(bend.frame, device=at.device)
    size = torch.as_tensor(bend.voxels, device=at.device)
    terms, slopes = eddy_polynomial(frame[0, :, None] * at + frame[1, :, None], bend.along)
    at[:, bend.along] += torch.einsum("nt,tnm->nm", size, terms)
    return 1 + torch.einsum("nt,tnm->nm", size, slopes) * float(bend.frame[0, bend.along])


def eddy_polynomial(s: torch.Tensor, along: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ten terms of `EddyCurrents` at scanner coordinates (n, 3, m), and their slopes along one axis, (10, n, m)."""
    x, y, z = s.unbind(1)
    one, none = torch.ones_like(x), torch.zeros_like(x)
    terms = torch.stack(eddy_terms(x, y, z))
    slopes = (
        [none, one, none, none, 2 * x, none, none, y, z, none],
        [none, none, one, none, none, 2 * y, none, x, none, z],
        [none, none, none, one, none, none, 2 * z, none, x, y],
    )
    return terms, torch.stack(slopes[along])
