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
    smooth = _blurred(_blurred(flat, 1), 2) - flat
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


def _blurred(planes: torch.Tensor, axis: int) -> torch.Tensor:
    """Planes (m, i, j) under a Gaussian along an axis that gives a voxel's own value a weight of 1."""
    place = np.arange(planes.shape[axis])
    matrix = np.exp(-0.5 * ((place[:, None] - place[None]) / BLUR) ** 2)
    weights = torch.as_tensor(matrix, device=planes.device).to(planes.dtype)
    return torch.matmul(weights, planes) if axis == 1 else torch.matmul(planes, weights)
