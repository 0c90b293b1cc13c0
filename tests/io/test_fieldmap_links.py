"""Which fieldmap serves which series, and what a fieldmap's sidecar must say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import GreFieldmap, PhaseEncoding
from dsiprep.errors import InputError, MetadataError
from dsiprep.io.bids import explain, find_units, read_unit, require_files
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.nifti import read_volume
from helpers.bids_dataset import AP, PA, SETTINGS, Dataset, has_note

LINK = {"IntendedFor": "bids::sub-01/dwi/sub-01_dwi.nii.gz"}


@pytest.mark.parametrize("target", ["dwi/sub-01_dwi.nii.gz", "bids::sub-01/dwi/sub-01_dwi.nii.gz"])
def test_fieldmap_linked_by_intended_for(dataset: Dataset, target: str) -> None:
    dataset.dwi("sub-01", AP)
    epi = dataset.image("sub-01_dir-PA_epi", 3, {**PA, "IntendedFor": [target]})
    unit = dataset.unit()
    assert [(ref.image, ref.pe, ref.bval) for ref in unit.epis] == [(epi, PhaseEncoding(1, 1, 0.05), None)]
    assert has_note(unit, "IntendedFor")
    assert epi in unit.files()
    assert read_unit(unit, SETTINGS).epis[0].data.shape == (3, 4, 5, 3)
    assert dataset.unit(ignore=frozenset({"fieldmaps"})).epis == ()


def test_fieldmap_linked_by_b0_field_source(dataset: Dataset) -> None:
    dataset.dwi("sub-01", {**AP, "B0FieldIdentifier": "f", "B0FieldSource": "f"})
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, "B0FieldIdentifier": "f"})
    unit = dataset.unit()
    assert [ref.image.name for ref in unit.epis] == ["sub-01_dir-PA_epi.nii.gz"]
    assert has_note(unit, "B0FieldIdentifier")
    assert read_unit(unit, SETTINGS).epis[0].data.shape == (1, 4, 5, 3)


def test_fieldmap_without_readout_time_or_direction_raises(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    link = {"IntendedFor": "dwi/sub-01_dwi.nii.gz"}
    dataset.image("sub-01_dir-PA_epi", 1, {"PhaseEncodingDirection": "j", **link})
    with pytest.raises(MetadataError, match=r"dir-PA_epi.*no TotalReadoutTime.*--ignore fieldmaps"):
        dataset.units()
    dataset.image("sub-01_dir-PA_epi", 1, {"TotalReadoutTime": 0.05, **link})
    with pytest.raises(MetadataError, match=r"dir-PA_epi.*no PhaseEncodingDirection.*--ignore fieldmaps"):
        dataset.units()
    assert dataset.unit(ignore=frozenset({"fieldmaps"})).runs


def test_phase_difference_fieldmap_is_used_without_a_pair(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    phase = dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.01, "EchoTime2": 0.012, **LINK})
    magnitude = dataset.image("sub-01_magnitude1", 1, {})
    unit = dataset.unit()
    assert unit.gre == GreFieldmap("phasediff", (phase,), magnitude, pytest.approx(0.002))
    assert has_note(unit, "sub-01_phasediff.nii.gz", "to correct the distortion")
    assert "field  sub-01_phasediff.nii.gz" in explain(unit, None)
    fieldmap = read_fieldmap(unit.gre)
    assert float(fieldmap.field.data.abs().max()) <= np.pi + 1e-5
    assert fieldmap.field.grid.shape == (4, 5, 3)
    assert read_unit(unit, SETTINGS).name == "sub-01"
    ignored = dataset.unit(ignore=frozenset({"fieldmaps"}))
    assert ignored.gre is None
    assert not has_note(ignored, "phasediff")
    magnitude.unlink()
    with pytest.raises(InputError, match="magnitude1"):
        require_files(unit)


def test_two_phase_images_and_fieldmap_in_hertz(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_phase1", 1, {"EchoTime": 0.004, **LINK})
    dataset.image("sub-01_phase2", 1, {"EchoTime": 0.0065, **LINK})
    dataset.image("sub-01_magnitude1", 1, {})
    gre = dataset.unit().gre
    assert gre is not None
    assert gre.kind == "phases"
    assert gre.echo_difference == pytest.approx(0.0025)
    assert [path.name for path in gre.images] == ["sub-01_phase1.nii.gz", "sub-01_phase2.nii.gz"]
    dataset.dwi("sub-02", AP)
    link = {"IntendedFor": "bids::sub-02/dwi/sub-02_dwi.nii.gz"}
    field = dataset.image("sub-02_fieldmap", 1, {"Units": "rad/s", **link})
    dataset.image("sub-02_magnitude", 1, {})
    (unit,) = dataset.units(participants=["02"])
    assert unit.gre is not None
    assert unit.gre.units == "rad/s"
    wanted = read_volume(field).data / (2 * np.pi)
    torch.testing.assert_close(read_fieldmap(unit.gre).field.data, wanted)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"EchoTime1": 0.01}, r"phasediff.*no EchoTime2.*--ignore fieldmaps"),
        ({"EchoTime1": 10, "EchoTime2": 12.46}, r"phasediff.*2\.46 s apart.*--ignore fieldmaps"),
    ],
)
def test_invalid_fieldmap_sidecars_raise(dataset: Dataset, sidecar: dict[str, Any], message: str) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_phasediff", 1, {**sidecar, **LINK})
    dataset.image("sub-01_magnitude1", 1, {})
    with pytest.raises(MetadataError, match=message):
        dataset.units()


def test_pair_takes_precedence_over_a_gradient_echo_fieldmap(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, **LINK})
    dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.01, "EchoTime2": 0.012, **LINK})
    dataset.image("sub-01_magnitude1", 1, {})
    unit = dataset.unit()
    assert unit.gre is None
    assert unit.epis
    assert has_note(unit, "phasediff", "not used", "better")


def test_ignoring_fieldmaps_ignores_b0_field_sources(tmp_path: Path) -> None:
    """A series linked to its fieldmap by B0FieldSource is processed when fieldmaps are ignored."""
    from dsiprep.phantom import PhantomSettings, make_phantom

    table = tmp_path / "table"
    (table.with_suffix(".bval")).write_text("0 1000 1000 1000 1000 1000 1000\n")
    (table.with_suffix(".bvec")).write_text("0 1 0 0 .6 .6 0\n0 0 1 0 .8 0 .6\n0 0 0 1 0 .8 .8\n")
    scheme = f"{table}.bval,{table}.bvec"
    phantom = make_phantom(
        tmp_path / "phantom", PhantomSettings(scheme=scheme, resolution=8, t1w_resolution=4, ideal=False)
    )
    (unit,) = find_units(phantom / "bids", SETTINGS, ignore=frozenset({"fieldmaps"}))
    assert not unit.epis
    assert not unit.reversed_pairs()
    (unit,) = find_units(phantom / "bids", SETTINGS)
    assert len(unit.epis) == 1
    assert len(unit.reversed_pairs()) == 2
