"""The choice among several structural images, from headers and sidecars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dsiprep.data.acquisition import Unit
from helpers.bids_dataset import AP, Dataset

SCAN = {"AcquisitionDateTime": "2020-01-01T10:00:00"}
WHOLE = ((8, 9, 8), (24.0, 24.0, 24.0))  # voxels and mm: about 200 mm along each axis


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = Dataset(tmp_path / "bids")
    dataset.dwi("sub-01", AP)
    return dataset


def add(
    dataset: Dataset,
    name: str,
    grid: tuple[tuple[int, ...], tuple[float, ...]] = WHOLE,
    sidecar: dict[str, Any] | None = None,
) -> None:
    path = dataset.image(f"sub-01_{name}T1w", 1, sidecar or {})
    shape, sizes = grid
    data = np.random.default_rng(0).integers(1, 99, shape).astype(np.int16)
    nib.Nifti1Image(data, np.diag([*sizes, 1.0])).to_filename(path)


def chosen(unit: Unit) -> list[str]:
    return [path.name.removeprefix("sub-01_").removesuffix(".nii.gz") for path in unit.t1w]


def test_localiser_sorted_first_is_not_used(dataset: Dataset) -> None:
    add(dataset, "acq-aaa_", ((20, 20, 5), (12.0, 12.0, 8.0)))
    add(dataset, "acq-mprage_")
    unit = dataset.unit()
    assert chosen(unit) == ["acq-mprage_T1w"]
    assert any("acq-mprage_T1w.nii.gz is the structural image" in note for note in unit.notes)
    assert {image.path.name: image.reason for image in unit.left_out} == {
        "sub-01_acq-aaa_T1w.nii.gz": "it covers only 40 mm along one axis, a slab or localiser"
    }


def test_a_slab_is_used_if_it_is_all_there_is(dataset: Dataset) -> None:
    add(dataset, "", ((20, 20, 5), (12.0, 12.0, 8.0)))
    assert chosen(dataset.unit()) == ["T1w"]


def test_images_of_one_protocol_stay_in_order(dataset: Dataset) -> None:
    for run in (2, 1):
        add(dataset, f"run-{run}_")
    unit = dataset.unit()
    assert chosen(unit) == ["run-1_T1w", "run-2_T1w"]
    assert not any("structural" in note for note in unit.notes)


def test_the_finer_image_leads_and_thick_slices_are_left_out(dataset: Dataset) -> None:
    add(dataset, "acq-a_", ((8, 9, 8), (24.0, 24.0, 24.0)))
    add(dataset, "acq-b_", ((10, 11, 10), (20.0, 20.0, 20.0)))
    add(dataset, "acq-c_", ((10, 11, 4), (20.0, 20.0, 50.0)))
    assert chosen(dataset.unit()) == ["acq-b_T1w", "acq-a_T1w"]


@pytest.mark.parametrize(
    ("names", "sidecars", "wanted"),
    [
        (("", "rec-norm_"), ({}, {}), ["rec-norm_T1w"]),
        (("acq-defaced_", "acq-whole_"), (SCAN, SCAN), ["acq-whole_T1w"]),
        (("acq-a_", "acq-b_"), (SCAN, {**SCAN, "ImageType": ["NORM"]}), ["acq-b_T1w"]),
        (("ce-gadolinium_", "run-1_"), ({}, {}), ["run-1_T1w"]),
        (("acq-a_", "acq-b_"), ({"SeriesInstanceUID": "1"}, {"SeriesInstanceUID": "2"}), ["acq-a_T1w", "acq-b_T1w"]),
    ],
)  # fmt: skip
def test_versions_of_one_scan(
    names: tuple[str, str], sidecars: tuple[dict[str, Any], ...], wanted: list[str], dataset: Dataset
) -> None:
    for name, sidecar in zip(names, sidecars, strict=True):
        add(dataset, name, WHOLE, sidecar)
    assert chosen(dataset.unit()) == wanted
