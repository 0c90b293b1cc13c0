"""What a whole series says of itself: slices out of line, how well a model explains it.

NumPy on the CPU: each of these runs once, and none of them takes more than seconds.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter1d

from dsiprep.ops.qspace.shore import shore_basis, shore_regulariser, shore_size

__all__ = ["contrast_to_noise", "discontinuous_slices", "shore_projection"]


def discontinuous_slices(data: np.ndarray, mask: np.ndarray, axis: int = 2, threshold: float = 2.5) -> np.ndarray:
    """Slices that do not lie between their two neighbours in the same volume.

    After Gaussian smoothing in the plane (2 voxels), the mean distance of a slice from the average of its
    neighbours is divided by half the mean difference of these. cs_dmri's `outlier_slices`, of which it gives
    the same numbers in a tenth of the time.

    Parameters
    ----------
    data : ndarray, (n, i, j, k)
    mask : ndarray, (i, j, k), bool
        Slices with fewer than 100 voxels are not judged.
    axis : int
        Voxel axis across slices.

    Returns
    -------
    ndarray, (n, slices), bool
    """
    stack = np.moveaxis(data, axis + 1, 1)
    inside = np.moveaxis(mask, axis, 0)
    judged = [s for s in range(1, len(inside) - 1) if inside[s].sum() >= 100]
    found = np.zeros(stack.shape[:2], bool)
    for volume, row in zip(stack, found, strict=True):
        smooth = gaussian_filter1d(np.ascontiguousarray(volume, np.float32), 2, axis=1)
        smooth = gaussian_filter1d(smooth, 2, axis=2)
        for s in judged:
            before, here, after = (smooth[s + step][inside[s]] for step in (-1, 0, 1))
            row[s] = np.abs(here - (before + after) / 2).mean() > threshold * np.abs(before - after).mean() / 2
    return found


def shore_projection(q: np.ndarray) -> tuple[np.ndarray, float]:
    """The matrix that replaces signals by their 3dSHORE fit.

    Of radial orders 6, 4 and 2 the highest is taken that leaves at least as many samples as functions over.

    Parameters
    ----------
    q : ndarray, (n, 3)
        Root of the b-value (s/mm²) times the b-vector.

    Returns
    -------
    matrix : ndarray, (n, n)
    freedom : float
        Degrees of freedom of the residual: its expected square, for noise of variance 1.
    """
    order = next((order for order in (6, 4, 2) if 2 * shore_size(order) <= len(q)), 0)
    basis = shore_basis(q, order)
    normal = basis.T @ basis + np.diag(shore_regulariser(order))
    matrix = basis @ np.linalg.solve(normal, basis.T)
    return matrix, float(((np.eye(len(q)) - matrix) ** 2).sum())


def contrast_to_noise(signals: np.ndarray, fitted: np.ndarray, freedom: float) -> np.ndarray:
    """Standard deviation of the fitted signal over volumes, over that of the residual.

    Parameters
    ----------
    signals, fitted : ndarray, (n, voxels)
    freedom : float
        Degrees of freedom of the residual.

    Returns
    -------
    ndarray, (voxels,)
        Zero where there is no residual.

    References
    ----------
    Bastiani et al. 2019, doi 10.1016/j.neuroimage.2018.09.073.
    """
    noise = np.sqrt(((signals - fitted) ** 2).sum(0) / max(freedom, 1.0))
    return np.divide(fitted.std(0), noise, out=np.zeros_like(noise), where=noise > 0)
