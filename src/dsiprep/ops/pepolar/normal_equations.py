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

from dsiprep.ops.pepolar.kernels import data_loop, laplacian_loop
from dsiprep.ops.pepolar.regularisation import along, laplacian, transposed_along

__all__ = ["NormalEquations", "conjugate_gradients", "cosine_basis", "percentile_99"]


@dataclass(frozen=True, eq=False)
class NormalEquations:
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


def cosine_basis(size: int, device: torch.device) -> torch.Tensor:
    """Orthonormal cosine transform (DCT-II) as a matrix, (size, size), rows by frequency."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(torch.pi / size * (k[None] + 0.5) * k[:, None]) * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis.float().to(device)


def smooth_inverse(normal: NormalEquations, inner: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inverse of the equations of a volume whose data weigh the same everywhere: a preconditioner.

    The stiffness is diagonal in cosines, and a cosine transform is three matrix products.

    Parameters
    ----------
    normal : NormalEquations
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
    normal: NormalEquations,
    right: tuple[torch.Tensor, torch.Tensor],
    inner: torch.Tensor,
    tolerance: float = 0.1,
    iterations: int = 40,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Preconditioned conjugate gradients on field and pose together.

    Parameters
    ----------
    normal : NormalEquations
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


def percentile_99(values: torch.Tensor) -> float:
    """What 99 % of values (n,) do not exceed."""
    return float(values.kthvalue(int(0.99 * (values.numel() - 1)) + 1).values)
