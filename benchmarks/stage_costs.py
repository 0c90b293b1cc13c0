"""CPU time, memory and serial share of each stage: `python benchmarks/stage_costs.py OUT [--threads 1 2] [--repeat N]`.

OUT holds a phantom (`dsiprep-tools phantom OUT`). Each run is a process of its own with kernels compiled beforehand;
numbers of threads take turns, and of each the run with the least CPU time counts. A stage ends where the next begins,
so it includes storing its result. With wall times T1 and T2 of one and two threads, the serial share is 2 T2 / T1 - 1
(Amdahl). Memory is the largest resident set while the stage runs, of which the private part is not backed by files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

CHILD = "_measure"
VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass
class StageCost:
    """Seconds of one stage, its largest resident set and the private part of it, MB."""

    name: str
    cpu: float
    wall: float
    resident: float = 0.0
    private: float = 0.0


class Watch:
    """Measures this process from one step to the next."""

    def __init__(self) -> None:
        self.done: list[StageCost] = []
        self.began = time.process_time(), time.perf_counter()
        self.current = StageCost("start", 0.0, 0.0)
        threading.Thread(target=self._sample, daemon=True).start()

    def step(self, name: str) -> None:
        """Another step begins."""
        now, stage = (time.process_time(), time.perf_counter()), self.current
        stage.cpu, stage.wall = now[0] - self.began[0], now[1] - self.began[1]
        self.done.append(stage)
        self.began, self.current = now, StageCost(name, 0.0, 0.0)

    def _sample(self) -> None:
        while True:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            stage = self.current
            stage.resident = max(stage.resident, int(fields["VmRSS"].split()[0]) / 1024)
            stage.private = max(stage.private, int(fields["RssAnon"].split()[0]) / 1024)
            time.sleep(0.2)


def measure(arguments: list[str]) -> None:
    """Body of the measured process: run the command line's jobs, print the costs as JSON."""
    watch = Watch()
    from dsiprep.cli.app import build_parser, find_selected_units, read_settings
    from dsiprep.cli.scheduling import make_jobs
    from dsiprep.jobs import run_subject

    options = build_parser().parse_args(arguments)
    chosen = read_settings(options)
    for job in make_jobs(find_selected_units(options, chosen)[0], options, chosen, "benchmark"):
        for outcome in run_subject(job, lambda unit, step: watch.step(step)):
            if outcome.error:
                raise SystemExit(outcome.error)
    watch.step("")
    print(json.dumps([asdict(stage) for stage in watch.done]))


def run(out: Path, threads: int, options: list[str]) -> list[StageCost]:
    """Costs of all stages of one run."""
    for folder in ("derivatives", "work"):
        shutil.rmtree(out / folder, ignore_errors=True)
    environment = {**os.environ, **dict.fromkeys(VARIABLES, str(threads))}
    command = [sys.executable, __file__, CHILD, str(out / "bids"), str(out / "derivatives"), "participant",
               "--output-resolution", "2", "-w", str(out / "work"), "--nprocs", str(threads), "--rerun",
               "--device", "cpu", *options]  # fmt: skip
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return [StageCost(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def table(runs: dict[int, list[StageCost]]) -> str:
    """Markdown: one row per stage, and their sum."""
    one, more = runs[min(runs)], [(count, stages) for count, stages in runs.items() if count > min(runs)]
    total = StageCost("sum", sum(s.cpu for s in one), sum(s.wall for s in one))
    total.resident, total.private = max(s.resident for s in one), max(s.private for s in one)
    heads = ["stage", "CPU s", "wall s", "resident MB", "private MB"]
    heads += [text for count, _ in more for text in (f"wall s, {count} threads", "serial share")]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row, stage in enumerate([*one, total]):
        cells = [stage.name, f"{stage.cpu:.1f}", f"{stage.wall:.1f}", f"{stage.resident:.0f}", f"{stage.private:.0f}"]
        for count, stages in more:
            wall = stages[row].wall if row < len(stages) else sum(s.wall for s in stages)
            share = (count * wall / max(stage.wall, 1e-9) - 1) / (count - 1)
            cells += [f"{wall:.1f}", f"{min(max(share, 0.0), 1.0):.2f}" if stage.wall > 0.5 else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeat", type=int, default=1)
    chosen, options = parser.parse_known_args()
    best: dict[int, list[StageCost]] = {}
    for _ in range(chosen.repeat):
        for count in chosen.threads:
            stages = run(chosen.out.resolve(), count, options)
            if count not in best or sum(s.cpu for s in stages) < sum(s.cpu for s in best[count]):
                best[count] = stages
    print(table(best))


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        measure(sys.argv[2:])
    else:
        main()
