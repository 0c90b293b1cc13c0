"""CPU loop for `ops.motion.slice_motion`: a volume's slices, as acquired, against its prediction in the head."""

from __future__ import annotations

import numba
import numpy as np

from dsiprep.compiled import compiled, inlined
from dsiprep.ops.image.bspline import cubic_slopes, cubic_weights
from dsiprep.ops.image.eddy_displacement import displace_voxel
from dsiprep.ops.motion.gauss_newton_kernels import STUDENT_DOF

__all__ = ["gather_slices_loop", "slice_equations_loop"]

PARAMETERS = 7  # rotation vector, translation, gain


@inlined
def _value_and_slopes(c: np.ndarray, x: float, y: float, z: float, out: np.ndarray) -> None:
    """Cubic B-spline with coefficients `c` and its slopes per voxel into `out` (4,), at least 1 voxel from the edge."""
    i, j, k = int(x), int(y), int(z)
    fx, fy, fz = np.float32(x - i), np.float32(y - j), np.float32(z - k)
    wx, wy, wz = cubic_weights(fx), cubic_weights(fy), cubic_weights(fz)
    sx, sy, sz = cubic_slopes(fx), cubic_slopes(fy), cubic_slopes(fz)
    value, dx, dy, dz = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for a in range(4):
        plane, plane_y, plane_z = np.float32(0), np.float32(0), np.float32(0)
        for b in range(4):
            line = c[i - 1 + a, j - 1 + b]
            c0, c1, c2, c3 = line[k - 1], line[k], line[k + 1], line[k + 2]
            along = wz[0] * c0 + wz[1] * c1 + wz[2] * c2 + wz[3] * c3
            plane += wy[b] * along
            plane_y += sy[b] * along
            plane_z += wy[b] * (sz[0] * c0 + sz[1] * c1 + sz[2] * c2 + sz[3] * c3)
        value += wx[a] * plane
        dx += sx[a] * plane
        dy += wx[a] * plane_y
        dz += wx[a] * plane_z
    out[0], out[1], out[2], out[3] = value, dx, dy, dz


@inlined
def _undisplaced(eddy: np.ndarray, frame: np.ndarray, along: int, at: np.ndarray) -> np.floating:
    """Undo the displacement of a voxel coordinate `at` (3,) in place; the Jacobian determinant of the displacement."""
    acquired = at[along]
    jacobian = np.float32(1)
    for _ in range(2):  # a smooth displacement much smaller than the distances over which it changes
        before = at[along]
        jacobian = displace_voxel(eddy, frame, along, at)
        at[along] = acquired - (at[along] - before)
    return jacobian


@inlined
def _mapped(m: np.ndarray, at: np.ndarray, out: np.ndarray) -> None:
    """Affine map `m` (3, 4) of the point `at` (3,) into `out`."""
    for c in range(3):
        out[c] = m[c, 0] * at[0] + m[c, 1] * at[1] + m[c, 2] * at[2] + m[c, 3]


@inlined
def _field_at(table: np.ndarray, point: np.ndarray, channels: int, out: np.ndarray) -> None:
    """Trilinear interpolation of a table (a, b, c, 4) at a voxel coordinate, or at the nearest one within it."""
    x = min(max(point[0], np.float32(0)), np.float32(table.shape[0] - 1.001))
    y = min(max(point[1], np.float32(0)), np.float32(table.shape[1] - 1.001))
    z = min(max(point[2], np.float32(0)), np.float32(table.shape[2] - 1.001))
    i, j, k = int(x), int(y), int(z)
    fx, fy, fz = np.float32(x - i), np.float32(y - j), np.float32(z - k)
    for channel in range(channels):
        out[channel] = 0
    for a in range(2):
        wx = fx if a else 1 - fx
        for b in range(2):
            wy = wx * (fy if b else 1 - fy)
            low, high = wy * (1 - fz), wy * fz
            for channel in range(channels):
                out[channel] += low * table[i + a, j + b, k, channel] + high * table[i + a, j + b, k + 1, channel]


@inlined
def _to_reference(table: np.ndarray, turn: np.ndarray, point: np.ndarray, entry: np.ndarray) -> np.floating:
    """Undo in place what the field of a turned head adds to a voxel coordinate of the head; the Jacobian determinant.

    `table` and `turn` are those of `slice_equations_loop`; `entry` (4,) becomes displacement and slopes at the result.
    """
    x, y, z = point[0], point[1], point[2]
    for _ in range(2):  # the angle times the slope of the displacement is much smaller than 1
        _field_at(table, point, 1, entry)
        point[0], point[1], point[2] = x - entry[0] * turn[0], y - entry[0] * turn[1], z - entry[0] * turn[2]
    _field_at(table, point, 4, entry)
    return np.float32(1) + entry[1] * turn[0] + entry[2] * turn[1] + entry[3] * turn[2]


@inlined
def _is_inside(inside: np.ndarray, point: np.ndarray) -> bool:
    """Whether the prediction holds at a voxel coordinate of the head."""
    x, y, z = point[0], point[1], point[2]
    if not (x >= 1 and y >= 1 and z >= 1):
        return False
    if not (x < inside.shape[0] - 2 and y < inside.shape[1] - 2 and z < inside.shape[2] - 2):
        return False
    return inside[int(x + 0.5), int(y + 0.5), int(z + 0.5)]


@inlined
def _fill_row(seen: np.ndarray, slopes: np.ndarray, arm: np.ndarray, gain: np.floating, row: np.ndarray) -> None:
    """Derivative of the residual by rotation, translation and gain, at a point `arm` (mm) from the centre."""
    gx = gain * (slopes[0, 0] * seen[1] + slopes[0, 1] * seen[2] + slopes[0, 2] * seen[3])
    gy = gain * (slopes[1, 0] * seen[1] + slopes[1, 1] * seen[2] + slopes[1, 2] * seen[3])
    gz = gain * (slopes[2, 0] * seen[1] + slopes[2, 1] * seen[2] + slopes[2, 2] * seen[3])
    row[0], row[1], row[2] = arm[1] * gz - arm[2] * gy, arm[2] * gx - arm[0] * gz, arm[0] * gy - arm[1] * gx
    row[3], row[4], row[5], row[6] = gx, gy, gz, -seen[0]


@inlined
def _add(
    row: np.ndarray,
    residual: np.floating,
    precision: np.floating,
    hessian: np.ndarray,
    slope: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Add the products of one voxel."""
    square = residual * residual * precision
    weight = np.float32(STUDENT_DOF + 1) / (np.float32(STUDENT_DOF) + square)
    sums[0] += 0.5 * (STUDENT_DOF + 1) * np.log1p(square / np.float32(STUDENT_DOF))
    sums[1] += weight * residual * residual
    sums[2] += 1
    for p in range(PARAMETERS):
        weighted = weight * row[p]
        slope[p] += weighted * residual
        for q in range(p + 1):
            hessian[p, q] += weighted * row[q]


@compiled(parallel=True)
def slice_equations_loop(
    volume: np.ndarray,
    coefficients: np.ndarray,
    inside: np.ndarray,
    maps: np.ndarray,
    world: np.ndarray,
    slopes: np.ndarray,
    axis: int,
    eddy: np.ndarray,
    frame: np.ndarray,
    along: int,
    table: np.ndarray,
    turns: np.ndarray,
    direction: np.ndarray,
    gain: np.ndarray,
    scale: float,
    hessian: np.ndarray,
    slope: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Sums of one Gauss-Newton step of each slice of a volume.

    Parameters
    ----------
    volume : ndarray, (i, j, k) float32
        As acquired; its axis `axis` is across slices.
    coefficients : ndarray, (a, b, c) float32
        Of the prediction on the grid of the head, as cubic B-spline.
    inside : ndarray, (a, b, c) bool
        Voxels where the prediction holds; none within 2 voxels of the edge of the grid.
    maps : ndarray, (slices, 3, 4) float32
        Voxels of the volume, by the pose of each slice, to voxels of the head.
    world : ndarray, (3, 4) float32
        Voxels of the head to mm RAS+ about the centre of rotation.
    slopes : ndarray, (3, 3) float32
        Gradient per voxel to gradient per mm.
    axis : int
    eddy, frame, along
        Attributes of `ops.image.eddy_displacement.EddyDisplacement`, of this volume; (0, 10) without eddy currents.
    table : ndarray, (a, b, c, 4) float32
        Displacement by the field of the head in mm and its slopes per voxel; (0, 0, 0, 4) if it is not known.
    turns : ndarray, (slices, 3) float32
        `ops.motion.carried_field.CarriedField.turns` of the poses.
    direction : ndarray, (3,) float32
        Of the displacement, RAS+.
    gain : ndarray, (slices,)
    scale : float
        Of the Student t distribution of residuals; infinite for equal weights.
    hessian, slope, sums : ndarray, (slices, 7, 7), (slices, 7), (slices, 3)
        Filled with J' W J, J' W residual, and cost, sum of weight x residual², number of voxels. Residual = volume -
        gain x prediction; J its derivative by rotation, translation and gain, lower triangle. The cost is minus the
        logarithm of the likelihood, without constants.
    """
    first, second = (1 if axis == 0 else 0), (1 if axis == 2 else 2)
    precision = np.float32(1 / scale**2)
    for number in numba.prange(volume.shape[axis]):
        at, point, arm = np.empty(3, np.float32), np.empty(3, np.float32), np.empty(3, np.float32)
        seen, row, g = np.empty(4, np.float32), np.empty(PARAMETERS, np.float32), np.float32(gain[number])
        entry = np.zeros(4, np.float32)
        for a in range(volume.shape[first]):
            for b in range(volume.shape[second]):
                at[axis], at[first], at[second] = number, a, b
                value, jacobian = volume[int(at[0]), int(at[1]), int(at[2])], np.float32(1)
                if len(eddy) > 0:
                    jacobian = _undisplaced(eddy[0], frame, along, at)
                _mapped(maps[number], at, point)
                if table.shape[0] > 0:
                    jacobian *= _to_reference(table, turns[number], point, entry)
                if not _is_inside(inside, point):
                    continue
                _value_and_slopes(coefficients, point[0], point[1], point[2], seen)
                _mapped(world, point, arm)
                for c in range(3):  # the point of the undistorted head, which is what turns
                    arm[c] -= entry[0] * direction[c]
                _fill_row(seen, slopes, arm, g, row)
                residual = jacobian * value - g * seen[0]
                _add(row, residual, precision, hessian[number], slope[number], sums[number])


@inlined
def _in_plane(volume: np.ndarray, axis: int, number: int, u: float, v: float) -> float:
    """Bilinear interpolation within a slice at the coordinates `u` and `v` of the other two axes, inside the slice."""
    if axis == 0:
        plane = volume[number]
    elif axis == 1:
        plane = volume[:, number]
    else:
        plane = volume[:, :, number]
    i, j = min(int(u), plane.shape[0] - 2), min(int(v), plane.shape[1] - 2)
    fu, fv = u - i, v - j
    low = plane[i, j] * (1 - fv) + plane[i, j + 1] * fv
    return low * (1 - fu) + (plane[i + 1, j] * (1 - fv) + plane[i + 1, j + 1] * fv) * fu


@compiled(parallel=True)
def gather_slices_loop(
    volumes: np.ndarray,
    voxels: np.ndarray,
    maps: np.ndarray,
    axis: int,
    used: np.ndarray,
    eddy: np.ndarray,
    frame: np.ndarray,
    along: int,
    table: np.ndarray,
    bends: np.ndarray,
    turns: np.ndarray,
    out: np.ndarray,
    weight: np.ndarray,
) -> None:
    """Sample volumes whose slices have poses of their own at points of the head.

    Each slice k counts with the weight 1 - |z - k| of its distance in slices, z being where its own pose puts the point
    across slices; with one pose for all, this is trilinear interpolation.

    Parameters
    ----------
    volumes : ndarray, (n, i, j, k) float32
    voxels : ndarray, (m, 3) float32
        Of the head.
    maps : ndarray, (n, slices, 3, 4) float32
        Voxels of the head to voxels of each volume, by the pose of each slice.
    axis : int
        Across slices.
    used : ndarray, (n, slices) bool
        Slices that are sampled.
    eddy, frame, along
        Attributes of `ops.image.eddy_displacement.EddyDisplacement`.
    table : ndarray, (m, 4) float32
        As in `slice_equations_loop`, at the points; (0, 4) if it is not known.
    bends, turns : ndarray, (n, slices, 3) float32
        What the field of the turned head adds per mm of its displacement: in voxels of the volume, and of the head.
    out, weight : ndarray, (n, m) float32
        Filled with the weighted sum of samples and the sum of weights.
    """
    first, second = (1 if axis == 0 else 0), (1 if axis == 2 else 2)
    count, has_field = volumes.shape[1 + axis], len(table) > 0
    for v in numba.prange(len(volumes)):
        at = np.empty(3, np.float32)
        wide, high = volumes.shape[1 + first] - 1, volumes.shape[1 + second] - 1
        for p in range(len(voxels)):
            x, y, z = voxels[p, 0], voxels[p, 1], voxels[p, 2]
            u = table[p, 0] if has_field else np.float32(0)
            for number in range(count):
                m, bend = maps[v, number], bends[v, number]
                across = m[axis, 0] * x + m[axis, 1] * y + m[axis, 2] * z + m[axis, 3] + u * bend[axis]
                near = 1 - abs(across - number)
                if near <= 0 or not used[v, number]:
                    continue
                for c in range(3):
                    at[c] = m[c, 0] * x + m[c, 1] * y + m[c, 2] * z + m[c, 3] + u * bend[c]
                jacobian = np.float32(1)
                if has_field:
                    for c in range(3):
                        jacobian += table[p, 1 + c] * turns[v, number, c]
                if len(eddy) > 0:
                    jacobian *= displace_voxel(eddy[v], frame, along, at)
                if at[first] < 0 or at[second] < 0 or at[first] > wide or at[second] > high:
                    continue
                out[v, p] += near * jacobian * _in_plane(volumes[v], axis, number, at[first], at[second])
                weight[v, p] += near
