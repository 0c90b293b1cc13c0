"""File names of derivatives, and their content as read by independent software."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from bids import BIDSLayout

from dsiprep.data.grid import Volume
from dsiprep.data.results import UnitResults
from dsiprep.data.template import Template
from dsiprep.data.transform import Affine
from dsiprep.errors import OutputError
from dsiprep.io import derivatives, itk
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import chain_points
from dsiprep.ops.image.interpolation import sample_linear
from dsiprep.settings import AnatomySettings
from helpers.report_subject import make_subject

# The queries of QSIRecon, which fails if one matches two files.
QUERIES = [
    r"dwi/.*_space-ACPC_desc-preproc_dwi\.nii\.gz",
    r"dwi/.*_space-ACPC_desc-preproc_dwi\.bval",
    r"dwi/.*_space-ACPC_desc-preproc_dwi\.bvec",
    r"dwi/.*_space-ACPC_desc-preproc_dwi\.b",
    r"dwi/.*_space-ACPC_desc-preproc_dwi\.b_table\.txt",
    r"dwi/.*_space-ACPC_desc-preproc_fslbvecs\.txt",
    r"dwi/.*_space-ACPC_dwiref\.nii\.gz",
    r"dwi/.*_space-ACPC_desc-brain_mask\.nii\.gz",
    r"dwi/.*_desc-confounds_timeseries\.tsv",
    r"dwi/.*_space-ACPC_desc-image_qc\.tsv",
    r"dwi/.*_space-ACPC_desc-slice_qc\.json",
    r"dwi/.*_hmcOptimization\.csv",
    r"dwi/.*_space-ACPC_stat-tsnr_dwimap\.nii\.gz",
    r"dwi/.*_space-ACPC_model-[A-Za-z0-9]+_stat-cnr_dwimap\.nii\.gz",
    r"dwi/.*_from-orig_to-dwiref_mode-image_desc-hmc_xfm\.txt",
    r"dwi/.*_from-dwiref_to-ACPC_mode-image_desc-coreg_xfm\.txt",
    r"fmap/.*_desc-preproc_fieldmap\.nii\.gz",
    r"anat/sub-[^_]+_space-ACPC_desc-preproc_T1w\.nii\.gz",
    r"anat/sub-[^_]+_space-ACPC_desc-brain_mask\.nii\.gz",
    r"anat/sub-[^_]+_space-ACPC_dseg\.nii\.gz",
    r"anat/sub-[^_]+_space-ACPC_label-GM_probseg\.nii\.gz",
    r"anat/sub-[^_]+_from-ACPC_to-MNI152[A-Za-z0-9]+_mode-image_xfm\.h5",
    r"anat/sub-[^_]+_from-MNI152[A-Za-z0-9]+_to-ACPC_mode-image_xfm\.h5",
    r"anat/sub-[^_]+_from-anat_to-ACPC_mode-image_xfm\.mat",
    r"anat/sub-[^_]+_from-ACPC_to-anat_mode-image_xfm\.mat",
]

SERIES = "sub-01_acq-dsi_space-ACPC_desc-preproc_dwi"


@pytest.fixture(scope="module")
def subject() -> UnitResults:
    return make_subject()


@pytest.fixture(scope="module")
def written(subject: UnitResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("derivatives")
    derivatives.write_root(out, "0.0")
    derivatives.write_unit(subject, out, None)
    return out


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_matches_one_file(written: Path, query: str) -> None:
    names = [path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()]
    assert len([name for name in names if re.search(f"{query}$", name)]) == 1


@pytest.mark.parametrize("extension", [".nii.gz", ".bval", ".bvec", ".b", ".b_table.txt"])
def test_pybids_finds_one_file_of_the_series(written: Path, extension: str) -> None:
    """PyBIDS, with which QSIRecon queries; `.bvec`, `.b` and FSL's table differ, so a wrong match is a mirror image."""
    layout = BIDSLayout(written, validate=False, is_derivative=True)
    found = layout.get(suffix="dwi", space=["T1w", "ACPC"], extension=extension)
    assert [Path(file.path).name for file in found] == [f"{SERIES}{extension}"]
    assert len(layout.get(suffix="fslbvecs")) == 1


def test_gradient_tables_hold_the_same_vectors_and_the_sidecar_describes_each(
    written: Path, subject: UnitResults
) -> None:
    """The frames that the sidecar states, computed here from the world vectors for an LPS+ image."""
    folder, world = next(written.rglob("dwi")), subject.preprocessed.dwi.bvecs
    described = json.loads((folder / f"{SERIES}.json").read_text())["GradientTables"]
    fsl = f"{SERIES.removesuffix('_dwi')}_fslbvecs.txt"
    assert described.keys() == {f"{SERIES}.bvec", f"{SERIES}.b", f"{SERIES}.b_table.txt", fsl}
    assert "DIPY" in described[f"{SERIES}.bvec"]["ReadBy"]
    assert "-fslgrad" in described[fsl]["ReadBy"]
    np.testing.assert_allclose(np.loadtxt(folder / f"{SERIES}.bvec").T, world * [-1, -1, 1], atol=1e-7)
    np.testing.assert_allclose(np.loadtxt(folder / fsl).T, world * [1, -1, 1], atol=1e-7)
    np.testing.assert_allclose(np.loadtxt(folder / f"{SERIES}.b")[:, :3], world, atol=1e-7)
    np.testing.assert_allclose(np.loadtxt(folder / f"{SERIES}.b_table.txt")[:, 1:], world * [-1, -1, 1], atol=1e-6)


def test_segmentation_labels_are_written_if_available(subject: UnitResults, tmp_path: Path) -> None:
    """Written under QSIPrep's name, and removed by a later run without labels."""
    name = "sub-01/anat/sub-01_space-ACPC_desc-aseg_dseg.nii.gz"
    labels = replace(subject.anatomy.mask, data=1024 * subject.anatomy.mask.data)
    derivatives.write_unit(replace(subject, anatomy=replace(subject.anatomy, labels=labels)), tmp_path, None)
    stored = nib.load(tmp_path / name)
    assert stored.get_data_dtype() == np.int16
    assert np.asarray(stored.dataobj).max() == 1024
    derivatives.write_unit(subject, tmp_path, None)
    assert not (tmp_path / name).exists()


def test_images_are_oriented_lps(written: Path) -> None:
    images = [path for path in written.rglob("*space-ACPC*.nii.gz") if "/dwi/" in path.as_posix()]
    assert len(images) >= 4
    for path in images:
        assert nib.aff2axcodes(nib.load(path).affine) == ("L", "P", "S"), path.name


def test_images_in_acpc_space_are_aligned_not_scanner_space(written: Path) -> None:
    images = [*written.rglob("*space-ACPC*.nii.gz")]
    assert len(images) > 8
    for path in images:
        header = nib.load(path).header
        assert int(header["sform_code"]) == int(header["qform_code"]) == 2, path.name
    fieldmap = nib.load(next(written.rglob("*_fieldmap.nii.gz"))).header
    assert int(fieldmap["sform_code"]) == 1  # on the grid of the dwiref


@pytest.mark.parametrize(("name", "code"), [("MNI152NLin2009cAsym", 4), ("Macaque", 2)])
def test_images_in_template_space_have_the_code_of_the_template(
    subject: UnitResults, tmp_path: Path, name: str, code: int
) -> None:
    warped = subject.anatomy.template_image
    assert warped is not None
    template = Template(name, warped, warped, None, "test")
    anatomy = replace(subject.anatomy, template=name)
    derivatives.write_anatomy_only(anatomy, subject.unit, tmp_path, template, AnatomySettings())
    images = [*tmp_path.rglob(f"*space-{name}*.nii.gz")]
    assert {int(nib.load(path).header["sform_code"]) for path in images} == {code}


def test_repetition_time_is_in_header_and_sidecar(subject: UnitResults, tmp_path: Path) -> None:
    runs = tuple(replace(run, metadata={"RepetitionTime": 3, "EchoTime": 0.09}) for run in subject.unit.runs)
    derivatives.write_unit(replace(subject, unit=replace(subject.unit, runs=runs)), tmp_path, None)
    header = nib.load(next(tmp_path.rglob("*_desc-preproc_dwi.nii.gz"))).header
    assert header.get_zooms()[3] == 3
    assert header.get_xyzt_units() == ("mm", "sec")
    sidecar = json.loads(next(tmp_path.rglob("*_desc-preproc_dwi.json")).read_text())
    assert (sidecar["RepetitionTime"], sidecar["EchoTime"], sidecar["TotalReadoutTime"]) == (3, 0.09, 0.05)
    assert "PhaseEncodingDirection" not in sidecar  # AP and PA


def test_motion_file_has_one_lps_transform_per_volume(written: Path, subject: UnitResults, tmp_path: Path) -> None:
    text = next(written.rglob("*desc-hmc_xfm.txt")).read_text()
    head, *blocks = re.split(r"^#Transform \d+\n", text, flags=re.MULTILINE)
    assert len(blocks) == len(subject.acquired.dwi)
    flip = np.array([-1.0, -1, 1])
    point = np.array([10.0, -20, 30])
    for motion in subject.motions:
        for matrix, volume in zip(motion.transforms, motion.volumes, strict=True):
            single = tmp_path / "single.txt"
            single.write_text(f"{head}#Transform 0\n{blocks[volume]}")
            mapped = sitk.ReadTransform(str(single)).TransformPoint((point * flip).tolist())
            np.testing.assert_allclose(np.array(mapped) * flip, matrix[:3, :3] @ point + matrix[:3, 3], atol=1e-4)


def test_distortion_file_combines_pose_and_field(written: Path, subject: UnitResults) -> None:
    """SimpleITK maps grid points as dsiprep does: P x + u(x)."""
    distortion = subject.distortion
    assert distortion is not None
    path = next(written.rglob("*desc-sdcup_xfm.h5"))
    transform = sitk.ReadTransform(str(path))
    up = [blip.name for blip in subject.acquired.blips].index("up")
    grid, pose = distortion.fields[up].grid, distortion.poses[up]
    rng = np.random.default_rng(0)
    voxels = rng.integers(1, np.array(grid.shape) - 1, (40, 3))
    for voxel in voxels:
        point = grid.to_world(voxel)
        u = distortion.fields[up].data[(slice(None), *voxel)].numpy()
        expected = pose[:3, :3] @ point + pose[:3, 3] + u
        mapped = np.array(transform.TransformPoint((point * [-1, -1, 1]).tolist())) * [-1, -1, 1]
        np.testing.assert_allclose(mapped, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("originals", "names"),
    [
        (["sub-01_ses-a_acq-x_T1w.nii.gz"], ["sub-01_ses-a"]),
        (["sub-01_run-1_T1w.nii.gz", "sub-01_run-2_T1w.nii.gz"], ["sub-01_run-1", "sub-01_run-2"]),
    ],
)
def test_one_transform_per_structural_image(
    subject: UnitResults, tmp_path: Path, originals: list[str], names: list[str]
) -> None:
    poses = [Affine(rigid_matrix(np.full(6, 0.1 * index)), "orig", "anat") for index in range(len(originals))]
    unit = replace(subject.unit, t1w=tuple(map(Path, originals)))
    anatomy = replace(subject.anatomy, orig_to_anat=tuple(poses))
    derivatives.write_anatomy_only(anatomy, unit, tmp_path, None, AnatomySettings())
    files = sorted((tmp_path / "sub-01" / "anat").glob("*_from-orig_to-anat_mode-image_xfm.txt"))
    assert [path.name.partition("_from")[0] for path in files] == names
    for path, pose in zip(files, poses, strict=True):
        np.testing.assert_allclose(itk.read_affine(path).matrix, pose.matrix, atol=1e-6)


@pytest.mark.parametrize("modality", ["T1w", "T2w"])
def test_sessionwise_anatomy_is_written_per_session(subject: UnitResults, tmp_path: Path, modality: str) -> None:
    """Files of an earlier run with another reference are removed, so that queries stay unambiguous."""
    settings = AnatomySettings(reference="sessionwise", modality=modality)
    image = {modality.lower(): (Path(f"sub-01_ses-b_{modality}.nii.gz"),)}
    unit = replace(subject.unit, session="b", name="sub-01_ses-b_acq-dsi", **image)
    anatomy = replace(subject.anatomy, modality=modality, orig_to_anat=(Affine(np.eye(4), "orig", "anat"),))
    results = replace(subject, unit=unit, anatomy=anatomy)
    derivatives.write_unit(results, tmp_path, None)
    assert (tmp_path / "sub-01" / "anat" / f"sub-01_space-ACPC_desc-preproc_{modality}.nii.gz").exists()
    derivatives.write_unit(replace(results, settings=replace(subject.settings, anatomy=settings)), tmp_path, None)
    image = Path("sub-01", "ses-b", "anat", f"sub-01_ses-b_space-ACPC_desc-preproc_{modality}.nii.gz")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*_desc-preproc_T?w.nii.gz")] == [image]
    sidecar = json.loads(next(tmp_path.rglob("*_desc-preproc_dwi.json")).read_text())
    assert sidecar["SpatialReference"] == f"bids::{image.as_posix()}"
    assert (tmp_path / image).with_name("sub-01_ses-b_from-orig_to-anat_mode-image_xfm.txt").exists()


def test_tables_have_one_row_per_volume(written: Path, subject: UnitResults) -> None:
    lines = next(written.rglob("*_timeseries.tsv")).read_text().splitlines()
    assert len(lines) == 1 + len(subject.acquired.dwi)
    assert {"framewise_displacement", "trans_x", "rot_z", "bval", "original_file"} <= set(lines[0].split("\t"))
    assert len({line.count("\t") for line in lines}) == 1
    quality = next(written.rglob("*image_qc.tsv")).read_text().splitlines()
    assert len(quality) == 2
    described = json.loads(next(written.rglob("*image_qc.json")).read_text())
    assert list(described) == quality[0].split("\t")
    assert all(column["Description"] for column in described.values())
    slices = json.loads(next(written.rglob("*slice_qc.json")).read_text())["slice_z"]
    assert len(slices) == len(subject.acquired.dwi)


def test_failed_write_leaves_no_files(subject: UnitResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(derivatives, "write_tables", disk_full)
    with pytest.raises(OutputError, match="No space left on device"):
        derivatives.write_unit(subject, tmp_path / "out", None)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("model", "name"), [("3dSHORE", "3dSHORE"), ("none", "3dSHORE"), ("tensor", "tensor")])
def test_cnr_file_is_named_after_its_model(subject: UnitResults, tmp_path: Path, model: str, name: str) -> None:
    motions = tuple(replace(motion, model=model) for motion in subject.motions)
    derivatives._write_series(replace(subject, motions=motions), tmp_path)
    assert len(list(tmp_path.glob("*_stat-cnr_dwimap.nii.gz"))) == 1
    assert list(tmp_path.glob(f"*_model-{name}_stat-cnr_dwimap.nii.gz"))


def test_leftovers_of_a_killed_run_are_removed(subject: UnitResults, tmp_path: Path) -> None:
    """The hidden folder of a killed run is removed when its unit is written again; those of other units remain."""
    name = subject.unit.name
    for leftover in (f".dsiprep-{name}", ".dsiprep-sub-99"):
        (tmp_path / leftover / "sub-01").mkdir(parents=True)
        (tmp_path / leftover / "sub-01" / "half.nii.gz").write_text("")
    derivatives.write_unit(subject, tmp_path, None)
    assert [path.name for path in tmp_path.glob(".dsiprep-*")] == [".dsiprep-sub-99"]
    assert not list(tmp_path.glob("sub-01/half.nii.gz"))


def test_stale_files_of_earlier_runs_are_removed(subject: UnitResults, tmp_path: Path) -> None:
    """A second match would break QSIRecon's queries; files of other units and of the user remain."""
    name, folder = subject.unit.name, tmp_path / f"sub-{subject.unit.subject}"
    if subject.unit.session:
        folder /= f"ses-{subject.unit.session}"
    (folder / "dwi").mkdir(parents=True)
    stale = folder / "dwi" / f"{name}_space-ACPC_model-other_stat-cnr_dwimap.nii.gz"
    others = [folder / "dwi" / f"{name}_acq-x_space-ACPC_dwiref.nii.gz", folder / "dwi" / "notes.txt"]
    for path in (stale, *others):
        path.write_text("")
    derivatives.write_unit(subject, tmp_path, None)
    assert not stale.exists()
    assert all(path.exists() for path in others)
    uncorrected = replace(subject, distortion=None)
    derivatives.write_unit(uncorrected, tmp_path, None)
    assert not list(tmp_path.rglob("*_fieldmap.*"))
    assert not list(tmp_path.rglob("*desc-sdc*"))


def test_template_images_are_warped_through_the_chain(subject: UnitResults, tmp_path: Path) -> None:
    """A ramp warped through acpc_to_template equals the ramp at the mapped points."""
    chain, grid, brain = subject.anatomy.acpc_to_template, subject.anatomy.image.grid, subject.anatomy.template_image
    assert chain is not None
    assert brain is not None
    ramp = torch.from_numpy(np.indices(grid.shape).sum(0).astype(np.float32))
    halves = (ramp > ramp.mean()).float() * 2
    anatomy = replace(subject.anatomy, image=Volume(ramp, grid), mask=Volume(halves, grid))
    template = Template(anatomy.template, brain, brain, None, "test")
    derivatives.write_anatomy_only(anatomy, subject.unit, tmp_path, template, AnatomySettings())
    (written,) = tmp_path.rglob(f"*space-{anatomy.template}_desc-preproc_*.nii.gz")
    mapped = chain_points(chain, brain.grid.to_world(np.argwhere(np.ones(brain.grid.shape))))
    voxels = torch.as_tensor(grid.to_voxels(mapped).T, dtype=torch.float32)
    expected = sample_linear(ramp[None], voxels)[0].reshape(brain.grid.shape).numpy()
    np.testing.assert_allclose(nib.load(written).get_fdata(), expected, atol=0.05)
    (labels,) = tmp_path.rglob(f"*space-{anatomy.template}_desc-brain_mask.nii.gz")
    assert set(np.unique(nib.load(labels).get_fdata())) == {0.0, 2.0}
