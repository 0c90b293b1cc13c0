"""Poses of the shots of a series: which volumes need more than one, and their estimation with a random walk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import median_filter

from dsiprep.data.dwi import DWI
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.affine import rigid_matrix, rigid_parameters
from dsiprep.ops.motion.carried_field import axis_change
from dsiprep.ops.motion.pose_prior import rms_extent
from dsiprep.ops.motion.poses import even_gradient_basis
from dsiprep.ops.motion.shot_walk import (
    Offsets,
    Trend,
    Walk,
    convex_weights,
    log_odds,
    solve_with_trend,
    step_weights,
    steps_of,
)
from dsiprep.ops.motion.slice_equations import PredictedSlices, ShotEquations

__all__ = [
    "ShotPoses",
    "explained",
    "first_equations",
    "follow_head",
    "settled",
    "single_poses",
    "with_misfit",
    "without_excursions",
]

STEP_MM = 0.03  # scale of the steps from shot to shot of a head at rest
ANNEALED_MM = (1.0, 0.4, 0.15, 0.06)  # scales that come first: wide steps
TRIED_MM = (0.02, 0.06, 0.2, 0.6)  # scales of steps by which volumes with one pose are tested
FIELD_MM = 2.0  # standard deviation of displacements by the field, from shot to shot
UNKNOWN_MM = 4.0  # the same of a distortion that was not estimated, over the head
OFFSETS_MM = (0.03, 0.1, 0.3)  # standard deviations of offsets by position that are tried
OFFSET_LENGTH_MM = 15.0  # over which offsets change
SETTLING = 2  # Gauss-Newton steps of volumes with one pose
SETTLED = 4  # of these, from which on steps are heavy-tailed
SOLUTIONS = 3  # for new weights of the steps, from the same equations, before that
FIRST_SPREAD_MM = 0.1  # of the trend with the gradient
EXCURSION_MM = 1.0  # from the median of seven shots
LONGEST_MM = 5.0  # changes of a pose in one iteration are shortened to this
KEPT_BYTES = 1 << 30  # of coefficients of predictions that stay in memory between iterations
LEAST_VOLUMES = 3  # that the systematic slope is taken from
SIMILAR_VOLUMES = 25  # of the most similar b-values, whose misfit is compared


@dataclass(frozen=True, eq=False)
class ShotPoses:
    """Poses of all shots of n volumes, and what else is fitted.

    Attributes
    ----------
    poses : ndarray, (n, shots, 4, 4)
        Points of the head to points of the volume while a shot is acquired, RAS+ mm.
    moving : ndarray, (n,) bool
        Volumes whose shots have poses of their own; in others all are equal.
    gain : ndarray, (n, slices)
        Signal of each slice over its prediction.
    scale : ndarray, (n,)
        Of the residual.
    misfit : ndarray, (n,)
        By which the variance of pose estimates exceeds that of the noise, at least 1.
    systematic : ndarray, (n, shots, 6)
        Slope of the cost of each shot that volumes of similar b-values have in common, because predictions are less
        sharp than slices and err alike.
    trend : Trend
        With a row of its basis for each volume.
    """

    poses: np.ndarray
    moving: np.ndarray
    gain: np.ndarray
    scale: np.ndarray
    misfit: np.ndarray
    systematic: np.ndarray
    trend: Trend


def single_poses(transforms: np.ndarray, slices: PredictedSlices) -> ShotPoses:
    """One pose (n, 4, 4) for all shots of each volume; nothing else is known."""
    count, q = len(transforms), np.where(slices.dwi.is_b0[:, None], 0, slices.dwi.q)
    basis = even_gradient_basis(q) if q.any() else np.zeros((count, 0))
    basis = np.column_stack([basis, slices.dwi.is_b0])  # registered to their own mean, b=0 volumes may drift together
    return ShotPoses(
        np.repeat(transforms[:, None], len(slices.shots), axis=1),
        np.zeros(count, bool),
        np.ones((count, len(slices.shot_of))),
        np.full(count, np.inf),
        np.ones(count),
        np.zeros((count, len(slices.shots), 6)),
        Trend(basis, np.zeros((basis.shape[1], 6)), FIRST_SPREAD_MM),
    )


def settled(slices: PredictedSlices, state: ShotPoses, volumes: np.ndarray) -> ShotPoses:
    """Register some volumes (v,) with one pose each to their predictions."""
    poses = state.poses.copy()
    for volume in volumes:
        coefficients, gain, scale = slices.coefficients(volume), state.gain[volume], np.inf
        for _ in range(SETTLING):
            one = slices.equations(volume, coefficients, poses[volume], gain, scale)
            gain, scale = one.gain, one.scale
            total = one.hessian.sum(axis=0)
            change = np.linalg.solve(total + 1e-6 * np.diag(np.diag(total)) + 1e-9 * np.eye(6), one.slope.sum(axis=0))
            poses[volume] = poses[volume] @ rigid_matrix(change, slices.points.centre)
    return replace(state, poses=poses)


def first_equations(slices: PredictedSlices, state: ShotPoses) -> tuple[ShotPoses, list[ShotEquations]]:
    """Fit gains and scales at the current poses; equations of all volumes."""
    gain, scale, found = state.gain.copy(), state.scale.copy(), []
    for volume in range(len(scale)):
        coefficients, poses = slices.coefficients(volume), state.poses[volume]
        rough = slices.equations(volume, coefficients, poses, gain[volume], scale[volume])  # with equal weights
        one = slices.equations(volume, coefficients, poses, rough.gain, rough.scale)
        gain[volume], scale[volume] = one.gain, one.scale
        found.append(one)
    return replace(state, gain=gain, scale=scale), found


def with_misfit(state: ShotPoses, equations: list[ShotEquations], dwi: DWI) -> ShotPoses:
    """Copy with `systematic` and `misfit` from equations at one pose of each volume: medians over similar b-values.

    The misfit is the variance of pose estimates over what noise explains, from differences of consecutive shots, whose
    poses hardly differ in truth. Volumes with b=0 are compared among each other; one or two of them, of whose mean they
    make up a large part, cannot be judged and stay where they are.
    """
    slope = np.stack([one.slope for one in equations])
    systematic, misfit = np.zeros_like(slope), np.ones(len(slope))
    for group in (np.flatnonzero(dwi.is_b0), np.flatnonzero(~dwi.is_b0)):
        similar = group[_similar(dwi.bvals[group])]
        enough = len(group) >= LEAST_VOLUMES
        systematic[group] = [np.median(slope[rows], axis=0) for rows in similar] if enough else slope[group]
        ratios = np.ones(len(slope))
        for v in group:
            ratios[v] = _shot_dispersion(equations[v], systematic[v])
        misfit[group] = np.maximum(np.median(ratios[similar], axis=1), 1) if len(group) else 1
    return replace(state, systematic=systematic, misfit=misfit)


def _similar(bvals: np.ndarray) -> np.ndarray:
    """Indices of the volumes of the most similar b-values of each volume, (n, s), itself among them."""
    by_bval, size = np.argsort(bvals, kind="stable"), min(SIMILAR_VOLUMES, len(bvals))
    first = np.clip(np.arange(len(bvals)) - size // 2, 0, len(bvals) - size)
    similar = np.empty((len(bvals), size), int)
    similar[by_bval] = by_bval[first[:, None] + np.arange(size)]
    return similar


def _shot_dispersion(one: ShotEquations, systematic: np.ndarray) -> float:
    """Median over pairs of consecutive shots of the squared Mahalanobis distance of their poses, over its median."""
    full = one.voxels >= 0.5 * one.voxels.max()
    inverse = np.linalg.pinv(one.hessian, hermitian=True)
    poses = np.einsum("tij,tj->ti", inverse, one.slope - systematic)
    pair = full[1:] & full[:-1]
    if not pair.any():
        return 1.0
    difference, total = np.diff(poses, axis=0)[pair], (inverse[1:] + inverse[:-1])[pair]
    distance = np.einsum("ti,tij,tj->t", difference, np.linalg.pinv(total, hermitian=True), difference)
    return float(np.median(distance) / 5.348)  # median of chi-square of 6 degrees of freedom


def explained(
    slices: PredictedSlices, state: ShotPoses, equations: list[ShotEquations]
) -> tuple[np.ndarray, np.ndarray]:
    """What poses of their own for the shots of each volume explain, by equations at one pose.

    The field displaces slices along the phase-encoding axis, as eddy currents decay and the subject breathes, and this
    alone is no sign of motion. Translations along that axis and rotations about the two others, of standard deviation
    `FIELD_MM`, are integrated out for each shot: what counts is what the field cannot mimic. Where the distortion is
    not known, so is what it does in a turned head (see `ops.motion.carried_field`). Nor do offsets tell that depend on
    where shots are in the head and not on when they were acquired (`Offsets`), or shots that lost signal.

    Returns
    -------
    odds : ndarray, (n,)
        Logarithm of the odds over one pose, of normal steps of the most likely of `TRIED_MM`.
    apart : ndarray, (n,)
        Root mean square distance (mm) of these poses from their mean.
    """
    hessian = np.stack([one.hessian for one in equations]) / state.misfit[:, None, None, None]
    slope = (np.stack([one.slope for one in equations]) - state.systematic) / state.misfit[:, None, None]
    lengths = _lengths(slices)
    mimicked = [] if slices.eddy is None else [_mimicked(slices.eddy, state.poses[:, 0], lengths)]
    if slices.field is None:
        mimicked += [_mimicked_by_unknown(axis, state.poses[:, 0], lengths) for axis in _encoding_axes(slices)]
    if mimicked:
        hessian, slope = _without_field(hessian, slope, np.concatenate(mimicked, axis=2))
    for volume, lost in enumerate(slices.lost):
        shots = np.unique(slices.shot_of[lost])
        hessian[volume, shots], slope[volume, shots] = 0, 0
    offsets = Offsets(_by_position(slices), OFFSETS_MM)
    found = [log_odds(h, s, TRIED_MM, lengths, offsets) for h, s in zip(hessian, slope, strict=True)]
    odds, apart = np.array(found).T
    return odds, apart


def _by_position(slices: PredictedSlices) -> np.ndarray:
    """Cosines of the mean position of each shot across slices, (shots, c)."""
    position = np.array([np.mean(group) for group in slices.shots])
    extent = max(float(np.ptp(position)), 1.0)
    count = max(1, round(extent * slices.dwi.grid.voxel_sizes[slices.slice_axis] / OFFSET_LENGTH_MM))
    return np.cos(np.pi * np.arange(1, count + 1) * ((position - position.min()) / extent)[:, None])


def _mimicked(eddy: EddyCurrents, poses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Changes of poses (n, 4, 4) that displace by about 1 mm along the phase-encoding axis, (n, 6, 3)."""
    axes = np.einsum("nba,bc->nac", poses[:, :3, :3], eddy.axes)  # columns, in the frame of the head
    out = np.zeros((len(poses), 6, 3))
    out[:, 3:, 0] = axes[..., eddy.along]
    for column, other in enumerate({0, 1, 2} - {eddy.along}, start=1):
        out[:, :3, column] = axes[..., other] / lengths[:3].mean()
    return out


def _encoding_axes(slices: PredictedSlices) -> list[np.ndarray]:
    """Unit vectors (3,) along which the field may displace: both axes of the slices if it is not known which."""
    eddy, directions = slices.eddy, slices.dwi.grid.directions
    return [directions[:, a] for a in range(3) if (a == eddy.along if eddy else a != slices.slice_axis)]


def _mimicked_by_unknown(axis: np.ndarray, poses: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Changes of poses (n, 4, 4) that do in a turned head what a distortion along `axis` (3,) does, (n, 6, 4).

    For a displacement of `UNKNOWN_MM` over `FIELD_MM` mm: its mean, and its slopes along the three axes of the head.
    """
    turned = axis_change(poses, axis) * UNKNOWN_MM / FIELD_MM
    out = np.zeros((len(poses), 6, 4))
    out[:, 3:, 0] = turned
    for column, along in enumerate(np.eye(3), start=1):
        out[:, :3, column] = np.cross(along, turned) / lengths[:3].mean()
    return out


def _without_field(hessian: np.ndarray, slope: np.ndarray, mimicked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equations (n, shots, 6, 6) and (n, shots, 6) after integration over changes (n, 6, c) of unknown size."""
    columns = np.einsum("vtij,vjc->vtic", hessian, mimicked)
    known = np.einsum("vic,vtid->vtcd", mimicked, columns) + np.eye(mimicked.shape[2]) / FIELD_MM**2
    side = np.einsum("vti,vic->vtc", slope, mimicked)
    fraction = np.linalg.solve(known, np.swapaxes(columns, -1, -2))
    rounding = 1e-12 * np.trace(hessian, axis1=-2, axis2=-1)[..., None, None] * np.eye(6)
    return hessian + rounding - columns @ fraction, slope - np.einsum("vtci,vtc->vti", fraction, side)


def _lengths(slices: PredictedSlices) -> np.ndarray:
    """Displacement in mm of points at the root mean square distance per unit of each pose parameter, (6,)."""
    extent = rms_extent(slices.points)
    return np.concatenate([np.sqrt((extent**2).sum() - extent**2), np.ones(3)])


@dataclass(frozen=True, eq=False)
class _Nodes:
    """Poses that are estimated: one for each shot of moving volumes, one for each other volume.

    Attributes
    ----------
    of : list of slice
        Nodes of each volume.
    interval : ndarray, (nodes,)
        Time since the node before, in shots; infinite at the start of a run.
    """

    of: list[slice]
    interval: np.ndarray


def _nodes(moving: np.ndarray, run: np.ndarray, shots: int) -> _Nodes:
    sizes = np.where(moving, shots, 1)
    first = np.cumsum(sizes) - sizes
    duration = np.repeat(np.where(moving, 1.0, shots), sizes)
    interval = np.append(np.inf, (duration[1:] + duration[:-1]) / 2)
    interval[first[np.diff(run, prepend=-1) != 0]] = np.inf
    return _Nodes([slice(int(f), int(f + n)) for f, n in zip(first, sizes, strict=True)], interval)


def follow_head(slices: PredictedSlices, state: ShotPoses, scales: tuple[float, ...], settled: int = 0) -> ShotPoses:
    """Estimate the poses of all shots of the moving volumes, and one pose of each other volume.

    Parameters
    ----------
    slices : PredictedSlices
    state : ShotPoses
    scales : tuple of float
        Scale of the steps from shot to shot in mm, one for each iteration.
    settled : int
        Iteration from which on steps have heavy tails.
    """
    count = len(slices.shots)
    nodes, lengths = _nodes(state.moving, slices.dwi.run, count), _lengths(slices)
    poses = np.concatenate([own[: part.stop - part.start] for own, part in zip(state.poses, nodes.of, strict=True)])
    sizes = [part.stop - part.start for part in nodes.of]
    hessian, slope = np.zeros((len(poses), 6, 6)), np.zeros((len(poses), 6))
    state, kept = replace(state, gain=state.gain.copy(), scale=state.scale.copy()), dict[int, np.ndarray]()
    for number, mm in enumerate(scales):
        for volume in range(len(state.moving)) if number == 0 else map(int, np.flatnonzero(state.moving)):
            part = nodes.of[volume]
            away = rigid_matrix(state.trend.basis[volume] @ state.trend.coefficients, slices.points.centre)
            own = np.broadcast_to(poses[part] @ away, (count, 4, 4))
            h, s = _equations(slices, state, volume, own, kept)
            hessian[part], slope[part] = (h, s) if state.moving[volume] else (h.sum(0), s.sum(0))
        walk = Walk(mm * np.sqrt(nodes.interval), slices.points.centre, lengths)
        for _ in range(SOLUTIONS if number < settled else 1):
            steps = steps_of(poses, walk)
            weights = (convex_weights if number < settled else step_weights)(steps, walk)
            trend = replace(state.trend, basis=np.repeat(state.trend.basis, sizes, axis=0))
            change, after = solve_with_trend(hessian, slope, steps, weights, trend, lengths)
            size = np.sqrt(((change * lengths) ** 2).sum(axis=1))
            change *= np.minimum(1, LONGEST_MM / np.maximum(size, 1e-9))[:, None]
            both = change + trend.basis @ (after.coefficients - trend.coefficients)
            slope -= np.einsum("tij,tj->ti", hessian, both)  # equations at the new poses, linearised
            state = replace(state, trend=replace(after, basis=state.trend.basis))
            poses = poses @ rigid_matrix(change, slices.points.centre)
    return replace(state, poses=np.stack([np.broadcast_to(poses[part], (count, 4, 4)) for part in nodes.of]))


def without_excursions(slices: PredictedSlices, state: ShotPoses) -> ShotPoses:
    """Copy in which shots that leave the path of the head for at most three shots follow the shots around them.

    Single shots, at the ends of the head above all, can agree with the prediction at quite a wrong pose. The median of
    seven shots, which replaces such poses, keeps sudden moves as they are.
    """
    shots, lengths, poses = state.poses.shape[1], _lengths(slices), state.poses.copy()
    for run in np.unique(slices.dwi.run):
        volumes = np.flatnonzero(slices.dwi.run == run)
        path = rigid_parameters(state.poses[volumes].reshape(-1, 4, 4), slices.points.centre)
        smooth = median_filter(path, size=(7, 1), mode="nearest")
        away = np.sqrt((((path - smooth) * lengths) ** 2).sum(axis=1)) > EXCURSION_MM
        path[away] = smooth[away]
        poses[volumes] = rigid_matrix(path, slices.points.centre).reshape(-1, shots, 4, 4)
    return replace(state, poses=np.where(state.moving[:, None, None, None], poses, state.poses))


def _equations(
    slices: PredictedSlices, state: ShotPoses, volume: int, poses: np.ndarray, kept: dict[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Hessian and slope of the shots of a volume; its gain and scale in `state` are renewed in place.

    Coefficients of predictions of moving volumes are added to `kept` while there is room.
    """
    coefficients = kept[volume] if volume in kept else slices.coefficients(volume)
    if state.moving[volume] and len(kept) * coefficients.nbytes < KEPT_BYTES:
        kept[volume] = coefficients
    one = slices.equations(volume, coefficients, poses, state.gain[volume], float(state.scale[volume]))
    state.gain[volume], state.scale[volume] = one.gain, one.scale
    return one.hessian / state.misfit[volume], (one.slope - state.systematic[volume]) / state.misfit[volume]
