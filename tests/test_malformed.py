"""Seeded damage to a dataset: the plan and the reading end with units or with a sentence, soon and in little memory."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from pathlib import Path

import pytest

from dsiprep.cli.plan_page import plan_as_json, plan_units
from dsiprep.errors import DsiprepError
from dsiprep.io.bids import find_units, read_unit
from dsiprep.settings import Settings
from helpers.malformed import build, damage

SECONDS = 20
BYTES = 2 * 2**30  # of heap beyond what is used at the start
FAST, ALL = 40, 1200
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


def check(seed: int, folder: Path) -> None:
    """One sample, stopped after `SECONDS`."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"{described}: no end after {SECONDS} s")

    dataset = build(folder / "bids")
    described = damage(dataset, seed)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
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


@pytest.mark.parametrize("seed", range(FAST))
def test_damaged_datasets_end_with_a_sentence(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


def _check_many(seeds: range, folder: Path) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + BYTES, used + BYTES))
    for seed in seeds:
        check(seed, folder / str(seed))


@pytest.mark.slow
def test_the_whole_corpus(tmp_path: Path) -> None:
    """In a process with a limit on memory."""
    process = multiprocessing.get_context("fork").Process(target=_check_many, args=(range(FAST, ALL), tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0
