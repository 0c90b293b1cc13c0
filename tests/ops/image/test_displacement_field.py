"""Displacement fields on grids in every orientation, against formulas and ITK."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import Affine, Chain, DisplacementField
from dsiprep.ops.image import displacement_field as field_module
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import (
    chain_displacement,
    chain_points,
    compose,
    fit_between,
    invert,
    jacobian_determinant,
)
from dsiprep.ops.image.interpolation import resample_onto, voxel_points
from helpers.grids import make_grid

SHAPE, SPACING = (26, 30, 24), (2.0, 1.6, 2.4)


def world(grid: Grid) -> np.ndarray:
    return grid.to_world(np.argwhere(np.ones(grid.shape)))


def bump(grid: Grid, size: float, seed: int = 0) -> DisplacementField:
    """A smooth displacement of up to `size` mm that is zero at the edges; a formula of world points."""
    rng = np.random.default_rng(seed)
    points = (world(grid) - grid.centre) / 12.0
    wave = np.stack([np.sin(points @ rng.normal(size=3) + rng.uniform(0, 6)) for _ in range(3)])
    u = size * wave * np.exp(-(points**2).sum(axis=1))
    return DisplacementField(torch.from_numpy(u.reshape(3, *grid.shape).astype(np.float32)), grid)


def linear_field(grid: Grid, matrix: np.ndarray) -> DisplacementField:
    u = (world(grid) - grid.centre) @ (matrix - np.eye(3)).T
    return DisplacementField(torch.from_numpy(u.T.reshape(3, *grid.shape).astype(np.float32)), grid)


def test_jacobian_of_a_linear_map_is_its_determinant(orientation: str) -> None:
    matrix = np.array([[1.2, 0.1, -0.05], [0.02, 0.9, 0.2], [-0.1, 0.03, 1.1]])
    field = linear_field(make_grid(orientation, SHAPE, SPACING), matrix)
    np.testing.assert_allclose(jacobian_determinant(field).numpy(), np.linalg.det(matrix), atol=2e-5)


def test_jacobian_is_itks(orientation: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    field = bump(make_grid(orientation, SHAPE, SPACING), 4.0)
    along_axes = np.einsum("ab,bijk->aijk", np.linalg.inv(field.grid.directions), field.data.numpy())
    image = sitk.GetImageFromArray(along_axes.T.astype(float), isVector=True)  # ITK's filter knows no direction
    image.SetSpacing(field.grid.voxel_sizes.tolist())
    theirs = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(image)).T
    inner = (slice(1, -1),) * 3
    ours = jacobian_determinant(field).numpy()
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-4)
    assert ours.std() > 0.05


def test_inverse_undoes(orientation: str) -> None:
    grid = make_grid(orientation, SHAPE, SPACING)
    field = bump(grid, 4.0)
    inverse = invert(field, tolerance_mm=1e-3)
    assert float(compose(inverse, field).data.norm(dim=0).max()) < 2e-3  # exact where the inverse has voxels
    assert float(field.data.norm(dim=0).max()) > 2


def test_the_other_order_is_as_good_as_interpolation() -> None:
    """Between its voxels the inverse is interpolated: half the voxel size, a quarter of the error."""
    errors = []
    for factor in (1, 2):
        grid = make_grid("oblique", SHAPE, SPACING).at_spacing(tuple(s / factor for s in SPACING))
        field = bump(grid, 4.0)
        errors.append(float(compose(field, invert(field, tolerance_mm=1e-3)).data.norm(dim=0).max()))
    assert errors[1] < 0.1 and errors[1] < 0.4 * errors[0]


def test_inverse_of_a_steep_field() -> None:
    """Slopes above 1, where fixed-point iteration alone diverges."""
    grid = Grid((60, 5, 5), np.diag([0.5, 1.0, 1.0, 1.0]))
    x = np.arange(60) * 0.5 - 15
    data = torch.zeros(3, *grid.shape)
    data[0] = torch.from_numpy(6 * np.tanh(x / 3) * np.exp(-((x / 9) ** 2))).float()[:, None, None]
    field = DisplacementField(data, grid)
    slopes = np.gradient(data[0, :, 2, 2].numpy(), 0.5)
    assert slopes.max() > 1.5 and slopes.min() > -1
    residual = compose(invert(field, tolerance_mm=1e-3), field).data[:, 2:-2, 1:-1, 1:-1]
    assert float(residual.abs().max()) < 5e-3


def test_fitted_values_are_nearer_between_voxels(orientation: str) -> None:
    """A formula read at random points, from its values at the voxels and from fitted ones."""
    grid = make_grid(orientation, SHAPE, SPACING)

    def formula(points: np.ndarray) -> np.ndarray:
        waves = np.sin(grid.to_voxels(points) / 4)
        return np.stack([waves[..., 0], waves.sum(axis=-1), waves[..., 2]], axis=-1)

    exact = DisplacementField(torch.from_numpy(formula(world(grid)).T.reshape(3, *SHAPE).astype(np.float32)), grid)
    points = grid.to_world(np.random.default_rng(0).uniform(2, np.array(SHAPE) - 3.0, (4000, 3)))
    wrong, fitted = (
        np.sqrt(np.square(chain_points(Chain((f,), "", ""), points) - points - formula(points)).mean(axis=0))
        for f in (exact, fit_between(exact))
    )
    # x (1 - x) / 2 over a cell has the standard deviation 0.0373 and the root mean square 0.0913
    np.testing.assert_allclose(fitted / wrong, 0.41, atol=0.05)
    assert wrong.min() > 1e-3


def test_composition_is_one_after_the_other(orientation: str) -> None:
    grid = make_grid(orientation, SHAPE, SPACING)
    first, second = bump(grid, 3.0, 1), bump(make_grid("RAS", (40, 40, 40), (1.5, 1.5, 1.5)), 3.0, 2)
    points = grid.to_world(np.random.default_rng(0).integers(3, np.asarray(SHAPE) - 3, (100, 3)))
    chain = Chain((first, second), "a", "b")
    once = chain_points(Chain((compose(first, second),), "a", "b"), points)
    np.testing.assert_allclose(once, chain_points(chain, points), atol=1e-4)
    assert np.abs(once - chain_points(Chain((second, first), "a", "b"), points)).max() > 0.05


def test_chain_of_points_and_chain_on_a_grid_agree(orientation: str) -> None:
    grid = make_grid(orientation, (9, 8, 7), (4.0, 5.0, 6.0))
    there = Affine(rigid_matrix(np.array([0.4, -0.3, 0.2, 90, -120, 60])), "a", "b")
    back = Affine(np.linalg.inv(there.matrix), "b", "c")
    fields = make_grid("LAS", (30, 30, 30), (2.0, 2.0, 2.0))
    chain = Chain((bump(fields, 3.0, 3), there, back, bump(fields, 2.0, 4), there), "a", "c")
    total = chain_displacement(chain, grid).numpy().reshape(3, -1).T
    np.testing.assert_allclose(world(grid) + total, chain_points(chain, world(grid)), atol=1e-3)


def test_a_chain_brings_images() -> None:
    """An image that is a linear function of the world is read where the chain points to."""
    source = make_grid("LPS", (40, 40, 40), (2.0, 2.0, 2.0))
    target = make_grid("oblique", (8, 8, 8), (3.0, 3.0, 3.0))
    image = torch.from_numpy((world(source) @ [1.0, 2.0, 3.0]).reshape(1, *source.shape)).float()
    chain = Chain((bump(target, 2.0), Affine(rigid_matrix(np.full(6, 0.1)), "a", "b")), "a", "b")
    out = resample_onto(image, source, target, displacement=chain_displacement(chain, target))[0].numpy()
    np.testing.assert_allclose(out.ravel(), chain_points(chain, world(target)) @ [1.0, 2.0, 3.0], atol=2e-3)


@pytest.mark.parametrize("size", [3.0, 7.0])
def test_both_bodies_of_the_inverse_agree(size: float) -> None:
    """Smooth and steep: the second one has voxels where fixed-point steps do not arrive."""
    grid = make_grid("oblique", SHAPE, SPACING)
    field = bump(grid, size)
    to_voxel = torch.as_tensor(np.linalg.inv(grid.affine)[:3, :3]).float()
    u = torch.einsum("ab,bijk->aijk", to_voxel, field.data)
    points = voxel_points(grid, grid).reshape(3, -1)
    to_world = torch.as_tensor(grid.affine[:3, :3]).float()
    plain = to_world @ field_module._inverse_at(u, points, -u.reshape(3, -1), 30, 1e-4, to_world)
    fast = invert(field, tolerance_mm=1e-4).data.reshape(3, -1)
    assert float(jacobian_determinant(field).min()) > 0
    assert float((fast - plain).norm(dim=0).max()) < 1e-3
