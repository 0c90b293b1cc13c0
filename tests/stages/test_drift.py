"""Drift of the signal, from b=0 volumes and from predictions, and its absence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.phantom.schemes import gradient_table
from dsiprep.stages.drift import estimate_drift, without_drift
from helpers.grids import make_grid

SHAPE = (12, 12, 12)


def series(
    gain: np.ndarray | None = None, interleaved: bool = True, by_b: bool = False, snr: float = 25.0, seed: int = 0
) -> DWI:
    """Tensors of random orientation with Rician noise, dsi101; b=0 volumes interleaved or all at the start."""
    rng = np.random.default_rng(seed)
    bvals, bvecs = gradient_table("dsi101")
    order = np.arange(len(bvals))
    if not interleaved:
        order = np.argsort(bvals > 0, kind="stable")
    if by_b:
        order = np.argsort(bvals, kind="stable")
    bvals, bvecs = bvals[order], bvecs[order]
    directions = rng.normal(size=(3, *SHAPE))
    directions /= np.linalg.norm(directions, axis=0)
    along = np.einsum("nd,dijk->nijk", bvecs, directions) ** 2
    signal = np.exp(-bvals[:, None, None, None] * (0.3e-3 + 1.4e-3 * along)) * rng.uniform(600, 1400, SHAPE)
    if gain is not None:
        signal = signal * gain[:, None, None, None]
    channels = rng.normal(scale=1000 / snr, size=(2, *signal.shape))
    data = np.sqrt((signal + channels[0]) ** 2 + channels[1] ** 2).astype(np.float32)
    zero = np.zeros(len(bvals), int)
    return DWI(torch.from_numpy(data), make_grid("LAS", SHAPE, (2, 2, 2)), bvals, bvecs, zero, zero)


def everywhere(dwi: DWI) -> Volume:
    return Volume(torch.ones(SHAPE), dwi.grid)


TIME = np.linspace(0, 1, 107)


@pytest.mark.parametrize(
    ("gain", "name"), [(1 - 0.06 * TIME, "Linear"), (1 - 0.1 * TIME + 0.05 * TIME**2, "Quadratic")]
)
def test_drift_from_interleaved_b0(gain: np.ndarray, name: str) -> None:
    dwi = series(gain)
    found = estimate_drift(dwi, everywhere(dwi))
    assert np.abs(found.gains - gain).max() < 0.005
    assert found.notes[0].startswith(name)
    assert np.isfinite(found.measured).sum() == 6
    corrected = without_drift(dwi, found).data / series().data
    assert float(corrected[:, dwi.data.mean(0) > 300].median(1).values.sub(1).abs().median()) < 0.01


@pytest.mark.parametrize("gain", [1 - 0.06 * TIME, 1 - 0.12 * TIME + 0.06 * TIME**2, 1 + 0.04 * TIME])
def test_drift_from_predictions(gain: np.ndarray) -> None:
    dwi = series(gain, interleaved=False)
    found = estimate_drift(dwi, everywhere(dwi))
    assert "prediction" in found.notes[0]
    assert np.abs(found.gains - gain).max() < 0.015


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_series_without_drift_is_returned(interleaved: bool, seed: int) -> None:
    dwi = series(interleaved=interleaved, seed=seed)
    found = estimate_drift(dwi, everywhere(dwi))
    assert np.abs(found.gains - 1).max() < 0.01
    if not found.notes:
        assert without_drift(dwi, found) is dwi


def test_decay_with_b_is_not_taken_for_drift() -> None:
    """In order of b, later volumes are darker, and the misfit of the model changes over time."""
    dwi = series(by_b=True)
    assert np.abs(estimate_drift(dwi, everywhere(dwi)).gains - 1).max() < 0.01


def test_runs_drift_separately_and_implausible_drift_is_left() -> None:
    steep = series(1 - 0.7 * TIME)
    plain = series(1 - 0.05 * TIME)
    both = DWI(
        torch.cat([plain.data, steep.data]), plain.grid, np.tile(plain.bvals, 2), np.tile(plain.bvecs, (2, 1)),
        np.repeat([0, 1], 107), np.zeros(214, int),
    )  # fmt: skip
    found = estimate_drift(both, everywhere(plain))
    assert np.abs(found.gains[:107] - (1 - 0.05 * TIME)).max() < 0.005
    assert (found.gains[107:] == 1).all()
    assert "too large" in found.notes[1]
