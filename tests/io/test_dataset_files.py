"""Which images of a dataset are found, whatever its root is called, and why others are not used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dsiprep.data.acquisition import Unit
from dsiprep.errors import DsiprepError, InputError, MetadataError
from dsiprep.io.bids import find_units, read_unit, scheme_of
from helpers.bids_dataset import AP, PA, SETTINGS, Dataset


def reasons(unit: Unit) -> dict[str, str]:
    return {image.path.name: image.reason for image in unit.left_out}


@pytest.mark.parametrize(
    "root",
    ["ds004666-1.0.1", "sub-01", ".hidden", "a [b] *c?", "with space", "ses-1", os.fsdecode(b"caf\xe9"), "a/sub-02/b"],
)
def test_any_name_of_the_root_is_accepted(root: str, tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / root)
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, "IntendedFor": "dwi/sub-01_dir-AP_dwi.nii.gz"})
    dataset.image("sub-01_T1w", 1, {})
    unit = dataset.unit()
    assert [path.name for path in unit.t1w] == ["sub-01_T1w.nii.gz"]
    assert unit.reversed_pairs() == ["j-", "j"]
    assert unit.left_out == ()
    assert scheme_of(unit, 100) is not None
    assert len(read_unit(unit, SETTINGS).epis) == 1


@pytest.mark.parametrize("label", ["AB+01", "0", "A" * 60])
def test_labels_that_bids_allows(label: str, dataset: Dataset) -> None:
    dataset.dwi(f"sub-{label}", AP)
    assert dataset.unit().name == f"sub-{label}"
    assert dataset.unit(participants=[label]).subject == label


@pytest.mark.parametrize("label", ["AB_01", "AB-01", "AB.01", "É1", os.fsdecode(b"\xff1")])
def test_labels_that_bids_does_not_allow_fail_alone(label: str, dataset: Dataset) -> None:
    dataset.dwi("sub-02", AP)
    (dataset.root / f"sub-{label}").mkdir()
    failed: dict[str, DsiprepError] = {}
    assert [unit.subject for unit in dataset.units(failed=failed)] == ["02"]
    assert list(failed) == [label]
    assert "is not valid in BIDS, which allows letters and digits; rename" in str(failed[label])
    str(failed[label]).encode()  # printable


def test_images_that_are_not_used_are_listed_with_reasons(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.image("sub-01_dir-AP_sbref", 1, AP).rename(dataset.root / "sub-01/dwi/sub-01_dir-AP_sbref.nii.gz")
    dataset.image("sub-01_T1w", 1, {})
    dataset.image("sub-01_T2w", 1, {})
    (dataset.root / "sub-01/anat/sub-01_T1w.nii").write_bytes(b"")
    dataset.image("sub-01_acq-0.8mm_dwi", 5, AP)
    dataset.image("sub-01_dir-PA_epi", 1, PA)
    dataset.image("sub-01_TB1map", 1, {})
    dataset.image("sub-01_phasediff", 1, {})
    dataset.image("sub-01_part-phase_T1w", 1, {})
    dataset.image("sub-02_FLAIR", 1, {}).rename(dataset.root / "sub-01/anat/sub-02_FLAIR.nii.gz")
    raw = os.fsdecode(b"sub-01_acq-\xff_T1w.nii.gz")
    (dataset.root / "sub-01/anat" / raw).write_bytes(b"")
    found = reasons(dataset.unit(participants=["01"]))
    expected = {
        "sub-01_dir-AP_sbref.nii.gz": "other images determine the distortion, or it cannot be used",
        "sub-01_T2w.nii.gz": "--anat-modality T1w",
        "sub-01_T1w.nii": "sub-01_T1w.nii.gz of the same name is used",
        "sub-01_acq-0.8mm_dwi.nii.gz": "no dot in a label (acq-0.8mm)",
        "sub-01_dir-PA_epi.nii.gz": "links it to a series",
        "sub-01_TB1map.nii.gz": "TB1map: of fmap/ only",
        "sub-01_phasediff.nii.gz": "links it to a series",
        "sub-01_part-phase_T1w.nii.gz": "a phase image; the magnitude is used",
        "sub-02_FLAIR.nii.gz": "does not start with sub-01",
        raw: "not UTF-8",
    }
    assert found.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found[name], name


def test_requested_sessions_filters_and_ignored_images_are_reasons(dataset: Dataset) -> None:
    for session in "ab":
        dataset.dwi(f"sub-01_ses-{session}_acq-x", AP)
    dataset.dwi("sub-01_ses-a_acq-y", AP)
    dataset.image("sub-01_ses-a_dir-PA_epi", 1, PA)
    options = {"sessions": ["a"], "filters": {"dwi": {"acquisition": "x"}}, "ignore": frozenset({"fieldmaps"})}
    assert reasons(dataset.unit(**options)) == {
        "sub-01_ses-b_acq-x_dwi.nii.gz": "another session than those of --session-label",
        "sub-01_ses-a_acq-y_dwi.nii.gz": "it does not match --bids-filter-file",
        "sub-01_ses-a_dir-PA_epi.nii.gz": "--ignore fieldmaps",
    }


def test_dot_in_a_label_of_a_structural_image(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_acq-0.8mm_T1w", 1, {})
    unit = dataset.unit()
    assert [path.name for path in unit.t1w] == ["sub-01_acq-0.8mm_T1w.nii.gz"]
    assert any("no dot in a label" in note for note in unit.notes)


@pytest.mark.parametrize(
    "name",
    ["sub-01_run-" + "1" * 23, "sub-01_" + "_".join(f"k{n}-{n}" for n in range(24)), "sub-01_run-²"],
)
def test_unusual_entities(name: str, dataset: Dataset) -> None:
    dataset.dwi(name, AP)
    dataset.image("sub-01_part-phase_T1w", 1, {})
    assert dataset.unit().name == name
    assert dataset.unit(filters={"dwi": {"subject": "01"}}).name == name
    with pytest.raises(InputError, match="--bids-filter-file"):
        dataset.units(filters={"dwi": {"run": 7}})


def test_sidecar_named_like_the_image_wins(dataset: Dataset) -> None:
    """Two sidecars that apply to one image are valid where one is named like it, as in the BIDS validator."""
    dataset.dwi("sub-01_dir-PA", {**PA, "EchoTime": 0.08})
    dataset.dwi("sub-01_acq-second_dir-PA", {"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.04})
    dataset.json(dataset.root / "sub-01_dwi.json", {"EchoTime": 0.09})
    dataset.json(dataset.root / "dwi.json", {"EchoTime": 0.1, "FlipAngle": 90})
    by_name = {run.image.name: run for unit in dataset.units() for run in unit.runs}
    second, first = (by_name[f"sub-01_{name}dir-PA_dwi.nii.gz"] for name in ("acq-second_", ""))
    assert (first.pe.readout_time, second.pe.readout_time) == (0.05, 0.04)
    assert (first.metadata["EchoTime"], second.metadata["EchoTime"]) == (0.08, 0.09)
    assert first.metadata["FlipAngle"] == second.metadata["FlipAngle"] == 90
    assert (first.bval.name, second.bval.name) == ("sub-01_dir-PA_dwi.bval", "sub-01_acq-second_dir-PA_dwi.bval")


def test_inheritance_of_nested_and_crossing_names(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01_acq-a_dir-AP", AP)
    path.with_name("sub-01_acq-a_dir-AP_dwi.json").unlink()
    dataset.json(path.with_name("sub-01_dwi.json"), {**AP, "EchoTime": 0.08})
    dataset.json(path.with_name("sub-01_acq-a_dwi.json"), {"EchoTime": 0.09})
    assert dataset.unit().runs[0].metadata["EchoTime"] == 0.09
    dataset.json(path.with_name("sub-01_dir-AP_dwi.json"), {"EchoTime": 0.1})
    with pytest.raises(MetadataError, match=r"both sub-01_acq-a_dwi\.json and sub-01_dir-AP_dwi\.json .* apply"):
        dataset.units()


def test_dangling_sidecar_is_not_absent(dataset: Dataset) -> None:
    """The same sentence for every kind of file whose content was not fetched."""
    path = dataset.dwi("sub-01", AP)
    for name in ("sub-01_dwi.json", "sub-01_dwi.bval", "sub-01_dwi.bvec", "sub-01_dwi.nii.gz"):
        kept = path.with_name(name).read_bytes()
        path.with_name(name).unlink()
        path.with_name(name).symlink_to("../../.git/annex/objects/x")
        with pytest.raises(InputError, match=rf"{name}: a link whose target does not exist; fetch its content"):
            read_unit(dataset.unit(), SETTINGS)
        path.with_name(name).unlink()
        path.with_name(name).write_bytes(kept)
    assert read_unit(dataset.unit(), SETTINGS)


def test_latin_1_and_byte_order_mark_in_sidecars(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01", AP).with_name("sub-01_dwi.json")
    text = json.dumps({**AP, "Manufacturer": "Müller"}, ensure_ascii=False)
    for content in (text.encode("latin-1"), text.encode("utf-8-sig"), text.encode("utf-16")):
        path.write_bytes(content)
        assert dataset.unit().runs[0].metadata["Manufacturer"] == "Müller"


def test_no_subject_stops_the_others(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsiprep.io import bids

    original = bids.build_grouping

    def fails_for_one(records: object, label: str, **options: object) -> object:
        if label == "01":
            raise RuntimeError("unforeseen")
        return original(records, label, **options)

    monkeypatch.setattr(bids, "build_grouping", fails_for_one)
    dataset.dwi("sub-01", AP)
    dataset.dwi("sub-02", AP)
    failed: dict[str, DsiprepError] = {}
    assert [unit.subject for unit in find_units(dataset.root, SETTINGS, failed=failed)] == ["02"]
    assert "RuntimeError: unforeseen" in str(failed["01"])
