"""Smooth fields against SciPy's B-splines, and the prior against the covariance that it stands for."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import BSpline
from scipy.sparse.linalg import cg

from dsiprep.ops.image.smooth_field import prior_precision, spline_basis, spline_knots
from helpers.grids import make_grid
from helpers.identity_results import voxel_points


def test_values_slopes_and_adjoint(orientation: str, rng: np.random.Generator) -> None:
    grid = make_grid(orientation, (9, 11, 8), (4.0, 3.5, 5.0))
    points = voxel_points(grid)
    knots = spline_knots(grid, points.reshape(-1, 3), 12.0)
    basis = spline_basis(knots, grid)
    coefficients = rng.normal(size=(2, knots.count))
    t = (points - knots.origin) @ knots.axes / knots.spacing
    kernel = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    for derivative in (None, 0, 2):
        weights = []
        for axis in range(3):
            distance = t[..., axis, None] - np.arange(knots.shape[axis])
            spline, unit = (kernel.derivative(), knots.spacing) if axis == derivative else (kernel, 1)
            weights.append(np.nan_to_num(spline(distance)) / unit)
        expected = np.einsum(
            "ijkp,ijkq,ijkr,fpqr->fijk", *weights, coefficients.reshape(2, *knots.shape), optimize=True
        )
        found = basis.evaluate(coefficients, derivative)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        images = rng.normal(size=found.shape)
        assert np.isclose((found * images).sum(), (coefficients * basis.adjoint(images, derivative)).sum())


def test_prior_has_the_stated_size_and_length() -> None:
    grid = make_grid("RAS", (29, 29, 29), (5.0, 5.0, 5.0))
    knots = spline_knots(grid, voxel_points(grid).reshape(-1, 3), 5.0)
    precision, middle = prior_precision(knots, 0.2, 15.0), np.array(knots.shape) // 2
    pulse = np.zeros(knots.shape)
    pulse[tuple(middle)] = 1
    solution, _ = cg(precision, pulse.ravel(), rtol=1e-6, maxiter=2000)
    line = solution.reshape(knots.shape)[middle[0] :, middle[1], middle[2]][:7]
    np.testing.assert_allclose(line, 0.2**2 * np.exp(-5.0 * np.arange(7) / 15), rtol=0.1)
