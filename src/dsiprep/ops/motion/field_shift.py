"""Shifts along the phase-encoding axis that the magnetic field causes, told apart from head motion.

An offset of the field shifts the whole image along the phase-encoding axis, as a translation of the head does. Images
cannot tell the two apart; what can is how they go with everything else. The displacement of the brain's centre along
that axis, in volume v, is modelled as

    y_v = c + head_v + field_v.

The head is a slow path, steps from one place of rest to another, and a movement of heavy tails (Student t), all of the
size found along the other two axes: where and when the head moves along those, y may change, too. The field is what
remains: eddy currents, functions of the gradient g_v and, as they decay over seconds, of the gradients before it; the
drift of the centre frequency, smooth in time within a run; and fluctuations from volume to volume, as by breathing. The
variance of each is found by maximum likelihood, so a head without such fields keeps its movements. As the slow path of
the head may be any, too, drift is left out unless the odds speak clearly for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsiprep.data.dwi import DWI
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.affine import rigid_parameters
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.poses import MIN_JITTER_MM, drift_basis, even_gradient_basis

__all__ = ["HeadMovements", "attribute_shifts", "field_shifts"]

STUDENT_DOF = 4.0  # degrees of freedom of the Student t distribution of movements
ITERATIONS = 60  # of the variances
STEP_WINDOW = 4  # volumes before and after a step whose median positions are compared
LEAST_REST = 3.0  # size of a step over the spread of positions before and after it
CLEAR_STEP = 4.0  # standard deviations of positions at rest
PATH_ITERATIONS = 20  # of the path of the head along the other axes
RADIUS_MM = 60.0  # distance at which rotations are converted to mm
CONSTANT_MM = 100.0  # prior standard deviation of c
INITIAL_MM = 0.3  # standard deviation that the variance of each part of the field starts from
FIRST_EVEN, FIRST_ODD = 3, 5  # parts of the field from which on functions of the gradient are even, and odd
FIRST_MOVE = 3.0  # initial movement along the phase-encoding axis over that along the others
CLEAR_DRIFT = 3.0  # logarithm of the odds from which on the centre frequency drifts
DECAYS = (0.0, 0.7)  # part of the effect of a gradient that is left after one more volume


@dataclass(frozen=True, eq=False)
class HeadMovements:
    """Movements of the head that fields cannot mimic, by volume.

    Attributes
    ----------
    movement : ndarray, (n, 3)
        Away from the path of the resting head, in standard deviations: translations along the two other axes and
        rotation about the phase-encoding axis.
    jitter, slow : float
        Standard deviations (mm) of movements and of the path of the resting head along the two other axes.
    steps : ndarray, (n, s)
        For each step to another place of rest, its size (mm) along the two other axes from its volume on, 0 before.
    """

    movement: np.ndarray
    jitter: float
    slow: float
    steps: np.ndarray


@dataclass(frozen=True, eq=False)
class _Parts:
    """Columns of the linear model of the shifts, (n, c), and which part (0, 1, ...) each belongs to.

    Parts are the constant, the slow path and the steps of the head, and those of the field: the offset of the
    diffusion-weighted volumes, other even functions of the gradient, the gradient, earlier gradients, drift.
    """

    columns: np.ndarray
    part: np.ndarray
    fixed: np.ndarray  # variance (mm²) of the first parts, which are known


def attribute_shifts(dwi: DWI, state: MotionState, centre: np.ndarray, even: bool) -> MotionState:
    """Give shifts along the phase-encoding axis to the field or the head; `state` must have `eddy`.

    Where the centre of the brain, `centre` (3,), is found in each volume stays the same. `even` as in `field_shifts`.
    """
    eddy = state.eddy
    assert eddy is not None
    axis = eddy.axes[:, eddy.along]
    apparent = _along_at(state.transforms, eddy, centre)
    q = np.where(dwi.is_b0[:, None], 0, dwi.q) / np.sqrt(dwi.bvals.max())
    shifts = field_shifts(apparent, head_movements(state.transforms, dwi.run, centre, eddy), q, dwi.run, even)
    transforms = state.transforms.copy()
    own = transforms[:, :3, :3] @ centre + transforms[:, :3, 3] - centre
    transforms[:, :3, 3] += ((apparent - shifts) - own @ axis)[:, None] * axis
    missing = apparent - _along_at(transforms, eddy, centre)
    coefficients = eddy.coefficients.copy()
    coefficients[:, 0] += missing
    deviation = state.deviation.copy()
    deviation[:, 0] += missing
    eddy = replace(eddy, coefficients=coefficients)
    return replace(state, transforms=transforms, eddy=eddy, deviation=deviation)


def head_movements(transforms: np.ndarray, run: np.ndarray, centre: np.ndarray, eddy: EddyCurrents) -> HeadMovements:
    """Movements that fields cannot mimic, from poses (n, 4, 4) about `centre` (3,)."""
    others = [axis for axis in range(3) if axis != eddy.along]
    poses, drift = _axis_parameters(transforms, centre, eddy, others), drift_basis(run)
    steps = resting_steps(poses[:, :2], run)
    knots, movement = _follow(poses, drift)
    slow = max(MIN_JITTER_MM, float(np.sqrt(np.var(knots[:, :2], axis=0, ddof=1).mean())))
    if steps.shape[1]:
        movement = _follow(poses, np.hstack([drift, steps]))[1]
    scale = np.maximum(MIN_JITTER_MM, np.quantile(np.abs(movement), 0.5, axis=0) / 0.6745)
    return HeadMovements(movement / scale, float(np.sqrt((scale[:2] ** 2).mean())), slow, steps)


def _follow(poses: np.ndarray, path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of `path` (n, c) with the least sum of distances from `poses` (n, 3), and poses less that path."""
    movement, knots = poses - np.median(poses, axis=0), np.zeros((path.shape[1], 3))
    for _ in range(PATH_ITERATIONS):
        weighted = path / (MIN_JITTER_MM + np.linalg.norm(movement, axis=1))[:, None]
        knots = np.linalg.solve(weighted.T @ path + 1e-9 * np.eye(len(knots)), weighted.T @ poses)
        movement = poses - path @ knots
    return knots, movement


def resting_steps(positions: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Steps of the head from one place of rest to another, (n, s), as in `HeadMovements`.

    Parameters
    ----------
    positions : ndarray, (n, 2)
        mm, along the axes across the phase-encoding axis.
    run : ndarray, (n,)
    """
    n, sizes = len(positions), np.zeros(len(positions))
    for v in range(STEP_WINDOW, n - STEP_WINDOW + 1):
        if run[v - STEP_WINDOW] == run[v + STEP_WINDOW - 1]:
            before, after = positions[v - STEP_WINDOW : v], positions[v : v + STEP_WINDOW]
            places = np.median(before, 0), np.median(after, 0)
            size = np.sqrt(((places[1] - places[0]) ** 2).mean())
            spread = max(
                np.median(np.linalg.norm(group - place, axis=1))
                for group, place in zip((before, after), places, strict=True)
            )
            sizes[v] = size if size > LEAST_REST * spread else 0
    scatter = float(np.median(np.abs(np.diff(positions, axis=0)))) / 0.6745 / np.sqrt(2)
    least = CLEAR_STEP * max(MIN_JITTER_MM, scatter)
    padded = np.pad(sizes, STEP_WINDOW)
    largest = np.array([size >= padded[v : v + 2 * STEP_WINDOW + 1].max() for v, size in enumerate(sizes)])
    at = np.flatnonzero(largest & (sizes > least))
    later = (np.arange(n)[:, None] >= at) & (run[:, None] == run[at])
    return later * sizes[at]


def field_shifts(apparent: np.ndarray, head: HeadMovements, q: np.ndarray, run: np.ndarray, even: bool) -> np.ndarray:
    """Shifts by the field (mm) of every volume, (n,); their median over b=0 is zero, as the reference is made of these.

    Parameters
    ----------
    apparent : ndarray, (n,)
        y: displacement (mm) of the centre of the brain along the phase-encoding axis.
    head : HeadMovements
    q : ndarray, (n, 3)
        Gradients relative to the strongest, in order of acquisition; zero at b=0.
    run : ndarray, (n,)
    even : bool
        Whether even functions of the gradient, and the offset from b=0, are the field's. They are, but predictions do
        not hold them, so that between rounds they are left to the poses, where `poses.remove_gradient_trend` and the
        prior on poses keep them from growing.

    References
    ----------
    Zhou et al. 2019, doi 10.1080/10618600.2018.1529601 (variances by minorisation and maximisation).
    """
    parts = _parts(q, run, head)
    others = parts.part < parts.part.max()
    fewer = _Parts(parts.columns[:, others], parts.part[others], parts.fixed)
    fit = _fit(apparent, head, parts)
    without_drift = _fit(apparent, head, fewer, fit.jitter)
    if fit.evidence - without_drift.evidence < CLEAR_DRIFT:
        fit, parts = without_drift, fewer
    field = parts.part >= (FIRST_EVEN if even else FIRST_ODD)
    shifts = parts.columns[:, field] @ fit.coefficients[field] + fit.white * fit.alpha
    return shifts - np.median(shifts[~(q != 0).any(axis=1)])


@dataclass(frozen=True, eq=False)
class _Fit:
    """Parts of the shifts at the most likely variances.

    Attributes
    ----------
    coefficients : ndarray, (c,)
        mm.
    alpha : ndarray, (n,)
        Residuals over the variance of what has no columns: fluctuations of the field, of variance `white` (mm²), and
        movements of the head, of variance `jitter` (mm²), (n,).
    evidence : float
        Logarithm of the likelihood, with all coefficients integrated out.
    """

    coefficients: np.ndarray
    alpha: np.ndarray
    white: float
    jitter: np.ndarray
    evidence: float


def _fit(apparent: np.ndarray, head: HeadMovements, parts: _Parts, given: np.ndarray | None = None) -> _Fit:
    """Maximise the likelihood over the variances; those of the head's movements too, unless they are given, (n,)."""
    x, number = parts.columns, len(parts.fixed)
    variances = np.concatenate([parts.fixed, np.full(parts.part.max() + 1 - number, INITIAL_MM**2)])
    white, moved = INITIAL_MM**2, FIRST_MOVE * head.jitter * np.linalg.norm(head.movement, axis=1)

    def movements() -> np.ndarray:
        distance = (head.movement**2).sum(axis=1) + (moved / head.jitter) ** 2
        return head.jitter**2 * (1 + distance / STUDENT_DOF) if given is None else given

    for _ in range(ITERATIONS):
        jitter = movements()
        noise = white + jitter
        scaled, normal, inverse = _normal_equations(x, noise, variances[parts.part])
        alpha = (apparent - x @ (inverse @ (scaled.T @ apparent))) / noise
        moved = jitter * alpha
        score = (x.T @ alpha) ** 2
        trace = np.diag(normal) - ((normal @ inverse) * normal).sum(axis=1)
        for part in range(number, len(variances)):
            own = parts.part == part
            ratio = score[own].sum() / max(trace[own].sum(), 1e-12)
            variances[part] = max(variances[part] * np.sqrt(ratio), 1e-8)
        leverage = ((scaled @ inverse) * scaled).sum(axis=1)
        white = max(white * np.sqrt((alpha**2).sum() / max((1 / noise - leverage).sum(), 1e-12)), 1e-8)
    jitter = movements()
    noise, prior = white + jitter, variances[parts.part]
    scaled, normal, inverse = _normal_equations(x, noise, prior)
    coefficients = inverse @ (scaled.T @ apparent)
    alpha = (apparent - x @ coefficients) / noise
    determinant = np.linalg.slogdet(np.eye(len(prior)) + normal * prior)[1]
    evidence = -0.5 * float(apparent @ alpha + np.log(noise).sum() + determinant)
    return _Fit(coefficients, alpha, white, jitter, evidence)


def _normal_equations(x: np.ndarray, noise: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns over the variances `noise` (n,), their normal matrix, and its inverse with the variances `prior` (c,)."""
    scaled = x / noise[:, None]
    normal = x.T @ scaled
    return scaled, normal, np.linalg.inv(normal + np.diag(1 / prior))


def _parts(q: np.ndarray, run: np.ndarray, head: HeadMovements) -> _Parts:
    """Columns of the model, each of unit mean square over the volumes that it concerns."""
    drift = drift_basis(run)
    weighted = (q**2).sum(axis=1, keepdims=True) > 0
    even = even_gradient_basis(q)
    even = even / np.sqrt((even**2).sum(axis=1)[weighted[:, 0]].mean())
    groups = [np.ones((len(q), 1)), drift, head.steps, weighted.astype(float), even, q]
    groups += [_earlier(q, run, decay) for decay in DECAYS] + [drift]
    part = np.repeat(np.arange(len(groups)), [group.shape[1] for group in groups])
    return _Parts(np.hstack(groups), part, np.array([CONSTANT_MM, head.slow, 1.0]) ** 2)


def _earlier(q: np.ndarray, run: np.ndarray, decay: float) -> np.ndarray:
    """Sum over the volumes before each, of the same run, of q (n, 3), times `decay` for every volume in between."""
    total = np.zeros_like(q)
    for v in range(1, len(q)):
        if run[v] == run[v - 1]:
            total[v] = decay * total[v - 1] + q[v - 1]
    return total


def _along_at(transforms: np.ndarray, eddy: EddyCurrents, centre: np.ndarray) -> np.ndarray:
    """Displacement (mm) of the head point `centre` (3,) along the phase-encoding axis in every volume, (n,)."""
    at = transforms[:, :3, :3] @ centre + transforms[:, :3, 3]
    bent = np.stack([eddy.displacement(v, point) for v, point in enumerate(at)])
    return (at - centre + bent) @ eddy.axes[:, eddy.along]


def _axis_parameters(matrices: np.ndarray, centre: np.ndarray, eddy: EddyCurrents, others: list[int]) -> np.ndarray:
    """Translations of `centre` along two voxel axes and rotation about the phase-encoding axis in mm, (n, 3)."""
    parameters = rigid_parameters(matrices, centre)
    turned = RADIUS_MM * parameters[:, :3] @ eddy.axes[:, eddy.along]
    return np.column_stack([parameters[:, 3:] @ eddy.axes[:, others], turned])
