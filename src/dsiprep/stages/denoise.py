"""Denoising of each run separately, because receive gain and noise level differ between runs, and the noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import Denoised, Motion
from dsiprep.ops.image.filters import gaussian
from dsiprep.ops.intensity.background_phase import without_background_phase
from dsiprep.ops.intensity.magnitude_noise import MagnitudeNoise, effective_coils, magnitude_noise
from dsiprep.ops.intensity.mppca import mppca
from dsiprep.ops.intensity.noise_level import correlation_factor, default_window, noise_level
from dsiprep.ops.intensity.patch2self import patch2self
from dsiprep.settings import DenoiseSettings

_LEVEL = (
    "The noise level was estimated from the lower half of the eigenvalues of local patches, relative to the "
    "Marchenko-Pastur distribution, separately for each run."
)
_RESTORED = (
    "The part of the residual that adjacent voxels share, in excess of that of noise, was put back (twicing) "
    "[@tukey1977]."
)
METHODS = {
    "dwidenoise": (
        f"{_LEVEL} Noise was removed with Marchenko-Pastur principal component analysis (MP-PCA) [@veraart2016] in "
        f"overlapping patches [@manjon2013]: components within the distribution of that noise were removed. {_RESTORED}"
    ),
    "dwidenoise2": (
        f"{_LEVEL} The variance of the noise was stabilised [@foi2011; @ma2020], components of overlapping patches "
        "[@manjon2013] within the Marchenko-Pastur distribution [@veraart2016] were removed, and the others were "
        f"shrunk to minimise the mean squared error of the average of patches [@gavish2017]. {_RESTORED}"
    ),
    "svht": (
        f"{_LEVEL} The singular values of overlapping patches [@manjon2013] were shrunk to minimise the mean squared "
        f"error of each patch at that noise level [@gavish2014; @gavish2017]. {_RESTORED}"
    ),
    "patch2self": (
        "Every volume was replaced by its prediction from all others in the same voxel by least squares (Patch2Self) "
        "[@fadnavis2020], separately for each run and for b=0 and diffusion-weighted volumes."
    ),
    "none": "The data were not denoised.",
    "koay": (
        "The noise floor of magnitude images was removed by inverting the expectation of non-central chi magnitudes "
        "[@koay2006], with the noise level of each voxel and an effective number of coils estimated from the "
        "background."
    ),
    "vst": (
        "The noise floor of magnitude images was removed by the unbiased inverse of the stabilising transform, with an "
        "effective number of coils estimated from the background."
    ),
    "complex": (
        "The series was acquired as complex data. The background phase of each slice, the mean slope and a smooth "
        "remainder, was removed, the data were processed as complex numbers, and the real part was kept, whose noise "
        "has zero mean [@corderogrande2019]."
    ),
}
NAMES = {"dwidenoise": "MP-PCA", "dwidenoise2": "MP-PCA with shrinkage", "svht": "Singular-value shrinkage"}

MIN_VOLUMES = 10  # per run; fewer give too few eigenvalues to estimate the noise
MIN_BACKGROUND = 500  # voxels from which the number of coils is estimated
AWAY_VOXELS = 3  # of the background from the rough brain mask
LEAST_CORRELATION, MOST_CORRELATION = 0.03, 2.5  # of `correlation_factor`: less is chance, more is no noise
DARKEST = 0.3  # share of the voxels away from the brain that are taken for background
MOST_NEGATIVE = 0.01  # of the values of a series of magnitudes: interpolation may have left a few
HIGH_B = 0.6  # of the largest b-value; above it, the background is read


def floor_method(settings: DenoiseSettings) -> str:
    """How the noise floor of magnitudes is removed: "koay", "vst" or "none"."""
    if settings.noise_floor != "auto":
        return settings.noise_floor
    return {"none": "none", "dwidenoise2": "vst"}.get(settings.method, "koay")


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
    found = denoise(dwi.with_data(data.real.contiguous() if settings.method == "patch2self" else data), mask, settings)
    real = replace(found.dwi.with_data(found.dwi.data.real.contiguous()), signed=True)
    text = f"{found.method} Complex data: background phase removed, real part kept."
    return replace(found, dwi=real, method=text)


def denoise(dwi: DWI, mask: Volume, settings: DenoiseSettings) -> Denoised:
    """Remove noise from every run of a series, and its floor; b=0 images of fmap/ are not denoised.

    Parameters
    ----------
    dwi : DWI
        Raw data that have not been interpolated. A series with many negative values is not one of magnitudes, and has
        no noise floor.
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
        return Denoised(dwi, None, None, f"Denoising was skipped because {_describe_short_runs(runs)}.")
    inside = mask.data.to(dwi.data.device) > 0
    is_magnitude = not dwi.data.is_complex() and _negative_share(dwi.data) < MOST_NEGATIVE
    air = [_read_background(dwi, v, inside, settings.window) if is_magnitude else _Background() for v in denoisable]
    found = [read.coils for read in air if read.coils is not None]
    magnitude = magnitude_noise(round(float(np.median(found)), 2) if found else 1.0) if is_magnitude else None
    data = dwi.data.clone() if len(runs) > 1 else dwi.data
    variance, rank = torch.zeros(2, *dwi.grid.shape, device=data.device)
    total = sum(len(volumes) for volumes in denoisable)
    for volumes, read in zip(denoisable, air, strict=True):
        index = torch.as_tensor(volumes, device=data.device)
        run = _select_volumes(dwi.data, volumes)
        sigma = noise_level(run, inside, settings.window, magnitude, read.factor)
        clean, sigma, components = _denoise_run(run, inside, sigma, dwi.is_b0[volumes], magnitude, settings)
        if len(runs) > 1:
            data[index] = clean
        else:
            data = clean
        variance += sigma**2 * (len(volumes) / total)
        rank += components * (len(volumes) / total)
    if data.is_complex():  # of the real part
        variance /= 2
    floor = floor_method(settings) if is_magnitude else "none"
    return Denoised(
        dwi.with_data(data),
        Volume(variance.sqrt(), dwi.grid),
        None if settings.method == "patch2self" else Volume(rank, dwi.grid),
        _describe(runs, denoisable, settings) + _describe_noise(air) + _describe_floor(floor, magnitude, bool(found)),
        floor,
        None if floor == "none" or magnitude is None else magnitude.coils,
    )


def remove_floor(values: torch.Tensor, sigma: torch.Tensor, magnitude: MagnitudeNoise) -> torch.Tensor:
    """Turn values (n, ...) into the amplitudes whose expected magnitudes they are, in place where sigma is not zero."""
    known = sigma > 0
    level = sigma[known]
    for volume in values:  # one volume at a time stays in the processor's cache
        volume[known] = magnitude.amplitude(volume[known] / level).mul_(level)
    return values


def without_floor(motion: Motion, denoised: Denoised) -> Motion:
    """Remove the noise floor from predictions that replace slices or fill gaps: they come from series that have it."""
    motion = _gaps_without_floor(motion, denoised)
    if motion.replacements is None or motion.outlier_slices is None or denoised.coils is None or denoised.noise is None:
        return motion
    sigma = denoised.noise.data.to(motion.replacements.device)
    levels = [sigma.select(motion.slice_axis, int(k)) for _, k in np.argwhere(motion.outlier_slices)]
    pairs = zip(motion.replacements, levels, strict=True)
    magnitude = magnitude_noise(denoised.coils)
    corrected = [remove_floor(predicted[None].clone(), level, magnitude)[0] for predicted, level in pairs]
    return replace(motion, replacements=torch.stack(corrected)) if corrected else motion


def _gaps_without_floor(motion: Motion, denoised: Denoised) -> Motion:
    """Remove the noise floor from predictions where a volume that moved within itself has no sample."""
    slices = motion.slices
    if slices is None or not len(slices.gaps) or denoised.coils is None or denoised.noise is None:
        return motion
    level = denoised.noise.data.cpu()[tuple(torch.as_tensor(axis) for axis in slices.gaps[:, 1:].T)]
    values = torch.as_tensor(np.asarray(slices.gap_values, np.float32))
    clean = remove_floor(values[None].clone(), level, magnitude_noise(denoised.coils))[0]
    return replace(motion, slices=replace(slices, gap_values=clean.numpy()))


def _denoise_run(
    data: torch.Tensor,
    inside: torch.Tensor,
    sigma: torch.Tensor,
    is_b0: np.ndarray,
    magnitude: MagnitudeNoise | None,
    settings: DenoiseSettings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Denoised series of one run, `sigma` where it was denoised, and the number of components."""
    method, floor = settings.method, floor_method(settings)
    if method == "patch2self":
        clean, rank = patch2self(data, inside, is_b0), torch.zeros_like(sigma)
        sigma = torch.where(functional.max_pool3d(inside[None].float(), 3, 1, 1)[0] > 0, sigma, 0.0)
        denoised_here = sigma > 0
    else:
        stabilised = magnitude if floor == "vst" else None
        shrinkage = {"dwidenoise": "none", "dwidenoise2": "overlap", "svht": "single"}[method]
        clean, _, rank = mppca(data, inside, settings.window, sigma, shrinkage, stabilised)
        denoised_here = rank > 0
        sigma = torch.where(denoised_here, sigma, 0.0)
    if floor == "koay" and magnitude is not None:
        clean = remove_floor(clean, sigma, magnitude)
    for volume, acquired in zip(clean, data, strict=True):
        volume.copy_(torch.where(denoised_here, volume, acquired))
    return clean, sigma, rank


def _negative_share(data: torch.Tensor) -> float:
    """Share of negative values among those that are not zero."""
    negative = sum(int((volume < 0).sum()) for volume in data)
    return negative / max(1, sum(int((volume != 0).sum()) for volume in data))


@dataclass(frozen=True)
class _Background:
    """What air tells about the noise of a run: number of coils, and `correlation_factor`; None if air was processed."""

    coils: float | None = None
    factor: float = 1.0


def _read_background(dwi: DWI, volumes: np.ndarray, inside: torch.Tensor, window: int) -> _Background:
    """Noise in the air around the head.

    Voxels are chosen by volumes of low b, and the noise is read from those of high b, so that the choice has no part in
    it.
    """
    high = dwi.bvals[volumes] >= HIGH_B * dwi.bvals[volumes].max()
    if high.sum() < MIN_VOLUMES or high.all():
        return _Background()
    near = functional.max_pool3d(inside[None].float(), 2 * AWAY_VOXELS + 1, 1, AWAY_VOXELS)[0] > 0
    read = _select_volumes(dwi.data, volumes[high])
    usable = ~near & (read > 0).all(0)
    if int(usable.sum()) < MIN_BACKGROUND / DARKEST:
        return _Background()
    brightness = gaussian(_select_volumes(dwi.data, volumes[~high]).mean(0)[None], AWAY_VOXELS)[0]
    values = brightness[usable]
    dark = usable & (brightness <= torch.quantile(values[:: max(1, len(values) // 100_000)], DARKEST))
    coils = effective_coils(read[:, dark])
    factor = 1.0 if coils is None else correlation_factor(read, dark, window)
    return _Background(coils, factor if 1 + LEAST_CORRELATION < factor < MOST_CORRELATION else 1.0)


def _select_volumes(data: torch.Tensor, volumes: np.ndarray) -> torch.Tensor:
    """Volumes of the series, as a view if they are contiguous."""
    first, last = int(volumes[0]), int(volumes[-1])
    if last - first + 1 == len(volumes):
        return data[first : last + 1]
    return data[torch.as_tensor(volumes, device=data.device)]


def _describe(runs: list[np.ndarray], denoisable: list[np.ndarray], settings: DenoiseSettings) -> str:
    if settings.method == "patch2self":
        text = "Patch2Self"
    else:
        widths = sorted({settings.window or default_window(len(volumes)) for volumes in denoisable})
        text = f"{NAMES[settings.method]} in windows of {' or '.join(f'{w}x{w}x{w}' for w in widths)} voxels"
    if len(denoisable) < len(runs):
        text += f"; skipped because {_describe_short_runs([v for v in runs if len(v) < MIN_VOLUMES])}"
    return text + "."


def _describe_noise(air: list[_Background]) -> str:
    most = max(read.factor for read in air)
    return f" Noise is correlated between voxels: its level was raised by up to {most - 1:.0%}." if most > 1 else ""


def _describe_floor(floor: str, magnitude: MagnitudeNoise | None, counted: bool) -> str:
    if magnitude is None:
        return " The series has negative values throughout, and so no noise floor of magnitudes."
    if floor == "none":
        return " The noise floor of magnitudes remains."
    how = "expectation of magnitudes inverted" if floor == "koay" else "unbiased inverse of the stabilised variance"
    source = "estimated from the background" if counted else "assumed, as there is no background to estimate it from"
    return f" Noise floor removed ({how}); effective number of coils {magnitude.coils:.3g}, {source}."


def _describe_short_runs(runs: list[np.ndarray]) -> str:
    counts = ", ".join(str(len(volumes)) for volumes in runs)
    return f"runs of {counts} volumes are too short to separate noise from signal (at least {MIN_VOLUMES} are needed)"
