"""The b=0 volumes of a series: aligned with each other, the volumes between them, their mean."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.ops.image.affine import point_displacement
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.motion.gauss_newton import align
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.poses import interpolate_poses, median_pose
from dsiprep.ops.motion.pyramid import PyramidLevel

__all__ = ["align_b0s", "interpolate_from_b0s", "mean_b0", "nearest_b0"]

ROUNDS = 4
STEPS = 6  # Gauss-Newton steps per round
SETTLED_MM = 0.01  # no b=0 volume moved more than this in a round


def align_b0s(dwi: DWI, level: PyramidLevel, state: MotionState) -> MotionState:
    """b=0 volumes to the mean of the others; the frame is the middle of their poses.

    Parameters
    ----------
    dwi : DWI
    level : PyramidLevel
        Of its volumes.
    state : MotionState
        Where they are so far.

    Returns
    -------
    MotionState
        With other poses of the b=0 volumes; the same where there is only one.
    """
    index = np.flatnonzero(dwi.is_b0)
    if len(index) < 2:
        return state
    out = state.transforms.copy()
    data = level.take(index)
    for _ in range(ROUNDS):
        observed = level.sample(index, state.with_transforms(out))
        targets = (observed.sum(0, keepdim=True) - observed) / (len(index) - 1)
        moved = align(data, level.grid, level.points, targets.contiguous(), out[index], steps=STEPS).transforms
        if len(index) == 2:  # each has gone all the way to the other: halfway is enough
            moved[0] = out[index[0]]
        moved = moved @ np.linalg.inv(median_pose(moved, level.points.centre))
        change = point_displacement(out[index], moved, level.probe_points()).mean(1).max()
        out[index] = moved
        if change < SETTLED_MM:
            break
    return state.with_transforms(out)


def nearest_b0(dwi: DWI) -> np.ndarray:
    """For each volume, (n,), the b=0 volume of its run nearest in time (of any run where its own has none)."""
    b0 = np.flatnonzero(dwi.is_b0)
    order = np.arange(len(dwi))
    elsewhere = dwi.run[:, None] != dwi.run[b0]
    return b0[(np.abs(order[:, None] - b0) + len(dwi) * elsewhere).argmin(1)]


def interpolate_from_b0s(dwi: DWI, level: PyramidLevel, state: MotionState) -> MotionState:
    """Diffusion-weighted volumes between the b=0 volumes before and after them, run by run.

    Parameters as for `align_b0s`; in a run without b=0, volumes lie as the nearest of another run.
    """
    out = state.transforms[nearest_b0(dwi)]
    for run in np.unique(dwi.run):
        own = np.flatnonzero(dwi.run == run)
        known = dwi.is_b0[own]
        if known.any():
            out[own] = interpolate_poses(state.transforms[own], known, level.points.centre)
    return state.with_transforms(out)


def mean_b0(dwi: DWI, transforms: np.ndarray) -> Volume:
    """Mean of the aligned b=0 volumes, each where it reaches.

    Parameters
    ----------
    dwi : DWI
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, world RAS+ mm.

    Returns
    -------
    Volume
        On the grid of `dwi`; zero where none of them reaches.
    """
    total = torch.zeros(dwi.grid.shape, device=dwi.data.device)
    number = torch.zeros_like(total)
    ones = torch.ones_like(dwi.data[:1])
    for volume in np.flatnonzero(dwi.is_b0):
        matrix = transforms[volume]
        total += resample_onto(dwi.data[volume : volume + 1], dwi.grid, dwi.grid, matrix, cubic=True)[0]
        number += resample_onto(ones, dwi.grid, dwi.grid, matrix, cubic=True)[0]
    return Volume((total / number.clamp(min=1e-3)).clamp(min=0) * (number > 0.5), dwi.grid)
