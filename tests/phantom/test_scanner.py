"""Geometry, signal and noise of the simulated scanner, compared with closed-form results and SimpleITK."""

from __future__ import annotations

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from scipy import stats
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.phantom.k_space import sample
from dsiprep.phantom.scanner import Source, add_noise, eddy_basis, noise_map, phase_encoding, scan, scanner_grid
from dsiprep.phantom.session import Session
from dsiprep.phantom.signal import BUNDLE, Tissue
from helpers.grids import make_grid

CENTRE = np.array([3.0, -5.0, 8.0])


def _blob(field: float | np.ndarray = 0.0, width: float = 5.0) -> Source:
    """An asymmetric blob near the centre of `make_grid`, with an off-resonance field in Hz."""
    grid = Grid((81, 81, 81), np.array([[1.0, 0, 0, -37], [0, 1, 0, -45], [0, 0, 1, -32], [0, 0, 0, 1]]))
    x = grid.to_world(np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)) - CENTRE
    image = np.exp(-(x**2 @ [1.0, 0.7, 1.4]) / (2 * width**2)) + 0.6 * np.exp(-((x - [9, 4, -6]) ** 2).sum(-1) / 40)
    return Source(image.astype(np.float32), grid, np.zeros(grid.shape, np.float32) + np.float32(field), grid)


def _field_along(axis: np.ndarray) -> np.ndarray:
    """A smooth field on the grid of the blob, about 60 Hz at most."""
    x = _blob().image_grid.to_world(np.stack(np.meshgrid(*[np.arange(81)] * 3, indexing="ij"), -1)) - CENTRE
    return 60 * np.exp(-(x**2).sum(-1) / (2 * 15**2)) * (1 + 0.02 * x @ axis)


def test_translated_head_shifts_the_image(orientation: str) -> None:
    grid = make_grid(orientation, (24, 26, 22), (3.0, 2.5, 3.5))
    pe = PhaseEncoding(1, 1, 0.05)
    still = scan(_blob(), grid, pe, np.eye(4))
    for axis, steps in ((0, 2), (1, -3), (2, 1)):
        pose = np.eye(4)
        pose[:3, 3] = steps * grid.affine[:3, axis]
        np.testing.assert_allclose(scan(_blob(), grid, pe, pose), np.roll(still, steps, axis), atol=2e-3)


def test_rotation_agrees_with_simpleitk(orientation: str) -> None:
    source = _blob(width=8.0)
    grid = make_grid(orientation, (24, 26, 22), (3.0, 2.5, 3.5))
    rotation = Rotation.from_euler("xyz", [9, -5, 14], degrees=True).as_matrix()
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, CENTRE - rotation @ CENTRE + [2.0, -1.0, 3.0]
    image = scan(source, grid, PhaseEncoding(0, -1, 0.05), pose, oversampling=3)
    expected = _resample_with_itk(source, grid, np.linalg.inv(pose))
    assert np.abs(image - expected).max() < 0.04 * expected.max()
    assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.9995


def _resample_with_itk(source: Source, grid: Grid, to_source: np.ndarray) -> np.ndarray:
    flip = np.diag([-1.0, -1, 1, 1])
    image = SimpleITK.GetImageFromArray(source.image.transpose(2, 1, 0))
    target = SimpleITK.Image([int(n) for n in grid.shape], SimpleITK.sitkFloat32)
    for itk, world in ((image, source.image_grid), (target, grid)):
        affine = flip @ world.affine
        itk.SetOrigin(affine[:3, 3].tolist())
        itk.SetSpacing(world.voxel_sizes.tolist())
        itk.SetDirection((affine[:3, :3] / world.voxel_sizes).ravel().tolist())
    transform = SimpleITK.AffineTransform(3)
    matrix = flip @ to_source @ flip
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation(matrix[:3, 3].tolist())
    return SimpleITK.GetArrayFromImage(SimpleITK.Resample(image, target, transform)).transpose(2, 1, 0)


@pytest.mark.parametrize("direction", ["PA", "AP"])
def test_constant_field_shifts_along_the_phase_encoding_axis(orientation: str, direction: str) -> None:
    grid = make_grid(orientation, (24, 26, 22), (3.0, 3.0, 3.0))
    pe = phase_encoding(grid, direction)
    still = scan(_blob(), grid, pe, np.eye(4))
    shifted = scan(_blob(40.0), grid, pe, np.eye(4))  # 40 Hz x 0.05 s = 2 voxels
    np.testing.assert_allclose(shifted, np.roll(still, 2 * pe.polarity, pe.axis), atol=2e-3)
    shift = _centroid(shifted, grid) - _centroid(still, grid)
    assert np.sign(shift[1]) == (1 if direction == "PA" else -1)  # towards anterior or posterior
    assert np.linalg.norm(shift) == pytest.approx(6.0, abs=0.05)


def _centroid(image: np.ndarray, grid: Grid) -> np.ndarray:
    index = np.argwhere(image > 1e-3)
    return np.average(grid.to_world(index), axis=0, weights=image[tuple(index.T)])


def test_linear_field_stretches_and_scales_signal() -> None:
    grid = make_grid("RAS", (24, 60, 22), (2.0, 2.0, 2.0))
    slope = 0.25  # derivative of the displacement along y
    x = _blob().field_grid.to_world(np.stack(np.meshgrid(*[np.arange(81)] * 3, indexing="ij"), -1))
    source = _blob((x[..., 1] - CENTRE[1]) * slope / (2.0 * 0.05))
    image = scan(source, grid, PhaseEncoding(1, 1, 0.05), np.eye(4), oversampling=3)
    points = grid.to_world(np.argwhere(np.ones(grid.shape, bool)))
    points[:, 1] = CENTRE[1] + (points[:, 1] - CENTRE[1]) / (1 + slope)
    expected = map_coordinates(source.image, source.image_grid.to_voxels(points).T, order=1) / (1 + slope)
    assert np.abs(image.ravel() - expected).max() < 0.03 * expected.max()


@pytest.mark.parametrize("polarity", [1, -1])
def test_signal_is_conserved_under_distortion(polarity: int) -> None:
    grid = make_grid("oblique", (32, 40, 32), (2.5, 2.5, 2.5))
    still = scan(_blob(), grid, PhaseEncoding(1, polarity, 0.0), np.eye(4))
    source = _blob(_field_along(np.array([0, 1.0, 0.5])))
    distorted = scan(source, grid, PhaseEncoding(1, polarity, 0.05), np.eye(4))
    assert np.abs(distorted - still).max() > 0.2 * still.max()
    np.testing.assert_allclose(distorted.sum(1), still.sum(1), rtol=1e-3, atol=1e-3)


def test_field_moves_with_the_head_but_eddy_currents_do_not() -> None:
    grid = make_grid("LAS", (32, 34, 30), (2.5, 2.5, 2.5))
    pe = PhaseEncoding(1, 1, 0.05)
    source = _blob(_field_along(np.array([0.0, 1, 0])))
    pose = np.eye(4)
    pose[:3, 3] = 2 * grid.affine[:3, 0] + grid.affine[:3, 2]
    moved = scan(source, grid, pe, pose)
    np.testing.assert_allclose(moved, np.roll(scan(source, grid, pe, np.eye(4)), (2, 1), (0, 2)), atol=2e-3)
    eddy = np.zeros(9)
    eddy[1] = 40.0  # mm per 100 mm along x
    without_field = replace(source, field=np.zeros_like(source.field))
    for head_pose in (np.eye(4), pose):
        still, displaced = (scan(without_field, grid, pe, head_pose, c) for c in (None, eddy))
        x = _centroid(still, grid)[0]
        shift = (_centroid(displaced, grid) - _centroid(still, grid)) @ grid.directions[:, 1]
        assert shift == pytest.approx(0.4 * x, abs=0.05)


def test_gradients_are_fixed_in_the_scanner() -> None:
    grid = make_grid("LAS", (8, 8, 8), (4.0, 4.0, 4.0))
    source = Grid((17, 17, 17), grid.affine @ np.diag([0.5, 0.5, 0.5, 1]))
    voxels = np.flatnonzero(np.ones(source.shape))
    fibres = np.zeros((len(voxels), 2, 3), np.float32)
    fibres[..., 2] = 1  # fibres along the superior-inferior axis of the head
    weights = np.tile(np.float32([100.0, 0.0]), (len(voxels), 1))
    tissue = Tissue(source, {}, voxels, fibres, weights)
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("x", -90, degrees=True).as_matrix()  # superior becomes anterior
    pose[:3, 3] = grid.centre - pose[:3, :3] @ grid.centre
    session = _session(grid, np.stack([pose] * 3), np.array([3000.0] * 3), np.eye(3))
    for volume, cosine in ((0, 0.0), (1, 1.0), (2, 0.0)):
        expected = sum(100 * s * np.exp(-3000 * (r + (a - r) * cosine)) for s, a, r in BUNDLE)
        assert session.acquire(tissue, volume)[4, 4, 4] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(session.head_bvecs, np.eye(3) @ pose[:3, :3], atol=1e-12)


def _session(grid: Grid, poses: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray) -> Session:
    n, pe = len(bvals), PhaseEncoding(1, 1, 0.05)
    no_field = np.zeros((2, 2, 2), np.float32)
    moved, signal_fraction = np.zeros(n, bool), np.ones((n, grid.shape[2]))
    reversed_pe, eddy = replace(pe, polarity=-1), np.zeros((n, 9))
    return Session(
        grid, pe, reversed_pe, bvals, bvecs, poses, poses[:1], moved, eddy, signal_fraction, np.ones(n), no_field, grid
    )


@pytest.mark.parametrize("name", ["RAS", "LAS", "LPS", "PSR", "oblique"])
def test_scanner_grids_have_the_requested_orientation(name: str) -> None:
    grid = scanner_grid(name, 2.5, CENTRE)
    codes = "".join(nib.aff2axcodes(grid.affine))
    assert codes == ("LAS" if name == "oblique" else name)
    np.testing.assert_allclose(grid.centre, CENTRE)
    np.testing.assert_allclose(grid.voxel_sizes, 2.5)
    expected = {"RAS": "j", "LAS": "j", "LPS": "j-", "PSR": "i-", "oblique": "j"}[name]
    assert phase_encoding(grid, "PA").direction == expected
    assert phase_encoding(grid, "AP").direction == (expected[0] if expected.endswith("-") else expected + "-")


def test_eddy_basis_is_harmonic() -> None:
    rng = np.random.default_rng(0)
    centre, h = rng.normal(size=3) * 50, 1.0
    neighbours = np.concatenate([centre + h * np.eye(3), centre - h * np.eye(3)])
    laplacian = eddy_basis(neighbours).sum(0) - 6 * eddy_basis(centre[None])[0]
    np.testing.assert_allclose(laplacian, 0, atol=1e-10)


def test_noise_is_rician() -> None:
    rng = np.random.default_rng(3)
    air = add_noise(np.zeros((60, 60, 60), np.float32), 10.0, rng)
    signal = add_noise(np.full((60, 60, 60), 100, np.float32), 10.0, rng)
    assert air.mean() == pytest.approx(10 * np.sqrt(np.pi / 2), rel=0.01)
    assert np.mean(signal**2) == pytest.approx(100**2 + 2 * 10**2, rel=0.01)


def test_noise_of_several_coils_and_its_variation_in_space() -> None:
    """Magnitudes of air follow SciPy's chi distribution of two degrees of freedom per coil."""
    air = add_noise(np.zeros((50, 50, 50), np.float32), 10.0, np.random.default_rng(1), coils=4)
    assert float(air.mean()) == pytest.approx(10 * stats.chi.mean(8), rel=0.01)
    assert float(air.std()) == pytest.approx(10 * stats.chi.std(8), rel=0.01)
    grid = make_grid("LAS", (21, 21, 21), (10.0, 10.0, 10.0))
    level = noise_map(grid, grid.centre, 5.0, 0.5)
    assert float(level[10, 10, 10]) == pytest.approx(7.5)
    assert float(level[0, 0, 0]) == pytest.approx(5.0, rel=0.01)


def test_k_space_holds_what_was_sampled() -> None:
    """Full sampling leaves smooth objects as they are; partial sampling leaves one side of k-space empty."""
    x, y = (np.linspace(-1, 1, 3 * n) for n in (20, 24))
    smooth = np.exp(-(x[:, None] ** 2) / 0.1 - y**2 / 0.15)[..., None] * np.ones(2)
    still, rng = np.zeros_like(smooth), np.random.default_rng(0)
    full = sample(smooth, still, 1, 1.0, 0.0, rng)
    np.testing.assert_allclose(full.real, smooth[1::3, 1::3], atol=2e-3)  # the middle of three fine voxels
    assert np.abs(full.imag).max() < 1e-3
    noisy = sample(smooth, still, 1, 6 / 8, 5.0, rng)
    lines = np.abs(np.fft.fft(noisy, axis=1)).max((0, 2))[np.argsort(np.fft.fftfreq(24))]
    assert np.array_equal(lines > 1e-3, np.fft.fftshift(np.fft.fftfreq(24)) >= -0.25)
    noise = sample(0 * smooth, still, 0, 1.0, 5.0, rng)
    assert abs(noise.std() / (5 * 2**0.5) - 1) < 0.1
