"""Leave-one-out error of 3dSHORE against the largest b-value: `python benchmarks/shore_scale.py`.

Noise-free and noisy (SNR 50 at b=0) analytic signals of 300 voxels with two fibres crossing at random and an isotropic
compartment, on half a Cartesian lattice of radius 5. "ex vivo": diffusivities of a quarter. Prints, for volumes of more
than two thirds of the largest b-value, the root mean square error of the prediction over the standard deviation of the
signal: with a scale of 700 s/mm² throughout and with the scale that is chosen.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from dsiprep.ops.qspace.shore import ZETA, choose_zeta, leave_one_out, near_neighbours, shore_basis, shore_prior

CASES = ((7000, 1.0), (10000, 1.0), (15000, 1.0), (20000, 1.0), (20000, 0.25), (40000, 0.25))
RADIUS, ORDER = 5, 6


def lattice(largest: float) -> np.ndarray:
    """q-vectors (n, 3) of half a lattice, the centre last."""
    axis = np.arange(-RADIUS, RADIUS + 1)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    half = points[(np.linalg.norm(points, axis=1) <= RADIUS) & (points @ [1, 1e-3, 1e-6] > 0)]
    return np.vstack([half, np.zeros(3)]) * np.sqrt(largest) / RADIUS


def crossing(q: np.ndarray, slower: float, rng: np.random.Generator, count: int = 300) -> np.ndarray:
    """Signals (n, count); diffusivities along and across fibres and of the rest 1.7, 0.2 and 0.9 µm²/ms."""
    out = np.zeros((len(q), count))
    for voxel in range(count):
        shares = rng.dirichlet((2, 1, 1))
        for share, along, across in zip(shares, (1.7e-3, 1.7e-3, 0.9e-3), (2e-4, 2e-4, 0.9e-3), strict=True):
            turn = Rotation.random(random_state=rng).as_matrix()
            tensor = slower * turn @ np.diag([along, across, across]) @ turn.T
            out[:, voxel] += share * np.exp(-np.einsum("na,ab,nb->n", q, tensor, q))
    return out


def error_over_contrast(q: np.ndarray, clean: np.ndarray, noisy: np.ndarray, zeta: float) -> float:
    """Of the volumes beyond two thirds of the largest b-value."""
    basis, weights = shore_basis(q, ORDER, zeta), np.ones(len(q))
    prior = shore_prior(noisy @ noisy.T / noisy.shape[1], basis, ORDER, weights)
    predicted = leave_one_out(basis, prior, near_neighbours(q), weights) @ noisy
    outer = (q**2).sum(1) > (q**2).sum(1).max() * 2 / 3
    contrast = clean[outer] - clean[outer].mean(0)
    return float(np.sqrt(((predicted - clean)[outer] ** 2).mean() / (contrast**2).mean()))


def main() -> None:
    """Print one line per case."""
    print("largest b  tissue    SNR   zeta   error at 700  error")
    for largest, slower in CASES:
        q, rng = lattice(largest), np.random.default_rng(1)
        clean = crossing(q, slower, rng)
        for noise in (0.0, 0.02):
            noisy = clean + noise * rng.standard_normal(clean.shape)
            zeta = choose_zeta(noisy @ noisy.T / noisy.shape[1], q, ORDER, np.ones(len(q)))
            errors = [error_over_contrast(q, clean, noisy, z) for z in (ZETA, zeta)]
            tissue = "in vivo" if slower == 1 else "ex vivo"
            print(f"{largest:9d}  {tissue}  {1 / noise if noise else np.inf:5.0f}  {zeta:5.0f}  "
                  f"{errors[0]:12.2f}  {errors[1]:5.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
