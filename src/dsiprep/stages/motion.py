"""SHORELine: predict each volume from the others, register it to its prediction, repeat until no volume moves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding, SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.motion import B0Shift
from dsiprep.data.results import Motion
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import point_displacement
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.motion.b0_alignment import align_b0s, interpolate_from_b0s, mean_b0, nearest_b0
from dsiprep.ops.motion.diffusion_to_b0 import align_diffusion_to_b0
from dsiprep.ops.motion.eddy_deviation import deviation_step
from dsiprep.ops.motion.eddy_model import (
    MIN_VOXEL_MM,
    EddyFit,
    choose_terms,
    eddy_step,
    shrink_to_significant,
    zero_eddy_currents,
)
from dsiprep.ops.motion.field_shift import attribute_shifts
from dsiprep.ops.motion.gauss_newton import unknown_fit
from dsiprep.ops.motion.motion_state import MotionState
from dsiprep.ops.motion.outlier_slices import judge_slices
from dsiprep.ops.motion.pose_prior import PosePrior, estimate_pose_prior
from dsiprep.ops.motion.poses import remove_gradient_trend, trace_rows
from dsiprep.ops.motion.pyramid import COARSE_MM, PyramidLevel, build_pyramid
from dsiprep.ops.motion.registration import register_to_predictions, rest_lost_volumes, restart_poor_fits
from dsiprep.ops.motion.slice_replacement import remove_loss, slice_replacements
from dsiprep.ops.motion.volume_agreement import MIN_WEIGHT, agreement, volume_weights
from dsiprep.ops.qspace.prediction import Model, Prediction, choose_model, choose_model_for, predict
from dsiprep.settings import MotionSettings

_ITERATION = (
    "and registered to its prediction by robust (Student t) Gauss-Newton steps, from coarse to fine resolution "
    "[@baker2004]. Each b-vector was rotated with its volume, volumes with large residuals had less weight in the "
    "prediction of the others, and rounds of prediction and registration were repeated until no volume moved. A "
    "heavy-tailed prior kept poses near the resting pose of the head around the same time without restraining clear "
    "movements. As head motion does not depend on the gradient, the component of the poses that was a smooth, even "
    "function of the gradient (a Gaussian process [@rasmussen2006]) was removed."
)
METHODS = {
    "3dSHORE": (
        "Head motion was estimated with the SHORELine approach [@cieslak2021; @cieslak2024]: each diffusion-weighted "
        "volume was predicted from all others by a 3dSHORE model [@ozarslan2008; @merlet2013] in closed form, with an "
        "isotropic normal prior on the coefficients estimated from the series by expectation maximisation "
        f"[@dempster1977], {_ITERATION}"
    ),
    "tensor": (
        "Head motion was estimated with the SHORELine approach [@cieslak2021; @cieslak2024]: each diffusion-weighted "
        f"volume was predicted from all others by a diffusion tensor [@basser1994] {_ITERATION}"
    ),
    "none": (
        "The b=0 volumes were aligned to their mean, and the poses of the diffusion-weighted volumes were interpolated "
        "in time between those of the b=0 volumes."
    ),
    "off": "Head motion was not corrected.",
    "eddy": (
        "Eddy currents were modelled as displacements along the phase-encoding axis: a polynomial in scanner "
        "coordinates whose coefficients are linear in the gradient, with the same linear map for all volumes "
        "[@andersson2016]. The map was estimated jointly with the poses by Gauss-Newton steps and shrunk by the "
        "amount that the same fit found along the two axes without eddy currents. Linear terms of single volumes "
        "beyond that were taken from affine fits and shrunk likewise. Shifts of the whole image by the field (eddy "
        "currents of this and earlier gradients, drift and fluctuations of the centre frequency) were told from "
        "translations of the head by a variance-component model, in which the head moves along the phase-encoding axis "
        "as much as along the others."
    ),
    "replace": (
        "Slices with signal dropout relative to their prediction were replaced by the prediction; slices excited "
        "together were judged together [@andersson2016outliers]."
    ),
}
__all__ = ["METHODS", "estimate_motion", "explain_model"]

log = logging.getLogger("dsiprep")
COARSE_ROUNDS = 10  # maximum rounds at each voxel size of `COARSE_MM`
COARSE_TOLERANCE = 1 / 40  # of the voxel size: largest movement at which rounds there stop
EDDY_TOLERANCE_MM = 0.005  # change of eddy currents in a round below which they stay for the rest of the level
INITIAL_PASSES = 2  # of prediction that only initialise the volume weights
RESTART_ROUND = 2  # in which poorly fitting volumes are restarted
JUDGED_ROUNDS = 3  # at each level, in which outlier slices are found anew
FIRST_PRIOR_ROUND = 3  # from which on poses are reliable enough for a pose prior
SIGNAL_MODELS = ("3dSHORE", "tensor")


@dataclass(frozen=True, eq=False)
class _Inputs:
    """A series and the options of its correction, which stay the same in all rounds."""

    dwi: DWI
    model: Model
    settings: MotionSettings
    multiband: tuple[tuple[int, ...], ...]
    finest_eddy: str = ""  # name of the last pyramid level at which eddy currents are estimated

    @property
    def weighted(self) -> np.ndarray:
        """Indices of the diffusion-weighted volumes."""
        return np.flatnonzero(~self.dwi.is_b0)


def explain_model(scheme: SamplingScheme, settings: MotionSettings) -> str:
    """Describe in one sentence what the stage does for a sampling scheme."""
    if settings.method == "none":
        return "none: switched off"
    model = choose_model(scheme.n_directions, len(scheme.bvalues) + (scheme.n_b0 > 0), settings.model)
    if model.name == "none":
        return f"{model.note}; poses of diffusion-weighted volumes are interpolated between b=0 volumes"
    eddy = "no eddy currents" if settings.eddy == "none" else f"{settings.eddy} eddy currents"
    rounds = f"up to {settings.iters} rounds at full resolution"
    return f"SHORELine with {model.name} ({model.note}), {settings.transform}, {eddy}, {rounds}"


def estimate_motion(
    dwi: DWI,
    mask: Volume,
    settings: MotionSettings,
    pe: PhaseEncoding | None = None,
    multiband: tuple[tuple[int, ...], ...] = (),
    slice_axis: int | None = None,
) -> Motion:
    """Estimate the pose of the head in every volume, eddy-current displacements and slices with signal dropout.

    Parameters
    ----------
    dwi : DWI
        Volumes of one phase encoding, in order of acquisition, with at least one b=0.
    mask : Volume
        Rough brain mask on the grid of `dwi`, 0 or 1.
    settings : MotionSettings
        `iters` limits the rounds at the resolution of the series; rounds at coarser resolution precede them.
    pe : PhaseEncoding, optional
        Eddy currents displace along its axis; they are not estimated without it.
    multiband : tuple of tuple of int
        Groups of simultaneously excited slices, which are judged together; by default each slice on its own.
    slice_axis : int, optional
        Voxel axis across slices; by default k, unless voxels are clearly longest along another axis.

    Returns
    -------
    Motion
        `transforms` map points of the b=0 reference to points of each volume. The frame is the geometric median of
        the poses of the b=0 volumes.

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
    identity = np.tile(np.eye(4), (len(dwi), 1, 1))
    axis = dwi.grid.likely_slice_axis if slice_axis is None else slice_axis
    state = MotionState(identity, None, np.zeros((10, 3)), np.zeros((len(dwi), 4)), None, axis, dwi.grid)
    if settings.method == "none":
        return _finish(_Inputs(dwi, Model("off", "switched off"), settings, multiband), levels[-1], state, [])
    count = int((~dwi.is_b0).sum())
    model = choose_model_for(dwi.bvals[~dwi.is_b0], settings.model)
    inputs = _Inputs(dwi, model, settings, multiband, _finest_eddy(levels))
    has_model = inputs.model.name != "none"
    if pe is not None and choose_terms(settings.eddy, count) and settings.transform == "Rigid" and has_model:
        state = replace(state, eddy=zero_eddy_currents(len(dwi), dwi.grid, pe.axis))
    trace: list[dict[str, Any]] = []
    b0_shift: B0Shift | None = None
    for number, level in enumerate(levels):
        state = align_b0s(dwi, level, state)
        if not has_model:
            state = interpolate_from_b0s(dwi, level, state)
            trace += trace_rows(state.transforms, level.points.centre, level.name, number + 1)
            continue
        if number == 0:
            state = state.with_transforms(state.transforms[nearest_b0(dwi)])
        rounds = settings.iters if number == len(levels) - 1 else COARSE_ROUNDS
        done = int(trace[-1]["iter_num"]) if trace else 0
        state, levels[number], rows = _shoreline_rounds(inputs, level, state, range(done + 1, done + rounds + 1))
        trace += rows
        if number >= len(levels) - 2 and settings.transform == "Rigid":  # before the last rounds, and after them
            state, b0_shift = align_diffusion_to_b0(dwi, levels[-1], state, b0_shift)
    if state.eddy is not None:
        state = attribute_shifts(dwi, state, levels[-1].points.centre, even=True)
    return _finish(inputs, levels[-1], state, trace, b0_shift)


def _check(dwi: DWI, mask: Volume) -> None:
    """Raise InputError if the series or its mask cannot be processed."""
    if not mask.grid.matches(dwi.grid):
        raise InputError(
            f"motion: the mask is {mask.grid.shape} voxels and the series {dwi.grid.shape}, or their affines differ"
        )
    if not (mask.data > 0.5).any():
        raise InputError("motion: the brain mask has no voxels; provide a mask that covers the head")
    for volume, data in enumerate(dwi.data):
        if not torch.isfinite(data).all():
            raise InputError(f"motion: volume {volume} holds NaN or infinite voxels; replace them with zero")
    if not dwi.is_b0.any():
        raise InputError(
            f"motion: no volume has b <= {dwi.b0_threshold:g}; the lowest b-value is {dwi.bvals.min():g}; "
            "raise --b0-threshold"
        )


def _shoreline_rounds(
    inputs: _Inputs, level: PyramidLevel, state: MotionState, rounds: range
) -> tuple[MotionState, PyramidLevel, list[dict[str, Any]]]:
    """Rounds of prediction and registration at one pyramid level, until no volume moves.

    Parameters
    ----------
    inputs : _Inputs
    level : PyramidLevel
    state : MotionState
    rounds : range
        Numbers of the rounds allowed at this level, counted over all levels from 1.

    Returns
    -------
    state : MotionState
    level : PyramidLevel
        With lost slices filled.
    trace : list of dict
        One row per volume and round.
    """
    dwi, weighted = inputs.dwi, inputs.weighted
    reference = level.sample(np.flatnonzero(dwi.is_b0), state).mean(0, keepdim=True)
    weights = _known_weights(inputs, state)
    fill: torch.Tensor | None = None
    eddy_fit: EddyFit | None = None
    tolerance = max(inputs.settings.tolerance, COARSE_TOLERANCE * level.spacing)
    eddy_change, state, trace = np.inf, replace(state, fit=unknown_fit(len(weighted))), []
    for number in rounds:
        observed = level.sample(weighted, state, fill)
        if number == 1:
            weights = _initial_weights(inputs, state, observed, reference)
        predicted = _predict(inputs, state, observed, reference, weights)
        if number < rounds[0] + JUDGED_ROUNDS:
            state = judge_slices(dwi, level, state, weighted, predicted.values, inputs.multiband)
        level, weights = remove_loss(dwi, level, state, weighted, observed, predicted.values)
        if number == rounds[0] and state.has_dropout():  # again without the loss that was found
            predicted = _predict(inputs, state, observed, reference, weights)
            level, weights = remove_loss(dwi, level, state, weighted, observed, predicted.values)
        if number == RESTART_ROUND:
            state = restart_poor_fits(dwi, level, state, predicted.values, weights)
        before, prior = state.transforms[weighted], _pose_prior(inputs, level, state, number)
        if prior is not None and number <= rounds[0] + JUDGED_ROUNDS:
            state = rest_lost_volumes(level, weighted, state, predicted.values, prior)
        if prior is not None and state.eddy is not None and _resolves_eddy(level):
            terms, is_final = choose_terms(inputs.settings.eddy, len(weighted)), level.name == inputs.finest_eddy
            eddy_fit = EddyFit(dwi, level, observed, predicted, prior, terms, is_final)
            if eddy_change > EDDY_TOLERANCE_MM:
                state, eddy_change = eddy_step(eddy_fit, state)
        state = _register(inputs, level, state, predicted, prior)
        if number > rounds[0]:
            state = _without_gradient_trend(dwi, level, state)
        fill = predicted.values
        trace += trace_rows(state.transforms, level.points.centre, level.name, number)
        movement = point_displacement(before, state.transforms[weighted], level.probe_points()).mean(1).max()
        log.info("motion: round %d (%s voxels), largest movement %.3f mm", number, level.name, movement)
        if movement < tolerance and (eddy_fit is None or eddy_change < inputs.settings.tolerance):
            break
    if eddy_fit is not None and eddy_fit.is_final:
        state = shrink_to_significant(eddy_fit, state)
    return state, level, trace


def _pose_prior(inputs: _Inputs, level: PyramidLevel, state: MotionState, number: int) -> PosePrior | None:
    """The pose prior of a round; None in the first rounds."""
    if number < FIRST_PRIOR_ROUND:
        return None
    return estimate_pose_prior(inputs.dwi, state.transforms, level.points.centre, level.probe_points())


def _register(
    inputs: _Inputs, level: PyramidLevel, state: MotionState, predicted: Prediction, prior: PosePrior | None
) -> MotionState:
    """Register the diffusion-weighted volumes to their predictions; the field keeps what is not the head's."""
    fits_field = prior is not None and state.eddy is not None
    if fits_field:
        state = deviation_step(level, inputs.weighted, state, predicted)
    affine = inputs.settings.transform == "Affine"
    state = register_to_predictions(level, inputs.weighted, state, predicted, affine, prior)
    return attribute_shifts(inputs.dwi, state, level.points.centre, even=False) if fits_field else state


def _initial_weights(
    inputs: _Inputs, state: MotionState, observed: torch.Tensor, reference: torch.Tensor
) -> np.ndarray:
    """Weights of the diffusion-weighted volumes for the first prediction, (n,), from repeated prediction."""
    weights = np.ones(len(observed))
    for _ in range(INITIAL_PASSES):
        predicted = _predict(inputs, state, observed, reference, weights)
        weights = volume_weights(observed, predicted.values, inputs.dwi.bvals[inputs.weighted])
    return weights


def _known_weights(inputs: _Inputs, state: MotionState) -> np.ndarray:
    """Weights of the diffusion-weighted volumes, (n,), by what is known before the first prediction."""
    whole = np.zeros(len(inputs.weighted)) if state.dropout is None else state.dropout.whole[inputs.weighted]
    return np.where(whole, MIN_WEIGHT, 1.0)


def _predict(
    inputs: _Inputs, state: MotionState, observed: torch.Tensor, reference: torch.Tensor, weights: np.ndarray
) -> Prediction:
    """Predict every diffusion-weighted volume from the others, with gradients rotated into the frame of the head."""
    dwi, weighted = inputs.dwi, inputs.weighted
    bvals, bvecs, transforms = dwi.bvals[weighted], dwi.bvecs[weighted], state.transforms[weighted]
    return predict(observed, reference, inputs.model, bvals, bvecs, transforms, weights)


def _resolves_eddy(level: PyramidLevel) -> bool:
    """Whether eddy currents are estimated at this pyramid level."""
    return bool(level.grid.voxel_sizes.mean() > MIN_VOXEL_MM)


def _finest_eddy(levels: list[PyramidLevel]) -> str:
    """Name of the last pyramid level at which eddy currents are estimated; empty if there is none."""
    return next((level.name for level in reversed(levels) if _resolves_eddy(level)), "")


def _without_gradient_trend(dwi: DWI, level: PyramidLevel, state: MotionState) -> MotionState:
    """Remove the component of the poses that is a smooth, even function of the gradient."""
    q = np.where(dwi.is_b0[:, None], 0, dwi.q)
    return state.with_transforms(remove_gradient_trend(state.transforms, q, dwi.run, level.points.centre))


def _finish(
    inputs: _Inputs, level: PyramidLevel, state: MotionState, trace: list[dict[str, Any]], shift: B0Shift | None = None
) -> Motion:
    """Compute the b=0 reference, the agreement of each volume with its final prediction, and outlier slices."""
    dwi, weighted, has_model = inputs.dwi, inputs.weighted, inputs.model.name in SIGNAL_MODELS
    volumes, b0 = np.arange(len(dwi)), np.flatnonzero(dwi.is_b0)
    observed = replace(level, filled={}).sample(volumes, state)  # as acquired
    predicted = observed[torch.as_tensor(dwi.is_b0)].mean(0, keepdim=True).expand_as(observed).clone()
    state = judge_slices(dwi, level, state, b0, predicted[b0])
    if has_model:
        state = _final_prediction(inputs, level, state, predicted)
    r2, xcorr = agreement(observed, predicted)
    del observed  # the size of the whole series inside the brain, as are all tensors here
    assert state.dropout is not None
    outliers, slice_z = state.dropout.lost, state.dropout.z
    outliers[b0] = False
    if not has_model:  # without predictions there is no agreement to report
        r2[weighted] = xcorr[weighted] = slice_z[weighted] = np.nan
    dwiref = mean_b0(dwi, state.shifted_transforms())
    replaces = inputs.settings.outliers == "replace"
    return Motion(
        transforms=state.transforms,
        volumes=volumes,
        dwiref=dwiref,
        mask=brain_mask_b0(dwiref),
        r2=r2,
        xcorr=xcorr,
        slice_z=slice_z,
        slice_axis=state.slice_axis,
        trace=trace,
        model=inputs.model.name,
        eddy=state.eddy,
        outlier_slices=outliers,
        replacements=slice_replacements(dwi, level, state, predicted) if replaces else None,
        notes=_notes(inputs, state),
        b0_shift=shift,
    )


def _final_prediction(inputs: _Inputs, level: PyramidLevel, state: MotionState, predicted: torch.Tensor) -> MotionState:
    """Write the predictions of the diffusion-weighted volumes to `predicted` (n, m), and judge their slices by them."""
    weighted, reference = torch.as_tensor(inputs.weighted, device=predicted.device), predicted[:1].clone()
    used = level.sample(inputs.weighted, state)
    weights = _known_weights(inputs, state)
    for _ in range(2):  # the second pass fills outlier slices with the prediction of the first
        predicted[weighted] = _predict(inputs, state, used, reference, weights).values
        state = judge_slices(inputs.dwi, level, state, inputs.weighted, predicted[weighted], inputs.multiband)
        _, weights = remove_loss(inputs.dwi, level, state, inputs.weighted, used, predicted[weighted])
    return state


def _notes(inputs: _Inputs, state: MotionState) -> tuple[str, ...]:
    """Deviations from the default model: which one was used, and why eddy currents were not estimated."""
    model, settings = inputs.model, inputs.settings
    notes = (f"{model.name}: {model.note}",) if model.name != "3dSHORE" or model.order < 6 else ()
    if settings.eddy == "none" or state.eddy is not None or model.name not in SIGNAL_MODELS:
        return notes
    reason = "affine transforms absorb them" if settings.transform == "Affine" else "the phase encoding is not known"
    if not choose_terms(settings.eddy, len(inputs.weighted)):
        reason = "there are too few directions"
    return (*notes, f"Eddy currents were not estimated: {reason}.")
