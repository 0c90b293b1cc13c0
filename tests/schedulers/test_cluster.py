"""Subjects on a Dask cluster: tries, progress, clients that go away, workers that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsiprep.errors import SettingsError
from dsiprep.jobs import Job, Outcome, StepCallback
from helpers.scripted_subject import scripted_job, tries

distributed = pytest.importorskip("distributed")

from dsiprep.schedulers import cluster  # noqa: E402  (needs dask)

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
SILENT = {"dashboard_address": None, "silence_logs": 50}


def ignore(unit: str, step: str) -> None:
    pass


class Pretended:
    """In place of a subject's process: the job's command says what happens at each try."""

    def __init__(self, job: Job, stop_on_first_crash: bool) -> None:
        self.job = job

    def finish(self, on_step: StepCallback) -> list[Outcome] | None:
        """What the process would return."""
        behaviour = self.job.command.split()
        now = behaviour[min(tries(self.job), len(behaviour) - 1)]
        with (self.job.work / f"tries-{self.job.subject}").open("a") as file:
            file.write("\n")
        on_step(self.job.units[0].name, "motion-up")
        if now == "die":
            return None
        while now == "wait" and not (self.job.work / "go").exists():
            time.sleep(0.05)
        return [Outcome(self.job.subject, self.job.units[0].name, 1.0, "it failed" if now == "fail" else None)]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of two workers that are threads of this process, with pretended subjects.

    Tasks do not share it, as they could if it were the default client of the process.
    """
    monkeypatch.setattr(cluster, "SubjectProcess", Pretended)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", **SILENT
        ) as local,
        distributed.Client(local, set_as_default=False) as found,
    ):
        yield found


def test_killed_subject_is_tried_twice_and_costs_no_other(client: Any, tmp_path: Path) -> None:
    behaviour = {"01": ["die"], "02": ["die", "finish"], "03": ["finish"], "04": ["fail"]}
    jobs = [scripted_job(tmp_path, subject, *told) for subject, told in behaviour.items()]
    steps: set[tuple[str, str]] = set()
    found = {o.subject: o.error for o in cluster.run_on_client(jobs, client, lambda *step: steps.add(step))}
    assert "killed twice" in str(found.pop("01"))
    assert found == {"02": None, "03": None, "04": "it failed"}
    assert [tries(job) for job in jobs] == [2, 2, 1, 1]
    assert steps == {(job.units[0].name, "motion-up") for job in jobs}
    assert not client.list_datasets()


def test_finished_run_is_run_anew(client: Any, tmp_path: Path) -> None:
    jobs = [scripted_job(tmp_path, "01", "die", "die", "finish")]
    (outcome,) = cluster.run_on_client(jobs, client, ignore)
    assert "killed twice" in str(outcome.error)
    assert [o.error for o in cluster.run_on_client(jobs, client, ignore)] == [None]


def test_nothing_more_is_started_after_a_failure(client: Any, tmp_path: Path) -> None:
    jobs = [scripted_job(tmp_path, f"{n:02}", "fail" if n == 0 else "wait") for n in range(9)]
    outcomes = list(cluster.run_on_client(jobs, client, ignore, stop_on_first_crash=True))
    (tmp_path / "go").touch()
    time.sleep(1)
    assert [outcome.subject for outcome in outcomes] == ["00"]
    assert sum(tries(job) for job in jobs) < len(jobs)


def test_client_comes_back_to_the_same_tasks(client: Any, tmp_path: Path) -> None:
    jobs = [scripted_job(tmp_path, "01", "finish"), scripted_job(tmp_path, "02", "wait")]
    with distributed.Client(client.cluster.scheduler_address, set_as_default=False) as first:
        run = cluster.run_on_client(jobs, first, ignore)
        assert next(run).subject == "01"
    del run  # the client is gone, the second subject goes on
    threading.Timer(0.5, (tmp_path / "go").touch).start()
    steps: list[tuple[str, str]] = []
    found = {o.subject: o.error for o in cluster.run_on_client(jobs, client, lambda *step: steps.append(step))}
    assert found == {"01": None, "02": None}
    assert [tries(job) for job in jobs] == [1, 1]
    assert ("sub-02_dir-AP", "motion-up") in steps


def test_addresses_and_options_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [scripted_job(tmp_path, "01")]
    with pytest.raises(SettingsError, match="--scheduler-options is for batch systems"):
        next(cluster.run_with_dask(jobs, ignore, "tcp://127.0.0.1:9", {"queue": "long"}))
    monkeypatch.setattr(cluster, "Client", lambda *_, **__: (_ for _ in ()).throw(OSError("timed out")))
    with pytest.raises(SettingsError, match="no Dask scheduler answers there"):
        next(cluster.run_with_dask(jobs, ignore, "tcp://127.0.0.1:9", {}))
    with pytest.raises(SettingsError, match="quue"):
        next(cluster.run_with_dask(jobs, ignore, "slurm", {"quue": "long"}))


def test_job_of_the_batch_system_fits_the_largest_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "memory_needed", lambda job: 1000 * int(job.subject))
    monkeypatch.setattr(cluster, "expected_minutes", lambda job: 40.0 * int(job.subject))
    jobs = [scripted_job(tmp_path, f"{n}") for n in range(1, 6)]
    settings, limits = cluster.job_settings("slurm", {}, jobs)
    assert (settings["cores"], settings["memory"], settings["walltime"]) == (1, "6000MiB", "07:40:00")
    assert limits == {"minimum_jobs": 0, "maximum_jobs": 5}
    given = {"memory": "9GB", "queue": "long", "maximum_jobs": 2, "worker_extra_args": ["--lifetime", "1h"]}
    settings, limits = cluster.job_settings("lsf", given, jobs)
    assert (settings["memory"], settings["queue"], settings["walltime"]) == ("9GB", "long", "07:40")
    assert settings["worker_extra_args"] == ["--lifetime", "1h", "--nthreads", "1"]
    assert limits["maximum_jobs"] == 2


@pytest.mark.filterwarnings("ignore:OAR Job memory")
@pytest.mark.parametrize("system", sorted(cluster.QUEUES))
def test_script_of_every_batch_system_asks_for_what_a_subject_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr(cluster, "memory_needed", lambda job: 5000)
    monkeypatch.setattr(cluster, "expected_minutes", lambda job: 30.0)
    job = scripted_job(tmp_path, "01")
    settings, _ = cluster.job_settings(system, {}, [Job(**{**vars(job), "threads": 6})])
    with cluster.QUEUES[system](**settings, scheduler_options={"dashboard_address": None}) as made:
        script = made.job_script()
    asked = {
        "slurm": ["--cpus-per-task=6", "--mem=6G", "-t 02:00:00"],
        "pbs": ["select=1:ncpus=6:mem=6000MB", "walltime=02:00:00"],
        "sge": ["h_rt=02:00:00"],
        "lsf": ["-n 6", "-M 6291", "-W 02:00"],
        "oar": ["core=6", "walltime=02:00:00"],
    }[system]
    assert [part for part in asked if part not in script] == [], script
    assert script.rstrip().splitlines()[-1].endswith("--nthreads 1")


@pytest.fixture
def real_workers(tmp_path: Path) -> Iterator[Callable[[], list[int]]]:
    """A scheduler with two workers of one thread each in processes of their own; their process ids."""
    helpers = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(helpers), os.environ.get("PYTHONPATH", "")])}
    preload = str(helpers / "helpers" / "dask_preload.py")
    address = "tcp://127.0.0.1:18786"
    programs = [[sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "18786",
                 "--no-dashboard"],
                *[[sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard",
                   "--preload", preload, "--local-directory", str(tmp_path)]] * 2]  # fmt: skip
    started = [
        subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for program in programs
    ]
    yield lambda: [process.pid for process in started]
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_killed_worker_costs_its_own_subject_one_more_try_and_no_other(
    real_workers: Callable[[], list[int]], tmp_path: Path
) -> None:
    """The workers' processes are killed under the subject that runs in them; others wait behind it."""
    jobs = [scripted_job(tmp_path, "01", "wait", "finish"), *(scripted_job(tmp_path, f"{n:02}") for n in range(2, 8))]
    jobs = [Job(**{**vars(job), "command": job.command or "finish"}) for job in jobs]
    assert len(real_workers()) == 3

    def kill_worker_of_first() -> None:
        file = tmp_path / "tries-01"
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        subject = int(file.read_text().splitlines()[0])
        worker = int((Path("/proc") / str(subject) / "stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill_worker_of_first)
    killer.start()
    run = cluster.run_with_dask(jobs, ignore, "tcp://127.0.0.1:18786", {})
    found = {outcome.subject: outcome.error for outcome in run}
    killer.join()
    assert found == {job.subject: None for job in jobs}
    assert [tries(job) for job in jobs] == [2, 1, 1, 1, 1, 1, 1]
