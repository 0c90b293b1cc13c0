"""The b=0 image of a phase encoding that was scanned only to estimate the distortion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawEpi
from dsiprep.data.results import Blip
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.motion.b0_alignment import align_b0s
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pyramid import COARSE_MM, build_pyramid

__all__ = ["aligned_mean", "reference_blip"]


def reference_blip(epis: Sequence[RawEpi], name: str) -> Blip:
    """The blip of images that share one phase encoding, on the grid of the first.

    Parameters
    ----------
    epis : sequence of RawEpi
        At least one. Their phase-encoding axes and displacements per Hz agree in scanner coordinates.
    name : str
        "up" or "down".

    Returns
    -------
    Blip
        With one image, in the median pose of the volumes.
    """
    grid = epis[0].grid
    volumes = [(volume, epi.grid) for epi in epis for volume in epi.data]
    return Blip(name, epis[0].pe, aligned_mean(volumes, grid)[None], grid)


def aligned_mean(volumes: Sequence[tuple[torch.Tensor, Grid]], grid: Grid) -> torch.Tensor:
    """Mean of volumes (i, j, k) of one phase encoding, aligned rigidly to each other, on `grid`.

    Parameters
    ----------
    volumes : sequence of (Tensor, Grid)
        Each is interpolated once. A single one on `grid` is returned as it is.
    grid : Grid

    Returns
    -------
    Tensor, (i, j, k)
        In each voxel the mean of the volumes that cover it.
    """
    if len(volumes) == 1:
        return _onto(*volumes[0], grid, np.eye(4))
    data = torch.stack([_onto(volume, source, grid, np.eye(4)) for volume, source in volumes])
    poses = _poses(data, grid)
    total, coverage = torch.zeros(grid.shape), torch.zeros(grid.shape)
    for (volume, source), pose in zip(volumes, poses, strict=True):
        total += _onto(volume, source, grid, pose)
        coverage += resample_onto(torch.ones(1, *source.shape), source, grid, pose, cubic=True)[0]
    return (total / coverage.clamp(min=1e-3)) * (coverage > 0.5)


def _onto(volume: torch.Tensor, source: Grid, grid: Grid, pose: np.ndarray) -> torch.Tensor:
    if source.matches(grid) and np.array_equal(pose, np.eye(4)):
        return volume.float()
    # cubic splines overshoot at edges, and intensities are not negative
    return resample_onto(volume[None].float(), source, grid, pose, cubic=True)[0].clamp_(min=0)


def _poses(data: torch.Tensor, grid: Grid) -> np.ndarray:
    """Poses (n, 4, 4) of volumes (n, i, j, k): points of their median pose to points of each."""
    count = len(data)
    mask = brain_mask_b0(Volume(data.mean(0), grid))
    if not bool((mask.data > 0.5).any()):
        return np.tile(np.eye(4), (count, 1, 1))
    zeros = np.zeros(count, int)
    series = DWI(data, grid, np.zeros(count), np.zeros((count, 3)), zeros, zeros, 0.0)
    identity = np.tile(np.eye(4), (count, 1, 1))
    state = MotionState(identity, None, np.zeros((10, 3)), np.zeros((count, 4)), None, 2, grid)
    for level in build_pyramid(series, mask, COARSE_MM):
        state = align_b0s(series, level, state)
    return state.transforms
