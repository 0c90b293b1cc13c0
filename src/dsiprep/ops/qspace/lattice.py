"""Points of Cartesian lattices in q-space, and the prediction of a series at any point from where it was acquired."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from dsiprep.ops.qspace.shore import ZETA, leave_one_out, near_neighbours, shore_basis, shore_prior, shore_size

__all__ = ["PointPrediction", "ball", "common_rotation", "half_ball", "predict_at"]

ORDERS = (8, 6, 4, 2)
SCALES = (0.6, 0.8, 1.0)  # of the basis in units of `ZETA`, up to b 7000; larger in proportion beyond
TOP_B = 7000.0  # s/mm²
TRIAL_ITERATIONS = 10  # of the prior, for the choice of order and scale
LIGHT_PRIOR = 0.01  # of the estimated penalty, where samples are at least twice as many as basis functions
SAME_POINT = 1.02  # fraction of the largest |q| up to which a point lies within the acquired ball


@dataclass(frozen=True, eq=False)
class PointPrediction:
    """Linear prediction of samples at points of q-space.

    Attributes
    ----------
    matrix : ndarray, (points, n)
        Weight of each acquired sample.
    uncertainty : ndarray, (points,)
        Standard deviation of each prediction in units of the noise of a sample.
    outside : ndarray, (points,), bool
        Points outside the convex hull of the acquired ones and their antipodes.
    left_out : ndarray, (n, n)
        Matrix that predicts each sample from the others.
    noise : float
        Noise standard deviation of a sample of weight 1.
    order : int
        Radial order of the 3dSHORE basis.
    zeta : float
        Its scale in s/mm².
    """

    matrix: np.ndarray
    uncertainty: np.ndarray
    outside: np.ndarray
    left_out: np.ndarray
    noise: float
    order: int
    zeta: float


def half_ball(squared_radius: int) -> np.ndarray:
    """One of each antipodal pair of integer points in a ball, without the origin, by squared radius, (n, 3) int."""
    points = ball(squared_radius)[1:]
    reach = 2 * int(np.sqrt(squared_radius)) + 1
    return points[points @ np.array([1, reach, reach**2]) > 0]


def ball(squared_radius: int) -> np.ndarray:
    """The integer points in a ball, by squared radius, the origin first, (n, 3) int."""
    axis = np.arange(-int(np.sqrt(squared_radius)), int(np.sqrt(squared_radius)) + 1)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    squared = (points**2).sum(1)
    order = np.argsort(squared, kind="stable")
    return points[order[squared[order] <= squared_radius]]


def common_rotation(nominal: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) that brings vectors (n, 3) closest to others, by least squares.

    References
    ----------
    Kabsch 1976, doi 10.1107/S0567739476001873.
    """
    u, _, vt = np.linalg.svd(turned.T @ nominal)
    return u @ np.diag([1.0, 1.0, np.linalg.det(u @ vt)]) @ vt


def predict_at(
    points: np.ndarray, q: np.ndarray, second_moment: np.ndarray, weights: np.ndarray | None = None
) -> PointPrediction:
    """Predict samples at points of q-space by 3dSHORE with a normal prior estimated from the samples.

    This is a Gaussian process whose covariance has the rotation-invariant form that the prior of 3dSHORE gives it. The
    radial order and the scale of the basis are those that predict samples best from the others. Each sample is
    predicted from the others with the whole prior. At `points` the prior is light where the samples suffice without:
    shrinkage lowers the error of each point, but what it takes is the same in all of them, and reconstruction sums over
    the points, in which noise averages out and a bias towards isotropy does not.

    Parameters
    ----------
    points : ndarray, (points, 3)
        Square root of the b-value (s/mm²) times the b-vector.
    q : ndarray, (n, 3)
        The same of the samples.
    second_moment : ndarray, (n, n)
        Mean over voxels of the outer product of the samples.
    weights : ndarray, (n,), optional
        Weight of each sample; 1 by default.

    References
    ----------
    Merlet & Deriche 2013, doi 10.1016/j.media.2013.02.010. Rasmussen & Williams 2006, ISBN 0-262-18253-X.
    """
    weights = np.ones(len(q)) if weights is None else weights
    order, zeta = _best_basis(q, second_moment, weights)
    basis, target = shore_basis(q, order, zeta), shore_basis(points, order, zeta)
    penalty = shore_prior(second_moment, basis, order, weights)
    share = LIGHT_PRIOR if len(q) >= 2 * basis.shape[1] else 1.0
    posterior = np.linalg.inv((basis * weights[:, None]).T @ basis + share * penalty)
    matrix = target @ posterior @ (basis * weights[:, None]).T
    left_out = leave_one_out(basis, penalty, near_neighbours(q), weights)
    hat = basis @ posterior @ (basis * weights[:, None]).T
    residual = np.eye(len(q)) - hat
    freedom = float(np.sum(weights[:, None] * residual**2))
    noise = np.sqrt(np.sum(weights * np.einsum("ij,ij->i", residual @ second_moment, residual)) / max(freedom, 1e-9))
    uncertainty = np.sqrt(np.einsum("pc,cd,pd->p", target, posterior, target))
    return PointPrediction(matrix, uncertainty, _outside(points, q), left_out, float(noise), order, zeta)


def _best_basis(q: np.ndarray, second_moment: np.ndarray, weights: np.ndarray) -> tuple[int, float]:
    """Radial order and scale with the smallest leave-one-out error, among orders that the samples determine."""
    wide = max(1.0, float((q**2).sum(1).max(initial=0)) / TOP_B)
    orders = [order for order in ORDERS if shore_size(order) < len(q)][:2] or [0]
    tried = [(order, ZETA * wide * scale) for order in orders for scale in SCALES]
    errors = []
    for order, zeta in tried:
        basis = shore_basis(q, order, zeta)
        penalty = shore_prior(second_moment, basis, order, weights, TRIAL_ITERATIONS)
        weighted = (basis * weights[:, None]).T
        hat = basis @ np.linalg.solve(weighted @ basis + penalty, weighted)
        left = (np.eye(len(q)) - hat) / np.maximum(1 - np.diag(hat), 1e-6)[:, None]
        errors.append(np.sum(weights * np.einsum("ij,ij->i", left @ second_moment, left)))
    return tried[int(np.argmin(errors))]


def _outside(points: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Points outside the convex hull of samples and antipodes, (points,) bool, but for `SAME_POINT` of their length."""
    try:
        hull = ConvexHull(np.concatenate([q, -q]))
    except QhullError:  # samples in one plane
        return np.linalg.norm(points, axis=1) > 0
    normals, offsets = hull.equations[:, :3], hull.equations[:, 3]
    return ((points / SAME_POINT) @ normals.T + offsets > 1e-9).any(1)
