"""SHORELine alone: arrays, tensors and files agree; outlier slices are replaced; unusable input is refused."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep import align_series, estimate_motion
from dsiprep.cli.tools import main
from dsiprep.errors import InputError
from dsiprep.io.gradients import to_fsl, write_bvals, write_fsl_bvecs
from dsiprep.io.itk import read_affine_series
from dsiprep.settings import MotionSettings
from helpers.motion_subject import Subject, errors, make_subject

FAST = MotionSettings(iters=2)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return make_subject(count=32, spacing=(6.0, 6.0, 6.0), moved=0.2)


def _arrays(subject: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    dwi = subject.dwi
    return dwi.data.permute(1, 2, 3, 0).numpy(), dwi.grid.affine, dwi.bvals, to_fsl(dwi.bvecs, dwi.grid)


def test_arrays_tensors_and_files_give_the_same_result(
    subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, affine, bvals, bvecs = _arrays(subject)
    mask = subject.mask.numpy()
    found = estimate_motion(data, affine, bvals, bvecs, mask, phase_encoding="j-", settings=FAST)
    again = estimate_motion(
        torch.from_numpy(data), affine, bvals, bvecs.T, torch.from_numpy(mask), phase_encoding="j-", settings=FAST
    )
    np.testing.assert_allclose(again.transforms, found.transforms, atol=1e-9)
    before = errors(np.tile(np.eye(4), (len(subject.dwi), 1, 1)), subject)
    assert sum(errors(found.transforms, subject)) < 0.6 * sum(before)
    assert found.eddy is not None

    nib.save(nib.Nifti1Image(data, affine), tmp_path / "sub-1_dwi.nii.gz")
    nib.save(nib.Nifti1Image(mask, affine), tmp_path / "mask.nii.gz")
    write_bvals(tmp_path / "sub-1_dwi.bval", bvals)
    write_fsl_bvecs(tmp_path / "sub-1_dwi.bvec", subject.dwi.bvecs, subject.dwi.grid)
    (tmp_path / "sub-1_dwi.json").write_text(json.dumps({"PhaseEncodingDirection": "j-"}))
    out = tmp_path / "out"
    arguments = ["shoreline", str(tmp_path / "sub-1_dwi.nii.gz"), "--mask", str(tmp_path / "mask.nii.gz")]
    assert main([*arguments, "-o", str(out), "--shoreline-iters", "2", "--device", "cpu"]) == 0
    assert all(Path(line).is_file() for line in capsys.readouterr().out.split())
    poses = read_affine_series(out / "sub-1_from-orig_to-dwiref_mode-image_desc-hmc_xfm.txt")
    np.testing.assert_allclose(poses, found.transforms, atol=1e-4)

    aligned, turned = align_series(data, affine, bvecs, found)
    written = nib.load(out / "sub-1_desc-hmc_dwi.nii.gz")
    np.testing.assert_allclose(np.asarray(written.dataobj), aligned, atol=2e-3 * aligned.max())
    np.testing.assert_allclose(np.loadtxt(out / "sub-1_desc-hmc_dwi.bvec").T, turned, atol=1e-4)
    (label,) = json.loads((out / "sub-1_desc-hmc_dwi.json").read_text())["GradientTables"].items()
    assert label[0] == "sub-1_desc-hmc_dwi.bvec"
    assert label[1]["Frame"].startswith("FSL:")
    inside = mask > 0
    b0 = aligned[inside][:, bvals < 50]
    raw = data[inside][:, bvals < 50]
    assert np.std(b0, axis=1).mean() <= np.std(raw, axis=1).mean()


def test_outlier_slice_is_replaced_by_its_prediction(subject: Subject) -> None:
    data, affine, bvals, bvecs = _arrays(subject)
    weak = int(np.flatnonzero(bvals < 1500)[3])
    cut = data.shape[2] // 2
    broken = data.copy()
    broken[:, :, cut, weak] *= 0.3
    mask, settings = subject.mask.numpy(), MotionSettings(iters=2, outliers="replace")
    found = estimate_motion(broken, affine, bvals, bvecs, mask, settings=settings)
    assert found.outlier_slices is not None
    assert found.outlier_slices[weak, cut]
    assert found.outlier_slices.sum() <= 2
    repaired = found.with_replaced_slices(weak, torch.from_numpy(np.ascontiguousarray(broken[..., weak]))).numpy()
    inside = mask[:, :, cut] > 0
    true = data[:, :, cut, weak][inside]
    assert (
        np.abs(repaired[:, :, cut][inside] - true).mean() < 0.25 * np.abs(broken[:, :, cut, weak][inside] - true).mean()
    )
    others = np.arange(data.shape[2]) != cut
    np.testing.assert_array_equal(repaired[:, :, others], broken[..., weak][:, :, others])
    together = tuple((k, k + 1) for k in range(0, data.shape[2] - 1, 2))  # multiband: judged in pairs
    grouped = estimate_motion(broken, affine, bvals, bvecs, mask, settings=FAST, multiband=together)
    assert grouped.outlier_slices is not None
    assert grouped.replacements is None
    assert (
        grouped.outlier_slices[:, 0:-1:2][:, : len(together)] == grouped.outlier_slices[:, 1::2][:, : len(together)]
    ).all()


def test_slices_are_those_of_the_sidecar(subject: Subject, tmp_path: Path) -> None:
    """Slices along j in pairs, although voxels are isotropic; the lost slice of a pair takes the other along."""
    data, affine, bvals, bvecs = _arrays(subject)
    data = data[:, : data.shape[1] // 2 * 2]
    count, weak = data.shape[1], int(np.flatnonzero(bvals < 1500)[3])
    first = count // 4
    broken = data.copy()
    broken[:, [first, first + count // 2], :, weak] *= 0.3
    nib.save(nib.Nifti1Image(broken, affine), tmp_path / "a_dwi.nii.gz")
    nib.save(nib.Nifti1Image(subject.mask.numpy()[:, :count], affine), tmp_path / "mask.nii.gz")
    write_bvals(tmp_path / "a_dwi.bval", bvals)
    write_fsl_bvecs(tmp_path / "a_dwi.bvec", subject.dwi.bvecs, subject.dwi.grid)
    times = [0.1 * (k % (count // 2)) for k in range(count)][::-1]
    sidecar = {"SliceTiming": times, "SliceEncodingDirection": "j-", "RepetitionTime": 2.5}
    (tmp_path / "a_dwi.json").write_text(json.dumps(sidecar))
    arguments = ["shoreline", str(tmp_path / "a_dwi.nii.gz"), "--mask", str(tmp_path / "mask.nii.gz")]
    assert main([*arguments, "-o", str(tmp_path), "--shoreline-iters", "1", "--device", "cpu"]) == 0
    table = json.loads((tmp_path / "a_desc-slice_qc.json").read_text())
    assert np.shape(table["slice_z"]) == (len(bvals), count)
    assert [weak, first] in table["lost"]
    assert [weak, first + count // 2] in table["lost"]
    assert nib.load(tmp_path / "a_desc-hmc_dwi.nii.gz").header.get_zooms()[3] == 2.5
    with pytest.raises(InputError, match="slice_axis is 3"):
        estimate_motion(data, affine, bvals, bvecs, slice_axis=3)


def test_unusable_input_is_refused_with_the_reason(
    subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, affine, bvals, bvecs = _arrays(subject)
    with pytest.raises(InputError, match="four are wanted"):
        estimate_motion(data[..., 0], affine, bvals, bvecs)
    with pytest.raises(InputError, match="b-values for"):
        estimate_motion(data, affine, bvals[1:], bvecs)
    with pytest.raises(InputError, match=r"bvecs has shape \(\d+, 3\)"):
        estimate_motion(data, affine, bvals, bvecs[1:])
    with pytest.raises(InputError, match="same grid"):
        estimate_motion(data, affine, bvals, bvecs, np.ones((2, 2, 2)))
    with pytest.raises(InputError, match="no volume has b"):
        estimate_motion(data, affine, bvals + 500, bvecs)
    assert main(["shoreline", str(tmp_path / "absent.nii.gz"), "-o", str(tmp_path / "o")]) == 1
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "a_dwi.nii.gz")
    write_bvals(tmp_path / "a_dwi.bval", bvals + 500)
    write_fsl_bvecs(tmp_path / "a_dwi.bvec", np.eye(3)[np.zeros(len(bvals), int)], subject.dwi.grid)
    capsys.readouterr()
    assert main(["shoreline", str(tmp_path / "a_dwi.nii.gz"), "-o", str(tmp_path / "o")]) == 1
    said = capsys.readouterr().err  # the tool has no --b0-threshold to advise
    assert "a_dwi.bval: no b=0 volume: the lowest b-value is 500, above 100; " in said
    assert "--b0" not in said
    assert not (tmp_path / "o").exists()
