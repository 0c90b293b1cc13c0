"""The motion stage recovers movements that were put in, and says plainly what it cannot do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

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
    """Three b-values, 30 % of the volumes moved."""
    return make_subject()


def test_movements_come_back(subject: Subject) -> None:
    before = errors(np.tile(np.eye(4), (len(subject.dwi), 1, 1)), subject)
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    rotation, translation = errors(result.transforms, subject)
    assert before[0] > 1.2 and before[1] > 1.0
    assert rotation < 0.25 and translation < 0.2
    assert result.model == "3dSHORE" and "radial order 4" in result.notes[0]
    n, slices = len(subject.dwi), subject.dwi.grid.shape[2]
    assert result.transforms.shape == (n, 4, 4) and result.slice_z.shape == (n, slices)
    assert set(result.trace[0]) == COLUMNS and len(result.trace) % n == 0
    assert result.trace[-1]["iter_num"] == len(result.trace) // n
    last = decompose(result.transforms[n - 1], np.zeros(3))
    assert result.trace[-1]["rotateX"] == pytest.approx(last["rotateX"], abs=1e-6)
    assert result.xcorr.min() > 0.7 and result.r2.max() <= 1
    assert (np.abs(result.slice_z) > 5).mean() < 0.01


@pytest.mark.parametrize("orientation", ["oblique", pytest.param("PSR", marks=pytest.mark.slow)])
def test_frame_and_voxels_of_any_kind(orientation: str) -> None:
    subject = make_subject(orientation, count=30, spacing=(4.5, 5.0, 6.0))
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.4 and translation < 0.4
    assert result.slice_axis == 2
    # the frame is that of the b=0 volumes
    b0 = subject.dwi.is_b0
    offset = median_pose(np.linalg.inv(subject.transforms[b0]) @ result.transforms[b0], CENTRE)
    found = rigid_parameters(
        np.linalg.inv(subject.transforms[b0]) @ result.transforms[b0] @ np.linalg.inv(offset), CENTRE
    )
    assert np.abs(found[:, 3:]).max() < 0.3


def test_one_b0_only() -> None:
    subject = make_subject(b0_every=0, count=30)
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.4 and translation < 0.3
    np.testing.assert_allclose(result.transforms[0], np.eye(4), atol=1e-9)
    np.testing.assert_allclose(result.dwiref.numpy(), subject.dwi.data[0].numpy(), atol=0.5)


@pytest.mark.slow
def test_a_still_head_stays() -> None:
    subject = make_subject(moved=0.0, count=30)
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    world = subject.dwi.grid.to_world(np.argwhere(subject.mask.numpy() > 0)[::50])
    still = np.tile(np.eye(4), (len(subject.dwi), 1, 1))
    assert point_displacement(result.transforms, still, world).mean() < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("model", ["auto", "tensor"])
def test_one_shell(model: str) -> None:
    subject = make_subject(rings=(1000.0,), count=24)
    result = estimate_motion(subject.dwi, subject.mask, replace(FAST, model=model))
    rotation, translation = errors(result.transforms, subject)
    assert result.model == ("3dSHORE" if model == "auto" else model)
    assert ("one b-value" if model == "auto" else "as asked for") in result.notes[0]
    assert rotation < 0.4 and translation < 0.25


def test_few_directions_predict_more_closely_without_logarithms() -> None:
    """Twelve directions of brain, of water and of the dark rim of a rough mask: predictions against noise-free signals.

    A tensor has nearly as many parameters as there are volumes, and takes over noise, of which logarithms of small
    signals are mostly made.
    """
    rng, axes, count = np.random.default_rng(3), directions(12), 4000
    fibre = rng.normal(size=(count, 3))
    along = (axes @ (fibre / np.linalg.norm(fibre, axis=1)[:, None]).T) ** 2
    water, rim = np.arange(count) < 0.2 * count, np.arange(count) >= 0.9 * count
    anisotropy, mean = np.where(water, 0, rng.uniform(0, 0.9, count)), np.where(water, 3, rng.uniform(0.6, 1, count))
    size = np.where(water, 800, np.where(rim, 20, rng.uniform(200, 500, count)))
    true = size * np.exp(-1.5 * mean * (1 + anisotropy * (along - 1 / 3) * 1.5))
    noisy = np.hypot(true + 12 * rng.normal(size=true.shape), 12 * rng.normal(size=true.shape))
    seen, b0 = (torch.as_tensor(x, dtype=torch.float32) for x in (noisy, size[None]))
    still, wrong = np.tile(np.eye(4), (12, 1, 1)), {}
    for wanted in ("auto", "tensor"):
        model = choose_model(12, 2, wanted)
        found = predict(seen, b0, model, np.full(12, 1500.0), axes, still, np.ones(12)).values.numpy()
        square = ((found - true) ** 2).mean(axis=0)
        wrong[model.name] = [float(np.sqrt(square[part].mean())) for part in (water, rim, ~water & ~rim)]
    assert (np.array(wrong["3dSHORE"]) < [0.85, 0.9, 1.0] * np.array(wrong["tensor"])).all()


def test_order_grows_with_the_number_of_directions() -> None:
    one_shell = {count: choose_model(count, 2, "auto").order for count in (7, 12, 15, 16, 28, 29)}
    assert one_shell == {7: 2, 12: 2, 15: 2, 16: 4, 28: 4, 29: 6}
    several = {count: choose_model(count, 4, "auto").order for count in (7, 21, 22, 49, 50)}
    assert several == {7: 2, 21: 2, 22: 4, 49: 4, 50: 6}
    assert choose_model(6, 2, "auto").name == choose_model(6, 2, "tensor").name == "none"


@pytest.mark.slow
def test_affine_keeps_the_size_of_the_head() -> None:
    subject = make_subject(count=30)
    result = estimate_motion(subject.dwi, subject.mask, MotionSettings(iters=4, transform="Affine"))
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.6 and translation < 0.4
    volume = np.cbrt(np.linalg.det(result.transforms[:, :3, :3]))
    assert np.abs(volume - 1).mean() < 0.05


def test_few_volumes_lower_the_order_and_then_the_model() -> None:
    small = make_subject(count=12, spacing=(7.0, 7.0, 7.0))
    result = estimate_motion(small.dwi, small.mask, MotionSettings(iters=1))
    assert result.model == "3dSHORE" and "radial order 2" in result.notes[0]
    tiny = small.dwi.select(np.arange(5))
    result = estimate_motion(tiny, small.mask, MotionSettings(iters=1))
    assert result.model == "none" and "too few" in result.notes[0]
    assert set(METHODS) == {"3dSHORE", "tensor", "none", "off", "eddy", "replace"}


def test_model_none_takes_the_b0s_in_between() -> None:
    subject = make_subject(count=20, b0_every=5, spacing=(6.0, 6.0, 6.0), moved=0.0)
    n = len(subject.dwi)
    time = np.arange(n) / (n - 1)
    drift = rigid_matrix(time[:, None] * np.array([0.03, 0, 0.02, 3, -2, 1]), CENTRE)
    voxels = subject.dwi.grid.affine
    moved = replace(subject.dwi, data=_carried(subject.dwi.data, voxels, drift))
    result = estimate_motion(moved, subject.mask, MotionSettings(model="none"))
    rotation, translation = errors(result.transforms, Subject(moved, subject.mask, drift))
    assert rotation < 0.25 and translation < 0.2


def _carried(data: torch.Tensor, affine: np.ndarray, matrices: np.ndarray) -> torch.Tensor:
    from scipy.ndimage import affine_transform

    out = []
    for volume, matrix in zip(data.numpy(), matrices, strict=True):
        m = np.linalg.inv(affine) @ np.linalg.inv(matrix) @ affine
        out.append(affine_transform(volume, m[:3, :3], m[:3, 3], order=3, mode="nearest"))
    return torch.from_numpy(np.stack(out))


def test_switched_off() -> None:
    subject = make_subject(count=8, spacing=(7.0, 7.0, 7.0))
    result = estimate_motion(subject.dwi, subject.mask, MotionSettings(method="none"))
    assert result.model == "off" and not result.trace
    assert (result.transforms == np.eye(4)).all()


def test_a_lost_slice_is_found_and_does_no_harm() -> None:
    subject = make_subject(count=30, moved=0.2)
    weak, lost = 17, subject.dwi.grid.shape[2] // 2
    subject.dwi.data[weak, :, :, lost] *= 0.3
    result = estimate_motion(subject.dwi, subject.mask, FAST)
    assert np.unravel_index(result.slice_z.argmin(), result.slice_z.shape) == (weak, lost)
    assert result.slice_z[weak, lost] < -6
    rotation, translation = errors(result.transforms, subject)
    assert rotation < 0.25 and translation < 0.2


def test_series_that_cannot_be_used() -> None:
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


def test_plan_names_the_model() -> None:
    from dsiprep.data.acquisition import SamplingScheme

    scheme = SamplingScheme("DSI", True, (200.0, 400.0, 600.0), 128, 1, 5000.0, "")
    assert "3dSHORE" in explain_model(scheme, MotionSettings())
    shell = replace(scheme, bvalues=(1000.0,), n_directions=30)
    assert "one b-value" in explain_model(shell, MotionSettings())
    assert "tensor" in explain_model(shell, MotionSettings(model="tensor"))
    assert "switched off" in explain_model(scheme, MotionSettings(method="none"))


def test_poses_between_around_and_beyond() -> None:
    rng = np.random.default_rng(0)
    parameters = np.zeros((40, 6))
    parameters[:, 3] = np.linspace(0, 1, 40)
    jumps = rng.choice(40, 12, replace=False)
    moved = parameters.copy()
    moved[jumps] += rng.uniform(-1, 1, (12, 6)) * np.r_[[0.1] * 3, [5] * 3]
    rest = rigid_parameters(resting_poses(rigid_matrix(moved, CENTRE), CENTRE), CENTRE)
    assert np.abs(rest - parameters)[6:-6, 3:].max() < 0.3
    known = np.zeros(40, bool)
    known[[0, 39]] = True
    between = rigid_parameters(interpolate_poses(rigid_matrix(parameters, CENTRE), known, CENTRE), CENTRE)
    np.testing.assert_allclose(between, parameters, atol=1e-9)
    middle = rigid_parameters(median_pose(rigid_matrix(moved - parameters, CENTRE), CENTRE), CENTRE)
    assert np.abs(middle).max() < 0.05


def test_decomposition_gives_the_matrix_back() -> None:
    matrix = rigid_matrix(np.array([0.1, -0.2, 0.3, 4, 5, 6]))
    scale, shear = np.diag([1.1, 0.9, 1.05]), np.array([[1, 0.05, -0.02], [0, 1, 0.03], [0, 0, 1.0]])
    matrix[:3, :3] = matrix[:3, :3] @ scale @ shear
    row = decompose(matrix, CENTRE)
    np.testing.assert_allclose([row[f"scale{a}"] for a in "XYZ"], [1.1, 0.9, 1.05])
    np.testing.assert_allclose([row[f"shear{a}"] for a in ("XY", "XZ", "YZ")], [0.05, -0.02, 0.03])
    np.testing.assert_allclose([row[f"rotate{a}"] for a in "XYZ"], [0.1, -0.2, 0.3])
    np.testing.assert_allclose([row[f"shift{a}"] for a in "XYZ"], matrix[:3, :3] @ CENTRE + matrix[:3, 3] - CENTRE)


def test_what_poses_share_with_the_gradient_goes_and_movement_stays() -> None:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((120, 3))
    q *= (rng.uniform(0.3, 1, 120) / np.linalg.norm(q, axis=1))[:, None]
    q[::12] = 0
    run = np.zeros(120, int)
    x, y, _ = q.T
    size = np.linalg.norm(q, axis=1)
    fourth = (x**4 - 6 * x**2 * y**2 + y**4) / np.maximum(size, 1e-9) ** 3
    shared = size[:, None] * np.r_[0.002, 0, 0, 0.2, -0.1, 0] + fourth[:, None] * np.r_[0, 0.003, 0, 0, 0, 0.3]
    jumps = rng.uniform(-1, 1, (120, 6)) * np.r_[[0.1] * 3, [5] * 3] * (rng.random(120) < 0.3)[:, None]
    noise = 0.02 * rng.standard_normal((120, 6)) * np.r_[[1 / 60] * 3, [1] * 3]
    truth = rigid_matrix(jumps + noise, CENTRE)
    found = remove_gradient_trend(truth @ rigid_matrix(shared, CENTRE), q, run, CENTRE)
    left = rigid_parameters(np.linalg.inv(truth) @ found, CENTRE)[:, 3:]
    assert np.sqrt((left**2).mean()) < 0.3 * np.sqrt((shared[:, 3:] ** 2).mean())
    half = rng.random(120) < 0.5
    calm = rigid_matrix(half[:, None] * rng.uniform(-1, 1, (120, 6)) * np.r_[[0.1] * 3, [5] * 3] + noise, CENTRE)
    restless = rigid_matrix(np.cumsum(rng.standard_normal((120, 6)), axis=0) * np.r_[[0.005] * 3, [0.3] * 3], CENTRE)
    for poses, limit in ((calm, 0.03), (restless, 0.1)):
        taken = rigid_parameters(np.linalg.inv(poses) @ remove_gradient_trend(poses, q, run, CENTRE), CENTRE)[:, 3:]
        assert np.sqrt((taken**2).mean()) < limit
    both = np.concatenate([q[:60], -q[:60]])  # an odd function, as eddy currents bring about, is left
    odd = rigid_matrix(noise + both[:, :1] * np.r_[0, 0, 0, 0, 0.5, 0], CENTRE)
    kept = rigid_parameters(remove_gradient_trend(odd, both, run, CENTRE), CENTRE)[:, 4]
    assert np.polyfit(both[:, 0], kept, 1)[0] > 0.45


def test_rounds_of_few_directions_come_to_rest() -> None:
    """Twelve directions and a tensor: if volumes go all the way to their predictions, displacements never die away."""
    axes = directions(12)
    rng = np.random.default_rng(3)
    seen, b0 = torch.as_tensor(rng.uniform(50, 60, (12, 40)), dtype=torch.float32), torch.full((1, 40), 100.0)
    still = np.tile(np.eye(4), (12, 1, 1))
    found = predict(seen, b0, Model("tensor"), np.full(12, 1500.0), axes, still, np.ones(12))
    left = np.eye(12) - found.matrix.numpy()
    last = {}
    for share in (1.0, found.relaxation):
        away = rng.normal(size=12)
        for _ in range(30):
            step = share * left @ away
            away = away - step
        last[share] = np.abs(step).max()
    assert found.relaxation < 0.8
    assert last[1.0] > 0.05 and last[found.relaxation] < 1e-3


def test_part_of_the_way_between_poses() -> None:
    turn = np.array([0.2, -0.1, 0.05, 3.0, 1.0, -2.0])
    before = rigid_matrix(np.array([[0.1, 0.2, -0.3, 4.0, 5.0, 6.0]]), CENTRE)
    halfway = relaxed_poses(before, before @ rigid_matrix(turn, CENTRE), 0.5, CENTRE)
    np.testing.assert_allclose(halfway[0], before[0] @ rigid_matrix(turn / 2, CENTRE), atol=1e-12)
