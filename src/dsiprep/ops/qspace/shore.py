"""3dSHORE: the basis, its regularisers, and leave-one-out prediction as a single matrix.

A prediction is linear in the other volumes, with the same weights in every voxel, so one n x n matrix predicts all
volumes from the others without refitting voxels.
"""

from __future__ import annotations

from math import factorial

import numpy as np
from scipy.special import eval_genlaguerre, gamma, lpmv

__all__ = [
    "choose_zeta",
    "leave_one_out",
    "near_neighbours",
    "shell_size",
    "shore_basis",
    "shore_prior",
    "shore_regulariser",
    "shore_size",
]

ZETA = 700.0  # scale of the basis in s/mm², for tau = 1 / (4 pi²), where q is the square root of b
ZETA_B = 7000.0  # s/mm²; a basis of that scale and radial order 6 covers b-values up to here
COVERED = 5000.0 / ZETA  # b-value in units of zeta at which the widest basis tried ends
CANDIDATES = 5  # scales tried
SELECTION_ITERATIONS = 10  # of `shore_prior` for each of them


def shore_size(radial_order: int) -> int:
    """Number of basis functions of an even radial order: 1, 7, 22, 50 for 0, 2, 4, 6."""
    half = radial_order // 2
    return round((half + 1) * (half + 2) * (4 * half + 3) / 6)


def shell_size(radial_order: int) -> int:
    """Number of basis functions that are distinct on a single shell: 1, 6, 15, 28 for 0, 2, 4, 6."""
    return (radial_order + 1) * (radial_order + 2) // 2


def shore_basis(q: np.ndarray, radial_order: int = 6, zeta: float = ZETA) -> np.ndarray:
    """3dSHORE functions at points in q-space, with the order and signs of BrainSuite and DIPY.

    Parameters
    ----------
    q : ndarray, (n, 3)
        Square root of the b-value (s/mm²) times the b-vector: q in 1/mm for a diffusion time of 1 / (4 pi²).
    radial_order : int
        Even.
    zeta : float
        Scale, in units of q squared.

    Returns
    -------
    ndarray, (n, shore_size(radial_order))

    References
    ----------
    Ozarslan et al. 2008, ISMRM 16:35. Merlet & Deriche 2013, doi 10.1016/j.media.2013.02.010.
    """
    q = np.asarray(q, float)
    radius = np.linalg.norm(q, axis=1)
    cosine = np.divide(q[:, 2], radius, out=np.ones_like(radius), where=radius > 0)
    azimuth = np.arctan2(q[:, 1], q[:, 0])
    x = radius**2 / zeta
    columns = []
    for ell, n in _orders(radial_order):
        kappa = np.sqrt(2 * factorial(n - ell) / (zeta**1.5 * gamma(n + 1.5)))
        radial = kappa * x ** (ell / 2) * np.exp(-x / 2) * eval_genlaguerre(n - ell, ell + 0.5, x)
        columns += [radial * _harmonic(ell, m, cosine, azimuth) for m in range(-ell, ell + 1)]
    return np.stack(columns, axis=1)


def shore_regulariser(radial_order: int, radial: float = 1e-8, angular: float = 1e-8) -> np.ndarray:
    """Diagonal (shore_size,) of lambdaN N + lambdaL L, which penalises high radial and angular orders."""
    diagonal = []
    for ell, n in _orders(radial_order):
        diagonal += [radial * (n * (n + 1)) ** 2 + angular * (ell * (ell + 1)) ** 2] * (2 * ell + 1)
    return np.array(diagonal)


def shore_prior(
    second_moment: np.ndarray, basis: np.ndarray, radial_order: int, weights: np.ndarray, iterations: int = 40
) -> np.ndarray:
    """Estimate the regulariser from the data, in place of fixed lambdas (empirical Bayes).

    The coefficients of a voxel are modelled as a normal distribution without preferred direction: any covariance
    between radial orders of the same l, none between different l or m. Expectation maximisation estimates this prior
    and the noise from all voxels at once, through their second moment alone.

    Parameters
    ----------
    second_moment : ndarray, (n, n)
        Mean over voxels of the outer product of the samples.
    basis : ndarray, (n, shore_size(radial_order))
    weights : ndarray, (n,)
        Weight of each sample, whose noise variance is sigma² / weight.
    iterations : int

    Returns
    -------
    ndarray, (c, c)
        sigma² times the inverse of the prior covariance: the penalty of `leave_one_out` with the same weights.

    References
    ----------
    Dempster et al. 1977, doi 10.1111/j.2517-6161.1977.tb01600.x.
    """
    n, c = basis.shape
    noise = 0.01 * np.trace(second_moment) / n
    prior = np.eye(c) * np.trace(second_moment) / np.sum(basis**2)
    weighted = basis * weights[:, None]
    gram = basis.T @ weighted
    blocks = _blocks(radial_order)
    for _ in range(iterations):
        posterior = np.linalg.inv(gram / noise + np.linalg.inv(prior))
        estimator = posterior @ weighted.T / noise
        cross_moment = estimator @ second_moment
        moment = cross_moment @ estimator.T + posterior
        fitted = np.einsum("nc,cn->n", basis, cross_moment)
        residual = np.diag(second_moment) - 2 * fitted + np.einsum("nc,cd,nd->n", basis, moment, basis)
        noise = max(float(np.sum(weights * residual)) / n, 1e-12)
        prior = _isotropic_covariance(moment, blocks)
    return noise * np.linalg.inv(prior)


def choose_zeta(second_moment: np.ndarray, q: np.ndarray, radial_order: int, weights: np.ndarray) -> float:
    """Scale of the basis: 700 s/mm² up to b 7000, beyond it the scale that predicts samples best from the others.

    A function of radial order N decays as exp(-b / (2 zeta)) and reaches to about b = 2 (N + 1) zeta; with a fixed
    scale, samples further out would be predicted as zero. How far the signal itself reaches depends on the tissue: in
    fixed tissue diffusion is several times slower. So `CANDIDATES` scales from 700 to max(b) / 7.14, in
    geometric progression, are compared by the leave-one-out residual r_i / (1 - h_ii) of the fit with hat matrix h.

    Parameters
    ----------
    second_moment : ndarray, (n, n)
        Mean over voxels of the outer product of the samples.
    q : ndarray, (n, 3)
        As for `shore_basis`.
    radial_order : int
    weights : ndarray, (n,)
        As for `shore_prior`.

    References
    ----------
    Allen 1974, doi 10.1080/00401706.1974.10489157 (the leave-one-out residual in closed form).
    """
    largest = float((np.asarray(q, float) ** 2).sum(1).max(initial=0))
    if largest <= ZETA_B * (1 + 1e-9):
        return ZETA
    candidates = np.geomspace(ZETA, largest / COVERED, CANDIDATES)
    errors = [
        _left_out_error(second_moment, shore_basis(q, radial_order, z), radial_order, weights) for z in candidates
    ]
    return float(candidates[int(np.argmin(errors))])


def _left_out_error(second_moment: np.ndarray, basis: np.ndarray, radial_order: int, weights: np.ndarray) -> float:
    """Weighted sum of the mean squared leave-one-out residuals."""
    penalty = shore_prior(second_moment, basis, radial_order, weights, SELECTION_ITERATIONS)
    weighted = (basis * weights[:, None]).T
    hat = basis @ np.linalg.solve(weighted @ basis + penalty, weighted)
    left = (np.eye(len(basis)) - hat) / np.maximum(1 - np.diag(hat), 1e-6)[:, None]
    return float(np.sum(weights * np.einsum("ij,ij->i", left @ second_moment, left)))


def near_neighbours(q: np.ndarray, fraction: float = 0.02) -> np.ndarray:
    """Pairs of samples too similar to predict each other: closer than `fraction` of the largest |q|, up to sign.

    Parameters
    ----------
    q : ndarray, (n, 3)

    Returns
    -------
    ndarray, (n, n) bool
        True on the diagonal.
    """
    q = np.asarray(q, float)
    limit = fraction * np.linalg.norm(q, axis=1).max(initial=0)
    same = np.linalg.norm(q[:, None] - q[None], axis=-1)
    opposite = np.linalg.norm(q[:, None] + q[None], axis=-1)
    return (np.minimum(same, opposite) < limit) | np.eye(len(q), dtype=bool)


def leave_one_out(
    basis: np.ndarray, penalty: np.ndarray, left_out: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Matrix that predicts every sample from the samples not left out with it.

    Parameters
    ----------
    basis : ndarray, (n, c)
        Basis functions at the samples.
    penalty : ndarray, (c, c) or (c,)
        Regulariser, or its diagonal.
    left_out : ndarray, (n, n) bool
        Row i: samples not used to predict sample i.
    weights : ndarray, (n,), optional
        Weight of each sample; 1 by default.

    Returns
    -------
    ndarray, (n, n)
        P with prediction = P @ samples; P[i, j] = 0 where `left_out[i, j]`.
    """
    n, c = basis.shape
    weights = np.ones(n) if weights is None else np.asarray(weights, float)
    penalty = np.diag(penalty) if np.ndim(penalty) == 1 else penalty
    normal = (basis * weights[:, None]).T @ basis + penalty
    out = np.empty((n, n))
    for i in range(n):
        excluded = np.flatnonzero(left_out[i])
        part = basis[excluded]
        reduced = normal - (part * weights[excluded, None]).T @ part
        reduced.flat[:: c + 1] += 1e-12 * np.trace(reduced) / c  # solvable despite undetermined coefficients
        out[i] = (basis @ np.linalg.solve(reduced, basis[i])) * weights
        out[i, excluded] = 0
    return out


def _orders(radial_order: int) -> list[tuple[int, int]]:
    """Pairs (l, n) in column order."""
    pairs = []
    for ell in range(0, radial_order + 1, 2):
        pairs += [(ell, n) for n in range(ell, (radial_order + ell) // 2 + 1)]
    return pairs


def _blocks(radial_order: int) -> list[np.ndarray]:
    """Column indices of the basis for each l, as arrays (radial orders, 2 l + 1)."""
    blocks, first = [], 0
    for ell in range(0, radial_order + 1, 2):
        shape = ((radial_order + ell) // 2 + 1 - ell, 2 * ell + 1)
        blocks.append(np.arange(first, first + shape[0] * shape[1]).reshape(shape))
        first += shape[0] * shape[1]
    return blocks


def _isotropic_covariance(moment: np.ndarray, blocks: list[np.ndarray]) -> np.ndarray:
    """The closest rotation-invariant covariance: averaged over m, zero between different l or m."""
    out = np.zeros_like(moment)
    for block in blocks:
        mean = np.mean([moment[np.ix_(column, column)] for column in block.T], axis=0)
        mean += 1e-9 * np.trace(mean) * np.eye(len(mean))
        for column in block.T:
            out[np.ix_(column, column)] = mean
    return out


def _harmonic(ell: int, m: int, cosine: np.ndarray, azimuth: np.ndarray) -> np.ndarray:
    """Real spherical harmonic: cosines for m < 0, sines for m > 0 (Descoteaux 2007, as in DIPY)."""
    order = abs(m)
    norm = np.sqrt((2 * ell + 1) / (4 * np.pi) * factorial(ell - order) / factorial(ell + order))
    value = norm * lpmv(order, ell, cosine)
    if m == 0:
        return value
    return np.sqrt(2) * value * (np.sin(order * azimuth) if m > 0 else np.cos(order * azimuth))
