"""Eddy currents: read where they displace to, found beside motion, written so that ITK applies them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from scipy.ndimage import map_coordinates
from scipy.stats import f as f_distribution

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.io.itk import write_eddy_series
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.point_set import point_set
from dsiprep.ops.motion.eddy_model import BY_CHANCE, kept_fraction
from dsiprep.ops.motion.gauss_newton import sample_volumes
from dsiprep.settings import MotionSettings
from dsiprep.stages.motion import estimate_motion
from helpers.grids import make_grid
from helpers.motion_subject import errors, make_subject

FLIP = np.array([-1.0, -1.0, 1.0])


def test_volumes_are_read_where_eddy_currents_displace_to(orientation: str) -> None:
    """Against SciPy's linear interpolation at x + e(x) d, times the derivative of the map by finite differences."""
    grid = make_grid(orientation, (20, 24, 18), (3.0, 2.5, 4.0))
    rng = np.random.default_rng(0)
    volume = rng.random((1, *grid.shape)).astype(np.float32)
    inside = np.zeros(grid.shape, np.float32)
    inside[5:-5, 6:-6, 5:-5] = 1
    points = point_set(torch.from_numpy(inside), grid)
    eddy = EddyCurrents(rng.normal(0, 4, (1, 10)), grid.directions, grid.centre, 1)
    matrix = rigid_matrix(np.array([0.02, -0.03, 0.01, 1.0, -1.0, 0.5]), grid.centre)
    found = sample_volumes(torch.from_numpy(volume), grid, points, matrix[None], torch.zeros(1, len(points)), eddy)[
        0
    ].numpy()

    still = (points.world + points.centre) @ matrix[:3, :3].T + matrix[:3, 3]
    d = grid.directions[:, 1]
    moved = still + eddy.displacement(0, still)
    step = 0.01
    slope = (eddy.displacement(0, still + step * d) - eddy.displacement(0, still - step * d)) @ d / (2 * step)
    expected = map_coordinates(volume[0].astype(float), grid.to_voxels(moved).T, order=1) * (1 + slope)
    assert np.abs(moved - still).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_eddy_currents_are_found_beside_motion() -> None:
    """Volumes displaced by SciPy."""
    subject = make_subject(count=46, moved=0.2, noise=15.0)
    dwi, grid = subject.dwi, subject.dwi.grid
    strength = np.sqrt(dwi.bvals / dwi.bvals.max())
    response = np.random.default_rng(3).normal(0, 1.5, (10, 3))
    truth = EddyCurrents((strength[:, None] * dwi.bvecs) @ response.T, grid.directions, grid.centre, 1)
    data = np.stack([_displaced(volume, v, truth, grid) for v, volume in enumerate(dwi.data.numpy())])
    bent = replace(dwi, data=torch.from_numpy(data))
    pe, settings = PhaseEncoding(1, 1), MotionSettings(iters=4)
    found = estimate_motion(bent, subject.mask, settings, pe)
    assert found.eddy is not None
    world = grid.to_world(np.argwhere(subject.mask.numpy() > 0)[::40])
    weighted = np.flatnonzero(~dwi.is_b0)
    there = np.stack([truth.displacement(v, world) for v in weighted])
    left = np.stack([found.eddy.displacement(v, world) for v in weighted]) - there
    assert np.abs(there).sum(-1).mean() > 0.8
    assert np.abs(left).sum(-1).mean() < 0.3 * np.abs(there).sum(-1).mean()
    rotation, translation = errors(found.transforms, subject)
    without = errors(estimate_motion(bent, subject.mask, replace(settings, eddy="none"), pe).transforms, subject)
    assert rotation + translation < 0.7 * sum(without)


def test_none_are_found_where_there_are_none() -> None:
    subject = make_subject(count=40)
    found = estimate_motion(subject.dwi, subject.mask, MotionSettings(iters=2), PhaseEncoding(1, 1))
    assert found.eddy is not None
    world = subject.dwi.grid.to_world(np.argwhere(subject.mask.numpy() > 0)[::40])
    moved = np.stack([found.eddy.displacement(v, world) for v in range(len(subject.dwi))])
    assert np.linalg.norm(moved, axis=-1).mean() < 0.5  # mm, of 5 mm voxels, with 40 directions over half a sphere


def test_twelve_directions_show_eddy_currents() -> None:
    """All poses a little apart besides, which few directions may take for eddy currents."""
    subject = make_subject(rings=(600.0,), count=12, moved=1.0, largest=(0.4, 0.4), noise=15.0)
    dwi, grid = subject.dwi, subject.dwi.grid
    response = np.zeros((10, 3))
    response[:4, :2] = np.random.default_rng(3).normal(0, 1.5, (4, 2))  # all directions have z above 0
    truth = EddyCurrents(np.where(dwi.is_b0[:, None], 0, dwi.bvecs) @ response.T, grid.directions, grid.centre, 1)
    data = np.stack([_displaced(volume, v, truth, grid) for v, volume in enumerate(dwi.data.numpy())])
    bent = dwi.with_data(torch.from_numpy(data))
    found = estimate_motion(bent, subject.mask, MotionSettings(iters=4), PhaseEncoding(1, 1))
    assert found.eddy is not None
    world = grid.to_world(np.argwhere(subject.mask.numpy() > 0)[::40])
    there, seen = (np.stack([e.displacement(v, world) for v in range(len(dwi))]) for e in (truth, found.eddy))
    assert np.abs(there).sum(-1).mean() > 2
    assert np.abs(seen - there).sum(-1).mean() < 0.2 * np.abs(there).sum(-1).mean()


def test_few_directions_must_show_eddy_currents_clearly() -> None:
    """Twice what other axes show is something with many directions; with few, movements of the head do as much."""
    assert kept_fraction(1.0, 0.25, 15) == pytest.approx(0.75)
    assert kept_fraction(1.0, 0.25, 14) == 0
    assert kept_fraction(2.0, 0.04, 12) == pytest.approx(1 - 0.01 * BY_CHANCE)
    assert kept_fraction(0.0, 0.0, 40) == 1 and kept_fraction(0.0, 0.1, 40) == 0
    assert pytest.approx(f_distribution.isf(0.01, 3, 6), abs=0.05) == BY_CHANCE


def _displaced(volume: np.ndarray, v: int, eddy: EddyCurrents, grid: Grid) -> np.ndarray:
    """What a scanner with eddy currents sees: the signal of x at x + e(x) d, and thinner where it is spread."""
    world = grid.to_world(np.argwhere(np.ones(grid.shape, bool)))
    still, d = world.copy(), eddy.axes[:, eddy.along]
    for _ in range(10):
        still = world - eddy.displacement(v, still)
    slope = (eddy.displacement(v, still + 0.01 * d) - eddy.displacement(v, still - 0.01 * d)) @ d / 0.02
    value = map_coordinates(volume, grid.to_voxels(still).T, order=3, mode="nearest") / (1 + slope)
    return value.reshape(grid.shape).astype(np.float32)


def test_itk_applies_what_is_written(tmp_path: Path, orientation: str) -> None:
    grid = make_grid(orientation, (20, 24, 18), (3.0, 2.5, 4.0))
    rng = np.random.default_rng(1)
    eddy = EddyCurrents(rng.normal(0, 2, (2, 10)), grid.directions, grid.centre, 1)
    path = tmp_path / "eddy_xfm.txt"
    write_eddy_series(path, eddy, grid)
    text = path.read_text().split("#Transform ")
    for volume in range(2):
        alone = tmp_path / f"{volume}.txt"
        alone.write_text("#Insight Transform File V1.0\n#Transform " + text[volume + 1])
        transform = SimpleITK.ReadTransform(str(alone))
        for voxel in ([0, 0, 0], [19, 23, 17], [3.5, 12, 8], [10, 2.2, 16]):
            point = grid.to_world(np.array(voxel, float))
            expected = point + eddy.displacement(volume, point)
            np.testing.assert_allclose(FLIP * transform.TransformPoint(FLIP * point), expected, atol=1e-4)


@pytest.mark.parametrize("wanted", ["none", "linear"])
def test_orders_of_the_polynomial(wanted: str) -> None:
    subject = make_subject(count=32, spacing=(7.0, 7.0, 7.0))
    found = estimate_motion(subject.dwi, subject.mask, MotionSettings(iters=3, eddy=wanted), PhaseEncoding(0, -1))
    if wanted == "none":
        assert found.eddy is None
    else:
        assert found.eddy is not None and found.eddy.along == 0
        assert (found.eddy.coefficients[:, 4:] == 0).all() and (found.eddy.coefficients[subject.dwi.is_b0] == 0).all()
        few = estimate_motion(
            subject.dwi.select(np.arange(12)), subject.mask, MotionSettings(iters=1), PhaseEncoding(0, -1)
        )
        assert few.eddy is None and any("too few directions" in note for note in few.notes)
