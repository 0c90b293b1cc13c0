"""Slices that lost their signal, as the other volumes say they should look."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.dwi import DWI
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pyramid import PyramidLevel

__all__ = ["slice_replacements"]


def slice_replacements(dwi: DWI, level: PyramidLevel, state: MotionState, predicted: torch.Tensor) -> torch.Tensor:
    """The lost slices of `state`, with the brain taken from the prediction.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    level : PyramidLevel
        On the voxels of `dwi`.
    state : MotionState
    predicted : Tensor, (n, m)
        Of all volumes at the points of `level`.

    Returns
    -------
    Tensor, (r, a, b)
        In the order of `numpy.argwhere(state.outlier_slices)`; scaled to the volume, moved and bent as the volume is.
    """
    axis, points = state.slice_axis, level.points
    inside = np.zeros(points.grid.shape, np.float32)
    inside[tuple(points.voxels.astype(int).T)] = 1
    out = []
    lost = np.zeros((len(dwi), 0), bool) if state.outlier_slices is None else state.outlier_slices
    for volume in np.flatnonzero(lost.any(axis=1)):
        kept = ~state.outlier_points(int(volume), points)
        observed = level.sample(np.array([volume]), state)[0].cpu().numpy()
        target = predicted[volume].cpu().numpy()
        gain = float(observed[kept] @ target[kept] / max(target[kept] @ target[kept], 1e-12))
        image = np.zeros(points.grid.shape, np.float32)
        image[tuple(points.voxels.astype(int).T)] = gain * target
        for number in np.flatnonzero(lost[volume]):
            acquired = dwi.data[int(volume)].select(axis, int(number)).cpu().numpy()
            out.append(_painted(acquired, image, inside, state, int(volume), int(number)))
    shape = [n for a, n in enumerate(dwi.grid.shape) if a != axis]
    return torch.from_numpy(np.stack(out)) if out else torch.zeros(0, *shape)


def _painted(
    acquired: np.ndarray, image: np.ndarray, inside: np.ndarray, state: MotionState, volume: int, number: int
) -> np.ndarray:
    """One slice: the prediction where it is known, the acquired values elsewhere."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in acquired.shape], indexing="ij"), axis=-1)
    voxels = np.insert(index, state.slice_axis, number, axis=-1)
    world = state.grid.to_world(voxels)
    jacobian = np.ones(acquired.shape)
    if state.eddy is not None:
        still = world.copy()
        for _ in range(3):  # the point that was displaced to here
            still = world - state.eddy.displacement(volume, still)
        ahead = still + state.eddy.axes[:, state.eddy.along]
        both = state.eddy.displacement(volume, ahead) - state.eddy.displacement(volume, still)
        jacobian, world = 1 + both @ state.eddy.axes[:, state.eddy.along], still
    back = np.linalg.inv(state.transforms[volume])
    where = np.moveaxis(state.grid.to_voxels(world @ back[:3, :3].T + back[:3, 3]), -1, 0)
    share = map_coordinates(inside, where, order=1)
    value = map_coordinates(image, where, order=1) / np.maximum(share, 0.5)
    return np.where(share > 0.5, value / jacobian, acquired).astype(np.float32)
