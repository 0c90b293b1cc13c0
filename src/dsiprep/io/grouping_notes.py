"""Why the files of a unit go together, and what is not used, in sentences."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from qsiplan import PreprocUnit, Provenance
from qsiplan.validation import GroupingIssue

from dsiprep.data.acquisition import Unit
from dsiprep.errors import SettingsError
from dsiprep.io.bids_filters import entities

# told here in other words, or about what dsiprep does not do
OWN_WORDS = frozenset({"missing-pedir", "estimation-unused", "fov-shifted", "estimation-spans-outputs"})
GRE_SUFFIXES = ("phasediff", "phase1", "fieldmap")


@dataclass(frozen=True)
class Options:
    """What decides which files go together, and which structural images serve."""

    ignore: frozenset[str]
    separate_all_dwis: bool
    merge: str
    b0_threshold: float
    modality: str
    reference: str


def joined(units: list[Unit], output: str, options: Options) -> list[Unit]:
    """The units that QSIPrep's grouping puts into one output, to be joined unless joining is off.

    Those whose distortion is not corrected stay apart: corrected and uncorrected volumes never share a file.

    Raises
    ------
    SettingsError
        If there is no structural image, hence no space that all of them share.
    """
    if options.merge == "none":
        note = "It can be joined with others of the session: --distortion-group-merge concat does."
        return [_noted(unit, note) for unit in units]
    corrected = [bool(unit.reversed_pairs() or unit.gre) for unit in units]
    if sum(corrected) < 2:
        return [
            _noted(unit, "No other output of the session is corrected, so there is none to join.") for unit in units
        ]
    for unit in units:
        if not unit.structural(options.modality):
            raise SettingsError(
                f"--distortion-group-merge {options.merge}: {unit.name} is to be joined with others, but without a "
                "structural image their spaces agree only as well as their b=0 images do; use none"
            )
    told = f"Once corrected, it is joined with others of the session (--distortion-group-merge {options.merge})."
    apart = "It is not joined with the others of the session, for its distortion is not corrected."
    return [
        replace(_noted(unit, told), output=output) if fine else _noted(unit, apart)
        for unit, fine in zip(units, corrected, strict=True)
    ]


def _noted(unit: Unit, note: str) -> Unit:
    return replace(unit, notes=(*unit.notes, note))


def reasons(planned: PreprocUnit, ignore: frozenset[str], short: list[str], split: bool) -> list[str]:
    """Sentences on one of qsiplan's units.

    Parameters
    ----------
    planned : PreprocUnit
    ignore : frozenset of str
        What was to be ignored.
    short : list of str
        Series that only serve as b=0 references.
    split : bool
        Whether series of the session were taken apart because their grids differ.
    """
    notes = [_why_together(planned, ignore)]
    if short:
        notes.append(
            f"{', '.join(short)}: under 16 volumes and reversed to a longer series, so only its b=0 volumes "
            "are used, to see the distortion."
        )
    if split:
        notes.append(
            "The series of this session differ in slice orientation, position or voxel grid, so each grid "
            "is processed by itself."
        )
    notes += _shifted(planned) + _unpaired(planned) + _gre_fieldmaps(planned, ignore)
    phases = [Path(path).name for path in planned.dwi_phase_files.values()]
    if phases and "phase" not in ignore:
        notes.append(f"{', '.join(phases)}: phase images are not used (--ignore phase silences this).")
    return notes + [_in_our_words(issue) for issue in planned.grouping.warnings if _concerns(issue, planned)]


def _why_together(planned: PreprocUnit, ignore: frozenset[str]) -> str:
    count = len(planned.dwi_files)
    series = "One run" if count == 1 else f"{count} runs"
    if "sdc" in ignore:
        return f"{series}; distortion is not looked at (--ignore sdc)."
    if not planned.is_pepolar:
        return f"{series}." if count == 1 else f"{series} of the same phase encoding, processed together."
    how = {
        Provenance.CURATED: "linked by B0FieldIdentifier and B0FieldSource",
        Provenance.TRANSLATED: "linked by IntendedFor",
    }.get(planned.estimation.provenance, "found by their PhaseEncodingDirection in the same session")
    axes = " and ".join(sorted({planned.grouping.files[path].signature.pe_dir for path in _encoded(planned)}))
    return f"{series} with images of phase encodings {axes}, {how}: together they show the distortion."


def _encoded(planned: PreprocUnit) -> list[str]:
    paths = {*planned.dwi_files, *planned.estimation.sources}
    return [path for path in paths if planned.grouping.files[path].signature.pe_dir]


def _shifted(planned: PreprocUnit) -> list[str]:
    grids = [record.grid for record in planned.dwi_records if record.grid]
    if all(grids[0].compare(grid) == "match" for grid in grids[1:]):
        return []
    shift = max(grids[0].shift_mm(grid) for grid in grids[1:])
    return [f"The runs' fields of view differ by up to {shift:.1f} mm; all are resampled onto the first run's grid."]


def _unpaired(planned: PreprocUnit) -> list[str]:
    linked = [planned.grouping.application.get(path) for path in planned.dwi_files]
    if planned.estimation is not None or not any(linked):
        return []
    return [
        "Images of other phase encodings are there, but none with the same axis, readout time and shim and "
        "the opposite sign, so distortion is not corrected."
    ]


def _gre_fieldmaps(planned: PreprocUnit, ignore: frozenset[str]) -> list[str]:
    if ignore & {"fieldmaps", "sdc"}:
        return []
    session = planned.dwi_records[0].session
    found = [
        record.filename
        for record in planned.grouping.files.values()
        if record.datatype == "fmap" and record.suffix in GRE_SUFFIXES and record.session in (session, None)
    ]
    if not found:
        return []
    if planned.is_gre:
        how = f"{planned.gre_suffix} of a gradient-echo scan corrects the distortion"
        return [f"{', '.join(sorted(found))}: the {how}."]
    instead = (
        "images of opposite phase encoding show the distortion better"
        if planned.is_pepolar
        else "no link leads from them to these series, so distortion is not corrected by them; add IntendedFor"
    )
    return [f"{', '.join(sorted(found))}: not used, as {instead} (--ignore fieldmaps silences this)."]


def _concerns(issue: GroupingIssue, planned: PreprocUnit) -> bool:
    if issue.code in OWN_WORDS:
        return False
    files = planned.grouping.files
    named = [files[path] for path in issue.files if path in files]
    series = {record.path for record in named if record.is_dwi}
    if series:
        return bool(series & set(planned.dwi_files))
    session = planned.dwi_records[0].session
    return not named or any(record.session in (session, None) for record in named)


def _in_our_words(issue: GroupingIssue) -> str:
    if issue.code == "reverse-pe-not-inferred":
        names = ", ".join(Path(path).name for path in issue.files)
        return (
            f"{names}: other series of this subject are linked to fieldmaps, so no pairs are guessed for "
            "this one; add B0FieldIdentifier and B0FieldSource, or IntendedFor, to pair it."
        )
    return str(issue.message).replace("QSIPrep", "dsiprep").replace("qsiprep", "dsiprep")


def structural_notes(modality: str, session: str | None, images: Sequence[Path], there: Set[str]) -> list[str]:
    """Which sessions' structural images serve a session, where that is not plain; what else could serve.

    Parameters
    ----------
    modality : str
        That was asked for: "T1w", "T2w" or "none".
    images : sequence of Path
        Of that modality, as they serve the session.
    there : set of str
        Suffixes of all structural images of the subject.
    """
    sessions = sorted({entities(path).get("ses", "") for path in images} - {""})
    if sessions and sessions != [session]:
        several = "s" if len(sessions) == 1 else ""
        names = " and ".join(f"ses-{name}" for name in sessions)
        return [f"The {modality} of {names} serve{several} all sessions of the subject, this one too."]
    if images or modality == "none":
        return []
    if modality in there:
        return [f"This session has no {modality} of its own, and sessionwise it borrows none."]
    return [
        f"There is no {modality}, but there is a {other}: --anat-modality {other} would use it."
        for other in ("T1w", "T2w")
        if other in there
    ]
