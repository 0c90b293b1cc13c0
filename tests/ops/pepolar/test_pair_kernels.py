"""Kernels of the pair model: compiled loops, tensor operations and SciPy agree, and equations are those of the cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.fft import dct
from scipy.spatial.transform import Rotation

from dsiprep.data.grid import Grid
from dsiprep.ops.pepolar import initial_field, normal_equations, pair_model, regularisation, sampling
from helpers.epi_pair import CENTRE, Case, make_grid, rigid


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
