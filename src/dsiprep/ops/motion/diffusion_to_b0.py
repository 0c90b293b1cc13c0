"""Alignment of the diffusion-weighted volumes, as a group, with the b=0 reference.

Volumes are registered to predictions made from one another, so nothing ties them to b=0 unless b=0 volumes are spread
over the series, nor one shell to the next if shells are acquired in blocks. Here the mean aligned image of the lowest
b-values is registered to the mean b=0 image by mutual information, and shells acquired in blocks each to the one below,
whose contrast is closest. A shift that this measurement cannot distinguish from none is not applied.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.motion import B0Shift
from dsiprep.ops.image.affine import point_displacement
from dsiprep.ops.image.epi_resampling import warp_volume
from dsiprep.ops.motion.b0_alignment import mean_b0
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.pyramid import PyramidLevel
from dsiprep.ops.registration.linear import register_linear

__all__ = ["align_diffusion_to_b0", "b_ranges"]

log = logging.getLogger("dsiprep")
SIGNIFICANT_MM = 0.2  # mean displacement of the brain; registrations of still phantoms gave 0.03 to 0.11 mm
SIGNIFICANT_GAIN = 0.03  # of the mutual information; still phantoms gained up to 0.02
HIGH_B, HIGH_B_GAIN = 1500.0, 0.06  # s/mm²: beyond, contrast differs more; a subject at b 2500 gained 0.04
BLOCK_GAP = 6  # volumes between those of a range and the nearest of lower b, above which ranges form blocks
MAX_SHELLS = 6
MIN_VOLUMES = 6  # in a range of b-values: the mean of fewer depends on their directions
LATTICE_RANGES = 3


def align_diffusion_to_b0(
    dwi: DWI, level: PyramidLevel, state: MotionState, before: B0Shift | None = None
) -> tuple[MotionState, B0Shift]:
    """Move the diffusion-weighted volumes of each range of b-values onto the b=0 reference.

    Parameters
    ----------
    dwi : DWI
    level : PyramidLevel
        Full resolution.
    state : MotionState
        With poses in which the volumes of each range are aligned with each other.
    before : B0Shift, optional
        What was found earlier. If a shift was applied then, every measurement is the best estimate, and is applied.

    Returns
    -------
    state : MotionState
    shift : B0Shift
        The larger of what is found now and what was found before. Ranges acquired among those below move with them.
    """
    brain = np.zeros(level.grid.shape, np.float32)
    brain[tuple(level.points.voxels.astype(int).T)] = 1
    mask, probes = Volume(torch.from_numpy(brain), level.grid), level.probe_points()
    correction, identity, applied = np.eye(4), np.eye(4)[None], 0.0
    transforms = state.transforms.copy()
    found = B0Shift(np.full(len(dwi), np.nan), np.zeros(len(dwi)))
    step_found = before is not None and bool(before.applied.any())
    lower: list[np.ndarray] = []
    for volumes in b_ranges(dwi.bvals, dwi.is_b0):
        if not lower or _in_blocks(volumes, np.concatenate(lower)):
            if lower:
                target = _mean_image(dwi, lower[-1], state.with_transforms(transforms))
            else:
                target = mean_b0(dwi, state.shifted_transforms()).to("cpu")
            image = _mean_image(dwi, volumes, state.with_transforms(transforms @ correction))
            fit = register_linear(image, target, fixed_mask=mask, search=False)
            shift = float(point_displacement(fit.matrix[None], identity, probes).mean())
            gain = (fit.score_after - fit.score_before) / max(fit.score_before - 1, 1e-9)
            least = SIGNIFICANT_GAIN if dwi.bvals[volumes].mean() <= HIGH_B else HIGH_B_GAIN
            found.measured[volumes] = shift
            if step_found or (shift > SIGNIFICANT_MM and gain > least):
                correction = correction @ fit.matrix
                applied = float(point_displacement(correction[None], identity, probes).mean())
                log.info("motion: volumes of b %.0f and above moved by %.2f mm", dwi.bvals[volumes].min(), shift)
        transforms[volumes] = transforms[volumes] @ correction
        found.applied[volumes] = applied
        lower.append(volumes)
    return state.with_transforms(transforms), before.merge(found) if before else found


def b_ranges(bvals: np.ndarray, is_b0: np.ndarray) -> list[np.ndarray]:
    """Indices of the diffusion-weighted volumes by increasing b-value: shells, or thirds of a lattice.

    Ranges of fewer than six volumes are merged with the one below.
    """
    weighted = np.flatnonzero(~is_b0)
    order = weighted[np.argsort(bvals[weighted], kind="stable")]
    shell = np.round(bvals[order] / 100)
    if len(np.unique(shell)) <= MAX_SHELLS:
        parts = np.split(order, np.flatnonzero(np.diff(shell)) + 1)
    else:
        parts = np.array_split(order, LATTICE_RANGES)
    ranges: list[np.ndarray] = []
    for part in parts:
        if ranges and min(len(part), len(ranges[-1])) < MIN_VOLUMES:
            ranges[-1] = np.concatenate([ranges[-1], part])
        else:
            ranges.append(part)
    return ranges


def _mean_image(dwi: DWI, volumes: np.ndarray, state: MotionState) -> Volume:
    """Mean of some aligned volumes on the grid of `dwi`, their eddy currents corrected."""
    total = torch.zeros(dwi.grid.shape, device=dwi.data.device)
    for volume in volumes:
        eddy, matrix = state.eddy_of(np.array([volume])), state.transforms[volume]
        total += warp_volume(dwi.data[int(volume)], dwi.grid, dwi.grid, matrix, eddy=eddy)
    return Volume((total / len(volumes)).clamp(min=0), dwi.grid).to("cpu")


def _in_blocks(volumes: np.ndarray, lower: np.ndarray) -> bool:
    """Whether volumes were acquired far from all volumes of lower b-value."""
    return bool(np.median(np.abs(volumes[:, None] - lower).min(1)) > BLOCK_GAP)
