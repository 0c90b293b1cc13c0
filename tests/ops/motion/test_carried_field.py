"""A turned head with off-resonance: what poses alone miss, in samples, equations and predictions of slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.point_set import point_set
from dsiprep.ops.motion.carried_field import carried_field
from dsiprep.ops.motion.slice_equations import PredictedSlices
from helpers.grids import make_grid

SHAPE = (22, 24, 20)
SLOPE, OFFSET = np.array([0.04, -0.05, 0.06]), 3.0  # of the displacement in mm, linear so that all is exact
BLIP = rigid_matrix(np.array([0.02, -0.01, 0.03, 0.5, 1, -0.5]))


def head(world: np.ndarray) -> np.ndarray:
    return 100 + 40 * np.sin(world @ [0.11, 0.05, -0.07]) + 30 * np.cos(world @ [-0.04, 0.09, 0.1])


def undistorted(points: np.ndarray, pose: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, float]:
    """Points x of the head that appear at `points` = pose @ x + u(x) direction, and the Jacobian determinant."""
    back = np.linalg.inv(pose)
    bent = back[:3, :3] @ direction
    start = points @ back[:3, :3].T + back[:3, 3]
    jacobian = 1 + float(SLOPE @ bent)
    u = (OFFSET + start @ SLOPE) / jacobian
    return start - u[:, None] * bent, jacobian


def image(grid: Grid, poses: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The head as acquired with a pose for each slice along k, (i, j, k)."""
    out = np.empty(grid.shape, np.float32)
    plane = np.argwhere(np.ones(grid.shape[:2], bool))
    for k, pose in enumerate(poses):
        x, jacobian = undistorted(grid.to_world(np.insert(plane, 2, k, axis=1)), pose, direction)
        out[..., k] = (head(x) / jacobian).reshape(grid.shape[:2])
    return out


def slices_of(orientation: str, poses: np.ndarray, known: bool = True) -> PredictedSlices:
    """One volume of the head in these poses (shots, 4, 4) from the reference, and its exact prediction."""
    grid = make_grid(orientation, SHAPE, (3.0, 3.2, 3.5))
    direction = grid.directions[:, 1]
    mask = np.zeros(SHAPE, np.float32)
    mask[5:-5, 5:-5, 5:-5] = 1
    points = point_set(torch.from_numpy(mask), grid)
    x, jacobian = undistorted(points.world.astype(float) + points.centre, BLIP, direction)
    predicted = torch.from_numpy((head(x) / jacobian).astype(np.float32))[None]
    data = torch.from_numpy(image(grid, poses @ BLIP, direction))[None]
    dwi = DWI(data, grid, np.zeros(1), np.zeros((1, 3)), np.zeros(1, int), np.zeros(1, int))
    u = OFFSET + grid.to_world(np.argwhere(np.ones(SHAPE, bool))) @ SLOPE
    vectors = (direction[:, None] * u).reshape(3, *SHAPE).astype(np.float32)
    field = carried_field(DisplacementField(torch.from_numpy(vectors), grid), BLIP, grid) if known else None
    shots = tuple((k,) for k in range(SHAPE[2]))
    return PredictedSlices(dwi, points, predicted, None, 2, shots, np.zeros((1, SHAPE[2]), bool), field)


def poses_by_slice(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    turned = np.array([0.12, -0.08, 0.1, 1.0, -1, 0.5])
    return rigid_matrix(turned + rng.normal(size=(SHAPE[2], 6)) * ([0.01] * 3 + [0.3] * 3))


@pytest.mark.parametrize("orientation", ["LAS", "PSR", "oblique"])
def test_the_displacement_is_that_of_the_head(orientation: str) -> None:
    slices = slices_of(orientation, np.tile(np.eye(4), (SHAPE[2], 1, 1)))
    field, points = slices.field, slices.points
    assert field is not None
    x, _ = undistorted(points.world.astype(float) + points.centre, BLIP, slices.dwi.grid.directions[:, 1])
    found = field.table[tuple(points.voxels.astype(int).T)]
    sign = float(field.direction @ slices.dwi.grid.directions[:, 1])
    np.testing.assert_allclose(found[:, 0] * sign, OFFSET + x @ SLOPE, atol=0.02)
    assert np.abs(field.turns(np.eye(4))).max() < 1e-12
    assert field.largest_bend(np.eye(4)) < 1e-12


@pytest.mark.parametrize("orientation", ["LAS", "PSR", "oblique"])
def test_samples_of_a_turned_head_match_its_prediction(orientation: str) -> None:
    """Slices are interpolated linearly, by poses that are a little apart; poses alone miss 0.6 mm."""
    poses = np.tile(rigid_matrix(np.array([0.12, -0.08, 0.1, 1.0, -1, 0.5])), (SHAPE[2], 1, 1))
    errors = {}
    for known in (True, False):
        slices = slices_of(orientation, poses, known)
        values, weight = slices.samples(np.array([0]), poses[None])
        full = weight[0] > 0.99
        assert full.float().mean() > 0.9
        errors[known] = float((values - slices.predicted)[0, full].abs().mean())
    assert errors[True] < 0.6
    assert errors[False] > 2.5 * errors[True]


@pytest.mark.parametrize("orientation", ["LAS", "PSR", "oblique"])
def test_equations_hold_at_the_true_poses(orientation: str) -> None:
    """The residual is small there, of the voxels at the edge alone, and the slope elsewhere leads back to them."""
    true = poses_by_slice(3)
    slices, unaware = (slices_of(orientation, true, known) for known in (True, False))
    coefficients, gain = slices.coefficients(0), np.ones(SHAPE[2])
    at_truth, without = (s.equations(0, coefficients, true, gain, np.inf) for s in (slices, unaware))
    robust = [s.equations(0, coefficients, true, gain, at_truth.scale / 3).scale for s in (slices, unaware)]
    assert at_truth.scale < 0.4 * without.scale
    assert robust[0] < 0.3 * robust[1]
    centre, rng = slices.points.centre, np.random.default_rng(5)
    away = rng.normal(size=(SHAPE[2], 6)) * ([0.004] * 3 + [0.2] * 3)
    there = true @ rigid_matrix(away, centre)
    found = slices.equations(0, coefficients, there, gain, robust[0])
    inner = found.voxels > 50
    assert inner.sum() >= 8
    total = found.hessian[inner]
    step = np.linalg.solve(total, found.slope[inner][..., None])[..., 0]
    left = np.linalg.inv(true[inner]) @ there[inner] @ rigid_matrix(step, centre)
    size = [np.abs(m[:, :3, 3]).mean() for m in (left, rigid_matrix(away[inner], np.zeros(3)))]
    assert size[0] < 0.2 * size[1]


def test_prediction_in_a_turned_pose() -> None:
    pose = rigid_matrix(np.array([0.12, -0.08, 0.1, 1.0, -1, 0.5]))
    slices = slices_of("LAS", np.tile(pose, (SHAPE[2], 1, 1)))
    voxels = np.argwhere(np.ones(SHAPE, bool))
    values, brain = slices.prediction_at(0, voxels, pose, 1.0)
    expected = slices.dwi.data[0].numpy().ravel()
    assert brain.sum() > 500
    assert np.abs(values - expected)[brain].mean() < 0.6
