"""Noise: each run is denoised on its own, for receive gains and noise differ between runs."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import Denoised
from dsiprep.ops.intensity.mppca import default_window, mppca
from dsiprep.settings import DenoiseSettings

METHODS = {
    "dwidenoise": (
        "Noise was estimated and removed with Marchenko-Pastur principal component analysis (MP-PCA) "
        "[@veraart2016; @corderogrande2019] of overlapping patches [@manjon2013], each run on its own. "
        "Components within the Marchenko-Pastur distribution were removed; the others were shrunk for the "
        "least squared error [@gavish2017]."
    ),
    "none": "The data were not denoised.",
}

FEWEST = 10  # volumes of a run; with fewer the distribution of eigenvalues says little


def denoise(dwi: DWI, mask: Volume, settings: DenoiseSettings) -> Denoised:
    """Remove noise from every run of a series; reversed phase-encoding EPIs are left as they are.

    Parameters
    ----------
    dwi : DWI
        Raw intensities: nothing interpolated yet.
    mask : Volume
        Rough brain mask; outside it intensities stay as they are.
    settings : DenoiseSettings

    Returns
    -------
    Denoised
        `noise` and `rank` are averages over the denoised runs, weighted by volumes; None where no run was
        denoised. `method` says in a sentence what was done and what was not.
    """
    if settings.method == "none":
        return Denoised(dwi, None, None, METHODS["none"])
    runs = [np.flatnonzero(dwi.run == run) for run in np.unique(dwi.run)]
    long = [volumes for volumes in runs if len(volumes) >= FEWEST]
    if not long:
        return Denoised(dwi, None, None, f"MP-PCA was skipped: {_skipped(runs)}.")
    data = dwi.data.clone()
    inside = mask.data.to(dwi.data.device) > 0
    variance, rank = torch.zeros_like(data[0]), torch.zeros_like(data[0])
    total = sum(len(volumes) for volumes in long)
    for volumes in long:
        index = torch.as_tensor(volumes, device=data.device)
        clean, sigma, kept = mppca(_volumes(dwi.data, volumes), inside, settings.window)
        data[index] = torch.where(inside, clean, _volumes(dwi.data, volumes))
        variance += sigma**2 * (len(volumes) / total)
        rank += kept * (len(volumes) / total)
    noise = Volume(variance.sqrt(), dwi.grid)
    return Denoised(dwi.with_data(data), noise, Volume(rank, dwi.grid), _told(runs, long, settings))


def _volumes(data: torch.Tensor, volumes: np.ndarray) -> torch.Tensor:
    """Volumes of the series; without a copy where they lie next to each other."""
    first, last = int(volumes[0]), int(volumes[-1])
    if last - first + 1 == len(volumes):
        return data[first : last + 1]
    return data[torch.as_tensor(volumes, device=data.device)]


def _told(runs: list[np.ndarray], long: list[np.ndarray], settings: DenoiseSettings) -> str:
    widths = sorted({settings.window or default_window(len(volumes)) for volumes in long})
    text = f"MP-PCA in windows of {' or '.join(f'{w}x{w}x{w}' for w in widths)} voxels"
    if len(long) < len(runs):
        text += f"; skipped where {_skipped([v for v in runs if len(v) < FEWEST])}"
    return text + "."


def _skipped(runs: list[np.ndarray]) -> str:
    counts = ", ".join(str(len(volumes)) for volumes in runs)
    return f"runs of {counts} volumes are too short to tell noise from signal (at least {FEWEST} are needed)"
