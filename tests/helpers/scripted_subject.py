"""In place of the process of a subject: does what the job's command says, in the real process body.

A file of the subject's name in the work folder counts the tries.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dsiprep.data.acquisition import Unit
from dsiprep.jobs import Job, Outcome, StepCallback
from dsiprep.schedulers import subject_process
from dsiprep.settings import Settings

__all__ = ["COMMAND", "scripted_job", "tries"]

COMMAND = (sys.executable, __file__)


def scripted_job(work: Path, subject: str, *behaviour: str) -> Job:
    """A job that behaves at each try as named: "die", "wait" (until it is killed), "eat" (3 GB) or "finish"."""
    unit = Unit(subject, None, f"sub-{subject}_dir-AP", (), (), (), (), ())
    return Job(subject, (unit,), Settings(), work / "out", work, command=" ".join(behaviour))


def tries(job: Job) -> int:
    """How often the process of a job was started."""
    file = job.work / f"tries-{job.subject}"
    return len(file.read_text().splitlines()) if file.exists() else 0


def follow(job: Job, on_step: StepCallback, *_: object) -> Iterator[Outcome]:
    """Behave as the job's command says."""
    behaviour = job.command.split()
    now = behaviour[min(tries(job), len(behaviour) - 1)]
    with (job.work / f"tries-{job.subject}").open("a") as file:
        file.write(f"{os.getpid()}\n")
    on_step(job.units[0].name, "motion-up")
    if now == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    while now == "wait":
        time.sleep(0.1)
    eaten = []
    while now == "eat" and len(eaten) < 30:
        eaten.append(bytearray(os.urandom(1000)) * 100_000)
        time.sleep(0.2)
    yield Outcome(job.subject, job.units[0].name, 1.0)


if __name__ == "__main__":
    subject_process.run_subject = follow  # type: ignore[assignment]
    subject_process.main(int(sys.argv[1]))
