"""The diffusion tensor: each sample predicted by the others, the series fitted, and where fibres point."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["main_directions", "tensor_basis", "tensor_prediction", "tensor_projection"]

CHUNK = 20_000  # voxels at a time


def tensor_basis(bvals: np.ndarray, bvecs: np.ndarray) -> np.ndarray:
    """Columns of log S = log S0 - b g' D g, (n, 7): 1, then -b (xx, yy, zz, 2xy, 2xz, 2yz).

    Parameters
    ----------
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors, or zero. b is counted in ms/µm², so the tensor comes out in µm²/ms.
    """
    x, y, z = np.asarray(bvecs, float).T
    b = np.asarray(bvals, float) / 1000
    products = np.stack([x * x, y * y, z * z, 2 * x * y, 2 * x * z, 2 * y * z], axis=1)
    return np.concatenate([np.ones((len(b), 1)), -b[:, None] * products], axis=1)


def tensor_prediction(signals: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    """Each sample predicted by the tensor of the others, by least squares of the logarithms.

    Parameters
    ----------
    signals : Tensor, (n, m)
        n samples of m voxels. Values below a thousandth of the voxel's largest count as that.
    matrix : ndarray, (n, n)
        `shore.leave_one_out` of the `tensor_basis` of the samples.

    Returns
    -------
    Tensor, (n, m)
        Not above 1.5 times the voxel's largest signal, where too few samples leave the fit open.

    References
    ----------
    Basser et al. 1994, doi 10.1006/jmrb.1994.1037.
    """
    top = signals.amax(dim=0).clamp(min=1e-6)
    logs = torch.log(torch.maximum(signals, 1e-3 * top))
    predicted = torch.as_tensor(matrix, dtype=signals.dtype, device=signals.device) @ logs
    return torch.minimum(torch.exp(predicted), 1.5 * top)


def tensor_projection(bvals: np.ndarray, bvecs: np.ndarray) -> tuple[np.ndarray, float]:
    """The matrix that replaces logarithms of signals by their fit, and the degrees of freedom of the residual.

    Parameters
    ----------
    bvals, bvecs : ndarray, (n,), (n, 3)
        s/mm²; unit vectors, or zero.

    Returns
    -------
    matrix : ndarray, (n, n)
    freedom : float
        Expected square of the residual, for noise of variance 1.
    """
    basis = tensor_basis(bvals, bvecs)
    return basis @ np.linalg.pinv(basis), float(len(basis) - 7)


def main_directions(signals: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where tensors point, by least squares of the logarithms with the squared signals as weights.

    Parameters
    ----------
    signals : ndarray, (n, voxels)
        b=0 volumes among them.
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
    """Tensors (voxels, 3, 3) in µm²/ms of (n, voxels) signals."""
    products = (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), 49)
    positive = np.maximum(signals, 1e-3 * np.maximum(signals.max(0), 1e-6)).astype(float)
    weights = (positive / positive.mean(0)) ** 2
    normal = (products.T @ weights).T.reshape(-1, 7, 7) + 1e-9 * len(basis) * np.eye(7)
    right = (basis.T @ (weights * np.log(positive))).T
    d = np.linalg.solve(normal, right[..., None])[..., 0]
    return d[:, [1, 4, 5, 4, 2, 6, 5, 6, 3]].reshape(-1, 3, 3)
