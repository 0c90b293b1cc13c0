"""Rigid and affine transforms: conversion between parameters and matrices, means, and b-vector rotation.

Matrices are (..., 4, 4) float64 NumPy arrays and map world points, RAS+ mm.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation


def rigid_matrix(parameters: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """Build rigid transforms from rotation vectors and translations.

    Parameters
    ----------
    parameters : ndarray, (..., 6)
        Rotation vector (radians, RAS+), then translation (mm, RAS+).
    centre : ndarray, (3,), optional
        Centre of rotation, mm. The origin by default.

    Returns
    -------
    ndarray, (..., 4, 4)
        x -> R (x - centre) + centre + t.
    """
    parameters = np.asarray(parameters, float)
    flat = parameters.reshape(-1, 6)
    centre = np.zeros(3) if centre is None else np.asarray(centre, float)
    matrices = np.tile(np.eye(4), (len(flat), 1, 1))
    matrices[:, :3, :3] = Rotation.from_rotvec(flat[:, :3]).as_matrix()
    matrices[:, :3, 3] = flat[:, 3:] + centre - matrices[:, :3, :3] @ centre
    return matrices.reshape(*parameters.shape[:-1], 4, 4)


def rigid_parameters(matrices: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """Invert `rigid_matrix`: parameters (..., 6); a general affine is reduced to its nearest rotation."""
    matrices = np.asarray(matrices, float)
    flat = matrices.reshape(-1, 4, 4)
    centre = np.zeros(3) if centre is None else np.asarray(centre, float)
    rotation = Rotation.from_matrix(nearest_rotation(flat[:, :3, :3])).as_rotvec()
    translation = flat[:, :3, 3] - centre + flat[:, :3, :3] @ centre
    return np.concatenate([rotation, translation], axis=1).reshape(*matrices.shape[:-2], 6)


def nearest_rotation(matrices: np.ndarray) -> np.ndarray:
    """Rotation part of the polar decomposition of (..., 3, 3) matrices with positive determinant."""
    u, _, vt = np.linalg.svd(np.asarray(matrices, float))
    return u @ vt


def mean_rigid(matrices: np.ndarray) -> np.ndarray:
    """Mean of rigid transforms (n, 4, 4): chordal mean rotation and mean translation."""
    mean = np.eye(4)
    mean[:3, :3] = nearest_rotation(np.mean(matrices[:, :3, :3], axis=0))
    mean[:3, 3] = np.mean(matrices[:, :3, 3], axis=0)
    return mean


def point_displacement(first: np.ndarray, second: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance in mm, (n, m), between the images of `points` (m, 3) under two sets of transforms (n, 4, 4)."""
    difference = np.asarray(first)[..., :3, :] - np.asarray(second)[..., :3, :]
    moved = np.einsum("nij,mj->nmi", difference[..., :3], points) + difference[:, None, :, 3]
    return np.linalg.norm(moved, axis=-1)
