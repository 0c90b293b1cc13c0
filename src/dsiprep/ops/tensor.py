"""The diffusion tensor as a predictor: each sample from the tensor of the others."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["tensor_basis", "tensor_prediction"]


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
