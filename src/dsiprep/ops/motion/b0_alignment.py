"""Alignment of the b=0 volumes of a series, interpolation of poses between them, and their mean."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.ops.image.affine import point_displacement
from dsiprep.ops.image.epi_resampling import field_of_view, warp_volume
from dsiprep.ops.motion.gauss_newton import align
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.poses import interpolate_poses, median_pose
from dsiprep.ops.motion.pyramid import PyramidLevel

__all__ = ["align_b0s", "interpolate_from_b0s", "mean_b0", "nearest_b0"]

MAX_ROUNDS = 4
STEPS_PER_ROUND = 6  # Gauss-Newton steps
CONVERGED_MM = 0.01  # largest movement of a b=0 volume in a round below which rounds stop


def align_b0s(dwi: DWI, level: PyramidLevel, state: MotionState) -> MotionState:
    """Align each b=0 volume to the mean of the others; the frame is the median of their poses.

    Parameters
    ----------
    dwi : DWI
    level : PyramidLevel
        Of the same series.
    state : MotionState
        Initial poses.

    Returns
    -------
    MotionState
        With updated poses of the b=0 volumes; unchanged if there is only one.
    """
    b0 = np.flatnonzero(dwi.is_b0)
    if len(b0) < 2:
        return state
    transforms = state.transforms.copy()
    moving = level.take(b0, state.eddy_of(b0))
    for _ in range(MAX_ROUNDS):
        observed = level.sample(b0, state.with_transforms(transforms))
        targets = (observed.sum(0, keepdim=True) - observed) / (len(b0) - 1)
        aligned = align(moving, level.points, targets.contiguous(), transforms[b0], steps=STEPS_PER_ROUND).transforms
        if len(b0) == 2:  # each is aligned to the other, so only one of the two may move
            aligned[0] = transforms[b0[0]]
        aligned = aligned @ np.linalg.inv(median_pose(aligned, level.points.centre))
        change = point_displacement(transforms[b0], aligned, level.probe_points()).mean(1).max()
        transforms[b0] = aligned
        if change < CONVERGED_MM:
            break
    return state.with_transforms(transforms)


def nearest_b0(dwi: DWI) -> np.ndarray:
    """Index of the b=0 volume nearest in time to each volume, (n,): of the same run, or of another if it has none."""
    b0 = np.flatnonzero(dwi.is_b0)
    order = np.arange(len(dwi))
    other_run = dwi.run[:, None] != dwi.run[b0]
    return b0[(np.abs(order[:, None] - b0) + len(dwi) * other_run).argmin(1)]


def interpolate_from_b0s(dwi: DWI, level: PyramidLevel, state: MotionState) -> MotionState:
    """Interpolate the poses of diffusion-weighted volumes in time between those of the b=0 volumes, run by run.

    Parameters are those of `align_b0s`. Volumes of a run without b=0 get the pose of the nearest b=0 of another run.
    """
    transforms = state.transforms[nearest_b0(dwi)]
    for run in np.unique(dwi.run):
        volumes = np.flatnonzero(dwi.run == run)
        known = dwi.is_b0[volumes]
        if known.any():
            transforms[volumes] = interpolate_poses(state.transforms[volumes], known, level.points.centre)
    return state.with_transforms(transforms)


def mean_b0(dwi: DWI, transforms: np.ndarray) -> Volume:
    """Mean of the aligned b=0 volumes, in each voxel over the volumes that cover it.

    Parameters
    ----------
    dwi : DWI
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, world RAS+ mm.

    Returns
    -------
    Volume
        On the grid of `dwi`; zero where no volume covers the voxel.
    """
    total = torch.zeros(dwi.grid.shape, device=dwi.data.device)
    coverage = torch.zeros_like(total)
    for volume in np.flatnonzero(dwi.is_b0):
        total += warp_volume(dwi.data[int(volume)], dwi.grid, dwi.grid, transforms[volume])
        coverage += field_of_view(dwi.grid, dwi.grid, transforms[volume]).to(coverage.device)
    return Volume(total / coverage.clamp(min=1), dwi.grid)
