"""Trilinear interpolation for the phantom, independent of `ops.image.interpolation` so that errors can show."""

from __future__ import annotations

import numba
import numpy as np

from dsiprep.compiled import compiled, inlined
from dsiprep.data.grid import Grid


@inlined
def trilinear(values: np.ndarray, x: float, y: float, z: float) -> float:
    """Value of an (i, j, k) array at a point in voxels; zero beyond the outermost voxel centres."""
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


def interpolate(values: np.ndarray, grid: Grid, points: np.ndarray, nearest: bool = False) -> np.ndarray:
    """Sample a map on `grid` at world points (n, 3): (n,) float32; outside, zero or the value of the nearest voxel."""
    world_to_voxel = np.linalg.inv(grid.affine)
    contiguous = np.ascontiguousarray(values, np.float32)
    return _interpolate_points(contiguous, np.asarray(points, float), world_to_voxel, nearest)


@compiled(parallel=True)
def _interpolate_points(values: np.ndarray, points: np.ndarray, m: np.ndarray, nearest: bool) -> np.ndarray:
    out = np.empty(points.shape[0], np.float32)
    for n in numba.prange(points.shape[0]):
        a, b, c = points[n, 0], points[n, 1], points[n, 2]
        x = m[0, 0] * a + m[0, 1] * b + m[0, 2] * c + m[0, 3]
        y = m[1, 0] * a + m[1, 1] * b + m[1, 2] * c + m[1, 3]
        z = m[2, 0] * a + m[2, 1] * b + m[2, 2] * c + m[2, 3]
        if nearest:
            x = min(max(x, 0.0), values.shape[0] - 1.0)
            y = min(max(y, 0.0), values.shape[1] - 1.0)
            z = min(max(z, 0.0), values.shape[2] - 1.0)
        out[n] = trilinear(values, x, y, z)
    return out
