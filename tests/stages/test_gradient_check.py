"""The b-table check on a synthetic brain whose fibres have ends: straight bundles along every axis, bent at one end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.qspace import GradientCheck
from dsiprep.data.results import Acquired
from dsiprep.io.gradients import fsl_axes
from dsiprep.ops.qspace.fibre_continuity import axis_frames, describe_frame
from dsiprep.ops.qspace.sampling_scheme import recognise
from dsiprep.stages.gradient_check import check_gradients, doubt_gradients, with_corrected_gradients

SHAPE, VOXEL = (44, 48, 40), 3.0


def bundles() -> tuple[np.ndarray, np.ndarray]:
    """Directions (i, j, k, 3) in world RAS+ and a white-matter mask: tubes along helices, apart from each other."""
    directions, white = np.zeros((*SHAPE, 3)), np.zeros(SHAPE, bool)
    rng = np.random.default_rng(4)
    for _ in range(170):
        at = rng.uniform(3, np.array(SHAPE) - 3)
        heading, turn = rng.normal(size=3), rng.normal(size=3) * 0.08
        for _ in range(120):
            heading = heading / np.linalg.norm(heading)
            voxel = tuple(np.round(at).astype(int))
            if min(voxel) < 2 or any(v >= n - 2 for v, n in zip(voxel, SHAPE, strict=True)):
                break
            around = tuple(slice(v - 1, v + 2) for v in voxel)
            free = ~white[around]
            directions[around][free], white[around] = heading, True
            at, heading = at + 0.5 * heading, heading + 0.5 * np.cross(turn, heading)
    return directions, white


def series(count: int = 30, bval: float = 1500.0, sigma: float = 0.02, mirrored: bool = False) -> Acquired:
    """b=0 and directions on the half sphere; the voxel axes are LAS, or RAS if `mirrored`."""
    rng = np.random.default_rng(1)
    affine = np.diag([VOXEL if mirrored else -VOXEL, VOXEL, VOXEL, 1.0])
    directions, white = bundles()
    voxel_axes = directions * [1 if mirrored else -1, 1, 1]  # the same image has other directions in the world
    bvecs = rng.normal(size=(count, 3))
    bvecs = np.concatenate([np.zeros((2, 3)), bvecs / np.linalg.norm(bvecs, axis=1, keepdims=True)])
    bvals = np.concatenate([np.zeros(2), np.full(count, bval)])
    along = (voxel_axes @ bvecs.T) ** 2
    diffusivity = np.where(white[..., None], 0.3e-3 + 1.4e-3 * along, 0.8e-3)
    signal = np.exp(-bvals * diffusivity) + sigma * rng.normal(size=along.shape)
    data = torch.as_tensor(np.moveaxis(np.abs(signal), -1, 0), dtype=torch.float32)
    grid, run = Grid(SHAPE, affine), np.zeros(len(bvals), int)
    dwi = DWI(data, grid, bvals, bvecs, run, run)
    mask = Volume(torch.ones(SHAPE), grid)
    return Acquired(dwi, (), recognise(bvals, bvecs), mask, np.ones(1))


def check(acquired: Acquired) -> GradientCheck:
    return check_gradients(acquired, fsl_axes(acquired.dwi.grid))


def in_frame(acquired: Acquired, frame: np.ndarray) -> Acquired:
    axes = fsl_axes(acquired.dwi.grid)
    return replace(acquired, dwi=replace(acquired.dwi, bvecs=acquired.dwi.bvecs @ (axes @ frame @ axes.T).T))


@pytest.fixture(scope="module")
def right() -> Acquired:
    return series()


def test_there_are_24_distinct_frames_and_the_first_changes_nothing() -> None:
    frames = axis_frames()
    assert len({describe_frame(frame) for frame in frames}) == 24
    assert describe_frame(frames[0]) == "x y z"
    assert all(describe_frame(frame) == describe_frame(-frame) for frame in frames)


@pytest.mark.parametrize("mirrored", [False, True])
def test_right_vectors_are_found_right(mirrored: bool) -> None:
    found = check(series(mirrored=mirrored))
    assert found.answer == "right"
    assert not found.remedy
    assert found.order == 1.0
    assert not doubt_gradients(found)


@pytest.mark.parametrize("number", range(1, 24))
def test_every_wrong_frame_is_found_and_corrected(right: Acquired, number: int) -> None:
    wrong = in_frame(right, axis_frames()[number])
    found = check(wrong)
    assert found.answer == "wrong"
    restored = with_corrected_gradients(wrong, found).dwi.bvecs
    cosine = np.abs(np.sum(restored * right.dwi.bvecs, axis=1))
    np.testing.assert_allclose(cosine[2:], 1, atol=1e-9)


def test_the_remedy_names_the_rows_of_the_file(right: Acquired) -> None:
    """Rows of the file as written by a program that negates y: the remedy negates y again."""
    axes = fsl_axes(right.dwi.grid)
    rows = (right.dwi.bvecs @ axes) * [1, -1, 1]
    wrong = replace(right, dwi=replace(right.dwi, bvecs=rows @ axes.T))
    found = check(wrong)
    assert found.remedy == "x -y z"
    assert "x -y z" in doubt_gradients(found)[0]
    assert "--bvec-check fix" in doubt_gradients(found)[0]
    assert "have been corrected" in doubt_gradients(replace(found, corrected=True))[0]


def test_noise_alone_is_undecided(right: Acquired) -> None:
    noise = torch.as_tensor(np.random.default_rng(2).normal(1, 0.1, right.dwi.data.shape), dtype=torch.float32)
    assert check(replace(right, dwi=right.dwi.with_data(noise))).answer == "undecided"


def test_too_few_directions_are_undecided_with_a_reason(right: Acquired) -> None:
    few = replace(right, dwi=right.dwi.select(np.arange(7)))
    found = check(few)
    assert found.answer == "undecided"
    assert "fewer than 6" in found.why


def test_reversed_b_values_are_found(right: Acquired) -> None:
    bvals = right.dwi.bvals[::-1].copy()
    found = check(replace(right, dwi=replace(right.dwi, bvals=bvals)))
    assert found.order < 0.97
    assert set(found.misfits) >= {0, 1}
    assert "order of the volumes" in doubt_gradients(found)[0]
