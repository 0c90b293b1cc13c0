"""The QSIPrep command for a dataset: the chosen options, and that the parser of the release accepts them."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import zipfile
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dsiprep.cli.app import main as run_app
from dsiprep.cli.tools import main
from dsiprep.errors import InputError, SettingsError
from dsiprep.phantom.dataset import make_phantom
from dsiprep.phantom.schemes import gradient_table
from dsiprep.phantom.settings import PhantomSettings
from dsiprep.qsiprep.command import ContainerSetup, write_command
from dsiprep.qsiprep.option_choices import EDDY_CONFIG, UserOptions
from helpers.qsiprep_releases import CHECKED_RELEASES, parser_of, wheel_of
from helpers.shared_data import SHARED

SHARED_BIDS = SHARED / "bids"
EDDY_OR_TOPUP = re.compile(r"eddy|topup", re.IGNORECASE)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DSI phantom with a reversed b=0 and a T1w."""
    coarse = PhantomSettings(scheme="dsi101", resolution=8.0, t1w_resolution=4.0, ideal=False)
    return make_phantom(tmp_path_factory.mktemp("phantom"), coarse) / "bids"


def add_subject(
    root: Path, label: str, scheme: str, directions: str = "AP", anatomy: str = "T1w", session: str = ""
) -> None:
    """Write a tiny subject with a complete b-table, and one run for each of the space-separated `directions`."""
    root.mkdir(exist_ok=True)
    (root / "dataset_description.json").write_text('{"Name": "tiny", "BIDSVersion": "1.10.0"}')
    folder = root / f"sub-{label}" / (f"ses-{session}" if session else "")
    prefix = f"sub-{label}_ses-{session}" if session else f"sub-{label}"
    for kind in ("dwi", "anat"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    bvals, bvecs = gradient_table(scheme)
    for direction in directions.split():
        stem = folder / "dwi" / f"{prefix}_acq-{scheme}_dir-{direction}_dwi"
        image = np.ones((4, 4, 4, len(bvals)), np.int16)
        nib.Nifti1Image(image, np.diag([2.0, 2, 2.5, 1])).to_filename(f"{stem}.nii.gz")
        np.savetxt(f"{stem}.bval", bvals[None], fmt="%g")
        np.savetxt(f"{stem}.bvec", bvecs.T, fmt="%.6f")
        pe = {"PhaseEncodingDirection": "j-" if direction == "AP" else "j", "TotalReadoutTime": 0.05}
        Path(f"{stem}.json").write_text(json.dumps(pe))
    if anatomy:
        image = np.ones((4, 4, 4), np.int16)
        nib.Nifti1Image(image, np.eye(4)).to_filename(folder / "anat" / f"{prefix}_{anatomy}.nii.gz")


def script(version: str, bids: Path, folder: Path, *options: str) -> str:
    """Output of `dsiprep-tools qsiprep-command`."""
    output = StringIO()
    with redirect_stdout(output):
        code = main(
            ["qsiprep-command", str(bids), str(folder / "out"), "--version", version, "--nprocs", "4", *options]
        )
    assert code == 0
    return output.getvalue()


def run_recorded(text: str, folder: Path) -> list[list[str]]:
    """Run a script with stubs for Docker and Apptainer; return the command lines that they receive."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    record = folder / "record"
    record.unlink(missing_ok=True)
    for name in ("docker", "apptainer"):
        (programs / name).write_text(
            f'#!/bin/sh\nprintf "%s\\0" "$(basename "$0")" "$@" >> {record}\necho >> {record}\n'
        )
        (programs / name).chmod(0o755)
    process = subprocess.run(
        ["sh"], input=text, text=True, capture_output=True, env={"PATH": f"{programs}:/usr/bin:/bin"}
    )
    assert process.returncode == 0, process.stderr
    return [line.split("\0")[:-1] for line in record.read_text().splitlines()]


def host_arguments(command: list[str]) -> list[str]:
    """The QSIPrep arguments of a container command, with container paths replaced by host paths."""
    mounts = [value for flag, value in pairwise(command) if flag in ("-v", "-B")]
    host_paths = {inside: path for path, inside in (mount.removesuffix(":ro").split(":") for mount in mounts)}
    arguments = []
    for argument in command[command.index("/data") :]:
        inside = next((folder for folder in host_paths if f"{argument}/".startswith(f"{folder}/")), "")
        arguments.append(host_paths.get(inside, "") + argument.removeprefix(inside))
    return arguments


def parse(command: list[str], parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the QSIPrep arguments of a container command with the parser of a release."""
    return parser.parse_args(host_arguments(command))


@pytest.fixture(scope="module", params=CHECKED_RELEASES)
def release(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, argparse.ArgumentParser]:
    """Version and parser of each release."""
    version = request.param
    return version, parser_of(wheel_of(version, pytestconfig), version, tmp_path_factory.mktemp("release"))


@pytest.mark.parametrize("flags", ["", "--gpu", "--gpu --apptainer"])
def test_dsi_command_is_accepted_by_every_release(
    flags: str, release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path
) -> None:
    version, parser = release
    text = script(version, phantom, tmp_path, "--skip-anat-based-spatial-normalization", *flags.split())
    (command,) = run_recorded(text, tmp_path)
    parsed = parse(command, parser)
    assert parsed.output_resolution == 8.0
    assert parsed.nprocs == 4
    assert parsed.participant_label == ["01"]
    assert parsed.skip_anat_based_spatial_normalization
    assert parsed.work_dir.name == "out_work"
    assert not EDDY_OR_TOPUP.search(" ".join(command[command.index("/data") :]))
    if version.startswith("26.1"):
        assert (parsed.hmc_method, parsed.sdc_method) == ("shoreline", "drbuddi")
        assert (parsed.shoreline_model, parsed.hmc_transform, parsed.shoreline_iters) == ("3dshore", "Rigid", 2)
        assert parsed.gpu == (["drbuddi"] if flags else None)
    else:
        assert (parsed.hmc_model, parsed.hmc_transform, parsed.shoreline_iters) == ("3dSHORE", "Rigid", 2)
        assert parsed.pepolar_method == "DRBUDDI"
    container = command[: command.index("/data")]
    assert ("--nv" in container) == ("--apptainer" in flags)
    assert ("--gpus" in container) == (flags == "--gpu")
    patched = bool(flags) and not version.startswith("26.1")
    owner = "pennbbl" if version.startswith("0.") else "pennlinc"
    assert (
        container[-1].endswith(("-gpu", "-gpu.sif"))
        if patched
        else container[-1].endswith(f"{owner}/qsiprep:{version}")
    )


@pytest.mark.parametrize("gpu", [False, True])
def test_shell_command_is_accepted_by_every_release(
    gpu: bool, release: tuple[str, argparse.ArgumentParser], tmp_path: Path
) -> None:
    if not SHARED_BIDS.is_dir():
        pytest.skip("the shared datasets are not available")
    version, parser = release
    text = script(version, SHARED_BIDS, tmp_path, "--participant-label", "xa30", "canon", *(["--gpu"] if gpu else []))
    commands = [parse(command, parser) for command in run_recorded(text, tmp_path)]
    by_subject = {parsed.participant_label[0]: parsed for parsed in commands}
    assert set(by_subject) == {"xa30", "canon"}
    assert by_subject["canon"].anat_modality == "none"
    assert by_subject["xa30"].anat_modality == "T1w"
    for parsed in commands:
        if version.startswith("26.1"):
            assert (parsed.hmc_method, parsed.sdc_method) == ("eddy", "topup")
            assert parsed.gpu == (["eddy"] if gpu else None)
        else:
            assert (parsed.hmc_model, parsed.pepolar_method) == ("eddy", "TOPUP")
            assert bool(parsed.eddy_config) == gpu
            assert not gpu or json.loads(Path(parsed.eddy_config).read_text())["use_cuda"] is True
    assert "eddy_cuda10.2=eddy_cuda11.0" in text if gpu and version == "26.0.0" else "eddy_cuda11.0" not in text


def test_dsiprep_accepts_the_same_arguments(
    release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The QSIPrep arguments for DSI can be passed to dsiprep unchanged."""
    version, _ = release
    (command,) = run_recorded(script(version, phantom, tmp_path, "--skip-anat-based-spatial-normalization"), tmp_path)
    assert run_app([*host_arguments(command), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "SHORELine with 3dSHORE" in plan
    assert "up to 2 rounds" in plan
    assert "drbuddi: blip-up/blip-down correction of phase encodings j and j-" in plan


def test_eddy_config_matches_the_defaults_of_the_release_except_for_cuda(release: tuple[str, argparse.ArgumentParser],
                                                         pytestconfig: pytest.Config) -> None:  # fmt: skip
    version, _ = release
    with zipfile.ZipFile(wheel_of(version, pytestconfig)) as archive:
        defaults = json.loads(archive.read("qsiprep/data/eddy_params.json"))
    assert {**defaults, "use_cuda": True} == EDDY_CONFIG | ({"flm": "linear"} if version.startswith("0.") else {})


def test_parser_rejects_the_command_of_another_release(
    release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shows that the tests above can fail."""
    version, parser = release
    other = "1.0.1" if version.startswith("26.1") else "26.1.1"
    (command,) = run_recorded(script(other, phantom, tmp_path), tmp_path)
    with pytest.raises(SystemExit):
        parse(command, parser)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_tortoise_motion_correction_requires_26_1(
    release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, parser = release
    options = ["--hmc-method", "tortoise", "--gpu"]
    if not version.startswith("26.1"):
        assert main(["qsiprep-command", str(phantom), str(tmp_path), "--version", version, *options]) == 1
        assert "requires QSIPrep 26.1.0" in capsys.readouterr().err
        return
    (command,) = run_recorded(script(version, phantom, tmp_path, *options), tmp_path)
    parsed = parse(command, parser)
    assert (parsed.hmc_method, parsed.sdc_method, parsed.gpu) == ("tortoise", "drbuddi", ["diffprep", "drbuddi"])


def test_license_and_filter_file_are_mounted(
    release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path
) -> None:
    version, parser = release
    for name in ("license.txt", "filter file.json"):
        (tmp_path / name).write_text("{}")
    options = ["--fs-license-file", str(tmp_path / "license.txt")]
    text = script(version, phantom, tmp_path, *options)
    parsed = parse(run_recorded(text, tmp_path)[0], parser)
    has_license_option = not version.startswith("26.1")
    assert has_license_option == (vars(parsed).get("fs_license_file") == tmp_path / "license.txt")
    assert has_license_option == ("license.txt" in text)
    (command,) = run_recorded(
        script(version, phantom, tmp_path, "--bids-filter-file", str(tmp_path / "filter file.json")), tmp_path
    )
    assert f"{tmp_path}/filter file.json:/filter.json:ro" in command
    assert parse(command, parser).bids_filters == {}


def test_subjects_are_grouped_and_every_option_has_a_reason(tmp_path: Path) -> None:
    """Subjects that need the same options share a command."""
    bids = tmp_path / "bids"
    add_subject(bids, "01", "dsi101", "AP PA")
    add_subject(bids, "02", "dsi101", "AP PA")
    add_subject(bids, "03", "hasc55", "AP", anatomy="T2w")
    add_subject(bids, "04", "multishell", "AP", anatomy="")
    text = script("1.0.1", bids, tmp_path, "--gpu")
    commands = run_recorded(text, tmp_path)
    assert [command[command.index("--participant-label") + 1 :][:2] for command in commands] == [
        ["01", "02"], ["03", "-w"], ["04", "-w"]]  # fmt: skip
    assert all("3dSHORE" in command for command in commands[:2])
    assert "eddy" in commands[2]
    assert "--gpus" in commands[0]
    assert "--gpus" not in commands[1]
    assert "no GPU: none of these steps uses one" in text
    assert "distortion is not corrected" in text
    assert commands[1][commands[1].index("--anat-modality") + 1] == "T2w"
    assert commands[0][commands[0].index("--output-resolution") + 1] == "2"
    for command in commands:
        for option in (word for word in command[command.index("/data") :] if re.match("--?[a-z]", word)):
            assert re.search(rf"^#   {option}\b.*: ", text, re.M), option


def test_mixed_sampling_and_invalid_folders_are_rejected(tmp_path: Path) -> None:
    bids = tmp_path / "bids"
    add_subject(bids, "01", "dsi101")
    add_subject(bids, "01", "multishell")
    setup = ContainerSetup(bids, tmp_path / "out", tmp_path / "work")
    with pytest.raises(InputError, match=r"Cartesian DSI, 101 .*; Multi-shell, .*one command for each"):
        write_command("1.0.1", setup, UserOptions())
    filters = tmp_path / "filter.json"
    filters.write_text('{"dwi": {"acquisition": "dsi101"}}')
    text = write_command("1.0.1", setup, UserOptions(filters=filters))
    assert "3dSHORE" in text
    assert f"{filters}:/filter.json:ro" in text
    with pytest.raises(SettingsError, match="the dataset itself"):
        write_command("1.0.1", ContainerSetup(bids, bids, tmp_path / "work"), UserOptions())
    with pytest.raises(SettingsError, match="inside the dataset"):
        write_command("1.0.1", ContainerSetup(bids, tmp_path / "out", bids / "work"), UserOptions())
    for invalid in (
        UserOptions(iterations=0),
        UserOptions(nprocs=-1),
        UserOptions(omp_nthreads=0),
        UserOptions(resolution=0.0),
    ):
        with pytest.raises(SettingsError, match="must be greater than 0"):
            write_command("1.0.1", setup, replace(invalid, filters=filters))


def test_session_option_has_the_name_of_the_release(
    release: tuple[str, argparse.ArgumentParser], tmp_path: Path
) -> None:
    """For a subject with one DSI session and one shelled session."""
    version, parser = release
    bids = tmp_path / "bids"
    for session, scheme in (("a", "dsi101"), ("b", "multishell")):
        add_subject(bids, "01", scheme, session=session)
    if version == "0.23.0":
        with pytest.raises(SettingsError, match="cannot select sessions"):
            write_command(
                version, ContainerSetup(bids, tmp_path / "out", tmp_path / "work"), UserOptions(sessions=("a",))
            )
        return
    for session, name in (("a", "3dshore"), ("b", "eddy")):
        (command,) = run_recorded(script(version, bids, tmp_path, "--session-label", session), tmp_path)
        parsed = vars(parse(command, parser))
        assert parsed.get("session_id", parsed.get("session_label")) == [session]
        assert name in (parsed.get("hmc_model") or parsed.get("shoreline_model") or parsed["hmc_method"]).lower()


def test_script_is_valid_shell(phantom: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    text = script("26.1.1", phantom, folder)
    assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0
    assert shlex.quote(f"{folder}/out:/out") in text
