"""Removal of Gibbs ringing from each run, after denoising and before anything interpolates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsiprep.data.acquisition import AXES, KSpace
from dsiprep.data.dwi import DWI
from dsiprep.data.raw import RawEpi
from dsiprep.data.results import Acquired, Denoised, Unringed
from dsiprep.ops.intensity.gibbs_ringing import unring
from dsiprep.ops.intensity.kspace_sampling import HalfSampled, half_sampled_band, power_profile, steepest_fall
from dsiprep.ops.intensity.partial_fourier import apodised, full_kspace
from dsiprep.settings import UnringingSettings

__all__ = ["METHODS", "plan_unringing", "unring_b0", "unring_references", "unring_series"]

METHODS = {
    "mrdegibbs": (
        "Gibbs ringing was removed by local subvoxel shifts in the plane of the slices [@kellner2016], before any "
        "interpolation."
    ),
    "rpg": (
        "Gibbs ringing was removed before any interpolation. The images were acquired with partial Fourier sampling, "
        "which makes them ring at two periods [@lee2021]. The edge of the band of k-space of which one half was "
        "missing was located in the power spectrum; the lost amplitude was restored by a homodyne reconstruction "
        "[@noll1991] with a phase consistent with the magnitudes; ringing was removed by local subvoxel shifts "
        "[@kellner2016]; and the noise was returned to its level by a smooth filter along the phase-encoding axis."
    ),
    "none": "Gibbs ringing was not removed.",
}

NAMES = {
    "none": "Gibbs ringing is not removed",
    "mrdegibbs": "Gibbs ringing is removed by local subvoxel shifts",
    "rpg": "Gibbs ringing is removed by restoring the missing half of k-space and by local subvoxel shifts",
}
SAMPLED_VOLUMES = 8  # at most, from which the sampling of k-space is determined
INTERPOLATED = 12.0  # dB within a tenth of a cycle per voxel
LEAST_LINES = 24  # along each axis of the plane, to determine it


@dataclass(frozen=True)
class _Choice:
    """Method of a run, the reason as a clause, and the band that partial Fourier sampling left half measured."""

    method: str
    reason: str
    band: HalfSampled | None = None


def plan_unringing(k_space: KSpace | None, settings: UnringingSettings) -> tuple[str, str]:
    """Method for a run and the reason, a clause without a full stop, from the sidecar alone.

    Parameters
    ----------
    k_space : KSpace or None
        None for a run that was resampled.
    settings : UnringingSettings
    """
    if settings.method == "none":
        return "none", "disabled"
    if k_space is None:
        return "none", "the run was resampled onto the grid of the first"
    fraction = k_space.partial_fourier
    if settings.method == "mrdegibbs":
        return "mrdegibbs", "requested"
    if fraction is None:
        missing = "the sidecar does not give PartialFourier"
        return "none", f"{missing}; add it (1 if k-space was sampled fully), or use --unringing-method mrdegibbs"
    if fraction > 0.99:
        return "mrdegibbs", "k-space was sampled fully"
    if k_space.pe_axis is None:
        return "none", f"the axis of partial Fourier sampling ({fraction:g}) is unknown: no PhaseEncodingDirection"
    return "rpg", f"partial Fourier {fraction:g} along {AXES[k_space.pe_axis]}"


def unring_series(acquired: Acquired, denoised: Denoised, settings: UnringingSettings) -> Unringed:
    """Remove Gibbs ringing from a series, run by run.

    Parameters
    ----------
    acquired : Acquired
        Data as measured, which show how k-space was sampled.
    denoised : Denoised
    settings : UnringingSettings

    Returns
    -------
    Unringed
        Sharing the memory of `denoised` if no run is changed.
    """
    choices = _choices(acquired, settings)
    unringed = _unring(denoised.dwi, acquired.k_space, choices)
    description = _describe(choices) + (f" {acquired.references}" if acquired.references else "")
    return Unringed(unringed, tuple(choice.method for choice in choices), description)


def unring_b0(acquired: Acquired, settings: UnringingSettings) -> DWI:
    """The b=0 volumes as acquired, but unringed."""
    b0 = acquired.dwi.select(acquired.dwi.is_b0)
    return _unring(b0, acquired.k_space, _choices(acquired, settings))


def _choices(acquired: Acquired, settings: UnringingSettings) -> list[_Choice]:
    """The choice for each run, from its volumes with the lowest b-values: the noise of others hides where it ends."""
    choices = []
    for run, k_space in enumerate(acquired.k_space):
        volumes = np.flatnonzero(acquired.dwi.run == run)
        lowest = volumes[np.argsort(acquired.dwi.bvals[volumes], kind="stable")]
        b0 = lowest[: max(1, min(SAMPLED_VOLUMES, int(acquired.dwi.is_b0[volumes].sum())))]
        choices.append(_choose(acquired.dwi.data[torch.as_tensor(b0)], k_space, settings))
    return choices


def _unring(dwi: DWI, sampled: Sequence[KSpace | None], choices: Sequence[_Choice]) -> DWI:
    """The series unringed, in a copy unless no run is to be changed."""
    data = dwi.data
    for run, (k_space, choice) in enumerate(zip(sampled, choices, strict=True)):
        if choice.method != "none" and k_space is not None:
            data = data.clone() if data is dwi.data else data
            for v in np.flatnonzero(dwi.run == run):
                data[int(v)] = _unring_volume(dwi.data[int(v)], k_space, choice.band, dwi.signed)
    return dwi.with_data(data)


def unring_references(epis: Sequence[RawEpi], settings: UnringingSettings) -> tuple[tuple[RawEpi, ...], str]:
    """Remove Gibbs ringing from b=0 images that serve only to estimate the distortion, and say what was done."""
    done, choices = [], []
    for epi in epis:
        choice = _choose(epi.data, epi.k_space, settings)
        choices.append(choice)
        if choice.method != "none" and epi.k_space is not None:
            data = torch.stack([_unring_volume(volume, epi.k_space, choice.band) for volume in epi.data])
            epi = replace(epi, data=data)
        done.append(epi)
    return tuple(done), f"In the images of fmap/: {_describe(choices)}" if choices else ""


def _choose(volumes: torch.Tensor, k_space: KSpace | None, settings: UnringingSettings) -> _Choice:
    """The planned method, unless the power spectrum of the images speaks against it."""
    method, reason = plan_unringing(k_space, settings)
    if method == "none" or k_space is None:
        return _Choice("none", reason)
    plane = [axis for axis in range(3) if axis != k_space.slice_axis]
    sizes = {axis: volumes.shape[1 + axis] for axis in plane}
    profiles = {axis: power_profile(volumes, k_space.slice_axis, axis) for axis in plane}
    if settings.method == "auto" and min(sizes.values()) >= LEAST_LINES:
        falls = {axis: steepest_fall(profiles[axis], sizes[axis]) for axis in plane}
        worst = max(falls, key=lambda axis: falls[axis])
        if falls[worst] > INTERPOLATED:
            found = f"the outer part of k-space is empty along {AXES[worst]} (a fall of {falls[worst]:.0f} dB)"
            return _Choice("none", f"{found}, so the images were interpolated")
    if method == "mrdegibbs":
        return _Choice(method, reason)
    if k_space.pe_axis not in plane or k_space.partial_fourier is None:
        return _Choice("none", f"{reason}, which is the axis across slices")
    other = next(axis for axis in plane if axis != k_space.pe_axis)
    band = half_sampled_band(profiles[k_space.pe_axis], profiles[other], k_space.partial_fourier)
    if band is None:
        missing = "the missing part of k-space was not left at zero"
        return _Choice("mrdegibbs", f"{reason}, but the power spectrum has no step: {missing}")
    return _Choice("rpg", reason, band)


def _unring_volume(
    volume: torch.Tensor, k_space: KSpace, band: HalfSampled | None, signed: bool = False
) -> torch.Tensor:
    """One volume (i, j, k) without ringing; magnitudes stay positive."""
    planes = volume.float().movedim(k_space.slice_axis, 0).contiguous()
    if band is not None and k_space.pe_axis is not None:
        along = k_space.pe_axis - (k_space.pe_axis > k_space.slice_axis)
        planes = apodised(unring(full_kspace(planes, along, band, signed)), along, band)
    else:
        planes = unring(planes)
    return (planes if signed else planes.clamp(min=0)).movedim(0, k_space.slice_axis)


def _describe(choices: Sequence[_Choice]) -> str:
    """One sentence for each distinct choice, with its images if there are several."""
    distinct: dict[tuple[str, str], list[int]] = {}
    for number, choice in enumerate(choices):
        distinct.setdefault((choice.method, choice.reason), []).append(number)
    parts = []
    for (method, reason), members in distinct.items():
        which = f" (series {', '.join(str(member + 1) for member in members)})" if len(distinct) > 1 else ""
        bands = [f"{band.edge:.2f} ({band.step:.1f} dB)" for member in members if (band := choices[member].band)]
        edge = f", where half of k-space is missing beyond {' and '.join(bands)} cycles per voxel" if bands else ""
        parts.append(f"{NAMES[method]}{which}: {reason}{edge}.")
    return " ".join(parts)
