"""A field that changes with the head, recovered from images that the phantom's scanner made of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.epi_resampling import SampledDisplacement
from dsiprep.ops.image.point_set import point_set
from dsiprep.ops.image.smooth_field import prior_precision, spline_basis, spline_knots
from dsiprep.ops.motion.tilt_equations import pose_step, solve_fields, tilt_equations
from dsiprep.ops.motion.tilted_series import TiltedSeries, pitch_and_roll
from dsiprep.phantom.scanner import Source, scan
from helpers.grids import make_grid
from helpers.identity_results import voxel_points

SHAPE, MM = (28, 32, 26), 5.0
ANGLES = np.deg2rad([(7, 0, 0), (-6, 1, 3), (0, 7, 0), (1, -7, -4), (5, 5, 0), (-5, 4, 6), (4, -6, 0), (-4, -4, 2)])
SHIFTS = np.array([(1, -2, 0.5), (0, 1, -1), (2, 0, 0), (-1, 1, 1), (0, 0, 2), (1, 1, 0), (-2, 0, 1), (0, 2, 0)])
READOUT = 0.05
RESTING, PITCH, ROLL = (8, (20, 30, -10)), (1.5, (10, 35, -20)), (1.2, (-35, -10, -15))  # Hz, Hz/degree; centre, mm


def blob(points: np.ndarray, size: float, centre: tuple[float, ...], width: float = 28.0) -> np.ndarray:
    return size * np.exp(-((points - np.array(centre)) ** 2).sum(-1) / (2 * width**2))


def head() -> tuple[np.ndarray, Grid]:
    """A textured ellipsoid on a 2.5 mm grid."""
    grid = make_grid("RAS", (72, 80, 68), (2.5, 2.5, 2.5))
    noise = gaussian_filter(np.random.default_rng(0).normal(size=grid.shape), 2.2)
    inside = np.linalg.norm((voxel_points(grid) - [3, -5, 8]) / [58, 68, 52], axis=-1)
    return ((600 + 300 * noise / noise.std()).clip(50) / (1 + np.exp((inside - 1) * 25))).astype(np.float32), grid


def acquire(pe: PhaseEncoding, grid: Grid, changes: bool) -> tuple[TiltedSeries, torch.Tensor]:
    """The head in eight tilted poses, and the image of it without distortion at the points of the brain."""
    image, image_grid = head()
    poses = rigid_matrix(np.concatenate([ANGLES, SHIFTS], axis=1), np.array([3.0, -5, 8]))
    world = voxel_points(image_grid)
    tilts = pitch_and_roll(poses)
    volumes = []
    for pose, (pitch, roll) in zip(poses, tilts, strict=True):
        field = blob(world, *RESTING)
        if changes:
            field = field + pitch * blob(world, *PITCH) + roll * blob(world, *ROLL)
        source = Source(image, image_grid, field.astype(np.float32), image_grid)
        volumes.append(scan(source, grid, pe, pose, oversampling=3))
    ideal = scan(Source(image, image_grid, 0 * image, image_grid), grid, replace(pe, readout_time=0.0), np.eye(4))
    points = point_set(torch.as_tensor(ideal > 250), grid)
    knots = spline_knots(grid, points.world + points.centre, 14.0)
    mm = pe.polarity * READOUT * grid.voxel_sizes[pe.axis]
    length = torch.as_tensor(mm * blob(voxel_points(grid), *RESTING)).float()
    direction = grid.directions[:, pe.axis]
    slopes = np.stack(np.gradient(length.numpy(), *grid.voxel_sizes), axis=-1) @ grid.directions.T
    resting = SampledDisplacement(
        torch.as_tensor(direction).float()[:, None, None, None] * length,
        torch.as_tensor(np.moveaxis(slopes, -1, 0)).float(),
        direction,
    )
    series = TiltedSeries(
        torch.from_numpy(np.stack(volumes)), grid, points, poses, None, (resting,), np.array([float(pe.polarity)]),
        np.zeros(len(poses), int), np.zeros(2), spline_basis(knots, grid), np.zeros((2, knots.count)),
    )  # fmt: skip
    i, j, k = points.voxels.astype(int).T
    return series, torch.from_numpy(ideal[i, j, k]).expand(len(poses), -1)


def estimate(series: TiltedSeries, ideal: torch.Tensor, axis: int) -> TiltedSeries:
    prior, volumes = prior_precision(series.basis.knots, 0.3, 25.0), np.arange(len(series.data))
    for _ in range(3):
        observed = series.sample(volumes)
        usable = ~observed.isnan().numpy()
        equations = tilt_equations(series, volumes, series.tilts, observed.nan_to_num(), ideal, usable, axis)
        change = solve_fields(equations, series, prior, axis)
        poses = pose_step(equations, series, change)
        series = replace(series, transforms=poses, coefficients=series.coefficients + change)
    return series


def displacements(series: TiltedSeries, mm: float, changes: bool, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Found and true displacement (mm) of the points along the axis by the change of the field and errors of poses."""
    world = series.points.world + series.points.centre
    true_poses = rigid_matrix(np.concatenate([ANGLES, SHIFTS], axis=1), np.array([3.0, -5, 8]))
    fields = series.at_points(series.basis.evaluate(series.coefficients))
    pitch, roll = pitch_and_roll(true_poses).T
    true = np.outer(pitch, blob(world, *PITCH)) + np.outer(roll, blob(world, *ROLL))
    found = series.tilts @ fields
    for v, (one, other) in enumerate(zip(series.transforms, true_poses, strict=True)):
        apart = world @ (one - other)[:3, :3].T + (one - other)[:3, 3]
        found[v] += apart @ series.grid.directions[:, axis]
    return found, mm * true * changes


@pytest.mark.parametrize(
    ("orientation", "axis", "polarity"), [("LAS", 1, 1), ("LAS", 1, -1), ("RAS", 0, 1), ("oblique", 1, 1)]
)
def test_recovers_the_field(orientation: str, axis: int, polarity: int) -> None:
    """Phase encoding PA, AP, LR and along a tilted axis: the total displacement of each volume."""
    grid = make_grid(orientation, SHAPE, (MM, MM, MM))
    series, ideal = acquire(PhaseEncoding(axis, polarity, READOUT), grid, True)
    found, true = displacements(estimate(series, ideal, axis), polarity * READOUT * MM, True, axis)
    before = np.sqrt((true**2).mean())
    assert before > 0.5
    assert np.sqrt(((found - true) ** 2).mean()) < 0.25 * before
    assert np.corrcoef(found.ravel(), true.ravel())[0, 1] > 0.97


def test_harmless_where_the_field_is_rigid() -> None:
    grid = make_grid("LAS", SHAPE, (MM, MM, MM))
    series, ideal = acquire(PhaseEncoding(1, 1, READOUT), grid, False)
    found, _ = displacements(estimate(series, ideal, 1), READOUT * MM, False, 1)
    assert np.sqrt((found**2).mean()) < 0.06


def test_pitch_and_roll_do_not_depend_on_yaw() -> None:
    turns = np.deg2rad([(5, 0, 0), (0, 4, 0), (0, 0, 30), (-3, 0, 0)])
    poses = rigid_matrix(np.concatenate([turns, np.zeros((4, 3))], axis=1))
    np.testing.assert_allclose(pitch_and_roll(poses), [(5, 0), (0, 4), (0, 0), (-3, 0)], atol=1e-9)
    yaw = rigid_matrix(np.array([0, 0, 0.7, 1, 2, 3]))
    np.testing.assert_allclose(pitch_and_roll(yaw @ poses), pitch_and_roll(poses), atol=1e-9)


def test_samples_where_the_head_is_found() -> None:
    """Volumes in the head, Jacobian and all, are those of the undistorted head for the true fields."""
    grid = make_grid("LAS", SHAPE, (MM, MM, MM))
    series, ideal = acquire(PhaseEncoding(1, -1, READOUT), grid, True)
    basis = series.basis
    rows = [basis.evaluate(row[None])[0].ravel() for row in np.eye(basis.knots.count, dtype=np.float32)]
    matrix = np.stack(rows, axis=1)
    wanted = [READOUT * MM * blob(voxel_points(grid), *which).ravel() for which in (PITCH, ROLL)]
    exact = np.linalg.lstsq(matrix, np.stack(wanted, axis=1), rcond=None)[0].T
    volumes = np.arange(len(series.data))
    rigid, same = acquire(PhaseEncoding(1, -1, READOUT), grid, False)  # voxels of 5 mm in another pose differ as well

    def error(of: TiltedSeries, target: torch.Tensor) -> float:
        return float((of.sample(volumes) - target).nan_to_num().square().mean().sqrt())

    least = error(rigid, same)
    assert error(series, ideal) > 1.8 * least
    assert error(replace(series, coefficients=exact), ideal) < 1.05 * least
