"""Joining corrected series of one subject, which are in the same space and on one voxel lattice, into one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy, Preprocessed
from dsiprep.errors import InputError
from dsiprep.ops.qspace.matching_gradients import same_gradients
from dsiprep.stages.resample import LEAST_COVERED, finish, merge_volumes

__all__ = ["join"]


def join(
    parts: tuple[Preprocessed, ...],
    nominal: tuple[DWI, ...],
    anatomy: Anatomy,
    merge: str = "concat",
    harmonize_b0: bool = True,
) -> Preprocessed:
    """Join several corrected series of one subject in the same ACPC space into one series.

    Parameters
    ----------
    parts : tuple of Preprocessed
        At the same resolution; their grids may cover different parts of the head.
    nominal : tuple of DWI
        The series each part was computed from, with the nominal b-vectors in world RAS+.
    anatomy : Anatomy
    merge : str
        "concat", or "average" or "least-squares" to average volumes of different parts with the same gradient.
    harmonize_b0 : bool
        Scale the parts to the same mean b=0 in the brain.

    Returns
    -------
    Preprocessed
        On a grid that covers all of them, without interpolation. `sources` indexes the volumes of all `nominal` series.

    Raises
    ------
    InputError
        If the grids are not offset by whole voxels.
    """
    grid = _common_grid([part.dwi.grid for part in parts])
    mask = torch.stack([_embed(part.mask.data[None], part.mask.grid, grid)[0] for part in parts]).amin(0) > 0.5
    data = torch.cat([_embed(part.dwi.data, part.dwi.grid, grid) for part in parts])
    counts = [len(part.dwi) for part in parts]
    owner = np.repeat(np.arange(len(parts)), counts)
    bvals, bvecs = (np.concatenate([getattr(part.dwi, name) for part in parts]) for name in ("bvals", "bvecs"))
    starts = np.cumsum([0, *(len(dwi) for dwi in nominal)])
    part_sources = [part.sources or tuple((v,) for v in range(len(part.dwi))) for part in parts]
    sources = tuple(
        tuple(int(v + start) for v in s) for start, rows in zip(starts, part_sources, strict=False) for s in rows
    )
    signed = any(part.dwi.signed for part in parts)
    series = DWI(data, grid, bvals, bvecs, owner, owner, parts[0].dwi.b0_threshold, signed)
    if harmonize_b0:
        _harmonise_b0(series, owner, mask)
    if merge != "concat":
        firsts = [s[0] for s in sources]
        nominal_bvals, nominal_bvecs = (
            np.concatenate([getattr(dwi, name) for dwi in nominal]) for name in ("bvals", "bvecs")
        )
        groups = same_gradients(nominal_bvals[firsts], nominal_bvecs[firsts], owner, series.is_b0)
        sources = tuple(tuple(v for row in group for v in sources[row]) for group in groups)
        series = merge_volumes(series, tuple(groups), None, owner)
    finished = finish(series, anatomy, "none", *_joined_coverage(parts, counts, grid), sources)
    deviation = _joined_deviation(parts, counts, grid)
    return finished if deviation is None else replace(finished, deviation=deviation)


def _joined_deviation(parts: tuple[Preprocessed, ...], counts: list[int], grid: Grid) -> torch.Tensor | None:
    """Deviation of the gradients, mean over all volumes; None if it is unknown for a part."""
    total = torch.zeros(9, *grid.shape)
    for part, count in zip(parts, counts, strict=True):
        if part.deviation is None:
            return None
        total += _embed(part.deviation, part.dwi.grid, grid) * count
    return total / sum(counts)


def _joined_coverage(
    parts: tuple[Preprocessed, ...], counts: list[int], grid: Grid
) -> tuple[Volume | None, torch.Tensor | None]:
    """Coverage of all volumes together, and where every part has enough data; None if it is unknown for a part."""
    maps = [_embed(part.coverage.data[None], part.dwi.grid, grid)[0] for part in parts if part.coverage]
    if len(maps) < len(parts):
        return None, None
    total = sum((each * count for each, count in zip(maps, counts, strict=True)), torch.zeros(grid.shape))
    return Volume(total / sum(counts), grid), torch.stack(maps).amin(0) >= LEAST_COVERED


def _common_grid(grids: list[Grid]) -> Grid:
    """The smallest grid that covers all of these, which must share one voxel lattice."""
    first = grids[0].affine
    corners = np.stack([np.linalg.solve(first[:3, :3], grid.affine[:3, 3] - first[:3, 3]) for grid in grids])
    same = all(np.allclose(grid.affine[:3, :3], first[:3, :3], atol=1e-4) for grid in grids)
    if not same or np.abs(corners - np.round(corners)).max() > 0.01:
        raise InputError(
            "the outputs cannot be joined because they are not on one voxel lattice; use --distortion-group-merge none"
        )
    low = np.round(corners).astype(int)
    lowest = low.min(0)
    shape = (low + [grid.shape for grid in grids]).max(0) - lowest
    affine = first.copy()
    affine[:3, 3] += first[:3, :3] @ lowest
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _embed(data: torch.Tensor, grid: Grid, target: Grid) -> torch.Tensor:
    """Volumes (n, i, j, k) on a larger grid of the same lattice, zero outside their own grid."""
    if grid.shape == target.shape:
        return data
    start = np.round(np.linalg.solve(target.affine, grid.affine[:, 3])[:3]).astype(int)
    out = torch.zeros(len(data), *target.shape, dtype=data.dtype)
    i, j, k = (slice(int(s), int(s) + n) for s, n in zip(start, grid.shape, strict=True))
    out[:, i, j, k] = data
    return out


def _harmonise_b0(series: DWI, owner: np.ndarray, mask: torch.Tensor) -> None:
    """Scale the parts in place to the same mean b=0; parts without b=0 volumes are unchanged."""
    means = np.full(int(owner.max()) + 1, np.nan)
    for part in range(len(means)):
        b0 = np.flatnonzero((owner == part) & series.is_b0)
        if len(b0):
            means[part] = float(torch.stack([series.data[int(v)][mask].mean() for v in b0]).mean())
    means[~(means > 0)] = np.nan
    factors = np.where(np.isfinite(means), np.nanmean(means) / means, 1.0)
    for v, part in enumerate(owner):
        series.data[v].mul_(float(factors[part]))
