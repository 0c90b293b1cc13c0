"""3dSHORE compared with DIPY, and leave-one-out weights compared with refits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from dsiprep.ops.qspace.shore import (
    ZETA,
    choose_zeta,
    leave_one_out,
    near_neighbours,
    shore_basis,
    shore_prior,
    shore_regulariser,
    shore_size,
)


def lattice(radius: float = 3.7, b_max: float = 5000.0) -> np.ndarray:
    """q-vectors of half a Cartesian lattice, (n, 3) in sqrt(s/mm²), with the centre last."""
    axis = np.arange(-4, 5)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    length = np.linalg.norm(points, axis=1)
    first = points @ np.array([1, 1e-3, 1e-6]) > 0
    half = points[(length <= radius) & first]
    return np.vstack([half, np.zeros(3)]) * np.sqrt(b_max) / np.linalg.norm(half, axis=1).max()


@pytest.mark.parametrize("order", [2, 4, 6, 8])
def test_basis_matches_dipy(order: int) -> None:
    shore = pytest.importorskip("dipy.reconst.shore")
    from dipy.core.gradients import gradient_table

    q = lattice()
    bvals = (q**2).sum(1)
    bvecs = q / np.maximum(np.linalg.norm(q, axis=1), 1e-9)[:, None]
    table = gradient_table(bvals, bvecs=bvecs, b0_threshold=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = shore.shore_matrix(order, 700, table)
    basis = shore_basis(q, order)
    assert basis.shape == (len(q), shore_size(order))
    np.testing.assert_allclose(basis, expected, atol=1e-10)
    np.testing.assert_allclose(
        shore_regulariser(order, 2e-8, 3e-8),
        np.diag(2e-8 * shore.n_shore(order) + 3e-8 * shore.l_shore(order)),
    )


def test_leave_one_out_matches_refit_without_the_sample_and_its_neighbours() -> None:
    rng = np.random.default_rng(0)
    q = lattice(3.2)
    q = np.vstack([q, -q[3] * 1.001])  # the antipode of a sample
    basis, penalty = shore_basis(q), shore_regulariser(6)
    samples = rng.random((len(q), 4))
    weights = rng.uniform(0.1, 1, len(q))
    left_out = near_neighbours(q)
    assert left_out[3, -1]
    assert left_out[-1, 3]
    assert left_out.sum() == len(q) + 2
    matrix = leave_one_out(basis, penalty, left_out, weights)
    for i in (0, 3, len(q) - 1):
        used = ~left_out[i]
        root = np.sqrt(weights[used])[:, None]
        stacked = np.vstack([root * basis[used], np.diag(np.sqrt(penalty))])
        target = np.vstack([root * samples[used], np.zeros((basis.shape[1], 4))])
        refit = np.linalg.lstsq(stacked, target, rcond=None)[0]
        np.testing.assert_allclose(matrix[i] @ samples, basis[i] @ refit, rtol=1e-5, atol=1e-7)
    assert (matrix[left_out] == 0).all()


def test_leave_one_out_reproduces_signals_in_the_basis() -> None:
    q = lattice()
    basis = shore_basis(q, 4)
    matrix = leave_one_out(basis, np.zeros(basis.shape[1]), near_neighbours(q))
    np.testing.assert_allclose(matrix @ basis, basis, rtol=1e-6, atol=1e-8 * np.abs(basis).max())


def test_volume_of_zero_weight_does_not_affect_the_others() -> None:
    q = lattice()
    weights = np.ones(len(q))
    weights[7] = 0
    matrix = leave_one_out(shore_basis(q, 4), shore_regulariser(4), near_neighbours(q), weights)
    assert (matrix[:, 7] == 0).all()
    assert np.abs(matrix[7]).sum() > 0  # but it is predicted itself


def crossing_signals(q: np.ndarray, count: int, rng: np.random.Generator, slower: float = 1.0) -> np.ndarray:
    """Signals (n, count) of two randomly crossing fibres and an isotropic compartment; diffusivities times `slower`."""
    out = np.zeros((len(q), count))
    for voxel in range(count):
        fractions = rng.dirichlet((2, 1, 1))
        for fraction, along, across in zip(fractions, (1.7e-3, 1.7e-3, 0.9e-3), (2e-4, 2e-4, 0.9e-3), strict=True):
            rotation = Rotation.random(random_state=rng).as_matrix()
            tensor = slower * rotation @ np.diag([along, across, across]) @ rotation.T
            out[:, voxel] += fraction * np.exp(-np.einsum("na,ab,nb->n", q, tensor, q))
    return out


def test_estimated_prior_predicts_better_than_fixed_lambdas() -> None:
    rng = np.random.default_rng(1)
    q = lattice(3.2)
    clean = crossing_signals(q, 400, rng)
    noisy = clean + 0.04 * rng.standard_normal(clean.shape)
    basis, left_out = shore_basis(q), near_neighbours(q)
    penalty = shore_prior(noisy @ noisy.T / noisy.shape[1], basis, 6, np.ones(len(q)))
    assert np.allclose(penalty, penalty.T)
    assert np.linalg.eigvalsh(penalty).min() > 0

    def error(matrix: np.ndarray) -> float:
        return float(np.sqrt(((matrix @ noisy - clean)[:-1] ** 2).mean()))

    fixed = error(leave_one_out(basis, shore_regulariser(6), left_out))
    estimated = error(leave_one_out(basis, penalty, left_out))
    assert estimated < 0.75 * fixed


@pytest.mark.parametrize(
    ("b_max", "slower", "largest"),
    [(15000.0, 1.0, 0.5), (20000.0, 1.0, 0.7), (20000.0, 0.25, 0.15), (40000.0, 0.25, 0.4)],
)
def test_outer_volumes_are_predicted_at_high_b(b_max: float, slower: float, largest: float) -> None:
    """Error over contrast of volumes beyond two thirds of the largest b; above 0.65 with the scale of 700."""
    q = lattice(4.2, b_max)
    clean = crossing_signals(q, 200, np.random.default_rng(5), slower)
    moment, weights = clean @ clean.T / clean.shape[1], np.ones(len(q))
    outer = (q**2).sum(1) > b_max * 2 / 3

    def error(zeta: float) -> float:
        basis = shore_basis(q, 6, zeta)
        matrix = leave_one_out(basis, shore_prior(moment, basis, 6, weights), near_neighbours(q), weights)
        return float(
            np.sqrt(((matrix @ clean - clean)[outer] ** 2).mean()) / (clean[outer] - clean[outer].mean(0)).std()
        )

    assert error(ZETA) > 0.65
    assert error(choose_zeta(moment, q, 6, weights)) < largest


def test_scale_is_700_up_to_b_7000() -> None:
    for b_max in (1000.0, 5000.0, 7000.0):
        q = lattice(3.2, b_max)
        signals = crossing_signals(q, 20, np.random.default_rng(6), 0.25)
        assert choose_zeta(signals @ signals.T / 20, q, 6, np.ones(len(q))) == ZETA == 700


def test_prior_is_rotation_invariant() -> None:
    rng = np.random.default_rng(2)
    q = lattice(3.2)
    rotation = Rotation.random(random_state=3).as_matrix()
    signals = crossing_signals(q, 200, rng)
    moment = signals @ signals.T / 200
    matrices = []
    for points in (q, q @ rotation.T):
        basis = shore_basis(points)
        penalty = shore_prior(moment, basis, 6, np.ones(len(q)))
        matrices.append(leave_one_out(basis, penalty, near_neighbours(points)))
    np.testing.assert_allclose(matrices[0], matrices[1], atol=1e-4)


def test_prior_is_independent_of_the_intensity_scale() -> None:
    q = lattice(3.2)
    signals = crossing_signals(q, 200, np.random.default_rng(4))
    basis, weights = shore_basis(q), np.ones(len(q))
    small = shore_prior(signals @ signals.T / 200, basis, 6, weights)
    large = shore_prior(1e6 * signals @ signals.T / 200, basis, 6, weights)
    np.testing.assert_allclose(small, large, rtol=1e-3, atol=1e-6 * np.abs(small).max())
