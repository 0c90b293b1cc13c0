"""The diffusion tensor: leave-one-out prediction, projection onto the model, and principal directions."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["main_directions", "tensor_basis", "tensor_prediction", "tensor_projection"]

CHUNK = 20_000  # voxels fitted at a time


def tensor_basis(bvals: np.ndarray, bvecs: np.ndarray) -> np.ndarray:
    """Design matrix (n, 7) of log S = log S0 - b g' D g: 1, then -b (xx, yy, zz, 2xy, 2xz, 2yz).

    Parameters
    ----------
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors, or zero.

    Returns
    -------
    ndarray, (n, 7)
        With b in ms/µm², so that tensors are in µm²/ms.
    """
    x, y, z = np.asarray(bvecs, float).T
    b = np.asarray(bvals, float) / 1000
    products = np.stack([x * x, y * y, z * z, 2 * x * y, 2 * x * z, 2 * y * z], axis=1)
    return np.concatenate([np.ones((len(b), 1)), -b[:, None] * products], axis=1)


def tensor_prediction(signals: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    """Predict each sample by a tensor fitted to the others, log-linear least squares.

    Parameters
    ----------
    signals : Tensor, (n, m)
        n samples of m voxels, clipped below at a thousandth of the largest value of the voxel.
    matrix : ndarray, (n, n)
        `shore.leave_one_out` of the `tensor_basis` of the samples.

    Returns
    -------
    Tensor, (n, m)
        At most 1.5 times the largest signal of the voxel, for fits underdetermined by too few samples.

    References
    ----------
    Basser et al. 1994, doi 10.1006/jmrb.1994.1037.
    """
    top = signals.amax(dim=0).clamp(min=1e-6)
    logs = torch.log(torch.maximum(signals, 1e-3 * top))
    predicted = torch.as_tensor(matrix, dtype=signals.dtype, device=signals.device) @ logs
    return torch.minimum(torch.exp(predicted), 1.5 * top)


def tensor_projection(bvals: np.ndarray, bvecs: np.ndarray) -> tuple[np.ndarray, float]:
    """Matrix that projects log signals onto the tensor model, and the residual degrees of freedom.

    Parameters
    ----------
    bvals, bvecs : ndarray, (n,), (n, 3)
        s/mm²; unit vectors, or zero.

    Returns
    -------
    matrix : ndarray, (n, n)
    freedom : float
        Expected sum of squared residuals for noise of variance 1.
    """
    basis = tensor_basis(bvals, bvecs)
    return basis @ np.linalg.pinv(basis), float(len(basis) - 7)


def main_directions(signals: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal directions of tensors, by log-linear least squares weighted with the squared signals.

    Parameters
    ----------
    signals : ndarray, (n, voxels)
        Including b=0 volumes.
    bvals, bvecs : ndarray, (n,), (n, 3)
        s/mm²; unit vectors, or zero.

    Returns
    -------
    fa : ndarray, (voxels,)
        Fractional anisotropy, 0 to 1; eigenvalues below zero count as zero.
    direction : ndarray, (voxels, 3)
        Unit eigenvectors of the largest eigenvalue, in the frame of `bvecs`.

    References
    ----------
    Salvador et al. 2005, doi 10.1002/hbm.20076.
    """
    basis = tensor_basis(bvals, bvecs)
    tensors = np.empty((signals.shape[1], 3, 3))
    for start in range(0, signals.shape[1], CHUNK):
        tensors[start : start + CHUNK] = _tensors(signals[:, start : start + CHUNK], basis)
    values, vectors = np.linalg.eigh(tensors)
    values = np.maximum(values, 0)
    spread = ((values - values.mean(1, keepdims=True)) ** 2).sum(1)
    size = (values**2).sum(1)
    fa = np.sqrt(1.5 * np.divide(spread, size, out=np.zeros_like(size), where=size > 0))
    return np.minimum(fa, 1.0), vectors[:, :, 2]


def _tensors(signals: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Fit tensors (voxels, 3, 3), µm²/ms, to signals (n, voxels)."""
    products = (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), 49)
    positive = np.maximum(signals, 1e-3 * np.maximum(signals.max(0), 1e-6)).astype(float)
    weights = (positive / positive.mean(0)) ** 2
    normal = (products.T @ weights).T.reshape(-1, 7, 7) + 1e-9 * len(basis) * np.eye(7)
    right = (basis.T @ (weights * np.log(positive))).T
    d = np.linalg.solve(normal, right[..., None])[..., 0]
    return d[:, [1, 4, 5, 4, 2, 6, 5, 6, 3]].reshape(-1, 3, 3)
