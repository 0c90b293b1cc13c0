"""Current estimates of motion, eddy currents and signal dropout for every volume of a series."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.motion.gauss_newton import Fit

__all__ = ["Dropout", "MotionState"]


@dataclass(frozen=True, eq=False)
class Dropout:
    """Signal lost by slices of n volumes.

    Attributes
    ----------
    lost : ndarray, (n, slices) bool
        Outlier slices.
    whole : ndarray, (n,) bool
        Volumes that lost signal in all slices.
    expected : ndarray, (n, slices)
        Ratio of the signal to its prediction that each slice would have without loss.
    z : ndarray, (n, slices)
        z-score of the ratio; zero for slices with too little brain.
    """

    lost: np.ndarray
    whole: np.ndarray
    expected: np.ndarray
    z: np.ndarray


@dataclass(frozen=True, eq=False)
class MotionState:
    """Poses, eddy currents and outlier slices of a series, as estimated so far.

    Attributes
    ----------
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    eddy : EddyCurrents or None
        Of all volumes; None if eddy currents are not estimated.
    response : ndarray, (10, 3)
        Linear map from gradients to the coefficients of `eddy`, in mm; see `ops.motion.eddy_model`.
    deviation : ndarray, (n, 4)
        What the constant and linear coefficients of `eddy` have besides, in mm; see `ops.motion.field_shift` and
        `ops.motion.eddy_deviation`. Only the constant at b=0.
    dropout : Dropout or None
        Of all volumes, in slices across voxel axis `slice_axis` of `grid`; None before it is detected.
    slice_axis : int
    grid : Grid
        Voxel grid of the series.
    fit : Fit or None
        Of the diffusion-weighted volumes to their predictions at the current voxel size; None before the first round.
    """

    transforms: np.ndarray
    eddy: EddyCurrents | None
    response: np.ndarray
    deviation: np.ndarray
    dropout: Dropout | None
    slice_axis: int
    grid: Grid
    fit: Fit | None = None

    def with_transforms(self, transforms: np.ndarray) -> MotionState:
        """Copy with other poses."""
        return replace(self, transforms=transforms)

    def shifted_transforms(self) -> np.ndarray:
        """Transforms with the field shift added as a translation: for b=0 all there is of `eddy`, (n, 4, 4)."""
        if self.eddy is None:
            return self.transforms
        transforms = self.transforms.copy()
        transforms[:, :3, 3] += self.deviation[:, :1] * self.eddy.axes[:, self.eddy.along]
        return transforms

    def has_dropout(self) -> bool:
        """Whether any slice lost signal, as far as is known."""
        return self.dropout is not None and bool(self.dropout.lost.any())

    def eddy_of(self, volumes: np.ndarray) -> EddyCurrents | None:
        """Eddy currents of the given volumes."""
        return None if self.eddy is None else self.eddy.take(volumes)
