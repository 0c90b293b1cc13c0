"""Displacement fields: composition, inversion, Jacobian determinants, and point transforms through chains.

Tensor operations serve every device; `ops.image.interpolation` chooses how to sample. Only `invert` has a second
implementation: on the CPU a Numba loop solves voxel by voxel, without temporaries. A test verifies that both agree.
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
    "invert",
    "jacobian_determinant",
    "prefilter",
]

FIXED_POINT_STEPS = 4


def compose(first: DisplacementField, second: DisplacementField) -> DisplacementField:
    """Compose two fields, `first` then `second`, on the grid of `first`.

    x -> x + u1(x) + u2(x + u1(x)). Displacements of `second` outside the grid of `first` are lost.
    """
    second_displaced = resample_onto(second.data, second.grid, first.grid, displacement=first.data)
    return DisplacementField(first.data + second_displaced, first.grid)


def invert(field: DisplacementField, iterations: int = 30, tolerance_mm: float = 0.01) -> DisplacementField:
    """Invert a field: v on the same grid with v(x) + u(x + v(x)) = 0.

    Newton's method; a step that does not reduce the residual of a voxel is halved. A field that folds has no inverse
    there, and the best iterate is kept.

    Parameters
    ----------
    field : DisplacementField
    iterations : int
        Maximum number of Newton steps.
    tolerance_mm : float
        Stop when the residual of every voxel is below this.

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
    """Solve v + u(start + v) = 0 in voxels for the points (3, m) of `start`, from the initial guess `v`."""
    for _ in range(FIXED_POINT_STEPS):
        v = -sample_linear(u, start + v)
    residual = v + sample_linear(u, start + v)
    remaining = torch.nonzero((to_world @ residual).norm(dim=0) > tolerance)[:, 0]
    if len(remaining):
        slopes = gradient(u).reshape(9, *u.shape[1:])  # du_a/dx_b, row-major in (a, b)
        v[:, remaining] = _newton(u, slopes, start[:, remaining], v[:, remaining], iterations, tolerance, to_world)
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
    """Newton iterations of `_inverse_at`, with the derivatives (9, i, j, k) of u, row-major."""
    best = torch.zeros_like(v)
    best_distance = torch.full((v.shape[1],), torch.inf, device=v.device)
    step, trial = torch.zeros_like(v), v.clone()
    active = torch.arange(v.shape[1], device=v.device)
    for _ in range(iterations):
        residual = trial[:, active] + sample_linear(u, start[:, active] + trial[:, active])
        distance = (to_world @ residual).norm(dim=0)
        better = distance < best_distance[active]
        improved = active[better]
        best[:, improved], best_distance[improved] = trial[:, improved], distance[better]
        step[:, active[~better]] /= 2
        derivatives = sample_linear(slopes, start[:, improved] + trial[:, improved])
        step[:, improved] = _newton_steps(derivatives, residual[:, better])
        trial[:, active] = best[:, active] - step[:, active]
        active = active[best_distance[active] > tolerance]
        if len(active) == 0:
            break
    return best


def jacobian_determinant(field: DisplacementField) -> torch.Tensor:
    """Jacobian determinant det(I + du/dx), from central differences in world mm.

    Parameters
    ----------
    field : DisplacementField
        On any grid, including oblique, anisotropic and left-handed ones.

    Returns
    -------
    Tensor, (i, j, k), float32
        Ratio of the volume of a mapped voxel to that of the voxel; positive where the map does not fold.
    """
    per_voxel = gradient(field.data)  # (3 components, 3 axes, i, j, k)
    world_to_voxel = torch.as_tensor(np.linalg.inv(field.grid.affine)[:3, :3], device=field.data.device).float()
    a = torch.einsum("cvijk,vw->cwijk", per_voxel, world_to_voxel)
    for axis in range(3):
        a[axis, axis] += 1
    return (
        a[0, 0] * (a[1, 1] * a[2, 2] - a[1, 2] * a[2, 1])
        - a[0, 1] * (a[1, 0] * a[2, 2] - a[1, 2] * a[2, 0])
        + a[0, 2] * (a[1, 0] * a[2, 1] - a[1, 1] * a[2, 0])
    )


def chain_points(chain: Chain, points: np.ndarray) -> np.ndarray:
    """Map points of the chain's target to points of its source.

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
            points = _transformed(step.matrix, points)
        else:
            voxels = torch.as_tensor(step.grid.to_voxels(points).T, dtype=torch.float32)
            displacement = sample_linear(step.data, voxels.to(step.data.device))
            points = points + displacement.cpu().numpy().T.astype(float)
    return points


def prefilter(field: DisplacementField) -> DisplacementField:
    """Prefilter a field for linear interpolation: no longer exact at the voxels, but closer on average between them.

    Between two voxels h apart, linear interpolation misses a smooth function by x (h - x) / 2 times its second
    derivative: h² / 12 of it on average, always with the same sign. Subtracting that at the voxels leaves two fifths
    of the root-mean-square error.
    """
    data = field.data.clone()
    for axis in (1, 2, 3):
        size = data.shape[axis]
        if size > 2:
            inner = field.data.narrow(axis, 1, size - 2)
            second = field.data.narrow(axis, 2, size - 2) - 2 * inner + field.data.narrow(axis, 0, size - 2)
            data.narrow(axis, 1, size - 2).sub_(second / 12)
    return DisplacementField(data, field.grid)


def chain_points_back(chain: Chain, points: np.ndarray, tolerance_mm: float = 1e-3) -> np.ndarray:
    """Map points of the chain's source to points of its target: the inverse of `chain_points`, on the CPU.

    The linear part of each field is inverted exactly and the remainder by Newton's method. The remainder is extended
    beyond the field's grid by its edge values, so that the inverse has no step there.

    Parameters
    ----------
    points : ndarray, (m, 3)
        World RAS+ mm.
    tolerance_mm : float
        Iterations stop for points that map back to within this distance.

    Returns
    -------
    ndarray, (m, 3), float64
        A field that folds has no inverse there, and the best iterate is returned.
    """
    points = np.asarray(points, float)
    for step in reversed(chain.steps):
        if isinstance(step, Affine):
            points = _transformed(np.linalg.inv(step.matrix), points)
        else:
            linear = np.linalg.inv(_linear_part(step))
            remainder = _extended_remainder(step, linear)
            points = _transformed(linear, points)
            to_voxel = np.linalg.inv(remainder.grid.affine)[:3, :3]
            u = torch.einsum("ab,bijk->aijk", torch.as_tensor(to_voxel).float(), remainder.data)
            to_world = torch.as_tensor(remainder.grid.affine[:3, :3]).float()
            start = torch.as_tensor(np.ascontiguousarray(remainder.grid.to_voxels(points).T), dtype=torch.float32)
            v = _inverse_at(u, start, -sample_linear(u, start), 30, tolerance_mm, to_world)
            points = points + v.numpy().T.astype(float) @ remainder.grid.affine[:3, :3].T
    return points


def _transformed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _linear_part(field: DisplacementField) -> np.ndarray:
    """Affine map (4, 4) closest to x -> x + u(x) in the least-squares sense."""
    step = tuple(slice(None, None, max(1, n // 32)) for n in field.grid.shape)
    points = field.grid.to_world(np.moveaxis(np.indices(field.grid.shape)[(slice(None), *step)], 0, -1).reshape(-1, 3))
    u = field.data.cpu().numpy()[(slice(None), *step)].reshape(3, -1).T.astype(float)
    middle, mean = points.mean(0), u.mean(0)
    matrix = np.eye(4)
    matrix[:3, :3] += np.linalg.lstsq(points - middle, u - mean, rcond=None)[0].T
    matrix[:3, 3] = middle + mean - matrix[:3, :3] @ middle
    return matrix


def _extended_remainder(field: DisplacementField, linear: np.ndarray) -> DisplacementField:
    """The field of x -> linear(x + u(x)), its grid widened by the longest displacement and filled with edge values."""
    chain = Chain((DisplacementField(field.data.cpu().float(), field.grid), Affine(linear, "", "")), "", "")
    remainder = chain_displacement(chain, field.grid)
    longest = float(remainder.norm(dim=0).max()) / field.grid.voxel_sizes
    i, j, k = (int(n) for n in np.minimum(np.ceil(longest) + 2, np.asarray(field.grid.shape) + 2))
    wide = torch.nn.functional.pad(remainder[None], (k, k, j, j, i, i), mode="replicate")[0]
    affine = field.grid.affine.copy()
    affine[:3, 3] = field.grid.to_world(np.array([-i, -j, -k]))
    return DisplacementField(wide, Grid((wide.shape[1], wide.shape[2], wide.shape[3]), affine))


def chain_displacement(chain: Chain, grid: Grid, device: torch.device | str = "cpu") -> torch.Tensor:
    """Total displacement of a chain, affine parts included, at every voxel of a grid in its target space.

    `resample_onto(volumes, source, grid, displacement=chain_displacement(chain, grid))` resamples images of the
    chain's source onto `grid`.

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
            # (M - I) x as one product: subtracting two large numbers would lose digits
            change = torch.as_tensor(step.matrix[:3, :3] - np.eye(3), dtype=torch.float32, device=device)
            shift = torch.as_tensor(step.matrix[:3, 3], dtype=torch.float32, device=device)
            moved = torch.einsum("ab,bijk->aijk", linear, total)
            total = moved + torch.einsum("ab,bijk->aijk", change, world) + shift[:, None, None, None]
        else:
            total = total + resample_onto(step.data.to(device), step.grid, grid, displacement=total)
    return total


def _newton_steps(slopes: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """(I + J)^-1 r at every point by Cramer's rule, J row-major (9, m); r itself where I + J is near-singular."""
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
    """Trilinear interpolation of u (zero outside) and its slopes du_a/dx_b, row-major, into `out` (12,)."""
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
def _newton_step(sample: np.ndarray, residual: np.ndarray, step: np.ndarray) -> None:
    """Write (I + J)^-1 residual, by Cramer's rule, into `step`; the residual itself where I + J is near-singular."""
    a, b, c = sample[3] + 1, sample[4], sample[5]
    d, e, f = sample[6], sample[7] + 1, sample[8]
    g, h, i = sample[9], sample[10], sample[11] + 1
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
    """Solve v + u(x + v) = 0 at one voxel, the result in `best` (3,); `work` (4, 12) is scratch memory."""
    sample, residual, step, trial = work[0], work[1, :3], work[2, :3], work[3, :3]
    for a in range(3):
        trial[a] = -u[a, i, j, k]
    best_distance = np.inf
    for _ in range(iterations):
        _value_and_slopes(u, i + trial[0], j + trial[1], k + trial[2], sample)
        distance = 0.0
        for a in range(3):
            residual[a] = trial[a] + sample[a]
            distance += residual[a] ** 2
        if distance < best_distance:
            best_distance = distance
            best[:] = trial
            if best_distance <= tolerance**2:
                return
            _newton_step(sample, residual, step)
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
                _invert_voxel(u, np.int64(i), j, k, iterations, tolerance, work, best)
                out[0, i, j, k], out[1, i, j, k], out[2, i, j, k] = best[0], best[1], best[2]
    return out
