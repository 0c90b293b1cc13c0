"""The preprocessing pipeline: all stages in order. Start here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dsiprep import stage_calls as call
from dsiprep.cache import Cache, CachedResult
from dsiprep.data.acquisition import Unit
from dsiprep.data.dwi import DWI
from dsiprep.data.gradient_coil import GradientNonlinearity
from dsiprep.data.qspace import GradientCheck, Lattice
from dsiprep.data.results import (
    Acquired,
    Anatomy,
    Distortion,
    Motion,
    MovingField,
    Preprocessed,
    Reference,
    UnitResults,
)
from dsiprep.engines.selection import check_engines, engine_fingerprints
from dsiprep.io import fieldmaps, gradient_coefficients, nifti, q_grid_table, templates, unit_reader
from dsiprep.io.bids import read_unit
from dsiprep.io.fieldmaps import read_fieldmap
from dsiprep.io.gradient_coefficients import read_coil_fields
from dsiprep.io.gradients import fsl_axes
from dsiprep.io.nifti import read_volume
from dsiprep.io.q_grid_table import read_q_grid
from dsiprep.io.scanner_corrections import corrections_of
from dsiprep.io.templates import load_template
from dsiprep.io.unit_check import check_unit
from dsiprep.io.user_mask import find_mask
from dsiprep.plan import (
    AXIS_CONTRADICTED,
    choose_distortion,
    choose_structural,
    doubt_axis,
    warnings_for,
)
from dsiprep.settings import Settings, UnringingSettings
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
    gradient_check,
    gradient_nonlinearity,
    lattice,
    motion,
    moving_field,
    quality,
    resample,
    slice_motion,
    unringing,
)

STEPS = (
    "acquisition",
    "gradients",
    "denoise",
    "unringing",
    "motion",
    "distortion",
    "slices",
    "anatomy",
    "coregister",
    "resample",
    "lattice",
    "quality",
)


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
    acquired, checked = _acquire(unit, settings, cache)
    denoised = cache.run(denoise, "denoise", partial(call.denoise_series, on), acquired, settings.denoise)
    unringed = cache.run(
        unringing, "unringing", partial(call.unring_series, on), acquired, denoised, settings.unringing
    )
    motions, corrected, reason, doubt = _undistort(unit, settings, cache, on, acquired)
    motions, moving = _follow_field(unit, settings, cache, on, acquired, motions, corrected)
    reference = _reference(cache, motions[0], corrected)
    leading, target_unit = _leading_reference(unit, lead, settings, cache, on, reference)
    anatomical = prepare_anatomy(unit, settings, cache, on, leading)
    register = call.register_to_structural
    coregistered = cache.run(
        coregister, "coregister", register, reference, anatomical, target_unit, settings.coregister
    )
    aligned, final = (motions, corrected, coregistered, anatomical), partial(call.resample_series, on)
    warp = _nonlinearity(unit, settings, cache)
    options = (settings.resample, settings.denoise, warp, moving)
    preprocessed = cache.run(resample, "resample", final, denoised, unringed, aligned, *options)
    on_lattice = None if unit.output else _evaluate_lattice(cache, acquired, preprocessed, settings)
    before = cache.run(quality, "quality-acquired", quality.measure_acquired, acquired, denoised, motions)
    measure = quality.measure_quality
    measured = cache.run(quality, "quality", measure, unit.name, acquired, denoised, *aligned, preprocessed, before)
    return UnitResults(
        unit=unit,
        settings=settings,
        acquired=acquired.value,
        denoised=denoised.value,
        unringed=unringed.value,
        motions=tuple(kept.value for kept in motions),
        distortion=corrected.value,
        distortion_reason=reason,
        anatomy=anatomical.value,
        coregistration=coregistered.value,
        preprocessed=preprocessed.value,
        quality=measured.value,
        seconds=dict(cache.seconds),
        device=str(on),
        warnings=(
            *warnings_for(unit, settings, corrected.value is not None, doubt),
            *(gradient_check.doubt_gradients(checked) if checked else ()),
        ),
        gradients=checked,
        lattice=on_lattice,
        nonlinearity=warp.value if warp else None,
        moving_field=moving.value if moving else None,
    )


def _leading_reference(
    unit: Unit,
    lead: Unit | None,
    settings: Settings,
    cache: Cache,
    device: torch.device,
    reference: CachedResult[Reference],
) -> tuple[CachedResult[Reference], str]:
    """The b=0 reference that replaces a missing structural image, and the name of its unit if that is another one."""
    if lead is None or lead.name == unit.name or unit.structural(settings.anatomy.modality):
        return reference, ""
    other = cache.for_other_unit()
    motions, corrected, *_ = _undistort(lead, settings, other, device, _acquire(lead, settings, other)[0])
    return _reference(other, motions[0], corrected), lead.output or lead.name


def _acquire(unit: Unit, settings: Settings, cache: Cache) -> tuple[CachedResult[Acquired], GradientCheck | None]:
    """The conformed series, its b-vectors corrected if asked for and found wrong, and how they fit the brain."""
    check_unit(unit, settings)
    raw = cache.files(
        unit_reader, unit.files(), [unit.sidecar_fields(), settings.acquisition], lambda: read_unit(unit, settings)
    )
    ringing = settings.unringing if unit.epis else UnringingSettings("none")  # of the series, a later stage's affair
    acquired = cache.run(acquisition, "acquisition", acquisition.conform, raw, settings.acquisition, ringing)
    if settings.gradients.check == "off":
        return acquired, None
    found = cache.run(gradient_check, "gradients", _check_gradients, acquired)
    check = found.value
    if settings.gradients.check == "warn" or not check.remedy:
        return acquired, check
    corrected = cache.derive(gradient_check.with_corrected_gradients, acquired, found)
    return corrected, replace(check, corrected=True)


def _check_gradients(acquired: Acquired) -> GradientCheck:
    return gradient_check.check_gradients(acquired, fsl_axes(acquired.dwi.grid))


def _nonlinearity(unit: Unit, settings: Settings, cache: Cache) -> CachedResult[GradientNonlinearity] | None:
    """Gradient nonlinearity of a unit's images; None without coefficients."""
    chosen = settings.nonlinearity
    if not chosen.coefficients:
        return None
    path, done = Path(chosen.coefficients), corrections_of(unit, settings.anatomy.modality, chosen.scanner)
    return cache.files(gradient_coefficients, (path,), done, lambda: GradientNonlinearity(read_coil_fields(path), done))


def _straighten(
    unit: Unit, settings: Settings, cache: Cache, device: torch.device, acquired: CachedResult[Acquired]
) -> tuple[CachedResult[Acquired], CachedResult[DWI]]:
    """Images from which motion and distortion are estimated: without gradient nonlinearity, b=0 unringed."""
    b0s = cache.run(unringing, "unringing-b0", unringing.unring_b0, acquired, settings.unringing)
    nonlinearity = _nonlinearity(unit, settings, cache)
    if nonlinearity is None:
        return acquired, b0s
    straight = partial(call.straighten_series, device)
    return (
        cache.run(gradient_nonlinearity, "nonlinearity", straight, acquired, nonlinearity),
        cache.run(gradient_nonlinearity, "nonlinearity-b0", gradient_nonlinearity.straighten_b0s, b0s, nonlinearity),
    )


def _undistort(
    unit: Unit, settings: Settings, cache: Cache, device: torch.device, acquired: CachedResult[Acquired]
) -> tuple[tuple[CachedResult[Motion], ...], CachedResult[Distortion | None], str, str]:
    """Motion of each blip, the distortion, why it is corrected in that way, and why it is not in spite of a pair."""
    acquired, b0s = _straighten(unit, settings, cache, device, acquired)
    motions = tuple(
        cache.run(
            motion,
            f"motion-{blip.name}",
            partial(call.estimate_motion, device),
            acquired,
            b0s,
            b,
            replace(settings.motion, slices="off"),
        )
        for b, blip in enumerate(acquired.value.blips)
        if (acquired.value.dwi.blip == b).any()
    )
    method, reason = choose_distortion(unit, acquired.value, settings)
    correct = partial(_correct_distortion, unit, settings, cache, device, acquired)
    doubt, careful = "", settings.distortion.method == "auto"
    if method == "drbuddi" and careful:
        doubt = doubt_axis(cache.run(axis_check, "distortion-axis", call.check_axis, acquired, motions).value)
    corrected = correct(motions, "none" if doubt else method)
    if method == "gre" and careful and corrected.value is not None:
        doubt = corrected.value.doubt
        corrected = correct(motions, "none") if doubt else corrected
    if slice_motion.follows_slices(acquired.value, settings.motion):
        motions = tuple(_follow_slices(cache, acquired, b0s, kept, corrected, settings) for kept in motions)
        if corrected.value is not None and any(slice_motion.moves_b0(acquired.value, kept.value) for kept in motions):
            corrected = correct(motions, method)
    return motions, corrected, AXIS_CONTRADICTED if doubt else reason, doubt


def _follow_slices(
    cache: Cache,
    acquired: CachedResult[Acquired],
    b0s: CachedResult[DWI],
    kept: CachedResult[Motion],
    corrected: CachedResult[Distortion | None],
    settings: Settings,
) -> CachedResult[Motion]:
    """Motion within the volumes of a blip, of whose motion between volumes the distortion was estimated."""
    name = acquired.value.blips[int(acquired.value.dwi.blip[kept.value.volumes[0]])].name
    follow = call.follow_slices
    return cache.run(slice_motion, f"slices-{name}", follow, acquired, b0s, kept, corrected, settings.motion)


def _follow_field(
    unit: Unit,
    settings: Settings,
    cache: Cache,
    device: torch.device,
    acquired: CachedResult[Acquired],
    motions: tuple[CachedResult[Motion], ...],
    corrected: CachedResult[Distortion | None],
) -> tuple[tuple[CachedResult[Motion], ...], CachedResult[MovingField] | None]:
    """Poses that go with the change of the field with the head, and that change; None if it is off."""
    if settings.moving_field.method == "off":
        return motions, None
    straight, b0s = _straighten(unit, settings, cache, device, acquired)
    inputs, options = (straight, b0s, motions, corrected), (settings.moving_field.method, settings.motion.model)
    found = cache.run(moving_field, "distortion-moving", moving_field.follow_field, *inputs, *options)
    return tuple(cache.derive(moving_field.with_poses, kept, found) for kept in motions), found


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
        if nonlinearity := _nonlinearity(unit, settings, cache):
            straight = gradient_nonlinearity.straighten_structural
            images = cache.run(gradient_nonlinearity, "nonlinearity-anat", straight, images, nonlinearity)
            mask = cache.derive(gradient_nonlinearity.straighten_mask, mask, nonlinearity)
        prepare, by = (
            partial(call.prepare_structural, device, cache.folder),
            engine_fingerprints(settings.anatomy),
        )
        return cache.run(anatomy, "anatomy", prepare, images, template, mask, by, settings.anatomy)
    prepare = partial(call.prepare_from_b0, device)
    return cache.run(anatomy, "anatomy-b0", prepare, reference, template, settings.anatomy)


def _correct_distortion(
    unit: Unit,
    settings: Settings,
    cache: Cache,
    device: torch.device,
    acquired: CachedResult[Acquired],
    motions: tuple[CachedResult[Motion], ...],
    method: str,
) -> CachedResult[Distortion | None]:
    if method == "gre" and unit.gre:
        gre = unit.gre
        field = cache.files(fieldmaps, gre.files(), gre, lambda: read_fieldmap(gre))
        if nonlinearity := _nonlinearity(unit, settings, cache):
            field = cache.derive(gradient_nonlinearity.straighten_fieldmap, field, nonlinearity)
        return cache.run(fieldmap, "distortion-gre", call.correct_with_fieldmap, acquired, motions[0], field)
    if method == "fieldmapless":
        anat = _undistorted_anatomy(unit, settings, cache, device)
        rigid = replace(settings.coregister, dof=6)
        distorted = cache.run(dwiref, "distortion-distorted", dwiref.reference_image, motions[0], None)
        start = cache.run(coregister, "coregister-distorted", call.register_to_structural, distorted, anat, "", rigid)
        correct_alone = partial(call.correct_without_fieldmap, device, unit.runs[0].axis)
        return cache.run(fieldmapless, "distortion-fieldmapless", correct_alone, acquired, motions[0], anat, start)
    correct, how = (
        partial(call.correct_distortion, device, cache.folder),
        [method, engine_fingerprints(settings.distortion)],
    )
    return cache.run(distortion, "distortion", correct, acquired, motions, how, settings.distortion)


def _undistorted_anatomy(unit: Unit, settings: Settings, cache: Cache, device: torch.device) -> CachedResult[Anatomy]:
    """The structural image that replaces a fieldmap; a mask given by the user applies to the other image."""
    modality, wanted = choose_structural(unit, settings), settings.anatomy
    if modality != wanted.modality:
        wanted = replace(wanted, modality=modality, mask="")
    return prepare_anatomy(unit, replace(settings, anatomy=wanted), cache, device)


def _reference(
    cache: Cache, moved: CachedResult[Motion], corrected: CachedResult[Distortion | None]
) -> CachedResult[Reference]:
    return cache.run(dwiref, "dwiref", dwiref.reference_image, moved, corrected)


def _evaluate_lattice(
    cache: Cache, acquired: CachedResult[Acquired], preprocessed: CachedResult[Preprocessed], settings: Settings
) -> Lattice | None:
    grid = settings.lattice.grid
    if grid == "none":
        return None
    table = read_q_grid(grid)
    points = cache.files(q_grid_table, (Path(grid),) if table else (), grid, lambda: table)
    return cache.run(lattice, "lattice", lattice.evaluate_lattice, preprocessed, acquired, grid, points).value
