"""Registration of diffusion-weighted volumes to their predictions, and restarts of volumes that fit poorly."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.motion.gauss_newton import align, sample_volumes, unknown_fit
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pose_prior import PosePrior, negative_log_prior, resting_poses
from dsiprep.ops.motion.poses import relaxed_poses
from dsiprep.ops.motion.pyramid import PyramidLevel, chunks
from dsiprep.ops.qspace.prediction import Prediction

__all__ = ["register_to_predictions", "rest_lost_volumes", "restart_poor_fits"]

log = logging.getLogger("dsiprep")
STEPS_PER_ROUND = 3  # Gauss-Newton steps
SETTLED_MM = 0.5  # mean movement in a round below which the scale of the residual serves the next round as well
RESTART_STEPS = 12  # Gauss-Newton steps from each alternative start
RESTART_DEGREES = 10.0  # rotations from the resting pose that are tried, about each axis and in both directions
POOR_FIT_WEIGHT = 0.45  # volume weight below which other starts are tried: a residual 1.5 times the typical one


def register_to_predictions(
    level: PyramidLevel,
    volumes: np.ndarray,
    state: MotionState,
    predicted: Prediction,
    affine: bool,
    prior: PosePrior | None,
) -> MotionState:
    """Move volumes towards their predictions, by the fraction of the estimated step for which rounds converge.

    Parameters
    ----------
    level : PyramidLevel
    volumes : ndarray, (n,)
        Indices of the volumes that `predicted` is of.
    state : MotionState
        Of all volumes.
    predicted : Prediction
    affine : bool
        12 degrees of freedom instead of 6; affine steps are always applied in full.
    prior : PosePrior or None
        Of all volumes.
    """
    transforms, fit = state.transforms.copy(), unknown_fit(len(volumes))
    for part, some in chunks(volumes):
        aligned = align(
            level.take(some, state.eddy_of(some)),
            level.points,
            predicted.values[part],
            transforms[some],
            affine=affine,
            steps=STEPS_PER_ROUND,
            prior=None if prior is None else prior.take(some),
            fit=None if state.fit is None else state.fit.take(part),
        )
        moved = point_displacement(transforms[some], aligned.transforms, level.probe_points()).mean(1)
        transforms[some] = aligned.transforms
        fit.gain[part] = aligned.fit.gain
        fit.scale[part] = np.where(moved < SETTLED_MM, aligned.fit.scale, np.inf)
    fraction = 1.0 if affine else predicted.relaxation
    if fraction < 1:
        centre = level.points.centre
        transforms[volumes] = relaxed_poses(state.transforms[volumes], transforms[volumes], fraction, centre)
    return replace(state, transforms=transforms, fit=fit)


def restart_poor_fits(
    dwi: DWI, level: PyramidLevel, state: MotionState, predicted: torch.Tensor, weights: np.ndarray
) -> MotionState:
    """Register volumes that fit poorly from several starting poses, and keep the result with the smallest residual.

    Parameters
    ----------
    dwi : DWI
    level : PyramidLevel
    state : MotionState
    predicted : Tensor, (n, m)
        Predictions of the diffusion-weighted volumes.
    weights : ndarray, (n,)
        Their `volume_weights`.
    """
    poor = np.flatnonzero(weights < POOR_FIT_WEIGHT)
    if not len(poor):
        return state
    transforms = state.transforms.copy()
    volumes = np.flatnonzero(~dwi.is_b0)[poor]
    targets = predicted[torch.as_tensor(poor, device=predicted.device)]
    moving = level.take(volumes)
    best = np.full(len(poor), np.inf)
    for start in _starting_poses(transforms, volumes, level.points.centre):
        aligned = align(moving, level.points, targets, start, steps=RESTART_STEPS)
        better = aligned.fit.scale < 0.98 * best  # keep the earlier start unless a later one is clearly better
        best[better] = aligned.fit.scale[better]
        transforms[volumes[better]] = aligned.transforms[better]
    log.info("motion: restarted %d poorly fitting volumes from other poses", len(poor))
    return state.with_transforms(transforms)


def rest_lost_volumes(
    level: PyramidLevel, volumes: np.ndarray, state: MotionState, predicted: torch.Tensor, prior: PosePrior
) -> MotionState:
    """Return volumes that lost signal as a whole to the resting pose, unless their data speak for another.

    Where little signal is left, steps follow the noise, and far from the resting pose the prior hardly pulls. Of the
    current and the resting pose, both registered with the prior, the one with the larger s² / (2 v) + log(prior) is
    kept: s is the projection of the volume on its prediction (less their means, the prediction of unit length), v the
    variance of the noise. Unlike the residual, s² does not grow where interpolation smooths the noise.

    Parameters
    ----------
    level : PyramidLevel
    volumes : ndarray, (n,)
        Indices of the volumes that `predicted` is of.
    state : MotionState
    predicted : Tensor, (n, m)
    prior : PosePrior
        Of all volumes.
    """
    rows = np.flatnonzero(state.dropout.whole[volumes]) if state.dropout is not None else np.zeros(0, int)
    if not len(rows):
        return state
    transforms, lost = state.transforms.copy(), volumes[rows]
    moving, expected = level.take(lost, state.eddy_of(lost)), prior.take(lost)
    targets = predicted[torch.as_tensor(rows, device=predicted.device)]
    poses, explained, noise = [], [], []
    for start in (expected.poses, transforms[lost]):
        poses.append(align(moving, level.points, targets, start, steps=RESTART_STEPS, prior=expected).transforms)
        observed = sample_volumes(moving, level.points, poses[-1], torch.zeros_like(targets))
        one, two = (values - values.mean(1, keepdim=True) for values in (observed, targets))
        square = ((one * two).sum(1) ** 2 / two.square().sum(1).clamp(min=1e-12)).cpu().numpy()
        explained.append(square)
        noise.append((one.square().sum(1).cpu().numpy() - square) / len(level.points))
    scale = 2 * np.maximum(*noise) + 1e-12  # of the two, the less smooth one is closer to the noise
    resting, current = (
        square / scale - negative_log_prior(pose, expected, level.points)
        for square, pose in zip(explained, poses, strict=True)
    )
    transforms[lost] = np.where((current > resting)[:, None, None], poses[1], poses[0])
    return state.with_transforms(transforms)


def _starting_poses(transforms: np.ndarray, volumes: np.ndarray, centre: np.ndarray) -> list[np.ndarray]:
    """Starts, each (n, 4, 4), for some volumes.

    In this order: their current poses, no movement, their resting poses, the current pose of the volume before each,
    and the resting poses rotated about each axis in both directions.
    """
    resting = resting_poses(transforms, centre)[volumes]
    identity = np.tile(np.eye(4), (len(volumes), 1, 1))
    angle = np.deg2rad(RESTART_DEGREES)
    rotations = [np.eye(6)[axis] * sign * angle for axis in range(3) for sign in (1, -1)]
    starts = [transforms[volumes], identity, resting, transforms[np.maximum(volumes - 1, 0)]]
    return starts + [resting @ rigid_matrix(rotation, centre) for rotation in rotations]
