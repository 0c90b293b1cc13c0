"""Prediction of an image from tissue maps: a linear model with spatially varying tissue intensities."""

from __future__ import annotations

import torch

from dsiprep.ops.image.filters import gaussian

__all__ = ["predicted_contrast"]

ROUNDS = 8
OUTLIER = 2.0  # robust standard deviations, for the global weights
LOCAL_OUTLIER = 3.0  # likewise, for the local weights
RIDGE = 1e-3  # keeps the local weight of a tissue at its global one where a window has hardly any of the tissue


def predicted_contrast(
    image: torch.Tensor, maps: torch.Tensor, n_varying: int, share: torch.Tensor, sigma: list[float]
) -> tuple[torch.Tensor, float]:
    """Predict an image from tissue maps.

    Weights that vary in space are fitted in a Gaussian window, so they follow receive bias, signal loss by dephasing
    and any other slow change of intensity; where there is little of a tissue, its weight is the robust weight of the
    whole brain.

    Parameters
    ----------
    image : Tensor, (a, b, y)
    maps : Tensor, (m, a, b, y)
        Fraction of each tissue, 0 to 1.
    n_varying : int
        The weights of the first `n_varying` tissues vary in space; each other tissue has one global weight.
    share : Tensor, (a, b, y)
        Weight of each voxel, 0 to 1.
    sigma : list of float
        Standard deviation of the window along each axis, voxels.

    Returns
    -------
    predicted : Tensor, (a, b, y)
    spread : float
        Robust standard deviation of the residual where `share` is above 0.
    """
    inner = share > 0
    global_weights = _robust_weights(image[inner], maps[:, inner])
    global_part, local = torch.einsum("m,mabc->abc", global_weights, maps), maps[:n_varying]
    residual = image - global_part
    limit = LOCAL_OUTLIER * _robust_std(residual[inner]) + 1e-12
    weight = share / (1 + (residual / limit) ** 2)
    pairs = [(p, q) for p in range(n_varying) for q in range(p, n_varying)]
    products = [weight * local[p] * local[q] for p, q in pairs] + [weight * part * residual for part in local]
    moments = gaussian(torch.stack(products), sigma)
    matrix = {(p, q): moments[number] + (RIDGE if p == q else 0.0) for number, (p, q) in enumerate(pairs)}
    deviation = torch.stack(_solve_per_voxel(matrix, list(moments[len(pairs) :])))
    predicted = global_part + (deviation * local).sum(0)
    return predicted, _robust_std((image - predicted)[inner])


def _robust_weights(values: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Weights (m,) of tissue maps (m, n) that predict values (n,), with outliers downweighted."""
    weight = torch.ones_like(values)
    ridge = 1e-6 * values.numel() * torch.eye(len(maps), device=values.device)
    weights = torch.zeros(len(maps), device=values.device)
    for _ in range(ROUNDS):
        weights = torch.linalg.solve((maps * weight) @ maps.T + ridge, (maps * weight) @ values)
        residual = values - weights @ maps
        weight = 1 / (1 + (residual / (OUTLIER * _robust_std(residual) + 1e-12)) ** 2)
    return weights


def _robust_std(values: torch.Tensor) -> float:
    """Robust standard deviation about zero, from the median absolute value."""
    return 1.4826 * float(values.abs().median()) if values.numel() else 0.0


def _solve_per_voxel(matrix: dict[tuple[int, int], torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    """Solve a small symmetric positive-definite system in each voxel by elimination; `matrix` is its upper triangle."""
    count, upper, right = len(right), dict(matrix), list(right)
    for pivot in range(count):
        for row in range(pivot + 1, count):
            factor = upper[pivot, row] / upper[pivot, pivot]
            right[row] = right[row] - factor * right[pivot]
            for column in range(row, count):
                upper[row, column] = upper[row, column] - factor * upper[pivot, column]
    solution: dict[int, torch.Tensor] = {}
    for row in reversed(range(count)):
        known = sum((upper[row, c] * solution[c] for c in range(row + 1, count)), torch.zeros_like(right[row]))
        solution[row] = (right[row] - known) / upper[row, row]
    return [solution[row] for row in range(count)]
