"""Which images determine the distortion of a series: header-only datasets with their right answers."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pytest

from dsiprep.data.acquisition import Unit
from dsiprep.errors import MetadataError
from dsiprep.io.bids import read_unit
from helpers.bids_dataset import AP, LAS, PA, SETTINGS, Dataset, has_note

LR = {"PhaseEncodingDirection": "i", "TotalReadoutTime": 0.05}
LINK = {"IntendedFor": "dwi/sub-01_dwi.nii.gz"}


def partners(unit: Unit) -> list[str]:
    return [epi.image.name.removesuffix(".nii.gz").removeprefix("sub-01_") for epi in unit.epis]


def tilted(degrees: float, axis: int = 0) -> np.ndarray:
    """The grid of the helper, its planes turned about a world axis through its centre."""
    angle, (a, b) = np.deg2rad(degrees), [other for other in range(3) if other != axis]
    turn = np.eye(4)
    turn[[a, a, b, b], [a, b, a, b]] = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
    centre = (LAS @ [1.5, 2, 1, 1])[:3]
    turn[:3, 3] = centre - turn[:3, :3] @ centre
    return turn @ LAS


@pytest.mark.parametrize(("ap", "pa"), [(0.0507, 0.05), (0.021, 0.022)])
def test_series_with_slightly_different_readout_times_form_one_unit(dataset: Dataset, ap: float, pa: float) -> None:
    dataset.dwi("sub-01_dir-AP", {**AP, "TotalReadoutTime": ap})
    dataset.dwi("sub-01_dir-PA", {**PA, "TotalReadoutTime": pa})
    unit = dataset.unit()
    assert [run.pe.readout_time for run in unit.runs if run.pe] == [ap, pa]
    assert unit.reversed_pairs() == ["j", "j-"]
    assert not unit.rejected_fieldmaps


def test_series_with_other_readout_times_correct_each_other(dataset: Dataset) -> None:
    dataset.dwi("sub-01_acq-a_dir-AP", AP)
    dataset.dwi("sub-01_acq-b_dir-PA", {**PA, "TotalReadoutTime": 0.04})
    first, second = dataset.units()
    assert partners(first) == ["acq-b_dir-PA_dwi"]
    assert partners(second) == ["acq-a_dir-AP_dwi"]
    assert has_note(first, "takes into account", "a readout time of 40.0 ms instead of 50.0 ms")
    assert read_unit(first, SETTINGS).epis[0].data.shape == (1, 4, 5, 3)  # the b=0 only


def test_equal_pairs_are_left_alone_by_a_third_readout_time(dataset: Dataset) -> None:
    """AP and PA at 50 ms remain a pair; the AP series at 52 ms uses the b=0 of PA."""
    dataset.dwi("sub-01_acq-a_dir-AP", AP)
    dataset.dwi("sub-01_acq-a_dir-PA", PA)
    dataset.dwi("sub-01_acq-b_dir-AP", {**AP, "TotalReadoutTime": 0.052})
    pair, single = sorted(dataset.units(), key=lambda unit: -len(unit.runs))
    assert (len(pair.runs), len(single.runs)) == (2, 1)
    assert partners(single) == ["acq-a_dir-PA_dwi"]


@pytest.mark.parametrize("degrees", [0.2, 2.0, 20.0])
def test_tilted_planes_are_used(dataset: Dataset, degrees: float) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA, affine=tilted(degrees))
    first, second = dataset.units()
    assert partners(first) == ["dir-PA_dwi"]
    assert partners(second) == ["dir-AP_dwi"]
    assert has_note(first, f"tilted by {degrees:.1f}°")


def test_planes_tilted_about_the_phase_encoding_axis_keep_it(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA, affine=tilted(20, axis=1))
    first, _ = dataset.units()
    assert partners(first) == ["dir-PA_dwi"]
    assert has_note(first, "another voxel grid or position")
    assert not has_note(first, "tilted")


def test_sagittal_series_with_the_same_direction_in_space(dataset: Dataset) -> None:
    """`j-` of an axial series and `i` of a sagittal one, stored P to A: opposite in the scanner."""
    sagittal = LAS[:, [1, 2, 0, 3]]
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_acq-sag_dir-PA", {**LR}, affine=sagittal)
    by_name = {unit.name: unit for unit in dataset.units()}
    assert partners(by_name["sub-01_dir-AP"]) == ["acq-sag_dir-PA_dwi"]


@pytest.mark.parametrize("change", ["slice", "grid"])
def test_other_field_of_view(dataset: Dataset, change: str) -> None:
    """One slice off, the runs are one series; with another matrix they use each other's b=0."""
    moved = LAS.copy()
    moved[2, 3] += 2.0
    if change == "grid":
        moved = LAS @ np.diag([0.8, 1, 1, 1])
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA, affine=moved)
    units = dataset.units()
    assert all(unit.reversed_pairs() for unit in units)
    assert len(units) == (1 if change == "slice" else 2)


def test_image_that_covers_too_little_is_not_used(dataset: Dataset) -> None:
    moved = LAS.copy()
    moved[1, 3] += 8.0
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, **LINK}, affine=moved)
    unit = dataset.unit()
    assert not unit.epis
    assert "it covers 22% of the field of view" in unit.rejected_fieldmaps[0]


@pytest.mark.parametrize("ignore", [frozenset(), frozenset({"shims"})])
def test_different_shims_are_paired_on_request(dataset: Dataset, ignore: frozenset[str]) -> None:
    dataset.dwi("sub-01_dir-AP", {**AP, "ShimSetting": [1, 2, 3]})
    dataset.dwi("sub-01_dir-PA", {**PA, "ShimSetting": [1, 2, 4]})
    units = dataset.units(ignore=ignore)
    if ignore:
        assert [len(unit.runs) for unit in units] == [2]
    else:
        assert len(units) == 2
        assert "use --ignore shims to pair them" in units[0].rejected_fieldmaps[0]


@pytest.mark.parametrize("link", ["IntendedFor", "B0FieldIdentifier"])
def test_links_outrank_different_shims(dataset: Dataset, link: str) -> None:
    by_identifier = link == "B0FieldIdentifier"
    series = {"B0FieldIdentifier": "f", "B0FieldSource": "f"} if by_identifier else {}
    dataset.dwi("sub-01", {**AP, "ShimSetting": [1, 2, 3], **series})
    fieldmap = {"B0FieldIdentifier": "f"} if by_identifier else LINK
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, "ShimSetting": [1, 2, 4], **fieldmap})
    unit = dataset.unit()
    assert partners(unit) == ["dir-PA_epi"]
    assert has_note(unit, "another ShimSetting")


def test_links_reach_other_grids(dataset: Dataset) -> None:
    for direction, pe, affine in (("AP", AP, LAS), ("PA", PA, tilted(5))):
        dataset.dwi(f"sub-01_dir-{direction}", {**pe, "B0FieldIdentifier": "f", "B0FieldSource": "f"}, affine=affine)
    assert [partners(unit) for unit in dataset.units()] == [["dir-PA_dwi"], ["dir-AP_dwi"]]


def test_orthogonal_phase_encodings_determine_the_field(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-LR", LR)
    first, second = dataset.units()
    assert (partners(first), partners(second)) == (["dir-LR_dwi"], ["dir-AP_dwi"])
    assert has_note(first, "another phase-encoding axis")
    dataset.dwi("sub-01_dir-PA", PA)
    pair, third = sorted(dataset.units(), key=lambda unit: -len(unit.runs))
    assert len(pair.runs) == 2
    assert partners(third) == ["dir-AP_dwi"]
    assert has_note(third, "dir-PA_dwi.nii.gz: not used", "only two phase encodings are combined")


def test_gradient_echo_fieldmap_outranks_an_orthogonal_series(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-LR", LR)
    link = {"IntendedFor": "dwi/sub-01_dir-AP_dwi.nii.gz"}
    dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.01, "EchoTime2": 0.012, **link})
    dataset.image("sub-01_magnitude1", 1, {})
    unit = next(unit for unit in dataset.units() if "dir-AP" in unit.runs[0].image.name)
    assert unit.gre
    assert not unit.epis


@pytest.mark.parametrize(
    "target",
    [
        "sub-01/dwi/sub-01_dwi.nii.gz",
        "/sub-01/dwi/sub-01_dwi.nii.gz",
        "/data/study/sub-01/dwi/sub-01_dwi.nii.gz",
        "sub-01_dwi.nii.gz",
        "dwi/sub-01_dwi.nii",
        "dwi/sub-01_dwi",
        "dwi\\sub-01_dwi.nii.gz",
        "sub-01\\dwi\\sub-01_dwi.nii.gz",
        "./dwi/sub-01_dwi.nii.gz",
        "bids::sub-01/dwi/sub-01_dwi.nii.gz",
        "bids:raw:sub-01/dwi/sub-01_dwi.nii.gz",
        "bids:raw:dwi/sub-01_dwi.nii.gz",
        ["bids::sub-01/dwi/sub-01_dwi.nii.gz", "func/sub-01_task-rest_bold.nii.gz"],
    ],
)
def test_intended_for_is_understood(dataset: Dataset, target: Any) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, "IntendedFor": target})
    unit = dataset.unit()
    assert partners(unit) == ["dir-PA_epi"]
    assert not has_note(unit, "does not match any file")


def test_intended_for_of_a_session(dataset: Dataset) -> None:
    for session in ("a", "b"):
        dataset.dwi(f"sub-01_ses-{session}", AP)
    dataset.image("sub-01_ses-b_dir-PA_epi", 1, {**PA, "IntendedFor": "ses-b/dwi/sub-01_ses-b_dwi.nii.gz"})
    assert [len(unit.epis) for unit in dataset.units()] == [0, 1]


def test_intended_for_another_file_is_reported(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, "IntendedFor": "dwi/sub-01_acq-x_dwi.nii.gz"})
    unit = dataset.unit()
    assert not unit.epis
    assert has_note(unit, "does not match any file")
    assert "it is not linked to a series" in unit.rejected_fieldmaps[0]


@pytest.mark.parametrize("link", [LINK, {"B0FieldIdentifier": "f"}])
def test_diffusion_series_in_fmap(dataset: Dataset, link: dict[str, Any]) -> None:
    dataset.dwi("sub-01", {**AP, **({"B0FieldSource": "f"} if "B0FieldIdentifier" in link else {})})
    series = dataset.image("sub-01_dir-PA_epi", 6, {**PA, **link})
    stem = series.with_name("sub-01_dir-PA_dwi")
    for ending in (".nii.gz", ".json"):
        series.with_name(f"sub-01_dir-PA_epi{ending}").rename(f"{stem}{ending}")
    np.savetxt(f"{stem}.bval", [[0, 1000, 0, 1000, 1000, 1000]], fmt="%d")
    unit = dataset.unit()
    assert partners(unit) == ["dir-PA_dwi"]
    assert read_unit(unit, SETTINGS).epis[0].data.shape == (2, 4, 5, 3)


def test_epi_with_a_table_of_b_values(dataset: Dataset) -> None:
    """Only b=0 volumes of `fmap/*_epi` are used if there is a `.bval` beside it."""
    dataset.dwi("sub-01", AP)
    epi = dataset.image("sub-01_dir-PA_epi", 4, {**PA, **LINK})
    np.savetxt(epi.with_name("sub-01_dir-PA_epi.bval"), [[1000, 0, 5, 1000]], fmt="%d")
    data = np.asarray(nib.load(epi).dataobj)
    unit = dataset.unit()
    used = read_unit(unit, SETTINGS).epis[0].data.numpy()
    np.testing.assert_array_equal(used, np.moveaxis(data, -1, 0)[1:3])
    assert epi.with_name("sub-01_dir-PA_epi.bval") in unit.files()


def test_reversed_single_band_reference(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    for name, sidecar in (("AP", AP), ("PA", PA)):
        epi = dataset.image(f"sub-01_dir-{name}_epi", 1, sidecar)
        for path in (epi, epi.with_name(epi.name.replace(".nii.gz", ".json"))):
            path.rename(dataset.root / "sub-01" / "dwi" / path.name.replace("_epi", "_sbref"))
    unit = dataset.unit()
    assert partners(unit) == ["dir-PA_sbref"]
    assert has_note(unit, "the contrast of a single-band reference")
    assert not dataset.unit(ignore=frozenset({"pepolar-dwis"})).epis
    dataset.dwi("sub-01_dir-PA", PA)
    assert len(dataset.unit().runs) == 2


def test_short_series_on_another_grid_is_a_reference(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA, volumes=6, affine=tilted(3))
    unit = dataset.unit()
    assert partners(unit) == ["dir-PA_dwi"]
    assert has_note(unit, "sub-01_dir-PA_dwi.nii.gz: fewer than 16 volumes")
    assert len(dataset.units(separate_all_dwis=True)) == 2


def test_reference_with_an_invalid_sidecar_does_not_stop_the_series(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    epi = dataset.image("sub-01_dir-PA_epi", 1, {"PhaseEncodingDirection": "PA"})
    for path in (epi, epi.with_name("sub-01_dir-PA_epi.json")):
        path.rename(dataset.root / "sub-01" / "dwi" / path.name.replace("_epi", "_sbref"))
    assert not dataset.unit().epis
    (dataset.root / "sub-01" / "dwi" / "sub-01_dir-PA_sbref.json").write_text("{")
    assert not dataset.unit().epis


def test_names_that_contradict_the_sidecars_are_reported(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", PA)
    dataset.dwi("sub-01_dir-PA", PA)
    unit = dataset.unit()
    assert "named as opposite phase encodings, but both sidecars say j" in unit.warnings[0]
    dataset.dwi("sub-02_dir-AP", AP)
    dataset.dwi("sub-02_dir-PA", PA)
    assert not dataset.units(participants=["02"])[0].warnings


def test_images_that_are_not_used_are_reported(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, PA)
    dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.01, "EchoTime2": 0.012})
    dataset.image("sub-01_magnitude1", 1, {})
    unit = dataset.unit()
    assert [text.split(":")[0] for text in unit.rejected_fieldmaps] == [
        "sub-01_dir-PA_epi.nii.gz",
        "sub-01_phasediff.nii.gz",
    ]
    assert all("add IntendedFor" in text for text in unit.rejected_fieldmaps)
    assert not dataset.unit(ignore=frozenset({"fieldmaps"})).rejected_fieldmaps
    assert not dataset.unit(ignore=frozenset({"sdc"})).rejected_fieldmaps


def test_linked_image_of_the_same_phase_encoding_is_reported(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, {**AP, **LINK})
    assert "has the same phase encoding (j-); check PhaseEncodingDirection" in dataset.unit().rejected_fieldmaps[0]


def test_readout_times_beyond_a_factor_of_three_still_raise(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, "TotalReadoutTime": 0.005, **LINK})
    with pytest.raises(MetadataError, match=r"0\.005 s, but 0\.05 s in its counterpart"):
        dataset.units()
