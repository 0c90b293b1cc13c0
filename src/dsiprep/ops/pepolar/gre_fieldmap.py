"""Off-resonance field from a gradient-echo scan: phase unwrapping, smoothing, and extrapolation beyond the brain."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Volume

__all__ = ["smooth_field", "unwrapped_hz", "without_folds"]

SMOOTH_MM = 2.0
EXTRAPOLATION_MM = (4.0, 8.0, 16.0, 40.0)  # standard deviations of ever wider windows
SPIKE_HZ = 60.0  # a voxel that differs by more from the median of its neighbours is an unwrapping error
MIN_JACOBIAN = 0.15


def unwrapped_hz(phase: Volume, mask: Volume, echo_difference: float) -> Volume:
    """Off-resonance in Hz from the phase difference of two echoes.

    Parameters
    ----------
    phase : Volume
        Radians, wrapped to the range from -pi to pi.
    mask : Volume
        Where there is signal (above 0.5).
    echo_difference : float
        s.

    Returns
    -------
    Volume
        Zero outside the mask. Whole turns are subtracted so that the median in the mask is within half a turn of 0.

    References
    ----------
    Herráez et al. 2002, doi 10.1364/AO.41.007437 (unwrapping along the most reliable path, as in scikit-image).
    """
    from skimage.restoration import unwrap_phase

    inside = mask.numpy() > 0.5
    wrapped = phase.numpy().astype(np.float64)
    flat_axes = [axis for axis, n in enumerate(inside.shape) if n == 1]
    unwrapped = unwrap_phase(np.ma.array(wrapped.squeeze(), mask=~inside.squeeze()), rng=0)
    radians = np.expand_dims(np.ma.filled(unwrapped, 0.0), flat_axes)
    radians -= 2 * np.pi * np.round(np.median(radians[inside]) / (2 * np.pi))
    hertz = np.where(inside, radians / (2 * np.pi * echo_difference), 0)
    return Volume(torch.from_numpy(hertz.astype(np.float32)), phase.grid)


def smooth_field(hertz: Volume, magnitude: Volume, mask: Volume) -> Volume:
    """Remove spikes and noise from a field, and extrapolate it beyond the mask.

    Inside the mask voxels are weighted by their squared magnitude, which is proportional to the precision of their
    phase. Outside, the field of the nearest tissue is continued, with smoothing that increases with distance.

    Parameters
    ----------
    hertz, magnitude, mask : Volume
        On the same grid.
    """
    sizes, inside = hertz.grid.voxel_sizes, mask.numpy() > 0.5
    data = hertz.numpy().astype(np.float32)
    brightness = magnitude.numpy() / max(float(np.median(magnitude.numpy()[inside])), 1e-12)
    weight = np.where(inside, np.clip(brightness, 0, 2) ** 2, 0).astype(np.float32)
    local_median = ndimage.median_filter(np.where(inside, data, _weighted_gaussian(data, weight, 8.0 / sizes)[0]), 3)
    weight[np.abs(data - local_median) > SPIKE_HZ] = 0
    smooth, support = _weighted_gaussian(data, weight, SMOOTH_MM / sizes)
    for width in EXTRAPOLATION_MM:
        wider, wider_support = _weighted_gaussian(data, weight, width / sizes)
        share = np.clip(support / 0.1, 0, 1)
        smooth, support = share * smooth + (1 - share) * wider, np.maximum(support, wider_support)
    return Volume(torch.from_numpy(smooth), hertz.grid)


def without_folds(shift: np.ndarray, axis: int) -> np.ndarray:
    """Smooth a shift, in voxels along `axis`, where lines would fold and only as much as needed.

    Tissue at x is found at x + shift(x), so a line folds where the shift falls by a voxel or more from one voxel to the
    next: 1 + d shift / dx stays above `MIN_JACOBIAN`. Where the shift rises, the image is stretched and never folds,
    however steep. If smoothing does not suffice, the whole shift is scaled down.
    """
    bound = 1 - MIN_JACOBIAN
    out, smooth = shift, shift
    for _ in range(50):
        steep = -np.diff(out, axis=axis, append=np.take(out, [-1], axis)) >= bound
        if not steep.any():
            return out
        smooth = ndimage.gaussian_filter(smooth, 1.5)
        share = ndimage.gaussian_filter(ndimage.binary_dilation(steep, iterations=4).astype(np.float32), 2.0)
        share = np.clip(3 * share, 0, 1)
        out = share * smooth + (1 - share) * out
    return out * (0.99 * bound / max(float(-np.diff(out, axis=axis).min()), bound))


def _weighted_gaussian(data: np.ndarray, weight: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean in a Gaussian window, and the total weight there; the overall mean where that is 0."""
    total = ndimage.gaussian_filter(weight, sigma, mode="constant")
    mean = float((data * weight).sum() / max(float(weight.sum()), 1e-12))
    deviation = ndimage.gaussian_filter((data - mean) * weight, sigma, mode="constant")
    return mean + deviation / (total + 1e-6), total
