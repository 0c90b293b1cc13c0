"""The way from raw data to results: the stages in order. Read this page first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dsiprep.cache import Cache, Kept
from dsiprep.data.acquisition import SamplingScheme, Unit
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
    UnitResults,
)
from dsiprep.data.template import Template
from dsiprep.device import with_cpu_fallback
from dsiprep.engines import unpile
from dsiprep.io.bids import read_unit, require_files
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.nifti import read_volume
from dsiprep.io.templates import load_template
from dsiprep.ops.mask import brain_mask_b0
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
    coregister,
    denoise,
    distortion,
    fieldmap,
    motion,
    quality,
    resample,
)

STEPS = ("acquisition", "denoise", "motion", "distortion", "anatomy", "coregister", "resample", "quality")
T = TypeVar("T")


def preprocess(
    unit: Unit, settings: Settings, cache: Cache | None = None, device: torch.device | str = "cpu"
) -> UnitResults:
    """One unit from raw data to results.

    Parameters
    ----------
    unit : Unit
        From `dsiprep.io.bids.find_units`.
    settings : Settings
    cache : Cache, optional
        Where results of stages are kept and found; in memory by default.
    device : torch.device or str
        Where tensors are worked on.

    Returns
    -------
    UnitResults

    Raises
    ------
    InputError
        If the data cannot be used; the message says what to do.
    """
    cache = cache or Cache(None)
    on = torch.device(device)
    _require(unit, settings, cache)
    raw = cache.files(unit.files(), [unit.facts(), settings.acquisition], lambda: read_unit(unit, settings))
    acquired = cache.run(acquisition, "acquisition", acquisition.conform, raw, settings.acquisition)
    denoised = cache.run(denoise, "denoise", partial(_denoise, on), acquired, settings.denoise)
    motions = tuple(
        cache.run(motion, f"motion-{blip.name}", partial(_motion, on), acquired, b, settings.motion)
        for b, blip in enumerate(acquired.value.blips)
        if (acquired.value.dwi.blip == b).any()
    )
    method, reason = choose_distortion(unit, acquired.value, settings.distortion)
    corrected = _correct_distortion(unit, settings, cache, on, (acquired, motions), method)
    anatomical = prepare_anatomy(unit, settings, cache, on, (motions[0], corrected))
    coregistered = cache.run(
        coregister, "coregister", _coregister, motions[0], corrected, anatomical, settings.coregister
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
    )


def _require(unit: Unit, settings: Settings, cache: Cache) -> None:
    """Files that can be read, and the program that these settings ask for, before anything long is begun."""
    require_files(unit)
    needed = choose_structural(unit, settings.distortion) and not (unit.reversed_pairs() or unit.gre)
    if needed and not cache.only_found:
        unpile.check()


def prepare_anatomy(
    unit: Unit,
    settings: Settings,
    cache: Cache,
    device: torch.device,
    reference: tuple[Kept[Motion], Kept[Distortion | None]] | None = None,
) -> Kept[Anatomy]:
    """The structural image of a unit; where it has none, the b=0 reference of `reference` stands in."""
    template = load_template()
    if unit.t1w and settings.anatomy.modality == "T1w":
        images = cache.files(unit.t1w, "T1w", lambda: tuple(read_volume(path) for path in unit.t1w))
        prepare = partial(_anatomy, device, template)
        return cache.run(anatomy, "anatomy", prepare, images, template.name, settings.anatomy)
    prepare = partial(_anatomy_from_b0, device, template)
    return cache.run(anatomy, "anatomy-b0", prepare, reference, template.name, settings.anatomy)


def choose_distortion(unit: Unit, acquired: Acquired, settings: DistortionSettings) -> tuple[str, str]:
    """The method for these blips, and why, in a sentence."""
    if settings.method == "none":
        return "none", "Distortion is not corrected: it was switched off."
    if len(acquired.blips) > 1:
        directions = " and ".join(blip.pe.direction for blip in acquired.blips if blip.pe)
        return "drbuddi", f"Blip-up/blip-down correction of phase encodings {directions} (the DRBUDDI model)."
    pe = acquired.blips[0].pe
    if pe is None:
        return "none", "Distortion is not corrected: the sidecars do not tell the sign of the phase encoding."
    alone = f"there are no images with phase encoding opposite to {pe.direction}"
    if unit.gre and pe.readout_time is not None:
        return "gre", f"A gradient-echo fieldmap ({unit.gre.kind}) corrects phase encoding {pe.direction}: {alone}."
    if unit.gre:
        alone = f"the GRE fieldmap needs TotalReadoutTime of the DWI, and {alone}"
    chosen = choose_structural(unit, settings)
    if chosen and pe.readout_time is not None:
        kind = "T1w, its contrast inverted" if chosen[1] else "T2w"
        return "unpile", f"Phase encoding {pe.direction} is corrected against the {kind}, by unpile: {alone}."
    return "none", f"Distortion is not corrected: {alone}."


def choose_structural(unit: Unit, settings: DistortionSettings) -> tuple[Path, bool] | None:
    """The structural image for fieldmap-less correction, and whether its contrast has to be inverted; None if none."""
    wanted = settings.anat_reference
    if wanted in ("auto", "t2w") and unit.t2w:
        return unit.t2w[0], False
    return (unit.t1w[0], True) if wanted in ("auto", "invt1w") and unit.t1w else None


def _correct_distortion(
    unit: Unit,
    settings: Settings,
    cache: Cache,
    device: torch.device,
    moved: tuple[Kept[Acquired], tuple[Kept[Motion], ...]],
    method: str,
) -> Kept[Distortion | None]:
    acquired, motions = moved
    if method == "gre" and unit.gre:
        gre = unit.gre
        field = cache.files(gre.files(), gre, lambda: read_fieldmap(gre))
        return cache.run(fieldmap, "distortion-gre", _with_fieldmap, acquired, motions[0], field)
    chosen = choose_structural(unit, settings.distortion)
    if method == "unpile" and chosen:
        structural = cache.files((chosen[0],), chosen[1], lambda: read_volume(chosen[0]))
        return cache.run(unpile, "distortion-unpile", _without_fieldmap, acquired, motions[0], structural, chosen[1])
    correct = partial(_distortion, device)
    return cache.run(distortion, "distortion", correct, acquired, motions, method, settings.distortion)


def _with_fieldmap(acquired: Acquired, moved: Motion, field: RawFieldmap) -> Distortion:
    reference, grid = moved.dwiref.data[None], acquired.dwi.grid
    return fieldmap.correct_with_fieldmap(acquired.blips[0], reference, grid, moved.mask, field)


def _without_fieldmap(acquired: Acquired, moved: Motion, structural: Volume, inverted: bool) -> Distortion:
    reference, grid = moved.dwiref.data[None], acquired.dwi.grid
    return unpile.correct_without_fieldmap(acquired.blips[0], reference, grid, moved.mask, structural, inverted)


def _denoise(device: torch.device, acquired: Acquired, settings: DenoiseSettings) -> Denoised:
    return with_cpu_fallback(
        lambda dwi, mask: denoise.denoise(dwi, mask, settings), device, (acquired.dwi, acquired.mask)
    )


def _motion(device: torch.device, acquired: Acquired, blip: int, settings: MotionSettings) -> Motion:
    """Motion is found in the series as acquired: denoising before it carries anatomy from volume to volume."""
    chosen, pe = acquired.dwi.blip == blip, acquired.blips[blip].pe
    moved = with_cpu_fallback(
        lambda dwi, mask: motion.estimate_motion(dwi, mask, settings, pe, acquired.multiband),
        device,
        (acquired.dwi.select(chosen), acquired.mask),
    )
    return replace(moved, volumes=np.flatnonzero(chosen))


def _distortion(
    device: torch.device,
    acquired: Acquired,
    motions: tuple[Motion, ...],
    method: str,
    settings: DistortionSettings,
) -> Distortion | None:
    if method == "none":
        return None
    aligned = {int(acquired.dwi.blip[moved.volumes[0]]): moved.dwiref.data[None] for moved in motions}
    b0s = tuple(aligned.get(b, blip.epis) for b, blip in enumerate(acquired.blips))
    correct: Callable[..., Distortion] = lambda *images: distortion.correct_distortion(  # noqa: E731
        acquired.blips, images, acquired.dwi.grid, motions[0].mask, settings
    )
    return with_cpu_fallback(correct, device, b0s)


def _anatomy(
    device: torch.device, template: Template, images: tuple[Volume, ...], name: str, settings: AnatomySettings
) -> Anatomy:
    return with_cpu_fallback(
        lambda *moved: anatomy.process_anatomy(moved, None, None, template, settings), device, images
    )


def _anatomy_from_b0(
    device: torch.device,
    template: Template,
    reference: tuple[Motion, Distortion | None],
    name: str,
    settings: AnatomySettings,
) -> Anatomy:
    dwiref, mask = reference_image(*reference)
    return with_cpu_fallback(
        lambda image, brain: anatomy.process_anatomy((), image, brain, template, settings), device, (dwiref, mask)
    )


def reference_image(moved: Motion, corrected: Distortion | None) -> tuple[Volume, Volume]:
    """The b=0 reference with the least distortion there is, and its brain mask."""
    if corrected is None:
        return moved.dwiref, moved.mask
    return corrected.dwiref, brain_mask_b0(corrected.dwiref)


def _coregister(
    moved: Motion, corrected: Distortion | None, anatomical: Anatomy, settings: CoregisterSettings
) -> Coregistration:
    return coregister.coregister(*reference_image(moved, corrected), anatomical, settings)


def _resample(
    device: torch.device,
    denoised: Denoised,
    aligned: tuple[tuple[Motion, ...], Distortion | None, Coregistration, Anatomy],
    settings: ResampleSettings,
    denoising: DenoiseSettings,
) -> Preprocessed:
    return with_cpu_fallback(
        lambda dwi: resample.resample(dwi, *aligned, settings, denoising.biascorrect), device, (denoised.dwi,)
    )


def join_units(name: str, parts: list[UnitResults]) -> Joined:
    """Finished units of one session as one series in ACPC space.

    Parameters
    ----------
    name : str
        Prefix of the output.
    parts : list of UnitResults
        With one structural image and one set of settings.
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


def plan_stages(unit: Unit, scheme: SamplingScheme | None, settings: Settings) -> dict[str, str]:
    """What each stage would do for a unit, and why; nothing is computed."""
    has_t1w = bool(unit.t1w) and settings.anatomy.modality == "T1w"
    if settings.distortion.method == "none":
        susceptibility = "none: switched off"
    elif unit.reversed_pairs():
        susceptibility = "drbuddi: there are opposite phase encodings, " + " and ".join(unit.reversed_pairs())
    elif unit.gre:
        susceptibility = f"gre: a gradient-echo fieldmap ({unit.gre.kind}) goes with the series"
    elif chosen := choose_structural(unit, settings.distortion):
        susceptibility = f"unpile: no fieldmap, so the b=0 goes to {chosen[0].name}"
    else:
        susceptibility = "none: no opposite phase encodings (see the notes)"
    return {
        "denoise": f"{settings.denoise.method}, unringing {settings.denoise.unringing}",
        "motion": motion.explain_model(scheme, settings.motion) if scheme else "the b-table cannot be read",
        "distortion": susceptibility,
        "anatomy": (
            f"{len(unit.t1w)} T1w image{'s' if len(unit.t1w) > 1 else ''}: N4, brain mask, ACPC, "
            + ("template" if settings.anatomy.normalize else "no template (switched off)")
            if has_t1w
            else "none: the b=0 reference is rotated to the template's axes"
        ),
        "coregister": f"{settings.coregister.dof} degrees of freedom" if has_t1w else "not needed",
        "resample": f"one cubic B-spline interpolation at {settings.resample.resolution:g} mm, "
        f"bias correction {settings.denoise.biascorrect}",
    }
