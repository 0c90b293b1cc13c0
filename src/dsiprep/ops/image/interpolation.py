"""Linear and cubic B-spline interpolation at voxel coordinates, whose integers are voxel centres.

Values outside the grid are zero. On the CPU a fused Numba loop samples all volumes; other devices use tensor
operations. A test verifies that both agree.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from scipy.ndimage import spline_filter1d

from dsiprep.compiled import compiled
from dsiprep.data.grid import Grid
from dsiprep.ops.image.bspline import cubic_weights, cubic_weights_of, mirror_indices, mirrored

__all__ = ["resample_onto", "sample_cubic", "sample_linear", "spline_coefficients", "voxel_points"]


def voxel_points(
    target: Grid, source: Grid, matrix: np.ndarray | None = None, displacement: torch.Tensor | None = None
) -> torch.Tensor:
    """Voxel coordinates in `source` of the points of `target`.

    Parameters
    ----------
    target, source : Grid
    matrix : ndarray, (4, 4), optional
        Maps world points of the target to world points of the source; identity by default.
    displacement : Tensor, (3, i, j, k), optional
        Displacement on the grid of the target, in mm RAS+ of the source, added after `matrix`.

    Returns
    -------
    Tensor, (3, i, j, k), float32
        On the device of `displacement`, or on the CPU.
    """
    world_to_voxel = np.linalg.inv(source.affine)
    full = world_to_voxel @ (np.eye(4) if matrix is None else matrix) @ target.affine
    device = torch.device("cpu") if displacement is None else displacement.device
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in target.shape]
    rows = []
    for row in full[:3]:
        i, j, k = (float(row[a]) * axes[a] for a in range(3))
        rows.append((i[:, None, None] + j[None, :, None] + k[None, None, :] + float(row[3])).float())
    points = torch.stack(rows)
    if displacement is not None:
        linear = torch.as_tensor(world_to_voxel[:3, :3], dtype=torch.float32, device=device)
        points += torch.einsum("ab,bijk->aijk", linear, displacement.float())
    return points


def sample_linear(volumes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Trilinear interpolation; volumes are zero outside the grid.

    Parameters
    ----------
    volumes : Tensor, (n, i, j, k), float32
    points : Tensor, (3, ...), float32
        Voxel coordinates, the same for all volumes.

    Returns
    -------
    Tensor, (n, ...)
    """
    return _sample(volumes, points, cubic=False)


def sample_cubic(coefficients: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Cubic B-spline interpolation of `spline_coefficients`; zero beyond half a voxel from the outermost voxel centres.

    Shapes as in `sample_linear`. Coefficients are mirrored about the outermost voxel centres.
    """
    return _sample(coefficients, points, cubic=True)


def spline_coefficients(volumes: torch.Tensor) -> torch.Tensor:
    """Coefficients of the cubic B-splines that interpolate volumes (n, i, j, k).

    The recursive filter of Unser et al. 1993 (doi 10.1109/78.193220), mirrored about the outermost voxel centres.
    """
    if volumes.device.type != "cpu":
        return _spline_coefficients_tensors(volumes.float())
    filtered = volumes.detach().cpu().numpy().astype(np.float32)
    for axis in (1, 2, 3):
        if filtered.shape[axis] > 1:
            filtered = spline_filter1d(filtered, order=3, axis=axis, output=np.float32, mode="mirror")
    return torch.from_numpy(np.ascontiguousarray(filtered)).to(volumes.device)


def resample_onto(
    volumes: torch.Tensor,
    source: Grid,
    target: Grid,
    matrix: np.ndarray | None = None,
    displacement: torch.Tensor | None = None,
    cubic: bool = False,
) -> torch.Tensor:
    """Resample volumes (n, i, j, k) from `source` onto `target`; `matrix` and `displacement` as in `voxel_points`."""
    points = voxel_points(target, source, matrix, displacement).to(volumes.device)
    return sample_cubic(spline_coefficients(volumes), points) if cubic else sample_linear(volumes, points)


def _spline_coefficients_tensors(volumes: torch.Tensor) -> torch.Tensor:
    """Tensor version of `spline_coefficients`: multiply by the inverse B-spline matrix along each axis."""
    for axis in (1, 2, 3):
        size = volumes.shape[axis]
        if size > 1:
            matrix = (4 * np.eye(size) + np.eye(size, k=1) + np.eye(size, k=-1)) / 6
            matrix[0, 1] = matrix[-1, -2] = 1 / 3  # mirrored edges
            inverse = torch.as_tensor(np.linalg.inv(matrix), dtype=torch.float32, device=volumes.device)
            volumes = torch.tensordot(volumes, inverse, dims=([axis], [1])).movedim(-1, axis)
    return volumes.contiguous()


def _sample(volumes: torch.Tensor, points: torch.Tensor, cubic: bool) -> torch.Tensor:
    flat = points.reshape(3, -1)
    if volumes.device.type == "cpu":
        source = volumes.detach().numpy().astype(np.float32, copy=False)
        coordinates = np.ascontiguousarray(flat.detach().cpu().numpy(), dtype=np.float32)
        result = torch.from_numpy((_cubic_loop if cubic else _linear_loop)(source, coordinates))
    else:
        result = _sample_tensors(volumes.float(), flat.to(volumes.device), cubic)
    return result.reshape(volumes.shape[0], *points.shape[1:])


@compiled(parallel=True)
def _linear_loop(volumes: np.ndarray, points: np.ndarray) -> np.ndarray:
    n, ni, nj, nk = volumes.shape
    out = np.zeros((n, points.shape[1]), np.float32)
    for p in numba.prange(points.shape[1]):
        x, y, z = points[0, p], points[1, p], points[2, p]
        if not (x > -1 and y > -1 and z > -1 and x < ni and y < nj and z < nk):
            continue
        i0, j0, k0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
        for di in range(2):
            i = i0 + di
            if i < 0 or i >= ni:
                continue
            wi = 1 - abs(x - i)
            for dj in range(2):
                j = j0 + dj
                if j < 0 or j >= nj:
                    continue
                wij = wi * (1 - abs(y - j))
                for dk in range(2):
                    k = k0 + dk
                    if k < 0 or k >= nk:
                        continue
                    w = wij * (1 - abs(z - k))
                    for v in range(n):
                        out[v, p] += w * volumes[v, i, j, k]
    return out


@compiled(parallel=True)
def _cubic_loop(volumes: np.ndarray, points: np.ndarray) -> np.ndarray:
    n, ni, nj, nk = volumes.shape
    out = np.zeros((n, points.shape[1]), np.float32)
    for p in numba.prange(points.shape[1]):
        x, y, z = points[0, p], points[1, p], points[2, p]
        if not (x >= -0.5 and y >= -0.5 and z >= -0.5 and x <= ni - 0.5 and y <= nj - 0.5 and z <= nk - 0.5):
            continue
        i0, j0, k0 = int(np.floor(x)) - 1, int(np.floor(y)) - 1, int(np.floor(z)) - 1
        wx = cubic_weights(x - np.float32(i0 + 1))
        wy = cubic_weights(y - np.float32(j0 + 1))
        wz0, wz1, wz2, wz3 = cubic_weights(z - np.float32(k0 + 1))
        if i0 >= 0 and j0 >= 0 and k0 >= 0 and i0 + 3 < ni and j0 + 3 < nj and k0 + 3 < nk:
            for v in range(n):
                value = np.float32(0)
                for a in range(4):
                    plane = np.float32(0)
                    for b in range(4):
                        line = volumes[v, i0 + a, j0 + b, k0 : k0 + 4]
                        plane += wy[b] * (line[0] * wz0 + line[1] * wz1 + line[2] * wz2 + line[3] * wz3)
                    value += wx[a] * plane
                out[v, p] = value
            continue
        m0, m1, m2, m3 = mirrored(k0, nk), mirrored(k0 + 1, nk), mirrored(k0 + 2, nk), mirrored(k0 + 3, nk)
        for a in range(4):
            i = mirrored(i0 + a, ni)
            for b in range(4):
                j = mirrored(j0 + b, nj)
                for v in range(n):
                    line = volumes[v, i, j]
                    value = line[m0] * wz0 + line[m1] * wz1 + line[m2] * wz2 + line[m3] * wz3
                    out[v, p] += wx[a] * wy[b] * value
    return out


def _sample_tensors(volumes: torch.Tensor, points: torch.Tensor, cubic: bool) -> torch.Tensor:
    """Tensor version of `_linear_loop` and `_cubic_loop`, one neighbour offset at a time."""
    size = torch.tensor(volumes.shape[1:], device=points.device)[:, None]
    margin = 0.5 if cubic else 1.0
    inside = ((points >= -margin) & (points <= size - 1 + margin)).all(0)
    base = torch.floor(points)
    f = points - base
    weights = cubic_weights_of(f) if cubic else (1 - f, f)
    first = -1 if cubic else 0
    index = [base.long() + first + t for t in range(len(weights))]
    flat = volumes.reshape(volumes.shape[0], -1)
    out = torch.zeros(volumes.shape[0], points.shape[1], device=volumes.device)
    for a, wa in enumerate(weights):
        for b, wb in enumerate(weights):
            for c, wc in enumerate(weights):
                neighbour = torch.stack([index[a][0], index[b][1], index[c][2]])
                weight = wa[0] * wb[1] * wc[2] * inside
                if not cubic:
                    weight = weight * ((neighbour >= 0) & (neighbour < size)).all(0)
                neighbour = mirror_indices(neighbour, size)
                linear = (neighbour[0] * volumes.shape[2] + neighbour[1]) * volumes.shape[3] + neighbour[2]
                out += weight * flat[:, linear]
    return out
