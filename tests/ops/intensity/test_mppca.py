"""MP-PCA compared with DIPY and with known noise, and the denoising stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.ops.intensity import mppca as module
from dsiprep.ops.intensity.mppca import mppca
from dsiprep.settings import DenoiseSettings
from dsiprep.stages.denoise import denoise
from helpers.grids import make_grid


def phantom(n: int, shape: tuple[int, int, int], sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A mixture of eight spatially varying components, without and with noise."""
    rng = np.random.default_rng(0)
    position = np.stack(np.meshgrid(*[np.linspace(-1, 1, s) for s in shape], indexing="ij")).reshape(3, -1)
    waves = [np.sin(rng.normal(size=3) * 3 @ position + rng.uniform(0, 6)) for _ in range(8)]
    signals = rng.gamma(2, 100, size=(8, n))
    truth = (signals.T @ (1 / (1 + np.exp(-8 * np.stack(waves)))) / 8).reshape(n, *shape)
    noisy = truth + rng.normal(scale=sigma, size=truth.shape)
    return torch.from_numpy(truth.astype(np.float32)), torch.from_numpy(noisy.astype(np.float32))


def rmse(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).pow(2).mean().sqrt())


@pytest.mark.parametrize(("n", "shape"), [(13, (14, 13, 12)), (60, (14, 13, 12)), (150, (12, 11, 10))])
def test_pure_noise_is_removed(n: int, shape: tuple[int, int, int]) -> None:
    data = 100 + 5 * torch.from_numpy(np.random.default_rng(1).normal(size=(n, *shape)).astype(np.float32))
    denoised, sigma, rank = mppca(data)
    assert abs(float(sigma.mean()) / 5 - 1) < 0.02
    assert float((sigma / 5 - 1).abs().max()) < 0.15
    assert float(rank.mean()) < 1.3  # only the mean
    assert rmse(denoised, torch.full_like(data, 100)) < 1.0


def test_error_is_below_that_of_dipy() -> None:
    from dipy.denoise.localpca import mppca as dipy_mppca

    truth, noisy = phantom(40, (14, 14, 12), 20.0)
    denoised, sigma, _ = mppca(noisy, window=5)
    shrunk, _, _ = mppca(noisy, window=5, shrinkage="overlap")
    theirs, their_sigma = dipy_mppca(noisy.permute(1, 2, 3, 0).numpy(), patch_radius=2, return_sigma=True)
    error = rmse(denoised, truth)
    assert error < rmse(torch.from_numpy(theirs).permute(3, 0, 1, 2), truth)
    assert rmse(shrunk, truth) < min(0.4 * rmse(noisy, truth), 0.99 * error)
    inner = (slice(2, -2),) * 3
    assert abs(float(sigma[inner].mean()) / 20 - 1) < 0.02
    assert abs(float(sigma[inner].mean()) - 20) <= abs(float(their_sigma[inner].mean()) - 20) + 0.2


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_removed_residual_is_noise_only(sigma: float) -> None:
    """The residual is slightly smaller than the noise and preserves volume means."""
    truth, noisy = phantom(80, (14, 12, 12), sigma)
    denoised, estimated, _ = mppca(noisy)
    assert abs(float(estimated.mean()) / sigma - 1) < 0.05
    assert 0.85 < rmse(noisy, denoised) / sigma < 1.0
    assert rmse(denoised, truth) < 0.5 * sigma
    assert float((denoised - truth).mean((1, 2, 3)).abs().max()) < 0.1 * sigma


def test_noise_free_series_is_unchanged() -> None:
    truth, _ = phantom(30, (9, 9, 9), 1.0)
    denoised, sigma, _ = mppca(truth)
    assert rmse(denoised, truth) < 1e-3 * float(truth.std())
    assert float(sigma.max()) < 0.05


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1), (5, 5, 2), (30, 4, 1)])
@pytest.mark.parametrize("n", [2, 13, 40])
def test_tiny_grids(n: int, shape: tuple[int, int, int]) -> None:
    data = 10 + torch.from_numpy(np.random.default_rng(2).normal(size=(n, *shape)).astype(np.float32))
    denoised, sigma, rank = mppca(data)
    assert denoised.shape == data.shape
    assert sigma.shape == rank.shape == shape
    assert bool(denoised.isfinite().all() & sigma.isfinite().all())
    assert float((denoised - data).abs().max()) < 6


def test_mask_and_zero_padding() -> None:
    truth, noisy = phantom(30, (20, 14, 12), 10.0)
    mask = torch.zeros(20, 14, 12)
    mask[6:15, 3:12, 2:10] = 1
    whole = mppca(noisy)
    denoised, sigma, _ = mppca(noisy, mask)
    near = torch.zeros_like(mask)  # one voxel around the mask, where the final brain mask may reach
    near[5:16, 2:13, 1:11] = 1
    far = torch.zeros_like(mask)  # no patch of 5 voxels reaches there
    far[:2] = far[19:] = 1
    assert float(denoised[:, far > 0].abs().max()) == float(sigma[far > 0].abs().max()) == 0
    assert float(sigma[near > 0].min()) > 8
    for region in (mask > 0, near > mask):
        assert rmse(denoised[:, region], truth[:, region]) < 1.1 * rmse(whole[0][:, region], truth[:, region])
    padded = torch.nn.functional.pad(noisy, (5, 5, 5, 5, 5, 5))
    _, sigma_padded, _ = mppca(padded)
    assert abs(float(sigma_padded[5:-5, 5:-5, 5:-5].mean()) / 10 - 1) < 0.05
    assert float(sigma_padded[:3].max()) == 0


def test_single_voxel_masks_and_chunked_processing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolated voxels in corners and at edges are denoised; threads and device chunks agree."""
    _, noisy = phantom(30, (13, 12, 11), 10.0)
    mask = torch.zeros(13, 12, 11)
    for voxel in ((0, 0, 0), (12, 11, 10), (12, 0, 5), (6, 6, 6), (3, 11, 0)):
        mask[voxel] = 1
    denoised, sigma, _ = mppca(noisy, mask)
    assert float(sigma[mask > 0].min()) > 8
    assert float(denoised[:, mask > 0].abs().min()) > 0
    pooled = module.in_batches
    monkeypatch.setattr(module, "in_batches", lambda work, index, size, pool: pooled(work, index, size, None))
    chunked, _, _ = mppca(noisy, mask)
    torch.testing.assert_close(chunked, denoised, rtol=1e-4, atol=1e-2)


def series(sigmas: list[tuple[int, float]]) -> tuple[DWI, torch.Tensor, Volume]:
    """A DWI series of runs, given as (volumes, noise); its noise-free data; and a mask without the outermost voxels."""
    grid = make_grid("LAS", (12, 11, 10), (2, 2, 2))
    parts = [phantom(n, grid.shape, sigma) for n, sigma in sigmas]
    n = sum(count for count, _ in sigmas)
    run = np.repeat(np.arange(len(sigmas)), [count for count, _ in sigmas])
    truth, data = (200 + torch.cat([part[i] for part in parts]) for i in (0, 1))  # far above the noise floor
    mask = torch.zeros(grid.shape)
    mask[1:-1, 1:-1, 1:-1] = 1
    dwi = DWI(data, grid, np.arange(n) * 10.0, np.eye(3)[np.arange(n) % 3], run, np.zeros(n, int))
    return dwi, truth, Volume(mask, grid)


def test_runs_are_denoised_separately() -> None:
    dwi, truth, mask = series([(30, 4.0), (20, 20.0), (4, 9.0)])
    before = dwi.data.clone()
    result = denoise(dwi, mask, DenoiseSettings())
    inside = mask.data > 0
    for part, limit in ((slice(0, 30), 0.55), (slice(30, 50), 0.55)):
        clean, noisy = result.dwi.data[part][:, inside], dwi.data[part][:, inside]
        assert rmse(clean, truth[part][:, inside]) < limit * rmse(noisy, truth[part][:, inside])
    assert torch.equal(dwi.data, before)
    assert torch.equal(result.dwi.data[50:], before[50:])
    assert not torch.equal(result.dwi.data[:50, ~inside], before[:50, ~inside])  # one voxel beyond the mask
    assert "4 volumes" in result.method
    assert result.noise is not None
    expected = np.sqrt((30 * 16 + 20 * 400) / 50)
    assert float(result.noise.data[inside].mean()) == pytest.approx(expected, rel=0.05)


def test_series_is_returned_if_disabled_or_too_short() -> None:
    dwi, _, mask = series([(9, 4.0)])
    none = denoise(dwi, mask, DenoiseSettings(method="none"))
    assert none.dwi is dwi
    assert none.noise is None
    short = denoise(dwi, mask, DenoiseSettings())
    assert short.noise is None
    assert short.dwi is dwi
    assert "skipped" in short.method
