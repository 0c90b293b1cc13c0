"""Gauss-Newton normal equations of a displacement field and a head pose, and their solution.

All arrays have the phase-encoding axis last, (a, b, y), with one unknown per voxel: the displacement f in mm along that
axis. The CPU runs compiled loops; other devices compute the same sums with tensor operations, and a test compares the
two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.ops.pepolar.blip_pair_kernels import data_loop, laplacian_loop
from dsiprep.ops.pepolar.regularisation import central_difference, central_difference_transpose, laplacian

__all__ = ["NormalEquations", "conjugate_gradients", "cosine_basis", "cosine_preconditioner", "percentile_99"]


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Gauss-Newton normal equations of the field (a, b, y) and a few pose parameters (m,).

    The linearised residual is r + by_field f + by_slope D f + J p, where D is the central difference along the last
    axis per voxel and J holds the derivatives with respect to the pose parameters p. Where the blips have different
    phase-encoding axes, across[0] D_a f + across[1] D_b f is added.

    Attributes
    ----------
    by_field, by_slope : Tensor, (a, b, y)
        Derivatives of the residual with respect to f and to D f.
    weight : Tensor, (a, b, y)
        Weight of each squared residual.
    curvature : Tensor, (a, b, y - 1)
        Second derivative of the barrier.
    coupling : Tensor, (m, a, b, y)
        Derivative of the gradient by the field with respect to the pose.
    pose : Tensor, (m, m)
        Block of the pose parameters.
    spacing : ndarray, (3,)
        mm.
    gradient_weight : float
        Weight of the field's squared gradient.
    laplacian_weight : Tensor, (a, b, y)
        Weight of its squared Laplacian.
    diagonal : Tensor, (a, b, y), or None
        Added to the diagonal of the field's block.
    across : Tensor, (2, a, b, y), or None
        Derivatives of the residual with respect to central differences of f along the first two axes.
    """

    by_field: torch.Tensor
    by_slope: torch.Tensor
    weight: torch.Tensor
    curvature: torch.Tensor
    coupling: torch.Tensor
    pose: torch.Tensor
    spacing: np.ndarray
    gradient_weight: float
    laplacian_weight: torch.Tensor
    diagonal: torch.Tensor | None = None
    across: torch.Tensor | None = None

    def apply(self, field: torch.Tensor, pose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Product of the matrix with a vector."""
        flat = self.coupling.flatten(1)
        loops = field.device.type == "cpu" and self.across is None
        out = self._apply_loops(field) if loops else self._apply_tensors(field)
        if self.diagonal is not None:
            out.addcmul_(self.diagonal, field)
        out += (pose @ flat).reshape(field.shape)
        return out, flat @ field.reshape(-1) + self.pose @ pose

    def _apply_loops(self, field: torch.Tensor) -> torch.Tensor:
        inverse_squares = 1 / np.asarray(self.spacing, float) ** 2
        penalised, out = torch.empty_like(field), torch.empty_like(field)
        laplacian_loop(
            field.numpy(), inverse_squares, self.laplacian_weight.numpy(), -self.gradient_weight, penalised.numpy()
        )
        laplacian_loop(penalised.numpy(), inverse_squares, np.ones((1, 1, 1), np.float32), 0.0, out.numpy())
        tensors = (field, self.by_field, self.by_slope, self.weight, self.curvature, out)
        data_loop(*(t.numpy() for t in tensors))
        return out

    def _apply_tensors(self, field: torch.Tensor) -> torch.Tensor:
        change = self.by_field * field + self.by_slope * central_difference(field, 2)
        if self.across is not None:
            change += self.across[0] * central_difference(field, 0) + self.across[1] * central_difference(field, 1)
        product, lap = self.weight * change, laplacian(field, self.spacing)
        out = self.by_field * product + central_difference_transpose(self.by_slope * product)
        if self.across is not None:
            out += central_difference_transpose(self.across[0] * product, 0)
            out += central_difference_transpose(self.across[1] * product, 1)
        out += laplacian(self.laplacian_weight * lap, self.spacing) - self.gradient_weight * lap
        force = self.curvature * torch.diff(field, dim=2)
        out[..., 1:] += force
        out[..., :-1] -= force
        return out


def conjugate_gradients(
    normal: NormalEquations,
    right_hand_side: tuple[torch.Tensor, torch.Tensor],
    region: torch.Tensor,
    tolerance: float = 0.1,
    max_iterations: int = 40,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Solve for field and pose together by preconditioned conjugate gradients.

    Parameters
    ----------
    normal : NormalEquations
    right_hand_side : Tensor (a, b, y), Tensor (m,)
        Of field and pose.
    region : Tensor, (a, b, y), bool
        As in `cosine_preconditioner`.
    tolerance : float
        Stop when the residual, in the preconditioner's norm, has fallen to this fraction.
    max_iterations : int

    Returns
    -------
    field : Tensor, (a, b, y)
    pose : Tensor, (m,)
    count : int
        Number of iterations.
    """
    solve_field = cosine_preconditioner(normal, region)
    solve_pose = torch.linalg.inv(normal.pose.double()).float()
    # r: residual, x: solution, z: preconditioned residual, d: direction, q: matrix times direction; f: field, p: pose
    rf, rp = right_hand_side[0].clone(), right_hand_side[1].clone()
    xf, xp = torch.zeros_like(rf), torch.zeros_like(rp)
    zf, zp = solve_field(rf), solve_pose @ rp
    df, dp = zf.clone(), zp.clone()
    rho = first = _dot(rf, zf) + _dot(rp, zp)
    for count in range(1, max_iterations + 1):
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
    return xf, xp, max_iterations


def cosine_preconditioner(normal: NormalEquations, region: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Approximate inverse of the field's block of the equations, diagonal in the cosine transform.

    It is exact where data and penalties have the same weight everywhere. The transform takes three matrix products.

    Parameters
    ----------
    normal : NormalEquations
    region : Tensor, (a, b, y), bool
        Where the mean weight of the data is computed.
    """
    shape = normal.by_field.shape
    bases = [cosine_basis(n, normal.by_field.device) for n in shape]
    eigenvalues = [
        (2 - 2 * torch.cos(torch.pi * torch.arange(n) / n)).to(normal.by_field.device) / float(h) ** 2
        for n, h in zip(shape, normal.spacing, strict=True)
    ]
    total = eigenvalues[0][:, None, None] + eigenvalues[1][:, None] + eigenvalues[2]
    by_field = float((normal.weight * normal.by_field**2)[region].mean())
    if normal.diagonal is not None:
        by_field += float(normal.diagonal[region].mean())
    sines = [torch.sin(torch.pi * torch.arange(n, device=total.device) / n) ** 2 for n in shape]
    diagonal = by_field + float((normal.weight * normal.by_slope**2)[region].mean()) * sines[2]
    if normal.across is not None:
        first, second = (float((normal.weight * slope**2)[region].mean()) for slope in normal.across)
        diagonal = diagonal + first * sines[0][:, None, None] + second * sines[1][:, None]
    diagonal = diagonal + normal.gradient_weight * total + float(normal.laplacian_weight.mean()) * total**2
    inverse = 1 / diagonal.clamp(min=1e-12)

    def solve(residual: torch.Tensor) -> torch.Tensor:
        spectrum = _transform(residual, bases) * inverse
        return _transform(spectrum, [b.T for b in bases])

    return solve


def cosine_basis(size: int, device: torch.device) -> torch.Tensor:
    """Orthonormal cosine transform (DCT-II) as a matrix, (size, size), one row per frequency."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(torch.pi / size * (k[None] + 0.5) * k[:, None]) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis.float().to(device)


def percentile_99(values: torch.Tensor) -> float:
    """99th percentile of values (n,), without interpolation."""
    return float(values.kthvalue(int(0.99 * (values.numel() - 1)) + 1).values)


def _transform(values: torch.Tensor, bases: list[torch.Tensor]) -> torch.Tensor:
    """Multiply each axis by its matrix."""
    a, b, y = values.shape
    values = (values.reshape(-1, y) @ bases[2].T).reshape(a, b, y)
    values = torch.matmul(bases[1], values)
    return (bases[0] @ values.reshape(a, -1)).reshape(a, b, y)


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))
