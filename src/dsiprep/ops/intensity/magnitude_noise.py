"""Noise of magnitude images: its expectation, the inverse of that, stabilisation of its variance, and coils.

The sum of squares over L coils follows a non-central chi distribution of 2L degrees of freedom; with L = 1 it is the
Rician distribution. Adaptively combined coils are described by an effective L, which need not be an integer.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from scipy.special import gammaln, hyp1f1

__all__ = ["MOST_COILS", "MagnitudeNoise", "effective_coils", "expected_magnitude", "magnitude_noise"]

MOST_COILS = 64.0
FAR = 25.0  # amplitude in units of sigma from which on the noise is Gaussian
STEP = 1 / 64  # of the tables, in units of sigma
ROUNDS = 5  # of refinement of the stabilising transform; its standard deviation is then within 4 % of 1


def expected_magnitude(amplitude: np.ndarray | float, coils: float = 1.0) -> np.ndarray:
    """Expectation of the magnitude of an amplitude, both in units of the noise standard deviation of one channel.

    References
    ----------
    Koay & Basser 2006, J Magn Reson 179:317, doi 10.1016/j.jmr.2006.01.016.
    """
    amplitude = np.asarray(amplitude, float)
    near = np.minimum(amplitude, FAR)
    floor = np.sqrt(np.pi / 2) * np.exp(gammaln(coils + 0.5) - gammaln(1.5) - gammaln(coils))
    exact = floor * hyp1f1(-0.5, coils, -near * near / 2)
    return np.where(amplitude <= FAR, exact, np.sqrt(amplitude**2 + 2 * coils - 1))


class MagnitudeNoise:
    """Tables of the noise of magnitude images with an effective number of coils; intensities in units of sigma.

    Both inverses are tables of a ratio that stays smooth at the noise floor f, where the amplitude itself rises like a
    square root: with u² = m² - f², the amplitude over u.

    Attributes
    ----------
    coils : float
    floor : float
        Expected magnitude where there is no signal.

    References
    ----------
    Koay & Basser 2006, J Magn Reson 179:317, doi 10.1016/j.jmr.2006.01.016 (inversion).
    Foi 2011, ISBI, 1809, doi 10.1109/ISBI.2011.5872758 (stabilised variance and its unbiased inverse).
    """

    def __init__(self, coils: float = 1.0) -> None:
        self.coils = coils
        amplitude = np.arange(0, 2 * FAR, STEP)
        expected = expected_magnitude(amplitude, coils)
        self.floor = float(expected[0])
        self._ratio = _ratio_table(amplitude, expected)
        magnitude, stabilised, expected = _stabilising_transform(coils)
        self._stabilised = torch.from_numpy(stabilised.astype(np.float32))
        self._end = float(magnitude[-1])
        self._stabilised_floor = float(expected[0])
        self._stabilised_ratio = _ratio_table(np.arange(len(expected)) * STEP, expected)

    def amplitude(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Amplitude whose expected magnitude this is; zero where it lies below the noise floor."""
        return _amplitude(magnitude, self.floor, self._ratio)

    def variance(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Variance of magnitudes with this expectation."""
        expected = magnitude.clamp(min=self.floor)
        amplitude = self.amplitude(expected)
        return (2 * self.coils + (amplitude - expected) * (amplitude + expected)).clamp_(max=1)

    def stabilise(self, magnitude: torch.Tensor) -> torch.Tensor:
        """Transform magnitudes so that their noise has standard deviation 1 whatever their amplitude."""
        beyond = (magnitude - self._end).clamp(min=0)  # the slope is 1 there
        return _look_up(self._stabilised, magnitude.clamp(max=self._end)).add_(beyond)

    def destabilise(self, expected: torch.Tensor) -> torch.Tensor:
        """Amplitude from the expectation of the stabilised magnitude; zero where it lies below the noise floor."""
        return _amplitude(expected, self._stabilised_floor, self._stabilised_ratio)


@lru_cache(4)
def magnitude_noise(coils: float = 1.0) -> MagnitudeNoise:
    """The tables for a number of coils, made once."""
    return MagnitudeNoise(coils)


def effective_coils(background: torch.Tensor) -> float | None:
    """Effective number of coils from magnitudes without signal.

    The ratio of the squared mean to the mean square depends on the number of coils alone. It is taken over volumes in
    each voxel, so that the noise may vary in space.

    Parameters
    ----------
    background : Tensor, (n, m)
        At least two volumes of m voxels without signal.

    Returns
    -------
    float or None
        Between 1 and MOST_COILS; None if noise of this kind cannot have such a ratio, as where an image was filtered
        or clipped.
    """
    count, values = len(background), background.double()
    square = (values * values).mean(0)
    squared_mean = (count * values.mean(0) ** 2 - square) / (count - 1)  # without the variance of the mean
    ratio = float(squared_mean.sum() / square.sum().clamp(min=1e-30))
    coils = np.geomspace(0.8, MOST_COILS, 400)
    ratios = np.array([float(expected_magnitude(0.0, c)) ** 2 / (2 * c) for c in coils])
    if not ratios[0] <= ratio <= ratios[-1]:
        return None
    return max(1.0, float(np.interp(ratio, ratios, coils)))


def _stabilising_transform(coils: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Magnitudes and the transform at them, and its expectation at amplitudes in steps of STEP.

    The slope starts as the reciprocal of the standard deviation of magnitudes with that expectation, and is divided by
    the standard deviation of the transformed magnitudes until that is 1.
    """
    reach = 8 + 2 * np.sqrt(2 * coils)
    magnitude = np.arange(0, reach + 8, STEP)
    amplitude = np.arange(0, reach, 8 * STEP)
    density = np.array([_density(magnitude, a, coils) for a in amplitude])
    expected = expected_magnitude(amplitude, coils)
    deviation = np.sqrt(2 * coils + amplitude**2 - expected**2)
    slope = 1 / np.interp(magnitude, expected, deviation)
    transform = _integral(slope)
    for _ in range(ROUNDS):
        mean = density @ transform
        slope /= np.interp(transform, mean, np.sqrt(density @ transform**2 - mean**2))
        transform = _integral(slope)
    mean = density @ transform
    fine = np.arange(0, 2 * FAR, STEP)
    far = expected_magnitude(fine, coils) + (mean[-1] - expected[-1])  # where the slope of the transform is 1
    return magnitude, transform, np.where(fine < amplitude[-1], np.interp(fine**2, amplitude**2, mean), far)


def _integral(slope: np.ndarray) -> np.ndarray:
    return np.append(0.0, np.cumsum((slope[1:] + slope[:-1]) * (STEP / 2)))


def _density(magnitude: np.ndarray, amplitude: float, coils: float) -> np.ndarray:
    """Probability of each of the magnitudes, which are spaced evenly."""
    inner = magnitude[1:]
    density = stats.ncx2.pdf(inner**2, 2 * coils, max(amplitude**2, 1e-9)) * inner
    return np.append(0.0, density) / density.sum()


def _ratio_table(amplitude: np.ndarray, expected: np.ndarray) -> torch.Tensor:
    """Amplitude over u at u in steps of STEP, with u² the square of the expectation less that at amplitude zero."""
    u = np.sqrt(np.maximum(expected**2 - expected[0] ** 2, 0))
    ratio = amplitude[1:] / u[1:]
    return torch.from_numpy(np.interp(np.arange(0, u[-1], STEP), u[1:], ratio).astype(np.float32))


def _amplitude(values: torch.Tensor, floor: float, ratio: torch.Tensor) -> torch.Tensor:
    end = float(np.hypot((len(ratio) - 2) * STEP, floor))
    beyond = (values - end).clamp_(min=0)  # the slope is 1 there
    near = values.clamp(0, end)
    u = near.mul_(near).sub_(floor * floor).clamp_(min=0).sqrt_()
    return _look_up(ratio, u).mul_(u).add_(beyond)


def _look_up(table: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Linear interpolation in a table of steps of STEP; constant beyond its ends."""
    table = table.to(position.device)
    scaled = (position * (1 / STEP)).clamp_(0, len(table) - 1.001)
    index = scaled.int()
    low = table[index]
    return low.add_((table[index + 1] - low).mul_(scaled.sub_(index)))
