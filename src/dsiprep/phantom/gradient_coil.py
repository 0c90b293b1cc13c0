"""Gradient coils of the phantom's scanner: their coefficients, and the field that they make.

Fields are evaluated in spherical coordinates and differentiated numerically, independently of the code that corrects
their nonlinearity.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.special import lpmv

from dsiprep.data.grid import Grid

__all__ = ["Coil", "coefficient_text", "make_coil"]

RADIUS = 250.0  # mm
# Coil, A (cosine) or B (sine), degree, order, coefficient: those of a whole-body set, and smaller ones that break its
# symmetry, so that mistaken axes or signs show
SHAPE = (
    ("x", "A", 3, 1, -0.100), ("x", "A", 5, 1, 0.030), ("x", "A", 3, 3, 0.012), ("x", "A", 2, 0, 0.006),
    ("y", "B", 3, 1, -0.110), ("y", "B", 5, 1, 0.033), ("y", "B", 3, 3, -0.010), ("y", "A", 2, 1, 0.005),
    ("z", "A", 3, 0, -0.080), ("z", "A", 5, 0, 0.025), ("z", "A", 4, 0, 0.006), ("z", "B", 2, 1, -0.005),
)  # fmt: skip
HALF_EXTENT = 168.0  # mm, of the tables around the isocentre
SPACING = 3.0  # mm
STEP = 0.5  # mm, of numerical derivatives
INVERSIONS = 30


@dataclass(frozen=True, eq=False)
class Coil:
    """Gradient nonlinearity on a grid in the scanner, RAS+ mm from the isocentre.

    Attributes
    ----------
    scale : float
        Factor of the coefficients in `SHAPE`.
    grid : Grid
    displacement : ndarray, (3, i, j, k)
        A point x appears at x + displacement(x), mm.
    inverse : ndarray, (4, i, j, k)
        What appears at x is at x + inverse[:3](x); inverse[3] is the Jacobian determinant of that map.
    deviation : ndarray, (9, i, j, k)
        L by rows: where a gradient g is prescribed, (I + L) g acts.
    """

    scale: float
    grid: Grid
    displacement: np.ndarray
    inverse: np.ndarray
    deviation: np.ndarray

    def gradients(self, gradient: np.ndarray, pose: np.ndarray, grid: Grid) -> np.ndarray:
        """The gradient (3, i, j, k) that acts on the points of a grid in the head, in the axes of the head.

        Parameters
        ----------
        gradient : ndarray, (3,)
            As prescribed, in the scanner.
        pose : ndarray, (4, 4)
            From head points to scanner points.
        grid : Grid
        """
        nine = self.deviation.reshape(3, 3, *self.grid.shape)
        scanner = gradient[:, None, None, None] + np.einsum("abijk,b->aijk", nine, gradient)
        head = np.einsum("ba,bijk->aijk", pose[:3, :3], scanner).astype(np.float32)
        to_table = np.linalg.inv(self.grid.affine) @ pose @ grid.affine
        out = np.empty((3, *grid.shape), np.float32)
        axes = [np.arange(n) for n in grid.shape]
        for i in range(grid.shape[0]):
            voxels = np.stack(np.meshgrid([i], axes[1], axes[2], indexing="ij")).reshape(3, -1)
            at = to_table[:3, :3] @ voxels + to_table[:3, 3:]
            for a in range(3):
                out[a, i] = map_coordinates(head[a], at, order=1, mode="nearest").reshape(grid.shape[1:])
        return out

    def distort(self, image: np.ndarray, grid: Grid) -> np.ndarray:
        """An undistorted image (i, j, k) in the scanner as these gradients encode it, float32."""
        to_table = np.linalg.inv(self.grid.affine) @ grid.affine
        to_voxel = np.linalg.inv(grid.affine)[:3, :3]
        out = np.empty(grid.shape, np.float32)
        axes = [np.arange(n) for n in grid.shape]
        for i in range(grid.shape[0]):
            voxels = np.stack(np.meshgrid([i], axes[1], axes[2], indexing="ij")).reshape(3, -1)
            at = to_table[:3, :3] @ voxels + to_table[:3, 3:]
            *shift, density = (map_coordinates(part, at, order=1, mode="nearest") for part in self.inverse)
            values = map_coordinates(image, voxels + to_voxel @ np.stack(shift), order=3, mode="nearest")
            out[i] = (values * density).reshape(grid.shape[1:])
        return out


def make_coil(points: np.ndarray, largest_mm: float) -> Coil:
    """Coils that displace the brain, given by scanner points (n, 3), by at most `largest_mm`."""
    scale = largest_mm / float(np.linalg.norm(_displacement(points), axis=1).max())
    size = int(2 * HALF_EXTENT / SPACING) + 1
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = -HALF_EXTENT
    grid = Grid((size, size, size), affine)
    at = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1).reshape(-1, 3))
    d, slopes = scale * _displacement(at), scale * _slopes(at)
    inverse, density = _invert(d.T.reshape(3, *grid.shape), slopes.reshape(*grid.shape, 3, 3))
    deviation = slopes.transpose(0, 2, 1).reshape(-1, 9).T.reshape(9, *grid.shape)
    return Coil(
        scale,
        grid,
        d.T.reshape(3, *grid.shape).astype(np.float32),
        np.concatenate([inverse, density[None]]).astype(np.float32),
        deviation.astype(np.float32),
    )


def coefficient_text(scale: float) -> str:
    """The coefficients in the format of Siemens' files."""
    lines = [
        "# Gradient coils of a simulated scanner",
        f" {RADIUS / 1000:.4f} m = R0, lnorm = 4, A(1,0) = B(1,1) = A(1,1) = 0;",
        " NO.  TYPE        SPECTRUM      AXIS",
    ]
    for number, (axis, kind, n, m, value) in enumerate(SHAPE, 1):
        lines.append(f" {number:3d}  {kind}({n:2d},{m:2d})  {scale * value:14.10f}  {axis}")
    return "\n".join(lines) + "\n"


def _displacement(points: np.ndarray) -> np.ndarray:
    """Displacement (n, 3) in mm RAS+ at scanner points (n, 3), for a scale of 1."""
    x, y, z = (points * [-1, 1, -1]).T  # left, anterior, inferior
    r = np.sqrt(x * x + y * y + z * z)
    cosine, phi = np.where(r > 0, z / np.maximum(r, 1e-9), 1.0), np.arctan2(y, x)
    out = np.zeros_like(points, float)
    for axis, kind, n, m, value in SHAPE:
        legendre = lpmv(m, n, cosine)
        if m:
            legendre = legendre * (-1) ** m * np.sqrt((2 * n + 1) * factorial(n - m) / (2 * factorial(n + m)))
        wave = np.cos(m * phi) if kind == "A" else np.sin(m * phi)
        out[:, "xyz".index(axis)] += RADIUS * value * (r / RADIUS) ** n * legendre * wave
    return out * [-1, 1, -1]


def _slopes(points: np.ndarray) -> np.ndarray:
    """Derivatives (n, 3, 3) of the displacement, by component and axis."""
    steps = STEP * np.eye(3)
    return np.stack([(_displacement(points + h) - _displacement(points - h)) / (2 * STEP) for h in steps], -1)


def _invert(d: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse displacement (3, i, j, k) by fixed-point iteration, and its Jacobian determinant, on the same grid."""
    index = np.indices(d.shape[1:]).astype(float)
    inverse = -d.copy()
    for _ in range(INVERSIONS):
        at = index + inverse / SPACING
        inverse = -np.stack([map_coordinates(part, at, order=1, mode="nearest") for part in d])
    forward = np.linalg.det(np.eye(3) + slopes)
    density = 1 / map_coordinates(forward, index + inverse / SPACING, order=1, mode="nearest")
    return inverse, density
