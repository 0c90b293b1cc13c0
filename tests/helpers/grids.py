"""Grids in typical orientations of scanners and converters."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from dsiprep.data.grid import Grid

AXES = {
    "RAS": np.diag([1.0, 1, 1]),
    "LAS": np.diag([-1.0, 1, 1]),
    "LPS": np.diag([-1.0, -1, 1]),
    "PSR": np.array([[0.0, 0, 1], [-1, 0, 0], [0, 1, 0]]),
    "oblique": Rotation.from_euler("xyz", [12, -7, 20], degrees=True).as_matrix() @ np.diag([-1.0, 1, 1]),
}


def make_grid(orientation: str, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Grid:
    """A grid with its centre close to, but not at, the world origin."""
    affine = np.eye(4)
    affine[:3, :3] = AXES[orientation] * np.asarray(spacing)
    affine[:3, 3] = np.array([3.0, -5, 8]) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine)
