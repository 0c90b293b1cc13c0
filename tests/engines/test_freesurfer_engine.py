"""FreeSurfer as an engine, with fake programs that produce files in FreeSurfer's conventions.

The subject is the packaged template deformed by a known map, so that masks, labels and warps are known.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.cli import app as cli
from dsiprep.data.acquisition import Unit
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.template import Template
from dsiprep.data.transform import DisplacementField
from dsiprep.engines import external_programs as programs
from dsiprep.engines import freesurfer
from dsiprep.engines.selection import check_engines, engines_for
from dsiprep.errors import EngineError
from dsiprep.io.freesurfer import write_warp
from dsiprep.ops.image.displacement_field import chain_points
from dsiprep.settings import AnatomySettings, Settings
from helpers.recorder import Recorder
from helpers.template_subject import GRID, make_template, subject_to_template, template_to_subject

CPU = torch.device("cpu")
CONFORMED = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # FreeSurfer's axes: L, I, A
HELP = {
    "7.4": "-m, --model MODEL  Transformation model ('deform', 'affine', 'rigid'). -t, --trans TRANS",
    "8": "-m model  Transformation model (joint, deform, affine, rigid). -t trans  -T trans",
}


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    home = tmp_path / "freesurfer"
    monkeypatch.setenv("FREESURFER_HOME", str(home))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(programs, "free_bytes", lambda device: 64e9)
    recorder = Recorder(home)
    (home / "build-stamp.txt").write_text("freesurfer-linux-ubuntu22_x86_64-8.1.0-20250718-f30dfed\n")
    (home / "license.txt").write_text("someone@example.org\n12345\n")
    monkeypatch.delenv("FS_LICENSE", raising=False)
    return recorder


def oblique_image() -> Volume:
    """A random image on an oblique grid, so that swapped axes are detected."""
    affine = np.array([[-3.0, 0.2, 0, 30], [0.2, -3.0, 0.3, 35], [0, 0.3, 3.2, -40], [0, 0, 0, 1]])
    data = torch.from_numpy(np.random.default_rng(0).random((20, 24, 22), np.float32))
    return Volume(data, Grid((20, 24, 22), affine))


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> Path:
    nib.Nifti1Image(data, affine).to_filename(path)
    return path


def test_brain_mask_by_synthstrip(recorder: Recorder, tmp_path: Path) -> None:
    image = oblique_image()
    truth = image.numpy() > 0.5
    mask = save(tmp_path / "output.nii.gz", truth.astype(np.uint8), image.grid.affine)
    recorder.program("mri_synthstrip", {"-m": mask})
    found = freesurfer.brain_mask(image)
    assert recorder.command_lines() == [["mri_synthstrip", "-i", "image.nii.gz", "-m", "mask.nii.gz"]]
    assert np.array_equal(found.numpy(), truth.astype(np.float32))
    assert found.grid is image.grid


@pytest.mark.parametrize("modes", [{}, {"robust": True, "parc": True}])
def test_tissue_and_labels_by_synthseg(modes: dict[str, bool], recorder: Recorder, tmp_path: Path) -> None:
    """SynthSeg writes labels at 1 mm with different axes; the orientation must be preserved."""
    image = oblique_image()
    inside = Volume(torch.ones(image.grid.shape), image.grid)
    affine = CONFORMED.copy()
    shape = np.array([80, 90, 90])
    affine[:3, 3] = image.grid.centre - affine[:3, :3] @ ((shape - 1) / 2)
    world = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3] - image.grid.centre
    labels = np.zeros(shape, np.int32)  # left: white matter in front, cortex behind; right: ventricle above
    labels[(world[..., 0] < 0) & (world[..., 1] > 0)] = 2
    labels[(world[..., 0] < 0) & (world[..., 1] <= 0)] = 1024 if modes else 3
    labels[(world[..., 0] >= 0) & (world[..., 2] > 0)] = 43
    recorder.program("mri_synthseg", {"--o": save(tmp_path / "output.nii.gz", labels, affine)})
    tissue, found = freesurfer.segment(image, inside, None, **modes)
    options = ["--robust", "--parc"] if modes else []
    threads = str(torch.get_num_threads())
    command_line = [
        "mri_synthseg",
        "--i",
        "image.nii.gz",
        "--o",
        "labels.nii.gz",
        "--threads",
        threads,
        *options,
        "--cpu",
    ]
    assert recorder.command_lines() == [command_line]
    assert torch.allclose(tissue.sum(0), torch.ones(image.grid.shape), atol=1e-5)
    position = image.grid.to_world(np.moveaxis(np.indices(image.grid.shape), 0, -1)) - image.grid.centre
    away_from_borders = (np.abs(position) > 2).all(-1)
    left, front = position[..., 0] < 0, position[..., 1] > 0
    for number, where in ((2, left & front), (1, left & ~front), (0, ~left)):  # background in the mask is CSF
        assert (tissue[number].numpy()[where & away_from_borders] > 0.99).all()
    parcel = found.numpy()[away_from_borders & left & ~front]
    assert (parcel == (1024 if modes else 3)).all()
    assert set(np.unique(found.numpy())) <= {0, 2, 3, 43, 1024}


def displacement(grid: Grid, function: object) -> DisplacementField:
    points = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    u = function(points) - points  # type: ignore[operator]
    return DisplacementField(torch.from_numpy(np.moveaxis(u, -1, 0).astype(np.float32)), grid)


def write_warp_7_4(path: Path, field: DisplacementField) -> Path:
    """Write a warp like SynthMorph of FreeSurfer 7.4: four axes, no intent code, RAS displacements."""
    return save(path, np.moveaxis(field.data.numpy(), 0, -1), field.grid.affine)


@pytest.mark.parametrize("release", list(HELP))
def test_normalisation_by_synthmorph(release: str, recorder: Recorder, tmp_path: Path) -> None:
    template, grid = make_template(), GRID
    brain = Volume(torch.zeros(grid.shape), grid)
    there, back = displacement(template.brain.grid, template_to_subject), displacement(grid, subject_to_template)
    if release == "8":
        write_warp(tmp_path / "t.nii.gz", there, grid)
        write_warp(tmp_path / "T.nii.gz", back, template.brain.grid)
        files = {"-t": tmp_path / "t.nii.gz", "-T": tmp_path / "T.nii.gz"}
    else:
        files = {"-t": write_warp_7_4(tmp_path / "t.nii.gz", there)}
    recorder.program("mri_synthmorph", files, output=HELP[release])
    forward, inverse = freesurfer.normalise(brain, template, template.mask, np.eye(4), AnatomySettings())
    threads = str(torch.get_num_threads())
    common = ["-j", threads, "moving.nii.gz", "fixed.nii.gz"]
    assert recorder.command_lines() == [
        ["mri_synthmorph", "register", "-h"],
        *(
            [["mri_synthmorph", "-m", "joint", "-t", "forward.nii.gz", "-T", "back.nii.gz", *common]]
            if release == "8"
            else [
                ["mri_synthmorph", "-m", "affine", "-t", "affine.txt", *common],
                ["mri_synthmorph", "-m", "deform", "-i", "affine.txt", "-t", "forward.nii.gz", *common],
            ]
        ),
    ]
    inside = template.brain.grid.to_world(np.argwhere(template.mask.numpy() > 0)[::40])
    assert np.abs(chain_points(forward, inside) - template_to_subject(inside)).max() < 0.1
    subject_points = template_to_subject(inside)
    assert np.abs(chain_points(inverse, subject_points) - inside).max() < 0.1
    assert (forward.source, forward.target, inverse.target) == ("ACPC", template.name, "ACPC")


def test_gpu_options_are_passed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested without a GPU: only the command lines are checked."""
    image = oblique_image()
    commands: list[list[str]] = []

    def stop(program: str, arguments: list[object], directory: object, device: torch.device) -> None:
        commands.append([program, *map(str, arguments)])
        raise EngineError("stopped")

    monkeypatch.setattr(freesurfer, "_run", stop)
    monkeypatch.setattr(freesurfer, "_has_joint_model", lambda directory: True)
    monkeypatch.setattr(freesurfer, "write_image", lambda *image: None)
    gpu_image = Volume(image.data.to("meta"), image.grid)
    monkeypatch.setattr(freesurfer, "on_gpu", lambda volume: volume.data.device.type == "meta")
    for call in (
        lambda: freesurfer.brain_mask(gpu_image),
        lambda: freesurfer.segment(gpu_image, image, None),
        lambda: freesurfer.normalise(gpu_image, Template("t", image, image, image.data[None], "test"), image, np.eye(4),
                                     AnatomySettings()),
    ):  # fmt: skip
        with pytest.raises(EngineError, match="stopped"):
            call()
    assert "-g" in commands[0]
    assert "--cpu" not in commands[1]
    assert "-g" in commands[2]


def test_failures_are_explained(recorder: Recorder) -> None:
    recorder.program("mri_synthstrip", status=1, output="torch.cuda.OutOfMemoryError: CUDA out of memory.")
    with pytest.raises(EngineError, match="mri_synthstrip ended with exit status 1: the GPU ran out of memory"):
        freesurfer.brain_mask(oblique_image())
    recorder.program("mri_synthstrip")
    with pytest.raises(EngineError, match=r"finished, but its output cannot be read: .*no such file"):
        freesurfer.brain_mask(oblique_image())


def settings(**changes: object) -> Settings:
    return Settings(anatomy=replace(AnatomySettings(), **changes))  # type: ignore[arg-type]


def unit() -> Unit:
    return Unit("01", None, "sub-01", (), t1w=(Path("sub-01_T1w.nii.gz"),))


def test_program_licence_and_memory_are_checked_in_advance(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    freesurfer_settings = settings(engine="freesurfer")
    with pytest.raises(EngineError, match=r"--anat-engine freesurfer: mri_synthstrip of FreeSurfer .*FREESURFER_HOME"):
        check_engines(unit(), freesurfer_settings, CPU)
    recorder.program("mri_synthstrip")
    recorder.program("mri_synthseg")
    with pytest.raises(EngineError, match="--normalization-engine synthmorph: mri_synthmorph"):
        check_engines(unit(), freesurfer_settings, CPU)
    check_engines(unit(), settings(engine="freesurfer", normalization="native"), CPU)
    recorder.program("mri_synthmorph")
    check_engines(unit(), freesurfer_settings, CPU)
    licence = recorder.folder / "license.txt"
    licence.unlink()
    with pytest.raises(EngineError, match=r"licence is not in .*license.txt; get one for free"):
        check_engines(unit(), freesurfer_settings, CPU)
    (tmp_path / "mine.txt").write_text("someone@example.org\n")
    monkeypatch.setenv("FS_LICENSE", str(tmp_path / "mine.txt"))
    check_engines(unit(), freesurfer_settings, CPU)
    monkeypatch.setattr(programs, "free_bytes", lambda device: 14e9)
    check_engines(unit(), settings(engine="freesurfer", normalize=False), CPU)
    with pytest.raises(EngineError, match=r"mri_synthmorph needs about 16 GB of memory, and 14\.0 GB are free"):
        check_engines(unit(), freesurfer_settings, CPU)
    with pytest.raises(EngineError, match="mri_synthseg needs about 18 GB"):
        check_engines(unit(), settings(engine="freesurfer", synthseg_robust=True), CPU)
    monkeypatch.delenv("FREESURFER_HOME")
    with pytest.raises(EngineError, match="FREESURFER_HOME is not set"):
        check_engines(unit(), freesurfer_settings, CPU)


def test_only_required_engines_are_selected() -> None:
    everything = replace(settings(engine="freesurfer", normalization="ants"), distortion=replace(
        Settings().distortion, engine="tortoise"))  # fmt: skip
    assert engines_for(unit(), everything) == ("freesurfer", "ants")  # without opposite phase encodings
    assert engines_for(replace(unit(), t1w=()), everything) == ()
    assert engines_for(unit(), Settings()) == ()
    assert AnatomySettings().normalizer == "native"
    assert replace(AnatomySettings(), engine="freesurfer").normalizer == "synthmorph"
    assert replace(AnatomySettings(), engine="freesurfer", normalize=False).normalizer == "none"


def test_version_is_read_from_the_stamp(recorder: Recorder) -> None:
    assert freesurfer.version() == "FreeSurfer 8.1.0"


def test_licence_file_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FS_LICENSE", "elsewhere")
    (tmp_path / "bids").mkdir()
    arguments = [str(tmp_path / "bids"), str(tmp_path / "out"), "participant", "--output-resolution", "2", "--dry-run"]
    options = ["--skip-bids-validation", "--work-dir", str(tmp_path / "work")]
    cli.main([*arguments, *options, "--fs-license-file", str(tmp_path / "mine.txt")])
    assert os.environ["FS_LICENSE"] == str(tmp_path / "mine.txt")
