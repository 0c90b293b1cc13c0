"""Errors of the gradients in each voxel, and of positions, with nonlinear gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dsiprep.score.read import MissingDerivativeError, Truth, apply, find, read_image, read_mapping

__all__ = ["GradientErrors", "apparent", "describe", "gradient_errors", "scanner_errors", "scanner_mapping"]

GradientErrors = dict[str, tuple[np.ndarray, np.ndarray]]  # b in percent and angle in degrees, (volumes, points)
B0 = 100.0  # s/mm²


def scanner_mapping(derivatives: Path) -> Callable[[np.ndarray], np.ndarray]:
    """From points of the scanner to points of the images, (n, 3); the identity if derivatives have no such warp."""
    try:
        return read_mapping(find(derivatives, "*_desc-gradwarp_xfm.h5"))
    except MissingDerivativeError:
        return lambda points: points


def apparent(
    truth: Truth, warp: Callable[[np.ndarray], np.ndarray], points: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Where points (n, 3) of the scanner appear that off-resonance shifts, a shift that `warp` stretches."""
    if truth.gradient_displacement is None:
        return points + shift
    along = truth.mm_per_hz / np.linalg.norm(truth.mm_per_hz)
    stretch = (warp(points + along) - warp(points - along)) @ along / 2
    return warp(points) + stretch[:, None] * shift


def scanner_errors(truth: Truth, warp: Callable[[np.ndarray], np.ndarray], points: np.ndarray) -> list[np.ndarray]:
    """Distance in mm of the true and the corrected displacement at head points (m, 3): residual and uncorrected."""
    residual, uncorrected = [], []
    for pose in truth.poses:
        scanner = apply(pose, points)
        true = truth.gradient_displacement.at(scanner) if truth.gradient_displacement else 0 * scanner
        residual.append(np.linalg.norm(warp(scanner) - scanner - true, axis=1))
        uncorrected.append(np.linalg.norm(true, axis=1))
    return [np.concatenate(residual), np.concatenate(uncorrected)]


def describe(errors: GradientErrors) -> Iterator[tuple[str, float, str, str]]:
    """Name, value, unit and meaning of each measure."""
    for name, note in (("error", ""), ("uncorrected", ", for comparison")):
        meaning = f"over the brain and volumes with b > 100{note}"
        for quantity, unit, values in zip(("b", "direction"), ("%", "deg"), errors[name], strict=True):
            size = np.abs(values)
            yield f"gradients: {quantity}, {name}", float(size.mean()), unit, f"mean {meaning}"
            yield (
                f"gradients: {quantity}, {name}, 95 %",
                float(np.percentile(size, 95)),
                unit,
                f"95th percentile {meaning}",
            )


def gradient_errors(derivatives: Path, truth: Truth, points: np.ndarray, acpc_to_head: np.ndarray) -> GradientErrors:
    """Error of b-values and directions at head points, with the deviation that was written and without it.

    Parameters
    ----------
    derivatives : Path
    truth : Truth
        Of a phantom with nonlinear gradients.
    points : ndarray, (m, 3)
        In the head frame.
    acpc_to_head : ndarray, (4, 4)

    Returns
    -------
    dict
        "error" and "uncorrected".
    """
    written = read_image(find(derivatives, "*_desc-graddev_dwimap.nii.gz"))
    vectors = np.loadtxt(find(derivatives, "*_desc-preproc_fslbvecs.txt")).T
    bvals = np.loadtxt(find(derivatives, "*_desc-preproc_dwi.bval"))
    if len(vectors) != len(truth.bvals):
        raise MissingDerivativeError(f"not compared: {len(vectors)} b-vectors for {len(truth.bvals)} volumes")
    axes = written.affine[:3, :3] / np.linalg.norm(written.affine[:3, :3], axis=0)
    if np.linalg.det(axes) > 0:
        axes = axes * [-1, 1, 1]  # FSL's frame
    to_head = acpc_to_head[:3, :3] @ axes
    acpc = apply(np.linalg.inv(acpc_to_head), points)
    # FSL reads the nine volumes as the columns of L
    deviation = written.at(acpc, order=3).reshape(-1, 3, 3).transpose(0, 2, 1)
    true_deviation = truth.image("gradient_deviation")
    scanner_bvecs = np.asarray(truth.table["bvecs_scanner"], float)
    errors: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"error": [], "uncorrected": []}
    for v in np.flatnonzero(truth.bvals > B0):
        pose = truth.poses[v]
        acting = np.eye(3) + true_deviation.at(apply(pose, points), order=3).reshape(-1, 3, 3)
        true = acting @ scanner_bvecs[v] @ pose[:3, :3]
        scale = np.sqrt(bvals[v] / truth.bvals[v])
        for name, found in (("error", np.eye(3) + deviation), ("uncorrected", np.eye(3)[None])):
            errors[name].append(_compare(scale * (found @ vectors[v]) @ to_head.T, true))
    return {name: (np.stack([b for b, _ in rows]), np.stack([a for _, a in rows])) for name, rows in errors.items()}


def _compare(found: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Difference of squared lengths in percent, and angle in degrees, of gradients (m, 3) or (1, 3) and (m, 3)."""
    squared = (true**2).sum(1)
    b = 100 * ((found**2).sum(1) / squared - 1)
    cosine = np.abs((found * true).sum(1)) / np.sqrt((found**2).sum(1) * squared)
    return b, np.rad2deg(np.arccos(np.clip(cosine, 0, 1)))
