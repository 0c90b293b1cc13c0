"""Alignment: known movements come back, both bodies agree, nothing pulls but what is told to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.image.eddy_displacement import eddy_on_grid
from dsiprep.ops.image.point_set import PointSet, average_blocks, point_set, target_gradients
from dsiprep.ops.motion import gauss_newton as module
from dsiprep.ops.motion.gauss_newton import align, normal_equations, sample_volumes
from dsiprep.ops.motion.pose_prior import PosePrior
from helpers.grids import make_grid
from helpers.motion_subject import CENTRE, signal

POSES = np.array([[0.06, -0.04, 0.05, 3.0, -2.0, 4.0], [-0.09, 0.1, 0.02, -4.0, 3.0, -3.0]])


def head_on(grid: Grid, matrices: np.ndarray) -> torch.Tensor:
    """The b=0 head seen in each pose, (n, i, j, k)."""
    voxels = np.argwhere(np.ones(grid.shape, bool))
    out = []
    for matrix in np.linalg.inv(matrices):
        points = grid.to_world(voxels) @ matrix[:3, :3].T + matrix[:3, 3]
        out.append(signal(points, 0.0, np.array([0.0, 0, 1])).reshape(grid.shape))
    return torch.from_numpy(np.stack(out).astype(np.float32))


def setting(orientation: str = "LAS", spacing: tuple[float, float, float] = (4.0, 4.5, 5.0)) -> tuple[Grid, PointSet]:
    extent = np.array([118.0, 130, 108])
    axes = make_grid(orientation, (2, 2, 2), spacing)
    shape = np.round(np.abs(axes.directions.T @ extent) / axes.voxel_sizes).astype(int)
    grid = make_grid(orientation, (int(shape[0]), int(shape[1]), int(shape[2])), spacing)
    reference = head_on(grid, np.eye(4)[None])[0]
    return grid, point_set((reference > 100).float(), grid)


def reference_values(grid: Grid, points: PointSet) -> torch.Tensor:
    reference = head_on(grid, np.eye(4)[None])
    return sample_volumes(reference, grid, points, np.eye(4)[None], torch.zeros(1, len(points)))


def test_rigid_movements_come_back_on_any_grid(orientation: str) -> None:
    grid, points = setting(orientation)
    truth = rigid_matrix(POSES, CENTRE)
    volumes = head_on(grid, truth) * torch.tensor([0.8, 1.3])[:, None, None, None]
    targets = reference_values(grid, points).repeat(2, 1)
    found = align(volumes, grid, points, targets, np.tile(np.eye(4), (2, 1, 1)), steps=25)
    world = points.world.astype(float) + points.centre
    assert point_displacement(found.transforms, truth, world).mean(1).max() < 0.2  # mm, of 4 to 5 mm voxels
    np.testing.assert_allclose(found.gain, [0.8, 1.3], rtol=0.02)


def test_affine_movements_come_back() -> None:
    grid, points = setting()
    truth = rigid_matrix(POSES[:1], CENTRE)
    stretch = np.eye(4)
    stretch[:3, :3] += [[0.03, 0.02, 0], [-0.01, -0.02, 0.01], [0.0, 0.03, 0.02]]
    truth = truth @ stretch
    found = align(
        head_on(grid, truth), grid, points, reference_values(grid, points), np.eye(4)[None], affine=True, steps=30
    )
    world = points.world.astype(float) + points.centre
    assert point_displacement(found.transforms, truth, world).mean() < 0.25


def test_read_is_scipys_linear_interpolation() -> None:
    grid, points = setting("oblique")
    volume = torch.rand(1, *grid.shape)
    matrix = rigid_matrix(POSES[:1], CENTRE)
    found = sample_volumes(volume, grid, points, matrix, torch.full((1, len(points)), -1.0)).numpy()[0]
    world = points.world.astype(float) + points.centre
    voxels = grid.to_voxels(world @ matrix[0, :3, :3].T + matrix[0, :3, 3])
    inside = ((voxels >= 0) & (voxels <= np.array(grid.shape) - 1)).all(1)
    expected = map_coordinates(volume[0].numpy().astype(float), voxels.T, order=1, mode="nearest")
    assert 0.9 < inside.mean() < 1
    # voxel coordinates are float32: a step of 1e-5 voxels
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-4)
    assert (found[~inside] == -1).mean() > 0.99


@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_both_bodies_give_the_same_equations(affine: bool, bent: bool) -> None:
    grid, points = setting("PSR")
    truth = rigid_matrix(POSES, CENTRE)
    volumes = head_on(grid, truth)
    targets = reference_values(grid, points).repeat(2, 1) + torch.randn(2, len(points))
    gradients = target_gradients(targets, points)
    gain, scale = np.array([0.9, 1.1]), np.array([50.0, 120.0])
    coefficients = np.random.default_rng(4).normal(0, 3, (2, 10))
    eddy = EddyCurrents(coefficients, grid.directions, grid.centre, 1) if bent else None
    numba = normal_equations(volumes, grid, points, truth, targets, gradients, gain, scale, affine, eddy)
    maps, bend = module._voxel_maps(grid, points, truth), eddy_on_grid(eddy, grid)
    both = module._equations_torch(volumes, points, maps, targets, gradients, gain, scale, affine, bend)
    for one, other in zip(numba, both, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * np.abs(one).max())
    values, inside = module._gather(volumes, points, maps, bend)
    fill = torch.full_like(targets, -1.0)
    expected = sample_volumes(volumes, grid, points, truth, fill, eddy)
    agree = torch.isclose(torch.where(inside, values, fill), expected, rtol=1e-4, atol=0.05)
    assert agree.float().mean() > 0.999


def test_slopes_are_derivatives_of_the_cost() -> None:
    grid, points = setting()
    volume = head_on(grid, rigid_matrix(POSES[:1] / 10, CENTRE))
    targets = reference_values(grid, points)
    gradients = target_gradients(targets, points)
    infinite, one = np.array([np.inf]), np.ones(1)

    def cost(step: np.ndarray) -> float:
        # moving the target by W is reading the volume through the inverse of W
        matrix = np.linalg.inv(rigid_matrix(step[None], points.centre))
        return normal_equations(volume, grid, points, matrix, targets, gradients, one, infinite)[2][0, 0]

    _, slope, sums = normal_equations(volume, grid, points, np.eye(4)[None], targets, gradients, one, infinite)
    lengths = np.array([1e-3] * 3 + [0.05] * 3)
    for axis in range(6):
        step = np.zeros(6)
        step[axis] = lengths[axis]
        numeric = (cost(step) - cost(-step)) / (2 * lengths[axis])
        weight = sums[0, 1] / sums[0, 2]  # weights are (nu + 1) / nu where the scale is infinite
        assert abs(-2 * slope[0, axis] - numeric) < 0.2 * np.abs(slope[0, :3] if axis < 3 else slope[0, 3:6]).max()
        assert weight == pytest.approx(1.25)


def test_a_target_without_structure_stays_where_it_is_expected() -> None:
    grid, points = setting()
    volumes, targets = torch.randn(1, *grid.shape), torch.zeros(1, len(points))
    expected = rigid_matrix(POSES[:1] / 20, CENTRE)
    found = align(volumes, grid, points, targets, np.eye(4)[None], steps=30, prior=PosePrior(expected, 0.1))
    world = points.world.astype(float) + points.centre
    assert point_displacement(found.transforms, expected, world).max() < 0.02


def test_expectation_of_rest_does_not_hold_a_clear_movement_back() -> None:
    grid, points = setting()
    truth = rigid_matrix(POSES[:1], CENTRE)
    volumes = head_on(grid, truth) + 30 * torch.randn(1, *grid.shape)
    targets, still = reference_values(grid, points), np.eye(4)[None]
    free = align(volumes, grid, points, targets, still, steps=25)
    held = align(volumes, grid, points, targets, still, steps=25, prior=PosePrior(still, 0.05))
    world = points.world.astype(float) + points.centre
    assert point_displacement(free.transforms, held.transforms, world).mean() < 0.02


def test_a_lost_slice_hardly_moves_a_volume() -> None:
    grid, points = setting()
    volumes = head_on(grid, np.eye(4)[None])
    volumes[:, :, :, grid.shape[2] // 2] *= 0.2
    found = align(volumes, grid, points, reference_values(grid, points), np.eye(4)[None], steps=15)
    world = points.world.astype(float) + points.centre
    assert point_displacement(found.transforms, np.eye(4)[None], world).mean() < 0.05


def test_gradients_of_a_ramp_are_its_slope(orientation: str) -> None:
    _grid, points = setting(orientation)
    slope = np.array([0.5, -1.5, 2.0])
    world = points.world.astype(float) + points.centre
    ramp = torch.from_numpy((world @ slope).astype(np.float32))[None]
    gradients = target_gradients(ramp, points)[0].numpy()
    inner = (points.neighbours != np.arange(len(points))[:, None]).all(1)
    np.testing.assert_allclose(gradients[inner], np.tile(slope, (inner.sum(), 1)), atol=1e-3)


def test_blocks_average_and_stay_in_place(orientation: str) -> None:
    grid = make_grid(orientation, (20, 21, 22), (2.0, 2.5, 4.0))
    world = grid.to_world(np.argwhere(np.ones(grid.shape, bool))).astype(np.float32)
    volumes = torch.from_numpy(world.T.reshape(3, *grid.shape).copy())
    coarse, coarse_grid = average_blocks(volumes, grid, 5.2)
    assert coarse_grid.shape == (6, 10, 22) and coarse.shape == (3, 6, 10, 22)
    expected = coarse_grid.to_world(np.argwhere(np.ones(coarse_grid.shape, bool))).T
    np.testing.assert_allclose(coarse.reshape(3, -1).numpy(), expected, atol=1e-3)
    same, same_grid = average_blocks(volumes, grid, 2.0)
    assert same is volumes and same_grid is grid
