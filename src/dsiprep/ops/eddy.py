"""Eddy currents of a whole series: displacements that follow the gradients, found together with the head's poses.

Volume v is displaced along the phase-encoding axis by a polynomial in scanner coordinates whose coefficients are
linear in the gradient g_v that was played: c_v = R g_v. R is the same for all volumes, so it cannot follow the head;
what of it looks like movement is told from movement by where the head is expected to rest.

Volumes are predicted from each other, and what they have in common is predicted too. So the derivative of a residual
by R is that of the volume less that of its prediction, (1 - P) J; without the second part, steps are far too short.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EDDY_MM, EddyCurrents
from dsiprep.ops.align import FREEDOM, Rest, pull_to_rest
from dsiprep.ops.bend import eddy_terms
from dsiprep.ops.points import PointSet
from dsiprep.ops.predict import Prediction

__all__ = ["TERMS", "no_eddy_currents", "strength", "tied_step", "with_response"]

TERMS = {"linear": 4, "quadratic": 10}


def no_eddy_currents(count: int, grid: Grid, along: int) -> EddyCurrents:
    """Zeros for `count` volumes that are encoded along voxel axis `along` of `grid`."""
    return EddyCurrents(np.zeros((count, 10)), grid.directions, grid.centre, along)


def with_response(eddy: EddyCurrents, response: np.ndarray, gradients: np.ndarray) -> EddyCurrents:
    """Coefficients R g_v, for R (10, 3) in mm and gradients (n, 3) relative to the strongest."""
    return replace(eddy, coefficients=gradients @ response.T)


def strength(eddy: EddyCurrents, points: np.ndarray) -> float:
    """Root mean square displacement (mm) of world points (m, 3) over all volumes."""
    moved = [eddy.displacement(volume, points) for volume in range(len(eddy.coefficients))]
    return float(np.sqrt(3 * np.mean(np.square(moved))))


def tied_step(
    residual: torch.Tensor,
    prediction: Prediction,
    values: torch.Tensor,
    slopes: torch.Tensor,
    points: PointSet,
    transforms: np.ndarray,
    eddy: EddyCurrents,
    gradients: np.ndarray,
    rest: Rest,
    terms: int,
) -> tuple[np.ndarray, np.ndarray]:
    """One Gauss-Newton step of R and all rigid poses together.

    Poses and gains are eliminated volume by volume (Schur complement), which leaves 3 x terms equations for R.

    Parameters
    ----------
    residual : Tensor, (n, k)
        Volumes less predictions at `points`, a sample of the brain.
    prediction : Prediction
    values, slopes : Tensor, (n, k) and (n, k, 3)
        Predictions at `points` and their gradients, per mm RAS+ of the reference.
    transforms : ndarray, (n, 4, 4)
    eddy : EddyCurrents
        Of these volumes.
    gradients : ndarray, (n, 3)
        World RAS+, relative to the strongest.
    rest : Rest
        Where the head is expected.
    terms : int
        How many of the ten terms may be used.

    Returns
    -------
    response : ndarray, (10, 3)
        To be taken off R, mm.
    moves : ndarray, (n, 6)
        Steps of the poses, for `align.moved_by`.

    References
    ----------
    Andersson & Sotiropoulos 2016, doi 10.1016/j.neuroimage.2015.10.019 (displacements that follow the gradient).
    """
    scale = 1.4826 * residual.abs().median(dim=1).values.clamp(min=1e-9)
    weight = (FREEDOM + 1) / (FREEDOM + (residual / scale[:, None]) ** 2) / scale[:, None] ** 2
    bent = _bending(values, slopes, points, transforms, eddy)[:, :terms]
    g = torch.as_tensor(gradients, dtype=bent.dtype, device=bent.device)
    columns = (bent[:, :, None, :] * g[:, None, :, None]).flatten(1, 2)
    columns = columns - prediction.change(columns, values[:, None])
    world = torch.as_tensor(points.world, device=slopes.device).expand_as(slopes)
    own = torch.cat([torch.linalg.cross(world, slopes), slopes, values[..., None]], dim=2).transpose(1, 2)
    rows = torch.cat([own, columns, residual[:, None]], dim=1)
    sums = torch.bmm(rows * weight[:, None], rows.transpose(1, 2)).cpu().numpy().astype(float)
    inner, mixed = sums[:, :7, :7], sums[:, :7, 7:]
    pull_to_rest(inner, mixed[:, :, -1], transforms, rest, points, np.ones(len(sums)))
    inner = inner + 1e-9 * np.trace(inner, axis1=1, axis2=2)[:, None, None] * np.eye(7)
    alone = np.linalg.solve(inner, mixed)
    left = (sums[:, 7:, 7:] - np.swapaxes(mixed, 1, 2) @ alone).sum(axis=0)
    normal, side = left[:-1, :-1], left[:-1, -1]
    found = np.linalg.solve(
        normal + 1e-6 * np.diag(np.diag(normal)) + 1e-9 * np.trace(normal) * np.eye(len(side)), side
    )
    response = np.zeros((10, 3))
    response[:terms] = found.reshape(terms, 3)
    return response, (alone[:, :, -1] - alone[:, :, :-1] @ found)[:, :6]


def _bending(
    values: torch.Tensor, slopes: torch.Tensor, points: PointSet, transforms: np.ndarray, eddy: EddyCurrents
) -> torch.Tensor:
    """Derivatives of volumes by the coefficients of their displacement in mm, (n, 10, k)."""
    world = points.world.astype(float) + points.centre
    scanner = np.einsum("nab,kb->nka", transforms[:, :3, :3], world) + transforms[:, None, :3, 3]
    s = np.moveaxis((scanner - eddy.centre) @ eddy.axes / EDDY_MM, 1, 2)
    terms, rises = eddy_terms(torch.as_tensor(s, dtype=torch.float32, device=values.device), eddy.along)
    seen = np.einsum("nba,b->na", transforms[:, :3, :3], eddy.axes[:, eddy.along])  # the axis as the head sees it
    steep = torch.einsum("nka,na->nk", slopes, torch.as_tensor(seen, dtype=torch.float32, device=values.device))
    return (terms * steep + rises * values / EDDY_MM).transpose(0, 1)
