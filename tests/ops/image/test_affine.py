"""Rigid parameters, mean transforms and b-vector rotation."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from dsiprep.ops.image import affine


def test_parameters_survive_conversion_to_matrices_and_back() -> None:
    rng = np.random.default_rng(0)
    parameters = rng.normal(size=(20, 6)) * [0.3, 0.3, 0.3, 10, 10, 10]
    centre = np.array([10.0, -20, 30])
    matrices = affine.rigid_matrix(parameters, centre)
    np.testing.assert_allclose(affine.rigid_parameters(matrices, centre), parameters, atol=1e-12)


def test_rotation_is_about_the_centre() -> None:
    centre = np.array([10.0, -20, 30])
    matrix = affine.rigid_matrix(np.array([0, 0, np.pi / 2, 0, 0, 0]), centre)
    np.testing.assert_allclose(matrix @ [*centre, 1], [*centre, 1], atol=1e-12)
    np.testing.assert_allclose(matrix @ [11, -20, 30, 1], [10, -19, 30, 1], atol=1e-12)


def test_mean_rigid_matches_scipy_mean_rotation() -> None:
    rng = np.random.default_rng(1)
    matrices = affine.rigid_matrix(rng.normal(size=(7, 6)) * 0.2)
    expected = Rotation.from_matrix(matrices[:, :3, :3]).mean().as_matrix()
    np.testing.assert_allclose(affine.mean_rigid(matrices)[:3, :3], expected, atol=1e-10)


def test_point_displacement_of_a_translation_is_its_length() -> None:
    moved = affine.rigid_matrix(np.array([0, 0, 0, 3, 4, 0.0]))[None]
    points = np.random.default_rng(2).normal(size=(5, 3)) * 50
    np.testing.assert_allclose(affine.point_displacement(moved, np.eye(4)[None], points), 5)
