"""Slices that lost their signal, as the other volumes say they should look."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.dwi import DWI
from dsiprep.ops.level import Level, Place

__all__ = ["replaced_slices"]


def replaced_slices(dwi: DWI, level: Level, place: Place, predicted: torch.Tensor) -> torch.Tensor:
    """The lost slices of `place`, with the brain taken from the prediction.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    level : Level
        On the voxels of `dwi`.
    place : Place
    predicted : Tensor, (n, m)
        Of all volumes at the points of `level`.

    Returns
    -------
    Tensor, (r, a, b)
        In the order of `numpy.argwhere(place.lost)`; scaled to the volume, moved and bent as the volume is.
    """
    axis, points = place.slice_axis, level.points
    inside = np.zeros(points.grid.shape, np.float32)
    inside[tuple(points.voxels.astype(int).T)] = 1
    out = []
    lost = np.zeros((len(dwi), 0), bool) if place.lost is None else place.lost
    for volume in np.flatnonzero(lost.any(axis=1)):
        kept = ~place.lost_points(int(volume), points)
        seen = level.read(np.array([volume]), place)[0].cpu().numpy()
        target = predicted[volume].cpu().numpy()
        gain = float(seen[kept] @ target[kept] / max(target[kept] @ target[kept], 1e-12))
        image = np.zeros(points.grid.shape, np.float32)
        image[tuple(points.voxels.astype(int).T)] = gain * target
        for number in np.flatnonzero(lost[volume]):
            acquired = dwi.data[int(volume)].select(axis, int(number)).cpu().numpy()
            out.append(_painted(acquired, image, inside, place, int(volume), int(number)))
    shape = [n for a, n in enumerate(dwi.grid.shape) if a != axis]
    return torch.from_numpy(np.stack(out)) if out else torch.zeros(0, *shape)


def _painted(
    acquired: np.ndarray, image: np.ndarray, inside: np.ndarray, place: Place, volume: int, number: int
) -> np.ndarray:
    """One slice: the prediction where it is known, the acquired values elsewhere."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in acquired.shape], indexing="ij"), axis=-1)
    voxels = np.insert(index, place.slice_axis, number, axis=-1)
    world = place.grid.to_world(voxels)
    jacobian = np.ones(acquired.shape)
    if place.eddy is not None:
        still = world.copy()
        for _ in range(3):  # the point that was displaced to here
            still = world - place.eddy.displacement(volume, still)
        ahead = still + place.eddy.axes[:, place.eddy.along]
        both = place.eddy.displacement(volume, ahead) - place.eddy.displacement(volume, still)
        jacobian, world = 1 + both @ place.eddy.axes[:, place.eddy.along], still
    back = np.linalg.inv(place.transforms[volume])
    where = np.moveaxis(place.grid.to_voxels(world @ back[:3, :3].T + back[:3, 3]), -1, 0)
    share = map_coordinates(inside, where, order=1)
    value = map_coordinates(image, where, order=1) / np.maximum(share, 0.5)
    return np.where(share > 0.5, value / jacobian, acquired).astype(np.float32)
