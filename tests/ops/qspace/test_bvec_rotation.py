"""Rotation of b-vectors into the frame of a moved head."""

from __future__ import annotations

import numpy as np

from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs


def test_bvec_is_rotated_opposite_to_the_head() -> None:
    """Rotation by +90 degrees about S moves the head's R axis to A, so a gradient along A is along its R axis."""
    rotated = rigid_matrix(np.array([0, 0, np.pi / 2, 5, 6, 7]))
    np.testing.assert_allclose(rotate_bvecs(np.array([[0.0, 1, 0]]), rotated[None]), [[1, 0, 0]], atol=1e-12)


def test_scaling_does_not_rotate_bvecs() -> None:
    scaled = np.diag([1.1, 0.9, 1.05, 1])
    bvec = np.array([[0.6, 0.8, 0]])
    np.testing.assert_allclose(rotate_bvecs(bvec, scaled[None]), bvec, atol=1e-12)
