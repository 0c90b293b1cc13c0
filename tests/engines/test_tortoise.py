"""DRBUDDI as an engine, replaced by a fake program that produces fields in the format of TORTOISE.

The fields are the ground truth of `helpers.epi_pair`, on a grid like that of DRBUDDI (finer, wider, axes reoriented to
LPS), written by SimpleITK, which wraps the library that TORTOISE uses.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from scipy.spatial.transform import Rotation

from dsiprep.data.acquisition import Run, Unit
from dsiprep.data.results import Blip, Distortion
from dsiprep.engines import external_programs as programs
from dsiprep.engines import tortoise
from dsiprep.errors import EngineError, SettingsError
from dsiprep.io.nifti import to_lps
from dsiprep.settings import DistortionSettings, Settings
from helpers.epi_pair import Case, correlation, field_mm, make_grid, rigid
from helpers.recorder import Recorder

AMPLITUDE = 6.0  # mm, the default of `Case`
RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


def undistorted_displacement(case: Case, points: np.ndarray, blip: int) -> np.ndarray:
    """True displacement of a blip at world points of the undistorted head (..., 3), mm RAS+."""
    unit = case.grid.directions[:, case.axis]
    polarity_axis = unit * np.sign(unit.sum())
    return case.scales[blip] * field_mm(points, polarity_axis, AMPLITUDE)[..., None] * unit


def write_truth(case: Case, folder: Path) -> dict[str, Path]:
    """Write FINV, MINV and the rigid transform of a case in the format of DRBUDDI."""
    _, reoriented = to_lps(np.zeros(case.grid.shape, bool), case.grid)
    fine = reoriented.at_spacing((1.7, 1.6, 2.1))
    pad = np.array([8, 8, 0])
    world = fine.to_world(np.moveaxis(np.indices(np.array(fine.shape) + 2 * pad), 0, -1) - pad)
    rotation = case.pose[:3, :3]
    files = {}
    for blip, name in enumerate((tortoise.UP, tortoise.DOWN)):
        u = undistorted_displacement(case, world, blip)
        if blip == 1:  # before the rigid transform: R (x + m) = R x + u
            u = u @ rotation
        image = sitk.GetImageFromArray((u * RAS_TO_LPS).transpose(2, 1, 0, 3).astype(np.float32), isVector=True)
        image.SetOrigin((world[0, 0, 0] * RAS_TO_LPS).tolist())
        image.SetSpacing(fine.voxel_sizes.tolist())
        image.SetDirection((RAS_TO_LPS[:, None] * fine.directions).ravel().tolist())
        files[name] = folder / name
        sitk.WriteImage(image, str(files[name]))
    euler = sitk.Euler3DTransform()
    lps_pose = np.diag([*RAS_TO_LPS, 1]) @ case.pose @ np.diag([*RAS_TO_LPS, 1])
    centre = np.array([11.0, -7.0, 5.0])
    euler.SetCenter(centre.tolist())
    z, x, y = (float(angle) for angle in Rotation.from_matrix(lps_pose[:3, :3]).as_euler("ZXY"))
    euler.SetRotation(x, y, z)
    euler.SetTranslation((lps_pose[:3, :3] @ centre + lps_pose[:3, 3] - centre).tolist())
    assert np.allclose(np.array(euler.GetMatrix()).reshape(3, 3), lps_pose[:3, :3], atol=1e-9)
    files[tortoise.RIGID] = folder / tortoise.RIGID
    sitk.WriteTransform(euler, str(files[tortoise.RIGID]))
    return files


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setenv("TORTOISE_HOME", str(tmp_path / "tortoise"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return Recorder(tmp_path / "tortoise")


def correct(case: Case, folder: Path | None = None) -> Distortion:
    return tortoise.correct_distortion(
        case.blips, case.images, case.grid, case.mask, DistortionSettings(), folder=folder
    )


CASES = {
    "RAS j": ("RAS", 1, 1, 0.0),
    "LAS j-": ("LAS", 1, -1, 0.0),
    "LPS i": ("LPS", 0, 1, 0.0),
    "PSR j": ("PSR", 1, 1, 0.0),
    "oblique j-": ("LAS", 1, -1, 15.0),
}


@pytest.mark.parametrize("name", list(CASES))
def test_drbuddi_output_is_converted_to_dsiprep_conventions(name: str, recorder: Recorder, tmp_path: Path) -> None:
    codes, axis, first, tilt = CASES[name]
    pose = rigid((7.0, -5.0, 9.0), np.array([1.0, -0.5, 1.5]))  # large, so that its effect on displacements is visible
    case = Case(make_grid(codes, tilt, (5.0, 5.0, 5.0)), axis, first, pose=pose)
    recorder.program("DRBUDDI", write_truth(case, tmp_path))
    result = correct(case)
    assert result.method == "tortoise"
    assert case.errors(result).max() < 0.05  # DRBUDDI's displacement rotates with the head; dsiprep's stays on its axis
    signed = np.einsum("c,cijk->ijk", case.grid.directions[:, axis], result.fields[0].data.numpy())[case.brain]
    assert np.corrcoef(signed, case.scales[0] * case.field[case.brain])[0, 1] > 0.999
    assert np.allclose(result.fields[1].data, -result.fields[0].data)
    assert np.allclose(result.poses, np.stack([np.eye(4), pose]), atol=1e-6)
    for image in (*result.after, result.dwiref):
        assert correlation(image.numpy(), case.truth, case.brain) > 0.975
    assert result.fieldmap_hz is not None
    expected = case.field / (case.grid.voxel_sizes[axis] * 0.05)
    assert np.abs(result.fieldmap_hz.numpy() - expected)[case.brain].max() < 0.3  # Hz, of 25


def test_command_line_and_input_files_match_what_drbuddi_expects(recorder: Recorder, tmp_path: Path) -> None:
    case = Case(make_grid("PSR", sizes=(6.0, 6.0, 6.0)), 1, 1)
    recorder.program("DRBUDDI", write_truth(case, tmp_path))
    correct(case)
    assert recorder.command_lines() == [
        ["DRBUDDI", "-u", "up.nii", "-d", "down.nii", "--up_json", "up.json", "--enforce_full_symmetry", "1"]
    ]
    call = recorder.calls()[0]
    assert str(call["arguments"][1]).startswith(str(call["cwd"]))  # type: ignore[index]
    assert call["environment"]["OMP_NUM_THREADS"] == str(torch.get_num_threads())  # type: ignore[index]
    assert not Path(str(call["cwd"])).exists()
    up = nib.load(recorder.folder / "got-up.nii")
    assert nib.aff2axcodes(up.affine) == ("L", "P", "S")
    assert up.ndim == 3
    assert np.isclose(np.asarray(up.dataobj).sum(), float(case.images[0].sum()), rtol=1e-5)
    # j of a file with axes P, S, R is S, the third axis of LPS+
    assert json.loads((recorder.folder / "got-up.json").read_text()) == {"PhaseEncodingDirection": "k"}
    for name in ("up", "down"):
        assert np.loadtxt(recorder.folder / f"got-{name}.bmtxt", ndmin=2).shape == (1, 6)


def test_version_is_read_from_the_installation(recorder: Recorder) -> None:
    recorder.program("DRBUDDI")
    assert tortoise.version() == "TORTOISE of unknown version"
    (recorder.folder / "settings").mkdir()
    (recorder.folder / "settings" / "version.txt").write_text("TORTOISE V4.2.0\n")
    assert tortoise.version() == "TORTOISE V4.2.0"


GPU_FAILURES = {
    "CUDA Runtime Error: too many resources requested for launch": "too few registers",
    "cudaMalloc: out of memory": "GPU ran out of memory",
}


@pytest.fixture(scope="module")
def small() -> Case:
    return Case(make_grid("RAS", sizes=(6.0, 6.0, 6.0)), 1, 1)


@pytest.mark.parametrize("message", list(GPU_FAILURES))
def test_cpu_program_runs_after_a_gpu_failure(
    message: str, small: Case, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tortoise, "on_gpu", lambda images: True)
    recorder.program("DRBUDDI_cuda", status=1, output=f"stage 25\n{message}")
    recorder.program("DRBUDDI", write_truth(small, tmp_path))
    result = correct(small, tmp_path / "work")
    assert [call["name"] for call in recorder.calls()] == ["DRBUDDI_cuda", "DRBUDDI"]
    assert result.method == "tortoise"
    assert "DRBUDDI_cuda ended with exit status 1" in result.notes[0]
    assert GPU_FAILURES[message] in result.notes[0]
    assert "DRBUDDI of TORTOISE" in result.notes[1]
    log = tmp_path / "work" / "DRBUDDI_cuda.log"
    assert str(log) in result.notes[0]
    assert message in log.read_text()
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["DRBUDDI.log", "DRBUDDI_cuda.log"]


def test_native_stage_runs_if_both_programs_fail(
    small: Case, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tortoise, "on_gpu", lambda images: True)
    recorder.program("DRBUDDI_cuda", status=1, output="out of memory")
    recorder.program("DRBUDDI", status=139, output="segmentation fault")
    result = correct(small)
    assert result.method == "drbuddi"
    assert small.errors(result).mean() < 1
    assert "DRBUDDI_cuda ended" in result.notes[0]
    assert "DRBUDDI ended with exit status 139" in result.notes[1]
    assert "segmentation fault" in result.notes[1]
    assert "native stage was used instead" in result.notes[2]


def test_missing_output_counts_as_failure(small: Case, recorder: Recorder) -> None:
    recorder.program("DRBUDDI")
    result = correct(small)
    assert result.method == "drbuddi"
    assert "output cannot be read" in result.notes[0]


def test_native_stage_runs_for_unequal_readout_times(recorder: Recorder) -> None:
    recorder.program("DRBUDDI")
    case = Case(make_grid("RAS", sizes=(6.0, 6.0, 6.0)), 1, 1, readouts=(0.05, 0.07))
    result = correct(case)
    assert result.method == "drbuddi"
    assert "readout times" in result.notes[0]
    assert not recorder.calls()


def test_invalid_pairs_are_rejected_like_in_the_native_stage(small: Case, recorder: Recorder) -> None:
    first: Blip = small.blips[0]
    with pytest.raises(SettingsError, match="not opposite"):
        tortoise.correct_distortion((first, first), small.images, small.grid, small.mask, DistortionSettings())


def test_check_reports_a_missing_program_and_insufficient_memory(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "sub-01_dwi.nii.gz"
    nib.Nifti1Image(np.zeros((100, 100, 60, 2), np.int16), np.diag([2.0, 2, 2, 1])).to_filename(image)
    unit = Unit("01", None, "sub-01", (Run(image, image, image, None),))
    cpu = torch.device("cpu")
    with pytest.raises(EngineError, match=r"--sdc-engine tortoise: DRBUDDI of TORTOISE V4 .*TORTOISE_HOME"):
        tortoise.check(unit, Settings(), cpu)
    recorder.program("DRBUDDI")
    tortoise.check(unit, Settings(), cpu)
    monkeypatch.setattr(programs, "free_bytes", lambda device: 2e9)
    # 2 mm divided by 1.3 three times is 0.91 mm, so 200 x 200 x 120 mm are 6.3 million voxels
    with pytest.raises(EngineError, match=r"on 6 million voxels needs about 3 GB of memory, and 2\.0 GB are free"):
        tortoise.check(unit, Settings(), cpu)
