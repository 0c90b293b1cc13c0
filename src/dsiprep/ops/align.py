"""Rigid or affine alignment of many volumes, each to a target of its own contrast, by Gauss-Newton steps.

Inverse compositional: the gradient is that of the fixed target, so a step reads each volume once and nothing else.
Residuals follow a Student t distribution whose scale is estimated on the way, so that voxels and slices that the
target does not explain count for little; each volume has its own gain. On the CPU a fused Numba loop sums residuals
and normal equations without temporaries; on other devices the same sums are taken with tensor operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from scipy.linalg import expm

from dsiprep.data.grid import Grid
from dsiprep.ops.affine import rigid_parameters
from dsiprep.ops.points import PointSet, target_gradients

__all__ = ["Aligned", "Rest", "align", "normal_equations", "read"]

DONE = 0.005  # mm that a last step moves points, root mean square
FREEDOM = 4.0  # degrees of freedom of the Student t distribution of residuals


@dataclass(frozen=True, eq=False)
class Rest:
    """Where volumes are expected: a pull towards `poses` that fades for volumes that are clearly elsewhere.

    The distance d of a pose from where it is expected follows a Student t distribution of scale `jitter`.

    Attributes
    ----------
    poses : ndarray, (n, 4, 4)
        Points of the reference to points of each volume, RAS+ mm.
    jitter : float
        mm, per axis, of points at the root mean square distance from the centre.
    """

    poses: np.ndarray
    jitter: float


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


def read(
    volumes: torch.Tensor, grid: Grid, points: PointSet, transforms: np.ndarray, fill: torch.Tensor
) -> torch.Tensor:
    """Each volume at the transformed points, (n, m); where that is outside the volume, `fill` (n, m)."""
    maps = _voxel_maps(grid, points, transforms)
    if volumes.device.type == "cpu":
        out = fill.detach().numpy().copy()
        _read_loop(volumes.detach().numpy(), points.voxels, maps, out)
        return torch.from_numpy(out)
    values, inside = _gather(volumes, points, maps)
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
    maps = _voxel_maps(grid, points, transforms)
    if volumes.device.type != "cpu":
        return _equations_torch(volumes, points, maps, targets, gradients, gain, scale, affine)
    hessian, slope, sums = _equations_loop(
        volumes.detach().numpy(),
        points.voxels,
        points.world,
        maps,
        targets.detach().numpy(),
        gradients.detach().numpy(),
        gain.astype(np.float64),
        scale.astype(np.float64),
        affine,
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
    rest: Rest | None = None,
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
    rest : Rest, optional
        Where the volumes are expected; nowhere in particular by default.

    References
    ----------
    Baker & Matthews 2004, doi 10.1023/B:VISI.0000011205.11775.fd.
    """
    count = len(volumes)
    transforms = np.array(starts, float)
    gradients = target_gradients(targets, points)
    gain, scale = np.ones(count), np.full(count, np.inf)
    active = np.arange(count)
    spread = np.sqrt((points.world.astype(float) ** 2).mean(axis=0))
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
        )
        scale[active] = np.sqrt(sums[:, 0] / np.maximum(sums[:, 2], 1)) + 1e-12
        if rest is not None and step > 0:
            away = _away(transforms[active], rest.poses[active], points.centre, affine)
            _pull(hessian, slope, away, rest.jitter, spread, scale[active])
        delta = _solve(hessian, slope)
        gain[active] += delta[:, -1]
        move, size = _increments(delta[:, :-1], points.centre, spread)
        transforms[active] = transforms[active] @ np.linalg.inv(move)
        active = active[(size > DONE) | (step < 2)]
        if not len(active):
            break
    return Aligned(transforms, gain, scale)


def _away(transforms: np.ndarray, poses: np.ndarray, centre: np.ndarray, affine: bool) -> np.ndarray:
    """The step that leads from each transform back to its pose, in the parameters of a step, (n, 6 or 12)."""
    difference = np.linalg.inv(poses) @ transforms
    if not affine:
        return rigid_parameters(difference, centre)
    linear = difference[:, :3, :3] - np.eye(3)
    shift = difference[:, :3, 3] + linear @ centre
    return np.concatenate([linear.reshape(-1, 9), shift], axis=1)


def _pull(
    hessian: np.ndarray,
    slope: np.ndarray,
    away: np.ndarray,
    jitter: float,
    spread: np.ndarray,
    scale: np.ndarray,
) -> None:
    """Add the expectation of rest to normal equations, in units of the residual's variance."""
    lengths = np.ones(away.shape[1])
    if away.shape[1] == 6:
        lengths[:3] = np.sqrt((spread**2).sum() - spread**2)
    else:
        lengths[:9] = np.tile(spread, 3)
    distance = ((away * lengths) ** 2).sum(axis=1) / jitter**2
    trust = (FREEDOM + 6) / (FREEDOM + distance) * scale**2
    weights = trust[:, None] * (lengths / jitter) ** 2
    index = np.arange(away.shape[1])
    hessian[:, index, index] += weights
    slope[:, :-1] += weights * away


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


@numba.njit(inline="always", fastmath=True)
def _linear(volume: np.ndarray, x: float, y: float, z: float) -> float:
    """Trilinear value at a point inside the volume."""
    ni, nj, nk = volume.shape
    i, j, k = min(int(x), ni - 2), min(int(y), nj - 2), min(int(z), nk - 2)
    fx, fy, fz = x - i, y - j, z - k
    c00 = volume[i, j, k] * (1 - fz) + volume[i, j, k + 1] * fz
    c01 = volume[i, j + 1, k] * (1 - fz) + volume[i, j + 1, k + 1] * fz
    c10 = volume[i + 1, j, k] * (1 - fz) + volume[i + 1, j, k + 1] * fz
    c11 = volume[i + 1, j + 1, k] * (1 - fz) + volume[i + 1, j + 1, k + 1] * fz
    return (c00 * (1 - fy) + c01 * fy) * (1 - fx) + (c10 * (1 - fy) + c11 * fy) * fx


@numba.njit(parallel=True, fastmath=True, cache=True)
def _read_loop(volumes: np.ndarray, voxels: np.ndarray, maps: np.ndarray, out: np.ndarray) -> None:
    n, ni, nj, nk = volumes.shape
    for v in numba.prange(n):
        a = maps[v]
        for p in range(voxels.shape[0]):
            i, j, k = voxels[p, 0], voxels[p, 1], voxels[p, 2]
            x = a[0, 0] * i + a[0, 1] * j + a[0, 2] * k + a[0, 3]
            y = a[1, 0] * i + a[1, 1] * j + a[1, 2] * k + a[1, 3]
            z = a[2, 0] * i + a[2, 1] * j + a[2, 2] * k + a[2, 3]
            if x >= 0 and y >= 0 and z >= 0 and x <= ni - 1 and y <= nj - 1 and z <= nk - 1:
                out[v, p] = _linear(volumes[v], x, y, z)


@numba.njit(parallel=True, fastmath=True, cache=True)
def _equations_loop(
    volumes: np.ndarray,
    voxels: np.ndarray,
    world: np.ndarray,
    maps: np.ndarray,
    targets: np.ndarray,
    gradients: np.ndarray,
    gain: np.ndarray,
    scale: np.ndarray,
    affine: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, ni, nj, nk = volumes.shape
    width = 13 if affine else 7
    hessian = np.zeros((n, width, width))
    slope = np.zeros((n, width))
    sums = np.zeros((n, 3))
    for v in numba.prange(n):
        a = maps[v]
        row = np.empty(width, np.float32)
        h = np.zeros((width, width), np.float64)
        s = np.zeros(width, np.float64)
        g = np.float32(gain[v])
        inverse = np.float32(1 / scale[v] ** 2)
        cost, total, count = np.float64(0), np.float64(0), 0
        for p in range(voxels.shape[0]):
            i, j, k = voxels[p, 0], voxels[p, 1], voxels[p, 2]
            x = a[0, 0] * i + a[0, 1] * j + a[0, 2] * k + a[0, 3]
            y = a[1, 0] * i + a[1, 1] * j + a[1, 2] * k + a[1, 3]
            z = a[2, 0] * i + a[2, 1] * j + a[2, 2] * k + a[2, 3]
            if not (x >= 0 and y >= 0 and z >= 0 and x <= ni - 1 and y <= nj - 1 and z <= nk - 1):
                continue
            r = _linear(volumes[v], x, y, z) - g * targets[v, p]
            w = np.float32((FREEDOM + 1) / (FREEDOM + r * r * inverse))
            gx, gy, gz = g * gradients[v, p, 0], g * gradients[v, p, 1], g * gradients[v, p, 2]
            wx, wy, wz = world[p, 0], world[p, 1], world[p, 2]
            if affine:
                row[0], row[1], row[2] = gx * wx, gx * wy, gx * wz
                row[3], row[4], row[5] = gy * wx, gy * wy, gy * wz
                row[6], row[7], row[8] = gz * wx, gz * wy, gz * wz
                row[9], row[10], row[11] = gx, gy, gz
            else:
                row[0], row[1], row[2] = wy * gz - wz * gy, wz * gx - wx * gz, wx * gy - wy * gx
                row[3], row[4], row[5] = gx, gy, gz
            row[width - 1] = targets[v, p]
            for b in range(width):
                wb = w * row[b]
                s[b] += wb * r
                for c in range(b + 1):
                    h[b, c] += wb * row[c]
            cost += w * r * r
            total += w
            count += 1
        hessian[v], slope[v] = h, s
        sums[v, 0], sums[v, 1], sums[v, 2] = cost, total, count
    return hessian, slope, sums


def _gather(volumes: torch.Tensor, points: PointSet, maps: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_read_loop` reads, (n, m), and which points are inside the volume."""
    device = volumes.device
    where = torch.as_tensor(points.voxels, device=device)
    map_ = torch.as_tensor(maps, device=device)
    at = torch.einsum("nab,mb->nam", map_[:, :, :3], where) + map_[:, :, 3:]
    size = torch.tensor(volumes.shape[1:], device=device)[None, :, None]
    inside = ((at >= 0) & (at <= size - 1)).all(1)
    base = torch.minimum(torch.nan_to_num(at).clamp(min=0).floor(), size - 2)
    part = at - base
    base = base.long()
    flat = volumes.reshape(len(volumes), -1)
    out = torch.zeros_like(at[:, 0])
    for i in (0, 1):
        for j in (0, 1):
            for k in (0, 1):
                index = ((base[:, 0] + i) * size[0, 1] + base[:, 1] + j) * size[0, 2] + base[:, 2] + k
                weight = (part if i else 1 - part)[:, 0] * (part if j else 1 - part)[:, 1]
                out += weight * (part if k else 1 - part)[:, 2] * torch.gather(flat, 1, index)
    return out, inside


def _equations_torch(
    volumes: torch.Tensor,
    points: PointSet,
    maps: np.ndarray,
    targets: torch.Tensor,
    gradients: torch.Tensor,
    gain: np.ndarray,
    scale: np.ndarray,
    affine: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums of `_equations_loop` with tensor operations."""
    device = volumes.device
    values, inside = _gather(volumes, points, maps)
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
