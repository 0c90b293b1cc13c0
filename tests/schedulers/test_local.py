"""Subjects in parallel on this machine: a killed process costs its own subject one more try, and no other."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from dsiprep.device import gpu_of_slot
from dsiprep.jobs import Job, Outcome
from dsiprep.schedulers import subject_process
from dsiprep.schedulers.local import parallel_subjects, run_in_processes, run_locally
from dsiprep.schedulers.subject_process import SubjectProcess
from helpers import scripted_subject
from helpers.scripted_subject import scripted_job

Start = Callable[[Job, int], SubjectProcess]


class Pretended(SubjectProcess):
    """Without a process: what the job says happens at once."""

    def __init__(self, job: Job, attempt: int) -> None:
        self.job = job
        self.connection, sender = Pipe()
        self.process = self  # type: ignore[assignment]
        behaviour = job.command.split()
        sender.send((job.units[0].name, "motion-up"))
        if behaviour[min(attempt, len(behaviour) - 1)] != "die":
            error = "it failed" if behaviour == ["fail"] else None
            sender.send([Outcome(job.subject, job.units[0].name, 1.0, error)])
        sender.close()

    def wait(self) -> None:
        """Nothing to wait for."""


@pytest.fixture
def started() -> list[tuple[str, int]]:
    """Subject and slot of each start."""
    return []


@pytest.fixture
def start(started: list[tuple[str, int]]) -> Start:
    def starting(job: Job, slot: int) -> SubjectProcess:
        attempt = [subject for subject, _ in started].count(job.subject)
        started.append((job.subject, slot))
        return Pretended(job, attempt)

    return starting


def test_killed_process_costs_no_other_subject_and_is_tried_twice(
    tmp_path: Path, start: Start, started: list[tuple[str, int]]
) -> None:
    behaviour = {"01": ["die"], "02": ["die", "finish"], "03": ["finish"], "04": ["finish"]}
    jobs = [scripted_job(tmp_path, subject, *tries) for subject, tries in behaviour.items()]
    steps: list[str] = []
    outcomes = {o.subject: o for o in run_in_processes(jobs, lambda unit, step: steps.append(unit), 2, False, start)}
    assert sorted(outcomes) == ["01", "02", "03", "04"]
    assert outcomes["01"].unit == "sub-01_dir-AP"
    assert "killed twice, probably because memory ran out" in str(outcomes["01"].error)
    assert [outcomes[subject].error for subject in ("02", "03", "04")] == [None] * 3
    assert [subject for subject, _ in started].count("01") == 2
    assert {slot for _, slot in started} == {0, 1}
    assert len(steps) == len(started) == 6


def test_nothing_more_is_started_after_a_failure(tmp_path: Path, start: Start, started: list[tuple[str, int]]) -> None:
    jobs = [scripted_job(tmp_path, f"{n:02}", "fail" if n == 1 else "finish") for n in range(6)]
    outcomes = list(run_in_processes(jobs, lambda unit, step: None, 2, True, start))
    assert len(outcomes) == len(started) < 6


def test_processes_end_when_the_run_is_interrupted(tmp_path: Path) -> None:
    stopped = []

    class Endless(Pretended):
        def __init__(self, job: Job) -> None:
            self.job = job
            self.connection, self.other = Pipe()
            if job.subject == "00":
                self.other.send([Outcome(job.subject, job.units[0].name, 1.0)])

        def stop(self) -> None:
            stopped.append(self.job.subject)

        @property
        def process(self) -> Endless:  # type: ignore[override]
            return self

    jobs = [scripted_job(tmp_path, f"{n:02}") for n in range(2)]
    run = run_in_processes(jobs, lambda unit, step: None, 2, False, lambda job, slot: Endless(job))
    next(run)
    run.close()
    assert stopped == ["01"]


def test_processes_are_kept_for_further_subjects_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject_process, "COMMAND", scripted_subject.COMMAND)
    jobs = [scripted_job(tmp_path, f"{n:02}", *(["die"] if n == 3 else ["finish"])) for n in range(6)]
    outcomes = {outcome.subject: outcome.error for outcome in run_locally(jobs, processes=2)}
    assert sorted(outcomes) == [f"{n:02}" for n in range(6)]
    assert [subject for subject, error in outcomes.items() if error] == ["03"]
    pids = {int(line) for file in tmp_path.glob("tries-*") for line in file.read_text().splitlines()}
    assert len(pids) < len(jobs)
    assert not any((Path("/proc") / str(pid)).exists() for pid in pids)


def test_every_slot_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu_of_slot("auto", 1) == {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [gpu_of_slot("cuda", slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == [
        "0,1,2",
        "1,2,0",
        "2,0,1",
        "0,1,2",
    ]
    assert gpu_of_slot("cuda:2", 1) == gpu_of_slot("cpu", 1) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,5")
    assert gpu_of_slot("auto", 1) == {"CUDA_VISIBLE_DEVICES": "5,GPU-a"}


def test_memory_and_cores_limit_the_subjects_in_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsiprep.schedulers.local.memory_needed", lambda job: 3000)
    jobs = [scripted_job(tmp_path, f"{n:02}") for n in range(8)]
    assert parallel_subjects(jobs, 16) == 1
    assert parallel_subjects(jobs, 16, 4) == 4
    assert parallel_subjects(jobs, 16, 1) == 8
    assert parallel_subjects(jobs, 16, 1, memory=10000) == 3
    assert parallel_subjects(jobs, 16, 1, memory=100) == 1


def test_single_process_stops_after_a_failure(tmp_path: Path) -> None:
    outcomes = list(run_locally([scripted_job(tmp_path, "01"), scripted_job(tmp_path, "02")], stop_on_first_crash=True))
    assert {outcome.subject for outcome in outcomes} == {"01"}
