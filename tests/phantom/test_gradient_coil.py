"""The phantom's gradient coils against the fields that are read from its coefficients, and what they do to images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.io.gradient_coefficients import read_coil_fields
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.gradient_nonlinearity import encoding_error, gradient_deviation
from dsiprep.phantom.gradient_coil import Coil, coefficient_text, make_coil
from dsiprep.phantom.scanner import Source, scan
from dsiprep.phantom.signal import Tissue
from helpers.grids import make_grid

BRAIN = np.random.default_rng(0).uniform([-70, -100, -60], [70, 75, 85], (400, 3))


@pytest.fixture(scope="module")
def coil() -> Coil:
    return make_coil(BRAIN, 5.0)


def test_fields_are_those_of_the_coefficients(coil: Coil, tmp_path: Path) -> None:
    path = tmp_path / "coil.grad"
    path.write_text(coefficient_text(coil.scale))
    fields, voxels = read_coil_fields(path), np.random.default_rng(1).integers(10, 100, (500, 3))
    points, at = coil.grid.to_world(voxels), tuple(voxels.T)
    displacement, _ = encoding_error(fields, points)
    np.testing.assert_allclose(coil.displacement[(slice(None), *at)].T, displacement, atol=1e-4)
    deviation = gradient_deviation(fields, points).reshape(-1, 9)
    np.testing.assert_allclose(coil.deviation[(slice(None), *at)].T, deviation, atol=1e-5)
    largest = np.linalg.norm(encoding_error(fields, BRAIN)[0], axis=1).max()
    assert largest == pytest.approx(5.0, abs=1e-3)


def test_inverse_undoes_the_displacement(coil: Coil) -> None:
    points = BRAIN * 0.9
    index = (coil.grid.to_voxels(points)).T
    true = points + np.stack([map_coordinates(part, index, order=1) for part in coil.inverse[:3]], -1)
    index = (coil.grid.to_voxels(true)).T
    there = true + np.stack([map_coordinates(part, index, order=1) for part in coil.displacement], -1)
    np.testing.assert_allclose(there, points, atol=0.01)


def blob_at(point: np.ndarray) -> tuple[np.ndarray, Grid]:
    grid = make_grid("RAS", (100, 100, 100), (2.0, 2.0, 2.0))
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    return np.exp(-((world - point) ** 2).sum(-1) / (2 * 5.0**2)).astype(np.float32), grid


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scan_puts_signal_where_it_is_encoded(coil: Coil, orientation: str, axis: int) -> None:
    """The centre of a blob appears displaced by the gradients, then by off-resonance; its signal is conserved."""
    point, pose = np.array([45.0, -50.0, 50.0]), rigid_matrix(np.array([0.1, 0.05, -0.08, 2.0, -3.0, 4.0]), np.zeros(3))
    image, image_grid = blob_at(point)
    grid = make_grid(orientation, (60, 60, 60), (3.2, 3.2, 3.2))
    pe, field = PhaseEncoding(axis, 1, 0.05), np.full(image.shape, 30.0, np.float32)
    shown = scan(Source(image, image_grid, field, image_grid), grid, pe, pose, coil=coil)
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    centre = (world * shown[..., None]).sum((0, 1, 2)) / shown.sum()
    y = pose[:3, :3] @ point + pose[:3, 3]
    index = coil.grid.to_voxels(y)[:, None]
    d = np.stack([map_coordinates(part, index, order=1)[0] for part in coil.displacement])
    assert np.linalg.norm(d) > 1
    np.testing.assert_allclose(centre, y + d + 1.5 * grid.affine[:3, axis], atol=0.25)
    assert shown.sum() * 3.2**3 == pytest.approx(image.sum() * 8, rel=0.01)


def test_distorted_structural_image_shows_a_point_where_it_is_encoded(coil: Coil) -> None:
    point = np.array([-40.0, -55.0, 55.0])
    image, grid = blob_at(point)
    shown = coil.distort(image, grid)
    world = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    centre = (world * shown[..., None]).sum((0, 1, 2)) / shown.sum()
    d = np.stack([map_coordinates(part, coil.grid.to_voxels(point)[:, None], order=1)[0] for part in coil.displacement])
    np.testing.assert_allclose(centre, point + d, atol=0.1)
    assert shown.sum() == pytest.approx(image.sum(), rel=0.01)


def test_signal_follows_the_gradient_of_each_voxel(coil: Coil) -> None:
    """With one gradient everywhere both functions agree; with the coils' it is that of each voxel's own gradient."""
    rng = np.random.default_rng(3)
    grid = make_grid("RAS", (6, 6, 6), (25.0, 25.0, 25.0))
    fibres = rng.normal(size=(50, 2, 3))
    fibres /= np.linalg.norm(fibres, axis=-1, keepdims=True)
    names = ("free", "grey", "soft", "lipid")
    images = {name: rng.uniform(0, 100, grid.shape).astype(np.float32) for name in names}
    weights = rng.uniform(0, 100, (50, 2)).astype(np.float32)
    tissue = Tissue(grid, images, np.arange(50), fibres.astype(np.float32), weights)
    g = np.array([0.6, 0.0, -0.8])
    same = np.broadcast_to(g[:, None, None, None], (3, *grid.shape))
    np.testing.assert_allclose(tissue.signal_of(2000, same), tissue.signal(2000, g), rtol=1e-4)

    pose = rigid_matrix(np.array([0.1, 0.05, -0.08, 2.0, -3.0, 4.0]), np.zeros(3))
    acting = coil.gradients(g, pose, grid)
    shown = tissue.signal_of(2000, acting)
    for voxel in [(0, 0, 0), (0, 1, 2), (5, 4, 3)]:
        point = pose[:3, :3] @ grid.to_world(np.array(voxel)) + pose[:3, 3]
        at = coil.grid.to_voxels(point)[:, None]
        deviation = np.stack([map_coordinates(part, at, order=1)[0] for part in coil.deviation]).reshape(3, 3)
        here = pose[:3, :3].T @ (np.eye(3) + deviation) @ g
        np.testing.assert_allclose(acting[(slice(None), *voxel)], here, atol=1e-5)
        length = np.linalg.norm(here)
        expected = tissue.signal(2000 * length**2, here / length)[voxel]
        assert shown[voxel] == pytest.approx(expected, rel=1e-3)
