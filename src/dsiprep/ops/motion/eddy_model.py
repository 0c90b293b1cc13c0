"""Eddy currents of a whole series: displacements that follow the gradients, found together with the head's poses.

Volume v is displaced along the phase-encoding axis by a polynomial in scanner coordinates whose coefficients are
linear in the gradient g_v that was played: c_v = R g_v. R is the same for all volumes, so it cannot follow the head;
what of it looks like movement is told from movement by where the head is expected to prior.

Volumes are predicted from each other, and what they have in common is predicted too. So the derivative of a residual
by R is that of the volume less that of its prediction, (1 - P) J; without the second part, steps are far too short.

With J = phi dy/dx + phi' y, y noisy, least squares would stretch images to make noise smaller: residuals and J share
noise, and the mean of n (phi dn/dx + phi' n) is half of phi' n². So the equations that residuals must meet are tested
with phi dy/dx + phi' y / 2, which noise does not correlate with.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid
from dsiprep.data.transform import EDDY_MM, EddyCurrents
from dsiprep.ops.image.eddy_displacement import eddy_polynomial
from dsiprep.ops.image.point_set import PointSet, target_gradients
from dsiprep.ops.motion.gauss_newton import FREEDOM, moved_by
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pose_prior import PosePrior, add_pose_prior
from dsiprep.ops.motion.pyramid import PyramidLevel
from dsiprep.ops.qspace.prediction import Prediction

__all__ = [
    "BY_CHANCE",
    "QUIET_MM",
    "choose_terms",
    "discount_chance",
    "eddy_step",
    "joint_step",
    "kept_fraction",
    "no_eddy_currents",
    "rms_displacement",
]

log = logging.getLogger("dsiprep")
MISLED_MM = 0.025  # eddy currents that errors of predictions would feign if predictions did not follow the data
QUIET_MM = 3.9  # voxels on which eddy currents are found: noise of smaller ones enters their predictions too
SAMPLE = 2000  # points of the brain that they are found from
FEWEST_LINEAR, FEWEST_QUADRATIC = 12, 45  # directions
FEW = 15  # directions, below which movements of the head feign eddy currents, along the other two axes as well
BY_CHANCE = 9.8  # exceeded in 1 % by F of 3 and 6: squares of three gradients along one axis over those along two
TERMS = {"linear": 4, "quadratic": 10}


def choose_terms(wanted: str, count: int) -> int:
    """Terms of the polynomial for `count` directions: few directions predict each other too loosely for many terms.

    Parameters
    ----------
    wanted : str
        "none", "linear" or "quadratic".
    """
    if wanted == "none" or count < FEWEST_LINEAR:
        return 0
    return TERMS["linear" if count < FEWEST_QUADRATIC else wanted]


def no_eddy_currents(count: int, grid: Grid, along: int) -> EddyCurrents:
    """Zeros for `count` volumes that are encoded along voxel axis `along` of `grid`."""
    return EddyCurrents(np.zeros((count, 10)), grid.directions, grid.centre, along)


def _with_response(eddy: EddyCurrents, response: np.ndarray, gradients: np.ndarray) -> EddyCurrents:
    """Coefficients R g_v, for R (10, 3) in mm and gradients (n, 3) relative to the strongest."""
    return replace(eddy, coefficients=gradients @ response.T)


def rms_displacement(eddy: EddyCurrents, points: np.ndarray) -> float:
    """Root mean square displacement (mm) of world points (m, 3) over all volumes."""
    moved = [eddy.displacement(volume, points) for volume in range(len(eddy.coefficients))]
    return float(np.sqrt(3 * np.mean(np.square(moved))))


def joint_step(
    residual: torch.Tensor,
    prediction: Prediction,
    values: torch.Tensor,
    slopes: torch.Tensor,
    points: PointSet,
    transforms: np.ndarray,
    eddy: EddyCurrents,
    gradients: np.ndarray,
    prior: PosePrior,
    response_now: np.ndarray,
    expected: float,
    terms: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One Gauss-Newton step of R and all rigid poses together.

    Poses and gains are eliminated volume by volume (Schur complement), which leaves N R = s. Beside the three columns
    of R there are two for what goes with the size of the gradient: no eddy current does, but errors of predictions do.
    What all volumes of similar gradient share hardly shows in residuals (N is small against D, the same sums without
    predictions), and there errors of the model mislead most. With errors of s of covariance k² D and an expectation of
    R of inverse covariance D, R is (N' D^-1 N + k² D)^-1 N' D^-1 s.

    Parameters
    ----------
    residual : Tensor, (n, k)
        Volumes less predictions at `points`, a sample of the brain.
    prediction : Prediction
    values, slopes : Tensor, (n, k) and (n, k, 3)
        Predictions at `points` and their gradients, per mm RAS+ of the reference.
    transforms : ndarray, (n, 4, 4)
    eddy : EddyCurrents
        Of these volumes.
    gradients : ndarray, (n, 3)
        World RAS+, relative to the strongest.
    prior : PosePrior
        Where the head is expected.
    response_now : ndarray, (10, 3)
        R that volumes were read with.
    expected : float
        Size of eddy currents, root mean square displacement in mm; k is 0.025 mm over this.
    terms : int
        How many of the ten terms may be used.

    Returns
    -------
    response : ndarray, (10, 3)
        To be taken off R, mm.
    moves : ndarray, (n, 6)
        Steps of the poses, for `align.moved_by`.

    References
    ----------
    Andersson & Sotiropoulos 2016, doi 10.1016/j.neuroimage.2015.10.019 (displacements that follow the gradient).
    """
    scale = 1.4826 * residual.abs().median(dim=1).values.clamp(min=1e-9)
    weight = (FREEDOM + 1) / (FREEDOM + (residual / scale[:, None]) ** 2) / scale[:, None] ** 2
    steep, spread = _bending(values, slopes, points, transforms, eddy)
    size = np.linalg.norm(gradients, axis=1)[:, None]
    played_out = np.hstack([gradients, size, size**2])  # what goes with the size alone is no eddy current
    g = torch.as_tensor(played_out, dtype=steep.dtype, device=steep.device)[:, None, :, None]
    columns = []
    for bent in (steep + spread / 2, steep + spread):
        played = (bent[:, :terms, None, :] * g).flatten(1, 2)
        columns.append(played - prediction.change(played, values[:, None]))
    full = torch.bmm(played * weight[:, None], played.transpose(1, 2)).sum(0).cpu().numpy().astype(float)
    world = torch.as_tensor(points.world, device=slopes.device).expand_as(slopes)
    own = torch.cat([torch.linalg.cross(world, slopes), slopes, values[..., None]], dim=2).transpose(1, 2)
    tests = torch.cat([own, columns[0]], dim=1) * weight[:, None]
    rows = torch.cat([own, columns[1], residual[:, None]], dim=1)
    sums = torch.bmm(tests, rows.transpose(1, 2)).cpu().numpy().astype(float)
    inner, mixed = sums[:, :7, :7], sums[:, :7, 7:]
    add_pose_prior(inner, mixed[:, :, -1], transforms, prior, points, np.ones(len(sums)))
    inner = inner + 1e-9 * np.trace(inner, axis1=1, axis2=2)[:, None, None] * np.eye(7)
    alone = np.linalg.solve(inner, mixed)
    left = (sums[:, 7:, 7:] - sums[:, 7:, :7] @ alone).sum(axis=0)
    normal, side = left[:, :-1], left[:, -1]
    full += 1e-6 * np.diag(np.diag(full)) + 1e-9 * np.trace(full) * np.eye(len(full))
    sure = normal.T @ np.linalg.inv(full)  # what predictions hide of a response, they also make errors in
    response_prior = (MISLED_MM / expected) ** 2 * full
    now = np.pad(response_now[:terms], ((0, 0), (0, 2))).ravel()
    found = np.linalg.solve(sure @ normal + response_prior, sure @ side + response_prior @ now)
    response = np.zeros((10, 3))
    response[:terms] = found.reshape(terms, 5)[:, :3]
    return response, (alone[:, :, -1] - alone[:, :, :-1] @ found)[:, :6]


def _bending(
    values: torch.Tensor, slopes: torch.Tensor, points: PointSet, transforms: np.ndarray, eddy: EddyCurrents
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives of volumes by the coefficients of their displacement in mm: of state and of density, (n, 10, k)."""
    world = points.world.astype(float) + points.centre
    scanner = np.einsum("nab,kb->nka", transforms[:, :3, :3], world) + transforms[:, None, :3, 3]
    s = np.moveaxis((scanner - eddy.centre) @ eddy.axes / EDDY_MM, 1, 2)
    terms, rises = eddy_polynomial(torch.as_tensor(s, dtype=torch.float32, device=values.device), eddy.along)
    observed = np.einsum("nba,b->na", transforms[:, :3, :3], eddy.axes[:, eddy.along])  # the axis as the head sees it
    steep = torch.einsum("nka,na->nk", slopes, torch.as_tensor(observed, dtype=torch.float32, device=values.device))
    return (terms * steep).transpose(0, 1), (rises * values / EDDY_MM).transpose(0, 1)


def eddy_step(
    dwi: DWI,
    level: PyramidLevel,
    state: MotionState,
    observed: torch.Tensor,
    predicted: Prediction,
    prior: PosePrior,
    terms: int,
) -> MotionState:
    """One step of the eddy currents' response to the gradient, and of all poses with it.

    Parameters
    ----------
    dwi : DWI
    level : PyramidLevel
        Of voxels above `QUIET_MM`.
    state : MotionState
        With `eddy`.
    observed : Tensor, (n, m)
        Diffusion-weighted volumes at the points of `level`.
    predicted : Prediction
        Of those volumes.
    prior : PosePrior
        Of all volumes.
    terms : int
        From `TERMS`.
    """
    assert state.eddy is not None
    index = np.flatnonzero(~dwi.is_b0)
    change, moves = _sampled_step(dwi, level, state, observed, predicted, prior, terms, state.eddy, state.response)
    response, out = state.response - change, state.transforms.copy()
    out[index], _ = moved_by(out[index], moves, level.points)
    eddy = _with_response(state.eddy, response, _gradients(dwi))
    return replace(state, transforms=out, response=response, eddy=eddy)


def _sampled_step(
    dwi: DWI,
    level: PyramidLevel,
    state: MotionState,
    observed: torch.Tensor,
    predicted: Prediction,
    prior: PosePrior,
    terms: int,
    eddy: EddyCurrents,
    response: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`joint_step` on a sample of the brain."""
    index = np.flatnonzero(~dwi.is_b0)
    step = max(1, len(level.points) // SAMPLE)
    slopes = [target_gradients(row[None], level.points)[0, ::step] for row in predicted.values]
    values = predicted.values[:, ::step].contiguous()
    return joint_step(
        observed[:, ::step] - values,
        predicted,
        values,
        torch.stack(slopes),
        level.points.every(step),
        state.transforms[index],
        eddy.take(index),
        _gradients(dwi)[index],
        PosePrior(prior.poses[index], prior.jitter),
        response,
        max(0.1, rms_displacement(eddy, level.probe_points())) if response.any() else 0.5,
        terms,
    )


def _gradients(dwi: DWI) -> np.ndarray:
    """World RAS+, relative to the strongest; zero at b=0."""
    return np.where(dwi.is_b0[:, None], 0, dwi.q) / np.sqrt(dwi.bvals.max())


def kept_fraction(found: float, null: float, count: int) -> float:
    """How much of eddy currents found with `count` directions is kept, 0 to 1.

    Parameters
    ----------
    found : float
        Their size in mm.
    null : float
        Mean square (mm²) of what is found along axes where there are none.
    count : int
    """
    if count < FEW:
        null *= BY_CHANCE
    return max(0.0, 1 - null / max(found, 1e-9) ** 2)


def discount_chance(
    dwi: DWI,
    level: PyramidLevel,
    state: MotionState,
    observed: torch.Tensor,
    predicted: Prediction,
    prior: PosePrior,
    terms: int,
) -> MotionState:
    """Eddy currents as far as they are more than what would be found along the axes where there are none.

    Errors of the predictions look like a response to the gradient along any axis; eddy currents act along one. Where
    directions are few, movements of the head do so as well, so that only what chance hardly brings about is kept.
    Parameters as for `eddy_step`.
    """
    assert state.eddy is not None
    gradients, few = _gradients(dwi), level.probe_points()
    found = rms_displacement(state.eddy, few)
    null = 0.0
    for axis in {0, 1, 2} - {state.eddy.along}:
        other = replace(state.eddy, along=axis)
        change, _ = _sampled_step(dwi, level, state, observed, predicted, prior, terms, other, np.zeros((10, 3)))
        null += 0.5 * rms_displacement(_with_response(other, change, gradients), few) ** 2
    share = kept_fraction(found, null, len(observed))
    log.info("motion: eddy currents of %.3f mm, %.3f mm by chance", found, null**0.5)
    response = share * state.response
    return replace(state, response=response, eddy=_with_response(state.eddy, response, gradients))
