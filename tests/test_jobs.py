"""Failures of units, reports and worker processes, and how they are reported."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dsiprep import jobs
from dsiprep.cli.terminal import run_and_show
from dsiprep.data.acquisition import Unit, UnusedImage
from dsiprep.errors import InputError
from dsiprep.jobs import Job, run_subject
from dsiprep.settings import Settings


def job(tmp_path: Path, subject: str = "01") -> Job:
    unit = Unit(subject, None, f"sub-{subject}_dir-AP", (), (), (), (), ())
    return Job(subject, (unit,), Settings(), tmp_path / "out", tmp_path / "work")


def test_failed_report_is_reported_and_keeps_the_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "sub-01.html"))

    monkeypatch.setenv("COLUMNS", "400")  # one line per cell of the table
    monkeypatch.setattr(jobs, "_run_unit", lambda unit, job, on_step: None)
    monkeypatch.setattr(jobs, "_write_reports", disk_full)
    kept = tmp_path / "work" / "sub-01" / "motion-0"
    kept.mkdir(parents=True)
    assert run_and_show([job(tmp_path)], 1, False) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "sub-01 report" in message
    assert "No space left on device" in message
    assert "Traceback" not in message
    assert kept.is_dir()
    assert [outcome.error is None for outcome in run_subject(job(tmp_path), lambda unit, step: None)] == [True, False]
    assert "Traceback" in (tmp_path / "out" / "logs" / "sub-01_report.log").read_text()


def test_subject_with_grouping_error_is_listed_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "_run_unit", lambda unit, job, on_step: None)
    monkeypatch.setattr(jobs, "_write_reports", lambda *_: None)
    assert run_and_show([job(tmp_path)], 1, False, {"07": "no PhaseEncodingDirection"}) == 1
    table = capsys.readouterr().err
    assert "sub-07" in table
    assert "no PhaseEncodingDirection" in table
    assert "done" in table
    assert run_and_show([job(tmp_path)], 1, False) == 0


def test_table_shows_brackets_and_unused_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise InputError("/data [raw]/[/b]: damaged")

    monkeypatch.setattr(jobs, "_run_unit", fails)
    monkeypatch.setattr(jobs, "_write_reports", lambda *_: None)
    work = job(tmp_path)
    unit = replace(work.units[0], left_out=(UnusedImage(Path("sub-01_T2w.nii.gz"), "--anat-modality T1w"),))
    assert run_and_show([replace(work, units=(unit,))], 1, False) == 1
    shown = capsys.readouterr().err
    assert "/data [raw]/[/b]: damaged" in " ".join(shown.split())
    assert "Images that are not used:\n  sub-01_T2w.nii.gz: --anat-modality T1w" in shown


def test_killed_process_is_reported_for_each_unit(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1) as pool:
        future = pool.submit(os._exit, 9)
        (outcome,) = jobs._collect(future, job(tmp_path))
    assert outcome.unit == "sub-01_dir-AP"
    assert outcome.error is not None
    assert "memory ran out" in outcome.error


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (PermissionError(13, "Permission denied", "a.nii.gz"), "a.nii.gz: Permission denied; check the permissions"),
        (OSError(28, "No space left on device", "b.nii.gz"), "b.nii.gz: No space left on device; check the free space"),
        (MemoryError(), "memory ran out"),
        (KeyError("x"), "unexpected KeyError: 'x'; please report it"),
    ],
)
def test_error_message_is_one_line(tmp_path: Path, problem: Exception, expected: str) -> None:
    message, log = jobs._explain(problem, "sub-01", tmp_path)
    assert message.startswith(expected)
    assert "\n" not in message
    assert log == tmp_path / "logs" / "sub-01.log"
