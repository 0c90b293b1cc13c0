"""Terminal output of a run: the progress bars and the table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from dsiprep.cli.plan_page import print_unused
from dsiprep.errors import printable
from dsiprep.jobs import Job, Outcome, StepCallback
from dsiprep.pipeline import STEPS
from dsiprep.plan import warnings_for


def run_and_show(
    jobs: Sequence[Job],
    run: Callable[[Sequence[Job], StepCallback], Iterator[Outcome]],
    grouping_errors: Mapping[str, str] | None = None,
) -> int:
    """Run the jobs with progress bars and print a table of units; return 0 on success and 1 after any failure.

    `run` yields the outcomes as they come and reports each step that begins. `grouping_errors` holds the error message
    of each subject whose files could not be grouped into units; these subjects are listed in the table as failed.
    """
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[step]}"),
        TimeElapsedColumn(),
    )
    for unit in (unit for job in jobs if not job.mode for unit in job.units):
        _print_warnings(console, unit.name, warnings_for(unit, jobs[0].settings))
    outcomes = [Outcome(subject, f"sub-{subject}", 0.0, error) for subject, error in (grouping_errors or {}).items()]
    with Progress(*columns, console=console) as progress:
        bars = _Bars(progress, jobs)
        for outcome in run(jobs, bars.on_step):
            outcomes.append(outcome)
            bars.finish(outcome)
        for outcome in outcomes:  # again, because the report step resets the bar of the last unit
            bars.finish(outcome)
    planned = [unit.name for job in jobs for unit in job.units]
    names = list(dict.fromkeys([*planned, *(outcome.unit for outcome in outcomes)]))
    _print_table(console, names, outcomes, jobs[0])
    print_unused(console, [unit for job in jobs for unit in job.units])
    return 0 if len(outcomes) == len(planned) and not any(outcome.error for outcome in outcomes) else 1


class _Bars:
    """One progress bar per unit; its length is the number of steps."""

    def __init__(self, progress: Progress, jobs: Sequence[Job]) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}
        for job in jobs:
            for unit in job.units:
                self.tasks[unit.name] = progress.add_task(unit.name, total=len(STEPS) + 2, step="waiting")

    def on_step(self, unit: str, step: str) -> None:
        """Show the step that a unit starts; outputs joined from several units have no bar."""
        order = [*STEPS, "derivatives", "report"]
        if unit in self.tasks:
            self.progress.update(self.tasks[unit], completed=order.index(step.split("-")[0]), step=step)
        if not self.progress.console.is_terminal:
            self.progress.console.print(f"{unit}: {step}", markup=False)

    def finish(self, outcome: Outcome) -> None:
        """Complete the bar of a unit; report outcomes have no bar."""
        if outcome.unit not in self.tasks:
            return
        step = "failed" if outcome.error else "done"
        self.progress.update(self.tasks[outcome.unit], completed=len(STEPS) + 2, step=step)


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
        table.add_row(escape(name), result, f"{outcome.seconds / 60:.1f} min")
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
