"""How well volumes agree with what was predicted of them: over the brain, and slice by slice."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["agreement", "volume_weights"]

LIKE = 15  # volumes of most similar b-value that a volume's residual is compared with


def agreement(observed: torch.Tensor, predicted: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """R² and correlation of volumes with their predictions.

    Parameters
    ----------
    observed, predicted : Tensor, (n, m)
        m voxels of n volumes.

    Returns
    -------
    r2, xcorr : ndarray, (n,), float64
        R² is 1 less the variance of the difference over that of the volume.
    """
    r2, xcorr = np.empty(len(observed)), np.empty(len(observed))
    for row, (value, expected) in enumerate(zip(observed, predicted, strict=True)):
        one, two = value - value.mean(), expected - expected.mean()
        total = one.square().sum().clamp(min=1e-12)
        r2[row] = float(1 - (one - two).square().sum() / total)
        xcorr[row] = float((one * two).sum() / (total * two.square().sum().clamp(min=1e-12)).sqrt())
    return r2, xcorr


def volume_weights(observed: torch.Tensor, predicted: torch.Tensor, bvals: np.ndarray) -> np.ndarray:
    """How far each volume is to be believed: (residual usual for its b-value over its own)², at most 1.

    Parameters
    ----------
    observed, predicted : Tensor, (n, m)
    bvals : ndarray, (n,)
        s/mm².

    Returns
    -------
    ndarray, (n,)
    """
    rms = np.array([float((one - two).square().mean().sqrt()) for one, two in zip(observed, predicted, strict=True)])
    order = np.argsort(bvals, kind="stable")
    usual = np.empty(len(rms))
    for place, volume in enumerate(order):
        first = max(0, min(place - LIKE // 2, len(rms) - LIKE))
        usual[volume] = np.median(rms[order[first : first + LIKE]])
    return np.clip((usual / np.maximum(rms, 1e-12)) ** 2, 1e-3, 1)
