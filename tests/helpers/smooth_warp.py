"""Smooth random displacement fields, and empty images on any grid."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.filters import gaussian

LPS = np.array([-1.0, -1, 1])

FIXED, MOVING = (16, 13, 11), (12, 15, 13)

TILT = rigid_matrix(np.array([0.1, -0.15, 0.2, 4, -6, 3]))


def displacement(grid: Grid, seed: int = 0, size: float = 8.0) -> np.ndarray:
    """Smooth random displacement with maximum component `size`, in mm RAS, (3, i, j, k)."""
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, *grid.shape)).astype(np.float32))
    smooth = gaussian(noise, 2.5).numpy()
    return smooth * (size / np.abs(smooth).max())


def centres(grid: Grid) -> np.ndarray:
    """World coordinates of the voxel centres, (i, j, k, 3)."""
    return grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))


def image_at(path: Path, grid: Grid) -> Path:
    """Write an image of zeros on `grid` and return its path."""
    nib.save(nib.Nifti1Image(np.zeros(grid.shape, np.float32), grid.affine), path)
    return path
