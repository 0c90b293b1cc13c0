"""How well runs tell the time that is left: `python benchmarks/time_left.py LOG ...`.

LOG is OUT/logs/dsiprep_*.log of one run: a line per stage with the time of day and what was expected to remain. Prints
one Markdown row per unit: its duration, lines written after the first two minutes, and the largest and the median error
of the time left relative to the time that was left.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np

LINE = re.compile(
    r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)\S* .*?(sub-\w[\w-]*): .*about (?:(\d+) h )?(?:(\d+) min|(\d+) s)? ?.*left"
)
SETTLING = 120.0  # s


def told(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Time of day and time left, both in s, of every line of each unit."""
    found = defaultdict(list)
    for line in path.read_text().splitlines():
        if match := LINE.search(line):
            hours, minutes, seconds = (int(value or 0) for value in match.groups()[2:])
            at = datetime.fromisoformat(match[1]).timestamp()
            found[match[2]].append((at, 3600.0 * hours + 60 * minutes + seconds))
    return found


def main(paths: list[Path]) -> None:
    """One row per unit."""
    print("| unit | duration, s | lines | largest error | median error |\n|---|---|---|---|---|")
    for path in paths:
        for unit, lines in told(path).items():
            at, left = np.array(lines).T
            end = at[-1]
            late = (at - at[0] > SETTLING) & (end - at > 0)
            if late.any():
                error = np.abs(left - (end - at))[late] / (end - at)[late]
                print(f"| {unit} | {end - at[0]:.0f} | {late.sum()} | {error.max():.0%} | {np.median(error):.0%} |")
            else:
                print(f"| {unit} | {end - at[0]:.0f} | 0 | | |")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
