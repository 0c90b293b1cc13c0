"""b=0 images that serve only to estimate the distortion, and the geometry of a pair that was not scanned alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.raw import RawEpi
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.pepolar import normal_equations, pair_model, regularisation
from dsiprep.settings import DistortionSettings
from dsiprep.stages.distortion import correct_distortion
from dsiprep.stages.pair_geometry import pair_geometry
from dsiprep.stages.reference_blip import aligned_mean, reference_blip
from helpers.epi_pair import CENTRE, Case, acquire, head, make_grid, rigid

POSE = rigid((1.0, -1.5, 0.8), np.array([0.8, 0.0, -0.6]))


def seen(grid: Grid, pose: np.ndarray) -> torch.Tensor:
    """The head at `pose` on a grid."""
    inverse = np.linalg.inv(pose)
    world = grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))
    return torch.from_numpy(head(world @ inverse[:3, :3].T + inverse[:3, 3]).astype(np.float32))


def test_moved_volumes_are_aligned_before_they_are_averaged() -> None:
    """Three volumes of the reversed blip, 2 mm and 2 degrees apart, give the field that one of them gives."""
    case = Case(make_grid("RAS"), 1)
    poses = [rigid((s * 2.0, 0, s * 1.0), np.array([s * 1.0, 0, s * -2.0])) for s in (-1, 0, 1)]
    images = [acquire(case.grid, 1, -1.0, pose, 6.0, case.grid.directions[:, 1]) for pose in poses]
    volumes = [torch.from_numpy(image.astype(np.float32)) for image in images]

    def error(second: torch.Tensor) -> float:
        arguments = (case.blips, (case.images[0], second[None]), case.grid, case.mask, DistortionSettings())
        return float(case.errors(correct_distortion(*arguments)).mean())

    alone, aligned = error(volumes[1]), error(aligned_mean([(volume, case.grid) for volume in volumes], case.grid))
    assert aligned < 1.15 * alone
    assert error(torch.stack(volumes).mean(0)) > 1.5 * alone
    assert torch.equal(aligned_mean([(volumes[0], case.grid)], case.grid), volumes[0])


def test_volumes_of_several_files_are_averaged_where_they_have_data() -> None:
    """The second file ends three slices earlier and has its own voxels; the mean is that of the first alone there."""
    grid, fine = make_grid("RAS"), make_grid("LPS", sizes=(3.0, 3.0, 3.0))
    short = Grid((*fine.shape[:2], fine.shape[2] - 12), fine.affine)
    epis = [RawEpi("a", seen(grid, np.eye(4))[None], grid, PhaseEncoding(1, -1, 0.05))]
    epis.append(RawEpi("b", seen(short, np.eye(4))[None], short, PhaseEncoding(1, 1, 0.05 * 4 / 3)))
    blip = reference_blip(epis, "down")
    assert blip.grid is grid
    assert blip.pe == epis[0].pe
    assert len(blip.epis) == 1
    inside = epis[0].data[0] > 35
    assert float((blip.epis[0] - epis[0].data[0])[inside].abs().max()) < 8  # of 60 to 150


@pytest.mark.parametrize(
    ("grid", "pe", "limit"),
    [
        (make_grid("RAS", 0.5), PhaseEncoding(1, -1), 0.045),
        (make_grid("RAS", 20.0), PhaseEncoding(1, -1), 0.045),
        (make_grid("ASR", sizes=(3.0, 4.0, 5.0)), PhaseEncoding(0, -1), 0.06),
        (make_grid("LPS"), PhaseEncoding(1, 1), 0.045),
        (make_grid("RAS"), PhaseEncoding(0, 1), 0.08),
        (make_grid("ASR"), PhaseEncoding(1, -1), 0.08),
    ],
    ids=["tilted by 0.5", "tilted by 20", "sagittal, other voxels", "axes of the file reversed", "L-R", "H-F"],
)
def test_field_of_a_pair_that_was_not_scanned_alike(grid: Grid, pe: PhaseEncoding, limit: float) -> None:
    """The equal pair has an error of 0.037 mm; the limits are those of its noise, larger where the axes differ."""
    case = Case(make_grid("RAS"), 1, pose=POSE, noise=0.5, second=(grid, pe))
    result = case.correct()
    assert case.errors(result).mean() < limit
    away = np.linalg.inv(result.poses[1]) @ POSE
    assert np.linalg.norm(away[:3, :3] - np.eye(3)) < np.deg2rad(0.5)
    # the displacement of the second image lies along its own phase-encoding axis
    vectors = result.fields[1].data.numpy().reshape(3, -1)
    across = vectors - np.outer(grid.directions[:, pe.axis], grid.directions[:, pe.axis] @ vectors)
    assert np.abs(across).max() < 1e-4 * np.abs(vectors).max()
    assert result.before[1].grid is case.grid


@pytest.mark.parametrize("readouts", [(0.021, 0.022), (0.0507, 0.05)])
def test_unequal_readout_times_give_the_field_of_equal_ones(readouts: tuple[float, float]) -> None:
    case = Case(make_grid("RAS"), 1, pose=POSE, noise=0.5, readouts=readouts, amplitude=6.0 * 0.05 / readouts[0])
    result = case.correct()
    assert case.errors(result).mean() < 0.1
    hertz = result.fieldmap_hz
    assert hertz is not None
    expected = case.field / (0.05 * 4.0)  # mm at a readout of 50 ms, voxels of 4 mm
    error = (hertz.numpy() - expected)[case.brain] * 0.05 * 4.0
    assert np.abs(error - np.median(error)).mean() < 0.1


def test_reference_that_ends_a_slice_earlier_leaves_the_field_unharmed() -> None:
    grid = make_grid("RAS")
    short = Grid((*grid.shape[:2], grid.shape[2] - 8), grid.affine)
    case = Case(grid, 1, pose=POSE, noise=0.5, second=(short, PhaseEncoding(1, -1)))
    result = case.correct()
    covered = np.broadcast_to(np.arange(grid.shape[2]) < short.shape[2] - 1, grid.shape) & case.brain
    error = result.fields[0].data.numpy()[1] - case.field
    assert np.abs(error - np.median(error[covered]))[covered].mean() < 0.05
    # beyond its end, the undistorted image is that of the series alone rather than half of it
    beyond = case.brain & ~np.broadcast_to(np.arange(grid.shape[2]) < short.shape[2] + 1, grid.shape)
    ratio = result.dwiref.numpy()[beyond] / case.truth[beyond]
    assert 0.9 < np.median(ratio) < 1.1


@pytest.mark.parametrize("pe", [PhaseEncoding(1, -1), PhaseEncoding(0, 1)])
def test_gradient_matches_the_cost_for_other_axes(pe: PhaseEncoding) -> None:
    """Derivatives of the cost by field and pose, for axes 20 and 90 degrees apart, against differences of the cost."""
    rng = np.random.default_rng(1)
    grid = make_grid("RAS", sizes=(8.0, 8.0, 8.0))
    other = make_grid("RAS", 20.0 if pe.axis == 1 else 0.0, sizes=(8.0, 8.0, 8.0))
    case = Case(grid, 1, pose=POSE, second=(other, pe))
    geometry = pair_geometry(case.blips, grid)
    images = tuple(geometry.ordered(image[0] / 60, b) for b, image in enumerate(case.images))
    brain = torch.from_numpy(case.brain).permute(geometry.orders[0])
    far = geometry.ordered(resample_onto(torch.from_numpy(case.brain)[None].float(), grid, other)[0] > 0.5, 1)
    pair = pair_model.make_pair(images, brain, geometry.grid(0), geometry.scales, CENTRE, (), (geometry.grid(1), far))
    smooth = torch.from_numpy(rng.normal(0, 1.0, brain.shape).astype(np.float32))
    state = pair_model.State(smooth, rigid((2.0, 1.0, -1.0), np.array([1.0, 0, 0.5])), 0.1)
    compared = pair_model.compare(pair, state)
    limits = pair_model.outlier_limits(pair, compared)
    normal, (field, pose) = pair_model.gauss_newton_equations(pair, state, compared, limits)
    step = torch.from_numpy(rng.normal(0, 1, brain.shape).astype(np.float32))
    turn = rng.normal(0, 1, 6) * np.array([0.02, 0.02, 0.02, 1, 1, 0.1])
    for direction, parameters, slope in (
        (step, np.zeros(6), float((field * step).sum())),
        (torch.zeros_like(step), turn, float(pose.double().numpy() @ turn)),
    ):
        costs = []
        for sign in (1, -1):
            trial = pair_model.apply_step(pair, state, 2e-3 * sign * direction, 2e-3 * sign * parameters)
            costs.append(pair_model.cost(pair, trial, pair_model.compare(pair, trial), limits))
        assert (costs[1] - costs[0]) / 4e-3 == pytest.approx(slope, rel=0.02)
    assert isinstance(normal, normal_equations.NormalEquations)
    product, _ = normal.apply(step, torch.zeros(6))
    other_product, _ = normal.apply(smooth, torch.zeros(6))
    assert float((product * smooth).sum()) == pytest.approx(float((other_product * step).sum()), rel=1e-3)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_transpose_of_the_central_difference(axis: int) -> None:
    rng = np.random.default_rng(2)
    a, b = (torch.from_numpy(rng.normal(size=(4, 5, 6))) for _ in range(2))
    forward = (regularisation.central_difference(a, axis) * b).sum()
    assert torch.allclose(forward, (a * regularisation.central_difference_transpose(b, axis)).sum())
