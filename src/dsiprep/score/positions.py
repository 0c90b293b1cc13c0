"""Where points of the head are found in the raw volumes, against where they are: all transforms composed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsiprep.score.nonlinearity import apparent
from dsiprep.score.read import MissingDerivativeError, Truth, apply, find, read_image, read_mappings

__all__ = ["Placed", "describe_positions"]

RESTING, TURNED = 0.7, 2.0  # degrees of pitch and roll of volumes at rest, and of those that are compared with them
MOVING_FIELD = "*_desc-moving_fieldmap.nii.gz"
EDDY = "*_from-orig_to-dwiref_mode-image_desc-eddy_xfm.txt"
Entry = tuple[str, float, str, str]


@dataclass(frozen=True, eq=False)
class Placed:
    """Points of the brain, (m, 3) each.

    Attributes
    ----------
    head : ndarray
        In the head.
    undistorted : ndarray
        Where they are found in the undistorted dwiref.
    rigid : ndarray
        The same in the pose of the blip.
    shift : ndarray
        Their displacement by distortion, mm.
    poses : ndarray, (n, 4, 4)
        From points of the dwiref to points of each volume.
    """

    head: np.ndarray
    undistorted: np.ndarray
    rigid: np.ndarray
    shift: np.ndarray
    poses: np.ndarray


def describe_positions(
    derivatives: Path, truth: Truth, warp: Callable[[np.ndarray], np.ndarray], placed: Placed
) -> Iterator[Entry]:
    """Names, values, units and meanings; `warp` from points of the scanner to those of images (nonlinear gradients)."""
    moved = _moving_displacement(derivatives, truth, placed.undistorted)
    resting = np.tile(placed.shift, (len(placed.poses), 1, 1))
    errors = without = _errors(truth, warp, placed, resting)
    if moved is not None:
        errors = _errors(truth, warp, placed, placed.shift + moved)
    length = np.linalg.norm(errors, axis=2)
    yield "combined: error", float(length.mean()), "mm", "position of T1w points in the raw volumes, mean"
    yield "combined: error, median", float(np.median(length)), "mm", "over brain and volumes"
    bent = _eddy_errors(derivatives, truth, placed.head)
    groups = {"turned volumes: error": errors + bent}
    if moved is not None:
        groups["turned volumes: without the moving field"] = without + bent
    yield from _turned(truth, groups)
    yield from _change(truth, placed.head)


def _errors(truth: Truth, warp: Callable[[np.ndarray], np.ndarray], placed: Placed, shifts: np.ndarray) -> np.ndarray:
    """Found less true positions (mm) in every volume without its eddy currents, (n, m, 3), for shifts (n, m, 3)."""
    field, out = truth.image("field_hz"), np.empty(shifts.shape)
    for v, (estimated, true) in enumerate(zip(placed.poses, truth.poses, strict=True)):
        found = apparent(truth, warp, apply(estimated, placed.rigid), shifts[v])
        out[v] = found - truth.distorted(placed.head, field, true)
    return out


def _moving_displacement(derivatives: Path, truth: Truth, points: np.ndarray) -> np.ndarray | None:
    """Displacement (mm RAS+) by the change of the field at points (m, 3) of the dwiref, (n, m, 3); None without one."""
    try:
        path = find(derivatives, MOVING_FIELD)
    except MissingDerivativeError:
        return None
    sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    angles = np.stack([sidecar["Pitch"], sidecar["Roll"]], axis=1)
    return (angles @ read_image(path).at(points).T)[..., None] * truth.mm_per_hz


def _eddy_errors(derivatives: Path, truth: Truth, points: np.ndarray) -> np.ndarray | float:
    """Found less true displacement (mm RAS+) by eddy currents and shifts of the field, (n, m, 3)."""
    try:
        maps = read_mappings(find(derivatives, EDDY))
    except MissingDerivativeError:
        return 0.0
    polarity = -1 if truth.table["phase_encoding_direction"].endswith("-") else 1
    towards, out = polarity * truth.mm_per_hz / np.linalg.norm(truth.mm_per_hz), []
    for v, pose in enumerate(truth.poses):
        scanner = apply(pose, points)
        out.append(maps[v](scanner) - scanner - truth.eddy(v, scanner)[:, None] * towards)
    return np.stack(out)


def _turned(truth: Truth, groups: dict[str, np.ndarray]) -> Iterator[Entry]:
    """Errors (n, m, 3) of all displacements in turned volumes, relative to those in volumes at rest."""
    turned, resting = truth.tilt > TURNED, truth.tilt < RESTING
    meaning = f"position in {turned.sum()} turned volumes relative to volumes at rest"
    for name, values in groups.items() if turned.any() else ():
        in_head = np.einsum("nab,nma->nmb", truth.poses[:, :3, :3], values)
        apart = np.linalg.norm(in_head[turned] - in_head[resting].mean(axis=0), axis=2)
        yield name, float(apart.mean()), "mm", f"{meaning}, mean"
        yield f"{name}, 95 %", float(np.percentile(apart, 95)), "mm", f"{meaning}, 95th percentile"


def _change(truth: Truth, points: np.ndarray) -> Iterator[Entry]:
    """What the true change of the field does to turned volumes, for comparison."""
    turned = np.flatnonzero(truth.tilt > TURNED)
    if truth.moving_field is None or not len(turned):
        return
    size = np.abs([truth.field_change(points, truth.poses[v]) for v in turned]) * np.linalg.norm(truth.mm_per_hz)
    meaning = "true displacement by the change of the field in turned volumes"
    yield "moving field: uncorrected", float(size.mean()), "mm", f"{meaning}, mean"
    yield "moving field: uncorrected, 95 %", float(np.percentile(size, 95)), "mm", f"{meaning}, 95th percentile"
