"""Cubic B-spline weights and mirrored indices: Numba and tensor versions compared with SciPy and NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from dsiprep.ops.image.bspline import (
    cubic_slopes,
    cubic_slopes_of,
    cubic_weights,
    cubic_weights_of,
    mirror_indices,
    mirrored,
)

TOLERANCE = {"float32": 3e-7, "float64": 1e-15}


@numba.njit
def weights_loop(f: np.ndarray) -> np.ndarray:
    """`cubic_weights` of every element, (4, n)."""
    out = np.empty((4, len(f)), f.dtype)
    for i in range(len(f)):
        out[0, i], out[1, i], out[2, i], out[3, i] = cubic_weights(f[i])
    return out


@numba.njit
def slopes_loop(f: np.ndarray) -> np.ndarray:
    """`cubic_slopes` of every element, (4, n)."""
    out = np.empty((4, len(f)), f.dtype)
    for i in range(len(f)):
        out[0, i], out[1, i], out[2, i], out[3, i] = cubic_slopes(f[i])
    return out


@numba.njit
def mirrored_loop(index: np.ndarray, size: int) -> np.ndarray:
    """`mirrored` of every element."""
    out = np.empty_like(index)
    for i in range(len(index)):
        out[i] = mirrored(index[i], size)
    return out


@pytest.fixture(params=["float32", "float64"])
def fractions(request: pytest.FixtureRequest) -> np.ndarray:
    """Fractional positions in [0, 1), the lower limit included."""
    return np.append(0.0, np.random.default_rng(0).uniform(0, 1, 200)).astype(request.param)


def scipy_basis(f: np.ndarray, derivative: int) -> np.ndarray:
    """SciPy's cubic B-spline, or its derivative, at the distances to the four nearest coefficients, (4, n)."""
    basis = BSpline.basis_element(np.arange(-2.0, 3.0), extrapolate=False).derivative(derivative)
    distances = f.astype(float) - np.arange(-1, 3)[:, None]
    return np.nan_to_num(basis(distances))  # NaN outside the support


@pytest.mark.parametrize(
    ("loop", "tensor_version", "derivative"),
    [(weights_loop, cubic_weights_of, 0), (slopes_loop, cubic_slopes_of, 1)],
    ids=["weights", "slopes"],
)
def test_weights_and_slopes_match_scipy(
    fractions: np.ndarray,
    loop: Callable[[np.ndarray], np.ndarray],
    tensor_version: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
    derivative: int,
) -> None:
    by_loop = loop(fractions)
    by_tensors = torch.stack(tensor_version(torch.from_numpy(fractions))).numpy()
    assert by_loop.dtype == by_tensors.dtype == fractions.dtype
    tolerance = TOLERANCE[str(fractions.dtype)]
    np.testing.assert_allclose(by_loop, by_tensors, rtol=0, atol=tolerance)
    np.testing.assert_allclose(by_loop, scipy_basis(fractions, derivative), rtol=0, atol=tolerance)


def test_weights_sum_to_one_and_slopes_to_zero(fractions: np.ndarray) -> None:
    tolerance = 2 * TOLERANCE[str(fractions.dtype)]
    np.testing.assert_allclose(weights_loop(fractions).sum(0), 1, rtol=0, atol=tolerance)
    np.testing.assert_allclose(slopes_loop(fractions).sum(0), 0, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_mirrored_indices_match_numpy_reflection(size: int) -> None:
    """Up to size - 1 voxels beyond either end; a single voxel repeats without limit."""
    width = size - 1 if size > 1 else 2
    index = np.arange(-width, size + width)
    expected = np.pad(np.arange(size), width, mode="reflect")
    np.testing.assert_array_equal(mirrored_loop(index, size), expected)
    np.testing.assert_array_equal(mirror_indices(torch.from_numpy(index), size).numpy(), expected)


def test_mirror_indices_with_one_size_per_axis() -> None:
    index = torch.tensor([[-1, 0, 4], [-1, 2, 3], [-2, 0, 1]])
    sizes = torch.tensor([4, 3, 1])[:, None]
    expected = torch.tensor([[1, 0, 2], [1, 2, 1], [0, 0, 0]])
    assert torch.equal(mirror_indices(index, sizes), expected)
