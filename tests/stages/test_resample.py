"""Resampling compared with SimpleITK and known truth, and b-vector rotation with known fibres."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from scipy.ndimage import gaussian_filter, map_coordinates, spline_filter
from scipy.spatial.transform import Rotation

from dsiprep import align_series
from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Distortion
from dsiprep.data.transform import DisplacementField, EddyCurrents
from dsiprep.errors import SettingsError
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.eddy_displacement import eddy_on_grid
from dsiprep.ops.image.epi_resampling import SampledDisplacement, _warp_tensors, sample_displacement, warp_volume
from dsiprep.ops.image.interpolation import _spline_coefficients_tensors, spline_coefficients
from dsiprep.ops.qspace.tensor import main_directions
from dsiprep.settings import ResampleSettings
from dsiprep.stages import joined_series
from dsiprep.stages import resample as stage
from dsiprep.stages.quality import _uncovered_brain
from dsiprep.stages.resample import resample
from helpers.grids import make_grid
from helpers.identity_results import head_intensity, make_anatomy, make_coregistration, make_motion, voxel_points

LPS = np.diag([-1.0, -1, 1])
TILT = rigid_matrix(np.array([0.12, -0.08, 0.2, 3.0, -2, 1.5]))


def to_sitk(data: np.ndarray, grid: Grid, vector: bool = False) -> sitk.Image:
    order = (2, 1, 0, 3) if vector else (2, 1, 0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.transpose(order)), isVector=vector)
    image.SetSpacing(grid.voxel_sizes.tolist())
    image.SetOrigin((LPS @ grid.affine[:3, 3]).tolist())
    image.SetDirection((LPS @ grid.directions).ravel().tolist())
    return image


def smooth(shape: tuple[int, ...], seed: int, width: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return gaussian_filter(noise, (0,) * (len(shape) - 3) + (width,) * 3)


def phase_encoding_field(grid: Grid, axis: int, size: float) -> DisplacementField:
    """A smooth displacement along one axis of the grid, at most `size` mm."""
    shift = smooth(grid.shape, 5, 4.0)
    shift *= size / np.abs(shift).max()
    data = grid.directions[:, axis][:, None, None, None] * shift
    return DisplacementField(torch.from_numpy(data.astype(np.float32)), grid)


def test_warp_matches_simpleitk(orientation: str) -> None:
    source = make_grid(orientation, (22, 26, 18), (2.0, 1.8, 3.1))
    target = make_grid("LPS", (20, 24, 22), (1.9, 1.9, 1.9))
    volume = 400 + 400 * smooth(source.shape, 1, 1.2).astype(np.float32)
    shift = (6 * smooth((3, *target.shape), 2, 3.0)).astype(np.float32)
    sampled = SampledDisplacement(torch.from_numpy(shift), torch.zeros(3, *target.shape), np.array([0.0, 1, 0]))
    found = warp_volume(torch.from_numpy(volume), source, target, TILT, sampled).numpy()

    points = voxel_points(target)
    moved = points @ TILT[:3, :3].T + TILT[:3, 3] + shift.transpose(1, 2, 3, 0)
    field = to_sitk((moved - points) @ LPS, target, vector=True)
    transform = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    image = to_sitk(volume, source)
    reference = sitk.Resample(image, to_sitk(found, target), transform, sitk.sitkBSpline3, 0.0, sitk.sitkFloat32)
    expected = sitk.GetArrayFromImage(reference).transpose(2, 1, 0)
    voxels = source.to_voxels(moved)
    inside = ((voxels > 2) & (voxels < np.array(source.shape) - 3)).all(-1)
    assert inside.sum() > 1000
    assert volume.min() > 0
    assert np.abs(found - expected)[inside].max() < 0.005 * np.ptp(volume)


def test_loop_and_tensor_implementations_agree() -> None:
    source, target = make_grid("oblique", (11, 13, 9), (2, 2, 2.5)), make_grid("LPS", (14, 12, 13), (2, 2, 2))
    volume = torch.from_numpy(np.random.default_rng(0).normal(50, 30, source.shape).astype(np.float32))
    sampled = sample_displacement(phase_encoding_field(source, 1, 3.0), target, np.eye(4))
    eddy = EddyCurrents(np.random.default_rng(1).normal(0, 2, (1, 10)), source.directions, source.centre, 1)
    loop = warp_volume(volume, source, target, TILT, sampled, TILT[:3, :3], eddy)
    signed = warp_volume(volume, source, target, TILT, sampled, TILT[:3, :3], eddy, signed=True)
    coefficients = spline_coefficients(volume[None])
    direction = np.linalg.solve(TILT[:3, :3], sampled.direction)
    torch.testing.assert_close(
        _warp_tensors(coefficients, source, target, TILT, sampled, direction, eddy_on_grid(eddy, source)),
        signed,
        rtol=1e-4,
        atol=0.03,
    )
    torch.testing.assert_close(_spline_coefficients_tensors(volume[None]), coefficients, rtol=1e-4, atol=1e-2)
    assert float(signed.min()) < -10  # overshoot, which is clipped unless intensities may be negative
    assert torch.equal(loop, signed.clamp(min=0))


def test_jacobian_matches_finite_differences(orientation: str) -> None:
    """Compared with finite differences of x -> A x + u(x)."""
    grid = make_grid(orientation, (24, 26, 22), (2.0, 2.2, 2.5))
    field = phase_encoding_field(grid, 1, 7.0)
    target = make_grid("LPS", (12, 12, 12), (2, 2, 2))
    sampled = sample_displacement(field, target, np.eye(4))
    direction = np.linalg.solve(TILT[:3, :3], sampled.direction)
    found = 1 + np.einsum("a,aijk->ijk", direction, sampled.slope.numpy())
    columns = []
    for axis in range(3):
        step = np.eye(4)
        step[axis, 3] = 0.5
        forward = sample_displacement(field, target, step).displacement
        step[axis, 3] = -0.5
        columns.append((forward - sample_displacement(field, target, step).displacement).numpy())
    slopes = np.stack(columns, axis=-1).transpose(1, 2, 3, 0, 4)
    expected = np.linalg.det(TILT[:3, :3] + slopes)
    assert np.ptp(expected) > 0.3
    assert np.abs(found - expected).max() < 0.03


def scanned(grid: Grid, transforms: np.ndarray, to_dwiref: np.ndarray, fibre: np.ndarray) -> tuple[DWI, np.ndarray]:
    """Simulated series of a head with a single fibre direction, one volume per pose; and the b-values."""
    n = len(transforms)
    rng = np.random.default_rng(4)
    bvecs = rng.normal(size=(n, 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    bvals = np.full(n, 1500.0)
    bvals[::8], bvecs[::8] = 0, 0
    data = []
    for transform, b, g in zip(transforms, bvals, bvecs, strict=True):
        full = transform @ to_dwiref
        points = (voxel_points(grid) - full[:3, 3]) @ np.linalg.inv(full[:3, :3]).T
        gradient = Rotation.from_matrix(full[:3, :3]).inv().apply(g)
        data.append(head_intensity(points) * np.exp(-b * (2e-4 + 1.5e-3 * (gradient @ fibre) ** 2)))
    series = torch.from_numpy(np.stack(data).astype(np.float32))
    return DWI(series, grid, bvals, bvecs, np.zeros(n, int), np.zeros(n, int)), bvals


def angle(direction: np.ndarray, fibre: np.ndarray) -> np.ndarray:
    """Angle in degrees between axes."""
    return np.degrees(np.arccos(np.clip(np.abs(direction @ fibre), 0, 1)))


def test_b_vectors_rotate_with_the_head(orientation: str) -> None:
    """With head rotations of up to 25 degrees, fibre directions and images in ACPC space match the truth."""
    grid = make_grid(orientation, (32, 36, 30), (2.0, 2.0, 2.2))
    parameters = np.random.default_rng(7).uniform(-1, 1, (24, 6)) * np.array([0.3, 0.3, 0.3, 3, 3, 3])
    parameters[0] = 0
    transforms = rigid_matrix(parameters)
    fibre = np.array([0.8, 0.36, 0.48])
    dwi, bvals = scanned(grid, transforms, TILT, fibre)
    motion = make_motion(grid, transforms, np.arange(24))
    out = resample(
        dwi, (motion,), None, make_coregistration(TILT), make_anatomy(), ResampleSettings(resolution=2.5), "none"
    )
    points = voxel_points(out.dwi.grid)
    core = np.linalg.norm(points / np.array([22.0, 27, 20]), axis=-1) < 0.7
    signals = out.dwi.data.numpy()[:, core]
    _, direction = main_directions(signals, bvals, out.dwi.bvecs)
    assert angle(direction, fibre).max() < 1.0
    _, unrotated = main_directions(signals, bvals, dwi.bvecs)
    assert angle(unrotated, fibre).mean() > 5
    assert np.abs(out.dwiref.numpy()[core] - head_intensity(points)[core]).max() < 15
    weighted = bvals > 0
    np.testing.assert_allclose(np.linalg.norm(out.dwi.bvecs[weighted], axis=1), 1)
    assert not out.dwi.bvecs[~weighted].any()
    assert out.mask.data.sum() > 1000


def test_b_vectors_follow_only_the_rotation_of_affine_motion() -> None:
    grid = make_grid("LAS", (24, 26, 24), (3, 3, 3))
    turn = rigid_matrix(np.array([0, 0, 0.3, 0, 0, 0]))
    dwi, _ = scanned(grid, np.stack([turn] * 9), np.eye(4), np.array([1.0, 0, 0]))
    scaled = turn @ np.diag([1.04, 1.0, 0.97, 1])
    motion = make_motion(grid, np.stack([scaled] * 9), np.arange(9))
    settings = ResampleSettings(resolution=4)
    out = resample(dwi, (motion,), None, make_coregistration(np.eye(4)), make_anatomy(), settings, "none")
    expected = dwi.bvecs @ scaled[:3, :3] @ np.diag([1 / 1.04, 1, 1 / 0.97])
    np.testing.assert_allclose(out.dwi.bvecs, expected, atol=0.02)
    np.testing.assert_allclose(np.linalg.norm(out.dwi.bvecs[1:8], axis=1), 1)


def test_brain_ends_where_data_end() -> None:
    """A slab, of which ten volumes move up by 6 mm: coverage is the fraction of volumes that reach a voxel."""
    full = make_grid("LAS", (30, 36, 30), (2.0, 2.0, 2.0))
    affine = full.affine.copy()
    affine[2, 3] += 2.0 * 8
    grid = Grid((30, 36, 14), affine)
    up = rigid_matrix(np.array([0, 0, 0, 0, 0, 6.0]))
    transforms = np.stack([np.eye(4)] * 10 + [up] * 10)
    data = torch.from_numpy(np.stack([head_intensity(voxel_points(grid))] * 20).astype(np.float32))
    dwi = DWI(data, grid, np.zeros(20), np.zeros((20, 3)), np.zeros(20, int), np.zeros(20, int))
    motion = make_motion(grid, transforms, np.arange(20))
    args = (make_coregistration(np.eye(4)), make_anatomy("T1w"), ResampleSettings(resolution=2), "none")
    out = resample(dwi, (motion,), None, *args)
    assert out.coverage is not None
    z = voxel_points(out.dwi.grid)[..., 2]
    low, high = affine[2, 3] - 1, affine[2, 3] + 2 * 14 - 1  # outer faces of the slab
    in_plane = grid.contains(voxel_points(out.dwi.grid) * [1, 1, 0] + [0, 0, (low + high) / 2])
    still, moved = ((low <= z + s) & (z + s <= high) & in_plane for s in (0, 6))
    np.testing.assert_allclose(out.coverage.numpy(), (still + 1.0 * moved) / 2, atol=1e-6)
    inside = out.mask.numpy() > 0.5
    assert inside.sum() > 500
    assert (out.coverage.numpy()[inside] == 1).all()
    half = Volume((torch.from_numpy(voxel_points(args[1].mask.grid)[..., 2]) > 4).float(), args[1].mask.grid)
    brain = args[1].mask.numpy() > 0.5
    uncovered, missing = _uncovered_brain(args[1], replace(out, coverage=half)), brain & (half.numpy() == 0)
    assert uncovered["uncovered_brain_ml"] == pytest.approx(missing.sum() * 0.008)
    assert uncovered["uncovered_brain_fraction"] == pytest.approx(missing.sum() / brain.sum())
    again = joined_series.join((out, out), (dwi, dwi), args[1], "concat")
    assert again.coverage is not None
    torch.testing.assert_close(again.coverage.data, out.coverage.data)


def test_affine_motion_restores_intensities() -> None:
    """An eddy current that stretches the image by 12 % spreads the same signal over more voxels."""
    grid = make_grid("LAS", (30, 36, 30), (2.0, 2.0, 2.0))
    stretched = np.diag([1.0, 1.12, 1.0, 1.0])
    points = voxel_points(grid)
    volumes = [head_intensity(points), head_intensity(points / [1, 1.12, 1]) / 1.12]
    data, none = torch.from_numpy(np.stack(volumes).astype(np.float32)), np.zeros(2, int)
    dwi = DWI(data, grid, np.array([0.0, 1000]), np.array([[0, 0, 0], [1.0, 0, 0]]), none, none)
    motion = make_motion(grid, np.stack([np.eye(4), stretched]), np.arange(2))
    settings = ResampleSettings(resolution=2)
    out = resample(dwi, (motion,), None, make_coregistration(np.eye(4)), make_anatomy(), settings, "none")
    core = np.linalg.norm(voxel_points(out.dwi.grid) / np.array([22.0, 27, 20]), axis=-1) < 0.75
    first, second = out.dwi.data.numpy()[:, core]
    assert np.abs(second / first - 1).max() < 0.02
    volumes_last = data.permute(1, 2, 3, 0).numpy()
    aligned, _ = align_series(volumes_last, grid.affine, np.array([[0, 0, 0], [1.0, 0, 0]]), motion)
    core = np.linalg.norm(points / np.array([22.0, 27, 20]), axis=-1) < 0.75
    assert np.abs(aligned[core][:, 1] / aligned[core][:, 0] - 1).max() < 0.02


def test_two_blips_with_distortion_and_motion_restore_the_truth() -> None:
    """Opposite distortions with different poses and head motion: geometry and intensity are restored."""
    grid = make_grid("LAS", (30, 36, 30), (2.0, 2.0, 2.0))
    field = phase_encoding_field(grid, 1, 4.0)
    poses = np.stack([np.eye(4), rigid_matrix(np.array([0.03, -0.02, 0.05, 1, 0.5, -1]))])
    moves = rigid_matrix(np.array([[0, 0, 0, 0, 0, 0], [0.08, -0.05, 0.1, 2, 1, -2]] * 2, float))
    fields = (field, DisplacementField(-field.data, grid))
    volumes = []
    for v, blip in enumerate((0, 0, 1, 1)):
        full = moves[v] @ poses[blip]
        volumes.append(distort(grid, full, fields[blip]))
    data = torch.from_numpy(np.stack(volumes).astype(np.float32))
    dwi = DWI(data, grid, np.zeros(4), np.zeros((4, 3)), np.zeros(4, int), np.array([0, 0, 1, 1]))
    motions = tuple(make_motion(grid, moves[part], np.array(part)) for part in ([0, 1], [2, 3]))
    zero = Volume(torch.zeros(grid.shape), grid)
    corrected = Distortion(poses, fields, None, zero, (zero, zero), (zero, zero), [], "known")
    settings = ResampleSettings(resolution=2)
    out = resample(dwi, motions, corrected, make_coregistration(TILT), make_anatomy(), settings, "none")
    dwiref_points = voxel_points(out.dwi.grid) @ TILT[:3, :3].T + TILT[:3, 3]
    core = np.linalg.norm(dwiref_points / np.array([22.0, 27, 20]), axis=-1) < 0.75
    truth = head_intensity(dwiref_points)
    for found in out.dwi.data.numpy():
        error = np.abs(found - truth)[core]
        assert error.mean() < 8
        assert np.percentile(error, 99) < 30
    without = resample(dwi, motions, None, make_coregistration(TILT), make_anatomy(), settings, "none")
    shape = without.dwi.grid.shape
    assert shape == out.dwi.grid.shape or np.abs(np.subtract(shape, out.dwi.grid.shape)).max() <= 2


def distort(grid: Grid, full: np.ndarray, field: DisplacementField) -> np.ndarray:
    """Simulated distorted image: at p = full y + u(y), truth(y) over the Jacobian, with y by fixed-point iteration."""
    inverse = np.linalg.inv(full)
    splines = [spline_filter(part) for part in field.data.numpy().astype(float)]

    def u(points: np.ndarray) -> np.ndarray:
        voxels = np.moveaxis(grid.to_voxels(points), -1, 0)
        return np.stack([map_coordinates(part, voxels, prefilter=False) for part in splines], axis=-1)

    p = voxel_points(grid)
    y = p @ inverse[:3, :3].T + inverse[:3, 3]
    for _ in range(12):
        y = (p - u(y)) @ inverse[:3, :3].T + inverse[:3, 3]
    slopes = np.stack([u(y + step) - u(y - step) for step in np.eye(3) / 2], axis=-1)
    return head_intensity(y) / np.linalg.det(full[:3, :3] + slopes)


@pytest.mark.parametrize("resolution", [1.7, 2.0, 3.3])
def test_output_grid(resolution: float) -> None:
    points = np.random.default_rng(0).uniform([-60, -80, -50], [61, 90, 71], (500, 3))
    grid = stage._output_grid(points, resolution)
    np.testing.assert_allclose(grid.affine[:3, :3], np.diag([-resolution, -resolution, resolution]))
    voxels = grid.to_voxels(points)
    margin = 10 / resolution
    assert (voxels.min(0) >= margin - 1e-6).all()
    assert (voxels.max(0) <= np.array(grid.shape) - 1 - margin + 1e-6).all()
    assert (voxels.min(0) < margin + 1).all()
    assert (voxels.max(0) > np.array(grid.shape) - 2 - margin).all()
    np.testing.assert_allclose(np.mod(grid.affine[:3, 3] / resolution + 0.5, 1), 0.5, atol=1e-6)


def test_bias_correction_and_brain_mask() -> None:
    grid = make_grid("LAS", (30, 36, 30), (2.0, 2.0, 2.0))
    points = voxel_points(grid)
    bias = np.exp(0.012 * points[..., 0] + 0.006 * points[..., 1])
    head = 1000 / (1 + np.exp((np.linalg.norm(points / np.array([22.0, 27, 20]), axis=-1) - 1) * 12))
    data = torch.from_numpy(np.stack([head * bias] * 2).astype(np.float32))
    dwi = DWI(data, grid, np.zeros(2), np.zeros((2, 3)), np.zeros(2, int), np.zeros(2, int))
    motion = make_motion(grid, np.stack([np.eye(4)] * 2), np.arange(2))
    settings = ResampleSettings(resolution=2)
    args = (dwi, (motion,), None, make_coregistration(np.eye(4)), make_anatomy("T1w"), settings)
    uncorrected, corrected = resample(*args, "none"), resample(*args, "n4")
    points = voxel_points(corrected.dwi.grid)
    core = np.linalg.norm(points / np.array([22.0, 27, 20]), axis=-1) < 0.8

    def coefficient_of_variation(volume: torch.Tensor) -> float:
        return float(volume.numpy()[core].std() / volume.numpy()[core].mean())

    assert coefficient_of_variation(corrected.dwi.data[0]) < 0.5 * coefficient_of_variation(uncorrected.dwi.data[0])
    torch.testing.assert_close(corrected.dwiref.data, corrected.dwi.data.mean(0), rtol=1e-4, atol=1e-2)
    inside = corrected.mask.numpy() > 0.5
    radius = np.linalg.norm(points / np.array([22.0, 27, 20]), axis=-1)
    assert radius[inside].max() < 1.5
    assert inside[radius < 0.8].mean() > 0.95


def test_missing_resolution_is_rejected() -> None:
    grid = make_grid("LAS", (8, 8, 8), (3, 3, 3))
    dwi = DWI(torch.ones(1, 8, 8, 8), grid, np.zeros(1), np.zeros((1, 3)), np.zeros(1, int), np.zeros(1, int))
    motion = make_motion(grid, np.eye(4)[None], np.zeros(1, int))
    with pytest.raises(SettingsError, match="output-resolution"):
        resample(dwi, (motion,), None, make_coregistration(np.eye(4)), make_anatomy(), ResampleSettings())
