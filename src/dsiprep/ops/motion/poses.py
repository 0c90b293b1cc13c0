"""Series of poses: their middle, the rest that they return to, and their parameters as reported."""

from __future__ import annotations

import numpy as np

from dsiprep.ops.image.affine import rigid_matrix, rigid_parameters

__all__ = ["LEAST_JITTER", "decompose", "interpolate_poses", "median_pose", "relaxed_poses", "remove_gradient_trend"]

KNOT = 12  # volumes over which heads may drift from one pose to another
FREEDOM = 4.0  # of the Student t distribution of movements
LEAST_JITTER = 0.05  # mm: heads are not expected to rest more quietly than this


def median_pose(matrices: np.ndarray, centre: np.ndarray, radius: float = 60.0) -> np.ndarray:
    """The rigid pose with the smallest summed distance to all of (n, 4, 4), rotations counted at `radius` mm.

    The geometric median by Weiszfeld's iteration, about `centre` (mm): a few volumes far off do not move it.
    """
    points = rigid_parameters(matrices, centre) * pose_scales(radius)
    return rigid_matrix(geometric_median(points, np.ones(len(points))) / pose_scales(radius), centre)


def interpolate_poses(matrices: np.ndarray, known: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Rigid poses between the volumes `known` (bool, n), linear in volume number, constant beyond them."""
    parameters = rigid_parameters(matrices, centre)
    time = np.arange(len(matrices))
    columns = [np.interp(time, time[known], parameters[known, c]) for c in range(6)]
    return rigid_matrix(np.stack(columns, axis=1), centre)


def relaxed_poses(before: np.ndarray, after: np.ndarray, share: float, centre: np.ndarray) -> np.ndarray:
    """Rigid poses a `share` of the way from `before` to `after`, both (n, 4, 4), turning about `centre` (mm)."""
    return before @ rigid_matrix(share * rigid_parameters(np.linalg.inv(before) @ after, centre), centre)


def remove_gradient_trend(
    matrices: np.ndarray, q: np.ndarray, run: np.ndarray, centre: np.ndarray, radius: float = 60.0
) -> np.ndarray:
    """Poses (n, 4, 4) without what they have in common as a smooth, even function of the gradient.

    A head does not know the gradient. Volumes of similar contrast are predicted from each other, so an error that they
    share is observed by none of them, and rounds of "predict and register" make it grow. Here it shows: a pose is taken as
    drift (straight pieces between knots 12 volumes apart, run by run), plus a function of q that is the same for all
    volumes (a Gaussian process with kernel |q| |q'| exp(-|q -+ q'|² / 2 l²), even and zero at b=0), plus movement with
    heavy tails (Student t). How large the function is, along each of six axes, is found by expectation maximisation:
    where the head is restless, little is taken for it. Eddy currents are odd in q, so they are not touched.

    Parameters
    ----------
    matrices : ndarray, (n, 4, 4)
        All volumes in order of acquisition, those of b=0 among them.
    q : ndarray, (n, 3)
        Root of b times the b-vector; zero at b=0.
    run : ndarray, (n,)
    centre : ndarray, (3,)
        mm.
    radius : float
        Rotations are counted in mm at this distance.

    References
    ----------
    Lange et al. 1989, doi 10.1080/01621459.1989.10478852 (Student t). Dempster et al. 1977,
    doi 10.1111/j.2517-6161.1977.tb01600.x.
    """
    poses = rigid_parameters(matrices, centre) * pose_scales(radius)
    drift, shared = _slow_terms(run), _even_terms(q)
    design, first = np.hstack([drift, shared]), drift.shape[1]
    spread, scale = np.full(6, 0.1), 0.0
    distance = np.linalg.norm(poses - np.median(poses, axis=0), axis=1)
    for turn in range(60):
        if turn < 10:  # least sum of distances first: from there the tails find the crowd
            weights = 1 / (6 * LEAST_JITTER * (distance + LEAST_JITTER))
        else:
            weights = (FREEDOM + 6) / (FREEDOM + (distance / scale) ** 2) / scale**2
        weighted = design * weights[:, None]
        normal, sides = weighted.T @ design, weighted.T @ poses
        found = np.empty_like(sides)
        for axis in range(6):
            firm = np.r_[np.full(first, 1e-6), np.full(shared.shape[1], spread[axis] ** -2)]
            covariance = np.linalg.inv(normal + np.diag(firm))
            found[:, axis] = covariance @ sides[:, axis]
            if turn >= 10:
                size = np.sum(found[first:, axis] ** 2) + np.trace(covariance[first:, first:])
                spread[axis] = np.sqrt(max(size / shared.shape[1], 1e-8))
        distance = np.linalg.norm(poses - design @ found, axis=1)
        scale = max(0.02, float(np.quantile(distance, 0.3)) / 1.957)  # of a normal distribution along six axes
    return matrices @ np.linalg.inv(rigid_matrix(shared @ found[first:] / pose_scales(radius), centre))


def _slow_terms(run: np.ndarray) -> np.ndarray:
    """Functions of volume number that are straight between knots about `KNOT` volumes apart, run by run, (n, c)."""
    columns = []
    for name in np.unique(run):
        own = np.flatnonzero(run == name)
        knots = np.linspace(0, len(own) - 1, max(2, 1 + round(len(own) / KNOT))) if len(own) > 1 else np.zeros(1)
        for knot in np.eye(len(knots)):
            column = np.zeros(len(run))
            column[own] = np.interp(np.arange(len(own)), knots, knot)
            columns.append(column)
    return np.stack(columns, axis=1)


def _even_terms(q: np.ndarray) -> np.ndarray:
    """Columns (n, c) whose products make the kernel of `remove_gradient_trend`.

    Its length l is 0.35 of the largest |q|, or more where volumes are few: with more columns than a quarter of the
    volumes, any movement would look like a function of q.
    """
    q = q / np.linalg.norm(q, axis=1).max()
    size = np.linalg.norm(q, axis=1)
    same = ((q[:, None] - q[None]) ** 2).sum(-1)
    opposite = ((q[:, None] + q[None]) ** 2).sum(-1)
    for length in (0.35, 0.5, 0.7, 1.0, 1.4):
        kernel = np.outer(size, size) * (np.exp(-same / (2 * length**2)) + np.exp(-opposite / (2 * length**2)))
        values, vectors = np.linalg.eigh(kernel)
        kept = values > 1e-3 * values[-1]
        if kept.sum() <= 0.3 * len(q):
            break
    return vectors[:, kept] * np.sqrt(values[kept])


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


def pose_scales(radius: float) -> np.ndarray:
    return np.array([radius, radius, radius, 1.0, 1.0, 1.0])


def geometric_median(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of (..., k, 6) points with weights (..., k), by Weiszfeld's iteration: (..., 6)."""
    total = weights.sum(axis=-1)[..., None]
    middle = (weights[..., None] * points).sum(axis=-2) / total
    for iteration in range(60):
        distance = np.linalg.norm(points - middle[..., None, :], axis=-1)
        pull = weights / (distance + max(0.02, 2 * 0.8**iteration))
        middle = (pull[..., None] * points).sum(axis=-2) / pull.sum(axis=-1)[..., None]
    return middle
