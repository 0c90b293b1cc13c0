"""A turned head with off-resonance: what poses alone miss, in samples, equations and predictions of slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.image.point_set import point_set
from dsiprep.ops.motion.carried_field import carried_field
from dsiprep.ops.motion.shot_poses import settled, single_poses
from dsiprep.ops.motion.slice_equations import PredictedSlices
from helpers.grids import make_grid

SHAPE = (30, 32, 28)
SLOPE, OFFSET = np.array([0.04, -0.05, 0.06]), 3.0  # of the displacement in mm, linear so that all is exact
TURNED = rigid_matrix(np.array([0.12, -0.08, 0.1, 1.0, -1, 0.5]))
BLIP = rigid_matrix(np.array([0.02, -0.01, 0.03, 0.5, 1, -0.5]))


def head(world: np.ndarray, ends: bool) -> np.ndarray:
    """Intensity of a head, which may end within the mask: predictions are not known beyond it."""
    inside = np.exp(-((np.linalg.norm(world - [3.0, -5, 8], axis=-1) / 17) ** 4)) if ends else 1.0
    return inside * (100 + 40 * np.sin(world @ [0.11, 0.05, -0.07]) + 30 * np.cos(world @ [-0.04, 0.09, 0.1]))


def undistorted(points: np.ndarray, pose: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, float]:
    """Points x of the head that appear at `points` = pose @ x + u(x) direction, and the Jacobian determinant."""
    back = np.linalg.inv(pose)
    bent = back[:3, :3] @ direction
    start = points @ back[:3, :3].T + back[:3, 3]
    jacobian = 1 + float(SLOPE @ bent)
    u = (OFFSET + start @ SLOPE) / jacobian
    return start - u[:, None] * bent, jacobian


def image(grid: Grid, poses: np.ndarray, direction: np.ndarray, ends: bool) -> np.ndarray:
    """The head as acquired with a pose for each slice along k, (i, j, k)."""
    out = np.empty(grid.shape, np.float32)
    plane = np.argwhere(np.ones(grid.shape[:2], bool))
    for k, pose in enumerate(poses):
        x, jacobian = undistorted(grid.to_world(np.insert(plane, 2, k, axis=1)), pose, direction)
        out[..., k] = (head(x, ends) / jacobian).reshape(grid.shape[:2])
    return out


def slices_of(orientation: str, poses: np.ndarray, known: bool = True, ends: bool = False) -> PredictedSlices:
    """One volume of the head in these poses (shots, 4, 4) from the reference, and its exact prediction."""
    grid = make_grid(orientation, SHAPE, (3.0, 3.2, 3.5))
    direction = grid.directions[:, 1]
    mask = np.zeros(SHAPE, np.float32)
    mask[6:-6, 6:-6, 6:-6] = 1
    points = point_set(torch.from_numpy(mask), grid)
    x, jacobian = undistorted(points.world.astype(float) + points.centre, BLIP, direction)
    predicted = torch.from_numpy((head(x, ends) / jacobian).astype(np.float32))[None]
    data = torch.from_numpy(image(grid, poses @ BLIP, direction, ends))[None]
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
    """Slices are interpolated linearly, between slices too; poses alone miss 0.6 mm."""
    poses = np.tile(TURNED, (SHAPE[2], 1, 1))
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
def test_residuals_vanish_at_the_true_poses_of_slices(orientation: str) -> None:
    true, scale = poses_by_slice(3), {}
    for known in (True, False):
        slices = slices_of(orientation, true, known, ends=True)
        scale[known] = slices.equations(0, slices.coefficients(0), true, np.ones(SHAPE[2]), np.inf).scale
    assert scale[True] < 0.4 * scale[False]  # voxels at the edge remain, where the prediction ends


@pytest.mark.parametrize("orientation", ["LAS", "PSR", "oblique"])
def test_a_turned_volume_is_registered_to_its_pose(orientation: str) -> None:
    away, errors = rigid_matrix(np.array([0.01, -0.01, 0.008, 0.4, 0.3, -0.4])), {}
    for known in (True, False):
        slices = slices_of(orientation, np.tile(TURNED, (SHAPE[2], 1, 1)), known, ends=True)
        state = settled(slices, single_poses((TURNED @ away)[None], slices), np.array([0]))
        inside = slices.points.world.astype(float) + slices.points.centre
        errors[known] = float(point_displacement(state.poses[0, :1], TURNED[None], inside).mean())
    assert errors[True] < 0.05
    assert errors[False] > 4 * errors[True]


def test_prediction_in_a_turned_pose() -> None:
    errors, voxels = {}, np.argwhere(np.ones(SHAPE, bool))
    for known in (True, False):
        slices = slices_of("LAS", np.tile(TURNED, (SHAPE[2], 1, 1)), known)
        values, brain = slices.prediction_at(0, voxels, TURNED, 1.0)
        assert brain.sum() > 500
        errors[known] = float(np.abs(values - slices.dwi.data[0].numpy().ravel())[brain].mean())
    assert errors[True] < 1.0  # interpolated linearly, and at the edge from one side
    assert errors[False] > 2.5 * errors[True]
