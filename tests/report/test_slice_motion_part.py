"""What the report says about motion within volumes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsiprep.data.motion import Motion, SliceMotion
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.report.slice_motion_part import moved_within, shot_traces, slice_motion_facts
from helpers.grids import make_grid
from helpers.identity_results import make_motion

VOLUMES, SHOTS = 5, 6


@pytest.fixture
def motion() -> Motion:
    """A head that moves by 3 mm along R half way through volume 2."""
    grid = make_grid("LAS", (8, 9, SHOTS), (5.0, 5.0, 5.0))
    parameters = np.zeros((VOLUMES, SHOTS, 6))
    parameters[2, 3:, 3] = parameters[3:, :, 3] = 3.0
    slices = SliceMotion(
        rigid_matrix(parameters, grid.centre), tuple((k,) for k in range(SHOTS)), np.arange(VOLUMES) == 2,
        np.array([-3, 5, 812, 1, 0.0]), np.zeros((VOLUMES, SHOTS), bool), np.tile([2, 4, 4, 3], (7, 1)),
        np.ones(7, np.float32),
    )  # fmt: skip
    return replace(make_motion(grid, np.tile(np.eye(4), (VOLUMES, 1, 1)), np.arange(VOLUMES)), slices=slices)


def test_facts_and_traces(motion: Motion) -> None:
    assert moved_within(motion)
    facts = {fact.name: fact.value for fact in slice_motion_facts(_results(motion))}
    assert facts["Volumes with motion within"] == "1 of 5"
    assert facts["Motion within these volumes"] == "3.0 mm, at most 3.0 mm"
    assert "812" in facts["Evidence for more than one pose"]
    assert facts["Voxels of brain taken from the prediction"].startswith("7 ")
    picture = shot_traces(motion).decode()
    assert picture.startswith("<?xml")
    assert "Translation by shot" in picture


def test_nothing_is_said_of_what_was_not_estimated(motion: Motion) -> None:
    assert slice_motion_facts(_results(replace(motion, slices=None))) == ()
    assert motion.slices is not None
    still = replace(motion, slices=replace(motion.slices, moving=np.zeros(VOLUMES, bool)))
    assert not moved_within(still)
    assert [fact.value for fact in slice_motion_facts(_results(still))] == ["0 of 5"]


def _results(motion: Motion) -> Any:
    return SimpleNamespace(motions=(motion,))
