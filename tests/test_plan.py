"""What the plan says about distortion, and which warnings reach dry run, terminal and report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsiprep import jobs
from dsiprep.cli.plan_page import plan_units, print_plan
from dsiprep.cli.terminal import run_and_show
from dsiprep.data.acquisition import AxisCheck, PhaseEncoding
from dsiprep.jobs import Job
from dsiprep.plan import doubt_axis, plan_stages, warnings_for
from dsiprep.report.overview import summary
from dsiprep.report.page_parts import FigureWriter
from dsiprep.report.sections import distortion
from dsiprep.schedulers.local import run_locally
from dsiprep.settings import DistortionSettings, Settings, UnringingSettings
from dsiprep.stages.axis_check import check_axis
from helpers.bids_dataset import AP, PA, SETTINGS, Dataset
from helpers.epi_pair import Case, make_grid, rigid
from helpers.report_subject import make_subject

LINK = {"IntendedFor": "dwi/sub-01_dwi.nii.gz"}
OFF = replace(SETTINGS, distortion=DistortionSettings(method="none"))


def stage(dataset: Dataset, settings: Settings = SETTINGS) -> str:
    unit = dataset.unit()
    return plan_stages(unit, None, settings, unit)["distortion"]


def test_unlinked_image_is_a_warning(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, PA)
    unit = dataset.unit()
    (text,) = warnings_for(unit, SETTINGS)
    assert text.startswith("Distortion is NOT corrected, although there are images that could determine it. sub-01_dir")
    assert "add IntendedFor" in text
    assert stage(dataset).startswith("none: distortion is not corrected")
    print_plan(plan_units([unit], SETTINGS))
    assert f"WARNING: {text}" in capsys.readouterr().out
    assert warnings_for(unit, OFF) == ()


def test_corrected_unit_has_no_warning(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    assert stage(dataset) == "none: distortion is not corrected: there are no images with phase encoding opposite to j-"
    assert warnings_for(dataset.unit(), SETTINGS) == ()
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, **LINK})
    assert stage(dataset) == "drbuddi: blip-up/blip-down correction of phase encodings j- and j (the DRBUDDI model)"
    assert warnings_for(dataset.unit(), SETTINGS) == ()


@pytest.mark.parametrize("sidecar", [{"PhaseEncodingDirection": "j-"}, {}])
def test_fieldmap_that_cannot_be_used_is_a_warning(dataset: Dataset, sidecar: dict[str, str]) -> None:
    dataset.dwi("sub-01", sidecar)
    dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.01, "EchoTime2": 0.012, **LINK})
    dataset.image("sub-01_magnitude1", 1, {})
    (text,) = warnings_for(dataset.unit(), SETTINGS)
    assert "NOT corrected" in text
    assert "sub-01_phasediff.nii.gz: it needs PhaseEncodingDirection and TotalReadoutTime" in text
    assert stage(dataset).startswith("none: distortion is not corrected")


def test_pair_without_the_direction_of_the_series_is_a_warning(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", {"PhaseEncodingAxis": "j"})
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, "IntendedFor": "dwi/sub-01_dir-AP_dwi.nii.gz"})
    (text,) = warnings_for(dataset.unit(), SETTINGS)
    assert "the sidecar of sub-01_dir-AP_dwi.nii.gz has no PhaseEncodingDirection" in text


def test_contradicting_names_are_a_warning(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", PA)
    dataset.dwi("sub-01_dir-PA", PA)
    assert "named as opposite phase encodings" in warnings_for(dataset.unit(), SETTINGS)[0]


def test_warnings_are_shown_at_the_end_of_the_run_and_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = replace(make_subject(blips=1), warnings=("Distortion is NOT corrected, for a reason.",), distortion=None)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(jobs, "_run_unit", lambda unit, job, on_step: told)
    monkeypatch.setattr(jobs, "_write_reports", lambda *_: None)
    job = Job("01", (told.unit,), Settings(), tmp_path / "out", tmp_path / "work")
    assert run_and_show([job], run_locally) == 0
    shown = capsys.readouterr().err
    assert "done, with warnings" in shown
    assert f"\nWARNING {told.unit.name}: Distortion is NOT corrected, for a reason.\n" in shown
    writer = FigureWriter(tmp_path, "sub-01", told.unit.name)
    assert summary(told, writer).notes[0] == "WARNING: Distortion is NOT corrected, for a reason."
    assert distortion(told, writer).notes[0] == "Distortion is NOT corrected, for a reason."


@pytest.mark.parametrize(("amplitude", "axis", "wrong"), [(6.0, 1, False), (6.0, 0, True), (6.0, 2, True),
                                                          (1.5, 0, True), (0.0, 1, False)])  # fmt: skip
def test_wrong_phase_encoding_axis_is_noticed(amplitude: float, axis: int, wrong: bool) -> None:
    pose = rigid((1.0, -1.5, 0.8), np.array([0.8, 0.0, -0.6]))
    case = Case(make_grid("RAS"), 1, amplitude=amplitude, pose=pose, noise=2.0)
    blips = tuple(replace(blip, pe=replace(blip.pe, axis=axis)) for blip in case.blips if blip.pe)
    check = check_axis(blips, case.images, case.grid, case.mask)
    assert check.axes[0] == axis
    text = doubt_axis(check)
    assert bool(text) == wrong
    if wrong:
        assert f"the sidecars give {'ijk'[axis]} as the phase-encoding axis, but displacements along j" in text
        assert "--sdc-method drbuddi" in text


@pytest.mark.parametrize(("axis", "other", "wrong"), [(1, 0, False), (0, 2, True)])
def test_axis_is_checked_on_different_grids(axis: int, other: int, wrong: bool) -> None:
    """The second image is a sagittal file with planes tilted by 5 degrees: A-P is its first axis, R-L its third."""
    case = Case(make_grid("RAS"), 1, noise=2.0, second=(make_grid("ASR", 5.0), PhaseEncoding(0, -1)))
    encodings = PhaseEncoding(axis, 1, 0.05), PhaseEncoding(other, -1, 0.05)
    blips = tuple(replace(blip, pe=pe) for blip, pe in zip(case.blips, encodings, strict=True))
    check = check_axis(blips, case.images, case.grid, case.mask)
    assert sorted(check.axes) == [0, 1, 2]
    assert bool(doubt_axis(check)) == wrong


def test_axis_of_orthogonal_encodings_is_not_doubted() -> None:
    case = Case(make_grid("RAS"), 1, second=(make_grid("RAS"), PhaseEncoding(0, 1)))
    check = check_axis(case.blips, case.images, case.grid, case.mask)
    assert check.axes == (1,)
    assert doubt_axis(check) == ""
    assert doubt_axis(AxisCheck((1, 0, 2), (100.0, 76.0, 90.0))) == ""


def test_ringing_and_phase_are_planned(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    dataset.dwi("sub-01_part-mag", {**AP, "PartialFourier": 0.75})
    unit = dataset.unit()
    stages = plan_stages(unit, None, SETTINGS, unit)
    assert stages["denoise"] == "dwidenoise, noise floor koay"
    assert stages["unringing"].startswith("rpg: partial Fourier 0.75 along j, unless the images")
    dataset.image("sub-01_part-phase_dwi", 20, AP)
    dataset.dwi("sub-01_part-mag", AP)
    unit = dataset.unit()
    assert plan_stages(unit, None, SETTINGS, unit)["denoise"] == "dwidenoise, complex"
    print_plan(plan_units([unit], SETTINGS))
    shown = capsys.readouterr().out
    assert "Not done: Gibbs ringing is not removed: the sidecar does not give PartialFourier; add it" in shown
    assert "sub-01_part-phase_dwi.nii.gz" in shown
    chosen = replace(SETTINGS, unringing=UnringingSettings("mrdegibbs"))
    assert plan_stages(unit, None, chosen, unit)["unringing"] == "mrdegibbs: requested"
