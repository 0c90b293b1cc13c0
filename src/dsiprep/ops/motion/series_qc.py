"""Quality metrics of a whole series: discontinuous slices and contrast-to-noise ratio of a signal model.

NumPy on the CPU: each function runs once per series and takes seconds at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsiprep.ops.image.filters import gaussian
from dsiprep.ops.qspace.shore import ZETA, choose_zeta, shore_basis, shore_regulariser, shore_size

__all__ = ["contrast_to_noise", "discontinuous_slices", "shore_projection", "values_inside"]

MIN_VOXELS = 100  # of the mask; slices with fewer are not judged


def discontinuous_slices(data: np.ndarray, mask: np.ndarray, axis: int = 2, threshold: float = 2.5) -> np.ndarray:
    """Slices that deviate from the average of their two neighbours in the same volume.

    After in-plane Gaussian smoothing (2 voxels), the mean absolute difference of a slice from the average of its
    neighbours is divided by half the mean absolute difference between these, and compared with `threshold`. Gives the
    same numbers as `outlier_slices` of cs_dmri in a tenth of the time.

    Parameters
    ----------
    data : ndarray, (n, i, j, k)
    mask : ndarray, (i, j, k), bool
        Slices with fewer than 100 voxels are not judged.
    axis : int
        Voxel axis across slices.
    threshold : float

    Returns
    -------
    ndarray, (n, slices), bool
    """
    stack = np.moveaxis(data, axis + 1, 1)
    inside = np.moveaxis(mask, axis, 0)
    judged = [s for s in range(1, len(inside) - 1) if inside[s].sum() >= MIN_VOXELS]
    discontinuous = np.zeros(stack.shape[:2], bool)
    for volume, row in zip(stack, discontinuous, strict=True):
        smooth = gaussian(torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None], (0, 2, 2))[0].numpy()
        for s in judged:
            before, current, after = (smooth[s + step][inside[s]] for step in (-1, 0, 1))
            row[s] = np.abs(current - (before + after) / 2).mean() > threshold * np.abs(before - after).mean() / 2
    return discontinuous


def shore_projection(q: np.ndarray, signals: np.ndarray) -> tuple[np.ndarray, float]:
    """Matrix that replaces signals by their 3dSHORE fit.

    Uses the highest radial order of 6, 4 and 2 with at least twice as many samples as basis functions, or 0.

    Parameters
    ----------
    q : ndarray, (n, 3)
        Square root of the b-value (s/mm²) times the b-vector.
    signals : ndarray, (n, voxels)
        Of the brain, from which the scale of the basis is chosen above b 7000.

    Returns
    -------
    matrix : ndarray, (n, n)
    freedom : float
        Degrees of freedom of the residual: its expected sum of squares for noise of variance 1.
    """
    order = next((order for order in (6, 4, 2) if 2 * shore_size(order) <= len(q)), 0)
    zeta = choose_zeta(signals @ signals.T / max(signals.shape[1], 1), q, order, np.ones(len(q)))
    basis = shore_basis(q, order, zeta)
    # functions of a wider basis are lower by (ZETA / zeta)^0.75, so the same penalty would weigh more
    normal = basis.T @ basis + np.diag(shore_regulariser(order)) * (ZETA / zeta) ** 1.5
    matrix = basis @ np.linalg.solve(normal, basis.T)
    return matrix, float(((np.eye(len(q)) - matrix) ** 2).sum())


def contrast_to_noise(signals: np.ndarray, fitted: np.ndarray, freedom: float) -> np.ndarray:
    """Standard deviation of the fitted signal over volumes, divided by that of the residual.

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


def values_inside(volumes: Sequence[np.ndarray] | np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Values of n volumes (i, j, k) in a bool mask (i, j, k), without a copy of the volumes: (n, m), float32."""
    inside = np.flatnonzero(mask)
    values = np.empty((len(volumes), len(inside)), np.float32)
    for row, volume in zip(values, volumes, strict=True):
        row[:] = volume.ravel()[inside]
    return values
