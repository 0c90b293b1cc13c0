"""Errors of the poses of slices: of the truth itself, of a known error, and of the table that the pipeline writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.motion import SliceMotion
from dsiprep.io.slice_motion_table import write_slice_motion
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.score.read import Truth
from dsiprep.score.slices import read_slice_poses, slice_errors
from helpers.grids import make_grid
from helpers.identity_results import make_coregistration, make_motion

SLICES = 8


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    grid = make_grid("LAS", (10, 11, SLICES), (5.0, 5.0, 5.0))
    parameters = np.random.default_rng(0).normal(size=(3, SLICES, 6)) * ([0.02] * 3 + [1.0] * 3)
    parameters[1] = parameters[1, :1]
    poses = rigid_matrix(parameters, grid.centre)
    np.save(tmp_path / "slice_head_to_scanner.npy", poses)
    table: dict[str, Any] = {
        "head_to_scanner": poses.mean(axis=1).tolist(),
        "grid_affine": grid.affine.tolist(),
        "grid_shape": list(grid.shape),
    }
    return Truth(tmp_path, table)


def test_errors_of_slices(truth: Truth) -> None:
    grid = make_grid("LAS", (10, 11, SLICES), (5.0, 5.0, 5.0))
    points = grid.to_world(np.argwhere(np.ones(grid.shape, bool)))
    common = rigid_matrix(np.array([0.1, 0, -0.1, 3, 2, 1]), grid.centre)
    exact = truth.slice_poses @ np.linalg.inv(common)
    errors = slice_errors(truth, exact, common, points)
    assert np.nanmax(errors) < 1e-9
    wrong = exact.copy()
    wrong[0, 3, :3, 3] += [0, 0.6, 0.8]
    errors = slice_errors(truth, wrong, common, points)
    assert errors[0, 3] == pytest.approx(1)
    assert np.nanmax(np.delete(errors.ravel(), 3)) < 1e-9
    assert list(truth.moved_within) == [True, False, True]


def test_written_table_has_the_poses_and_gradients_of_slices(truth: Truth, tmp_path: Path) -> None:
    grid = make_grid("LAS", (10, 11, SLICES), (5.0, 5.0, 5.0))
    shots = tuple((k, k + SLICES // 2) for k in (0, 2, 1, 3))
    poses = truth.slice_poses[:, [group[0] for group in shots]]
    moving = np.array([True, False, True])
    none = np.zeros((0, 4), int)
    slices = SliceMotion(poses, shots, moving, np.zeros(3), np.zeros((3, SLICES), bool), none, np.zeros(0, np.float32))
    motion = replace(make_motion(grid, truth.poses, np.arange(3)), slices=slices)
    bvecs = np.array([[0.6, 0, 0.8], [0, 1, 0], [0, 0, 1]])
    one = np.zeros(3, int)
    dwi = DWI(torch.zeros(3, *grid.shape), grid, np.full(3, 1000.0), bvecs, one, one)
    to_dwiref = rigid_matrix(np.array([0.1, 0.2, 0, 1, 2, 3]))
    results: Any = SimpleNamespace(
        motions=(motion,),
        acquired=SimpleNamespace(dwi=dwi),
        distortion=None,
        coregistration=make_coregistration(to_dwiref),
    )
    write_slice_motion(tmp_path / "sub-01", results)
    path = tmp_path / "sub-01_space-ACPC_desc-slicemotion_timeseries.tsv"
    found = read_slice_poses(path, truth, truth.poses)
    np.testing.assert_allclose(found[moving], slices.slice_poses[moving], atol=1e-4)
    np.testing.assert_allclose(found[1], np.tile(truth.poses[1], (SLICES, 1, 1)))
    rows = np.loadtxt(path, skiprows=1)
    assert rows.shape == (2 * SLICES, 12)
    assert list(rows[:SLICES, 2].astype(int)) == [0, 2, 1, 3, 0, 2, 1, 3]
    expected = rotate_bvecs(bvecs[0], slices.slice_poses[0, 5] @ to_dwiref)
    np.testing.assert_allclose(rows[5, 9:], expected, atol=1e-5)
    still = replace(motion, slices=replace(slices, moving=np.zeros(3, bool)))
    write_slice_motion(tmp_path / "sub-02", SimpleNamespace(**{**vars(results), "motions": (still,)}))  # type: ignore[arg-type]
    assert not list(tmp_path.glob("sub-02*"))
