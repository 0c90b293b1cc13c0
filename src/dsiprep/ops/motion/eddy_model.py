"""Eddy currents of a series: displacements that follow the gradients, estimated jointly with the poses of the head.

Volume v is displaced along the phase-encoding axis by a polynomial in scanner coordinates whose coefficients are
linear in the applied gradient g_v: c_v = R g_v. The response R is the same for all volumes, so it cannot follow
individual movements; the prior on resting poses separates the part of R that resembles head motion from motion.

Volumes are predicted from each other, so what they have in common is predicted as well. The derivative of a residual
with respect to R is therefore that of the volume minus that of its prediction, (1 - P) J; without the second term,
steps are far too short.

With J = phi dy/dx + phi' y and noisy y, least squares would stretch images to reduce the noise: residuals and J share
noise, and the mean of n (phi dn/dx + phi' n) is half of phi' n². The normal equations are therefore formed with the
instrument phi dy/dx + phi' y / 2, which is uncorrelated with the noise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid
from dsiprep.data.transform import EDDY_MM, EddyCurrents
from dsiprep.ops.image.eddy_displacement import eddy_polynomial
from dsiprep.ops.image.point_set import PointSet, target_gradients
from dsiprep.ops.motion.gauss_newton import apply_steps
from dsiprep.ops.motion.gauss_newton_kernels import STUDENT_DOF
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pose_prior import PosePrior, add_pose_prior
from dsiprep.ops.motion.pyramid import PyramidLevel
from dsiprep.ops.qspace.prediction import Prediction

__all__ = [
    "F_QUANTILE_99",
    "MIN_VOXEL_MM",
    "EddyFit",
    "choose_terms",
    "eddy_step",
    "joint_step",
    "kept_fraction",
    "rms_displacement",
    "shrink_to_significant",
    "zero_eddy_currents",
]

log = logging.getLogger("dsiprep")
MIN_VOXEL_MM = (
    3.9  # mean voxel size above which eddy currents are estimated: noise of smaller voxels enters predictions too
)
SAMPLED_VALUES = 250_000  # points of the brain times volumes that eddy currents are estimated from, and ...
FINAL_VALUES = 1_000_000  # ... at the finest of the voxel sizes
SLOPE_VOLUMES = 20  # volumes in which points with strong contrast along the phase-encoding axis are looked for
PREDICTION_ERROR_MM = 0.025  # eddy currents that prediction errors would mimic if predictions did not follow the data
SIZE_ITERATIONS = 30  # of the size of eddy currents and the penalty that depends on it
INITIAL_SIZE_MM = 0.5  # assumed size of eddy currents before there is an estimate
MIN_SIZE_MM = 0.1  # lower bound on the size that the penalty assumes
MIN_DIRECTIONS_LINEAR, MIN_DIRECTIONS_QUADRATIC = 12, 45
FEW_DIRECTIONS = 15  # with fewer, head movements mimic eddy currents, also along the other two axes
F_QUANTILE_99 = 9.8  # of F(3, 6): mean square of three gradients along one axis over that along the two other axes
TERMS = {"linear": 4, "quadratic": 10}
POSE_AND_GAIN = 7  # parameters of each volume: rotation vector, translation and gain


@dataclass(frozen=True, eq=False)
class EddyFit:
    """Data of one estimation of eddy currents: diffusion-weighted volumes, their predictions and the pose prior.

    Attributes
    ----------
    dwi : DWI
    level : PyramidLevel
        With voxels above `MIN_VOXEL_MM`.
    observed : Tensor, (n, m)
        Diffusion-weighted volumes at the points of `level`.
    predicted : Prediction
        Of those volumes.
    prior : PosePrior
        Of all volumes.
    terms : int
        Polynomial terms that are estimated, from `choose_terms`.
    is_final : bool
        Whether this is the last level at which they are.
    """

    dwi: DWI
    level: PyramidLevel
    observed: torch.Tensor
    predicted: Prediction
    prior: PosePrior
    terms: int
    is_final: bool


@dataclass(frozen=True, eq=False)
class ResidualSample:
    """Residuals of n volumes at k points of the brain.

    Attributes
    ----------
    points : PointSet
        The k points.
    residual : Tensor, (n, k)
        Volumes minus predictions.
    values, slopes : Tensor, (n, k) and (n, k, 3)
        Predictions and their gradients, per mm RAS+ of the reference.
    prediction : Prediction
        Of the same volumes, at all points.
    """

    points: PointSet
    residual: torch.Tensor
    values: torch.Tensor
    slopes: torch.Tensor
    prediction: Prediction


def choose_terms(wanted: str, count: int) -> int:
    """Number of polynomial terms for `count` directions.

    With few directions, predictions follow single volumes too closely to estimate many terms.

    Parameters
    ----------
    wanted : str
        "none", "linear" or "quadratic".
    """
    if wanted == "none" or count < MIN_DIRECTIONS_LINEAR:
        return 0
    return TERMS["linear" if count < MIN_DIRECTIONS_QUADRATIC else wanted]


def zero_eddy_currents(count: int, grid: Grid, along: int) -> EddyCurrents:
    """Zero displacement for `count` volumes with phase encoding along voxel axis `along` of `grid`."""
    return EddyCurrents(np.zeros((count, 10)), grid.directions, grid.centre, along)


def _with_response(
    eddy: EddyCurrents, response: np.ndarray, gradients: np.ndarray, deviation: np.ndarray | None = None
) -> EddyCurrents:
    """Set the coefficients to R g_v, for R (10, 3) in mm and gradients (n, 3) relative to the strongest.

    `deviation` (n, 4), in mm, adds to the constant and linear terms.
    """
    coefficients = gradients @ response.T
    if deviation is not None:
        coefficients[:, :4] += deviation
    return replace(eddy, coefficients=coefficients)


def rms_displacement(eddy: EddyCurrents, points: np.ndarray) -> float:
    """Root mean square displacement (mm) of world points (m, 3) over all volumes."""
    displacement = [eddy.displacement(volume, points) for volume in range(len(eddy.coefficients))]
    return float(np.sqrt(3 * np.mean(np.square(displacement))))


def eddy_step(fit: EddyFit, state: MotionState) -> tuple[MotionState, float]:
    """One Gauss-Newton step of the response to the gradient, jointly with all poses; `state` must have `eddy`.

    Also returns the root mean square displacement (mm) by the change of the response.
    """
    assert state.eddy is not None
    weighted = np.flatnonzero(~fit.dwi.is_b0)
    gradients, points = _gradients(fit.dwi), fit.level.probe_points()
    size = _size_of_response(state.eddy, gradients, points)
    change, moves = _sampled_step(fit, state.transforms[weighted], state.eddy, state.response, size)
    response, transforms = state.response - change, state.transforms.copy()
    transforms[weighted], _ = apply_steps(transforms[weighted], moves, fit.level.points)
    eddy = _with_response(state.eddy, response, gradients, state.deviation)
    return replace(state, transforms=transforms, response=response, eddy=eddy), size(change)


def shrink_to_significant(fit: EddyFit, state: MotionState) -> MotionState:
    """Shrink eddy currents by what the same fit finds along the two axes without any; `state` must have `eddy`.

    Prediction errors resemble a response to the gradient along any axis, whereas eddy currents act along the
    phase-encoding axis only. With few directions, head movements also resemble one, and only what chance hardly
    explains is kept.
    """
    assert state.eddy is not None
    weighted = np.flatnonzero(~fit.dwi.is_b0)
    gradients, probe_points = _gradients(fit.dwi), fit.level.probe_points()
    size = rms_displacement(_with_response(state.eddy, state.response, gradients), probe_points)
    null = 0.0
    for axis in {0, 1, 2} - {state.eddy.along}:
        other = replace(state.eddy, along=axis)
        none = np.zeros((10, 3))
        change, _ = _sampled_step(fit, state.transforms[weighted], other, none, lambda _: INITIAL_SIZE_MM)
        null += 0.5 * rms_displacement(_with_response(other, change, gradients), probe_points) ** 2
    log.info("motion: eddy currents of %.3f mm rms, %.3f mm along the other axes", size, null**0.5)
    response = kept_fraction(size, null, len(fit.observed)) * state.response
    return replace(state, response=response, eddy=_with_response(state.eddy, response, gradients, state.deviation))


def kept_fraction(size: float, null: float, count: int) -> float:
    """Fraction of the estimated eddy currents that is kept, 0 to 1.

    Parameters
    ----------
    size : float
        Root mean square displacement by eddy currents, mm.
    null : float
        Mean square displacement (mm²) that the same fit finds along axes without eddy currents.
    count : int
        Directions.
    """
    if count < FEW_DIRECTIONS:
        null *= F_QUANTILE_99
    return max(0.0, 1 - null / max(size, 1e-9) ** 2)


def _sampled_step(
    fit: EddyFit,
    transforms: np.ndarray,
    eddy: EddyCurrents,
    response: np.ndarray,
    size: Callable[[np.ndarray], float],
) -> tuple[np.ndarray, np.ndarray]:
    """`joint_step` on a sample of the brain, for the (n, 4, 4) transforms of the diffusion-weighted volumes."""
    weighted = np.flatnonzero(~fit.dwi.is_b0)
    points, predicted = fit.level.points, fit.predicted
    count = (FINAL_VALUES if fit.is_final else SAMPLED_VALUES) // len(fit.observed)
    chosen = _informative_points(predicted.values, points, eddy.axes[:, eddy.along], count)
    slopes = target_gradients(predicted.values, points, chosen)
    values = predicted.values[:, chosen]
    sample = ResidualSample(points.take(chosen), fit.observed[:, chosen] - values, values, slopes, predicted)
    return joint_step(
        sample,
        transforms,
        eddy.take(weighted),
        _gradients(fit.dwi)[weighted],
        fit.prior.take(weighted),
        response[: fit.terms],
        size,
    )


def _informative_points(predicted: torch.Tensor, points: PointSet, axis: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices of the `count` points at which predictions (n, m) change most along `axis` (3,).

    The information about a shift along the axis is the squared slope along it, which is uneven: a few per cent of the
    points, at the borders of tissues, hold a good part of it.
    """
    slopes = target_gradients(predicted[:: max(1, len(predicted) // SLOPE_VOLUMES)], points)
    along = slopes @ torch.as_tensor(axis, dtype=slopes.dtype, device=slopes.device)
    return np.sort(along.square().sum(dim=0).topk(min(len(points), count)).indices.cpu().numpy())


def _size_of_response(eddy: EddyCurrents, gradients: np.ndarray, points: np.ndarray) -> Callable[[np.ndarray], float]:
    """The function that gives the root mean square displacement (mm) of `points` (m, 3) by a response (10, 3)."""
    s = torch.as_tensor((points - eddy.centre) @ eddy.axes / EDDY_MM).T[None]
    terms = eddy_polynomial(s, eddy.along)[0][:, 0].numpy()
    products, moments = terms @ terms.T / len(points), gradients.T @ gradients / len(gradients)
    return lambda response: float(np.sqrt(max(0.0, np.trace(response.T @ products @ response @ moments))))


def _gradients(dwi: DWI) -> np.ndarray:
    """Gradients (n, 3) in world RAS+, relative to the strongest; zero at b=0."""
    return np.where(dwi.is_b0[:, None], 0, dwi.q) / np.sqrt(dwi.bvals.max())


def joint_step(
    sample: ResidualSample,
    transforms: np.ndarray,
    eddy: EddyCurrents,
    gradients: np.ndarray,
    prior: PosePrior,
    response: np.ndarray,
    size: Callable[[np.ndarray], float],
) -> tuple[np.ndarray, np.ndarray]:
    """One Gauss-Newton step of R and all rigid poses together.

    Poses and gains are eliminated volume by volume (Schur complement), which leaves N R = s. In addition to the three
    columns of R there are two for effects of the size of the gradient and its square, which prediction errors have and
    eddy currents do not. Displacements common to volumes of similar gradient hardly show in the residuals (N is small
    relative to D, the same sums without predictions), and there model errors mislead most. With errors of s of
    covariance k² D and a zero-mean prior on R of precision D, R = (N' D^-1 N + k² D)^-1 N' D^-1 s. k is 0.025 mm over
    the root mean square displacement by R itself, to which it is iterated.

    Parameters
    ----------
    sample : ResidualSample
    transforms : ndarray, (n, 4, 4)
    eddy : EddyCurrents
        Of these volumes.
    gradients : ndarray, (n, 3)
        World RAS+, relative to the strongest.
    prior : PosePrior
        Of these volumes.
    response : ndarray, (t, 3)
        R of the terms to be estimated, with which the volumes were sampled.
    size : callable
        Root mean square displacement (mm) by a response (10, 3).

    Returns
    -------
    change : ndarray, (10, 3)
        To be subtracted from R, mm; zero for the other terms.
    moves : ndarray, (n, 6)
        Steps of the poses, for `gauss_newton.apply_steps`.

    References
    ----------
    Andersson & Sotiropoulos 2016, doi 10.1016/j.neuroimage.2015.10.019 (displacements that follow the gradient).
    """
    terms, own = len(response), POSE_AND_GAIN
    sums, unpredicted = _joint_equations(sample, transforms, eddy, gradients, terms)
    inner, mixed = sums[:, :own, :own], sums[:, :own, own:]
    add_pose_prior(inner, mixed[:, :, -1], transforms, prior, sample.points, np.ones(len(sums)))
    inner = inner + 1e-9 * np.trace(inner, axis1=1, axis2=2)[:, None, None] * np.eye(own)
    eliminated = np.linalg.solve(inner, mixed)
    reduced = (sums[:, own:, own:] - sums[:, own:, :own] @ eliminated).sum(axis=0)
    before, change = np.pad(response, ((0, 10 - terms), (0, 0))), np.zeros((10, 3))
    solution, expected = np.zeros(5 * terms), size(before) or INITIAL_SIZE_MM
    for _ in range(SIZE_ITERATIONS):
        penalty = (PREDICTION_ERROR_MM / max(MIN_SIZE_MM, expected)) ** 2
        solution = _solve_response(reduced[:, :-1], reduced[:, -1], unpredicted, response, penalty)
        change[:terms] = solution.reshape(terms, 5)[:, :3]
        expected = size(before - change)
    return change, (eliminated[:, :, -1] - eliminated[:, :, :-1] @ solution)[:, :6]


def _joint_equations(
    sample: ResidualSample, transforms: np.ndarray, eddy: EddyCurrents, gradients: np.ndarray, terms: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted normal equations of pose, gain and response for each volume.

    Returns
    -------
    sums : ndarray, (n, 7 + 5 t, 8 + 5 t)
        Rows: pose, gain and instruments of the response. Columns: pose, gain, response and residual.
    unpredicted : ndarray, (5 t, 5 t)
        D: the sums of the response over all volumes, without the derivative of predictions.
    """
    values, slopes, residual = sample.values, sample.slopes, sample.residual
    scale = 1.4826 * residual.abs().median(dim=1).values.clamp(min=1e-9)
    weight = (STUDENT_DOF + 1) / (STUDENT_DOF + (residual / scale[:, None]) ** 2) / scale[:, None] ** 2
    shift, stretch = _displacement_derivatives(values, slopes, sample.points, transforms, eddy)
    size = np.linalg.norm(gradients, axis=1)[:, None]
    regressors = np.hstack([gradients, size, size**2])
    g = torch.as_tensor(regressors, dtype=shift.dtype, device=shift.device)[:, None, :, None]
    instruments, derivatives = (
        (columns[:, :terms, None, :] * g).flatten(1, 2) for columns in (shift + stretch / 2, shift + stretch)
    )
    unpredicted = torch.bmm(derivatives * weight[:, None], derivatives.transpose(1, 2)).sum(0)
    instruments, derivatives = (
        columns - sample.prediction.change(columns, values[:, None]) for columns in (instruments, derivatives)
    )
    world = torch.as_tensor(sample.points.world, device=slopes.device).expand_as(slopes)
    own = torch.cat([torch.linalg.cross(world, slopes), slopes, values[..., None]], dim=2).transpose(1, 2)
    tests = torch.cat([own, instruments], dim=1) * weight[:, None]
    rows = torch.cat([own, derivatives, residual[:, None]], dim=1)
    sums = torch.bmm(tests, rows.transpose(1, 2))
    return sums.cpu().numpy().astype(float), unpredicted.cpu().numpy().astype(float)


def _solve_response(
    normal: np.ndarray, side: np.ndarray, unpredicted: np.ndarray, response: np.ndarray, penalty: float
) -> np.ndarray:
    """Solve N R = s with errors of s of covariance penalty * D and the prior of `joint_step`, (5 t,)."""
    ridge = 1e-6 * np.diag(np.diag(unpredicted)) + 1e-9 * np.trace(unpredicted) * np.eye(len(unpredicted))
    unpredicted = unpredicted + ridge
    projection = normal.T @ np.linalg.inv(unpredicted)
    precision = penalty * unpredicted
    current = np.pad(response, ((0, 0), (0, 2))).ravel()
    return np.linalg.solve(projection @ normal + precision, projection @ side + precision @ current)


def _displacement_derivatives(
    values: torch.Tensor, slopes: torch.Tensor, points: PointSet, transforms: np.ndarray, eddy: EddyCurrents
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of volumes with respect to their coefficients in mm: by the shift and by the stretch, (n, 10, k).

    These are phi dy/dx and phi' y of the module's docstring.
    """
    world = points.world.astype(float) + points.centre
    scanner = np.einsum("nab,kb->nka", transforms[:, :3, :3], world) + transforms[:, None, :3, 3]
    s = np.moveaxis((scanner - eddy.centre) @ eddy.axes / EDDY_MM, 1, 2)
    terms, term_slopes = eddy_polynomial(torch.as_tensor(s, dtype=torch.float32, device=values.device), eddy.along)
    axis = np.einsum("nba,b->na", transforms[:, :3, :3], eddy.axes[:, eddy.along])  # in the frame of the head
    along = torch.einsum("nka,na->nk", slopes, torch.as_tensor(axis, dtype=torch.float32, device=values.device))
    return (terms * along).transpose(0, 1), (term_slopes * values / EDDY_MM).transpose(0, 1)
