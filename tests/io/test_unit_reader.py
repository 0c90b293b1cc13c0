"""Reading the files of a unit, and errors for missing or invalid files."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.errors import GradientError, InputError
from dsiprep.io.bids import read_unit, require_files
from dsiprep.io.sidecars import slice_axis, slice_times
from helpers.bids_dataset import AP, LAS, SETTINGS, Dataset, has_note


def test_missing_files_raise(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01", AP)
    bval = path.parent / "sub-01_dwi.bval"
    content = bval.read_text()
    bval.unlink()
    unit = dataset.unit()
    with pytest.raises(GradientError, match=r"sub-01_dwi\.nii\.gz: no b-values: sub-01_dwi\.bval"):
        require_files(unit)
    (dataset.root / "dwi.bval").write_text(content)  # inherited
    assert read_unit(dataset.unit(), SETTINGS).runs[0].bvals.max() == 1000
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(InputError, match="datalad"):
        read_unit(unit, SETTINGS) if bval.exists() else require_files(dataset.unit())


def test_read_unit_returns_data_gradients_and_slice_times(dataset: Dataset) -> None:
    dataset.dwi("sub-01", {**AP, "SliceTiming": [0, 0.5, 1], "SliceEncodingDirection": "k-"})
    run = read_unit(dataset.unit(), SETTINGS).runs[0]
    assert run.data.dtype == torch.float32
    assert run.data.shape == (20, 4, 5, 3)
    image = nib.load(dataset.root / "sub-01/dwi/sub-01_dwi.nii.gz")
    np.testing.assert_array_equal(run.data.numpy(), np.moveaxis(image.get_fdata(), 3, 0))
    np.testing.assert_array_equal(run.grid.affine, LAS)
    assert run.slice_times == (1, 0.5, 0)
    assert run.slice_axis == 2
    assert run.name == "sub-01_dwi.nii.gz"
    # for LAS, FSL's frame is that of the voxel axes
    fsl = np.loadtxt(dataset.root / "sub-01/dwi/sub-01_dwi.bvec").T
    np.testing.assert_allclose(run.bvecs, fsl * (-1, 1, 1), atol=1e-5)


def test_single_volume_instead_of_a_series_raises(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01", AP)
    nib.Nifti1Image(np.ones((4, 5, 3), np.int16), LAS).to_filename(path)
    with pytest.raises(InputError, match=r"sub-01_dwi\.nii\.gz: a single volume"):
        read_unit(dataset.unit(), SETTINGS)


def test_unreadable_series_raises_on_reading(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01", AP)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"sub-01_dwi\.nii\.gz: not readable"):
        read_unit(dataset.unit(), SETTINGS)


def test_damaged_structural_image_raises_on_reading_the_unit(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    path = dataset.image("sub-01_T1w", 1, {})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="sub-01_T1w"):
        read_unit(dataset.unit(), SETTINGS)


def test_phase_encoding_direction_without_b0_raises(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01", AP)
    (path.parent / "sub-01_dwi.bval").write_text(" ".join(["150"] + ["1000"] * 19))
    np.savetxt(path.parent / "sub-01_dwi.bvec", np.tile([[1.0], [0], [0]], 20))
    with pytest.raises(GradientError, match=r"sub-01_dwi.*lowest b-value is 150.*--b0-threshold 150"):
        read_unit(dataset.unit(), SETTINGS)


@pytest.mark.parametrize(
    ("sidecar", "axis", "times"),
    [
        ({"SliceTiming": [0, 1, 2], "SliceEncodingDirection": "k"}, 2, (0, 1, 2)),
        ({"SliceTiming": [0, 1, 2]}, 2, (0, 1, 2)),
        ({"SliceTiming": [0, 1, 2, 3], "SliceEncodingDirection": "i-"}, 0, (3, 2, 1, 0)),
        ({"SliceEncodingDirection": "j"}, 1, ()),
        ({"SliceTiming": [0, 1, 2], "SliceEncodingDirection": "j"}, 1, ()),  # five slices
        ({"SliceTiming": [0, 1]}, None, ()),
        ({}, None, ()),
    ],
)
def test_slice_axis_and_times(sidecar: dict, axis: int | None, times: tuple[float, ...]) -> None:
    assert slice_axis(sidecar, (4, 5, 3)) == axis
    assert slice_times(sidecar, (4, 5, 3)) == times


@pytest.mark.parametrize(("factor", "noted"), [(2, False), (4, True), ("n/a", False), (None, False)])
def test_multiband_factor_that_slice_times_contradict_is_noted(dataset: Dataset, factor: object, noted: bool) -> None:
    """The times say which slices were excited together; a factor alone does not."""
    times = [0, 0.5, 0, 0.5]
    four = Dataset(dataset.root / "four", (4, 5, 4))
    four.dwi("sub-01", {**AP, "SliceTiming": times, "MultibandAccelerationFactor": factor})
    assert has_note(four.unit(), "MultibandAccelerationFactor is 4", "2 slices at each time") is noted
