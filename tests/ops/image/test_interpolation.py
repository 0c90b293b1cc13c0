"""Interpolation compared with SciPy and SimpleITK, and the Numba loops with the tensor operations."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from scipy.ndimage import map_coordinates

from dsiprep.data.grid import Grid
from dsiprep.ops.image import interpolation as sample
from dsiprep.ops.image.affine import rigid_matrix
from helpers.grids import make_grid


@pytest.fixture
def volumes() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 9, 8, 7)).astype(np.float32))


@pytest.fixture
def points() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).uniform(-2, 10, (3, 500)).astype(np.float32))


def test_linear_matches_scipy(volumes: torch.Tensor, points: torch.Tensor) -> None:
    ours = sample.sample_linear(volumes, points)
    for volume, values in zip(volumes.numpy(), ours.numpy(), strict=True):
        expected = map_coordinates(volume, points.numpy(), order=1, mode="grid-constant")
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_cubic_matches_scipy_inside_and_is_zero_outside(volumes: torch.Tensor, points: torch.Tensor) -> None:
    ours = sample.sample_cubic(sample.spline_coefficients(volumes), points)
    size = torch.tensor(volumes.shape[1:])[:, None]
    inside = ((points >= -0.5) & (points <= size - 0.5)).all(0).numpy()
    assert 50 < inside.sum() < 450
    for volume, values in zip(volumes.numpy(), ours.numpy(), strict=True):
        expected = map_coordinates(volume, points.numpy(), order=3, mode="mirror")
        np.testing.assert_allclose(values[inside], expected[inside], atol=1e-4)
        assert (values[~inside] == 0).all()


@pytest.mark.parametrize("cubic", [False, True])
def test_numba_and_tensor_versions_agree(volumes: torch.Tensor, points: torch.Tensor, cubic: bool) -> None:
    loop = (sample.sample_cubic if cubic else sample.sample_linear)(volumes, points)
    torch.testing.assert_close(loop, sample._sample_tensors(volumes, points, cubic), atol=1e-5, rtol=1e-5)


def test_axis_of_one_voxel() -> None:
    thin = torch.ones(1, 6, 1, 5)
    points = torch.tensor([[2.0], [0.0], [2.5]])
    assert sample.sample_cubic(sample.spline_coefficients(thin), points).item() == pytest.approx(1, abs=1e-5)
    assert sample.sample_linear(thin, points).item() == pytest.approx(1)


def test_resample_onto_matches_simpleitk(orientation: str) -> None:
    """A rigid transform between an oblique or flipped anisotropic grid and an isotropic one."""
    source = make_grid(orientation, (14, 16, 12), (2.0, 2.5, 3.0))
    target = make_grid("LPS", (13, 12, 15), (2.2, 2.2, 2.2))
    data = torch.from_numpy(np.random.default_rng(2).normal(size=(1, *source.shape)).astype(np.float32))
    matrix = rigid_matrix(np.array([0.1, -0.05, 0.2, 3, -2, 1]))
    ours = sample.resample_onto(data, source, target, matrix)[0].numpy()
    flip = np.diag([-1.0, -1, 1, 1])
    transform = sitk.AffineTransform(3)
    matrix_lps = flip @ matrix @ flip
    transform.SetMatrix(matrix_lps[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix_lps[:3, 3].tolist())
    image = sitk_image(data[0].numpy(), source)
    theirs = sitk.Resample(
        image, sitk_image(np.zeros(target.shape, np.float32), target), transform, sitk.sitkLinear, 0.0
    )
    inside = sitk.Resample(
        sitk_image(np.ones(source.shape, np.float32), source), theirs, transform, sitk.sitkLinear, 0.0
    )
    inside_itk = sitk.GetArrayFromImage(inside).T == 1
    assert inside_itk.sum() > 300
    inside_ours = (
        sample.sample_linear(torch.ones(1, *source.shape), sample.voxel_points(target, source, matrix))[0].numpy()
        > 0.999
    )
    both = inside_itk & inside_ours
    np.testing.assert_allclose(ours[both], sitk.GetArrayFromImage(theirs).T[both], atol=1e-3)


def sitk_image(data: np.ndarray, grid: Grid) -> sitk.Image:
    """A SimpleITK image, in ITK's conventions (LPS)."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    lps = np.diag([-1.0, -1, 1])
    image.SetSpacing(grid.voxel_sizes.tolist())
    image.SetOrigin((lps @ grid.affine[:3, 3]).tolist())
    image.SetDirection((lps @ grid.directions).ravel().tolist())
    return image
