"""What a dataset has that decides how QSIPrep is to be run: sampling scheme, reversed phase encoding, anatomy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsiprep.data.acquisition import SamplingScheme, Unit
from dsiprep.errors import InputError
from dsiprep.io.bids import find_units, scheme_of
from dsiprep.io.bids_filters import Filters
from dsiprep.io.nifti import read_spacing
from dsiprep.settings import Settings


@dataclass(frozen=True)
class Case:
    """Subjects that are run with the same options.

    Attributes
    ----------
    shelled : bool
        All their series are of shells; otherwise all are of q-space sampling without shells.
    anatomy : str
        "T1w", "T2w" (no T1w) or "none".
    pairs : bool
        Some of their series have an opposite phase encoding.
    fieldmap : bool
        Some have a gradient-echo fieldmap.
    spacing : float
        mm; the smallest edge of their voxels.
    subjects : tuple of str
        Labels without `sub-`.
    schemes : tuple of str
        In words.
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
    """Look at a dataset.

    Parameters
    ----------
    bids_dir : Path
    participants, sessions : sequence of str, optional
        Labels; all by default.
    filters : dict, optional
        As in a `--bids-filter-file`.

    Returns
    -------
    list of Case
        In order of their first subject.

    Raises
    ------
    InputError
        If there is nothing to preprocess, a b-table cannot be read, or one subject has series of both kinds.
    """
    settings = Settings()
    units = find_units(bids_dir, settings, participants=participants, sessions=sessions, filters=filters)
    by_subject: dict[str, list[Unit]] = {}
    for unit in units:
        by_subject.setdefault(unit.subject, []).append(unit)
    threshold = settings.acquisition.b0_threshold
    together: dict[tuple[object, ...], list[Case]] = {}
    for case in (_of_subject(label, members, threshold) for label, members in by_subject.items()):
        key = (case.shelled, case.anatomy, case.pairs, case.fieldmap, case.spacing)
        together.setdefault(key, []).append(case)
    return [_joined(cases) for cases in together.values()]


def _of_subject(label: str, units: list[Unit], b0_threshold: float) -> Case:
    schemes = [scheme for unit in units if (scheme := _scheme(unit, b0_threshold)).kind != "b0-only"]
    if not schemes:
        raise InputError(f"sub-{label}: only b=0 volumes; there is nothing for QSIPrep to do")
    # what QSIPrep would join into one series is looked at run by run too
    runs = [_scheme(replace(unit, runs=(run,)), b0_threshold) for unit in units for run in unit.runs]
    grids = [scheme for scheme in runs if scheme.kind in ("DSI", "CS-DSI")]
    shells = [scheme for scheme in runs if scheme.shelled]
    if len({scheme.shelled for scheme in schemes}) > 1 or (grids and shells):
        kinds = "; ".join(dict.fromkeys(scheme.description for scheme in (*grids, *shells) or schemes))
        raise InputError(
            f"sub-{label} has shelled and other sampling ({kinds}); QSIPrep takes one motion model a run: choose "
            "series with --bids-filter-file or --session-label, and ask once for each"
        )
    images = [unit.t1w for unit in units], [unit.t2w for unit in units]
    anatomy = next((name for name, found in zip(("T1w", "T2w"), images, strict=True) if any(found)), "none")
    spacing = min(min(read_spacing(run.image)) for unit in units for run in unit.runs)
    return Case(
        shelled=schemes[0].shelled,
        anatomy=anatomy,
        pairs=any(unit.reversed_pairs() for unit in units),
        fieldmap=any(unit.gre for unit in units),
        spacing=round(spacing, 2),
        subjects=(label,),
        schemes=tuple(dict.fromkeys(scheme.description for scheme in schemes)),
    )


def _scheme(unit: Unit, b0_threshold: float) -> SamplingScheme:
    scheme = scheme_of(unit, b0_threshold)
    if scheme is None:
        raise InputError(
            f"{unit.name}: its b-values or b-vectors cannot be read, so its sampling is not known; "
            f"{unit.runs[0].bval} and {unit.runs[0].bvec.name} are wanted, as FSL writes them"
        )
    return scheme


def _joined(cases: list[Case]) -> Case:
    first = cases[0]
    return Case(
        first.shelled,
        first.anatomy,
        first.pairs,
        first.fieldmap,
        first.spacing,
        tuple(label for case in cases for label in case.subjects),
        tuple(dict.fromkeys(words for case in cases for words in case.schemes)),
    )
