"""Group the files of a BIDS dataset into processing units.

The grouping is qsiplan's, which QSIPrep also uses; this module converts it to `Unit`s with explanatory notes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qsiplan import (
    DWIGrouping,
    FileRecord,
    PreprocUnit,
    build_grouping,
    concatenation_scheme,
    selection_for_config,
    to_preproc_units,
)
from qsiplan.validation import GroupingIssue

from dsiprep.data.acquisition import Run, Unit
from dsiprep.errors import DsiprepError, InputError, MetadataError, SettingsError
from dsiprep.io.bids_filters import Filters, check_filters, entities
from dsiprep.io.dataset_files import DatasetFiles
from dsiprep.io.fieldmap_links import with_links
from dsiprep.io.fieldmaps import gre_fieldmap, with_linked_fieldmap
from dsiprep.io.grouping_notes import Options, assign_output, grouping_notes, structural_notes, unused_fieldmaps
from dsiprep.io.nifti_header import count_volumes
from dsiprep.io.records import describe_images
from dsiprep.io.sidecars import check_readout_times, relevant_fields
from dsiprep.io.structural_choice import StructuralChoice
from dsiprep.io.subject_files import SubjectFiles, choose_references, label_warnings, without_reference_units
from dsiprep.io.unit_check import with_file_notes
from dsiprep.io.unit_reader import explain, read_unit, require_files, scheme_of
from dsiprep.io.unused_images import select_images, with_unused
from dsiprep.settings import Settings

__all__ = ["explain", "find_units", "read_unit", "require_files", "scheme_of"]

log = logging.getLogger("dsiprep")
IGNORABLE = ("fieldmaps", "t2w", "phase", "sdc", "pepolar-dwis", "shims", "fov")
SHORT_SERIES = 16
# codes of qsiplan's errors that are none here
SPLIT_BY_GRID = ("fov-oblique", "fov-grid-mismatch")
LINKED_TO_OTHER_GRIDS = ("unresolvable-b0fieldsource",)
LINKED_ANYWAY = ("estimation-shim-mismatch", "curated-pepolar-single-signature")


def find_units(
    bids_dir: Path,
    settings: Settings,
    *,
    participants: Sequence[str] | None = None,
    sessions: Sequence[str] | None = None,
    filters: Filters | None = None,
    ignore: frozenset[str] = frozenset(),
    separate_all_dwis: bool = False,
    distortion_group_merge: str = "none",
    failed: dict[str, DsiprepError] | None = None,
) -> list[Unit]:
    """Find the processing units of a dataset.

    Parameters
    ----------
    bids_dir : Path
        Root of the dataset.
    settings : Settings
        Only `acquisition.b0_threshold`, `anatomy.modality`, `anatomy.reference` and `distortion.anat_reference` are
        used.
    participants, sessions : sequence of str, optional
        Labels, with or without `sub-` and `ses-`; all by default.
    filters : dict, optional
        PyBIDS entities by kind of file ("dwi", "fmap", "t1w", "t2w"), as in a `--bids-filter-file`.
    ignore : frozenset of str
        Any of `IGNORABLE`.
    separate_all_dwis : bool
        Make each run a unit of its own; b=0 images of a run with opposite phase encoding are still used.
    distortion_group_merge : str
        QSIPrep's option: "concat", "average" or "least-squares" joins the corrected units of a session (`Unit.output`).
    failed : dict, optional
        Collects errors by subject label, so that the other subjects continue; by default, the first error is raised.

    Returns
    -------
    list of Unit
        Sorted by subject and name.

    Raises
    ------
    InputError
        If the dataset, a participant or a session does not exist, or there is nothing to process.
    MetadataError
        If a sidecar lacks required metadata or contradicts another.
    SettingsError
        If a filter or an entry of `ignore` is invalid, or outputs cannot be joined as requested.
    """
    check_filters(filters or {})
    if unknown := ignore - set(IGNORABLE):
        raise SettingsError(f"--ignore {' '.join(sorted(unknown))}: choose from {', '.join(IGNORABLE)}")
    root = Path(bids_dir)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected the root of a BIDS dataset")
    catalog = DatasetFiles(root)
    labels = _subject_labels(catalog, participants)
    session_labels = [session.removeprefix("ses-") for session in sessions] if sessions else None
    options = Options(
        frozenset(ignore), separate_all_dwis, distortion_group_merge, settings.acquisition.b0_threshold,
        settings.anatomy.modality, settings.anatomy.reference, settings.distortion.anat_reference,
    )  # fmt: skip
    units: list[Unit] = []
    for label in labels:
        try:
            units += _units_of_subject(catalog, label, session_labels, filters, options)
        except DsiprepError as error:
            if failed is None:
                raise
            failed[label] = error
        except Exception as error:  # whatever the files of one subject do to qsiplan, the others are processed
            if failed is None:
                raise
            failed[label] = InputError(
                f"sub-{label}: its files cannot be grouped ({type(error).__name__}: {error}); please report it"
            )
    if not units and not failed:
        raise InputError(_nothing_found_message(catalog, labels, session_labels, filters))
    return units


def _subject_labels(catalog: DatasetFiles, participants: Sequence[str] | None) -> list[str]:
    available = catalog.subjects()
    if not available:
        raise InputError(f"{catalog.root}: no sub-* folders; expected the root of a BIDS dataset")
    if not participants:
        return available
    requested = list(dict.fromkeys(label.removeprefix("sub-") for label in participants))
    unknown = [label for label in requested if label not in available]
    if unknown:
        shown = ", ".join(available[:20]) + (f", ... ({len(available)} in total)" if len(available) > 20 else "")
        raise InputError(f"--participant-label {' '.join(unknown)}: not in {catalog.root}; available: {shown}")
    return requested


def _nothing_found_message(
    catalog: DatasetFiles, labels: list[str], sessions: list[str] | None, filters: Filters | None
) -> str:
    subjects = f"sub-{labels[0]}" if len(labels) == 1 else f"any of {len(labels)} subjects"
    message = f"{catalog.root}: no diffusion-weighted series (dwi/*_dwi.nii.gz) for {subjects}"
    if sessions:
        available = sorted({session for label in labels for session in catalog.sessions(label)})
        found = f"available sessions: {', '.join(available)}" if available else "the dataset has no sessions"
        return f"{message} in --session-label {' '.join(sessions)}; {found}"
    if filters:
        return f"{message} matches --bids-filter-file; check its entities"
    return f"{message}; check that the dataset follows BIDS"


def _units_of_subject(
    catalog: DatasetFiles,
    label: str,
    sessions: list[str] | None,
    filters: Filters | None,
    options: Options,
) -> list[Unit]:
    images = select_images(catalog.images(label), sessions, filters, options.ignore)
    if not images.by_kind["dwi"]:
        log.warning("sub-%s: no diffusion-weighted series match the request", label)
        return []
    described = with_links(
        describe_images(catalog.root, label, images, options.b0_threshold), catalog.root, options.ignore
    )
    subject = SubjectFiles(label, described, options)
    units: list[Unit] = []
    for grouping, split in _groupings(subject, described.issues):
        units += _units_of_grouping(subject, grouping, split)
    if not options.separate_all_dwis:
        units = without_reference_units(units, SHORT_SERIES)
    noted = [with_file_notes(unit, options.b0_threshold) for unit in _with_unique_names(units)]
    return with_unused(noted, images, described, subject.left_out, options)


def _groupings(subject: SubjectFiles, issues: list[GroupingIssue]) -> list[tuple[DWIGrouping, bool]]:
    """qsiplan's grouping, or one per voxel grid (flagged True) if it would stack series of different grids."""
    whole = _group(subject, subject.records, issues)
    differing = {
        path for issue in whole.errors if issue.code in ("fov-oblique", "fov-grid-mismatch") for path in issue.files
    }
    if not differing:
        return [(whole, False)]
    series = [record for record in subject.records if record.is_dwi]
    others = [record for record in subject.records if not record.is_dwi]
    parts = [[record for record in series if record.path not in differing]]
    for record in series:
        if record.path in differing:
            _add_to_matching_part(record, parts)
    return [(_group(subject, part + others, issues, split=True), True) for part in parts if part]


def _add_to_matching_part(record: FileRecord, parts: list[list[FileRecord]]) -> None:
    """Add a series to the part with its session and grid, or start a new one; `parts[0]` is skipped."""
    for part in parts[1:]:
        first = part[0]
        comparable = record.session == first.session and record.grid and first.grid
        if comparable and first.grid.compare(record.grid) == "match":
            part.append(record)
            return
    parts.append([record])


def _group(
    subject: SubjectFiles, records: list[FileRecord], issues: list[GroupingIssue], split: bool = False
) -> DWIGrouping:
    ignore = subject.options.ignore
    grouping = build_grouping(
        records,
        subject.label,
        separate_all_dwis=subject.options.separate_all_dwis,
        ignore_fieldmaps=bool(ignore & {"fieldmaps", "sdc"}),
        ignore_pepolar_dwis="pepolar-dwis" in ignore,
        ignore_t2w="t2w" in ignore,
        ignore_shims="shims" in ignore,
        ignore_fov="fov" in ignore,
        ignore_sdc="sdc" in ignore,
        distortion_group_merge="average" if subject.options.merge == "least-squares" else subject.options.merge,
        extra_issues=issues,
    )
    _raise_errors(grouping, LINKED_ANYWAY + (LINKED_TO_OTHER_GRIDS if split else SPLIT_BY_GRID))
    return grouping


def _raise_errors(grouping: DWIGrouping, except_for: tuple[str, ...]) -> None:
    for issue in grouping.errors:
        if issue.code not in except_for:
            raise MetadataError(f"sub-{grouping.subject_id}: {issue.message}")


def _readout_notes(subject: SubjectFiles, grouping: DWIGrouping) -> dict[str, str]:
    """Notes on missing readout times, by name of the estimation; raises a MetadataError if they are inconsistent."""
    notes: dict[str, str] = {}
    for name in {estimation for estimation in grouping.application.values() if estimation}:
        estimation = grouping.estimations[name]
        known = {path: pe for path in estimation.sources if (pe := subject.encodings.get(path))}
        fmap = any(grouping.files[path].datatype == "fmap" for path in estimation.sources)
        fallback = "--ignore fieldmaps" if fmap else "--ignore pepolar-dwis"
        for axis in {pe.axis for pe in known.values()}:
            along = {Path(path).name: pe for path, pe in known.items() if pe.axis == axis}
            if len({pe.polarity for pe in along.values()}) > 1 and (note := check_readout_times(along, fallback)):
                notes[name] = note
    return notes


def _units_of_grouping(subject: SubjectFiles, grouping: DWIGrouping, split: bool) -> list[Unit]:
    readout_notes = _readout_notes(subject, grouping)
    selection = selection_for_config("shoreline", "drbuddi")
    scheme = concatenation_scheme(grouping, selection)
    output_names = list(scheme.values())
    units: list[Unit] = []
    sharing_output: dict[str, list[Unit]] = {}
    for planned in map(with_linked_fieldmap, to_preproc_units(grouping, selection)):
        output = scheme[planned.output_name]
        unit = _as_unit(subject, planned, split)
        if planned.is_pepolar and planned.estimation.b0field_id in readout_notes:
            unit = replace(unit, notes=(*unit.notes, readout_notes[planned.estimation.b0field_id]))
        if output_names.count(output) == 1:
            units.append(replace(unit, name=output))
        else:
            sharing_output.setdefault(output, []).append(unit)
    for output, members in sharing_output.items():
        units += assign_output(members, output, subject.options)
    return units


def _as_unit(subject: SubjectFiles, planned: PreprocUnit, split: bool) -> Unit:
    session, ignore = planned.dwi_records[0].session, subject.options.ignore
    _require_directions(subject, planned)
    runs, short = _runs_and_references(subject, planned)
    gre = None if ignore & {"fieldmaps", "sdc"} else gre_fieldmap(planned)
    choice = choose_references(subject, planned, runs, gre is not None)
    is_pair = bool(choice.epis) or len({run.pe.direction for run in runs if run.pe}) > 1
    t1w, t2w = (subject.structural(suffix, session) for suffix in ("T1w", "T2w"))
    modality, suffixes = subject.options.modality, {record.suffix for record in subject.records if record.is_anat}
    chosen = {"T1w": t1w, "T2w": t2w}.get(modality, StructuralChoice((), {}))
    members = [*(run.image for run in runs), *(epi.image for epi in choice.epis), *chosen.images]
    notes = grouping_notes(planned, ignore, short, split, is_pair) + list(choice.notes)
    notes += [note for path in members for note in subject.notes.get(str(path), ())]
    notes += [*chosen.notes, *structural_notes(modality, session, chosen.images, suffixes)]
    return Unit(
        subject.label,
        session,
        planned.output_name,
        runs,
        choice.epis,
        t1w.images,
        t2w.images,
        tuple(dict.fromkeys(notes)),
        None if is_pair else gre,
        warnings=label_warnings(subject, session),
        rejected_fieldmaps=() if is_pair or "sdc" in ignore else choice.unused + unused_fieldmaps(planned, ignore),
    )


def _require_directions(subject: SubjectFiles, planned: PreprocUnit) -> None:
    """Raise a MetadataError for an EPI fieldmap that is linked to these series but lacks its direction."""
    for path in planned.dwi_files:
        linked = planned.grouping.application.get(path)
        for source in planned.grouping.estimations[linked].sources if linked else ():
            record = planned.grouping.files[source]
            if record.is_epi_like and not record.is_dwi and subject.encodings.get(source) is None:
                raise MetadataError(
                    f"{source}: no PhaseEncodingDirection in its sidecar, but it is linked to "
                    f"{Path(path).name} as a fieldmap; add the field, or run with --ignore fieldmaps"
                )


def _runs_and_references(subject: SubjectFiles, planned: PreprocUnit) -> tuple[tuple[Run, ...], list[str]]:
    """Runs to process, and names of short series that serve only to estimate the distortion."""
    lengths = {path: count_volumes(Path(path), SHORT_SERIES) for path in planned.dwi_files}
    short = [path for path in planned.dwi_files if _serves_as_reference(subject, path, lengths)]
    runs = tuple(_run(subject, planned, path) for path in planned.dwi_files if path not in short)
    return runs, [Path(path).name for path in short]


def _serves_as_reference(subject: SubjectFiles, path: str, lengths: dict[str, int]) -> bool:
    """Whether a short series serves only as a b=0 reference.

    QSIPrep treats every series with fewer than 16 volumes as a fieldmap; here it must also have the opposite phase
    encoding of a series at least twice as long.
    """
    pe = subject.encodings.get(path)
    if pe is None or lengths[path] >= SHORT_SERIES:
        return False
    opposite = [
        lengths[other]
        for other in lengths
        if (other_pe := subject.encodings.get(other)) and other_pe.axis == pe.axis and other_pe.polarity != pe.polarity
    ]
    return any(length >= 2 * lengths[path] for length in opposite)


def _run(subject: SubjectFiles, planned: PreprocUnit, path: str) -> Run:
    record, image = planned.grouping.files[path], Path(path)
    stem = image.name.removesuffix(".gz").removesuffix(".nii")
    tables = [
        Path(file) if file else image.with_name(f"{stem}.{kind}")
        for kind, file in (("bval", record.bval_file), ("bvec", record.bvec_file))
    ]
    names = {key: value for key, value in entities(path).items() if key != "suffix"}
    wanted, part = "phase" not in subject.options.ignore, Path(record.phase_path) if record.phase_path else None
    if part is not None and not wanted and "_part-imag" not in part.name:
        part = None
    names.pop("part", None)
    fields, pe = relevant_fields(record.metadata), subject.encodings.get(path)
    return Run(image, tables[0], tables[1], pe, names, fields, part, wanted)


def _with_unique_names(units: list[Unit]) -> list[Unit]:
    """Rename units that share a name, so that no two units write the same files."""
    units = sorted(units, key=lambda unit: unit.name)
    counts: dict[str, int] = {}
    for index, unit in enumerate(units):
        count = counts[unit.name] = counts.get(unit.name, 0) + 1
        if count > 1:
            head = f"sub-{unit.subject}" + (f"_ses-{unit.session}" if unit.session else "")
            entity_parts = [
                part for part in unit.name.removeprefix(head).split("_") if part and not part.startswith("acq-")
            ]
            acq = unit.runs[0].entities.get("acq", "")
            units[index] = replace(unit, name="_".join([head, f"acq-{acq}grid{count}", *entity_parts]))
    return units
