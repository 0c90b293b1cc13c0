"""Gradient nonlinearity against gradunwarp, trxscan and FSL's formula, and its warp in both implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dsiprep.data.gradient_coil import GradientCoil
from dsiprep.data.transform import EddyCurrents
from dsiprep.io.gradient_coefficients import read_coil_fields
from dsiprep.ops.image.displacement_field import jacobian_determinant
from dsiprep.ops.image.eddy_displacement import eddy_on_grid
from dsiprep.ops.image.epi_resampling import SampledDisplacement, _warp_tensors, field_of_view, warp_volume
from dsiprep.ops.image.gradient_nonlinearity import encoding_error, gradient_deviation, remaining_warp
from dsiprep.ops.image.interpolation import spline_coefficients
from dsiprep.ops.image.scanner_warp import scanner_warp
from helpers.grids import make_grid

PHYSICAL = [("x", "A"), ("y", "B"), ("z", "A")]  # the terms of each coil that trxscan evaluates


def random() -> np.random.Generator:
    return np.random.default_rng(5)


def coefficient_file(path: Path, kinds: list[tuple[str, str]], degree: int, size: float) -> Path:
    """A file in Siemens' format with random coefficients of all degrees from 2."""
    rng = random()
    lines = [" 0.2500 m = R0, lnorm = 4, A(1,0) = B(1,1) = A(1,1) = 0;"]
    for axis, kind in kinds:
        for n in range(2, degree + 1):
            for m in range(1 if kind == "B" else 0, n + 1):
                lines.append(f" {len(lines):3d}  {kind}({n:2d},{m:2d})   {rng.normal() * size:.7f}  {axis}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def coil(tmp_path: Path) -> GradientCoil:
    every = [(axis, kind) for axis in "xyz" for kind in "AB"]
    fields = read_coil_fields(coefficient_file(tmp_path / "coil.grad", every, 6, 0.06))
    assert isinstance(fields, GradientCoil)
    return fields


def test_displacement_is_that_of_gradunwarp(tmp_path: Path) -> None:
    coeffs = pytest.importorskip("gradunwarp.core.coeffs")
    unwarp_resample = pytest.importorskip("gradunwarp.core.unwarp_resample")
    every = [(axis, kind) for axis in "xyz" for kind in "AB"]
    path = coefficient_file(tmp_path / "coil.grad", every, 7, 0.02)
    points = random().uniform(-120, 120, (500, 3))
    found, _ = encoding_error(read_coil_fields(path), points)

    lai = (points * [-1, 1, -1]).T  # its unwarping samples images at x + this displacement
    theirs = coeffs.get_coefficients("siemens", str(path))
    expected, _ = unwarp_resample.eval_spherical_harmonics(theirs, "siemens", unwarp_resample.CV(*lai))
    assert np.abs(found).max() > 5
    np.testing.assert_allclose(found, np.stack(expected, -1) * [-1, 1, -1], atol=2e-4)  # it shifts x by 0.0001 mm


def test_displacement_and_gradients_are_those_of_trxscan(tmp_path: Path, orientation: str) -> None:
    core = pytest.importorskip("trxscan")._core
    path, grid = (
        coefficient_file(tmp_path / "coil.grad", PHYSICAL, 5, 0.1),
        make_grid(orientation, (9, 8, 7), (9, 8, 8)),
    )
    fields = read_coil_fields(path)
    points = grid.to_world(np.moveaxis(np.indices(grid.shape), 0, -1).reshape(-1, 3))
    theirs = core.GnlField.on_grid(core.GradCoef.parse_siemens(path.read_text()), grid.shape, grid.affine)

    def image(flat: object, channels: int) -> np.ndarray:
        last = np.asarray(flat).reshape(*grid.shape[::-1], channels)  # the first voxel axis runs fastest
        return last.transpose(2, 1, 0, 3).reshape(-1, channels)

    displacement, _ = encoding_error(fields, points)
    np.testing.assert_allclose(image(theirs.disp(), 3), displacement, atol=1e-5)
    axes = grid.directions
    columns = (axes.T @ gradient_deviation(fields, points) @ axes).transpose(0, 2, 1).reshape(-1, 9)
    assert np.abs(columns).max() > 0.02
    identity = np.eye(3).ravel()  # which it includes
    np.testing.assert_allclose(image(theirs.graddev(grid.affine), 9) - identity, columns, atol=2e-4)


def test_slopes_are_derivatives(coil: GradientCoil) -> None:
    points, step = random().uniform(-100, 100, (200, 3)), 1e-3
    _, slopes = encoding_error(coil, points)
    columns = [
        (encoding_error(coil, points + step * e)[0] - encoding_error(coil, points - step * e)[0]) / (2 * step)
        for e in np.eye(3)
    ]
    np.testing.assert_allclose(slopes, np.stack(columns, -1), atol=1e-8)


def test_acting_gradient_is_the_derivative_of_the_field(coil: GradientCoil) -> None:
    """The field of all coils is the sum of their gradients times the positions that they encode."""
    points, g, step = random().uniform(-100, 100, (50, 3)), np.array([0.6, -0.7, 0.4]), 1e-3

    def field(at: np.ndarray) -> np.ndarray:
        return (at + encoding_error(coil, at)[0]) @ g

    acting = np.stack([(field(points + step * e) - field(points - step * e)) / (2 * step) for e in np.eye(3)], -1)
    np.testing.assert_allclose((np.eye(3) + gradient_deviation(coil, points)) @ g, acting, atol=1e-7)


def test_table_and_displacement_field_hold_the_warp(coil: GradientCoil, orientation: str) -> None:
    """A table of the displacement, sampled between its points, and read as a displacement field."""
    grid = make_grid(orientation, (22, 24, 20), (3.0, 3.2, 4.0))
    field = remaining_warp(coil, grid, "none", 2)
    assert field is not None
    points = grid.to_world(random().uniform(-2, 22, (300, 3)))
    exact, slopes = encoding_error(coil, points)
    sampled, sampled_slopes = encoding_error(field, points)
    assert np.abs(exact).max() > 1
    np.testing.assert_allclose(sampled, exact, atol=0.02)
    np.testing.assert_allclose(sampled_slopes, slopes, atol=2e-3)
    inner = (slice(2, -2),) * 3
    at_table = field.grid.to_world(np.moveaxis(np.indices(field.grid.shape), 0, -1))[inner].reshape(-1, 3)
    exact_density = np.linalg.det(np.eye(3) + encoding_error(coil, at_table)[1])
    np.testing.assert_allclose(jacobian_determinant(field)[inner].reshape(-1), exact_density, atol=1e-3)


def test_nothing_is_left_after_correction_in_three_dimensions(coil: GradientCoil) -> None:
    assert remaining_warp(coil, make_grid("LAS", (8, 8, 8), (3, 3, 3)), "3d", 2) is None


@pytest.mark.parametrize("slice_axis", [2, 0])
def test_correction_within_slices_leaves_the_rest(coil: GradientCoil, orientation: str, slice_axis: int) -> None:
    """Simulate the scanner: at c its image shows what was encoded at c + d_in(c)."""
    grid = make_grid(orientation, (22, 24, 20), (3.0, 3.2, 4.0))
    field = remaining_warp(coil, grid, "2d", slice_axis)
    assert field is not None
    points = grid.to_world(random().uniform(2, 18, (300, 3)))
    at, _ = encoding_error(field, points)
    c, across = points + at, grid.directions[:, slice_axis]
    d_there = encoding_error(coil, c)[0]
    encoded = c + d_there - (d_there @ across)[:, None] * across
    np.testing.assert_allclose(encoded, points + encoding_error(coil, points)[0], atol=0.03)
    assert np.abs(at @ across).max() > 0.5


def test_loop_and_tensors_agree_and_follow_the_equation(coil: GradientCoil) -> None:
    """The volume is sampled at y + d(y) + (1 + d_pp)(u + e) with y = A x, times det(I + dd/dy)."""
    source, target = make_grid("oblique", (15, 16, 14), (4, 4, 4)), make_grid("LPS", (10, 11, 12), (4, 4, 4))
    tilt = np.eye(4)
    tilt[:3, 3] = [1.0, -2.0, 0.5]
    axis = source.directions[:, 1]
    length = torch.from_numpy(random().normal(0, 3, target.shape).astype(np.float32))
    shift = torch.einsum("a,ijk->aijk", torch.as_tensor(axis).float(), length)
    u = SampledDisplacement(shift, torch.zeros_like(shift), axis)
    eddy = EddyCurrents(random().normal(0, 1, (1, 10)), source.directions, source.centre, 1)
    warp = scanner_warp(remaining_warp(coil, source, "none", 2), source, 1)
    indices = np.moveaxis(np.indices(source.shape), 0, -1)
    world = source.to_world(indices)
    volume = torch.from_numpy((500 + world @ [1.0, 2.0, -1.5]).astype(np.float32))  # linear: interpolated exactly
    reached = torch.ones(target.shape, dtype=torch.bool)
    loop = warp_volume(volume, source, target, tilt, u, None, eddy, signed=True, scanner=warp, reached=reached)
    assert torch.equal(reached, field_of_view(source, target, tilt, u, eddy, warp))
    assert 0 < int((~reached).sum()) < reached.numel()
    tensors = _warp_tensors(
        spline_coefficients(volume[None]), source, target, tilt, u, axis, eddy_on_grid(eddy, source), warp
    )
    torch.testing.assert_close(loop, tensors, rtol=1e-4, atol=0.05)

    y = target.to_world(np.moveaxis(np.indices(target.shape), 0, -1)).reshape(-1, 3) + tilt[:3, 3]
    d, slopes = encoding_error(coil, y)
    displaced = y + shift.numpy().reshape(3, -1).T
    along = (displaced + eddy.displacement(0, displaced) - y) @ axis
    stretch = 1 + np.einsum("a,nab,b->n", axis, slopes, axis)
    z = y + d + (stretch * along)[:, None] * axis
    rise = (eddy.displacement(0, displaced + 0.01 * axis) - eddy.displacement(0, displaced - 0.01 * axis)) @ axis / 0.02
    expected = (500 + z @ [1.0, 2.0, -1.5]) * np.linalg.det(np.eye(3) + slopes) * np.maximum(1 + rise, 0)
    voxels = source.to_voxels(z)
    inside = ((voxels > 3) & (voxels < np.array(source.shape) - 4)).all(1)
    assert inside.sum() > 100
    np.testing.assert_allclose(loop.numpy().reshape(-1)[inside], expected[inside], rtol=2e-3)
