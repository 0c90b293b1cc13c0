"""Motion of the phantom while a volume is acquired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.errors import SettingsError
from dsiprep.ops.image.affine import point_displacement, rigid_matrix, rigid_parameters
from dsiprep.phantom import PhantomSettings
from dsiprep.phantom.motion_within import moving_volumes, slice_poses
from dsiprep.phantom.scanner import Source, scan
from dsiprep.phantom.session import Session
from dsiprep.phantom.slice_acquisition import slice_timing
from helpers.grids import make_grid

SLICES, VOLUMES = 20, 60
POINTS = np.random.default_rng(0).normal(size=(300, 3)) * 40 + [0, -15, 10]


def _poses(settings: PhantomSettings) -> np.ndarray:
    return slice_poses(np.tile(np.eye(4), (VOLUMES, 1, 1)), SLICES, POINTS, settings, np.random.default_rng(1))


def test_moves_have_the_requested_number_and_size() -> None:
    poses = _poses(PhantomSettings(moved_within=0.2))
    order = np.argsort(slice_timing(SLICES), kind="stable")
    moving = moving_volumes(poses)
    assert abs(moving.sum() - 0.2 * (VOLUMES - 1)) <= 2  # a move that begins after the last shot is not seen
    assert not moving[0]
    for volume in np.flatnonzero(moving):
        first, last = poses[volume, order[0]], poses[volume, order[-1]]
        move = rigid_parameters(last @ np.linalg.inv(first), POINTS.mean(axis=0))
        assert np.rad2deg(np.linalg.norm(move[:3])) < 9.1
        assert np.linalg.norm(move[3:]) < 11  # translations before and after are about different rotations
    # the head rests between moves, and slices of one shot have one pose
    rest = ~moving
    assert np.ptp(poses[rest], axis=1).max() < 1e-9
    np.testing.assert_allclose(poses[:, : SLICES // 2], poses[:, SLICES // 2 :], atol=1e-9)
    np.testing.assert_allclose(poses[1:][rest[1:], order[0]], poses[:-1][rest[1:], order[-1]], atol=1e-9)


def test_steady_motion_has_the_requested_speed() -> None:
    poses = _poses(PhantomSettings(steady=1.0))
    assert moving_volumes(poses).all()
    order = np.argsort(slice_timing(SLICES), kind="stable")
    first = poses[:, order[0]]
    assert point_displacement(first[1:], first[:-1], POINTS).mean() == pytest.approx(1, rel=0.05)
    within = poses.transpose(1, 0, 2, 3)[order]
    steps = [point_displacement(b, a, POINTS).mean() for a, b in zip(within[:-2:2], within[2::2], strict=True)]
    assert np.mean(steps) == pytest.approx(1 / (SLICES / 2), rel=0.2)


def test_slices_scanned_alone_are_those_of_the_volume() -> None:
    grid = make_grid("oblique", (16, 18, 8), (4.0, 4.0, 4.0))
    fine = Grid((40, 40, 40), np.diag([2.5, 2.5, 2.5, 1]) + np.outer([1, 1, 1, 0], [0, 0, 0, 1]) * -45)
    x = fine.to_world(np.stack(np.meshgrid(*map(np.arange, fine.shape), indexing="ij"), -1))
    image = np.exp(-(x**2 @ [1.0, 0.7, 1.4]) / 800).astype(np.float32)
    source = Source(image, fine, (30 * image).astype(np.float32), fine)
    pe, eddy = PhaseEncoding(1, 1, 0.05), np.array([0.5, 1, 0, -1, 0, 0, 0, 0, 0])
    pose = rigid_matrix(np.array([0.05, 0.02, -0.04, 2, -1, 3]))
    whole = scan(source, grid, pe, pose, eddy)
    none = np.zeros((1, 3))
    session = Session(
        grid, pe, pe, np.zeros(1), none, pose[None], pose[None], np.zeros(1, bool), eddy[None], np.ones((1, 8)),
        np.ones(1), source.field, fine,
    )  # fmt: skip
    for number in range(8):
        alone = scan(source, session._slice_grid(number), pe, pose, eddy)
        np.testing.assert_allclose(alone[..., 0], whole[..., number], rtol=1e-5, atol=1e-5)


def test_without_it_nothing_is_written_or_drawn() -> None:
    assert "steady" not in PhantomSettings().described()
    assert "moved_within" not in PhantomSettings().described()
    with pytest.raises(SettingsError, match="moved-within"):
        replace(PhantomSettings(), moved_within=1.5).check()
    with pytest.raises(SettingsError, match="steady"):
        replace(PhantomSettings(), steady=-1).check()
