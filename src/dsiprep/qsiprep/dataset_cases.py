"""Properties of a dataset that decide how to run QSIPrep: sampling scheme, fieldmaps, anatomy, voxel size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsiprep.data.acquisition import SamplingScheme, Unit
from dsiprep.errors import InputError
from dsiprep.io.bids import find_units, scheme_of
from dsiprep.io.bids_filters import Filters
from dsiprep.io.nifti_header import read_spacing
from dsiprep.settings import Settings


@dataclass(frozen=True)
class Case:
    """A group of subjects that need the same options.

    Attributes
    ----------
    shelled : bool
        Whether all their series are shelled; otherwise none of them is.
    anatomy : str
        "T1w", "T2w" (no T1w) or "none".
    pairs : bool
        Whether any of their series has reversed phase encoding.
    fieldmap : bool
        Whether any of their series has a gradient-echo fieldmap.
    spacing : float
        Smallest voxel edge in mm.
    subjects : tuple of str
        Labels without `sub-`.
    schemes : tuple of str
        Descriptions of their sampling schemes.
    """

    shelled: bool
    anatomy: str
    pairs: bool
    fieldmap: bool
    spacing: float
    subjects: tuple[str, ...]
    schemes: tuple[str, ...]


def find_cases(
    bids_dir: Path, participants: Sequence[str] | None, sessions: Sequence[str] | None, filters: Filters | None
) -> list[Case]:
    """Group the subjects of a dataset by the options that they need.

    Parameters
    ----------
    bids_dir : Path
    participants, sessions : sequence of str, optional
        Labels; all by default.
    filters : dict, optional
        Content of a `--bids-filter-file`.

    Returns
    -------
    list of Case
        In order of their first subject.

    Raises
    ------
    InputError
        If there is nothing to preprocess, if a b-table cannot be read, or if a subject has both shelled and
        other series.
    """
    settings = Settings()
    units = find_units(bids_dir, settings, participants=participants, sessions=sessions, filters=filters)
    by_subject: dict[str, list[Unit]] = {}
    for unit in units:
        by_subject.setdefault(unit.subject, []).append(unit)
    threshold = settings.acquisition.b0_threshold
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in (_case_of_subject(label, subject_units, threshold) for label, subject_units in by_subject.items()):
        key = (case.shelled, case.anatomy, case.pairs, case.fieldmap, case.spacing)
        groups.setdefault(key, []).append(case)
    return [_merge(cases) for cases in groups.values()]


def _case_of_subject(label: str, units: list[Unit], b0_threshold: float) -> Case:
    schemes = [scheme for unit in units if (scheme := _scheme(unit, b0_threshold)).kind != "b0-only"]
    if not schemes:
        raise InputError(f"sub-{label}: only b=0 volumes, which QSIPrep cannot process")
    # also classify the runs one by one, because QSIPrep would concatenate them
    runs = [_scheme(replace(unit, runs=(run,)), b0_threshold) for unit in units for run in unit.runs]
    lattices = [scheme for scheme in runs if scheme.kind in ("DSI", "CS-DSI")]
    shells = [scheme for scheme in runs if scheme.shelled]
    if len({scheme.shelled for scheme in schemes}) > 1 or (lattices and shells):
        descriptions = "; ".join(dict.fromkeys(scheme.description for scheme in (*lattices, *shells) or schemes))
        raise InputError(
            f"sub-{label} has both shelled and other series ({descriptions}), but a QSIPrep run uses one motion model: "
            "select series with --bids-filter-file or --session-label and write one command for each"
        )
    images = [unit.t1w for unit in units], [unit.t2w for unit in units]
    anatomy = next((name for name, paths in zip(("T1w", "T2w"), images, strict=True) if any(paths)), "none")
    spacing = min(min(read_spacing(run.image)) for unit in units for run in unit.runs)
    return Case(
        shelled=schemes[0].shelled,
        anatomy=anatomy,
        pairs=any(_has_opposite_axes(unit) for unit in units),
        fieldmap=any(unit.gre for unit in units),
        spacing=round(spacing, 2),
        subjects=(label,),
        schemes=tuple(dict.fromkeys(scheme.description for scheme in schemes)),
    )


def _has_opposite_axes(unit: Unit) -> bool:
    """Whether QSIPrep can correct the unit as a pair: by the axes of the files, and with none orthogonal."""
    encodings = {
        (pe.axis, pe.polarity) for pe in (*(run.pe for run in unit.runs), *(epi.pe for epi in unit.epis)) if pe
    }
    return any((axis, -polarity) in encodings for axis, polarity in encodings)


def _scheme(unit: Unit, b0_threshold: float) -> SamplingScheme:
    scheme = scheme_of(unit, b0_threshold)
    if scheme is None:
        raise InputError(
            f"{unit.name}: the b-values or b-vectors cannot be read, so the sampling scheme is unknown; "
            f"expected {unit.runs[0].bval} and {unit.runs[0].bvec.name} in FSL format"
        )
    return scheme


def _merge(cases: list[Case]) -> Case:
    first = cases[0]
    return Case(
        first.shelled,
        first.anatomy,
        first.pairs,
        first.fieldmap,
        first.spacing,
        tuple(label for case in cases for label in case.subjects),
        tuple(dict.fromkeys(scheme for case in cases for scheme in case.schemes)),
    )
