"""Seeded damage to a dataset: the plan and the reading end with units or with a sentence, soon and in little memory."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from dsiprep.cli import app as cli
from dsiprep.cli.plan_page import plan_as_json, plan_units
from dsiprep.errors import DsiprepError
from dsiprep.io.bids import find_units, read_unit
from dsiprep.phantom import make_phantom
from dsiprep.settings import Settings
from helpers.bids_dataset import Dataset
from helpers.malformed import build, damage
from helpers.small_run import SMALL, command

SECONDS = 20
BYTES = 2 * 2**30  # of heap beyond what is used at the start
FAST, ALL = 40, 1200
WHOLE, WHOLE_SECONDS = 16, 600  # datasets that are run, for at most so long
SETTINGS = Settings()


def outcome(root: Path) -> str:
    """Plan and read all subjects; anything but a `DsiprepError` is raised."""
    failed: dict[str, DsiprepError] = {}
    try:
        units = find_units(root, SETTINGS, failed=failed)
    except DsiprepError as error:
        return str(error)
    messages = [str(error) for error in failed.values()]
    plan_as_json(plan_units(units, SETTINGS), {label: str(error) for label, error in failed.items()}, root).encode()
    for unit in units:
        try:
            read_unit(unit, SETTINGS)
        except DsiprepError as error:
            messages.append(str(error))
    return "; ".join(messages)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of all that is in a folder; links are not followed."""
    found = [Path(root) / name for root, folders, files in os.walk(folder) for name in (*folders, *files)]
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in found)


def limit(seconds: int) -> None:
    """Raise TimeoutError after so many seconds, unless the alarm is reset before."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)


def check(seed: int, folder: Path) -> tuple[str, str]:
    """One sample, stopped after `SECONDS`: the kind of its first damage, and "accepted" or "refused"."""
    dataset = build(folder / "bids")
    described = damage(dataset, seed)
    before = listing(folder)
    limit(SECONDS)
    try:
        message = outcome(dataset.root)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {described}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    assert "please report" not in message, f"seed {seed}: {described}: {message}"
    message.encode()  # printable
    assert "\n" not in message, f"seed {seed}: {described}: {message}"
    assert len(message) < 2000, f"seed {seed}: {described}"
    assert listing(folder) == before, f"seed {seed}: {described}: the dataset was changed"
    return described.split(":")[0], "refused" if message else "accepted"


@pytest.mark.parametrize("seed", range(FAST))
def test_damaged_datasets_end_with_a_sentence(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


def _check_many(seeds: range, folder: Path) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, used + BYTES))
    counts = Counter(check(seed, folder / str(seed)) for seed in seeds)
    for kind, end in sorted(counts):
        print(f"{kind}, {end}: {counts[kind, end]}")


@pytest.mark.slow
def test_the_whole_corpus(tmp_path: Path) -> None:
    """In a process with a limit on memory."""
    process = multiprocessing.get_context("fork").Process(target=_check_many, args=(range(FAST, ALL), tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
def test_whole_runs_of_damaged_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it ends well or not, a run leaves images with their tables, and nothing outside its folders."""
    counts: Counter[str] = Counter()
    phantom = make_phantom(tmp_path / "phantom", SMALL)
    for seed in range(WHOLE):
        folder = tmp_path / str(seed)
        shutil.copytree(phantom, folder / "phantom")
        described = damage(Dataset(folder / "phantom" / "bids"), seed)
        before = listing(folder / "phantom")
        limit(WHOLE_SECONDS)
        quick = ("--hmc-model", "none", "--denoise-method", "none", "--sdc-method", "none")
        code = cli.main(command(folder / "phantom", folder / "out", *quick))
        signal.alarm(0)
        message = capsys.readouterr().err
        said = f"seed {seed}: {described}: {message}"
        assert "please report" not in message, said
        assert "Traceback" not in message, said
        images = [path for path in (folder / "out").rglob("*_dwi.nii.gz") if "figures" not in path.parts]
        assert code or images, said
        for image in images:
            beside = [Path(str(image).replace(".nii.gz", ending)) for ending in (".bval", ".bvec", ".json")]
            assert all(path.stat().st_size for path in beside), said
        assert not list((folder / "out").rglob("*.partial*")), said
        assert listing(folder / "phantom") == before, said
        assert {path.name for path in folder.iterdir()} <= {"phantom", "out", "work", "moved"}, said
        counts["refused" if code and not images else "partly run" if code else "run"] += 1
    print(f"damaged datasets run: {dict(counts)}")
    assert counts["refused"] > 3
    assert counts["run"] > 3
