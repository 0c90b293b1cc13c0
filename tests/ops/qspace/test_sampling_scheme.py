"""Recognition of sampling schemes despite rotation, scaling, rounding and noise."""

from __future__ import annotations

import numpy as np
import pytest
from dipy.data import get_fnames
from scipy.spatial.transform import Rotation

from dsiprep.ops.qspace.sampling_scheme import lattice_points, recognise
from helpers.shared_data import SHARED

TABLES = SHARED / "gradients"


def ball(squared_radius: int) -> np.ndarray:
    """All lattice points in a ball, without its centre."""
    reach = int(np.sqrt(squared_radius))
    axis = np.arange(-reach, reach + 1)
    points = np.stack(np.meshgrid(axis, axis, axis), -1).reshape(-1, 3)
    squared = (points**2).sum(1)
    return points[(squared <= squared_radius) & (squared > 0)].astype(float)


def half(points: np.ndarray) -> np.ndarray:
    """One of each pair of antipodes."""
    return points[points @ np.array([1, 0.01, 0.0001]) > 0]


def as_table(points: np.ndarray, top: float, seed: int = 0, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A randomly rotated b-table: b-values rounded to 5 s/mm², b-vectors to 4 digits; `noise` is relative."""
    rng = np.random.default_rng(seed)
    squared = (points**2).sum(1)
    rotation = Rotation.random(random_state=seed).as_matrix()
    bvecs = points / np.sqrt(squared)[:, None] @ rotation.T + rng.normal(0, noise, points.shape)
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    bvals = top * squared / squared.max() * (1 + rng.normal(0, noise, len(points)))
    return np.r_[0, 5, np.round(bvals / 5) * 5], np.r_[np.zeros((2, 3)), np.round(bvecs, 4)]


def rotated(bvecs: np.ndarray, seed: int) -> np.ndarray:
    return bvecs @ Rotation.random(random_state=seed).as_matrix().T


@pytest.mark.parametrize("squared_radius", [9, 13, 25, 36])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_full_and_partial_lattices_are_distinguished(squared_radius: int, noise: float) -> None:
    full = ball(squared_radius)
    one_side = half(full)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        random_signs = one_side * rng.choice([-1, 1], (len(one_side), 1))
        subset = random_signs[rng.choice(len(random_signs), max(20, len(random_signs) // 5), replace=False)]
        two_sided_subset = full[rng.choice(len(full), max(30, len(full) // 4), replace=False)]
        for points, kind, half_sphere in (
            (full, "DSI", False),
            (one_side, "DSI", True),
            (random_signs, "DSI", True),
            (subset, "CS-DSI", True),
            (two_sided_subset, "CS-DSI", None),
        ):
            scheme = recognise(*as_table(points, 7000, seed, noise))
            assert scheme.kind == kind
            assert half_sphere is None or scheme.half_sphere == half_sphere
            assert scheme.n_directions == len(points)
            assert scheme.n_b0 == 2
            assert not scheme.shelled


def test_lattice_coordinates_are_recovered_up_to_symmetry() -> None:
    points = half(ball(25))
    bvals, bvecs = as_table(points, 7000, seed=5)
    recovered = lattice_points((np.sqrt(bvals)[:, None] * bvecs)[2:])
    assert recovered is not None
    np.testing.assert_array_equal((recovered**2).sum(1), (points**2).sum(1).astype(int))
    np.testing.assert_array_equal(recovered @ recovered.T, (points @ points.T).astype(int))


def test_repeated_samples_are_counted_once() -> None:
    bvals, bvecs = as_table(half(ball(13)), 4000)
    scheme = recognise(np.tile(bvals, 2), np.tile(bvecs, (2, 1)))
    assert (scheme.n_directions, scheme.n_b0) == (len(bvals) - 2, 4)


@pytest.mark.parametrize(
    ("b", "counts"),
    [
        ((1000,), (6,)),
        ((1000,), (12,)),
        ((3000,), (64,)),
        ((1000, 2000, 3000), (30, 30, 30)),
        ((500, 1000, 2000, 3000), (6, 15, 15, 60)),
        ((1000, 4000, 9000), (10, 20, 40)),  # |q| of a lattice, but not its directions
        ((400, 800, 1600, 3200, 6400), (8, 16, 24, 32, 48)),
    ],
)
def test_shells_are_not_mistaken_for_lattices(b: tuple[int, ...], counts: tuple[int, ...]) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        bvecs = rng.normal(size=(sum(counts), 3))
        bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
        bvals = np.round(np.repeat(b, counts) * (1 + rng.normal(0, 0.005, sum(counts))) / 5) * 5
        scheme = recognise(np.r_[0, bvals], np.r_[np.zeros((1, 3)), bvecs])
        assert scheme.kind == ("single-shell" if len(b) == 1 else "multi-shell")
        np.testing.assert_allclose(scheme.bvalues, b, rtol=0.01)
        assert scheme.shelled


def test_six_lattice_directions_on_one_shell_are_a_shell() -> None:
    edges = np.array([(1, 0, 1), (-1, 0, 1), (0, 1, 1), (0, 1, -1), (1, 1, 0), (-1, 1, 0)]) / np.sqrt(2)
    scheme = recognise(np.r_[0, np.full(12, 1000)], np.r_[np.zeros((1, 3)), edges, -edges])
    assert scheme.kind == "single-shell"
    assert scheme.description == "Single shell, 12 directions at b 1000"


def test_random_points_are_other() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        q = rng.uniform(-1, 1, (300, 3))
        q = q[(np.linalg.norm(q, axis=1) < 1) & (np.linalg.norm(q, axis=1) > 0.2)][:80]
        squared = (q**2).sum(1)
        scheme = recognise(np.r_[0, 5000 * squared], np.r_[np.zeros((1, 3)), q / np.sqrt(squared)[:, None]])
        assert scheme.kind == "other"


def test_b0_only() -> None:
    scheme = recognise(np.array([0.0, 5, 100]), np.zeros((3, 3)))
    assert (scheme.kind, scheme.n_b0, scheme.n_directions, scheme.max_b) == ("b0-only", 3, 0, 0)
    assert scheme.description == "b=0 only, 3 volumes"


@pytest.mark.parametrize(
    ("name", "kind", "count", "half_sphere"),
    [
        ("DSIQ5", "DSI", 257, True),
        ("ds004737_dsi", "CS-DSI", 95, True),
        ("ABCD", "multi-shell", 96, False),
        ("HCP", "multi-shell", 270, False),
        ("hcph_multishell", "multi-shell", 274, False),
    ],
)
def test_scanner_tables(name: str, kind: str, count: int, half_sphere: bool) -> None:
    if not TABLES.is_dir():
        pytest.skip("shared gradient tables not available")
    bvals, bvecs = np.loadtxt(TABLES / f"{name}.bval"), np.loadtxt(TABLES / f"{name}.bvec")
    bvecs = bvecs.T if bvecs.shape[0] == 3 else bvecs
    rng = np.random.default_rng(3)
    noisy = bvecs + rng.normal(0, 0.015, bvecs.shape)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    for vectors, values in ((bvecs, bvals), (rotated(bvecs, 2), 1.03 * bvals), (rotated(noisy, 4), bvals)):
        scheme = recognise(values, vectors)
        assert (scheme.kind, scheme.half_sphere) == (kind, half_sphere)
        assert scheme.n_directions == count


def test_dipy_tables() -> None:
    for name, count, radius, sphere in (
        ("dsi515btable", 514, "5", "full"),
        ("dsi4169btable", 4168, "10", "full"),
    ):
        rows = np.loadtxt(get_fnames(name=name))
        for vectors in (rows[:, 1:], rotated(rows[:, 1:], 1)):
            scheme = recognise(rows[:, 0], vectors)
            assert scheme.kind == "DSI"
            assert scheme.n_directions == count
            assert f"{count} directions on a lattice of radius {radius} ({sphere} sphere)" in scheme.description
    _, bval, bvec = get_fnames(name="small_101D")
    bvals, bvecs = np.loadtxt(bval), np.loadtxt(bvec)
    scheme = recognise(bvals, bvecs.T if bvecs.shape[0] == 3 else bvecs)
    assert (scheme.kind, scheme.half_sphere, scheme.n_directions) == ("DSI", True, 101)
    _, bval, bvec = get_fnames(name="small_64D")
    bvals, bvecs = np.loadtxt(bval), np.loadtxt(bvec)
    scheme = recognise(bvals, bvecs.T if bvecs.shape[0] == 3 else bvecs)
    assert (scheme.kind, scheme.n_directions) == ("single-shell", 64)
