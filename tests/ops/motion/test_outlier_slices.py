"""Slices with signal dropout: ratios to the prediction in the planes of the slices, and which slices lost signal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.motion.motion_state import Dropout, MotionState
from dsiprep.ops.motion.outlier_slices import SliceRatios, find_dropout, slice_ratios
from dsiprep.ops.motion.pyramid import build_pyramid
from dsiprep.ops.motion.slice_replacement import remove_loss
from helpers.grids import make_grid

VOLUMES, SLICES = 60, 40
BVALS = np.repeat([1000.0, 2000.0, 3000.0], VOLUMES // 3)


def _ratios(lost: np.ndarray, loss: float) -> SliceRatios:
    """Ratios of volumes with smooth gains, biased predictions and noise, of which `lost` slices lack `loss`."""
    rng = np.random.default_rng(0)
    position = np.linspace(-1, 1, SLICES)
    gain = rng.normal(0, 0.03, (VOLUMES, 1)) + rng.normal(0, 0.05, (VOLUMES, 1)) * position
    bias = 0.1 * np.sin(7 * position) * (BVALS[:, None] / 3000)
    ratio = np.exp(gain + bias + rng.normal(0, 0.02, gain.shape[:1] + position.shape)) * (1 - loss * lost)
    voxels = np.tile(np.where(np.abs(position) < 0.9, 500.0, 10.0), (VOLUMES, 1))
    return SliceRatios(ratio, voxels)


def _pattern(name: str) -> np.ndarray:
    lost = np.zeros((VOLUMES, SLICES), bool)
    for row, volume in enumerate(range(2, VOLUMES, 5)):  # a fifth
        if name == "six neighbours":
            lost[volume, 10 + row : 16 + row] = True
        else:
            step = {"interleave": 2, "every third": 3, "whole volume": 1}[name]
            lost[volume, row % step :: step] = True
    return lost


@pytest.mark.parametrize("loss", [0.3, 0.9])
@pytest.mark.parametrize("name", ["interleave", "every third", "six neighbours", "whole volume"])
def test_lost_slices_are_found_in_any_pattern(name: str, loss: float) -> None:
    lost, judged = _pattern(name), _ratios(np.zeros((VOLUMES, SLICES)), 0).voxels >= 30
    ratios = _ratios(lost, loss)
    found = find_dropout(ratios, BVALS)
    assert (found.lost & judged)[lost & judged].mean() > 0.99
    assert (found.lost & ~lost).sum() <= 2
    np.testing.assert_array_equal(found.whole, lost.all(axis=1))
    # what slices would hold without loss does not depend on the loss
    without = find_dropout(_ratios(lost, 0), BVALS).expected
    assert np.abs(np.log(found.expected / without))[judged].max() < 0.15
    assert np.sqrt((np.log(found.expected / without)[judged] ** 2).mean()) < 0.04


def test_intact_slices_are_not_outliers() -> None:
    found = find_dropout(_ratios(np.zeros((VOLUMES, SLICES)), 0), BVALS)
    assert not found.lost.any()
    assert found.z.std() < 1.5
    assert (found.z[:, 0] == 0).all()  # too little brain


def test_slices_excited_together_are_judged_together() -> None:
    lost = np.zeros((VOLUMES, SLICES), bool)
    lost[7, [12, 32]] = True
    lost[30, 5] = True  # its partner is intact: the shot was not lost
    together = tuple((k, k + 20) for k in range(20))
    ratios = _ratios(lost, 0.5)
    ratios.ratio[30, 5] *= 1.75  # 12 % below its prediction
    found = find_dropout(ratios, BVALS, together)
    assert np.argwhere(found.lost).tolist() == [[7, 12], [7, 32]]
    np.testing.assert_array_equal(found.z[:, 5:15], found.z[:, 25:35])


@pytest.fixture
def series() -> tuple[DWI, Volume]:
    """Volumes of one smooth ball, 3 mm, of which the third lost every other slice."""
    grid = make_grid("RAS", (28, 28, 24), (3.0, 3.0, 3.0))
    centre = grid.to_world(np.array([13.5, 13.5, 11.5]))
    distance = np.linalg.norm(grid.to_world(np.stack(np.indices(grid.shape), -1)) - centre, axis=-1)
    ball = torch.from_numpy(100 + 50 * np.cos(distance / 10)).float()
    data = torch.stack([ball] * 4)
    data[2, :, :, ::2] *= 0.4
    zeros = np.zeros(4, int)
    dwi = DWI(data, grid, np.array([0.0, 1000, 1000, 1000]), np.eye(4, 3), zeros, zeros)
    return dwi, Volume(torch.from_numpy(distance < 34).float(), grid)


def _state(dwi: DWI, shift: float) -> MotionState:
    transforms = np.tile(rigid_matrix(np.array([0, 0, 0, 0, 0, shift])), (len(dwi), 1, 1))
    return MotionState(transforms, None, np.zeros((10, 3)), np.zeros((len(dwi), 4)), None, 2, dwi.grid)


@pytest.mark.parametrize("shift", [0.0, 1.5])
@pytest.mark.parametrize("number", [0, 1])
def test_ratios_are_those_of_the_slices_as_acquired(series: tuple[DWI, Volume], shift: float, number: int) -> None:
    """Also half-way between slices, and from a level of 6 mm at which pairs of slices are averaged."""
    dwi, mask = series
    level, state = build_pyramid(dwi, mask, (6.0,))[number], _state(dwi, shift)
    volumes = np.array([1, 2, 3])
    predicted = level.sample(np.array([1, 1, 1]), state)
    ratios = slice_ratios(dwi, level, volumes, state, predicted)
    judged = np.flatnonzero(ratios.voxels[0] >= 60)
    assert len(judged) >= 15
    relative = ratios.ratio[1, judged] / ratios.ratio[0, judged]
    np.testing.assert_allclose(relative, np.where(judged % 2, 1, 0.4), atol=1e-3)
    inner = judged[2:-2]  # at the ends of the brain points lie on one side of the slice only
    np.testing.assert_allclose(ratios.ratio[[0, 2]][:, inner], 1, atol=0.05)


@pytest.mark.parametrize("number", [0, 1])
def test_filled_slices_leave_nothing_of_the_loss(series: tuple[DWI, Volume], number: int) -> None:
    dwi, mask = series
    level, volumes = build_pyramid(dwi, mask, (6.0,))[number], np.array([1, 2, 3])
    state = _state(dwi, 1.0)
    predicted, observed = level.sample(np.array([1, 1, 1]), state), level.sample(volumes, state)
    before = (observed[1] / predicted[1] - 1).abs().mean()
    lost, shape = np.zeros((4, 24), bool), (4, 24)
    lost[2, ::2] = True
    state = replace(state, dropout=Dropout(lost, np.zeros(4, bool), np.ones(shape), np.zeros(shape)))
    filled, weights = remove_loss(dwi, level, state, volumes, observed, predicted)
    assert list(filled.filled) == [2]
    assert before > 0.25
    assert (observed[1] / predicted[1] - 1).abs().mean() < 0.05 * before + 0.015
    torch.testing.assert_close(filled.take(np.array([3])).data, level.take(np.array([3])).data)
    assert weights.shape == (3,)
