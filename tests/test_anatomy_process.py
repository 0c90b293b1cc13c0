"""The structural image prepared in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsiprep import anatomy_process
from dsiprep.anatomy_process import anatomy_beside
from dsiprep.cache import Cache
from dsiprep.costs import BESIDE_THREADS
from dsiprep.data.acquisition import Unit
from dsiprep.io.bids import find_units
from dsiprep.phantom import make_phantom
from dsiprep.phantom.head import TEMPLATE
from dsiprep.pipeline import prepare_anatomy
from dsiprep.settings import AnatomySettings, Settings
from helpers.processes import alive, wait_until
from helpers.small_run import SMALL

CPU = torch.device("cpu")
SETTINGS = Settings(anatomy=AnatomySettings(template=TEMPLATE, normalize=False))


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Unit:
    phantom = make_phantom(tmp_path_factory.mktemp("phantom"), SMALL)
    (found,) = find_units(phantom / "bids", SETTINGS)
    return found


def test_result_is_found_where_it_is_needed(unit: Unit, tmp_path: Path) -> None:
    computed: list[str] = []
    cache = Cache(tmp_path, computed.append)
    with anatomy_beside(unit, SETTINGS, cache, CPU, BESIDE_THREADS):
        prepare_anatomy(unit, SETTINGS, cache, CPU)
    assert set(cache.elsewhere) == {"anatomy"}
    assert computed == []
    again = Cache(tmp_path)
    with anatomy_beside(unit, SETTINGS, again, CPU, BESIDE_THREADS):
        assert again.elsewhere == {}


def test_process_that_fails_leaves_the_stage_to_its_parent(
    unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anatomy_process, "COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    computed: list[str] = []
    cache = Cache(tmp_path, computed.append)
    with anatomy_beside(unit, SETTINGS, cache, CPU, BESIDE_THREADS):
        prepare_anatomy(unit, SETTINGS, cache, CPU)
    assert computed == ["anatomy"]


def test_few_threads_or_a_gpu_have_no_second_process(unit: Unit, tmp_path: Path) -> None:
    for device, threads in ((CPU, BESIDE_THREADS - 1), (torch.device("cuda"), 16)):
        cache = Cache(tmp_path)
        with anatomy_beside(unit, SETTINGS, cache, device, threads):
            assert cache.elsewhere == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_ends_with_a_parent_that_is_killed() -> None:
    waiting = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen((sys.executable, '-c', 'import dsiprep.anatomy_process as a; a._end_with_parent()'),"
        " stdin=subprocess.PIPE)\nprint(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen((sys.executable, "-c", waiting), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    wait_until(lambda: not alive(child), 30.0)
