"""Displacement fields: composition, inversion, Jacobian determinant; what a chain of maps does to points.

One body in tensor operations serves every device; the interpolation below it is chosen in `ops.sample`. Only the
inverse has a second one: on the CPU a loop solves for it voxel by voxel, without a temporary. A test holds both
to the same numbers.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from dsiprep.compiled import compiled
from dsiprep.data.grid import Grid
from dsiprep.data.transform import Affine, Chain, DisplacementField
from dsiprep.ops.image.filters import gradient
from dsiprep.ops.image.interpolation import resample_onto, sample_linear, voxel_points

__all__ = [
    "chain_displacement",
    "chain_points",
    "chain_points_back",
    "compose",
    "fit_between",
    "invert",
    "jacobian_determinant",
]

FIXED_POINT_STEPS = 4


def compose(first: DisplacementField, second: DisplacementField) -> DisplacementField:
    """One field that does `first` and then `second`, on the grid of `first`.

    x -> x + u1(x) + u2(x + u1(x)). What `second` does outside the grid of `first` is lost.
    """
    second_there = resample_onto(second.data, second.grid, first.grid, displacement=first.data)
    return DisplacementField(first.data + second_there, first.grid)


def invert(field: DisplacementField, iterations: int = 30, tolerance_mm: float = 0.01) -> DisplacementField:
    """The field v on the same grid with v(x) + u(x + v(x)) = 0.

    By Newton's method. Where a step does not bring a voxel nearer, half of it is tried; fields that fold have no
    inverse, and there the last best guess stands.

    Parameters
    ----------
    field : DisplacementField
    iterations : int
        At most so many steps of Newton's method.
    tolerance_mm : float
        Stop when no voxel is further than this from its inverse.

    Returns
    -------
    DisplacementField
    """
    device = field.data.device
    to_voxel = torch.as_tensor(np.linalg.inv(field.grid.affine)[:3, :3], device=device).float()
    to_world = torch.as_tensor(field.grid.affine[:3, :3], device=device).float()
    u = torch.einsum("ab,bijk->aijk", to_voxel, field.data.float())
    if device.type == "cpu":
        tolerance = tolerance_mm / float(field.grid.voxel_sizes.max())
        inverse = torch.from_numpy(_invert_loop(np.ascontiguousarray(u.numpy()), iterations, tolerance))
        return DisplacementField(torch.einsum("ab,bijk->aijk", to_world, inverse), field.grid)
    start = voxel_points(field.grid, field.grid).to(device).reshape(3, -1)
    v = _inverse_at(u, start, -u.reshape(3, -1), iterations, tolerance_mm, to_world)
    return DisplacementField((to_world @ v).reshape(u.shape), field.grid)


def _inverse_at(
    u: torch.Tensor, start: torch.Tensor, v: torch.Tensor, iterations: int, tolerance: float, to_world: torch.Tensor
) -> torch.Tensor:
    """v with v + u(start + v) = 0 in voxels for the points (3, m) of `start`, from a first guess."""
    for _ in range(FIXED_POINT_STEPS):
        v = -sample_linear(u, start + v)
    residual = v + sample_linear(u, start + v)
    left = torch.nonzero((to_world @ residual).norm(dim=0) > tolerance)[:, 0]
    if len(left):
        slopes = gradient(u).reshape(9, *u.shape[1:])  # du_a/dx_b, row-major in (a, b)
        v[:, left] = _newton(u, slopes, start[:, left], v[:, left], iterations, tolerance, to_world)
    return v


def _newton(
    u: torch.Tensor,
    slopes: torch.Tensor,
    start: torch.Tensor,
    v: torch.Tensor,
    iterations: int,
    tolerance: float,
    to_world: torch.Tensor,
) -> torch.Tensor:
    """Solve v + u(start + v) = 0 in voxels for the points (3, m) of `start`."""
    best = torch.zeros_like(v)
    size = torch.full((v.shape[1],), torch.inf, device=v.device)
    step, trial = torch.zeros_like(v), v.clone()
    active = torch.arange(v.shape[1], device=v.device)
    for _ in range(iterations):
        residual = trial[:, active] + sample_linear(u, start[:, active] + trial[:, active])
        distance = (to_world @ residual).norm(dim=0)
        better = distance < size[active]
        ahead = active[better]
        best[:, ahead], size[ahead] = trial[:, ahead], distance[better]
        step[:, active[~better]] /= 2
        step[:, ahead] = _solve(sample_linear(slopes, start[:, ahead] + trial[:, ahead]), residual[:, better])
        trial[:, active] = best[:, active] - step[:, active]
        active = active[size[active] > tolerance]
        if len(active) == 0:
            break
    return best


def jacobian_determinant(field: DisplacementField) -> torch.Tensor:
    """det(I + du/dx) with derivatives in world mm, central differences.

    Parameters
    ----------
    field : DisplacementField
        On any grid: oblique, anisotropic, left-handed.

    Returns
    -------
    Tensor, (i, j, k), float32
        Local volume of the image of a voxel, over the voxel's; positive where the map does not fold.
    """
    per_voxel = gradient(field.data)  # (3 components, 3 axes, i, j, k)
    inverse = torch.as_tensor(np.linalg.inv(field.grid.affine)[:3, :3], device=field.data.device).float()
    a = torch.einsum("cvijk,vw->cwijk", per_voxel, inverse)
    for axis in range(3):
        a[axis, axis] += 1
    return (
        a[0, 0] * (a[1, 1] * a[2, 2] - a[1, 2] * a[2, 1])
        - a[0, 1] * (a[1, 0] * a[2, 2] - a[1, 2] * a[2, 0])
        + a[0, 2] * (a[1, 0] * a[2, 1] - a[1, 1] * a[2, 0])
    )


def chain_points(chain: Chain, points: np.ndarray) -> np.ndarray:
    """Points of the chain's target to points of its source.

    Parameters
    ----------
    points : ndarray, (m, 3)
        World RAS+ mm.

    Returns
    -------
    ndarray, (m, 3), float64
    """
    points = np.asarray(points, float)
    for step in chain.steps:
        if isinstance(step, Affine):
            points = _moved(step.matrix, points)
        else:
            voxels = torch.as_tensor(step.grid.to_voxels(points).T, dtype=torch.float32)
            moved = sample_linear(step.data, voxels.to(step.data.device))
            points = points + moved.cpu().numpy().T.astype(float)
    return points


def fit_between(field: DisplacementField) -> DisplacementField:
    """The field for those who interpolate: no longer exact at the voxels, but nearest everywhere.

    Between two voxels h apart linear interpolation misses a smooth function by x (h - x) / 2 times its second
    derivative, h² / 12 of it on average and always to the same side. Taking that off at the voxels leaves two fifths of
    the error (root mean square).
    """
    data = field.data.clone()
    for axis in (1, 2, 3):
        size = data.shape[axis]
        if size > 2:
            inner = field.data.narrow(axis, 1, size - 2)
            curved = field.data.narrow(axis, 2, size - 2) - 2 * inner + field.data.narrow(axis, 0, size - 2)
            data.narrow(axis, 1, size - 2).sub_(curved / 12)
    return DisplacementField(data, field.grid)


def chain_points_back(chain: Chain, points: np.ndarray, tolerance_mm: float = 1e-3) -> np.ndarray:
    """Points of the chain's source to points of its target: `chain_points` undone, on the CPU.

    The linear part of each field is undone exactly, and what is left by Newton's method. Beyond its grid a field
    is taken to go on as at the edge, less its linear part, so that the inverse has no step there.

    Parameters
    ----------
    points : ndarray, (m, 3)
        World RAS+ mm.
    tolerance_mm : float
        Points that `chain_points` brings back to so near are not improved further.

    Returns
    -------
    ndarray, (m, 3), float64
        Where a field folds there is no inverse, and the best guess stands.
    """
    points = np.asarray(points, float)
    for step in reversed(chain.steps):
        if isinstance(step, Affine):
            points = _moved(np.linalg.inv(step.matrix), points)
        else:
            linear = np.linalg.inv(_linear_part(step))
            rest = _extended(step, linear)
            points = _moved(linear, points)
            to_voxel = np.linalg.inv(rest.grid.affine)[:3, :3]
            u = torch.einsum("ab,bijk->aijk", torch.as_tensor(to_voxel).float(), rest.data)
            to_world = torch.as_tensor(rest.grid.affine[:3, :3]).float()
            start = torch.as_tensor(np.ascontiguousarray(rest.grid.to_voxels(points).T), dtype=torch.float32)
            v = _inverse_at(u, start, -sample_linear(u, start), 30, tolerance_mm, to_world)
            points = points + v.numpy().T.astype(float) @ rest.grid.affine[:3, :3].T
    return points


def _moved(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _linear_part(field: DisplacementField) -> np.ndarray:
    """The affine map nearest to x -> x + u(x), (4, 4)."""
    step = tuple(slice(None, None, max(1, n // 32)) for n in field.grid.shape)
    points = field.grid.to_world(np.moveaxis(np.indices(field.grid.shape)[(slice(None), *step)], 0, -1).reshape(-1, 3))
    u = field.data.cpu().numpy()[(slice(None), *step)].reshape(3, -1).T.astype(float)
    middle, mean = points.mean(0), u.mean(0)
    matrix = np.eye(4)
    matrix[:3, :3] += np.linalg.lstsq(points - middle, u - mean, rcond=None)[0].T
    matrix[:3, 3] = middle + mean - matrix[:3, :3] @ middle
    return matrix


def _extended(field: DisplacementField, linear: np.ndarray) -> DisplacementField:
    """x -> linear(x + u(x)) on a grid that is wider by the longest displacement, which goes on as at the edge."""
    chain = Chain((DisplacementField(field.data.cpu().float(), field.grid), Affine(linear, "", "")), "", "")
    rest = chain_displacement(chain, field.grid)
    reach = float(rest.norm(dim=0).max()) / field.grid.voxel_sizes
    i, j, k = (int(n) for n in np.minimum(np.ceil(reach) + 2, np.asarray(field.grid.shape) + 2))
    wide = torch.nn.functional.pad(rest[None], (k, k, j, j, i, i), mode="replicate")[0]
    affine = field.grid.affine.copy()
    affine[:3, 3] = field.grid.to_world(np.array([-i, -j, -k]))
    return DisplacementField(wide, Grid((wide.shape[1], wide.shape[2], wide.shape[3]), affine))


def chain_displacement(chain: Chain, grid: Grid, device: torch.device | str = "cpu") -> torch.Tensor:
    """The whole chain as one displacement at every voxel of a grid of its target.

    `resample_onto(volumes, source, grid, displacement=chain_displacement(chain, grid))` brings images of the chain's
    source onto `grid`. Linear parts are included.

    Parameters
    ----------
    grid : Grid
    device : torch.device or str
        Where to compute.

    Returns
    -------
    Tensor, (3, i, j, k), float32
        mm RAS+.
    """
    world = voxel_points(grid, Grid(grid.shape, np.eye(4))).to(device)
    total = torch.zeros_like(world)
    for step in chain.steps:
        if isinstance(step, Affine):
            linear = torch.as_tensor(step.matrix[:3, :3], dtype=torch.float32, device=device)
            # (M - I) x in one go: the difference of two large numbers would cost digits
            change = torch.as_tensor(step.matrix[:3, :3] - np.eye(3), dtype=torch.float32, device=device)
            shift = torch.as_tensor(step.matrix[:3, 3], dtype=torch.float32, device=device)
            moved = torch.einsum("ab,bijk->aijk", linear, total)
            total = moved + torch.einsum("ab,bijk->aijk", change, world) + shift[:, None, None, None]
        else:
            total = total + resample_onto(step.data.to(device), step.grid, grid, displacement=total)
    return total


def _solve(slopes: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """(I + J)^-1 r at every point by Cramer's rule, J row-major (9, m); near-singular ones take r."""
    a, b, c, d, e, f, g, h, i = slopes
    a, e, i = a + 1, e + 1, i + 1
    cofactors = [
        [e * i - f * h, c * h - b * i, b * f - c * e],
        [f * g - d * i, a * i - c * g, c * d - a * f],
        [d * h - e * g, b * g - a * h, a * e - b * d],
    ]
    determinant = a * cofactors[0][0] + b * cofactors[1][0] + c * cofactors[2][0]
    safe = determinant.abs() > 0.05
    divisor = torch.where(safe, determinant, 1.0)
    rows = [(row[0] * residual[0] + row[1] * residual[1] + row[2] * residual[2]) / divisor for row in cofactors]
    return torch.where(safe, torch.stack(rows), residual)


@compiled()
def _value_and_slopes(u: np.ndarray, x: float, y: float, z: float, out: np.ndarray) -> None:
    """The three components at a point by trilinear interpolation, zero outside, and their slopes du_a/dx_b."""
    _, ni, nj, nk = u.shape
    if not (x > -1 and y > -1 and z > -1 and x < ni and y < nj and z < nk):
        out[:] = 0
        return
    i, j, k = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
    x, y, z = x - i, y - j, z - k
    inner = i >= 0 and j >= 0 and k >= 0 and i < ni - 1 and j < nj - 1 and k < nk - 1
    c = np.zeros(8)
    for a in range(3):
        for t in range(8):
            p, q, r = i + (t >> 2), j + (t >> 1 & 1), k + (t & 1)
            if inner or (0 <= p < ni and 0 <= q < nj and 0 <= r < nk):
                c[t] = u[a, p, q, r]
            else:
                c[t] = 0
        d00, d01, d10, d11 = c[1] - c[0], c[3] - c[2], c[5] - c[4], c[7] - c[6]
        v00, v01, v10, v11 = c[0] + z * d00, c[2] + z * d01, c[4] + z * d10, c[6] + z * d11
        v0, v1 = v00 + y * (v01 - v00), v10 + y * (v11 - v10)
        out[a] = v0 + x * (v1 - v0)
        out[3 + 3 * a] = v1 - v0
        out[4 + 3 * a] = (1 - x) * (v01 - v00) + x * (v11 - v10)
        out[5 + 3 * a] = (1 - x) * ((1 - y) * d00 + y * d01) + x * ((1 - y) * d10 + y * d11)


@compiled()
def _newton_step(state: np.ndarray, residual: np.ndarray, step: np.ndarray) -> None:
    """step = (I + J)^-1 residual by Cramer's rule; the residual itself where I + J is near-singular."""
    a, b, c = state[3] + 1, state[4], state[5]
    d, e, f = state[6], state[7] + 1, state[8]
    g, h, i = state[9], state[10], state[11] + 1
    p, q, r = residual[0], residual[1], residual[2]
    ka, kb, kc = e * i - f * h, f * g - d * i, d * h - e * g
    determinant = a * ka + b * kb + c * kc
    if abs(determinant) < 0.05:
        step[:] = residual
        return
    step[0] = (ka * p + (c * h - b * i) * q + (b * f - c * e) * r) / determinant
    step[1] = (kb * p + (a * i - c * g) * q + (c * d - a * f) * r) / determinant
    step[2] = (kc * p + (b * g - a * h) * q + (a * e - b * d) * r) / determinant


@compiled()
def _invert_voxel(
    u: np.ndarray, i: int, j: int, k: int, iterations: int, tolerance: float, work: np.ndarray, best: np.ndarray
) -> None:
    """Solve v + u(x + v) = 0 at one voxel; `work` is for what changes on the way."""
    state, residual, step, trial = work[0], work[1, :3], work[2, :3], work[3, :3]
    for a in range(3):
        trial[a] = -u[a, i, j, k]
    size = np.inf
    for _ in range(iterations):
        _value_and_slopes(u, i + trial[0], j + trial[1], k + trial[2], state)
        distance = 0.0
        for a in range(3):
            residual[a] = trial[a] + state[a]
            distance += residual[a] ** 2
        if distance < size:
            size = distance
            best[:] = trial
            if size <= tolerance**2:
                return
            _newton_step(state, residual, step)
        else:
            for a in range(3):
                step[a] /= 2
        for a in range(3):
            trial[a] = best[a] - step[a]


@compiled(parallel=True)
def _invert_loop(u: np.ndarray, iterations: int, tolerance: float) -> np.ndarray:
    out = np.empty_like(u)
    _, ni, nj, nk = u.shape
    for i in numba.prange(ni):
        work, best = np.zeros((4, 12)), np.zeros(3)
        for j in range(nj):
            for k in range(nk):
                _invert_voxel(u, i, j, k, iterations, tolerance, work, best)
                out[0, i, j, k], out[1, i, j, k], out[2, i, j, k] = best[0], best[1], best[2]
    return out
