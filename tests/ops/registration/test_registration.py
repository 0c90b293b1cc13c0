"""Registration of phantoms whose pose or deformation is known."""

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
from helpers.blob_images import GRID, blobs, error, far_pose, moved, volume
from helpers.grids import make_grid


@pytest.fixture(scope="module")
def t1w() -> Volume:
    return volume(blobs(0), (0.0, 0.25, 0.7, 1.0))


@pytest.fixture(scope="module")
def b0() -> Volume:
    return volume(blobs(0), (0.02, 1.0, 0.45, 0.3))


@pytest.mark.parametrize("seed", [0, 1])
def test_b0_to_t1w_from_far(t1w: Volume, b0: Volume, seed: int) -> None:
    pose = far_pose(seed)
    fit = register_linear(moved(b0, pose, 0.03, (80, 90, 60)), t1w, metric="mi")
    assert error(fit.matrix, pose) < 0.5
    assert fit.score_after > fit.score_before + 0.05 and fit.metric == "mi"


def test_same_contrast_from_far(t1w: Volume) -> None:
    pose = far_pose(2)
    fit = register_linear(moved(t1w, pose, 0.03, (80, 90, 60)), t1w, metric="cc")
    assert error(fit.matrix, pose) < 0.3
    assert fit.score_after > 0.98


def test_partial_coverage(t1w: Volume, b0: Volume) -> None:
    """A third of the head is missing from the moving image."""
    pose = rigid_matrix(np.array([0.2, -0.1, 0.15, 8, -12, 10]))
    fit = register_linear(moved(b0, pose, 0.02, (80, 90, 34)), t1w)
    assert error(fit.matrix, pose) < 0.7


@pytest.mark.parametrize(("metric", "tolerance"), [("cc", 0.3), ("mi", 1.0)])
def test_affine(t1w: Volume, b0: Volume, metric: str, tolerance: float) -> None:
    truth = rigid_matrix(np.array([0.1, -0.1, 0.05, 5, 3, -4]))
    truth[:3, :3] = truth[:3, :3] @ np.array([[1.08, 0.03, 0], [0, 0.95, 0.02], [-0.02, 0, 1.05]])
    moving = moved(t1w if metric == "cc" else b0, truth, 0.02, (80, 90, 60))
    fit = register_linear(moving, t1w, dof=12, metric=metric, search=False)
    assert error(fit.matrix, truth) < tolerance
    assert error(np.eye(4), truth) > 10


def test_masks_and_rigid(t1w: Volume, b0: Volume) -> None:
    pose = rigid_matrix(np.array([0.1, -0.1, 0.05, 5, 3, -4]))
    moving = moved(b0, pose, 0.02, (80, 90, 60))
    moving.data[:12] = 2.0  # a bright slab beside the head, which only the masks can tell from it
    mask = Volume((t1w.data > 0.1).float(), GRID)
    moving_mask = Volume(resample_onto(mask.data[None], GRID, moving.grid, np.linalg.inv(pose))[0], moving.grid)
    fit = register_linear(moving, t1w, fixed_mask=mask, moving_mask=moving_mask)
    assert error(fit.matrix, pose) < 0.3
    np.testing.assert_allclose(fit.matrix[:3, :3] @ fit.matrix[:3, :3].T, np.eye(3), atol=1e-10)


def test_it_gives_the_same_twice(t1w: Volume, b0: Volume) -> None:
    moving = moved(b0, rigid_matrix(np.full(6, 0.05)), 0.02, (80, 90, 60))
    first, second = (register_linear(moving, t1w, search=False).matrix for _ in range(2))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_unknown_choices_are_refused(t1w: Volume) -> None:
    with pytest.raises(ValueError, match="dof is 6 or 12"):
        register_linear(t1w, t1w, dof=7)
    with pytest.raises(ValueError, match="mi or cc"):
        register_linear(t1w, t1w, metric="ssd")


@pytest.mark.parametrize("metric", ["mi", "cc"])
def test_derivative_by_the_matrix_is_right(t1w: Volume, b0: Volume, metric: str) -> None:
    level = _level(b0, t1w, (Volume((t1w.data > 0.1).float(), GRID), None), (4.0, 3.0, 24), metric)
    matrix = rigid_matrix(np.array([0.05, 0.02, -0.04, 1.3, -0.7, 0.9]))
    _, derivative = _evaluate(level, matrix)
    for row, column, step in ((0, 3, 2e-2), (1, 3, 2e-2), (2, 3, 2e-2), (0, 1, 4e-4), (2, 0, 4e-4)):
        nudge = np.zeros((4, 4))
        nudge[row, column] = step
        up, down = (_evaluate(level, matrix + sign * nudge)[0] for sign in (1, -1))
        assert derivative[row, column] == pytest.approx((up - down) / (2 * step), rel=0.05, abs=2e-4)


def test_mutual_information_is_numpys() -> None:
    """Against entropies of a plain histogram of the same samples, whose bins are sharp."""
    rng = np.random.default_rng(0)
    fixed = rng.random(400_000).astype(np.float32)
    moving = (np.sin(4 * fixed) + 0.3 * rng.normal(size=fixed.size)).astype(np.float32)
    low, high = float(moving.min()), float(moving.max())
    bins = similarity.to_bins(fixed, 0.0, 1.0)
    score, _ = similarity.mutual_information(bins, moving, np.ones_like(moving), low, high)
    joint = np.histogram2d(fixed, moving, bins=(32, 29))[0] / fixed.size

    def entropy(p: np.ndarray) -> float:
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    plain = (entropy(joint.sum(0)) + entropy(joint.sum(1))) / entropy(joint.ravel())
    assert score == pytest.approx(plain, abs=0.02)
    noise, _ = similarity.mutual_information(bins, rng.permutation(moving), np.ones_like(moving), low, high)
    assert noise == pytest.approx(1.0, abs=2e-3) and score > 1.05


def test_local_correlation_is_numpys_and_its_derivative_right() -> None:
    rng = np.random.default_rng(0)
    fixed, moving = (torch.from_numpy(rng.random((9, 10, 11)).astype(np.float32)) for _ in range(2))
    weights = torch.zeros(9, 10, 11)
    weights[2:-2, 2:-2, 2:-2] = torch.from_numpy(rng.random((5, 6, 7)).astype(np.float32))
    score, derivative = similarity.local_correlation(fixed, moving, weights, 2)
    cube = (slice(2, 7), slice(3, 8), slice(4, 9))
    plain = np.corrcoef(fixed[cube].numpy().ravel(), moving[cube].numpy().ravel())[0, 1] ** 2
    assert float(score[4, 5, 6]) == pytest.approx(plain, abs=1e-4)
    nudge = torch.zeros_like(moving)
    for where in ((4, 5, 6), (3, 3, 5), (0, 4, 4)):
        nudge.zero_()
        nudge[where] = 0.05
        up, down = (
            float((similarity.local_correlation(fixed, moving + s * nudge, weights, 2)[0] * weights).sum())
            for s in (1, -1)
        )
        assert float(derivative[where]) == pytest.approx((up - down) / 0.1, rel=0.05, abs=2e-3)


def test_both_bodies_of_the_diffeomorphic_registration_agree(t1w: Volume) -> None:
    """The loops near the mask and the tensor operations of the whole volume, over iterations of one level."""
    rng = np.random.default_rng(2)
    u = gaussian(torch.from_numpy(rng.normal(size=(3, *GRID.shape)).astype(np.float32)), 4.0)
    u *= 1.5 / float(u.norm(dim=0).max())
    moving = resample_onto(t1w.data[None], GRID, GRID, displacement=4 * u)[0]
    weights = torch.from_numpy(ndimage.gaussian_filter((blobs(0) > 0).astype(np.float32), 0.7))
    weights[weights < 0.05] = 0
    start = u * diffeomorphic._rim(u)
    fast, fast_score = diffeomorphic._descend_loops(start.clone(), moving, t1w.data, weights, 5)
    plain, plain_score = diffeomorphic._descend_tensors(start, moving, t1w.data, weights, 5)
    assert float((fast - start).norm(dim=0).max()) > 0.5
    assert fast_score == pytest.approx(plain_score, abs=1e-4)
    assert float((fast - plain).norm(dim=0).max()) < 2e-3


def test_folds_are_smoothed_where_they_are() -> None:
    rng = np.random.default_rng(6)
    u = gaussian(torch.from_numpy(rng.normal(size=(3, 40, 41, 42)).astype(np.float32)), 3.0)
    u *= 0.5 / float(u.norm(dim=0).max())
    u[:, 18:22, 19:23, 20:24] += torch.from_numpy(rng.normal(size=(3, 4, 4, 4)).astype(np.float32)) * 2
    u *= diffeomorphic._rim(u)
    grid = Grid((40, 41, 42), np.eye(4))
    plain = (jacobian_determinant(DisplacementField(u, grid)) < diffeomorphic.LEAST_VOLUME) * diffeomorphic._rim(u)
    assert torch.equal(diffeomorphic._folded(u) > 0, plain > 0) and plain.sum() > 20
    with_replaced_slices = diffeomorphic._without_folds(u.clone())
    assert float(jacobian_determinant(DisplacementField(with_replaced_slices, grid)).min()) > 0.02
    assert float((with_replaced_slices - u).norm(dim=0)[:8].max()) < 0.02  # far from the folds


def test_the_loops_correlate_as_the_plain_body() -> None:
    rng = np.random.default_rng(3)
    fixed, moving = (torch.from_numpy(rng.random((31, 20, 24)).astype(np.float32)) for _ in range(2))
    weights = torch.zeros(31, 20, 24)
    weights[4:-5, 4:-4, 5:-4] = torch.from_numpy(rng.random((22, 12, 15)).astype(np.float32))
    score, derivative = similarity.local_correlation(fixed, moving, weights, 2)
    near = diffeomorphic._spans(diffeomorphic._near(weights, 3))
    force = np.ones((3, *fixed.shape), np.float32)
    mean = correlation_loop(fixed.numpy(), moving.numpy(), weights.numpy(), 2, similarity.VARIANCE_FLOOR, near, force)
    assert mean == pytest.approx(float((score * weights).sum() / weights.sum()), rel=1e-5)
    plain = (gradient(moving[None])[0] * derivative).numpy()
    inside = diffeomorphic._near(weights, 3).numpy()
    np.testing.assert_allclose(force[:, inside], plain[:, inside], atol=2e-4 * np.abs(plain).max())
    assert (force[:, ~inside] == 1).all()


def test_a_known_deformation_is_found(t1w: Volume) -> None:
    rng = np.random.default_rng(4)
    u = gaussian(torch.from_numpy(rng.normal(size=(3, *GRID.shape)).astype(np.float32)), 6.0)
    rim = torch.from_numpy(ndimage.gaussian_filter((blobs(0) > 0).astype(np.float32), 2.0))
    u *= 3.0 * rim / float(u.norm(dim=0)[rim > 0.5].mean())
    pose = rigid_matrix(np.array([0.05, -0.03, 0.04, 4, -6, 3]))
    # moving(m) = t1w(m') with m = pose (y + u(y)): the fixed image is what is pulled, so that u is the truth
    fixed = Volume(resample_onto(t1w.data[None], GRID, GRID, displacement=u)[0], GRID)
    moving = Volume(t1w.data, Grid(GRID.shape, pose @ GRID.affine))
    mask = Volume((fixed.data > 0.1).float(), GRID)
    fit = register_diffeomorphic(moving, fixed, pose, fixed_mask=mask, finest_mm=2.5)
    found = resample_onto(fit.forward.data, fit.forward.grid, GRID)
    inside = torch.from_numpy(ndimage.binary_erosion(mask.numpy() > 0.5, iterations=2))
    before, after = u.norm(dim=0)[inside], (found - u).norm(dim=0)[inside]
    assert float(after.mean()) < 0.25 * float(before.mean()) and float(before.mean()) > 1.5
    assert fit.similarity > 0.85
    assert float(jacobian_determinant(fit.forward).min()) > 0
    assert float(jacobian_determinant(fit.inverse).min()) > 0
    there_and_back = compose(fit.forward, fit.inverse).data.norm(dim=0)
    # exact at the inverse's voxels (below); between them it is interpolated, which costs a twentieth of a voxel
    assert float(there_and_back[fit.forward.data.norm(dim=0) > 0.5].quantile(0.99)) < 0.05 * 2.5
    assert float(compose(fit.inverse, fit.forward).data.norm(dim=0).quantile(0.999)) < 0.02


def test_an_image_that_ends_within_the_mask(t1w: Volume) -> None:
    """Where the moving image does not reach, its zeros pull at nothing: the field stays as small as elsewhere."""
    cut = Volume(t1w.data[:, :, 22:].clone(), Grid((64, 76, 40), GRID.affine @ shifted(0, 0, 22)))
    mask = Volume((t1w.data > 0.1).float(), GRID)
    fit = register_diffeomorphic(cut, t1w, np.eye(4), fixed_mask=mask, finest_mm=2.5)
    inside = mask.data > 0.5
    length = fit.forward.data.norm(dim=0)[inside]
    assert float(length.max()) < 1.0 and float(length.mean()) < 0.1


def test_images_that_are_the_same_stay(t1w: Volume) -> None:
    mask = Volume((t1w.data > 0.1).float(), GRID)
    fit = register_diffeomorphic(t1w, t1w, np.eye(4), fixed_mask=mask, finest_mm=2.5)
    length = fit.forward.data.norm(dim=0)[mask.data > 0.5]
    assert float(length.mean()) < 0.1 and fit.similarity > 0.95  # 0.04 of a voxel


def test_the_box_holds_a_mask_on_an_oblique_grid() -> None:
    turned = make_grid("oblique", (60, 50, 40), (2.0, 2.5, 3.0))
    mask = torch.zeros(turned.shape)
    mask[20:40, 15:35, 12:30] = 1
    corner, box = diffeomorphic._box_around(Volume(mask, turned), GRID)
    voxels = box.to_voxels(turned.to_world(np.argwhere(mask.numpy() > 0)))
    assert voxels.min() >= 4 and (voxels.max(axis=0) <= np.array(box.shape) - 5).all()
    assert np.allclose(box.to_world(np.zeros(3)), GRID.to_world(np.array(corner)))


def shifted(x: float, y: float, z: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix
