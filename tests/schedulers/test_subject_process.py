"""A subject in a process of its own: its messages, its death, and the death of its parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsiprep.data.acquisition import Unit
from dsiprep.jobs import Job
from dsiprep.schedulers import subject_process
from dsiprep.schedulers.subject_process import SubjectProcess
from dsiprep.settings import Settings
from helpers import scripted_subject
from helpers.processes import alive, wait_until
from helpers.scripted_subject import scripted_job, tries


def ignore(unit: str, step: str) -> None:
    pass


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject_process, "COMMAND", scripted_subject.COMMAND)


def test_failure_of_a_real_subject_is_received(tmp_path: Path) -> None:
    unit = Unit("01", None, "sub-01_dir-AP", (), (), (), (), ())
    job = Job("01", (unit,), Settings(), tmp_path / "out", tmp_path / "work")
    outcomes = SubjectProcess(job, False, {"DSIPREP_TEST": "1"}).finish(ignore)
    assert outcomes is not None
    assert "no output resolution is set" in str(outcomes[0].error)


@pytest.mark.usefixtures("scripted")
def test_steps_and_death_are_received(tmp_path: Path) -> None:
    steps: list[tuple[str, str]] = []
    job = scripted_job(tmp_path, "01", "die", "finish")
    assert SubjectProcess(job, False).finish(lambda *step: steps.append(step)) is None
    outcomes = SubjectProcess(job, False).finish(ignore)
    assert steps == [("sub-01_dir-AP", "motion-up")]
    assert outcomes is not None
    assert [outcome.error for outcome in outcomes] == [None]
    assert tries(job) == 2


@pytest.mark.usefixtures("scripted")
def test_one_process_takes_several_subjects(tmp_path: Path) -> None:
    jobs = [scripted_job(tmp_path, subject, "finish") for subject in ("01", "02")]
    process = SubjectProcess(jobs[0], False)
    received = []
    for job in jobs:
        if job is not jobs[0]:
            process.take(job, False)
        while not (message := process.receive(ignore))[0]:
            pass
        received += message[1] or []
    assert process.lives
    process.stop()
    assert not process.lives
    assert [outcome.subject for outcome in received] == ["01", "02"]
    assert (tmp_path / "tries-01").read_text() == (tmp_path / "tries-02").read_text()  # the same process


PARENT = """
import sys
from pathlib import Path
from dsiprep.schedulers import subject_process
from helpers.scripted_subject import COMMAND, scripted_job
subject_process.COMMAND = COMMAND
subject_process.SubjectProcess(scripted_job(Path(sys.argv[1]), "01", "wait"), False).finish(lambda *step: None)
"""


def test_process_ends_with_its_parent(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    started = tmp_path / "tries-01"
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}
    ) as parent:
        try:
            wait_until(lambda: started.exists() and started.read_text().endswith("\n"))
        finally:
            parent.kill()
    child = int(started.read_text())
    wait_until(lambda: not alive(child))
