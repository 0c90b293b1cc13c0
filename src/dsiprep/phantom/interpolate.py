"""Trilinear reading for the phantom. It is kept apart from `ops.sample` so that the two can disagree."""

from __future__ import annotations

import numba
import numpy as np

from dsiprep.data.grid import Grid


@numba.njit(inline="always", fastmath=True)
def trilinear(values: np.ndarray, x: float, y: float, z: float) -> float:
    """The value of an (i, j, k) array at a voxel point; zero beyond the outermost voxel centres."""
    ni, nj, nk = values.shape
    if not (x >= 0 and y >= 0 and z >= 0 and x <= ni - 1 and y <= nj - 1 and z <= nk - 1):
        return 0.0
    i, j, k = min(int(x), ni - 2), min(int(y), nj - 2), min(int(z), nk - 2)
    a, b, c = x - i, y - j, z - k
    low = (values[i, j, k] * (1 - c) + values[i, j, k + 1] * c) * (1 - b)
    low += (values[i, j + 1, k] * (1 - c) + values[i, j + 1, k + 1] * c) * b
    high = (values[i + 1, j, k] * (1 - c) + values[i + 1, j, k + 1] * c) * (1 - b)
    high += (values[i + 1, j + 1, k] * (1 - c) + values[i + 1, j + 1, k + 1] * c) * b
    return low * (1 - a) + high * a


def read(values: np.ndarray, grid: Grid, points: np.ndarray, nearest: bool = False) -> np.ndarray:
    """A map on `grid` at world points (n, 3): (n,) float32. Outside: zero, or the nearest voxel's value."""
    voxels = grid.to_voxels(points)
    if nearest:
        voxels = np.clip(voxels, 0, np.asarray(grid.shape) - 1)
    return _read_all(np.ascontiguousarray(values, np.float32), voxels)


@numba.njit(parallel=True, fastmath=True, cache=True)
def _read_all(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    out = np.empty(points.shape[0], np.float32)
    for n in numba.prange(points.shape[0]):
        out[n] = trilinear(values, points[n, 0], points[n, 1], points[n, 2])
    return out
