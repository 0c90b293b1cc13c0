"""Where a run is: a live line per unit on a terminal, a line per stage elsewhere, and both in a log file."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dsiprep.cli.time_model import TimeModel
from dsiprep.costs import expected_seconds
from dsiprep.errors import OutputError, printable
from dsiprep.jobs import Job, Outcome

__all__ = ["LiveProgress", "as_time", "memory_in_use", "run_log"]

log = logging.getLogger("dsiprep")
PAGE = os.sysconf("SC_PAGE_SIZE")


class LiveProgress:
    """Progress of all units, to be used as a context.

    Parameters
    ----------
    console : Console
    jobs : sequence of Job
    processes : int
        Subjects that run side by side.
    """

    def __init__(self, console: Console, jobs: Sequence[Job], processes: int = 1) -> None:
        self.console, self.processes = console, max(processes, 1)
        self.models: dict[str, TimeModel] = {}
        self.steps: dict[str, str] = {}
        for job in jobs:
            for unit in job.units:
                expected = expected_seconds(unit, job.settings, job.threads)
                if unit is not job.units[-1]:
                    del expected["report"]  # there is one for the subject, after its last unit
                self.models[unit.name] = TimeModel(expected)
        self.live = Live(console=console, get_renderable=self._table, refresh_per_second=2, transient=False)

    def __enter__(self) -> LiveProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def on_step(self, unit: str, step: str) -> None:
        """Show the stage that a unit begins."""
        now = time.monotonic()
        self.steps[unit] = step
        if unit in self.models:
            self.models[unit].begin(step, now)
        self._tell(f"{unit}: {step}{self._standing(unit, now)}")

    def finish(self, outcome: Outcome) -> None:
        """A unit has ended, or a report or joined output has failed."""
        now = time.monotonic()
        if outcome.unit in self.models:
            model = self.models[outcome.unit]
            model.end(now)
            for other in self.models.values():
                if not other.step:
                    other.pace = model.learned_pace
            self.steps[outcome.unit] = "failed" if outcome.error else "done"
        if outcome.error:
            text = Text.assemble(("FAILED ", "bold red"), f"{outcome.unit}: {outcome.error}")
            self.console.print(text, soft_wrap=True)
            log.error("%s failed after %s: %s", outcome.unit, as_time(outcome.seconds), outcome.error)
        else:
            self._tell(f"{outcome.unit}: done in {as_time(outcome.seconds)}")

    def seconds_left(self, now: float) -> float:
        """Time to the end of the run, if units keep to the number that run side by side."""
        each = [model.seconds_left(now) for model in self.models.values()]
        if self.processes == 1 or not each:
            return sum(each)
        return max(sum(each) / min(self.processes, len(each)), *each)

    def _standing(self, unit: str, now: float) -> str:
        """Share of the whole, time left and memory, for a line of text."""
        if unit not in self.models:
            return ""
        share, left = self.models[unit].share(now), self.models[unit].seconds_left(now)
        text = f" ({share:.0%} done, about {as_time(left)} left"
        if len(self.models) > 1:
            text += f", {as_time(self.seconds_left(now))} for all"
        return f"{text}, {memory_in_use() / 2**30:.1f} GB in use)"

    def _tell(self, line: str) -> None:
        """To the log, and to an output that is not a terminal with the time of day."""
        log.info(line)
        if not self.console.is_terminal:
            self.console.print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", markup=False, soft_wrap=True)

    def _table(self) -> Table:
        now = time.monotonic()
        table = Table.grid(padding=(0, 2))
        for unit, model in self.models.items():
            step = self.steps.get(unit, "waiting")
            share = model.share(now)
            left = "" if step in ("done", "failed") else f"about {as_time(model.seconds_left(now))} left"
            style = "red" if step == "failed" else "green" if step == "done" else ""
            table.add_row(printable(unit), ProgressBar(1.0, share, width=28), f"{share:4.0%}", Text(step, style), left)
        total = f"about {as_time(self.seconds_left(now))} left" if len(self.models) > 1 else ""
        table.add_row("", "", "", Text(f"{memory_in_use() / 2**30:.1f} GB in use", "dim"), total)
        return table


def as_time(seconds: float) -> str:
    """A time span to one or two digits of its unit: "40 s", "6 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def memory_in_use() -> int:
    """Resident memory of this process and its descendants, bytes; 0 where the system does not tell."""
    total, waiting = 0, [os.getpid()]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            total += int((process / "statm").read_text().split()[1]) * PAGE
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError, ValueError):  # it has ended meanwhile, or there is no /proc
            continue
    return total


@contextmanager
def run_log(out: Path, settings_toml: str) -> Iterator[Path]:
    """Write `logs/dsiprep.toml`, and keep a log of what happens inside the context beside it.

    Yields
    ------
    Path
        `logs/dsiprep_<date>-<time>.log`.

    Raises
    ------
    OutputError
        If they cannot be written.
    """
    folder = out / "logs"
    path = folder / f"dsiprep_{datetime.now():%Y%m%d-%H%M%S}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dsiprep.toml").write_text(settings_toml, encoding="utf-8")
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; check the free space and permissions") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root, before = logging.getLogger(), log.level
    for shown in root.handlers:  # what the file gets in addition is not shown on the terminal
        if type(shown) is logging.StreamHandler:
            shown.setLevel(root.level)
    log.addHandler(handler)
    log.setLevel(min(root.level, logging.INFO))
    log.info("settings and versions of this run:\n%s", settings_toml)
    try:
        yield path
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        handler.close()
