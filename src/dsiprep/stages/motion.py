"""SHORELine: predict each volume from the others, register it to its prediction, repeat until nothing moves."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding, SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Motion
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.motion.b0_alignment import align_b0s, interpolate_from_b0s, mean_b0, nearest_b0
from dsiprep.ops.motion.eddy_model import QUIET_MM, choose_terms, discount_chance, eddy_step, no_eddy_currents
from dsiprep.ops.motion.gauss_newton import align
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.outlier_slices import find_outlier_slices, slice_scores, slice_signal_loss
from dsiprep.ops.motion.pose_prior import PosePrior, jitter, resting_poses
from dsiprep.ops.motion.poses import decompose, relaxed_poses, remove_gradient_trend
from dsiprep.ops.motion.pyramid import CHUNK, PyramidLevel, build_pyramid
from dsiprep.ops.motion.slice_replacement import slice_replacements
from dsiprep.ops.motion.volume_agreement import agreement, volume_weights
from dsiprep.ops.qspace.prediction import Model, Prediction, choose_model, predict
from dsiprep.settings import MotionSettings

_ROUNDS = (
    "registered to its prediction by robust (Student t) Gauss-Newton steps, coarse to fine [@baker2004]. b-vectors "
    "turned with their volumes, volumes that did not fit counted for less in the predictions of the others, and rounds "
    "were repeated until no volume moved. Poses were expected near those that the head rested in around "
    "the same time, with "
    "heavy tails, so that clear movements are left as they are; what poses had in common as a smooth, even function "
    "of the gradient (a Gaussian process [@rasmussen2006]) was taken away, since a head does not know the gradient."
)
METHODS = {
    "3dSHORE": (
        "Head motion was estimated with the SHORELine approach [@cieslak2021; @cieslak2024]: each diffusion-weighted "
        "volume was predicted from all others by a 3dSHORE model [@ozarslan2008; @merlet2013] in closed form, with an "
        "isotropic normal prior on the coefficients estimated from the series by expectation maximisation "
        f"[@dempster1977], and {_ROUNDS}"
    ),
    "tensor": (
        "Head motion was estimated with the SHORELine approach [@cieslak2021; @cieslak2024]: each diffusion-weighted "
        f"volume was predicted from all others by a diffusion tensor [@basser1994], and {_ROUNDS}"
    ),
    "none": (
        "The b=0 volumes were aligned to their mean, and diffusion-weighted volumes took the motion of the b=0 "
        "volumes, interpolated in time."
    ),
    "off": "Head motion was not corrected.",
    "eddy": (
        "Eddy currents were modelled as displacements along the phase-encoding axis, a polynomial in scanner "
        "coordinates whose coefficients are linear in the gradient, the same for all volumes [@andersson2016], and "
        "found together with the poses by Gauss-Newton steps, and counted as far as they were more than the same fit "
        "found along axes without any."
    ),
    "replace": (
        "Slices that had lost signal against their prediction were replaced by it, those excited together "
        "judged together [@andersson2016outliers]."
    ),
}
__all__ = ["METHODS", "estimate_motion", "explain_model"]

log = logging.getLogger("dsiprep")
COARSE_MM = (8.0, 5.0)  # voxel sizes before the volumes' own
COARSE_ROUNDS = 10
STEPS = 3  # Gauss-Newton steps per round
MISFIT = 0.45  # trust below which other starts are tried: a residual 1.5 times the usual


def explain_model(scheme: SamplingScheme, settings: MotionSettings) -> str:
    """What the stage would do for a sampling scheme, in a sentence."""
    if settings.method == "none":
        return "none: switched off"
    model = choose_model(scheme.n_directions, len(scheme.bvalues) + (scheme.n_b0 > 0), settings.model)
    if model.name == "none":
        return f"{model.note}; diffusion-weighted volumes take the motion of those around them"
    eddy = "no eddy currents" if settings.eddy == "none" else f"{settings.eddy} eddy currents"
    return f"SHORELine with {model.name} ({model.note}), {settings.transform}, {eddy}, up to {settings.iters} rounds"


def estimate_motion(
    dwi: DWI,
    mask: Volume,
    settings: MotionSettings,
    pe: PhaseEncoding | None = None,
    multiband: tuple[tuple[int, ...], ...] = (),
) -> Motion:
    """Where the head was in every volume, what eddy currents did to it, and which slices lost their signal.

    Parameters
    ----------
    dwi : DWI
        Volumes of one phase encoding, in the order of acquisition, at least one b=0.
    mask : Volume
        Rough brain mask on the grid of `dwi`, 0 or 1.
    settings : MotionSettings
        `iters` bounds the rounds on the volumes' own voxels; rounds on coarser voxels come before.
    pe : PhaseEncoding, optional
        Eddy currents displace along its axis; without it they are not looked for.
    multiband : tuple of tuple of int
        Slices excited together, which are judged together; each by itself by default.

    Returns
    -------
    Motion
        `transforms` take points of the b=0 reference to points of each volume. The frame is the middle
        (geometric median) of the poses of the b=0 volumes.

    Raises
    ------
    InputError
        If the mask is empty, voxels are not finite, there is no b=0, or grids differ.

    References
    ----------
    Cieslak et al. 2024, doi 10.1002/hbm.26570.
    """
    _check(dwi, mask)
    levels = build_pyramid(dwi, mask, COARSE_MM)
    start = np.tile(np.eye(4), (len(dwi), 1, 1))
    state = MotionState(start, None, np.zeros((10, 3)), None, _slice_axis(dwi.grid), dwi.grid)
    if settings.method == "none":
        return _finish(dwi, levels[-1], state, Model("off", "switched off"), settings, multiband, [])
    weighted = ~dwi.is_b0
    rings = 1 + len(np.unique(np.round(dwi.bvals[weighted] / 100)))
    model = choose_model(int(weighted.sum()), rings, settings.model)
    terms = choose_terms(settings.eddy, int(weighted.sum()))
    if pe is not None and terms and settings.transform == "Rigid" and model.name != "none":
        state = replace(state, eddy=no_eddy_currents(len(dwi), dwi.grid, pe.axis))
    trace: list[dict[str, Any]] = []
    for number, level in enumerate(levels):
        state = align_b0s(dwi, level, state)
        if model.name == "none":
            state = interpolate_from_b0s(dwi, level, state)
            trace += _rows(state.transforms, level, number + 1)
            continue
        if number == 0:
            state = state.with_transforms(state.transforms[nearest_b0(dwi)])
        rounds = settings.iters if number == len(levels) - 1 else COARSE_ROUNDS
        done = int(trace[-1]["iter_num"]) if trace else 0
        state, rows = _rounds(dwi, level, state, model, settings, (done, rounds), multiband)
        trace += rows
    return _finish(dwi, levels[-1], state, model, settings, multiband, trace)


def _check(dwi: DWI, mask: Volume) -> None:
    if not mask.grid.matches(dwi.grid):
        raise InputError(
            f"motion: the mask is {mask.grid.shape} voxels, the series {dwi.grid.shape}, or they lie apart"
        )
    if not (mask.data > 0.5).any():
        raise InputError("motion: the brain mask has no voxels; give a mask that covers the head")
    for volume, data in enumerate(dwi.data):
        if not torch.isfinite(data).all():
            raise InputError(f"motion: volume {volume} holds NaN or infinite voxels; replace them with zero")
    if not dwi.is_b0.any():
        raise InputError(
            f"motion: no volume has b <= {dwi.b0_threshold:g}, the lowest is {dwi.bvals.min():g}; raise --b0-threshold"
        )


def _rounds(
    dwi: DWI,
    level: PyramidLevel,
    state: MotionState,
    model: Model,
    settings: MotionSettings,
    count: tuple[int, int],
    multiband: tuple[tuple[int, ...], ...],
) -> tuple[MotionState, list[dict[str, Any]]]:
    """Predict, register, repeat: `count` rounds done and allowed. Gives the state and a row per volume and round."""
    index = np.flatnonzero(~dwi.is_b0)
    reference = level.sample(np.flatnonzero(dwi.is_b0), state).mean(0, keepdim=True)
    weights, fill = np.ones(len(index)), None
    trace: list[dict[str, Any]] = []
    done, allowed = count
    quiet = level.grid.voxel_sizes.mean() > QUIET_MM
    for number in range(done + 1, done + allowed + 1):
        observed = level.sample(index, state, fill)
        for _ in range(3 if number == 1 else 1):
            predicted = _predicted(dwi, state, observed, reference, model, weights)
            weights = volume_weights(observed, predicted.values, dwi.bvals[index])
        if number == 2:
            state = _try_other_starts(dwi, level, state, predicted.values, weights)
        if level.name == "full" and state.outlier_slices is None:
            residual = _residual(observed, predicted.values)
            state = replace(state, outlier_slices=_lost(dwi, level, state, residual, predicted.values, multiband))
            del residual
        before, prior = state.transforms[index], _rest(dwi, level, state.transforms) if number > 2 else None
        if prior is not None and state.eddy is not None and quiet:
            state = eddy_step(dwi, level, state, observed, predicted, prior, choose_terms(settings.eddy, len(index)))
        state = _register(level, index, state, predicted, settings.transform == "Affine", prior)
        if number > done + 1:
            q = np.where(dwi.is_b0[:, None], 0, dwi.q)
            state = state.with_transforms(remove_gradient_trend(state.transforms, q, dwi.run, level.points.centre))
        fill = predicted.values
        trace += _rows(state.transforms, level, number)
        moved = point_displacement(before, state.transforms[index], level.probe_points()).mean(1)
        log.info("motion: round %d (%s voxels), moved %.3f mm at most", number, level.name, moved.max())
        if moved.max() < settings.tolerance:
            break
    if prior is not None and state.eddy is not None and quiet:
        state = discount_chance(dwi, level, state, observed, predicted, prior, choose_terms(settings.eddy, len(index)))
    return state, trace


def _predicted(
    dwi: DWI, state: MotionState, observed: torch.Tensor, reference: torch.Tensor, model: Model, weights: np.ndarray
) -> Prediction:
    """Every diffusion-weighted volume from the others, gradients as the head saw them."""
    index = np.flatnonzero(~dwi.is_b0)
    return predict(observed, reference, model, dwi.bvals[index], dwi.bvecs[index], state.transforms[index], weights)


def _lost(
    dwi: DWI,
    level: PyramidLevel,
    state: MotionState,
    residual: torch.Tensor,
    predicted: torch.Tensor,
    multiband: tuple[tuple[int, ...], ...],
) -> np.ndarray:
    """Slices of diffusion-weighted volumes that lost their signal, (n, slices) bool for all volumes."""
    index = np.flatnonzero(~dwi.is_b0)
    lost = np.zeros((len(dwi), dwi.grid.shape[state.slice_axis]), bool)
    where = (level.points, dwi.grid, state.transforms[index], state.slice_axis)
    lost[index] = find_outlier_slices(
        slice_scores(residual, *where), slice_signal_loss(residual, predicted, *where), multiband
    )
    return lost


def _residual(observed: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Volumes less their predictions, each with the gain that fits best."""
    fit, size = (torch.einsum("nm,nm->n", values, predicted) for values in (observed, predicted))
    return (predicted * (-fit / size.clamp(min=1e-12))[:, None]).add_(observed)


def _try_other_starts(
    dwi: DWI, level: PyramidLevel, state: MotionState, predicted: torch.Tensor, weights: np.ndarray
) -> MotionState:
    """Volumes that fit badly start again from other poses; the one that ends with the smallest residual stays."""
    bad = np.flatnonzero(weights < MISFIT)
    if not len(bad):
        return state
    out = state.transforms.copy()
    volumes = np.flatnonzero(~dwi.is_b0)[bad]
    targets = predicted[torch.as_tensor(bad, device=predicted.device)]
    data, still = level.take(volumes), np.tile(np.eye(4), (len(bad), 1, 1))
    usual = resting_poses(out, level.points.centre)[volumes]
    turns = [np.eye(6)[axis] * side * np.deg2rad(10) for axis in range(3) for side in (1, -1)]
    starts = [out[volumes], still, usual, out[np.maximum(volumes - 1, 0)]]
    starts += [usual @ rigid_matrix(turn, level.points.centre) for turn in turns]
    best = np.full(len(bad), np.inf)
    for start in starts:
        found = align(data, level.grid, level.points, targets, start, steps=4 * STEPS)
        better = found.rms < 0.98 * best  # the first, unless another is clearly better
        best[better] = found.rms[better]
        out[volumes[better]] = found.transforms[better]
    log.info("motion: %d volumes that did not fit were started again", len(bad))
    return state.with_transforms(out)


def _rest(dwi: DWI, level: PyramidLevel, transforms: np.ndarray) -> PosePrior:
    """Where the head is expected around the time of each volume, run by run, and how closely."""
    poses = np.empty_like(transforms)
    for run in np.unique(dwi.run):
        own = dwi.run == run
        poses[own] = resting_poses(transforms[own], level.points.centre)
    away = point_displacement(transforms, poses, level.probe_points())[~dwi.is_b0]
    return PosePrior(poses, jitter(np.sqrt((away**2).mean(1))))


def _register(
    level: PyramidLevel,
    index: np.ndarray,
    state: MotionState,
    predicted: Prediction,
    affine: bool,
    prior: PosePrior | None,
) -> MotionState:
    """Volumes on their way to their predictions, as far as lets rounds come to prior."""
    out = state.transforms.copy()
    for first in range(0, len(index), CHUNK):
        part = slice(first, first + CHUNK)
        some = index[part]
        out[some] = align(
            level.take(some),
            level.grid,
            level.points,
            predicted.values[part],
            out[some],
            affine=affine,
            steps=STEPS,
            prior=None if prior is None else PosePrior(prior.poses[some], prior.jitter),
            eddy=state.eddy_of(some),
        ).transforms
    share = 1.0 if affine else predicted.relaxation
    if share < 1:
        out[index] = relaxed_poses(state.transforms[index], out[index], share, level.points.centre)
    return state.with_transforms(out)


def _rows(transforms: np.ndarray, level: PyramidLevel, number: int) -> list[dict[str, Any]]:
    """hmcOptimization.csv: shifts in mm and rotations in radians about the brain's centre."""
    name = f"{level.name} round {number}"
    return [
        {"volume": volume} | decompose(matrix, level.points.centre) | {"iter_num": number, "iter_name": name}
        for volume, matrix in enumerate(transforms)
    ]


def _finish(
    dwi: DWI,
    level: PyramidLevel,
    state: MotionState,
    model: Model,
    settings: MotionSettings,
    multiband: tuple[tuple[int, ...], ...],
    trace: list[dict[str, Any]],
) -> Motion:
    """The b=0 reference, and how well each volume agrees with its prediction at the end."""
    everything, weighted = np.arange(len(dwi)), ~dwi.is_b0
    observed = level.sample(everything, state)
    reference = observed[torch.as_tensor(~weighted)].mean(0, keepdim=True)
    predicted = reference.expand_as(observed).clone()
    if model.name in ("3dSHORE", "tensor"):
        rows = torch.as_tensor(np.flatnonzero(weighted), device=observed.device)
        for _ in range(2):  # lost slices are filled in the second
            used = level.sample(everything[weighted], state, predicted[rows])
            predicted[rows] = _predicted(dwi, state, used, reference, model, np.ones(len(rows))).values
        del used
    r2, xcorr = agreement(observed, predicted)
    residual = _residual(observed, predicted)
    del observed  # of the size of the brain in the whole series, as are all of these
    z = slice_scores(residual, level.points, dwi.grid, state.transforms, state.slice_axis)
    lost = np.zeros(z.shape, bool)
    if model.name in ("3dSHORE", "tensor"):
        lost = _lost(dwi, level, state, residual[rows], predicted[rows], multiband)
    state = replace(state, outlier_slices=lost)
    if model.name in ("none", "off"):  # nothing predicts them, so there is nothing to agree with
        r2[weighted] = xcorr[weighted] = z[weighted] = np.nan
    dwiref = mean_b0(dwi, state.transforms)
    return Motion(
        transforms=state.transforms,
        volumes=everything,
        dwiref=dwiref,
        mask=brain_mask_b0(dwiref),
        r2=r2,
        xcorr=xcorr,
        slice_z=z,
        slice_axis=state.slice_axis,
        trace=trace,
        model=model.name,
        eddy=state.eddy,
        outlier_slices=lost,
        replacements=slice_replacements(dwi, level, state, predicted) if settings.outliers == "replace" else None,
        notes=_notes(model, settings, state, dwi.is_b0),
    )


def _notes(model: Model, settings: MotionSettings, state: MotionState, is_b0: np.ndarray) -> tuple[str, ...]:
    notes = (f"{model.name}: {model.note}",) if model.name != "3dSHORE" or model.order < 6 else ()
    if settings.eddy == "none" or state.eddy is not None or model.name in ("none", "off"):
        return notes
    why = "affine transforms take their state" if settings.transform == "Affine" else "the phase encoding is not known"
    if not choose_terms(settings.eddy, int((~is_b0).sum())):
        why = "there are too few directions"
    return (*notes, f"Eddy currents were not looked for: {why}.")


def _slice_axis(grid: Grid) -> int:
    """k, unless voxels are clearly longest along another axis."""
    sizes = grid.voxel_sizes
    longest = int(sizes.argmax())
    return longest if sizes[longest] > 1.2 * sizes[2] else 2
