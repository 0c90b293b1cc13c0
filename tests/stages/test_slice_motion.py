"""Motion within volumes: a head that moves during some volumes, whose signal is exact in the pose of each slice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsiprep.data.motion import Motion
from dsiprep.data.results import Distortion
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError, SettingsError
from dsiprep.ops.image.affine import mean_rigid, point_displacement, rigid_matrix
from dsiprep.ops.motion.eddy_model import zero_eddy_currents
from dsiprep.ops.motion.slice_samples import volume_in_mean_pose
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.settings import MotionSettings
from dsiprep.stages.slice_motion import choose_volumes, follow_slices, follows_slices
from helpers.motion_subject import CENTRE, Subject, make_subject, signal

NOISE = 15.0
MOVING = (6, 15, 24, 33)


def _shots(slices: int) -> tuple[tuple[int, ...], ...]:
    return tuple((k,) for k in (*range(0, slices, 2), *range(1, slices, 2)))


def _true_poses(subject: Subject, shots: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """The head moves half way through each of `MOVING` and rests there until the next, (n, slices, 4, 4)."""
    rng = np.random.default_rng(8)
    count, here = len(subject.dwi), np.zeros(6)
    parameters = np.zeros((count, len(shots), 6))
    for volume in range(count):
        for number, group in enumerate(shots):
            if volume in MOVING and number == len(shots) // 2:
                here = rng.choice([-1, 1], 6) * rng.uniform([0.03] * 3 + [2] * 3, [0.06] * 3 + [4] * 3)
            parameters[volume, list(group)] = here
    return rigid_matrix(parameters, CENTRE)


def _acquired(still: Subject, poses: np.ndarray) -> Subject:
    """A still subject's series acquired in other poses of its slices, (n, slices, 4, 4)."""
    dwi, grid = still.dwi, still.dwi.grid
    data, rng = np.empty(tuple(dwi.data.shape), np.float32), np.random.default_rng(9)
    plane = np.argwhere(np.ones(grid.shape[:2], bool))
    for volume, slice_poses in enumerate(poses):
        for k, pose in enumerate(slice_poses):
            head = np.linalg.inv(pose)
            points = grid.to_world(np.insert(plane, 2, k, axis=1)) @ head[:3, :3].T + head[:3, 3]
            clean = signal(points, dwi.bvals[volume], rotate_bvecs(dwi.bvecs[volume], pose)).reshape(grid.shape[:2])
            real, imaginary = NOISE * rng.standard_normal((2, *grid.shape[:2]))
            data[volume, ..., k] = np.hypot(clean + real, imaginary)
    means = np.stack([mean_rigid(each) for each in poses])
    return Subject(replace(dwi, data=torch.from_numpy(data)), still.mask, means)


@pytest.fixture(scope="module")
def moving_subject() -> tuple[Subject, np.ndarray, tuple[tuple[int, ...], ...]]:
    still = make_subject(count=40, moved=0, noise=NOISE)
    shots = _shots(still.dwi.grid.shape[2])
    poses = _true_poses(still, shots)
    return _acquired(still, poses), poses, shots


def _one_pose(subject: Subject, transforms: np.ndarray) -> Motion:
    n, slices = len(subject.dwi), subject.dwi.grid.shape[2]
    nothing = np.zeros((n, slices))
    reference = replace(subject.mask, data=subject.dwi.data[0])
    return Motion(
        transforms=transforms, volumes=np.arange(n), dwiref=reference, mask=subject.mask, r2=np.ones(n),
        xcorr=np.ones(n), slice_z=nothing, slice_axis=2, trace=[], model="3dSHORE", outlier_slices=nothing > 0,
    )  # fmt: skip


def _slice_errors(found: np.ndarray, true: np.ndarray, subject: Subject) -> np.ndarray:
    """Mean displacement (mm) of brain points of each slice, less what all resting volumes have in common; (n, k)."""
    rest = np.setdiff1d(np.arange(len(true)), MOVING)
    common = mean_rigid(np.linalg.inv(found[rest].mean(axis=1)) @ true[rest].mean(axis=1))
    out = np.full(true.shape[:2], np.nan)
    for k in range(true.shape[1]):
        inside = np.argwhere(subject.mask.numpy()[..., k] > 0.5)
        if len(inside) > 20:
            points = subject.dwi.grid.to_world(np.insert(inside[::5], 2, k, axis=1))
            out[:, k] = point_displacement(np.linalg.inv(found[:, k]), common @ np.linalg.inv(true[:, k]), points).mean(
                1
            )
    return out


def test_volumes_that_move_are_found_and_followed(
    moving_subject: tuple[Subject, np.ndarray, tuple[tuple[int, ...], ...]],
) -> None:
    subject, true, shots = moving_subject
    before = _one_pose(subject, subject.transforms)
    found = follow_slices(subject.dwi, subject.mask, before, shots, MotionSettings())
    assert found.slices is not None
    assert set(np.flatnonzero(found.slices.moving)) >= set(MOVING)
    assert found.slices.moving.sum() <= len(MOVING) + 3
    moving = list(MOVING)
    one = np.nanmean(_slice_errors(np.repeat(before.transforms[:, None], true.shape[1], 1), true, subject)[moving])
    errors = _slice_errors(found.slices.slice_poses, true, subject)
    assert one > 1.5
    assert np.nanmean(errors[moving]) < 0.5  # slices at the ends of the head hardly tell the time of a move
    assert np.nanmedian(errors[moving]) < 0.35
    assert np.nanmean(np.delete(errors, moving, axis=0)) < 0.25
    still, inside = make_subject(count=40, moved=0, noise=NOISE).dwi, subject.mask.numpy() > 0.5
    for volume in MOVING:  # slices are 5 mm apart, and a move across them leaves gaps as wide
        image = volume_in_mean_pose(subject.dwi.data[volume], subject.dwi.grid, found, volume, np.eye(4), None).numpy()
        ideal, ideal_at_rest = (_ideal(subject, volume, pose) for pose in (mean_rigid(true[volume]), np.eye(4)))
        corrected = np.corrcoef(image[inside], ideal[inside])[0, 1]
        at_rest = np.corrcoef(still.data[volume].numpy()[inside], ideal_at_rest[inside])[0, 1]
        raw = np.corrcoef(subject.dwi.data[volume].numpy()[inside], ideal[inside])[0, 1]
        assert corrected > 0.95 * at_rest
        assert 1 - corrected < 0.7 * (1 - raw)


def _ideal(subject: Subject, volume: int, pose: np.ndarray) -> np.ndarray:
    """Image of a volume at one pose, without noise, (i, j, k)."""
    grid, head = subject.dwi.grid, np.linalg.inv(pose)
    points = grid.to_world(np.argwhere(np.ones(grid.shape, bool))) @ head[:3, :3].T + head[:3, 3]
    gradient = rotate_bvecs(subject.dwi.bvecs[volume], pose)
    return signal(points, subject.dwi.bvals[volume], gradient).reshape(grid.shape)


def test_slices_that_only_seemed_lost_are_intact(
    moving_subject: tuple[Subject, np.ndarray, tuple[tuple[int, ...], ...]],
) -> None:
    """Two slices of moving volumes are taken for lost, of which one is; its gap is filled with the prediction."""
    subject, true, shots = moving_subject
    data = subject.dwi.data.clone()
    data[15, ..., 12] *= 0.3
    dwi = subject.dwi.with_data(data)
    flagged = np.zeros((len(dwi), true.shape[1]), bool)
    flagged[6, 9] = flagged[15, 12] = True
    before = replace(_one_pose(subject, subject.transforms), outlier_slices=flagged, replacements=data[[6, 15], ..., 9])
    found = follow_slices(dwi, subject.mask, before, shots, MotionSettings(outliers="replace"))
    assert found.slices is not None
    assert found.outlier_slices is not None
    assert found.replacements is not None
    assert np.argwhere(found.outlier_slices).tolist() == [[15, 12]]
    assert torch.equal(found.replacements, data[[15], ..., 9])
    assert np.nanmean(_slice_errors(found.slices.slice_poses, true, subject)[list(MOVING)]) < 0.5
    image = volume_in_mean_pose(dwi.data[15], dwi.grid, found, 15, np.eye(4), None).numpy()[..., 12]
    inside = subject.mask.numpy()[..., 12] > 0.5
    whole = follow_slices(subject.dwi, subject.mask, _one_pose(subject, subject.transforms), shots, MotionSettings())
    complete = volume_in_mean_pose(subject.dwi.data[15], subject.dwi.grid, whole, 15, np.eye(4), None).numpy()[..., 12]
    assert image[inside].mean() == pytest.approx(complete[inside].mean(), rel=0.1)
    assert np.corrcoef(image[inside], complete[inside])[0, 1] > 0.9  # noise of 15 in a mean signal of 135
    assert data[15, ..., 12].numpy()[inside].mean() < 0.5 * complete[inside].mean()


def test_head_at_rest_keeps_its_poses() -> None:
    still = make_subject(count=40, moved=0, noise=NOISE)
    before = _one_pose(still, still.transforms)
    found = follow_slices(still.dwi, still.mask, before, _shots(still.dwi.grid.shape[2]), MotionSettings())
    assert found.slices is not None
    assert not found.slices.moving.any()
    np.testing.assert_array_equal(found.transforms, before.transforms)
    without = replace(found, slices=None)
    image = volume_in_mean_pose(still.dwi.data[3], still.dwi.grid, without, 3, np.eye(4), None)
    assert torch.equal(image, still.dwi.data[3])


@pytest.mark.parametrize("phase_encoded", [True, False])
def test_shifts_along_phase_encoding_are_not_taken_for_motion(phase_encoded: bool) -> None:
    """The field shifts slices of some volumes by up to 4 mm; along another axis only a head can do that."""
    still = make_subject(count=40, moved=0, noise=NOISE)
    grid, shots, along = still.dwi.grid, _shots(still.dwi.grid.shape[2]), 1
    poses = np.tile(np.eye(4), (len(still.dwi), grid.shape[2], 1, 1))
    for volume in MOVING:
        for number, group in enumerate(shots):
            shift = 4 * np.sin(np.pi * number / len(shots))
            poses[volume, list(group), :3, 3] = shift * grid.directions[:, along if phase_encoded else 0]
    subject = _acquired(still, poses)
    motion = replace(_one_pose(subject, subject.transforms), eddy=zero_eddy_currents(len(still.dwi), grid, along))
    found = follow_slices(subject.dwi, subject.mask, motion, shots, MotionSettings())
    assert found.slices is not None
    assert list(np.flatnonzero(found.slices.moving)) == ([] if phase_encoded else list(MOVING))


def _field(points: np.ndarray) -> np.ndarray:
    """Displacement of points (m, 3) of the head along phase encoding, up to 7 mm, (m,)."""
    return sum(
        size * np.exp(-((points - CENTRE - middle) ** 2).sum(-1) / 2 / 18**2)
        for size, middle in ((7.0, [0, 25, -20]), (-7.0, [20, -15, 5]), (6.0, [-20, 0, 20]))
    )


def _distorted(still: Subject, poses: np.ndarray, along: int) -> tuple[Subject, Distortion]:
    """The series acquired with poses of slices (n, slices, 4, 4) and a field that the head carries, and the field."""
    dwi, grid = still.dwi, still.dwi.grid
    data, rng = np.empty(tuple(dwi.data.shape), np.float32), np.random.default_rng(9)
    plane, direction, step = np.argwhere(np.ones(grid.shape[:2], bool)), grid.directions[:, along], 0.5
    for volume, slice_poses in enumerate(poses):
        for k, pose in enumerate(slice_poses):
            head, acquired = np.linalg.inv(pose), grid.to_world(np.insert(plane, 2, k, axis=1))
            u = np.zeros(len(plane))
            at = lambda u: (acquired - u[:, None] * direction) @ head[:3, :3].T + head[:3, 3]  # noqa: B023, E731
            for _ in range(40):
                u = _field(at(u))
            bent = head[:3, :3] @ direction
            slope = (_field(at(u) + step * bent) - _field(at(u) - step * bent)) / (2 * step)
            clean = signal(at(u), dwi.bvals[volume], rotate_bvecs(dwi.bvecs[volume], pose)) / (1 + slope)
            real, imaginary = NOISE * rng.standard_normal((2, len(plane)))
            data[volume, ..., k] = np.hypot(clean + real, imaginary).reshape(grid.shape[:2])
    vectors = direction[:, None] * _field(grid.to_world(np.argwhere(np.ones(grid.shape, bool))))
    field = DisplacementField(torch.from_numpy(vectors.reshape(3, *grid.shape).astype(np.float32)), grid)
    means = np.stack([mean_rigid(each) for each in poses])
    known = Distortion(np.eye(4)[None], (field,), None, still.mask, (), (), [], "gre")
    return Subject(replace(dwi, data=torch.from_numpy(data)), still.mask, means), known


def test_the_field_of_a_turned_head_is_not_taken_for_motion() -> None:
    """A head that rests turned by up to 9 degrees in every fourth volume, and moves within one of them."""
    still, along = make_subject(count=40, moved=0, noise=NOISE), 1
    shots, slices = _shots(still.dwi.grid.shape[2]), still.dwi.grid.shape[2]
    rng, parameters = np.random.default_rng(4), np.zeros((len(still.dwi), slices, 6))
    for volume in range(5, len(still.dwi), 4):
        turn = np.deg2rad(rng.choice([-1, 1], 3) * rng.uniform(3, 6, 3))
        parameters[volume] = np.concatenate([turn, rng.uniform(-2, 2, 3)])
    parameters[21, [k for group in shots[len(shots) // 2 :] for k in group]] += [0.05, -0.04, 0.05, 2, -2, 3]
    true = rigid_matrix(parameters, CENTRE)
    subject, known = _distorted(still, true, along)
    eddy = zero_eddy_currents(len(still.dwi), still.dwi.grid, along)
    before = replace(_one_pose(subject, subject.transforms), eddy=eddy)
    none = replace(known, fields=(replace(known.fields[0], data=0 * known.fields[0].data),))
    turned = np.setdiff1d(np.arange(5, len(still.dwi), 4), [21])
    found, evidence, errors = {}, {}, {}
    for name, distortion in (("known", known), ("unknown", None), ("none", none)):
        result = follow_slices(subject.dwi, subject.mask, before, shots, MotionSettings(), distortion)
        assert result.slices is not None
        found[name], evidence[name] = list(np.flatnonzero(result.slices.moving)), result.slices.evidence[turned].max()
        error = point_displacement(result.slices.slice_poses[21], true[21], CENTRE + 30 * np.eye(3)).mean(axis=1)
        errors[name] = float(np.median(error[5:-5]))
    assert found["known"] == found["unknown"] == [21]
    assert max(evidence.values()) < 5
    assert errors["known"] < 0.5
    assert errors["known"] < errors["none"]


def test_neighbours_of_clear_volumes_are_linked_within_a_run() -> None:
    odds, apart = np.array([0, 25.0, 500, 25, 25, 25]), np.array([0.5, 0.15, 1.0, 0.15, 0.15, 0.05])
    run = np.array([0, 0, 0, 1, 1, 1])
    assert list(choose_volumes(odds, apart, run)) == [False, True, True, False, False, False]
    assert list(choose_volumes(odds, apart, np.zeros(6, int))) == [False, True, True, True, True, False]


def test_without_slice_times_it_is_refused_with_the_remedy() -> None:
    class Known:
        multiband: tuple[tuple[int, ...], ...] = ()
        slice_axis = None

    known = Known()
    assert not follows_slices(known, MotionSettings(slices="auto"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="SliceTiming"):
        follows_slices(known, MotionSettings(slices="on"))  # type: ignore[arg-type]
    known.multiband, known.slice_axis = ((0,), (1,)), 2  # type: ignore[assignment]
    assert follows_slices(known, MotionSettings(slices="auto"))  # type: ignore[arg-type]
    assert not follows_slices(known, MotionSettings(slices="off"))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="Affine"):
        MotionSettings(slices="on", transform="Affine")
