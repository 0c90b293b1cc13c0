"""A finished run without normalisation gets its transforms: natively, or from a warp of SynthMorph."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from dsiprep.cli import tools
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError, OutputError, SettingsError
from dsiprep.io.nifti import write_image
from dsiprep.standalone import add_normalization as finish
from dsiprep.standalone.add_normalization import add_normalization
from helpers.template_person import GRID, NAME, bend, make_person, make_template, unbend

WAYS = ("from-ACPC_to-{}_mode-image_xfm.h5", "from-{}_to-ACPC_mode-image_xfm.h5")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QSIPrep folder whose subject has no transforms to a template; templates are coarse, so that this is quick."""
    monkeypatch.setattr(finish, "load_template", lambda *name: make_template())
    anat = tmp_path / "qsiprep" / "sub-01" / "anat"
    anat.mkdir(parents=True)
    brain, mask = make_person()
    write_image(anat / "sub-01_space-ACPC_desc-preproc_T1w.nii.gz", brain.data, GRID)
    write_image(anat / "sub-01_space-ACPC_desc-brain_mask.nii.gz", mask.data, GRID, discrete=True)
    return tmp_path / "qsiprep"


def synthmorph_warp(path: Path) -> Path:
    """From the person to the template at 5 mm, as SynthMorph writes it: RAS displacements, four axes, no intent."""
    grid = make_template().brain.grid
    points = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1))
    nib.Nifti1Image((bend(points) - points).astype(np.float32), grid.affine).to_filename(path)
    return path


def errors(run: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Distance in mm from the truth at points of the brain, template to person and back, as ITK reads the files."""
    files = [run / "sub-01" / "anat" / f"sub-01_{way.format(name)}" for way in WAYS]
    forward, back = (sitk.ReadTransform(str(path)) for path in files)
    template = make_template()
    inside = template.brain.grid.to_world(np.argwhere(template.mask.numpy() > 0)[::25])
    flip = np.array([-1.0, -1, 1])

    def through(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
        return np.array([transform.TransformPoint((p * flip).tolist()) for p in points]) * flip

    there = np.linalg.norm(through(forward, inside) - bend(inside), axis=1)
    return there, np.linalg.norm(through(back, bend(inside)) - inside, axis=1)


def listing(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "sub-01" / "anat").iterdir())


def test_own_registration_makes_both_transforms(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tools.main(["add-normalization", str(run), "--participant-label", "01", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert listing(run)[:2] == [f"sub-01_{WAYS[0].format(NAME)}", f"sub-01_{WAYS[1].format(NAME)}"]
    assert len(listing(run)) == 4 and "0.9" in said and "templateflow get MNI152NLin2009cAsym" in said
    there, back = errors(run, NAME)
    assert there.mean() < 1.25 and back.mean() < 1.25  # mm, a quarter of a voxel
    before = {path: path.read_bytes() for path in (run / "sub-01" / "anat").iterdir()}
    assert tools.main(["add-normalization", str(run), "--participant-label", "sub-01"]) == 1
    assert "which are not overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (run / "sub-01" / "anat").iterdir()} == before


@pytest.mark.parametrize("with_inverse", [False, True])
def test_a_warp_of_synthmorph_is_taken_under_the_name_that_is_given(run: Path, with_inverse: bool) -> None:
    warp, inverse = synthmorph_warp(run / "warp.nii.gz"), None
    if with_inverse:
        points = GRID.to_world(np.moveaxis(np.indices(GRID.shape), 0, -1))
        inverse = run / "inverse.nii.gz"
        nib.Nifti1Image((unbend(points) - points).astype(np.float32), GRID.affine).to_filename(inverse)
    added = add_normalization(run, "01", warp=warp, inverse_warp=inverse, template="MNI152NLin2009cAsym")
    assert [path.name for path in added.files] == [f"sub-01_{way.format('MNI152NLin2009cAsym')}" for way in WAYS]
    there, back = errors(run, "MNI152NLin2009cAsym")
    assert there.max() < 0.15 and back.max() < 0.15
    assert len(added.said) == 1 and "Dice of 0.9" in added.said[0]


def test_a_warp_must_be_named_and_lead_the_right_way(run: Path) -> None:
    warp = synthmorph_warp(run / "warp.nii.gz")
    with pytest.raises(SettingsError, match="does not tell which template"):
        add_normalization(run, "01", warp=warp)
    with pytest.raises(SettingsError, match="goes with --warp"):
        add_normalization(run, "01", inverse_warp=warp)
    grid = make_template().brain.grid
    away = DisplacementField(torch.full((3, *grid.shape), 40.0), grid)
    nib.Nifti1Image(np.moveaxis(away.data.numpy(), 0, -1), grid.affine).to_filename(warp)
    with pytest.raises(InputError, match=r"Dice of 0\.\d+ only"):
        add_normalization(run, "01", warp=warp, template="MNI152NLin2009cAsym")
    assert len(listing(run)) == 2


def test_missing_inputs_are_named(run: Path) -> None:
    anat = run / "sub-01" / "anat"
    with pytest.raises(InputError, match="holds no folder sub-02"):
        add_normalization(run, "02")
    (anat / "sub-01_space-ACPC_desc-brain_mask.nii.gz").rename(run / "mask.nii.gz")
    with pytest.raises(InputError, match=r"desc-brain_mask\.nii\.gz: there is no such file"):
        add_normalization(run, "01")
    shutil.move(anat / "sub-01_space-ACPC_desc-preproc_T1w.nii.gz", anat / "sub-01_desc-preproc_T1w.nii.gz")
    with pytest.raises(InputError, match=r"no anat/sub-01_space-ACPC_desc-preproc_T1w\.nii\.gz; a run of QSIPrep 1\.0"):
        add_normalization(run, "01")


def test_a_folder_that_cannot_be_written_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**where: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match="Permission denied; this folder must be writable"):
        add_normalization(run, "01", warp=synthmorph_warp(run / "warp.nii.gz"), template="MNI152NLin2009cAsym")
