"""A field that changes with the head: off-resonance as a function of pitch and roll, estimated from the series itself.

The pitch and roll of the head relative to the main field change the field of its susceptibility, which distorts turned
volumes in another way than the rest. The change is linear in both angles and has the shape of two smooth fields.
Volumes, corrected for all that is known, are compared with their predictions; what is left, where the head was turned,
goes with the angles and looks like a displacement along the phase-encoding axis, gives the two fields.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.dwi import DWI
from dsiprep.data.motion import Motion, eddy_currents
from dsiprep.data.moving_field import MovingField
from dsiprep.data.results import Acquired, Distortion
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.image.epi_resampling import along_axis, sample_displacement
from dsiprep.ops.image.point_set import average_blocks, point_set
from dsiprep.ops.image.smooth_field import prior_precision, spline_basis, spline_knots
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.motion.series_prediction import PredictedSeries, predict_series
from dsiprep.ops.motion.tilt_equations import TiltEquations, pose_step, solve_fields, tilt_equations
from dsiprep.ops.motion.tilted_series import TiltedSeries, pitch_and_roll

METHODS = {
    "moving": (
        "The off-resonance field was taken to change linearly with pitch and roll of the head [@andersson2018]. Both "
        "derivative fields, cubic B-splines with a Matérn prior [@lindgren2011], were estimated from the series: by "
        "Gauss-Newton steps on the differences between the corrected volumes and their predictions from the other "
        "volumes, with Jacobian modulation, jointly with the poses of the turned volumes. The displacement that "
        "followed for each volume was part of the one resampling."
    ),
}
__all__ = ["METHODS", "follow_field", "with_poses"]

log = logging.getLogger("dsiprep")
TURNED = 1.0  # degrees from the reference; only volumes turned by more are compared, and their poses estimated
TILTED = 2.0  # degrees of pitch and roll that tell
LEAST_TILTED = 5  # volumes that must be tilted by that much
SPACING_MM = 4.0  # of the voxels at which volumes are compared
KNOTS_MM, SIZE_MM, LENGTH_MM = 14.0, 0.15, 20.0  # splines; prior: mm per degree, and correlation length
ROUNDS = 3  # of prediction and estimation of the fields
CLEAR = 6.0  # of the evidence, above which the fields are used
DEGREES = 6.0  # at which the size of the change is stated
SIGNAL_MODELS = ("3dSHORE", "tensor")


@dataclass(frozen=True, eq=False)
class _Compared:
    """Turned volumes and their predictions at the points of the brain, each (k, m).

    `tilts` are those of `TiltEquations`.
    """

    volumes: np.ndarray
    tilts: np.ndarray
    observed: torch.Tensor
    predicted: torch.Tensor
    usable: np.ndarray

    def equations(self, series: TiltedSeries, axis: int) -> TiltEquations:
        return tilt_equations(series, self.volumes, self.tilts, self.observed, self.predicted, self.usable, axis)

    def misfit(self) -> float:
        """Mean absolute residual, relative to the mean prediction."""
        inside = torch.as_tensor(self.usable)
        return float((self.observed - self.predicted)[inside].abs().mean() / self.predicted[inside].mean())


@dataclass(frozen=True, eq=False)
class _Inputs:
    """A series, what was estimated of it before, and how it is predicted."""

    dwi: DWI
    motions: tuple[Motion, ...]
    axis: int
    model: str
    turned: np.ndarray


def follow_field(
    acquired: Acquired,
    b0s: DWI,
    motions: tuple[Motion, ...],
    distortion: Distortion | None,
    wanted: str,
    model: str = "auto",
) -> MovingField:
    """Estimate how the field changes with pitch and roll.

    Parameters
    ----------
    acquired : Acquired
    b0s : DWI
        The b=0 volumes, from which ringing was removed.
    motions : tuple of Motion
        One per blip with DWI volumes; together they cover all volumes.
    distortion : Distortion or None
    wanted : str
        "on" uses what is estimated, "auto" what is clear; neither estimates anything where the head hardly turned.
    model : str
        Signal model that predicts volumes, as in `choose_model`.

    References
    ----------
    Andersson et al. 2018, doi 10.1016/j.neuroimage.2017.12.040.
    """
    transforms, undistorted = _all_transforms(acquired, motions, distortion)
    rigid = _rigid_field(acquired, transforms, undistorted, _origin(acquired, motions, distortion, undistorted))
    pe = acquired.blips[int(acquired.dwi.blip[motions[0].volumes[0]])].pe
    turned = np.flatnonzero(_turned(acquired, motions, undistorted))
    reason = _not_possible(motions, pe) or _too_still(rigid.tilts[turned])
    if reason or pe is None:
        return replace(rigid, reason=reason)
    dwi = acquired.dwi.select(np.arange(len(acquired.dwi)))
    dwi.data[torch.as_tensor(dwi.is_b0)] = b0s.data
    inputs = _Inputs(dwi, motions, pe.axis, model, turned)
    start = _series(inputs, rigid, undistorted, _resting(acquired, distortion, rigid), distortion)
    return _estimate(inputs, rigid, start, _poses(acquired, distortion), wanted)


def with_poses(motion: Motion, moving: MovingField) -> Motion:
    """Copy with the poses that were estimated with the fields."""
    return replace(motion, transforms=moving.transforms[motion.volumes])


def _estimate(inputs: _Inputs, rigid: MovingField, series: TiltedSeries, poses: np.ndarray, wanted: str) -> MovingField:
    prior = prior_precision(series.basis.knots, SIZE_MM, LENGTH_MM)
    observed = series.sample(np.arange(len(inputs.dwi)))
    compared, before = _compare(inputs, series, observed), np.nan
    for number in range(1 + ROUNDS):
        equations = compared.equations(series, inputs.axis)
        none = np.zeros_like(series.coefficients)
        change = solve_fields(equations, series, prior, inputs.axis) if number else none
        transforms = pose_step(equations, series, change)
        series = replace(series, transforms=transforms, coefficients=series.coefficients + change)
        observed[torch.as_tensor(inputs.turned)] = series.sample(inputs.turned)
        compared = _compare(inputs, series, observed)
        if number == 0:
            before = compared.misfit()
    evidence = _evidence(inputs, series, compared, prior)
    if wanted == "auto" and evidence < CLEAR:
        reason = f"The field moves rigidly with the head: evidence for a change is {evidence:.1f}, less than {CLEAR:g}."
        return replace(rigid, reason=reason, evidence=evidence)
    after, size = compared.misfit(), _size(series)
    gain = 100 * (1 - after / before)
    reason = (
        f"The field changes with pitch and roll: {size:.2f} mm at {DEGREES:g} degrees (95th percentile in the brain); "
        f"residuals of {len(inputs.turned)} turned volumes fell by {gain:.1f} %, evidence {evidence:.1f}."
    )
    log.info("moving field: %s", reason)
    values = spline_basis(series.basis.knots, rigid.grid).evaluate(series.coefficients)
    return replace(
        rigid,
        derivatives=torch.from_numpy(values).float(),
        tilts=pitch_and_roll(series.transforms) - series.origin,
        transforms=series.transforms @ np.linalg.inv(poses),
        reason=reason,
        size_mm=size,
        evidence=evidence,
        residuals=(before, after),
    )


def _compare(inputs: _Inputs, series: TiltedSeries, observed: torch.Tensor) -> _Compared:
    """Predict all volumes from samples (n, m), which are NaN outside the field of view, and take the turned ones."""
    transforms, turned = series.transforms, inputs.turned
    outside = observed.isnan()
    rough = predict_series(inputs.dwi, observed.nan_to_num(), transforms, inputs.model).values
    filled = torch.where(outside, rough, observed)
    predicted = predict_series(inputs.dwi, filled, transforms, inputs.model)
    tilts = series.tilts - _tilts_of_predictions(predicted, series.tilts)
    usable = ~outside.numpy()[turned] & _intact(inputs, series)
    rows = torch.as_tensor(turned)
    return _Compared(turned, tilts[turned], filled[rows], predicted.values[rows], usable)


def _tilts_of_predictions(predicted: PredictedSeries, tilts: np.ndarray) -> np.ndarray:
    """Mean tilt of the volumes of which each prediction is made, weighted by their part of its signal, (n, 2)."""
    mean = predicted.values.mean(dim=1).clamp(min=1e-9).numpy()
    return (predicted.matrix * mean / mean[:, None]) @ tilts


def _intact(inputs: _Inputs, series: TiltedSeries) -> np.ndarray:
    """Whether the points lie outside slices with signal dropout in the turned volumes, (k, m) bool."""
    out = np.ones((len(inputs.turned), len(series.points)), bool)
    world, grid = series.points.world.astype(float) + series.points.centre, inputs.dwi.grid
    for motion in inputs.motions:
        if motion.outlier_slices is None:
            continue
        for row, v in enumerate(inputs.turned):
            lost = motion.outlier_slices[motion.volumes == v].any(axis=0)
            if lost.any():
                at = grid.to_voxels(world @ series.transforms[v, :3, :3].T + series.transforms[v, :3, 3])
                low = np.clip(np.floor(at[:, motion.slice_axis]).astype(int), 0, len(lost) - 2)
                out[row] &= ~(lost[low] | lost[low + 1])
    return out


def _evidence(inputs: _Inputs, series: TiltedSeries, compared: _Compared, prior: sparse.csr_matrix) -> float:
    """Variance over the brain of the fields over that of the same fit along the axes along which no field displaces."""
    spread = lambda c: float(series.at_points(series.basis.evaluate(c)).var(axis=1).sum())  # noqa: E731
    controls = []
    for axis in {0, 1, 2} - {inputs.axis}:
        equations = compared.equations(series, axis)
        without = replace(series, coefficients=np.zeros_like(series.coefficients))
        controls.append(spread(solve_fields(equations, without, prior, axis)))
    return spread(series.coefficients) / max(float(np.mean(controls)), 1e-12)


def _size(series: TiltedSeries) -> float:
    fields = np.abs(series.at_points(series.basis.evaluate(series.coefficients)))
    return float(DEGREES * np.percentile(fields, 95, axis=1).max())


def _series(
    inputs: _Inputs,
    rigid: MovingField,
    transforms: np.ndarray,
    resting: tuple[DisplacementField, ...],
    distortion: Distortion | None,
) -> TiltedSeries:
    reference = inputs.motions[0].dwiref if distortion is None else distortion.dwiref
    mask = brain_mask_b0(reference)
    data, grid = average_blocks(inputs.dwi.data, inputs.dwi.grid, SPACING_MM)
    inside, _ = average_blocks(mask.data[None].float(), mask.grid, SPACING_MM)
    points = point_set(inside[0], grid)
    knots = spline_knots(grid, points.world + points.centre, KNOTS_MM)
    axis = inputs.dwi.grid.directions[:, inputs.axis]
    eddy = eddy_currents(inputs.motions, len(inputs.dwi))
    return TiltedSeries(
        data,
        grid,
        points,
        transforms,
        eddy,
        tuple(along_axis(sample_displacement(field, grid, np.eye(4)), axis) for field in resting),
        rigid.directions @ axis,
        inputs.dwi.blip,
        pitch_and_roll(transforms[:1])[0] - rigid.tilts[0],
        spline_basis(knots, grid),
        np.zeros((2, knots.count)),
    )


def _resting(acquired: Acquired, distortion: Distortion | None, rigid: MovingField) -> tuple[DisplacementField, ...]:
    if distortion is not None:
        return distortion.fields
    none = DisplacementField(torch.zeros(3, *rigid.grid.shape), rigid.grid)
    return tuple(none for _ in acquired.blips)


def _rigid_field(
    acquired: Acquired, transforms: np.ndarray, undistorted: np.ndarray, origin: np.ndarray
) -> MovingField:
    """The result without a change of the field."""
    grid = acquired.dwi.grid
    encodings = [blip.pe for blip in acquired.blips]
    directions, mm_per_hz = _directions(acquired, encodings)
    tilts = pitch_and_roll(undistorted) - origin
    return MovingField(None, grid, directions, tilts, transforms, mm_per_hz, "")


def _directions(acquired: Acquired, encodings: list[PhaseEncoding | None]) -> tuple[np.ndarray, float | None]:
    """`MovingField.directions` and `mm_per_hz`."""
    vectors, known = [], all(pe is not None and pe.readout_time for pe in encodings)
    for pe, blip in zip(encodings, acquired.blips, strict=True):
        grid = blip.grid or acquired.dwi.grid
        if pe is None:
            vectors.append(np.zeros(3))
            continue
        readout = float(pe.readout_time or 0) * grid.voxel_sizes[pe.axis] if known else 1.0
        vectors.append(pe.polarity * readout * grid.directions[:, pe.axis])
    unit = max(float(np.linalg.norm(vectors[0])), 1e-12)
    return np.stack(vectors) / unit, unit if known else None


def _poses(acquired: Acquired, distortion: Distortion | None) -> np.ndarray:
    """Pose of the blip of each volume, (n, 4, 4)."""
    if distortion is None:
        return np.tile(np.eye(4), (len(acquired.dwi), 1, 1))
    return np.asarray(distortion.poses)[acquired.dwi.blip]


def _all_transforms(
    acquired: Acquired, motions: tuple[Motion, ...], distortion: Distortion | None
) -> tuple[np.ndarray, np.ndarray]:
    """Transforms of all volumes, (n, 4, 4), from the dwiref of their blip and from the undistorted dwiref."""
    transforms = np.tile(np.eye(4), (len(acquired.dwi), 1, 1))
    for motion in motions:
        transforms[motion.volumes] = motion.transforms
    return transforms, transforms @ _poses(acquired, distortion)


def _origin(
    acquired: Acquired, motions: tuple[Motion, ...], distortion: Distortion | None, undistorted: np.ndarray
) -> np.ndarray:
    """Pitch and roll to which the distortion belongs, (2,): the mean over the blips of which it was estimated."""
    dwi, means = acquired.dwi, []
    for b in range(len(acquired.blips)):
        own = (dwi.blip == b) & dwi.is_b0
        if own.any():
            means.append(pitch_and_roll(undistorted[own]).mean(axis=0))
        elif distortion is not None and distortion.method == "drbuddi":
            means.append(pitch_and_roll(distortion.poses[b][None])[0])
    return np.mean(means, axis=0)


def _turned(acquired: Acquired, motions: tuple[Motion, ...], transforms: np.ndarray) -> np.ndarray:
    """Volumes that turned by more than `TURNED` and did not move within themselves, (n,) bool."""
    trace = np.trace(transforms[:, :3, :3], axis1=1, axis2=2)
    turned = np.rad2deg(np.arccos(np.clip((trace - 1) / 2, -1, 1))) > TURNED
    for motion in motions:
        if motion.slices is not None:
            turned[motion.volumes[motion.slices.moving]] = False
        if motion.outlier_slices is not None:
            turned[motion.volumes[motion.outlier_slices.mean(axis=1) > 0.5]] = False
    return turned


def _not_possible(motions: tuple[Motion, ...], pe: PhaseEncoding | None) -> str:
    """Why no field can be estimated; empty if it can."""
    if pe is None:
        return "A change of the field with the head was not estimated: the phase encoding is not known."
    if any(motion.model not in SIGNAL_MODELS for motion in motions):
        return "A change of the field with the head was not estimated: there are too few directions to predict volumes."
    if any(motion.density(row) != 1 for motion in motions for row in range(len(motion.volumes))):
        return "A change of the field with the head was not estimated: poses are affine."
    return ""


def _too_still(tilts: np.ndarray) -> str:
    """Why turned volumes with tilts (k, 2) do not tell a change of the field; empty if they do."""
    tilted = int((np.linalg.norm(tilts, axis=1) > TILTED).sum()) if len(tilts) else 0
    if tilted >= LEAST_TILTED:
        return ""
    return (
        f"A change of the field with the head is not used because rotations are below {TILTED:g} degrees of pitch and "
        f"roll in all but {tilted} volumes; it takes {LEAST_TILTED}."
    )
