"""Print scores as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dsiprep.score.compare import Score


def print_scores(scores: Sequence[Score], console: Console | None = None) -> None:
    """Print one row per score; a missing value is shown as "-", with the reason in the last column."""
    table = Table(box=None, header_style="bold")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("meaning", style="dim")
    for entry in scores:
        value = "-" if entry.value is None else f"{entry.value:.3f}"
        table.add_row(entry.name, value, entry.unit, entry.meaning)
    (console or Console()).print(table)
