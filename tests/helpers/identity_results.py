"""Stage results with identity transforms, for a synthetic head."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy, Coregistration, Motion
from dsiprep.data.transform import Affine
from helpers.grids import make_grid


def voxel_points(grid: Grid) -> np.ndarray:
    """World coordinates of the voxels, (i, j, k, 3)."""
    return grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1))


def head_intensity(points: np.ndarray) -> np.ndarray:
    """Intensity of a smooth head with internal structure, semi-axes 22, 27 and 20 mm, centred at (0, 0, 0)."""
    radius = np.linalg.norm(points / np.array([22.0, 27, 20]), axis=-1)
    wave = 1 + 0.2 * np.sin(points[..., 0] / 5) * np.cos(points[..., 1] / 6) + 0.1 * np.sin(points[..., 2] / 5)
    return 1000 * wave / (1 + np.exp((radius - 1) * 12))


def make_anatomy(modality: str = "none") -> Anatomy:
    grid = make_grid("LPS", (34, 38, 34), (2, 2, 2))
    mask = Volume(torch.from_numpy((head_intensity(voxel_points(grid)) > 400).astype(np.float32)), grid)
    identity = Affine(np.eye(4), "anat", "ACPC")
    return Anatomy(modality, mask, mask, None, identity, None, None, "none", None, None)


def make_motion(grid: Grid, transforms: np.ndarray, volumes: np.ndarray) -> Motion:
    mask = torch.from_numpy((head_intensity(voxel_points(grid)) > 300).astype(np.float32))
    zero = np.zeros(len(volumes))
    slices = np.zeros((len(volumes), grid.shape[2]))
    return Motion(transforms, volumes, Volume(mask, grid), Volume(mask, grid), zero, zero, slices, 2, [], "3dSHORE")


def make_coregistration(matrix: np.ndarray) -> Coregistration:
    return Coregistration(Affine(matrix, "dwiref", "ACPC"), 0.0, 0.0, "none")
