"""Slices with signal dropout: their residuals against the prediction, and which of them count as outliers."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.image.point_set import PointSet

__all__ = ["find_outlier_slices", "slice_scores", "slice_signal_loss"]

FEWEST = 30  # voxels of brain below which a slice is not judged
SMALLEST_LOSS = 0.1  # of the predicted signal: what a slice must lack to count as lost


def slice_scores(residual: torch.Tensor, points: PointSet, grid: Grid, transforms: np.ndarray, axis: int) -> np.ndarray:
    """Robust z-scores of the mean residual of every slice of every volume; signal loss is negative.

    A slice is one of the volume's own: residuals are gathered where the points of the reference lie in the volume.

    Parameters
    ----------
    residual : Tensor, (n, m)
        Volume less prediction at `points`.
    points : PointSet
        In the reference.
    grid : Grid
        Of the volumes.
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, world RAS+ mm.
    axis : int
        Voxel axis across slices.

    Returns
    -------
    ndarray, (n, slices)
        Zero for slices with fewer than 30 voxels of brain.
    """
    total, number = _by_slice(residual, points, grid, transforms, axis)
    # the mean of many voxels is quieter: the root of their number puts slices of all sizes on one scale
    scaled = np.where(number >= FEWEST, total / np.sqrt(np.maximum(number, 1)), np.nan)
    known = np.isfinite(scaled)
    usual = np.array([_middle(column[k]) for column, k in zip(scaled.T, known.T, strict=True)])
    away = scaled - usual
    # a volume's own slices and the same slice of other volumes: where predictions err often, an error says little
    beside = np.array([_middle(np.abs(line[k])) for line, k in zip(away, known, strict=True)])
    elsewhere = np.array([_middle(np.abs(column[k])) for column, k in zip(away.T, known.T, strict=True)])
    spread = np.maximum(beside[:, None], elsewhere)
    floor = 0.5 * np.median(spread[spread > 0]) if (spread > 0).any() else 1.0
    return np.nan_to_num(away / (1.4826 * np.maximum(spread, floor)))


def _middle(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else 0.0


def slice_signal_loss(
    residual: torch.Tensor,
    predicted: torch.Tensor,
    points: PointSet,
    grid: Grid,
    transforms: np.ndarray,
    axis: int,
) -> np.ndarray:
    """What share of its predicted signal each slice of each volume lacks, (n, slices); arguments as `slice_scores`."""
    lacking, number = _by_slice(-residual, points, grid, transforms, axis)
    expected, _ = _by_slice(predicted, points, grid, transforms, axis)
    return np.where(number >= FEWEST, lacking / np.maximum(expected, 1e-9), 0)


def find_outlier_slices(
    z: np.ndarray, losses: np.ndarray, multiband: tuple[tuple[int, ...], ...] = (), limit: float = -5.0
) -> np.ndarray:
    """Slices that lost signal: a tenth of it at least, and far more than chance, with all slices excited together.

    Parameters
    ----------
    z, losses : ndarray, (n, slices)
        From `slice_scores` and `slice_signal_loss`.
    multiband : tuple of tuple of int
        Slices excited together; scores of a group are summed and divided by the root of their number.
    limit : float
        Score from which a slice is lost.

    Returns
    -------
    ndarray, (n, slices) bool
    """
    score, share = z.copy(), losses.copy()
    for group in multiband:
        own = [k for k in group if k < z.shape[1]]
        judged = np.maximum((z[:, own] != 0).sum(axis=1), 1)  # zero: too little brain to be judged
        score[:, own] = (z[:, own].sum(axis=1) / np.sqrt(judged))[:, None]
        share[:, own] = (losses[:, own].sum(axis=1) / judged)[:, None]
    return (score <= limit) & (share >= SMALLEST_LOSS)


def _by_slice(
    values: torch.Tensor, points: PointSet, grid: Grid, transforms: np.ndarray, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values (n, m) over the points in each of the volumes' own slices, and their number, (n, slices)."""
    count = grid.shape[axis]
    world = points.world.astype(float) + points.centre
    rows = (np.linalg.inv(grid.affine) @ transforms)[:, axis]
    total, number = np.zeros((len(rows), count)), np.zeros((len(rows), count))
    for volume, (row, line) in enumerate(zip(rows, values.cpu().numpy(), strict=True)):
        where = np.rint(world @ row[:3] + row[3]).astype(int)
        inside = (where >= 0) & (where < count)
        number[volume] = np.bincount(where[inside], minlength=count)
        total[volume] = np.bincount(where[inside], line[inside], minlength=count)
    return total, number
