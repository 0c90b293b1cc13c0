"""The command line: option names, rejected options, exit codes and start-up time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dsiprep.cli import app as cli
from dsiprep.cli.unsupported import EDDY_VALUES, UNSUPPORTED_OPTIONS, UNSUPPORTED_VALUES
from dsiprep.errors import OutputError, SettingsError
from dsiprep.settings import ResampleSettings, Settings

MINIMAL = ["bids", "out", "participant", "--output-resolution", "2"]


def parse(*extra: str) -> cli.argparse.Namespace:
    return cli.build_parser().parse_args([*MINIMAL, *extra])


def command(bids: Path, out: Path) -> list[str]:
    return [str(bids), str(out), "participant", "--output-resolution", "2"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    bids = tmp_path / "bids"
    bids.mkdir()
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    return bids


@pytest.mark.parametrize(
    ("arguments", "setting", "value"),
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
def test_options_set_their_settings(arguments: list[str], setting: str, value: object) -> None:
    stage, name = setting.split(".")
    assert getattr(getattr(cli.read_settings(parse(*arguments)), stage), name) == value


def test_sloppy_does_not_override_given_options(tmp_path: Path) -> None:
    """Even if the given value is the default, or if it comes from --shoreline-config."""
    default, sloppy = (cli.read_settings(parse(*arguments)) for arguments in ([], ["--sloppy"]))
    assert (default.motion.iters, default.anatomy.finest_mm) == (3, 1.0)
    assert (sloppy.motion.iters, sloppy.anatomy.finest_mm) == (1, 4.0)
    for iterations in ("4", "3"):
        chosen = cli.read_settings(parse("--sloppy", "--shoreline-iters", iterations))
        assert (chosen.motion.iters, chosen.anatomy.finest_mm) == (int(iterations), 4.0)
    config = tmp_path / "shoreline.json"
    config.write_text(json.dumps({"iters": 2}))
    assert cli.read_settings(parse("--sloppy", "--shoreline-config", str(config))).motion.iters == 2


def test_minimal_command_gives_default_settings() -> None:
    assert cli.read_settings(parse()) == replace(Settings(), resample=ResampleSettings(resolution=2.0))


def test_lists_and_memory_sizes_are_parsed() -> None:
    options = parse("--participant_label", "sub-01", "02", "--session-id", "1", "--mem", "16G", "--n-cpus", "3")
    assert options.participant_label == ["sub-01", "02"]
    assert options.session_label == ["1"]
    assert options.mem == 16 * 1024
    assert options.nprocs == 3


def test_shoreline_config_is_parsed(tmp_path: Path) -> None:
    config = tmp_path / "shoreline.json"
    config.write_text(json.dumps({"model": "3dshore", "iters": 5, "transform": "Affine"}))
    motion = cli.read_settings(parse("--shoreline-config", str(config))).motion
    assert (motion.model, motion.iters, motion.transform) == ("3dSHORE", 5, "Affine")
    for content, message in (
        ({"speed": 1}, "speed"),
        (["iters"], "holds a list"),
        ({"iters": "two"}, "iters: 'two' is not a number"),
        ({"model": "magic"}, "model: 'magic' is not one of"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(SettingsError, match=message):
            cli.read_settings(parse("--shoreline-config", str(config)))


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED_OPTIONS))
def test_unsupported_option_is_rejected_with_one_line(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(flag)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"dsiprep: {flag}: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("flag", "value"), sorted(set(UNSUPPORTED_VALUES) - EDDY_VALUES))
def test_unsupported_value_is_rejected(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(flag, value)
    assert stop.value.code == 2
    assert UNSUPPORTED_VALUES[flag, value] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shoreline-iters", "0"], r"--shoreline-iters\): 0 is too small"),
        (["--dwidenoise-window", "4"], "even"),
        (["--dwidenoise-window", "-3"], r"--dwidenoise-window\): -3 is too small"),
        (["--hmc-tolerance", "-1"], r"--hmc-tolerance\): -1 is too small"),
        (["--b0-threshold", "-3"], r"--b0-threshold\): -3 is too small"),
        (["--nprocs", "0"], "--nprocs 0"),
        (["--omp-nthreads", "-3"], "--omp-nthreads -3"),
        (["--mem", "-1024"], "--mem -1024"),
        (["--output-resolution", "0.1"], r"--output-resolution\): 0\.1 mm is too small"),
    ],
)
def test_out_of_range_value_is_rejected(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        cli.read_settings(parse(*arguments))


def test_output_resolution_is_required(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(dataset), str(tmp_path / "out"), "participant"]) == 2
    assert "--output-resolution" in capsys.readouterr().err


@pytest.mark.parametrize(("out", "work"), [("bids", "work"), ("bids/sub-01/out", "work"), ("out", "bids/work")])
def test_output_or_work_folder_inside_the_input_is_rejected(dataset: Path, tmp_path: Path, out: str, work: str) -> None:
    arguments = [*command(dataset, tmp_path / out), "-w", str(tmp_path / work)]
    with pytest.raises(OutputError):
        cli.check_folders(cli.build_parser().parse_args(arguments))
    assert cli.main(arguments) == 1
    assert [path.name for path in dataset.iterdir()] == ["dataset_description.json"]


@pytest.mark.parametrize("folder", ["out", "work"])
def test_folder_that_cannot_be_created_is_reported_before_processing(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / folder).write_text("a file")
    arguments = command(dataset, tmp_path / "out")
    assert cli.main([*arguments, "-w", str(tmp_path / "work" / "deep")]) == 1
    assert f"{tmp_path / folder} is a file; choose another folder" in capsys.readouterr().err


def test_output_in_derivatives_of_the_input_is_allowed(dataset: Path, tmp_path: Path) -> None:
    arguments = [str(dataset), str(dataset / "derivatives" / "dsiprep"), "participant", "-w", str(tmp_path / "work")]
    cli.check_folders(cli.build_parser().parse_args(arguments))


def test_filter_file_without_json_object_is_rejected(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "filter.json").write_text("[1, 2]")
    arguments = [*command(dataset, tmp_path / "out"), "-w", str(tmp_path / "work")]
    assert cli.main([*arguments, "--bids-filter-file", str(tmp_path / "filter.json")]) == 2
    assert "holds a list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "message"),
    [("pipe", "a named pipe"), ("/dev/zero", "a device"), ("nowhere", "target does not exist"), ("deep", "too deeply")],
)
def test_filter_file_that_cannot_be_read(
    kind: str, message: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "filter.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "deep":
        path.write_text("[" * 100_000)
    else:
        path.symlink_to(kind)
    arguments = [*command(dataset, tmp_path / "out"), "-w", str(tmp_path / "work"), "--bids-filter-file", str(path)]
    assert cli.main(arguments) == 2
    assert f"{message}" in capsys.readouterr().err


def test_unexpected_error_prints_one_line_and_logs_the_traceback(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_run", lambda *_: 1 / 0)
    assert cli.main([*command(dataset, tmp_path / "out"), "-w", str(tmp_path / "work")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("dsiprep: unexpected ZeroDivisionError")
    assert message.count("\n") == 1
    log = Path(message.split()[-1])
    assert "Traceback" in log.read_text()
    log.unlink()


def test_errors_are_one_printable_line() -> None:
    name = os.fsdecode(b"caf\xe9\n\x1b[31m")
    message = str(OutputError(f"{name}: \ud800 é"))
    assert message == "caf\\udce9\\n\\x1b[31m: \\ud800 é"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps"])
def test_unknown_device_is_rejected(name: str) -> None:
    from dsiprep.device import choose

    with pytest.raises(SettingsError, match=f"--device {name}: not one of"):
        choose(name)


def test_sigterm_ends_a_run_like_an_interrupt(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_run", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 0)
    assert cli.main(command(dataset, tmp_path / "out")) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_folder_without_dataset_description_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = command(tmp_path, tmp_path.parent / "out")
    assert cli.main([*arguments, "-w", str(tmp_path.parent / "work")]) == 1
    assert "dataset_description.json" in capsys.readouterr().err


def _cpu_seconds(*arguments: str) -> float:
    """CPU time of a Python process, best of three; it depends less on the load of the machine than wall time."""
    best = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, used)
    return best


def test_start_up_time() -> None:
    """`import dsiprep` under 0.3 s and `dsiprep --help` under 1 s, not counting the start of the interpreter."""
    empty = _cpu_seconds("-c", "")
    assert _cpu_seconds("-c", "import dsiprep") - empty < 0.3
    assert _cpu_seconds("-m", "dsiprep.cli.app", "--help") - empty < 1.0
