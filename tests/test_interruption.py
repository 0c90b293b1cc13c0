"""Runs that are killed, or run out of disk space: the same command finishes afterwards, with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsiprep.cache import Cache
from dsiprep.cli import app as cli
from dsiprep.phantom import make_phantom
from helpers.small_run import SMALL, command, fingerprint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantom(tmp_path_factory.mktemp("phantom"), SMALL)


@pytest.fixture(scope="module")
def undisturbed(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of the second of two runs: both use kernels that were compiled before."""
    for name in ("first", "second"):
        out = tmp_path_factory.mktemp(name) / "out"
        assert cli.main(command(phantom, out)) == 0
    return out


def listing(out: Path) -> list[str]:
    """Everything in the output folder but the logs, of which each run leaves its own."""
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if not path.name.endswith(".log"))


def test_run_killed_again_and_again_finishes_with_identical_outputs(
    phantom: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, killed = tmp_path / "out", 0
    for seconds in (4, 6, 8, 11, 15, 20):
        arguments = [sys.executable, "-m", "dsiprep.cli.app", *command(phantom, out)]
        with subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL) as run:
            try:
                run.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                killed += 1
    assert killed > 1
    assert cli.main(command(phantom, out)) == 0
    assert fingerprint(out) == fingerprint(undisturbed)
    assert listing(out) == listing(undisturbed)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("lost", ["work", "bids"])
@pytest.mark.parametrize("step", ["motion-up", "resample"])
def test_folder_that_disappears_during_a_run_is_named_or_made_again(
    phantom: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], lost: str, step: str,
) -> None:  # fmt: skip
    shutil.copytree(phantom / "bids", tmp_path / "bids")
    begin = Cache._timed

    def remove_first(self: Cache, name: str, function: object, inputs: tuple[object, ...]) -> object:
        if name == step:
            shutil.rmtree(tmp_path / lost)
        return begin(self, name, function, inputs)  # type: ignore[arg-type]

    arguments = [str(tmp_path / "bids"), *command(phantom, tmp_path / "out")[1:]]
    with monkeypatch.context() as patched:
        patched.setattr(Cache, "_timed", remove_first)
        code = cli.main(arguments)
    message = " ".join(capsys.readouterr().err.split())
    assert "unexpected" not in message
    assert "Traceback" not in message
    assert not code or str(tmp_path / lost) in message
    shutil.copytree(phantom / "bids", tmp_path / "bids", dirs_exist_ok=True)
    assert cli.main(arguments) == 0
    assert fingerprint(tmp_path / "out") == fingerprint(undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("a file system of fixed size cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_is_reported_at_every_stage_and_the_run_finishes_with_more_space(
    phantom: Path, undisturbed: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, code, megabytes = small_disk / "out", 1, 1
    while code and megabytes < 1000:
        subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(small_disk)], check=True)
        code = cli.main(command(phantom, out))
        message = " ".join(capsys.readouterr().err.split())
        assert not code or "no space left" in message.lower(), message
        assert "Traceback" not in message
        megabytes *= 2
    assert code == 0
    assert megabytes > 16
    assert fingerprint(out) == fingerprint(undisturbed)
