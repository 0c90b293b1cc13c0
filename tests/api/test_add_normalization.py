"""Adding template transforms to a run without normalisation: by registration, or from a SynthMorph warp."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from dsiprep.api import add_normalization as module
from dsiprep.api.add_normalization import add_normalization
from dsiprep.cli import tools
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError, OutputError, SettingsError
from dsiprep.io.nifti import write_image
from helpers.template_subject import GRID, NAME, make_subject, make_template, subject_to_template, template_to_subject

XFM_NAMES = ("from-ACPC_to-{}_mode-image_xfm.h5", "from-{}_to-ACPC_mode-image_xfm.h5")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QSIPrep output folder without template transforms; the template is coarse to keep the tests fast."""
    monkeypatch.setattr(module, "load_template", lambda *name: make_template())
    anat = tmp_path / "qsiprep" / "sub-01" / "anat"
    anat.mkdir(parents=True)
    brain, mask = make_subject()
    write_image(anat / "sub-01_space-ACPC_desc-preproc_T1w.nii.gz", brain.data, GRID)
    write_image(anat / "sub-01_space-ACPC_desc-brain_mask.nii.gz", mask.data, GRID, discrete=True)
    return tmp_path / "qsiprep"


def synthmorph_warp(path: Path) -> Path:
    """Warp from subject to template at 5 mm in SynthMorph's format: RAS displacements, four axes, no intent code."""
    grid = make_template().brain.grid
    points = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    nib.Nifti1Image((template_to_subject(points) - points).astype(np.float32), grid.affine).to_filename(path)
    return path


def errors(run: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm to the true forward and inverse points in the brain, with the files applied by ITK."""
    files = [run / "sub-01" / "anat" / f"sub-01_{pattern.format(name)}" for pattern in XFM_NAMES]
    forward, inverse = (sitk.ReadTransform(str(path)) for path in files)
    template = make_template()
    inside = template.brain.grid.to_world(np.argwhere(template.mask.numpy() > 0)[::25])
    flip = np.array([-1.0, -1, 1])

    def through(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
        return np.array([transform.TransformPoint((p * flip).tolist()) for p in points]) * flip

    forward_errors = np.linalg.norm(through(forward, inside) - template_to_subject(inside), axis=1)
    return forward_errors, np.linalg.norm(through(inverse, template_to_subject(inside)) - inside, axis=1)


def listing(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "sub-01" / "anat").iterdir())


def test_registration_writes_both_transforms_and_never_overwrites(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tools.main(["add-normalization", str(run), "--participant-label", "01", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    assert listing(run)[:2] == [f"sub-01_{XFM_NAMES[0].format(NAME)}", f"sub-01_{XFM_NAMES[1].format(NAME)}"]
    assert len(listing(run)) == 4
    assert "0.9" in output
    assert "templateflow get MNI152NLin2009cAsym" in output
    forward_errors, inverse_errors = errors(run, NAME)
    assert forward_errors.mean() < 1.25  # mm, a quarter of a voxel
    assert inverse_errors.mean() < 1.25
    before = {path: path.read_bytes() for path in (run / "sub-01" / "anat").iterdir()}
    assert tools.main(["add-normalization", str(run), "--participant-label", "sub-01"]) == 1
    assert "existing files are not overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (run / "sub-01" / "anat").iterdir()} == before


@pytest.mark.parametrize("with_inverse", [False, True])
def test_synthmorph_warp_is_written_under_the_given_template_name(run: Path, with_inverse: bool) -> None:
    warp, inverse = synthmorph_warp(run / "warp.nii.gz"), None
    if with_inverse:
        points = GRID.to_world(np.moveaxis(np.indices(GRID.shape), 0, -1))
        inverse = run / "inverse.nii.gz"
        nib.Nifti1Image((subject_to_template(points) - points).astype(np.float32), GRID.affine).to_filename(inverse)
    added = add_normalization(run, "01", warp=warp, inverse_warp=inverse, template="MNI152NLin2009cAsym")
    assert [path.name for path in added.files] == [f"sub-01_{name.format('MNI152NLin2009cAsym')}" for name in XFM_NAMES]
    forward_errors, inverse_errors = errors(run, "MNI152NLin2009cAsym")
    assert forward_errors.max() < 0.15
    assert inverse_errors.max() < 0.15
    assert len(added.notes) == 1
    assert "Dice of 0.9" in added.notes[0]


def test_unnamed_or_wrong_warp_is_rejected(run: Path) -> None:
    warp = synthmorph_warp(run / "warp.nii.gz")
    with pytest.raises(SettingsError, match="does not store the name of its template"):
        add_normalization(run, "01", warp=warp)
    with pytest.raises(SettingsError, match="--inverse-warp requires --warp"):
        add_normalization(run, "01", inverse_warp=warp)
    grid = make_template().brain.grid
    shift = DisplacementField(torch.full((3, *grid.shape), 40.0), grid)
    nib.Nifti1Image(np.moveaxis(shift.data.numpy(), 0, -1), grid.affine).to_filename(warp)
    with pytest.raises(InputError, match=r"Dice of only 0\.\d+"):
        add_normalization(run, "01", warp=warp, template="MNI152NLin2009cAsym")
    assert len(listing(run)) == 2


def test_error_names_the_missing_input(run: Path) -> None:
    anat = run / "sub-01" / "anat"
    with pytest.raises(InputError, match="contains no folder sub-02"):
        add_normalization(run, "02")
    (anat / "sub-01_space-ACPC_desc-brain_mask.nii.gz").rename(run / "mask.nii.gz")
    with pytest.raises(InputError, match=r"desc-brain_mask\.nii\.gz does not exist"):
        add_normalization(run, "01")
    shutil.move(anat / "sub-01_space-ACPC_desc-preproc_T1w.nii.gz", anat / "sub-01_desc-preproc_T1w.nii.gz")
    with pytest.raises(
        InputError, match=r"no anat/sub-01_space-ACPC_desc-preproc_T1w\.nii\.gz; expected a run of QSIPrep 1\.0"
    ):
        add_normalization(run, "01")


def test_unwritable_folder_is_reported(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**arguments: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match="Permission denied; the folder must be writable"):
        add_normalization(run, "01", warp=synthmorph_warp(run / "warp.nii.gz"), template="MNI152NLin2009cAsym")
