"""Rigid and affine transforms: parameters to matrices and back, means, what they do to b-vectors.

Matrices are (..., 4, 4) float64 NumPy and map world points, RAS+ mm.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation


def rigid_matrix(parameters: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """Rigid transforms from rotation vectors and translations.

    Parameters
    ----------
    parameters : ndarray, (..., 6)
        Rotation vector (radians, RAS+), then translation (mm, RAS+).
    centre : ndarray, (3,), optional
        Point that is rotated about, mm. The origin by default.

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
    """The inverse of `rigid_matrix`, (..., 6). Of an affine, the nearest rotation is taken."""
    matrices = np.asarray(matrices, float)
    flat = matrices.reshape(-1, 4, 4)
    centre = np.zeros(3) if centre is None else np.asarray(centre, float)
    rotation = Rotation.from_matrix(nearest_rotation(flat[:, :3, :3])).as_rotvec()
    translation = flat[:, :3, 3] - centre + flat[:, :3, :3] @ centre
    return np.concatenate([rotation, translation], axis=1).reshape(*matrices.shape[:-2], 6)


def nearest_rotation(matrices: np.ndarray) -> np.ndarray:
    """The rotation part of the polar decomposition of (..., 3, 3) matrices with positive determinant."""
    u, _, vt = np.linalg.svd(np.asarray(matrices, float))
    return u @ vt


def rotate_bvecs(bvecs: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """b-vectors as seen from the reference head.

    The gradient is fixed in the scanner. A head whose points moved by x -> R x + t saw the gradient R' g.

    Parameters
    ----------
    bvecs : ndarray, (n, 3)
        Unit vectors in world RAS+, or zero.
    matrices : ndarray, (n, 4, 4) or (4, 4)
        Points of the reference to points of each volume (as in `Motion.transforms`).

    Returns
    -------
    ndarray, (n, 3)
    """
    rotations = nearest_rotation(np.asarray(matrices)[..., :3, :3])
    return np.einsum("...ji,...j->...i", rotations, np.asarray(bvecs, float))


def mean_rigid(matrices: np.ndarray) -> np.ndarray:
    """The rigid transform nearest to all of (n, 4, 4): mean rotation (chordal) and mean translation."""
    mean = np.eye(4)
    mean[:3, :3] = nearest_rotation(np.mean(matrices[:, :3, :3], axis=0))
    mean[:3, 3] = np.mean(matrices[:, :3, 3], axis=0)
    return mean


def point_displacement(first: np.ndarray, second: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distance in mm between where two sets of transforms (n, 4, 4) send `points` (m, 3): (n, m)."""
    difference = np.asarray(first)[..., :3, :] - np.asarray(second)[..., :3, :]
    moved = np.einsum("nij,mj->nmi", difference[..., :3], points) + difference[:, None, :, 3]
    return np.linalg.norm(moved, axis=-1)
