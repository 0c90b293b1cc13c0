"""Results of motion correction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dsiprep.data.grid import Volume
from dsiprep.data.summary import Summarised
from dsiprep.data.transform import EddyCurrents

RIGID = 1e-9  # rounding of the determinant of a rotation


@dataclass(frozen=True, eq=False)
class B0Shift:
    """Rigid displacement of the brain between groups of diffusion-weighted volumes and the b=0 reference.

    Attributes
    ----------
    measured : ndarray, (n,)
        Mean displacement (mm) over the brain by which mutual information would move the range of b-values to which the
        volume belongs; NaN in b=0 volumes and ranges that were not measured.
    applied : ndarray, (n,)
        What was applied of it; 0 where it was not significant.
    """

    measured: np.ndarray
    applied: np.ndarray

    def merge(self, later: B0Shift) -> B0Shift:
        """The larger values of two measurements, of which the second was made after the first was applied."""
        return B0Shift(np.fmax(self.measured, later.measured), np.maximum(self.applied, later.applied))


def shot_of_slices(shots: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Shot of each slice, (slices,), from the slices of each shot."""
    out = np.empty(sum(map(len, shots)), int)
    for number, group in enumerate(shots):
        out[list(group)] = number
    return out


@dataclass(frozen=True, eq=False, repr=False)
class SliceMotion(Summarised):
    """Motion of the head while volumes were acquired.

    Attributes
    ----------
    poses : ndarray, (n, shots, 4, 4), float64
        As `Motion.transforms`, for each shot; all equal in volumes with one pose.
    shots : tuple of tuple of int
        Slices of each shot, in order of acquisition.
    moving : ndarray, (n,) bool
        Volumes whose shots have poses of their own.
    evidence : ndarray, (n,)
        Logarithm of the odds for poses of their own, by which `moving` was decided.
    left_out : ndarray, (n, slices) bool
        Slices that are not used for the images of moving volumes.
    gaps : ndarray, (g, 4), int
        Volume and voxel, on the grid of the series, where a moving volume has no sample around it in its mean pose.
    gap_values : ndarray, (g,), float32
        Predicted intensity there.
    """

    poses: np.ndarray
    shots: tuple[tuple[int, ...], ...]
    moving: np.ndarray
    evidence: np.ndarray
    left_out: np.ndarray
    gaps: np.ndarray
    gap_values: np.ndarray

    @property
    def shot_of(self) -> np.ndarray:
        """Shot of each slice, (slices,)."""
        return shot_of_slices(self.shots)

    @property
    def slice_poses(self) -> np.ndarray:
        """Pose of each slice, (n, slices, 4, 4)."""
        return self.poses[:, self.shot_of]


@dataclass(frozen=True, eq=False, repr=False)
class Motion(Summarised):
    """Head poses and outlier slices of the volumes of one blip.

    Attributes
    ----------
    transforms : ndarray, (n, 4, 4), float64
        Map points of the dwiref (world RAS+ mm) to points of volume v: x_v = transforms[v] @ x_dwiref. To resample
        volume v onto the dwiref, sample it at x_v.
    volumes : ndarray, (n,), int
        Indices of the volumes in the conformed series.
    dwiref : Volume
        The b=0 reference image to which all volumes were aligned, with susceptibility distortion.
    mask : Volume
        Brain mask of the dwiref, 0 or 1.
    r2, xcorr : ndarray, (n,)
        R² and correlation of each aligned volume with its prediction in the mask, at the last iteration; NaN without
        a model.
    slice_z : ndarray, (n, slices)
        Robust z-score of the signal of each slice along `slice_axis` over its prediction; NaN without a model.
    slice_axis : int
        Voxel axis of slice selection.
    trace : list of dict
        One row per volume and iteration, with the columns of hmcOptimization.csv.
    model : str
        Signal model: "3dSHORE", "tensor", "none" or "off".
    eddy : EddyCurrents or None
        Eddy-current displacement of every volume, at the points x_v.
    outlier_slices : ndarray, (n, slices) bool, or None
        Slices of diffusion-weighted volumes with signal dropout.
    replacements : Tensor, (r, a, b), or None
        Replacement slices in the order of numpy.argwhere(outlier_slices); None if they are not replaced.
    notes : tuple of str
        Remarks for the report.
    b0_shift : B0Shift or None
        Diffusion-weighted volumes against b=0; None if it was not measured.
    slices : SliceMotion or None
        Motion within volumes, of which `transforms` are the mean poses; None if it was not estimated.
    """

    transforms: np.ndarray
    volumes: np.ndarray
    dwiref: Volume
    mask: Volume
    r2: np.ndarray
    xcorr: np.ndarray
    slice_z: np.ndarray
    slice_axis: int
    trace: list[dict[str, Any]]
    model: str
    eddy: EddyCurrents | None = None
    outlier_slices: np.ndarray | None = None
    replacements: torch.Tensor | None = None
    notes: tuple[str, ...] = ()
    b0_shift: B0Shift | None = None
    slices: SliceMotion | None = None

    def density(self, row: int) -> float:
        """Determinant of an affine pose, by which intensities sampled at x_v are multiplied; exactly 1 if rigid.

        Affine poses stand for eddy currents, which spread the signal of a voxel over a larger or smaller area.
        """
        determinant = float(np.linalg.det(self.transforms[row][:3, :3]))
        return determinant if abs(determinant - 1) > RIGID else 1.0

    def replaces(self, row: int) -> bool:
        """Whether slices of volume `row` of `transforms` are replaced."""
        outliers = self.outlier_slices
        return self.replacements is not None and outliers is not None and bool(outliers[row].any())

    def with_replaced_slices(self, row: int, volume: torch.Tensor) -> torch.Tensor:
        """Replace the outlier slices of volume `row` of `transforms`, (i, j, k), if replacements exist."""
        if self.replacements is None or self.outlier_slices is None or not self.replaces(row):
            return volume
        out = volume.clone()
        for number, (volume_row, slice_index) in enumerate(np.argwhere(self.outlier_slices)):
            if volume_row == row:
                out.select(self.slice_axis, int(slice_index)).copy_(self.replacements[number])
        return out


def eddy_currents(motions: tuple[Motion, ...], count: int) -> EddyCurrents | None:
    """Eddy currents of all blips combined, for `count` volumes; None if none were estimated."""
    estimated = [(motion.volumes, motion.eddy) for motion in motions if motion.eddy is not None]
    if not estimated:
        return None
    coefficients = np.zeros((count, 10))
    for volumes, eddy in estimated:
        coefficients[volumes] = eddy.coefficients
    return replace(estimated[0][1], coefficients=coefficients)
