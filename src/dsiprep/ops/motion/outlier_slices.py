"""Slices with signal dropout: residuals against the prediction slice by slice, and which slices are outliers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.image.point_set import PointSet

__all__ = ["SliceGeometry", "find_outlier_slices", "slice_scores", "slice_signal_loss"]

MIN_VOXELS = 30  # of brain; slices with fewer are not judged
MIN_LOSS = 0.1  # fraction of its predicted signal that an outlier slice lacks at least


@dataclass(frozen=True, eq=False)
class SliceGeometry:
    """Which slice of each volume the points of the reference lie in.

    Attributes
    ----------
    points : PointSet
        In the reference.
    grid : Grid
        Of the volumes.
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, world RAS+ mm.
    axis : int
        Voxel axis across slices.
    """

    points: PointSet
    grid: Grid
    transforms: np.ndarray
    axis: int

    def sum_by_slice(self, values: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Sums of values (n, m) over the points in each slice of the volumes, and their number; both (n, slices)."""
        count = self.grid.shape[self.axis]
        world = self.points.world.astype(float) + self.points.centre
        rows = (np.linalg.inv(self.grid.affine) @ self.transforms)[:, self.axis]
        total, number = np.zeros((len(rows), count)), np.zeros((len(rows), count))
        for volume, (row, volume_values) in enumerate(zip(rows, values.cpu().numpy(), strict=True)):
            slices = np.rint(world @ row[:3] + row[3]).astype(int)
            inside = (slices >= 0) & (slices < count)
            number[volume] = np.bincount(slices[inside], minlength=count)
            total[volume] = np.bincount(slices[inside], volume_values[inside], minlength=count)
        return total, number


def slice_scores(residual: torch.Tensor, geometry: SliceGeometry) -> np.ndarray:
    """Robust z-scores of the mean residual of every slice of every volume; signal dropout is negative.

    Slices are those of the volumes as acquired: residuals at points of the reference are collected in the slice of the
    volume that each point falls into.

    Parameters
    ----------
    residual : Tensor, (n, m)
        Volume minus prediction at the points.
    geometry : SliceGeometry

    Returns
    -------
    ndarray, (n, slices)
        Zero for slices with fewer than 30 voxels of brain.
    """
    total, number = geometry.sum_by_slice(residual)
    # the standard deviation of a mean falls with the root of the number of voxels: this gives all slices one scale
    scaled = np.where(number >= MIN_VOXELS, total / np.sqrt(np.maximum(number, 1)), np.nan)
    known = np.isfinite(scaled)
    typical = np.array([_median_or_zero(column[k]) for column, k in zip(scaled.T, known.T, strict=True)])
    deviation = scaled - typical
    # over the slices of a volume and over volumes: where predictions often err, a single error means little
    within_volume = np.array([_median_or_zero(np.abs(row[k])) for row, k in zip(deviation, known, strict=True)])
    across_volumes = np.array(
        [_median_or_zero(np.abs(column[k])) for column, k in zip(deviation.T, known.T, strict=True)]
    )
    spread = np.maximum(within_volume[:, None], across_volumes)
    floor = 0.5 * np.median(spread[spread > 0]) if (spread > 0).any() else 1.0
    return np.nan_to_num(deviation / (1.4826 * np.maximum(spread, floor)))


def _median_or_zero(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else 0.0


def slice_signal_loss(residual: torch.Tensor, predicted: torch.Tensor, geometry: SliceGeometry) -> np.ndarray:
    """Fraction of its predicted signal that each slice of each volume lacks, (n, slices).

    `residual` and `predicted` are (n, m); zero for slices with fewer than 30 voxels of brain.
    """
    loss, number = geometry.sum_by_slice(-residual)
    expected, _ = geometry.sum_by_slice(predicted)
    return np.where(number >= MIN_VOXELS, loss / np.maximum(expected, 1e-9), 0)


def find_outlier_slices(
    z: np.ndarray, losses: np.ndarray, multiband: tuple[tuple[int, ...], ...] = (), limit: float = -5.0
) -> np.ndarray:
    """Slices that lack at least a tenth of their predicted signal, with a z-score at or below `limit`.

    Simultaneously excited slices are judged together.

    Parameters
    ----------
    z, losses : ndarray, (n, slices)
        From `slice_scores` and `slice_signal_loss`.
    multiband : tuple of tuple of int
        Groups of slices excited together. Of the slices of a group that have enough brain, scores are summed and
        divided by the square root of their number, and losses are averaged.
    limit : float

    Returns
    -------
    ndarray, (n, slices) bool
    """
    score, loss = z.copy(), losses.copy()
    for group in multiband:
        slices = [k for k in group if k < z.shape[1]]
        judged = np.maximum((z[:, slices] != 0).sum(axis=1), 1)  # a score of zero has too little brain
        score[:, slices] = (z[:, slices].sum(axis=1) / np.sqrt(judged))[:, None]
        loss[:, slices] = (losses[:, slices].sum(axis=1) / judged)[:, None]
    return (score <= limit) & (loss >= MIN_LOSS)
