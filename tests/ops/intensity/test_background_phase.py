"""Background phase of complex images: the real part holds the signal, and noise of zero mean."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.ops.intensity.background_phase import without_background_phase
from dsiprep.ops.intensity.mppca import mppca

SHAPE = (40, 44, 6)


def smooth_phase(slope: float) -> np.ndarray:
    x, y = np.linspace(-1, 1, SHAPE[0])[:, None, None], np.linspace(-1, 1, SHAPE[1])[None, :, None]
    return slope * x - 0.7 * slope * y + 1.5 * x * y + np.arange(SHAPE[2])


def real_part(signal: np.ndarray, phase: np.ndarray, sigma: float, axis: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = sigma * (rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE))
    image = np.moveaxis(signal * np.exp(1j * phase) + noise, 2, axis)
    magnitude, angle = (torch.from_numpy(f(image).astype(np.float32)) for f in (np.abs, np.angle))
    return np.moveaxis(without_background_phase(magnitude, angle, axis).numpy(), axis, 2)


def test_smooth_phase_is_removed() -> None:
    found = real_part(np.full(SHAPE, 100.0), smooth_phase(6.0), 0.0)[3:-3, 3:-3]
    assert np.abs(found.real - 100).max() < 1
    assert np.abs(found.imag).max() < 10


def test_noise_has_no_floor() -> None:
    """Magnitudes of noise have a mean of 1.25 standard deviations; half of each slice has a signal as well."""
    signal = np.zeros(SHAPE)
    signal[:20] = 20
    found = np.stack([real_part(signal, smooth_phase(3.0), 1.0, seed=seed) for seed in range(8)])[:, 20:]
    assert abs(found.real.mean()) < 0.02  # twice the standard error of the mean
    assert abs(found.real.std() - 1) < 0.02


def test_weak_signal_is_unbiased() -> None:
    """At twice the noise the mean magnitude is 14 % too high."""
    found = np.stack([real_part(np.full(SHAPE, 2.0), smooth_phase(6.0), 1.0, seed=seed) for seed in range(4)])
    assert abs(found.real.mean() / 2 - 1) < 0.025


def test_slices_across_any_axis() -> None:
    along_k = real_part(np.full(SHAPE, 50.0), smooth_phase(4.0), 1.0)
    for axis in (0, 1):
        np.testing.assert_allclose(real_part(np.full(SHAPE, 50.0), smooth_phase(4.0), 1.0, axis), along_k, atol=1e-3)


def test_noise_of_complex_series() -> None:
    rng = np.random.default_rng(1)
    noise = 5 * (rng.normal(size=(40, 12, 12, 10)) + 1j * rng.normal(size=(40, 12, 12, 10)))
    denoised, sigma, rank = mppca(torch.from_numpy((100 + noise).astype(np.complex64)))
    assert abs(float(sigma.mean()) / 5 - 1) < 0.02
    assert float(rank.mean()) < 1.3
    assert float((denoised - 100).abs().square().mean().sqrt()) < 1.5


def test_complex_series_keeps_more_than_its_real_part_alone() -> None:
    """Real-valued data are denoised alike as real and as complex numbers, up to the noise of the other part."""
    rng = np.random.default_rng(2)
    weights = rng.gamma(2, 50, (60, 4))
    signal = np.einsum("nc,cm->nm", weights, rng.random((4, 12**3))).reshape(60, 12, 12, 12)
    noise = 8 * (rng.normal(size=signal.shape) + 1j * rng.normal(size=signal.shape))
    as_complex = mppca(torch.from_numpy((signal + noise).astype(np.complex64)))[0].numpy()
    as_real = mppca(torch.from_numpy((signal + noise.real).astype(np.float32)))[0].numpy()
    error = np.sqrt(((as_complex.real - signal) ** 2).mean())
    assert error < 1.35 * np.sqrt(((as_real - signal) ** 2).mean())
    assert error < 0.45 * 8
