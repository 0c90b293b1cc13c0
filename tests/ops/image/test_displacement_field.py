"""Displacement fields on grids in all orientations, compared with analytic results and ITK."""

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
    invert,
    jacobian_determinant,
    prefilter,
)
from dsiprep.ops.image.interpolation import resample_onto, voxel_points
from helpers.grids import make_grid

SHAPE, SPACING = (26, 30, 24), (2.0, 1.6, 2.4)


def voxel_positions(grid: Grid) -> np.ndarray:
    """World coordinates of all voxels, (m, 3)."""
    return grid.to_world(np.argwhere(np.ones(grid.shape)))


def bump(grid: Grid, size: float, seed: int = 0) -> DisplacementField:
    """A smooth analytic displacement of up to `size` mm that vanishes at the edges."""
    rng = np.random.default_rng(seed)
    points = (voxel_positions(grid) - grid.centre) / 12.0
    wave = np.stack([np.sin(points @ rng.normal(size=3) + rng.uniform(0, 6)) for _ in range(3)])
    u = size * wave * np.exp(-(points**2).sum(axis=1))
    return DisplacementField(torch.from_numpy(u.reshape(3, *grid.shape).astype(np.float32)), grid)


def linear_field(grid: Grid, matrix: np.ndarray) -> DisplacementField:
    """The displacement of a linear map about the centre of the grid."""
    u = (voxel_positions(grid) - grid.centre) @ (matrix - np.eye(3)).T
    return DisplacementField(torch.from_numpy(u.T.reshape(3, *grid.shape).astype(np.float32)), grid)


def test_jacobian_of_linear_map_is_its_determinant(orientation: str) -> None:
    matrix = np.array([[1.2, 0.1, -0.05], [0.02, 0.9, 0.2], [-0.1, 0.03, 1.1]])
    field = linear_field(make_grid(orientation, SHAPE, SPACING), matrix)
    np.testing.assert_allclose(jacobian_determinant(field).numpy(), np.linalg.det(matrix), atol=2e-5)


def test_jacobian_matches_itk(orientation: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    field = bump(make_grid(orientation, SHAPE, SPACING), 4.0)
    along_axes = np.einsum("ab,bijk->aijk", np.linalg.inv(field.grid.directions), field.data.numpy())
    image = sitk.GetImageFromArray(along_axes.T.astype(float), isVector=True)  # ITK's filter ignores the direction
    image.SetSpacing(field.grid.voxel_sizes.tolist())
    theirs = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(image)).T
    inner = (slice(1, -1),) * 3
    ours = jacobian_determinant(field).numpy()
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-4)
    assert ours.std() > 0.05


def test_inverse_then_field_is_the_identity(orientation: str) -> None:
    grid = make_grid(orientation, SHAPE, SPACING)
    field = bump(grid, 4.0)
    inverse = invert(field, tolerance_mm=1e-3)
    assert float(compose(inverse, field).data.norm(dim=0).max()) < 2e-3  # exact at the voxels of the inverse
    assert float(field.data.norm(dim=0).max()) > 2


def test_field_then_inverse_is_limited_by_interpolation() -> None:
    """The inverse is interpolated between its voxels: half the voxel size gives a quarter of the error."""
    errors = []
    for factor in (1, 2):
        grid = make_grid("oblique", SHAPE, SPACING).at_spacing(tuple(s / factor for s in SPACING))
        field = bump(grid, 4.0)
        errors.append(float(compose(field, invert(field, tolerance_mm=1e-3)).data.norm(dim=0).max()))
    assert errors[1] < 0.1
    assert errors[1] < 0.4 * errors[0]


def test_inverse_of_steep_field() -> None:
    """Slopes above 1, for which fixed-point iteration alone diverges."""
    grid = Grid((60, 5, 5), np.diag([0.5, 1.0, 1.0, 1.0]))
    x = np.arange(60) * 0.5 - 15
    data = torch.zeros(3, *grid.shape)
    data[0] = torch.from_numpy(6 * np.tanh(x / 3) * np.exp(-((x / 9) ** 2))).float()[:, None, None]
    field = DisplacementField(data, grid)
    slopes = np.gradient(data[0, :, 2, 2].numpy(), 0.5)
    assert slopes.max() > 1.5
    assert slopes.min() > -1
    residual = compose(invert(field, tolerance_mm=1e-3), field).data[:, 2:-2, 1:-1, 1:-1]
    assert float(residual.abs().max()) < 5e-3


def test_prefilter_reduces_interpolation_error(orientation: str) -> None:
    """An analytic field interpolated at random points, with and without the prefilter."""
    grid = make_grid(orientation, SHAPE, SPACING)

    def analytic(points: np.ndarray) -> np.ndarray:
        waves = np.sin(grid.to_voxels(points) / 4)
        return np.stack([waves[..., 0], waves.sum(axis=-1), waves[..., 2]], axis=-1)

    exact = DisplacementField(
        torch.from_numpy(analytic(voxel_positions(grid)).T.reshape(3, *SHAPE).astype(np.float32)), grid
    )
    points = grid.to_world(np.random.default_rng(0).uniform(2, np.array(SHAPE) - 3.0, (4000, 3)))
    plain, prefiltered = (
        np.sqrt(np.square(chain_points(Chain((f,), "", ""), points) - points - analytic(points)).mean(axis=0))
        for f in (exact, prefilter(exact))
    )
    # over a cell, x (1 - x) / 2 has a standard deviation of 0.0373 and a root mean square of 0.0913
    np.testing.assert_allclose(prefiltered / plain, 0.41, atol=0.05)
    assert plain.min() > 1e-3


def test_composed_field_matches_applying_both_in_order(orientation: str) -> None:
    grid = make_grid(orientation, SHAPE, SPACING)
    first, second = bump(grid, 3.0, 1), bump(make_grid("RAS", (40, 40, 40), (1.5, 1.5, 1.5)), 3.0, 2)
    points = grid.to_world(np.random.default_rng(0).integers(3, np.asarray(SHAPE) - 3, (100, 3)))
    chain = Chain((first, second), "a", "b")
    composed = chain_points(Chain((compose(first, second),), "a", "b"), points)
    np.testing.assert_allclose(composed, chain_points(chain, points), atol=1e-4)
    assert np.abs(composed - chain_points(Chain((second, first), "a", "b"), points)).max() > 0.05


def test_chain_points_and_chain_displacement_agree(orientation: str) -> None:
    grid = make_grid(orientation, (9, 8, 7), (4.0, 5.0, 6.0))
    forward = Affine(rigid_matrix(np.array([0.4, -0.3, 0.2, 90, -120, 60])), "a", "b")
    backward = Affine(np.linalg.inv(forward.matrix), "b", "c")
    fields = make_grid("LAS", (30, 30, 30), (2.0, 2.0, 2.0))
    chain = Chain((bump(fields, 3.0, 3), forward, backward, bump(fields, 2.0, 4), forward), "a", "c")
    total = chain_displacement(chain, grid).numpy().reshape(3, -1).T
    np.testing.assert_allclose(voxel_positions(grid) + total, chain_points(chain, voxel_positions(grid)), atol=1e-3)


def test_image_resampled_through_a_chain() -> None:
    """An image that is linear in world coordinates, sampled at the points given by the chain."""
    source = make_grid("LPS", (40, 40, 40), (2.0, 2.0, 2.0))
    target = make_grid("oblique", (8, 8, 8), (3.0, 3.0, 3.0))
    image = torch.from_numpy((voxel_positions(source) @ [1.0, 2.0, 3.0]).reshape(1, *source.shape)).float()
    chain = Chain((bump(target, 2.0), Affine(rigid_matrix(np.full(6, 0.1)), "a", "b")), "a", "b")
    out = resample_onto(image, source, target, displacement=chain_displacement(chain, target))[0].numpy()
    np.testing.assert_allclose(out.ravel(), chain_points(chain, voxel_positions(target)) @ [1.0, 2.0, 3.0], atol=2e-3)


@pytest.mark.parametrize("size", [3.0, 7.0])
def test_numba_and_tensor_inverse_agree(size: float) -> None:
    """A smooth and a steep field; in the steep one, fixed-point steps do not converge at some voxels."""
    grid = make_grid("oblique", SHAPE, SPACING)
    field = bump(grid, size)
    to_voxel = torch.as_tensor(np.linalg.inv(grid.affine)[:3, :3]).float()
    u = torch.einsum("ab,bijk->aijk", to_voxel, field.data)
    points = voxel_points(grid, grid).reshape(3, -1)
    to_world = torch.as_tensor(grid.affine[:3, :3]).float()
    tensors = to_world @ field_module._inverse_at(u, points, -u.reshape(3, -1), 30, 1e-4, to_world)
    loop = invert(field, tolerance_mm=1e-4).data.reshape(3, -1)
    assert float(jacobian_determinant(field).min()) > 0
    assert float((loop - tensors).norm(dim=0).max()) < 1e-3
