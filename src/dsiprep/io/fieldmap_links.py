"""Links from fieldmaps to the series that they are intended for, however these are written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from qsiplan import FileRecord

from dsiprep.io.records import SubjectRecords

__all__ = ["intended_series", "with_links"]

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


def with_links(described: SubjectRecords, root: Path, ignore: frozenset[str]) -> SubjectRecords:
    """The records with the series that each fieldmap is intended for.

    References that are linked become records, which are grouped. With fieldmaps ignored, nothing is linked.
    """
    if ignore & {"fieldmaps", "sdc"}:  # references to ignored fieldmaps would be reported as inconsistent
        return replace(
            described,
            records=[replace(record, b0field_identifiers=(), b0field_sources=()) for record in described.records],
            references=[replace(record, b0field_identifiers=()) for record in described.references],
        )
    series = [record.path for record in described.records if record.is_dwi]

    def linked(record: FileRecord) -> FileRecord:
        targets = intended_series(record.metadata.get("IntendedFor"), series, root)
        return replace(record, intended_for=targets) if record.datatype == "fmap" else record

    records, references = ([linked(record) for record in some] for some in (described.records, described.references))
    usable = [record for record in references if record.intended_for or record.b0field_identifiers]
    records = [*records, *usable]
    understood = {record.path for record in records if record.intended_for}
    return replace(
        described,
        records=records,
        references=[record for record in references if record not in usable],
        issues=[
            issue
            for issue in described.issues
            if issue.code != "intendedfor-missing-target" or not understood & set(issue.files)
        ],
    )
