"""Many subjects: one after the other, or one process per share of cores or per GPU.

A subject is the grain: its units (sessions, outputs) follow each other in one process and share its anatomy and its
report. A failed unit does not stop the others.
"""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from dsiprep import __version__
from dsiprep.cache import Cache
from dsiprep.data.acquisition import Unit
from dsiprep.data.results import UnitResults
from dsiprep.errors import DsiprepError
from dsiprep.settings import Settings

log = logging.getLogger("dsiprep")
StepCallback = Callable[[str, str], None]


@dataclass(frozen=True)
class Job:
    """One subject's work.

    Attributes
    ----------
    subject : str
        Without `sub-`.
    units : tuple of Unit
        At least one.
    settings : Settings
    out, work : Path
        Derivatives, and the folder of stage results.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    threads : int
        Cores that this subject may use.
    keep_work : bool
        Keep the stage results after a finished subject.
    mode : str
        "" for everything, "anat_only", "reports_only" or "boilerplate_only" (the last two compute nothing).
    command : str
        What was typed, for the report.
    """

    subject: str
    units: tuple[Unit, ...]
    settings: Settings
    out: Path
    work: Path
    device: str = "auto"
    threads: int = 1
    keep_work: bool = False
    mode: str = ""
    command: str = ""


@dataclass(frozen=True)
class Outcome:
    """How one unit (or, under "sub-X report", a report) ended: `error` is None, or the sentence that says why."""

    subject: str
    unit: str
    seconds: float
    error: str | None = None
    log: Path | None = None


def memory_needed(job: Job) -> int:
    """About how many MB one subject takes at its peak: a few float32 copies of the largest series, and the rest."""
    import nibabel as nib

    largest = 0
    for unit in job.units:
        shapes = [nib.load(run.image).shape for run in unit.runs]  # type: ignore[attr-defined]
        largest = max(largest, sum(math.prod(shape) for shape in shapes))
    return 2500 + round(5 * 4 * largest / 2**20)


def run_jobs(
    jobs: Sequence[Job],
    processes: int = 1,
    stop_on_first_crash: bool = False,
    on_step: StepCallback = lambda unit, step: None,
) -> Iterator[Outcome]:
    """Outcomes as they come in.

    Parameters
    ----------
    jobs : sequence of Job
    processes : int
        How many subjects at once.
    stop_on_first_crash : bool
        Start nothing more after a failure.
    on_step : callable
        Told (unit, step) when a step is about to be computed; with one process only.
    """
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            for outcome in run_subject(job, on_step, stop_on_first_crash):
                yield outcome
                if outcome.error and stop_on_first_crash:
                    return
        return
    # spawn: CUDA and threads do not survive a fork
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_run_quietly, job, stop_on_first_crash): job for job in jobs}
        for future in as_completed(futures):
            outcomes = _collect(future, futures[future])
            yield from outcomes
            if stop_on_first_crash and any(outcome.error for outcome in outcomes):
                pool.shutdown(cancel_futures=True)
                return


def _collect(future: Future[list[Outcome]], job: Job) -> list[Outcome]:
    """A job's outcomes; where its process was killed, that of every unit."""
    try:
        return future.result()
    except BrokenProcessPool:
        why = (
            "a process was killed, most likely because memory ran out; run fewer subjects at once (--mem, or more "
            "--omp-nthreads): the same command goes on from here"
        )
        return [Outcome(job.subject, unit.name, 0.0, why) for unit in job.units]


def _run_quietly(job: Job, stop_on_first_crash: bool) -> list[Outcome]:
    return list(run_subject(job, lambda unit, step: None, stop_on_first_crash))


def run_subject(job: Job, on_step: StepCallback, stop_on_first_crash: bool = False) -> Iterator[Outcome]:
    """All units of one subject, then its report; yields an outcome per unit, and one for a report that failed.

    The stage results stay in the work folder if a unit failed, so that a second try goes on from there.
    """
    from dsiprep.device import use_threads

    use_threads(job.threads)
    finished: list[UnitResults] = []
    failures: list[tuple[str, str]] = []
    for unit in _leads_first(job):
        start = time.perf_counter()
        error, where = None, None
        try:
            good = tuple(other for other in job.units if other.name not in dict(failures))  # a failed one leads none
            result = _run_unit(unit, replace(job, units=good), on_step)
            finished += [result] if result is not None else []
        except Exception as problem:
            error, where = _explain(problem, unit.name, job.out)
            failures.append((unit.name, error))
        yield Outcome(job.subject, unit.name, time.perf_counter() - start, error, where)
        if error and stop_on_first_crash:
            break
    finished.sort(key=lambda result: [unit.name for unit in job.units].index(result.unit.name))
    for name in dict.fromkeys(unit.output for unit in job.units if unit.output) if not job.mode else ():
        start = time.perf_counter()
        try:
            _write_joined(name, finished, job, on_step)
        except Exception as problem:
            error, where = _explain(problem, name, job.out)
            failures.append((name, error))
            yield Outcome(job.subject, name, time.perf_counter() - start, error, where)
    if job.mode != "anat_only":
        start, name = time.perf_counter(), f"sub-{job.subject} report"
        try:
            _write_reports(finished, failures, job, on_step)
        except Exception as problem:
            error, where = _explain(problem, name, job.out)
            failures.append((name, error))
            yield Outcome(job.subject, name, time.perf_counter() - start, error, where)
    if not failures and not job.keep_work and not job.mode:
        Cache(_work_folder(job)).clear()


def _leads_first(job: Job) -> list[Unit]:
    """Units in order, those first whose b=0 reference stands in for others' structural image."""
    from dsiprep.plan import choose_lead

    leading = {choose_lead(unit, job.units, job.settings).name for unit in job.units}
    return sorted(job.units, key=lambda unit: unit.name not in leading)


def _run_unit(unit: Unit, job: Job, on_step: StepCallback) -> UnitResults | None:
    from dsiprep.device import choose
    from dsiprep.io.derivatives import write_anatomy_of, write_root, write_unit
    from dsiprep.io.templates import load_template
    from dsiprep.pipeline import prepare_anatomy, preprocess
    from dsiprep.plan import choose_lead

    redraw = job.mode in ("reports_only", "boilerplate_only")
    cache = Cache(_work_folder(job), lambda step: on_step(unit.name, step), only_found=redraw)
    device = choose(job.device)
    template = None
    if job.settings.anatomy.normalize:
        template = load_template(job.settings.anatomy.template, job.settings.anatomy.modality)
    if job.mode == "anat_only":
        modality = job.settings.anatomy.modality
        if not unit.structural(modality):
            raise DsiprepError(f"{unit.name}: --anat-only, but there is no {modality} image; leave the option out")
        anatomy = prepare_anatomy(unit, job.settings, cache, device)
        write_root(job.out, __version__)
        write_anatomy_of(anatomy.value, unit, job.out, template, job.settings.anatomy)
        return None
    results = preprocess(unit, job.settings, cache, device, choose_lead(unit, job.units, job.settings))
    if not redraw:
        on_step(unit.name, "derivatives")
        write_unit(results, job.out, template)
    return results


def _write_joined(name: str, finished: list[UnitResults], job: Job, on_step: StepCallback) -> None:
    """The output that several finished units make together."""
    from dsiprep.io.derivatives import write_joined
    from dsiprep.pipeline import join_units

    parts = [results for results in finished if results.unit.output == name]
    wanted = [unit.name for unit in job.units if unit.output == name]
    missing = sorted(set(wanted) - {results.unit.name for results in parts})
    if missing:
        raise DsiprepError(f"{name}: not joined, for {', '.join(missing)} did not finish")
    on_step(name, "join")
    write_joined(join_units(name, parts), parts, job.out)


def _write_reports(
    finished: list[UnitResults], failures: list[tuple[str, str]], job: Job, on_step: StepCallback
) -> None:
    from dsiprep.io.derivatives import write_root
    from dsiprep.report.boilerplate import write_boilerplate
    from dsiprep.report.html import render_report

    write_root(job.out, __version__)
    on_step(job.units[-1].name, "report")
    if finished:
        write_boilerplate(finished, job.out)
    if job.mode != "boilerplate_only":
        render_report(finished, job.out, __version__, failures, job.command)


def _work_folder(job: Job) -> Path:
    return job.work / f"sub-{job.subject}"


def _explain(problem: Exception, name: str, out: Path) -> tuple[str, Path | None]:
    """A sentence for people; the traceback goes to a log."""
    where: Path | None = out / "logs" / f"{name.replace(' ', '_')}.log"
    try:
        assert where is not None
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text("".join(traceback.format_exception(problem)))
    except OSError:
        where = None
    if isinstance(problem, DsiprepError):
        return str(problem), where
    if isinstance(problem, MemoryError):
        return "memory ran out; give more with --mem, or run fewer subjects at once", where
    if isinstance(problem, OSError) and problem.errno is not None:
        advice = "check its rights" if isinstance(problem, PermissionError) else "make room or check the rights"
        return f"{problem.filename or out}: {problem.strerror}; {advice}, then run again", where
    return f"unexpected {type(problem).__name__}: {problem}; please report it with the log", where
