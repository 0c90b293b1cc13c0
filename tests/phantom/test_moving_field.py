"""The phantom's field for any tilt against the analytic field of a sphere, and what it does to images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from dsiprep.phantom.head import make_head
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.moving_field import dipole_components, make_moving_field, tilted_change
from dsiprep.score.read import Truth
from helpers.grids import make_grid
from helpers.identity_results import voxel_points

PITCH, YAW = Rotation.from_euler("x", 6, degrees=True).as_matrix(), Rotation.from_euler("z", 20, degrees=True)


def test_sphere() -> None:
    """Outside a sphere of susceptibility 1 and radius a, the field is a³ / (3 r³) (3 cos² - 1), blurred or not."""
    grid, radius = make_grid("RAS", (90, 90, 90), (2.0, 2.0, 2.0)), 14.0
    points = voxel_points(grid) - grid.to_world((np.array(grid.shape) - 1) / 2)
    distance = np.linalg.norm(points, axis=-1)
    sphere = gaussian_filter(np.clip((radius - distance) / 2 + 0.5, 0, 1), 1.5)
    components = dipole_components(sphere, grid)
    change = tilted_change(components, PITCH, np.eye(3))
    volume = sphere.sum() * 2.0**3 / (4 / 3 * np.pi)
    analytic = [(points @ r.T)[..., 2] ** 2 / distance**5 * volume for r in (PITCH, np.eye(3))]
    outside = (distance > radius + 10) & (distance < 45)
    expected = (analytic[0] - analytic[1])[outside]
    assert np.abs(change[outside] - expected).max() < 0.05 * np.abs(expected).max()


def test_size_and_independence_of_yaw() -> None:
    head = make_head(np.random.default_rng(0))
    grid = head.box(np.array([300.0, 330, 270]), 6.0)
    reference = Rotation.from_euler("xyz", [3, -2, 5], degrees=True).as_matrix()
    moving = make_moving_field(head, grid, reference, 1.0, 0.125)
    sizes = []
    for axis in "xy":
        turned = Rotation.from_euler(axis, 6, degrees=True).as_matrix() @ reference
        change = 0.125 * interpolate(moving.change(turned), grid, head.brain_points())
        sizes.append(float(np.percentile(np.abs(change), 95)))
    assert max(sizes) == pytest.approx(1.0, abs=0.03)
    assert min(sizes) > 0.3
    assert np.abs(moving.change(YAW.as_matrix() @ reference)).max() < 1e-4


def test_score_reads_the_same_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula of the score, written independently."""
    components = np.random.default_rng(1).normal(size=(6, 50))
    reference, rotation = (Rotation.random(random_state=seed).as_matrix() for seed in (2, 3))

    class Components:
        def at(self, points: np.ndarray) -> np.ndarray:
            return components.T

    truth = Truth(Path(), {"moving_field_reference": reference})
    truth.__dict__["moving_field"] = Components()
    pose = np.eye(4)
    pose[:3, :3] = rotation
    found = truth.field_change(np.zeros((50, 3)), pose)
    np.testing.assert_allclose(found, tilted_change(components, rotation, reference), atol=1e-9)
