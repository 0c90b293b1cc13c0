"""Denoising of each run separately, because receive gain and noise level differ between runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import Denoised
from dsiprep.ops.intensity.background_phase import without_background_phase
from dsiprep.ops.intensity.mppca import default_window, mppca
from dsiprep.settings import DenoiseSettings

METHODS = {
    "dwidenoise": (
        "Noise was estimated and removed with Marchenko-Pastur principal component analysis (MP-PCA) "
        "[@veraart2016; @corderogrande2019] in overlapping patches [@manjon2013], separately for each run. "
        "Components within the Marchenko-Pastur distribution were removed, and the others were shrunk to minimise the "
        "mean squared error [@gavish2017]."
    ),
    "none": "The data were not denoised.",
    "complex": (
        "The series was acquired as complex data. The background phase of each slice, the mean slope and a smooth "
        "remainder, was removed, the data were processed as complex numbers, and the real part was kept, whose noise "
        "has zero mean [@corderogrande2019]."
    ),
}

MIN_VOLUMES = 10  # per run; fewer give too few eigenvalues to estimate the noise


def denoise_complex(
    dwi: DWI, phase: torch.Tensor, mask: Volume, settings: DenoiseSettings, slice_axes: Sequence[int]
) -> Denoised:
    """Remove background phase and noise from a complex series, and keep the real part.

    Parameters
    ----------
    dwi : DWI
        Magnitudes.
    phase : Tensor, (n, i, j, k)
        Radians.
    mask, settings
        As for `denoise`.
    slice_axes : sequence of int
        Voxel axis across the slices of each run.
    """
    data = torch.empty_like(dwi.data, dtype=torch.complex64)
    for v, run in enumerate(dwi.run):
        data[v] = without_background_phase(dwi.data[v], phase[v].to(dwi.data.device), slice_axes[run])
    found = denoise(dwi.with_data(data), mask, settings)
    real = replace(found.dwi.with_data(found.dwi.data.real.contiguous()), signed=True)
    text = f"{found.method} Complex data: background phase removed, real part kept."
    return replace(found, dwi=real, method=text)


def denoise(dwi: DWI, mask: Volume, settings: DenoiseSettings) -> Denoised:
    """Remove noise from every run of a series; b=0 images of fmap/ are not denoised.

    Parameters
    ----------
    dwi : DWI
        Raw data that have not been interpolated.
    mask : Volume
        Rough brain mask. What lies less than about a patch width outside is denoised too, since the final mask may
        reach there; intensities farther away are unchanged.
    settings : DenoiseSettings

    Returns
    -------
    Denoised
        `noise` (square root of the mean variance) and `rank` are averages over the denoised runs, weighted by their
        number of volumes; None if no run was denoised. `method` describes what was done and what was skipped.
    """
    if settings.method == "none":
        return Denoised(dwi, None, None, METHODS["none"])
    runs = [np.flatnonzero(dwi.run == run) for run in np.unique(dwi.run)]
    denoisable = [volumes for volumes in runs if len(volumes) >= MIN_VOLUMES]
    if not denoisable:
        return Denoised(dwi, None, None, f"MP-PCA was skipped because {_describe_short_runs(runs)}.")
    data = dwi.data.clone()
    inside = mask.data.to(dwi.data.device) > 0
    variance, rank = torch.zeros(2, *dwi.grid.shape, device=data.device)
    total = sum(len(volumes) for volumes in denoisable)
    for volumes in denoisable:
        index = torch.as_tensor(volumes, device=data.device)
        denoised, sigma, signal_rank = mppca(_select_volumes(dwi.data, volumes), inside, settings.window)
        data[index] = torch.where(signal_rank > 0, denoised, _select_volumes(dwi.data, volumes))
        variance += sigma**2 * (len(volumes) / total)
        rank += signal_rank * (len(volumes) / total)
    noise = Volume(variance.sqrt(), dwi.grid)
    return Denoised(dwi.with_data(data), noise, Volume(rank, dwi.grid), _describe(runs, denoisable, settings))


def _select_volumes(data: torch.Tensor, volumes: np.ndarray) -> torch.Tensor:
    """Volumes of the series, as a view if they are contiguous."""
    first, last = int(volumes[0]), int(volumes[-1])
    if last - first + 1 == len(volumes):
        return data[first : last + 1]
    return data[torch.as_tensor(volumes, device=data.device)]


def _describe(runs: list[np.ndarray], denoisable: list[np.ndarray], settings: DenoiseSettings) -> str:
    widths = sorted({settings.window or default_window(len(volumes)) for volumes in denoisable})
    text = f"MP-PCA in windows of {' or '.join(f'{w}x{w}x{w}' for w in widths)} voxels"
    if len(denoisable) < len(runs):
        text += f"; skipped because {_describe_short_runs([v for v in runs if len(v) < MIN_VOLUMES])}"
    return text + "."


def _describe_short_runs(runs: list[np.ndarray]) -> str:
    counts = ", ".join(str(len(volumes)) for volumes in runs)
    return f"runs of {counts} volumes are too short to separate noise from signal (at least {MIN_VOLUMES} are needed)"
