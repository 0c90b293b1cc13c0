"""Grouping of BIDS datasets into units, with notes and error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.errors import InputError, MetadataError, SettingsError
from dsiprep.io.bids import explain, find_units, read_unit, scheme_of
from dsiprep.settings import AnatomySettings, Settings
from helpers.bids_dataset import AP, LAS, PA, SETTINGS, Dataset, has_note
from helpers.shared_data import SHARED

REAL = SHARED / "bids"


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


def test_phase_encoding_axis_without_sign(dataset: Dataset) -> None:
    dataset.dwi("sub-01", {"PhaseEncodingAxis": "j", "EstimatedTotalReadoutTime": 0.04})
    unit = dataset.unit()
    assert unit.runs[0].pe is None
    assert has_note(unit, "PhaseEncodingAxis j without a sign")


LINK = {"IntendedFor": "bids::sub-01/dwi/sub-01_dwi.nii.gz"}


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
