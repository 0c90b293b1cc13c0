"""Series of rigid poses: median, interpolation, partial steps, gradient trend, and parameters for the trace file."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsiprep.ops.image.affine import rigid_matrix, rigid_parameters

__all__ = [
    "MIN_JITTER_MM",
    "decompose",
    "drift_basis",
    "even_gradient_basis",
    "geometric_median",
    "interpolate_poses",
    "median_pose",
    "pose_scales",
    "relaxed_poses",
    "remove_gradient_trend",
    "trace_rows",
]

KNOT_SPACING = 12  # volumes between the knots of the piecewise linear drift
STUDENT_DOF = 4.0  # degrees of freedom of the Student t distribution of movements
MIN_JITTER_MM = 0.05  # lower bound on the assumed jitter of a resting head
LEAST_DISTANCE_ITERATIONS = 10  # of `remove_gradient_trend`, before the Student t iterations
KERNEL_LENGTHS = (0.35, 0.5, 0.7, 1.0, 1.4)  # tried in this order, relative to the largest |q|


def median_pose(matrices: np.ndarray, centre: np.ndarray, radius: float = 60.0) -> np.ndarray:
    """Rigid pose with the smallest summed distance to poses (n, 4, 4), rotations converted to mm at `radius` mm.

    Geometric median about `centre` (mm) by Weiszfeld's algorithm; a few outlying volumes hardly affect it.
    """
    points = rigid_parameters(matrices, centre) * pose_scales(radius)
    return rigid_matrix(geometric_median(points, np.ones(len(points))) / pose_scales(radius), centre)


def interpolate_poses(matrices: np.ndarray, known: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Rigid poses interpolated between the volumes `known` (bool, n): linear in volume number, constant beyond them."""
    parameters = rigid_parameters(matrices, centre)
    time = np.arange(len(matrices))
    columns = [np.interp(time, time[known], parameters[known, c]) for c in range(6)]
    return rigid_matrix(np.stack(columns, axis=1), centre)


def relaxed_poses(before: np.ndarray, after: np.ndarray, fraction: float, centre: np.ndarray) -> np.ndarray:
    """Rigid poses a `fraction` of the way from `before` to `after`, both (n, 4, 4), rotating about `centre` (mm)."""
    return before @ rigid_matrix(fraction * rigid_parameters(np.linalg.inv(before) @ after, centre), centre)


def remove_gradient_trend(
    matrices: np.ndarray, q: np.ndarray, run: np.ndarray, centre: np.ndarray, radius: float = 60.0
) -> np.ndarray:
    """Remove the component of poses (n, 4, 4) that is a smooth, even function of the gradient.

    Head motion does not depend on the gradient. Volumes of similar contrast are predicted from each other, so an error
    common to them leaves no residual and grows from round to round of prediction and registration. To detect it, each
    pose is modelled as the sum of drift (piecewise linear between knots 12 volumes apart, run by run), a function of q
    common to all volumes (a Gaussian process with kernel |q| |q'| exp(-|q -+ q'|² / 2 l²), even and zero at b=0), and
    heavy-tailed movement (Student t). The variance of the function along each of the six axes is estimated by
    expectation maximisation, so little is removed if the head is restless. Eddy currents are odd in q and are not
    affected.

    Parameters
    ----------
    matrices : ndarray, (n, 4, 4)
        All volumes in order of acquisition, including b=0.
    q : ndarray, (n, 3)
        Square root of b times the b-vector; zero at b=0.
    run : ndarray, (n,)
    centre : ndarray, (3,)
        mm.
    radius : float
        Distance (mm) at which rotations are converted to mm.

    References
    ----------
    Lange et al. 1989, doi 10.1080/01621459.1989.10478852 (Student t). Dempster et al. 1977,
    doi 10.1111/j.2517-6161.1977.tb01600.x.
    """
    poses = rigid_parameters(matrices, centre) * pose_scales(radius)
    drift, trend = drift_basis(run), even_gradient_basis(q)
    design, first = np.hstack([drift, trend]), drift.shape[1]
    coefficients, prior_sd, scale = np.zeros((design.shape[1], 6)), np.full(6, 0.1), 0.0
    distance = np.linalg.norm(poses - np.median(poses, axis=0), axis=1)
    for iteration in range(60):
        robust_start = iteration < LEAST_DISTANCE_ITERATIONS
        if robust_start:  # the least sum of distances finds the majority of poses before the Student t fit
            weights = 1 / (6 * MIN_JITTER_MM * (distance + MIN_JITTER_MM))
        else:
            weights = (STUDENT_DOF + 6) / (STUDENT_DOF + (distance / scale) ** 2) / scale**2
        weighted = design * weights[:, None]
        normal, sides = weighted.T @ design, weighted.T @ poses
        for axis in range(6):
            precision = np.r_[np.full(first, 1e-6), np.full(trend.shape[1], prior_sd[axis] ** -2)]
            covariance = np.linalg.inv(normal + np.diag(precision))
            coefficients[:, axis] = covariance @ sides[:, axis]
            if not robust_start:
                moment = np.sum(coefficients[first:, axis] ** 2) + np.trace(covariance[first:, first:])
                prior_sd[axis] = np.sqrt(max(moment / trend.shape[1], 1e-8))
        distance = np.linalg.norm(poses - design @ coefficients, axis=1)
        scale = max(0.02, float(np.quantile(distance, 0.3)) / 1.957)  # of a normal distribution along six axes
    trend_parameters = trend @ coefficients[first:] / pose_scales(radius)
    return matrices @ np.linalg.inv(rigid_matrix(trend_parameters, centre))


def drift_basis(run: np.ndarray) -> np.ndarray:
    """Piecewise linear functions of volume number with knots about `KNOT_SPACING` apart, run by run, (n, c)."""
    columns = []
    for name in np.unique(run):
        volumes = np.flatnonzero(run == name)
        count = len(volumes)
        knots = np.linspace(0, count - 1, max(2, 1 + round(count / KNOT_SPACING))) if count > 1 else np.zeros(1)
        for knot in np.eye(len(knots)):
            column = np.zeros(len(run))
            column[volumes] = np.interp(np.arange(count), knots, knot)
            columns.append(column)
    return np.stack(columns, axis=1)


def even_gradient_basis(q: np.ndarray) -> np.ndarray:
    """Columns (n, c) whose outer product is the kernel of `remove_gradient_trend`.

    The length l is 0.35 of the largest |q|, or longer until there are at most 0.3 as many columns as volumes: with
    more columns, any movement would resemble a function of q.
    """
    q = q / np.linalg.norm(q, axis=1).max()
    columns = _kernel_columns(q, KERNEL_LENGTHS[0])
    for length in KERNEL_LENGTHS[1:]:
        if columns.shape[1] <= 0.3 * len(q):
            break
        columns = _kernel_columns(q, length)
    return columns


def _kernel_columns(q: np.ndarray, length: float) -> np.ndarray:
    """Square root of the kernel of `remove_gradient_trend`, (n, c), without eigenvalues below 0.001 of the largest."""
    size = np.linalg.norm(q, axis=1)
    same = ((q[:, None] - q[None]) ** 2).sum(-1)
    opposite = ((q[:, None] + q[None]) ** 2).sum(-1)
    kernel = np.outer(size, size) * (np.exp(-same / (2 * length**2)) + np.exp(-opposite / (2 * length**2)))
    values, vectors = np.linalg.eigh(kernel)
    kept = values > 1e-3 * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def decompose(matrix: np.ndarray, centre: np.ndarray) -> dict[str, float]:
    """Parameters of an affine (4, 4), named as the columns of hmcOptimization.csv.

    The linear part is rotation x scale x shear (upper triangular). The rotation is a rotation vector in radians and
    the shift is the displacement of `centre` in mm, both along world RAS+.
    """
    linear = np.asarray(matrix, float)[:3, :3]
    rotation, upper = np.linalg.qr(linear)
    signs = np.sign(np.diag(upper))
    rotation, upper = rotation * signs, upper * signs[:, None]
    scale = np.diag(upper)
    rigid = np.eye(4)
    rigid[:3, :3] = rotation
    rotation_vector = rigid_parameters(rigid)[:3]
    shift = linear @ centre + matrix[:3, 3] - centre
    row = {f"scale{a}": float(s) for a, s in zip("XYZ", scale, strict=True)}
    pairs = (("XY", 0, 1), ("XZ", 0, 2), ("YZ", 1, 2))
    row |= {f"shear{name}": float(upper[i, j] / scale[i]) for name, i, j in pairs}
    row |= {f"rotate{a}": float(r) for a, r in zip("XYZ", rotation_vector, strict=True)}
    return row | {f"shift{a}": float(s) for a, s in zip("XYZ", shift, strict=True)}


def trace_rows(transforms: np.ndarray, centre: np.ndarray, level: str, number: int) -> list[dict[str, Any]]:
    """Rows of hmcOptimization.csv: the parameters of every volume's pose about `centre` after round `number`."""
    name = f"{level} round {number}"
    return [
        {"volume": volume} | decompose(matrix, centre) | {"iter_num": number, "iter_name": name}
        for volume, matrix in enumerate(transforms)
    ]


def pose_scales(radius: float) -> np.ndarray:
    """Factors (6,) that convert a rotation vector and translation to mm, for points `radius` mm from the centre."""
    return np.array([radius, radius, radius, 1.0, 1.0, 1.0])


def geometric_median(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted geometric median of points (..., k, 6) with weights (..., k) by Weiszfeld's algorithm, (..., 6)."""
    total = weights.sum(axis=-1)[..., None]
    median = (weights[..., None] * points).sum(axis=-2) / total
    for iteration in range(60):
        distance = np.linalg.norm(points - median[..., None, :], axis=-1)
        inverse = weights / (distance + max(0.02, 2 * 0.8**iteration))
        median = (inverse[..., None] * points).sum(axis=-2) / inverse.sum(axis=-1)[..., None]
    return median
