"""Series of poses: their middle, the rest that they return to, and their parameters as reported."""

from __future__ import annotations

import numpy as np

from dsiprep.ops.affine import rigid_matrix, rigid_parameters

__all__ = ["decompose", "interpolate_poses", "jitter", "median_pose", "resting_poses"]

STILL = 0.05  # mm: heads are not expected to rest more quietly than this


def median_pose(matrices: np.ndarray, centre: np.ndarray, radius: float = 60.0) -> np.ndarray:
    """The rigid pose with the smallest summed distance to all of (n, 4, 4), rotations counted at `radius` mm.

    The geometric median by Weiszfeld's iteration, about `centre` (mm): a few volumes far off do not move it.
    """
    points = rigid_parameters(matrices, centre) * _lengths(radius)
    return rigid_matrix(_geometric_median(points, np.ones(len(points))) / _lengths(radius), centre)


def resting_poses(
    matrices: np.ndarray, centre: np.ndarray, width: int = 12, radius: float = 60.0
) -> np.ndarray:
    """The pose that the head rests in around each volume: a running geometric median over time.

    Parameters
    ----------
    matrices : ndarray, (n, 4, 4)
        In order of acquisition.
    centre : ndarray, (3,)
        mm.
    width : int
        Half the window in volumes; weights fall off linearly.
    radius : float
        Rotations are counted in mm at this distance.

    Returns
    -------
    ndarray, (n, 4, 4)
        Rigid.
    """
    points = rigid_parameters(matrices, centre) * _lengths(radius)
    time = np.arange(len(points))
    rest = np.empty_like(points)
    for v in time:
        weights = np.clip(1 - np.abs(time - v) / (width + 1), 0, None)
        used = weights > 0
        rest[v] = _geometric_median(points[used], weights[used])
    return rigid_matrix(rest / _lengths(radius), centre)


def jitter(distances: np.ndarray) -> float:
    """Spread per axis (mm) of poses about rest, from their distances (mm) to it: robust, at least 0.05 mm.

    For normal distributions along three axes the median distance is 1.538 times the spread along one.
    """
    return max(STILL, float(np.median(distances)) / 1.538)


def interpolate_poses(matrices: np.ndarray, known: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Rigid poses between the volumes `known` (bool, n), linear in volume number, constant beyond them."""
    parameters = rigid_parameters(matrices, centre)
    time = np.arange(len(matrices))
    columns = [np.interp(time, time[known], parameters[known, c]) for c in range(6)]
    return rigid_matrix(np.stack(columns, axis=1), centre)


def decompose(matrix: np.ndarray, centre: np.ndarray) -> dict[str, float]:
    """An affine (4, 4) in the columns of hmcOptimization.csv.

    The linear part is rotation x scale x shear (upper triangular). Rotation: vector in radians; shift: where
    `centre` goes, in mm; both along world RAS+.
    """
    linear = np.asarray(matrix, float)[:3, :3]
    rotation, upper = np.linalg.qr(linear)
    signs = np.sign(np.diag(upper))
    rotation, upper = rotation * signs, upper * signs[:, None]
    scale = np.diag(upper)
    rigid = np.eye(4)
    rigid[:3, :3] = rotation
    turn = rigid_parameters(rigid)[:3]
    shift = linear @ centre + matrix[:3, 3] - centre
    row = {f"scale{a}": float(s) for a, s in zip("XYZ", scale, strict=True)}
    pairs = (("XY", 0, 1), ("XZ", 0, 2), ("YZ", 1, 2))
    row |= {f"shear{name}": float(upper[i, j] / scale[i]) for name, i, j in pairs}
    row |= {f"rotate{a}": float(r) for a, r in zip("XYZ", turn, strict=True)}
    return row | {f"shift{a}": float(s) for a, s in zip("XYZ", shift, strict=True)}


def _lengths(radius: float) -> np.ndarray:
    return np.array([radius, radius, radius, 1.0, 1.0, 1.0])


def _geometric_median(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    middle = np.median(points[weights >= 0.5 * weights.max()], axis=0)
    for _ in range(30):
        pull = weights / (np.linalg.norm(points - middle, axis=1) + 0.02)
        middle = (pull[:, None] * points).sum(axis=0) / pull.sum()
    return middle
