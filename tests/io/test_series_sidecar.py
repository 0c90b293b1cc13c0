"""Acquisition parameters of preprocessed series."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.results import UnitResults
from dsiprep.data.transform import Affine
from dsiprep.io.series_sidecar import acquisition_fields
from dsiprep.ops.image.affine import rigid_matrix
from helpers.grids import make_grid
from helpers.report_subject import make_subject


@pytest.fixture(scope="module")
def subject() -> UnitResults:
    return make_subject(blips=1)


def acquired_on(subject: UnitResults, grid: Grid, direction: str, to_acpc: np.ndarray) -> UnitResults:
    """The subject as if acquired on `grid` with a phase encoding and a head pose."""
    dwi = subject.acquired.dwi
    data = torch.zeros(len(dwi), *grid.shape)
    blips = (replace(subject.acquired.blips[0], pe=PhaseEncoding.from_bids(direction)),)
    acquired = replace(subject.acquired, dwi=replace(dwi, data=data, grid=grid), blips=blips)
    coregistration = replace(subject.coregistration, dwiref_to_acpc=Affine(np.linalg.inv(to_acpc), "dwiref", "ACPC"))
    return replace(subject, acquired=acquired, coregistration=coregistration)


@pytest.mark.parametrize(
    ("orientation", "direction", "expected"),
    [("LAS", "j", "j-"), ("RAS", "i-", "i"), ("LPS", "k-", "k-"), ("PSR", "i", "j"), ("PSR", "k", "i-")],
)
def test_phase_encoding_refers_to_the_axes_of_the_output(
    subject: UnitResults, orientation: str, direction: str, expected: str
) -> None:
    """The output is LPS, and the head was tilted by up to 15 degrees."""
    pose = rigid_matrix(np.array([0.25, -0.1, 0.2, 30.0, -20, 10]))
    moved = acquired_on(subject, make_grid(orientation, (6, 7, 5), (2, 2, 3)), direction, pose)
    fields = acquisition_fields([moved], make_grid("LPS", (4, 4, 4), (2, 2, 2)))
    assert fields["PhaseEncodingDirection"] == expected


def test_fields_that_differ_or_are_unknown_are_left_out(subject: UnitResults) -> None:
    grid, run = subject.preprocessed.dwi.grid, subject.unit.runs[0]
    first = replace(run, metadata={"RepetitionTime": 3.0, "EchoTime": 0.09})
    second = replace(run, metadata={"RepetitionTime": 3.5, "EchoTime": 0.09}, pe=PhaseEncoding(1, -1, 0.06))
    both = [replace(subject, unit=replace(subject.unit, runs=(each,))) for each in (first, second)]
    fields = acquisition_fields(both, grid)
    assert set(fields) == {"EchoTime", "PhaseEncodingDirection"}
    assert "EchoTime" not in acquisition_fields([both[0], subject], grid)
