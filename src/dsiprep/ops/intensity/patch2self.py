"""Patch2Self: each volume of a series predicted from the others, with noise that they do not share."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["patch2self"]

LEAST_SHARE = 1e-8  # of the variance of a volume: below it, the other volumes determine the volume


def patch2self(data: torch.Tensor, mask: torch.Tensor, is_b0: np.ndarray) -> torch.Tensor:
    """Denoise a series by predicting every volume from all others in the same voxel by least squares.

    b=0 and diffusion-weighted volumes are predicted from their own kind; a kind of one volume is unchanged. With C the
    covariance of volumes over voxels and P its inverse, the residual of volume v is (P x)_v / P_vv, so that all
    regressions take one inverse.

    Parameters
    ----------
    data : Tensor, (n, i, j, k), float32
    mask : Tensor, (i, j, k)
        Voxels from which the regressions are estimated; they are applied everywhere.
    is_b0 : ndarray, (n,) bool

    Returns
    -------
    Tensor, (n, i, j, k), float32

    References
    ----------
    Fadnavis et al. 2020, NeurIPS 33:16293 (Patch2Self).
    """
    denoised = data.float().clone()
    inside = mask.to(data.device) > 0
    for kind in (is_b0, ~is_b0):
        volumes = np.flatnonzero(kind)
        if len(volumes) > 1:
            index = torch.as_tensor(volumes, device=data.device)
            denoised[index] = _predict_from_others(denoised[index], inside)
    return denoised


def _predict_from_others(volumes: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    samples = volumes[:, inside].double()
    mean = samples.mean(1, keepdim=True)
    covariance = torch.cov(samples, correction=0)
    scale = covariance.diagonal().clamp(min=1e-30).sqrt()
    correlation = covariance / (scale[:, None] * scale)
    # fewer voxels than volumes leave directions without variance, which must not be predicted exactly
    correlation += LEAST_SHARE * torch.eye(len(volumes), dtype=torch.float64, device=volumes.device)
    precision = torch.linalg.inv(correlation)
    residual = precision / precision.diagonal()[:, None] / scale * scale[:, None]
    flat = volumes.reshape(len(volumes), -1)
    return (flat - (residual.float() @ (flat - mean.float()))).reshape(volumes.shape)
