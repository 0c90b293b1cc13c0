"""Many subjects: what becomes of the others, and of the table, when something goes wrong."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from dsiprep import jobs as scale
from dsiprep.cli import terminal as show
from dsiprep.data.acquisition import Unit
from dsiprep.jobs import Job, run_subject
from dsiprep.settings import Settings


def job(tmp_path: Path, subject: str = "01") -> Job:
    unit = Unit(subject, None, f"sub-{subject}_dir-AP", (), (), (), (), ())
    return Job(subject, (unit,), Settings(), tmp_path / "out", tmp_path / "work")


def test_a_report_that_fails_is_told_and_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "sub-01.html"))

    monkeypatch.setenv("COLUMNS", "400")  # one line per cell of the table
    monkeypatch.setattr(scale, "_run_unit", lambda unit, job, tell: None)
    monkeypatch.setattr(scale, "_write_reports", full)
    kept = tmp_path / "work" / "sub-01" / "motion-0"
    kept.mkdir(parents=True)
    assert show.run_and_show([job(tmp_path)], 1, False) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "sub-01 report" in said and "No space left on device" in said and "Traceback" not in said
    assert kept.is_dir()
    assert [outcome.error is None for outcome in run_subject(job(tmp_path), lambda unit, step: None)] == [True, False]
    assert "Traceback" in (tmp_path / "out" / "logs" / "sub-01_report.log").read_text()


def test_subjects_that_could_not_be_grouped_are_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "_run_unit", lambda unit, job, tell: None)
    monkeypatch.setattr(scale, "_write_reports", lambda *_: None)
    assert show.run_and_show([job(tmp_path)], 1, False, {"07": "no PhaseEncodingDirection"}) == 1
    said = capsys.readouterr().err
    assert "sub-07" in said and "no PhaseEncodingDirection" in said and "done" in said
    assert show.run_and_show([job(tmp_path)], 1, False) == 0


def test_a_process_that_is_killed_costs_a_sentence(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1) as pool:
        future = pool.submit(os._exit, 9)
        (outcome,) = scale._collect(future, job(tmp_path))
    assert outcome.unit == "sub-01_dir-AP" and outcome.error is not None and "memory ran out" in outcome.error


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (PermissionError(13, "Permission denied", "a.nii.gz"), "a.nii.gz: Permission denied; check its rights"),
        (OSError(28, "No space left on device", "b.nii.gz"), "b.nii.gz: No space left on device; make room"),
        (MemoryError(), "memory ran out"),
        (KeyError("x"), "unexpected KeyError: 'x'; please report it"),
    ],
)
def test_what_went_wrong_is_one_sentence(tmp_path: Path, problem: Exception, said: str) -> None:
    sentence, log = scale._explain(problem, "sub-01", tmp_path)
    assert sentence.startswith(said) and "\n" not in sentence
    assert log == tmp_path / "logs" / "sub-01.log"
