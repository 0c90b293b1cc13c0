"""The files of one subject with their phase encodings, and the links between series and fieldmaps."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from qsiplan import FileRecord, PreprocUnit
from qsiplan.models import READOUT_TOLERANCE

from dsiprep.data.acquisition import PhaseEncoding, Run, Unit
from dsiprep.errors import InputError, MetadataError
from dsiprep.io.bids_filters import entities
from dsiprep.io.counterparts import Choice, EpiImage, choose_counterpart, contradicted_labels
from dsiprep.io.grouping_notes import Options
from dsiprep.io.nifti_header import count_volumes, read_grid
from dsiprep.io.protocols import separate_protocols
from dsiprep.io.records import SubjectRecords
from dsiprep.io.sidecars import phase_encoding, relevant_fields
from dsiprep.io.structural_choice import StructuralChoice, choose_structural_images

__all__ = ["SubjectFiles", "choose_references", "label_warnings", "without_reference_units"]

log = logging.getLogger("dsiprep")

SAME_PROTOCOL = 0.1  # relative difference of readout times up to which opposite series are processed together


class SubjectFiles:
    """The files of one subject with their phase encodings, readout times derived where necessary.

    Parameters
    ----------
    label : str
    described : SubjectRecords
        With links.
    options : Options
    """

    def __init__(self, label: str, described: SubjectRecords, options: Options) -> None:
        self.label = label
        self.options = options
        self.encodings: dict[str, PhaseEncoding | None] = {}
        self.notes = dict(described.notes)
        self.left_out: dict[str, str] = {}
        records, protocol_notes = separate_protocols(described.records)
        self.notes |= {path: (*self.notes.get(path, ()), note) for path, note in protocol_notes.items()}
        self.records = _with_common_readouts([self._with_encoding(record) for record in records])
        self.images = self._epi_images([*self.records, *self._usable(described.references)])

    def _with_encoding(self, record: FileRecord) -> FileRecord:
        if not record.is_epi_like:
            return record
        fallback = "--ignore fieldmaps" if record.datatype == "fmap" else "--ignore sdc"
        try:
            pe, notes = phase_encoding(record.metadata, record.filename, fallback)
        except MetadataError:
            if "sdc" not in self.options.ignore:
                raise
            pe, notes = None, ()
        self.encodings[record.path] = pe
        self.notes[record.path] = (*self.notes.get(record.path, ()), *(() if "sdc" in self.options.ignore else notes))
        signature = replace(record.signature, readout_time=None)
        if pe is not None and pe.readout_time is not None:
            signature = replace(signature, readout_time=_rounded(pe.readout_time))
        if "shims" in self.options.ignore:
            signature = replace(signature, shim=None)
        return replace(record, signature=signature)

    def _usable(self, references: list[FileRecord]) -> list[FileRecord]:
        """The references with a valid sidecar; the series can be processed without them."""
        usable = []
        for record in references:
            try:
                usable.append(self._with_encoding(record))
            except MetadataError as problem:
                log.warning("%s; the image is not used for the distortion", problem)
        return usable

    def _epi_images(self, records: list[FileRecord]) -> dict[str, EpiImage]:
        """Images whose phase encoding and grid are known, by path."""
        images = {}
        for record in records:
            pe = self.encodings.get(record.path)
            if pe is None:
                continue
            try:
                grid = read_grid(Path(record.path))
            except InputError:
                continue  # reported when the file is read
            suffix, kind = entities(record.path)["suffix"], Path(record.path).parent.name
            images[record.path] = EpiImage(
                Path(record.path),
                pe,
                grid,
                "sbref" if suffix == "sbref" else kind,
                record.session,
                tuple(record.metadata.get("ShimSetting") or ()) or None,
                table_of(record),
                relevant_fields(record.metadata),
            )
        return images

    def structural(self, suffix: str, session: str | None) -> StructuralChoice:
        """The T1w or T2w images: of all sessions, or, sessionwise, of the session and those without one."""
        images = [record for record in self.records if record.is_anat and record.suffix == suffix]
        if self.options.reference == "sessionwise" and session is not None:
            images = [record for record in images if record.session in (session, None)]
        choice = choose_structural_images([(record.path, record.metadata) for record in images])
        self.left_out |= choice.left_out
        return choice

    def linked_to(self, series: tuple[str, ...]) -> set[str]:
        """EPI images that B0FieldSource or IntendedFor link to a series."""
        by_path = {record.path: record for record in self.records}
        wanted = {source for path in series for source in by_path[path].b0field_sources}
        return {
            record.path
            for record in self.records
            if record.is_epi_like
            and record.path not in series
            and (wanted & set(record.b0field_identifiers) or set(series) & set(record.intended_for))
        }

    @property
    def has_links(self) -> bool:
        """Whether any fieldmap of EPI images is linked to a series; then series are not paired without a link."""
        return any(
            record.b0field_identifiers or record.b0field_sources or (record.is_epi_like and record.intended_for)
            for record in self.records
        )


def choose_references(subject: SubjectFiles, planned: PreprocUnit, runs: tuple[Run, ...], has_gre: bool) -> Choice:
    """Images that determine the distortion of the runs of a unit together with them; none if the runs do themselves.

    A gradient-echo fieldmap is preferred to images with an orthogonal phase encoding.
    """
    ignore, session = subject.options.ignore, planned.dwi_records[0].session
    own = {str(run.image) for run in runs}
    if "sdc" in ignore or len({run.pe.direction for run in runs if run.pe}) > 1:
        return Choice()
    others = [
        image
        for path, image in subject.images.items()
        if path not in own
        and (image.session in (session, None))
        and not ("pepolar-dwis" in ignore and image.kind != "fmap")
    ]
    first = subject.images.get(str(runs[0].image))
    if first is None:
        missing = f"the sidecar of {runs[0].image.name} has no PhaseEncodingDirection; add it to use this image"
        return Choice(unused=tuple(f"{image.path.name}: {missing}" for image in others))
    paired = {path for path in planned.dwi_files if path not in own}  # short series
    if planned.is_pepolar:
        paired |= set(planned.extra_b0)
    linked = {Path(path) for path in paired | subject.linked_to(planned.dwi_files)}
    linked &= {image.path for image in others}
    choice = choose_counterpart(first, others, linked, "shims" in ignore, not subject.has_links)
    if has_gre and choice.is_orthogonal:
        return Choice()
    return choice


def without_reference_units(units: list[Unit], short: int) -> list[Unit]:
    """The units without those that consist of series with fewer than `short` volumes that only serve as references.

    Another unit that is at least twice as long uses their b=0 volumes. On the same grid, they would be part of it.
    """
    lengths = {run.image: count_volumes(run.image, short) for unit in units for run in unit.runs}
    served: dict[Path, str] = {}
    for unit in units:
        longest = max(lengths[run.image] for run in unit.runs)
        for epi in unit.epis:
            if lengths.get(epi.image, short) < short and longest >= 2 * lengths[epi.image]:
                served[epi.image] = unit.name
    kept = [unit for unit in units if not all(run.image in served for run in unit.runs)]
    return [
        replace(unit, notes=(*unit.notes, *(_short_note(epi.image) for epi in unit.epis if epi.image in served)))
        for unit in kept
    ]


def _short_note(image: Path) -> str:
    return f"{image.name}: fewer than 16 volumes; only its b=0 volumes are used, to estimate the distortion."


def label_warnings(subject: SubjectFiles, session: str | None) -> tuple[str, ...]:
    """Sentences on files of a session whose names contradict their sidecars."""
    if "sdc" in subject.options.ignore:
        return ()
    images = [image for image in subject.images.values() if image.session in (session, None)]
    return contradicted_labels([image for image in images if image.kind != "sbref"])


def table_of(record: FileRecord) -> Path | None:
    """b-values of an EPI image: those of a diffusion series also where it serves as a fieldmap."""
    if record.bval_file:
        return Path(record.bval_file)
    table = Path(record.path).with_name(record.filename.removesuffix(".gz").removesuffix(".nii") + ".bval")
    return table if table.is_file() else None


def _rounded(seconds: float) -> float:
    return round(seconds / READOUT_TOLERANCE) * READOUT_TOLERANCE


def _with_common_readouts(records: list[FileRecord]) -> list[FileRecord]:
    """Give opposite series of nearly the same readout time the same signature, so that they are grouped as a pair.

    Only series without an equal counterpart are changed. Their phase encodings keep the exact readout times.
    """
    times: dict[object, dict[int, set[float]]] = defaultdict(lambda: {1: set(), -1: set()})
    for record in records:
        signature = record.signature
        if record.is_dwi and signature.pe_polarity and signature.readout_time:
            times[_protocol(record)][signature.pe_polarity].add(signature.readout_time)
    common: dict[tuple[object, float], float] = {}
    for protocol, by_polarity in times.items():
        up, down = by_polarity[1] - by_polarity[-1], by_polarity[-1] - by_polarity[1]
        for time in sorted(down):
            nearest = min(up, key=lambda other: abs(other - time), default=None)
            if nearest and abs(nearest - time) <= SAME_PROTOCOL * time:
                common[protocol, time] = nearest
                up = up - {nearest}
    return [
        replace(record, signature=replace(record.signature, readout_time=common[_protocol(record), time]))
        if record.is_dwi
        and (time := record.signature.readout_time)
        and record.signature.pe_polarity == -1
        and (_protocol(record), time) in common
        else record
        for record in records
    ]


def _protocol(record: FileRecord) -> object:
    return record.session, record.signature.pe_axis, record.signature.shim
