"""What is going to be done with a unit, and why: choices that cost nothing, made before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from dsiprep.data.acquisition import SamplingScheme, Unit
from dsiprep.data.results import Acquired
from dsiprep.engines.selection import engines_for
from dsiprep.errors import SettingsError
from dsiprep.io.templates import load_template
from dsiprep.io.user_mask import find_mask
from dsiprep.settings import Settings
from dsiprep.stages import motion

__all__ = ["check_anatomy", "choose_distortion", "choose_lead", "choose_structural", "plan_stages"]

log = logging.getLogger("dsiprep")


def choose_lead(unit: Unit, units: Sequence[Unit], settings: Settings) -> Unit:
    """The unit whose b=0 reference stands in for the structural image that `unit` lacks.

    It is the same for all units of a subject, or, sessionwise, of a session: the first whose distortion can be
    corrected, or else the first.

    Parameters
    ----------
    unit : Unit
    units : sequence of Unit
        Those that are processed, of this subject and perhaps of others.
    settings : Settings
    """
    sessionwise = settings.anatomy.reference == "sessionwise"
    alike = [
        other for other in units if other.subject == unit.subject and (not sessionwise or other.session == unit.session)
    ]
    if settings.distortion.method != "none":
        alike.sort(key=lambda other: not (other.reversed_pairs() or other.gre))
    return alike[0] if alike else unit


def check_anatomy(units: Sequence[Unit], settings: Settings) -> None:
    """Find template and masks before anything long is begun; a template asked for by name is fetched if need be.

    Raises
    ------
    InputError
        If one is not to be had.
    SettingsError
        If one mask is to serve several subjects.
    """
    wanted = settings.anatomy
    if wanted.mask and len({unit.subject for unit in units}) > 1 and Path(wanted.mask).is_file():
        raise SettingsError(
            f"--anat-mask {wanted.mask}: one mask for several subjects; put {{subject}} in place of the label, give a "
            "folder of derivatives, or choose the subject with --participant-label"
        )
    note = load_template(wanted.template, wanted.modality, allow_network=bool(wanted.template)).note
    if note and wanted.normalize and any(unit.structural(wanted.modality) for unit in units):
        log.warning(note)
    for unit in units:
        if unit.structural(wanted.modality):
            find_mask(unit, wanted)


def choose_structural(unit: Unit, settings: Settings) -> str:
    """Modality of the structural image whose tissues stand in for a fieldmap; empty where none is to."""
    wanted = settings.distortion.anat_reference
    modality = {"auto": settings.anatomy.modality, "invt1w": "T1w", "t2w": "T2w"}.get(wanted, "none")
    return modality if unit.structural(modality) else ""


def choose_distortion(unit: Unit, acquired: Acquired, settings: Settings) -> tuple[str, str]:
    """The method for these blips, and why, in a sentence."""
    if settings.distortion.method == "none":
        return "none", "Distortion is not corrected: it was switched off."
    if len(acquired.blips) > 1:
        directions = " and ".join(blip.pe.direction for blip in acquired.blips if blip.pe)
        return "drbuddi", f"Blip-up/blip-down correction of phase encodings {directions} (the DRBUDDI model)."
    pe, chosen = acquired.blips[0].pe, choose_structural(unit, settings)
    if pe is None and chosen and unit.runs[0].axis is not None:
        return "fieldmapless", (
            f"The tissues of the {chosen} correct phase encoding along {'ijk'[unit.runs[0].axis]}, whose sign the "
            "sidecars do not tell."
        )
    if pe is None:
        return "none", "Distortion is not corrected: the sidecars do not tell the sign of the phase encoding."
    alone = f"there are no images with phase encoding opposite to {pe.direction}"
    if unit.gre and pe.readout_time is not None:
        return "gre", f"A gradient-echo fieldmap ({unit.gre.kind}) corrects phase encoding {pe.direction}: {alone}."
    if unit.gre:
        alone = f"the GRE fieldmap needs TotalReadoutTime of the DWI, and {alone}"
    if chosen:
        return "fieldmapless", f"The tissues of the {chosen} correct phase encoding {pe.direction}: {alone}."
    return "none", f"Distortion is not corrected: {alone}."


def plan_stages(unit: Unit, scheme: SamplingScheme | None, settings: Settings, lead: Unit) -> dict[str, str]:
    """What each stage would do for a unit, and why; nothing is computed. `lead` as `choose_lead` gives it."""
    images = unit.structural(settings.anatomy.modality)
    b0_way = "not needed" if lead.name == unit.name else f"its b=0 reference to that of {lead.name}"
    if settings.distortion.method == "none":
        susceptibility = "none: switched off"
    elif unit.reversed_pairs():
        susceptibility = "drbuddi: there are opposite phase encodings, " + " and ".join(unit.reversed_pairs())
    elif unit.gre:
        susceptibility = f"gre: a gradient-echo fieldmap ({unit.gre.kind}) goes with the series"
    elif (chosen := choose_structural(unit, settings)) and unit.runs[0].axis is not None:
        susceptibility = f"fieldmapless: no fieldmap, so the tissues of the {chosen} tell"
    else:
        susceptibility = "none: no opposite phase encodings (see the notes)"
    engines = engines_for(unit, settings)
    return {
        **({"engines": ", ".join(engines) + ": checked before anything is begun"} if engines else {}),
        "denoise": f"{settings.denoise.method}, unringing {settings.denoise.unringing}",
        "motion": motion.explain_model(scheme, settings.motion) if scheme else "the b-table cannot be read",
        "distortion": susceptibility,
        "anatomy": (
            f"{len(images)} {settings.anatomy.modality} image{'s' if len(images) > 1 else ''}: "
            f"{'N4, ' if settings.anatomy.biascorrect == 'n4' else ''}brain mask, ACPC, "
            + ("template" if settings.anatomy.normalize else "no template (switched off)")
            if images
            else f"none: the b=0 reference of {lead.name} is rotated to the template's axes"
        ),
        "coregister": f"{settings.coregister.dof} degrees of freedom" if images else b0_way,
        "resample": f"one cubic B-spline interpolation at {settings.resample.resolution:g} mm, "
        f"bias correction {settings.denoise.biascorrect}",
    }
