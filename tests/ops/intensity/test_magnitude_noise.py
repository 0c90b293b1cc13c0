"""Noise of magnitudes compared with SciPy's distributions and with samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dsiprep.ops.intensity.magnitude_noise import effective_coils, expected_magnitude, magnitude_noise
from dsiprep.ops.intensity.mppca import mppca
from dsiprep.ops.intensity.noise_level import noise_level

AMPLITUDES = np.array([0.0, 0.3, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0])


def magnitudes(amplitude: np.ndarray, coils: int, count: int, seed: int = 0) -> torch.Tensor:
    """Root of the sum of squares over coils, with noise of standard deviation 1 in each channel."""
    rng = np.random.default_rng(seed)
    channels = rng.standard_normal((2 * coils, count, *amplitude.shape))
    channels[0] += amplitude
    return torch.from_numpy(np.sqrt((channels**2).sum(0)).astype(np.float32))


def test_expectation_is_that_of_the_rice_distribution() -> None:
    for amplitude in AMPLITUDES[:-2]:
        assert float(expected_magnitude(amplitude)) == pytest.approx(stats.rice.mean(amplitude), rel=1e-6)


@pytest.mark.parametrize("coils", [1, 2, 8])
def test_inverse_of_the_expectation(coils: int) -> None:
    noise = magnitude_noise(float(coils))
    expected = expected_magnitude(AMPLITUDES, coils)
    sampled = magnitudes(AMPLITUDES, coils, 100_000).double().mean(0).numpy()
    assert np.abs(expected - sampled).max() < 0.015
    found = noise.amplitude(torch.from_numpy(expected.astype(np.float32)))
    assert (np.abs(found.numpy() - AMPLITUDES) / (1 + AMPLITUDES)).max() < 5e-4
    assert float(noise.amplitude(torch.tensor([0.0, 0.9 * noise.floor, -3.0])).abs().max()) == 0


@pytest.mark.parametrize("coils", [1, 2, 8])
def test_variance_is_stabilised_and_inverted_without_bias(coils: int) -> None:
    noise = magnitude_noise(float(coils))
    values = noise.stabilise(magnitudes(AMPLITUDES, coils, 100_000)).double()
    assert float((values.std(0) - 1).abs().max()) < 0.05
    found = noise.destabilise(values.mean(0).float()).numpy()
    assert (np.abs(found - AMPLITUDES) / (1 + AMPLITUDES))[AMPLITUDES > 0.5].max() < 0.01
    assert np.abs(found - AMPLITUDES).max() < 0.2  # the expectation is flat at the floor


@pytest.mark.parametrize("coils", [1, 3, 12])
def test_number_of_coils_is_found_where_the_noise_varies(coils: int) -> None:
    varying = torch.linspace(5, 20, 2000)
    background = magnitudes(np.zeros(2000), coils, 40) * varying
    assert effective_coils(background) == pytest.approx(coils, rel=0.05)


def test_no_coils_without_noise_of_that_kind() -> None:
    assert effective_coils(torch.zeros(20, 100)) is None
    clipped = (magnitudes(np.zeros(500), 1, 40) - 1.5).clamp(min=0)
    assert effective_coils(clipped) is None


@pytest.mark.parametrize("coils", [1, 4])
def test_noise_floor_of_a_decaying_signal(coils: int) -> None:
    """Noise of one channel and amplitudes around the floor, with either inverse, from magnitudes."""
    rng = np.random.default_rng(4)
    shape, bvals = (15, 15, 15), np.linspace(0, 6, 60)
    position = np.linspace(0.4, 1.2, 15)[:, None, None] * np.ones(shape)
    sigma = 10.0
    truth = (300 * np.exp(-bvals[:, None, None, None] * position)).astype(np.float32)
    data = magnitudes(truth / sigma, coils, 1, int(rng.integers(99)))[0] * sigma
    noise = magnitude_noise(float(coils))
    level = noise_level(data, magnitude=noise)
    assert float(level.mean()) == pytest.approx(sigma, rel=0.03)
    plain = mppca(data, sigma=level)[0]
    inverted = noise.amplitude(plain / level) * level
    stabilised = mppca(data, sigma=level, magnitude=noise)[0]
    low = torch.from_numpy(truth) < sigma
    raw_bias = float((plain - torch.from_numpy(truth))[low].mean())
    for found in (inverted, stabilised):
        error = found - torch.from_numpy(truth)
        assert abs(float(error[low].mean())) < 0.25 * raw_bias
        assert float(error.pow(2).mean()) < 0.5 * float((plain - torch.from_numpy(truth)).pow(2).mean())
