"""Single-step resampling of EPI volumes: cubic B-splines through an affine, a displacement field and eddy currents.

On the CPU one Numba loop computes the voxel coordinate, the weights and the intensity; other devices use tensor
operations. A test verifies that both agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch

from dsiprep.compiled import compiled
from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField, EddyCurrents
from dsiprep.ops.image.bspline import cubic_weights, mirrored
from dsiprep.ops.image.eddy_displacement import EddyDisplacement, displace_points, displace_voxel, eddy_on_grid
from dsiprep.ops.image.filters import gradient
from dsiprep.ops.image.interpolation import resample_onto, sample_cubic, spline_coefficients, voxel_points
from dsiprep.ops.image.scanner_warp import NO_WARP, ScannerWarp, look_up, warp_points

__all__ = [
    "SampledDisplacement",
    "add_displacements",
    "along_axis",
    "displacement_axis",
    "field_of_view",
    "sample_displacement",
    "warp_volume",
]


@dataclass(frozen=True, eq=False)
class SampledDisplacement:
    """A susceptibility displacement field sampled at the points of a target grid.

    Attributes
    ----------
    displacement : Tensor, (3, i, j, k)
        Displacement in mm RAS+, added after the affine.
    slope : Tensor, (3, i, j, k)
        Gradient, per mm RAS+ of the undistorted space, of the displacement along `direction`.
    direction : ndarray, (3,)
        Unit vector parallel to all displacements.
    """

    displacement: torch.Tensor
    slope: torch.Tensor
    direction: np.ndarray


def sample_displacement(field: DisplacementField, target: Grid, matrix: np.ndarray) -> SampledDisplacement:
    """Sample a displacement field along one direction (phase encoding) at the points of `target`.

    Parameters
    ----------
    field : DisplacementField
        On the grid of the undistorted reference; all vectors parallel.
    target : Grid
    matrix : ndarray, (4, 4)
        World points of the target to world points of the undistorted reference.
    """
    u, direction = field.data.float(), displacement_axis(field)
    length = torch.einsum("a,aijk->ijk", torch.as_tensor(direction, device=u.device).float(), u)
    world_to_voxel = torch.as_tensor(np.linalg.inv(field.grid.affine)[:3, :3], device=u.device).float()
    slope = torch.einsum("vijk,vw->wijk", gradient(length[None])[0], world_to_voxel)
    sampled = resample_onto(torch.cat([u, slope]), field.grid, target, matrix, cubic=True)
    return SampledDisplacement(sampled[:3].contiguous(), sampled[3:].contiguous(), direction)


def displacement_axis(field: DisplacementField) -> np.ndarray:
    """Unit vector (3,), RAS+, parallel to all vectors of a field; its sense is arbitrary."""
    u = field.data.float()
    _, vectors = np.linalg.eigh(torch.einsum("aijk,bijk->ab", u, u).double().cpu().numpy())
    return np.asarray(vectors[:, -1])


def along_axis(sampled: SampledDisplacement, axis: np.ndarray) -> SampledDisplacement:
    """The same displacement, its `direction` the unit vector `axis` (3,), which is parallel to it or opposite."""
    sign = -1.0 if float(sampled.direction @ axis) < 0 else 1.0
    return SampledDisplacement(sampled.displacement, sign * sampled.slope, np.asarray(axis, float))


def add_displacements(
    resting: SampledDisplacement | None, changes: Sequence[SampledDisplacement], amounts: np.ndarray
) -> SampledDisplacement | None:
    """`resting` plus `amounts` (c,) times the `changes`, all along one axis."""
    if not len(changes):
        return resting
    first = changes[0] if resting is None else resting
    displacement, slope = (torch.zeros_like(x) for x in (first.displacement, first.slope))
    for part, amount in zip((first, *changes), (float(resting is not None), *amounts), strict=True):
        aligned = along_axis(part, first.direction)
        displacement += float(amount) * aligned.displacement
        slope += float(amount) * aligned.slope
    return SampledDisplacement(displacement, slope, first.direction)


def warp_volume(
    volume: torch.Tensor,
    source: Grid,
    target: Grid,
    matrix: np.ndarray,
    susceptibility: SampledDisplacement | None = None,
    linear: np.ndarray | None = None,
    eddy: EddyCurrents | None = None,
    signed: bool = False,
    scanner: ScannerWarp = NO_WARP,
    reached: torch.Tensor | None = None,
) -> torch.Tensor:
    """Resample a volume at w(x) = matrix @ x + u(x), times the Jacobian determinant of u.

    Parameters
    ----------
    volume : Tensor, (i, j, k), float32
    source, target : Grid
        Grids of the volume and of the result.
    matrix : ndarray, (4, 4)
        World RAS+ mm of the target to world of the source.
    susceptibility : SampledDisplacement, optional
        u at the points of the target.
    linear : ndarray, (3, 3), optional
        A, the linear part of the map from the undistorted reference to the source; identity by default. With u
        along p and slope g, the Jacobian relative to that of A is det(A + p g') / det(A) = 1 + g . inv(A) p.
    eddy : EddyCurrents, optional
        Of this volume alone: it is sampled at w(x) + e(w(x)) d, and the Jacobian is multiplied by that of e.
    signed : bool
        Whether intensities may be negative; otherwise negative ones, where cubic splines overshoot, become 0.
    scanner : ScannerWarp
        Gradient nonlinearity at y = matrix @ x: it displaces by d(y) and stretches the displacements u and e.
    reached : Tensor, as `target`, bool, on the CPU, optional
        Becomes the `field_of_view`.

    Returns
    -------
    Tensor, as `target`, float32
        Zero outside `source`.
    """
    coefficients = spline_coefficients(volume[None].float())
    direction = np.zeros(3)
    if susceptibility is not None:
        direction = np.linalg.solve(np.eye(3) if linear is None else linear, susceptibility.direction)
    eddy_voxels = eddy_on_grid(eddy, source)
    if volume.device.type != "cpu":
        if reached is not None:
            reached.copy_(field_of_view(source, target, matrix, susceptibility, eddy, scanner))
        warped = _warp_tensors(coefficients, source, target, matrix, susceptibility, direction, eddy_voxels, scanner)
        return warped if signed else warped.clamp(min=0)
    world_to_voxel = np.linalg.inv(source.affine)
    empty = np.zeros((3, 0, 0, 0), np.float32)
    out = np.zeros(target.shape, np.float32)
    inside = np.zeros((0, 0, 0), bool) if reached is None else reached.zero_().numpy()
    _warp_loop(
        coefficients[0].numpy(),
        (world_to_voxel @ matrix @ target.affine)[:3],
        empty if susceptibility is None else susceptibility.displacement.numpy(),
        empty if susceptibility is None else susceptibility.slope.numpy(),
        world_to_voxel[:3, :3].astype(np.float32),
        direction.astype(np.float32),
        eddy_voxels.coefficients,
        eddy_voxels.frame,
        eddy_voxels.along,
        scanner.values,
        scanner.frame,
        -float(np.finfo(np.float32).max) if signed else 0.0,
        out,
        inside,
    )
    return torch.from_numpy(out)


def field_of_view(
    source: Grid,
    target: Grid,
    matrix: np.ndarray,
    susceptibility: SampledDisplacement | None = None,
    eddy: EddyCurrents | None = None,
    scanner: ScannerWarp = NO_WARP,
) -> torch.Tensor:
    """Whether `warp_volume` with the same arguments samples each target voxel within `source`, (i, j, k) bool."""
    displacement = None if susceptibility is None else susceptibility.displacement
    points = voxel_points(target, source, matrix, displacement)
    eddy_voxels = eddy_on_grid(eddy, source)
    if len(eddy_voxels.coefficients):
        flat = points.reshape(1, 3, -1).clone()
        displace_points(eddy_voxels, flat)
        points = flat.reshape(points.shape)
    if scanner.values.size:
        points, _ = warp_points(scanner, voxel_points(target, source, matrix).to(points.device), points)
    limit = torch.tensor(source.shape, device=points.device).reshape(3, 1, 1, 1) - 0.5
    return ((points >= -0.5) & (points <= limit)).all(0)


def _warp_tensors(
    coefficients: torch.Tensor,
    source: Grid,
    target: Grid,
    matrix: np.ndarray,
    susceptibility: SampledDisplacement | None,
    direction: np.ndarray,
    eddy: EddyDisplacement,
    scanner: ScannerWarp = NO_WARP,
) -> torch.Tensor:
    """Tensor version of `_warp_loop`, for other devices."""
    displacement = None if susceptibility is None else susceptibility.displacement
    points = voxel_points(target, source, matrix, displacement).to(coefficients.device)
    jacobian: torch.Tensor | float = 1.0
    if len(eddy.coefficients):
        flat = points.reshape(1, 3, -1).clone()
        jacobian = displace_points(eddy, flat).reshape(points.shape[1:])
        points = flat.reshape(points.shape)
    if scanner.values.size:
        start = voxel_points(target, source, matrix).to(coefficients.device)
        points, density = warp_points(scanner, start, points)
        jacobian = jacobian * density
    values = sample_cubic(coefficients, points)[0] * jacobian
    if susceptibility is not None:
        along_pe = torch.as_tensor(direction, device=values.device).float()
        values = values * (1 + torch.einsum("a,aijk->ijk", along_pe, susceptibility.slope)).clamp(min=0)
    return values


@compiled(parallel=True)
def _warp_loop(
    coefficients: np.ndarray,
    affine: np.ndarray,
    displacement: np.ndarray,
    slope: np.ndarray,
    to_voxel: np.ndarray,
    direction: np.ndarray,
    eddy: np.ndarray,
    frame: np.ndarray,
    along: int,
    table: np.ndarray,
    table_frame: np.ndarray,
    least: float,
    out: np.ndarray,
    reached: np.ndarray,
) -> None:
    ni, nj, nk = coefficients.shape
    has_displacement, has_eddy, has_table = displacement.shape[1] > 0, len(eddy) > 0, table.shape[1] > 0
    rows = out.shape[0] * out.shape[1]
    for row in numba.prange(rows):
        i, j = row // out.shape[1], row % out.shape[1]
        wx, wy, wz = np.empty(4, np.float32), np.empty(4, np.float32), np.empty(4, np.float32)
        at, entry = np.empty(3, np.float32), np.empty(5, np.float32)
        base = affine[:, 0] * i + affine[:, 1] * j + affine[:, 3]
        for k in range(out.shape[2]):
            x = np.float32(base[0] + affine[0, 2] * k)
            y = np.float32(base[1] + affine[1, 2] * k)
            z = np.float32(base[2] + affine[2, 2] * k)
            x0, y0, z0 = x, y, z
            jacobian = np.float32(1)
            if has_displacement:
                u, v, w = displacement[0, i, j, k], displacement[1, i, j, k], displacement[2, i, j, k]
                x += to_voxel[0, 0] * u + to_voxel[0, 1] * v + to_voxel[0, 2] * w
                y += to_voxel[1, 0] * u + to_voxel[1, 1] * v + to_voxel[1, 2] * w
                z += to_voxel[2, 0] * u + to_voxel[2, 1] * v + to_voxel[2, 2] * w
                for a in range(3):
                    jacobian += direction[a] * slope[a, i, j, k]
            if has_eddy:
                at[0], at[1], at[2] = x, y, z
                jacobian *= displace_voxel(eddy[0], frame, along, at)
                x, y, z = at[0], at[1], at[2]
            if has_table:
                look_up(table, table_frame, x0, y0, z0, entry)
                jacobian *= entry[3]
                x = x0 + entry[4] * (x - x0) + entry[0]
                y = y0 + entry[4] * (y - y0) + entry[1]
                z = z0 + entry[4] * (z - z0) + entry[2]
            if not (x >= -0.5 and y >= -0.5 and z >= -0.5 and x <= ni - 0.5 and y <= nj - 0.5 and z <= nk - 0.5):
                continue
            if reached.size > 0:
                reached[i, j, k] = True
            i0, j0, k0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
            wx[0], wx[1], wx[2], wx[3] = cubic_weights(x - np.float32(i0))
            wy[0], wy[1], wy[2], wy[3] = cubic_weights(y - np.float32(j0))
            wz[0], wz[1], wz[2], wz[3] = cubic_weights(z - np.float32(k0))
            value = np.float32(0)
            if i0 >= 1 and j0 >= 1 and k0 >= 1 and i0 < ni - 2 and j0 < nj - 2 and k0 < nk - 2:
                for a in range(4):
                    plane = np.float32(0)
                    for b in range(4):
                        line = coefficients[i0 - 1 + a, j0 - 1 + b, k0 - 1 : k0 + 3]
                        plane += wy[b] * (line[0] * wz[0] + line[1] * wz[1] + line[2] * wz[2] + line[3] * wz[3])
                    value += wx[a] * plane
            else:
                for a in range(4):
                    p = mirrored(i0 - 1 + a, ni)
                    for b in range(4):
                        q = mirrored(j0 - 1 + b, nj)
                        for c in range(4):
                            value += wx[a] * wy[b] * wz[c] * coefficients[p, q, mirrored(k0 - 1 + c, nk)]
            out[i, j, k] = max(np.float32(least), value * max(np.float32(0), jacobian))
