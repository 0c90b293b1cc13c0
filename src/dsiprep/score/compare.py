"""Errors of derivatives with respect to the ground truth of a phantom.

The pose of the dwiref, which a pipeline may choose freely, is estimated and removed first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from dsiprep.ops.image.affine import (
    mean_rigid,
    nearest_rotation,
    point_displacement,
    rigid_matrix,
    rigid_parameters,
)
from dsiprep.score.nonlinearity import describe, gradient_errors, scanner_errors, scanner_mapping
from dsiprep.score.positions import Placed, describe_positions
from dsiprep.score.read import (
    MissingDerivativeError,
    Truth,
    apply,
    find,
    linear_part,
    read_image,
    read_image_affine,
    read_mapping,
    read_mappings,
    read_matrices,
    read_matrix,
    read_truth,
)
from dsiprep.score.slices import read_slice_poses, slice_errors

B0 = 100.0  # s/mm²
TISSUES = {"GM": 1, "WM": 2, "CSF": 3}


@dataclass(frozen=True)
class Score:
    """One measure: `value` in `unit`; if `value` is None, `meaning` is the reason why it is missing."""

    name: str
    value: float | None
    unit: str
    meaning: str


@dataclass(frozen=True, eq=False)
class Case:
    """One set of derivatives with its ground truth; files are read once and cached."""

    derivatives: Path
    truth: Truth

    @cached_property
    def points(self) -> np.ndarray:
        """Brain points in the head frame."""
        return self.truth.brain_points()

    @cached_property
    def estimated(self) -> np.ndarray:
        """From points of the dwiref, before distortion correction, to points of each volume, (n, 4, 4)."""
        matrices = read_matrices(find(self.derivatives, "*_from-orig_to-dwiref_mode-image_desc-hmc_xfm.txt"))
        if len(matrices) != len(self.truth.poses):
            raise MissingDerivativeError(
                f"not compared: {len(matrices)} transforms for {len(self.truth.poses)} volumes"
            )
        return matrices

    @cached_property
    def pose(self) -> np.ndarray:
        """From head points to points of the distorted dwiref, as the robust (median) estimate over volumes, (4, 4)."""
        per_volume = np.linalg.inv(self.estimated) @ self.truth.poses
        common = per_volume[0]
        for _ in range(3):
            residual = rigid_parameters(np.linalg.inv(common) @ per_volume, self.truth.centre)
            common = common @ rigid_matrix(np.median(residual, axis=0), self.truth.centre)
        return common

    @cached_property
    def distortion(self) -> Callable[[np.ndarray], np.ndarray]:
        """From points of the undistorted dwiref to points of the distorted one to which volumes were aligned."""
        name = "down" if self.truth.table["phase_encoding_direction"].endswith("-") else "up"
        try:
            path = find(self.derivatives, f"*_mode-image_desc-sdc{name}_xfm.h5")
        except MissingDerivativeError:
            path = find(self.derivatives, "*_mode-image_desc-sdc*_xfm.h5")
        return read_mapping(path)

    @cached_property
    def blip_pose(self) -> np.ndarray:
        """The rigid part of `distortion`, (4, 4); the identity if distortion was not corrected."""
        try:
            return linear_part(self.distortion)
        except MissingDerivativeError:
            return np.eye(4)

    @cached_property
    def scanner_warp(self) -> Callable[[np.ndarray], np.ndarray]:
        """From points of the scanner to points of the images, which nonlinear gradients displace."""
        return scanner_mapping(self.derivatives)

    @cached_property
    def acpc_to_head(self) -> np.ndarray:
        """From ACPC points to points of the native T1w, (4, 4)."""
        return read_matrix(find(self.derivatives, "*_from-anat_to-ACPC_mode-image_xfm.mat"))

    @cached_property
    def acpc_to_dwiref(self) -> np.ndarray:
        """From ACPC points to points of the undistorted dwiref, (4, 4)."""
        return read_matrix(find(self.derivatives, "*_from-dwiref_to-ACPC_mode-image_desc-coreg_xfm.txt"))


def score(derivatives: Path, truth: Path) -> list[Score]:
    """Compare derivatives with the ground truth of the phantom from which they were computed.

    Parameters
    ----------
    derivatives : Path
        Root of the derivatives of one subject, with QSIPrep's file names.
    truth : Path
        The `truth` folder of the phantom.

    Returns
    -------
    list of Score
        A score without a value, with the reason, where a derivative is missing.

    Raises
    ------
    InputError
        If there is no ground truth.
    """
    case = Case(Path(derivatives), read_truth(truth))
    scores: list[Score] = []
    for name, measure in MEASURES.items():
        try:
            for entry in measure(case):
                scores.append(entry)
        except MissingDerivativeError as reason:
            scores.append(Score(name, None, "", str(reason)))
    return scores


def _motion(case: Case) -> Iterator[Score]:
    truth = case.truth
    error = np.linalg.inv(case.pose) @ np.linalg.inv(case.estimated) @ truth.poses
    vectors = rigid_parameters(error, truth.centre)
    degrees, shifts = np.rad2deg(vectors[:, :3]), vectors[:, 3:]
    weighted = truth.bvals > B0
    identity = np.broadcast_to(np.eye(4), error.shape)
    displaced = point_displacement(error, identity, case.points).mean(1)
    uncorrected = point_displacement(truth.poses, truth.poses[:1], case.points).mean(1)
    angle = np.linalg.norm(degrees, axis=1)
    yield Score("motion: rotation", float(angle.mean()), "deg", "mean residual angle over all volumes")
    yield Score("motion: rotation RMSE", _rms(degrees[weighted]), "deg", "over volumes with b > 100 and three axes")
    yield Score(
        "motion: translation",
        float(np.linalg.norm(shifts, axis=1).mean()),
        "mm",
        "mean at the centre of the brain",
    )
    yield Score("motion: translation RMSE", _rms(shifts[weighted]), "mm", "over volumes with b > 100 and three axes")
    yield Score("motion: displacement", float(displaced.mean()), "mm", "mean over brain and volumes")
    yield Score("motion: worst volume", float(displaced.max()), "mm", "mean over brain")
    if weighted.any() and not weighted.all():
        to_b0 = np.linalg.inv(mean_rigid(error[~weighted])) @ error[weighted]
        apart = point_displacement(to_b0, identity[weighted], case.points).mean()
        yield Score("motion: diffusion against b=0", float(apart), "mm", "mean over brain and volumes with b > 100")
    yield Score(
        "motion: uncorrected",
        float(uncorrected.mean()),
        "mm",
        "true displacement relative to the first volume, for comparison",
    )
    moved = np.asarray(truth.table["moved"], bool)
    groups = {"moved volumes": moved, "unmoved volumes": ~moved, **_bvalue_bands(truth.bvals)}
    for name, members in groups.items():
        if members.any():
            meaning = f"mean displacement, {members.sum()} volumes"
            yield Score(f"motion: {name}", float(displaced[members].mean()), "mm", meaning)


def _slices(case: Case) -> Iterator[Score]:
    moved = case.truth.moved_within
    if not moved.any():
        return
    one = np.repeat(case.estimated[:, None], case.truth.slice_poses.shape[1], axis=1)
    try:
        path = find(case.derivatives, "*_desc-slicemotion_timeseries.tsv")
        poses = read_slice_poses(path, case.truth, case.estimated)
    except MissingDerivativeError:  # no volume has more than one pose
        poses = one
    groups = {"error": (poses, moved), "one pose": (one, moved), "volumes at rest": (poses, ~moved)}
    for name, (found, members) in groups.items():
        if members.any():
            errors = slice_errors(case.truth, found, case.pose, case.points)[members]
            meaning = f"mean over slices of {members.sum()} volumes"
            yield Score(f"slices: {name}", float(np.nanmean(errors)), "mm", meaning)


def _bvalue_bands(bvals: np.ndarray) -> dict[str, np.ndarray]:
    """Masks of b=0 volumes and of three ranges of b-values, by name."""
    edges = [B0, *(bvals.max() * np.array([1, 2, 3]) / 3)]
    bands = {"b=0": bvals <= B0}
    for low, high in pairwise(edges):
        bands[f"b {low:.0f} to {high:.0f}"] = (bvals > low) & (bvals <= high)
    return bands


def _eddy(case: Case) -> Iterator[Score]:
    truth = case.truth
    maps = read_mappings(find(case.derivatives, "*_from-orig_to-dwiref_mode-image_desc-eddy_xfm.txt"))
    points, direction = case.points[::40], truth.mm_per_hz / np.linalg.norm(truth.mm_per_hz)
    direction *= -1 if truth.table["phase_encoding_direction"].endswith("-") else 1  # towards higher indices
    weighted = np.flatnonzero(truth.bvals > B0)
    errors, true_sizes = [], []
    for volume in weighted:
        scanner = apply(truth.poses[volume], points)
        true = truth.eddy(volume, scanner)
        errors.append(np.abs((maps[volume](scanner) - scanner) @ direction - true).mean())
        true_sizes.append(np.abs(true).mean())
    yield Score("eddy currents: error", float(np.mean(errors)), "mm", "mean over brain and volumes")
    yield Score(
        "eddy currents: uncorrected", float(np.mean(true_sizes)), "mm", "mean true displacement, for comparison"
    )


def _outlier_slices(case: Case) -> Iterator[Score]:
    path = find(case.derivatives, "*_space-ACPC_desc-slice_qc.json")
    detected = {tuple(pair) for pair in json.loads(path.read_text()).get("lost", [])}
    true = {(int(v), int(k)) for v, k, *_ in case.truth.table["lost_slices"]}
    if true:
        meaning = f"detected fraction of {len(true)} slices with signal dropout, low-signal ones included"
        yield Score("outlier slices: sensitivity", len(detected & true) / len(true), "", meaning)
    yield Score("outlier slices: false positives", float(len(detected - true)), "", "number of slices")


def _bvectors(case: Case) -> Iterator[Score]:
    path = find(case.derivatives, "*_space-ACPC_desc-preproc_dwi.bvec")
    affine = read_image_affine(path.with_suffix(".nii.gz"))
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    tables = {".bvec": np.loadtxt(path).T @ directions.T}  # as DIPY and QSIRecon read it: along the image axes
    if path.with_suffix(".b").is_file():
        tables[".b"] = np.loadtxt(path.with_suffix(".b"))[:, :3]
    fsl = path.with_name(path.name.replace("_dwi.bvec", "_fslbvecs.txt"))
    if fsl.is_file():  # as FSL reads it
        sign = [-1, 1, 1] if np.linalg.det(directions) > 0 else [1, 1, 1]
        tables["_fslbvecs.txt"] = (np.loadtxt(fsl).T * sign) @ directions.T
    rotation = nearest_rotation(case.acpc_to_head[:3, :3])
    true = np.asarray(case.truth.table["bvecs_head"], float)
    weighted = case.truth.bvals > B0
    for name, vectors in tables.items():
        if vectors.shape != true.shape:
            raise MissingDerivativeError(f"not compared: {len(vectors)} b-vectors for {len(true)} volumes")
        cosine = np.abs(((vectors @ rotation.T) * true).sum(1))[weighted]
        angle = np.rad2deg(np.arccos(np.clip(cosine, 0, 1)))
        yield Score(
            f"b-vectors: {name}", float(angle.mean()), "deg", "mean angle to the true gradient in the head frame"
        )


def _field(case: Case) -> Iterator[Score]:
    estimate = read_image(find(case.derivatives, "*_desc-preproc_fieldmap.nii.gz"))
    truth = case.truth.image("field_hz")
    to_dwiref = np.linalg.inv(case.blip_pose) @ case.pose
    points = case.points[estimate.covers(apply(to_dwiref, case.points))]
    mm = float(np.linalg.norm(case.truth.mm_per_hz))
    true = truth.at(points)
    error = (estimate.at(apply(to_dwiref, points)) - true) * mm
    without_offset = np.abs(error - np.median(error))
    yield Score("field: error", float(np.abs(error).mean()), "mm", "mean over the brain, as displacement")
    yield Score("field: error, 95 %", float(np.percentile(np.abs(error), 95)), "mm", "95th percentile over the brain")
    yield Score(
        "field: error without offset",
        float(without_offset.mean()),
        "mm",
        "less the median; a constant field only shifts the head",
    )
    yield Score(
        "field: error without offset, 95 %",
        float(np.percentile(without_offset, 95)),
        "mm",
        "95th percentile over the brain",
    )
    yield Score("field: uncorrected", float(np.abs(true * mm).mean()), "mm", "mean true displacement, for comparison")


def _coregistration(case: Case) -> Iterator[Score]:
    true = apply(np.linalg.inv(case.blip_pose) @ case.pose, case.points)
    estimated = apply(case.acpc_to_dwiref @ np.linalg.inv(case.acpc_to_head), case.points)
    error = np.linalg.norm(estimated - true, axis=1)
    yield Score("coregistration: error", float(error.mean()), "mm", "mean over the brain, dwiref to T1w")


def _combined(case: Case) -> Iterator[Score]:
    points = case.points[::4]
    undistorted = apply(case.acpc_to_dwiref @ np.linalg.inv(case.acpc_to_head), points)
    rigid = apply(case.blip_pose, undistorted)
    placed = Placed(points, undistorted, rigid, case.distortion(undistorted) - rigid, case.estimated)
    entries = describe_positions(case.derivatives, case.truth, case.scanner_warp, placed)
    yield from (Score(*entry) for entry in entries)


def _gradients(case: Case) -> Iterator[Score]:
    if case.truth.gradient_displacement:
        errors = gradient_errors(case.derivatives, case.truth, case.points[::4], case.acpc_to_head)
        yield from (Score(*entry) for entry in describe(errors))
        positions = scanner_errors(case.truth, case.scanner_warp, case.points[::40])
        for name, values in zip(("error", "uncorrected"), positions, strict=True):
            meaning = "of the displacement by gradients in the brain, over volumes"
            yield Score(f"gradients: position, {name}", float(values.mean()), "mm", f"mean {meaning}")
            yield Score(f"gradients: position, {name}, largest", float(values.max()), "mm", f"largest {meaning}")


def _template(case: Case) -> Iterator[Score]:
    path = find(case.derivatives, "*_from-ACPC_to-MNI*_mode-image_xfm.h5")
    space = path.name.split("_to-")[1].split("_")[0]
    positions, mask = case.truth.image("template_to_head"), case.truth.image("template_brain_mask")
    points = mask.points(mask.data > 0.5)
    error = np.linalg.norm(apply(case.acpc_to_head, read_mapping(path)(points)) - positions.at(points), axis=1)
    true_space = case.truth.table["template"]
    note = "" if space == true_space else f"; {space} compared with the truth in {true_space}"
    yield Score("template: error", float(error.mean()), "mm", f"mean over the brain of the template{note}")
    yield Score("template: error, 95 %", float(np.percentile(error, 95)), "mm", "95th percentile over the brain")


def _brain(case: Case) -> Iterator[Score]:
    true = case.truth.image("T1w_brain_mask")
    patterns = {
        "T1w": "anat/*_space-ACPC_desc-brain_mask.nii.gz",
        "DWI": "dwi/*_space-ACPC_desc-brain_mask.nii.gz",
    }
    for name, pattern in patterns.items():
        estimated, points = _voxels(find(case.derivatives, pattern))
        inside = true.at(apply(case.acpc_to_head, points), order=0) > 0.5
        yield Score(f"brain mask: {name}", _dice(estimated > 0.5, inside), "Dice", "overlap with the true brain")


def _tissue(case: Case) -> Iterator[Score]:
    true = case.truth.image("T1w_dseg")
    estimated, points = _voxels(find(case.derivatives, "anat/*_space-ACPC_dseg.nii.gz"))
    labels = true.at(apply(case.acpc_to_head, points), order=0)
    for name, label in TISSUES.items():
        yield Score(
            f"tissue: {name}", _dice(estimated == label, labels == label), "Dice", "overlap with the true tissue"
        )


def _reference(case: Case) -> Iterator[Score]:
    ideal, brain = case.truth.image("ideal_b0"), case.truth.image("T1w_brain_mask")
    estimated, points = _voxels(find(case.derivatives, "dwi/*_space-ACPC_dwiref.nii.gz"))
    head = apply(case.acpc_to_head, points)
    scanner = apply(case.truth.poses[0], head)
    inside = (brain.at(head, order=0) > 0.5) & ideal.covers(scanner) & (estimated > 0)
    correlation = np.corrcoef(estimated[inside], ideal.at(scanner[inside]))[0, 1]
    yield Score("b=0 reference", float(correlation), "r", "correlation with the ideal b=0 image in the brain")


def _voxels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All values (n,) of a 3-D image and their world points (n, 3)."""
    image = read_image(path)
    return image.data.ravel(), apply(image.affine, np.argwhere(np.ones(image.data.shape, bool)).astype(float))


def _dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / max(int(first.sum() + second.sum()), 1))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


MEASURES: dict[str, Callable[[Case], Iterator[Score]]] = {
    "motion": _motion,
    "slices": _slices,
    "eddy currents": _eddy,
    "outlier slices": _outlier_slices,
    "b-vectors": _bvectors,
    "gradients": _gradients,
    "field": _field,
    "coregistration": _coregistration,
    "combined": _combined,
    "template": _template,
    "brain mask": _brain,
    "tissue": _tissue,
    "b=0 reference": _reference,
}
