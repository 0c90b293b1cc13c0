"""The tables beside a series: confounds, quality, slices, the course of motion correction."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dsiprep.data.results import Motion, Quality, UnitResults
from dsiprep.data.transform import EDDY_TERMS

__all__ = ["lost_slices", "write_json", "write_tables"]


def lost_slices(motions: tuple[Motion, ...]) -> list[tuple[int, int]]:
    """Volume of the conformed series and slice, for all slices that lost their signal."""
    pairs = []
    for moved in motions:
        if moved.outlier_slices is not None:
            pairs += [(int(moved.volumes[row]), int(cut)) for row, cut in np.argwhere(moved.outlier_slices)]
    return sorted(pairs)


def write_tables(
    stem: Path, quality: Quality, files: Sequence[str], members: Sequence[UnitResults], sources: Sequence[Sequence[int]]
) -> None:
    """Confounds, image and slice quality, and hmcOptimization.csv of one output.

    Parameters
    ----------
    stem : Path
        Folder and prefix of the output.
    quality : Quality
    files : sequence of str
        The run that every volume acquired came from.
    members : sequence of UnitResults
        The units that make up the output, in order.
    sources : sequence of sequence of int
        Which volumes acquired were made one; empty where none was.
    """
    columns = {name: column for name, column in quality.confounds.items() if name != "run"}
    columns["original_file"] = np.array(files, dtype=object)
    _write_confounds(stem, columns, sources)
    _write_tsv(_named(stem, "_space-ACPC_desc-image_qc.tsv"), {k: np.array([v]) for k, v in quality.table.items()})
    starts = np.cumsum([0, *(len(unit.acquired.dwi) for unit in members)])
    lost = [(v + start, k) for unit, start in zip(members, starts, strict=False) for v, k in lost_slices(unit.motions)]
    write_json(
        _named(stem, "_space-ACPC_desc-slice_qc.json"),
        {"Description": "Robust z-score of each slice's residual against the prediction, volume acquired by slice",
         "slice_z": [[round(z, 3) if np.isfinite(z) else None for z in row] for row in quality.slice_z.tolist()],
         "lost": [[int(v), int(k)] for v, k in lost],
         "replaced": members[0].settings.motion.outliers == "replace"},
    )  # fmt: skip
    rows = [row for unit in members for moved in unit.motions for row in moved.trace]
    with _named(stem, "_hmcOptimization.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else ["iter_num"])
        writer.writeheader()
        writer.writerows(rows)


def _named(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


WORST = ("framewise_displacement", "trans_", "rot_", "eddy_")  # of volumes made one, the largest is told


def _write_confounds(stem: Path, columns: dict[str, np.ndarray], sources: Sequence[Sequence[int]]) -> None:
    """The confounds table, a row for every volume of the output."""
    if sources:
        columns = {name: _of_merged(name, column, sources) for name, column in columns.items()}
    _write_tsv(_named(stem, "_desc-confounds_timeseries.tsv"), columns)
    known = {k: CONFOUNDS[k] for k in columns if k in CONFOUNDS}
    write_json(_named(stem, "_desc-confounds_timeseries.json"), known)


def _of_merged(name: str, column: np.ndarray, sources: Sequence[Sequence[int]]) -> np.ndarray:
    groups = [column[list(members)] for members in sources]
    if column.dtype == object:
        return np.array(["+".join(dict.fromkeys(map(str, group))) for group in groups], dtype=object)
    if name.startswith(WORST):
        groups = [group[np.isfinite(group)] if np.isfinite(group).any() else group for group in groups]
        return np.array([group[np.argmax(np.abs(group))] for group in groups])
    return np.array([group.mean() for group in groups])


CONFOUNDS = {
    "framewise_displacement": {"Description": "Framewise displacement, SPM parameters, 50 mm sphere", "Units": "mm"},
    "trans_x": {"Description": "Translation towards R at the image centre", "Units": "mm"},
    "trans_y": {"Description": "Translation towards A at the image centre", "Units": "mm"},
    "trans_z": {"Description": "Translation towards S at the image centre", "Units": "mm"},
    "rot_x": {"Description": "Rotation vector about the image centre, R component", "Units": "rad"},
    "rot_y": {"Description": "Rotation vector about the image centre, A component", "Units": "rad"},
    "rot_z": {"Description": "Rotation vector about the image centre, S component", "Units": "rad"},
    **{
        f"eddy_{name}": {
            "Description": f"Displacement by eddy currents along the phase-encoding axis: coefficient of {term}, "
            "i, j, k from the centre of the image along the voxel axes, in units of 100 mm",
            "Units": "mm",
        }
        for name, term in EDDY_TERMS.items()
    },
    "hmc_r2": {"Description": "R² of the aligned volume with its prediction"},
    "hmc_xcorr": {"Description": "Correlation of the aligned volume with its prediction"},
    "grad_x": {"Description": "b-vector, R component, ACPC world"},
    "grad_y": {"Description": "b-vector, A component, ACPC world"},
    "grad_z": {"Description": "b-vector, S component, ACPC world"},
    "bval": {"Description": "b-value", "Units": "s/mm^2"},
    "original_file": {"Description": "The run that the volume came from"},
}


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Indented, with a newline at its end."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tsv(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Columns under their names; what is not finite is n/a."""
    with path.open("w") as stream:
        stream.write("\t".join(columns) + "\n")
        for row in zip(*columns.values(), strict=True):
            stream.write("\t".join(_cell(value) for value in row) + "\n")


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return "n/a"
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
