"""The comparisons. What a pipeline cannot know, one common pose of the reference, is taken out first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from dsiprep.ops.image.affine import (
    nearest_rotation,
    point_displacement,
    rigid_matrix,
    rigid_parameters,
)
from dsiprep.score.read import (
    AbsentError,
    Truth,
    apply,
    find,
    linear_part,
    read_image,
    read_mapping,
    read_mappings,
    read_matrices,
    read_matrix,
    read_truth,
)

B0 = 100.0  # s/mm²
TISSUES = {"GM": 1, "WM": 2, "CSF": 3}


@dataclass(frozen=True)
class Score:
    """One number: `value` in `unit`, or None and in `meaning` the reason why it could not be found."""

    name: str
    value: float | None
    unit: str
    meaning: str


@dataclass(frozen=True, eq=False)
class Case:
    """One set of derivatives beside its truth. What is read once is kept."""

    derivatives: Path
    truth: Truth

    @cached_property
    def points(self) -> np.ndarray:
        """Brain points in the head frame."""
        return self.truth.brain_points()

    @cached_property
    def estimated(self) -> np.ndarray:
        """Points of the dwiref (still distorted) to points of each volume, (n, 4, 4)."""
        found = read_matrices(find(self.derivatives, "*_from-orig_to-dwiref_mode-image_desc-hmc_xfm.txt"))
        if len(found) != len(self.truth.poses):
            raise AbsentError(f"not compared: {len(found)} transforms for {len(self.truth.poses)} volumes")
        return found

    @cached_property
    def pose(self) -> np.ndarray:
        """Head points to points of the distorted dwiref, by what the volumes agree on (median), (4, 4)."""
        each = np.linalg.inv(self.estimated) @ self.truth.poses
        common = each[0]
        for _ in range(3):
            rest = rigid_parameters(np.linalg.inv(common) @ each, self.truth.centre)
            common = common @ rigid_matrix(np.median(rest, axis=0), self.truth.centre)
        return common

    @cached_property
    def distortion(self) -> Callable[[np.ndarray], np.ndarray]:
        """Points of the undistorted dwiref to points of the distorted one that volumes were aligned to."""
        name = "down" if self.truth.table["phase_encoding_direction"].endswith("-") else "up"
        try:
            path = find(self.derivatives, f"*_mode-image_desc-sdc{name}_xfm.h5")
        except AbsentError:
            path = find(self.derivatives, "*_mode-image_desc-sdc*_xfm.h5")
        return read_mapping(path)

    @cached_property
    def blip_pose(self) -> np.ndarray:
        """The rigid part of `distortion`, (4, 4); identity where no distortion was corrected."""
        try:
            return linear_part(self.distortion)
        except AbsentError:
            return np.eye(4)

    @cached_property
    def acpc_to_head(self) -> np.ndarray:
        """Points of ACPC to points of the native T1w, (4, 4)."""
        return read_matrix(find(self.derivatives, "*_from-anat_to-ACPC_mode-image_xfm.mat"))

    @cached_property
    def acpc_to_dwiref(self) -> np.ndarray:
        """Points of ACPC to points of the undistorted dwiref, (4, 4)."""
        return read_matrix(find(self.derivatives, "*_from-dwiref_to-ACPC_mode-image_desc-coreg_xfm.txt"))


def score(derivatives: Path, truth: Path) -> list[Score]:
    """Compare derivatives with the truth of the phantom that they were made from.

    Parameters
    ----------
    derivatives : Path
        Root of one subject's derivatives, with QSIPrep's names.
    truth : Path
        The `truth` folder of the phantom.

    Returns
    -------
    list of Score
        Where a derivative is absent, a score without a value and with the reason.

    Raises
    ------
    InputError
        If there is no truth.
    """
    case = Case(Path(derivatives), read_truth(truth))
    scores: list[Score] = []
    for name, measure in MEASURES.items():
        try:
            for entry in measure(case):
                scores.append(entry)
        except AbsentError as reason:
            scores.append(Score(name, None, "", str(reason)))
    return scores


def _motion(case: Case) -> Iterator[Score]:
    truth = case.truth
    error = np.linalg.inv(case.pose) @ np.linalg.inv(case.estimated) @ truth.poses
    vectors = rigid_parameters(error, truth.centre)
    degrees, shifts = np.rad2deg(vectors[:, :3]), vectors[:, 3:]
    weighted = truth.bvals > B0
    here = np.broadcast_to(np.eye(4), error.shape)
    displaced = point_displacement(error, here, case.points).mean(1)
    before = point_displacement(truth.poses, truth.poses[:1], case.points).mean(1)
    angle = np.linalg.norm(degrees, axis=1)
    yield Score("motion: rotation", float(angle.mean()), "deg", "mean angle left over, all volumes")
    yield Score("motion: rotation RMSE", _rms(degrees[weighted]), "deg", "over b>100 and three axes")
    yield Score(
        "motion: translation",
        float(np.linalg.norm(shifts, axis=1).mean()),
        "mm",
        "mean, at the brain's centre",
    )
    yield Score("motion: translation RMSE", _rms(shifts[weighted]), "mm", "over b>100 and three axes")
    yield Score("motion: displacement", float(displaced.mean()), "mm", "mean over brain and volumes")
    yield Score("motion: worst volume", float(displaced.max()), "mm", "mean over brain")
    yield Score(
        "motion: uncorrected",
        float(before.mean()),
        "mm",
        "displacement from the first volume, for comparison",
    )
    moved = np.asarray(truth.table["moved"], bool)
    groups = {"moved volumes": moved, "unmoved volumes": ~moved, **_bands(truth.bvals)}
    for name, members in groups.items():
        if members.any():
            meaning = f"displacement, {members.sum()} volumes"
            yield Score(f"motion: {name}", float(displaced[members].mean()), "mm", meaning)


def _bands(bvals: np.ndarray) -> dict[str, np.ndarray]:
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
    errors, sizes = [], []
    for volume in weighted:
        scanner = apply(truth.poses[volume], points)
        true = truth.eddy(volume, scanner)
        errors.append(np.abs((maps[volume](scanner) - scanner) @ direction - true).mean())
        sizes.append(np.abs(true).mean())
    yield Score("eddy currents: error", float(np.mean(errors)), "mm", "mean over brain and volumes")
    yield Score("eddy currents: uncorrected", float(np.mean(sizes)), "mm", "mean true displacement, for comparison")


def _lost(case: Case) -> Iterator[Score]:
    path = find(case.derivatives, "*_space-ACPC_desc-slice_qc.json")
    found = {tuple(pair) for pair in json.loads(path.read_text()).get("lost", [])}
    true = {(int(v), int(k)) for v, k, *_ in case.truth.table["lost_slices"]}
    if true:
        yield Score(
            "lost slices: found", len(found & true) / len(true), "", f"share of {len(true)}, dim ones among them"
        )
    yield Score("lost slices: wrong", float(len(found - true)), "", "slices called lost that are not")


def _bvectors(case: Case) -> Iterator[Score]:
    path = find(case.derivatives, "*_space-ACPC_desc-preproc_dwi.bvec")
    image = read_image_geometry(path.with_suffix(".nii.gz"))
    directions = image[:3, :3] / np.linalg.norm(image[:3, :3], axis=0)
    fsl = np.loadtxt(path).T * ([-1, 1, 1] if np.linalg.det(directions) > 0 else [1, 1, 1])
    tables = {".bvec": fsl @ directions.T}
    if path.with_suffix(".b").is_file():
        tables[".b"] = np.loadtxt(path.with_suffix(".b"))[:, :3]
    turn = nearest_rotation(case.acpc_to_head[:3, :3])
    wanted = np.asarray(case.truth.table["bvecs_head"], float)
    weighted = case.truth.bvals > B0
    for name, vectors in tables.items():
        if vectors.shape != wanted.shape:
            raise AbsentError(f"not compared: {len(vectors)} b-vectors for {len(wanted)} volumes")
        cosine = np.abs(((vectors @ turn.T) * wanted).sum(1))[weighted]
        angle = np.rad2deg(np.arccos(np.clip(cosine, 0, 1)))
        yield Score(f"b-vectors: {name}", float(angle.mean()), "deg", "mean angle from the true gradient in the head")


def _field(case: Case) -> Iterator[Score]:
    estimate = read_image(find(case.derivatives, "*_desc-preproc_fieldmap.nii.gz"))
    truth = case.truth.image("field_hz")
    to_dwiref = np.linalg.inv(case.blip_pose) @ case.pose
    points = case.points[estimate.covers(apply(to_dwiref, case.points))]
    mm = float(np.linalg.norm(case.truth.mm_per_hz))
    true = truth.at(points)
    error = (estimate.at(apply(to_dwiref, points)) - true) * mm
    left = np.abs(error - np.median(error))
    yield Score("field: error", float(np.abs(error).mean()), "mm", "mean over the brain, as displacement")
    yield Score("field: error, 95 %", float(np.percentile(np.abs(error), 95)), "mm", "95th percentile in the brain")
    yield Score("field: error but a constant", float(left.mean()), "mm", "a constant field is a shift of the head")
    yield Score("field: error but a constant, 95 %", float(np.percentile(left, 95)), "mm", "95th percentile")
    yield Score("field: uncorrected", float(np.abs(true * mm).mean()), "mm", "mean true displacement, for comparison")


def _coregistration(case: Case) -> Iterator[Score]:
    wanted = apply(np.linalg.inv(case.blip_pose) @ case.pose, case.points)
    found = apply(case.acpc_to_dwiref @ np.linalg.inv(case.acpc_to_head), case.points)
    error = np.linalg.norm(found - wanted, axis=1)
    yield Score("coregistration: error", float(error.mean()), "mm", "mean over the brain, DWI to T1w")


def _everything(case: Case) -> Iterator[Score]:
    points = case.points[::4]
    field = case.truth.image("field_hz")
    undistorted = apply(case.acpc_to_dwiref @ np.linalg.inv(case.acpc_to_head), points)
    rigid = apply(case.blip_pose, undistorted)
    shift = case.distortion(undistorted) - rigid
    errors = [
        np.linalg.norm(apply(found, rigid) + shift - case.truth.distorted(points, field, true), axis=1)
        for found, true in zip(case.estimated, case.truth.poses, strict=True)
    ]
    yield Score("all together", float(np.mean(errors)), "mm", "where a T1w point is looked for in a raw volume, mean")
    yield Score("all together, median", float(np.median(errors)), "mm", "over brain and volumes")


def _template(case: Case) -> Iterator[Score]:
    path = find(case.derivatives, "*_from-ACPC_to-MNI*_mode-image_xfm.h5")
    space = path.name.split("_to-")[1].split("_")[0]
    positions, mask = case.truth.image("template_to_head"), case.truth.image("template_brain_mask")
    points = mask.points(mask.data > 0.5)
    error = np.linalg.norm(apply(case.acpc_to_head, read_mapping(path)(points)) - positions.at(points), axis=1)
    known = case.truth.table["template"]
    note = "" if space == known else f"; {space} against the truth of {known}"
    yield Score("template: error", float(error.mean()), "mm", f"mean over the template's brain{note}")
    yield Score("template: error, 95 %", float(np.percentile(error, 95)), "mm", "95th percentile")


def _brain(case: Case) -> Iterator[Score]:
    true = case.truth.image("T1w_brain_mask")
    patterns = {
        "T1w": "anat/*_space-ACPC_desc-brain_mask.nii.gz",
        "DWI": "dwi/*_space-ACPC_desc-brain_mask.nii.gz",
    }
    for name, pattern in patterns.items():
        found, points = _voxels(find(case.derivatives, pattern))
        inside = true.at(apply(case.acpc_to_head, points), order=0) > 0.5
        yield Score(f"brain mask: {name}", _dice(found > 0.5, inside), "Dice", "with the true brain")


def _tissue(case: Case) -> Iterator[Score]:
    true = case.truth.image("T1w_dseg")
    found, points = _voxels(find(case.derivatives, "anat/*_space-ACPC_dseg.nii.gz"))
    labels = true.at(apply(case.acpc_to_head, points), order=0)
    for name, label in TISSUES.items():
        yield Score(f"tissue: {name}", _dice(found == label, labels == label), "Dice", "with the true tissue")


def _reference(case: Case) -> Iterator[Score]:
    ideal, brain = case.truth.image("ideal_b0"), case.truth.image("T1w_brain_mask")
    found, points = _voxels(find(case.derivatives, "dwi/*_space-ACPC_dwiref.nii.gz"))
    head = apply(case.acpc_to_head, points)
    scanner = apply(case.truth.poses[0], head)
    inside = (brain.at(head, order=0) > 0.5) & ideal.covers(scanner) & (found > 0)
    correlation = np.corrcoef(found[inside], ideal.at(scanner[inside]))[0, 1]
    yield Score("b=0 reference", float(correlation), "r", "correlation with the ideal b=0 in the brain")


def read_image_geometry(path: Path) -> np.ndarray:
    """The affine (4, 4) of a NIfTI image, without its voxels."""
    import nibabel as nib

    return np.asarray(nib.Nifti1Image.from_filename(path).affine, float)


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
    "eddy currents": _eddy,
    "lost slices": _lost,
    "b-vectors": _bvectors,
    "field": _field,
    "coregistration": _coregistration,
    "all together": _everything,
    "template": _template,
    "brain mask": _brain,
    "tissue": _tissue,
    "b=0 reference": _reference,
}
