"""Rigid or affine alignment of many volumes, each to a target of its own contrast, by Gauss-Newton steps.

Inverse compositional: gradients are those of the fixed targets, so each step samples every volume once and computes
no image gradients. Residuals follow a Student t distribution whose scale is re-estimated at every step, which
down-weights voxels and slices that the target does not explain, and each volume has its own gain. Volumes may
additionally be displaced by eddy currents. On the CPU, fused Numba loops sample the volumes and sum the normal
equations without temporaries; on other devices tensor operations compute the same sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import expm

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.eddy_displacement import EddyDisplacement, displace_points, eddy_on_grid
from dsiprep.ops.image.point_set import PointSet, target_gradients
from dsiprep.ops.motion.gauss_newton_kernels import STUDENT_DOF, equations_loop, sample_loop
from dsiprep.ops.motion.pose_prior import PosePrior, add_pose_prior, rms_extent

__all__ = [
    "Aligned",
    "Fit",
    "MovingVolumes",
    "Targets",
    "align",
    "apply_steps",
    "make_targets",
    "normal_equations",
    "sample_volumes",
    "unknown_fit",
]

CONVERGED_MM = 0.02  # root mean square displacement of the points by a step below which a volume has converged
MAX_STEP_MM = 10.0  # longer steps are shortened to this


@dataclass(frozen=True, eq=False)
class MovingVolumes:
    """Volumes to be aligned or sampled.

    Attributes
    ----------
    data : Tensor, (n, i, j, k), float32
    grid : Grid
    eddy : EddyCurrents or None
        Eddy-current displacement of these volumes, held fixed.
    """

    data: torch.Tensor
    grid: Grid
    eddy: EddyCurrents | None = None

    def __len__(self) -> int:
        return len(self.data)

    def take(self, index: np.ndarray) -> MovingVolumes:
        """The volumes at an index array."""
        return MovingVolumes(_take(self.data, index), self.grid, None if self.eddy is None else self.eddy.take(index))


@dataclass(frozen=True, eq=False)
class Targets:
    """The fixed image of each volume, at the points of the reference.

    Attributes
    ----------
    points : PointSet
    values : Tensor, (n, m)
    gradients : Tensor, (n, m, 3)
        Per mm along world RAS+.
    """

    points: PointSet
    values: torch.Tensor
    gradients: torch.Tensor

    def take(self, index: np.ndarray) -> Targets:
        """The targets at an index array."""
        return Targets(self.points, _take(self.values, index), _take(self.gradients, index))


@dataclass(frozen=True, eq=False)
class Fit:
    """How n volumes differ from their targets, besides their poses.

    Attributes
    ----------
    gain : ndarray, (n,)
        Intensity of the volume over that of its target.
    scale : ndarray, (n,)
        Of the residual (Student t), in the unit of the volumes; infinite if not known.
    """

    gain: np.ndarray
    scale: np.ndarray

    def take(self, index: np.ndarray | slice) -> Fit:
        """The fits of some volumes."""
        return Fit(self.gain[index], self.scale[index])


def unknown_fit(count: int) -> Fit:
    """Gain 1 and no scale, so that all points have equal weights."""
    return Fit(np.ones(count), np.full(count, np.inf))


@dataclass(frozen=True, eq=False)
class Aligned:
    """Result of `align`.

    Attributes
    ----------
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, world RAS+ mm.
    fit : Fit
    """

    transforms: np.ndarray
    fit: Fit


def make_targets(values: torch.Tensor, points: PointSet) -> Targets:
    """Targets from values (n, m) at the points, with their gradients."""
    return Targets(points, values, target_gradients(values, points))


def sample_volumes(moving: MovingVolumes, points: PointSet, transforms: np.ndarray, fill: torch.Tensor) -> torch.Tensor:
    """Sample each volume at the transformed points, (n, m); `fill` (n, m) where that is outside the volume.

    With eddy currents, values are those at the displaced points times the Jacobian determinant of the displacement.
    """
    maps, displacement = voxel_maps(moving.grid, points, transforms), eddy_on_grid(moving.eddy, moving.grid)
    if moving.data.device.type == "cpu":
        out = fill.detach().numpy().copy()
        sample_loop(
            moving.data.detach().numpy(),
            points.voxels,
            maps,
            displacement.coefficients,
            displacement.frame,
            displacement.along,
            out,
        )
        return torch.from_numpy(out)
    values, inside = _sample_torch(moving.data, points, maps, displacement)
    return torch.where(inside, values, fill)


def normal_equations(
    moving: MovingVolumes,
    targets: Targets,
    transforms: np.ndarray,
    gain: np.ndarray,
    scale: np.ndarray,
    affine: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted sums of one Gauss-Newton step for each volume.

    Parameters
    ----------
    moving : MovingVolumes
    targets : Targets
        Of the same volumes.
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of the volume, RAS+ mm.
    gain, scale : ndarray, (n,)
        Residual = volume - gain * target; its weight is (nu + 1) / (nu + (residual / scale)²). An infinite scale
        gives all voxels the same weight.
    affine : bool
        12 parameters instead of 6.

    Returns
    -------
    hessian : ndarray, (n, p + 1, p + 1)
        J' W J with J = d(gain * target) / d(parameters, gain): rotation vector and translation, or matrix
        (row-major) and translation, about the centre of the points.
    slope : ndarray, (n, p + 1)
        J' W residual.
    sums : ndarray, (n, 3)
        Sum of weight x residual², sum of weights, number of points inside the volume.
    """
    points = targets.points
    maps, displacement = voxel_maps(moving.grid, points, transforms), eddy_on_grid(moving.eddy, moving.grid)
    if moving.data.device.type != "cpu":
        return _equations_torch(moving.data, targets, maps, displacement, gain, scale, affine)
    hessian, slope, sums = equations_loop(
        moving.data.detach().numpy(),
        points.voxels,
        points.world,
        maps,
        targets.values.detach().numpy(),
        targets.gradients.detach().numpy(),
        gain.astype(np.float64),
        scale.astype(np.float64),
        affine,
        displacement.coefficients,
        displacement.frame,
        displacement.along,
    )
    return hessian + np.swapaxes(np.tril(hessian, -1), 1, 2), slope, sums


def align(
    moving: MovingVolumes,
    points: PointSet,
    targets: torch.Tensor,
    starts: np.ndarray,
    affine: bool = False,
    steps: int = 10,
    prior: PosePrior | None = None,
    fit: Fit | None = None,
) -> Aligned:
    """Align each volume to its target.

    Parameters
    ----------
    moving : MovingVolumes
    points : PointSet
        Of the targets.
    targets : Tensor, (n, m)
        One target per volume, at the points.
    starts : ndarray, (n, 4, 4)
        Initial transforms: points of the reference to points of each volume, RAS+ mm.
    affine : bool
        12 degrees of freedom instead of 6.
    steps : int
        Maximum number of Gauss-Newton steps; a volume has converged when a step moves its points by no more than
        0.02 mm (root mean square).
    prior : PosePrior, optional
        Prior on the poses; none by default.
    fit : Fit, optional
        Of an earlier alignment at similar poses, to start from. Where the scale is not known, the first step weighs
        all points equally to find it, and at least three steps are made.

    References
    ----------
    Baker & Matthews 2004, doi 10.1023/B:VISI.0000011205.11775.fd.
    """
    count = len(moving)
    transforms = np.array(starts, float)
    fixed = make_targets(targets, points)
    fit = fit or unknown_fit(count)
    gain, scale = fit.gain.copy(), fit.scale.copy()
    least = np.where(np.isfinite(scale), 1, 3)  # steps: the first without a scale has equal weights and no prior
    active = np.arange(count)
    for step in range(1, steps + 1):
        hessian, slope, sums = normal_equations(
            moving.take(active), fixed.take(active), transforms[active], gain[active], scale[active], affine
        )
        weighted = np.isfinite(scale[active])
        scale[active] = np.sqrt(sums[:, 0] / np.maximum(sums[:, 2], 1)) + 1e-12
        if prior is not None:
            add_pose_prior(
                hessian, slope, transforms[active], prior.take(active), points, weighted * scale[active], affine
            )
        delta = _solve(hessian, slope)
        gain[active] += delta[:, -1]
        transforms[active], size = apply_steps(transforms[active], delta[:, :-1], points)
        active = active[(size > CONVERGED_MM) | (step < least[active])]
        if not len(active):
            break
    return Aligned(transforms, Fit(gain, scale))


def apply_steps(transforms: np.ndarray, delta: np.ndarray, points: PointSet) -> tuple[np.ndarray, np.ndarray]:
    """Apply Gauss-Newton steps (n, 6 or 12) to transforms (n, 4, 4).

    Also returns the root mean square displacement (mm) of the points by each step before it is shortened to at most
    10 mm, (n,).
    """
    increments, size = _increments(delta, points.centre, rms_extent(points))
    return transforms @ np.linalg.inv(increments), size


def _take(tensor: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    """Rows of a tensor; the tensor itself, not a copy, if `index` selects all of them in order."""
    if len(index) == len(tensor):
        return tensor
    return tensor[torch.as_tensor(index, device=tensor.device)]


def _solve(hessian: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Solve for the steps, with a ridge for directions along which the target has no gradient."""
    diagonal = np.einsum("nii->ni", hessian)
    ridge = 1e-6 * diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-30
    return np.linalg.solve(hessian + ridge[:, :, None] * np.eye(hessian.shape[1]), slope[..., None])[..., 0]


def _increments(delta: np.ndarray, centre: np.ndarray, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World matrices of parameter steps about `centre`, and the displacement (mm) of points of that rms extent."""
    generator = np.zeros((len(delta), 4, 4))
    if delta.shape[1] == 6:
        rx, ry, rz = delta[:, :3].T
        generator[:, 0, 1], generator[:, 0, 2] = -rz, ry
        generator[:, 1, 0], generator[:, 1, 2] = rz, -rx
        generator[:, 2, 0], generator[:, 2, 1] = -ry, rx
        generator[:, :3, 3] = delta[:, 3:]
    else:
        generator[:, :3, :3] = delta[:, :9].reshape(-1, 3, 3)
        generator[:, :3, 3] = delta[:, 9:]
    size = np.sqrt(((generator[:, :3, :3] * extent) ** 2).sum((1, 2)) + (generator[:, :3, 3] ** 2).sum(1))
    limit = np.minimum(1, MAX_STEP_MM / np.maximum(size, 1e-9))
    to_centre, from_centre = np.eye(4), np.eye(4)
    to_centre[:3, 3], from_centre[:3, 3] = -centre, centre
    return from_centre @ expm(generator * limit[:, None, None]) @ to_centre, size


def voxel_maps(grid: Grid, points: PointSet, transforms: np.ndarray) -> np.ndarray:
    """Affine maps from voxels of the reference to voxels of each volume, (n, 3, 4)."""
    return (np.linalg.inv(grid.affine) @ transforms @ points.grid.affine)[:, :3].astype(np.float32)


def _sample_torch(
    volumes: torch.Tensor, points: PointSet, maps: np.ndarray, displacement: EddyDisplacement
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of `sample_loop` by tensor operations, (n, m), and whether each point is inside the volume."""
    device = volumes.device
    voxels = torch.as_tensor(points.voxels, device=device)
    affine = torch.as_tensor(maps, device=device)
    at = torch.einsum("nab,mb->nam", affine[:, :, :3], voxels) + affine[:, :, 3:]
    jacobian: torch.Tensor | float = 1.0
    if len(displacement.coefficients):
        jacobian = displace_points(displacement, at)
    size = torch.tensor(volumes.shape[1:], device=device)[None, :, None]
    inside = ((at >= 0) & (at <= size - 1)).all(1)
    base = torch.minimum(torch.nan_to_num(at).clamp(min=0).floor(), size - 2)
    fraction = at - base
    base = base.long()
    flat = volumes.reshape(len(volumes), -1)
    out = torch.zeros_like(at[:, 0])
    for i in (0, 1):
        for j in (0, 1):
            for k in (0, 1):
                index = ((base[:, 0] + i) * size[0, 1] + base[:, 1] + j) * size[0, 2] + base[:, 2] + k
                weight = (fraction if i else 1 - fraction)[:, 0] * (fraction if j else 1 - fraction)[:, 1]
                out += weight * (fraction if k else 1 - fraction)[:, 2] * torch.gather(flat, 1, index)
    return out * jacobian, inside


def _equations_torch(
    volumes: torch.Tensor,
    targets: Targets,
    maps: np.ndarray,
    displacement: EddyDisplacement,
    gain: np.ndarray,
    scale: np.ndarray,
    affine: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of `equations_loop` by tensor operations."""
    device, points = volumes.device, targets.points
    values, inside = _sample_torch(volumes, points, maps, displacement)
    gains = torch.as_tensor(gain, dtype=torch.float32, device=device)[:, None]
    inverse = torch.as_tensor(1 / scale**2, dtype=torch.float32, device=device)[:, None]
    residual = values - gains * targets.values
    weight = (STUDENT_DOF + 1) / (STUDENT_DOF + residual**2 * inverse) * inside
    world = torch.as_tensor(points.world, device=device).expand(len(volumes), -1, 3)
    shifts = gains[..., None] * targets.gradients
    linear = (shifts[..., :, None] * world[..., None, :]).flatten(2) if affine else torch.linalg.cross(world, shifts)
    rows = torch.cat([linear, shifts, targets.values[..., None]], dim=2)
    weighted = rows * weight[..., None]
    hessian = torch.bmm(weighted.transpose(1, 2), rows)
    slope = torch.bmm(weighted.transpose(1, 2), residual[..., None])[..., 0]
    sums = torch.stack([(weight * residual**2).sum(1), weight.sum(1), inside.sum(1)], dim=1)
    return tuple(x.cpu().numpy().astype(np.float64) for x in (hessian, slope, sums))  # type: ignore[return-value]
