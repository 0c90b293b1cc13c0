"""Describe the images of a subject to qsiplan: the `FileRecord`s from which it groups them.

qsiplan can index a dataset itself, but not one whose root has a dot, bracket or leading dot in its name, and it
stops at unusual values of one sidecar. The records are therefore made here from checked metadata; qsiplan only groups.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from qsiplan import FileRecord
from qsiplan.metadata import evaluate_shells, resolve_intended_for
from qsiplan.models import DistortionSignature, GridInfo
from qsiplan.validation import GroupingIssue

from dsiprep.errors import InputError, MetadataError
from dsiprep.io.bids_filters import entities
from dsiprep.io.dataset_files import SubjectImages
from dsiprep.io.nifti_header import read_grid
from dsiprep.io.number_tables import read_numbers
from dsiprep.io.sidecar_files import SidecarFiles
from dsiprep.io.sidecar_values import clean_metadata
from dsiprep.io.sidecars import DIRECTION

log = logging.getLogger("dsiprep")
LINKS_OF_BOTH_PARTS = ("IntendedFor", "B0FieldIdentifier")  # of the magnitude and the phase of an acquisition
LINKS_OF_EITHER_PART = ("B0FieldSource", "MultipartID")


@dataclass
class SubjectRecords:
    """Records of one subject, sorted by kind and path, qsiplan's issues with them, and notes by path.

    `references` are EPI images that qsiplan does not know, described as EPI fieldmaps.
    """

    records: list[FileRecord] = field(default_factory=list)
    references: list[FileRecord] = field(default_factory=list)
    issues: list[GroupingIssue] = field(default_factory=list)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)


def describe_images(root: Path, label: str, images: SubjectImages, b0_threshold: float) -> SubjectRecords:
    """Records of the images of a subject.

    Parameters
    ----------
    root : Path
        Root of the dataset.
    label : str
        Of the subject, without `sub-`.
    images : SubjectImages
        Images that match the request.
    b0_threshold : float
        b-values at or below this (s/mm²) count as b=0.

    Raises
    ------
    MetadataError
        If a sidecar of a series or fieldmap cannot be read, is ambiguous or links files by invalid names.
    """
    found, sidecars = SubjectRecords(), SidecarFiles(root)
    series, primaries = set(images.by_kind["dwi"]), {phase: magnitude for magnitude, phase in images.phases.items()}
    for datatype, kinds in (("dwi", ("dwi",)), ("fmap", ("fmap",)), ("anat", ("t1w", "t2w"))):
        for path in sorted(path for kind in kinds for path in images.by_kind[kind]):
            fields, notes = _metadata(sidecars, path, datatype, images.phases.get(path))
            found.notes[path] = (*notes, *((images.notes[path],) if path in images.notes else ()))
            record = _record(path, datatype, fields, images.phases.get(path))
            if datatype == "dwi":
                record = _with_tables(record, sidecars, b0_threshold)
            if datatype == "fmap":  # for its issues; `fieldmap_links` finds the series
                resolve_intended_for(
                    tuple(fields.get("IntendedFor", ())), path, str(root), label, series, found.issues, primaries
                )
            found.records.append(record)
    for path in images.by_kind["reference"]:
        try:
            fields, found.notes[path] = _metadata(sidecars, path, "fmap", images.phases.get(path))
        except MetadataError as problem:  # the series can be processed without it
            log.warning("%s; the image is not used for the distortion", problem)
        else:
            found.references.append(replace(_record(path, "fmap", fields, None), suffix="epi"))
    return found


def _metadata(
    sidecars: SidecarFiles, path: str, datatype: str, phase: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Checked sidecar fields of an image; links from the sidecar of its phase image count for the acquisition."""
    if datatype == "anat":  # of structural images, fields help to choose but are not needed
        try:
            return clean_metadata(sidecars.metadata(path), Path(path).name)[0], ()
        except MetadataError:
            return {}, ()
    fields, notes = clean_metadata(sidecars.metadata(path), Path(path).name)
    if phase is not None:
        of_phase, _ = clean_metadata(sidecars.metadata(phase), Path(phase).name)
        for name in LINKS_OF_BOTH_PARTS:
            if name in of_phase:
                fields[name] = list(dict.fromkeys([*fields.get(name, []), *of_phase[name]]))
        fields = {name: of_phase[name] for name in LINKS_OF_EITHER_PART if name in of_phase} | fields
    return fields, notes


def _record(path: str, datatype: str, fields: dict[str, Any], phase: str | None) -> FileRecord:
    values, direction = entities(path), fields.get("PhaseEncodingDirection")
    signature = DistortionSignature(
        pe_dir=direction if isinstance(direction, str) and DIRECTION.fullmatch(direction) else None,
        shim=tuple(fields["ShimSetting"]) if "ShimSetting" in fields else None,
    )
    return FileRecord(
        path=path,
        datatype=datatype,
        suffix=values.get("suffix", ""),
        session=values.get("ses"),
        signature=signature,
        b0field_identifiers=tuple(fields.get("B0FieldIdentifier", ())),
        b0field_sources=tuple(fields.get("B0FieldSource", ())),
        multipart_id=tuple(fields.get("MultipartID", ())),
        metadata=fields,
        part=None if values.get("part") == "real" else values.get("part"),  # to qsiplan, the primary image
        phase_path=phase,
    )


def _with_tables(record: FileRecord, sidecars: SidecarFiles, b0_threshold: float) -> FileRecord:
    """A DWI record with its b-table and voxel grid; what cannot be read is unknown, and refused on reading."""
    bval, bvec = (sidecars.table(record.path, extension) for extension in (".bval", ".bvec"))
    shelled, shells, max_bval = None, (), None
    try:
        bvals = read_numbers(bval).ravel() if bval else np.empty(0)
    except InputError:
        bvals = np.empty(0)
    if bvals.size and np.isfinite(bvals).all():
        shelled, shells = evaluate_shells(bvals, b0_threshold=b0_threshold)
        max_bval = float(bvals.max())
    return replace(
        record,
        shelled=shelled,
        shells=shells,
        max_bval=max_bval,
        grid=_grid_info(record.path),
        bval_file=str(bval) if bval else None,
        bvec_file=str(bvec) if bvec else None,
    )


def _grid_info(path: str) -> GridInfo | None:
    try:
        grid = read_grid(Path(path))
    except InputError:
        return None
    sizes = tuple(round(float(size), 3) for size in grid.voxel_sizes)
    return GridInfo(grid.shape, sizes, tuple(tuple(map(float, row)) for row in grid.affine))
