"""Filters compared with SciPy and NumPy, and the Numba loops with the tensor operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.ops.image import filters


@pytest.fixture
def volumes() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((2, 17, 14, 19)).astype(np.float32))


@pytest.mark.parametrize("sigma", [1.3, (0.6, 0.0, 2.1)])
def test_gaussian_matches_scipy(volumes: torch.Tensor, sigma: float | tuple[float, float, float]) -> None:
    ours = filters.gaussian(volumes, sigma).numpy()
    theirs = np.stack([ndimage.gaussian_filter(v, sigma, mode="nearest") for v in volumes.numpy()])
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_gaussian_wider_than_the_volume_matches_scipy() -> None:
    volume = torch.rand(1, 3, 4, 5)
    theirs = ndimage.gaussian_filter(volume[0].numpy(), 3.0, mode="nearest")
    np.testing.assert_allclose(filters.gaussian(volume, 3.0)[0].numpy(), theirs, atol=1e-6)


def test_zero_sigma_returns_a_copy(volumes: torch.Tensor) -> None:
    out = filters.gaussian(volumes, 0.0)
    assert torch.equal(out, volumes)
    assert out.data_ptr() != volumes.data_ptr()


def test_gradient_matches_numpy(volumes: torch.Tensor) -> None:
    ours = filters.gradient(volumes).numpy()
    np.testing.assert_allclose(ours[1], np.stack(np.gradient(volumes[1].numpy())), atol=1e-6)


def test_gradient_is_zero_along_an_axis_of_one_voxel() -> None:
    out = filters.gradient(torch.rand(1, 5, 6, 1))
    assert float(out[:, 2].abs().max()) == 0
    assert float(out[:, 0].abs().max()) > 0


def test_box_sum_matches_scipy(volumes: torch.Tensor) -> None:
    theirs = ndimage.uniform_filter(volumes[0].numpy(), 5, mode="constant") * 125
    np.testing.assert_allclose(filters.box_sum(volumes, 2)[0].numpy(), theirs, atol=1e-3)


def test_numba_and_tensor_versions_agree(volumes: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_filters() -> list[torch.Tensor]:
        return [
            filters.gaussian(volumes, (1.2, 0.5, 2.0)),
            filters.gradient(volumes),
            filters.box_sum(volumes, 2),
        ]

    loops = all_filters()
    monkeypatch.setattr(filters, "_uses_numba", lambda tensor: False)
    for loop, tensors in zip(loops, all_filters(), strict=True):
        torch.testing.assert_close(loop, tensors, atol=1e-4, rtol=1e-5)


def test_downsampling_keeps_the_field_of_view_and_does_not_alias() -> None:
    affine = np.diag([-1.0, 1.2, 2.0, 1.0])
    grid = Grid((40, 40, 20), affine)
    wave = torch.cos(torch.pi * torch.arange(40.0))[:, None, None].expand(grid.shape)  # Nyquist frequency
    ramp = torch.arange(40.0)[None, :, None].expand(grid.shape)
    out = filters.resample_to_spacing(Volume((wave + ramp).contiguous(), grid), 4.0)
    np.testing.assert_allclose(out.grid.voxel_sizes, [4, 4, 4])
    expected = grid.to_voxels(out.grid.to_world(np.argwhere(np.ones(out.grid.shape))))[:, 1]
    inner = np.zeros(out.grid.shape, bool)
    inner[2:-2, 2:-2, 2:-2] = True
    np.testing.assert_allclose(out.numpy().ravel()[inner.ravel()], expected[inner.ravel()], atol=0.02)
