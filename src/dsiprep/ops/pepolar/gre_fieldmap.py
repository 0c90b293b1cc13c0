"""Off-resonance from a gradient-echo scan: unwrapped, freed of noise, and carried on beyond the brain."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Volume

__all__ = ["smooth_field", "unwrapped_hz", "without_folds"]

SMOOTH_MM = 2.0
BEYOND_MM = (4.0, 8.0, 16.0, 40.0)
SPIKE_HZ = 60.0  # further than this from the median of its neighbours a voxel is an error of the unwrapping
LEAST_JACOBIAN = 0.15


def unwrapped_hz(phase: Volume, mask: Volume, echo_difference: float) -> Volume:
    """Off-resonance in Hz from the phase that built up between two echoes.

    Parameters
    ----------
    phase : Volume
        Radians, wrapped into -pi to pi.
    mask : Volume
        Where there is signal (above 0.5).
    echo_difference : float
        s.

    Returns
    -------
    Volume
        Zero outside the mask. Whole turns are taken off so that the median in the mask is within half a turn of 0.

    References
    ----------
    Herráez et al. 2002, doi 10.1364/AO.41.007437 (unwrapping along the most reliable path; scikit-image's).
    """
    from skimage.restoration import unwrap_phase

    inside = mask.numpy() > 0.5
    wrapped = phase.numpy().astype(np.float64)
    flat = [axis for axis, n in enumerate(inside.shape) if n == 1]
    turned = unwrap_phase(np.ma.array(wrapped.squeeze(), mask=~inside.squeeze()), rng=0)
    radians = np.expand_dims(np.ma.filled(turned, 0.0), flat)
    radians -= 2 * np.pi * np.round(np.median(radians[inside]) / (2 * np.pi))
    hertz = np.where(inside, radians / (2 * np.pi * echo_difference), 0)
    return Volume(torch.from_numpy(hertz.astype(np.float32)), phase.grid)


def smooth_field(hertz: Volume, magnitude: Volume, mask: Volume) -> Volume:
    """A field without spikes and noise, everywhere.

    Inside the mask voxels weigh as their magnitude, which is as their phase is worth; outside, the field of the
    nearest tissue goes on, ever smoother.

    Parameters
    ----------
    hertz, magnitude, mask : Volume
        On one grid.
    """
    sizes, inside = hertz.grid.voxel_sizes, mask.numpy() > 0.5
    data = hertz.numpy().astype(np.float32)
    level = magnitude.numpy() / max(float(np.median(magnitude.numpy()[inside])), 1e-12)
    weight = np.where(inside, np.clip(level, 0, 2) ** 2, 0).astype(np.float32)
    centre = ndimage.median_filter(np.where(inside, data, _blurred(data, weight, 8.0 / sizes)[0]), 3)
    weight[np.abs(data - centre) > SPIKE_HZ] = 0
    found, certain = _blurred(data, weight, SMOOTH_MM / sizes)
    for width in BEYOND_MM:
        wider, more = _blurred(data, weight, width / sizes)
        share = np.clip(certain / 0.1, 0, 1)
        found, certain = share * found + (1 - share) * wider, np.maximum(certain, more)
    return Volume(torch.from_numpy(found), hertz.grid)


def _blurred(data: np.ndarray, weight: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean of the neighbourhood, and how much weight there was; the mean of all where there was none."""
    total = ndimage.gaussian_filter(weight, sigma, mode="constant")
    mean = float((data * weight).sum() / max(float(weight.sum()), 1e-12))
    spread = ndimage.gaussian_filter((data - mean) * weight, sigma, mode="constant")
    return mean + spread / (total + 1e-6), total


def without_folds(shift: np.ndarray, axis: int) -> np.ndarray:
    """A shift in voxels along `axis`, smoothed where, and no more than, it takes for no line to fold.

    Steps between neighbours stay below 1 - `LEAST_JACOBIAN`, whichever the sign.
    """
    bound = 1 - LEAST_JACOBIAN
    out, smooth = shift, shift
    for _ in range(50):
        steep = np.abs(np.diff(out, axis=axis, append=np.take(out, [-1], axis))) >= bound
        if not steep.any():
            return out
        smooth = ndimage.gaussian_filter(smooth, 1.5)
        share = ndimage.gaussian_filter(ndimage.binary_dilation(steep, iterations=4).astype(np.float32), 2.0)
        share = np.clip(3 * share, 0, 1)
        out = share * smooth + (1 - share) * out
    return out * (0.99 * bound / max(float(np.abs(np.diff(out, axis=axis)).max()), bound))
