"""Series of different protocols are processed separately; parts of one protocol are joined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsiprep.data.acquisition import Unit
from helpers.bids_dataset import AP, PA, Dataset

DSI = {"EchoTime": 0.138, "RepetitionTime": 9.9}


def runs(units: list[Unit]) -> dict[str, list[str]]:
    return {unit.name: [run.image.name.split("_dwi")[0] for run in unit.runs] for unit in units}


def test_two_halves_of_one_dsi_are_joined(dataset: Dataset) -> None:
    for name, largest, echo in (("a", 5000, 0.138), ("b", 4800, 0.1365)):
        path = dataset.dwi(f"sub-01_acq-{name}", {**AP, **DSI, "EchoTime": echo})
        bvals = np.r_[0, np.linspace(300, largest, 19)]
        np.savetxt(path.with_name(f"sub-01_acq-{name}_dwi.bval"), bvals[None], fmt="%d")
    unit = dataset.unit()
    assert len(unit.runs) == 2
    assert any("differ in EchoTime from 0.1365 to 0.138 s" in note for note in unit.notes)


def test_dsi_and_dti_of_one_session_are_separate(dataset: Dataset) -> None:
    for direction, encoding in (("AP", AP), ("PA", PA)):
        dataset.dwi(f"sub-01_acq-dsi_dir-{direction}", {**encoding, **DSI})
        dataset.dwi(f"sub-01_acq-dti_dir-{direction}", {**encoding, **DSI, "EchoTime": 0.08})
    units = dataset.units()
    assert runs(units) == {
        f"sub-01_acq-{name}": [f"sub-01_acq-{name}_dir-AP", f"sub-01_acq-{name}_dir-PA"] for name in ("dsi", "dti")
    }
    assert all(unit.reversed_pairs() == ["j", "j-"] for unit in units)
    assert any("differs from" in note and "EchoTime (0.138 s and 0.08 s)" in note for note in units[0].notes)


@pytest.mark.parametrize("with_times", [True, False])
def test_echoes_are_separate(with_times: bool, dataset: Dataset) -> None:
    for direction, encoding in (("AP", AP), ("PA", PA)):
        for echo, time in ((1, 0.07), (2, 0.11)):
            fields = {"EchoTime": time} if with_times else {}
            dataset.dwi(f"sub-01_dir-{direction}_echo-{echo}", {**encoding, **fields})
    assert runs(dataset.units()) == {
        f"sub-01_acq-echo{echo}": [f"sub-01_dir-{direction}_echo-{echo}" for direction in ("AP", "PA")]
        for echo in (1, 2)
    }


@pytest.mark.parametrize(
    ("first", "second", "separate"),
    [
        ({"RepetitionTime": 3.0}, {"RepetitionTime": 9.0}, True),
        ({"RepetitionTime": 8.0}, {"RepetitionTime": 9.0}, False),
        ({"RepetitionTime": 8.0}, {}, False),
        ({"EchoTime": "n/a"}, {"EchoTime": 0.1}, False),
        ({"ImageType": ["ORIGINAL", "NORM", "DIS2D"]}, {"ImageType": ["ORIGINAL", "NORM", "DIS2D", "MFSPLIT"]}, False),
        ({"ImageType": ["ORIGINAL", "NORM", "DIS2D"]}, {"ImageType": ["ORIGINAL", "NORM", "ND"]}, True),
        ({"ImageType": ["ORIGINAL"]}, {"ImageType": ["ORIGINAL", "NORM"]}, True),
    ],
)
def test_repetition_times_and_reconstructions(
    first: dict[str, Any], second: dict[str, Any], separate: bool, dataset: Dataset
) -> None:
    dataset.dwi("sub-01_run-1", {**AP, **first})
    dataset.dwi("sub-01_run-2", {**AP, **second})
    units = dataset.units()
    assert len(units) == (2 if separate else 1)
    assert any("processed separately" in note for note in units[0].notes) == separate


def test_short_reversed_series_of_another_echo_time_serves_as_reference(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", {**AP, "EchoTime": 0.138})
    dataset.dwi("sub-01_dir-PA", {**PA, "EchoTime": 0.07}, volumes=3)
    unit = dataset.unit()
    assert [epi.image.name for epi in unit.epis] == ["sub-01_dir-PA_dwi.nii.gz"]


def test_multipart_id_of_the_sidecars_decides(dataset: Dataset) -> None:
    for run, time in ((1, 0.07), (2, 0.11)):
        dataset.dwi(f"sub-01_run-{run}", {**AP, "EchoTime": time, "MultipartID": "all"})
    assert len(dataset.unit().runs) == 2


def test_protocols_are_compared_within_a_session(dataset: Dataset) -> None:
    for session, time in (("a", 0.07), ("b", 0.11)):
        for direction, encoding in (("AP", AP), ("PA", PA)):
            dataset.dwi(f"sub-01_ses-{session}_dir-{direction}", {**encoding, "EchoTime": time})
    dataset.dwi("sub-01_ses-b_acq-x_dir-AP", {**AP, "EchoTime": 0.15})
    assert {name: len(files) for name, files in runs(dataset.units()).items()} == {
        "sub-01_ses-a": 2, "sub-01_ses-b": 2, "sub-01_ses-b_acq-x_dir-AP": 1,
    }  # fmt: skip
