"""Every stage on the CPU and on a GPU: `benchmarks/gpu.sh run OUT` calls `python benchmarks/gpu.py OUT`.

Written to OUT as results come, the most important first: gpu.json, and gpu.md with tables of

- seconds of wall time of each stage on each device, peak GPU memory, and how far the results of the devices lie apart;
- the same with too little GPU memory;
- the tests that need a GPU;
- where the time of each stage goes on the GPU: ten kernels, share of the time in which the GPU computes, and in which
  the host waits for it.

The phantom is a DSI-257 series at 2.5 mm with a T1w image at 1 mm. A small one is processed first, so that no time
contains the compilation of kernels. What the time budget does not admit is named in the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_stages import Step, simulate, steps
from torch.profiler import ProfilerActivity, profile

from dsiprep.device import choose, use_threads
from dsiprep.io.bundled_template import bundled_template
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.settings import AnatomySettings

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = PhantomSettings(scheme="hasc55", resolution=6.0, t1w_resolution=3.0, eddy=1.0)
WARM_UP_FINEST_MM = 4.0
MEASURED = PhantomSettings(eddy=2.0, dropout=0.005)
WAITS = re.compile(r"cuda(Stream|Device|Event)Synchronize|cudaMemcpy(Async)?$")
SMALL_SHARE = 0.6  # of a stage's peak memory, when too little is given
Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The budget of a part is spent."""


class Report:
    """What was measured, written anew after each addition."""

    def __init__(self, out: Path, about: Row) -> None:
        self.out, self.content = out, {**about, "stages": [], "little memory": [], "tests": {}, "profiles": []}
        out.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, row: Row) -> None:
        """Append a row to a part and write both files."""
        if isinstance(self.content[part], list):
            self.content[part].append(row)
        else:
            self.content[part] = row
        (self.out / "gpu.json").write_text(json.dumps(self.content, indent=1) + "\n")
        (self.out / "gpu.md").write_text(markdown(self.content))
        print(json.dumps({part: row})[:400], flush=True)


class Budget:
    """Seconds of wall time from the start of the process."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that remain."""
        return self.end - time.monotonic()

    @contextlib.contextmanager
    def at_most(self, share: float) -> Iterator[None]:
        """Interrupt the work inside after this share of what is left.

        Raises
        ------
        OutOfTimeError
        """
        seconds = share * self.left()
        if seconds < 1:
            raise OutOfTimeError("no time left")

        def stop(*_: object) -> None:
            raise OutOfTimeError(f"stopped after {seconds:.0f} s")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again: a compiler's callback may swallow it
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def timed(work: Callable[[torch.device], Any], on: torch.device) -> tuple[Any, Row]:
    """The result, wall time, and peak of allocated and reserved GPU memory in MB."""
    if on.type != "cuda":
        start = time.perf_counter()
        return work(on), {"seconds": time.perf_counter() - start}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(on)
    torch.cuda.synchronize(on)
    start = time.perf_counter()
    result = work(on)
    torch.cuda.synchronize(on)
    seconds = time.perf_counter() - start
    allocated, reserved = torch.cuda.max_memory_allocated(on), torch.cuda.max_memory_reserved(on)
    return result, {"seconds": seconds, "peak MB": allocated / 2**20, "reserved MB": reserved / 2**20}


def apart(step: Step, one: Any, other: Any) -> Row:
    """Mean and largest difference of two results of a step, in its unit."""
    difference = step.compared(one) - step.compared(other)
    size = np.linalg.norm(difference, axis=0) if difference.ndim == 2 else np.abs(difference)
    return {"mean": float(np.nanmean(size)), "largest": float(np.nanmax(size)), "unit": step.unit}


def attempt(row: Row, work: Callable[[], Any]) -> Any:
    """The result of `work`; after an exception None, and the row says what happened."""
    try:
        return work()
    except OutOfTimeError as late:
        row["not finished"] = str(late)
    except Exception as problem:
        row["error"] = "".join(traceback.format_exception(problem))[-2000:]
    return None


def measure(step: Step, devices: list[torch.device], budget: Budget, report: Report | None) -> Any:
    """Run a step on each device, GPUs first; the result on the CPU, or on the GPU if there is no other."""
    results: list[tuple[torch.device, Any]] = []
    for on in sorted(devices, key=lambda device: device.type != "cuda"):
        if on.type == "cuda" and not step.on_gpu:
            continue
        row: Row = {"stage": step.name, "device": str(on)}

        def work(on: torch.device = on, row: Row = row) -> Any:
            with budget.at_most(0.6):
                result, measured = timed(step.work, on)
                row.update(measured)
                if on.type == "cuda" and report and measured["seconds"] < 0.05 * budget.left():
                    result, again = timed(step.work, on)
                    row.update(again, first=measured["seconds"])
            return result

        if (result := attempt(row, work)) is not None:
            if results:
                row["apart"] = apart(step, results[0][1], result)
            results.append((on, result))
        if report:
            report.add("stages", row)
        elif row.keys() & {"error", "not finished"}:
            print(json.dumps(row), flush=True)
    return results[-1][1] if results else None


def all_stages(settings: PhantomSettings, devices: list[torch.device], budget: Budget, report: Report | None) -> Row:
    """Measure every stage; its steps and their results by name."""
    start = time.perf_counter()
    raw, t1w = simulate(settings)
    print(f"phantom: {time.perf_counter() - start:.1f} s", flush=True)
    finest_mm = AnatomySettings().finest_mm if settings == MEASURED else WARM_UP_FINEST_MM
    program, done = steps(raw, t1w, bundled_template(), settings.resolution, finest_mm), {}
    step = next(program)
    with contextlib.suppress(StopIteration):
        while (result := measure(step, devices, budget, report)) is not None:
            done[step.name] = (step, result)
            step = program.send(result)
    return done


def little_memory(step: Step, expected: Any, peak_mb: float, on: torch.device, budget: Budget) -> Row:
    """A step with less GPU memory than it takes: what it reports, and how far its result lies from the other."""
    row: Row = {"stage": step.name, "device": str(on), "limit MB": SMALL_SHARE * peak_mb}
    handler = logging.Handler()
    messages: list[str] = []
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dsiprep").addHandler(handler)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(on).total_memory
    torch.cuda.set_per_process_memory_fraction(SMALL_SHARE * peak_mb * 2**20 / total, on)

    def work() -> None:
        with budget.at_most(0.5):
            result, measured = timed(step.work, on)
        row.update(measured, apart=apart(step, expected, result))

    try:
        attempt(row, work)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, on)
        logging.getLogger("dsiprep").removeHandler(handler)
    return {**row, "messages": messages}


def profiled(step: Step, on: torch.device, budget: Budget) -> Row:
    """Where the time of a step goes: ten kernels, and shares of the wall time."""
    row: Row = {"stage": step.name, "device": str(on)}
    gpu = on.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]

    def work() -> None:
        with budget.at_most(0.4):
            start = time.perf_counter()
            with profile(activities=activities) as record:
                step.work(on)
            seconds = time.perf_counter() - start
            averages = record.key_averages()
            spent = "self_device_time_total" if gpu else "self_cpu_time_total"
            kernels = [item for item in averages if not gpu or item.device_type.name == "CUDA"]
            kernels.sort(key=lambda item: -getattr(item, spent))
            waiting = sum(item.self_cpu_time_total for item in averages if WAITS.search(item.key))
            row.update({
                "seconds": seconds,
                "computing": sum(getattr(item, spent) for item in kernels) / 1e6 / seconds,
                "host waiting": waiting / 1e6 / seconds,
                "launches": sum(item.count for item in kernels),
                "kernels": [{"name": item.key[:90], "calls": item.count, "ms": getattr(item, spent) / 1000}
                            for item in kernels[:10]],
            })  # fmt: skip

    attempt(row, work)
    return row


def gpu_tests(budget: Budget) -> Row:
    """The tests that need a GPU, with pytest's summary."""
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "cuda",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-rs",
        *files,
    ]
    row: Row = {"files": [str(Path(name).relative_to(ROOT)) for name in files]}

    def work() -> None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, 0.5 * budget.left()))
        row.update({"exit code": done.returncode, "output": (done.stdout + done.stderr)[-1500:]})

    attempt(row, work)
    return row


def markdown(content: Row) -> str:
    """All parts as tables."""
    about = {name: value for name, value in content.items() if not isinstance(value, list | dict)}
    lines = ["# Stages on CPU and GPU", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += [
        "| stage | device | s | first run, s | peak GPU MB | mean apart | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in content["stages"]]
    if content["little memory"]:
        lines += ["", "## Too little GPU memory", "", "| stage | limit MB | s | mean apart | largest | messages |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        lines += [_short_of_memory(row) for row in content["little memory"]]
    if tests := content["tests"]:
        lines += ["", "## Tests", "", "```", tests.get("output", str(tests)).strip(), "```"]
    for row in content["profiles"]:
        lines += ["", f"## {row['stage']} on {row['device']}", "", *_profile(row)]
    return "\n".join(lines) + "\n"


def _number(value: Any, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else ""


def _apart(row: Row) -> tuple[str, str]:
    if failed := row.get("not finished") or row.get("error"):
        return failed.strip().splitlines()[-1].replace("|", "/"), ""
    found = row.get("apart")
    return (f"{found['mean']:.4g} {found['unit']}", f"{found['largest']:.4g} {found['unit']}") if found else ("", "")


def _line(row: Row) -> str:
    numbers = (_number(row.get("seconds"), 2), _number(row.get("first"), 2), _number(row.get("peak MB"), 0))
    return "| " + " | ".join((row["stage"], row["device"], *numbers, *_apart(row))) + " |"


def _short_of_memory(row: Row) -> str:
    numbers = (_number(row["limit MB"], 0), _number(row.get("seconds"), 2), *_apart(row))
    return "| " + " | ".join((row["stage"], *numbers, "; ".join(row["messages"]))) + " |"


def _profile(row: Row) -> list[str]:
    if "kernels" not in row:
        return [_apart(row)[0]]
    shares = f"{row['computing']:.0%} of {row['seconds']:.1f} s computing, host waiting {row['host waiting']:.0%}"
    table = [f"| `{item['name']}` | {item['calls']} | {item['ms']:.1f} |" for item in row["kernels"]]
    return [f"{shares}, {row['launches']} kernels", "", "| kernel | calls | ms |", "|---|---|---|", *table]


def numbered(device: torch.device) -> torch.device:
    """The device with its number, which limits of memory ask for."""
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def about_machine(devices: list[torch.device], settings: PhantomSettings, threads: int) -> Row:
    """What was measured, and on what."""
    gpus = [torch.cuda.get_device_name(on) for on in devices if on.type == "cuda"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "GPU": ", ".join(gpus) or "none",
        "threads": threads,
        "Python, torch": f"{platform.python_version()}, {torch.__version__}",
        "phantom": f"{settings.scheme} at {settings.resolution:g} mm, T1w at {settings.t1w_resolution:g} mm",
        "commit": commit or "unknown",
    }


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--budget", type=float, default=500.0, help="seconds in all (default: 500)")
    parser.add_argument("--small", action="store_true", help="measure the small phantom")
    chosen = parser.parse_args()
    budget, settings = Budget(chosen.budget), WARM_UP if chosen.small else MEASURED
    use_threads(chosen.threads)
    devices = [numbered(choose(name)) for name in chosen.devices]
    report = Report(chosen.out, about_machine(devices, settings, chosen.threads))
    if not chosen.small:
        all_stages(WARM_UP, devices, budget, None)
        print(f"warm after {chosen.budget - budget.left():.0f} s", flush=True)
    done = all_stages(settings, devices, budget, report)
    gpu = next((on for on in devices if on.type == "cuda"), None)
    peaks = {row["stage"]: row["peak MB"] for row in report.content["stages"] if "peak MB" in row}
    for name in [name for name in ("denoise", "motion") if gpu and name in peaks and name in done]:
        report.add("little memory", little_memory(*done[name], peaks[name], gpu, budget))
    if gpu:
        report.add("tests", gpu_tests(budget))
    for name in ("motion", "anatomy", "distortion", "resample", "denoise", "fieldmapless"):
        if name in done and budget.left() > 5:
            report.add("profiles", profiled(done[name][0], gpu or devices[0], budget))
    print(f"finished with {budget.left():.0f} s left", flush=True)


if __name__ == "__main__":
    main()
