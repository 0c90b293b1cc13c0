"""Values of sidecar fields as converters write them: the obvious reading, a note, or a sentence with file and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsiprep.errors import MetadataError
from dsiprep.io.sidecar_values import clean_metadata
from helpers.bids_dataset import Dataset

AP: dict[str, Any] = {"PhaseEncodingDirection": "j-", "TotalReadoutTime": 0.05}


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        ("TotalReadoutTime", "0.05", 0.05),
        ("TotalReadoutTime", [0.05], 0.05),
        ("TotalReadoutTime", [0.05, "0.05"], None),
        ("TotalReadoutTime", "n/a", None),
        ("TotalReadoutTime", [None], None),
        ("TotalReadoutTime", [], None),
        ("TotalReadoutTime", "", None),
        ("EchoTime", ["0.08", "0.08"], 0.08),
        ("PhaseEncodingDirection", ["j-"], "j-"),
        ("PhaseEncodingDirection", "n/a", None),
        ("PhaseEncodingDirection", " j- ", "j-"),
        ("ShimSetting", ["1", 2, "n/a"], [1.0, 2.0]),
        ("SliceTiming", ["0", "0.5"], [0.0, 0.5]),
        ("B0FieldIdentifier", 1, ["1"]),
        ("B0FieldIdentifier", ["a", None, "n/a"], ["a"]),
        ("IntendedFor", "n/a", None),
        ("MultipartID", ["a", "b"], ["a", "b"]),
        ("MultibandAccelerationFactor", "3", 3.0),
    ],
)
def test_obvious_readings(field: str, value: Any, meant: Any) -> None:
    fields, notes = clean_metadata({field: value, "Other": [None]}, "x.nii.gz")
    if meant is None and field == "TotalReadoutTime" and isinstance(value, list) and len(value) > 1:
        assert fields[field] == value  # refused where it is used
        return
    assert fields.get(field) == meant
    assert fields["Other"] == [None]
    assert notes == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ShimSetting", [[1, 2], 3]),
        ("ShimSetting", 5),
        ("SliceTiming", "0, 1"),
        ("RepetitionTime", [1, 2]),
        ("RepetitionTime", float("inf")),
        ("RepetitionTime", 10**400),
        ("FlipAngle", {"a": 1}),
        ("EffectiveEchoSpacing", True),
        ("Manufacturer", 7),
    ],
)
def test_descriptive_fields_are_ignored_with_a_note(field: str, value: Any) -> None:
    fields, notes = clean_metadata({field: value}, "x.nii.gz")
    assert field not in fields
    assert f"x.nii.gz: {field} is " in notes[0]


@pytest.mark.parametrize("field", ["B0FieldIdentifier", "B0FieldSource", "MultipartID", "IntendedFor"])
@pytest.mark.parametrize("value", [[["a"]], {"a": 1}, True, 1.5])
def test_links_that_are_no_names_are_refused(field: str, value: Any) -> None:
    with pytest.raises(MetadataError, match=rf"x\.nii\.gz: {field} is .*expected a name or a list of names"):
        clean_metadata({field: value}, "x.nii.gz")


@pytest.mark.parametrize("value", [float("inf"), 1e308, 10**400, [0.05, 0.06], {"a": 1}, "fast", True, -1])
def test_impossible_readout_times_are_refused(value: Any, tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "bids")
    dataset.dwi("sub-01", {**AP, "TotalReadoutTime": value})
    with pytest.raises(MetadataError, match=r"sub-01_dwi\.nii\.gz: TotalReadoutTime .* expected"):
        dataset.units()
    assert dataset.unit(ignore=frozenset({"sdc"})).runs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b"[1, 2]", "holds a list; expected a JSON object"),
        (b"{", "cannot be read as JSON"),
        (b"\x00" * 100, "binary data"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_damaged_sidecars_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    dataset = Dataset(tmp_path / "bids")
    path = dataset.dwi("sub-01", AP)
    path.with_name("sub-01_dwi.json").write_bytes(content)
    with pytest.raises(MetadataError, match=rf"sub-01_dwi\.json.*{message}"):
        dataset.units()
