"""Replacement of outlier slices by the prediction from the other volumes."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.dwi import DWI
from dsiprep.ops.image.point_set import PointSet
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pyramid import PyramidLevel

__all__ = ["slice_replacements"]

INVERSE_ITERATIONS = 3  # of the fixed-point inversion of the eddy-current displacement


def slice_replacements(dwi: DWI, level: PyramidLevel, state: MotionState, predicted: torch.Tensor) -> torch.Tensor:
    """Replacements of the outlier slices of `state`, with the brain taken from the prediction.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    level : PyramidLevel
        On the voxels of `dwi`.
    state : MotionState
    predicted : Tensor, (n, m)
        Predictions of all volumes at the points of `level`.

    Returns
    -------
    Tensor, (r, a, b)
        In the order of `numpy.argwhere(state.outlier_slices)`; with the gain, pose and eddy-current displacement of
        the volume. Outside the brain, values are those acquired.
    """
    axis, points = state.slice_axis, level.points
    inside = _image(points, 1.0)
    out = []
    outliers = np.zeros((len(dwi), 0), bool) if state.outlier_slices is None else state.outlier_slices
    for volume in np.flatnonzero(outliers.any(axis=1)):
        kept = ~state.outlier_points(int(volume), points)
        observed = level.sample(np.array([volume]), state)[0].cpu().numpy()
        target = predicted[volume].cpu().numpy()
        gain = float(observed[kept] @ target[kept] / max(target[kept] @ target[kept], 1e-12))
        image = _image(points, gain * target)
        for number in np.flatnonzero(outliers[volume]):
            acquired = dwi.data[int(volume)].select(axis, int(number)).cpu().numpy()
            out.append(_replaced_slice(acquired, image, inside, state, int(volume), int(number)))
    shape = [n for a, n in enumerate(dwi.grid.shape) if a != axis]
    return torch.from_numpy(np.stack(out)) if out else torch.zeros(0, *shape)


def _image(points: PointSet, values: np.ndarray | float) -> np.ndarray:
    """Image on the grid of the points with the given values there, and zero elsewhere."""
    image = np.zeros(points.grid.shape, np.float32)
    image[tuple(points.voxels.astype(int).T)] = values
    return image


def _replaced_slice(
    acquired: np.ndarray, image: np.ndarray, inside: np.ndarray, state: MotionState, volume: int, number: int
) -> np.ndarray:
    """Slice `number` of a volume: the predicted `image` where `inside` covers it, the acquired values elsewhere."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in acquired.shape], indexing="ij"), axis=-1)
    voxels = np.insert(index, state.slice_axis, number, axis=-1)
    world = state.grid.to_world(voxels)
    jacobian = np.ones(acquired.shape)
    if state.eddy is not None:
        undisplaced = world.copy()
        for _ in range(INVERSE_ITERATIONS):
            undisplaced = world - state.eddy.displacement(volume, undisplaced)
        shifted = undisplaced + state.eddy.axes[:, state.eddy.along]  # by 1 mm, for the derivative
        difference = state.eddy.displacement(volume, shifted) - state.eddy.displacement(volume, undisplaced)
        jacobian, world = 1 + difference @ state.eddy.axes[:, state.eddy.along], undisplaced
    to_reference = np.linalg.inv(state.transforms[volume])
    at = np.moveaxis(state.grid.to_voxels(world @ to_reference[:3, :3].T + to_reference[:3, 3]), -1, 0)
    coverage = map_coordinates(inside, at, order=1)
    value = map_coordinates(image, at, order=1) / np.maximum(coverage, 0.5)
    return np.where(coverage > 0.5, value / jacobian, acquired).astype(np.float32)
