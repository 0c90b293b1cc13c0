"""The eddy-current polynomial: Numba and tensor versions compared with `EddyCurrents.displacement`."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.eddy_displacement import EddyDisplacement, displace_points, displace_voxel, eddy_on_grid
from helpers.grids import make_grid

VOLUMES = 3


@numba.njit
def displace_voxel_loop(
    coefficients: np.ndarray, frame: np.ndarray, along: int, voxels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Apply `displace_voxel` to copies of `voxels` (m, 3); return them and the Jacobian determinants."""
    displaced, jacobian = voxels.copy(), np.empty(len(voxels), np.float32)
    for i in range(len(voxels)):
        jacobian[i] = displace_voxel(coefficients, frame, along, displaced[i])
    return displaced, jacobian


@pytest.fixture
def grid() -> Grid:
    return make_grid("oblique", (30, 28, 20), (2.0, 2.2, 3.0))


@pytest.fixture
def voxels(grid: Grid) -> np.ndarray:
    """Random voxel coordinates, (m, 3) float32."""
    return np.random.default_rng(0).uniform(0, np.asarray(grid.shape) - 1, (200, 3)).astype(np.float32)


@pytest.fixture(params=[0, 1, 2], ids=["i", "j", "k"])
def eddy(request: pytest.FixtureRequest, grid: Grid) -> EddyCurrents:
    """Displacements of the order of 1 mm along one phase-encoding axis, with all ten terms."""
    coefficients = np.random.default_rng(1).normal(0, 3, (VOLUMES, 10))
    return EddyCurrents(coefficients, grid.directions, grid.centre + np.array([4.0, -3, 2]), request.param)


def displaced_exactly(eddy: EddyCurrents, volume: int, grid: Grid, voxels: np.ndarray) -> np.ndarray:
    """Displaced voxel coordinates from `EddyCurrents.displacement` in world coordinates, float64."""
    world = grid.to_world(voxels)
    return grid.to_voxels(world + eddy.displacement(volume, world))


def jacobian_by_differences(eddy: EddyCurrents, volume: int, grid: Grid, voxels: np.ndarray) -> np.ndarray:
    """Determinant of the Jacobian matrix by central differences, which are exact for a quadratic polynomial."""
    step = 0.5 * np.eye(3)
    columns = [
        displaced_exactly(eddy, volume, grid, voxels + step[axis])
        - displaced_exactly(eddy, volume, grid, voxels - step[axis])
        for axis in range(3)
    ]
    return np.linalg.det(np.stack(columns, axis=-1))


def test_numba_version_matches_world_displacement(eddy: EddyCurrents, grid: Grid, voxels: np.ndarray) -> None:
    on_grid = eddy_on_grid(eddy, grid)
    for volume in range(VOLUMES):
        displaced, jacobian = displace_voxel_loop(on_grid.coefficients[volume], on_grid.frame, on_grid.along, voxels)
        expected = displaced_exactly(eddy, volume, grid, voxels)
        np.testing.assert_allclose(displaced, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            jacobian, jacobian_by_differences(eddy, volume, grid, voxels.astype(float)), rtol=0, atol=1e-6
        )
        assert np.abs(displaced - voxels)[:, eddy.along].max() > 0.2
        assert np.abs(jacobian - 1).max() > 0.01


def test_numba_and_tensor_versions_agree(eddy: EddyCurrents, grid: Grid, voxels: np.ndarray) -> None:
    on_grid = eddy_on_grid(eddy, grid)
    points = torch.from_numpy(voxels.T.copy()).repeat(VOLUMES, 1, 1)
    jacobians = displace_points(on_grid, points).numpy()
    for volume in range(VOLUMES):
        displaced, jacobian = displace_voxel_loop(on_grid.coefficients[volume], on_grid.frame, on_grid.along, voxels)
        np.testing.assert_allclose(points[volume].numpy().T, displaced, rtol=0, atol=1e-5)
        np.testing.assert_allclose(jacobians[volume], jacobian, rtol=0, atol=1e-6)


def test_only_the_phase_encoding_coordinate_changes(eddy: EddyCurrents, grid: Grid, voxels: np.ndarray) -> None:
    on_grid = eddy_on_grid(eddy, grid)
    displaced, _ = displace_voxel_loop(on_grid.coefficients[0], on_grid.frame, on_grid.along, voxels)
    others = [axis for axis in range(3) if axis != eddy.along]
    np.testing.assert_array_equal(displaced[:, others], voxels[:, others])


def test_without_eddy_currents_there_are_no_coefficients(grid: Grid) -> None:
    on_grid = eddy_on_grid(None, grid)
    assert isinstance(on_grid, EddyDisplacement)
    assert on_grid.coefficients.shape == (0, 10)
