"""Series of poses: their middle, the rest that they return to, and their parameters as reported."""

from __future__ import annotations

import numpy as np

from dsiprep.ops.affine import nearest_rotation, rigid_matrix, rigid_parameters

__all__ = ["decompose", "extrapolate", "interpolate_poses", "jitter", "median_pose", "resting_poses", "without_trend"]

FEW = 30  # volumes below which poses are not asked for a trend with direction
KNOT = 12  # volumes over which heads may drift from one pose to another
STILL = 0.05  # mm: heads are not expected to rest more quietly than this


def median_pose(matrices: np.ndarray, centre: np.ndarray, radius: float = 60.0) -> np.ndarray:
    """The rigid pose with the smallest summed distance to all of (n, 4, 4), rotations counted at `radius` mm.

    The geometric median by Weiszfeld's iteration, about `centre` (mm): a few volumes far off do not move it.
    """
    points = rigid_parameters(matrices, centre) * _lengths(radius)
    return rigid_matrix(_geometric_median(points, np.ones(len(points))) / _lengths(radius), centre)


def resting_poses(matrices: np.ndarray, centre: np.ndarray, width: int = 12, radius: float = 60.0) -> np.ndarray:
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
    width = min(width, len(points) - 1)
    near = np.arange(len(points))[:, None] + np.arange(-width, width + 1)
    weights = 1 - np.abs(np.arange(-width, width + 1)) / (width + 1)
    weights = weights * ((near >= 0) & (near < len(points)))
    rest = _geometric_median(points[near.clip(0, len(points) - 1)], weights)
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


def extrapolate(
    before: list[np.ndarray], after: list[np.ndarray], centre: np.ndarray, affine: bool, radius: float = 60.0
) -> np.ndarray:
    """Where rounds of "predict and register" lead to, from what the last rounds did (Anderson mixing).

    Errors that all volumes of similar contrast share fade slowly from round to round, for each is predicted from the
    others. The combination of the last rounds after which the least movement is left takes many rounds at once.

    Parameters
    ----------
    before, after : list of ndarray, (n, 4, 4)
        Poses that went into each round, and that came out of it; the last round last.
    centre : ndarray, (3,)
        mm.
    affine : bool
        False brings the result back to rigid transforms.

    Returns
    -------
    ndarray, (n, 4, 4)

    References
    ----------
    Walker & Ni 2011, doi 10.1137/10078356X.
    """
    lengths = np.array([radius, radius, radius, 1.0])
    there, back = np.eye(4), np.eye(4)
    there[:3, 3], back[:3, 3] = -centre, centre
    points = [(there @ matrices @ back)[:, :3] * lengths for matrices in before]
    images = [(there @ matrices @ back)[:, :3] * lengths for matrices in after]
    moves = np.stack([image - point for image, point in zip(images, points, strict=True)])
    size = np.linalg.norm(moves[-1], axis=(1, 2))
    calm = 1 / np.maximum(size, 3 * np.median(size) + 1e-9)  # volumes on their way back do not set the pace
    columns = ((moves[1:] - moves[:-1]) * calm[:, None, None]).reshape(len(moves) - 1, -1).T
    goal = (moves[-1] * calm[:, None, None]).ravel()
    gram = columns.T @ columns
    mix = np.linalg.solve(gram + 1e-6 * np.trace(gram) * np.eye(len(gram)), columns.T @ goal)
    step = np.tensordot(mix, np.diff(np.stack(images), axis=0), axes=1)
    reach = np.linalg.norm(step, axis=(1, 2))
    step *= np.minimum(1, 10 * np.maximum(np.median(size), 1e-6) / np.maximum(reach, 1e-9))[:, None, None]
    result = np.tile(np.eye(4), (len(step), 1, 1))
    result[:, :3] = (images[-1] - step) / lengths
    if not affine:
        result[:, :3, :3] = nearest_rotation(result[:, :3, :3])
    return back @ result @ there


def without_trend(
    matrices: np.ndarray, q: np.ndarray, run: np.ndarray, centre: np.ndarray, radius: float = 60.0
) -> np.ndarray:
    """Poses (n, 4, 4) without what they have in common as a function of the gradient.

    A head does not know the gradient. Volumes of similar contrast are predicted from each other, so an error that they
    share is seen by none of them. Here it shows: poses are explained by a drift (straight pieces between knots
    12 volumes apart, run by run) and a trend with |q| and with the quadratic form of q, which vanishes at b=0, with
    heavy tails (Cauchy), so that volumes that the head moved in do not count. The trend is taken away as far as it
    is more than the movement of a restless head would bring about by chance. It is even in q: eddy currents are odd.

    Parameters
    ----------
    matrices : ndarray, (n, 4, 4)
        All volumes in order of acquisition, those of b=0 among them.
    q : ndarray, (n, 3)
        Root of b times the b-vector; zero at b=0.
    run : ndarray, (n,)
    centre : ndarray, (3,)
        mm.
    """
    poses = rigid_parameters(matrices, centre) * _lengths(radius)
    drift, trend = _slow_terms(run), _even_terms(q)
    design = np.hstack([drift, trend])
    firm = np.r_[np.full(drift.shape[1], 1e-6), np.full(trend.shape[1], 0.02)]  # what drift can explain, it does
    weights = np.ones(len(poses))
    for turn in range(60):
        weighted = design * weights[:, None]
        normal = weighted.T @ design
        normal.flat[:: len(normal) + 1] += firm * np.diag(normal) + 1e-9
        found = np.linalg.solve(normal, weighted.T @ poses)
        distance = np.linalg.norm(poses - design @ found, axis=1)
        if turn < 20:  # least sum of distances first: from there the tails find the crowd
            weights = 1 / (distance + STILL)
        else:
            weights = 1 / (1 + (distance / max(STILL, float(np.median(distance)) / 2)) ** 2)
    kept = _beyond_chance(design, trend.shape[1], weights, poses - design @ found, found)
    shared = rigid_matrix(kept * (trend @ found[-trend.shape[1] :]) / _lengths(radius), centre)
    return matrices @ np.linalg.inv(shared)


def _beyond_chance(
    design: np.ndarray, last: int, weights: np.ndarray, residual: np.ndarray, found: np.ndarray
) -> float:
    """The share (0 to 1) of the effect of the `last` columns that residuals do not bring about by chance.

    Where the head hardly rests, a trend would be fitted to its movements: 1 less expected over found effect, from
    the covariance of the coefficients for residuals of any size (White 1980, doi 10.2307/1912934).
    """
    weighted = design * weights[:, None]
    normal = weighted.T @ design
    normal.flat[:: len(normal) + 1] += 1e-3 * np.diag(normal) + 1e-9
    spread = np.linalg.solve(normal, weighted.T)[-last:]
    inner = normal[-last:, -last:]
    effect = np.einsum("ak,ab,bk->", found[-last:], inner, found[-last:])
    by_chance = np.einsum("an,ab,bn,n->", spread, inner, spread, (residual**2).sum(axis=1))
    by_chance *= len(design) / max(1, len(design) - design.shape[1])
    return float(np.clip(1 - by_chance / max(effect, 1e-12), 0, 1))


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
    """|q| and the six products of q, largest |q| 1; only |q| and its square where volumes are few, (n, 7 or 2)."""
    q = q / np.linalg.norm(q, axis=1).max()
    length = np.linalg.norm(q, axis=1)[:, None]
    if len(q) < FEW:
        return np.hstack([length, length**2])
    x, y, z = q.T
    return np.hstack([length, np.stack([x * x, y * y, z * z, x * y, x * z, y * z], axis=1)])


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
    """Of (..., k, 6) points with weights (..., k), by Weiszfeld's iteration: (..., 6)."""
    total = weights.sum(axis=-1)[..., None]
    middle = (weights[..., None] * points).sum(axis=-2) / total
    for iteration in range(60):
        distance = np.linalg.norm(points - middle[..., None, :], axis=-1)
        pull = weights / (distance + max(0.02, 2 * 0.8**iteration))
        middle = (pull[..., None] * points).sum(axis=-2) / pull.sum(axis=-1)[..., None]
    return middle
