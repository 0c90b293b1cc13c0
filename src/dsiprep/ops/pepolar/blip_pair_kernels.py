"""Compiled CPU loops of blip-up/blip-down correction.

Their equivalents in tensor operations, for other devices, are in `sampling` and `normal_equations`. All arrays have the
phase-encoding axis last, (a, b, y).
"""

from __future__ import annotations

import numba
import numpy as np

from dsiprep.compiled import compiled, inlined
from dsiprep.ops.image.bspline import cubic_slopes, cubic_weights, mirrored

__all__ = ["data_loop", "laplacian_loop", "lines_loop", "volume_loop"]


@compiled(parallel=True)
def lines_loop(coefficients: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CPU loop of `sampling.sample_lines`."""
    na, nb, ny = shift.shape
    value, slope, inside = np.zeros_like(shift), np.zeros_like(shift), np.zeros_like(shift)
    for a in numba.prange(na):
        weights, slopes = np.empty(4, np.float32), np.empty(4, np.float32)
        for b in range(nb):
            for y in range(ny):
                position = y + shift[a, b, y]
                if not (position >= -0.5 and position <= ny - 0.5):
                    continue
                base = int(np.floor(position))
                _fill_taps(position - base, weights, slopes)
                v, s = np.float32(0), np.float32(0)
                for t in range(4):
                    c = coefficients[a, b, mirrored(base - 1 + t, ny)]
                    v += weights[t] * c
                    s += slopes[t] * c
                value[a, b, y], slope[a, b, y], inside[a, b, y] = v, s, 1
    return value, slope, inside


@compiled(parallel=True)
def volume_loop(
    coefficients: np.ndarray, matrix: np.ndarray, shift: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CPU loop of `sampling.sample_volume`."""
    na, nb, ny = shift.shape
    value, inside = np.zeros_like(shift), np.zeros_like(shift)
    gradient = np.zeros((3, na, nb, ny), np.float32)
    for a in numba.prange(na):
        weights, slopes = np.empty((3, 4), np.float32), np.empty((3, 4), np.float32)
        point, result = np.empty(3), np.empty(4, np.float32)
        for b in range(nb):
            for y in range(ny):
                within = True
                for r in range(3):
                    point[r] = matrix[r, 0] * a + matrix[r, 1] * b + matrix[r, 2] * y + matrix[r, 3]
                    if r == 2:
                        point[r] += shift[a, b, y]
                    within = within and point[r] >= -0.5 and point[r] <= coefficients.shape[r] - 0.5
                if within:
                    _sample_point(coefficients, point, weights, slopes, result)
                    value[a, b, y], inside[a, b, y] = result[0], 1
                    for r in range(3):
                        gradient[r, a, b, y] = result[r + 1]
    return value, gradient, inside


@compiled(parallel=True)
def laplacian_loop(
    field: np.ndarray, inverse_squares: np.ndarray, factor: np.ndarray, identity_weight: float, out: np.ndarray
) -> None:
    """out = factor * laplacian(field) + identity_weight * field.

    `inverse_squares` (3,) holds 1 / spacing² of each axis, per mm². A `factor` of a single voxel means 1 everywhere.
    """
    na, nb, ny = field.shape
    add, varies = np.float32(identity_weight), factor.size > 1
    ha, hb, hy = np.float32(inverse_squares[0]), np.float32(inverse_squares[1]), np.float32(inverse_squares[2])
    for a in numba.prange(na):
        below, above = max(a - 1, 0), min(a + 1, na - 1)
        for b in range(nb):
            left, right = max(b - 1, 0), min(b + 1, nb - 1)
            for y in range(ny):
                f = 2 * field[a, b, y]
                lap = ha * (field[below, b, y] + field[above, b, y] - f)
                lap += hb * (field[a, left, y] + field[a, right, y] - f)
                lap += hy * (field[a, b, max(y - 1, 0)] + field[a, b, min(y + 1, ny - 1)] - f)
                if varies:
                    lap *= factor[a, b, y]
                out[a, b, y] = lap + add * field[a, b, y]


@compiled(parallel=True)
def data_loop(
    field: np.ndarray,
    by_field: np.ndarray,
    by_slope: np.ndarray,
    weight: np.ndarray,
    curvature: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add the data and barrier terms of `normal_equations.NormalEquations`, applied to `field`, to `out`."""
    na, nb, ny = field.shape
    half = np.float32(0.5)
    for a in numba.prange(na):
        spread = np.empty(ny, np.float32)
        for b in range(nb):
            for y in range(ny):
                slope = half * (field[a, b, min(y + 1, ny - 1)] - field[a, b, max(y - 1, 0)])
                q = weight[a, b, y] * (by_field[a, b, y] * field[a, b, y] + by_slope[a, b, y] * slope)
                out[a, b, y] += by_field[a, b, y] * q
                spread[y] = half * by_slope[a, b, y] * q
            for y in range(ny):
                out[a, b, min(y + 1, ny - 1)] += spread[y]
                out[a, b, max(y - 1, 0)] -= spread[y]
            for y in range(ny - 1):
                force = curvature[a, b, y] * (field[a, b, y + 1] - field[a, b, y])
                out[a, b, y + 1] += force
                out[a, b, y] -= force


@inlined
def _fill_taps(f: float, weights: np.ndarray, slopes: np.ndarray) -> None:
    weights[0], weights[1], weights[2], weights[3] = cubic_weights(f)
    slopes[0], slopes[1], slopes[2], slopes[3] = cubic_slopes(f)


@inlined
def _sample_point(
    coefficients: np.ndarray, point: np.ndarray, weights: np.ndarray, slopes: np.ndarray, result: np.ndarray
) -> None:
    """Write value and gradient, (4,), at a point within the grid to `result`."""
    sa, sb, sy = coefficients.shape
    ia, ib, iy = int(np.floor(point[0])), int(np.floor(point[1])), int(np.floor(point[2]))
    _fill_taps(point[0] - ia, weights[0], slopes[0])
    _fill_taps(point[1] - ib, weights[1], slopes[1])
    _fill_taps(point[2] - iy, weights[2], slopes[2])
    y0, y1, y2, y3 = mirrored(iy - 1, sy), mirrored(iy, sy), mirrored(iy + 1, sy), mirrored(iy + 2, sy)
    w, g = weights[2], slopes[2]
    v, da, db, dy = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for s in range(4):
        ra = mirrored(ia - 1 + s, sa)
        for t in range(4):
            line = coefficients[ra, mirrored(ib - 1 + t, sb)]
            c0, c1, c2, c3 = line[y0], line[y1], line[y2], line[y3]
            m = w[0] * c0 + w[1] * c1 + w[2] * c2 + w[3] * c3
            weight_ab = weights[0, s] * weights[1, t]
            v += weight_ab * m
            da += slopes[0, s] * weights[1, t] * m
            db += weights[0, s] * slopes[1, t] * m
            dy += weight_ab * (g[0] * c0 + g[1] * c1 + g[2] * c2 + g[3] * c3)
    result[0], result[1], result[2], result[3] = v, da, db, dy
