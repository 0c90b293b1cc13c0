"""QSIPrep's command for a dataset: what is chosen, and that the release's own parser takes it."""

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
from dsiprep.qsiprep.command import Place, write_command
from dsiprep.qsiprep.option_choices import EDDY, Wishes
from helpers.qsiprep_releases import CHECKED, parser_of, wheel_of
from helpers.shared_data import SHARED

REAL = SHARED / "bids"
SHELLS_ONLY = re.compile(r"eddy|topup", re.IGNORECASE)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DSI phantom as `dsiprep-tools phantom` writes it, with a reversed b=0 and a T1w."""
    coarse = PhantomSettings(scheme="dsi101", resolution=8.0, t1w_resolution=4.0, ideal=False)
    return make_phantom(tmp_path_factory.mktemp("phantom"), coarse) / "bids"


def add_subject(
    root: Path, label: str, scheme: str, directions: str = "AP", anatomy: str = "T1w", session: str = ""
) -> None:
    """A tiny subject with a real b-table; two runs where two directions are given as "AP PA"."""
    root.mkdir(exist_ok=True)
    (root / "dataset_description.json").write_text('{"Name": "tiny", "BIDSVersion": "1.10.0"}')
    folder = root / f"sub-{label}" / (f"ses-{session}" if session else "")
    head = f"sub-{label}_ses-{session}" if session else f"sub-{label}"
    for kind in ("dwi", "anat"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    bvals, bvecs = gradient_table(scheme)
    for direction in directions.split():
        stem = folder / "dwi" / f"{head}_acq-{scheme}_dir-{direction}_dwi"
        image = np.ones((4, 4, 4, len(bvals)), np.int16)
        nib.Nifti1Image(image, np.diag([2.0, 2, 2.5, 1])).to_filename(f"{stem}.nii.gz")
        np.savetxt(f"{stem}.bval", bvals[None], fmt="%g")
        np.savetxt(f"{stem}.bvec", bvecs.T, fmt="%.6f")
        pe = {"PhaseEncodingDirection": "j-" if direction == "AP" else "j", "TotalReadoutTime": 0.05}
        Path(f"{stem}.json").write_text(json.dumps(pe))
    if anatomy:
        image = np.ones((4, 4, 4), np.int16)
        nib.Nifti1Image(image, np.eye(4)).to_filename(folder / "anat" / f"{head}_{anatomy}.nii.gz")


def script(version: str, bids: Path, folder: Path, *options: str) -> str:
    """What the tool prints."""
    said = StringIO()
    with redirect_stdout(said):
        code = main(
            ["qsiprep-command", str(bids), str(folder / "out"), "--version", version, "--nprocs", "4", *options]
        )
    assert code == 0
    return said.getvalue()


def run_it(text: str, folder: Path) -> list[list[str]]:
    """Run a script with recorders in place of Docker and Apptainer: the command lines that reach them."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    record = folder / "record"
    record.unlink(missing_ok=True)
    for name in ("docker", "apptainer"):
        (programs / name).write_text(
            f'#!/bin/sh\nprintf "%s\\0" "$(basename "$0")" "$@" >> {record}\necho >> {record}\n'
        )
        (programs / name).chmod(0o755)
    done = subprocess.run(["sh"], input=text, text=True, capture_output=True, env={"PATH": f"{programs}:/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    return [line.split("\0")[:-1] for line in record.read_text().splitlines()]


def outside(command: list[str]) -> list[str]:
    """QSIPrep's part of a container command, with the machine's paths in place of the container's."""
    mounts = [word for flag, word in pairwise(command) if flag in ("-v", "-B")]
    paths = {inside: path for path, inside in (mount.removesuffix(":ro").split(":") for mount in mounts)}
    words = []
    for word in command[command.index("/data") :]:
        inside = next((place for place in paths if f"{word}/".startswith(f"{place}/")), "")
        words.append(paths.get(inside, "") + word.removeprefix(inside))
    return words


def accepted(command: list[str], parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What a release's own parser makes of the command."""
    return parser.parse_args(outside(command))


@pytest.fixture(scope="module", params=CHECKED)
def release(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, argparse.ArgumentParser]:
    """Each release and its own parser."""
    version = request.param
    return version, parser_of(wheel_of(version, pytestconfig), version, tmp_path_factory.mktemp("release"))


@pytest.mark.parametrize("how", ["", "--gpu", "--gpu --apptainer"])
def test_every_release_takes_its_command_for_dsi(
    how: str, release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path
) -> None:
    version, parser = release
    text = script(version, phantom, tmp_path, "--skip-anat-based-spatial-normalization", *how.split())
    (command,) = run_it(text, tmp_path)
    found = accepted(command, parser)
    assert found.output_resolution == 8.0 and found.nprocs == 4 and found.participant_label == ["01"]
    assert found.skip_anat_based_spatial_normalization and found.work_dir.name == "out_work"
    assert not SHELLS_ONLY.search(" ".join(command[command.index("/data") :])), "never for DSI"
    if version.startswith("26.1"):
        assert (found.hmc_method, found.sdc_method) == ("shoreline", "drbuddi")
        assert (found.shoreline_model, found.hmc_transform, found.shoreline_iters) == ("3dshore", "Rigid", 2)
        assert found.gpu == (["drbuddi"] if how else None)
    else:
        assert (found.hmc_model, found.hmc_transform, found.shoreline_iters) == ("3dSHORE", "Rigid", 2)
        assert found.pepolar_method == "DRBUDDI"
    container = command[: command.index("/data")]
    assert ("--nv" in container) == ("--apptainer" in how) and ("--gpus" in container) == (how == "--gpu")
    patched = bool(how) and not version.startswith("26.1")
    owner = "pennbbl" if version.startswith("0.") else "pennlinc"
    assert (
        container[-1].endswith(("-gpu", "-gpu.sif"))
        if patched
        else container[-1].endswith(f"{owner}/qsiprep:{version}")
    )


@pytest.mark.parametrize("gpu", [False, True])
def test_every_release_takes_its_command_for_shells(
    gpu: bool, release: tuple[str, argparse.ArgumentParser], tmp_path: Path
) -> None:
    if not REAL.is_dir():
        pytest.skip("the real datasets are not beside the project")
    version, parser = release
    text = script(version, REAL, tmp_path, "--participant-label", "xa30", "canon", *(["--gpu"] if gpu else []))
    commands = [accepted(command, parser) for command in run_it(text, tmp_path)]
    by_subject = {found.participant_label[0]: found for found in commands}
    assert set(by_subject) == {"xa30", "canon"}
    assert by_subject["canon"].anat_modality == "none" and by_subject["xa30"].anat_modality == "T1w"
    for found in commands:
        if version.startswith("26.1"):
            assert (found.hmc_method, found.sdc_method) == ("eddy", "topup") and found.gpu == (
                ["eddy"] if gpu else None
            )
        else:
            assert (found.hmc_model, found.pepolar_method) == ("eddy", "TOPUP")
            assert bool(found.eddy_config) == gpu
            assert not gpu or json.loads(Path(found.eddy_config).read_text())["use_cuda"] is True
    assert "eddy_cuda10.2=eddy_cuda11.0" in text if gpu and version == "26.0.0" else "eddy_cuda11.0" not in text


def test_dsiprep_takes_the_same_words(
    release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To move from QSIPrep: its arguments for DSI, as they stand, behind another program's name."""
    version, _ = release
    (command,) = run_it(script(version, phantom, tmp_path, "--skip-anat-based-spatial-normalization"), tmp_path)
    assert run_app([*outside(command), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "SHORELine with 3dSHORE" in said and "up to 2 rounds" in said and "drbuddi: there are opposite" in said


def test_eddy_settings_are_the_releases_own_but_for_cuda(release: tuple[str, argparse.ArgumentParser],
                                                         pytestconfig: pytest.Config) -> None:  # fmt: skip
    version, _ = release
    with zipfile.ZipFile(wheel_of(version, pytestconfig)) as archive:
        own = json.loads(archive.read("qsiprep/data/eddy_params.json"))
    assert {**own, "use_cuda": True} == EDDY | ({"flm": "linear"} if version.startswith("0.") else {})


def test_a_parser_refuses_what_is_of_another_release(
    release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the tests above can fail."""
    version, parser = release
    other = "1.0.1" if version.startswith("26.1") else "26.1.1"
    (command,) = run_it(script(other, phantom, tmp_path), tmp_path)
    with pytest.raises(SystemExit):
        accepted(command, parser)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_tortoise_where_there_is_one(
    release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, parser = release
    options = ["--hmc-method", "tortoise", "--gpu"]
    if not version.startswith("26.1"):
        assert main(["qsiprep-command", str(phantom), str(tmp_path), "--version", version, *options]) == 1
        assert "from 26.1.0 on" in capsys.readouterr().err
        return
    (command,) = run_it(script(version, phantom, tmp_path, *options), tmp_path)
    found = accepted(command, parser)
    assert (found.hmc_method, found.sdc_method, found.gpu) == ("tortoise", "drbuddi", ["diffprep", "drbuddi"])


def test_licence_and_filters(release: tuple[str, argparse.ArgumentParser], phantom: Path, tmp_path: Path) -> None:
    version, parser = release
    for name in ("license.txt", "filter file.json"):
        (tmp_path / name).write_text("{}")
    options = ["--fs-license-file", str(tmp_path / "license.txt")]
    text = script(version, phantom, tmp_path, *options)
    found = accepted(run_it(text, tmp_path)[0], parser)
    has = not version.startswith("26.1")
    assert has == (vars(found).get("fs_license_file") == tmp_path / "license.txt") and has == ("license.txt" in text)
    (command,) = run_it(
        script(version, phantom, tmp_path, "--bids-filter-file", str(tmp_path / "filter file.json")), tmp_path
    )
    assert f"{tmp_path}/filter file.json:/filter.json:ro" in command, "a path with a space stays one word"
    assert accepted(command, parser).bids_filters == {}


def test_reasons_and_groups(tmp_path: Path) -> None:
    """Subjects that the same options suit share a command; every option has its reason."""
    bids = tmp_path / "bids"
    add_subject(bids, "01", "dsi101", "AP PA")
    add_subject(bids, "02", "dsi101", "AP PA")
    add_subject(bids, "03", "hasc55", "AP", anatomy="T2w")
    add_subject(bids, "04", "multishell", "AP", anatomy="")
    text = script("1.0.1", bids, tmp_path, "--gpu")
    commands = run_it(text, tmp_path)
    assert [command[command.index("--participant-label") + 1 :][:2] for command in commands] == [
        ["01", "02"], ["03", "-w"], ["04", "-w"]]  # fmt: skip
    assert all("3dSHORE" in command for command in commands[:2]) and "eddy" in commands[2]
    assert "--gpus" in commands[0] and "--gpus" not in commands[1], "nothing to correct with DRBUDDI"
    assert "no GPU: none of these steps uses one" in text and "distortion stays" in text
    assert commands[1][commands[1].index("--anat-modality") + 1] == "T2w"
    assert commands[0][commands[0].index("--output-resolution") + 1] == "2", "the smallest edge"
    for command in commands:
        for option in (word for word in command[command.index("/data") :] if re.match("--?[a-z]", word)):
            assert re.search(rf"^#   {option}\b.*: ", text, re.M), option


def test_what_cannot_be_run_at_once(tmp_path: Path) -> None:
    bids = tmp_path / "bids"
    add_subject(bids, "01", "dsi101")
    add_subject(bids, "01", "multishell")
    place = Place(bids, tmp_path / "out", tmp_path / "work")
    with pytest.raises(InputError, match=r"Cartesian DSI, 101 .*; Multi-shell, .*ask once for each"):
        write_command("1.0.1", place, Wishes())
    chosen = tmp_path / "filter.json"
    chosen.write_text('{"dwi": {"acquisition": "dsi101"}}')
    text = write_command("1.0.1", place, Wishes(filters=chosen))
    assert "3dSHORE" in text and f"{chosen}:/filter.json:ro" in text
    with pytest.raises(SettingsError, match="the dataset itself"):
        write_command("1.0.1", Place(bids, bids, tmp_path / "work"), Wishes())
    with pytest.raises(SettingsError, match="inside the dataset"):
        write_command("1.0.1", Place(bids, tmp_path / "out", bids / "work"), Wishes())
    for wrong in (Wishes(iterations=0), Wishes(nprocs=-1), Wishes(omp_nthreads=0), Wishes(resolution=0.0)):
        with pytest.raises(SettingsError, match="more than 0 is wanted"):
            write_command("1.0.1", place, replace(wrong, filters=chosen))


def test_sessions_are_chosen_in_each_releases_words(
    release: tuple[str, argparse.ArgumentParser], tmp_path: Path
) -> None:
    """One session is DSI, the other is of shells, so each is asked for by itself."""
    version, parser = release
    bids = tmp_path / "bids"
    for session, scheme in (("a", "dsi101"), ("b", "multishell")):
        add_subject(bids, "01", scheme, session=session)
    if version == "0.23.0":
        with pytest.raises(SettingsError, match="cannot choose sessions"):
            write_command(version, Place(bids, tmp_path / "out", tmp_path / "work"), Wishes(sessions=("a",)))
        return
    for session, name in (("a", "3dshore"), ("b", "eddy")):
        (command,) = run_it(script(version, bids, tmp_path, "--session-label", session), tmp_path)
        found = vars(accepted(command, parser))
        assert found.get("session_id", found.get("session_label")) == [session]
        assert name in (found.get("hmc_model") or found.get("shoreline_model") or found["hmc_method"]).lower()


def test_the_script_is_valid_shell(phantom: Path, tmp_path: Path) -> None:
    odd = tmp_path / "it's a folder"
    odd.mkdir()
    text = script("26.1.1", phantom, odd)
    assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0
    assert shlex.quote(f"{odd}/out:/out") in text
