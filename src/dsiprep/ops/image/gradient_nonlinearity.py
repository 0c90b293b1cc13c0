"""Gradient nonlinearity: where points of the scanner appear in images, and the gradients that they experience.

World coordinates are RAS+ mm of the scanner, with the origin at the isocentre.
"""

from __future__ import annotations

from math import factorial

import numpy as np
import torch

from dsiprep.data.gradient_coil import CoilFields, GradientCoil
from dsiprep.data.grid import Grid
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.image.displacement_field import invert
from dsiprep.ops.image.filters import gradient
from dsiprep.ops.image.interpolation import sample_linear

__all__ = ["encoding_error", "gradient_deviation", "remaining_warp"]

TO_COIL = np.array([-1.0, 1.0, -1.0])  # RAS to left, anterior, inferior
SPACING_MM = 4.0  # of tabulated warps; linear interpolation of a displacement of 5 mm is then accurate to 0.01 mm
MARGIN_MM = 24.0  # of tabulated warps around the field of view, into which the head may move
POINTS_AT_ONCE = 40_000


def encoding_error(fields: CoilFields, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Displacement d of the positions that the gradients encode, and its derivatives.

    Parameters
    ----------
    fields : GradientCoil or DisplacementField
    points : ndarray, (m, 3)
        True positions, RAS+ mm from the isocentre.

    Returns
    -------
    displacement : ndarray, (m, 3)
        Encoded minus true position, mm RAS+: a point x appears in the image at x + d(x).
    slopes : ndarray, (m, 3, 3)
        slopes[:, a, b] is the derivative of d_a along b.
    """
    points = np.asarray(points, float)
    if isinstance(fields, DisplacementField):
        return _sampled_error(fields, points)
    parts = [_harmonic_error(fields, points[i : i + POINTS_AT_ONCE]) for i in range(0, len(points), POINTS_AT_ONCE)]
    return np.concatenate([d for d, _ in parts]), np.concatenate([slopes for _, slopes in parts])


def gradient_deviation(fields: CoilFields, points: np.ndarray) -> np.ndarray:
    """L (m, 3, 3) at scanner points (m, 3), in RAS+ axes: where a gradient g is prescribed, (I + L) g acts.

    Coil a adds g_a (x_a + d_a) to the field, and the gradient is the derivative of the sum, so L is the transpose of
    the derivatives of d [1]_. The b-value is proportional to the square of the gradient.

    References
    ----------
    .. [1] Bammer et al. 2003, doi 10.1002/mrm.10545
    """
    return encoding_error(fields, points)[1].transpose(0, 2, 1)


def remaining_warp(fields: CoilFields, grid: Grid, done: str, slice_axis: int) -> DisplacementField | None:
    """Displacement that is left in images on `grid`, as a table along their axes; None if nothing is left.

    Parameters
    ----------
    fields : GradientCoil or DisplacementField
    grid : Grid
        Of the images.
    done : str
        What the scanner corrected: "none", "2d" (within slices) or "3d".
    slice_axis : int
        Voxel axis across slices.

    Returns
    -------
    DisplacementField or None
        A scanner point y appears in the images at y + u(y).

    Notes
    -----
    Correcting within slices takes each slice as flat: the image at c shows what was encoded at c + d_in(c), d_in within
    the slice. So y appears at c with c + d_in(c) = y + d(y), which differs from y across the slice, by d, and within
    it, by the change of d_in over that distance.
    """
    if done == "3d":
        return None
    table = _table_grid(grid)
    points = table.to_world(np.moveaxis(np.indices(table.shape), 0, -1).reshape(-1, 3))
    d, _ = encoding_error(fields, points)
    u = d
    if done == "2d":
        axes = [a for a in range(3) if a != slice_axis]
        in_plane = np.linalg.qr(grid.directions[:, axes])[0]
        within = in_plane @ in_plane.T
        forward = _field(d @ within, table)  # c -> c + d_in(c)
        back = invert(forward, tolerance_mm=1e-3)
        encoded = torch.as_tensor(table.to_voxels(points + d).T.copy(), dtype=torch.float32)
        edge = torch.tensor(table.shape)[:, None] - 1.0
        u = d + sample_linear(back.data, encoded.clamp(min=0).minimum(edge)).numpy().T
    return _field(u, table)


def _table_grid(grid: Grid) -> Grid:
    """A grid of about `SPACING_MM` along the axes of `grid`, `MARGIN_MM` wider on each side."""
    pad = np.ceil(MARGIN_MM / grid.voxel_sizes).astype(int)
    i, j, k = (int(n) for n in np.asarray(grid.shape) + 2 * pad)
    affine = grid.affine.copy()
    affine[:3, 3] = grid.to_world(-pad)
    return Grid((i, j, k), affine).at_spacing(SPACING_MM)


def _field(displacement: np.ndarray, grid: Grid) -> DisplacementField:
    data = np.ascontiguousarray(displacement.T.reshape(3, *grid.shape), np.float32)
    return DisplacementField(torch.from_numpy(data), grid)


def _sampled_error(field: DisplacementField, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`encoding_error` of a displacement field; outside its grid the values at its edge."""
    per_voxel = gradient(field.data.float()).reshape(9, *field.grid.shape)
    voxels = torch.as_tensor(field.grid.to_voxels(points).T.copy(), dtype=torch.float32)
    voxels = voxels.clamp(min=0).minimum(torch.tensor(field.grid.shape)[:, None] - 1.0)
    sampled = sample_linear(torch.cat([field.data.float(), per_voxel]), voxels).numpy().T.astype(float)
    slopes = sampled[:, 3:].reshape(-1, 3, 3) @ np.linalg.inv(field.grid.affine)[:3, :3]
    return sampled[:, :3], slopes


def _harmonic_error(coil: GradientCoil, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`encoding_error` of spherical harmonics."""
    x, y, z = (points * TO_COIL / coil.radius).T
    degree = coil.cosine.shape[1] - 1
    solid = _solid_harmonics(x, y, z, degree)
    displacement, slopes = np.zeros((len(points), 3)), np.zeros((len(points), 3, 3))
    for n in range(degree + 1):
        for m in range(n + 1):
            norm = np.sqrt((2 * n + 1) * factorial(n - m) / (2 * factorial(n + m))) if m else 1.0
            weights = norm * (coil.cosine[:, n, m] - 1j * coil.sine[:, n, m])
            if weights.any():
                # Re(w (C + i S)) = A C + B S
                displacement += np.multiply.outer(solid[n, m], weights).real * coil.radius
                for b, part in enumerate(_derivatives(solid, n, m)):
                    slopes[:, :, b] += np.multiply.outer(part, weights).real
    return displacement * TO_COIL, slopes * TO_COIL[:, None] * TO_COIL


def _solid_harmonics(x: np.ndarray, y: np.ndarray, z: np.ndarray, degree: int) -> dict[tuple[int, int], np.ndarray]:
    """r^n P_nm(cos theta) exp(i m phi), P_nm without the Condon-Shortley phase, for 0 <= m <= n <= degree."""
    squared = x * x + y * y + z * z
    solid: dict[tuple[int, int], np.ndarray] = {(0, 0): np.ones_like(x, dtype=complex)}
    for m in range(degree + 1):
        if m:
            solid[m, m] = (2 * m - 1) * (x + 1j * y) * solid[m - 1, m - 1]
        for n in range(m + 1, degree + 1):
            two_below = solid.get((n - 2, m), 0.0)
            solid[n, m] = ((2 * n - 1) * z * solid[n - 1, m] - (n + m - 1) * squared * two_below) / (n - m)
    return solid


def _derivatives(solid: dict[tuple[int, int], np.ndarray], n: int, m: int) -> tuple[np.ndarray, ...]:
    """Derivatives of a solid harmonic along x, y and z, themselves solid harmonics of one degree less."""
    zero = np.zeros_like(solid[0, 0])
    up = -solid.get((n - 1, m + 1), zero)  # (d/dx + i d/dy)
    lower = (n + m) * (n + m - 1) * solid.get((n - 1, m - 1), zero)
    down = lower if m else -solid.get((n - 1, 1), zero).conj()  # (d/dx - i d/dy)
    return (up + down) / 2, (up - down) / 2j, (n + m) * solid.get((n - 1, m), zero)
