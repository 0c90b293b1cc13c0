"""Smooth scalar fields as cubic B-splines on a coarse grid, with a prior of given size and correlation length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from dsiprep.data.grid import Grid

__all__ = ["SplineBasis", "SplineKnots", "prior_precision", "spline_basis", "spline_knots"]

MARGIN = 2  # knots beyond the outermost points


@dataclass(frozen=True, eq=False)
class SplineKnots:
    """Knots along the axes of a grid.

    Attributes
    ----------
    origin : ndarray, (3,)
        World position of the first knot, mm.
    axes : ndarray, (3, 3)
        Unit vectors of the axes in world RAS+, as columns.
    spacing : float
        mm.
    shape : (int, int, int)
    """

    origin: np.ndarray
    axes: np.ndarray
    spacing: float
    shape: tuple[int, int, int]

    @property
    def count(self) -> int:
        """Coefficients of one field."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class SplineBasis:
    """Values and slopes of B-splines at the voxels of a grid along the axes of the knots.

    Attributes
    ----------
    knots : SplineKnots
    weights, slopes : tuple of ndarray, (voxels, knots)
        Of each axis; slopes are per mm.
    """

    knots: SplineKnots
    weights: tuple[np.ndarray, ...]
    slopes: tuple[np.ndarray, ...]

    def evaluate(self, coefficients: np.ndarray, derivative: int | None = None) -> np.ndarray:
        """Fields of coefficients (f, count), or their derivatives per mm along an axis, (f, i, j, k)."""
        a, b, c = self._factors(derivative)
        lattice = coefficients.reshape(-1, *self.knots.shape)
        return np.einsum("ip,fpjk->fijk", a, np.einsum("jq,fpqk->fpjk", b, lattice @ c.T, optimize=True), optimize=True)

    def adjoint(self, images: np.ndarray, derivative: int | None = None) -> np.ndarray:
        """The transpose of `evaluate`: (f, i, j, k) to (f, count)."""
        a, b, c = self._factors(derivative)
        part = np.einsum("jq,fpjk->fpqk", b, np.einsum("ip,fijk->fpjk", a, images, optimize=True), optimize=True) @ c
        return part.reshape(len(images), -1)

    def _factors(self, derivative: int | None) -> tuple[np.ndarray, ...]:
        return tuple(self.slopes[axis] if axis == derivative else self.weights[axis] for axis in range(3))


def spline_knots(grid: Grid, points: np.ndarray, spacing: float) -> SplineKnots:
    """Knots along the axes of `grid` that cover world points (m, 3) mm, `spacing` mm apart."""
    along = points @ grid.directions
    first, last = along.min(axis=0), along.max(axis=0)
    steps = np.ceil((last - first) / spacing).astype(int)
    start = (first + last - steps * spacing) / 2 - MARGIN * spacing
    i, j, k = (int(n) for n in steps + 1 + 2 * MARGIN)
    return SplineKnots(grid.directions @ start, grid.directions, spacing, (i, j, k))


def spline_basis(knots: SplineKnots, grid: Grid) -> SplineBasis:
    """Evaluate the B-splines of `knots` at the voxels of a grid with the same axes."""
    first = (grid.affine[:3, 3] - knots.origin) @ knots.axes / knots.spacing
    weights, slopes = [], []
    for axis in range(3):
        step = grid.voxel_sizes[axis] / knots.spacing
        distance = (first[axis] + step * np.arange(grid.shape[axis]))[:, None] - np.arange(knots.shape[axis])
        weights.append(_cubic(distance))
        slopes.append(_cubic_slope(distance) / knots.spacing)
    return SplineBasis(knots, tuple(weights), tuple(slopes))


def prior_precision(knots: SplineKnots, size: float, length: float) -> sparse.csr_matrix:
    """Inverse covariance of the coefficients of a field with a given standard deviation and correlation length.

    The covariance between two points is size² exp(-distance / length), a Matérn covariance, whose inverse is the
    differential operator (1 - length² Laplacian)² / (8 pi length³ size²); the Laplacian is that of differences between
    knots, and the field is zero beyond them.

    References
    ----------
    Lindgren et al. 2011, doi 10.1111/j.1467-9868.2011.00777.x.
    """
    ratio = (length / knots.spacing) ** 2
    lines = [sparse.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(n, n)) for n in knots.shape]
    one = [sparse.identity(n) for n in knots.shape]
    total = sparse.identity(knots.count)
    for axis in range(3):
        a, b, c = (lines[axis] if axis == other else one[other] for other in range(3))
        total = total + ratio * sparse.kron(sparse.kron(a, b), c)
    return (total @ total).tocsr() * (knots.spacing**3 / (8 * np.pi * length**3 * size**2))


def _cubic(x: np.ndarray) -> np.ndarray:
    near, far = 2 / 3 - x**2 + np.abs(x) ** 3 / 2, (2 - np.abs(x)).clip(min=0) ** 3 / 6
    return np.where(np.abs(x) < 1, near, far)


def _cubic_slope(x: np.ndarray) -> np.ndarray:
    near, far = -2 * x + 1.5 * x * np.abs(x), -np.sign(x) * (2 - np.abs(x)).clip(min=0) ** 2 / 2
    return np.where(np.abs(x) < 1, near, far)
