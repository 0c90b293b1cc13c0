"""Head motion while a volume is acquired: moves within volumes and steady motion, as a pose for each slice."""

from __future__ import annotations

import numpy as np

from dsiprep.ops.image.affine import point_displacement, rigid_matrix, rigid_parameters
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.phantom.slice_acquisition import REPETITION_TIME, slice_timing

MOVE = (3.0, 9.0)  # mm, and degrees
LONGEST_RAMP = 0.5  # of a repetition time; half of the moves are sudden
TRIALS = 8  # of each move, of which the one that ends nearest to the resting pose is taken
PERIODS = (17.0, 41.0)  # volumes; range of the periods of steady motion about and along the six axes


def slice_poses(
    poses: np.ndarray,
    slices: int,
    points: np.ndarray,
    settings: PhantomSettings,
    rng: np.random.Generator,
) -> np.ndarray:
    """Pose of the head in every slice of every volume.

    Parameters
    ----------
    poses : ndarray, (n, 4, 4)
        From head points to scanner points, to which the motion within volumes is added.
    slices : int
        Number of slices per volume.
    points : ndarray, (m, 3)
        Brain points in the scanner, by which steady motion is scaled; rotations are about their mean.
    settings : PhantomSettings
    rng : Generator

    Returns
    -------
    ndarray, (n, slices, 4, 4)
    """
    start = np.asarray(slice_timing(slices)) / REPETITION_TIME
    time = np.arange(len(poses))[:, None] + start  # in volumes
    added = np.zeros((*time.shape, 6))
    centre = points.mean(axis=0)
    if settings.moved_within:
        added += _moves(time, settings.moved_within, rng)
    if settings.steady:
        path = _steady(time, rng)
        volumes = rigid_matrix(path[:, 0], centre)
        speed = point_displacement(volumes[1:], volumes[:-1], points).mean()
        added += path * (settings.steady / speed)
    parameters = rigid_parameters(poses @ np.linalg.inv(poses[0]), centre)
    return rigid_matrix(parameters[:, None] + added, centre) @ poses[0]


def moving_volumes(poses: np.ndarray) -> np.ndarray:
    """Volumes whose slices (n, slices, 4, 4) do not all have the same pose, (n,) bool."""
    return np.ptp(poses, axis=1).max(axis=(1, 2)) > 1e-9


def _moves(time: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Motion parameters (n, slices, 6) of a head that rests between moves, each of which begins within a volume."""
    count = len(time)
    chosen = np.sort(1 + rng.choice(count - 1, round(fraction * (count - 1)), replace=False))
    added, here = np.zeros((*time.shape, 6)), np.zeros(6)
    for volume in chosen:
        step = _nearest_to_rest(here, rng)
        begin = rng.uniform(0.05, 0.95) * np.ptp(time[0])
        ramp = rng.uniform(0.05, LONGEST_RAMP) * (rng.random() < 0.5)
        done = np.clip((time - volume - begin) / max(ramp, 1e-9), 0, 1)
        added += done[..., None] * step
        here = here + step
    return added


def _nearest_to_rest(here: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random rotation (rad) and translation (mm) from the parameters `here`, (6,)."""
    axes = rng.normal(size=(TRIALS, 2, 3))
    axes *= rng.uniform(*MOVE, (TRIALS, 2, 1)) / np.linalg.norm(axes, axis=2, keepdims=True)
    steps = np.concatenate([np.deg2rad(axes[:, 0]), axes[:, 1]], axis=1)
    distance = np.linalg.norm((here + steps) * ([180 / np.pi] * 3 + [1] * 3), axis=1)
    return steps[np.argmin(distance)]


def _steady(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sinusoidal parameters (n, slices, 6) of unit speed in mm and degrees a volume."""
    periods, phases = rng.uniform(*PERIODS, 6), rng.uniform(0, 2 * np.pi, 6)
    angle = 2 * np.pi * time[..., None] / periods + phases
    return np.sin(angle) * periods / (2 * np.pi) * ([np.pi / 180] * 3 + [1] * 3)
