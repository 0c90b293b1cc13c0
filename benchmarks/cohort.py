"""Whole cohorts: `python benchmarks/cohort.py OUT [--subjects N] [--planned N]`.

- N phantoms of 6 mm, processed by one worker and by two of one core each, in either order: wall and CPU time, whether
  every byte of the outputs agrees, the largest size of a subject's work folder, the time of a second run, and what is
  computed, in what time, after a session was added. Kernels are compiled by the first of the phantoms beforehand. Other
  jobs on the machine change wall times more than CPU times.
- The plan (`--dry-run --json`) of a dataset whose images have a header and no voxels: wall time and peak memory.

One Markdown table. Subjects share the images of three heads, as copies.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np

from dsiprep.phantom import PhantomSettings, make_phantom

HEADS = 3
SUFFIXES = (".nii.gz", ".tsv", ".bvec", ".bval", ".b", ".txt", ".csv", ".mat", ".h5")
RUN = ("participant", "--output-resolution", "6", "--sloppy", "--device", "cpu", "--skip-bids-validation")


def make_cohort(out: Path, subjects: int) -> Path:
    """A BIDS dataset of phantoms with the labels 001, 002, ..."""
    bids = out / "bids"
    if bids.exists():
        return bids
    for head in range(min(HEADS, subjects)):
        make_phantom(
            out / f"head-{head}",
            PhantomSettings(scheme="hasc55", resolution=6.0, t1w_resolution=3.0, ideal=False, seed=head + 1),
        )
    shutil.copytree(out / "head-0" / "bids", bids, ignore=shutil.ignore_patterns("sub-*", "participants*"))
    for number in range(subjects):
        copy_subject(out / f"head-{number % HEADS}" / "bids" / "sub-01", bids, f"sub-{number + 1:03}", "")
    return bids


def copy_subject(source: Path, bids: Path, subject: str, session: str) -> None:
    """Copy a subject of one session under other labels, also in IntendedFor."""
    for path in source.rglob("*.*"):
        name = path.name.replace("sub-01", f"{subject}{'_' if session else ''}{session}")
        target = bids / subject / session / path.parent.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            text = path.read_text().replace("sub-01/", f"{subject}/{session}{'/' if session else ''}")
            target.write_text(text.replace("/sub-01_", f"/{subject}{'_' if session else ''}{session}_"))
        else:
            shutil.copy(path, target)


def run(bids: Path, out: Path, *options: str) -> tuple[float, float]:
    """Wall and CPU time of a run of the command line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    start, before = time.perf_counter(), cpu_of_children()
    command = [sys.executable, "-m", "dsiprep", str(bids), str(out), *RUN, "-w", str(out.with_name(out.name + "-work"))]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    (out / "stderr.txt").write_text(done.stderr)
    return time.perf_counter() - start, cpu_of_children() - before


def cpu_of_children() -> float:
    """CPU time (s) of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def digests(out: Path) -> dict[str, str]:
    """Of all images, transforms and tables."""
    files = [path for path in out.rglob("*") if path.name.endswith(SUFFIXES) and path.parent != out]
    files = [path for path in files if "logs" not in path.parts]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def size(folder: Path) -> int:
    """Bytes of all files; those that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


@contextmanager
def largest_work(work: Path) -> Iterator[list[int]]:
    """Largest size in bytes of the folder of one subject, seen twice a second."""
    largest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            for folder in work.glob("sub-*"):
                largest[0] = max(largest[0], size(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield largest
    finally:
        stop.set()
        thread.join()


def raw_bytes(bids: Path, subject: str) -> int:
    """Bytes of a subject's series as float32, the form in which stages keep it."""
    (series,) = (bids / subject).rglob("*_dwi.nii.gz")
    return 4 * int(np.prod(nib.Nifti1Image.from_filename(series).shape))


def cohort(out: Path, subjects: int) -> Iterator[tuple[str, str]]:
    """Rows of the table for processed phantoms."""
    bids = make_cohort(out, subjects)
    labels = sorted(path.name[4:] for path in bids.glob("sub-*"))
    run(bids, out / "warm", "--participant-label", labels[0], "--nprocs", "1")
    with largest_work(out / "one-work") as largest:
        one, cpu = run(bids, out / "one", "--nprocs", "1")
    yield f"{subjects} subjects, one worker", f"{one:.0f} s, {cpu:.0f} CPU-s"
    two, cpu = run(bids, out / "two", "--nprocs", "2", "--omp-nthreads", "1")
    yield "two workers", f"{two:.0f} s, {two / one:.2f} of the time, {cpu:.0f} CPU-s"
    run(bids, out / "reversed", "--nprocs", "2", "--omp-nthreads", "1", "--participant-label", *labels[::-1])
    same = digests(out / "one") == digests(out / "two") == digests(out / "reversed")
    yield f"{len(digests(out / 'one'))} images, transforms and tables", "identical" if same else "DIFFERENT"
    raw = raw_bytes(bids, f"sub-{labels[0]}")
    yield "largest work folder of a subject", f"{largest[0] / raw:.1f} x the series ({raw / 2**20:.0f} MB)"
    left = [path.name for name in ("one", "two") for path in (out / f"{name}-work").iterdir()]
    yield "left in the work folders", ", ".join(left) or "nothing"
    again, _ = run(bids, out / "one", "--nprocs", "1")
    yield "second run", f"{again:.1f} s, {again / subjects:.2f} s per subject"
    yield "computed after a session was added (--keep-work)", added_session(out)


def added_session(out: Path) -> str:
    """Stages that are computed when a subject gets a second session without a T1w image."""
    bids = out / "sessions"
    shutil.rmtree(bids, ignore_errors=True)
    shutil.copytree(out / "bids", bids, ignore=shutil.ignore_patterns("sub-*"))
    source = out / "head-0" / "bids" / "sub-01"
    copy_subject(source, bids, "sub-001", "ses-1")
    _, first = run(bids, out / "kept", "--nprocs", "1", "--keep-work")
    copy_subject(source, bids, "sub-001", "ses-2")
    shutil.rmtree(bids / "sub-001" / "ses-2" / "anat")
    _, second = run(bids, out / "kept", "--nprocs", "1", "--keep-work")
    steps = [
        line.split(": ") for line in (out / "kept" / "stderr.txt").read_text().splitlines() if line.count(": ") == 1
    ]
    computed = {unit: [step for name, step in steps if name == unit] for unit, _ in steps}
    listed = "; ".join(f"{unit}: {', '.join(names)}" for unit, names in computed.items() if unit.startswith("sub-"))
    return f"{listed}; {second:.0f} CPU-s, of the first session {first:.0f}"


def make_empty(bids: Path, subjects: int) -> None:
    """Subjects with a series, a reversed b=0 image and a T1w image of which only the headers exist."""
    if bids.exists():
        return
    series, volume = (_header_alone((80, 96, 72, count)) for count in (258, 3))
    t1w = _header_alone((176, 240, 240))
    bvals = " ".join(["0", *["3000"] * 257]) + "\n"
    directions = np.random.default_rng(1).normal(size=(3, 258))
    directions /= np.linalg.norm(directions, axis=0)
    bvecs = "\n".join(" ".join(f"{value:.5f}" for value in row) for row in directions) + "\n"
    sidecar = {"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.05, "RepetitionTime": 4.0, "EchoTime": 0.09}
    bids.mkdir(parents=True)
    (bids / "dataset_description.json").write_text('{"Name": "empty", "BIDSVersion": "1.9.0"}\n')
    for number in range(subjects):
        subject = f"sub-{number + 1:05}"
        for folder in ("anat", "dwi", "fmap"):
            (bids / subject / folder).mkdir(parents=True)
        dwi, fmap = (bids / subject / part for part in (f"dwi/{subject}_dwi", f"fmap/{subject}_dir-AP_epi"))
        (bids / subject / "anat" / f"{subject}_T1w.nii.gz").write_bytes(t1w)
        dwi.with_suffix(".nii.gz").write_bytes(series)
        dwi.with_suffix(".bval").write_text(bvals)
        dwi.with_suffix(".bvec").write_text(bvecs)
        dwi.with_suffix(".json").write_text(json.dumps(sidecar))
        fmap.with_suffix(".nii.gz").write_bytes(volume)
        link = {"PhaseEncodingDirection": "j-", "IntendedFor": f"bids::{subject}/dwi/{subject}_dwi.nii.gz"}
        fmap.with_suffix(".json").write_text(json.dumps({**sidecar, **link}))


def _header_alone(shape: tuple[int, ...]) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_zooms((2.5, 2.5, 2.5, 4.0)[: len(shape)])
    header.set_sform(np.diag([2.5, 2.5, 2.5, 1.0]), 1)
    header["vox_offset"] = 352
    return gzip.compress(header.binaryblock + bytes(4))


def planning(out: Path, subjects: int) -> Iterator[tuple[str, str]]:
    """The row of the table for a plan."""
    bids = out / f"empty-{subjects}"
    make_empty(bids, subjects)
    command = [sys.executable, "-m", "dsiprep", str(bids), str(out / "planned"), *RUN, "--dry-run", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    plan = json.loads(process.stdout.read())
    _, _, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    units = len(plan["units"])
    used = usage.ru_utime + usage.ru_stime
    measured = f"{seconds:.0f} s of wall time, {used:.0f} s of CPU, {usage.ru_maxrss / 1024:.0f} MB"
    yield f"plan of {subjects} subjects ({units} units)", measured


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--subjects", type=int, default=100, help="processed phantoms; 0 leaves them out")
    parser.add_argument("--planned", type=int, default=10_000, help="planned subjects; 0 leaves them out")
    chosen = parser.parse_args()
    print("| what | measured |\n|---|---|", flush=True)
    rows = [cohort(chosen.out, chosen.subjects)] if chosen.subjects else []
    rows += [planning(chosen.out, chosen.planned)] if chosen.planned else []
    for part in rows:
        for name, value in part:
            print(f"| {name} | {value} |", flush=True)


if __name__ == "__main__":
    main()
