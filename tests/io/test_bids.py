"""Files of a dataset: which go together, what they must have, and what is said when they do not."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import GreFieldmap, PhaseEncoding, Unit
from dsiprep.data.grid import Grid
from dsiprep.errors import GradientError, InputError, MetadataError, SettingsError
from dsiprep.io.bids import explain, find_units, read_unit, require_files, scheme_of
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.nifti import read_image, read_series, read_shape, read_volume, to_lps, write_image
from dsiprep.settings import AnatomySettings, Settings
from helpers.bids_dataset import LAS, SETTINGS, Dataset
from helpers.shared_data import SHARED

REAL = SHARED / "bids"
AP = {"PhaseEncodingDirection": "j-", "TotalReadoutTime": 0.05}
PA = {"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.05}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "bids")


def told(unit: Unit, *words: str) -> bool:
    """Whether one note holds all the words."""
    return any(all(word in note for word in words) for note in unit.notes)


def test_reversed_runs_go_together(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA)
    dataset.image("sub-01_T1w", 1, {})
    unit = dataset.unit(participants=["sub-01"])
    assert (unit.subject, unit.session, unit.name) == ("01", None, "sub-01")
    assert [run.pe for run in unit.runs] == [PhaseEncoding(1, -1, 0.05), PhaseEncoding(1, 1, 0.05)]
    assert unit.runs[0].entities == {"sub": "01", "dir": "AP"}
    assert [path.name for path in unit.t1w] == ["sub-01_T1w.nii.gz"]
    assert told(unit, "j and j-", "PhaseEncodingDirection")
    text = explain(unit, scheme_of(unit, 100))
    assert "sub-01_dir-AP_dwi.nii.gz  (phase encoding j-, readout time 0.05000 s)" in text
    assert "Single shell, 19 directions at b 1000" in text


def test_sessions_are_never_mixed(dataset: Dataset) -> None:
    dataset.dwi("sub-01_ses-a_dir-AP", AP)
    dataset.dwi("sub-01_ses-b_dir-PA", PA)
    dataset.image("sub-01_ses-a_T1w", 1, {})
    first, second = dataset.units()
    assert (first.session, second.session) == ("a", "b")
    assert first.name == "sub-01_ses-a_dir-AP" and not first.epis and not second.epis
    assert second.t1w == first.t1w and told(second, "T1w of ses-a serves all sessions")
    assert [(unit.session, unit.t1w) for unit in dataset.units(sessions=["ses-b"])] == [("b", first.t1w)]
    with pytest.raises(InputError, match="--session-label c; there are a, b"):
        dataset.units(sessions=["c"])


@pytest.mark.parametrize("suffix", ["T1w", "T2w"])
@pytest.mark.parametrize("reference", ["first-lex", "unbiased"])
def test_one_anatomy_serves_all_sessions(dataset: Dataset, reference: str, suffix: str) -> None:
    """anat/ is written once per subject, from the images of all its sessions."""
    for session in ("a", "b"):
        dataset.dwi(f"sub-01_ses-{session}", AP)
        for run in (2, 1):
            dataset.image(f"sub-01_ses-{session}_run-{run}_{suffix}", 1, {})
    wanted = [f"sub-01_ses-{session}_run-{run}_{suffix}.nii.gz" for session in ("a", "b") for run in (1, 2)]
    settings = Settings(anatomy=AnatomySettings(modality=suffix, reference=reference))
    units = [*find_units(dataset.root, settings), *find_units(dataset.root, settings, sessions=["b"])]
    assert [[path.name for path in unit.structural(suffix)] for unit in units] == [wanted] * 3
    assert told(units[0], f"The {suffix} of ses-a and ses-b serve all sessions")


def test_sessionwise_sessions_have_their_own_anatomy(dataset: Dataset) -> None:
    for session in ("a", "b", "c"):
        dataset.dwi(f"sub-01_ses-{session}", AP)
    for name in ("ses-a", "ses-b"):
        dataset.image(f"sub-01_{name}_T1w", 1, {})
    settings = Settings(anatomy=AnatomySettings(reference="sessionwise"))
    units = find_units(dataset.root, settings)
    assert [[path.name for path in unit.t1w] for unit in units] == [
        ["sub-01_ses-a_T1w.nii.gz"], ["sub-01_ses-b_T1w.nii.gz"], []
    ]  # fmt: skip
    assert told(units[2], "no T1w of its own") and not told(units[0], "T1w")


def test_the_other_contrast_is_told_where_the_one_asked_for_lacks(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_T2w", 1, {})
    assert told(dataset.unit(), "--anat-modality T2w would use it")


def test_session_without_label_shares_its_structural_image(dataset: Dataset) -> None:
    dataset.dwi("sub-01_ses-a", AP)
    dataset.image("sub-01_T1w", 1, {})
    assert [path.name for path in dataset.unit().t1w] == ["sub-01_T1w.nii.gz"]


@pytest.mark.parametrize("target", ["dwi/sub-01_dwi.nii.gz", "bids::sub-01/dwi/sub-01_dwi.nii.gz"])
def test_fieldmap_by_intended_for(dataset: Dataset, target: str) -> None:
    dataset.dwi("sub-01", AP)
    epi = dataset.image("sub-01_dir-PA_epi", 3, {**PA, "IntendedFor": [target]})
    unit = dataset.unit()
    assert [(ref.image, ref.pe, ref.bval) for ref in unit.epis] == [(epi, PhaseEncoding(1, 1, 0.05), None)]
    assert told(unit, "IntendedFor") and epi in unit.files()
    assert read_unit(unit, SETTINGS).epis[0].data.shape == (3, 4, 5, 3)
    assert dataset.unit(ignore=frozenset({"fieldmaps"})).epis == ()


def test_fieldmap_by_b0_field(dataset: Dataset) -> None:
    dataset.dwi("sub-01", {**AP, "B0FieldIdentifier": "f", "B0FieldSource": "f"})
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, "B0FieldIdentifier": "f"})
    unit = dataset.unit()
    assert [ref.image.name for ref in unit.epis] == ["sub-01_dir-PA_epi.nii.gz"]
    assert told(unit, "B0FieldIdentifier") and read_unit(unit, SETTINGS).epis[0].data.shape == (1, 4, 5, 3)


def test_short_reversed_series_is_a_reference(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA, volumes=6)
    unit = dataset.unit()
    assert [run.image.name for run in unit.runs] == ["sub-01_dir-AP_dwi.nii.gz"]
    assert [ref.bval.name for ref in unit.epis if ref.bval] == ["sub-01_dir-PA_dwi.bval"]
    assert told(unit, "under 16 volumes") and told(unit, "together they show")
    assert read_unit(unit, SETTINGS).epis[0].data.shape == (1, 4, 5, 3)  # the b=0 only


def test_short_pair_stays_a_pair(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP, volumes=13)
    dataset.dwi("sub-01_dir-PA", PA, volumes=13)
    assert len(dataset.unit().runs) == 2


def test_separate_runs_borrow_from_each_other(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA)
    first, second = dataset.units(separate_all_dwis=True)
    assert len(first.runs) == len(second.runs) == 1
    assert first.epis[0].image == second.runs[0].image and first.epis[0].bval == second.runs[0].bval
    assert not dataset.units(ignore=frozenset({"pepolar-dwis"}))[0].epis


def test_readout_time_is_inherited_and_derived(dataset: Dataset) -> None:
    dataset.json(dataset.root / "dwi.json", {"EffectiveEchoSpacing": 0.0005, "ReconMatrixPE": 101})
    dataset.dwi("sub-01_dir-AP", {"PhaseEncodingDirection": "j-"})
    dataset.dwi("sub-01_dir-PA", {"PhaseEncodingDirection": "j", "EstimatedTotalReadoutTime": 0.05})
    unit = dataset.unit()
    assert [run.pe.readout_time for run in unit.runs if run.pe] == pytest.approx([0.05, 0.05])
    assert told(unit, "dir-AP", "0.05000 s from EffectiveEchoSpacing x (ReconMatrixPE - 1)")
    assert told(unit, "dir-PA", "from EstimatedTotalReadoutTime")


def test_no_readout_time_on_either_side(dataset: Dataset) -> None:
    dataset.dwi("sub-01_dir-AP", {"PhaseEncodingDirection": "j-"})
    dataset.dwi("sub-01_dir-PA", {"PhaseEncodingDirection": "j"})
    unit = dataset.unit()
    assert [run.pe for run in unit.runs] == [PhaseEncoding(1, -1), PhaseEncoding(1, 1)]
    assert told(unit, "no fieldmap in Hz")


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"PhaseEncodingDirection": "j"}, r"dir-PA_dwi.*no TotalReadoutTime.*0\.05 s.*--ignore"),
        ({"PhaseEncodingDirection": "j", "TotalReadoutTime": 50}, r"dir-PA.*TotalReadoutTime.*50.*seconds"),
        ({"PhaseEncodingDirection": "j", "TotalReadoutTime": 0.005}, r"dir-PA_dwi.*0\.005 s, but 0\.05 s"),
        ({"PhaseEncodingDirection": "AP"}, r"dir-PA_dwi.*PhaseEncodingDirection is 'AP'.*--ignore"),
    ],
)
def test_sidecars_that_cannot_be(dataset: Dataset, sidecar: dict[str, Any], message: str) -> None:
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", sidecar)
    with pytest.raises(MetadataError, match=message):
        dataset.units()
    failed: dict[str, Any] = {}
    dataset.dwi("sub-02", AP)
    assert [unit.subject for unit in dataset.units(failed=failed)] == ["02"]
    assert isinstance(failed["01"], MetadataError)
    assert dataset.units(participants=["01"], ignore=frozenset({"sdc"}))


def test_fieldmap_readout_missing_on_one_side(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    link = {"IntendedFor": "dwi/sub-01_dwi.nii.gz"}
    dataset.image("sub-01_dir-PA_epi", 1, {"PhaseEncodingDirection": "j", **link})
    with pytest.raises(MetadataError, match=r"dir-PA_epi.*no TotalReadoutTime.*--ignore fieldmaps"):
        dataset.units()
    dataset.image("sub-01_dir-PA_epi", 1, {"TotalReadoutTime": 0.05, **link})
    with pytest.raises(MetadataError, match=r"dir-PA_epi.*no PhaseEncodingDirection.*--ignore fieldmaps"):
        dataset.units()
    assert dataset.unit(ignore=frozenset({"fieldmaps"})).runs


def test_axis_without_a_sign(dataset: Dataset) -> None:
    dataset.dwi("sub-01", {"PhaseEncodingAxis": "j", "EstimatedTotalReadoutTime": 0.04})
    unit = dataset.unit()
    assert unit.runs[0].pe is None and told(unit, "PhaseEncodingAxis j without a sign")


LINK = {"IntendedFor": "bids::sub-01/dwi/sub-01_dwi.nii.gz"}


def test_gre_phase_difference_corrects_series_without_a_pair(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    phase = dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.01, "EchoTime2": 0.012, **LINK})
    magnitude = dataset.image("sub-01_magnitude1", 1, {})
    unit = dataset.unit()
    assert unit.gre == GreFieldmap("phasediff", (phase,), magnitude, pytest.approx(0.002))
    assert told(unit, "sub-01_phasediff.nii.gz", "corrects the distortion")
    assert "field  sub-01_phasediff.nii.gz" in explain(unit, None)
    read = read_fieldmap(unit.gre)
    assert float(read.field.data.abs().max()) <= np.pi + 1e-5 and read.field.grid.shape == (4, 5, 3)
    assert read_unit(unit, SETTINGS).name == "sub-01"
    left = dataset.unit(ignore=frozenset({"fieldmaps"}))
    assert left.gre is None and not told(left, "phasediff")
    magnitude.unlink()
    with pytest.raises(InputError, match="magnitude1"):
        require_files(unit)


def test_gre_two_phases_and_field_in_hertz(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_phase1", 1, {"EchoTime": 0.004, **LINK})
    dataset.image("sub-01_phase2", 1, {"EchoTime": 0.0065, **LINK})
    dataset.image("sub-01_magnitude1", 1, {})
    gre = dataset.unit().gre
    assert gre is not None and gre.kind == "phases" and gre.echo_difference == pytest.approx(0.0025)
    assert [path.name for path in gre.images] == ["sub-01_phase1.nii.gz", "sub-01_phase2.nii.gz"]
    dataset.dwi("sub-02", AP)
    link = {"IntendedFor": "bids::sub-02/dwi/sub-02_dwi.nii.gz"}
    field = dataset.image("sub-02_fieldmap", 1, {"Units": "rad/s", **link})
    dataset.image("sub-02_magnitude", 1, {})
    (unit,) = dataset.units(participants=["02"])
    assert unit.gre is not None and unit.gre.units == "rad/s"
    wanted = read_volume(field).data / (2 * np.pi)
    torch.testing.assert_close(read_fieldmap(unit.gre).field.data, wanted)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"EchoTime1": 0.01}, r"phasediff.*no EchoTime2.*--ignore fieldmaps"),
        ({"EchoTime1": 10, "EchoTime2": 12.46}, r"phasediff.*2\.46 s apart.*--ignore fieldmaps"),
    ],
)
def test_gre_sidecars_that_cannot_be(dataset: Dataset, sidecar: dict[str, Any], message: str) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_phasediff", 1, {**sidecar, **LINK})
    dataset.image("sub-01_magnitude1", 1, {})
    with pytest.raises(MetadataError, match=message):
        dataset.units()


def test_pair_goes_before_a_gre_fieldmap(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    dataset.image("sub-01_dir-PA_epi", 1, {**PA, **LINK})
    dataset.image("sub-01_phasediff", 1, {"EchoTime1": 0.01, "EchoTime2": 0.012, **LINK})
    dataset.image("sub-01_magnitude1", 1, {})
    unit = dataset.unit()
    assert unit.gre is None and unit.epis and told(unit, "phasediff", "not used", "better")


def test_four_phase_encodings_do_not_mix(dataset: Dataset) -> None:
    """No unit holds more than one axis of phase encoding."""
    for name, direction in {"AP": "j-", "PA": "j", "LR": "i", "RL": "i-"}.items():
        dataset.dwi(f"sub-01_dir-{name}", {"PhaseEncodingDirection": direction, "TotalReadoutTime": 0.05})
    units = dataset.units()
    axes = [{image.pe.axis for image in (*unit.runs, *unit.epis) if image.pe} for unit in units]
    assert sorted(map(tuple, axes)) == [(0,), (1,)]


def test_phase_images_are_left_with_a_note(dataset: Dataset) -> None:
    dataset.dwi("sub-01_part-mag", AP)
    dataset.image("sub-01_part-phase_dwi", 20, AP)
    unit = dataset.unit()
    assert (unit.name, len(unit.runs)) == ("sub-01", 1) and told(unit, "part-phase", "not used")
    assert not told(dataset.unit(ignore=frozenset({"phase"})), "part-phase")


def test_series_of_different_grids_are_taken_apart(dataset: Dataset) -> None:
    turn = np.eye(4)
    turn[:2, :2] = [[0.94, -0.342], [0.342, 0.94]]
    dataset.dwi("sub-01_acq-a_dir-AP", AP)
    dataset.dwi("sub-01_acq-a_dir-PA", PA)
    dataset.dwi("sub-01_acq-b_dir-PA", PA, affine=turn @ LAS)
    first, second = dataset.units()
    assert (first.name, len(first.runs)) == ("sub-01_acq-a", 2)
    assert (second.name, len(second.runs)) == ("sub-01_acq-b_dir-PA", 1)
    assert told(second, "each grid is processed by itself")


def test_small_shifts_stay_together(dataset: Dataset) -> None:
    moved = LAS.copy()
    moved[2, 3] += 1.5
    dataset.dwi("sub-01_dir-AP", AP)
    dataset.dwi("sub-01_dir-PA", PA, affine=moved)
    assert told(dataset.unit(), "differ by up to 1.5 mm", "resampled")


def test_unpaired_readouts_are_told(dataset: Dataset) -> None:
    dataset.dwi("sub-01_acq-a_dir-AP", AP)
    dataset.dwi("sub-01_acq-b_dir-PA", {**PA, "TotalReadoutTime": 0.04})
    units = dataset.units()
    assert len(units) == 2 and all(told(unit, "none with the same axis, readout time") for unit in units)


def test_filters(dataset: Dataset) -> None:
    dataset.dwi("sub-01_acq-a_run-01", AP)
    dataset.dwi("sub-01_acq-b_run-02", PA)
    dataset.image("sub-01_acq-x_T1w", 1, {})
    dataset.image("sub-01_T1w", 1, {})
    only = dataset.unit(filters={"dwi": {"acquisition": ["a", "c"]}, "t1w": {"acquisition": None}})
    assert only.runs[0].entities["acq"] == "a" and [p.name for p in only.t1w] == ["sub-01_T1w.nii.gz"]
    assert dataset.unit(filters={"dwi": {"run": 2}}).runs[0].entities["acq"] == "b"
    assert dataset.unit(filters={"dwi": {"direction": None, "run": "01"}}).runs
    with pytest.raises(InputError, match="--bids-filter-file"):
        dataset.units(filters={"dwi": {"acquisition": "z"}})
    with pytest.raises(SettingsError, match="'bold' is no kind of file"):
        dataset.units(filters={"bold": {}})
    with pytest.raises(SettingsError, match="shape"):
        dataset.units(ignore=frozenset({"shape"}))


def test_participants_that_are_not_there(dataset: Dataset, tmp_path: Path) -> None:
    dataset.dwi("sub-01", AP)
    dataset.dwi("sub-02", AP)
    with pytest.raises(InputError, match=r"--participant-label 7: not in .*; there are 01, 02"):
        dataset.units(participants=["sub-7", "01"])
    with pytest.raises(InputError, match="no such folder"):
        find_units(tmp_path / "none", SETTINGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no sub-\* folders"):
        find_units(tmp_path / "empty", SETTINGS)
    (dataset.root / "sub-03" / "anat").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no diffusion-weighted series .* of sub-03"):
        dataset.units(participants=["03"])


def test_files_that_are_not_there(dataset: Dataset) -> None:
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


def test_what_is_read(dataset: Dataset) -> None:
    dataset.dwi("sub-01", {**AP, "SliceTiming": [0, 0.5, 1], "SliceEncodingDirection": "k-"})
    run = read_unit(dataset.unit(), SETTINGS).runs[0]
    assert run.data.dtype == torch.float32 and run.data.shape == (20, 4, 5, 3)
    image = nib.load(dataset.root / "sub-01/dwi/sub-01_dwi.nii.gz")
    np.testing.assert_array_equal(run.data.numpy(), np.moveaxis(image.get_fdata(), 3, 0))
    np.testing.assert_array_equal(run.grid.affine, LAS)
    assert run.slice_times == (1, 0.5, 0) and run.name == "sub-01_dwi.nii.gz"
    # LAS: FSL's frame is that of the voxels
    fsl = np.loadtxt(dataset.root / "sub-01/dwi/sub-01_dwi.bvec").T
    np.testing.assert_allclose(run.bvecs, fsl * (-1, 1, 1), atol=1e-5)


@pytest.mark.skipif(not REAL.is_dir(), reason="the public datasets are not beside the project")
def test_real_datasets() -> None:
    units = {unit.name: unit for unit in find_units(REAL, SETTINGS)}
    canon = [f"sub-canon_acq-{acq}_dir-PA" for acq in ("all20", "ax20", "cor20", "headturn", "sag20")]
    assert sorted(units) == sorted([*canon, "sub-canon_acq-ortho", "sub-philips", "sub-xa30"])
    assert [len(units[name].runs) for name in ("sub-canon_acq-ortho", "sub-philips", "sub-xa30")] == [2, 1, 2]
    assert told(units["sub-canon_acq-ortho"], "no fieldmap in Hz")
    assert told(units["sub-xa30"], "sub-xa30_phasediff.nii.gz", "not used")
    assert units["sub-philips"].runs[0].pe is None
    for unit in units.values():
        raw = read_unit(unit, SETTINGS)
        assert sum(len(run.bvals) for run in raw.runs) == sum(len(run.data) for run in raw.runs)


# Images


def ramp(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    grid = Grid((4, 5, 3), LAS)
    data = ramp((6, 4, 5, 3)) - 7.25
    write_image(tmp_path / name, torch.from_numpy(data), grid)
    again, found = read_image(tmp_path / name)
    np.testing.assert_array_equal(again, data)
    assert found.matches(grid)
    by_nibabel = nib.load(tmp_path / name)
    np.testing.assert_array_equal(by_nibabel.get_fdata(), np.moveaxis(data, 0, 3))
    assert by_nibabel.header.get_xyzt_units() == ("mm", "sec") and by_nibabel.get_data_dtype() == np.float32
    np.testing.assert_allclose(by_nibabel.header.get_qform(), LAS, atol=1e-6)
    assert read_shape(tmp_path / name) == (4, 5, 3, 6)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_simple_itk_reads_it_too(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    write_image(tmp_path / "a.nii.gz", ramp((6, 4, 5, 3)), Grid((4, 5, 3), LAS))
    seen = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    np.testing.assert_array_equal(seen.transpose(0, 3, 2, 1), ramp((6, 4, 5, 3)))


def test_equal_data_give_equal_files(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_image(tmp_path / name, ramp((4, 5, 3)), Grid((4, 5, 3), LAS), discrete=False)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_labels_are_small(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", np.ones((4, 5, 3), bool), Grid((4, 5, 3), LAS), discrete=True)
    assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == np.uint8
    assert read_volume(tmp_path / "a.nii.gz").data.sum() == 60


def test_scaled_integers_and_odd_shapes(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(4, 5, 3, 1, 1), LAS)
    image.header.set_slope_inter(0.5, 2)
    image.to_filename(tmp_path / "a.nii")
    expected = np.asarray(nib.load(tmp_path / "a.nii").dataobj)[..., 0, 0]
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").numpy(), expected)
    nib.Nifti2Image(ramp((4, 5, 3)), LAS).to_filename(tmp_path / "b.nii")
    np.testing.assert_array_equal(read_image(tmp_path / "b.nii")[0], ramp((4, 5, 3)))


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR", "LPS", "SPR"])
def test_to_lps_moves_no_voxel(codes: str) -> None:
    orient = nib.orientations.axcodes2ornt(tuple(codes))
    sheared = np.array([[2.0, 0.1, 0, 5], [0, 3, 0.2, -5], [0.1, 0, 4, 1], [0, 0, 0, 1]])
    start = nib.Nifti1Image(ramp((4, 5, 3)), sheared)
    image = start.as_reoriented(orient)
    grid = Grid(image.shape, image.affine)
    data, lps = to_lps(np.stack([image.get_fdata()] * 2), grid)
    assert nib.aff2axcodes(lps.affine) == ("L", "P", "S") and data.shape == (2, *lps.shape)
    wanted = start.as_reoriented(nib.orientations.axcodes2ornt(("L", "P", "S")))
    np.testing.assert_array_equal(data[1], wanted.get_fdata())
    np.testing.assert_allclose(lps.affine, wanted.affine)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    whole = tmp_path / "whole.nii.gz"
    noise = np.random.default_rng(0).normal(size=(20, 4, 5, 3)).astype(np.float32)
    write_image(whole, noise, Grid((4, 5, 3), LAS))
    content = whole.read_bytes()
    for stop in (len(content) // 2, len(content) - 4, 30):
        (tmp_path / "cut.nii.gz").write_bytes(content[:stop])
        with pytest.raises(InputError, match=r"cut\.nii\.gz.*truncated"):
            read_image(tmp_path / "cut.nii.gz")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    (tmp_path / "cut.nii.gz").write_bytes(bytes(flipped))
    with pytest.raises(InputError, match=r"truncated or damaged"):
        read_image(tmp_path / "cut.nii.gz")
    (tmp_path / "cut.nii").write_bytes(gzip.decompress(content)[:-100])
    with pytest.raises(InputError, match=r"cut\.nii: the file is truncated"):
        read_image(tmp_path / "cut.nii")
    for junk in (b"", b"hello", b"x" * 1000):
        (tmp_path / "junk.nii").write_bytes(junk)
        with pytest.raises(InputError, match=r"junk\.nii: not readable as NIfTI"):
            read_image(tmp_path / "junk.nii")
    with pytest.raises(InputError, match=r"none\.nii: there is no such file"):
        read_image(tmp_path / "none.nii")


def test_values_that_are_not_numbers_are_told(tmp_path: Path) -> None:
    data = ramp((6, 4, 5, 3))
    data[2, 1, 1] = np.nan
    data[5, 0, 0, 0] = np.inf
    write_image(tmp_path / "a.nii.gz", data, Grid((4, 5, 3), LAS))
    with pytest.raises(InputError, match=r"a\.nii\.gz: 4 values in volumes 2, 5 .* not numbers"):
        read_image(tmp_path / "a.nii.gz")


def test_wrong_dimensions_are_told(tmp_path: Path) -> None:
    write_image(tmp_path / "flat.nii.gz", ramp((4, 5, 3)), Grid((4, 5, 3), LAS))
    write_image(tmp_path / "many.nii.gz", ramp((6, 4, 5, 3)), Grid((4, 5, 3), LAS))
    with pytest.raises(InputError, match=r"flat.*single volume of 4 x 5 x 3 voxels, but .*series \(4-D\)"):
        read_series(tmp_path / "flat.nii.gz")
    with pytest.raises(InputError, match=r"many.*6 volumes, but a single 3-D image"):
        read_volume(tmp_path / "many.nii.gz")
    nib.Nifti1Image(np.zeros((4, 5, 3), np.complex64), LAS).to_filename(tmp_path / "c.nii")
    with pytest.raises(InputError, match="complex64, but real numbers"):
        read_image(tmp_path / "c.nii")


def test_images_without_a_place_are_told(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp((4, 5, 3)), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    image.to_filename(tmp_path / "a.nii")
    with pytest.raises(InputError, match=r"sform and qform codes are 0"):
        read_image(tmp_path / "a.nii")


def test_single_volume_as_a_series(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01", AP)
    nib.Nifti1Image(np.ones((4, 5, 3), np.int16), LAS).to_filename(path)
    with pytest.raises(InputError, match=r"sub-01_dwi\.nii\.gz: a single volume"):
        read_unit(dataset.unit(), SETTINGS)


def test_unreadable_series_is_told_when_it_is_read(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01", AP)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"sub-01_dwi\.nii\.gz: not readable"):
        read_unit(dataset.unit(), SETTINGS)


def test_damaged_structural_image_is_told_before_hours_of_work(dataset: Dataset) -> None:
    dataset.dwi("sub-01", AP)
    path = dataset.image("sub-01_T1w", 1, {})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="sub-01_T1w"):
        read_unit(dataset.unit(), SETTINGS)


def test_a_phase_encoding_without_b0_is_told(dataset: Dataset) -> None:
    path = dataset.dwi("sub-01", AP)
    (path.parent / "sub-01_dwi.bval").write_text(" ".join(["150"] + ["1000"] * 19))
    np.savetxt(path.parent / "sub-01_dwi.bvec", np.tile([[1.0], [0], [0]], 20))
    with pytest.raises(GradientError, match=r"sub-01_dwi.*lowest b-value is 150.*--b0-threshold 150"):
        read_unit(dataset.unit(), SETTINGS)


def test_ignored_fieldmaps_leave_no_contradiction(tmp_path: Path) -> None:
    """A series that names its fieldmap by B0FieldIdentifier still goes when fieldmaps are ignored."""
    from dsiprep.phantom import PhantomSettings, make_phantom

    table = tmp_path / "table"
    (table.with_suffix(".bval")).write_text("0 1000 1000 1000 1000 1000 1000\n")
    (table.with_suffix(".bvec")).write_text("0 1 0 0 .6 .6 0\n0 0 1 0 .8 0 .6\n0 0 0 1 0 .8 .8\n")
    scheme = f"{table}.bval,{table}.bvec"
    made = make_phantom(
        tmp_path / "phantom", PhantomSettings(scheme=scheme, resolution=8, t1w_resolution=4, ideal=False)
    )
    (unit,) = find_units(made / "bids", SETTINGS, ignore=frozenset({"fieldmaps"}))
    assert not unit.epis and not unit.reversed_pairs()
    (unit,) = find_units(made / "bids", SETTINGS)
    assert len(unit.epis) == 1 and len(unit.reversed_pairs()) == 2
