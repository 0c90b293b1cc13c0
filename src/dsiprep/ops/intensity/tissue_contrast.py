"""One image predicted from tissue maps: linear, with weights that drift from place to place."""

from __future__ import annotations

import torch

from dsiprep.ops.image.filters import gaussian

__all__ = ["predicted_contrast"]

ROUNDS = 8
OUTLIER = 2.0  # in robust standard deviations, for the weights that hold everywhere
LOCAL_OUTLIER = 3.0
RIDGE = 1e-3  # holds the weight of a tissue that a window has hardly any of to the one that holds everywhere


def predicted_contrast(
    image: torch.Tensor, maps: torch.Tensor, drifting: int, share: torch.Tensor, sigma: list[float]
) -> tuple[torch.Tensor, float]:
    """What tissue maps predict of an image.

    The weight of a tissue that drifts is fitted in a Gaussian window, so it follows receive bias, signal that dephasing
    takes, and whatever else changes brightness slowly; where there is little of the tissue it is the robust weight
    of the whole brain.

    Parameters
    ----------
    image : Tensor, (a, b, y)
    maps : Tensor, (m, a, b, y)
        Share of each tissue, 0 to 1.
    drifting : int
        The weights of so many of them, the first, drift; each other has one weight everywhere.
    share : Tensor, (a, b, y)
        How much each voxel counts, 0 to 1.
    sigma : list of float
        Standard deviation of the window along each axis in voxels.

    Returns
    -------
    predicted : Tensor, (a, b, y)
    spread : float
        Robust standard deviation of what is left where `share` is above 0.
    """
    inner = share > 0
    everywhere = _robust_weights(image[inner], maps[:, inner])
    steady, local = torch.einsum("m,mabc->abc", everywhere, maps), maps[:drifting]
    rest = image - steady
    limit = LOCAL_OUTLIER * _spread(rest[inner]) + 1e-12
    trust = share / (1 + (rest / limit) ** 2)
    pairs = [(p, q) for p in range(drifting) for q in range(p, drifting)]
    products = [trust * local[p] * local[q] for p, q in pairs] + [trust * part * rest for part in local]
    moments = gaussian(torch.stack(products), sigma)
    matrix = {(p, q): moments[number] + (RIDGE if p == q else 0.0) for number, (p, q) in enumerate(pairs)}
    drift = torch.stack(_solved(matrix, list(moments[len(pairs) :])))
    predicted = steady + (drift * local).sum(0)
    return predicted, _spread((image - predicted)[inner])


def _robust_weights(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Weights of tissues (m, n) that predict values (n,), whatever lies far off counting less."""
    trust = torch.ones_like(values)
    ridge = 1e-6 * values.numel() * torch.eye(len(shares), device=values.device)
    weights = torch.zeros(len(shares), device=values.device)
    for _ in range(ROUNDS):
        weights = torch.linalg.solve((shares * trust) @ shares.T + ridge, (shares * trust) @ values)
        rest = values - weights @ shares
        trust = 1 / (1 + (rest / (OUTLIER * _spread(rest) + 1e-12)) ** 2)
    return weights


def _spread(values: torch.Tensor) -> float:
    return 1.4826 * float(values.abs().median()) if values.numel() else 0.0


def _solved(matrix: dict[tuple[int, int], torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    """Symmetric positive equations, one small set per voxel, by elimination; `matrix` holds the upper triangle."""
    count, upper, right = len(right), dict(matrix), list(right)
    for pivot in range(count):
        for row in range(pivot + 1, count):
            factor = upper[pivot, row] / upper[pivot, pivot]
            right[row] = right[row] - factor * right[pivot]
            for column in range(row, count):
                upper[row, column] = upper[row, column] - factor * upper[pivot, column]
    found: dict[int, torch.Tensor] = {}
    for row in reversed(range(count)):
        known = sum((upper[row, c] * found[c] for c in range(row + 1, count)), torch.zeros_like(right[row]))
        found[row] = (right[row] - known) / upper[row, row]
    return [found[row] for row in range(count)]
