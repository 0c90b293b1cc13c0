"""Fused loops of `align` for the CPU: one pass over the points of a volume, without temporaries.

A volume is read at an affine of the point and, where there are eddy currents, at a displacement along one voxel axis,
times its Jacobian.
"""

from __future__ import annotations

import numba
import numpy as np

from dsiprep.compiled import compiled, inlined
from dsiprep.ops.image.eddy_displacement import displace_voxel

__all__ = ["FREEDOM", "equations_loop", "read_loop"]

FREEDOM = 4.0  # degrees of freedom of the Student t distribution of residuals


@inlined
def _linear(volume: np.ndarray, x: float, y: float, z: float) -> float:
    """Trilinear value at a point inside the volume."""
    ni, nj, nk = volume.shape
    i, j, k = min(int(x), ni - 2), min(int(y), nj - 2), min(int(z), nk - 2)
    fx, fy, fz = x - i, y - j, z - k
    c00 = volume[i, j, k] * (1 - fz) + volume[i, j, k + 1] * fz
    c01 = volume[i, j + 1, k] * (1 - fz) + volume[i, j + 1, k + 1] * fz
    c10 = volume[i + 1, j, k] * (1 - fz) + volume[i + 1, j, k + 1] * fz
    c11 = volume[i + 1, j + 1, k] * (1 - fz) + volume[i + 1, j + 1, k + 1] * fz
    return (c00 * (1 - fy) + c01 * fy) * (1 - fx) + (c10 * (1 - fy) + c11 * fy) * fx


@compiled(parallel=True)
def read_loop(
    volumes: np.ndarray,
    voxels: np.ndarray,
    maps: np.ndarray,
    eddy: np.ndarray,
    frame: np.ndarray,
    along: int,
    out: np.ndarray,
) -> None:
    """Each volume at its points; `out` (n, m) keeps its value where a point is outside.

    `eddy` (n, 10) or (0, 10), `frame` and `along` as in `bend.EddyDisplacement`.
    """
    n, ni, nj, nk = volumes.shape
    bent = len(eddy) > 0
    for v in numba.prange(n):
        a = maps[v]
        at = np.empty(3, np.float32)
        for p in range(voxels.shape[0]):
            i, j, k = voxels[p, 0], voxels[p, 1], voxels[p, 2]
            for c in range(3):
                at[c] = a[c, 0] * i + a[c, 1] * j + a[c, 2] * k + a[c, 3]
            jacobian = np.float32(1)
            if bent:
                jacobian = displace_voxel(eddy[v], frame, along, at)
            x, y, z = at[0], at[1], at[2]
            if x >= 0 and y >= 0 and z >= 0 and x <= ni - 1 and y <= nj - 1 and z <= nk - 1:
                out[v, p] = jacobian * _linear(volumes[v], x, y, z)


@compiled(parallel=True)
def equations_loop(
    volumes: np.ndarray,
    voxels: np.ndarray,
    world: np.ndarray,
    maps: np.ndarray,
    targets: np.ndarray,
    gradients: np.ndarray,
    gain: np.ndarray,
    scale: np.ndarray,
    affine: bool,
    eddy: np.ndarray,
    frame: np.ndarray,
    along: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums of `align.normal_equations`, lower triangles; `eddy` and `frame` as in `read_loop`."""
    n, ni, nj, nk = volumes.shape
    width = 13 if affine else 7
    bent = len(eddy) > 0
    hessian = np.zeros((n, width, width))
    slope = np.zeros((n, width))
    sums = np.zeros((n, 3))
    for v in numba.prange(n):
        a = maps[v]
        row = np.empty(width, np.float32)
        at = np.empty(3, np.float32)
        h = np.zeros((width, width), np.float64)
        s = np.zeros(width, np.float64)
        g = np.float32(gain[v])
        inverse = np.float32(1 / scale[v] ** 2)
        cost, total, count = np.float64(0), np.float64(0), 0
        for p in range(voxels.shape[0]):
            i, j, k = voxels[p, 0], voxels[p, 1], voxels[p, 2]
            for c in range(3):
                at[c] = a[c, 0] * i + a[c, 1] * j + a[c, 2] * k + a[c, 3]
            jacobian = np.float32(1)
            if bent:
                jacobian = displace_voxel(eddy[v], frame, along, at)
            x, y, z = at[0], at[1], at[2]
            if not (x >= 0 and y >= 0 and z >= 0 and x <= ni - 1 and y <= nj - 1 and z <= nk - 1):
                continue
            r = jacobian * _linear(volumes[v], x, y, z) - g * targets[v, p]
            w = np.float32((FREEDOM + 1) / (FREEDOM + r * r * inverse))
            gx, gy, gz = g * gradients[v, p, 0], g * gradients[v, p, 1], g * gradients[v, p, 2]
            wx, wy, wz = world[p, 0], world[p, 1], world[p, 2]
            if affine:
                row[0], row[1], row[2] = gx * wx, gx * wy, gx * wz
                row[3], row[4], row[5] = gy * wx, gy * wy, gy * wz
                row[6], row[7], row[8] = gz * wx, gz * wy, gz * wz
                row[9], row[10], row[11] = gx, gy, gz
            else:
                row[0], row[1], row[2] = wy * gz - wz * gy, wz * gx - wx * gz, wx * gy - wy * gx
                row[3], row[4], row[5] = gx, gy, gz
            row[width - 1] = targets[v, p]
            for b in range(width):
                wb = w * row[b]
                s[b] += wb * r
                for c in range(b + 1):
                    h[b, c] += wb * row[c]
            cost += w * r * r
            total += w
            count += 1
        hessian[v], slope[v] = h, s
        sums[v, 0], sums[v, 1], sums[v, 2] = cost, total, count
    return hessian, slope, sums
