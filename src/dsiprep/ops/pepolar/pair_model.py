"""The model of a blip-up/blip-down pair: how images, field, head pose and gain fit, and the equations of the next step.

Point x of the undistorted head is found in blip 0 at x + (s_0 f(x) + g(x)) e, in blip 1 at P x + (s_1 f(x) + g(x)) e:
f the field in mm, e the phase-encoding axis, P the pose of the head in blip 1, and g what both displacements share, 0
where no structural image tells. Intensities are multiplied by the Jacobian determinants of these maps. All arrays have
the phase-encoding axis last, (a, b, y).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.image.affine import point_displacement, rigid_matrix
from dsiprep.ops.image.filters import gaussian
from dsiprep.ops.image.interpolation import spline_coefficients
from dsiprep.ops.pepolar.normal_equations import NormalEquations, percentile_99
from dsiprep.ops.pepolar.pose_derivatives import across_axis, rigid_columns
from dsiprep.ops.pepolar.regularisation import BARRIER, add_penalties, along, barrier, laplacian, transposed_along
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines, sample_solid

__all__ = [
    "Comparison",
    "Contrast",
    "Images",
    "Pair",
    "State",
    "change",
    "compare",
    "cost",
    "equations",
    "folded",
    "make_pair",
    "moved",
    "outliers",
]

WEAK = 0.02  # weight of the squared gradient of the field in mm, per mm³
STIFF = 200.0  # of its squared Laplacian, per mm³, in mm²
KINK = 0.004  # Laplacians beyond this (1/mm) cost in proportion only: sources of the field are rare and strong
OUTLIER = 3.0  # residuals beyond this many standard deviations count less and less
MISFIT = 0.02  # images never agree better than this share of the brain's intensity
NOISE_WINDOW = 1.5  # voxels
UNSEEN = 2**0.5  # by how much further contrasts disagree more than by noise: they are means of volumes that moved

Images = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Contrast:
    """Another image of both blips on the grid of their b=0 images, distorted and scaled as those are.

    Attributes
    ----------
    lines, solid, noise
        As in `Pair`.
    """

    lines: torch.Tensor
    solid: torch.Tensor
    noise: float


@dataclass(frozen=True, eq=False)
class Pair:
    """Two b=0 images at one voxel size, in units of the brain's median.

    Attributes
    ----------
    lines : Tensor, (a, b, y)
        Blip 0, spline coefficients along the last axis.
    solid : Tensor, (a, b, y)
        Blip 1, spline coefficients along all axes.
    inner : Tensor, (a, b, y), bool
        Brain, roughly.
    grid : Grid
        Phase-encoding axis last.
    scales : (float, float)
        s_0 and s_1, of opposite signs.
    centre : ndarray, (3,)
        Point that the head turns about, world RAS+ mm.
    noise : float
        Standard deviation of the difference of both images where they fit.
    contrasts : tuple of Contrast
        What is compared beside the b=0 images.
    """

    lines: torch.Tensor
    solid: torch.Tensor
    inner: torch.Tensor
    grid: Grid
    scales: tuple[float, float]
    centre: np.ndarray
    noise: float
    contrasts: tuple[Contrast, ...] = ()

    @property
    def steepness(self) -> float:
        """Displacement in voxels per mm of field, in the blip that is distorted more."""
        return max(abs(s) for s in self.scales) / float(self.grid.voxel_sizes[2])


@dataclass(frozen=True, eq=False)
class State:
    """What is estimated.

    Attributes
    ----------
    field : Tensor, (a, b, y)
        f, mm.
    pose : ndarray, (4, 4)
        P, world RAS+ mm.
    gain : float
        Logarithm of the factor that brings blip 1 to the intensities of blip 0.
    shared : Tensor, (a, b, y), or None
        g, mm.
    """

    field: torch.Tensor
    pose: np.ndarray
    gain: float
    shared: torch.Tensor | None = None

    def displacements(self, scales: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both blips along the phase-encoding axis, (a, b, y), mm."""
        both = (scales[0] * self.field, scales[1] * self.field)
        return both if self.shared is None else (both[0] + self.shared, both[1] + self.shared)


@dataclass(frozen=True, eq=False)
class Comparison:
    """Both images at the points of the undistorted head.

    Attributes
    ----------
    values, jacobians : two Tensor, (a, b, y)
        Intensities as read, and what they are multiplied by.
    slope : Tensor, (a, b, y)
        Of blip 0 along the last axis, per voxel.
    gradient : Tensor, (3, a, b, y)
        Of blip 1, per voxel.
    inside : Tensor, (a, b, y)
        1 where both points are within the grid.
    residual : Tensor, (a, b, y)
        Modulated blip 0 less modulated blip 1, gain applied.
    contrasts : tuple of Comparison
        The same of each further contrast.
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
    inner: torch.Tensor,
    grid: Grid,
    scales: tuple[float, float],
    centre: np.ndarray,
    contrasts: Sequence[Images] = (),
) -> Pair:
    """A `Pair` of images (a, b, y); `inner` (a, b, y) may be empty, and then stands for everything.

    `contrasts` are further images of blip 0 and blip 1, in the same units.
    """
    inner = inner if bool(inner.any()) else torch.ones_like(inner)
    more = tuple(Contrast(*_coefficients(both), UNSEEN * _noise(both, inner)) for both in contrasts)
    return Pair(*_coefficients(images), inner, grid, scales, centre, _noise(images, inner), more)


def _coefficients(images: Images) -> Images:
    """Splines along lines of blip 0, and along all axes of blip 1."""
    return line_coefficients(images[0]), spline_coefficients(images[1][None])[0]


def _noise(images: Images, inner: torch.Tensor) -> float:
    """Standard deviation of the difference of both images where nothing but noise tells them apart.

    Differences along all three axes at once leave little of the anatomy, and the smoothest tenth of the brain less.
    """
    total = MISFIT**2
    for image in images:
        rough, where = image, inner
        for axis in range(3):
            if image.shape[axis] > 1:
                rough = torch.diff(rough, dim=axis) / 2**0.5
                where = where.narrow(axis, 1, image.shape[axis] - 1)
        local = gaussian((rough * rough)[None].contiguous(), NOISE_WINDOW)[0][where]
        if local.numel():
            total += float(local.kthvalue(int(0.1 * local.numel()) + 1).values)
    return float(total**0.5)


def compare(pair: Pair, state: State) -> Comparison:
    """Both images at the points of the undistorted head, and how they differ."""
    affine, h = pair.grid.affine, float(pair.grid.voxel_sizes[2])
    u0, u1 = state.displacements(pair.scales)
    matrix = np.linalg.inv(affine) @ state.pose @ affine
    j0 = 1 + along(u0, 2) / h
    # det(R + s e grad(f)') = 1 + s grad(f)' R' e
    turned = np.linalg.inv(affine[:3, :3]) @ state.pose[:3, :3].T @ pair.grid.directions[:, 2]
    j1 = torch.ones_like(j0)
    for axis in range(3):
        j1 += float(turned[axis]) * along(u1, axis)

    def read(images: Pair | Contrast) -> Comparison:
        v0, slope, in0 = sample_lines(images.lines, u0 / h)
        v1, gradient, in1 = sample_solid(images.solid, matrix, u1 / h)
        residual = v0 * j0 - float(np.exp(state.gain)) * v1 * j1
        return Comparison((v0, v1), (j0, j1), slope, gradient, in0 * in1, residual)

    return replace(read(pair), contrasts=tuple(read(contrast) for contrast in pair.contrasts))


def outliers(pair: Pair, compared: Comparison) -> tuple[float, ...]:
    """Where residuals of b=0 and of each contrast begin to count less: further out while images are still apart."""
    return tuple(_outlier(pair.inner, part, noise) for part, noise in _parts(pair, compared))


def _outlier(inner: torch.Tensor, compared: Comparison, noise: float) -> float:
    inside = compared.residual[inner & (compared.inside > 0)]
    spread = float(1.4826 * inside.abs().median()) if inside.numel() else 0.0
    return OUTLIER * max(spread, noise)


def _parts(pair: Pair, compared: Comparison) -> list[tuple[Comparison, float]]:
    """What is compared, and its noise: b=0, then each contrast."""
    return list(zip((compared, *compared.contrasts), (pair.noise, *(c.noise for c in pair.contrasts)), strict=True))


def _stiffness(pair: Pair) -> tuple[float, float]:
    volume = float(np.prod(pair.grid.voxel_sizes))
    return WEAK * volume, STIFF * volume


def folded(pair: Pair, state: State, compared: Comparison) -> bool:
    """Whether the field folds either image, or all but does."""
    shared = state.shared is not None  # the barrier does not know of it
    jacobians = compared.jacobians[0 if shared else 1 :]
    return not bool(torch.isfinite(barrier(state.field, pair.steepness)[0])) or not all(
        bool((j > 0).all()) for j in jacobians
    )


def cost(pair: Pair, state: State, compared: Comparison, limits: tuple[float, ...]) -> float:
    """What is minimised: misfit, roughness of the field and barrier; infinite where the field folds.

    The misfit is Cauchy's, limit²/2 log(1 + r²/limit²) in units of the noise, limits as from `outliers`; the roughness
    is squared up to `KINK` and proportional beyond.
    """
    if folded(pair, state, compared):
        return float("inf")
    wall = barrier(state.field, pair.steepness)[0]
    misfit = sum(
        0.5 * (limit / noise) ** 2 * (part.inside * torch.log1p((part.residual / limit) ** 2)).sum()
        for (part, noise), limit in zip(_parts(pair, compared), limits, strict=True)
    )
    weak, stiff = _stiffness(pair)
    bend = laplacian(state.field, pair.grid.voxel_sizes)
    rough = stiff * KINK**2 * (torch.sqrt(1 + (bend / KINK) ** 2) - 1).sum()
    return float(misfit + rough - 0.5 * weak * (bend * state.field).sum() + BARRIER * wall)


def equations(
    pair: Pair, state: State, compared: Comparison, limits: tuple[float, ...]
) -> tuple[NormalEquations, tuple[torch.Tensor, torch.Tensor]]:
    """Gauss-Newton equations of the next step: the matrix, and minus the gradient of `cost`.

    Pose parameters are a rotation vector (radians, about the moved centre), two translations across the
    phase-encoding axis (mm) and the logarithm of the gain, (6,).
    """
    parts = zip(_parts(pair, compared), limits, strict=True)
    terms = _together([_terms(pair, state, part, noise, limit) for (part, noise), limit in parts])
    force, pose = terms.force, terms.pose
    pose += torch.diag(torch.tensor([100.0, 100.0, 100.0, 0.01, 0.01, 1.0], device=pose.device))
    sizes, (weak, stiff) = pair.grid.voxel_sizes, _stiffness(pair)
    curvature, bent = add_penalties(force, state.field, sizes, pair.steepness, (weak, stiff, KINK))
    data = (terms.level, terms.tilt, terms.weight)
    normal = NormalEquations(*data, curvature, terms.coupling, pose, sizes, (weak, bent), terms.diagonal)
    return normal, (-force, -terms.push)


@dataclass(frozen=True, eq=False)
class _Terms:
    """What residuals add to `equations`: to the matrix as in `NormalEquations`, and to the gradients by field and pose."""

    level: torch.Tensor
    tilt: torch.Tensor
    weight: torch.Tensor
    coupling: torch.Tensor
    pose: torch.Tensor
    force: torch.Tensor
    push: torch.Tensor
    diagonal: torch.Tensor | None = None


def _terms(pair: Pair, state: State, compared: Comparison, noise: float, limit: float) -> _Terms:
    h, (s0, s1), gain = float(pair.grid.voxel_sizes[2]), pair.scales, float(np.exp(state.gain))
    (v0, v1), (j0, j1) = compared.values, compared.jacobians
    level = s0 / h * compared.slope * j0 - gain * s1 / h * compared.gradient[2] * j1
    tilt = s0 / h * v0 - gain * s1 / h * v1
    z = compared.residual / limit
    weight = compared.inside / (noise**2 * (1 + z * z))
    columns = _pose_columns(pair, state, compared)
    spread = weight * columns
    coupling = torch.stack([level * c + transposed_along(tilt * c) for c in spread])
    count = len(columns)
    pose = columns.reshape(count, -1) @ spread.reshape(count, -1).T
    weighted = weight * compared.residual
    force = level * weighted + transposed_along(tilt * weighted)
    return _Terms(level, tilt, weight, coupling, pose, force, columns.reshape(count, -1) @ weighted.reshape(-1))


def _together(terms: list[_Terms]) -> _Terms:
    """All residuals as one, exactly: squares of level + tilt D add up to one such square and a diagonal."""
    if len(terms) == 1:
        return terms[0]
    squares = _total(t.weight * t.level**2 for t in terms)
    mixed = _total(t.weight * t.level * t.tilt for t in terms)
    weight = _total(t.weight * t.tilt**2 for t in terms)
    level = torch.where(weight > 1e-12, mixed / weight.clamp(min=1e-12), 0.0)
    return _Terms(
        level,
        (weight > 1e-12).float(),
        weight,
        _total(t.coupling for t in terms),
        _total(t.pose for t in terms),
        _total(t.force for t in terms),
        _total(t.push for t in terms),
        (squares - weight * level**2).clamp(min=0),
    )


def _total(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, tensors)


def _pose_columns(pair: Pair, state: State, compared: Comparison) -> torch.Tensor:
    """Derivatives of the residual by the pose parameters of `equations`, (6, a, b, y)."""
    affine, gain = pair.grid.affine, float(np.exp(state.gain))
    value, jacobian = compared.values[1], compared.jacobians[1]
    turn = torch.as_tensor(np.linalg.inv(affine[:3, :3]).T, dtype=torch.float32, device=value.device)
    world = -gain * jacobian * torch.einsum("ab,bijk->aijk", turn, compared.gradient)
    arms = state.pose @ affine
    arms[:3, 3] -= (state.pose @ np.append(pair.centre, 1))[:3]
    return torch.cat([rigid_columns(world, arms, pair.grid), (-gain * value * jacobian)[None]])


def moved(pair: Pair, state: State, field: torch.Tensor, pose: np.ndarray) -> State:
    """The state after a step: `field` (a, b, y) in mm, `pose` (6,) as in `equations`."""
    centre = (state.pose @ np.append(pair.centre, 1))[:3]
    parameters = np.concatenate([pose[:3], across_axis(pair.grid) @ pose[3:5]])
    gain = float(np.clip(state.gain + pose[5], -3, 3))
    return State(state.field + field, rigid_matrix(parameters, centre) @ state.pose, gain)


def change(pair: Pair, before: State, after: State) -> float:
    """How far nearly all of the brain moved between two states, mm."""
    most = percentile_99((after.field - before.field).abs()[pair.inner])
    arms = pair.centre + 60.0 * np.concatenate([np.eye(3), -np.eye(3)])
    return max(most, float(point_displacement(before.pose[None], after.pose[None], arms).max()))
