"""From the options of a run to its jobs, and to what runs them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from dsiprep.data.acquisition import Unit
from dsiprep.device import check_name, choose
from dsiprep.engines.selection import check_engines
from dsiprep.errors import SettingsError
from dsiprep.io.files import check_file
from dsiprep.jobs import Job, Outcome, StepCallback, finished_before
from dsiprep.schedulers.local import parallel_subjects, run_locally
from dsiprep.settings import Settings

__all__ = ["cores_per_subject", "make_jobs", "scheduler_of", "side_by_side"]

Run = Callable[[Sequence[Job], StepCallback], Iterator[Outcome]]
BATCH_SYSTEMS = ("slurm", "pbs", "sge", "lsf", "oar")
CLUSTER_CORES = 4  # of each subject, unless --omp-nthreads is given
MODES = ("anat_only", "reports_only", "boilerplate_only")


def make_jobs(units: Sequence[Unit], options: argparse.Namespace, chosen: Settings, command: str) -> list[Job]:
    """One job per subject.

    Raises
    ------
    SettingsError
        If the device does not exist, or the scheduler is none that is known.
    EngineError
        If a third-party program that the run needs is missing.
    """
    local = options.scheduler == "local"
    if not local and options.scheduler not in BATCH_SYSTEMS and "://" not in options.scheduler:
        raise SettingsError(
            f"--scheduler {options.scheduler}: give local, one of {', '.join(BATCH_SYSTEMS)}, or an address such as "
            "tcp://10.0.0.1:8786"
        )
    if local and options.scheduler_options:
        raise SettingsError("--scheduler-options is for --scheduler " + "|".join(BATCH_SYSTEMS) + "; remove it")
    check_name(options.device)
    device = choose(options.device) if local else None  # workers look for their own
    mode = next((name for name in MODES if getattr(options, name)), "")
    by_subject: dict[str, list[Unit]] = {}
    for unit in units:
        if device is not None and mode in ("", "anat_only"):
            check_engines(unit, chosen, device)
        by_subject.setdefault(unit.subject, []).append(unit)
    return [
        Job(subject, tuple(subject_units), chosen, options.output_dir.resolve(), options.work_dir.resolve(),
            options.device, cores_per_subject(options), options.keep_work, mode, command)
        for subject, subject_units in by_subject.items()
    ]  # fmt: skip


def cores_per_subject(options: argparse.Namespace) -> int:
    """--omp-nthreads; by default all of --nprocs on this machine, and `CLUSTER_CORES` on a cluster."""
    return int(options.omp_nthreads or (options.nprocs if options.scheduler == "local" else CLUSTER_CORES))


def side_by_side(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """How many subjects run at the same time: on a cluster all of them, as far as is known."""
    if options.scheduler != "local":
        return len(jobs)
    return parallel_subjects(jobs, options.nprocs, options.omp_nthreads, options.mem)


def scheduler_of(jobs: Sequence[Job], options: argparse.Namespace) -> Run:
    """What runs the jobs; subjects that finished before with the same inputs are not processed again.

    Raises
    ------
    SettingsError
        If Dask is asked for and not installed, or its options cannot be read.
    """
    run = _chosen_scheduler(jobs, options)
    return run if options.rerun else partial(_run_unfinished, run=run)


def _run_unfinished(jobs: Sequence[Job], on_step: StepCallback, run: Run) -> Iterator[Outcome]:
    left = []
    for job in jobs:
        outcomes = finished_before(job)
        yield from outcomes
        left += [] if outcomes else [job]
    if left:
        yield from run(left, on_step)


def _chosen_scheduler(jobs: Sequence[Job], options: argparse.Namespace) -> Run:
    stop = options.stop_on_first_crash
    if options.scheduler == "local":
        return partial(run_locally, processes=side_by_side(jobs, options), stop_on_first_crash=stop)
    try:
        from dsiprep.schedulers.cluster import run_with_dask
    except ModuleNotFoundError as missing:
        raise SettingsError(
            f"--scheduler {options.scheduler}: {missing.name} is not installed; run `pip install 'dsiprep[cluster]'`"
        ) from None
    given = _read_options(options.scheduler_options) if options.scheduler_options else {}
    return partial(run_with_dask, scheduler=options.scheduler, options=given, stop_on_first_crash=stop)


def _read_options(path: Path) -> Mapping[str, Any]:
    check_file(path)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as problem:
        raise SettingsError(f"--scheduler-options {path}: {os.strerror(problem.errno or 0)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise SettingsError(f"--scheduler-options {path} is neither YAML nor JSON: {problem}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise SettingsError(f"--scheduler-options {path}: options by name are wanted, such as `queue: long`")
    return content
