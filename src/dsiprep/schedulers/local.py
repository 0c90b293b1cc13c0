"""Subjects on this machine, one after another or in parallel processes."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from typing import cast

from dsiprep.device import gpu_of_slot
from dsiprep.jobs import Job, Outcome, StepCallback, killed, memory_needed, run_subject
from dsiprep.schedulers.subject_process import SubjectProcess

__all__ = ["parallel_subjects", "run_locally"]

log = logging.getLogger("dsiprep")


def parallel_subjects(jobs: Sequence[Job], cores: int, cores_per_subject: int = 0, memory: int = 0) -> int:
    """Number of subjects to run in parallel, limited by cores and memory.

    Parameters
    ----------
    jobs : sequence of Job
    cores : int
        In all.
    cores_per_subject : int
        0 gives all cores to each subject.
    memory : int
        MB in all; 0 sets no limit.
    """
    processes = max(1, cores // (cores_per_subject or cores))
    if memory:
        processes = min(processes, max(1, memory // max(memory_needed(job) for job in jobs)))
    return min(processes, len(jobs))


def run_locally(
    jobs: Sequence[Job],
    on_step: StepCallback = lambda unit, step: None,
    processes: int = 1,
    stop_on_first_crash: bool = False,
) -> Iterator[Outcome]:
    """Run the jobs and yield their outcomes as they finish.

    Parameters
    ----------
    jobs : sequence of Job
    on_step : callable
        Called with (unit, step) before a step is computed.
    processes : int
        Number of subjects that run in parallel; a single one runs in this process.
    stop_on_first_crash : bool
        Start no further work after a failure.
    """
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            for outcome in run_subject(job, on_step, stop_on_first_crash):
                yield outcome
                if outcome.error and stop_on_first_crash:
                    return
        return

    started: dict[int, SubjectProcess] = {}

    def start(job: Job, slot: int) -> SubjectProcess:
        if slot in started and started[slot].lives:
            started[slot].take(job, stop_on_first_crash)
        else:
            started[slot] = SubjectProcess(job, stop_on_first_crash, gpu_of_slot(job.device, slot))
        return started[slot]

    try:
        yield from run_in_processes(jobs, on_step, processes, stop_on_first_crash, start)
    finally:
        for process in started.values():
            process.stop()


def run_in_processes(
    jobs: Sequence[Job],
    on_step: StepCallback,
    processes: int,
    stop_on_first_crash: bool,
    start: Callable[[Job, int], SubjectProcess],
) -> Iterator[Outcome]:
    """Run each job in a process of its own; a job whose process was killed is tried once more, after the others.

    `start` starts the process of a job in one of the slots 0 to `processes` - 1.
    """
    waiting = deque((job, 1) for job in jobs)
    running: dict[Connection, tuple[SubjectProcess, int, int]] = {}
    free = list(range(processes))
    try:
        while waiting or running:
            while waiting and free:
                job, attempt = waiting.popleft()
                slot = free.pop(0)
                process = start(job, slot)
                running[cast("Connection", process.connection)] = (process, slot, attempt)
            for connection in cast("list[Connection]", wait_for_any(list(running))):
                process, slot, attempt = running[connection]
                ended, outcomes = process.receive(on_step)
                if not ended:
                    continue
                del running[connection]
                free.append(slot)
                if outcomes is None and attempt == 1:
                    log.warning("sub-%s: its process was killed; it is tried once more", process.job.subject)
                    waiting.append((process.job, 2))
                    continue
                outcomes = killed(process.job) if outcomes is None else outcomes
                yield from outcomes
                if stop_on_first_crash and any(outcome.error for outcome in outcomes):
                    waiting.clear()
    finally:
        for process, _, _ in running.values():
            process.stop()
