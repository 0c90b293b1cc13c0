"""The random walk of shots: against dense linear algebra and normal densities of SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.motion.shot_walk import (
    Offsets,
    Trend,
    Walk,
    log_odds,
    solve_walk,
    solve_with_trend,
    step_weights,
    steps_of,
)

LENGTHS = np.array([50.0, 60, 55, 1, 1, 1])
SHOTS = 7


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    """Hessian and slope of each shot."""
    rng = np.random.default_rng(3)
    factor = rng.normal(size=(SHOTS, 6, 6)) * LENGTHS[:, None]
    return factor @ factor.transpose(0, 2, 1) * 5, rng.normal(size=(SHOTS, 6)) * LENGTHS * 10


def _difference() -> np.ndarray:
    """Matrix from all parameters to all steps but the first, in mm."""
    change = np.kron(np.eye(SHOTS)[1:] - np.eye(SHOTS)[:-1], np.eye(6))
    return change * np.tile(LENGTHS, SHOTS)


def test_solution_minimises_the_cost(data: tuple[np.ndarray, np.ndarray]) -> None:
    hessian, slope = data
    steps, weights = np.random.default_rng(4).normal(size=(SHOTS, 6)) * 0.01, np.linspace(1, 9, SHOTS)
    steps[0] = weights[0] = 0
    found = solve_walk(hessian, slope, steps, weights, LENGTHS)
    dense = np.zeros((6 * SHOTS, 6 * SHOTS))
    for t in range(SHOTS):
        dense[6 * t : 6 * t + 6, 6 * t : 6 * t + 6] = hessian[t]
    difference, repeated = _difference(), np.repeat(weights[1:], 6)
    dense += difference.T @ (repeated[:, None] * difference)
    sides = slope.ravel() - difference.T @ (repeated * (steps[1:] * LENGTHS).ravel())
    np.testing.assert_allclose(found.ravel(), np.linalg.solve(dense, sides), rtol=1e-4, atol=1e-6)


def test_log_odds_are_those_of_normal_densities(data: tuple[np.ndarray, np.ndarray]) -> None:
    hessian, slope = data
    scale, wide = 0.3, 100.0  # mm; a wide prior of the first pose stands for a flat one
    hessian = hessian + np.eye(6) * LENGTHS**2  # well conditioned, for SciPy
    covariance = np.zeros((6 * SHOTS, 6 * SHOTS))  # mm², as all that follows
    poses = np.zeros(6 * SHOTS)
    for t in range(SHOTS):
        part = slice(6 * t, 6 * t + 6)
        inverse = np.linalg.inv(hessian[t])
        covariance[part, part] = inverse * np.outer(LENGTHS, LENGTHS)
        poses[part] = LENGTHS * (inverse @ slope[t])
    common = np.kron(np.ones((SHOTS, SHOTS)), np.eye(6) * wide**2)
    walk = np.kron(np.minimum.outer(np.arange(SHOTS), np.arange(SHOTS)), np.eye(6) * scale**2)
    offsets = Offsets(np.random.default_rng(5).normal(size=(SHOTS, 2)), (0.1, 0.4))
    likely = {}
    for name, prior in (("walk", common + walk), ("one", common)):
        by_spread = [np.kron(offsets.basis @ offsets.basis.T, np.eye(6) * s**2) for s in offsets.spreads]
        likely[name] = max(multivariate_normal(cov=covariance + prior + more).logpdf(poses) for more in by_spread)
    odds, apart = log_odds(hessian, slope, (scale,), LENGTHS, offsets)
    assert odds == pytest.approx(likely["walk"] - likely["one"], abs=0.05)
    assert apart > 0
    assert log_odds(hessian, slope, (0.01, scale, 3.0), LENGTHS, offsets)[0] >= odds


def test_offsets_by_position_are_no_evidence_of_motion() -> None:
    """Two passes over the head: what both agree on is where the shots are, what differs is when they were acquired."""
    rng, shots = np.random.default_rng(2), 30
    position = np.r_[np.arange(0, shots, 2), np.arange(1, shots, 2)] / shots
    basis = np.cos(np.pi * np.arange(1, 6) * position[:, None])
    offsets, ignored = Offsets(basis, (0.03, 0.1, 0.3)), Offsets(basis, (1e-6,))
    hessian = np.tile(np.diag((LENGTHS / 0.1) ** 2), (shots, 1, 1))
    noise = 0.1 * rng.normal(size=(shots, 6))
    by_position, later = basis @ (0.15 * rng.normal(size=(5, 6))), np.outer(np.arange(shots) > 17, np.full(6, 0.5))
    slopes = [((noise + shift) / LENGTHS) @ hessian[0] for shift in (by_position, later, by_position + later)]
    odds = [log_odds(hessian, slope, (0.06, 0.2), LENGTHS, offsets)[0] for slope in slopes]
    assert odds[0] < 5
    assert log_odds(hessian, slopes[0], (0.06, 0.2), LENGTHS, ignored)[0] > 30
    assert min(odds[1:]) > 30


def test_trend_with_the_gradient_is_told_from_motion() -> None:
    """A slow path, measured with an offset that depends on the gradient, which comes in random order."""
    rng = np.random.default_rng(6)
    count, size = 60, 4
    basis, spread = rng.normal(size=(count, size)), 0.5
    path = np.cumsum(0.05 * rng.normal(size=(count, 6)), axis=0)
    offsets = spread * rng.normal(size=(size, 6))
    measured = (path + basis @ offsets + 0.02 * rng.normal(size=(count, 6))) / LENGTHS
    hessian = np.tile(np.diag((LENGTHS / 0.02) ** 2), (count, 1, 1))
    weights = np.r_[0, np.full(count - 1, 0.05**-2)]
    trend = Trend(basis, np.zeros((size, 6)), 0.1)
    poses = np.zeros((count, 6))
    for _ in range(4):  # of the spread; the problem itself is linear
        slope = np.einsum("tij,tj->ti", hessian, measured - poses - basis @ trend.coefficients)
        steps = np.diff(poses, axis=0, prepend=0)
        change, trend = solve_with_trend(hessian, slope, steps, weights, trend, LENGTHS)
        poses = poses + change
    assert 0.3 < trend.spread < 0.9
    error = (poses * LENGTHS - path) - (poses * LENGTHS - path).mean(axis=0)
    assert np.abs(error).mean() < 0.03
    assert np.abs(measured * LENGTHS - path).mean() > 0.5


def test_heavy_tails_let_a_sudden_move_pass() -> None:
    """Rest, a move of 5 mm between two shots, rest: measured with an error of 0.3 mm."""
    rng = np.random.default_rng(5)
    true = np.where(np.arange(20) < 8, 0.0, 5.0)
    measured = true + 0.3 * rng.normal(size=20)
    poses = np.tile(np.eye(4), (20, 1, 1))
    walk = Walk(np.r_[np.inf, np.full(19, 0.03)], np.zeros(3), LENGTHS)
    for iteration in range(30):
        hessian = np.tile(np.diag(np.r_[1e6, 1e6, 1e6, 1, 1, 1] / 0.3**2), (20, 1, 1))
        slope = np.zeros((20, 6))
        slope[:, 3] = (measured - poses[:, 0, 3]) / 0.3**2
        steps = steps_of(poses, walk)
        wide = Walk(walk.scale * max(1, 30 * 0.7**iteration), walk.centre, LENGTHS)
        poses = poses @ rigid_matrix(solve_walk(hessian, slope, steps, step_weights(steps, wide), LENGTHS))
    error = poses[:, 0, 3] - true
    assert np.abs(error).max() < 0.25
    assert np.abs(np.diff(poses[:, 0, 3]))[[*range(7), *range(8, 19)]].max() < 0.1


def test_runs_are_not_joined() -> None:
    poses = rigid_matrix(np.arange(24.0).reshape(4, 6) / 100)
    walk = Walk(np.array([np.inf, 0.1, np.inf, 0.1]), np.zeros(3), LENGTHS)
    steps = steps_of(poses, walk)
    assert (steps[[0, 2]] == 0).all()
    assert (np.abs(steps[[1, 3]]).sum(axis=1) > 0).all()
    assert (step_weights(steps, walk)[[0, 2]] == 0).all()
