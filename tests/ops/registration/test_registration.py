"""Linear and diffeomorphic registration of phantoms with a known pose or deformation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.displacement_field import compose, jacobian_determinant
from dsiprep.ops.image.filters import gaussian, gradient
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.registration import diffeomorphic, similarity
from dsiprep.ops.registration.diffeomorphic import register_diffeomorphic
from dsiprep.ops.registration.diffeomorphic_kernels import correlation_loop
from dsiprep.ops.registration.linear import _evaluate, _level, register_linear
from helpers.blob_images import GRID, blob_labels, image_of, large_pose, max_error, moved
from helpers.grids import make_grid


@pytest.fixture(scope="module")
def t1w() -> Volume:
    return image_of(blob_labels(0), (0.0, 0.25, 0.7, 1.0))


@pytest.fixture(scope="module")
def b0() -> Volume:
    return image_of(blob_labels(0), (0.02, 1.0, 0.45, 0.3))


@pytest.mark.parametrize("seed", [0, 1])
def test_rigid_across_contrasts_from_large_pose(t1w: Volume, b0: Volume, seed: int) -> None:
    pose = large_pose(seed)
    fit = register_linear(moved(b0, pose, 0.03, (80, 90, 60)), t1w, metric="mi")
    assert max_error(fit.matrix, pose) < 0.5
    assert fit.score_after > fit.score_before + 0.05
    assert fit.metric == "mi"


def test_rigid_same_contrast_from_large_pose(t1w: Volume) -> None:
    pose = large_pose(2)
    fit = register_linear(moved(t1w, pose, 0.03, (80, 90, 60)), t1w, metric="cc")
    assert max_error(fit.matrix, pose) < 0.3
    assert fit.score_after > 0.98


def test_rigid_with_partial_coverage(t1w: Volume, b0: Volume) -> None:
    """The moving image lacks a third of the head."""
    pose = rigid_matrix(np.array([0.2, -0.1, 0.15, 8, -12, 10]))
    fit = register_linear(moved(b0, pose, 0.02, (80, 90, 34)), t1w)
    assert max_error(fit.matrix, pose) < 0.7


@pytest.mark.parametrize(("metric", "tolerance"), [("cc", 0.3), ("mi", 1.0)])
def test_affine_recovers_known_transform(t1w: Volume, b0: Volume, metric: str, tolerance: float) -> None:
    truth = rigid_matrix(np.array([0.1, -0.1, 0.05, 5, 3, -4]))
    truth[:3, :3] = truth[:3, :3] @ np.array([[1.08, 0.03, 0], [0, 0.95, 0.02], [-0.02, 0, 1.05]])
    moving = moved(t1w if metric == "cc" else b0, truth, 0.02, (80, 90, 60))
    fit = register_linear(moving, t1w, dof=12, metric=metric, search=False)
    assert max_error(fit.matrix, truth) < tolerance
    assert max_error(np.eye(4), truth) > 10


def test_masks_exclude_bright_surroundings(t1w: Volume, b0: Volume) -> None:
    pose = rigid_matrix(np.array([0.1, -0.1, 0.05, 5, 3, -4]))
    moving = moved(b0, pose, 0.02, (80, 90, 60))
    moving.data[:12] = 2.0  # a bright slab beside the head that only the masks exclude
    mask = Volume((t1w.data > 0.1).float(), GRID)
    moving_mask = Volume(resample_onto(mask.data[None], GRID, moving.grid, np.linalg.inv(pose))[0], moving.grid)
    fit = register_linear(moving, t1w, fixed_mask=mask, moving_mask=moving_mask)
    assert max_error(fit.matrix, pose) < 0.3
    np.testing.assert_allclose(fit.matrix[:3, :3] @ fit.matrix[:3, :3].T, np.eye(3), atol=1e-10)


def test_linear_registration_is_reproducible(t1w: Volume, b0: Volume) -> None:
    moving = moved(b0, rigid_matrix(np.full(6, 0.05)), 0.02, (80, 90, 60))
    first, second = (register_linear(moving, t1w, search=False).matrix for _ in range(2))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_invalid_dof_and_metric_are_rejected(t1w: Volume) -> None:
    with pytest.raises(ValueError, match="dof must be 6 or 12"):
        register_linear(t1w, t1w, dof=7)
    with pytest.raises(ValueError, match="metric mi or cc"):
        register_linear(t1w, t1w, metric="ssd")


@pytest.mark.parametrize("metric", ["mi", "cc"])
def test_matrix_derivative_matches_finite_differences(t1w: Volume, b0: Volume, metric: str) -> None:
    level = _level(b0, t1w, (Volume((t1w.data > 0.1).float(), GRID), None), (4.0, 3.0, 24), metric)
    matrix = rigid_matrix(np.array([0.05, 0.02, -0.04, 1.3, -0.7, 0.9]))
    _, derivative = _evaluate(level, matrix)
    for row, column, step in ((0, 3, 2e-2), (1, 3, 2e-2), (2, 3, 2e-2), (0, 1, 4e-4), (2, 0, 4e-4)):
        change = np.zeros((4, 4))
        change[row, column] = step
        plus, minus = (_evaluate(level, matrix + sign * change)[0] for sign in (1, -1))
        assert derivative[row, column] == pytest.approx((plus - minus) / (2 * step), rel=0.05, abs=2e-4)


def test_mutual_information_matches_numpy_histogram() -> None:
    """Compared with the entropies of a histogram of the same samples without a Parzen window."""
    rng = np.random.default_rng(0)
    fixed = rng.random(400_000).astype(np.float32)
    moving = (np.sin(4 * fixed) + 0.3 * rng.normal(size=fixed.size)).astype(np.float32)
    low, high = float(moving.min()), float(moving.max())
    bins = similarity.to_bins(fixed, 0.0, 1.0)
    score, _ = similarity.mutual_information(bins, moving, np.ones_like(moving), low, high)
    joint = np.histogram2d(fixed, moving, bins=(32, 29))[0] / fixed.size

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    expected = (entropy(joint.sum(0)) + entropy(joint.sum(1))) / entropy(joint.ravel())
    assert score == pytest.approx(expected, abs=0.02)
    independent, _ = similarity.mutual_information(bins, rng.permutation(moving), np.ones_like(moving), low, high)
    assert independent == pytest.approx(1.0, abs=2e-3)
    assert score > 1.05


def test_local_correlation_matches_numpy_and_finite_differences() -> None:
    rng = np.random.default_rng(0)
    fixed, moving = (torch.from_numpy(rng.random((9, 10, 11)).astype(np.float32)) for _ in range(2))
    weights = torch.zeros(9, 10, 11)
    weights[2:-2, 2:-2, 2:-2] = torch.from_numpy(rng.random((5, 6, 7)).astype(np.float32))
    score, derivative = similarity.local_correlation(fixed, moving, weights, 2)
    window = (slice(2, 7), slice(3, 8), slice(4, 9))
    expected = np.corrcoef(fixed[window].numpy().ravel(), moving[window].numpy().ravel())[0, 1] ** 2
    assert float(score[4, 5, 6]) == pytest.approx(expected, abs=1e-4)
    change = torch.zeros_like(moving)
    for voxel in ((4, 5, 6), (3, 3, 5), (0, 4, 4)):
        change.zero_()
        change[voxel] = 0.05
        plus, minus = (
            float((similarity.local_correlation(fixed, moving + s * change, weights, 2)[0] * weights).sum())
            for s in (1, -1)
        )
        assert float(derivative[voxel]) == pytest.approx((plus - minus) / 0.1, rel=0.05, abs=2e-3)


def test_loop_and_tensor_implementations_agree(t1w: Volume) -> None:
    """Kernels near the mask compared with tensor operations on the whole volume, over five iterations of one level."""
    rng = np.random.default_rng(2)
    u = gaussian(torch.from_numpy(rng.normal(size=(3, *GRID.shape)).astype(np.float32)), 4.0)
    u *= 1.5 / float(u.norm(dim=0).max())
    moving = resample_onto(t1w.data[None], GRID, GRID, displacement=4 * u)[0]
    weights = torch.from_numpy(ndimage.gaussian_filter((blob_labels(0) > 0).astype(np.float32), 0.7))
    weights[weights < 0.05] = 0
    start = u * diffeomorphic._interior(u)
    loops, loops_score = diffeomorphic._optimise_level_loops(start.clone(), moving, t1w.data, weights, 5)
    tensors, tensors_score = diffeomorphic._optimise_level_tensors(start, moving, t1w.data, weights, 5)
    assert float((loops - start).norm(dim=0).max()) > 0.5
    assert loops_score == pytest.approx(tensors_score, abs=1e-4)
    assert float((loops - tensors).norm(dim=0).max()) < 2e-3


def test_folds_are_smoothed_locally() -> None:
    rng = np.random.default_rng(6)
    u = gaussian(torch.from_numpy(rng.normal(size=(3, 40, 41, 42)).astype(np.float32)), 3.0)
    u *= 0.5 / float(u.norm(dim=0).max())
    u[:, 18:22, 19:23, 20:24] += torch.from_numpy(rng.normal(size=(3, 4, 4, 4)).astype(np.float32)) * 2
    u *= diffeomorphic._interior(u)
    grid = Grid((40, 41, 42), np.eye(4))
    interior = diffeomorphic._interior(u)
    expected = (jacobian_determinant(DisplacementField(u, grid)) < diffeomorphic.MIN_JACOBIAN) * interior
    assert torch.equal(diffeomorphic._find_folds(u) > 0, expected > 0)
    assert expected.sum() > 20
    unfolded = diffeomorphic._unfold(u.clone())
    assert float(jacobian_determinant(DisplacementField(unfolded, grid)).min()) > 0.02
    assert float((unfolded - u).norm(dim=0)[:8].max()) < 0.02  # far from the folds


def test_correlation_kernel_matches_tensor_implementation() -> None:
    rng = np.random.default_rng(3)
    fixed, moving = (torch.from_numpy(rng.random((31, 20, 24)).astype(np.float32)) for _ in range(2))
    weights = torch.zeros(31, 20, 24)
    weights[4:-5, 4:-4, 5:-4] = torch.from_numpy(rng.random((22, 12, 15)).astype(np.float32))
    score, derivative = similarity.local_correlation(fixed, moving, weights, 2)
    spans = diffeomorphic._row_spans(diffeomorphic._near_weights(weights, 3))
    force = np.ones((3, *fixed.shape), np.float32)
    mean = correlation_loop(fixed.numpy(), moving.numpy(), weights.numpy(), 2, similarity.VARIANCE_FLOOR, spans, force)
    assert mean == pytest.approx(float((score * weights).sum() / weights.sum()), rel=1e-5)
    expected = (gradient(moving[None])[0] * derivative).numpy()
    inside = diffeomorphic._near_weights(weights, 3).numpy()
    np.testing.assert_allclose(force[:, inside], expected[:, inside], atol=2e-4 * np.abs(expected).max())
    assert (force[:, ~inside] == 1).all()


def test_diffeomorphic_recovers_known_deformation(t1w: Volume) -> None:
    rng = np.random.default_rng(4)
    u = gaussian(torch.from_numpy(rng.normal(size=(3, *GRID.shape)).astype(np.float32)), 6.0)
    envelope = torch.from_numpy(ndimage.gaussian_filter((blob_labels(0) > 0).astype(np.float32), 2.0))
    u *= 3.0 * envelope / float(u.norm(dim=0)[envelope > 0.5].mean())
    pose = rigid_matrix(np.array([0.05, -0.03, 0.04, 4, -6, 3]))
    # the fixed image is resampled through u and the moving one is only posed, so u is the true displacement
    fixed = Volume(resample_onto(t1w.data[None], GRID, GRID, displacement=u)[0], GRID)
    moving = Volume(t1w.data, Grid(GRID.shape, pose @ GRID.affine))
    mask = Volume((fixed.data > 0.1).float(), GRID)
    fit = register_diffeomorphic(moving, fixed, pose, fixed_mask=mask, finest_mm=2.5)
    estimated = resample_onto(fit.forward.data, fit.forward.grid, GRID)
    inside = torch.from_numpy(ndimage.binary_erosion(mask.numpy() > 0.5, iterations=2))
    before, after = u.norm(dim=0)[inside], (estimated - u).norm(dim=0)[inside]
    assert float(after.mean()) < 0.25 * float(before.mean())
    assert float(before.mean()) > 1.5
    assert fit.similarity > 0.85
    assert float(jacobian_determinant(fit.forward).min()) > 0
    assert float(jacobian_determinant(fit.inverse).min()) > 0
    round_trip = compose(fit.forward, fit.inverse).data.norm(dim=0)
    # the inverse is exact at its own voxels (below); interpolating between them costs a twentieth of a voxel
    assert float(round_trip[fit.forward.data.norm(dim=0) > 0.5].quantile(0.99)) < 0.05 * 2.5
    assert float(compose(fit.inverse, fit.forward).data.norm(dim=0).quantile(0.999)) < 0.02


def test_moving_image_that_ends_within_the_mask(t1w: Volume) -> None:
    """Zeros outside the field of view of the moving image exert no force: the displacement stays small."""
    cut = Volume(t1w.data[:, :, 22:].clone(), Grid((64, 76, 40), GRID.affine @ translation(0, 0, 22)))
    mask = Volume((t1w.data > 0.1).float(), GRID)
    fit = register_diffeomorphic(cut, t1w, np.eye(4), fixed_mask=mask, finest_mm=2.5)
    inside = mask.data > 0.5
    length = fit.forward.data.norm(dim=0)[inside]
    assert float(length.max()) < 1.0
    assert float(length.mean()) < 0.1


def test_identical_images_are_not_displaced(t1w: Volume) -> None:
    mask = Volume((t1w.data > 0.1).float(), GRID)
    fit = register_diffeomorphic(t1w, t1w, np.eye(4), fixed_mask=mask, finest_mm=2.5)
    length = fit.forward.data.norm(dim=0)[mask.data > 0.5]
    assert float(length.mean()) < 0.1
    assert fit.similarity > 0.95


def test_region_contains_mask_on_oblique_grid() -> None:
    oblique = make_grid("oblique", (60, 50, 40), (2.0, 2.5, 3.0))
    mask = torch.zeros(oblique.shape)
    mask[20:40, 15:35, 12:30] = 1
    corner, region = diffeomorphic._region_around(Volume(mask, oblique), GRID)
    voxels = region.to_voxels(oblique.to_world(np.argwhere(mask.numpy() > 0)))
    assert voxels.min() >= 4
    assert (voxels.max(axis=0) <= np.array(region.shape) - 5).all()
    assert np.allclose(region.to_world(np.zeros(3)), GRID.to_world(np.array(corner)))


def translation(x: float, y: float, z: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix
