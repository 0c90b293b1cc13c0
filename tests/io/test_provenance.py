"""The description of the derivatives, and BIDS URIs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsiprep.data.results import UnitResults
from dsiprep.io.derivatives import write_root
from dsiprep.io.provenance import raw_root, raw_uris, space_uri
from helpers.report_subject import make_subject


@pytest.fixture(scope="module")
def subject() -> UnitResults:
    return make_subject(blips=1)


def test_description_names_program_source_and_licence(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "raw" / "derivatives" / "dsiprep"
    raw.mkdir()
    content = {"Name": "x", "License": "CC0", "DatasetDOI": "doi:10.18112/openneuro.ds1.v1.0.0"}
    (raw / "dataset_description.json").write_text(json.dumps(content))
    write_root(out, "1.2", raw)
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["GeneratedBy"][0]["Version"] == "1.2"
    assert description["GeneratedBy"][0]["CodeURL"].startswith("https://")
    assert description["SourceDatasets"] == [{"URL": "../..", "DOI": "doi:10.18112/openneuro.ds1.v1.0.0"}]
    assert description["DatasetLinks"] == {"raw": "../.."}
    assert description["License"] == "CC0"
    write_root(out, "1.3")
    kept = json.loads((out / "dataset_description.json").read_text())
    assert kept["DatasetLinks"] == {"raw": "../.."}
    assert kept["GeneratedBy"][0]["Version"] == "1.3"


def test_raw_dataset_without_a_licence_gives_none(tmp_path: Path) -> None:
    write_root(tmp_path / "out", "1.2", tmp_path)
    assert "License" not in json.loads((tmp_path / "out" / "dataset_description.json").read_text())


def test_sources_are_relative_to_the_raw_dataset(subject: UnitResults) -> None:
    folder = Path("/data/sub-01/copy/bids/sub-01/ses-a/dwi")
    run = replace(subject.unit.runs[0], image=folder / "sub-01_ses-a_dwi.nii.gz")
    unit = replace(subject.unit, runs=(run, run))
    assert raw_root(unit) == Path("/data/sub-01/copy/bids")
    assert raw_uris(unit, [run.image, run.image]) == ["bids:raw:sub-01/ses-a/dwi/sub-01_ses-a_dwi.nii.gz"]


def test_without_a_structural_image_the_space_is_that_of_the_leading_series(subject: UnitResults) -> None:
    alone = replace(subject, anatomy=replace(subject.anatomy, modality="none"))
    assert space_uri(alone) == "bids::sub-01/dwi/sub-01_acq-dsi_space-ACPC_dwiref.nii.gz"
    led = replace(alone.coregistration, target_unit="sub-01_ses-b_acq-x")
    assert space_uri(replace(alone, coregistration=led)) == (
        "bids::sub-01/ses-b/dwi/sub-01_ses-b_acq-x_space-ACPC_dwiref.nii.gz"
    )
    joined = replace(alone, unit=replace(alone.unit, output="sub-01"))
    assert space_uri(joined) == "bids::sub-01/dwi/sub-01_space-ACPC_dwiref.nii.gz"
