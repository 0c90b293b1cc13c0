"""Links from fieldmaps to series, and EPI images of a subject that qsiplan does not index."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from qsiplan import FileRecord
from qsiplan.bids import find_associated_files, parse_file_entities
from qsiplan.metadata import build_signature
from qsiplan.validation import GroupingIssue

from dsiprep.errors import MetadataError
from dsiprep.io.bids_filters import Filters, entities, matches

__all__ = ["intended_series", "linked_records", "other_epi_records", "without_resolved"]

log = logging.getLogger("dsiprep")
URI = re.compile(r"bids:[^:]*:")


def intended_series(entries: object, series: Iterable[str], root: Path) -> tuple[str, ...]:
    """The series that an IntendedFor field names, however its paths are written.

    BIDS asks for `bids::sub-01/dwi/x.nii.gz` or, formerly, `dwi/x.nii.gz`. Paths from the root, absolute paths of
    another machine, bare file names, backslashes and names without `.gz` or ending mean the same file and are read too.

    Parameters
    ----------
    entries : str or list of str
    series : iterable of str
        Paths of the subject's diffusion series.
    root : Path
        Of the dataset.
    """
    texts = [entries] if isinstance(entries, str) else entries if isinstance(entries, list) else []
    parts = [_parts(URI.sub("", text.strip().replace("\\", "/"))) for text in texts if isinstance(text, str)]
    return tuple(path for path in series if any(_is_same(entry, _parts(_relative(path, root))) for entry in parts))


def _parts(path: str) -> tuple[str, ...]:
    names = [name for name in PurePosixPath(path).parts if name not in ("/", ".", "..")]
    stem = names[-1].removesuffix(".gz").removesuffix(".nii") if names else ""
    # the phase image of a complex series names the same acquisition as its magnitude
    return (*names[:-1], stem.replace("_part-phase", "").replace("_part-mag", ""))


def _relative(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def _is_same(entry: tuple[str, ...], series: tuple[str, ...]) -> bool:
    """Whether the shorter of two paths is the end of the longer one."""
    shared = min(len(entry), len(series))
    return bool(entry[-1]) and entry[-shared:] == series[-shared:]


def linked_records(
    records: list[FileRecord], others: list[FileRecord], root: Path
) -> tuple[list[FileRecord], list[FileRecord]]:
    """The records with the series that each fieldmap is intended for, and linked `others`; then unlinked `others`."""
    series = [record.path for record in records if record.is_dwi]
    everything = [
        replace(record, intended_for=intended_series(record.metadata.get("IntendedFor"), series, root))
        if record.datatype == "fmap"
        else record
        for record in (*records, *others)
    ]
    extra = {record.path for record in others}
    unlinked = [
        record
        for record in everything
        if record.path in extra and not record.intended_for and not record.b0field_identifiers
    ]
    return [record for record in everything if record not in unlinked], unlinked


def without_resolved(issues: list[GroupingIssue], records: list[FileRecord]) -> list[GroupingIssue]:
    """The issues without those on IntendedFor entries that were understood after all."""
    linked = {record.path for record in records if record.intended_for}
    return [issue for issue in issues if issue.code != "intendedfor-missing-target" or not linked & set(issue.files)]


def other_epi_records(root: Path, label: str, sessions: list[str] | None, filters: Filters | None) -> list[FileRecord]:
    """Records of `fmap/*_dwi`, `fmap/*_sbref` and `dwi/*_sbref`, as EPI fieldmaps without an intended series."""
    folder = root / f"sub-{label}"
    wanted = (("fmap", "dwi", "fmap"), ("fmap", "sbref", "fmap"), ("dwi", "sbref", "sbref"))
    found = []
    for kind, suffix, query in wanted:
        paths = sorted(path for level in ("", "ses-*/") for path in folder.glob(f"{level}{kind}/*_{suffix}.nii*"))
        for path in paths:
            names = entities(path)
            selected = sessions is None or names.get("ses") in [*sessions, *([None] if kind == "fmap" else [])]
            if (
                not selected
                or names.get("part", "mag") != "mag"
                or not matches(str(path), (filters or {}).get(query, {}))
            ):
                continue
            try:
                found.append(_epi_record(path))
            except MetadataError as problem:  # the series can be processed without it
                log.warning("%s; the image is not used for the distortion", problem)
    return found


def _epi_record(path: Path) -> FileRecord:
    metadata = _metadata(path)
    try:
        signature = build_signature(dict(metadata))
    except (TypeError, ValueError) as error:
        raise MetadataError(f"{path.name}: its sidecar is invalid ({error}); correct it") from None
    return FileRecord(
        path=str(path),
        datatype="fmap",
        suffix="epi",
        session=parse_file_entities(path).get("session"),
        signature=signature,
        b0field_identifiers=_texts(metadata.get("B0FieldIdentifier")),
        metadata=metadata,
    )


def _metadata(path: Path) -> Mapping[str, Any]:
    """Fields of the sidecars that apply to an image, the nearest last."""
    merged: dict[str, Any] = {}
    try:
        for sidecar in find_associated_files(path, ".json"):
            merged |= json.loads(sidecar.read_text(encoding="utf-8"))
    except (ValueError, TypeError, OSError) as error:
        raise MetadataError(f"{path}: its sidecar cannot be read ({error}); correct it") from None
    return merged


def _texts(value: object) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(text for text in values if isinstance(text, str))
