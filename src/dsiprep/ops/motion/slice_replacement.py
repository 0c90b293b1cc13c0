"""Replacement of outlier slices by the prediction from the other volumes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid
from dsiprep.ops.image.point_set import PointSet, average_blocks
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pyramid import PyramidLevel
from dsiprep.ops.motion.volume_agreement import MIN_WEIGHT, volume_weights

__all__ = ["remove_loss", "slice_replacements"]

INVERSE_ITERATIONS = 3  # of the fixed-point inversion of the eddy-current displacement


def slice_replacements(dwi: DWI, level: PyramidLevel, state: MotionState, predicted: torch.Tensor) -> torch.Tensor:
    """Replacements of the outlier slices of `state`, with the brain taken from the prediction.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    level : PyramidLevel
    state : MotionState
    predicted : Tensor, (n, m)
        Predictions of all volumes at the points of `level`.

    Returns
    -------
    Tensor, (r, a, b)
        In the order of `numpy.argwhere(state.dropout.lost)`; with the gain, pose and eddy-current displacement of
        the volume. Outside the brain, values are those acquired.
    """
    lost = np.zeros((len(dwi), 0), bool) if state.dropout is None else state.dropout.lost
    out = []
    for volume in np.flatnonzero(lost.any(axis=1)):
        out += _replaced_slices(dwi, level.points, state, int(volume), predicted[volume])
    shape = [n for a, n in enumerate(dwi.grid.shape) if a != state.slice_axis]
    return torch.from_numpy(np.stack(out)) if out else torch.zeros(0, *shape)


def remove_loss(
    dwi: DWI,
    level: PyramidLevel,
    state: MotionState,
    volumes: np.ndarray,
    observed: torch.Tensor,
    predicted: torch.Tensor,
) -> tuple[PyramidLevel, np.ndarray]:
    """Fill outlier slices with the prediction, and weigh volumes.

    Volumes that were lost as a whole count for nothing in the prediction of others, but keep their data, which their
    poses rest on.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    level : PyramidLevel
    state : MotionState
    volumes : ndarray, (n,)
    observed : Tensor, (n, m)
        These volumes at the points of `level`; changed in place where signal was lost.
    predicted : Tensor, (n, m)

    Returns
    -------
    level : PyramidLevel
        With the filled volumes.
    weights : ndarray, (n,)
        From `volume_weights`.
    """
    level = _filled(dwi, level, state, volumes, predicted)
    whole = np.zeros(len(volumes), bool) if state.dropout is None else state.dropout.whole[volumes]
    partly = np.isin(volumes, list(level.filled))
    if partly.any():
        rows = torch.as_tensor(np.flatnonzero(partly), device=observed.device)
        observed[rows] = level.sample(volumes[partly], state, predicted[rows])
    rows = torch.as_tensor(np.flatnonzero(whole), device=observed.device)
    observed[rows] = predicted[rows]
    weights = volume_weights(observed, predicted, dwi.bvals[volumes])
    return level, np.where(whole, MIN_WEIGHT, weights)


def _filled(
    dwi: DWI, level: PyramidLevel, state: MotionState, volumes: np.ndarray, predicted: torch.Tensor
) -> PyramidLevel:
    """Copy of a level in which the outlier slices of volumes are filled with the prediction.

    They are filled before slices are averaged or interpolated, so neighbours do not take on any of the loss. At the
    current pose, filled slices leave no residual, and the pose rests on the others. Volumes that were lost as a whole
    stay as they are.
    """
    filled = {}
    if state.dropout is not None:
        partly = state.dropout.lost.any(axis=1) & ~state.dropout.whole
        for row in np.flatnonzero(partly[volumes]):
            volume = int(volumes[row])
            data = dwi.data[volume].clone()
            slices = _replaced_slices(dwi, level.points, state, volume, predicted[row])
            for number, values in zip(np.flatnonzero(state.dropout.lost[volume]), slices, strict=True):
                data.select(state.slice_axis, int(number)).copy_(torch.from_numpy(values))
            filled[volume] = average_blocks(data[None], dwi.grid, level.spacing)[0][0]
    return replace(level, filled=filled)


def _replaced_slices(
    dwi: DWI, points: PointSet, state: MotionState, volume: int, predicted: torch.Tensor
) -> list[np.ndarray]:
    """Replacements of the outlier slices of a volume, each (a, b), from its prediction (m,) at the points."""
    assert state.dropout is not None
    inside, image = _image(points, 1.0), _image(points, predicted.cpu().numpy())
    out = []
    for number in np.flatnonzero(state.dropout.lost[volume]):
        acquired = dwi.data[volume].select(state.slice_axis, int(number)).cpu().numpy()
        at, jacobian = _reference_voxels(points.grid, state, volume, int(number), acquired.shape)
        coverage = map_coordinates(inside, at, order=1)
        value = map_coordinates(image, at, order=1) / np.maximum(coverage, 0.5)
        value *= state.dropout.expected[volume, number] / jacobian
        out.append(np.where(coverage > 0.5, value, acquired).astype(np.float32))
    return out


def _image(points: PointSet, values: np.ndarray | float) -> np.ndarray:
    """Image on the grid of the points with the given values there, and zero elsewhere."""
    image = np.zeros(points.grid.shape, np.float32)
    image[tuple(points.voxels.astype(int).T)] = values
    return image


def _reference_voxels(
    reference: Grid, state: MotionState, volume: int, number: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of the reference in a slice of a volume, (3, a, b), and the Jacobian of its displacement, (a, b)."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    world = state.grid.to_world(np.insert(index, state.slice_axis, number, axis=-1))
    jacobian = np.ones(shape)
    if state.eddy is not None:
        undisplaced = world.copy()
        for _ in range(INVERSE_ITERATIONS):
            undisplaced = world - state.eddy.displacement(volume, undisplaced)
        shifted = undisplaced + state.eddy.axes[:, state.eddy.along]  # by 1 mm, for the derivative
        difference = state.eddy.displacement(volume, shifted) - state.eddy.displacement(volume, undisplaced)
        jacobian, world = 1 + difference @ state.eddy.axes[:, state.eddy.along], undisplaced
    to_reference = np.linalg.inv(state.transforms[volume])
    return np.moveaxis(reference.to_voxels(world @ to_reference[:3, :3].T + to_reference[:3, 3]), -1, 0), jacobian
