"""Removal of the smooth phase of complex images, so that their real part holds the signal and noise of zero mean.

The phase of a slice comes from motion during the diffusion gradients, eddy currents, the field and the coils. Its mean
slope is found from neighbouring voxels and removed; what is left follows from the image blurred in the plane. A
voxel's own value is left out of that blur: its noise would turn the phase towards itself, and the real part would keep
a part of the noise floor that it is meant to be free of.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["without_background_phase"]

BLUR = 2.0  # voxels, standard deviation in the plane


def without_background_phase(magnitude: torch.Tensor, phase: torch.Tensor, slice_axis: int) -> torch.Tensor:
    """A complex volume with its background phase removed.

    Parameters
    ----------
    magnitude, phase : Tensor, (i, j, k), float32
        Phase in radians.
    slice_axis : int
        Each slice across it has a phase of its own.

    Returns
    -------
    Tensor, (i, j, k), complex64
        Signal in the real part, and noise of zero mean in both.
    """
    planes = torch.polar(magnitude.float(), phase.float()).movedim(slice_axis, 0)
    flat = planes * _ramp(planes).conj()
    smooth, own = _blurred(flat, 1)
    smooth, centre = _blurred(smooth, 2)
    smooth = smooth - own * centre * flat
    length = smooth.abs()
    turned = torch.where(length > 0, smooth.conj() / length.clamp(min=torch.finfo(torch.float32).tiny), 1)
    return (flat * turned).movedim(0, slice_axis)


def _ramp(planes: torch.Tensor) -> torch.Tensor:
    """Unit phasors (m, i, j) of the mean slope of the phase of each plane."""
    total = torch.zeros(planes.shape, device=planes.device)
    for axis in (1, 2):
        size = planes.shape[axis]
        product = planes.narrow(axis, 1, size - 1) * planes.narrow(axis, 0, size - 1).conj()
        angle = product.sum((1, 2), keepdim=True).angle()
        place = torch.arange(size, device=planes.device, dtype=torch.float32)
        total = total + angle * (place[:, None] if axis == 1 else place[None])
    return torch.polar(torch.ones_like(total), total)


def _blurred(planes: torch.Tensor, axis: int) -> tuple[torch.Tensor, float]:
    """Planes (m, i, j) under a periodic Gaussian along an axis, and the weight of a voxel's own value."""
    size = planes.shape[axis]
    distance = np.minimum(np.arange(size), size - np.arange(size))
    kernel = np.exp(-0.5 * (distance / BLUR) ** 2)
    kernel /= kernel.sum()
    matrix = kernel[(np.arange(size)[:, None] - np.arange(size)[None]) % size]
    weights = torch.as_tensor(matrix, device=planes.device).to(planes.dtype)
    blurred = torch.matmul(weights, planes) if axis == 1 else torch.matmul(planes, weights.T)
    return blurred, float(kernel[0])
