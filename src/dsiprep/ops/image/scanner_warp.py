"""The warp of gradient nonlinearity in voxel coordinates of images, for Numba loops and for tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.compiled import inlined
from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.image.displacement_field import jacobian_determinant, prefilter
from dsiprep.ops.image.filters import gradient
from dsiprep.ops.image.interpolation import sample_linear

__all__ = ["NO_WARP", "ScannerWarp", "look_up", "scanner_warp", "warp_points"]


@dataclass(frozen=True, eq=False)
class ScannerWarp:
    """Table of a warp y -> y + d(y) that is fixed in the scanner; beyond its edge the values at its edge.

    Attributes
    ----------
    values : ndarray, (5, i, j, k), float32
        d in voxels of the images; the determinant of I + dd/dy; 1 + dd/dy along the phase-encoding axis.
    frame : ndarray, (2, 3), float32
        Position in the table is frame[0] * voxel + frame[1], axis by axis.
    """

    values: np.ndarray
    frame: np.ndarray


NO_WARP = ScannerWarp(np.zeros((5, 0, 0, 0), np.float32), np.zeros((2, 3), np.float32))


def scanner_warp(field: DisplacementField | None, source: Grid, along: int | None = None) -> ScannerWarp:
    """Express a warp in voxels of images on `source`.

    Parameters
    ----------
    field : DisplacementField or None
        d on a grid with the axes of `source`; None stands for no warp.
    source : Grid
    along : int, optional
        Voxel axis of phase encoding.
    """
    if field is None:
        return NO_WARP
    to_voxel = np.linalg.inv(source.affine)[:3, :3]
    device = field.data.device
    shift = torch.einsum("ab,bijk->aijk", torch.as_tensor(to_voxel, device=device).float(), prefilter(field).data)
    stretch = torch.ones_like(shift[0])
    if along is not None:
        # the axes are parallel: one table step is `per_step` voxels
        per_step = field.grid.voxel_sizes[along] / source.voxel_sizes[along]
        exact = torch.einsum("b,bijk->ijk", torch.as_tensor(to_voxel[along], device=device).float(), field.data)
        stretch = 1 + gradient(exact[None])[0, along] / per_step
    values = torch.cat([shift, jacobian_determinant(field)[None], stretch[None]])
    frame = np.stack([source.voxel_sizes / field.grid.voxel_sizes, field.grid.to_voxels(source.affine[:3, 3])])
    return ScannerWarp(np.ascontiguousarray(values.cpu().numpy(), np.float32), frame.astype(np.float32))


@inlined
def look_up(
    values: np.ndarray, frame: np.ndarray, x: np.floating, y: np.floating, z: np.floating, out: np.ndarray
) -> None:
    """Write the five values at a voxel coordinate into `out`: the lookup of `warp_points`, for Numba loops."""
    _, ni, nj, nk = values.shape
    x = min(max(frame[0, 0] * x + frame[1, 0], np.float32(0)), np.float32(ni - 1))
    y = min(max(frame[0, 1] * y + frame[1, 1], np.float32(0)), np.float32(nj - 1))
    z = min(max(frame[0, 2] * z + frame[1, 2], np.float32(0)), np.float32(nk - 1))
    i, j, k = min(int(x), ni - 2), min(int(y), nj - 2), min(int(z), nk - 2)
    a, b, c = x - i, y - j, z - k
    for v in range(5):
        low = (values[v, i, j, k] * (1 - c) + values[v, i, j, k + 1] * c) * (1 - b)
        low += (values[v, i, j + 1, k] * (1 - c) + values[v, i, j + 1, k + 1] * c) * b
        high = (values[v, i + 1, j, k] * (1 - c) + values[v, i + 1, j, k + 1] * c) * (1 - b)
        high += (values[v, i + 1, j + 1, k] * (1 - c) + values[v, i + 1, j + 1, k + 1] * c) * b
        out[v] = low * (1 - a) + high * a


def warp_points(warp: ScannerWarp, start: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where points of a scan appear, in voxels (3, ...), and the factor of their intensities, (...).

    Parameters
    ----------
    warp : ScannerWarp
        Not `NO_WARP`.
    start : Tensor, (3, ...)
        Voxel coordinates of the true positions y.
    points : Tensor, (3, ...)
        y displaced along the phase-encoding axis, as in images without gradient nonlinearity. Off-resonance displaces
        by a given distance in the images; in images from which the nonlinearity has been removed, where that distance
        was estimated, it is shorter by the local stretch.
    """
    values = torch.as_tensor(warp.values, device=points.device)
    frame = torch.as_tensor(warp.frame, device=points.device).reshape(2, 3, *(1 for _ in points.shape[1:]))
    last = torch.tensor(values.shape[1:], device=points.device).reshape(frame.shape[1:]) - 1.0
    sampled = sample_linear(values, (frame[0] * start + frame[1]).clamp(min=0).minimum(last))
    return start + sampled[4] * (points - start) + sampled[:3], sampled[3]
