"""Run one subject: its units (sessions, outputs) one after another, which share the anatomy and the report.

A failed unit does not stop the others.
"""

from __future__ import annotations

import contextlib
import errno
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from dsiprep import __version__
from dsiprep.cache import Cache, LockedError, exclusive
from dsiprep.data.acquisition import Unit
from dsiprep.data.results import UnitResults
from dsiprep.errors import DsiprepError, printable
from dsiprep.finished import FinishedSubjects
from dsiprep.mapped import release_memory
from dsiprep.settings import Settings

ADVICE = {
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.ENOENT: "it disappeared during the run; restore it",
}
StepCallback = Callable[[str, str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """The processing of one subject.

    Attributes
    ----------
    subject : str
        Without `sub-`.
    units : tuple of Unit
        At least one.
    settings : Settings
    out, work : Path
        Folders of the derivatives and of the cached stage results.
    device : str
        "auto", "cpu", "cuda" or "cuda:N".
    threads : int
        Number of cores to use.
    keep_work : bool
        Keep the cached results after all units have finished.
    mode : str
        "" for full processing, "anat_only", "reports_only" or "boilerplate_only" (the last two compute nothing).
    command : str
        Command line, for the report.
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
    """Result of one unit, of an output joined from several units, or of a report (named "sub-X report").

    Attributes
    ----------
    subject, unit : str
    seconds : float
        Wall time.
    error : str or None
        One-line error message after a failure.
    log : Path or None
        File with the traceback, if it could be written.
    warnings : tuple of str
        What must not be overlooked about a finished unit.
    unchanged : bool
        It had finished before, with the same inputs.
    """

    subject: str
    unit: str
    seconds: float
    error: str | None = None
    log: Path | None = None
    warnings: tuple[str, ...] = ()
    unchanged: bool = False


def finished_before(job: Job) -> list[Outcome]:
    """Outcomes of a job whose subject finished before with the same inputs; empty if it has to be processed."""
    kept = not job.keep_work or _work_folder(job).is_dir()
    warnings = FinishedSubjects(job.out, job.settings).warnings_of(job.subject, job.units) if kept else None
    if job.mode or warnings is None:
        return []
    return [Outcome(job.subject, unit.name, 0.0, warnings=warnings[unit.name], unchanged=True) for unit in job.units]


def memory_needed(job: Job) -> int:
    """Approximate peak memory of a job in MB."""
    from dsiprep.costs import expected_memory

    return expected_memory(job.units, job.settings, job.threads)


def expected_minutes(job: Job) -> float:
    """Approximate CPU time of a job in minutes."""
    from dsiprep import costs

    return costs.expected_minutes(job.units, job.settings)


def killed(job: Job) -> list[Outcome]:
    """Outcomes of a job whose process was killed twice: all its units have failed."""
    error = (
        "its process was killed twice, probably because memory ran out; run fewer subjects in parallel (with --mem or "
        "a higher --omp-nthreads) or give each more memory, and the same command resumes from here"
    )
    return [Outcome(job.subject, unit.name, 0.0, error) for unit in job.units]


def run_subject(
    job: Job, on_step: StepCallback, stop_on_first_crash: bool = False, patience: float = 0.0
) -> Iterator[Outcome]:
    """Run all units of one subject, then write its joined outputs and its report.

    Yields the outcome of every unit, and of each joined output or report that failed. The cached results are kept after
    a failure, so that the next run resumes from them. All units fail if another process works on the same subject and
    does not end within `patience` seconds.
    """
    from dsiprep.device import use_threads

    use_threads(job.threads)
    try:
        with exclusive(_work_folder(job), patience):
            yield from _run_units(job, on_step, stop_on_first_crash)
    except LockedError as problem:
        yield from (Outcome(job.subject, unit.name, 0.0, str(problem)) for unit in job.units)


def _run_units(job: Job, on_step: StepCallback, stop_on_first_crash: bool) -> Iterator[Outcome]:
    finished: list[UnitResults] = []
    failures: list[tuple[str, str]] = []
    records = FinishedSubjects(job.out, job.settings)
    inputs = records.begin(job.subject, job.units)
    for unit in _leads_first(job):
        # the b=0 reference of a failed unit cannot replace another unit's structural image
        usable = tuple(other for other in job.units if other.name not in dict(failures))
        results, outcome = _attempt(job, unit.name, partial(_run_unit, unit, replace(job, units=usable), on_step))
        if results is not None:
            finished.append(results)
            outcome = replace(outcome, warnings=results.warnings)
        failures += [(unit.name, outcome.error)] if outcome.error else []
        yield outcome
        if outcome.error and stop_on_first_crash:
            break
    finished.sort(key=lambda results: [unit.name for unit in job.units].index(results.unit.name))
    final_steps = {}
    if not job.mode:
        for name in dict.fromkeys(unit.output for unit in job.units if unit.output):
            final_steps[name] = partial(_write_joined, name, finished, job, on_step)
    if job.mode != "anat_only":
        final_steps[f"sub-{job.subject} report"] = partial(_write_reports, finished, failures, job, on_step)
    for name, step in final_steps.items():
        outcome = _attempt(job, name, step)[1]
        if outcome.error:
            failures.append((name, outcome.error))
            yield outcome
    if not failures and not job.mode:
        warnings = {results.unit.name: results.warnings for results in finished}
        with contextlib.suppress(OSError):  # without a record the next run takes the subject up again
            records.remember(job.subject, job.units, inputs, warnings)
        if not job.keep_work:
            Cache(_work_folder(job)).clear()


def _attempt(job: Job, name: str, step: Callable[[], T]) -> tuple[T | None, Outcome]:
    """Run a step; after an exception its result is None and its outcome holds the error."""
    start = time.perf_counter()
    result, error, log_file = None, None, None
    try:
        result = step()
        _log_file(name, job.out).unlink(missing_ok=True)  # of an earlier failure
    except Exception as problem:
        error, log_file = _explain(problem, name, job.out)
        error = printable(error)
    return result, Outcome(job.subject, name, time.perf_counter() - start, error, log_file)


def _leads_first(job: Job) -> list[Unit]:
    """The units in order, but first those whose b=0 reference replaces the structural image of others."""
    from dsiprep.plan import choose_lead

    leads = {choose_lead(unit, job.units, job.settings).name for unit in job.units}
    return sorted(job.units, key=lambda unit: unit.name not in leads)


def _run_unit(unit: Unit, job: Job, on_step: StepCallback) -> UnitResults | None:
    from dsiprep.anatomy_process import anatomy_beside
    from dsiprep.device import choose
    from dsiprep.io.derivatives import write_anatomy_only, write_root
    from dsiprep.io.provenance import raw_root
    from dsiprep.outputs import template_of, write_derivatives
    from dsiprep.pipeline import prepare_anatomy, preprocess
    from dsiprep.plan import choose_lead

    reports_only = job.mode in ("reports_only", "boilerplate_only")
    cache = Cache(_work_folder(job), lambda step: on_step(unit.name, step), only_found=reports_only)
    device = choose(job.device)
    if job.mode == "anat_only":
        modality = job.settings.anatomy.modality
        if not unit.structural(modality):
            raise DsiprepError(f"{unit.name}: --anat-only, but there is no {modality} image; remove the option")
        anatomy = prepare_anatomy(unit, job.settings, cache, device)
        write_root(job.out, __version__, raw_root(unit))
        write_anatomy_only(anatomy.value, unit, job.out, template_of(job.settings.anatomy), job.settings.anatomy)
        return None
    with anatomy_beside(unit, job.settings, cache, device, job.threads):
        results = preprocess(unit, job.settings, cache, device, choose_lead(unit, job.units, job.settings))
    if not reports_only:
        on_step(unit.name, "derivatives")
        release_memory()
        write_derivatives(results, job.out)
    return results


def _write_joined(name: str, finished: list[UnitResults], job: Job, on_step: StepCallback) -> None:
    """Write the output that is joined from several finished units."""
    from dsiprep.io.derivatives import write_joined
    from dsiprep.joining import join_units

    parts = [results for results in finished if results.unit.output == name]
    expected = {unit.name for unit in job.units if unit.output == name}
    missing = sorted(expected - {results.unit.name for results in parts})
    if missing:
        raise DsiprepError(f"{name}: not joined, because {', '.join(missing)} did not finish")
    on_step(name, "join")
    write_joined(join_units(name, parts), parts, job.out)


def _write_reports(
    finished: list[UnitResults], failures: list[tuple[str, str]], job: Job, on_step: StepCallback
) -> None:
    from dsiprep.outputs import write_methods, write_report

    on_step(job.units[-1].name, "report")
    if job.mode == "boilerplate_only":
        write_methods(finished, job.out)
    else:
        write_report(finished, job.out, failures, job.command)


def _work_folder(job: Job) -> Path:
    return job.work / f"sub-{job.subject}"


def _explain(problem: Exception, name: str, out: Path) -> tuple[str, Path | None]:
    """Return a one-line error message and the log file that holds the traceback."""
    log_file = _write_log(problem, name, out)
    if isinstance(problem, DsiprepError):
        return str(problem), log_file
    if isinstance(problem, MemoryError):
        return "memory ran out; give more with --mem, or run fewer subjects in parallel", log_file
    if isinstance(problem, OSError) and problem.errno is not None:
        advice = ADVICE.get(problem.errno, "check the free space and permissions")
        return f"{problem.filename or out}: {problem.strerror}; {advice}, then rerun", log_file
    return f"unexpected {type(problem).__name__}: {problem}; please report it with the log", log_file


def _write_log(problem: Exception, name: str, out: Path) -> Path | None:
    log_file = _log_file(name, out)
    try:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        log_file.write_text("".join(traceback.format_exception(problem)), errors="backslashreplace")
    except OSError:
        return None
    return log_file


def _log_file(name: str, out: Path) -> Path:
    return out / "logs" / f"{name.replace(' ', '_')}.log"
