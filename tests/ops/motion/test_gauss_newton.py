"""Gauss-Newton alignment: known movements are recovered, Numba and tensor sums agree, and priors act as specified."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image import point_set as point_set_module
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.image.eddy_displacement import eddy_on_grid
from dsiprep.ops.image.point_set import PointSet, average_blocks, point_set, target_gradients
from dsiprep.ops.motion import gauss_newton
from dsiprep.ops.motion.gauss_newton import Fit, MovingVolumes, align, make_targets, normal_equations, sample_volumes
from dsiprep.ops.motion.pose_prior import PosePrior
from helpers.grids import make_grid
from helpers.motion_subject import CENTRE, signal

POSES = np.array([[0.06, -0.04, 0.05, 3.0, -2.0, 4.0], [-0.09, 0.1, 0.02, -4.0, 3.0, -3.0]])
IDENTITY = np.eye(4)[None]


def b0_images(grid: Grid, matrices: np.ndarray) -> torch.Tensor:
    """b=0 images of the synthetic head in each pose, (n, i, j, k)."""
    voxels = np.argwhere(np.ones(grid.shape, bool))
    images = []
    for matrix in np.linalg.inv(matrices):
        points = grid.to_world(voxels) @ matrix[:3, :3].T + matrix[:3, 3]
        images.append(signal(points, 0.0, np.array([0.0, 0, 1])).reshape(grid.shape))
    return torch.from_numpy(np.stack(images).astype(np.float32))


def grid_and_points(
    orientation: str = "LAS", spacing: tuple[float, float, float] = (4.0, 4.5, 5.0)
) -> tuple[Grid, PointSet]:
    """Grid that covers the synthetic head, and the points inside the head."""
    extent = np.array([118.0, 130, 108])
    axes = make_grid(orientation, (2, 2, 2), spacing)
    shape = np.round(np.abs(axes.directions.T @ extent) / axes.voxel_sizes).astype(int)
    grid = make_grid(orientation, (int(shape[0]), int(shape[1]), int(shape[2])), spacing)
    reference = b0_images(grid, IDENTITY)[0]
    return grid, point_set((reference > 100).float(), grid)


def reference_values(grid: Grid, points: PointSet) -> torch.Tensor:
    """The b=0 image at the points, (1, m)."""
    reference = MovingVolumes(b0_images(grid, IDENTITY), grid)
    return sample_volumes(reference, points, IDENTITY, torch.zeros(1, len(points)))


def world_points(points: PointSet) -> np.ndarray:
    return points.world.astype(float) + points.centre


def test_align_recovers_rigid_movements_on_any_grid(orientation: str) -> None:
    grid, points = grid_and_points(orientation)
    truth = rigid_matrix(POSES, CENTRE)
    volumes = b0_images(grid, truth) * torch.tensor([0.8, 1.3])[:, None, None, None]
    targets = reference_values(grid, points).repeat(2, 1)
    aligned = align(MovingVolumes(volumes, grid), points, targets, np.tile(np.eye(4), (2, 1, 1)), steps=25)
    errors = point_displacement(aligned.transforms, truth, world_points(points)).mean(1)
    assert errors.max() < 0.2  # mm, with voxels of 4 to 5 mm
    np.testing.assert_allclose(aligned.fit.gain, [0.8, 1.3], rtol=0.02)


def test_align_recovers_affine_movements() -> None:
    grid, points = grid_and_points()
    truth = rigid_matrix(POSES[:1], CENTRE)
    stretch = np.eye(4)
    stretch[:3, :3] += [[0.03, 0.02, 0], [-0.01, -0.02, 0.01], [0.0, 0.03, 0.02]]
    truth = truth @ stretch
    moving = MovingVolumes(b0_images(grid, truth), grid)
    aligned = align(moving, points, reference_values(grid, points), IDENTITY, affine=True, steps=30)
    assert point_displacement(aligned.transforms, truth, world_points(points)).mean() < 0.25


def test_sampling_matches_scipy_linear_interpolation() -> None:
    grid, points = grid_and_points("oblique")
    volume = torch.rand(1, *grid.shape)
    matrix = rigid_matrix(POSES[:1], CENTRE)
    fill = torch.full((1, len(points)), -1.0)
    sampled = sample_volumes(MovingVolumes(volume, grid), points, matrix, fill).numpy()[0]
    voxels = grid.to_voxels(world_points(points) @ matrix[0, :3, :3].T + matrix[0, :3, 3])
    inside = ((voxels >= 0) & (voxels <= np.array(grid.shape) - 1)).all(1)
    expected = map_coordinates(volume[0].numpy().astype(float), voxels.T, order=1, mode="nearest")
    assert 0.9 < inside.mean() < 1
    # voxel coordinates are float32, with steps of 1e-5 voxels
    np.testing.assert_allclose(sampled[inside], expected[inside], atol=2e-4)
    assert (sampled[~inside] == -1).mean() > 0.99


@pytest.mark.parametrize("with_eddy", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_numba_and_tensor_equations_agree(affine: bool, with_eddy: bool) -> None:
    grid, points = grid_and_points("PSR")
    truth = rigid_matrix(POSES, CENTRE)
    volumes = b0_images(grid, truth)
    targets = make_targets(reference_values(grid, points).repeat(2, 1) + torch.randn(2, len(points)), points)
    gain, scale = np.array([0.9, 1.1]), np.array([50.0, 120.0])
    coefficients = np.random.default_rng(4).normal(0, 3, (2, 10))
    eddy = EddyCurrents(coefficients, grid.directions, grid.centre, 1) if with_eddy else None
    moving = MovingVolumes(volumes, grid, eddy)
    numba_sums = normal_equations(moving, targets, truth, gain, scale, affine)
    maps, displacement = gauss_newton.voxel_maps(grid, points, truth), eddy_on_grid(eddy, grid)
    torch_sums = gauss_newton._equations_torch(volumes, targets, maps, displacement, gain, scale, affine)
    for one, other in zip(numba_sums, torch_sums, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * np.abs(one).max())
    values, inside = gauss_newton._sample_torch(volumes, points, maps, displacement)
    fill = torch.full_like(targets.values, -1.0)
    expected = sample_volumes(moving, points, truth, fill)
    equal = torch.isclose(torch.where(inside, values, fill), expected, rtol=1e-4, atol=0.05)
    assert equal.float().mean() > 0.999


def test_slope_matches_finite_differences_of_the_cost() -> None:
    grid, points = grid_and_points()
    moving = MovingVolumes(b0_images(grid, rigid_matrix(POSES[:1] / 10, CENTRE)), grid)
    targets = make_targets(reference_values(grid, points), points)
    infinite, one = np.array([np.inf]), np.ones(1)

    def cost(step: np.ndarray) -> float:
        # moving the target by W is the same as sampling the volume through the inverse of W
        matrix = np.linalg.inv(rigid_matrix(step[None], points.centre))
        return normal_equations(moving, targets, matrix, one, infinite)[2][0, 0]

    _, slope, sums = normal_equations(moving, targets, IDENTITY, one, infinite)
    lengths = np.array([1e-3] * 3 + [0.05] * 3)
    for axis in range(6):
        step = np.zeros(6)
        step[axis] = lengths[axis]
        numeric = (cost(step) - cost(-step)) / (2 * lengths[axis])
        weight = sums[0, 1] / sums[0, 2]  # all weights are (nu + 1) / nu if the scale is infinite
        assert abs(-2 * slope[0, axis] - numeric) < 0.2 * np.abs(slope[0, :3] if axis < 3 else slope[0, 3:6]).max()
        assert weight == pytest.approx(1.25)


def test_pose_prior_decides_if_the_target_has_no_structure() -> None:
    grid, points = grid_and_points()
    moving, targets = MovingVolumes(torch.randn(1, *grid.shape), grid), torch.zeros(1, len(points))
    expected = rigid_matrix(POSES[:1] / 20, CENTRE)
    aligned = align(moving, points, targets, IDENTITY, steps=30, prior=PosePrior(expected, 0.1))
    assert point_displacement(aligned.transforms, expected, world_points(points)).max() < 0.02


def test_pose_prior_does_not_restrain_a_clear_movement() -> None:
    grid, points = grid_and_points()
    truth = rigid_matrix(POSES[:1], CENTRE)
    moving = MovingVolumes(b0_images(grid, truth) + 30 * torch.randn(1, *grid.shape), grid)
    targets = reference_values(grid, points)
    without = align(moving, points, targets, IDENTITY, steps=25)
    with_prior = align(moving, points, targets, IDENTITY, steps=25, prior=PosePrior(IDENTITY, 0.05))
    assert point_displacement(without.transforms, with_prior.transforms, world_points(points)).mean() < 0.02


def test_a_slice_with_signal_dropout_hardly_affects_alignment() -> None:
    grid, points = grid_and_points()
    volumes = b0_images(grid, IDENTITY)
    volumes[:, :, :, grid.shape[2] // 2] *= 0.2
    aligned = align(MovingVolumes(volumes, grid), points, reference_values(grid, points), IDENTITY, steps=15)
    assert point_displacement(aligned.transforms, IDENTITY, world_points(points)).mean() < 0.05


def test_gradients_of_a_linear_ramp(orientation: str) -> None:
    _grid, points = grid_and_points(orientation)
    slope = np.array([0.5, -1.5, 2.0])
    ramp = torch.from_numpy((world_points(points) @ slope).astype(np.float32))[None]
    gradients = target_gradients(ramp, points)[0].numpy()
    interior = (points.neighbours != np.arange(len(points))[:, None]).all(1)
    np.testing.assert_allclose(gradients[interior], np.tile(slope, (interior.sum(), 1)), atol=1e-3)


@pytest.mark.parametrize("step", [1, 7])
def test_loops_and_tensors_give_the_same_gradients(step: int) -> None:
    _grid, points = grid_and_points("oblique")
    values = torch.randn(2, len(points), generator=torch.Generator().manual_seed(1))
    inverse = torch.as_tensor(np.linalg.inv(points.grid.affine[:3, :3]), dtype=torch.float32)
    chosen = np.arange(0, len(points), step)
    expected = point_set_module._gradients_torch(values, points, inverse, chosen)
    torch.testing.assert_close(target_gradients(values, points, chosen), expected)
    torch.testing.assert_close(target_gradients(values, points)[:, chosen], expected)


def test_a_known_fit_saves_steps_and_leads_to_the_same_pose(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, points = grid_and_points()
    noise = torch.randn(2, *grid.shape, generator=torch.Generator().manual_seed(1))
    start = rigid_matrix(POSES / 10, CENTRE)
    moving = MovingVolumes(b0_images(grid, start) + 20 * noise, grid)
    targets = reference_values(grid, points).repeat(2, 1)
    first = align(moving, points, targets, start, steps=15)
    calls: list[int] = []
    equations = normal_equations
    monkeypatch.setattr(gauss_newton, "normal_equations", lambda *args: (calls.append(1), equations(*args))[1])
    again = align(moving, points, targets, first.transforms, fit=first.fit)
    assert len(calls) == 1
    assert point_displacement(again.transforms, first.transforms, world_points(points)).max() < 0.02
    unknown = align(moving, points, targets, first.transforms, fit=Fit(first.fit.gain, np.full(2, np.inf)))
    assert len(calls) >= 4
    assert point_displacement(unknown.transforms, first.transforms, world_points(points)).max() < 0.05


def test_block_averages_keep_world_positions(orientation: str) -> None:
    grid = make_grid(orientation, (20, 21, 22), (2.0, 2.5, 4.0))
    world = grid.to_world(np.argwhere(np.ones(grid.shape, bool))).astype(np.float32)
    volumes = torch.from_numpy(world.T.reshape(3, *grid.shape).copy())
    coarse, coarse_grid = average_blocks(volumes, grid, 5.2)
    assert coarse_grid.shape == (6, 10, 22)
    assert coarse.shape == (3, 6, 10, 22)
    expected = coarse_grid.to_world(np.argwhere(np.ones(coarse_grid.shape, bool))).T
    np.testing.assert_allclose(coarse.reshape(3, -1).numpy(), expected, atol=1e-3)
    same, same_grid = average_blocks(volumes, grid, 2.0)
    assert same is volumes
    assert same_grid is grid
