"""Rigid or affine alignment of many volumes, each to a target of its own contrast, by Gauss-Newton steps.

Inverse compositional: the gradient is that of the fixed target, so a step reads each volume once and nothing else.
Residuals follow a Student t distribution whose scale is estimated on the way, so that voxels and slices that the
target does not explain count for little; each volume has its own gain. Volumes may be bent by eddy currents besides.
On the CPU a fused Numba loop sums residuals and normal equations without temporaries; on other devices the same sums
are taken with tensor operations.
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
from dsiprep.ops.motion.gauss_newton_kernels import FREEDOM, equations_loop, read_loop
from dsiprep.ops.motion.pose_prior import PosePrior, _spread, add_pose_prior

__all__ = ["Aligned", "align", "moved_by", "normal_equations", "sample_volumes"]

DONE = 0.005  # mm that a last step moves points, root mean square


@dataclass(frozen=True, eq=False)
class Aligned:
    """Where the volumes are.

    Attributes
    ----------
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, world RAS+ mm.
    gain : ndarray, (n,)
        Intensity of the volume over that of its target.
    rms : ndarray, (n,)
        Scale of the residual (Student t), in the unit of the volumes: the smaller, the better the fit.
    """

    transforms: np.ndarray
    gain: np.ndarray
    rms: np.ndarray


def sample_volumes(
    volumes: torch.Tensor,
    grid: Grid,
    points: PointSet,
    transforms: np.ndarray,
    fill: torch.Tensor,
    eddy: EddyCurrents | None = None,
) -> torch.Tensor:
    """Each volume at the transformed points, (n, m); where that is outside the volume, `fill` (n, m).

    With `eddy`, at the displaced points, times the Jacobian of the displacement.
    """
    maps, bend = _voxel_maps(grid, points, transforms), eddy_on_grid(eddy, grid)
    if volumes.device.type == "cpu":
        out = fill.detach().numpy().copy()
        read_loop(volumes.detach().numpy(), points.voxels, maps, bend.voxels, bend.frame, bend.along, out)
        return torch.from_numpy(out)
    values, inside = _gather(volumes, points, maps, bend)
    return torch.where(inside, values, fill)


def normal_equations(
    volumes: torch.Tensor,
    grid: Grid,
    points: PointSet,
    transforms: np.ndarray,
    targets: torch.Tensor,
    gradients: torch.Tensor,
    gain: np.ndarray,
    scale: np.ndarray,
    affine: bool = False,
    eddy: EddyCurrents | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted sums of one Gauss-Newton step for each volume.

    Parameters
    ----------
    volumes : Tensor, (n, i, j, k), float32
        Sampled on `grid`.
    transforms : ndarray, (n, 4, 4)
        Points of the reference to points of the volume, RAS+ mm.
    targets, gradients : Tensor, (n, m) and (n, m, 3)
        From `target_gradients`, in the order of `points`.
    gain, scale : ndarray, (n,)
        Residual = volume - gain * target; its weight is (nu + 1) / (nu + (residual / scale)²). A scale of
        infinity weighs all voxels alike.
    affine : bool
        12 parameters instead of 6.
    eddy : EddyCurrents, optional
        Of these volumes.

    Returns
    -------
    hessian : ndarray, (n, p + 1, p + 1)
        J' W J with J = d(gain * target) / d(parameters, gain): rotation vector and translation, or the
        matrix (row-major) and translation, about the centre of the points.
    slope : ndarray, (n, p + 1)
        J' W residual.
    sums : ndarray, (n, 3)
        Sum of weight x residual², sum of weights, number of points inside the volume.
    """
    maps, bend = _voxel_maps(grid, points, transforms), eddy_on_grid(eddy, grid)
    if volumes.device.type != "cpu":
        return _equations_torch(volumes, points, maps, targets, gradients, gain, scale, affine, bend)
    hessian, slope, sums = equations_loop(
        volumes.detach().numpy(),
        points.voxels,
        points.world,
        maps,
        targets.detach().numpy(),
        gradients.detach().numpy(),
        gain.astype(np.float64),
        scale.astype(np.float64),
        affine,
        bend.voxels,
        bend.frame,
        bend.along,
    )
    return hessian + np.swapaxes(np.tril(hessian, -1), 1, 2), slope, sums


def align(
    volumes: torch.Tensor,
    grid: Grid,
    points: PointSet,
    targets: torch.Tensor,
    starts: np.ndarray,
    affine: bool = False,
    steps: int = 10,
    prior: PosePrior | None = None,
    eddy: EddyCurrents | None = None,
) -> Aligned:
    """Move each volume until it fits its target.

    Parameters
    ----------
    volumes : Tensor, (n, i, j, k), float32
    grid : Grid
        Of the volumes.
    points : PointSet
        Of the targets.
    targets : Tensor, (n, m)
    starts : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    affine : bool
        12 degrees of freedom instead of 6.
    steps : int
        Upper bound on Gauss-Newton steps; a volume is done before when a step moves its points by less than
        0.005 mm (root mean square).
    prior : PosePrior, optional
        Where the volumes are expected; nowhere in particular by default.
    eddy : EddyCurrents, optional
        Of these volumes; left as they are.

    References
    ----------
    Baker & Matthews 2004, doi 10.1023/B:VISI.0000011205.11775.fd.
    """
    count = len(volumes)
    transforms = np.array(starts, float)
    gradients = target_gradients(targets, points)
    gain, scale = np.ones(count), np.full(count, np.inf)
    active = np.arange(count)
    for step in range(steps):
        some = torch.as_tensor(active, device=volumes.device)
        hessian, slope, sums = normal_equations(
            _take(volumes, some),
            grid,
            points,
            transforms[active],
            _take(targets, some),
            _take(gradients, some),
            gain[active],
            scale[active],
            affine,
            None if eddy is None else eddy.take(active),
        )
        scale[active] = np.sqrt(sums[:, 0] / np.maximum(sums[:, 2], 1)) + 1e-12
        if prior is not None and step > 0:
            here = PosePrior(prior.poses[active], prior.jitter)
            add_pose_prior(hessian, slope, transforms[active], here, points, scale[active], affine)
        delta = _solve(hessian, slope)
        gain[active] += delta[:, -1]
        transforms[active], size = moved_by(transforms[active], delta[:, :-1], points)
        active = active[(size > DONE) | (step < 2)]
        if not len(active):
            break
    return Aligned(transforms, gain, scale)


def moved_by(transforms: np.ndarray, delta: np.ndarray, points: PointSet) -> tuple[np.ndarray, np.ndarray]:
    """Transforms (n, 4, 4) after a Gauss-Newton step (n, 6 or 12), and how far it moves the points (mm rms), (n,)."""
    move, size = _increments(delta, points.centre, _spread(points))
    return transforms @ np.linalg.inv(move), size


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return tensor if len(index) == len(tensor) else tensor[index]


def _solve(hessian: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Steps, with a ridge where the target has no gradient along some direction."""
    diagonal = np.einsum("nii->ni", hessian)
    ridge = 1e-6 * diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-30
    return np.linalg.solve(hessian + ridge[:, :, None] * np.eye(hessian.shape[1]), slope[..., None])[..., 0]


def _increments(delta: np.ndarray, centre: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World matrices of parameter steps about `centre`, and how far (mm) they move points of that spread."""
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
    size = np.sqrt(((generator[:, :3, :3] * spread) ** 2).sum((1, 2)) + (generator[:, :3, 3] ** 2).sum(1))
    limit = np.minimum(1, 10 / np.maximum(size, 1e-9))  # a step of more than 10 mm is not to be believed
    to_centre, back = np.eye(4), np.eye(4)
    to_centre[:3, 3], back[:3, 3] = -centre, centre
    return back @ expm(generator * limit[:, None, None]) @ to_centre, size


def _voxel_maps(grid: Grid, points: PointSet, transforms: np.ndarray) -> np.ndarray:
    """Reference voxels to volume voxels, (n, 3, 4)."""
    return (np.linalg.inv(grid.affine) @ transforms @ points.grid.affine)[:, :3].astype(np.float32)


def _gather(
    volumes: torch.Tensor, points: PointSet, maps: np.ndarray, bend: EddyDisplacement
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `read_loop` reads, (n, m), and which points are inside the volume."""
    device = volumes.device
    where = torch.as_tensor(points.voxels, device=device)
    map_ = torch.as_tensor(maps, device=device)
    at = torch.einsum("nab,mb->nam", map_[:, :, :3], where) + map_[:, :, 3:]
    jacobian: torch.Tensor | float = 1.0
    if len(bend.voxels):
        jacobian = displace_points(bend, at)
    limit = torch.tensor(volumes.shape[1:], device=device)[None, :, None]
    inside = ((at >= 0) & (at <= limit - 1)).all(1)
    base = torch.minimum(torch.nan_to_num(at).clamp(min=0).floor(), limit - 2)
    part = at - base
    base = base.long()
    flat = volumes.reshape(len(volumes), -1)
    out = torch.zeros_like(at[:, 0])
    for i in (0, 1):
        for j in (0, 1):
            for k in (0, 1):
                index = ((base[:, 0] + i) * limit[0, 1] + base[:, 1] + j) * limit[0, 2] + base[:, 2] + k
                weight = (part if i else 1 - part)[:, 0] * (part if j else 1 - part)[:, 1]
                out += weight * (part if k else 1 - part)[:, 2] * torch.gather(flat, 1, index)
    return out * jacobian, inside


def _equations_torch(
    volumes: torch.Tensor,
    points: PointSet,
    maps: np.ndarray,
    targets: torch.Tensor,
    gradients: torch.Tensor,
    gain: np.ndarray,
    scale: np.ndarray,
    affine: bool,
    bend: EddyDisplacement,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums of `equations_loop` with tensor operations."""
    device = volumes.device
    values, inside = _gather(volumes, points, maps, bend)
    gains = torch.as_tensor(gain, dtype=torch.float32, device=device)[:, None]
    inverse = torch.as_tensor(1 / scale**2, dtype=torch.float32, device=device)[:, None]
    residual = values - gains * targets
    weight = (FREEDOM + 1) / (FREEDOM + residual**2 * inverse) * inside
    world = torch.as_tensor(points.world, device=device).expand(len(volumes), -1, 3)
    slopes = gains[..., None] * gradients
    moves = (slopes[..., :, None] * world[..., None, :]).flatten(2) if affine else torch.linalg.cross(world, slopes)
    rows = torch.cat([moves, slopes, targets[..., None]], dim=2)
    weighted = rows * weight[..., None]
    hessian = torch.bmm(weighted.transpose(1, 2), rows)
    slope = torch.bmm(weighted.transpose(1, 2), residual[..., None])[..., 0]
    sums = torch.stack([(weight * residual**2).sum(1), weight.sum(1), inside.sum(1)], dim=1)
    return tuple(x.cpu().numpy().astype(np.float64) for x in (hessian, slope, sums))  # type: ignore[return-value]
