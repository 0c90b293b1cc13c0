"""Volumes put together from slices with poses of their own."""

from __future__ import annotations

import numpy as np
import pytest

from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.motion.slice_reconstruction import reconstruct, sample_density
from dsiprep.ops.motion.slice_samples import in_one_pose
from helpers.grids import make_grid

SHAPE = (18, 20, 16)


def _smooth(world: np.ndarray) -> np.ndarray:
    return 100 + 40 * np.sin(world @ [0.21, 0.1, -0.16]) + 30 * np.cos(world @ [-0.1, 0.2, 0.18])


@pytest.mark.parametrize("axis", [0, 2])
def test_moved_slices_are_put_back(axis: int) -> None:
    grid = make_grid("oblique", SHAPE, (3.0, 3.0, 3.0))
    voxels = np.argwhere(np.ones(SHAPE, bool))
    rng = np.random.default_rng(2)
    within = grid.directions[:, (axis + 1) % 3] * 4 + grid.directions[:, (axis + 2) % 3] * 2
    move = np.concatenate([0.04 * grid.directions[:, axis], within])  # no gaps open between slices
    parameters = np.where(np.arange(SHAPE[axis])[:, None] % 2, move, 0) + 0.002 * rng.normal(size=6)
    poses, mean = rigid_matrix(parameters, grid.centre), np.eye(4)
    back = np.linalg.inv(poses)[voxels[:, axis]]
    world = np.einsum("mab,mb->ma", back[:, :3, :3], grid.to_world(voxels)) + back[:, :3, 3]
    acquired, true = _smooth(world).astype(np.float32), _smooth(grid.to_world(voxels)).reshape(SHAPE)
    points = in_one_pose(voxels, grid, poses, axis, mean)
    found = reconstruct(acquired, points, true.astype(np.float32))
    inner = (slice(3, -3),) * 3
    before = np.abs(acquired.reshape(SHAPE) - true)[inner].mean()
    after = np.abs(found.values - true)[inner].mean()
    assert before > 5
    assert after < 0.1 * before
    density = sample_density(points[((points >= 1) & (points < np.array(SHAPE) - 2)).all(1)], SHAPE)
    assert found.gap[inner].mean() == (density < 0.25)[inner].mean()


def test_volume_at_rest_is_unchanged_and_gaps_are_filled() -> None:
    grid = make_grid("RAS", SHAPE, (3.0, 3.0, 3.0))
    voxels = np.argwhere(np.ones(SHAPE, bool))
    true = _smooth(grid.to_world(voxels)).reshape(SHAPE).astype(np.float32)
    elsewhere = np.full(SHAPE, 77, np.float32)
    kept = ~np.isin(voxels[:, 2], (7, 8, 9))
    found = reconstruct(true.ravel()[kept], voxels[kept].astype(np.float32), elsewhere)
    assert found.gap[2:-3, 2:-3, 8].all()
    np.testing.assert_allclose(found.values[3:-3, 3:-3, 8], 77, atol=25)
    np.testing.assert_allclose(found.values[4:-4, 4:-4, 3:5], true[4:-4, 4:-4, 3:5], rtol=0.02)


def test_displacements_stay_with_the_head_and_the_scanner() -> None:
    """Where a point of the head appears in both poses, with eddy currents, by the maps of the forward model."""
    grid = make_grid("LPS", SHAPE, (3.0, 3.0, 3.0))
    eddy = EddyCurrents(np.array([[1.0, 2, -3, 1, 0, 0, 0, 0, 0, 0]]), grid.directions, grid.centre, 1)
    poses = rigid_matrix(np.random.default_rng(4).normal(size=(SHAPE[2], 6)) * ([0.05] * 3 + [2] * 3), grid.centre)
    mean = rigid_matrix(np.array([0.02, 0, 0.01, 1, 0, 0]), grid.centre)
    voxels = np.argwhere(np.ones(SHAPE, bool))[::37]
    there = grid.to_world(in_one_pose(voxels, grid, poses, 2, mean, eddy=eddy))

    def appears(pose: np.ndarray, head: np.ndarray) -> np.ndarray:
        scanner = head @ pose[:3, :3].T + pose[:3, 3]
        return scanner + eddy.displacement(0, scanner)

    undisplaced = there.copy()
    for _ in range(20):
        undisplaced = there - eddy.displacement(0, undisplaced)
    inverse = np.linalg.inv(mean)
    head = undisplaced @ inverse[:3, :3].T + inverse[:3, 3]
    for voxel, point in zip(voxels, head, strict=True):
        np.testing.assert_allclose(appears(poses[voxel[2]], point), grid.to_world(voxel), atol=0.02)
