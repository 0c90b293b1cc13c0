"""Metrics of all series in an output folder, and how far each lies from the others or from a reference table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsiprep.errors import InputError
from dsiprep.io.quality_columns import column_meaning
from dsiprep.report.quality_record import SUFFIX
from dsiprep.report.verdict_bounds import Bound
from dsiprep.report.verdicts import CHECKS

TABLE_ENDING = "_desc-image_qc.tsv"  # of dsiprep, and of QSIPrep since version 0.20
DESIGN = ("dimension_", "voxel_size_", "num_directions", "max_b")  # properties of the protocol, not of the quality
LARGER_IS_BETTER = ("neighbor_corr", "dwi_contrast", "coherence_index", "dice_distance", "coregistration_score", "CNR")
SMALLER_IS_BETTER = ("mean_fd", "max_fd", "max_r", "max_t", "num_bad_slices", "uncovered_brain")
TO_DEVIATIONS = 1.4826  # from the median absolute deviation of a normal distribution to its standard deviation
LEAST_SERIES = 10  # for bounds from a cohort
LOOK_Z, BAD_Z = 3.0, 5.0


@dataclass(frozen=True)
class Series:
    """One preprocessed series of the cohort.

    Attributes
    ----------
    name : str
        As in file names, without ending.
    subject : str
        "sub-01".
    metrics : dict
        Numbers by name; those without a value are left out.
    verdicts : tuple of dict
        As in the JSON file of the series; empty for series of other software.
    descriptions : dict
        Meaning of the metrics.
    """

    name: str
    subject: str
    metrics: dict[str, float]
    verdicts: tuple[dict[str, object], ...] = ()
    descriptions: dict[str, str] = field(default_factory=dict)

    def count(self, state: str) -> int:
        """Number of verdicts of one state."""
        return sum(verdict.get("state") == state for verdict in self.verdicts)


def read_cohort(out: Path) -> list[Series]:
    """All series below `out`, by name: from their JSON files, and from image_qc.tsv where there is none.

    Raises
    ------
    InputError
        If there is no series, or a file cannot be read.
    """
    found = {}
    for path in sorted(out.glob(f"sub-*/figures/*{SUFFIX}")):
        series = _from_record(path)
        found[series.name] = series
    for path in sorted(out.glob(f"sub-*/**/*{TABLE_ENDING}")):
        series = _from_table(path)
        found.setdefault(series.name, series)
    if not found:
        raise InputError(
            f"{out}: there are no series with quality metrics (sub-*/figures/*{SUFFIX} or *{TABLE_ENDING}); "
            "run the participant level first"
        )
    return [found[name] for name in sorted(found)]


def _from_record(path: Path) -> Series:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        metrics = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        verdicts = tuple(dict(verdict) for verdict in record.get("verdicts", ()))
        descriptions = {str(name): str(text) for name, text in record.get("descriptions", {}).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a quality file of dsiprep ({error}); run that subject again") from error
    name = path.name.removesuffix(SUFFIX)
    return Series(name, name.split("_")[0], metrics, verdicts, descriptions)


def _from_table(path: Path) -> Series:
    rows = read_table(path)
    name = path.name.removesuffix(TABLE_ENDING).removesuffix("_space-ACPC").removesuffix("_space-T1w")
    return Series(name, name.split("_")[0], _numbers(rows[0]) if rows else {})


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a TSV or CSV file with a header.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream, delimiter="," if path.suffix == ".csv" else "\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a TSV or CSV file with a header") from error


def _numbers(row: dict[str, str]) -> dict[str, float]:
    numbers = {}
    for name, text in row.items():
        try:
            value = float(text)
        except (TypeError, ValueError):
            continue
        if name and math.isfinite(value) and not name.endswith("_id"):
            numbers[name] = value
    return numbers


def metric_names(cohort: Iterable[Series]) -> list[str]:
    """Names of all metrics, in the order of their first series."""
    return list(dict.fromkeys(name for series in cohort for name in series.metrics))


def values_of(cohort: Sequence[Series], name: str) -> np.ndarray:
    """One metric of all series, (n,); NaN where it has no value."""
    return np.array([series.metrics.get(name, np.nan) for series in cohort])


def read_reference(path: Path) -> dict[str, np.ndarray]:
    """Values of each metric in a table with one row per series, such as the group_dwi.tsv of another study.

    Raises
    ------
    InputError
        If it cannot be read or has no numbers.
    """
    rows = [_numbers(row) for row in read_table(path)]
    names = dict.fromkeys(name for row in rows for name in row)
    if not names:
        raise InputError(f"{path}: no column holds numbers; give a table such as group_dwi.tsv")
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def robust_z(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Distance of values from the median of a reference in robust standard deviations, (n,).

    With half of the reference equal, the mean absolute deviation takes the place of the median one; with all of it
    equal there is no scale, and the distance is NaN for values that differ.

    References
    ----------
    Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers.
    """
    known = reference[np.isfinite(reference)]
    if not len(known):
        return np.full(len(values), np.nan)
    median, scale = centre_and_scale(known)
    difference = values - median
    return difference / scale if scale > 0 else np.where(difference == 0, 0.0, np.nan)


def centre_and_scale(known: np.ndarray) -> tuple[float, float]:
    """Median and robust standard deviation of values."""
    median = float(np.median(known))
    deviations = np.abs(known - median)
    scale = TO_DEVIATIONS * float(np.median(deviations))
    return median, scale or 1.2533 * float(deviations.mean())


def direction(name: str) -> int:
    """+1 if larger values of a metric are worse, -1 if smaller ones are, 0 if that is not known."""
    for check in CHECKS:
        if name == f"check_{check.key}":
            return 1 if check.larger_is_worse else -1
    if any(part in name for part in LARGER_IS_BETTER):
        return -1
    return 1 if any(part in name for part in SMALLER_IS_BETTER) else 0


def is_quality(name: str) -> bool:
    """Whether a metric tells of quality rather than of the protocol."""
    return not any(part in name for part in DESIGN)


def meaning(name: str, cohort: Sequence[Series]) -> str:
    """Description of a metric."""
    return next((s.descriptions[name] for s in cohort if s.descriptions.get(name)), "") or column_meaning(name)


def cohort_bounds(cohort: Sequence[Series]) -> dict[str, Bound]:
    """Bounds of the verdicts at 3 and 5 robust standard deviations from the median of a cohort of ten or more."""
    bounds = {}
    for check in CHECKS:
        known = values_of(cohort, f"check_{check.key}")
        known = known[np.isfinite(known)]
        if len(known) < LEAST_SERIES:
            continue
        median, scale = centre_and_scale(known)
        if scale > 0:
            sign = 1 if check.larger_is_worse else -1
            look, bad = (float(f"{median + sign * z * scale:.4g}") for z in (LOOK_Z, BAD_Z))
            source = (
                f"cohort of {len(known)} series: {LOOK_Z:g} and {BAD_Z:g} robust standard deviations from the median"
            )
            bounds[check.key] = Bound(look, bad, source)
    return bounds
