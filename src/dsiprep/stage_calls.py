"""One call of each stage: on the chosen device, with the chosen engine, on the CPU if a GPU has too little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dsiprep.data.acquisition import AxisCheck, PhaseEncoding
from dsiprep.data.dwi import DWI
from dsiprep.data.gradient_coil import GradientNonlinearity
from dsiprep.data.grid import Volume
from dsiprep.data.raw import RawFieldmap
from dsiprep.data.results import (
    Acquired,
    Anatomy,
    Coregistration,
    Denoised,
    Distortion,
    Motion,
    MovingField,
    Preprocessed,
    Reference,
    Unringed,
)
from dsiprep.data.template import Template
from dsiprep.device import with_cpu_fallback
from dsiprep.engines.selection import anatomical_steps, distortion_step
from dsiprep.settings import (
    AnatomySettings,
    CoregisterSettings,
    DenoiseSettings,
    DistortionSettings,
    MotionSettings,
    ResampleSettings,
    UnringingSettings,
)
from dsiprep.stages import (
    anatomy,
    axis_check,
    coregister,
    denoise,
    distortion,
    fieldmap,
    fieldmapless,
    gradient_nonlinearity,
    motion,
    resample,
    slice_motion,
    unringing,
)

__all__ = [
    "check_axis",
    "correct_distortion",
    "correct_with_fieldmap",
    "correct_without_fieldmap",
    "denoise_series",
    "estimate_motion",
    "follow_slices",
    "prepare_from_b0",
    "prepare_structural",
    "register_to_structural",
    "resample_series",
    "straighten_series",
    "unring_series",
]


def denoise_series(device: torch.device, acquired: Acquired, settings: DenoiseSettings) -> Denoised:
    phase = acquired.phase
    if phase is not None:
        axes = [sampled.slice_axis if sampled else 2 for sampled in acquired.k_space]
        return with_cpu_fallback(
            lambda dwi, mask: denoise.denoise_complex(dwi, phase, mask, settings, axes),
            device,
            (acquired.dwi, acquired.mask),
        )
    return with_cpu_fallback(
        lambda dwi, mask: denoise.denoise(dwi, mask, settings), device, (acquired.dwi, acquired.mask)
    )


def unring_series(
    device: torch.device, acquired: Acquired, denoised: Denoised, settings: UnringingSettings
) -> Unringed:
    return with_cpu_fallback(
        lambda series: unringing.unring_series(acquired, replace(denoised, dwi=series), settings),
        device,
        (denoised.dwi,),
    )


def straighten_series(device: torch.device, acquired: Acquired, nonlinearity: GradientNonlinearity) -> Acquired:
    return with_cpu_fallback(
        lambda series: gradient_nonlinearity.straighten_series(replace(acquired, dwi=series), nonlinearity),
        device,
        (acquired.dwi,),
    )


def estimate_motion(device: torch.device, acquired: Acquired, b0s: DWI, blip: int, settings: MotionSettings) -> Motion:
    """Motion is estimated on the series as acquired: denoised volumes would carry anatomy into each other.

    The b=0 volumes, of which the b=0 reference is made, are unringed, as their counterparts in fmap/ are.
    """
    chosen, pe = acquired.dwi.blip == blip, acquired.blips[blip].pe
    series = _series_of(acquired, b0s, blip)
    moved = with_cpu_fallback(
        lambda dwi, mask: motion.estimate_motion(dwi, mask, settings, pe, acquired.multiband, acquired.slice_axis),
        device,
        (series, acquired.mask),
    )
    return replace(moved, volumes=np.flatnonzero(chosen))


def follow_slices(
    acquired: Acquired, b0s: DWI, moved: Motion, distortion: Distortion | None, settings: MotionSettings
) -> Motion:
    """Motion within volumes, of the same series as `estimate_motion`; its loops are those of the CPU."""
    blip = int(acquired.dwi.blip[moved.volumes[0]])
    series, shots = _series_of(acquired, b0s, blip), acquired.multiband
    return slice_motion.follow_slices(series, acquired.mask, moved, shots, settings, distortion, blip)


def _series_of(acquired: Acquired, b0s: DWI, blip: int) -> DWI:
    """The volumes of one blip as acquired, with other b=0 volumes; a copy."""
    series = acquired.dwi.select(acquired.dwi.blip == blip)
    series.data[torch.as_tensor(series.is_b0)] = b0s.select(b0s.blip == blip).data
    return series


def correct_distortion(
    device: torch.device,
    folder: Path | None,
    acquired: Acquired,
    motions: tuple[Motion, ...],
    method: list[object],
    settings: DistortionSettings,
) -> Distortion | None:
    if method[0] == "none":
        return None
    find, b0s = distortion_step(settings, folder), _aligned_b0s(acquired, motions)
    means, grid, mask = distortion.mean_diffusion(acquired.dwi, motions), acquired.dwi.grid, motions[0].mask

    def correct(*images: torch.Tensor) -> Distortion:
        return find(acquired.blips, images[:2], grid, mask, settings, diffusion=images[2:])

    return with_cpu_fallback(correct, device, (*b0s, *means))


def correct_with_fieldmap(acquired: Acquired, moved: Motion, field: RawFieldmap) -> Distortion:
    reference, grid = moved.dwiref.data[None], acquired.dwi.grid
    return fieldmap.correct_with_fieldmap(acquired.blips[0], reference, grid, moved.mask, field)


def correct_without_fieldmap(
    device: torch.device,
    axis: int | None,
    acquired: Acquired,
    moved: Motion,
    anat: Anatomy,
    start: Coregistration,
) -> Distortion:
    pe = acquired.blips[0].pe or PhaseEncoding(axis or 0, 1)  # without a sign no field in Hz is written
    return with_cpu_fallback(
        lambda b0: fieldmapless.correct_without_fieldmap(pe, b0, moved.mask, anat, start), device, (moved.dwiref,)
    )


def check_axis(acquired: Acquired, motions: tuple[Motion, ...]) -> AxisCheck:
    return axis_check.check_axis(acquired.blips, _aligned_b0s(acquired, motions), acquired.dwi.grid, motions[0].mask)


def prepare_structural(
    device: torch.device,
    folder: Path | None,
    images: tuple[Volume, ...],
    template: Template,
    mask: Volume | None,
    by: list[object],
    settings: AnatomySettings,
) -> Anatomy:
    steps = anatomical_steps(settings, folder)
    return with_cpu_fallback(
        lambda *moved: anatomy.process_anatomy(moved, None, None, template, settings, mask, steps), device, images
    )


def prepare_from_b0(
    device: torch.device,
    reference: Reference,
    template: Template,
    settings: AnatomySettings,
) -> Anatomy:
    return with_cpu_fallback(
        lambda image, brain: anatomy.process_anatomy((), image, brain, template, settings),
        device,
        (reference.dwiref, reference.mask),
    )


def register_to_structural(
    reference: Reference, anatomical: Anatomy, target_unit: str, settings: CoregisterSettings
) -> Coregistration:
    return coregister.coregister(reference.dwiref, reference.mask, anatomical, settings, target_unit)


def resample_series(
    device: torch.device,
    denoised: Denoised,
    unringed: Unringed,
    aligned: tuple[tuple[Motion, ...], Distortion | None, Coregistration, Anatomy],
    settings: ResampleSettings,
    denoising: DenoiseSettings,
    nonlinearity: GradientNonlinearity | None = None,
    moving: MovingField | None = None,
) -> Preprocessed:
    moved = tuple(denoise.without_floor(motion, denoised) for motion in aligned[0])
    known = (nonlinearity, moving)
    return with_cpu_fallback(
        lambda dwi: resample.resample(dwi, moved, *aligned[1:], settings, denoising.biascorrect, *known),
        device,
        (unringed.dwi,),
    )


def _aligned_b0s(acquired: Acquired, motions: tuple[Motion, ...]) -> tuple[torch.Tensor, ...]:
    """Aligned b=0 volumes of each blip, (m, i, j, k)."""
    aligned = {int(acquired.dwi.blip[moved.volumes[0]]): moved.dwiref.data[None] for moved in motions}
    return tuple(aligned.get(b, blip.epis) for b, blip in enumerate(acquired.blips))
