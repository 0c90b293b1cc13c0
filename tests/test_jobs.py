"""Failures of units and reports, and how they are reported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsiprep import jobs
from dsiprep.cli.terminal import run_and_show
from dsiprep.data.acquisition import Unit, UnusedImage
from dsiprep.errors import InputError
from dsiprep.jobs import Job, run_subject
from dsiprep.schedulers.local import run_locally
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
    assert run_and_show([job(tmp_path)], run_locally) == 1
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
    assert run_and_show([job(tmp_path)], run_locally, {"07": "no PhaseEncodingDirection"}) == 1
    table = capsys.readouterr().err
    assert "sub-07" in table
    assert "no PhaseEncodingDirection" in table
    assert "done" in table
    assert run_and_show([job(tmp_path)], run_locally) == 0


def test_second_process_on_a_subject_is_refused_and_leaves_the_first_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_run_unit", lambda unit, job, on_step: None)
    monkeypatch.setattr(jobs, "_write_reports", lambda *_: None)
    code = (
        "import sys; from pathlib import Path; from dsiprep.cache import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "work" / "sub-01")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "locked\n"
        (outcome,) = run_subject(job(tmp_path), lambda unit, step: None)
        assert f"process {other.pid} on " in str(outcome.error)
        assert not (tmp_path / "out" / "logs").exists()
        other.kill()  # its lock ends with it
        other.wait()
    (outcome,) = run_subject(job(tmp_path), lambda unit, step: None)
    assert outcome.error is None
    assert list((tmp_path / "work").iterdir()) == []


def test_log_of_an_earlier_failure_is_removed_by_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(unit: Unit, job: Job, on_step: object) -> None:
        raise ValueError

    monkeypatch.setattr(jobs, "_write_reports", lambda *_: None)
    monkeypatch.setattr(jobs, "_run_unit", fail)
    list(run_subject(job(tmp_path), lambda unit, step: None))
    log = tmp_path / "out" / "logs" / "sub-01_dir-AP.log"
    assert log.exists()
    monkeypatch.setattr(jobs, "_run_unit", lambda unit, job, on_step: None)
    list(run_subject(job(tmp_path), lambda unit, step: None))
    assert not log.exists()


def test_table_shows_brackets_and_unused_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise InputError("/data [raw]/[/b]: damaged")

    monkeypatch.setattr(jobs, "_run_unit", fails)
    monkeypatch.setattr(jobs, "_write_reports", lambda *_: None)
    work = job(tmp_path)
    unit = replace(work.units[0], left_out=(UnusedImage(Path("sub-01_T2w.nii.gz"), "--anat-modality T1w"),))
    assert run_and_show([replace(work, units=(unit,))], run_locally) == 1
    shown = capsys.readouterr().err
    assert "/data [raw]/[/b]: damaged" in " ".join(shown.split())
    assert "Images that are not used:\n  sub-01_T2w.nii.gz: --anat-modality T1w" in shown


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (PermissionError(13, "Permission denied", "a.nii.gz"), "a.nii.gz: Permission denied; check the permissions"),
        (
            OSError(28, "No space left on device", "b.nii.gz"),
            "b.nii.gz: No space left on device; make room",
        ),
        (FileNotFoundError(2, "No such file", "c.npy"), "c.npy: No such file; it disappeared during the run; restore"),
        (MemoryError(), "memory ran out"),
        (KeyError("x"), "unexpected KeyError: 'x'; please report it"),
    ],
)
def test_error_message_is_one_line(tmp_path: Path, problem: Exception, expected: str) -> None:
    message, log = jobs._explain(problem, "sub-01", tmp_path)
    assert message.startswith(expected)
    assert "\n" not in message
    assert log == tmp_path / "logs" / "sub-01.log"
