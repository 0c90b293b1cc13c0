"""The voxels of a reference where volumes are compared with their targets, and the same at coarser voxels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dsiprep.data.grid import Grid

__all__ = ["PointSet", "average_blocks", "point_set", "target_gradients"]


@dataclass(frozen=True, eq=False)
class PointSet:
    """The voxels of a reference grid where target and volumes are compared.

    Attributes
    ----------
    grid : Grid
        The reference grid.
    voxels : ndarray, (m, 3), float32
        Voxel coordinates.
    world : ndarray, (m, 3), float32
        World RAS+ mm, less `centre`.
    centre : ndarray, (3,)
        Mean position of the points in mm; rotations are about it.
    neighbours : ndarray, (m, 6), int32
        Where in the point set the neighbours along -i, +i, -j, +j, -k, +k are; the point itself at the rim.
    """

    grid: Grid
    voxels: np.ndarray
    world: np.ndarray
    centre: np.ndarray
    neighbours: np.ndarray

    def __len__(self) -> int:
        return len(self.voxels)

    def every(self, step: int) -> PointSet:
        """One in `step` of the points, about the same centre; for sums, not for gradients."""
        return replace(self, voxels=self.voxels[::step], world=self.world[::step], neighbours=self.neighbours[::step])


def point_set(mask: torch.Tensor, grid: Grid) -> PointSet:
    """The voxels of `grid` where `mask` (i, j, k) is above one half."""
    inside = np.pad(mask.detach().cpu().numpy() > 0.5, 1)
    number = np.full(inside.shape, -1, np.int64)
    where = np.argwhere(inside)
    number[inside] = np.arange(len(where))
    columns = []
    for axis in range(3):
        for step in (-1, 1):
            beside = where.copy()
            beside[:, axis] += step
            found = number[tuple(beside.T)]
            columns.append(np.where(found < 0, np.arange(len(where)), found))
    voxels = where - 1
    world = grid.to_world(voxels)
    centre = world.mean(axis=0)
    return PointSet(
        grid,
        voxels.astype(np.float32),
        (world - centre).astype(np.float32),
        centre,
        np.stack(columns, axis=1).astype(np.int32),
    )


def target_gradients(targets: torch.Tensor, points: PointSet) -> torch.Tensor:
    """World gradients of (n, m) targets by central differences (one-sided at the rim), (n, m, 3), per mm."""
    near = torch.as_tensor(points.neighbours, device=targets.device).long()
    own = torch.arange(len(points), device=targets.device)
    # voxel index = inverse @ world, so the world gradient is inverse' @ the gradient per voxel
    inverse = torch.as_tensor(np.linalg.inv(points.grid.affine[:3, :3]), dtype=torch.float32, device=targets.device)
    out = torch.zeros(*targets.shape, 3, device=targets.device)
    for axis in range(3):
        low, high = near[:, 2 * axis], near[:, 2 * axis + 1]
        steps = (low != own).float() + (high != own).float()
        slope = (targets[:, high] - targets[:, low]) / steps.clamp(min=1)
        out += slope[..., None] * inverse[axis]
    return out


def average_blocks(volumes: torch.Tensor, grid: Grid, spacing: float) -> tuple[torch.Tensor, Grid]:
    """Means over blocks of whole voxels, as many as come nearest to `spacing` mm along each axis.

    Parameters
    ----------
    volumes : Tensor, (n, i, j, k)
        Voxels at the upper ends that do not fill a block are left out.
    grid : Grid
    spacing : float
        mm.

    Returns
    -------
    volumes : Tensor, (n, i', j', k')
        The same tensor where voxels are as large as that already.
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
