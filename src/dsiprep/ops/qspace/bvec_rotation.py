"""Rotation of b-vectors with the head."""

from __future__ import annotations

import numpy as np

from dsiprep.ops.image.affine import nearest_rotation

__all__ = ["rotate_bvecs"]


def rotate_bvecs(bvecs: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """Rotate b-vectors from the scanner frame to the frame of the reference head.

    The gradient is fixed in the scanner. In the frame of a head that moved by x -> R x + t it is R' g.

    Parameters
    ----------
    bvecs : ndarray, (n, 3)
        Unit vectors in world RAS+, or zero.
    matrices : ndarray, (n, 4, 4) or (4, 4)
        Map points of the reference to points of each volume, as in `Motion.transforms`.

    Returns
    -------
    ndarray, (n, 3)
    """
    rotations = nearest_rotation(np.asarray(matrices)[..., :3, :3])
    return np.einsum("...ji,...j->...i", rotations, np.asarray(bvecs, float))
