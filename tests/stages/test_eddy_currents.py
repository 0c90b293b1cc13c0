"""Eddy currents: sampling at displaced points, joint estimation with motion, and the displacement as ITK applies it."""

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
from dsiprep.data.dwi import DWI
from dsiprep.data.transform import EddyCurrents
from dsiprep.io.itk import write_eddy_series
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.point_set import point_set
from dsiprep.ops.motion.eddy_model import F_QUANTILE_99, kept_fraction
from dsiprep.ops.motion.gauss_newton import MovingVolumes, sample_volumes
from dsiprep.settings import MotionSettings
from dsiprep.stages.motion import estimate_motion
from helpers.grids import make_grid
from helpers.motion_subject import Subject, errors, make_subject

RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


def test_volumes_are_sampled_at_the_displaced_points(orientation: str) -> None:
    """Compared with SciPy's linear interpolation at x + e(x) d, times a finite-difference Jacobian determinant."""
    grid = make_grid(orientation, (20, 24, 18), (3.0, 2.5, 4.0))
    rng = np.random.default_rng(0)
    volume = rng.random((1, *grid.shape)).astype(np.float32)
    inside = np.zeros(grid.shape, np.float32)
    inside[5:-5, 6:-6, 5:-5] = 1
    points = point_set(torch.from_numpy(inside), grid)
    eddy = EddyCurrents(rng.normal(0, 4, (1, 10)), grid.directions, grid.centre, 1)
    matrix = rigid_matrix(np.array([0.02, -0.03, 0.01, 1.0, -1.0, 0.5]), grid.centre)
    moving = MovingVolumes(torch.from_numpy(volume), grid, eddy)
    sampled = sample_volumes(moving, points, matrix[None], torch.zeros(1, len(points)))[0].numpy()

    undisplaced = (points.world + points.centre) @ matrix[:3, :3].T + matrix[:3, 3]
    d, step = grid.directions[:, 1], 0.01
    displaced = undisplaced + eddy.displacement(0, undisplaced)
    ahead, behind = (eddy.displacement(0, undisplaced + sign * step * d) for sign in (1, -1))
    slope = (ahead - behind) @ d / (2 * step)
    expected = map_coordinates(volume[0].astype(float), grid.to_voxels(displaced).T, order=1) * (1 + slope)
    assert np.abs(displaced - undisplaced).max() > 1
    np.testing.assert_allclose(sampled, expected, atol=1e-3)


def test_eddy_currents_are_estimated_jointly_with_motion() -> None:
    """Volumes displaced with SciPy."""
    subject = make_subject(count=46, moved=0.2, noise=15.0)
    dwi, grid = subject.dwi, subject.dwi.grid
    strength = np.sqrt(dwi.bvals / dwi.bvals.max())
    response = np.random.default_rng(3).normal(0, 1.5, (10, 3))
    truth = EddyCurrents((strength[:, None] * dwi.bvecs) @ response.T, grid.directions, grid.centre, 1)
    distorted = dwi.with_data(_displaced_series(dwi, truth))
    pe, settings = PhaseEncoding(1, 1), MotionSettings(iters=4)
    result = estimate_motion(distorted, subject.mask, settings, pe)
    assert result.eddy is not None
    world = _mask_points(subject)
    weighted = np.flatnonzero(~dwi.is_b0)
    true = np.stack([truth.displacement(v, world) for v in weighted])
    error = np.stack([result.eddy.displacement(v, world) for v in weighted]) - true
    assert np.abs(true).sum(-1).mean() > 0.8
    assert np.abs(error).sum(-1).mean() < 0.3 * np.abs(true).sum(-1).mean()
    rotation, translation = errors(result.transforms, subject)
    without = estimate_motion(distorted, subject.mask, replace(settings, eddy="none"), pe)
    assert rotation + translation < 0.7 * sum(errors(without.transforms, subject))


def test_no_eddy_currents_are_estimated_from_undistorted_data() -> None:
    subject = make_subject(count=40)
    result = estimate_motion(subject.dwi, subject.mask, MotionSettings(iters=2), PhaseEncoding(1, 1))
    assert result.eddy is not None
    world = _mask_points(subject)
    estimated = np.stack([result.eddy.displacement(v, world) for v in range(len(subject.dwi))])
    assert np.linalg.norm(estimated, axis=-1).mean() < 0.5  # mm; 5 mm voxels, 40 directions over half a sphere


def test_eddy_currents_are_estimated_from_twelve_directions() -> None:
    """All poses also differ a little, which with few directions can be mistaken for eddy currents."""
    subject = make_subject(rings=(600.0,), count=12, moved=1.0, largest=(0.4, 0.4), noise=15.0)
    dwi, grid = subject.dwi, subject.dwi.grid
    response = np.zeros((10, 3))
    response[:4, :2] = np.random.default_rng(3).normal(0, 1.5, (4, 2))  # all directions have z above 0
    truth = EddyCurrents(np.where(dwi.is_b0[:, None], 0, dwi.bvecs) @ response.T, grid.directions, grid.centre, 1)
    distorted = dwi.with_data(_displaced_series(dwi, truth))
    result = estimate_motion(distorted, subject.mask, MotionSettings(iters=4), PhaseEncoding(1, 1))
    assert result.eddy is not None
    world = _mask_points(subject)
    true, estimated = (np.stack([e.displacement(v, world) for v in range(len(dwi))]) for e in (truth, result.eddy))
    assert np.abs(true).sum(-1).mean() > 2
    assert np.abs(estimated - true).sum(-1).mean() < 0.2 * np.abs(true).sum(-1).mean()


def test_displacements_that_do_not_follow_the_gradient_are_not_taken_for_motion() -> None:
    """Every volume with a shift of its own and linear terms of its own, and the head at rest."""
    subject = make_subject(count=32, moved=0.0, noise=15.0)
    dwi, grid = subject.dwi, subject.dwi.grid
    coefficients = np.zeros((len(dwi), 10))
    coefficients[~dwi.is_b0, :4] = np.random.default_rng(8).normal(0, [1.0, 2.0, 2.0, 2.0], ((~dwi.is_b0).sum(), 4))
    truth = EddyCurrents(coefficients, grid.directions, grid.centre, 1)
    distorted = dwi.with_data(_displaced_series(dwi, truth))
    settings = MotionSettings(iters=4)
    result = estimate_motion(distorted, subject.mask, settings, PhaseEncoding(1, 1))
    without = estimate_motion(distorted, subject.mask, replace(settings, eddy="none"), PhaseEncoding(1, 1))
    for wrong, before, most in zip(
        errors(result.transforms, subject), errors(without.transforms, subject), (0.5, 0.35), strict=True
    ):
        assert wrong < most * before


def test_few_directions_require_clear_eddy_currents() -> None:
    """With few directions, twice the displacement along other axes is not enough, as head movements can cause it."""
    assert kept_fraction(1.0, 0.25, 15) == pytest.approx(0.75)
    assert kept_fraction(1.0, 0.25, 14) == 0
    assert kept_fraction(2.0, 0.04, 12) == pytest.approx(1 - 0.01 * F_QUANTILE_99)
    assert kept_fraction(0.0, 0.0, 40) == 1
    assert kept_fraction(0.0, 0.1, 40) == 0
    assert pytest.approx(f_distribution.isf(0.01, 3, 6), abs=0.05) == F_QUANTILE_99


def _mask_points(subject: Subject) -> np.ndarray:
    """World points of the mask, one in 40, (m, 3)."""
    return subject.dwi.grid.to_world(np.argwhere(subject.mask.numpy() > 0)[::40])


def _displaced_series(dwi: DWI, eddy: EddyCurrents) -> torch.Tensor:
    """Simulate acquisition with eddy currents: the signal of x at x + e(x) d, divided by the local stretch."""
    world = dwi.grid.to_world(np.argwhere(np.ones(dwi.grid.shape, bool)))
    d, displaced = eddy.axes[:, eddy.along], []
    for v, volume in enumerate(dwi.data.numpy()):
        source = world.copy()
        for _ in range(10):
            source = world - eddy.displacement(v, source)
        slope = (eddy.displacement(v, source + 0.01 * d) - eddy.displacement(v, source - 0.01 * d)) @ d / 0.02
        value = map_coordinates(volume, dwi.grid.to_voxels(source).T, order=3, mode="nearest") / (1 + slope)
        displaced.append(value.reshape(dwi.grid.shape).astype(np.float32))
    return torch.from_numpy(np.stack(displaced))


def test_itk_applies_written_displacements(tmp_path: Path, orientation: str) -> None:
    grid = make_grid(orientation, (20, 24, 18), (3.0, 2.5, 4.0))
    rng = np.random.default_rng(1)
    eddy = EddyCurrents(rng.normal(0, 2, (2, 10)), grid.directions, grid.centre, 1)
    path = tmp_path / "eddy_xfm.txt"
    write_eddy_series(path, eddy, grid)
    text = path.read_text().split("#Transform ")
    for volume in range(2):
        single = tmp_path / f"{volume}.txt"
        single.write_text("#Insight Transform File V1.0\n#Transform " + text[volume + 1])
        transform = SimpleITK.ReadTransform(str(single))
        for voxel in ([0, 0, 0], [19, 23, 17], [3.5, 12, 8], [10, 2.2, 16]):
            point = grid.to_world(np.array(voxel, float))
            expected = point + eddy.displacement(volume, point)
            np.testing.assert_allclose(RAS_TO_LPS * transform.TransformPoint(RAS_TO_LPS * point), expected, atol=1e-4)


@pytest.mark.parametrize("order", ["none", "linear"])
def test_order_of_the_polynomial(order: str) -> None:
    subject = make_subject(count=32, spacing=(7.0, 7.0, 7.0))
    result = estimate_motion(subject.dwi, subject.mask, MotionSettings(iters=3, eddy=order), PhaseEncoding(0, -1))
    if order == "none":
        assert result.eddy is None
        return
    assert result.eddy is not None
    assert result.eddy.along == 0
    coefficients = result.eddy.coefficients
    assert (coefficients[:, 4:] == 0).all()
    assert (coefficients[subject.dwi.is_b0, 1:] == 0).all()
    assert np.abs(coefficients[subject.dwi.is_b0, 0]).max() < 0.05  # mm; a drift of the field also shifts b=0 images


def test_eddy_currents_are_not_estimated_from_fewer_than_twelve_directions() -> None:
    subject = make_subject(count=32, spacing=(7.0, 7.0, 7.0))
    series = subject.dwi.select(np.arange(12))
    result = estimate_motion(series, subject.mask, MotionSettings(iters=1), PhaseEncoding(0, -1))
    assert result.eddy is None
    assert any("too few directions" in note for note in result.notes)
