"""A random walk of the head from shot to shot with heavy-tailed steps, and the poses that data and walk agree on.

Each node t has a pose T_t: that of a shot, or of a volume with one pose. Data give it a quadratic cost (normal
equations); the walk gives each step log(T_t-1^-1 T_t), in mm, a Student t distribution: rest and slow motion are
likely, and a sudden move is hardly held back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve_banded, cholesky_banded

from dsiprep.ops.image.affine import rigid_parameters

__all__ = ["Walk", "log_odds", "solve_walk", "step_weights", "steps_of"]

STEP_DOF = 1.0  # degrees of freedom of the Student t distribution of steps
PARAMETERS = 6


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
    after, squares = np.append(weights[1:], 0)[:, None], lengths**2
    sides = slope - weights[:, None] * squares * steps
    sides[:-1] += after[:-1] * squares * steps[1:]
    factor = cholesky_banded(_banded(hessian, weights, lengths), lower=True, check_finite=False)
    return cho_solve_banded((factor, True), sides.ravel(), check_finite=False).reshape(sides.shape)


def log_odds(hessian: np.ndarray, slope: np.ndarray, scale: float, lengths: np.ndarray) -> tuple[float, float]:
    """Logarithm of the marginal likelihood of normal steps of a scale (mm) between n shots, over that of one pose.

    Integrated over all poses, so more freedom is not favoured for its own sake; arguments as in `solve_walk`. Also
    returns the root mean square distance (mm) of the poses from their mean.
    """
    weights = np.full(len(hessian), scale**-2.0)
    weights[0] = 0
    factor = cholesky_banded(_banded(hessian, weights, lengths), lower=True, check_finite=False)
    change = cho_solve_banded((factor, True), slope.ravel(), check_finite=False)
    steps = (len(hessian) - 1) * np.log(lengths**2 / scale**2).sum() / 2
    walk = change @ slope.ravel() / 2 - np.log(factor[0]).sum() + steps
    total, side = hessian.sum(axis=0) + 1e-9 * np.eye(PARAMETERS), slope.sum(axis=0)
    odds = walk - side @ np.linalg.solve(total, side) / 2 + np.linalg.slogdet(total)[1] / 2
    apart = (change.reshape(slope.shape) - change.reshape(slope.shape).mean(axis=0)) * lengths
    return float(odds), float(np.sqrt((apart**2).sum(axis=1).mean()))


def _banded(hessian: np.ndarray, weights: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Matrix of the cost of data and steps in lower banded form, (7, 6 n): element [row - column, column]."""
    count, squares, index = len(hessian), lengths**2, np.arange(PARAMETERS)
    after = np.append(weights[1:], 0)[:, None]
    diagonal = hessian.copy()
    ridge = 1e-6 * np.einsum("nii->ni", hessian) + 1e-9
    diagonal[:, index, index] += (weights[:, None] + after) * squares + ridge
    banded = np.zeros((PARAMETERS + 1, count, PARAMETERS))
    for column in range(PARAMETERS):
        for row in range(column, PARAMETERS):
            banded[row - column, :, column] = diagonal[:, row, column]
    banded[PARAMETERS] = -after * squares
    return banded.reshape(PARAMETERS + 1, -1)
