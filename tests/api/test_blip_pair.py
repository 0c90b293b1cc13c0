"""`dsiprep-tools drbuddi`: files in, field, images and transforms out; ITK and ANTs read what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from dsiprep.api import blip_pair as pair
from dsiprep.api.blip_pair import correct_pair
from dsiprep.cli.tools import main
from dsiprep.errors import GradientError, InputError, MetadataError
from helpers.epi_pair import READOUT, Case, correlation, make_grid, rigid


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(make_grid("LAS", tilt=10), 1, pose=rigid((1, 0, -1), np.array([1.0, 0.0, 0.5])), noise=1.0)


@pytest.fixture(scope="module")
def out(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the tool wrote, with its inputs beside."""
    folder = tmp_path_factory.mktemp("pair")
    for name, image in zip(("up", "down"), case.images, strict=True):
        series = np.stack([image[0].numpy(), 0.2 * image[0].numpy()], -1)
        nib.save(nib.Nifti1Image(series, case.grid.affine), folder / f"{name}.nii.gz")
        (folder / f"{name}.bval").write_text("0 3000\n")
        direction = "j" if name == "up" else "j-"
        sidecar = {"PhaseEncodingDirection": direction, "TotalReadoutTime": READOUT}
        (folder / f"{name}.json").write_text(json.dumps(sidecar))
    files = ["--up", str(folder / "up.nii.gz"), "--down", str(folder / "down.nii.gz")]
    assert main(["drbuddi", *files, "-o", str(folder / "out"), "--device", "cpu"]) == 0
    return folder / "out"


def test_files_hold_the_correction(case: Case, out: Path) -> None:
    corrected = np.asarray(nib.load(out / "dwiref.nii.gz").dataobj)
    assert correlation(corrected, case.truth, case.brain) > 0.98
    hertz = np.asarray(nib.load(out / "fieldmap_hz.nii.gz").dataobj)
    error = (hertz * READOUT * case.grid.voxel_sizes[1] - case.field)[case.brain]
    assert np.abs(error - np.median(error)).mean() < 0.25
    facts = json.loads((out / "result.json").read_text())
    assert facts["method"] == "drbuddi"
    assert facts["trace"][-1]["change_mm"] < 0.1


@pytest.mark.parametrize("blip", ["up", "down"])
def test_itk_and_ants_apply_the_transforms_alike(case: Case, out: Path, blip: str) -> None:
    """Both read the image where dsiprep does; times the Jacobian, that is the corrected image."""
    ants = pytest.importorskip("ants")
    image = sitk.Extract(sitk.ReadImage(str(out.parent / f"{blip}.nii.gz"), sitk.sitkFloat32), (*case.grid.shape, 0))
    transform = sitk.ReadTransform(str(out / f"{blip}_sdc.h5"))
    by_itk = sitk.GetArrayFromImage(sitk.Resample(image, image, transform, sitk.sitkLinear)).T
    fixed = ants.image_read(str(out / f"{blip}_before.nii.gz"))
    by_ants = ants.apply_transforms(fixed, fixed, [str(out / f"{blip}_sdc.h5")], interpolator="linear").numpy()
    inside = case.mask.numpy() > 0
    np.testing.assert_allclose(by_ants[inside], by_itk[inside], atol=0.02 * by_itk[inside].mean())
    after = np.asarray(nib.load(out / f"{blip}_after.nii.gz").dataobj)
    bare = after / jacobian(transform, case)
    assert np.abs(bare - by_itk)[case.brain].mean() < 0.03 * by_itk[case.brain].mean()
    assert correlation(bare, by_itk, case.brain) > 0.99


def jacobian(transform: sitk.Transform, case: Case) -> np.ndarray:
    """Determinant of the stored map by central differences of its points."""
    shape = case.grid.shape
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    points = case.grid.to_world(index.reshape(-1, 3)) * [-1, -1, 1]
    sent = np.array([transform.TransformPoint(p) for p in points.tolist()]) * [-1, -1, 1]
    voxels = case.grid.to_voxels(sent).reshape(*shape, 3)
    slopes = [np.stack(np.gradient(voxels[..., c]), -1) for c in range(3)]
    return np.maximum(np.linalg.det(np.stack(slopes, -2)), 0.1)


def test_unusable_input_is_refused_with_the_reason(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("up", "down"):
        nib.save(nib.Nifti1Image(np.ones((5, 6, 7), np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
    files = tmp_path / "up.nii.gz", tmp_path / "down.nii.gz"
    with pytest.raises(MetadataError, match=r"up\.json.*--pe-dir"):
        correct_pair(*files)
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), tmp_path / "mask.nii.gz")
    with pytest.raises(InputError, match="mask is not on the grid"):
        correct_pair(*files, pe_dir="j", mask=tmp_path / "mask.nii.gz")
    code = main(["drbuddi", "--up", str(files[0]), "--down", str(tmp_path / "none.nii"), "-o", str(tmp_path / "o")])
    assert code == 1
    assert "none.nii" in capsys.readouterr().err
    nib.save(nib.Nifti1Image(np.ones((5, 6, 7, 2), np.float32), np.eye(4)), files[0])
    (tmp_path / "up.bval").write_text("150 3000\n")
    with pytest.raises(GradientError, match=r"up\.bval: no b=0.*150, above 100; .*write 0 for it") as raised:
        correct_pair(*files, pe_dir="j")
    assert "--b0-threshold" not in str(raised.value)  # an option that this tool does not have


@pytest.mark.parametrize(("share", "taken"), [(0.03, False), (0.4, False), (0.6, True), (1.0, True)])
def test_second_image_that_covers_too_little_brain_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, taken: bool
) -> None:
    """Slices from below that hold about this share of the brain."""
    below = case.mask.numpy().sum(axis=(0, 1)).cumsum() / case.mask.numpy().sum()
    last = int(np.abs(below - share).argmin()) + 1
    files = tmp_path / "up.nii.gz", tmp_path / "down.nii.gz"
    up, down = (image[0].numpy() for image in case.images)
    for path, image in zip(files, (up, down[:, :, :last]), strict=True):
        nib.save(nib.Nifti1Image(image, case.grid.affine), path)
    nib.save(nib.Nifti1Image(case.mask.numpy(), case.grid.affine), tmp_path / "mask.nii.gz")
    monkeypatch.setattr(pair, "correct_distortion", lambda *_: "corrected")
    if taken:
        assert correct_pair(*files, pe_dir="j", mask=tmp_path / "mask.nii.gz") == "corrected"
        return
    with pytest.raises(InputError, match=r"down\.nii\.gz: covers \d+% of the brain in up\.nii\.gz.* 50% is needed"):
        correct_pair(*files, pe_dir="j", mask=tmp_path / "mask.nii.gz")
