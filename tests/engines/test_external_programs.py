"""Programs that people own: found, run, their failures told; and what the pipeline asks which engine for."""

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
from dsiprep.engines import ants, freesurfer, tortoise
from dsiprep.engines import external_programs as programs
from dsiprep.engines import selection as choice
from dsiprep.errors import EngineError
from dsiprep.io import itk
from dsiprep.phantom import make_phantom
from dsiprep.settings import AnatomySettings, DistortionSettings, Settings
from helpers.recorder import Recorder
from helpers.small_run import SMALL, command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.delenv("SOME_HOME", raising=False)
    return tmp_path


def test_the_variable_goes_before_path_and_may_name_folder_bin_or_program(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert programs.find("tool", "SOME_HOME") is None
    for name in ("path", "home"):
        Recorder(here / name).program("tool")
    assert programs.find("tool", "SOME_HOME") == here / "path" / "bin" / "tool"
    mine = here / "home" / "bin" / "tool"
    for named in (here / "home", here / "home" / "bin", mine):
        monkeypatch.setenv("SOME_HOME", str(named))
        assert programs.find("tool", "SOME_HOME") == mine
    mine.chmod(0o644)
    assert programs.find("tool", "SOME_HOME") == here / "path" / "bin" / "tool"
    with pytest.raises(EngineError, match=r"--x: other of Package is neither .* SOME_HOME .* nor on PATH; install"):
        programs.require("other", "SOME_HOME", "Package", "--x")


def test_output_goes_to_a_log_that_stays_and_files_go(here: Path) -> None:
    with programs.workplace("tool", here / "work") as place:
        said = programs.run([sys.executable, "-c", "print('hello'); open('big', 'w')"], place, name="tool")
        assert (place.folder / "big").is_file() and said == "hello\n"
    assert [path.name for path in (here / "work").iterdir()] == ["tool.log"]
    log = (here / "work" / "tool.log").read_text()
    assert log.startswith(f"$ {sys.executable} -c ") and log.endswith("hello\n")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "tool ended with exit status 3."),
        ("print('itk: std::bad_alloc'); raise SystemExit(1)", "exit status 1: the memory did not suffice."),
        ("import os; os.kill(os.getpid(), 9)", "was stopped by SIGKILL: most likely the memory did not suffice."),
        ("import os; os.kill(os.getpid(), 6)", "was stopped by SIGABRT."),
        ("print('\\n'.join(map(str, range(20)))); raise SystemExit(1)", "It last said: 14 / 15 / 16 / 17 / 18 / 19"),
    ],
)
def test_failures_are_told_with_reason_and_last_lines(code: str, said: str, here: Path) -> None:
    assert signal.SIGKILL == 9
    with programs.workplace("tool", None) as place, pytest.raises(EngineError) as caught:
        programs.run([sys.executable, "-c", code], place, name="tool")
    assert said in str(caught.value) and "whole output" not in str(caught.value)


def test_a_program_that_cannot_be_started_is_told(here: Path) -> None:
    (here / "tool").write_text("not a program")
    (here / "tool").chmod(0o755)
    with programs.workplace("tool", None) as place, pytest.raises(EngineError, match="tool cannot be started"):
        programs.run([here / "tool"], place)


def test_memory_that_is_free_is_no_fancy() -> None:
    assert 1e6 < free_bytes(torch.device("cpu")) < 1e14
    programs.require_memory(1e6, "it", "--x")
    with pytest.raises(EngineError, match=r"--x: it needs about 1000000 GB of memory, and [\d.]+ GB are free"):
        programs.require_memory(1e15, "it", "--x")


def test_a_gpu_is_lent_by_its_number_and_the_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert release_gpu(torch.device("cpu")) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert release_gpu(torch.device("cuda:1")) == {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert release_gpu(torch.device("cuda:1")) == {"CUDA_VISIBLE_DEVICES": "6"}


def function_of(step: object) -> object:
    return step.func if isinstance(step, partial) else step


def test_each_setting_brings_its_engine() -> None:
    native = AnatomySettings()
    asked = {
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
    for settings, functions in asked.items():
        steps = choice.anatomical_steps(settings, None)
        assert tuple(function_of(f) for f in (steps.brain, steps.tissue, steps.normalise)) == functions


def test_tortoise_is_asked_for_only_with_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tortoise, "check", lambda *what: pytest.fail("must not be asked for"))
    image = tmp_path / "dwi.nii.gz"
    one = Unit("01", None, "sub-01", (Run(image, image, image, PhaseEncoding.from_bids("j")),))
    pair = replace(one, runs=(*one.runs, Run(image, image, image, PhaseEncoding.from_bids("j-"))))
    settings = Settings(distortion=DistortionSettings(engine="tortoise"))
    cpu = torch.device("cpu")
    choice.check_engines(one, settings, cpu)
    choice.check_engines(pair, Settings(distortion=DistortionSettings("none", "tortoise")), cpu)
    assert choice.engines_for(pair, settings) == ("tortoise",)
    assert "tortoise" in plan.plan_stages(pair, None, settings, pair)["engines"]
    assert "engines" not in plan.plan_stages(pair, None, Settings(), pair)


@pytest.mark.slow
def test_a_whole_run_with_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ANTs normalises for real; a DRBUDDI that crashes gives way to the native stage, and the report says so."""
    recorder = Recorder(tmp_path / "tortoise")
    recorder.program("DRBUDDI", status=139, says="Segmentation fault")
    monkeypatch.setenv("TORTOISE_HOME", str(tmp_path / "tortoise"))
    phantom = make_phantom(tmp_path / "phantom", SMALL)
    out, work = tmp_path / "out", tmp_path / "work"
    words = [*command(phantom, out), "--keep-work", "--sdc-engine", "tortoise", "--normalization-engine", "ants",
             "--ants-settings", "fast"]  # fmt: skip
    assert cli.main(words) == 0
    page = (out / "sub-01.html").read_text()
    assert "DRBUDDI ended with exit status 139" in page and "native stage stepped in" in page
    assert len(list((out / "sub-01" / "anat").glob("*_from-ACPC_to-MNI152NLin2009*_xfm.h5"))) == 1
    assert "with the settings of fMRIPrep" in (out / "logs" / "CITATION.md").read_text()
    assert {path.name for path in (work / "sub-01").glob("*.log")} == {"DRBUDDI.log", "antsRegistration.log"}
    assert recorder.words()[0][1:3] == ["-u", "up.nii"] and len(recorder.calls()) == 1
    chains = [itk.read_composite_h5(path) for path in (out / "sub-01" / "anat").glob("*_to-*MNI*_xfm.h5")]
    assert all(len(chain.steps) == 2 for chain in chains)
    assert cli.main(words) == 0  # everything is found
    assert len(recorder.calls()) == 1
