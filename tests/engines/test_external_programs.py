"""Third-party programs: locating and running them, error messages, and selection of engines."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dsiprep import plan
from dsiprep.cli import app as cli
from dsiprep.data.acquisition import PhaseEncoding, Run, Unit
from dsiprep.device import free_bytes, release_gpu
from dsiprep.engines import ants, freesurfer, selection, tortoise
from dsiprep.engines import external_programs as programs
from dsiprep.errors import EngineError
from dsiprep.io import itk
from dsiprep.phantom import make_phantom
from dsiprep.settings import AnatomySettings, DistortionSettings, Settings
from helpers.recorder import Recorder
from helpers.small_run import SMALL, command


@pytest.fixture
def isolated_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.delenv("SOME_HOME", raising=False)
    return tmp_path


def test_variable_precedes_path_and_may_be_folder_bin_or_program(
    isolated_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert programs.find("tool", "SOME_HOME") is None
    for name in ("path", "home"):
        Recorder(isolated_path / name).program("tool")
    assert programs.find("tool", "SOME_HOME") == isolated_path / "path" / "bin" / "tool"
    program = isolated_path / "home" / "bin" / "tool"
    for setting in (isolated_path / "home", isolated_path / "home" / "bin", program):
        monkeypatch.setenv("SOME_HOME", str(setting))
        assert programs.find("tool", "SOME_HOME") == program
    program.chmod(0o644)
    assert programs.find("tool", "SOME_HOME") == isolated_path / "path" / "bin" / "tool"
    with pytest.raises(
        EngineError, match="--x: other of Package is neither in the folder given by SOME_HOME nor on PATH"
    ):
        programs.require("other", "SOME_HOME", "Package", "--x")


def test_log_is_kept_and_files_are_removed(isolated_path: Path) -> None:
    with programs.working_directory("tool", isolated_path / "work") as directory:
        output = programs.run([sys.executable, "-c", "print('hello'); open('big', 'w')"], directory, name="tool")
        assert (directory.folder / "big").is_file()
        assert output == "hello\n"
    assert [path.name for path in (isolated_path / "work").iterdir()] == ["tool.log"]
    log = (isolated_path / "work" / "tool.log").read_text()
    assert log.startswith(f"$ {sys.executable} -c ")
    assert log.endswith("hello\n")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "tool ended with exit status 3."),
        ("print('itk: std::bad_alloc'); raise SystemExit(1)", "exit status 1: not enough memory."),
        ("import os; os.kill(os.getpid(), 9)", "was stopped by SIGKILL: most likely not enough memory."),
        ("import os; os.kill(os.getpid(), 6)", "was stopped by SIGABRT."),
        ("print('\\n'.join(map(str, range(20)))); raise SystemExit(1)", "Last output: 14 / 15 / 16 / 17 / 18 / 19"),
    ],
)
def test_failures_are_reported_with_reason_and_last_lines(code: str, message: str, isolated_path: Path) -> None:
    assert signal.SIGKILL == 9
    with programs.working_directory("tool", None) as directory, pytest.raises(EngineError) as caught:
        programs.run([sys.executable, "-c", code], directory, name="tool")
    assert message in str(caught.value)
    assert "full output" not in str(caught.value)


def test_program_that_cannot_be_started_is_reported(isolated_path: Path) -> None:
    (isolated_path / "tool").write_text("not a program")
    (isolated_path / "tool").chmod(0o755)
    with (
        programs.working_directory("tool", None) as directory,
        pytest.raises(EngineError, match="tool cannot be started"),
    ):
        programs.run([isolated_path / "tool"], directory)


def test_free_memory_is_plausible_and_required() -> None:
    assert 1e6 < free_bytes(torch.device("cpu")) < 1e14
    programs.require_memory(1e6, "it", "--x")
    with pytest.raises(EngineError, match=r"--x: it needs about 1000000 GB of memory, and [\d.]+ GB are free"):
        programs.require_memory(1e15, "it", "--x")


def test_release_gpu_selects_the_device_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert release_gpu(torch.device("cpu")) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert release_gpu(torch.device("cuda:1")) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert release_gpu(torch.device("cuda:1")) == {"CUDA_VISIBLE_DEVICES": "6"}


def function_of(step: object) -> object:
    return step.func if isinstance(step, partial) else step


def test_settings_select_the_engine_of_each_step() -> None:
    native = AnatomySettings()
    expected = {
        native: (None, None, None),
        replace(native, normalization="ants"): (None, None, ants.normalise),
        replace(native, normalization="synthmorph"): (None, None, freesurfer.normalise),
        replace(native, engine="freesurfer"): (freesurfer.brain_mask, freesurfer.segment, freesurfer.normalise),
        replace(native, engine="freesurfer", normalization="native"): (freesurfer.brain_mask, freesurfer.segment, None),
        replace(native, engine="freesurfer", normalization="ants"): (
            freesurfer.brain_mask, freesurfer.segment, ants.normalise,
        ),
        replace(native, normalization="ants", normalize=False): (None, None, None),
    }  # fmt: skip
    for settings, functions in expected.items():
        steps = selection.anatomical_steps(settings, None)
        assert tuple(function_of(f) for f in (steps.brain, steps.tissue, steps.normalise)) == functions


def test_tortoise_is_selected_only_for_blip_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tortoise, "check", lambda *what: pytest.fail("must not be checked"))
    image = tmp_path / "dwi.nii.gz"
    one = Unit("01", None, "sub-01", (Run(image, image, image, PhaseEncoding.from_bids("j")),))
    pair = replace(one, runs=(*one.runs, Run(image, image, image, PhaseEncoding.from_bids("j-"))))
    settings = Settings(distortion=DistortionSettings(engine="tortoise"))
    cpu = torch.device("cpu")
    selection.check_engines(one, settings, cpu)
    selection.check_engines(pair, Settings(distortion=DistortionSettings(method="none", engine="tortoise")), cpu)
    assert selection.engines_for(pair, settings) == ("tortoise",)
    assert "tortoise" in plan.plan_stages(pair, None, settings, pair)["engines"]
    assert "engines" not in plan.plan_stages(pair, None, Settings(), pair)


@pytest.mark.slow
def test_pipeline_with_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real ANTs, and with a DRBUDDI that crashes, so that the native stage is used and the report notes it."""
    recorder = Recorder(tmp_path / "tortoise")
    recorder.program("DRBUDDI", status=139, output="Segmentation fault")
    monkeypatch.setenv("TORTOISE_HOME", str(tmp_path / "tortoise"))
    phantom = make_phantom(tmp_path / "phantom", SMALL)
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = [*command(phantom, out), "--keep-work", "--sdc-engine", "tortoise", "--normalization-engine", "ants",
                 "--ants-settings", "fast"]  # fmt: skip
    assert cli.main(arguments) == 0
    page = (out / "sub-01.html").read_text()
    assert "DRBUDDI ended with exit status 139" in page
    assert "native stage was used instead" in page
    assert len(list((out / "sub-01" / "anat").glob("*_from-ACPC_to-MNI152NLin2009*_xfm.h5"))) == 1
    assert "with the settings of fMRIPrep" in (out / "logs" / "CITATION.md").read_text()
    assert {path.name for path in (work / "sub-01").glob("*.log")} == {"DRBUDDI.log", "antsRegistration.log"}
    assert recorder.command_lines()[0][1:3] == ["-u", "up.nii"]
    assert len(recorder.calls()) == 1
    chains = [itk.read_composite_h5(path) for path in (out / "sub-01" / "anat").glob("*_to-*MNI*_xfm.h5")]
    assert all(len(chain.steps) == 2 for chain in chains)
    assert cli.main(arguments) == 0  # all results are cached
    assert len(recorder.calls()) == 1
