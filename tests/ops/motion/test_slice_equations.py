"""Equations of slices: derivatives by finite differences, and sampling against trilinear interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.dwi import DWI
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.point_set import point_set
from dsiprep.ops.motion.gauss_newton import MovingVolumes, sample_volumes
from dsiprep.ops.motion.slice_equations import PredictedSlices
from helpers.grids import make_grid

SHAPE = (14, 15, 12)


def _smooth(world: np.ndarray) -> np.ndarray:
    return 100 + 40 * np.sin(world @ [0.11, 0.05, -0.07]) + 30 * np.cos(world @ [-0.04, 0.09, 0.1])


def _slices(orientation: str, axis: int, eddy: bool = False) -> PredictedSlices:
    grid = make_grid(orientation, SHAPE, (4.0, 4.5, 5.0))
    world = grid.to_world(np.argwhere(np.ones(SHAPE, bool)))
    image = _smooth(world).reshape(SHAPE).astype(np.float32)
    mask = np.zeros(SHAPE, np.float32)
    mask[3:-3, 3:-3, 3:-3] = 1
    points = point_set(torch.from_numpy(mask), grid)
    n = SHAPE[axis]
    shots = (
        tuple((k, k + n // 2) for k in (*range(0, n // 2, 2), *range(1, n // 2, 2)))
        if n % 2 == 0
        else tuple((k,) for k in range(n))
    )
    dwi = DWI(torch.from_numpy(image)[None], grid, np.zeros(1), np.zeros((1, 3)), np.zeros(1, int), np.zeros(1, int))
    predicted = torch.from_numpy(image[mask > 0.5])[None]
    coefficients = np.array([[0.8, 1, -2, 1.5, 0, 0.5, 0, 0, 0, 0]])
    currents = EddyCurrents(coefficients, grid.directions, grid.centre, 1 if axis != 1 else 0) if eddy else None
    return PredictedSlices(dwi, points, predicted, currents, axis, shots, np.zeros((1, n), bool))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slope_is_that_of_the_cost(axis: int) -> None:
    slices = _slices("oblique", axis)
    coefficients, count = slices.coefficients(0), SHAPE[axis]
    rng = np.random.default_rng(1)
    poses = rigid_matrix(rng.normal(size=(len(slices.shots), 6)) * ([0.01] * 3 + [0.6] * 3), slices.points.centre)
    scale = 3.0
    gain = np.ones(count)
    for _ in range(30):  # gains that minimise the cost, so that it does not change with them
        here = slices.equations(0, coefficients, poses, gain, scale)
        gain = here.gain
    shot = len(slices.shots) // 2
    for parameter, size in ((0, 1e-4), (2, 1e-4), (3, 5e-3), (5, 5e-3)):
        step = np.zeros(6)
        step[parameter] = size
        costs = []
        for sign in (1, -1):
            moved = poses.copy()
            moved[shot] = moved[shot] @ rigid_matrix(sign * step, slices.points.centre)
            costs.append(slices.equations(0, coefficients, moved, gain, scale).cost[shot])
        variance = min(scale, here.scale) ** 2 / scale**2  # equations are divided by the smaller scale
        expected = -(costs[0] - costs[1]) / (2 * size)
        assert here.slope[shot, parameter] * variance == pytest.approx(expected, rel=0.05, abs=0.02 * abs(expected) + 1)


@pytest.mark.parametrize("eddy", [False, True])
@pytest.mark.parametrize("axis", [0, 2])
def test_one_pose_gives_trilinear_interpolation(axis: int, eddy: bool) -> None:
    slices = _slices("LPS", axis, eddy)
    pose = rigid_matrix(np.array([0.03, -0.02, 0.04, 1.0, 2, -1]), slices.points.centre)
    values, weight = slices.samples(np.array([0]), np.tile(pose, (1, len(slices.shots), 1, 1)))
    moving = MovingVolumes(slices.dwi.data, slices.dwi.grid, slices.eddy)
    expected = sample_volumes(moving, slices.points, pose[None], torch.zeros(1, len(slices.points)))
    full = weight[0] > 0.999
    assert full.float().mean() > 0.9
    np.testing.assert_allclose(values[0, full], expected[0, full], rtol=2e-4)


def test_each_slice_is_sampled_by_its_own_pose() -> None:
    """Slices shifted along an axis within them: SciPy's interpolation of each, by its own shift."""
    slices = _slices("RAS", 2)
    shifts = np.linspace(-3, 3, len(slices.shots))
    poses = np.tile(np.eye(4), (len(slices.shots), 1, 1))
    poses[:, 0, 3] = shifts
    values, weight = slices.samples(np.array([0]), poses[None])
    voxels = slices.points.voxels
    own = shifts[slices.shot_of][voxels[:, 2].astype(int)] / slices.dwi.grid.affine[0, 0]
    expected = map_coordinates(slices.dwi.data[0].numpy(), (voxels + np.outer(own, [1, 0, 0])).T, order=1)
    assert weight.min() == 1
    np.testing.assert_allclose(values[0], expected, rtol=1e-4)


def test_slices_with_dropout_are_not_sampled() -> None:
    slices = _slices("RAS", 2)
    slices.lost[0, 5] = True
    _, weight = slices.samples(np.array([0]), np.tile(np.eye(4), (1, len(slices.shots), 1, 1)))
    assert (weight[0][slices.points.voxels[:, 2] == 5] == 0).all()
    assert (weight[0][slices.points.voxels[:, 2] != 5] == 1).all()
