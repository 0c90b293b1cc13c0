"""The motion stage: recovery of simulated movements, signal models, outlier slices and rejected input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from dsiprep.data.acquisition import SamplingScheme
from dsiprep.data.grid import Grid, Volume
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import point_displacement, rigid_matrix, rigid_parameters
from dsiprep.ops.motion.pose_prior import resting_poses
from dsiprep.ops.motion.poses import decompose, interpolate_poses, median_pose, relaxed_poses, remove_gradient_trend
from dsiprep.ops.qspace.prediction import Model, choose_model, predict
from dsiprep.settings import MotionSettings
from dsiprep.stages.motion import METHODS, estimate_motion, explain_model
from helpers.motion_subject import CENTRE, Subject, directions, errors, make_subject

FAST = MotionSettings(iters=6)
COLUMNS = {
    "volume", "scaleX", "scaleY", "scaleZ", "shearXY", "shearXZ", "shearYZ", "rotateX", "rotateY", "rotateZ",
    "shiftX", "shiftY", "shiftZ", "iter_num", "iter_name",
}  # fmt: skip


@pytest.fixture(scope="module")
def subject() -> Subject:
    """Series with three b-values and movement in 30 % of the volumes."""
    return make_subject()


def test_movements_are_recovered(subject: Subject) -> None:
    before = errors(np.tile(np.eye(4), (len(subject.dwi), 1, 1)), subject)
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    rotation, translation = errors(result.transforms, subject)
    assert before[0] > 1.2
    assert before[1] > 1.0
    assert rotation < 0.25
    assert translation < 0.2
    assert result.model == "3dSHORE"
    assert "radial order 4" in result.notes[0]
    n, slices = len(subject.dwi), subject.dwi.grid.shape[2]
    assert result.transforms.shape == (n, 4, 4)
    assert result.slice_z.shape == (n, slices)
    assert set(result.trace[0]) == COLUMNS
    assert len(result.trace) % n == 0
    assert result.trace[-1]["iter_num"] == len(result.trace) // n
    last = decompose(result.transforms[n - 1], np.zeros(3))
    assert result.trace[-1]["rotateX"] == pytest.approx(last["rotateX"], abs=1e-6)
    assert result.xcorr.min() > 0.7
    assert result.r2.max() <= 1
    assert (np.abs(result.slice_z) > 5).mean() < 0.01


@pytest.mark.parametrize("orientation", ["oblique", pytest.param("PSR", marks=pytest.mark.slow)])
def test_any_orientation_and_anisotropic_voxels(orientation: str) -> None:
    subject = make_subject(orientation, count=30, spacing=(4.5, 5.0, 6.0))
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.4
    assert translation < 0.4
    assert result.slice_axis == 2
    # the frame is the median pose of the b=0 volumes
    b0 = subject.dwi.is_b0
    difference = np.linalg.inv(subject.transforms[b0]) @ result.transforms[b0]
    offset = median_pose(difference, CENTRE)
    residual = rigid_parameters(difference @ np.linalg.inv(offset), CENTRE)
    assert np.abs(residual[:, 3:]).max() < 0.3


def test_series_with_a_single_b0() -> None:
    subject = make_subject(b0_every=0, count=30)
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.4
    assert translation < 0.3
    np.testing.assert_allclose(result.transforms[0], np.eye(4), atol=1e-9)
    np.testing.assert_allclose(result.dwiref.numpy(), subject.dwi.data[0].numpy(), atol=0.5)


@pytest.mark.slow
def test_no_movement_is_estimated_for_a_still_head() -> None:
    subject = make_subject(moved=0.0, count=30)
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    world = subject.dwi.grid.to_world(np.argwhere(subject.mask.numpy() > 0)[::50])
    identity = np.tile(np.eye(4), (len(subject.dwi), 1, 1))
    assert point_displacement(result.transforms, identity, world).mean() < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("model", ["auto", "tensor"])
def test_movements_are_recovered_on_one_shell(model: str) -> None:
    subject = make_subject(rings=(1000.0,), count=24)
    result = estimate_motion(subject.dwi, subject.mask, replace(FAST, model=model))
    rotation, translation = errors(result.transforms, subject)
    assert result.model == ("3dSHORE" if model == "auto" else model)
    assert ("one b-value" if model == "auto" else "as requested") in result.notes[0]
    assert rotation < 0.4
    assert translation < 0.25


def test_shore_predicts_few_directions_better_than_the_tensor() -> None:
    """Twelve directions in brain tissue, water and the dark rim of a rough mask, compared with noise-free signals.

    A tensor has nearly as many parameters as there are volumes, so its predictions follow the noise, which is amplified
    in the logarithms of small signals.
    """
    rng, axes, count = np.random.default_rng(3), directions(12), 4000
    fibre = rng.normal(size=(count, 3))
    cos2 = (axes @ (fibre / np.linalg.norm(fibre, axis=1)[:, None]).T) ** 2
    water, rim = np.arange(count) < 0.2 * count, np.arange(count) >= 0.9 * count
    anisotropy, mean = np.where(water, 0, rng.uniform(0, 0.9, count)), np.where(water, 3, rng.uniform(0.6, 1, count))
    amplitude = np.where(water, 800, np.where(rim, 20, rng.uniform(200, 500, count)))
    true = amplitude * np.exp(-1.5 * mean * (1 + anisotropy * (cos2 - 1 / 3) * 1.5))
    noisy = np.hypot(true + 12 * rng.normal(size=true.shape), 12 * rng.normal(size=true.shape))
    observed, b0 = (torch.as_tensor(x, dtype=torch.float32) for x in (noisy, amplitude[None]))
    identity, rmse = np.tile(np.eye(4), (12, 1, 1)), {}
    for wanted in ("auto", "tensor"):
        model = choose_model(12, 2, wanted)
        predicted = predict(observed, b0, model, np.full(12, 1500.0), axes, identity, np.ones(12)).values.numpy()
        square = ((predicted - true) ** 2).mean(axis=0)
        rmse[model.name] = [float(np.sqrt(square[part].mean())) for part in (water, rim, ~water & ~rim)]
    assert (np.array(rmse["3dSHORE"]) < [0.85, 0.9, 1.0] * np.array(rmse["tensor"])).all()


def test_radial_order_depends_on_the_number_of_directions() -> None:
    one_shell = {count: choose_model(count, 2, "auto").order for count in (7, 12, 15, 16, 28, 29)}
    assert one_shell == {7: 2, 12: 2, 15: 2, 16: 4, 28: 4, 29: 6}
    several = {count: choose_model(count, 4, "auto").order for count in (7, 21, 22, 49, 50)}
    assert several == {7: 2, 21: 2, 22: 4, 49: 4, 50: 6}
    assert choose_model(6, 2, "auto").name == choose_model(6, 2, "tensor").name == "none"


@pytest.mark.slow
def test_affine_transforms_preserve_the_volume_of_the_head() -> None:
    subject = make_subject(count=30)
    result = estimate_motion(subject.dwi, subject.mask, MotionSettings(iters=4, transform="Affine"))
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.6
    assert translation < 0.4
    scale = np.cbrt(np.linalg.det(result.transforms[:, :3, :3]))
    assert np.abs(scale - 1).mean() < 0.05


def test_few_volumes_reduce_the_order_or_disable_the_model() -> None:
    small = make_subject(count=12, spacing=(7.0, 7.0, 7.0))
    result = estimate_motion(small.dwi, small.mask, MotionSettings(iters=1))
    assert result.model == "3dSHORE"
    assert "radial order 2" in result.notes[0]
    tiny = small.dwi.select(np.arange(5))
    result = estimate_motion(tiny, small.mask, MotionSettings(iters=1))
    assert result.model == "none"
    assert "too few" in result.notes[0]
    assert set(METHODS) == {"3dSHORE", "tensor", "none", "off", "eddy", "replace"}


def test_model_none_interpolates_between_b0_volumes() -> None:
    subject = make_subject(count=20, b0_every=5, spacing=(6.0, 6.0, 6.0), moved=0.0)
    n = len(subject.dwi)
    time = np.arange(n) / (n - 1)
    drift = rigid_matrix(time[:, None] * np.array([0.03, 0, 0.02, 3, -2, 1]), CENTRE)
    voxels = subject.dwi.grid.affine
    moved = replace(subject.dwi, data=_moved(subject.dwi.data, voxels, drift))
    result = estimate_motion(moved, subject.mask, MotionSettings(model="none"))
    rotation, translation = errors(result.transforms, Subject(moved, subject.mask, drift))
    assert rotation < 0.25
    assert translation < 0.2


def _moved(data: torch.Tensor, affine: np.ndarray, matrices: np.ndarray) -> torch.Tensor:
    """Move each volume by its rigid transform, with SciPy."""
    moved = []
    for volume, matrix in zip(data.numpy(), matrices, strict=True):
        m = np.linalg.inv(affine) @ np.linalg.inv(matrix) @ affine
        moved.append(affine_transform(volume, m[:3, :3], m[:3, 3], order=3, mode="nearest"))
    return torch.from_numpy(np.stack(moved))


def test_motion_correction_can_be_switched_off() -> None:
    subject = make_subject(count=8, spacing=(7.0, 7.0, 7.0))
    result = estimate_motion(subject.dwi, subject.mask, MotionSettings(method="none"))
    assert result.model == "off"
    assert not result.trace
    assert (result.transforms == np.eye(4)).all()


def test_a_slice_with_signal_dropout_is_detected_and_motion_is_still_recovered() -> None:
    subject = make_subject(count=30, moved=0.2)
    volume, dropout = 17, subject.dwi.grid.shape[2] // 2
    subject.dwi.data[volume, :, :, dropout] *= 0.3
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    assert np.unravel_index(result.slice_z.argmin(), result.slice_z.shape) == (volume, dropout)
    assert result.slice_z[volume, dropout] < -6
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.25
    assert translation < 0.2


@pytest.mark.parametrize("pattern", ["interleave", "six neighbours"])
def test_many_lost_slices_are_found_and_replaced(pattern: str) -> None:
    subject = make_subject(count=30, moved=0.2)
    dwi, slices = subject.dwi, subject.dwi.grid.shape[2]
    true, lost = dwi.data.clone(), np.zeros((len(dwi), slices), bool)
    for volume in (5, 17, 26):
        lost[volume, slice(volume % 2, None, 2) if pattern == "interleave" else slice(5, 11)] = True
        dwi.data[volume, :, :, lost[volume]] *= 0.4
    result = estimate_motion(dwi, subject.mask, replace(FAST, outliers="replace"))
    judged = result.slice_z != 0
    assert result.outlier_slices is not None
    assert result.outlier_slices[lost & judged].mean() > 0.95
    intact, touched = result.outlier_slices & ~lost, lost.any(axis=1)
    assert intact[~touched].sum() <= 1
    assert intact[touched].sum() <= 1
    assert (result.slice_z[lost & result.outlier_slices] <= -2).all()
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.4
    assert translation < 0.3
    inside = subject.mask.numpy()[..., 5:11] > 0.5
    for volume in (5, 17, 26):
        repaired = result.with_replaced_slices(volume, dwi.data[volume])
        whole, filled, reduced = (
            x[..., 5:11].numpy()[inside].mean() for x in (true[volume], repaired, dwi.data[volume])
        )
        assert abs(filled - whole) < 0.2 * abs(reduced - whole)  # voxels of the true volume are mostly noise


def test_invalid_input_is_rejected() -> None:
    subject = make_subject(count=8, spacing=(7.0, 7.0, 7.0))
    dwi, mask = subject.dwi, subject.mask
    with pytest.raises(InputError, match="mask has no voxels"):
        estimate_motion(dwi, Volume(torch.zeros_like(mask.data), mask.grid), FAST)
    with pytest.raises(InputError, match="no volume has b <= 100"):
        estimate_motion(dwi.select(~dwi.is_b0), mask, FAST)
    broken = dwi.data.clone()
    broken[3, 2, 2, 2] = torch.nan
    with pytest.raises(InputError, match="volume 3 holds NaN"):
        estimate_motion(dwi.with_data(broken), mask, FAST)
    shifted = mask.grid.affine.copy()
    shifted[0, 3] += 5
    with pytest.raises(InputError, match="mask is"):
        estimate_motion(dwi, Volume(mask.data, Grid(mask.grid.shape, shifted)), FAST)


def test_explanation_names_the_model() -> None:
    scheme = SamplingScheme("DSI", True, (200.0, 400.0, 600.0), 128, 1, 5000.0, "")
    assert "3dSHORE" in explain_model(scheme, MotionSettings())
    shell = replace(scheme, bvalues=(1000.0,), n_directions=30)
    assert "one b-value" in explain_model(shell, MotionSettings())
    assert "tensor" in explain_model(shell, MotionSettings(model="tensor"))
    assert "switched off" in explain_model(scheme, MotionSettings(method="none"))


def test_resting_interpolated_and_median_poses() -> None:
    rng = np.random.default_rng(0)
    drift = np.zeros((40, 6))
    drift[:, 3] = np.linspace(0, 1, 40)
    jumps = rng.choice(40, 12, replace=False)
    moved = drift.copy()
    moved[jumps] += rng.uniform(-1, 1, (12, 6)) * np.r_[[0.1] * 3, [5] * 3]
    resting = rigid_parameters(resting_poses(rigid_matrix(moved, CENTRE), CENTRE), CENTRE)
    assert np.abs(resting - drift)[6:-6, 3:].max() < 0.3
    known = np.zeros(40, bool)
    known[[0, 39]] = True
    interpolated = rigid_parameters(interpolate_poses(rigid_matrix(drift, CENTRE), known, CENTRE), CENTRE)
    np.testing.assert_allclose(interpolated, drift, atol=1e-9)
    median = rigid_parameters(median_pose(rigid_matrix(moved - drift, CENTRE), CENTRE), CENTRE)
    assert np.abs(median).max() < 0.05


def test_decompose_recovers_scale_shear_rotation_and_shift() -> None:
    matrix = rigid_matrix(np.array([0.1, -0.2, 0.3, 4, 5, 6]))
    scale, shear = np.diag([1.1, 0.9, 1.05]), np.array([[1, 0.05, -0.02], [0, 1, 0.03], [0, 0, 1.0]])
    matrix[:3, :3] = matrix[:3, :3] @ scale @ shear
    row = decompose(matrix, CENTRE)
    np.testing.assert_allclose([row[f"scale{a}"] for a in "XYZ"], [1.1, 0.9, 1.05])
    np.testing.assert_allclose([row[f"shear{a}"] for a in ("XY", "XZ", "YZ")], [0.05, -0.02, 0.03])
    np.testing.assert_allclose([row[f"rotate{a}"] for a in "XYZ"], [0.1, -0.2, 0.3])
    np.testing.assert_allclose([row[f"shift{a}"] for a in "XYZ"], matrix[:3, :3] @ CENTRE + matrix[:3, 3] - CENTRE)


def test_gradient_trend_is_removed_and_movement_is_kept() -> None:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((120, 3))
    q *= (rng.uniform(0.3, 1, 120) / np.linalg.norm(q, axis=1))[:, None]
    q[::12] = 0
    run = np.zeros(120, int)
    x, y, _ = q.T
    size = np.linalg.norm(q, axis=1)
    fourth = (x**4 - 6 * x**2 * y**2 + y**4) / np.maximum(size, 1e-9) ** 3
    trend = size[:, None] * np.r_[0.002, 0, 0, 0.2, -0.1, 0] + fourth[:, None] * np.r_[0, 0.003, 0, 0, 0, 0.3]
    jumps = rng.uniform(-1, 1, (120, 6)) * np.r_[[0.1] * 3, [5] * 3] * (rng.random(120) < 0.3)[:, None]
    noise = 0.02 * rng.standard_normal((120, 6)) * np.r_[[1 / 60] * 3, [1] * 3]
    truth = rigid_matrix(jumps + noise, CENTRE)
    corrected = remove_gradient_trend(truth @ rigid_matrix(trend, CENTRE), q, run, CENTRE)
    error = rigid_parameters(np.linalg.inv(truth) @ corrected, CENTRE)[:, 3:]
    assert np.sqrt((error**2).mean()) < 0.3 * np.sqrt((trend[:, 3:] ** 2).mean())
    half = rng.random(120) < 0.5
    calm = rigid_matrix(half[:, None] * rng.uniform(-1, 1, (120, 6)) * np.r_[[0.1] * 3, [5] * 3] + noise, CENTRE)
    restless = rigid_matrix(np.cumsum(rng.standard_normal((120, 6)), axis=0) * np.r_[[0.005] * 3, [0.3] * 3], CENTRE)
    for poses, limit in ((calm, 0.03), (restless, 0.1)):
        change = rigid_parameters(np.linalg.inv(poses) @ remove_gradient_trend(poses, q, run, CENTRE), CENTRE)[:, 3:]
        assert np.sqrt((change**2).mean()) < limit
    paired = np.concatenate([q[:60], -q[:60]])  # odd functions of q, as caused by eddy currents, are not removed
    odd = rigid_matrix(noise + paired[:, :1] * np.r_[0, 0, 0, 0, 0.5, 0], CENTRE)
    kept = rigid_parameters(remove_gradient_trend(odd, paired, run, CENTRE), CENTRE)[:, 4]
    assert np.polyfit(paired[:, 0], kept, 1)[0] > 0.45


def test_relaxed_rounds_converge_with_few_directions() -> None:
    """Twelve directions and a tensor: with full steps towards the predictions, displacements never decay."""
    axes = directions(12)
    rng = np.random.default_rng(3)
    observed, b0 = torch.as_tensor(rng.uniform(50, 60, (12, 40)), dtype=torch.float32), torch.full((1, 40), 100.0)
    identity = np.tile(np.eye(4), (12, 1, 1))
    prediction = predict(observed, b0, Model("tensor"), np.full(12, 1500.0), axes, identity, np.ones(12))
    residual_of = np.eye(12) - prediction.matrix.numpy()
    last_step = {}
    for fraction in (1.0, prediction.relaxation):
        displacement = rng.normal(size=12)
        for _ in range(30):
            step = fraction * residual_of @ displacement
            displacement = displacement - step
        last_step[fraction] = np.abs(step).max()
    assert prediction.relaxation < 0.8
    assert last_step[1.0] > 0.05
    assert last_step[prediction.relaxation] < 1e-3


def test_relaxed_poses_apply_a_fraction_of_the_step() -> None:
    step = np.array([0.2, -0.1, 0.05, 3.0, 1.0, -2.0])
    before = rigid_matrix(np.array([[0.1, 0.2, -0.3, 4.0, 5.0, 6.0]]), CENTRE)
    halfway = relaxed_poses(before, before @ rigid_matrix(step, CENTRE), 0.5, CENTRE)
    np.testing.assert_allclose(halfway[0], before[0] @ rigid_matrix(step / 2, CENTRE), atol=1e-12)
