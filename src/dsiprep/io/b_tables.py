"""Read the b-table of a series: the only reader of `.bval` and `.bvec`, for the plan and for the run.

The length of b-vectors may carry the amplitude of the gradient, |g| = sqrt(b / b_max), as in the direction tables of
scanners. Where this is unambiguous the table is read so: with one nominal b-value, b = b_nominal |g|^2; with a b-value
for each volume, only the directions of the vectors count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from dsiprep.errors import GradientError
from dsiprep.io.files import file_state
from dsiprep.io.nifti import volume_list
from dsiprep.io.number_tables import read_numbers

NORM_TOLERANCE = 0.1
LENGTH_TOLERANCE = 0.03  # of lengths that carry the amplitude
SAME_B = 0.02  # fraction by which b-values of one nominal b-value differ at most
MIN_SCALED = 3  # volumes with scaled b-vectors, and ...
MIN_SCALED_FRACTION = 0.05  # ... their fraction, below which scaled b-vectors count as errors
MAX_B = 1e6  # s/mm²
MAX_B_IN_MS = 50.0  # ms/µm², 50,000 s/mm²
MIN_DIRECTIONS = 6
MAX_COMPONENT = 1e100  # of a b-vector that can be normalised


@dataclass(frozen=True)
class BTable:
    """b-values (n,) in s/mm² and unit b-vectors (n, 3) in the frame of the file, zero for b=0; notes on both."""

    bvals: np.ndarray
    vectors: np.ndarray
    notes: tuple[str, ...] = ()


def read_b_table(bval: Path, bvec: Path, n_volumes: int, b0_threshold: float = 100.0) -> BTable:
    """Read a b-table in the frame of its file.

    Parameters
    ----------
    bval, bvec : Path
        One row of n values, and three rows of n (or n rows of three).
    n_volumes : int
        Number of volumes of the image.
    b0_threshold : float
        b-values at or below this (s/mm²) count as b=0.

    Raises
    ------
    GradientError
        If a file is missing or not a table of numbers, counts do not match, values are invalid or in another unit, or a
        diffusion-weighted volume has no direction.
    """
    states = tuple(file_state(path) if path.is_file() else object() for path in (bval, bvec))
    table = _table_of(bval, bvec, n_volumes, b0_threshold, states)
    return BTable(table.bvals.copy(), table.vectors.copy(), table.notes)


@lru_cache(maxsize=256)
def _table_of(bval: Path, bvec: Path, n_volumes: int, b0_threshold: float, states: object) -> BTable:
    """The b-table of files in these states: a plan asks for each several times."""
    bvals = read_bvals(bval, n_volumes)
    table = read_numbers(bvec)
    if table.shape[0] != 3 and table.shape[1:] == (3,):
        table = table.T
    if table.shape != (3, n_volumes):
        found = f"{table.shape[0]} row{'s' if table.shape[0] > 1 else ''} of {table.shape[1]} numbers"
        raise GradientError(
            f"{bvec}: {found}, but {n_volumes} volumes need 3 rows of {n_volumes}; check that the b-vectors "
            "belong to this image"
        )
    vectors, notes = _without_nan(table.T, bvals > b0_threshold, bvec)
    _check_unit(bvals, vectors, b0_threshold, bval)
    bvals, vectors, note = _with_amplitude(bvals, vectors, b0_threshold, bvec)
    return BTable(bvals, _unit_vectors(vectors, bvals > b0_threshold, bvec, bval), (*notes, *note))


def read_bvals(bval: Path, n_volumes: int) -> np.ndarray:
    """Read b-values in s/mm², (n,). Raises as `read_b_table`."""
    bvals = read_numbers(bval).ravel()
    if len(bvals) != n_volumes:
        raise GradientError(
            f"{bval}: {len(bvals)} b-values, but the image has {n_volumes} volumes; check that they belong "
            "together (a trace or ADC volume at the end of the series has no b-value)"
        )
    if (bad := np.flatnonzero(~np.isfinite(bvals) | (bvals < 0))).size:
        raise GradientError(f"{bval}: the b-value of {volume_list(list(bad))} is negative or not a number; correct it")
    if (bad := np.flatnonzero(bvals > MAX_B)).size:
        raise GradientError(
            f"{bval}: the b-value of {volume_list(list(bad))} is {bvals[bad[0]]:.4g}; expected at most "
            f"{MAX_B:.0e} s/mm²; correct the unit"
        )
    return bvals


def _without_nan(vectors: np.ndarray, weighted: np.ndarray, bvec: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """b-vectors with zeros for those of b=0 volumes that are not numbers, and a note."""
    undefined = ~(np.abs(vectors) <= MAX_COMPONENT).all(1)
    if (bad := np.flatnonzero(undefined & weighted)).size:
        raise GradientError(
            f"{bvec}: the b-vector of {volume_list(list(bad))} is not a finite number although b > 0; "
            "correct it, or remove these volumes"
        )
    if not undefined.any():
        return vectors, ()
    cleaned = np.where(undefined[:, None], 0.0, vectors)
    return cleaned, (f"{bvec.name}: b-vectors of b=0 volumes that are not numbers were read as 0 0 0.",)


def _check_unit(bvals: np.ndarray, vectors: np.ndarray, b0_threshold: float, bval: Path) -> None:
    """Raise a GradientError for b-values in ms/µm²: none above the threshold, but with many directions."""
    largest = float(bvals.max(initial=0))
    if not 0 < largest <= min(MAX_B_IN_MS, b0_threshold):
        return
    with_b = vectors[(bvals > 0.1 * largest) & (np.linalg.norm(vectors, axis=1) > 0.5)]
    if len(np.unique(np.round(with_b, 2), axis=0)) >= MIN_DIRECTIONS:
        raise GradientError(
            f"{bval}: the largest b-value is {largest:g}, not above the b=0 threshold of {b0_threshold:g}, "
            "but the volumes have directions; b-values in ms/µm² must be multiplied by 1000, as s/mm² is expected"
        )


def _with_amplitude(
    bvals: np.ndarray, vectors: np.ndarray, b0_threshold: float, bvec: Path
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """b-values and b-vectors where the length of the vectors carries the amplitude of the gradient, and a note."""
    length, weighted = np.linalg.norm(vectors, axis=1), bvals > b0_threshold
    scaled = weighted & (np.abs(length - 1) > NORM_TOLERANCE)
    enough = (scaled & (length > 0)).sum() >= max(MIN_SCALED, MIN_SCALED_FRACTION * weighted.sum())
    if not enough or abs(length[weighted].max() - 1) > NORM_TOLERANCE:
        return bvals, vectors, ()
    unit = vectors / np.where(length > 0, length, 1)[:, None]
    top = float(bvals.max())
    if np.ptp(bvals[weighted]) <= SAME_B * top:
        amplitude = np.where(weighted, np.minimum(length, 1), 1)
        note = f"{bvec.name}: the length of the b-vectors carries the amplitude; b = {top:g} |g|² s/mm² was read."
        return bvals * amplitude**2, np.where(length[:, None] > 0, unit, 0), (note,)
    for power in (0.5, 1.0):
        expected = (bvals / top) ** power
        if (np.abs(length - expected)[weighted] <= LENGTH_TOLERANCE).all():
            note = (
                f"{bvec.name}: the length of the b-vectors follows the b-values, which are given for each volume; only "
                "the directions were used."
            )
            return bvals, unit, (note,)
    return bvals, vectors, ()


def _unit_vectors(vectors: np.ndarray, weighted: np.ndarray, bvec: Path, bval: Path) -> np.ndarray:
    """Normalised rows; b-vectors of b=0 volumes become zero if their length is not close to 1."""
    norm = np.linalg.norm(vectors, axis=1)
    if (bad := np.flatnonzero(weighted & (norm < 1e-6))).size:
        raise GradientError(
            f"{bvec}: the b-vector of {volume_list(list(bad))} is zero although b > 0 in {bval.name}; "
            "correct the table, or remove these volumes (trace images have no direction)"
        )
    off = np.abs(norm - 1) > NORM_TOLERANCE
    if (bad := np.flatnonzero(weighted & off)).size:
        raise GradientError(
            f"{bvec}: the b-vector of {volume_list(list(bad))} has length {norm[bad[0]]:.3g}, which neither "
            "is 1 nor follows the b-values; convert the series again, or correct the table"
        )
    return np.where(off[:, None], 0.0, vectors / np.where(norm > 0, norm, 1)[:, None])
