"""Raw runs become one series: one grid, one intensity scale, blips told apart, sampling scheme recognised."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawEpi, RawRun, RawUnit
from dsiprep.data.results import Acquired, Blip
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.qspace.sampling_scheme import recognise
from dsiprep.settings import AcquisitionSettings

METHODS = {
    "conform": (
        "Runs of one session were concatenated on the voxel grid of the first. Where their fields of view "
        "differed, they were resampled onto it by cubic B-splines."
    ),
    "harmonize_b0": ("Each run was multiplied by a factor so that the mean b=0 intensity in the brain was the same."),
    "scheme": (
        "The sampling scheme was recognised from the b-table: q-vectors that lie on a Cartesian lattice, "
        "whatever its turn and scale, make diffusion spectrum imaging [@wedeen2005]."
    ),
}
SAME_TIME_S = 0.004


def conform(raw: RawUnit, settings: AcquisitionSettings) -> Acquired:
    """One series from the runs of a unit.

    Parameters
    ----------
    raw : RawUnit
    settings : AcquisitionSettings

    Returns
    -------
    Acquired
        Voxels as in the file of the first run; a single run's data are passed through untouched.
    """
    grid = raw.runs[0].grid
    runs = [_run_onto(run, grid) for run in raw.runs]
    epis = [_epi_onto(epi, grid) for epi in raw.epis]
    counts = [len(run.bvals) for run in runs]
    data = runs[0].data if len(runs) == 1 else torch.cat([run.data for run in runs])
    blips, blip_of_run = _blips(runs, epis)
    dwi = DWI(
        data,
        grid,
        np.concatenate([run.bvals for run in runs]),
        np.concatenate([run.bvecs for run in runs]),
        np.repeat(np.arange(len(runs)), counts),
        np.repeat(blip_of_run, counts),
        settings.b0_threshold,
    )
    mask = brain_mask_b0(Volume(dwi.data[torch.as_tensor(dwi.is_b0)].mean(0), grid))
    scales = np.ones(len(runs))
    if settings.harmonize_b0 and (len(runs) > 1 or epis):
        dwi, blips, scales = _harmonized(dwi, blips, mask.data > 0)
    scheme = recognise(dwi.bvals, dwi.bvecs, settings.b0_threshold)
    return Acquired(dwi, blips, scheme, mask, scales, multiband_groups([run.slice_times for run in runs]))


def _run_onto(run: RawRun, grid: Grid) -> RawRun:
    if run.grid.matches(grid):
        return run
    pe = _along(run.pe, run.grid, grid) if run.pe else None
    return replace(run, data=_resampled(run.data, run.grid, grid), grid=grid, pe=pe)


def _epi_onto(epi: RawEpi, grid: Grid) -> RawEpi:
    if epi.grid.matches(grid):
        return epi
    data = _resampled(epi.data, epi.grid, grid)
    return replace(epi, data=data, grid=grid, pe=_along(epi.pe, epi.grid, grid))


def _resampled(data: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    # cubic splines overshoot at edges, and intensities are not negative
    return resample_onto(data, source, target, cubic=True).clamp_(min=0)


def _along(pe: PhaseEncoding, source: Grid, target: Grid) -> PhaseEncoding:
    """The same displacement in mm, told in the voxel axes of another grid."""
    step = np.linalg.solve(target.affine[:3, :3], pe.vector(source))  # one voxel of the source, in target voxels
    axis = int(np.argmax(np.abs(step)))
    polarity = pe.polarity * (1 if step[axis] > 0 else -1)
    readout = None if pe.readout_time is None else pe.readout_time * abs(float(step[axis]))
    return PhaseEncoding(axis, polarity, readout)


def _blips(runs: list[RawRun], epis: list[RawEpi]) -> tuple[tuple[Blip, ...], np.ndarray]:
    """Blips, up before down, and the blip of each run. One where no image has the opposite sign."""
    lead = runs[0].pe
    if lead is None or any(run.pe is None for run in runs):
        empty = torch.empty(0, *runs[0].grid.shape)
        return (Blip("only", None, empty),), np.zeros(len(runs), int)
    encodings = [run.pe for run in runs if run.pe]
    usable = [epi for epi in epis if epi.pe.axis == lead.axis]
    signs = sorted({pe.polarity for pe in (*encodings, *(epi.pe for epi in usable))}, reverse=True)
    names = {1: "up", -1: "down"} if len(signs) > 1 else {signs[0]: "only"}
    blips = []
    for sign in signs:
        images = [epi for epi in usable if epi.pe.polarity == sign]
        pe = next((pe for pe in encodings if pe.polarity == sign), None) or images[0].pe
        stacked = torch.cat([epi.data for epi in images]) if images else torch.empty(0, *runs[0].grid.shape)
        blips.append(Blip(names[sign], pe, stacked))
    return tuple(blips), np.array([signs.index(pe.polarity) for pe in encodings])


def _harmonized(dwi: DWI, blips: tuple[Blip, ...], brain: torch.Tensor) -> tuple[DWI, tuple[Blip, ...], np.ndarray]:
    """Mean b=0 in the brain made equal over runs and b=0 images of fmap/; runs without b=0 stay."""
    means = np.array([_mean_b0(dwi, run, brain) for run in range(int(dwi.run.max()) + 1)])
    goal = float(np.nanmean(means))
    scales = np.where(np.isfinite(means), goal / means, 1.0)
    if len(scales) > 1:
        factors = torch.as_tensor(scales[dwi.run], dtype=torch.float32)
        # torch.cat made a copy of several runs: it may be changed in place
        dwi = dwi.with_data(dwi.data.mul_(factors[:, None, None, None]))
    scaled = []
    for blip in blips:
        levels = blip.epis[:, brain].mean(1)
        factors = torch.where(levels > 0, goal / levels, torch.ones_like(levels))
        scaled.append(replace(blip, epis=blip.epis * factors[:, None, None, None]))
    return dwi, tuple(scaled), scales


def _mean_b0(dwi: DWI, run: int, brain: torch.Tensor) -> float:
    chosen = torch.as_tensor((dwi.run == run) & dwi.is_b0)
    mean = float(dwi.data[chosen].mean(0)[brain].mean()) if chosen.any() else float("nan")
    return mean if mean > 0 else float("nan")


def multiband_groups(slice_times: list[tuple[float, ...]]) -> tuple[tuple[int, ...], ...]:
    """Slices excited together, in order of time.

    Parameters
    ----------
    slice_times : list of tuple of float
        Per run, the time of each slice in s.

    Returns
    -------
    tuple of tuple of int
        Empty where a run's times are unknown, runs differ, or groups are of unequal size.
    """
    found = {_groups(times) for times in slice_times}
    groups = found.pop() if len(found) == 1 else ()
    return groups if len({len(group) for group in groups}) == 1 else ()


def _groups(times: tuple[float, ...]) -> tuple[tuple[int, ...], ...]:
    groups: list[list[int]] = []
    last = -np.inf
    for index in np.argsort(times, kind="stable"):
        if times[index] - last > SAME_TIME_S:
            groups.append([])
        groups[-1].append(int(index))
        last = times[index]
    return tuple(tuple(sorted(group)) for group in groups)
