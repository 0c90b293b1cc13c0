"""Subjects as jobs of a real SLURM: cancelled, beyond their time, beyond their memory."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsiprep.cli import app, tools
from dsiprep.jobs import Job
from dsiprep.phantom import make_phantom
from helpers import slurm
from helpers.scripted_subject import scripted_job, tries
from helpers.small_run import SMALL, command, fingerprint

pytest.importorskip("dask_jobqueue")

from dsiprep.schedulers import cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not slurm.available(), reason="SLURM and munge are not installed, or this user is not root"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of SLURM's commands."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a socket's path has to be short
    with slurm.running(folder) as found:
        yield found
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def options(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the batch system, for workers whose subjects are scripted."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, environment[name])
    return {
        "cores": 1,
        "memory": "1500MB",
        "walltime": "00:10:00",
        "interface": "lo",
        "log_directory": str(tmp_path),
        "local_directory": str(tmp_path),
        "job_script_prologue": [f"export PYTHONPATH={TESTS}:$PYTHONPATH"],
        "worker_extra_args": ["--preload", str(TESTS / "helpers" / "dask_preload.py"), "--no-dashboard"],
        "scheduler_options": {"dashboard_address": None},
        "maximum_jobs": 3,
    }


def run(jobs: list[Job], options: Mapping[str, Any]) -> dict[str, str | None]:
    """The error of each subject."""
    outcomes = cluster.run_with_dask(jobs, lambda unit, step: None, "slurm", options)
    return {outcome.subject: outcome.error for outcome in outcomes}


def scripted_jobs(tmp_path: Path, *first: str) -> list[Job]:
    """Subject 00 behaves as named; four others finish at once."""
    others = [scripted_job(tmp_path, f"{n:02}", "finish") for n in range(1, 5)]
    return [scripted_job(tmp_path, "00", *first), *others]


def test_cancelled_job_costs_its_own_subject_one_more_try(
    environment: dict[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    jobs = scripted_jobs(tmp_path, "wait", "finish")

    def cancel() -> None:
        while tries(jobs[0]) == 0:
            time.sleep(0.2)
        time.sleep(1)
        subject = (tmp_path / "tries-00").read_text().split()[0]
        status = (Path("/proc") / subject / "environ").read_bytes().split(b"\0")
        (job,) = (entry.split(b"=")[1].decode() for entry in status if entry.startswith(b"SLURM_JOB_ID="))
        subprocess.run(["scancel", "--signal=KILL", "--full", job], env=environment, check=True)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    errors = run(jobs, options)
    canceller.join()
    assert errors == {job.subject: None for job in jobs}
    assert [tries(job) for job in jobs] == [2, 1, 1, 1, 1]
    left = subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True).stdout
    assert all(state in ("CG", "") for state in (line.split()[4] for line in left.splitlines())), left


def test_subject_beyond_its_memory_fails_after_two_tries_and_costs_no_other(
    options: dict[str, Any], tmp_path: Path
) -> None:
    jobs = scripted_jobs(tmp_path, "eat")
    errors = run(jobs, options)
    assert "killed twice, probably because memory ran out" in str(errors.pop("00"))
    assert set(errors.values()) == {None}
    assert [tries(job) for job in jobs] == [2, 1, 1, 1, 1]


def test_subject_beyond_its_time_is_tried_once_more(options: dict[str, Any], tmp_path: Path) -> None:
    jobs = scripted_jobs(tmp_path, "wait", "finish")
    errors = run(jobs, {**options, "walltime": "00:01:00"})
    assert errors == {job.subject: None for job in jobs}
    assert tries(jobs[0]) == 2


@pytest.fixture(scope="module")
def two_phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the subjects 01 and 02, of the same images."""
    folder = make_phantom(tmp_path_factory.mktemp("phantoms"), replace(SMALL, resolution=6.0, t1w_resolution=3.0))
    first, second = folder / "bids" / "sub-01", folder / "bids" / "sub-02"
    for path in first.rglob("*.*"):
        target = second / path.parent.name / path.name.replace("sub-01", "sub-02")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            target.write_text(path.read_text().replace("sub-01", "sub-02"))
        else:
            shutil.copy(path, target)
    return folder


def test_array_and_scheduler_write_what_a_local_run_writes(
    environment: dict[str, str], two_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the docs page "On a cluster": a job array, then one command; each finishes both subjects."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, environment[name])
    outs = {name: tmp_path / name / "out" for name in ("local", "array", "scheduler")}
    assert app.main(command(two_phantoms, outs["local"], "--nprocs", "1")) == 0
    bids, out, _, *options = command(two_phantoms, outs["array"], "--omp-nthreads", "1")
    script = tmp_path / "dsiprep.sbatch"
    assert tools.main(["array", bids, out, "--slurm", "-o", str(script), "--options", *options]) == 0
    subprocess.run(["sbatch", "--wait", "--mem=4000M", str(script)], env=environment, check=True)
    file = tmp_path / "slurm.yaml"
    file.write_text(f"interface: lo\nmemory: 4GB\nlog_directory: {tmp_path}\nlocal_directory: {tmp_path}\n")
    given = ("--omp-nthreads", "1", "--scheduler", "slurm", "--scheduler-options", str(file))
    assert app.main(command(two_phantoms, outs["scheduler"], *given)) == 0
    wanted = fingerprint(outs["local"])
    assert len([name for name in wanted if "sub-02" in name]) > 20
    assert fingerprint(outs["array"]) == wanted
    assert fingerprint(outs["scheduler"]) == wanted
