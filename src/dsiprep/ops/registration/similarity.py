"""Similarity metrics and their derivatives with respect to the moving intensities.

`mutual_information` and `correlation` compare point samples and drive the linear registration; `local_correlation`
compares volumes and drives the diffeomorphic one. Each returns a score (larger is better) and its derivative with
respect to every moving intensity; the gradient for any transform follows by the chain rule.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from dsiprep.compiled import compiled, inlined
from dsiprep.ops.image.bspline import cubic_slopes, cubic_weights
from dsiprep.ops.image.filters import box_sum

__all__ = ["VARIANCE_FLOOR", "correlation", "local_correlation", "mutual_information", "to_bins"]

BINS = 32
CHUNKS = 16  # partial histograms; a fixed number keeps sums independent of the number of threads
EPSILON = 1e-12
VARIANCE_FLOOR = 1e-5  # added to every variance, so that windows with a standard deviation below 0.003 count little


def to_bins(values: np.ndarray, low: float, high: float, bins: int = BINS) -> np.ndarray:
    """Histogram bin of each fixed sample, (m,) int32; values outside [low, high] go to the first or last bin."""
    scaled = (np.asarray(values, np.float32) - low) * (bins / max(high - low, EPSILON))
    return np.clip(scaled, 0, bins - 1).astype(np.int32)


def mutual_information(
    fixed_bins: np.ndarray, moving: np.ndarray, weights: np.ndarray, low: float, high: float, bins: int = BINS
) -> tuple[float, np.ndarray]:
    """Normalised mutual information (H(f) + H(m)) / H(f, m), with a cubic B-spline Parzen window on the moving side.

    Parameters
    ----------
    fixed_bins : ndarray, (m,), int32
        From `to_bins`.
    moving : ndarray, (m,), float32
        Moving intensities at the same points.
    weights : ndarray, (m,), float32
        0 excludes a point.
    low, high : float
        Range of the moving intensities; values outside are clipped to it and have zero derivative.
    bins : int
        Number of bins for each image.

    Returns
    -------
    score : float
        1 for independent images, 2 for identical ones.
    derivative : ndarray, (m,), float32
        Derivative of the score with respect to each moving intensity.

    References
    ----------
    Mattes et al. 2003 (doi 10.1109/TMI.2003.809072);
    Studholme et al. 1999 (doi 10.1016/S0031-3203(98)00091-0).
    """
    scale = (bins - 3) / max(high - low, EPSILON)
    joint = _histogram_loop(fixed_bins, moving, weights, low, scale, bins).sum(axis=0)
    total = joint.sum()
    if total <= 0:
        return 1.0, np.zeros_like(moving)
    joint /= total
    log_joint = np.log(joint + EPSILON)
    log_moving = np.log(joint.sum(axis=0) + EPSILON)
    log_fixed = np.log(joint.sum(axis=1) + EPSILON)
    joint_entropy = max(-(joint * log_joint).sum(), EPSILON)
    marginal = -(joint.sum(axis=1) * log_fixed).sum() - (joint.sum(axis=0) * log_moving).sum()
    score = float(marginal / joint_entropy)
    table = (score * log_joint - log_moving[None]) * (scale / total / joint_entropy)
    return score, _histogram_derivative(fixed_bins, moving, weights, low, scale, table)


def correlation(fixed: np.ndarray, moving: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Weighted Pearson correlation.

    Parameters
    ----------
    fixed, moving, weights : ndarray, (m,), float32

    Returns
    -------
    score : float
        -1 to 1.
    derivative : ndarray, (m,), float32
        Derivative of the score with respect to each moving intensity.
    """
    total = float(weights.sum(dtype=float))
    if total <= 0:
        return 0.0, np.zeros_like(moving)
    w = weights / np.float32(total)
    f = fixed - np.float32(np.dot(w.astype(float), fixed))
    m = moving - np.float32(np.dot(w.astype(float), moving))
    ff, mm = float(np.dot(w * f, f)), float(np.dot(w * m, m))
    norm = np.sqrt(ff * mm) + EPSILON
    score = float(np.dot(w * f, m)) / norm
    return score, (w * (f / norm - m * (score / (mm + EPSILON)))).astype(np.float32)


def local_correlation(
    fixed: torch.Tensor, moving: torch.Tensor, weights: torch.Tensor, radius: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared correlation in a cubic window around every voxel, and its derivative with respect to the moving image.

    Parameters
    ----------
    fixed, moving : Tensor, (i, j, k), float32
        Scaled to about 0 to 1, because `VARIANCE_FLOOR` is in squared intensity units.
    weights : Tensor, (i, j, k), float32
        Weight of the window around each voxel.
    radius : int
        Half-width of the window in voxels.

    Returns
    -------
    score : Tensor, (i, j, k)
        Squared correlation in each window, 0 to 1.
    derivative : Tensor, (i, j, k)
        Derivative of the weighted sum of all scores with respect to each moving intensity; each voxel contributes to
        every window that contains it.

    References
    ----------
    Avants et al. 2008 (doi 10.1016/j.media.2007.06.004).
    """
    count = (2 * radius + 1) ** 3
    sums = box_sum(torch.stack([fixed, moving, fixed * fixed, moving * moving, fixed * moving]), radius)
    score, coefficients = _correlation_maps(sums, weights, count)
    summed = box_sum(coefficients, radius)
    return score, fixed * summed[0] - moving * summed[1] + summed[2]


def _correlation_maps(sums: torch.Tensor, weights: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Score of each window, and the coefficients of f, of -m and of 1 that it adds to the derivative."""
    mean_f, mean_m = sums[0] / count, sums[1] / count
    ff = (sums[2] / count - mean_f**2).clamp(min=0) + VARIANCE_FLOOR
    mm = (sums[3] / count - mean_m**2).clamp(min=0) + VARIANCE_FLOOR
    fm = sums[4] / count - mean_f * mean_m
    a = weights * 2 * fm / (ff * mm) / count
    b = a * fm / mm
    return fm * fm / (ff * mm), torch.stack([a, b, b * mean_m - a * mean_f])


@inlined
def _bin(value: float, low: float, scale: float, bins: int) -> tuple[int, float]:
    """First of the four bins that a sample contributes to, and its fractional position between the second and third."""
    position = min(max((value - low) * scale, 0.0), bins - 3 - 1e-4)
    first = int(position)
    return first, position - first


@compiled(parallel=True)
def _histogram_loop(
    fixed: np.ndarray, moving: np.ndarray, weights: np.ndarray, low: float, scale: float, bins: int
) -> np.ndarray:
    """Weighted joint histograms of chunks of the samples, (chunks, fixed bins, moving bins)."""
    partial = np.zeros((CHUNKS, bins, bins))
    size = (len(moving) + CHUNKS - 1) // CHUNKS
    for c in numba.prange(CHUNKS):
        table = partial[c]
        for p in range(c * size, min((c + 1) * size, len(moving))):
            w = weights[p]
            if w > 0:
                b, t = _bin(moving[p], low, scale, bins)
                w0, w1, w2, w3 = cubic_weights(t)
                row = table[fixed[p]]
                row[b] += w * w0
                row[b + 1] += w * w1
                row[b + 2] += w * w2
                row[b + 3] += w * w3
    return partial


@compiled(parallel=True)
def _histogram_derivative(
    fixed: np.ndarray, moving: np.ndarray, weights: np.ndarray, low: float, scale: float, table: np.ndarray
) -> np.ndarray:
    """Derivative with respect to each moving intensity, (m,), given that with respect to the histogram counts."""
    bins = table.shape[1]
    out = np.zeros(len(moving), np.float32)
    for p in numba.prange(len(moving)):
        position = (moving[p] - low) * scale
        if weights[p] > 0 and position > 0 and position < bins - 3:
            b, t = _bin(moving[p], low, scale, bins)
            s0, s1, s2, s3 = cubic_slopes(t)
            row = table[fixed[p]]
            out[p] = weights[p] * (row[b] * s0 + row[b + 1] * s1 + row[b + 2] * s2 + row[b + 3] * s3)
    return out
