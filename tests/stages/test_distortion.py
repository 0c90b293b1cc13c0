"""Blip-up/blip-down correction: kernels against SciPy, and recovery of known fields from an independent simulation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.fft import dct
from scipy.spatial.transform import Rotation

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip, Distortion
from dsiprep.errors import InputError, SettingsError
from dsiprep.ops.pepolar import initial_field, normal_equations, pair_model, regularisation, sampling
from dsiprep.settings import DistortionSettings
from dsiprep.stages.distortion import correct_distortion
from helpers.epi_pair import CENTRE, READOUT, SIZE, Case, correlation, make_grid, rigid
from helpers.shared_data import SHARED

DATA = SHARED / "bids"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def unwarp(case: Case, result: Distortion, b: int) -> np.ndarray:
    """Blip b unwarped by SciPy with the estimated pose and field, modulated by the Jacobian determinant."""
    grid = case.grid
    world = grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))
    pose = result.poses[b]
    points = world @ pose[:3, :3].T + pose[:3, 3] + np.moveaxis(result.fields[b].data.numpy(), 0, -1)
    voxels = grid.to_voxels(points)
    jacobian = np.stack([np.stack(np.gradient(voxels[..., c]), -1) for c in range(3)], -2)
    image = ndimage.map_coordinates(case.images[b][0].numpy(), np.moveaxis(voxels, -1, 0), order=3)
    return image * np.linalg.det(jacobian)


# ---- kernels


def test_sample_lines_matches_scipy(rng: np.random.Generator) -> None:
    image = rng.standard_normal((3, 4, 17)).astype(np.float32)
    shift = (3 * rng.standard_normal(image.shape)).astype(np.float32)
    coefficients = torch.from_numpy(ndimage.spline_filter1d(image, 3, axis=2, output=np.float32, mode="mirror"))
    value, slope, inside = (t.numpy() for t in sampling.sample_lines(coefficients, torch.from_numpy(shift)))
    position = np.arange(17) + shift
    ok = (position >= 0) & (position <= 16)
    for a, b in np.ndindex(3, 4):
        truth = ndimage.map_coordinates(image[a, b].astype(float), position[a, b][None], order=3, mode="mirror")
        assert np.allclose(value[a, b][ok[a, b]], truth[ok[a, b]], atol=1e-4)
    assert np.array_equal(inside > 0, (position >= -0.5) & (position <= 16.5))
    ahead, behind = (sampling.sample_lines(coefficients, torch.from_numpy(shift + e))[0].numpy() for e in (0.01, -0.01))
    smooth = (position > 0.1) & (position < 15.9)
    assert np.allclose(slope[smooth], ((ahead - behind) / 0.02)[smooth], atol=0.02)


def test_sample_volume_matches_scipy(rng: np.random.Generator) -> None:
    image = rng.standard_normal((7, 8, 9))
    matrix = np.hstack([Rotation.from_rotvec([0.1, -0.2, 0.15]).as_matrix(), [[0.4], [-0.3], [0.2]]])
    shift = rng.standard_normal(image.shape).astype(np.float32)
    coefficients = torch.from_numpy(ndimage.spline_filter(image, 3, output=np.float32, mode="mirror"))
    value, gradient, _ = (t.numpy() for t in sampling.sample_volume(coefficients, matrix, torch.from_numpy(shift)))
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in image.shape), indexing="ij"))
    points = np.einsum("ab,bijk->aijk", matrix[:, :3], voxels) + matrix[:, 3, None, None, None]
    points[2] += shift
    size = np.array(image.shape)[:, None, None, None]
    ok = ((points >= 0.05) & (points <= size - 1.05)).all(0)
    assert ok.sum() > 100
    truth = ndimage.map_coordinates(image, points, order=3, mode="mirror")
    assert np.allclose(value[ok], truth[ok], atol=1e-4)
    for axis in range(3):
        step = np.zeros((3, 1, 1, 1))
        step[axis] = 1e-3
        ahead, behind = (ndimage.map_coordinates(image, points + s, order=3, mode="mirror") for s in (step, -step))
        assert np.allclose(gradient[axis][ok], ((ahead - behind) / 2e-3)[ok], atol=5e-3)


def random_equations(
    rng: np.random.Generator, shape: tuple[int, int, int] = (4, 5, 6)
) -> normal_equations.NormalEquations:
    def draw(*size: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(size).astype(np.float32))

    n = np.prod(shape)
    by_field, by_slope, weight = draw(*shape), draw(*shape), draw(*shape).abs()
    columns = draw(6, n)
    difference = np.zeros((n, n), np.float32)
    for c in range(n):
        unit = torch.zeros(n)
        unit[c] = 1
        difference[:, c] = regularisation.central_difference(unit.reshape(shape), 2).reshape(-1).numpy()
    data = torch.diag(by_field.reshape(-1)) + torch.diag(by_slope.reshape(-1)) @ torch.from_numpy(difference)
    coupling = (columns * weight.reshape(-1)) @ data
    pose = (columns * weight.reshape(-1)) @ columns.T + torch.eye(6)
    curvature = draw(*shape[:2], shape[2] - 1).abs()
    spacing = np.array([2.0, 2.5, 1.5])
    laplacian_weight = draw(*shape).abs() + 0.1
    return normal_equations.NormalEquations(
        by_field,
        by_slope,
        weight,
        curvature,
        coupling.reshape(6, *shape),
        pose,
        spacing,
        0.3,
        laplacian_weight,
        draw(*shape).abs(),
    )


def test_compiled_loops_match_tensor_operations(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.from_numpy(rng.standard_normal((6, 7, 8)).astype(np.float32))
    shift = torch.from_numpy((2 * rng.standard_normal((6, 7, 8))).astype(np.float32))
    matrix = np.hstack([Rotation.from_rotvec([0.1, 0.2, -0.1]).as_matrix(), [[0.3], [0.1], [-0.2]]])
    pairs = [
        (sampling.sample_lines(image, shift), sampling._sample_lines_tensors(image, shift)),
        (sampling.sample_volume(image, matrix, shift), sampling._sample_volume_tensors(image, matrix, shift)),
    ]
    normal = random_equations(rng, (6, 7, 8))
    pairs.append(((normal._apply_loops(shift),), (normal._apply_tensors(shift),)))
    by_loops = normal.apply(shift, torch.ones(6))
    monkeypatch.setattr(
        normal_equations.NormalEquations, "_apply_loops", normal_equations.NormalEquations._apply_tensors
    )
    pairs.append((by_loops, normal.apply(shift, torch.ones(6))))
    for loops, tensors in pairs:
        for a, b in zip(loops, tensors, strict=True):
            assert torch.allclose(a, b, atol=2e-4, rtol=1e-4)


def test_normal_equations_are_positive_definite_and_solved(rng: np.random.Generator) -> None:
    normal = random_equations(rng)
    shape, n = tuple(normal.by_field.shape), normal.by_field.numel()
    matrix = np.zeros((n + 6, n + 6))
    for c in range(n + 6):
        unit = torch.zeros(n + 6)
        unit[c] = 1
        field, pose = normal.apply(unit[:n].reshape(shape), unit[n:])
        matrix[:, c] = np.concatenate([field.reshape(-1).numpy(), pose.numpy()])
    assert np.allclose(matrix, matrix.T, atol=1e-3)
    assert np.linalg.eigvalsh(matrix).min() > 0
    right = rng.standard_normal(n + 6).astype(np.float32)
    everywhere = torch.ones(shape, dtype=torch.bool)
    sides = torch.from_numpy(right[:n]).reshape(shape), torch.from_numpy(right[n:])
    field, pose, _ = normal_equations.conjugate_gradients(normal, sides, everywhere, 1e-6, 2000)
    truth = np.linalg.solve(matrix, right)
    solution = np.concatenate([field.reshape(-1).numpy(), pose.numpy()])
    assert np.allclose(solution, truth, atol=0.02 * np.abs(truth).max())


def test_preconditioner_is_exact_for_uniform_weights(rng: np.random.Generator) -> None:
    values = rng.standard_normal((5, 9))
    spectrum = normal_equations.cosine_basis(9, torch.device("cpu")).numpy() @ values.T
    assert np.allclose(spectrum, dct(values, axis=1, norm="ortho").T, atol=1e-5)
    shape = (5, 6, 7)
    one, zero = torch.ones(shape), torch.zeros(shape)
    spacing = np.array([2.0, 1.0, 3.0])
    normal = normal_equations.NormalEquations(
        one, zero, one, torch.zeros(5, 6, 6), torch.zeros(6, *shape), torch.eye(6), spacing, 0.7, one, 0.4 * one
    )
    right = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
    product = normal.apply(normal_equations.cosine_preconditioner(normal, one > 0)(right), torch.zeros(6))[0]
    assert torch.allclose(product, right, atol=1e-3)


def test_equal_mass_field_recovers_a_known_shift() -> None:
    y = np.arange(60.0)
    profile = [np.exp(-0.5 * ((y - 30 - s) / 5) ** 2) * 100 for s in (3.0, -3.0)]
    first, second = (torch.from_numpy(np.tile(p, (2, 3, 1)).astype(np.float32)) for p in profile)
    field = initial_field.equal_mass_field(first, second, (1.0, -1.0)).numpy()
    assert np.allclose(field[..., 27:34], 3.0, atol=0.25)
    uneven = [np.exp(-0.5 * ((y - 30 - s) / 5) ** 2) * 100 for s in (2.0, -4.0)]
    first, second = (torch.from_numpy(np.tile(p, (2, 3, 1)).astype(np.float32)) for p in uneven)
    assert np.allclose(initial_field.equal_mass_field(first, second, (0.5, -1.0)).numpy()[..., 27:34], 4.0, atol=0.3)


@pytest.mark.parametrize("limits", [(0.3,), (0.3, 0.2)], ids=["b=0", "b=0 and a further contrast"])
def test_right_hand_side_is_the_negative_gradient_of_the_cost(limits: tuple[float, ...]) -> None:
    """Compared with numerical derivatives of the cost with respect to field, pose and gain."""
    case = Case(make_grid("RAS"), 1, amplitude=4.0, pose=rigid((1, -1, 1), np.array([1.0, 0, -1])))
    last = Grid(tuple(case.grid.shape[a] for a in (0, 2, 1)), case.grid.affine[:, [0, 2, 1, 3]])
    images = tuple(i[0].permute(0, 2, 1).contiguous() / 60 for i in case.images)
    brain = torch.from_numpy(case.brain).permute(0, 2, 1)
    contrasts = [tuple(i**2 for i in images)] * (len(limits) - 1)
    pair = pair_model.make_pair(images, brain, last, (1.0, -1.0), CENTRE, contrasts)
    smooth = torch.from_numpy(np.ascontiguousarray(0.5 * case.field.transpose(0, 2, 1), np.float32))
    pair = pair_model.expecting(pair, pair, 0.6 * smooth)
    state = pair_model.State(smooth, rigid((0.3, 0.2, 0.1), np.zeros(3)), 0.05)
    compared = pair_model.compare(pair, state)
    _, (field, pose) = pair_model.gauss_newton_equations(pair, state, compared, limits)

    def cost(direction: torch.Tensor, parameters: np.ndarray) -> float:
        trial = pair_model.apply_step(pair, state, direction, parameters)
        return pair_model.cost(pair, trial, pair_model.compare(pair, trial), limits)

    bump = torch.from_numpy(np.ascontiguousarray(np.cos(case.field).transpose(0, 2, 1), np.float32))
    slope = (cost(0.02 * bump, np.zeros(6)) - cost(-0.02 * bump, np.zeros(6))) / 0.04
    assert slope == pytest.approx(-float((field * bump).sum()), rel=0.05)
    for p, step in enumerate((2e-3, 2e-3, 2e-3, 0.1, 0.1, 0.01)):
        change = np.zeros(6)
        change[p] = step
        slope = (cost(0 * bump, change) - cost(0 * bump, -change)) / (2 * step)
        scale = abs(pose.numpy()[[0, 1, 2]]).max() if p < 3 else abs(float(pose[p]))
        assert slope == pytest.approx(-float(pose[p]), abs=0.08 * float(scale))


# ---- signs, orientations, motion


@pytest.mark.parametrize(
    ("codes", "axis", "first", "tilt"),
    [
        ("RAS", 1, 1, 0),
        ("RAS", 1, -1, 0),
        ("LAS", 0, 1, 0),
        ("LPS", 1, 1, 0),
        ("PSR", 0, -1, 0),
        ("PSR", 2, 1, 0),
        ("LAS", 2, -1, 0),
        ("LAS", 1, 1, 17),
    ],
)
def test_field_sign_is_correct_in_every_orientation(codes: str, axis: int, first: int, tilt: float) -> None:
    case = Case(make_grid(codes, tilt), axis, first)
    result = case.correct()
    assert result.fieldmap_hz is not None
    voxel = case.grid.voxel_sizes[axis]
    hertz = result.fieldmap_hz.numpy() * READOUT * voxel  # mm for polarity +1, along +axis
    assert np.abs(hertz - case.field)[case.brain].mean() < 0.2
    assert np.abs(case.field[case.brain]).max() > 4
    for b in range(2):
        # by convention, the displacement is the field times the signed relative readout time
        expected = np.einsum("c,ijk->cijk", case.grid.directions[:, axis], case.scales[b] * hertz)
        assert np.allclose(result.fields[b].data.numpy(), expected, atol=1e-3)
        unwarped = unwarp(case, result, b)
        assert correlation(unwarped, case.truth, case.brain) > 0.99
        assert np.abs(unwarped - case.truth)[case.brain].mean() < 0.03 * case.truth[case.brain].mean()
        assert np.allclose(result.after[b].numpy()[case.brain], unwarped[case.brain], atol=6)
    assert correlation(result.before[0].numpy(), case.truth, case.brain) < 0.97


def test_head_motion_and_gain_are_estimated_with_the_field() -> None:
    grid = make_grid("LAS")
    pose = rigid((1.5, -1.0, 2.0), np.array([1.5, 0.0, -1.0]))
    case = Case(grid, 1, pose=pose, noise=1.5, gain=1.3)
    result = case.correct()
    errors = case.errors(result)
    assert errors.mean() < 0.25
    assert np.percentile(errors, 95) < 0.7
    assert np.array_equal(result.poses[0], np.eye(4))
    points = CENTRE + 30 * np.concatenate([np.eye(3), -np.eye(3)])
    pose_error = result.poses[1] - pose
    point_error = points @ pose_error[:3, :3].T + pose_error[:3, 3]
    assert np.abs(point_error[:, [0, 2]]).max() < 0.3  # along phase encoding it is equivalent to a constant field
    assert result.trace[-1]["gain"] == pytest.approx(1 / 1.3, rel=0.02)
    assert correlation(unwarp(case, result, 1), unwarp(case, result, 0), case.brain) > 0.97
    assert correlation(result.dwiref.numpy(), case.truth, case.brain) > 0.98


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_strength_of_the_field_is_kept(noise: float) -> None:
    """Smoothness penalties must not shrink the field, with noise or without."""
    case = Case(make_grid("RAS", sizes=(3.0, 3.0, 3.0)), 1, noise=noise)
    result = case.correct()
    assert result.fieldmap_hz is not None
    found = result.fieldmap_hz.numpy()[case.brain] * READOUT * 3.0
    assert np.polyfit(case.field[case.brain], found, 1)[0] == pytest.approx(1, abs=0.01)


def test_roughness_is_counted_from_the_estimate_of_the_coarser_level() -> None:
    case = Case(make_grid("RAS"), 1, amplitude=4.0)
    images = tuple(i[0].permute(0, 2, 1).contiguous() / 60 for i in case.images)
    last = Grid(tuple(case.grid.shape[a] for a in (0, 2, 1)), case.grid.affine[:, [0, 2, 1, 3]])
    pair = pair_model.make_pair(images, torch.from_numpy(case.brain).permute(0, 2, 1), last, (1.0, -1.0), CENTRE)
    field = torch.from_numpy(np.ascontiguousarray(case.field.transpose(0, 2, 1), np.float32))
    spacing, smoothness = last.voxel_sizes, pair_model._smoothness(pair)
    expected = pair_model.expecting(pair, pair, field).expected
    assert torch.allclose(expected, regularisation.penalty_gradient(field, spacing, smoothness)[0])
    bumps = torch.cos(field)

    def distance(change: float) -> float:
        trial = field + change * bumps
        return float(
            regularisation.roughness(trial, spacing, smoothness)
            - regularisation.roughness(field, spacing, smoothness)
            - (expected.double() * (trial - field)).sum()
        )

    assert distance(0.2) > 0
    assert distance(-0.2) > 0
    assert abs(distance(0.01)) < 0.02 * distance(0.2)


def test_readout_times_may_differ_or_be_unknown() -> None:
    grid = make_grid("RAS")
    uneven = Case(grid, 1, readouts=(0.03, 0.06))
    result = uneven.correct()
    assert result.fieldmap_hz is not None
    hertz = result.fieldmap_hz.numpy() * READOUT * SIZE
    assert np.abs(hertz - uneven.field)[uneven.brain].mean() < 0.2
    ratio = result.fields[1].data.numpy()[1] / (result.fields[0].data.numpy()[1] + 1e-12)
    assert np.allclose(ratio[np.abs(hertz) > 0.1], -2, atol=1e-3)
    unknown = Case(grid, 1, readouts=(None, None)).correct()
    assert unknown.fieldmap_hz is None
    assert np.abs(unknown.fields[0].data.numpy()[1] - uneven.field)[uneven.brain].mean() < 0.2


def test_large_field_does_not_fold() -> None:
    case = Case(make_grid("LAS", sizes=(4.0, 3.0, 4.0)), 1, amplitude=16.0, noise=1.5)
    result = case.correct()
    for field in result.fields:
        along = np.einsum("c,cijk->ijk", case.grid.directions[:, 1], field.data.numpy())
        assert (1 + np.diff(along, axis=1) / 3.0).min() > 0
    errors = case.errors(result)
    assert np.abs(case.field[case.brain]).max() > 11
    assert np.percentile(errors, 95) < 1.0
    assert correlation(result.dwiref.numpy(), case.truth, case.brain) > 0.97
    assert all(row["change_mm"] >= 0 and np.isfinite(row["cost"]) for row in result.trace)


def test_identical_images_give_no_field() -> None:
    case = Case(make_grid("RAS"), 1, amplitude=0.0)
    result = case.correct()
    assert np.abs(result.fields[0].data.numpy())[:, case.brain].max() < 0.02
    assert np.allclose(result.poses[1], np.eye(4), atol=0.02)


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 12, 9), (6, 5, 1), (9, 2, 8)])
def test_results_are_finite_on_tiny_and_thin_grids(shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    grid = Grid(shape, np.diag([3.0, 2.0, 4.0, 1.0]))
    images = [torch.from_numpy(rng.uniform(1, 2, (2, *shape)).astype(np.float32)) for _ in range(2)]
    images[0][0, 0, 0, 0] = float("nan")
    images[1][:, :, : shape[1] // 2] = 0  # partial coverage
    blips = tuple(Blip(n, PhaseEncoding(1, p, 0.04), torch.zeros(0, *shape)) for n, p in (("up", 1), ("down", -1)))
    result = correct_distortion(
        blips, (images[0], images[1]), grid, Volume(torch.ones(shape), grid), DistortionSettings()
    )
    assert result.fields[0].data.shape == (3, *shape)
    tensors = [f.data for f in result.fields] + [v.data for v in (*result.after, *result.before, result.dwiref)]
    assert all(bool(torch.isfinite(t).all()) for t in tensors)
    assert np.isfinite(result.poses).all()


@pytest.mark.parametrize("kind", ["several", "negative", "partial", "bright", "zeros"])
def test_field_is_recovered_from_unusual_images(kind: str, rng: np.random.Generator) -> None:
    """Several b=0 volumes, negative noise, missing slices, a different gain, an empty margin."""
    case = Case(make_grid("LAS", sizes=(6.0, 6.0, 6.0)), 1, noise=1.0)
    up, down = (image.clone() for image in case.images)
    inside = case.brain.copy()
    if kind == "several":
        up = torch.cat([up + torch.from_numpy(rng.normal(0, 1, up.shape).astype(np.float32)) for _ in range(4)])
    elif kind == "negative":
        down = torch.where(down < 20, down - 5 * torch.rand_like(down), down)
    elif kind == "partial":
        down[..., :6] = 0
        inside[..., :8] = False
    elif kind == "bright":
        down = down * 1000
    else:
        up[:, :2], down[:, -2:] = 0, 0
    result = correct_distortion(case.blips, (up, down), case.grid, case.mask, DistortionSettings())
    unit = case.grid.directions[:, 1]
    found = np.einsum("c,cijk->ijk", unit, result.fields[0].data.numpy())
    error = (found - case.field)[inside]
    assert np.isfinite(result.dwiref.numpy()).all()
    assert np.isfinite(found).all()
    assert np.abs(np.diff(found, axis=1)).max() < 6.0  # less than a voxel: nothing folds
    assert np.abs(error - np.median(error)).mean() < 0.3
    if kind == "bright":
        assert result.trace[-1]["gain"] == pytest.approx(1e-3, rel=0.05)


def test_invalid_pairs_are_rejected() -> None:
    shape = (6, 6, 6)
    grid = Grid(shape, np.eye(4))
    image, mask = torch.ones(1, *shape), Volume(torch.ones(shape), grid)

    def attempt(first: PhaseEncoding | None, second: PhaseEncoding | None, image: torch.Tensor = image) -> None:
        blips = (Blip("up", first, torch.zeros(0, *shape)), Blip("down", second, torch.zeros(0, *shape)))
        correct_distortion(blips, (image, torch.ones(1, *shape)), grid, mask, DistortionSettings())

    up, down = PhaseEncoding(1, 1, 0.05), PhaseEncoding(1, -1, 0.05)
    with pytest.raises(SettingsError, match="j and j are not opposite"):
        attempt(up, up)
    with pytest.raises(InputError, match="neither"):
        attempt(up, replace(down, readout_time=None))
    with pytest.raises(InputError, match="PhaseEncodingDirection"):
        attempt(None, down)
    with pytest.raises(InputError, match="empty"):
        attempt(up, down, torch.zeros(1, *shape))
    with pytest.raises(InputError, match="expected"):
        attempt(up, down, torch.ones(1, 5, 6, 6))
    blips = (Blip("up", up, image), Blip("down", down, image))
    with pytest.raises(SettingsError, match="--sdc-method none"):
        correct_distortion(blips, (image, image), grid, mask, DistortionSettings(method="none"))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data/bids: a real blip-up/blip-down pair")
def test_real_pair_correlates_after_correction() -> None:
    images, encodings = [], []
    for direction in ("AP", "PA"):
        stem = DATA / "sub-xa30" / "dwi" / f"sub-xa30_dir-{direction}_dwi"
        image = nib.load(f"{stem}.nii.gz")
        sidecar = json.loads(Path(f"{stem}.json").read_text())
        first = np.asarray(image.dataobj[..., :1], np.float32)
        images.append(torch.from_numpy(np.moveaxis(first, -1, 0).copy()))
        encodings.append(PhaseEncoding.from_bids(sidecar["PhaseEncodingDirection"], sidecar["TotalReadoutTime"]))
    grid = Grid(image.shape[:3], image.affine)
    bright = ndimage.gaussian_filter(images[0][0].numpy(), 1) > 0.3 * np.percentile(images[0].numpy(), 95)
    mask = Volume(torch.from_numpy(ndimage.binary_fill_holes(bright).astype(np.float32)), grid)
    blips = tuple(Blip(f"{e.direction}", e, torch.zeros(0, *grid.shape)) for e in encodings)
    result = correct_distortion(blips, (images[0], images[1]), grid, mask, DistortionSettings())
    brain = mask.numpy() > 0
    assert correlation(result.before[0].numpy(), result.before[1].numpy(), brain) < 0.8
    assert correlation(result.after[0].numpy(), result.after[1].numpy(), brain) > 0.96
