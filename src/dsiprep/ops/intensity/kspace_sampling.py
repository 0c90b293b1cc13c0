"""How much of k-space was measured, seen from the images: zero filling, and the edge of partial Fourier sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["HalfSampled", "half_sampled_band", "power_profile", "steepest_fall"]

OTHER_AXIS = (0.15, 0.3)  # cycles per voxel along the other axis of the plane: inside any matrix, away from the centre
LAST = 0.47  # cycles per voxel; beyond, filters and the highest frequency itself
SPAN = 0.1  # cycles per voxel over which a fall is measured
SMOOTH = 3  # lines
FIRST = 0.08  # cycles per voxel; below, the power is that of the shape of the head
TREND = 2  # degree of the polynomial by which the two axes of an evenly sampled plane differ
LEAST_STEP = 3.0  # dB; half the amplitude is 6.02 dB
OFF_CENTRE, WIDEST = 0.06, 0.08  # cycles per voxel; of the edge from where the sidecar puts it, and its half width


@dataclass(frozen=True)
class HalfSampled:
    """The part of k-space of which only one side was measured; the other was left at zero.

    Attributes
    ----------
    edge : float
        Cycles per voxel at which it begins.
    width : float
        Half width of the transition: the edge is not at one frequency, since the phase of the object moves it.
    step : float
        Fall of the power at the edge, dB; 6.02 without noise.
    """

    edge: float
    width: float
    step: float

    def response(self, frequency: np.ndarray) -> np.ndarray:
        """Amplitude that real images keep at frequencies (cycles per voxel): 1, and 1/2 beyond the edge."""
        return 1 - 0.5 * _ramp(np.abs(frequency), self.edge, self.width)


def power_profile(volumes: torch.Tensor, slice_axis: int, axis: int) -> np.ndarray:
    """Mean power of in-plane spatial frequencies along one axis of the slice plane.

    Parameters
    ----------
    volumes : Tensor, (m, i, j, k)
    slice_axis, axis : int
        Voxel axes 0 to 2.

    Returns
    -------
    ndarray, (n // 2 + 1,)
        dB, from the centre of k-space to its edge.
    """
    other = next(a for a in range(3) if a not in (slice_axis, axis))
    spectrum = torch.fft.rfft(volumes.float(), dim=1 + axis)
    power = torch.fft.fft(spectrum, dim=1 + other).abs().square()
    power = power.movedim((1 + axis, 1 + other), (0, 1)).flatten(2).mean(2)
    frequency = np.abs(np.fft.fftfreq(volumes.shape[1 + other]))
    chosen = (frequency >= OTHER_AXIS[0]) & (frequency <= OTHER_AXIS[1])
    mean = power[:, torch.as_tensor(chosen, device=power.device)].double().mean(1).cpu().numpy()
    return 10 * np.log10(np.maximum(mean, 1e-12 * max(float(mean.max()), 1e-30)))


def steepest_fall(profile: np.ndarray, size: int) -> float:
    """Largest fall of a `power_profile` of an axis of `size` voxels within a tenth of a cycle per voxel, dB.

    Measured k-space falls by 2 to 8 dB; where an image was interpolated by zero filling, by 10 to 100.
    """
    smooth = np.convolve(profile, np.full(SMOOTH, 1 / SMOOTH), "valid")
    lines = max(1, round(SPAN * size))
    first = max(0, round(FIRST * size) - SMOOTH // 2)
    falls = smooth[first:-lines] - smooth[first + lines :]
    return float(falls.max()) if falls.size else 0.0


def half_sampled_band(profile: np.ndarray, readout: np.ndarray, fraction: float) -> HalfSampled | None:
    """The band that partial Fourier sampling left half measured, fitted to the power along the phase-encoding axis.

    Parameters
    ----------
    profile, readout : ndarray
        From `power_profile`, along the phase-encoding axis and along the other axis of the plane.
    fraction : float
        Partial Fourier fraction, 0.5 to 1.

    Returns
    -------
    HalfSampled or None
        None if the power does not fall at the edge: the missing half was not left at zero but reconstructed.
    """
    frequency = np.linspace(0, 0.5, len(profile))
    used = (frequency >= FIRST) & (frequency <= LAST)
    x = frequency[used]
    y = profile[used] - np.interp(x, np.linspace(0, 0.5, len(readout)), readout)
    trend = np.polynomial.polynomial.polyvander(4 * x - 1, TREND)
    best: tuple[float, HalfSampled] | None = None
    for edge in fraction - 0.5 + np.linspace(-OFF_CENTRE, OFF_CENTRE, 25):
        for width in np.linspace(0, WIDEST, 9):
            fall = -20 * np.log10(1 - 0.5 * _ramp(x, edge, width))
            columns = np.column_stack([trend, -fall / 6.0206])
            found, *_ = np.linalg.lstsq(columns, y, rcond=None)
            misfit = float(((columns @ found - y) ** 2).sum())
            if best is None or misfit < best[0]:
                best = misfit, HalfSampled(float(edge), float(width), float(found[-1]))
    return best[1] if best and best[1].step >= LEAST_STEP and best[1].width < WIDEST else None


def _ramp(frequency: np.ndarray, edge: float, width: float) -> np.ndarray:
    """0 below the edge, 1 above, linear in between."""
    if width == 0:
        return (frequency > edge).astype(float)
    return np.clip((frequency - edge + width) / (2 * width), 0, 1)
