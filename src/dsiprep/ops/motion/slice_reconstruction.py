"""A volume whose slices were acquired in poses of their own, as it would have been in one pose.

Acquired voxel y of a slice lies at the point x of the head with y = T_s x + d(x), T_s being the pose of the slice and d
the displacement by susceptibility and eddy currents. In the pose T it would have been at y' = T T_s^-1 (y - d) + d.
These points are scattered: they crowd where the head moved with the acquisition and leave gaps where it moved against
it. The volume is the cubic B-spline f that minimises, over samples and coefficients,

    sum (I(y) - f(y'))² + sum l (c - c0)²,

with c0 the coefficients of a first image, each voxel of which is the mean of the samples around it or, where there is
none, the prediction of the volume. l is small where samples determine the coefficients. Solved by conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch

from dsiprep.compiled import compiled
from dsiprep.ops.image.bspline import cubic_weights
from dsiprep.ops.image.interpolation import spline_coefficients

__all__ = ["Reconstructed", "reconstruct", "sample_density"]

ITERATIONS = 8  # of conjugate gradients
TRUST = 0.1  # l where samples are as dense as voxels
GAP_TRUST = 1.0  # l where there are none
SPARSE = 0.25  # density of samples, relative to that of voxels, below which a voxel is a gap


@dataclass(frozen=True, eq=False)
class Reconstructed:
    """A volume in one pose.

    Attributes
    ----------
    values : ndarray, (i, j, k) float32
    gap : ndarray, (i, j, k) bool
        Voxels without samples around them.
    """

    values: np.ndarray
    gap: np.ndarray


def sample_density(points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Samples around each voxel, weighted by trilinear interpolation: 1 where they are as dense as voxels."""
    return _scattered(np.ones(len(points), np.float32), points, shape, False)


def reconstruct(values: np.ndarray, points: np.ndarray, elsewhere: np.ndarray) -> Reconstructed:
    """Least-squares volume of scattered samples.

    Parameters
    ----------
    values : ndarray, (m,) float32
        Samples.
    points : ndarray, (m, 3) float32
        Their voxel coordinates in the pose of the result; those outside are left out.
    elsewhere : ndarray, (i, j, k) float32
        Values of voxels without samples around them.

    Returns
    -------
    Reconstructed
    """
    shape = elsewhere.shape
    inside = ((points >= 1) & (points < np.array(shape) - 2)).all(axis=1)
    values, points = values[inside], points[inside]
    density = sample_density(points, shape)
    mean = _scattered(values, points, shape, False) / np.maximum(density, 1e-6)
    share = np.clip(density / SPARSE, 0, 1)
    first = share * mean + (1 - share) * elsewhere
    start = _coefficients(first)
    trust = (TRUST + GAP_TRUST * (1 - np.clip(density, 0, 1)) ** 2).astype(np.float32)
    change = np.zeros_like(start)
    left = _scattered(values - _gathered(start, points), points, shape, True)
    along, square = left.copy(), float((left * left).sum())
    for _ in range(ITERATIONS):
        if square <= 0:
            break
        product = _scattered(_gathered(along, points), points, shape, True) + trust * along
        step = square / float((along * product).sum())
        change += step * along
        left -= step * product
        before, square = square, float((left * left).sum())
        along = left + (square / before) * along
    edge = ~_interior(shape)
    full = _on_voxels(start + change)
    full[edge] = first[edge]
    return Reconstructed(full, density < SPARSE)


def _interior(shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, bool)
    out[1:-1, 1:-1, 1:-1] = True
    return out


def _coefficients(image: np.ndarray) -> np.ndarray:
    return spline_coefficients(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None])[0].numpy()


def _on_voxels(coefficients: np.ndarray) -> np.ndarray:
    """Values of a cubic B-spline at the voxels, (i, j, k)."""
    out = coefficients
    for axis in range(3):
        padded = np.pad(out, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        low, high = (np.take(padded, range(s, s + out.shape[axis]), axis) for s in (0, 2))
        out = (low + 4 * out + high) / 6
    return out.astype(np.float32)


def _gathered(coefficients: np.ndarray, points: np.ndarray) -> np.ndarray:
    out = np.empty(len(points), np.float32)
    _gather_loop(coefficients, points, out)
    return out


def _scattered(values: np.ndarray, points: np.ndarray, shape: tuple[int, ...], cubic: bool) -> np.ndarray:
    """Transpose of cubic or linear interpolation at points, at least 1 voxel from the edges, (i, j, k)."""
    out = np.zeros(shape, np.float32)
    _scatter_loop(values, points, cubic, out)
    return out


@compiled(parallel=True)
def _gather_loop(coefficients: np.ndarray, points: np.ndarray, out: np.ndarray) -> None:
    for p in numba.prange(len(points)):
        i, j, k = int(points[p, 0]), int(points[p, 1]), int(points[p, 2])
        wx, wy = cubic_weights(points[p, 0] - np.float32(i)), cubic_weights(points[p, 1] - np.float32(j))
        wz = cubic_weights(points[p, 2] - np.float32(k))
        value = np.float32(0)
        for a in range(4):
            for b in range(4):
                line = coefficients[i - 1 + a, j - 1 + b]
                four = wz[0] * line[k - 1] + wz[1] * line[k] + wz[2] * line[k + 1] + wz[3] * line[k + 2]
                value += wx[a] * wy[b] * four
        out[p] = value


@compiled()
def _scatter_loop(values: np.ndarray, points: np.ndarray, cubic: bool, out: np.ndarray) -> None:
    for p in range(len(points)):
        i, j, k = int(points[p, 0]), int(points[p, 1]), int(points[p, 2])
        fx, fy, fz = points[p, 0] - np.float32(i), points[p, 1] - np.float32(j), points[p, 2] - np.float32(k)
        if cubic:
            wx, wy, wz = cubic_weights(fx), cubic_weights(fy), cubic_weights(fz)
            for a in range(4):
                for b in range(4):
                    part = values[p] * wx[a] * wy[b]
                    for c in range(4):
                        out[i - 1 + a, j - 1 + b, k - 1 + c] += part * wz[c]
        else:
            for a in range(2):
                for b in range(2):
                    part = values[p] * (fx if a else 1 - fx) * (fy if b else 1 - fy)
                    out[i + a, j + b, k] += part * (1 - fz)
                    out[i + a, j + b, k + 1] += part * fz
