"""The masked voxels of a reference grid at which volumes are compared with their targets, and block averaging."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numba
import numpy as np
import torch

from dsiprep.compiled import compiled
from dsiprep.data.grid import Grid

__all__ = ["PointSet", "average_blocks", "point_set", "target_gradients"]


@dataclass(frozen=True, eq=False)
class PointSet:
    """The voxels of a reference grid at which volumes are compared with their targets.

    Attributes
    ----------
    grid : Grid
        The reference grid.
    voxels : ndarray, (m, 3), float32
        Voxel coordinates.
    world : ndarray, (m, 3), float32
        World RAS+ mm, relative to `centre`.
    centre : ndarray, (3,)
        Mean world position of the points in mm: the centre of rotation.
    neighbours : ndarray, (m, 6), int32
        Indices of the neighbours along -i, +i, -j, +j, -k, +k; the point's own index where there is none.
    """

    grid: Grid
    voxels: np.ndarray
    world: np.ndarray
    centre: np.ndarray
    neighbours: np.ndarray

    def __len__(self) -> int:
        return len(self.voxels)

    def take(self, indices: np.ndarray) -> PointSet:
        """The points of these indices, with the same centre; for sums only, as neighbour indices become invalid."""
        return replace(
            self, voxels=self.voxels[indices], world=self.world[indices], neighbours=self.neighbours[indices]
        )


def point_set(mask: torch.Tensor, grid: Grid) -> PointSet:
    """The voxels of `grid` where `mask` (i, j, k) is above one half."""
    inside = np.pad(mask.detach().cpu().numpy() > 0.5, 1)
    index = np.full(inside.shape, -1, np.int64)
    padded_voxels = np.argwhere(inside)
    index[inside] = np.arange(len(padded_voxels))
    columns = []
    for axis in range(3):
        for step in (-1, 1):
            shifted = padded_voxels.copy()
            shifted[:, axis] += step
            neighbour = index[tuple(shifted.T)]
            columns.append(np.where(neighbour < 0, np.arange(len(padded_voxels)), neighbour))
    voxels = padded_voxels - 1
    world = grid.to_world(voxels)
    centre = world.mean(axis=0)
    return PointSet(
        grid,
        voxels.astype(np.float32),
        (world - centre).astype(np.float32),
        centre,
        np.stack(columns, axis=1).astype(np.int32),
    )


def target_gradients(targets: torch.Tensor, points: PointSet, indices: np.ndarray | None = None) -> torch.Tensor:
    """World gradients (n, m, 3) per mm of targets (n, m): central differences, one-sided at the mask's edge.

    With `indices`, at these points only.
    """
    # voxel index = inverse @ world, so the world gradient is inverse' @ the gradient per voxel
    inverse = np.linalg.inv(points.grid.affine[:3, :3]).astype(np.float32)
    own = np.arange(len(points)) if indices is None else indices
    if targets.device.type == "cpu":
        out = np.empty((len(targets), len(own), 3), np.float32)
        _gradients_loop(np.ascontiguousarray(targets.detach().numpy()), points.neighbours, inverse, own, out)
        return torch.from_numpy(out)
    return _gradients_torch(targets, points, torch.as_tensor(inverse, device=targets.device), own)


@compiled(parallel=True)
def _gradients_loop(
    targets: np.ndarray, neighbours: np.ndarray, inverse: np.ndarray, indices: np.ndarray, out: np.ndarray
) -> None:
    """Write `target_gradients` to `out`; `_gradients_torch` is the same in tensor operations."""
    for v in numba.prange(out.shape[0]):
        values = targets[v]
        for p in range(out.shape[1]):
            own = indices[p]
            x, y, z = np.float32(0), np.float32(0), np.float32(0)
            for axis in range(3):
                low, high = neighbours[own, 2 * axis], neighbours[own, 2 * axis + 1]
                slope = values[high] - values[low]
                if low != own and high != own:
                    slope *= np.float32(0.5)
                x += slope * inverse[axis, 0]
                y += slope * inverse[axis, 1]
                z += slope * inverse[axis, 2]
            out[v, p, 0], out[v, p, 1], out[v, p, 2] = x, y, z


def _gradients_torch(
    targets: torch.Tensor, points: PointSet, inverse: torch.Tensor, indices: np.ndarray
) -> torch.Tensor:
    """`_gradients_loop` by tensor operations."""
    neighbours = torch.as_tensor(points.neighbours[indices], device=targets.device).long()
    own = torch.as_tensor(indices, device=targets.device)
    out = torch.zeros(len(targets), len(own), 3, device=targets.device)
    for axis in range(3):
        low, high = neighbours[:, 2 * axis], neighbours[:, 2 * axis + 1]
        steps = (low != own).float() + (high != own).float()
        slope = (targets[:, high] - targets[:, low]) / steps.clamp(min=1)
        out += slope[..., None] * inverse[axis]
    return out


def average_blocks(volumes: torch.Tensor, grid: Grid, spacing: float) -> tuple[torch.Tensor, Grid]:
    """Average over blocks of whole voxels whose size is closest to `spacing` mm along each axis.

    Parameters
    ----------
    volumes : Tensor, (n, i, j, k)
        Voxels at the upper ends that do not fill a block are discarded.
    grid : Grid
    spacing : float
        mm.

    Returns
    -------
    volumes : Tensor, (n, i', j', k')
        The input itself where its voxels already are as large as the spacing.
    grid : Grid
    """
    sizes, full = grid.voxel_sizes, np.asarray(grid.shape)
    factor = np.clip(np.round(spacing / sizes), 1, np.maximum(1, full // 4)).astype(int)
    if (factor == 1).all():
        return volumes, grid
    shape = full // factor
    i, j, k = shape * factor
    parts = volumes[:, :i, :j, :k].reshape(len(volumes), shape[0], factor[0], shape[1], factor[1], shape[2], factor[2])
    affine = grid.affine.copy()
    affine[:3, :3] = affine[:3, :3] * factor
    affine[:3, 3] = grid.to_world((factor - 1) / 2)
    return parts.mean((2, 4, 6)).contiguous(), Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)
