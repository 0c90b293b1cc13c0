"""Partial Fourier images with k-space left at zero where it was not measured: the image that full k-space would give.

With the fraction f measured along the phase-encoding axis, an object whose phase is removed loses the half of its
amplitude beyond f - 1/2 cycles per voxel, in the real part; the imaginary part holds what is antisymmetric. Ringing
then has two periods, of which local subvoxel shifts find one (Lee 2021). Here the lost half is given back instead, so
that one period is left: a homodyne reconstruction, whose phase follows from the magnitudes. The blur that then returns
the noise to its level falls smoothly to 1/2 at the edge of k-space, and so does not ring.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.ops.intensity.kspace_sampling import HalfSampled

__all__ = ["apodised", "full_kspace"]

ROUNDS = 2  # of phase and magnitude


def full_kspace(planes: torch.Tensor, axis: int, band: HalfSampled, signed: bool = False) -> torch.Tensor:
    """Images as from full k-space.

    Parameters
    ----------
    planes : Tensor, (m, i, j)
        Magnitudes, or the real part after removal of the phase.
    axis : int
        Of phase encoding, 0 or 1 in the plane.
    band : HalfSampled
    signed : bool
        Whether `planes` is a real part, so that no phase needs to be found.

    Returns
    -------
    Tensor, (m, i, j)
        Noise within the band is twice as high.

    References
    ----------
    Noll et al. 1991, IEEE Trans Med Imaging 10:154, doi 10.1109/42.79473 (homodyne reconstruction).
    Lee et al. 2021, Magn Reson Med 86:2733, doi 10.1002/mrm.28830 (ringing of partial Fourier images).
    """
    frequency = np.fft.fftfreq(planes.shape[1 + axis])
    kept = band.response(frequency)
    real = planes
    if not signed:
        # the unmeasured side of the band: an object of real part `real` has this imaginary part
        imaginary = np.where(np.abs(frequency) < 0.5, -1j * np.sign(frequency) * (1 - kept) / kept, 0)
        for _ in range(ROUNDS):
            other = _filtered(real, imaginary, axis)
            length = torch.sqrt(real * real + other * other)
            real = planes * torch.where(length > 0, real / length, 1.0)
    return _filtered(real, 1 / kept, axis)


def apodised(planes: torch.Tensor, axis: int, band: HalfSampled) -> torch.Tensor:
    """Images (m, i, j) from `full_kspace`, blurred smoothly so that noise is about as before."""
    frequency = np.abs(np.fft.fftfreq(planes.shape[1 + axis])) / 0.5
    return _filtered(planes, 1 - 0.5 * frequency ** (1 / (1 - band.edge / 0.5)), axis)


def _filtered(planes: torch.Tensor, response: np.ndarray, axis: int) -> torch.Tensor:
    """Planes filtered along an axis by a response to `fftfreq` whose impulse response is real."""
    kernel = np.fft.ifft(response).real
    size = len(kernel)
    matrix = kernel[(np.arange(size)[:, None] - np.arange(size)[None]) % size]
    weights = torch.as_tensor(matrix, dtype=planes.dtype, device=planes.device)
    return torch.matmul(weights, planes) if axis == 0 else torch.matmul(planes, weights.T)
