"""Scores of derivatives whose errors are known."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from rich.console import Console
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from dsiprep.errors import InputError
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.score import Score, print_scores, score
from dsiprep.score.read import apply

N = 12
CENTRE = np.array([4.0, -12.0, 9.0])
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])
LPS = np.array([[-2.0, 0, 0, 70], [0, -2, 0, 60], [0, 0, 2, -60], [0, 0, 0, 1]])
RAW = np.array([[-3.0, 0, 0, 60], [0, 3, 0, -75], [0, 0, 3, -50], [0, 0, 0, 1]])
HZ_TO_MM = 0.05 * 3.0


class Subject:
    """A synthetic ground truth with error-free derivatives, to which known errors are added one at a time."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(5)
        self.truth, self.out = folder / "truth", folder / "derivatives"
        for sub in ("anat", "dwi", "fmap"):
            (self.out / "sub-01" / sub).mkdir(parents=True)
        self.truth.mkdir()
        self.poses = rigid_matrix(np.c_[rng.normal(0, 0.05, (N, 3)), rng.normal(0, 3, (N, 3))], CENTRE)
        self.head_to_dwiref = rigid_matrix(np.array([0.05, -0.08, 0.1, 3.0, -2, 4]), CENTRE)
        self.blip = rigid_matrix(np.array([0.01, 0.0, -0.02, 0.5, 0.3, -0.4]), CENTRE)
        self.acpc_to_head = rigid_matrix(np.array([-0.1, 0.06, 0.03, 5.0, 1, -6]), CENTRE)
        self.bvec_sign = [1, 1, 1]  # of the components that the .bvec holds
        self.bvals = np.r_[0.0, np.linspace(500, 6000, N - 1)]
        self.bvecs = rng.normal(size=(N, 3)) * (self.bvals > 0)[:, None]
        self.bvecs[1:] /= np.linalg.norm(self.bvecs[1:], axis=1, keepdims=True)
        self.eddy = (
            rng.normal(0, 1, (N, 9)) * (self.bvals > 0)[:, None] * (np.arange(9) < 4)
        )  # linear terms only, which an ITK affine can represent
        self._write_truth()
        self.write()

    def field(self, head: np.ndarray) -> np.ndarray:
        """Off-resonance field in Hz at head points (..., 3)."""
        return 30 * np.exp(-((head - CENTRE - [0, 30, -10]) ** 2).sum(-1) / (2 * 22**2))

    def _write_truth(self) -> None:
        grid = np.diag([2.0, 2, 2, 1])
        grid[:3, 3] = CENTRE - 59
        shape = (60, 60, 60)
        points = _points(shape, grid)
        self.radius = np.linalg.norm(points - CENTRE, axis=-1)
        brain = self.radius < 45
        labels = np.where(self.radius < 25, 2, np.where(self.radius < 35, 1, 3)) * brain
        template = points + np.array([1.0, -2, 3]) + np.sin(points / 20)
        images = {
            "T1w_brain_mask": brain.astype(np.uint8), "T1w_dseg": labels.astype(np.uint8),
            "template_brain_mask": brain.astype(np.uint8), "template_to_head": template,
            "field_hz": self.field(points),
        }  # fmt: skip
        for name, data in images.items():
            _write(self.truth / f"{name}.nii.gz", data, grid)
        shape = (40, 50, 36)
        _write(self.truth / "ideal_b0.nii.gz", self._contrast(_points(shape, RAW), self.poses[0]), RAW)
        head_bvecs = np.einsum("nji,nj->ni", self.poses[:, :3, :3], self.bvecs)
        table = {
            "template": "MNI152NLin2009aSym", "brain_centre": CENTRE.tolist(), "bvals": self.bvals.tolist(),
            "bvecs_scanner": self.bvecs.tolist(), "bvecs_head": head_bvecs.tolist(),
            "moved": [False] * 6 + [True] * 6,
            "head_to_scanner": self.poses.tolist(), "phase_encoding_direction": "j-", "readout_time_s": 0.05,
            "grid_affine": RAW.tolist(), "eddy_mm": self.eddy.tolist(), "lost_slices": [[3, 10, 0.4], [5, 20, 0.3]],
        }  # fmt: skip
        (self.truth / "truth.json").write_text(json.dumps(table))

    def _contrast(self, scanner: np.ndarray, pose: np.ndarray) -> np.ndarray:
        head = apply(np.linalg.inv(pose), scanner.reshape(-1, 3)).reshape(scanner.shape)
        return 100 + 50 * np.sin(head[..., 0] / 9) * np.cos(head[..., 1] / 11) + head[..., 2]

    def write(self, **errors: np.ndarray) -> list[Score]:
        """Write all derivatives with the given `errors` and score them."""
        anat, dwi = self.out / "sub-01" / "anat" / "sub-01", self.out / "sub-01" / "dwi" / "sub-01_dir-PA"
        estimated = errors.get("motion", np.eye(4)) @ self.poses @ np.linalg.inv(self.head_to_dwiref)
        _write_series(Path(f"{dwi}_from-orig_to-dwiref_mode-image_desc-hmc_xfm.txt"), estimated)
        eddy = np.tile(np.eye(4), (N, 1, 1))
        eddy[:, 1] += (self.eddy + errors.get("eddy", np.zeros(9)))[:, [1, 2, 3, 0]] / [100, 100, 100, 1]
        _write_series(Path(f"{dwi}_from-orig_to-dwiref_mode-image_desc-eddy_xfm.txt"), eddy)
        outliers = errors.get("outliers", np.array([[3, 10], [5, 20]])).tolist()
        Path(f"{dwi}_space-ACPC_desc-slice_qc.json").write_text(json.dumps({"lost": outliers}))
        undistorted = np.linalg.inv(self.blip) @ self.head_to_dwiref  # maps head points
        coreg = errors.get("coreg", np.eye(4)) @ undistorted @ self.acpc_to_head
        _write_matrix(coreg, f"{dwi}_from-dwiref_to-ACPC_mode-image_desc-coreg_xfm.txt")
        _write_matrix(self.acpc_to_head, f"{anat}_from-anat_to-ACPC_mode-image_xfm.mat")
        self._write_field(dwi, undistorted, errors.get("hz", np.zeros(1)))
        self._write_template(anat, errors.get("template", np.zeros(3)))
        self._write_tables(dwi, errors.get("bvec_rotation", np.eye(3)))
        self._write_images(anat, dwi, errors.get("image_offset", np.zeros(3)))
        return score(self.out, self.truth)

    def _write_field(self, dwi: Path, undistorted: np.ndarray, hz: np.ndarray) -> None:
        shape = (40, 50, 36)
        x = _points(shape, RAW)
        head = apply(np.linalg.inv(undistorted), x.reshape(-1, 3)).reshape(x.shape)
        field = self.field(head) + hz
        _write(Path(str(dwi).replace("/dwi/", "/fmap/") + "_desc-preproc_fieldmap.nii.gz"), field, RAW)
        shift = field[..., None] * np.array([0.0, -HZ_TO_MM, 0.0])  # j- points towards posterior here
        before_pose = shift @ np.linalg.inv(self.blip[:3, :3]).T
        composite = SimpleITK.CompositeTransform([_affine(self.blip), _displacement(before_pose, RAW)])
        SimpleITK.WriteTransform(composite, f"{dwi}_from-distorted_to-dwiref_mode-image_desc-sdcdown_xfm.h5")

    def _write_template(self, anat: Path, offset: np.ndarray) -> None:
        image = nib.load(self.truth / "template_to_head.nii.gz")
        head = image.get_fdata() + offset
        acpc = apply(np.linalg.inv(self.acpc_to_head), head.reshape(-1, 3)).reshape(head.shape)
        warp = _displacement(acpc - _points(head.shape[:3], image.affine), image.affine)
        composite = SimpleITK.CompositeTransform([warp])
        SimpleITK.WriteTransform(composite, f"{anat}_from-ACPC_to-MNI152NLin2009aSym_mode-image_xfm.h5")

    def _write_tables(self, dwi: Path, rotation: np.ndarray) -> None:
        head = np.einsum("nji,nj->ni", self.poses[:, :3, :3], self.bvecs)
        world = head @ self.acpc_to_head[:3, :3] @ rotation.T
        stem = f"{dwi}_space-ACPC_desc-preproc_dwi"
        _write(Path(f"{stem}.nii.gz"), np.zeros((70, 60, 60, 2)), LPS)
        along_axes = world * [-1, -1, 1]
        np.savetxt(f"{stem}.bvec", (along_axes * self.bvec_sign).T)
        np.savetxt(f"{stem.removesuffix('_dwi')}_fslbvecs.txt", (along_axes * [-1, 1, 1]).T)
        np.savetxt(f"{stem}.b", np.c_[world, self.bvals])

    def _write_images(self, anat: Path, dwi: Path, offset: np.ndarray) -> None:
        points = _points((70, 60, 60), LPS)
        head = apply(self.acpc_to_head, points.reshape(-1, 3)).reshape(points.shape) + offset
        for name, stem in (("T1w_brain_mask", "desc-brain_mask"), ("T1w_dseg", "dseg")):
            image = nib.load(self.truth / f"{name}.nii.gz")
            voxels = apply(np.linalg.inv(image.affine), head.reshape(-1, 3)).T
            data = map_coordinates(np.asarray(image.dataobj), voxels, order=0).reshape(points.shape[:3])
            _write(Path(f"{anat}_space-ACPC_{stem}.nii.gz"), data, LPS)
        _write(Path(f"{dwi}_space-ACPC_desc-brain_mask.nii.gz"), data > 0, LPS)
        _write(Path(f"{dwi}_space-ACPC_dwiref.nii.gz"), self._contrast(head, np.eye(4)), LPS)


def _points(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return apply(affine, index.reshape(-1, 3)).reshape(*shape, 3)


def _write(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    kind = np.uint8 if data.dtype in (bool, np.uint8) else np.float32
    nib.save(nib.Nifti1Image(data.astype(kind), affine), path)


def _affine(matrix: np.ndarray) -> SimpleITK.AffineTransform:
    lps = FLIP @ matrix @ FLIP
    transform = SimpleITK.AffineTransform(3)
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def _write_matrix(matrix: np.ndarray, path: str) -> None:
    SimpleITK.WriteTransform(_affine(matrix), path)


def _write_series(path: Path, matrices: np.ndarray) -> None:
    lines = ["#Insight Transform File V1.0"]
    for number, matrix in enumerate(matrices):
        transform = _affine(matrix)
        lines += [f"#Transform {number}", "Transform: AffineTransform_double_3_3"]
        lines += [
            "Parameters: " + " ".join(repr(p) for p in transform.GetParameters()),
            "FixedParameters: 0 0 0",
        ]
    path.write_text("\n".join(lines) + "\n")


def _displacement(vectors: np.ndarray, affine: np.ndarray) -> SimpleITK.DisplacementFieldTransform:
    lps = FLIP @ affine
    image = SimpleITK.GetImageFromArray((vectors * [-1.0, -1, 1]).transpose(2, 1, 0, 3), isVector=True)
    size = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetSpacing(size.tolist())
    image.SetDirection((lps[:3, :3] / size).ravel().tolist())
    return SimpleITK.DisplacementFieldTransform(SimpleITK.Cast(image, SimpleITK.sitkVectorFloat64))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Created once; each test overwrites the derivatives with its own errors."""
    return Subject(tmp_path_factory.mktemp("score"))


def _values(scores: list[Score]) -> dict[str, float]:
    missing = [entry for entry in scores if entry.value is None]
    assert not missing, missing
    return {entry.name: float(entry.value) for entry in scores if entry.value is not None}


def test_error_free_derivatives_score_zero(subject: Subject) -> None:
    found = _values(subject.write())
    for name, limit in {
        "motion: rotation": 1e-4, "motion: translation RMSE": 1e-4, "motion: displacement": 1e-4,
        "motion: worst volume": 1e-4, "eddy currents: error": 1e-4,
        "outlier slices: false positives": 1e-9, "field: error": 0.02,
        "b-vectors: .bvec": 1e-3, "b-vectors: .b": 1e-3, "b-vectors: _fslbvecs.txt": 1e-3,
        "coregistration: error": 1e-4, "combined: error": 0.02, "template: error": 0.02,
    }.items():  # fmt: skip
        assert found[name] < limit, (name, found[name])
    assert found["motion: uncorrected"] > 3
    assert found["field: uncorrected"] > 0.5
    for name in ("brain mask: T1w", "brain mask: DWI", "tissue: GM", "tissue: WM", "tissue: CSF"):
        assert found[name] > 0.999
    assert found["b=0 reference"] > 0.999


def test_motion_errors(subject: Subject) -> None:
    motion = np.tile(np.eye(4), (N, 1, 1))
    at_centre = apply(subject.poses[7], CENTRE[None])[0]
    motion[7] = rigid_matrix(np.array([0.0, np.deg2rad(3.0), 0, 0, 0, 0]), at_centre)
    motion[9][:3, 3] = [0.0, 2.4, 0]
    found = _values(subject.write(motion=motion))
    assert found["motion: rotation"] == pytest.approx(3 / N, rel=1e-3)
    assert found["motion: rotation RMSE"] == pytest.approx(3 / np.sqrt(3 * (N - 1)), rel=1e-3)
    assert found["motion: translation"] == pytest.approx(2.4 / N, rel=1e-3)
    assert found["motion: unmoved volumes"] < 1e-4 < found["motion: moved volumes"]
    assert found["motion: worst volume"] == pytest.approx(2.4, rel=1e-3)
    assert found["coregistration: error"] < 1e-3  # two volumes do not bias the common pose


def test_field_errors(subject: Subject) -> None:
    found = _values(subject.write(hz=np.array([10.0])))
    assert found["field: error"] == pytest.approx(10 * HZ_TO_MM, abs=0.02)
    assert found["field: error without offset"] < 0.02
    assert found["combined: error"] == pytest.approx(10 * HZ_TO_MM, abs=0.05)


def test_registration_errors(subject: Subject) -> None:
    shift = np.eye(4)
    shift[:3, 3] = [0.9, 0, -1.2]
    found = _values(subject.write(coreg=shift, template=np.array([0, 2.0, 0]), image_offset=np.array([6.0, 0, 0])))
    assert found["coregistration: error"] == pytest.approx(1.5, abs=1e-3)
    assert found["combined: error"] == pytest.approx(1.5, abs=0.1)
    assert found["template: error"] == pytest.approx(2.0, abs=0.02)
    # Dice of two balls with a diameter of 90 mm, 6 mm apart
    assert found["brain mask: T1w"] == pytest.approx(1 - 1.5 * 6 / 90, abs=0.02)
    assert found["tissue: WM"] < 0.9
    assert found["b=0 reference"] < 0.95


def test_bvector_errors(subject: Subject) -> None:
    rotation = Rotation.from_rotvec(np.deg2rad(5.0) * np.array([0, 0, 1.0])).as_matrix()
    found = _values(subject.write(bvec_rotation=rotation))
    world = subject.bvecs[1:]
    assert found["b-vectors: .bvec"] == pytest.approx(found["b-vectors: .b"], abs=1e-4)
    acpc = np.einsum("nji,nj->ni", subject.poses[1:, :3, :3], world) @ subject.acpc_to_head[:3, :3]
    off_axis = np.sqrt(1 - acpc[:, 2] ** 2)  # a vector at angle t to the axis rotates by 2 asin(sin t sin 2.5 deg)
    expected = np.rad2deg(2 * np.arcsin(off_axis * np.sin(np.deg2rad(2.5))))
    assert found["b-vectors: .b"] == pytest.approx(expected.mean(), rel=1e-4)


def test_mirrored_bvec_is_an_error(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.bvec` is read as DIPY reads it: FSL's convention in it counts as mirrored left-right."""
    monkeypatch.setattr(subject, "bvec_sign", [-1, 1, 1])
    found = _values(subject.write())
    assert found["b-vectors: .bvec"] > 20
    assert found["b-vectors: _fslbvecs.txt"] < 1e-3


def test_eddy_current_and_outlier_slice_errors(subject: Subject) -> None:
    eddy = np.zeros(9)
    eddy[0] = 0.25
    found = _values(subject.write(eddy=eddy, outliers=np.array([[3, 10], [4, 4], [4, 5]])))
    assert found["eddy currents: error"] == pytest.approx(0.25, abs=1e-4)
    assert found["eddy currents: uncorrected"] > 0.5
    assert found["outlier slices: sensitivity"] == 0.5
    assert found["outlier slices: false positives"] == 2
    subject.write()


def test_missing_derivatives_are_reported(subject: Subject, tmp_path: Path) -> None:
    scores = score(tmp_path, subject.truth)
    assert all(entry.value is None and "no file" in entry.meaning for entry in scores)
    assert [entry.name for entry in scores][:2] == ["motion", "eddy currents"]
    console = Console(record=True, width=160)
    print_scores([*scores, Score("x", 1.23456, "mm", "y")], console)
    assert "1.235" in console.export_text()
    with pytest.raises(InputError):
        score(tmp_path, tmp_path)


def test_nonlinear_gradients(tmp_path: Path) -> None:
    """A uniform deviation of the gradients, read as FSL reads it, and the displacement that goes with it."""
    subject, deviation = Subject(tmp_path), np.array([[0.03, 0.01, -0.02], [0.0, -0.02, 0.015], [0.005, 0.0, 0.04]])
    subject.poses = np.tile(subject.poses[0], (N, 1, 1))
    subject._write_truth()
    grid = np.diag([8.0, 8, 8, 1])
    grid[:3, 3] = -140
    points = _points((36, 36, 36), grid)
    displacement = points @ deviation  # its derivatives are the transpose
    _write(subject.truth / "gradient_displacement.nii.gz", displacement, grid)
    nine = np.broadcast_to(deviation.ravel(), (36, 36, 36, 9))
    _write(subject.truth / "gradient_deviation.nii.gz", nine, grid)
    dwi = subject.out / "sub-01" / "dwi"
    np.savetxt(dwi / "sub-01_dir-PA_space-ACPC_desc-preproc_dwi.bval", subject.bvals[None])
    rotation = (
        subject.poses[0][:3, :3] @ subject.acpc_to_head[:3, :3] @ np.diag([1, -1, 1])
    )  # FSL's axes of LPS+ images
    fsl = rotation.T @ deviation @ rotation
    columns = np.broadcast_to(fsl.ravel(order="F"), (70, 60, 60, 9))
    _write(dwi / "sub-01_dir-PA_space-ACPC_desc-graddev_dwimap.nii.gz", columns, LPS)
    warp = SimpleITK.CompositeTransform([_displacement(displacement, grid)])
    SimpleITK.WriteTransform(warp, str(dwi / "sub-01_dir-PA_from-orig_to-scanner_mode-image_desc-gradwarp_xfm.h5"))
    values = {entry.name: entry.value for entry in subject.write() if entry.value is not None}
    assert values["gradients: b, error"] < 0.01
    assert values["gradients: direction, error"] < 0.01
    assert values["gradients: position, error"] < 0.001
    assert values["combined: error"] < 0.05
    weighted = subject.bvecs[subject.bvals > 100]
    length = np.linalg.norm(weighted + weighted @ deviation.T, axis=1)
    change = 100 * np.abs(1 / length**2 - 1)
    assert values["gradients: b, uncorrected"] == pytest.approx(change.mean(), rel=1e-3)
    assert values["gradients: position, uncorrected"] > 1
