"""Initial field of a blip-up/blip-down pair from the cumulative intensities along each line."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["equal_mass_field"]


def equal_mass_field(first: torch.Tensor, second: torch.Tensor, scales: tuple[float, float]) -> torch.Tensor:
    """Displacement that makes the cumulative intensities of both images agree along every line.

    Distortion moves signal along a line without losing any, so a point of the undistorted line has the same share of
    the line's total signal before it as its image in either blip.

    Parameters
    ----------
    first, second : Tensor, (a, b, y)
        Non-negative intensities.
    scales : (float, float)
        Displacement in each image per unit of field, of opposite signs.

    Returns
    -------
    Tensor, (a, b, y)
        Field, in voxels along the last axis; 0 in empty lines.

    References
    ----------
    Chang and Fitzpatrick 1992, doi 10.1109/42.158935 (line integral method).
    """
    images = [v.clamp(min=0).double().cpu().numpy() for v in (first, second)]
    # a small constant background keeps cumulative sums strictly increasing and gives empty lines no field
    background = 0.02 * max(float(v.mean()) for v in images) + 1e-12
    a, b, size = images[0].shape
    edges = np.arange(size + 1) - 0.5
    field = np.zeros((a, b, size))
    quantiles = (np.arange(4 * size) + 0.5) / (4 * size)
    for i in range(a):
        for j in range(b):
            sums = [np.concatenate([[0.0], np.cumsum(v[i, j] + background)]) for v in images]
            y0, y1 = (np.interp(quantiles, s / s[-1], edges) for s in sums)
            line = (y0 - y1) / (scales[0] - scales[1])
            field[i, j] = np.interp(np.arange(size), y0 - scales[0] * line, line)
    return torch.from_numpy(field).float().to(first.device)
