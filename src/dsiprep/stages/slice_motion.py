"""Slice-to-volume motion: a pose for each shot of the volumes during which the head moved."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.motion import Motion, SliceMotion
from dsiprep.data.results import Acquired, Distortion
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import mean_rigid
from dsiprep.ops.image.point_set import point_set
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.motion.b0_alignment import mean_b0
from dsiprep.ops.motion.carried_field import carried_field
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.outlier_slices import MIN_LOSS
from dsiprep.ops.motion.pyramid import FULL, PyramidLevel
from dsiprep.ops.motion.series_prediction import predict_series
from dsiprep.ops.motion.shot_poses import (
    ANNEALED_MM,
    SETTLED,
    STEP_MM,
    ShotPoses,
    explained,
    first_equations,
    follow_head,
    settled,
    single_poses,
    with_misfit,
    without_excursions,
)
from dsiprep.ops.motion.slice_equations import PredictedSlices
from dsiprep.ops.motion.slice_reconstruction import sample_density
from dsiprep.ops.motion.slice_samples import in_one_pose, volume_in_mean_pose
from dsiprep.settings import MotionSettings

METHODS = {
    "slices": (
        "Volumes during which the head moved were given a pose for each shot (slices excited together), in the order "
        "of acquisition [@andersson2017; @christiaens2021]: the slices, as acquired, were registered to the prediction "
        "of the volume by robust Gauss-Newton steps, jointly for all shots of the series under a random walk of the "
        "head with Student t distributed steps and a smooth, even function of the gradient that is not motion. The "
        "off-resonance field, as far as it was estimated, turned with the head, the phase-encoding axis did not. "
        "Predictions were renewed with the corrected volumes. One pose was kept unless the odds, with all poses "
        "integrated out, spoke clearly for more. Each of these volumes was put together in its mean "
        "pose, with distortion and eddy currents, by regularised least squares; where no slice was acquired, the "
        "prediction was taken. Its b-vector was turned by the mean of its rotations."
    ),
}
__all__ = ["METHODS", "choose_volumes", "follow_slices", "follows_slices", "moves_b0", "wants_slices"]

log = logging.getLogger("dsiprep")
CLEAR = (30.0, 0.2)  # logarithm of the odds, and mm between poses, from which on a volume has a pose for each shot
LINKED = (20.0, 0.08)  # the same for a neighbour of such a volume
ROUNDS = 3  # of prediction and registration
STEPS = 2  # Gauss-Newton steps in each round after the first
LEAST_SAMPLED = 0.3  # weight of samples at a point, of which the prediction takes the place below
SPARSE = 0.5  # density of samples around a voxel below which its prediction is kept


def wants_slices(settings: MotionSettings) -> bool:
    """Whether motion within volumes is asked for, and possible if slice times are known."""
    return settings.slices != "off" and settings.method != "none" and settings.transform == "Rigid"


def follows_slices(acquired: Acquired, settings: MotionSettings) -> bool:
    """Whether motion within volumes is estimated.

    Raises
    ------
    InputError
        If it was asked for and the order of acquisition is not known.
    """
    if not wants_slices(settings):
        return False
    known = bool(acquired.multiband) and acquired.slice_axis is not None
    if settings.slices == "on" and not known:
        raise InputError(
            "--slice-motion on: the sidecars do not give one SliceTiming, the same in all runs, with a time for each "
            "slice along SliceEncodingDirection; add it, or choose --slice-motion auto, which then keeps one pose for "
            "each volume"
        )
    return known


def follow_slices(
    dwi: DWI,
    mask: Volume,
    motion: Motion,
    shots: tuple[tuple[int, ...], ...],
    settings: MotionSettings,
    distortion: Distortion | None = None,
    blip: int = 0,
) -> Motion:
    """Estimate the pose of the head in each shot, where it moved while a volume was acquired.

    Parameters
    ----------
    dwi : DWI
        The series of `motion`, as acquired.
    mask : Volume
        Rough brain mask on the grid of `dwi`.
    motion : Motion
        With one pose for each volume.
    shots : tuple of tuple of int
        Slices of each shot, in order of acquisition.
    settings : MotionSettings
        `slices` "on" gives every volume a pose for each shot, "auto" those that clearly need it.
    distortion : Distortion, optional
        Its field turns with the head and displaces along an axis that does not. Without it, what a field could do in a
        turned head is no evidence of motion.
    blip : int
        Of the series in `distortion`.

    Returns
    -------
    Motion
        `slices` holds the poses of the shots. If a volume moved within itself, `transforms` are the mean poses; if
        none did, they are unchanged.
    """
    if motion.model not in ("3dSHORE", "tensor"):
        note = "Motion within volumes was not estimated: there are too few directions to predict volumes."
        return replace(motion, notes=(*motion.notes, note)) if settings.slices == "on" else motion
    level = PyramidLevel(dwi.data, dwi.grid, point_set(mask.data, dwi.grid), FULL)
    lost = np.zeros(motion.slice_z.shape, bool) if motion.outlier_slices is None else motion.outlier_slices
    field = None if distortion is None else carried_field(distortion.fields[blip], distortion.poses[blip], dwi.grid)
    observed = level.sample(np.arange(len(dwi)), _state(dwi, motion, motion.transforms))
    predicted = predict_series(dwi, observed, motion.transforms, settings.model).values
    slices = PredictedSlices(dwi, level.points, predicted, motion.eddy, motion.slice_axis, shots, lost, field)
    single = single_poses(motion.transforms, slices)
    slices, state = _with_turned(level, slices, single, motion, settings.model)
    state, equations = first_equations(slices, state)
    state = with_misfit(state, equations, dwi)
    evidence, apart = explained(slices, state, equations)
    chosen = np.ones(len(dwi), bool) if settings.slices == "on" else choose_volumes(evidence, apart, dwi.run)
    state = replace(state, moving=chosen)
    log.info("motion within volumes: %d of %d volumes", state.moving.sum(), len(dwi))
    if not state.moving.any():
        return replace(motion, slices=_result(slices, single, evidence, lost, motion))
    transforms = motion.transforms
    for number in range(ROUNDS):
        steps = (*ANNEALED_MM, STEP_MM, STEP_MM) if number == 0 else (STEP_MM,) * STEPS
        state = without_excursions(slices, follow_head(slices, state, steps, SETTLED if number == 0 else 0))
        transforms = _mean_poses(state)
        observed = _sample(level, slices, state, _state(dwi, motion, transforms))
        slices = slices.with_predictions(predict_series(dwi, observed, transforms, settings.model).values)
    moved = _without_false_loss(replace(motion, transforms=transforms), lost, state)
    lost = lost if moved.outlier_slices is None else moved.outlier_slices
    left_out = lost if settings.outliers == "replace" else np.zeros_like(lost)
    moved = replace(moved, slices=_result(slices, state, evidence, left_out, moved))
    return _with_reference(dwi, moved, distortion, blip) if (state.moving & dwi.is_b0).any() else moved


def _with_turned(
    level: PyramidLevel, slices: PredictedSlices, state: ShotPoses, motion: Motion, model: str
) -> tuple[PredictedSlices, ShotPoses]:
    """Volumes in which the head was turned registered again, with its field, and what they are predicted to be.

    Poses that were estimated without the field make up for a part of what it does, the same in all slices.
    """
    turned = slices.is_bent(state.poses[:, 0])
    if not turned.any():
        return slices, state
    state = settled(slices, state, np.flatnonzero(turned))
    transforms = state.poses[:, 0]
    observed = _sample(level, slices, state, _state(slices.dwi, motion, transforms))
    return slices.with_predictions(predict_series(slices.dwi, observed, transforms, model).values), state


def moves_b0(acquired: Acquired, motion: Motion) -> bool:
    """Whether the b=0 reference of a blip changed, because the head moved within a b=0 volume."""
    return motion.slices is not None and bool((motion.slices.moving & acquired.dwi.is_b0[motion.volumes]).any())


def _without_false_loss(motion: Motion, lost: np.ndarray, state: ShotPoses) -> Motion:
    """Copy in which slices of moving volumes that only seemed to have lost signal, at one wrong pose, are intact."""
    some = ~lost.all(axis=1)
    typical = np.full((len(lost), 1), np.inf)  # volumes that were lost as a whole stay lost
    typical[some] = np.nanmedian(np.where(lost, np.nan, state.gain)[some], axis=1, keepdims=True)
    intact = state.moving[:, None] & (state.gain >= (1 - MIN_LOSS) * typical)
    still = lost & ~intact
    kept = None if motion.replacements is None else motion.replacements[torch.as_tensor(still[lost])]
    return replace(motion, outlier_slices=still, replacements=kept)


def _with_reference(dwi: DWI, motion: Motion, distortion: Distortion | None, blip: int) -> Motion:
    """Copy with the mean of the b=0 volumes in their mean poses as reference."""
    assert motion.slices is not None
    rows = np.flatnonzero(dwi.is_b0)
    still, transforms = dwi.select(rows), motion.transforms[rows].copy()
    own = replace(motion, volumes=np.arange(len(dwi)))
    bent = (np.eye(4), None) if distortion is None else (distortion.poses[blip], distortion.fields[blip])
    for number, row in enumerate(rows):
        if motion.slices.moving[row]:
            still.data[number] = volume_in_mean_pose(dwi.data[int(row)], dwi.grid, own, int(row), *bent)
        if motion.eddy is not None:  # the shift of the field, all that b=0 volumes have of it
            along = motion.eddy.axes[:, motion.eddy.along]
            transforms[number, :3, 3] += motion.eddy.coefficients[row, 0] * along
    reference = mean_b0(still, transforms)
    return replace(motion, dwiref=reference, mask=brain_mask_b0(reference))


def choose_volumes(odds: np.ndarray, apart: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Volumes that clearly need more than one pose, and neighbours of the same run that probably do, (n,) bool.

    Parameters
    ----------
    odds, apart : ndarray, (n,)
        From `explained`.
    run : ndarray, (n,)
    """
    clear = (odds > CLEAR[0]) & (apart > CLEAR[1])
    likely = (odds > LINKED[0]) & (apart > LINKED[1])
    follows = run[1:] == run[:-1]
    while True:
        beside = np.append(False, clear[:-1] & follows) | np.append(clear[1:] & follows, False)
        more = clear | (likely & beside)
        if (more == clear).all():
            return clear
        clear = more


def _state(dwi: DWI, motion: Motion, transforms: np.ndarray) -> MotionState:
    none = np.zeros((10, 3)), np.zeros((len(dwi), 4))
    return MotionState(transforms, motion.eddy, *none, None, motion.slice_axis, dwi.grid)


def _mean_poses(state: ShotPoses) -> np.ndarray:
    """One pose for each volume, (n, 4, 4)."""
    means = state.poses[:, 0].copy()
    for volume in np.flatnonzero(state.moving):
        means[volume] = mean_rigid(state.poses[volume])
    return means


def _sample(level: PyramidLevel, slices: PredictedSlices, state: ShotPoses, single: MotionState) -> torch.Tensor:
    """All volumes at the points, (n, m), by the poses of their shots where they have them, and the field."""
    observed = level.sample(np.arange(len(state.moving)), single, slices.predicted)
    own = np.flatnonzero(state.moving | slices.is_bent(state.poses[:, 0]))
    values, weight = slices.samples(own, state.poses[own])
    rows = torch.as_tensor(own)
    observed[rows] = torch.where(weight > LEAST_SAMPLED, values, slices.predicted[rows])
    return observed


def _result(
    slices: PredictedSlices, state: ShotPoses, evidence: np.ndarray, left_out: np.ndarray, motion: Motion
) -> SliceMotion:
    gaps, values = [np.zeros((0, 4), int)], [np.zeros(0, np.float32)]
    for volume in np.flatnonzero(state.moving):
        voxels, predicted = _gaps(slices, state, int(volume), left_out[volume], motion)
        gaps.append(np.insert(voxels, 0, volume, axis=1))
        values.append(predicted)
    return SliceMotion(
        state.poses, slices.shots, state.moving, evidence, left_out, np.concatenate(gaps), np.concatenate(values)
    )


def _gaps(
    slices: PredictedSlices, state: ShotPoses, volume: int, left_out: np.ndarray, motion: Motion
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (g, 3) of brain with few samples around them in the mean pose of a volume, and their prediction (g,)."""
    grid, axis = slices.dwi.grid, motion.slice_axis
    voxels = np.argwhere(np.ones(grid.shape, bool))
    voxels = voxels[~left_out[voxels[:, axis]]]
    poses = state.poses[volume][slices.shot_of]
    points = in_one_pose(voxels, grid, poses, axis, motion.transforms[volume])  # displacements hardly move gaps
    points = points[((points >= 0) & (points < np.array(grid.shape) - 1)).all(axis=1)]
    sparse = sample_density(points, grid.shape) < SPARSE
    found = np.argwhere(sparse)
    values, inside = slices.prediction_at(
        volume, found, motion.transforms[volume], float(np.median(state.gain[volume]))
    )
    return found[inside], values[inside]
