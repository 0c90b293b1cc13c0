"""Tables that accompany a series: confounds, image and slice quality, and the progress of motion correction."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dsiprep.data.results import Motion, Quality, UnitResults
from dsiprep.data.transform import EDDY_TERMS
from dsiprep.io.quality_columns import column_descriptions

__all__ = ["outlier_slices", "write_json", "write_tables", "write_tsv"]


def outlier_slices(motions: tuple[Motion, ...]) -> list[tuple[int, int]]:
    """Volume of the conformed series and slice index of all outlier slices, sorted."""
    pairs = []
    for motion in motions:
        if motion.outlier_slices is not None:
            pairs += [(int(motion.volumes[row]), int(k)) for row, k in np.argwhere(motion.outlier_slices)]
    return sorted(pairs)


def write_tables(
    stem: Path, quality: Quality, files: Sequence[str], members: Sequence[UnitResults], sources: Sequence[Sequence[int]]
) -> None:
    """Write confounds, image and slice quality, and hmcOptimization.csv of one output.

    Parameters
    ----------
    stem : Path
        Folder and prefix of the output.
    quality : Quality
    files : sequence of str
        Source run of each acquired volume.
    members : sequence of UnitResults
        Units that make up the output, in order.
    sources : sequence of sequence of int
        Acquired volumes that were merged into each output volume; empty if none were.
    """
    columns = {name: column for name, column in quality.confounds.items() if name != "run"}
    columns["original_file"] = np.array(files, dtype=object)
    _write_confounds(stem, columns, sources)
    image_quality = {k: np.array([v]) for k, v in quality.table.items()}
    write_tsv(_with_ending(stem, "_space-ACPC_desc-image_qc.tsv"), image_quality)
    write_json(_with_ending(stem, "_space-ACPC_desc-image_qc.json"), column_descriptions(image_quality))
    offsets = np.cumsum([0, *(len(unit.acquired.dwi) for unit in members)])
    outliers = [
        (v + offset, k) for unit, offset in zip(members, offsets, strict=False) for v, k in outlier_slices(unit.motions)
    ]
    write_json(
        _with_ending(stem, "_space-ACPC_desc-slice_qc.json"),
        {"Description": "Robust z-score of the residual of each slice from its prediction, acquired volume by slice",
         "slice_z": [[round(z, 3) if np.isfinite(z) else None for z in row] for row in quality.slice_z.tolist()],
         "lost": [[int(v), int(k)] for v, k in outliers],
         "replaced": members[0].settings.motion.outliers == "replace"},
    )  # fmt: skip
    rows = [row for unit in members for motion in unit.motions for row in motion.trace]
    with _with_ending(stem, "_hmcOptimization.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else ["iter_num"])
        writer.writeheader()
        writer.writerows(rows)


def _with_ending(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


# merged volumes: these columns keep the value of largest magnitude, others the mean
MAXIMUM_COLUMNS = ("framewise_displacement", "trans_", "rot_", "eddy_")


def _write_confounds(stem: Path, columns: dict[str, np.ndarray], sources: Sequence[Sequence[int]]) -> None:
    """Write the confounds table, one row per output volume, and its sidecar."""
    if sources:
        columns = {name: _merged_column(name, column, sources) for name, column in columns.items()}
    write_tsv(_with_ending(stem, "_desc-confounds_timeseries.tsv"), columns)
    descriptions = {k: CONFOUNDS[k] for k in columns if k in CONFOUNDS}
    write_json(_with_ending(stem, "_desc-confounds_timeseries.json"), descriptions)


def _merged_column(name: str, column: np.ndarray, sources: Sequence[Sequence[int]]) -> np.ndarray:
    groups = [column[list(members)] for members in sources]
    if column.dtype == object:
        return np.array(["+".join(dict.fromkeys(map(str, group))) for group in groups], dtype=object)
    if name.startswith(MAXIMUM_COLUMNS):
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
            "Description": f"Displacement along the phase-encoding axis by eddy currents and drift of the field: "
            f"coefficient of {term}, with i, j, k from the image centre along the voxel axes in units of 100 mm",
            "Units": "mm",
        }
        for name, term in EDDY_TERMS.items()
    },
    "signal_drift": {"Description": "Signal relative to the first volume of the run, fitted and divided out"},
    "hmc_r2": {"Description": "R² between the aligned volume and its prediction"},
    "hmc_xcorr": {"Description": "Correlation between the aligned volume and its prediction"},
    "b0_shift_measured": {
        "Description": "Mean displacement of the brain between the volume's range of b-values and b=0, as measured",
        "Units": "mm",
    },
    "b0_shift_applied": {"Description": "The part of b0_shift_measured that was corrected", "Units": "mm"},
    "grad_x": {"Description": "b-vector, R component, in ACPC world coordinates"},
    "grad_y": {"Description": "b-vector, A component, in ACPC world coordinates"},
    "grad_z": {"Description": "b-vector, S component, in ACPC world coordinates"},
    "bval": {"Description": "b-value", "Units": "s/mm^2"},
    "original_file": {"Description": "Source run of the volume"},
}


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write indented JSON that ends with a newline."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_tsv(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write columns with a header row; values that are not finite become n/a."""
    with path.open("w") as stream:
        stream.write("\t".join(columns) + "\n")
        for row in zip(*columns.values(), strict=True):
            stream.write("\t".join(_cell(value) for value in row) + "\n")


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float | np.floating) and not np.isfinite(value)):
        return "n/a"
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)
