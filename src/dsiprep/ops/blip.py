"""Kernels of blip-up/blip-down correction: sampling with derivatives, and the normal equations of field and pose.

All arrays have the phase-encoding axis last, (a, b, y), and one unknown per voxel: the displacement f in mm along
that axis. On the CPU the hot loops run in Numba; other devices do the same sums with tensor operations, and a test
holds both to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.ops.blip_loops import data_loop, laplacian_loop, lines_loop, solid_loop

__all__ = [
    "Normal",
    "along",
    "barrier",
    "conjugate_gradients",
    "cosine_basis",
    "equal_mass_field",
    "laplacian",
    "sample_lines",
    "sample_solid",
]


def sample_lines(coefficients: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A volume read at x + shift along its last axis.

    Parameters
    ----------
    coefficients : Tensor, (a, b, y), float32
        Cubic B-spline coefficients along the last axis only.
    shift : Tensor, (a, b, y), float32
        Voxels along the last axis.

    Returns
    -------
    value, slope, inside : Tensor, (a, b, y)
        Intensity, its derivative along the last axis per voxel, and 1 where the point is within the grid (0 elsewhere,
        where value and slope are 0 too).
    """
    if coefficients.device.type == "cpu":
        results = lines_loop(coefficients.numpy(), shift.numpy())
        return tuple(torch.from_numpy(r) for r in results)
    return _lines_tensors(coefficients, shift)


def _lines_tensors(coefficients: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
    size = coefficients.shape[-1]
    where = torch.arange(size, device=shift.device) + shift
    inside = ((where >= -0.5) & (where <= size - 0.5)).float()
    base = torch.floor(where)
    weights, slopes = _taps(where - base)
    value, slope = torch.zeros_like(shift), torch.zeros_like(shift)
    for tap in range(4):
        taken = torch.gather(coefficients, 2, _mirror(base.long() - 1 + tap, size))
        value += weights[tap] * taken
        slope += slopes[tap] * taken
    return value * inside, slope * inside, inside


def sample_solid(coefficients: torch.Tensor, matrix: np.ndarray, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A volume read at matrix @ x + shift along its last axis.

    Parameters
    ----------
    coefficients : Tensor, (a, b, y), float32
        Cubic B-spline coefficients along all axes.
    matrix : ndarray, (3, 4) or (4, 4)
        Voxels to voxels.
    shift : Tensor, (a, b, y), float32
        Voxels along the last axis.

    Returns
    -------
    value : Tensor, (a, b, y)
    gradient : Tensor, (3, a, b, y)
        Derivatives per voxel at the point.
    inside : Tensor, (a, b, y)
    """
    if coefficients.device.type == "cpu":
        results = solid_loop(coefficients.numpy(), np.asarray(matrix, np.float64), shift.numpy())
        return tuple(torch.from_numpy(r) for r in results)
    return _solid_tensors(coefficients, np.asarray(matrix), shift)


def _solid_tensors(coefficients: torch.Tensor, matrix: np.ndarray, shift: torch.Tensor) -> tuple[torch.Tensor, ...]:
    axes = [torch.arange(n, device=shift.device, dtype=torch.float32) for n in shift.shape]
    rows = [[float(m) for m in row] for row in matrix[:3]]
    where = [r[0] * axes[0][:, None, None] + r[1] * axes[1][:, None] + r[2] * axes[2] + r[3] for r in rows]
    where[2] = where[2] + shift
    sizes = coefficients.shape
    inside = torch.ones_like(shift)
    for x, n in zip(where, sizes, strict=True):
        inside *= (x >= -0.5) & (x <= n - 0.5)
    base = [torch.floor(x) for x in where]
    taps = [_taps(x - b) for x, b in zip(where, base, strict=True)]
    total = torch.zeros((4, *shift.shape), device=shift.device)
    for i in range(4):
        for j in range(4):
            for k in range(4):
                near = [_mirror(b.long() - 1 + t, n) for b, t, n in zip(base, (i, j, k), sizes, strict=True)]
                taken = coefficients.reshape(-1)[(near[0] * sizes[1] + near[1]) * sizes[2] + near[2]]
                for d in range(4):
                    u, v, w = (taps[axis][1 if d == axis + 1 else 0][t] for axis, t in enumerate((i, j, k)))
                    total[d] += u * v * w * taken
    total *= inside
    return total[0], total[1:], inside


def along(field: torch.Tensor, axis: int) -> torch.Tensor:
    """Central difference per voxel; beyond the edges the outermost value is repeated."""
    n = field.shape[axis]
    if n == 1:
        return torch.zeros_like(field)
    ends = field.narrow(axis, 0, 1), field.narrow(axis, n - 1, 1)
    padded = torch.cat([ends[0], field, ends[1]], axis)
    return (padded.narrow(axis, 2, n) - padded.narrow(axis, 0, n)) / 2


def laplacian(field: torch.Tensor, spacing: np.ndarray) -> torch.Tensor:
    """Sum of second differences per mm², no flux through the edges.

    Parameters
    ----------
    field : Tensor, (a, b, y)
    spacing : ndarray, (3,)
        mm.
    """
    total = torch.zeros_like(field)
    for axis in range(3):
        n = field.shape[axis]
        if n > 1:
            rise = torch.diff(field, dim=axis) / float(spacing[axis]) ** 2
            total.narrow(axis, 0, n - 1).add_(rise)
            total.narrow(axis, 1, n - 1).sub_(rise)
    return total


def barrier(field: torch.Tensor, steepness: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cost of squeezing voxels, infinite where a line would fold.

    d^4 / (1 - d^2) of d = steepness times the difference of neighbours along the last axis, as in Burger et al. 2013
    (doi 10.1137/110835955).

    Returns
    -------
    cost : Tensor, ()
        Infinite where |d| >= 1 anywhere.
    slope, curvature : Tensor, (a, b, y - 1)
        Derivatives by the difference of neighbours.
    """
    d = steepness * torch.diff(field, dim=2)
    square = d * d
    left = 1 - square
    if field.shape[2] > 1 and float(left.min()) <= 0.02:
        return torch.tensor(float("inf")), d, d
    slope = 2 * square * d * (2 - square) / (left * left)
    curvature = square * (12 - 10 * square) / (left * left) + 4 * d * slope / left
    return (square * square / left).sum(), steepness * slope, steepness**2 * curvature


@dataclass(frozen=True, eq=False)
class Normal:
    """Gauss-Newton equations of the field (a, b, y) and a few pose parameters (m,).

    The linearised residual is r + level f + tilt D f + columns' p, with D the central difference along the last axis
    per voxel.

    Attributes
    ----------
    level, tilt, weight : Tensor, (a, b, y)
    curvature : Tensor, (a, b, y - 1)
        Second derivative of `barrier`.
    coupling : Tensor, (m, a, b, y)
        Derivative of the field's gradient by the pose.
    pose : Tensor, (m, m)
    spacing : ndarray, (3,)
        mm.
    stiffness : (float, float)
        Weights of the squared gradient and of the squared Laplacian.
    diagonal : Tensor, (a, b, y), or None
        Further weight of the field itself.
    """

    level: torch.Tensor
    tilt: torch.Tensor
    weight: torch.Tensor
    curvature: torch.Tensor
    coupling: torch.Tensor
    pose: torch.Tensor
    spacing: np.ndarray
    stiffness: tuple[float, torch.Tensor]
    diagonal: torch.Tensor | None = None

    def apply(self, field: torch.Tensor, pose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix times a vector."""
        flat = self.coupling.flatten(1)
        out = self._apply_loops(field) if field.device.type == "cpu" else self._apply_tensors(field)
        if self.diagonal is not None:
            out.addcmul_(self.diagonal, field)
        out += (pose @ flat).reshape(field.shape)
        return out, flat @ field.reshape(-1) + self.pose @ pose

    def _apply_loops(self, field: torch.Tensor) -> torch.Tensor:
        weak, stiff = self.stiffness
        inverse = 1 / np.asarray(self.spacing, float) ** 2
        force, out = torch.empty_like(field), torch.empty_like(field)
        laplacian_loop(field.numpy(), inverse, stiff.numpy(), -weak, force.numpy())
        laplacian_loop(force.numpy(), inverse, np.ones((1, 1, 1), np.float32), 0.0, out.numpy())
        tensors = (field, self.level, self.tilt, self.weight, self.curvature, out)
        data_loop(*(t.numpy() for t in tensors))
        return out

    def _apply_tensors(self, field: torch.Tensor) -> torch.Tensor:
        product = self.weight * (self.level * field + self.tilt * along(field, 2))
        bend = laplacian(field, self.spacing)
        out = self.level * product + transposed_along(self.tilt * product)
        out += laplacian(self.stiffness[1] * bend, self.spacing) - self.stiffness[0] * bend
        force = self.curvature * torch.diff(field, dim=2)
        out[..., 1:] += force
        out[..., :-1] -= force
        return out


def transposed_along(values: torch.Tensor) -> torch.Tensor:
    """The transpose of `along` on the last axis."""
    out = torch.zeros_like(values)
    if values.shape[2] == 1:
        return out
    half = values / 2
    out[..., 1:] += half[..., :-1]
    out[..., :-1] -= half[..., 1:]
    out[..., 0] -= half[..., 0]
    out[..., -1] += half[..., -1]
    return out


def cosine_basis(size: int, device: torch.device) -> torch.Tensor:
    """Orthonormal cosine transform (DCT-II) as a matrix, (size, size), rows by frequency."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(torch.pi / size * (k[None] + 0.5) * k[:, None]) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis.float().to(device)


def smooth_inverse(normal: Normal, inner: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of the equations of a volume whose data weigh the same everywhere: a preconditioner.

    The stiffness is diagonal in cosines, and a cosine transform is three matrix products.

    Parameters
    ----------
    normal : Normal
    inner : Tensor, (a, b, y), bool
        Where the data's mean weight is taken.
    """
    shape = normal.level.shape
    bases = [cosine_basis(n, normal.level.device) for n in shape]
    mu = [
        (2 - 2 * torch.cos(torch.pi * torch.arange(n) / n)).to(normal.level.device) / float(h) ** 2
        for n, h in zip(shape, normal.spacing, strict=True)
    ]
    total = mu[0][:, None, None] + mu[1][:, None] + mu[2]
    mean_level = float((normal.weight * normal.level**2)[inner].mean())
    if normal.diagonal is not None:
        mean_level += float(normal.diagonal[inner].mean())
    mean_tilt = float((normal.weight * normal.tilt**2)[inner].mean())
    sine = torch.sin(torch.pi * torch.arange(shape[2], device=total.device) / shape[2]) ** 2
    diagonal = (
        mean_level + mean_tilt * sine + normal.stiffness[0] * total + float(normal.stiffness[1].mean()) * total**2
    )
    inverse = 1 / diagonal.clamp(min=1e-12)

    def solve(residual: torch.Tensor) -> torch.Tensor:
        spectrum = _rotate(residual, bases) * inverse
        return _rotate(spectrum, [b.T for b in bases])

    return solve


def _rotate(values: torch.Tensor, bases: list[torch.Tensor]) -> torch.Tensor:
    a, b, y = values.shape
    values = (values.reshape(-1, y) @ bases[2].T).reshape(a, b, y)
    values = torch.matmul(bases[1], values)
    return (bases[0] @ values.reshape(a, -1)).reshape(a, b, y)


def conjugate_gradients(
    normal: Normal,
    right: tuple[torch.Tensor, torch.Tensor],
    inner: torch.Tensor,
    tolerance: float = 0.1,
    iterations: int = 40,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Preconditioned conjugate gradients on field and pose together.

    Parameters
    ----------
    normal : Normal
    right : Tensor (a, b, y), Tensor (m,)
        Right-hand side.
    inner : Tensor, (a, b, y), bool
        As in `smooth_inverse`.
    tolerance : float
        Stop when the residual, in the preconditioner's norm, has fallen to this share.
    iterations : int
        Upper bound.

    Returns
    -------
    field : Tensor, (a, b, y)
    pose : Tensor, (m,)
    count : int
        Iterations taken.
    """
    solve_field = smooth_inverse(normal, inner)
    solve_pose = torch.linalg.inv(normal.pose.double()).float()
    rf, rp = right[0].clone(), right[1].clone()
    xf, xp = torch.zeros_like(rf), torch.zeros_like(rp)
    zf, zp = solve_field(rf), solve_pose @ rp
    df, dp = zf.clone(), zp.clone()
    rho = first = _dot(rf, zf) + _dot(rp, zp)
    for count in range(1, iterations + 1):
        qf, qp = normal.apply(df, dp)
        curvature = _dot(df, qf) + _dot(dp, qp)
        if not curvature > 0:
            return xf, xp, count
        step = rho / curvature
        for x, d in ((xf, df), (xp, dp)):
            x.add_(d, alpha=step)
        for r, q in ((rf, qf), (rp, qp)):
            r.sub_(q, alpha=step)
        zf, zp = solve_field(rf), solve_pose @ rp
        previous, rho = rho, _dot(rf, zf) + _dot(rp, zp)
        if rho <= tolerance**2 * first:
            return xf, xp, count
        df.mul_(rho / previous).add_(zf)
        dp.mul_(rho / previous).add_(zp)
    return xf, xp, iterations


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def equal_mass_field(first: torch.Tensor, second: torch.Tensor, scales: tuple[float, float]) -> torch.Tensor:
    """Displacement that makes the cumulative intensities of both images agree along every line.

    The line integral method of Chang and Fitzpatrick 1992 (doi 10.1109/42.158935): signal is moved, never lost, so
    what lies before a point of the undistorted line lies before its image in both.

    Parameters
    ----------
    first, second : Tensor, (a, b, y)
        Non-negative intensities.
    scales : (float, float)
        Displacement in each image per unit of field, of opposite signs.

    Returns
    -------
    Tensor, (a, b, y)
        Field, in voxels along the last axis. Lines with nothing in them are all ground: their field is 0.
    """
    images = [v.clamp(min=0).double().cpu().numpy() for v in (first, second)]
    ground = 0.02 * max(float(v.mean()) for v in images) + 1e-12
    a, b, size = images[0].shape
    edges = np.arange(size + 1) - 0.5
    field = np.zeros((a, b, size))
    quantiles = (np.arange(4 * size) + 0.5) / (4 * size)
    for i in range(a):
        for j in range(b):
            sums = [np.concatenate([[0.0], np.cumsum(v[i, j] + ground)]) for v in images]
            y0, y1 = (np.interp(quantiles, s / s[-1], edges) for s in sums)
            line = (y0 - y1) / (scales[0] - scales[1])
            field[i, j] = np.interp(np.arange(size), y0 - scales[0] * line, line)
    return torch.from_numpy(field).float().to(first.device)


def _taps(f: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    g = 1 - f
    weights = [g**3 / 6, (4 - 6 * f**2 + 3 * f**3) / 6, (4 - 6 * g**2 + 3 * g**3) / 6, f**3 / 6]
    slopes = [-(g**2) / 2, (3 * f**2 - 4 * f) / 2, (4 * g - 3 * g**2) / 2, f**2 / 2]
    return weights, slopes


def _mirror(index: torch.Tensor, size: int) -> torch.Tensor:
    index = index.abs()
    index = torch.where(index >= size, 2 * size - 2 - index, index)
    return index.clamp(0, size - 1)
