"""The tables beside a series: confounds, quality, slices, the course of motion correction."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsiprep.data.results import Motion, UnitResults
from dsiprep.data.transform import EDDY_TERMS

__all__ = ["lost_slices", "write_confounds", "write_json", "write_tables", "write_tsv"]


def lost_slices(motions: tuple[Motion, ...]) -> list[tuple[int, int]]:
    """Volume of the conformed series and slice, for all slices that lost their signal."""
    pairs = []
    for moved in motions:
        if moved.lost is not None:
            pairs += [(int(moved.volumes[row]), int(cut)) for row, cut in np.argwhere(moved.lost)]
    return sorted(pairs)


def write_tables(results: UnitResults, folder: Path) -> None:
    """Confounds, image and slice quality, and hmcOptimization.csv of one unit."""
    stem, quality = results.unit.name, results.quality
    files = [results.unit.runs[run].image.name for run in results.acquired.dwi.run]
    columns = {name: column for name, column in quality.confounds.items() if name != "run"}
    columns["original_file"] = np.array(files, dtype=object)
    write_confounds(folder / stem, columns, results.preprocessed.sources)
    write_tsv(folder / f"{stem}_space-ACPC_desc-image_qc.tsv", {k: np.array([v]) for k, v in quality.table.items()})
    write_json(
        folder / f"{stem}_space-ACPC_desc-slice_qc.json",
        {"Description": "Robust z-score of each slice's residual against the prediction, volume by slice",
         "slice_z": [[round(z, 3) if np.isfinite(z) else None for z in row] for row in quality.slice_z.tolist()],
         "lost": [[int(v), int(k)] for v, k in lost_slices(results.motions)],
         "replaced": results.settings.motion.outliers == "replace"},
    )  # fmt: skip
    rows = [row for moved in results.motions for row in moved.trace]
    with (folder / f"{stem}_hmcOptimization.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else ["iter_num"])
        writer.writeheader()
        writer.writerows(rows)


WORST = ("framewise_displacement", "trans_", "rot_", "eddy_")  # of volumes made one, the largest is told


def write_confounds(stem: Path, columns: dict[str, np.ndarray], sources: tuple[tuple[int, ...], ...]) -> None:
    """The confounds table, a row for every volume of the output."""
    if sources:
        columns = {name: _of_merged(name, column, sources) for name, column in columns.items()}
    write_tsv(stem.with_name(stem.name + "_desc-confounds_timeseries.tsv"), columns)
    known = {k: CONFOUNDS[k] for k in columns if k in CONFOUNDS}
    write_json(stem.with_name(stem.name + "_desc-confounds_timeseries.json"), known)


def _of_merged(name: str, column: np.ndarray, sources: tuple[tuple[int, ...], ...]) -> np.ndarray:
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


def write_tsv(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Columns under their names; what is not finite is n/a."""
    with path.open("w") as stream:
        stream.write("\t".join(columns) + "\n")
        for row in zip(*columns.values(), strict=True):
            stream.write("\t".join(_cell(value) for value in row) + "\n")


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return "n/a"
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
