"""Contributions of compared images to the Gauss-Newton equations of a pair, and their sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch

__all__ = ["DataTerms", "combined"]


@dataclass(frozen=True, eq=False)
class DataTerms:
    """Contribution of one comparison: to the matrix as in `NormalEquations`, and to the gradients by field and pose."""

    by_field: torch.Tensor
    by_slope: torch.Tensor
    weight: torch.Tensor
    coupling: torch.Tensor
    pose: torch.Tensor
    field_gradient: torch.Tensor
    pose_gradient: torch.Tensor
    diagonal: torch.Tensor | None = None
    across: torch.Tensor | None = None


def combined(terms: list[DataTerms]) -> DataTerms:
    """Exact sum of the contributions of comparisons: squares of by_field + by_slope D add to one and a diagonal.

    Of several comparisons, derivatives across the axis enter the gradients only, which decide where the steps end.
    """
    if len(terms) == 1:
        return terms[0]
    squares = _sum(t.weight * t.by_field**2 for t in terms)
    products = _sum(t.weight * t.by_field * t.by_slope for t in terms)
    weight = _sum(t.weight * t.by_slope**2 for t in terms)
    by_field = torch.where(weight > 1e-12, products / weight.clamp(min=1e-12), 0.0)
    return DataTerms(
        by_field,
        (weight > 1e-12).float(),
        weight,
        _sum(t.coupling for t in terms),
        _sum(t.pose for t in terms),
        _sum(t.field_gradient for t in terms),
        _sum(t.pose_gradient for t in terms),
        (squares - weight * by_field**2).clamp(min=0),
    )


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, tensors)
