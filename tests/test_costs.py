"""Expected times and memory follow the size of a series, the cores and the settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsiprep.costs import COSTS, expected_memory, expected_seconds
from dsiprep.data.acquisition import Unit
from dsiprep.settings import LatticeSettings, MotionSettings, Settings
from helpers.bids_dataset import AP, Dataset

SHAPE = (100, 100, 50)  # half a million voxels


def series(dataset: Dataset, volumes: int) -> Unit:
    dataset.shape = SHAPE
    dataset.dwi("sub-01", AP, volumes)
    return dataset.unit()


def test_times_follow_size_and_cores(dataset: Dataset) -> None:
    unit = series(dataset, 40)
    one, four = (expected_seconds(unit, Settings(), threads) for threads in (1, 4))
    assert list(one) == [step for step in COSTS if step not in ("lattice", "slices")]  # nor are slice times known
    assert four["motion"] < 0.4 * one["motion"]
    assert one["motion"] == pytest.approx(COSTS["motion"][0] + 20 * COSTS["motion"][1])
    assert one["anatomy"] < COSTS["anatomy"][0]  # there is no structural image


def test_motion_within_volumes_costs_something_where_slice_times_are_known(dataset: Dataset) -> None:
    unit = series(dataset, 40)
    times = {"SliceTiming": [0.05 * k for k in range(SHAPE[2])]}
    timed = replace(unit, runs=tuple(replace(run, metadata={**run.metadata, **times}) for run in unit.runs))
    followed = Settings(motion=MotionSettings(slices="auto"))
    assert expected_seconds(timed, followed)["slices"] == pytest.approx(COSTS["slices"][0] + 20 * COSTS["slices"][1])
    for motion in (MotionSettings(slices="off"), MotionSettings(method="none"), MotionSettings(transform="Affine")):
        assert "slices" not in expected_seconds(timed, Settings(motion=motion))


def test_complex_data_and_a_lattice_cost_more(dataset: Dataset) -> None:
    unit = series(dataset, 40)
    complex_unit = replace(unit, runs=(replace(unit.runs[0], complex_part=unit.runs[0].image),))
    on_lattice = Settings(lattice=LatticeSettings(grid="acquired"))
    assert expected_seconds(complex_unit, Settings())["denoise"] == 2 * expected_seconds(unit, Settings())["denoise"]
    assert expected_seconds(unit, on_lattice)["lattice"] > 0
    plain, lattice = (expected_memory([unit], settings) for settings in (Settings(), on_lattice))
    assert plain < lattice < expected_memory([complex_unit], Settings())
