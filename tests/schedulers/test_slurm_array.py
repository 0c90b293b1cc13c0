"""The script of a job array: what it asks for, and what bash makes of it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dsiprep.errors import InputError
from dsiprep.schedulers import slurm_array as module
from dsiprep.schedulers.slurm_array import slurm_array
from helpers.scripted_subject import scripted_job


@pytest.fixture(autouse=True)
def known_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_needed", lambda job: 4000)
    monkeypatch.setattr(module, "expected_minutes", lambda job: 15.5)


def processed(script: str, task: int) -> list[str]:
    """Arguments of the commands that a task runs."""
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_every_subject_is_processed_by_one_task(tmp_path: Path) -> None:
    jobs = [replace(scripted_job(tmp_path / "a b", f"{n:02}"), threads=3) for n in range(3)]
    script = slurm_array(jobs, ["echo", "it's", "bids dir"], at_once=2)
    for line in ("--array=0-2%2", "--cpus-per-task=3", "--mem=4800M", "--time=01:32:00"):
        assert f"#SBATCH {line}\n" in script
    assert f"#SBATCH --output={tmp_path}/a\\ b/out/logs/slurm-%A_%a.out" in script
    assert [processed(script, task) for task in range(3)] == [
        [f"it's bids dir --participant-label {n:02} --nprocs 3"] for n in range(3)
    ]


def test_large_cohort_has_several_subjects_per_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_ARRAY", 4)
    script = slurm_array([scripted_job(tmp_path, str(n)) for n in range(10)], ["echo"])
    assert "#SBATCH --array=0-3\n" in script
    assert "#SBATCH --time=04:36:00\n" in script
    found = [line.split()[1] for task in range(4) for line in processed(script, task)]
    assert sorted(found, key=int) == [str(n) for n in range(10)]


def test_failed_subject_does_not_stop_the_others_of_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_ARRAY", 1)
    script = slurm_array(
        [scripted_job(tmp_path, str(n)) for n in range(3)], ["bash", "-c", 'echo "$1"; [ "$1" != 1 ]', "x"]
    )
    script = script.replace("--participant-label", "")
    done = subprocess.run(["bash", "-c", script], env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"}, capture_output=True)
    assert done.stdout.split() == [b"0", b"1", b"2"]
    assert done.returncode == 1


def test_no_subject_is_refused() -> None:
    with pytest.raises(InputError, match="no subject"):
        slurm_array([], ["dsiprep"])
