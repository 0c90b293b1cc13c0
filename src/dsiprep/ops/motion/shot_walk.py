"""A random walk of the head from shot to shot with heavy-tailed steps, and the poses that data and walk agree on.

Each node t has a pose T_t: that of a shot, or of a volume with one pose. Data give it a quadratic cost (normal
equations); the walk gives each step log(T_t-1^-1 T_t), in mm, a Student t distribution: rest and slow motion are
likely, and a sudden move is hardly held back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cho_solve_banded, cholesky_banded, solve_triangular

from dsiprep.ops.image.affine import rigid_parameters

__all__ = [
    "Offsets",
    "Trend",
    "Walk",
    "convex_weights",
    "log_odds",
    "solve_walk",
    "solve_with_trend",
    "step_weights",
    "steps_of",
]

STEP_DOF = 1.0  # degrees of freedom of the Student t distribution of steps
PARAMETERS = 6
SPREADS_MM = (0.01, 2.0)  # smallest and largest of a trend


@dataclass(frozen=True, eq=False)
class Walk:
    """How far the head is expected to move from node to node.

    Attributes
    ----------
    scale : ndarray, (n,)
        Of the step to each node, mm per axis; infinite where it does not follow on the one before.
    centre : ndarray, (3,)
        Of rotation, mm.
    lengths : ndarray, (6,)
        mm per unit of each pose parameter.
    """

    scale: np.ndarray
    centre: np.ndarray
    lengths: np.ndarray


def steps_of(poses: np.ndarray, walk: Walk) -> np.ndarray:
    """Parameters of the step to each pose (n, 4, 4) from the one before it, (n, 6); zero where there is none."""
    steps = np.zeros((len(poses), PARAMETERS))
    steps[1:] = rigid_parameters(np.linalg.inv(poses[:-1]) @ poses[1:], walk.centre)
    return np.where(np.isfinite(walk.scale)[:, None], steps, 0)


def step_weights(steps: np.ndarray, walk: Walk) -> np.ndarray:
    """Precision (1/mm²) of each step given how long it is, (n,); zero where there is none."""
    return (STEP_DOF + PARAMETERS) / (STEP_DOF + _squares(steps, walk)) / walk.scale**2


def convex_weights(steps: np.ndarray, walk: Walk) -> np.ndarray:
    """Weights as `step_weights`, of a cost that grows with the length of long steps and has no local minima."""
    return (STEP_DOF + PARAMETERS) / STEP_DOF / np.sqrt(1 + _squares(steps, walk)) / walk.scale**2


def _squares(steps: np.ndarray, walk: Walk) -> np.ndarray:
    return ((steps * walk.lengths) ** 2).sum(axis=1) / walk.scale**2


def solve_walk(
    hessian: np.ndarray, slope: np.ndarray, steps: np.ndarray, weights: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Changes of all poses that minimise the quadratic cost of the data plus that of the steps.

    Parameters
    ----------
    hessian, slope : ndarray, (n, 6, 6) and (n, 6)
        Cost of a change d of pose t: d' hessian d / 2 - slope' d.
    steps : ndarray, (n, 6)
        From `steps_of`.
    weights : ndarray, (n,)
        From `step_weights`.
    lengths : ndarray, (6,)
        See `Walk`.

    Returns
    -------
    ndarray, (n, 6)
        By a banded Cholesky decomposition: the work grows as n.
    """
    sides = _walk_sides(slope, steps, weights, lengths)
    factor = cholesky_banded(_banded(hessian, weights[:, None] * lengths**2), lower=True, check_finite=False)
    return cho_solve_banded((factor, True), sides.ravel(), check_finite=False).reshape(sides.shape)


@dataclass(frozen=True, eq=False)
class Trend:
    """A smooth function of the gradient by which the poses where volumes agree with predictions differ from the head's.

    Volumes of similar gradients are predicted from each other, so an error that they share leaves no residual. Motion
    of the head does not depend on the gradient and is continuous in time, which tells the two apart.

    Attributes
    ----------
    basis : ndarray, (n, c)
        Functions of the gradient at each node.
    coefficients : ndarray, (c, 6)
        Current ones, in the units of pose parameters.
    spread : float
        Prior standard deviation of the coefficients, mm.
    """

    basis: np.ndarray
    coefficients: np.ndarray
    spread: float


def solve_with_trend(
    hessian: np.ndarray, slope: np.ndarray, steps: np.ndarray, weights: np.ndarray, trend: Trend, lengths: np.ndarray
) -> tuple[np.ndarray, Trend]:
    """Changes of poses that minimise the cost of data, steps and a trend together, and the new trend.

    Parameters
    ----------
    hessian, slope, steps, weights, lengths
        As in `solve_walk`; data are compared at pose and trend together.
    trend : Trend

    Returns
    -------
    change : ndarray, (n, 6)
    trend : Trend
        With the most likely spread, within a factor of 2 of what it was.
    """
    count, size = trend.basis.shape
    sides = _walk_sides(slope, steps, weights, lengths)
    factor = cholesky_banded(_banded(hessian, weights[:, None] * lengths**2), lower=True, check_finite=False)
    mixed = np.einsum("tij,tc->ticj", hessian, trend.basis).reshape(PARAMETERS * count, -1)
    solved = cho_solve_banded((factor, True), np.column_stack([mixed, sides.ravel()]), check_finite=False)
    reduced = np.einsum("tc,tij,td->cidj", trend.basis, hessian, trend.basis, optimize=True)
    reduced = reduced.reshape(PARAMETERS * size, -1) - mixed.T @ solved[:, :-1]
    side = (trend.basis.T @ slope).ravel() - mixed.T @ solved[:, -1]
    before, best, found, chosen = trend.coefficients.ravel(), -np.inf, np.zeros(0), trend.spread
    for spread in np.clip(trend.spread * np.array([0.5, 0.7, 1, 1.4, 2]), *SPREADS_MM):
        precision = np.tile(lengths**2 / spread**2, size)
        root = np.linalg.cholesky(reduced + np.diag(precision))
        half = np.linalg.solve(root, side - precision * before)
        likelihood = half @ half / 2 - precision @ before**2 / 2 - np.log(root.diagonal()).sum()
        likelihood += np.log(precision).sum() / 2
        if likelihood > best:
            best, found, chosen = likelihood, np.linalg.solve(root.T, half), float(spread)
    change = (solved[:, -1] - solved[:, :-1] @ found).reshape(count, PARAMETERS)
    return change, Trend(trend.basis, trend.coefficients + found.reshape(size, PARAMETERS), chosen)


def _walk_sides(slope: np.ndarray, steps: np.ndarray, weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Right-hand side of the equations of poses, (n, 6)."""
    sides = slope - weights[:, None] * lengths**2 * steps
    sides[:-1] += weights[1:, None] * lengths**2 * steps[1:]
    return sides


@dataclass(frozen=True, eq=False)
class Offsets:
    """Poses by which slices agree with a prediction differ from the head's, smoothly over the head.

    A prediction that errs shifts slices next to each other alike, whenever they were acquired.

    Attributes
    ----------
    basis : ndarray, (n, c)
        Functions of the position of each shot.
    spreads : tuple of float
        Prior standard deviations (mm) of the coefficients, of which the most likely is taken.
    """

    basis: np.ndarray
    spreads: tuple[float, ...]


def log_odds(
    hessian: np.ndarray, slope: np.ndarray, scales: tuple[float, ...], lengths: np.ndarray, offsets: Offsets
) -> tuple[float, float]:
    """Logarithm of the marginal likelihood of normal steps between n shots, over that of one pose.

    Of the most likely of `scales` (mm). Integrated over all poses, so more freedom is not favoured for its own sake,
    and in either case over the offsets; arguments as in `solve_walk`. Also returns the root mean square distance (mm)
    of the poses from their mean.
    """
    mixed = np.einsum("tij,tc->ticj", hessian, offsets.basis)
    square = np.einsum("td,ticj->dicj", offsets.basis, mixed).reshape(2 * (mixed[0, 0].size,))
    side, weights = (offsets.basis.T @ slope).ravel(), np.ones(len(slope))
    total, weights[0] = np.linalg.cholesky(hessian.sum(axis=0) + 1e-9 * np.eye(PARAMETERS)), 0
    columns = np.column_stack([mixed.sum(axis=0).reshape(PARAMETERS, -1), slope.sum(axis=0)])
    solved, log_det = cho_solve((total, True), columns), 2 * np.log(total.diagonal()).sum()
    one, _ = _likelihood(columns, solved, log_det, square, side, offsets, lengths)
    columns, best, apart = np.column_stack([mixed.reshape(slope.size, -1), slope.ravel()]), -np.inf, 0.0
    for scale in scales:
        links = weights[:, None] * lengths**2 / scale**2
        factor = cholesky_banded(_banded(hessian, links), lower=True, check_finite=False)
        solved = cho_solve_banded((factor, True), columns, check_finite=False)
        log_det = 2 * np.log(factor[0]).sum() - np.log(links[1:]).sum()
        walk, change = _likelihood(columns, solved, log_det, square, side, offsets, lengths)
        if walk - one > best:
            away = (change.reshape(slope.shape) - change.reshape(slope.shape).mean(axis=0)) * lengths
            best, apart = walk - one, float(np.sqrt((away**2).sum(axis=1).mean()))
    return best, apart


def _likelihood(
    columns: np.ndarray,
    solved: np.ndarray,
    log_det: float,
    square: np.ndarray,
    side: np.ndarray,
    offsets: Offsets,
    lengths: np.ndarray,
) -> tuple[float, np.ndarray]:
    """Logarithm of the marginal likelihood over poses and offsets, and the most likely changes of the poses.

    `columns` are the products of poses with offsets, and the slope of poses; `solved` the solutions of their normal
    equations, with the determinant exp(`log_det`); `square` and `side` the normal equations of the offsets.
    """
    products = columns[:, :-1].T @ solved
    reduced, left = square - products[:, :-1], side - products[:, -1]
    best, change = -np.inf, solved[:, -1]
    for spread in offsets.spreads:
        precision = np.tile(lengths**2 / spread**2, len(side) // PARAMETERS)
        root = np.linalg.cholesky(reduced + np.diag(precision))
        half = solve_triangular(root, left, lower=True)
        value = (half @ half + np.log(precision).sum()) / 2 - np.log(root.diagonal()).sum()
        if value > best:
            best, change = value, solved[:, -1] - solved[:, :-1] @ solve_triangular(root.T, half)
    return float(best + (columns[:, -1] @ solved[:, -1] - log_det) / 2), change


def _banded(hessian: np.ndarray, links: np.ndarray) -> np.ndarray:
    """Matrix of the cost of data and steps in lower banded form, (p + 1, p n): element [row - column, column].

    `links` (n, p) is the precision of the step of each parameter to node t from the one before it.
    """
    count, size = links.shape
    after, index = np.vstack([links[1:], np.zeros(size)]), np.arange(size)
    diagonal = hessian.copy()
    ridge = 1e-6 * np.einsum("nii->ni", hessian) + 1e-9
    diagonal[:, index, index] += links + after + ridge
    banded = np.zeros((size + 1, count, size))
    for column in range(size):
        for row in range(column, size):
            banded[row - column, :, column] = diagonal[:, row, column]
    banded[size] = -after
    return banded.reshape(size + 1, -1)
