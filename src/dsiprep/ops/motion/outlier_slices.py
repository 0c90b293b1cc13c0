"""Slices with signal dropout: the signal of every slice against its prediction, and which slices lost some of it.

The ratio of slice k of volume v, as acquired, to its prediction p is r = <volume, p> / <p, p> over the brain in the
plane of the slice. Its logarithm is

    log r_vk = log g_v(k) + c_k(b) + log(1 - loss_vk) + noise,

with the gain g of the volume, smooth across slices, and the bias c of predictions in slice k, common to volumes of
similar b. c is a median over these volumes. g is an upper quantile over neighbouring slices, which the loss of half of
them does not lower; where all of a volume was lost, it is that of the volumes of similar b.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from dsiprep.data.dwi import DWI
from dsiprep.ops.image.eddy_displacement import eddy_on_grid
from dsiprep.ops.motion.gauss_newton import voxel_maps
from dsiprep.ops.motion.gauss_newton_kernels import slice_sums_loop
from dsiprep.ops.motion.motion_state import Dropout, MotionState
from dsiprep.ops.motion.pyramid import PyramidLevel, chunks

__all__ = ["MIN_LOSS", "SliceRatios", "find_dropout", "judge_slices", "slice_ratios"]

MIN_VOXELS = 30  # of brain; slices with fewer are not judged
MIN_LOSS = 0.12  # fraction of its signal that an outlier slice lacks at least
LIMIT = -5.0  # z-score at or below which a slice is an outlier
RELATED_LIMIT = -2.0  # the same in volumes with many outliers, in which others are as likely lost as not
MANY = 0.1  # fraction of the slices of a volume
MIN_VOLUME_LOSS = 0.15  # the same for the gain of whole volumes, which errs more with the model
VOLUME_LIMIT = -2.5  # z-score of the gain at or below which all of a volume was lost
ONE_SIGMA = 0.8413  # quantile of a normal distribution one standard deviation above the median
SIMILAR_VOLUMES = 25  # at most, of the most similar b-values, that slices are compared with
SIMILAR_GAINS = 15  # the same for whole volumes, whose gain depends more on b, and at least for slices
NEIGHBOURS = 6  # slices on either side that define the gain of a volume
INTACT_QUANTILE = 0.75  # of neighbouring slices, taken for the gain: half of them may have lost signal
MIN_RATIO = 0.02  # smaller ratios are noise about zero
EDGE = 0.12  # slices by which predictions may err where the brain begins and ends
MIN_SPREAD = 0.01  # of log ratios: predictions and scanners are not more exact


@dataclass(frozen=True, eq=False)
class SliceRatios:
    """Signal of slices over their prediction.

    Attributes
    ----------
    ratio : ndarray, (n, slices)
    voxels : ndarray, (n, slices)
        Voxels of brain that the ratio is of.
    """

    ratio: np.ndarray
    voxels: np.ndarray


def judge_slices(
    dwi: DWI,
    level: PyramidLevel,
    state: MotionState,
    volumes: np.ndarray,
    predicted: torch.Tensor,
    multiband: tuple[tuple[int, ...], ...] = (),
) -> MotionState:
    """Copy of `state` with the signal dropout of volumes; the others keep what they had, at first none.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    level : PyramidLevel
    state : MotionState
    volumes : ndarray, (n,)
    predicted : Tensor, (n, m)
        Predictions of these volumes at the points of `level`.
    multiband : tuple of tuple of int
        See `find_dropout`.
    """
    found = find_dropout(slice_ratios(dwi, level, volumes, state, predicted), dwi.bvals[volumes], multiband)
    shape = (len(dwi), dwi.grid.shape[state.slice_axis])
    none = Dropout(np.zeros(shape, bool), np.zeros(len(dwi), bool), np.ones(shape), np.zeros(shape))
    before = none if state.dropout is None else state.dropout
    arrays = {field.name: getattr(before, field.name).copy() for field in fields(Dropout)}
    for name, values in arrays.items():
        values[volumes] = getattr(found, name)
    return replace(state, dropout=Dropout(**arrays))


def slice_ratios(
    dwi: DWI, level: PyramidLevel, volumes: np.ndarray, state: MotionState, predicted: torch.Tensor
) -> SliceRatios:
    """Ratios of the slices of volumes, as acquired, to their predictions.

    Parameters
    ----------
    dwi : DWI
        As acquired.
    level : PyramidLevel
        Of any voxel size.
    volumes : ndarray, (n,)
    state : MotionState
        Poses and eddy currents of all volumes.
    predicted : Tensor, (n, m)
        At the points of `level`.
    """
    axis, grid = state.slice_axis, dwi.grid
    sums = np.zeros((len(volumes), grid.shape[axis], 3))
    width = max(1.0, level.grid.voxel_sizes[axis] / grid.voxel_sizes[axis])
    for part, some in chunks(volumes):
        displacement = eddy_on_grid(state.eddy_of(some), grid)
        slice_sums_loop(
            dwi.data[torch.as_tensor(some, device=dwi.data.device)].cpu().numpy(),
            level.points.voxels,
            voxel_maps(grid, level.points, state.transforms[some]),
            predicted[part].cpu().numpy(),
            axis,
            width,
            displacement.coefficients,
            displacement.frame,
            displacement.along,
            sums[part],
        )
    voxels = sums[..., 2] * level.grid.voxel_sizes.prod() / grid.voxel_sizes.prod() / width
    return SliceRatios(sums[..., 0] / np.maximum(sums[..., 1], 1e-12), voxels)


def find_dropout(ratios: SliceRatios, bvals: np.ndarray, multiband: tuple[tuple[int, ...], ...] = ()) -> Dropout:
    """Slices and volumes that lack at least a tenth of their signal, beyond what noise explains.

    Parameters
    ----------
    ratios : SliceRatios
    bvals : ndarray, (n,)
        s/mm².
    multiband : tuple of tuple of int
        Groups of slices excited together, which are judged by their mean, weighted by the noise of each.

    Returns
    -------
    Dropout
        Of these volumes.
    """
    judged = ratios.voxels >= MIN_VOXELS
    similar = _similar_volumes(bvals, int(np.clip(len(bvals) // 4, SIMILAR_GAINS, SIMILAR_VOLUMES)))
    x = np.where(judged, np.log(np.maximum(ratios.ratio, MIN_RATIO)), np.nan)
    relative = x - _over_similar(x, similar)
    gain, whole = _local_gain(relative), _lost_volumes(relative, _similar_volumes(bvals, SIMILAR_GAINS))
    gain = np.where(whole[:, None], _over_similar(gain, similar), gain)
    expected = gain + _over_similar(x - gain, similar)
    deviation = x - expected
    spread = np.maximum(1.4826 * _over_similar(np.abs(deviation), similar), MIN_SPREAD)
    spread = np.hypot(spread, EDGE * np.abs(np.gradient(ratios.voxels, axis=1)) / np.maximum(ratios.voxels, 1))
    for group in multiband:
        slices = [k for k in group if k < x.shape[1]]
        precision = np.where(judged[:, slices], spread[:, slices] ** -2, 0)
        total = np.maximum(precision.sum(axis=1, keepdims=True), 1e-12)
        deviation[:, slices] = (np.nan_to_num(deviation[:, slices]) * precision).sum(axis=1, keepdims=True) / total
        spread[:, slices] = total**-0.5
    z = np.nan_to_num(deviation / spread)
    weak = judged & (deviation <= np.log(1 - MIN_LOSS))
    lost = weak & (z <= LIMIT)
    many = lost.sum(axis=1) >= MANY * judged.sum(axis=1)
    lost |= weak & (z <= RELATED_LIMIT) & many[:, None]
    lost[whole] = ratios.voxels[whole] > 0
    return Dropout(lost, whole, np.exp(np.nan_to_num(expected)), np.where(judged, z, 0))


def _similar_volumes(bvals: np.ndarray, size: int) -> np.ndarray:
    """Indices of `size` volumes of the b-values nearest to that of each volume, (n, s), itself among them."""
    by_bval = np.argsort(bvals, kind="stable")
    size = min(size, len(bvals))
    first = np.clip(np.arange(len(bvals)) - size // 2, 0, len(bvals) - size)
    similar = np.empty((len(bvals), size), int)
    similar[by_bval] = by_bval[first[:, None] + np.arange(size)]
    return similar


def _over_similar(values: np.ndarray, similar: np.ndarray) -> np.ndarray:
    """Medians of values (n, ...) over similar volumes (n, s), (n, ...)."""
    return np.stack([_quantile(values[some], 0.5, 0) for some in similar])


def _local_gain(relative: np.ndarray) -> np.ndarray:
    """Upper quantile of log ratios (n, slices) over the neighbouring slices, (n, slices)."""
    padded = np.pad(relative, ((0, 0), (NEIGHBOURS, NEIGHBOURS)), constant_values=np.nan)
    return _quantile(sliding_window_view(padded, 2 * NEIGHBOURS + 1, axis=1), INTACT_QUANTILE, 2)


def _lost_volumes(relative: np.ndarray, similar: np.ndarray) -> np.ndarray:
    """Whether all of a volume lost signal, (n,): the upper quantile of its log ratios is below that of the others."""
    gain = _quantile(relative, INTACT_QUANTILE, 1)
    deviation = gain - _over_similar(gain, similar)
    above = np.stack([_quantile(deviation[some], ONE_SIGMA, 0) for some in similar])  # loss only lowers: that is noise
    return (deviation <= np.log(1 - MIN_VOLUME_LOSS)) & (deviation <= VOLUME_LIMIT * np.maximum(above, MIN_SPREAD))


def _quantile(values: np.ndarray, q: float, axis: int) -> np.ndarray:
    """Quantile along an axis of the values that are not NaN; NaN where there are none."""
    ordered = np.sort(values, axis=axis)  # NaN last
    last = np.maximum(np.isfinite(values).sum(axis=axis, keepdims=True) - 1, 0)
    low = np.floor(q * last).astype(int)
    below, above = (np.take_along_axis(ordered, i, axis) for i in (low, np.minimum(low + 1, last)))
    return np.squeeze(below + (q * last - low) * (above - below), axis)
