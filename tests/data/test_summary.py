"""The repr of results and images: one short line, whatever they hold."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Motion
from helpers.report_subject import make_subject


def test_repr_of_a_volume_shows_shape_and_type() -> None:
    grid = Grid((4, 5, 6), np.eye(4))
    assert repr(grid) == "Grid(shape=(4, 5, 6), affine=4x4 float64)"
    assert repr(Volume(torch.zeros(4, 5, 6), grid)) == "Volume(data=4x5x6 float32, grid=Grid)"


def test_repr_of_results_is_one_line() -> None:
    results = make_subject()
    motion: Motion = results.motions[0]
    for item in (motion, results.preprocessed, results.quality, results.anatomy, results.unit):
        assert "\n" not in repr(item)
        assert len(repr(item)) < 1000
    assert f"transforms={len(motion.transforms)}x4x4 float64" in repr(motion)
