"""Subjects as tasks of a Dask cluster: one that runs already, or one made of jobs of a batch system.

Each task runs one subject in a process of its own, so that a subject that runs out of memory does not end its worker.
The scheduler keeps the tries of each subject that were begun, and its outcomes: a subject is tried twice, whoever died;
a task that only waited on a worker that died is not charged, and a subject whose worker died after it had finished is
not processed again. The tasks are published under a name that follows from the run: the same command finds them again.
"""

from __future__ import annotations

import hashlib
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import dask
import dask_jobqueue
from distributed import Client, Future, KilledWorker, as_completed, get_client, get_worker

from dsiprep import __version__
from dsiprep.errors import DsiprepError, SettingsError, printable
from dsiprep.jobs import Job, Outcome, StepCallback, expected_minutes, killed, memory_needed
from dsiprep.schedulers.subject_process import SubjectProcess

__all__ = ["connect", "job_settings", "run_on_client", "run_with_dask"]

QUEUES = {
    "slurm": dask_jobqueue.SLURMCluster,
    "pbs": dask_jobqueue.PBSCluster,
    "sge": dask_jobqueue.SGECluster,
    "lsf": dask_jobqueue.LSFCluster,
    "oar": dask_jobqueue.OARCluster,
}
TRIES = 2  # of one subject
MEMORY_MARGIN = 1.2  # over the expected peak
# A subject takes minutes: workers are asked for at once, and none is given a second subject before it has finished one.
DASK_SETTINGS = {
    "distributed.scheduler.unknown-task-duration": "1h",
    "distributed.scheduler.worker-saturation": 1.0,
}


class SubjectKilledError(DsiprepError):
    """The process of a subject was killed; Dask tries the task again."""


def run_with_dask(
    jobs: Sequence[Job],
    on_step: StepCallback,
    scheduler: str,
    options: Mapping[str, Any],
    stop_on_first_crash: bool = False,
) -> Iterator[Outcome]:
    """Run the jobs on a cluster and yield their outcomes as they finish.

    Parameters
    ----------
    jobs : sequence of Job
    on_step : callable
        Called with (unit, step) before a step is computed.
    scheduler : str
        Address of a Dask scheduler, or one of `QUEUES`.
    options : mapping
        For a batch system: what `job_settings` takes.
    stop_on_first_crash : bool
        Start no further work after a failure.

    Raises
    ------
    SettingsError
        If the scheduler cannot be reached or refuses the options.
    """
    with connect(scheduler, options, jobs) as client:
        yield from run_on_client(jobs, client, on_step, stop_on_first_crash)


@contextmanager
def connect(scheduler: str, options: Mapping[str, Any], jobs: Sequence[Job]) -> Iterator[Client]:
    """A client of the scheduler; jobs of a batch system start when there is work and are cancelled at the end."""
    if scheduler not in QUEUES:
        if options:
            raise SettingsError(f"--scheduler-options is for batch systems ({', '.join(QUEUES)}); remove it")
        try:
            client = Client(scheduler, timeout=20)
        except (OSError, ValueError) as problem:
            raise SettingsError(
                f"--scheduler {scheduler}: no Dask scheduler answers there ({problem}); start one with `dask scheduler`"
            ) from None
        with client:
            yield client
        return
    settings, limits = job_settings(scheduler, options, jobs)
    with dask.config.set(DASK_SETTINGS):
        try:
            cluster = QUEUES[scheduler](**settings)
        except (TypeError, ValueError, OSError) as problem:
            raise SettingsError(f"--scheduler {scheduler}: {problem}; correct --scheduler-options") from None
        with cluster, Client(cluster) as client:
            cluster.adapt(**limits)
            yield client


def job_settings(
    scheduler: str, options: Mapping[str, Any], jobs: Sequence[Job]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Arguments of the cluster of dask-jobqueue, and of its `adapt`: one job of the batch system runs one subject.

    Cores, memory and time follow from the largest subject; `options` override them.
    """
    given = dict(options)
    limits = {
        "minimum_jobs": int(given.pop("minimum_jobs", 0)),
        "maximum_jobs": int(given.pop("maximum_jobs", len(jobs))),
    }
    minutes = 60 + 2 * math.ceil(max(expected_minutes(job) for job in jobs))
    seconds = "" if scheduler == "lsf" else ":00"
    settings = {
        "cores": max(job.threads for job in jobs),
        "memory": f"{math.ceil(MEMORY_MARGIN * max(memory_needed(job) for job in jobs))}MiB",
        "walltime": f"{minutes // 60:02d}:{minutes % 60:02d}{seconds}",
        "job_name": "dsiprep",
        **given,
        "processes": 1,
    }
    settings["worker_extra_args"] = [*settings.get("worker_extra_args", ()), "--nthreads", "1"]
    return settings, limits


def run_on_client(
    jobs: Sequence[Job], client: Client, on_step: StepCallback, stop_on_first_crash: bool = False
) -> Iterator[Outcome]:
    """Run the jobs as tasks, or come back to those that an earlier client submitted for the same run."""
    name = _name_of(jobs[0])
    for unit, step in dict(message for _, message in client.get_events(name)).items():
        on_step(unit, step)
    client.subscribe_topic(name, lambda event: on_step(*event[1]))
    running = _submit(jobs, client, name, stop_on_first_crash)
    stream = as_completed(running, loop=client.loop)
    for future in stream:
        job = running.pop(future)
        if _is_innocent(future, job, client, name):
            again = _submit([job], client, name, stop_on_first_crash)
            running |= again
            stream.update(again)
            continue
        outcomes = _outcomes_of(future, job)
        yield from outcomes
        if stop_on_first_crash and any(outcome.error for outcome in outcomes):
            client.cancel(list(running))
            break
    client.unsubscribe_topic(name)
    client.unpublish_dataset(name)


def _name_of(job: Job) -> str:
    """Name of a run: the same for the same version, settings and output folder."""
    identity = repr((__version__, job.settings, str(job.out), str(job.work), job.mode, job.device))
    return f"dsiprep-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _submit(jobs: Sequence[Job], client: Client, name: str, stop_on_first_crash: bool) -> dict[Future, Job]:
    """Tasks of the jobs, those that run already included; what failed before is tried anew."""
    known: dict[str, Future] = client.get_dataset(name) if name in client.list_datasets() else {}
    before = dict(known)
    for job in jobs:
        future = known.get(job.subject)
        if future is not None and future.status in ("pending", "finished"):
            continue
        if future is None:
            client.set_metadata([name, job.subject], {})
        key = ("subject", name, job.subject, uuid4().hex)
        known[job.subject] = client.submit(run_on_worker, job, stop_on_first_crash, name, key=key, retries=TRIES)
    if known != before:
        client.publish_dataset(known, name=name, override=True)
    return {known[job.subject]: job for job in jobs}


def run_on_worker(job: Job, stop_on_first_crash: bool, name: str) -> list[Outcome]:
    """Body of a task.

    Raises
    ------
    SubjectKilledError
        If the process of the subject was killed.
    """
    worker, client = get_worker(), get_client()
    known: bytes = client.get_metadata([name, job.subject, "outcomes"], b"")
    if known:
        return pickle.loads(known)
    tries = client.get_metadata([name, job.subject, "tries"], 0) + 1
    if tries > TRIES:
        return killed(job)
    client.set_metadata([name, job.subject, "tries"], tries)
    process = SubjectProcess(job, stop_on_first_crash)
    outcomes = process.finish(lambda unit, step: worker.log_event(name, (unit, step)))
    if outcomes is None:
        raise SubjectKilledError(f"sub-{job.subject}: its process was killed")
    client.set_metadata([name, job.subject, "outcomes"], pickle.dumps(outcomes))
    return outcomes


def _is_innocent(future: Future, job: Job, client: Client, name: str) -> bool:
    """Whether Dask gave a task up because workers died on which it waited, not because of its own tries."""
    if future.status != "error" or not isinstance(future.exception(), KilledWorker):
        return False
    return client.get_metadata([name, job.subject, "tries"], 0) < TRIES


def _outcomes_of(future: Future, job: Job) -> list[Outcome]:
    if future.status == "finished":
        return list(future.result())
    if future.status == "error" and isinstance(future.exception(), KilledWorker | SubjectKilledError):
        return killed(job)
    reason = printable(repr(future.exception())) if future.status == "error" else "the scheduler no longer knows it"
    error = f"the task failed: {reason}; all workers need the same version of dsiprep and the same folders"
    return [Outcome(job.subject, unit.name, 0.0, error) for unit in job.units]
