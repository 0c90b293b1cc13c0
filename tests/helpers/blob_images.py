"""Smooth synthetic images of a head-shaped phantom, moved by known transforms."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.interpolation import resample_onto
from helpers.grids import make_grid

GRID = make_grid("RAS", (64, 76, 62), (2.5, 2.5, 2.5))


def blob_labels(seed: int) -> np.ndarray:
    """Labels of a brain-like phantom without symmetry: 0 outside, 1 an outer rim (CSF), 2 and 3 folded inside."""
    rng = np.random.default_rng(seed)
    points = (GRID.to_world(np.argwhere(np.ones(GRID.shape))) - GRID.centre) / [62, 78, 60]
    radius = np.linalg.norm(points, axis=1) + 0.1 * np.sin(3 * points[:, 0] + 1) * points[:, 2]
    folds = ndimage.gaussian_filter(rng.normal(size=GRID.shape), 2.5).ravel()
    labels = np.where(folds > 0, 2, 3)
    labels[radius > 0.85] = 1
    labels[radius > 0.95] = 0
    return labels.reshape(GRID.shape)


def image_of(labels: np.ndarray, intensities: tuple[float, float, float, float]) -> Volume:
    """The labels as an image with one intensity per label, slightly smoothed."""
    data = ndimage.gaussian_filter(np.asarray(intensities)[labels], 0.6).astype(np.float32)
    return Volume(torch.from_numpy(data), GRID)


def moved(image: Volume, matrix: np.ndarray, noise: float, shape: tuple[int, int, int]) -> Volume:
    """The image with its head moved by `matrix`, on an oblique LAS grid of 2.2 x 2.2 x 3 mm around it."""
    grid = make_grid("oblique", shape, (2.2, 2.2, 3.0))
    affine = grid.affine.copy()
    affine[:3, 3] += (matrix @ [*GRID.centre, 1])[:3] - grid.centre + [6, -4, 5]
    grid = Grid(shape, affine)
    data = resample_onto(image.data[None], GRID, grid, np.linalg.inv(matrix), cubic=True)[0]
    added = np.random.default_rng(1).normal(size=shape).astype(np.float32) * noise
    return Volume((data + torch.from_numpy(added)).abs(), grid)


def max_error(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Largest distance in mm between the images of head points under two matrices."""
    corners = np.array(np.meshgrid(*[(-60, 60)] * 3)).reshape(3, -1).T
    corners = corners * [0.8, 1, 0.8] + GRID.centre
    difference = (estimate - truth)[:3]
    return float(np.linalg.norm(corners @ difference[:, :3].T + difference[:, 3], axis=1).max())


def large_pose(seed: int) -> np.ndarray:
    """A rotation of 30 degrees and a translation of 50 mm in random directions."""
    rng = np.random.default_rng(seed)
    axis, shift = rng.normal(size=3), rng.normal(size=3)
    axis *= np.radians(30) / np.linalg.norm(axis)
    return rigid_matrix(np.concatenate([axis, 50 * shift / np.linalg.norm(shift)]))
