"""Errors of the poses of single slices where the phantom moved while volumes were acquired."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.score.read import Truth, apply

__all__ = ["read_slice_poses", "slice_errors"]

LEAST_POINTS = 30  # of brain; slices with fewer are not compared


def read_slice_poses(path: Path, truth: Truth, estimated: np.ndarray) -> np.ndarray:
    """Poses of all slices, (n, slices, 4, 4): those of a table, and the pose of the volume where there are none.

    Parameters
    ----------
    path : Path
        `desc-slicemotion_timeseries.tsv`.
    truth : Truth
        Of the acquired series, about the centre of whose grid the table's rotations are.
    estimated : ndarray, (n, 4, 4)
        One pose for each volume.
    """
    shape = np.array(truth.table["grid_shape"])
    poses = np.repeat(estimated[:, None], shape[2], axis=1)
    centre = apply(np.asarray(truth.table["grid_affine"], float), (shape[None] - 1) / 2)[0]
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            values = [float(row[name]) for name in ("rot_x", "rot_y", "rot_z", "trans_x", "trans_y", "trans_z")]
            poses[int(row["volume"]), int(row["slice"])] = rigid_matrix(np.array(values), centre)
    return poses


def slice_errors(truth: Truth, poses: np.ndarray, common: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Mean error (mm) of the pose of each slice over its brain, (n, slices); NaN where there is too little of it.

    Parameters
    ----------
    truth : Truth
    poses : ndarray, (n, slices, 4, 4)
        From points of the dwiref to points of each slice.
    common : ndarray, (4, 4)
        From head points to points of the dwiref.
    points : ndarray, (m, 3)
        Brain points in the head.
    """
    true = truth.slice_poses
    to_voxels = np.linalg.inv(np.asarray(truth.table["grid_affine"], float))
    out = np.full(true.shape[:2], np.nan)
    for volume, slice_poses in enumerate(true):
        mean = truth.poses[volume]
        number = np.round(apply(to_voxels, apply(mean, points))[:, 2]).astype(int)
        for k, pose in enumerate(slice_poses):
            within = points[number == k]
            if len(within) >= LEAST_POINTS:
                out[volume, k] = point_displacement((poses[volume, k] @ common)[None], pose[None], within).mean()
    return out
