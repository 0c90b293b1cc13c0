"""Notes on why the files of a unit are processed together and which files are not used."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from qsiplan import PreprocUnit, Provenance
from qsiplan.validation import GroupingIssue

from dsiprep.data.acquisition import Unit
from dsiprep.errors import SettingsError
from dsiprep.io.bids_filters import entities

# qsiplan's warnings that are reworded below or concern steps that dsiprep does not have
REPLACED_WARNINGS = frozenset(
    {"missing-pedir", "estimation-unused", "fov-shifted", "estimation-spans-outputs", "estimation-shim-mismatch"}
)
GRE_SUFFIXES = ("phasediff", "phase1", "fieldmap")


@dataclass(frozen=True)
class Options:
    """Options that determine the grouping and the choice of structural images."""

    ignore: frozenset[str]
    separate_all_dwis: bool
    merge: str
    b0_threshold: float
    modality: str
    reference: str
    fieldmapless: str = "none"


def assign_output(units: list[Unit], output: str, options: Options) -> list[Unit]:
    """Mark the units that QSIPrep's grouping puts into one output to be joined, unless `options.merge` is "none".

    Units whose distortion is not corrected remain separate: corrected and uncorrected volumes never share a file.

    Raises
    ------
    SettingsError
        If there is no structural image to define a common space.
    """
    if options.merge == "none":
        note = "Use --distortion-group-merge concat to join this unit with others of the session."
        return [_with_note(unit, note) for unit in units]
    corrected = [bool(unit.reversed_pairs() or unit.gre) for unit in units]
    if sum(corrected) < 2:
        note = "No other unit of the session is corrected for distortion, so there is none to join."
        return [_with_note(unit, note) for unit in units]
    for unit in units:
        if not unit.structural(options.modality):
            raise SettingsError(
                f"--distortion-group-merge {options.merge}: {unit.name} cannot be joined with other units: without a "
                "structural image their spaces agree only as well as their b=0 images do; add one, or use none"
            )
    is_joined = (
        "After distortion correction, this unit is joined with others of the session "
        f"(--distortion-group-merge {options.merge})."
    )
    is_separate = "This unit is not joined with others of the session because its distortion is not corrected."
    return [
        replace(_with_note(unit, is_joined), output=output) if is_corrected else _with_note(unit, is_separate)
        for unit, is_corrected in zip(units, corrected, strict=True)
    ]


def _with_note(unit: Unit, note: str) -> Unit:
    return replace(unit, notes=(*unit.notes, note))


def grouping_notes(
    planned: PreprocUnit, ignore: frozenset[str], short: list[str], split: bool, is_pair: bool
) -> list[str]:
    """Explanatory notes on one of qsiplan's units.

    Parameters
    ----------
    planned : PreprocUnit
    ignore : frozenset of str
        As in `io.bids.find_units`.
    short : list of str
        Series that serve only as b=0 references.
    split : bool
        Whether the series of the session were separated because their voxel grids differ.
    is_pair : bool
        Whether images of two phase encodings determine the distortion.
    """
    notes = [_grouping_reason(planned, ignore)]
    notes += [
        f"{name}: fewer than 16 volumes, with phase encoding opposite to a longer series; only its b=0 volumes are "
        "used, to estimate the distortion."
        for name in short
    ]
    if split:
        notes.append(
            "The series of this session differ in slice orientation, position or voxel grid, so each grid "
            "is processed separately."
        )
    notes += _fov_shift_note(planned) + _gre_fieldmap_note(planned, ignore, is_pair)
    phases = list(planned.dwi_phase_files)
    if phases and len(phases) < len(planned.dwi_files) and "phase" not in ignore:
        alone = ", ".join(Path(path).name for path in planned.dwi_files if path not in phases)
        notes.append(f"Phase is not used: {alone} has none, and the runs are processed alike.")
    return notes + [_warning_text(issue) for issue in planned.grouping.warnings if _concerns(issue, planned)]


def _grouping_reason(planned: PreprocUnit, ignore: frozenset[str]) -> str:
    count = len(planned.dwi_files)
    series = "One run" if count == 1 else f"{count} runs"
    if "sdc" in ignore:
        return f"{series}; distortion is not corrected (--ignore sdc)."
    if not planned.is_pepolar:
        return f"{series}." if count == 1 else f"{series} with the same phase encoding, processed together."
    link = {
        Provenance.CURATED: "linked by B0FieldIdentifier and B0FieldSource",
        Provenance.TRANSLATED: "linked by IntendedFor",
    }.get(planned.estimation.provenance, "matched by PhaseEncodingDirection within the session")
    encodings = {planned.grouping.files[path].signature.pe_dir for path in _files_with_encoding(planned)}
    directions = " and ".join(sorted(encodings))
    return f"{series}; distortion is estimated from images with phase encodings {directions}, {link}."


def _files_with_encoding(planned: PreprocUnit) -> list[str]:
    paths = {*planned.dwi_files, *planned.estimation.sources}
    return [path for path in paths if planned.grouping.files[path].signature.pe_dir]


def _fov_shift_note(planned: PreprocUnit) -> list[str]:
    grids = [record.grid for record in planned.dwi_records if record.grid]
    if all(grids[0].compare(grid) == "match" for grid in grids[1:]):
        return []
    shift = max(grids[0].shift_mm(grid) for grid in grids[1:])
    return [
        f"The fields of view of the runs differ by up to {shift:.1f} mm; all are resampled onto the grid of the first."
    ]


def _gre_fieldmap_note(planned: PreprocUnit, ignore: frozenset[str], is_pair: bool) -> list[str]:
    files = _gre_fieldmaps(planned, ignore)
    if not files:
        return []
    if is_pair:
        return [
            f"{files}: not used, because images with opposite phase encoding give a better estimate of the distortion "
            "(--ignore fieldmaps hides this note)."
        ]
    if planned.is_gre:
        return [f"{files}: used as gradient-echo fieldmap to correct the distortion."]
    return [f"{text} (--ignore fieldmaps hides this note)." for text in unused_fieldmaps(planned, ignore)]


def unused_fieldmaps(planned: PreprocUnit, ignore: frozenset[str]) -> tuple[str, ...]:
    """Gradient-echo fieldmaps of the session that are not linked to the series, and how to use them."""
    files = _gre_fieldmaps(planned, ignore)
    if not files or planned.is_gre:
        return ()
    return (f"{files}: not used, because it is not linked to these series; add IntendedFor to use it",)


def _gre_fieldmaps(planned: PreprocUnit, ignore: frozenset[str]) -> str:
    """Names of the gradient-echo fieldmaps of the session."""
    if ignore & {"fieldmaps", "sdc"}:
        return ""
    session = planned.dwi_records[0].session
    names = [
        record.filename
        for record in planned.grouping.files.values()
        if record.datatype == "fmap" and record.suffix in GRE_SUFFIXES and record.session in (session, None)
    ]
    return ", ".join(sorted(names))


def _concerns(issue: GroupingIssue, planned: PreprocUnit) -> bool:
    if issue.code in REPLACED_WARNINGS:
        return False
    files = planned.grouping.files
    named = [files[path] for path in issue.files if path in files]
    series = {record.path for record in named if record.is_dwi}
    if series:
        return bool(series & set(planned.dwi_files))
    session = planned.dwi_records[0].session
    return not named or any(record.session in (session, None) for record in named)


def _warning_text(issue: GroupingIssue) -> str:
    if issue.code == "reverse-pe-not-inferred":
        names = ", ".join(Path(path).name for path in issue.files)
        return (
            f"{names}: other series of this subject are linked to fieldmaps explicitly, so this one is not paired "
            "automatically; add B0FieldIdentifier and B0FieldSource, or IntendedFor, to pair it."
        )
    return str(issue.message).replace("QSIPrep", "dsiprep").replace("qsiprep", "dsiprep")


def structural_notes(modality: str, session: str | None, images: Sequence[Path], available: Set[str]) -> list[str]:
    """Notes on structural images from other sessions, and on other modalities that could be used.

    Parameters
    ----------
    modality : str
        The requested one: "T1w", "T2w" or "none".
    session : str or None
        Label of the session that is processed.
    images : sequence of Path
        Images of that modality that are used for the session.
    available : set of str
        Suffixes of all structural images of the subject.
    """
    sessions = sorted({entities(path).get("ses", "") for path in images} - {""})
    if sessions and sessions != [session]:
        verb = "is" if len(sessions) == 1 else "are"
        names = " and ".join(f"ses-{name}" for name in sessions)
        return [f"The {modality} of {names} {verb} used for all sessions of the subject."]
    if images or modality == "none":
        return []
    if modality in available:
        return [f"This session has no {modality}; a sessionwise reference does not use images of other sessions."]
    return [
        f"There is no {modality}, but there is a {other}; use it with --anat-modality {other}."
        for other in ("T1w", "T2w")
        if other in available
    ]
