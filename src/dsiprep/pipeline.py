"""The preprocessing pipeline: all stages in order. Start here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dsiprep.cache import Cache, CachedResult
from dsiprep.data.acquisition import AxisCheck, PhaseEncoding, Unit
from dsiprep.data.grid import Volume
from dsiprep.data.raw import RawFieldmap
from dsiprep.data.results import (
    Acquired,
    Anatomy,
    Coregistration,
    Denoised,
    Distortion,
    Joined,
    Motion,
    Preprocessed,
    Reference,
    UnitResults,
)
from dsiprep.data.template import Template
from dsiprep.device import with_cpu_fallback
from dsiprep.engines.selection import anatomical_steps, check_engines, distortion_step, engine_fingerprints
from dsiprep.io import fieldmaps, nifti, templates, unit_reader
from dsiprep.io.bids import read_unit
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.nifti import read_volume
from dsiprep.io.templates import load_template
from dsiprep.io.unit_check import check_unit
from dsiprep.io.user_mask import find_mask
from dsiprep.plan import AXIS_CONTRADICTED, choose_distortion, choose_structural, doubt_axis, warnings_for
from dsiprep.settings import (
    AnatomySettings,
    CoregisterSettings,
    DenoiseSettings,
    DistortionSettings,
    MotionSettings,
    ResampleSettings,
    Settings,
)
from dsiprep.stages import (
    acquisition,
    anatomy,
    axis_check,
    coregister,
    denoise,
    distortion,
    dwiref,
    fieldmap,
    fieldmapless,
    motion,
    quality,
    resample,
)

STEPS = ("acquisition", "denoise", "motion", "distortion", "anatomy", "coregister", "resample", "quality")
T = TypeVar("T")


def preprocess(
    unit: Unit,
    settings: Settings,
    cache: Cache | None = None,
    device: torch.device | str = "cpu",
    lead: Unit | None = None,
) -> UnitResults:
    """Preprocess one unit: the DWI runs that become one output.

    Parameters
    ----------
    unit : Unit
        From `find_units`.
    settings : Settings
        `resample.resolution` has no default.
    cache : Cache, optional
        Holds stage results, so that an interrupted call resumes; in memory by default.
    device : torch.device or str
        Where tensors are processed.
    lead : Unit, optional
        From `choose_lead`: the unit whose b=0 reference replaces a missing structural image, so that all series of a
        subject share one space. The unit itself by default.

    Returns
    -------
    UnitResults
        For `write_derivatives`.

    Raises
    ------
    InputError
        If the data cannot be used.
    SettingsError
        If no output resolution is set.
    """
    settings.resample.require_resolution()
    cache, on = cache or Cache(None), torch.device(device)
    if not cache.only_found:
        check_engines(unit, settings, on)
    acquired = _acquire(unit, settings, cache)
    denoised = cache.run(denoise, "denoise", partial(_denoise, on), acquired, settings.denoise)
    motions, corrected, reason, doubt = _undistort(unit, settings, cache, on, acquired)
    modality = settings.anatomy.modality
    follows = lead is not None and lead.name != unit.name and not unit.structural(modality)
    target_unit = (lead.output or lead.name) if lead is not None and follows else ""
    reference = leading = _reference(cache, motions[0], corrected)
    if lead is not None and target_unit:
        other = cache.for_other_unit()
        moved, undistorted, *_ = _undistort(lead, settings, other, on, _acquire(lead, settings, other))
        leading = _reference(other, moved[0], undistorted)
    anatomical = prepare_anatomy(unit, settings, cache, on, leading)
    coregistered = cache.run(
        coregister, "coregister", _coregister, reference, anatomical, target_unit, settings.coregister
    )
    aligned = (motions, corrected, coregistered, anatomical)
    preprocessed = cache.run(
        resample, "resample", partial(_resample, on), denoised, aligned, settings.resample, settings.denoise
    )
    measured = cache.run(
        quality, "quality", quality.measure_quality, unit.name, acquired, denoised, *aligned, preprocessed
    )
    return UnitResults(
        unit=unit,
        settings=settings,
        acquired=acquired.value,
        denoised=denoised.value,
        motions=tuple(kept.value for kept in motions),
        distortion=corrected.value,
        distortion_reason=reason,
        anatomy=anatomical.value,
        coregistration=coregistered.value,
        preprocessed=preprocessed.value,
        quality=measured.value,
        seconds=dict(cache.seconds),
        device=str(on),
        warnings=warnings_for(unit, settings, corrected.value is not None, doubt),
    )


def _acquire(unit: Unit, settings: Settings, cache: Cache) -> CachedResult[Acquired]:
    check_unit(unit, settings)
    raw = cache.files(
        unit_reader, unit.files(), [unit.sidecar_fields(), settings.acquisition], lambda: read_unit(unit, settings)
    )
    return cache.run(acquisition, "acquisition", acquisition.conform, raw, settings.acquisition)


def _undistort(
    unit: Unit, settings: Settings, cache: Cache, device: torch.device, acquired: CachedResult[Acquired]
) -> tuple[tuple[CachedResult[Motion], ...], CachedResult[Distortion | None], str, str]:
    """Motion of each blip, the distortion, why it is corrected in that way, and why it is not in spite of a pair."""
    motions = tuple(
        cache.run(motion, f"motion-{blip.name}", partial(_motion, device), acquired, b, settings.motion)
        for b, blip in enumerate(acquired.value.blips)
        if (acquired.value.dwi.blip == b).any()
    )
    method, reason = choose_distortion(unit, acquired.value, settings)
    correct = partial(_correct_distortion, unit, settings, cache, device, (acquired, motions))
    doubt, careful = "", settings.distortion.method == "auto"
    if method == "drbuddi" and careful:
        doubt = doubt_axis(cache.run(axis_check, "distortion-axis", _check_axis, acquired, motions).value)
    corrected = correct("none" if doubt else method)
    if method == "gre" and careful and corrected.value is not None:
        doubt = corrected.value.doubt
        corrected = correct("none") if doubt else corrected
    return motions, corrected, AXIS_CONTRADICTED if doubt else reason, doubt


def prepare_anatomy(
    unit: Unit,
    settings: Settings,
    cache: Cache,
    device: torch.device,
    reference: CachedResult[Reference] | None = None,
) -> CachedResult[Anatomy]:
    """The structural image of a unit, or `reference` in its place if there is none."""
    found = load_template(settings.anatomy.template, settings.anatomy.modality)
    template = cache.files(templates, found.files, [found.name, found.note], lambda: found)
    if paths := unit.structural(settings.anatomy.modality):
        images = cache.files(
            nifti, paths, settings.anatomy.modality, lambda: tuple(read_volume(path) for path in paths)
        )
        given = find_mask(unit, settings.anatomy)
        mask = cache.files(nifti, (given,) if given else (), "mask", lambda: read_volume(given) if given else None)
        prepare, by = partial(_anatomy, device, cache.folder), engine_fingerprints(settings.anatomy)
        return cache.run(anatomy, "anatomy", prepare, images, template, mask, by, settings.anatomy)
    prepare = partial(_anatomy_from_b0, device)
    return cache.run(anatomy, "anatomy-b0", prepare, reference, template, settings.anatomy)


def _correct_distortion(
    unit: Unit,
    settings: Settings,
    cache: Cache,
    device: torch.device,
    moved: tuple[CachedResult[Acquired], tuple[CachedResult[Motion], ...]],
    method: str,
) -> CachedResult[Distortion | None]:
    acquired, motions = moved
    if method == "gre" and unit.gre:
        gre = unit.gre
        field = cache.files(fieldmaps, gre.files(), gre, lambda: read_fieldmap(gre))
        return cache.run(fieldmap, "distortion-gre", _with_fieldmap, acquired, motions[0], field)
    if method == "fieldmapless":
        anat = _undistorted_anatomy(unit, settings, cache, device)
        rigid = replace(settings.coregister, dof=6)
        distorted = cache.run(dwiref, "distortion-distorted", dwiref.reference_image, motions[0], None)
        start = cache.run(coregister, "coregister-distorted", _coregister, distorted, anat, "", rigid)
        correct_alone = partial(_without_fieldmap, device, unit.runs[0].axis)
        return cache.run(fieldmapless, "distortion-fieldmapless", correct_alone, acquired, motions[0], anat, start)
    correct, how = partial(_distortion, device, cache.folder), [method, engine_fingerprints(settings.distortion)]
    return cache.run(distortion, "distortion", correct, acquired, motions, how, settings.distortion)


def _with_fieldmap(acquired: Acquired, moved: Motion, field: RawFieldmap) -> Distortion:
    reference, grid = moved.dwiref.data[None], acquired.dwi.grid
    return fieldmap.correct_with_fieldmap(acquired.blips[0], reference, grid, moved.mask, field)


def _undistorted_anatomy(unit: Unit, settings: Settings, cache: Cache, device: torch.device) -> CachedResult[Anatomy]:
    """The structural image that replaces a fieldmap; a mask given by the user applies to the other image."""
    modality, wanted = choose_structural(unit, settings), settings.anatomy
    if modality != wanted.modality:
        wanted = replace(wanted, modality=modality, mask="")
    return prepare_anatomy(unit, replace(settings, anatomy=wanted), cache, device)


def _without_fieldmap(
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


def _denoise(device: torch.device, acquired: Acquired, settings: DenoiseSettings) -> Denoised:
    return with_cpu_fallback(
        lambda dwi, mask: denoise.denoise(dwi, mask, settings), device, (acquired.dwi, acquired.mask)
    )


def _motion(device: torch.device, acquired: Acquired, blip: int, settings: MotionSettings) -> Motion:
    """Motion is estimated on the series as acquired: denoised volumes would carry anatomy into each other."""
    chosen, pe = acquired.dwi.blip == blip, acquired.blips[blip].pe
    moved = with_cpu_fallback(
        lambda dwi, mask: motion.estimate_motion(dwi, mask, settings, pe, acquired.multiband, acquired.slice_axis),
        device,
        (acquired.dwi.select(chosen), acquired.mask),
    )
    return replace(moved, volumes=np.flatnonzero(chosen))


def _distortion(
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


def _check_axis(acquired: Acquired, motions: tuple[Motion, ...]) -> AxisCheck:
    return axis_check.check_axis(acquired.blips, _aligned_b0s(acquired, motions), acquired.dwi.grid, motions[0].mask)


def _aligned_b0s(acquired: Acquired, motions: tuple[Motion, ...]) -> tuple[torch.Tensor, ...]:
    """Aligned b=0 volumes of each blip, (m, i, j, k)."""
    aligned = {int(acquired.dwi.blip[moved.volumes[0]]): moved.dwiref.data[None] for moved in motions}
    return tuple(aligned.get(b, blip.epis) for b, blip in enumerate(acquired.blips))


def _anatomy(
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


def _anatomy_from_b0(
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


def _reference(
    cache: Cache, moved: CachedResult[Motion], corrected: CachedResult[Distortion | None]
) -> CachedResult[Reference]:
    return cache.run(dwiref, "distortion-dwiref", dwiref.reference_image, moved, corrected)


def _coregister(
    reference: Reference, anatomical: Anatomy, target_unit: str, settings: CoregisterSettings
) -> Coregistration:
    return coregister.coregister(reference.dwiref, reference.mask, anatomical, settings, target_unit)


def _resample(
    device: torch.device,
    denoised: Denoised,
    aligned: tuple[tuple[Motion, ...], Distortion | None, Coregistration, Anatomy],
    settings: ResampleSettings,
    denoising: DenoiseSettings,
) -> Preprocessed:
    moved = tuple(denoise.without_floor(motion, denoised) for motion in aligned[0])
    return with_cpu_fallback(
        lambda dwi: resample.resample(dwi, moved, *aligned[1:], settings, denoising.biascorrect),
        device,
        (denoised.dwi,),
    )


def join_units(name: str, parts: list[UnitResults]) -> Joined:
    """Join finished units of one session into one series in ACPC space.

    Parameters
    ----------
    name : str
        Prefix of the output.
    parts : list of UnitResults
        Units that share a structural image and settings.
    """
    settings, anatomical = parts[0].settings, parts[0].anatomy
    series = tuple(part.preprocessed for part in parts)
    asked = tuple(part.acquired.dwi for part in parts)
    merge = settings.resample.merge
    together = resample.join(series, asked, anatomical, merge, settings.acquisition.harmonize_b0)
    model = parts[0].motions[0].model
    found, runs = tuple(part.quality for part in parts), tuple(dwi.run for dwi in asked)
    measured = quality.measure_joined(name, found, runs, anatomical, together, model)
    files = tuple(part.unit.runs[run].image.name for part in parts for run in part.acquired.dwi.run)
    return Joined(name, tuple(part.unit.name for part in parts), merge, files, together, measured, model)
