"""Fused CPU loops for `ops.motion.gauss_newton`: one pass over the points of each volume, without temporaries.

A volume is sampled at an affine map of each point plus, with eddy currents, a displacement along one voxel axis, and
multiplied by the Jacobian determinant of that displacement.
"""

from __future__ import annotations

import numba
import numpy as np

from dsiprep.compiled import compiled, inlined
from dsiprep.ops.image.eddy_displacement import displace_voxel

__all__ = ["STUDENT_DOF", "equations_loop", "sample_loop"]

STUDENT_DOF = 4.0  # degrees of freedom of the Student t distribution of residuals
BLOCK = 256  # points whose products are summed in single precision


@inlined
def _linear(volume: np.ndarray, x: float, y: float, z: float) -> float:
    """Trilinear interpolation at a point inside the volume."""
    ni, nj, nk = volume.shape
    i, j, k = min(int(x), ni - 2), min(int(y), nj - 2), min(int(z), nk - 2)
    fx, fy, fz = x - i, y - j, z - k
    c00 = volume[i, j, k] * (1 - fz) + volume[i, j, k + 1] * fz
    c01 = volume[i, j + 1, k] * (1 - fz) + volume[i, j + 1, k + 1] * fz
    c10 = volume[i + 1, j, k] * (1 - fz) + volume[i + 1, j, k + 1] * fz
    c11 = volume[i + 1, j + 1, k] * (1 - fz) + volume[i + 1, j + 1, k + 1] * fz
    return (c00 * (1 - fy) + c01 * fy) * (1 - fx) + (c10 * (1 - fy) + c11 * fy) * fx


@inlined
def _map_point(
    a: np.ndarray, voxel: np.ndarray, eddy: np.ndarray, v: int, frame: np.ndarray, along: int, at: np.ndarray
) -> np.floating:
    """Map a reference voxel into volume `v` by the affine `a` (3, 4), then displace it by eddy currents.

    Writes the voxel coordinates to `at` (3,) and returns the Jacobian determinant of the displacement.
    """
    i, j, k = voxel[0], voxel[1], voxel[2]
    for c in range(3):
        at[c] = a[c, 0] * i + a[c, 1] * j + a[c, 2] * k + a[c, 3]
    jacobian = np.float32(1)
    if len(eddy) > 0:
        jacobian = displace_voxel(eddy[v], frame, along, at)
    return jacobian


@inlined
def _fill_rows(
    volume: np.ndarray,
    voxels: np.ndarray,
    world: np.ndarray,
    a: np.ndarray,
    targets: np.ndarray,
    gradients: np.ndarray,
    gain: np.floating,
    affine: bool,
    eddy: np.ndarray,
    v: int,
    frame: np.ndarray,
    along: int,
    first: int,
    last: int,
    at: np.ndarray,
    rows: np.ndarray,
    residual: np.ndarray,
) -> int:
    """Derivatives (width, .) and residuals (.) of the points `first` to `last` inside the volume; their number."""
    ni, nj, nk = volume.shape
    count = 0
    for p in range(first, last):
        jacobian = _map_point(a, voxels[p], eddy, v, frame, along, at)
        x, y, z = at[0], at[1], at[2]
        if not (x >= 0 and y >= 0 and z >= 0 and x <= ni - 1 and y <= nj - 1 and z <= nk - 1):
            continue
        residual[count] = jacobian * _linear(volume, x, y, z) - gain * targets[p]
        gx, gy, gz = gain * gradients[p, 0], gain * gradients[p, 1], gain * gradients[p, 2]
        wx, wy, wz = world[p, 0], world[p, 1], world[p, 2]
        if affine:
            rows[0, count], rows[1, count], rows[2, count] = gx * wx, gx * wy, gx * wz
            rows[3, count], rows[4, count], rows[5, count] = gy * wx, gy * wy, gy * wz
            rows[6, count], rows[7, count], rows[8, count] = gz * wx, gz * wy, gz * wz
            rows[9, count], rows[10, count], rows[11, count] = gx, gy, gz
            rows[12, count] = targets[p]
        else:
            rows[0, count], rows[1, count], rows[2, count] = wy * gz - wz * gy, wz * gx - wx * gz, wx * gy - wy * gx
            rows[3, count], rows[4, count], rows[5, count] = gx, gy, gz
            rows[6, count] = targets[p]
        count += 1
    return count


@inlined
def _add_products(
    rows: np.ndarray,
    residual: np.ndarray,
    count: int,
    precision: np.floating,
    weights: np.ndarray,
    hessian: np.ndarray,
    slope: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Add the weighted products of `count` points to `hessian`, `slope` and `sums`; `weights` (2, .) is overwritten."""
    weight, weighted = weights[0], weights[1]
    cost, total = np.float32(0), np.float32(0)
    for q in range(count):
        r = residual[q]
        w = np.float32(STUDENT_DOF + 1) / (np.float32(STUDENT_DOF) + r * r * precision)
        weight[q] = w
        cost += w * r * r
        total += w
    sums[0] += cost
    sums[1] += total
    sums[2] += count
    for b in range(len(rows)):
        product = np.float32(0)
        for q in range(count):
            weighted[q] = weight[q] * rows[b, q]
            product += weighted[q] * residual[q]
        slope[b] += product
        for c in range(b + 1):
            product = np.float32(0)
            for q in range(count):
                product += weighted[q] * rows[c, q]
            hessian[b, c] += product


@compiled(parallel=True)
def sample_loop(
    volumes: np.ndarray,
    voxels: np.ndarray,
    maps: np.ndarray,
    eddy: np.ndarray,
    frame: np.ndarray,
    along: int,
    out: np.ndarray,
) -> None:
    """Sample each volume at its points; `out` (n, m) keeps its values where a point is outside the volume.

    `eddy` (n, 10) or (0, 10), `frame` and `along` are the attributes of `ops.image.eddy_displacement.EddyDisplacement`.
    """
    n, ni, nj, nk = volumes.shape
    for v in numba.prange(n):
        a = maps[v]
        at = np.empty(3, np.float32)
        for p in range(voxels.shape[0]):
            jacobian = _map_point(a, voxels[p], eddy, v, frame, along, at)
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
    """Sums of `gauss_newton.normal_equations`, lower triangles only; `eddy`, `frame`, `along` as in `sample_loop`."""
    n = volumes.shape[0]
    width = 13 if affine else 7
    hessian = np.zeros((n, width, width))
    slope = np.zeros((n, width))
    sums = np.zeros((n, 3))
    for v in numba.prange(n):
        rows = np.empty((width, BLOCK), np.float32)
        residual, weighted = np.empty(BLOCK, np.float32), np.empty((2, BLOCK), np.float32)
        at = np.empty(3, np.float32)
        g = np.float32(gain[v])
        for first in range(0, voxels.shape[0], BLOCK):
            last = min(first + BLOCK, voxels.shape[0])
            count = _fill_rows(
                volumes[v],
                voxels,
                world,
                maps[v],
                targets[v],
                gradients[v],
                g,
                affine,
                eddy,
                v,
                frame,
                along,
                first,
                last,
                at,
                rows,
                residual,
            )
            _add_products(rows, residual, count, np.float32(1 / scale[v] ** 2), weighted, hessian[v], slope[v], sums[v])
    return hessian, slope, sums


@compiled(parallel=True)
def slice_sums_loop(
    volumes: np.ndarray,
    voxels: np.ndarray,
    maps: np.ndarray,
    targets: np.ndarray,
    axis: int,
    width: float,
    eddy: np.ndarray,
    frame: np.ndarray,
    along: int,
    out: np.ndarray,
) -> None:
    """Add up products of the slices of each volume, as acquired, and the target around them.

    A point at the position z across slices counts for slice k with the weight 1 - |z - k| / `width`. The volume is
    sampled in the plane of the slice, so neighbouring slices do not mix. `out` (n, slices, 3) gains the weighted sums
    of volume x target, target² and 1; other arguments as in `equations_loop`.
    """
    n = volumes.shape[0]
    size = volumes.shape[1:]
    for v in numba.prange(n):
        a = maps[v]
        at = np.empty(3, np.float32)
        for p in range(voxels.shape[0]):
            jacobian = _map_point(a, voxels[p], eddy, v, frame, along, at)
            z = at[axis]
            at[axis] = 0
            if not (at[0] >= 0 and at[1] >= 0 and at[2] >= 0):
                continue
            if not (at[0] <= size[0] - 1 and at[1] <= size[1] - 1 and at[2] <= size[2] - 1):
                continue
            target = targets[v, p]
            for k in range(max(int(np.ceil(z - width)), 0), min(int(np.floor(z + width)), size[axis] - 1) + 1):
                at[axis] = k
                weight = 1 - abs(z - k) / width
                out[v, k, 0] += weight * jacobian * _linear(volumes[v], at[0], at[1], at[2]) * target
                out[v, k, 1] += weight * target * target
                out[v, k, 2] += weight
