"""Choice of the processing of a unit and the reasons for it, made before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from dsiprep.data.acquisition import AxisCheck, PhaseEncoding, Run, SamplingScheme, Unit
from dsiprep.data.results import Acquired
from dsiprep.engines.selection import engines_for
from dsiprep.errors import InputError, SettingsError
from dsiprep.io.nifti_header import read_shape
from dsiprep.io.scanner_corrections import corrections_of
from dsiprep.io.sidecars import slice_times
from dsiprep.io.templates import choose_template
from dsiprep.io.user_mask import find_mask
from dsiprep.settings import Settings
from dsiprep.stages import denoise, lattice, motion, moving_field
from dsiprep.stages.slice_motion import wants_slices
from dsiprep.stages.unringing import plan_unringing

__all__ = [
    "check_anatomy",
    "choose_distortion",
    "choose_lead",
    "choose_structural",
    "doubt_axis",
    "not_done",
    "plan_distortion",
    "plan_slices",
    "plan_stages",
    "warnings_for",
]

log = logging.getLogger("dsiprep")
AXIS_CONTRADICTED = "Distortion is not corrected: the images contradict the phase-encoding axis of the sidecars."
WRONG_AXIS = 0.75  # of the misfit along the given axis; below, another axis explains the images clearly better


def choose_lead(unit: Unit, units: Sequence[Unit], settings: Settings) -> Unit:
    """Return the unit whose b=0 reference replaces the structural image that `unit` lacks.

    All units of a subject share it (of a session, if the anatomical reference is sessionwise). It is the first one
    whose distortion can be corrected, or the first one if there is none.

    Parameters
    ----------
    unit : Unit
    units : sequence of Unit
        Units that are processed, possibly of several subjects.
    settings : Settings
    """
    sessionwise = settings.anatomy.reference == "sessionwise"
    candidates = [
        other for other in units if other.subject == unit.subject and (not sessionwise or other.session == unit.session)
    ]
    if settings.distortion.method != "none":
        candidates.sort(key=lambda other: not (other.reversed_pairs() or other.gre))
    return candidates[0] if candidates else unit


def check_anatomy(units: Sequence[Unit], settings: Settings) -> str:
    """Check template and brain masks before any long computation; a missing template is downloaded if possible.

    Returns
    -------
    str
        Name of the template.

    Raises
    ------
    InputError
        If a template or mask is not available.
    SettingsError
        If a single mask file is given for several subjects.
    """
    anatomy = settings.anatomy
    if anatomy.mask and len({unit.subject for unit in units}) > 1 and Path(anatomy.mask).is_file():
        raise SettingsError(
            f"--anat-mask {anatomy.mask}: a single mask for several subjects; use {{subject}} in its path, give a "
            "folder of derivatives, or select one subject with --participant-label"
        )
    download = anatomy.normalize or bool(anatomy.template)
    template = choose_template(anatomy.template, anatomy.modality, allow_network=download)
    note = template.note
    if note and anatomy.normalize and any(unit.structural(anatomy.modality) for unit in units):
        log.warning(note)
    for unit in units:
        if unit.structural(anatomy.modality):
            find_mask(unit, anatomy)
    return template.name


def choose_structural(unit: Unit, settings: Settings) -> str:
    """Modality of the structural image used for fieldmapless distortion correction; empty if there is none."""
    reference = settings.distortion.anat_reference
    modality = {"auto": settings.anatomy.modality, "invt1w": "T1w", "t2w": "T2w"}.get(reference, "none")
    return modality if unit.structural(modality) else ""


def choose_distortion(unit: Unit, acquired: Acquired, settings: Settings) -> tuple[str, str]:
    """Return the distortion correction method for the phase encodings of a unit, and a sentence with the reason."""
    directions = [blip.pe.direction for blip in acquired.blips if blip.pe] if len(acquired.blips) > 1 else []
    return _decide_distortion(unit, directions, acquired.blips[0].pe, settings)


def _decide_distortion(
    unit: Unit, directions: Sequence[str], pe: PhaseEncoding | None, settings: Settings
) -> tuple[str, str]:
    """Method and reason; `directions` are the opposite phase encodings (empty without any), `pe` that of the runs."""
    if settings.distortion.method == "none":
        return "none", "Distortion is not corrected: the correction is disabled."
    if directions:
        return "drbuddi", (
            f"Blip-up/blip-down correction of phase encodings {' and '.join(directions)} (the DRBUDDI model)."
        )
    chosen = choose_structural(unit, settings)
    if pe is None and chosen and unit.runs[0].axis is not None:
        return "fieldmapless", (
            f"Fieldmapless correction with the tissue classes of the {chosen}, along {'ijk'[unit.runs[0].axis]}: the "
            "sidecars do not define the sign of the phase encoding."
        )
    if pe is None:
        return "none", "Distortion is not corrected: the sidecars do not define the sign of the phase encoding."
    reason = f"there are no images with phase encoding opposite to {pe.direction}"
    if unit.gre and pe.readout_time is not None:
        return "gre", f"Correction with a gradient-echo fieldmap ({unit.gre.kind}) along {pe.direction}: {reason}."
    if unit.gre:
        reason = f"the GRE fieldmap cannot be used without TotalReadoutTime of the DWI, and {reason}"
    if chosen:
        return "fieldmapless", (
            f"Fieldmapless correction with the tissue classes of the {chosen}, along {pe.direction}: {reason}."
        )
    return "none", f"Distortion is not corrected: {reason}."


def plan_distortion(unit: Unit, settings: Settings) -> tuple[str, str]:
    """Method and reason as from `choose_distortion`, before the files are read."""
    first = unit.runs[0].pe
    known = first is not None and all(run.pe is not None for run in unit.runs)
    return _decide_distortion(unit, unit.reversed_pairs() if known else (), first if known else None, settings)


def not_done(unit: Unit, settings: Settings) -> list[str]:
    """What will not be done for a unit, and why: one sentence each, besides those of `warnings_for`."""
    method, reason = plan_distortion(unit, settings)
    modality = settings.anatomy.modality
    sentences = [reason] if method == "none" and not warnings_for(unit, settings) else []
    if not unit.structural(modality):
        why = "disabled" if modality == "none" else f"there is no {modality}"
        sentences.append(f"Nothing is aligned with a structural image or normalised: {why}.")
    elif not settings.anatomy.normalize:
        sentences.append("The structural image is not normalised to a template: disabled.")
    if settings.motion.method == "none":
        sentences.append("Head motion is not corrected: disabled.")
    if settings.gradients.check == "off":
        sentences.append("The b-table is not checked against the images: disabled.")
    if settings.denoise.method == "none":
        sentences.append("Noise is not removed: disabled.")
    choices = dict.fromkeys(plan_unringing(run.k_space, settings.unringing) for run in unit.runs)
    sentences += [f"Gibbs ringing is not removed: {reason}." for chosen, reason in choices if chosen == "none"]
    return sentences


def doubt_axis(check: AxisCheck) -> str:
    """Why a pair is not corrected if its images contradict the phase-encoding axis of the sidecars; empty if not."""
    given, best = check.misfits[0], min(check.misfits)
    if best >= WRONG_AXIS * given:
        return ""
    axis, other = "ijk"[check.axes[0]], "ijk"[check.axes[check.misfits.index(best)]]
    return (
        f"Distortion is NOT corrected: the sidecars give {axis} as the phase-encoding axis, but displacements along "
        f"{other} make the images of both phase encodings agree much better (misfit {best / given:.0%}). Correct "
        "PhaseEncodingDirection, or use --sdc-method drbuddi to correct along the given axis nevertheless."
    )


def lattice_not_done(unit: Unit, scheme: SamplingScheme | None, settings: Settings) -> str:
    """Why the series will not be evaluated on a lattice although that was asked for; empty if it will."""
    if settings.lattice.grid == "none" or scheme is None or unit.output:
        return ""
    return lattice.why_not(settings.lattice.grid, scheme)


def warnings_for(unit: Unit, settings: Settings, corrected: bool | None = None, doubt: str = "") -> tuple[str, ...]:
    """What must not be overlooked about the distortion of a unit: sentences for plan, report and terminal.

    Parameters
    ----------
    unit : Unit
    settings : Settings
    corrected : bool, optional
        Whether the distortion was corrected; by default, whether it is planned.
    doubt : str
        From `doubt_axis`.
    """
    if settings.distortion.method == "none":
        return ()
    if doubt:
        return (*unit.warnings, doubt)
    if not (unit.rejected_fieldmaps or unit.gre):
        return unit.warnings
    if corrected is None:
        corrected = plan_distortion(unit, settings)[0] != "none"
    if corrected:
        return unit.warnings
    reasons = unit.rejected_fieldmaps or (
        f"{unit.gre.images[0].name if unit.gre else ''}: it needs PhaseEncodingDirection and TotalReadoutTime of the "
        "series; add them to its sidecar",
    )
    return (
        *unit.warnings,
        "Distortion is NOT corrected, although there are images that could determine it. " + "; ".join(reasons) + ".",
    )


def _is_complex(unit: Unit) -> bool:
    return all(run.complex_part is not None and run.use_phase for run in unit.runs)


def _describe_denoising(unit: Unit, settings: Settings) -> str:
    """Method, and what is done about the noise floor of magnitudes."""
    floor = "complex" if _is_complex(unit) else f"noise floor {denoise.floor_method(settings.denoise)}"
    return f"{settings.denoise.method}, {floor}"


def _describe_unringing(unit: Unit, settings: Settings) -> str:
    """Method and reason of each run, as far as the sidecars tell."""
    choices = dict.fromkeys(plan_unringing(run.k_space, settings.unringing) for run in unit.runs)
    unless = ", unless the images turn out to be interpolated" if settings.unringing.method == "auto" else ""
    return "; ".join(f"{method}: {reason}" + (unless if method != "none" else "") for method, reason in choices)


def plan_stages(
    unit: Unit, scheme: SamplingScheme | None, settings: Settings, lead: Unit, template: str = ""
) -> dict[str, str]:
    """Describe what each stage would do for a unit, without computing anything.

    Parameters
    ----------
    unit : Unit
    scheme : SamplingScheme or None
        None if the b-table cannot be read.
    settings : Settings
    lead : Unit
        Result of `choose_lead`.
    template : str
        Name from `check_anatomy`.

    Returns
    -------
    dict
        Description by stage name.
    """
    images = unit.structural(settings.anatomy.modality)
    method, reason = plan_distortion(unit, settings)
    b0_registration = "not needed" if lead.name == unit.name else f"b=0 reference to that of {lead.name}"
    engines = engines_for(unit, settings)
    return {
        **({"engines": ", ".join(engines) + ": checked before processing starts"} if engines else {}),
        **(
            {
                "gradients": "b-vectors against their 23 flips and permutations, order of volumes against b: "
                + ("wrong b-vectors are corrected" if settings.gradients.check == "fix" else "warning only")
            }
            if settings.gradients.check != "off"
            else {}
        ),
        **_nonlinearity_plan(unit, settings),
        "denoise": _describe_denoising(unit, settings),
        "unringing": _describe_unringing(unit, settings),
        "motion": motion.explain_model(scheme, settings.motion) if scheme else "the b-table cannot be read",
        "distortion": f"{method}: {reason[0].lower()}{reason[1:].rstrip('.')}",
        **({"slices": within} if (within := plan_slices(unit, settings)) else {}),
        **_moving_field_plan(settings),
        "anatomy": (
            f"{len(images)} {settings.anatomy.modality} image{'s' if len(images) > 1 else ''}: "
            f"{'N4, ' if settings.anatomy.biascorrect == 'n4' else ''}brain mask, ACPC, "
            + (f"template {template}".rstrip() if settings.anatomy.normalize else "no template (disabled)")
            if images
            else f"none: the b=0 reference of {lead.name} is rigidly registered to the template {template}".rstrip()
        ),
        "coregister": f"{settings.coregister.dof} degrees of freedom" if images else b0_registration,
        "resample": f"one cubic B-spline interpolation at {settings.resample.resolution:g} mm, "
        f"bias correction {settings.denoise.biascorrect}",
        **_lattice_plan(unit, scheme, settings),
    }


def plan_slices(unit: Unit, settings: Settings) -> str:
    """What is done about motion within volumes, before the files are read; empty if nothing is."""
    if not wants_slices(settings.motion) or not unit.runs or not all(_has_slice_times(run) for run in unit.runs):
        return ""
    every = settings.motion.slices == "on"
    return f"a pose for each shot in {'all volumes' if every else 'volumes during which the head moved'}"


def _has_slice_times(run: Run) -> bool:
    try:
        i, j, k, *_ = read_shape(run.image)
    except (InputError, ValueError):  # refused when it is read
        return False
    return bool(slice_times(run.metadata, (i, j, k)))


def _nonlinearity_plan(unit: Unit, settings: Settings) -> dict[str, str]:
    chosen = settings.nonlinearity
    if not chosen.coefficients:
        return {}
    done = corrections_of(unit, settings.anatomy.modality, chosen.scanner)
    shown = ", ".join(f"{name} {kind}" for name, kind in (("series", done.series), ("references", done.epis)))
    return {"nonlinearity": f"{Path(chosen.coefficients).name}; corrected by the scanner: {shown}"}


def _moving_field_plan(settings: Settings) -> dict[str, str]:
    if settings.moving_field.method == "off":
        return {}
    limit = f"in at least {moving_field.LEAST_TILTED} volumes by {moving_field.TILTED:g} degrees of pitch or roll"
    clear = " and the evidence is clear" if settings.moving_field.method == "auto" else ""
    return {"moving field": f"change of the field with pitch and roll, if the head turned {limit}{clear}"}


def _lattice_plan(unit: Unit, scheme: SamplingScheme | None, settings: Settings) -> dict[str, str]:
    if settings.lattice.grid == "none":
        return {}
    reason = lattice_not_done(unit, scheme, settings)
    return {"lattice": f"none: {reason}" if reason else f"the series at the points of {settings.lattice.grid}, too"}
