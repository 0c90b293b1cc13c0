"""The command line: QSIPrep's names, refusals as sentences, exit codes, start-up time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsiprep.cli import app as cli
from dsiprep.cli.unsupported import NOT_BUILT, NOT_HERE, SHELL_TOOLS
from dsiprep.errors import OutputError, SettingsError
from dsiprep.settings import ResampleSettings, Settings

MINIMAL = ["bids", "out", "participant", "--output-resolution", "2"]


def parse(*extra: str) -> cli.argparse.Namespace:
    return cli.build_parser().parse_args([*MINIMAL, *extra])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    bids = tmp_path / "bids"
    bids.mkdir()
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return bids


@pytest.mark.parametrize(
    ("words", "where", "value"),
    [
        (["--shoreline-iters", "3"], "motion.iters", 3),
        (["--hmc-model", "3dSHORE"], "motion.model", "3dSHORE"),
        (["--hmc-transform", "Affine"], "motion.transform", "Affine"),
        (["--pepolar-method", "DRBUDDI"], "distortion.method", "drbuddi"),
        (["--sdc-method", "drbuddi"], "distortion.method", "drbuddi"),
        (["--b0-to-anat-transform", "Affine"], "coregister.dof", 12),
        (["--dwi2anat-dof", "12"], "coregister.dof", 12),
        (["--dwi-denoise-window", "5"], "denoise.window", 5),
        (["--b1-biascorrect-stage", "none"], "denoise.biascorrect", "none"),
        (["--skip-anat-based-spatial-normalization"], "anatomy.normalize", False),
        (["--no-b0-harmonization"], "acquisition.harmonize_b0", False),
        (["--b0-threshold", "50"], "acquisition.b0_threshold", 50.0),
        (["--ignore", "sdc"], "distortion.method", "none"),
    ],
)
def test_options_reach_their_settings(words: list[str], where: str, value: object) -> None:
    stage, name = where.split(".")
    assert getattr(getattr(cli.read_settings(parse(*words)), stage), name) == value


def test_sloppy_leaves_what_was_said(tmp_path: Path) -> None:
    """Also where it is the usual value, and where a file says it."""
    usual, cheap = (cli.read_settings(parse(*words)) for words in ([], ["--sloppy"]))
    assert (usual.motion.iters, usual.anatomy.finest_mm) == (4, 1.0)
    assert (cheap.motion.iters, cheap.anatomy.finest_mm) == (1, 4.0)
    for rounds in ("4", "3"):
        chosen = cli.read_settings(parse("--sloppy", "--shoreline-iters", rounds))
        assert (chosen.motion.iters, chosen.anatomy.finest_mm) == (int(rounds), 4.0)
    config = tmp_path / "shoreline.json"
    config.write_text(json.dumps({"iters": 2}))
    assert cli.read_settings(parse("--sloppy", "--shoreline-config", str(config))).motion.iters == 2


def test_nothing_said_means_the_usual_settings() -> None:
    assert cli.read_settings(parse()) == replace(Settings(), resample=ResampleSettings(resolution=2.0))


def test_lists_and_sizes_are_read() -> None:
    options = parse("--participant_label", "sub-01", "02", "--session-id", "1", "--mem", "16G", "--n-cpus", "3")
    assert options.participant_label == ["sub-01", "02"] and options.session_label == ["1"]
    assert options.mem == 16 * 1024 and options.nprocs == 3


def test_shoreline_config_is_read(tmp_path: Path) -> None:
    config = tmp_path / "shoreline.json"
    config.write_text(json.dumps({"model": "3dshore", "iters": 5, "transform": "Affine"}))
    motion = cli.read_settings(parse("--shoreline-config", str(config))).motion
    assert (motion.model, motion.iters, motion.transform) == ("3dSHORE", 5, "Affine")
    for content, said in (
        ({"speed": 1}, "speed"),
        (["iters"], "holds a list"),
        ({"iters": "two"}, "iters: 'two' is not a number"),
        ({"model": "magic"}, "model: 'magic' is not one of"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(SettingsError, match=said):
            cli.read_settings(parse("--shoreline-config", str(config)))


@pytest.mark.parametrize("flag", sorted(NOT_HERE))
def test_what_is_not_here_is_refused_with_a_sentence(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(flag)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"dsiprep: {flag}: ") and said.count("\n") == 1


@pytest.mark.parametrize(("flag", "value"), sorted(set(NOT_BUILT) - SHELL_TOOLS))
def test_values_that_are_not_built_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(flag, value)
    assert stop.value.code == 2
    assert NOT_BUILT[flag, value] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shoreline-iters", "0"], "at least 1"),
        (["--dwidenoise-window", "4"], "even"),
        (["--dwidenoise-window", "-3"], "negative"),
        (["--hmc-tolerance", "-1"], "--hmc-tolerance -1 mm"),
        (["--b0-threshold", "-3"], "--b0-threshold -3 is negative"),
        (["--nprocs", "0"], "--nprocs 0"),
        (["--omp-nthreads", "-3"], "--omp-nthreads -3"),
        (["--mem", "-1024"], "--mem -1024"),
        (["--output-resolution", "0.1"], "outside"),
    ],
)
def test_impossible_values_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        cli.read_settings(parse(*words))


def test_resolution_is_required(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(dataset), str(tmp_path / "out"), "participant"]) == 2
    assert "--output-resolution" in capsys.readouterr().err


@pytest.mark.parametrize(("out", "work"), [("bids", "work"), ("bids/sub-01/out", "work"), ("out", "bids/work")])
def test_outputs_never_go_into_the_input(dataset: Path, tmp_path: Path, out: str, work: str) -> None:
    words = [str(dataset), str(tmp_path / out), "participant", "--output-resolution", "2", "-w", str(tmp_path / work)]
    with pytest.raises(OutputError):
        cli.check_folders(cli.build_parser().parse_args(words))
    assert cli.main(words) == 1
    assert [path.name for path in dataset.iterdir()] == ["dataset_description.json"]


@pytest.mark.parametrize("place", ["out", "work"])
def test_folders_that_cannot_be_made_are_told_before_anything_is_computed(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / place).write_text("a file")
    words = [str(dataset), str(tmp_path / "out"), "participant", "--output-resolution", "2"]
    assert cli.main([*words, "-w", str(tmp_path / "work" / "deep")]) == 1
    assert f"{tmp_path / place} is a file; choose another" in capsys.readouterr().err


def test_derivatives_inside_the_input_are_allowed(dataset: Path, tmp_path: Path) -> None:
    words = [str(dataset), str(dataset / "derivatives" / "dsiprep"), "participant", "-w", str(tmp_path / "work")]
    cli.check_folders(cli.build_parser().parse_args(words))


def test_filters_that_are_no_object_are_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "filter.json").write_text("[1, 2]")
    words = [str(dataset), str(tmp_path / "out"), "participant", "--output-resolution", "2"]
    assert cli.main([*words, "-w", str(tmp_path / "work"), "--bids-filter-file", str(tmp_path / "filter.json")]) == 2
    assert "holds a list" in capsys.readouterr().err


def test_no_traceback_reaches_the_screen(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_run", lambda *_: 1 / 0)
    words = [str(dataset), str(tmp_path / "out"), "participant", "--output-resolution", "2", "-w", str(tmp_path / "w")]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith("dsiprep: unexpected ZeroDivisionError") and said.count("\n") == 1
    log = Path(said.split()[-1])
    assert "Traceback" in log.read_text()
    log.unlink()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps"])
def test_unknown_devices_are_refused(name: str) -> None:
    from dsiprep.device import choose

    with pytest.raises(SettingsError, match=f"--device {name}: not one of"):
        choose(name)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path), str(tmp_path.parent / "out"), "participant", "--output-resolution", "2"]
    assert cli.main([*words, "-w", str(tmp_path.parent / "work")]) == 1
    assert "dataset_description.json" in capsys.readouterr().err


def _seconds(*words: str) -> float:
    """Of CPU: what else runs on the machine counts little."""
    best = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, used)
    return best


def test_start_up_is_quick() -> None:
    """`import dsiprep` under 0.3 s and `dsiprep --help` under 1 s, on top of what an empty interpreter takes."""
    empty = _seconds("-c", "")
    assert _seconds("-c", "import dsiprep") - empty < 0.3
    assert _seconds("-m", "dsiprep.cli.app", "--help") - empty < 1.0
