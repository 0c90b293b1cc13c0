"""Agreement of volumes with their predictions: R², correlation and volume weights."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["MIN_WEIGHT", "agreement", "volume_weights"]

MIN_WEIGHT = 1e-3
SIMILAR_VOLUMES = 15  # volumes of the most similar b-values that define the typical residual


def agreement(observed: torch.Tensor, predicted: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """R² and correlation of volumes with their predictions.

    Parameters
    ----------
    observed, predicted : Tensor, (n, m)
        n volumes at m voxels.

    Returns
    -------
    r2, xcorr : ndarray, (n,), float64
        R² is 1 minus the variance of the difference over that of the volume.
    """
    r2, xcorr = np.empty(len(observed)), np.empty(len(observed))
    for row, (volume, prediction) in enumerate(zip(observed, predicted, strict=True)):
        one, two = volume - volume.mean(), prediction - prediction.mean()
        total = one.square().sum().clamp(min=1e-12)
        r2[row] = float(1 - (one - two).square().sum() / total)
        xcorr[row] = float((one * two).sum() / (total * two.square().sum().clamp(min=1e-12)).sqrt())
    return r2, xcorr


def volume_weights(observed: torch.Tensor, predicted: torch.Tensor, bvals: np.ndarray) -> np.ndarray:
    """Per-volume weight: squared ratio of the typical residual at this b-value to the volume's own, at most 1.

    Parameters
    ----------
    observed, predicted : Tensor, (n, m)
    bvals : ndarray, (n,)
        s/mm².

    Returns
    -------
    ndarray, (n,)
        At least 0.001.
    """
    rms = np.array([float((one - two).square().mean().sqrt()) for one, two in zip(observed, predicted, strict=True)])
    by_bval = np.argsort(bvals, kind="stable")
    typical = np.empty(len(rms))
    for rank, volume in enumerate(by_bval):
        first = max(0, min(rank - SIMILAR_VOLUMES // 2, len(rms) - SIMILAR_VOLUMES))
        typical[volume] = np.median(rms[by_bval[first : first + SIMILAR_VOLUMES]])
    return np.clip((typical / np.maximum(rms, 1e-12)) ** 2, MIN_WEIGHT, 1)
