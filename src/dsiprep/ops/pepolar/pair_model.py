"""Model of a blip-up/blip-down pair: images given field, head pose and gain, their misfit, and Gauss-Newton equations.

Point x of the undistorted head is found in blip 0 at x + (s_0 f(x) + g(x)) e and in blip 1 at
P x + (s_1 f(x) + g(x)) e1. f is the field in mm, e the phase-encoding axis, P the pose of the head in blip 1, and g the
displacement shared by both blips, 0 without a structural image. e1 is e unless blip 1 was scanned on another grid, on
which it stays. Intensities are multiplied by the Jacobian determinants of these maps. All arrays have the
phase-encoding axis last, (a, b, y).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.image.filters import resized
from dsiprep.ops.image.interpolation import spline_coefficients
from dsiprep.ops.pepolar.data_terms import DataTerms, combined
from dsiprep.ops.pepolar.difference_noise import difference_noise
from dsiprep.ops.pepolar.normal_equations import NormalEquations, percentile_99
from dsiprep.ops.pepolar.pose_derivatives import transverse_axes
from dsiprep.ops.pepolar.regularisation import (
    BARRIER_WEIGHT,
    Smoothness,
    add_penalties,
    barrier,
    central_difference,
    central_difference_transpose,
    penalty_gradient,
    roughness,
)
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines, sample_volume
from dsiprep.ops.pepolar.second_blip import PARALLEL, jacobian_direction, pose_derivatives, spread_across, voxel_matrix

__all__ = [
    "Comparison",
    "Contrast",
    "Images",
    "Pair",
    "State",
    "apply_step",
    "compare",
    "cost",
    "displacement_between",
    "expecting",
    "gauss_newton_equations",
    "is_folded",
    "make_pair",
    "outlier_limits",
]

GRADIENT_WEIGHT = 0.02  # of the squared gradient of the field in mm, per mm³
LAPLACIAN_WEIGHT = 200.0  # of its squared Laplacian, per mm³, in mm²
LINEAR_LAPLACIAN = 0.004  # 1/mm; the penalty is linear beyond, because sources of the field are rare and strong
OUTLIER = 3.0  # standard deviations; residuals beyond count less and less
CONTRAST_NOISE_FACTOR = 2**0.5  # further contrasts are means of volumes that moved, so they differ by more than noise
POSE_PRIOR = (100.0, 100.0, 100.0, 0.01, 0.01, 1.0)  # per rad², per mm² and of the logarithm of the gain

Images = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Contrast:
    """A further image of both blips on the grid of their b=0 images, with the same distortion and gain.

    Attributes
    ----------
    line_splines, volume_splines, noise
        As in `Pair`.
    """

    line_splines: torch.Tensor
    volume_splines: torch.Tensor
    noise: float


@dataclass(frozen=True, eq=False)
class Pair:
    """Two b=0 images at one voxel size, in units of the brain's median.

    Attributes
    ----------
    line_splines : Tensor, (a, b, y)
        Blip 0, spline coefficients along the last axis.
    volume_splines : Tensor, (a, b, y)
        Blip 1, spline coefficients along all axes.
    brain : Tensor, (a, b, y), bool
        Rough mask.
    grid : Grid
        Phase-encoding axis last.
    scales : (float, float)
        s_0 and s_1, of opposite signs.
    centre : ndarray, (3,)
        Centre of the head's rotation, world RAS+ mm.
    noise : float
        Standard deviation of the difference of correctly aligned images.
    contrasts : tuple of Contrast
        Compared in addition to the b=0 images.
    second : Grid
        Of blip 1, phase-encoding axis last; `grid` unless it was scanned on another.
    expected : Tensor, (a, b, y), or None
        Gradient of the smoothness penalties at the estimate of a coarser level, from `expecting`.
    """

    line_splines: torch.Tensor
    volume_splines: torch.Tensor
    brain: torch.Tensor
    grid: Grid
    scales: tuple[float, float]
    centre: np.ndarray
    noise: float
    contrasts: tuple[Contrast, ...]
    second: Grid
    expected: torch.Tensor | None = None

    @property
    def steepness(self) -> float:
        """Displacement in voxels per mm of field, in the more distorted blip."""
        return max(abs(s) for s in self.scales) / float(self.grid.voxel_sizes[2])


@dataclass(frozen=True, eq=False)
class State:
    """Current estimate.

    Attributes
    ----------
    field : Tensor, (a, b, y)
        f, mm.
    pose : ndarray, (4, 4)
        P, world RAS+ mm.
    gain : float
        Logarithm of the factor that scales blip 1 to the intensities of blip 0.
    shared : Tensor, (a, b, y), or None
        g, mm.
    """

    field: torch.Tensor
    pose: np.ndarray
    gain: float
    shared: torch.Tensor | None = None

    def displacements(self, scales: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Displacement of each blip along the phase-encoding axis, (a, b, y), mm."""
        both = (scales[0] * self.field, scales[1] * self.field)
        return both if self.shared is None else (both[0] + self.shared, both[1] + self.shared)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Both images sampled at the points of the undistorted head.

    Attributes
    ----------
    values, jacobians : two Tensor, (a, b, y)
        Unmodulated intensities, and the Jacobian determinants.
    slope : Tensor, (a, b, y)
        Of blip 0 along the last axis, per voxel.
    gradient : Tensor, (3, a, b, y)
        Of blip 1, per voxel.
    inside : Tensor, (a, b, y)
        1 where both points are within the grid.
    residual : Tensor, (a, b, y)
        Modulated blip 0 minus modulated blip 1, gain applied.
    contrasts : tuple of Comparison
        The same for each further contrast.
    """

    values: tuple[torch.Tensor, torch.Tensor]
    jacobians: tuple[torch.Tensor, torch.Tensor]
    slope: torch.Tensor
    gradient: torch.Tensor
    inside: torch.Tensor
    residual: torch.Tensor
    contrasts: tuple[Comparison, ...] = ()


def make_pair(
    images: Images,
    brain: torch.Tensor,
    grid: Grid,
    scales: tuple[float, float],
    centre: np.ndarray,
    contrasts: Sequence[Images] = (),
    second: tuple[Grid, torch.Tensor] | None = None,
) -> Pair:
    """Prepare a `Pair` from images (a, b, y).

    An empty mask `brain` (a, b, y) is replaced by the whole grid. `contrasts` are further images of blip 0 and blip 1,
    in the same units. `second` is the grid of blip 1 and the brain on it, if they are not `grid` and `brain`.
    """
    other, brains = second[0] if second else grid, (brain, second[1] if second else brain)
    brain, far = (b if bool(b.any()) else torch.ones_like(b) for b in brains)
    further = tuple(
        Contrast(*_splines(i), CONTRAST_NOISE_FACTOR * difference_noise(i, (brain, far))) for i in contrasts
    )
    return Pair(*_splines(images), brain, grid, scales, centre, difference_noise(images, (brain, far)), further, other)


def expecting(pair: Pair, coarser: Pair, field: torch.Tensor) -> Pair:
    """The pair with its roughness counted from that of `field` (a, b, y), the estimate of the `coarser` level.

    Penalties R flatten the field, above all where it is strong. What a coarser level found in spite of them, c, stays:
    R(f) is replaced by its Bregman distance R(f) - R(c) - <R'(c), f - c> (Osher et al. 2005, doi 10.1137/040605412).
    """
    gradient, _ = penalty_gradient(field, coarser.grid.voxel_sizes, _smoothness(coarser))
    volume_ratio = float(np.prod(pair.grid.voxel_sizes) / np.prod(coarser.grid.voxel_sizes))
    return replace(pair, expected=volume_ratio * resized(gradient, pair.grid.shape))


def compare(pair: Pair, state: State) -> Comparison:
    """Sample both images at the points of the undistorted head and compute their difference."""
    h, h1 = (float(grid.voxel_sizes[2]) for grid in (pair.grid, pair.second))
    u0, u1 = state.displacements(pair.scales)
    matrix = voxel_matrix(pair.grid, pair.second, state.pose)
    j0 = 1 + central_difference(u0, 2) / h
    direction = jacobian_direction(pair.grid, pair.second, state.pose)
    j1 = torch.ones_like(j0)
    for axis in range(3):
        j1 += float(direction[axis]) * central_difference(u1, axis)

    def sample(images: Pair | Contrast) -> Comparison:
        v0, slope, in0 = sample_lines(images.line_splines, u0 / h)
        v1, gradient, in1 = sample_volume(images.volume_splines, matrix, u1 / h1)
        residual = v0 * j0 - float(np.exp(state.gain)) * v1 * j1
        return Comparison((v0, v1), (j0, j1), slope, gradient, in0 * in1, residual)

    return replace(sample(pair), contrasts=tuple(sample(contrast) for contrast in pair.contrasts))


def outlier_limits(pair: Pair, compared: Comparison) -> tuple[float, ...]:
    """Residual beyond which a voxel counts less, for b=0 and each contrast; larger while the images still disagree."""
    return tuple(_outlier_limit(pair.brain, part, noise) for part, noise in _parts(pair, compared))


def is_folded(pair: Pair, state: State, compared: Comparison) -> bool:
    """Whether the field folds either image, or nearly does."""
    shared = state.shared is not None  # the barrier does not include the shared displacement
    jacobians = compared.jacobians[0 if shared else 1 :]
    return not bool(torch.isfinite(barrier(state.field, pair.steepness)[0])) or not all(
        bool((j > 0).all()) for j in jacobians
    )


def cost(pair: Pair, state: State, compared: Comparison, limits: tuple[float, ...]) -> float:
    """Objective function: misfit, roughness of the field and barrier; infinite where the field folds.

    The misfit is Cauchy's, limit²/2 log(1 + r²/limit²) in units of the noise, with limits from `outlier_limits`. The
    Laplacian is penalised quadratically up to `LINEAR_LAPLACIAN` and linearly beyond. With `pair.expected`, roughness
    is counted from that of the coarser level's estimate, less a constant.
    """
    if is_folded(pair, state, compared):
        return float("inf")
    folding = barrier(state.field, pair.steepness)[0]
    misfit = sum(
        0.5 * (limit / noise) ** 2 * (part.inside * torch.log1p((part.residual / limit) ** 2)).sum()
        for (part, noise), limit in zip(_parts(pair, compared), limits, strict=True)
    )
    rough = roughness(state.field, pair.grid.voxel_sizes, _smoothness(pair))
    if pair.expected is not None:
        rough = rough - (pair.expected.double() * state.field).sum()
    return float(misfit + rough + BARRIER_WEIGHT * folding)


def gauss_newton_equations(
    pair: Pair, state: State, compared: Comparison, limits: tuple[float, ...]
) -> tuple[NormalEquations, tuple[torch.Tensor, torch.Tensor]]:
    """Normal equations of the next step: the matrix, and the negative gradient of `cost`.

    Pose parameters are a rotation vector (radians, about the moved centre), two translations across the
    phase-encoding axis (mm) and the logarithm of the gain, (6,).
    """
    parts = zip(_parts(pair, compared), limits, strict=True)
    terms = combined([_data_terms(pair, state, part, noise, limit) for (part, noise), limit in parts])
    field_gradient, pose = terms.field_gradient, terms.pose
    pose += torch.diag(torch.tensor(POSE_PRIOR, device=pose.device))
    spacing, smoothness = pair.grid.voxel_sizes, _smoothness(pair)
    curvature, laplacian_weight = add_penalties(field_gradient, state.field, spacing, pair.steepness, smoothness)
    if pair.expected is not None:
        field_gradient -= pair.expected
    normal = NormalEquations(
        terms.by_field,
        terms.by_slope,
        terms.weight,
        curvature,
        terms.coupling,
        pose,
        spacing,
        smoothness.gradient_weight,
        laplacian_weight,
        terms.diagonal,
        terms.across,
    )
    return normal, (-field_gradient, -terms.pose_gradient)


def apply_step(pair: Pair, state: State, field: torch.Tensor, pose: np.ndarray) -> State:
    """The state after a step: `field` (a, b, y) in mm, `pose` (6,) as in `gauss_newton_equations`."""
    centre = (state.pose @ np.append(pair.centre, 1))[:3]
    parameters = np.concatenate([pose[:3], transverse_axes(pair.second) @ pose[3:5]])
    gain = float(np.clip(state.gain + pose[5], -3, 3))
    return State(state.field + field, rigid_matrix(parameters, centre) @ state.pose, gain)


def displacement_between(pair: Pair, before: State, after: State) -> float:
    """Displacement in mm of the brain from one state to another.

    The larger of the 99th percentile due to the field and the maximum due to the pose.
    """
    by_field = percentile_99((after.field - before.field).abs()[pair.brain])
    points = pair.centre + 60.0 * np.concatenate([np.eye(3), -np.eye(3)])
    return max(by_field, float(point_displacement(before.pose[None], after.pose[None], points).max()))


def _splines(images: Images) -> Images:
    """Spline coefficients along lines of blip 0, and along all axes of blip 1."""
    return line_coefficients(images[0]), spline_coefficients(images[1][None])[0]


def _outlier_limit(brain: torch.Tensor, compared: Comparison, noise: float) -> float:
    residual = compared.residual[brain & (compared.inside > 0)]
    spread = float(1.4826 * residual.abs().median()) if residual.numel() else 0.0
    return OUTLIER * max(spread, noise)


def _parts(pair: Pair, compared: Comparison) -> list[tuple[Comparison, float]]:
    """Comparison and noise of b=0, then of each contrast."""
    return list(zip((compared, *compared.contrasts), (pair.noise, *(c.noise for c in pair.contrasts)), strict=True))


def _smoothness(pair: Pair) -> Smoothness:
    volume = float(np.prod(pair.grid.voxel_sizes))
    return Smoothness(GRADIENT_WEIGHT * volume, LAPLACIAN_WEIGHT * volume, LINEAR_LAPLACIAN)


def _data_terms(pair: Pair, state: State, compared: Comparison, noise: float, limit: float) -> DataTerms:
    h, h1 = (float(grid.voxel_sizes[2]) for grid in (pair.grid, pair.second))
    (s0, s1), gain = pair.scales, float(np.exp(state.gain))
    (v0, v1), (j0, j1) = compared.values, compared.jacobians
    by_field = s0 / h * compared.slope * j0 - gain * s1 / h1 * compared.gradient[2] * j1
    along, across = _jacobian_terms(pair, state, v1)
    by_slope = s0 / h * v0 + along
    z = compared.residual / limit
    weight = compared.inside / (noise**2 * (1 + z * z))
    columns = _pose_derivatives(pair, state, compared)

    def transposed(values: torch.Tensor) -> torch.Tensor:
        return by_field * values + central_difference_transpose(by_slope * values) + spread_across(across, values)

    weighted_columns = weight * columns
    count, weighted = len(columns), weight * compared.residual
    pose = columns.reshape(count, -1) @ weighted_columns.reshape(count, -1).T
    pose_gradient = columns.reshape(count, -1) @ weighted.reshape(-1)
    coupling = torch.stack([transposed(c) for c in weighted_columns])
    field_gradient = transposed(weighted)
    return DataTerms(by_field, by_slope, weight, coupling, pose, field_gradient, pose_gradient, across=across)


def _jacobian_terms(pair: Pair, state: State, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Derivatives of the residual by differences of f, through J1: along the last axis, and across it (2, a, b, y)."""
    scaled = -float(np.exp(state.gain)) * pair.scales[1] * value
    cosine = float(pair.grid.directions[:, 2] @ pair.second.directions[:, 2])
    if cosine > np.cos(PARALLEL):  # what the rotation of the head adds is of second order
        return scaled / float(pair.grid.voxel_sizes[2]), None
    d = jacobian_direction(pair.grid, pair.second, state.pose)
    return float(d[2]) * scaled, torch.stack([float(d[0]) * scaled, float(d[1]) * scaled])


def _pose_derivatives(pair: Pair, state: State, compared: Comparison) -> torch.Tensor:
    """Derivatives of the residual with respect to the pose parameters of `gauss_newton_equations`, (6, a, b, y)."""
    value, modulation = compared.values[1], -float(np.exp(state.gain)) * compared.jacobians[1]
    rigid = pose_derivatives(modulation * compared.gradient, pair.grid, pair.second, state.pose, pair.centre)
    return torch.cat([rigid, (modulation * value)[None]])
