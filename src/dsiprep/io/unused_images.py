"""Select the requested images of a subject, and list every image of anat, dwi and fmap that nobody takes, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dsiprep.data.acquisition import Unit, UnusedImage
from dsiprep.io.bids_filters import Filters, apply_filters, entities
from dsiprep.io.dataset_files import SubjectImages
from dsiprep.io.grouping_notes import Options
from dsiprep.io.records import SubjectRecords

FIELDMAPLESS_MODALITY = {"invt1w": "T1w", "t2w": "T2w"}


def select_images(
    images: SubjectImages, sessions: list[str] | None, filters: Filters | None, ignore: frozenset[str]
) -> SubjectImages:
    """The images that match the request; the others are added to those that are not used.

    Structural images of all sessions match, because sessions may share one anatomy.
    """
    unused = dict(images.unused)
    chosen = {kind: list(paths) for kind, paths in images.by_kind.items()}

    def drop(kind: str, kept: list[str], reason: str) -> None:
        unused.update({path: reason for path in chosen[kind] if path not in kept})
        chosen[kind] = kept

    if sessions is not None:
        for kind in ("dwi", "fmap", "reference"):
            kept = [path for path in chosen[kind] if entities(path).get("ses") in sessions or _is_shared(path)]
            drop(kind, kept, "another session than those of --session-label")
    for kind, kept in apply_filters(chosen, filters).items():
        drop(kind, kept, "it does not match --bids-filter-file")
    if ignored := ignore & {"fieldmaps", "sdc"}:
        reason = f"--ignore {sorted(ignored)[0]}"
        drop("fmap", [], reason)
        beside_series = [path for path in chosen["reference"] if "sdc" not in ignored and not _in_fmap(path)]
        drop("reference", beside_series, reason)
    if "t2w" in ignore:
        drop("t2w", [], "--ignore t2w")
    return replace(images, by_kind=chosen, unused=unused)


def _in_fmap(path: str) -> bool:
    return Path(path).parent.name == "fmap"


def _is_shared(path: str) -> bool:
    """Whether a fieldmap belongs to all sessions."""
    return _in_fmap(path) and "ses" not in entities(path)


def with_unused(
    units: list[Unit], images: SubjectImages, described: SubjectRecords, left_out: Mapping[str, str], options: Options
) -> list[Unit]:
    """The units of a subject, each with the list of images that no unit takes.

    Parameters
    ----------
    units : list of Unit
    images : SubjectImages
        From `select_images`.
    described : SubjectRecords
    left_out : mapping
        Reasons for structural images that were not chosen, by path.
    options : Options
    """
    modalities = {options.modality, FIELDMAPLESS_MODALITY.get(options.fieldmapless, options.modality)}
    used = {path for unit in units for path in unit.files()}
    used |= {path for unit in units if unit.gre for path in unit.gre.files()}
    used |= {path for unit in units for modality in modalities for path in unit.structural(modality)}
    reasons = dict(images.unused) | dict(left_out)
    unlinked = {path for issue in described.issues for path in issue.files}
    for kind, paths in images.by_kind.items():
        for path in paths:
            if Path(path) not in used and path not in reasons:
                reasons[path] = _reason(path, kind, units, options, unlinked)
    listed = tuple(UnusedImage(Path(path), reasons[path]) for path in sorted(reasons) if Path(path) not in used)
    return [replace(unit, left_out=listed) for unit in units]


def _reason(path: str, kind: str, units: list[Unit], options: Options, unlinked: set[str]) -> str:
    """Why an image that could be used was not taken by any unit."""
    if kind in ("t1w", "t2w"):
        return f"--anat-modality {options.modality}"
    if kind == "reference":
        return "other images determine the distortion, or it cannot be used for it (see the notes)"
    if kind == "dwi":
        return "its b=0 volumes add nothing to those of a longer series with the same phase encoding"
    corrected_by_pair = any(unit.reversed_pairs() for unit in units)
    suffix = entities(path).get("suffix", "")
    used = [unit.gre.magnitude for unit in units if unit.gre and unit.gre.magnitude.parent == Path(path).parent]
    if suffix.startswith("magnitude") and used:
        return f"the magnitude {used[0].name} is used"
    if suffix != "epi" and corrected_by_pair:
        return "images with opposite phase encoding give a better estimate of the distortion"
    if path in unlinked:
        return "no field links it to a series (see the notes)"
    if suffix == "epi" and corrected_by_pair:
        return "the distortion is estimated from other images with opposite phase encoding"
    return "no IntendedFor or B0FieldIdentifier links it to a series that it can correct"
