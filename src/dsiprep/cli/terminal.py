"""Terminal output of a run: progress and the table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from dsiprep.cli.plan_page import print_unused
from dsiprep.cli.progress import LiveProgress, as_time
from dsiprep.errors import printable
from dsiprep.jobs import Job, Outcome, StepCallback
from dsiprep.plan import warnings_for


def run_and_show(
    jobs: Sequence[Job],
    run: Callable[[Sequence[Job], StepCallback], Iterator[Outcome]],
    grouping_errors: Mapping[str, str] | None = None,
    processes: int = 1,
) -> int:
    """Run the jobs, show where they are, and print a table of units; return 0 on success and 1 after any failure.

    `run` yields the outcomes as they come and reports each step that begins; `processes` is the number of subjects that
    it runs side by side. `grouping_errors` holds the error message
    of each subject whose files could not be grouped into units; these subjects are listed in the table as failed.
    """
    console = Console(stderr=True, highlight=False)
    for unit in (unit for job in jobs if not job.mode for unit in job.units):
        _print_warnings(console, unit.name, warnings_for(unit, jobs[0].settings))
    outcomes = [Outcome(subject, f"sub-{subject}", 0.0, error) for subject, error in (grouping_errors or {}).items()]
    with LiveProgress(console, jobs, processes) as progress:
        for outcome in run(jobs, progress.on_step):
            outcomes.append(outcome)
            progress.finish(outcome)
    planned = [unit.name for job in jobs for unit in job.units]
    names = list(dict.fromkeys([*planned, *(outcome.unit for outcome in outcomes)]))
    _print_table(console, names, outcomes, jobs[0])
    print_unused(console, [unit for job in jobs for unit in job.units])
    return 0 if len(outcomes) == len(planned) and not any(outcome.error for outcome in outcomes) else 1


def _print_table(console: Console, names: Sequence[str], outcomes: Sequence[Outcome], job: Job) -> None:
    table = Table(*(Column(name, overflow="fold") for name in ("unit", "result", "time")))
    by_name = {outcome.unit: outcome for outcome in outcomes}
    for name in names:
        outcome = by_name.get(name)
        if outcome is None:
            table.add_row(escape(name), "not started", "")
            continue
        done = "[yellow]done, with warnings[/yellow]" if outcome.warnings else "[green]done[/green]"
        done += " before; nothing has changed since" if outcome.unchanged else ""
        result = f"[red]failed[/red]: {escape(outcome.error)}" if outcome.error else done
        if outcome.error and outcome.log:
            result += f"\n(log: {escape(printable(outcome.log))})"
        table.add_row(escape(name), result, as_time(outcome.seconds))
    console.print(table)
    for outcome in outcomes:
        _print_warnings(console, outcome.unit, outcome.warnings)
    for subject in sorted({outcome.subject for outcome in outcomes if not outcome.error}):
        report = job.out / f"sub-{subject}.html"
        if report.exists():
            console.print(f"Report: {printable(report)}", soft_wrap=True, markup=False)


def _print_warnings(console: Console, unit: str, warnings: Sequence[str]) -> None:
    for text in warnings:
        console.print(Text.assemble(("WARNING ", "bold yellow"), f"{unit}: {text}"), soft_wrap=True)
