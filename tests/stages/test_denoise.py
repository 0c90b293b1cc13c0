"""The denoising stage: methods, number of coils and correlation of the noise from the background, noise floor."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.errors import SettingsError
from dsiprep.phantom.schemes import gradient_table
from dsiprep.settings import DenoiseSettings
from dsiprep.stages.denoise import denoise, without_floor
from helpers.grids import make_grid
from helpers.identity_results import make_motion

SHAPE = (40, 40, 26)
SIGMA = 40.0


@cache
def truth() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A ball of tensors in air, dsi101 with b to 4000: signal (n, i, j, k), ball (i, j, k), b-values, b-vectors."""
    rng = np.random.default_rng(2)
    bvals, bvecs = gradient_table("dsi101")
    x, y, z = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij")
    ball = x**2 + y**2 + z**2 < 10**2
    angle = x / 8 + y / 20
    direction = np.stack([np.cos(angle), np.sin(angle) * np.cos(z / 6), np.sin(angle) * np.sin(z / 6)])
    along = np.einsum("nd,dijk->nijk", bvecs, direction) ** 2
    brightness = ndimage.gaussian_filter(rng.normal(size=SHAPE), 3)
    brightness = 800 * (1 + 0.3 * brightness / brightness.std())
    signal = np.exp(-bvals[:, None, None, None] * (0.2e-3 + 1.5e-3 * along)) * brightness * ball
    return signal.astype(np.float32), ball, bvals, bvecs


def series(coils: int = 1, magnitude: bool = True, air: float = 1.0) -> DWI:
    """The ball with noise of standard deviation SIGMA in each channel, in air as well or `air` times as much."""
    signal, ball, bvals, bvecs = truth()
    rng = np.random.default_rng(5)
    channels = SIGMA * rng.standard_normal((2 * coils, *signal.shape), np.float32)
    channels[0] += signal
    data = np.sqrt((channels**2).sum(0)) if magnitude else channels[0]
    data = np.where(ball, data, air * data).astype(np.float32)
    zero = np.zeros(len(bvals), int)
    return DWI(torch.from_numpy(data), make_grid("LAS", SHAPE, (2, 2, 2)), bvals, bvecs, zero, zero)


def brain(dwi: DWI) -> Volume:
    return Volume(torch.from_numpy(truth()[1].astype(np.float32)), dwi.grid)


def bias_and_error(found: torch.Tensor) -> tuple[float, float]:
    """Mean error of amplitudes below the noise, and root mean square error, inside the ball, over SIGMA."""
    signal, ball = truth()[:2]
    difference = (found.numpy() - signal)[:, ball] / SIGMA
    return float(difference[signal[:, ball] < SIGMA].mean()), float(np.sqrt((difference**2).mean()))


@pytest.mark.parametrize("method", ["dwidenoise", "dwidenoise2", "svht", "patch2self"])
def test_methods_lower_error_and_floor(method: str) -> None:
    dwi = series()
    result = denoise(dwi, brain(dwi), DenoiseSettings(method=method))
    kept = denoise(dwi, brain(dwi), DenoiseSettings(method=method, noise_floor="none"))
    (bias, error), (kept_bias, kept_error) = bias_and_error(result.dwi.data), bias_and_error(kept.dwi.data)
    raw_bias, raw_error = bias_and_error(dwi.data)
    assert error < kept_error < 0.75 * raw_error
    assert abs(bias) < 0.2 * raw_bias
    assert kept_bias > 0.8 * raw_bias
    assert result.coils == pytest.approx(1, abs=0.05)
    assert result.floor == ("vst" if method == "dwidenoise2" else "koay")
    assert kept.coils is None
    assert result.noise is not None
    inside = torch.from_numpy(truth()[1])
    assert float(result.noise.data[inside].mean()) == pytest.approx(SIGMA, rel=0.03)
    assert (result.rank is None) == (method == "patch2self")
    assert float(result.dwi.data.min()) >= 0 or method == "patch2self"


@pytest.mark.parametrize("coils", [2, 6])
def test_coils_are_counted_in_the_background(coils: int) -> None:
    dwi = series(coils)
    result = denoise(dwi, brain(dwi), DenoiseSettings())
    assert result.coils == pytest.approx(coils, rel=0.05)
    assert abs(bias_and_error(result.dwi.data)[0]) < 0.15 * bias_and_error(dwi.data)[0]
    assert "correlated" not in result.method


def test_a_masked_background_means_one_coil() -> None:
    dwi = series(air=0.0)
    result = denoise(dwi, brain(dwi), DenoiseSettings())
    assert result.coils == 1
    assert "assumed" in result.method
    assert abs(bias_and_error(result.dwi.data)[0]) < 0.2 * bias_and_error(dwi.data)[0]


def test_correlation_of_interpolated_noise_is_measured_in_the_background() -> None:
    """Magnitudes interpolated between voxels: air tells by how much patches underestimate the noise."""

    def interpolated(dwi: DWI) -> DWI:
        return dwi.with_data(0.7 * dwi.data + 0.3 * dwi.data.roll(1, 2))

    dwi, masked = interpolated(series()), interpolated(series(air=0.0))
    aware, unaware = (denoise(each, brain(each), DenoiseSettings()) for each in (dwi, masked))
    assert "correlated" in aware.method
    assert "correlated" not in unaware.method
    raw, known, unknown = (abs(bias_and_error(each.dwi.data)[0]) for each in (replace(aware, dwi=dwi), aware, unaware))
    assert known < 0.5 * unknown
    assert known < 0.25 * raw


def test_series_with_negative_values_have_no_floor() -> None:
    dwi = series(magnitude=False)
    result = denoise(dwi, brain(dwi), DenoiseSettings())
    assert result.floor == "none"
    assert "negative" in result.method
    assert abs(bias_and_error(result.dwi.data)[0]) < 0.05
    inside = torch.from_numpy(truth()[1])
    assert result.noise is not None
    assert float(result.noise.data[inside].mean()) == pytest.approx(SIGMA, rel=0.03)


@pytest.mark.parametrize(
    ("method", "floor"), [("none", "koay"), ("none", "vst"), ("svht", "vst"), ("patch2self", "vst")]
)
def test_contradictory_settings_are_refused(method: str, floor: str) -> None:
    with pytest.raises(SettingsError, match="--noise-floor"):
        DenoiseSettings(method=method, noise_floor=floor)


def test_floor_is_removed_from_replaced_slices() -> None:
    """Slices are replaced by predictions from magnitudes, whose floor has to go as well."""
    dwi = series()
    result = denoise(dwi, brain(dwi), DenoiseSettings())
    assert result.noise is not None
    lost = np.zeros((len(dwi), SHAPE[2]), bool)
    lost[3, 12] = lost[40, 13] = True
    inside = torch.from_numpy(truth()[1])
    floor = result.noise.data * 1.2533  # root of pi/2
    still = make_motion(dwi.grid, np.tile(np.eye(4), (len(dwi), 1, 1)), np.arange(len(dwi)))
    moved = replace(still, outlier_slices=lost, replacements=torch.stack([floor[..., 12], floor[..., 13]]))
    corrected = without_floor(moved, result)
    assert corrected.replacements is not None
    assert float(corrected.replacements[0][inside[..., 12]].max()) < 0.1 * SIGMA
    assert without_floor(moved, replace(result, coils=None)) is moved
