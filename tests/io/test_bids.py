"""Grouping of BIDS datasets into units, with notes and error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import GreFieldmap, PhaseEncoding, Unit
from dsiprep.errors import InputError, MetadataError, SettingsError
from dsiprep.io.bids import explain, find_units, read_unit, require_files, scheme_of
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.nifti import read_volume
from dsiprep.settings import AnatomySettings, Settings
from helpers.bids_dataset import LAS, SETTINGS, Dataset
from helpers.shared_data import SHARED

REAL = SHARED / "bids"
AP = {"PhaseEncodingDirection": "j-", "TotalReadoutTime": 0.05}
PA = {"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.05}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "bids")


def has_note(unit: Unit, *words: str) -> bool:
    """Whether one note contains all the words."""
    return any(all(word in note for word in words) for note in unit.notes)


def test_runs_with_opposite_phase_encoding_form_one_unit(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA)
    dataset.image("sub-01_T1w", 1, {})
    unit = dataset.unit(participants=["sub-01"])
    assert (unit.subject, unit.session, unit.name) == ("01", None, "sub-01")
    assert [run.pe for run in unit.runs] == [PhaseEncoding(1, -1, 0.05), PhaseEncoding(1, 1, 0.05)]
    assert unit.runs[0].entities == {"sub": "01", "dir": "AP"}
    assert [path.name for path in unit.t1w] == ["sub-01_T1w.nii.gz"]
    assert has_note(unit, "j and j-", "PhaseEncodingDirection")
    text = explain(unit, scheme_of(unit, 100))
    assert "sub-01_dir-AP_dwi.nii.gz  (phase encoding j-, readout time 0.05000 s)" in text
    assert "Single shell, 19 directions at b 1000" in text


def test_sessions_are_separate_units(dataset: Dataset) -> None:
    dataset.dwi("sub-01_ses-a_dir-AP", AP)
    dataset.dwi("sub-01_ses-b_dir-PA", PA)
    dataset.image("sub-01_ses-a_T1w", 1, {})
    first, second = dataset.units()
    assert (first.session, second.session) == ("a", "b")
    assert first.name == "sub-01_ses-a_dir-AP"
    assert not first.epis
    assert not second.epis
    assert second.t1w == first.t1w
    assert has_note(second, "T1w of ses-a is used for all sessions")
    assert [(unit.session, unit.t1w) for unit in dataset.units(sessions=["ses-b"])] == [("b", first.t1w)]
    with pytest.raises(InputError, match="--session-label c; available sessions: a, b"):
        dataset.units(sessions=["c"])


@pytest.mark.parametrize("suffix", ["T1w", "T2w"])
@pytest.mark.parametrize("reference", ["first-lex", "unbiased"])
def test_all_sessions_share_one_anatomy(dataset: Dataset, reference: str, suffix: str) -> None:
    """anat/ is written once per subject, from the structural images of all sessions."""
    for session in ("a", "b"):
        dataset.dwi(f"sub-01_ses-{session}", AP)
        for run in (2, 1):
            dataset.image(f"sub-01_ses-{session}_run-{run}_{suffix}", 1, {})
    wanted = [f"sub-01_ses-{session}_run-{run}_{suffix}.nii.gz" for session in ("a", "b") for run in (1, 2)]
    settings = Settings(anatomy=AnatomySettings(modality=suffix, reference=reference))
    units = [*find_units(dataset.root, settings), *find_units(dataset.root, settings, sessions=["b"])]
    assert [[path.name for path in unit.structural(suffix)] for unit in units] == [wanted] * 3
    assert has_note(units[0], f"The {suffix} of ses-a and ses-b are used for all sessions")


def test_sessionwise_anatomy_uses_images_of_the_session(dataset: Dataset) -> None:
    for session in ("a", "b", "c"):
        dataset.dwi(f"sub-01_ses-{session}", AP)
    for name in ("ses-a", "ses-b"):
        dataset.image(f"sub-01_{name}_T1w", 1, {})
    settings = Settings(anatomy=AnatomySettings(reference="sessionwise"))
    units = find_units(dataset.root, settings)
    assert [[path.name for path in unit.t1w] for unit in units] == [
        ["sub-01_ses-a_T1w.nii.gz"], ["sub-01_ses-b_T1w.nii.gz"], []
    ]  # fmt: skip
    assert has_note(units[2], "This session has no T1w")
    assert not has_note(units[0], "T1w")


def test_note_suggests_the_available_modality(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_T2w", 1, {})
    assert has_note(dataset.unit(), "use it with --anat-modality T2w")


def test_structural_image_without_session_is_used_for_sessions(dataset: Dataset) -> None:
    dataset.dwi("sub-01_ses-a", AP)
    dataset.image("sub-01_T1w", 1, {})
    assert [path.name for path in dataset.unit().t1w] == ["sub-01_T1w.nii.gz"]


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


def test_short_series_with_opposite_phase_encoding_is_a_reference(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA, volumes=6)
    unit = dataset.unit()
    assert [run.image.name for run in unit.runs] == ["sub-01_dir-AP_dwi.nii.gz"]
    assert [ref.bval.name for ref in unit.epis if ref.bval] == ["sub-01_dir-PA_dwi.bval"]
    assert has_note(unit, "fewer than 16 volumes")
    assert has_note(unit, "distortion is estimated")
    assert read_unit(unit, SETTINGS).epis[0].data.shape == (1, 4, 5, 3)  # the b=0 only


def test_short_series_of_equal_length_remain_a_pair(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP, volumes=13)
    dataset.dwi("sub-01_dir-PA", PA, volumes=13)
    assert len(dataset.unit().runs) == 2


def test_separate_runs_use_b0_images_of_each_other(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA)
    first, second = dataset.units(separate_all_dwis=True)
    assert len(first.runs) == len(second.runs) == 1
    assert first.epis[0].image == second.runs[0].image
    assert first.epis[0].bval == second.runs[0].bval
    assert not dataset.units(ignore=frozenset({"pepolar-dwis"}))[0].epis


def test_readout_time_is_inherited_and_derived(dataset: Dataset) -> None:
    dataset.json(dataset.root / "dwi.json", {"EffectiveEchoSpacing": 0.0005, "ReconMatrixPE": 101})
    dataset.dwi("sub-01_dir-AP", {"PhaseEncodingDirection": "j-"})
    dataset.dwi("sub-01_dir-PA", {"PhaseEncodingDirection": "j", "EstimatedTotalReadoutTime": 0.05})
    unit = dataset.unit()
    assert [run.pe.readout_time for run in unit.runs if run.pe] == pytest.approx([0.05, 0.05])
    assert has_note(unit, "dir-AP", "0.05000 s from EffectiveEchoSpacing x (ReconMatrixPE - 1)")
    assert has_note(unit, "dir-PA", "from EstimatedTotalReadoutTime")


def test_note_if_no_readout_time_is_known(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", {"PhaseEncodingDirection": "j-"})
    dataset.dwi("sub-01_dir-PA", {"PhaseEncodingDirection": "j"})
    unit = dataset.unit()
    assert [run.pe for run in unit.runs] == [PhaseEncoding(1, -1), PhaseEncoding(1, 1)]
    assert has_note(unit, "no fieldmap in Hz")


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"PhaseEncodingDirection": "j"}, r"dir-PA_dwi.*no TotalReadoutTime.*0\.05 s.*--ignore"),
        ({"PhaseEncodingDirection": "j", "TotalReadoutTime": 50}, r"dir-PA.*TotalReadoutTime.*50.*seconds"),
        ({"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.005}, r"dir-PA_dwi.*0\.005 s, but 0\.05 s"),
        ({"PhaseEncodingDirection": "AP"}, r"dir-PA_dwi.*PhaseEncodingDirection is 'AP'.*--ignore"),
    ],
)
def test_invalid_sidecars_raise(dataset: Dataset, sidecar: dict[str, Any], message: str) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", sidecar)
    with pytest.raises(MetadataError, match=message):
        dataset.units()
    failed: dict[str, Any] = {}
    dataset.dwi("sub-02", AP)
    assert [unit.subject for unit in dataset.units(failed=failed)] == ["02"]
    assert isinstance(failed["01"], MetadataError)
    assert dataset.units(participants=["01"], ignore=frozenset({"sdc"}))


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


def test_phase_encoding_axis_without_sign(dataset: Dataset) -> None:
    dataset.dwi("sub-01", {"PhaseEncodingAxis": "j", "EstimatedTotalReadoutTime": 0.04})
    unit = dataset.unit()
    assert unit.runs[0].pe is None
    assert has_note(unit, "PhaseEncodingAxis j without a sign")


LINK = {"IntendedFor": "bids::sub-01/dwi/sub-01_dwi.nii.gz"}


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


def test_four_phase_encodings_form_one_unit_per_axis(dataset: Dataset) -> None:
    """Each unit has a single phase-encoding axis."""
    for name, direction in {"AP": "j-", "PA": "j", "LR": "i", "RL": "i-"}.items():
        dataset.dwi(f"sub-01_dir-{name}", {"PhaseEncodingDirection": direction, "TotalReadoutTime": 0.05})
    units = dataset.units()
    axes = [{image.pe.axis for image in (*unit.runs, *unit.epis) if image.pe} for unit in units]
    assert sorted(map(tuple, axes)) == [(0,), (1,)]


def test_phase_image_makes_a_series_complex(dataset: Dataset) -> None:
    dataset.dwi("sub-01_part-mag", AP)
    dataset.image("sub-01_part-phase_dwi", 20, AP)
    unit = dataset.unit()
    assert (unit.name, len(unit.runs), unit.left_out) == ("sub-01", 1, ())
    (run,) = unit.runs
    assert run.complex_part is not None
    assert (run.complex_part.name, run.is_cartesian) == ("sub-01_part-phase_dwi.nii.gz", False)
    ignoring = dataset.unit(ignore=frozenset({"phase"}))
    assert ignoring.runs[0].complex_part is None
    assert [image.path.name for image in ignoring.left_out] == ["sub-01_part-phase_dwi.nii.gz"]


def test_phase_of_one_run_alone_is_not_used(dataset: Dataset) -> None:
    dataset.dwi("sub-01_run-1_part-mag", AP)
    dataset.image("sub-01_run-1_part-phase_dwi", 20, AP)
    dataset.dwi("sub-01_run-2_part-mag", AP)
    assert has_note(dataset.unit(), "Phase is not used", "sub-01_run-2_part-mag_dwi.nii.gz has none")


def test_real_and_imaginary_part_are_one_series(dataset: Dataset) -> None:
    dataset.dwi("sub-01_part-real", AP)
    dataset.image("sub-01_part-imag_dwi", 20, AP)
    unit = dataset.unit()
    (run,) = unit.runs
    assert (unit.name, run.image.name, run.is_cartesian) == ("sub-01", "sub-01_part-real_dwi.nii.gz", True)
    assert run.use_phase
    assert not dataset.unit(ignore=frozenset({"phase"})).runs[0].use_phase
    (dataset.root / "sub-01/dwi/sub-01_part-imag_dwi.nii.gz").unlink()
    with pytest.raises(InputError, match="no diffusion-weighted series"):
        dataset.units()


def test_series_on_different_grids_are_separate_units(dataset: Dataset) -> None:
    rotation = np.eye(4)
    rotation[:2, :2] = [[0.94, -0.342], [0.342, 0.94]]
    dataset.dwi("sub-01_acq-a_dir-AP", AP)
    dataset.dwi("sub-01_acq-a_dir-PA", PA)
    dataset.dwi("sub-01_acq-b_dir-PA", PA, affine=rotation @ LAS)
    first, second = dataset.units()
    assert (first.name, len(first.runs)) == ("sub-01_acq-a", 2)
    assert (second.name, len(second.runs)) == ("sub-01_acq-b_dir-PA", 1)
    assert has_note(second, "each grid is processed separately")


def test_series_with_small_shifts_form_one_unit(dataset: Dataset) -> None:
    moved = LAS.copy()
    moved[2, 3] += 1.5
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA, affine=moved)
    assert has_note(dataset.unit(), "differ by up to 1.5 mm", "resampled")


def test_filters_select_files(dataset: Dataset) -> None:
    dataset.dwi("sub-01_acq-a_run-01", AP)
    dataset.dwi("sub-01_acq-b_run-02", PA)
    dataset.image("sub-01_acq-x_T1w", 1, {})
    dataset.image("sub-01_T1w", 1, {})
    only = dataset.unit(filters={"dwi": {"acquisition": ["a", "c"]}, "t1w": {"acquisition": None}})
    assert only.runs[0].entities["acq"] == "a"
    assert [p.name for p in only.t1w] == ["sub-01_T1w.nii.gz"]
    assert dataset.unit(filters={"dwi": {"run": 2}}).runs[0].entities["acq"] == "b"
    assert dataset.unit(filters={"dwi": {"direction": None, "run": "01"}}).runs
    with pytest.raises(InputError, match="--bids-filter-file"):
        dataset.units(filters={"dwi": {"acquisition": "z"}})
    with pytest.raises(SettingsError, match="'bold' is not a kind of file"):
        dataset.units(filters={"bold": {}})
    with pytest.raises(SettingsError, match="shape"):
        dataset.units(ignore=frozenset({"shape"}))


def test_missing_participants_raise(dataset: Dataset, tmp_path: Path) -> None:
    dataset.dwi("sub-01", AP)
    dataset.dwi("sub-02", AP)
    with pytest.raises(InputError, match=r"--participant-label 7: not in .*; available: 01, 02"):
        dataset.units(participants=["sub-7", "01"])
    with pytest.raises(InputError, match="no such folder"):
        find_units(tmp_path / "none", SETTINGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no sub-\* folders"):
        find_units(tmp_path / "empty", SETTINGS)
    (dataset.root / "sub-03" / "anat").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no diffusion-weighted series .* for sub-03"):
        dataset.units(participants=["03"])


@pytest.mark.skipif(not REAL.is_dir(), reason="the public datasets are not available")
def test_public_datasets() -> None:
    units = {unit.name: unit for unit in find_units(REAL, SETTINGS)}
    canon = [f"sub-canon_acq-{acq}_dir-PA" for acq in ("all20", "ax20", "cor20", "headturn", "sag20")]
    assert sorted(units) == sorted([*canon, "sub-canon_acq-ortho", "sub-philips", "sub-xa30"])
    assert [len(units[name].runs) for name in ("sub-canon_acq-ortho", "sub-philips", "sub-xa30")] == [2, 1, 2]
    assert has_note(units["sub-canon_acq-ortho"], "no fieldmap in Hz")
    assert has_note(units["sub-xa30"], "sub-xa30_phasediff.nii.gz", "not used")
    assert units["sub-philips"].runs[0].pe is None
    for unit in units.values():
        raw = read_unit(unit, SETTINGS)
        assert sum(len(run.bvals) for run in raw.runs) == sum(len(run.data) for run in raw.runs)


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
