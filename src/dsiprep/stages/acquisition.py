"""Conform raw runs to one series: common grid, intensity scale, assignment to blips, sampling scheme."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.acquisition import LEAST_ANGLE, PhaseEncoding, displacement_angle, simultaneous_slices
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawEpi, RawRun, RawUnit
from dsiprep.data.results import Acquired, Blip
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.qspace.sampling_scheme import recognise
from dsiprep.settings import AcquisitionSettings, UnringingSettings
from dsiprep.stages.drift import METHODS as DRIFT_METHODS
from dsiprep.stages.drift import estimate_drift, without_drift
from dsiprep.stages.reference_blip import reference_blip
from dsiprep.stages.unringing import unring_references

METHODS = {
    "conform": (
        "The runs were concatenated on the voxel grid of the first run. Runs with a different field of view were "
        "resampled onto it with cubic B-splines."
    ),
    **DRIFT_METHODS,
    "harmonize_b0": ("Each run was scaled to the same mean b=0 intensity in the brain."),
    "references": (
        "The b=0 volumes of the phase encoding that served only to estimate the distortion were aligned rigidly and "
        "averaged."
    ),
    "scheme": (
        "The sampling scheme was identified from the b-table: q-vectors on a Cartesian lattice of any orientation and "
        "scale are classified as diffusion spectrum imaging [@wedeen2005]."
    ),
}


def conform(raw: RawUnit, settings: AcquisitionSettings, unringing: UnringingSettings | None = None) -> Acquired:
    """Combine the runs of a unit into one series.

    Parameters
    ----------
    raw : RawUnit
    settings : AcquisitionSettings
    unringing : UnringingSettings, optional
        For b=0 images of fmap/, which are aligned and averaged here.

    Returns
    -------
    Acquired
        On the voxel grid of the first run's file; the data of a single run without drift are returned unchanged.
    """
    grid = raw.runs[0].grid
    runs = [_resample_run(run, grid) for run in raw.runs]
    counts = [len(run.bvals) for run in runs]
    data = runs[0].data if len(runs) == 1 else torch.cat([run.data for run in runs])
    epis, references = unring_references(raw.epis, unringing) if unringing else (raw.epis, "")
    blips, blip_of_run = _group_blips(runs, epis)
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
    drift = estimate_drift(dwi, mask) if settings.drift == "auto" else None
    dwi = dwi if drift is None else without_drift(dwi, drift)
    scales = np.ones(len(runs))
    if settings.harmonize_b0 and (len(runs) > 1 or raw.epis):
        dwi, blips, scales = _harmonise_b0(dwi, blips, mask)
    scheme = recognise(dwi.bvals, dwi.bvecs, settings.b0_threshold)
    axes = {run.slice_axis for run in runs}
    groups = multiband_groups([run.slice_times for run in runs])
    return Acquired(
        dwi, blips, scheme, mask, scales, groups, axes.pop() if len(axes) == 1 else None, drift,
        tuple(run.k_space for run in runs), _joined_phase(runs), references,
    )  # fmt: skip


def _joined_phase(runs: list[RawRun]) -> torch.Tensor | None:
    """Phase of all volumes; None if a run has none, or was resampled."""
    phases = [run.phase for run in runs if run.phase is not None]
    if not phases or len(phases) < len(runs):
        return None
    return phases[0] if len(phases) == 1 else torch.cat(phases)


def _resample_run(run: RawRun, grid: Grid) -> RawRun:
    if run.grid.matches(grid):
        return run
    pe = _convert_phase_encoding(run.pe, run.grid, grid) if run.pe else None
    axis = None if run.slice_axis is None else _convert_axis(run.slice_axis, run.grid, grid)
    # slices of the first run's grid are not those that were excited, so their times are unknown
    return replace(
        run,
        data=_resample(run.data, run.grid, grid),
        grid=grid,
        pe=pe,
        slice_times=(),
        slice_axis=axis,
        k_space=None,
        phase=None,
    )


def _convert_axis(axis: int, source: Grid, target: Grid) -> int:
    """The axis of another grid that is closest to this one."""
    return int(np.argmax(np.abs(target.directions.T @ source.directions[:, axis])))


def _resample(data: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    # cubic splines overshoot at edges, and intensities are not negative
    return resample_onto(data, source, target, cubic=True).clamp_(min=0)


def _convert_phase_encoding(pe: PhaseEncoding, source: Grid, target: Grid) -> PhaseEncoding:
    """Phase encoding along the axes of another grid; the readout time is adapted to keep the displacement in mm."""
    # one source voxel along the phase-encoding axis, in target voxels
    step = np.linalg.solve(target.affine[:3, :3], pe.vector(source))
    axis = int(np.argmax(np.abs(step)))
    polarity = pe.polarity * (1 if step[axis] > 0 else -1)
    readout = None if pe.readout_time is None else pe.readout_time * abs(float(step[axis]))
    return PhaseEncoding(axis, polarity, readout)


def _group_blips(runs: list[RawRun], epis: tuple[RawEpi, ...]) -> tuple[tuple[Blip, ...], np.ndarray]:
    """The blips, and the blip index of each run: those of the runs, up before down, then that of the references.

    The undistorted image lies in the pose of the first blip, so this is one that has a series.
    """
    empty = torch.empty(0, *runs[0].grid.shape)
    if any(run.pe is None for run in runs):
        return (Blip("only", None, empty),), np.zeros(len(runs), int)
    encodings = [run.pe for run in runs if run.pe]
    polarities = sorted({pe.polarity for pe in encodings}, reverse=True)
    first = encodings[0], runs[0].grid
    others = [epi for epi in epis if displacement_angle(first, (epi.pe, epi.grid)) >= LEAST_ANGLE]
    names = {1: "up", -1: "down"} if len(polarities) > 1 or others else {polarities[0]: "only"}
    blips = [Blip(names[p], next(pe for pe in encodings if pe.polarity == p), empty) for p in polarities]
    if others and len(polarities) == 1:
        blips.append(reference_blip(others, names[-polarities[0]]))
    return tuple(blips), np.array([polarities.index(pe.polarity) for pe in encodings])


def _harmonise_b0(dwi: DWI, blips: tuple[Blip, ...], mask: Volume) -> tuple[DWI, tuple[Blip, ...], np.ndarray]:
    """Scale runs and b=0 images of fmap/ to the same mean b=0 in the brain; runs without b=0 volumes are unchanged."""
    brain = mask.data > 0
    means = np.array([_mean_b0(dwi, run, brain) for run in range(int(dwi.run.max()) + 1)])
    target = float(np.nanmean(means))
    scales = np.where(np.isfinite(means), target / means, 1.0)
    if len(scales) > 1:
        factors = torch.as_tensor(scales[dwi.run], dtype=torch.float32)
        # with several runs, torch.cat has copied the data, so it may be modified in place
        dwi = dwi.with_data(dwi.data.mul_(factors[:, None, None, None]))
    return dwi, tuple(_scaled_references(blip, mask, target) for blip in blips), scales


def _scaled_references(blip: Blip, mask: Volume, target: float) -> Blip:
    if not len(blip.epis):
        return blip
    grid = blip.grid or mask.grid
    brain = resample_onto(mask.data[None].float(), mask.grid, grid)[0] > 0.5
    mean = float(blip.epis[:, brain].mean()) if bool(brain.any()) else 0.0
    return replace(blip, epis=blip.epis * (target / mean)) if mean > 0 else blip


def _mean_b0(dwi: DWI, run: int, brain: torch.Tensor) -> float:
    """Mean b=0 intensity of a run in the brain; NaN if it has no b=0 volumes or the mean is not positive."""
    b0 = torch.as_tensor((dwi.run == run) & dwi.is_b0)
    mean = float(dwi.data[b0].mean(0)[brain].mean()) if b0.any() else float("nan")
    return mean if mean > 0 else float("nan")


def multiband_groups(slice_times: list[tuple[float, ...]]) -> tuple[tuple[int, ...], ...]:
    """Groups of slices excited together, in temporal order.

    Parameters
    ----------
    slice_times : list of tuple of float
        Acquisition time of each slice in s, per run.

    Returns
    -------
    tuple of tuple of int
        Empty if the times of a run are unknown, the runs differ, or the groups differ in size.
    """
    distinct = {simultaneous_slices(times) for times in slice_times}
    groups = distinct.pop() if len(distinct) == 1 else ()
    return groups if len({len(group) for group in groups}) == 1 else ()
