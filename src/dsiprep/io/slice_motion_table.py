"""Table of the poses and gradients of single slices, where the head moved while volumes were acquired."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsiprep.data.results import Motion, UnitResults
from dsiprep.io.qc_tables import write_json, write_tsv
from dsiprep.ops.image.affine import rigid_parameters
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs

__all__ = ["write_slice_motion"]

COLUMNS: dict[str, dict[str, str]] = {
    "volume": {"Description": "Volume of the acquired series, from 0"},
    "slice": {"Description": "Slice along the slice axis of the acquired series, from 0"},
    "shot": {"Description": "Number of the shot within the volume, in order of acquisition, from 0"},
    "trans_x": {"Description": "Translation towards R at the centre of the dwiref", "Units": "mm"},
    "trans_y": {"Description": "Translation towards A at the centre of the dwiref", "Units": "mm"},
    "trans_z": {"Description": "Translation towards S at the centre of the dwiref", "Units": "mm"},
    "rot_x": {"Description": "Rotation vector about the centre of the dwiref, R component", "Units": "rad"},
    "rot_y": {"Description": "Rotation vector about the centre of the dwiref, A component", "Units": "rad"},
    "rot_z": {"Description": "Rotation vector about the centre of the dwiref, S component", "Units": "rad"},
    "grad_x": {"Description": "b-vector that the head experienced, R component, in ACPC world coordinates"},
    "grad_y": {"Description": "b-vector that the head experienced, A component, in ACPC world coordinates"},
    "grad_z": {"Description": "b-vector that the head experienced, S component, in ACPC world coordinates"},
}


def write_slice_motion(stem: Path, results: UnitResults) -> None:
    """Write the slices of all volumes whose shots have poses of their own; nothing if there are none.

    Parameters
    ----------
    stem : Path
        Folder and prefix of the output.
    results : UnitResults
    """
    parts = [_rows(results, motion) for motion in results.motions if motion.slices is not None]
    rows = np.concatenate([np.zeros((0, len(COLUMNS))), *parts])
    if not len(rows):
        return
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    columns = {name: rows[:, number] for number, name in enumerate(COLUMNS)}
    for name in ("volume", "slice", "shot"):
        columns[name] = columns[name].astype(int)
    write_tsv(stem.with_name(f"{stem.name}_space-ACPC_desc-slicemotion_timeseries.tsv"), columns)
    write_json(stem.with_name(f"{stem.name}_space-ACPC_desc-slicemotion_timeseries.json"), COLUMNS)


def _rows(results: UnitResults, motion: Motion) -> np.ndarray:
    """Rows of one blip, (r, columns)."""
    assert motion.slices is not None
    slices, dwi = motion.slices, results.acquired.dwi
    pose = np.eye(4)
    if results.distortion is not None:
        pose = results.distortion.poses[int(dwi.blip[motion.volumes[0]])]
    to_dwiref = pose @ results.coregistration.dwiref_to_acpc.matrix
    out = [np.zeros((0, len(COLUMNS)))]
    for row in np.flatnonzero(slices.moving):
        poses = slices.slice_poses[row]
        parameters = rigid_parameters(poses, motion.dwiref.grid.centre)
        volume = int(motion.volumes[row])
        gradients = rotate_bvecs(np.tile(dwi.bvecs[volume], (len(poses), 1)), poses @ to_dwiref)
        index = np.stack([np.full(len(poses), volume), np.arange(len(poses)), slices.shot_of], axis=1)
        out.append(np.hstack([index, parameters[:, 3:], parameters[:, :3], gradients]))
    return np.concatenate(out)
