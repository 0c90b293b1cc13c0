"""Time, memory and errors of a whole run on a phantom: `python benchmarks/end_to_end.py OUT [phantom options]`.

Builds the phantom if OUT/truth is not there, runs dsiprep in a process of its own and prints one Markdown table: wall
time, CPU time, peak memory, and every error against the truth.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dsiprep.cli.tools import main as tools
from dsiprep.phantom.head import TEMPLATE
from dsiprep.score import score


def run(out: Path, phantom_options: list[str]) -> None:
    """Phantom, run, table."""
    if not (out / "truth").is_dir():
        tools(["phantom", str(out), *phantom_options])
    for folder in ("derivatives", "work"):
        shutil.rmtree(out / folder, ignore_errors=True)
    command = [sys.executable, "-m", "dsiprep.cli.app", str(out / "bids"), str(out / "derivatives"), "participant",
               "--output-resolution", "2", "--anatomical-template", TEMPLATE, "-w", str(out / "work")]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True)
    wall = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"| wall time | {wall / 60:.1f} min |")
    print("|---|---|")
    print(f"| CPU time | {(used.ru_utime + used.ru_stime) / 60:.1f} min |")
    print(f"| peak memory | {used.ru_maxrss / 2**20:.1f} GB |")
    for entry in score(out / "derivatives", out / "truth"):
        if entry.value is not None:
            print(f"| {entry.name} | {entry.value:.3f} {entry.unit} |")


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve(), sys.argv[2:])
