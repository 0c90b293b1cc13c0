"""Noise level of matrices and series of known noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsiprep.ops.intensity.noise_level import correlation_factor, default_window, noise_level, noise_variance


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 90, 5), (60, 61, 12), (107, 124, 0), (12, 26, 2)])
def test_noise_variance_of_matrices_of_known_rank(rows: int, columns: int, rank: int) -> None:
    """Strong signal does not count as noise; d.o.f. are those that the signal leaves."""
    rng = np.random.default_rng(3)
    shape = (count := 3000 // rows, rows, columns)
    signal = rng.normal(size=(count, rows, rank)) @ rng.normal(size=(count, rank, columns))
    matrices = rng.normal(size=shape) * 3 + 20 * signal
    values = torch.from_numpy(np.linalg.eigvalsh(matrices @ matrices.transpose(0, 2, 1)))
    variance = noise_variance(values, torch.full((count,), rows), torch.full((count,), columns))
    assert float(variance.mean().sqrt()) == pytest.approx(3, rel=0.025)


def test_default_window_width() -> None:
    assert [default_window(n) for n in (2, 27, 28, 62, 63, 343, 344, 1100)] == [3, 3, 5, 5, 7, 7, 9, 11]


def test_level_follows_noise_that_varies_in_space() -> None:
    rng = np.random.default_rng(1)
    level = np.linspace(5, 10, 30)[:, None, None] * np.ones((30, 20, 20))
    signal = rng.gamma(2, 100, (60, 4)) @ rng.uniform(0.5, 1, (4, level.size))
    data = (signal.reshape(60, *level.shape) + level * rng.standard_normal((60, *level.shape))).astype(np.float32)
    found = noise_level(torch.from_numpy(data)).numpy()
    assert np.abs(found / level - 1)[4:-4].max() < 0.04
    assert abs((found / level).mean() - 1) < 0.01


def test_correlation_factor() -> None:
    """1 for independent noise; for interpolated noise what is missing from the level."""
    rng = np.random.default_rng(2)
    white = torch.from_numpy(rng.standard_normal((40, 30, 30, 20)).astype(np.float32) + 10)
    everywhere = torch.ones(30, 30, 20, dtype=torch.bool)
    assert correlation_factor(white, everywhere) == pytest.approx(1, abs=0.02)
    mixed = 0.7 * white + 0.3 * white.roll(1, 2)
    factor = correlation_factor(mixed, everywhere)
    assert factor > 1.05
    assert float(noise_level(mixed, factor=factor).mean()) == pytest.approx(np.hypot(0.7, 0.3), rel=0.03)
    assert correlation_factor(white, everywhere & False) == 1
