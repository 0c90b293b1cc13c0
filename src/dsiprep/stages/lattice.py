"""The preprocessed series on a Cartesian lattice in q-space again, from which the rotations of the head moved it."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.acquisition import SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.qspace import Lattice
from dsiprep.data.results import Acquired, Preprocessed
from dsiprep.errors import InputError
from dsiprep.ops.qspace.lattice import ball, half_ball, predict_at
from dsiprep.ops.qspace.sampling_scheme import lattice_points

__all__ = ["METHODS", "evaluate_lattice", "why_not"]

METHODS = {
    "lattice": (
        "Rotations of the head move q-space samples away from the lattice on which they were prescribed. The "
        "preprocessed series was evaluated on a lattice along the axes of the output by a 3dSHORE model [@merlet2013] "
        "with an isotropic normal prior on the coefficients, estimated from the series by expectation maximisation "
        "[@dempster1977], which is a Gaussian process in q-space [@rasmussen2006]."
    ),
}
RADIUS_5 = 25  # squared, of dsi257 and dsi515
SAMPLE = 20_000  # voxels from which the model is estimated
CHUNK = 50_000  # voxels predicted at a time
LEAST_WEIGHTED = 12  # diffusion-weighted volumes
WORSE = 1.5  # residual over the typical one of similar b, from which on a volume counts less


def why_not(grid: str, scheme: SamplingScheme) -> str:
    """Why a series of this scheme cannot be evaluated on a lattice; empty if it can."""
    if grid == "acquired" and scheme.kind not in ("DSI", "CS-DSI"):
        return "the series was not acquired on a lattice; choose dsi257, dsi515 or a table"
    if scheme.n_directions < LEAST_WEIGHTED:
        return f"{scheme.n_directions} diffusion-weighted volumes are too few; {LEAST_WEIGHTED} are the least"
    return ""


def evaluate_lattice(
    preprocessed: Preprocessed, acquired: Acquired, grid: str, table: tuple[np.ndarray, np.ndarray] | None = None
) -> Lattice | None:
    """Evaluate a preprocessed series at the points of a lattice.

    Parameters
    ----------
    preprocessed : Preprocessed
        With rotated b-vectors.
    acquired : Acquired
        The series as acquired, with the b-table as prescribed.
    grid : str
        "acquired" (the lattice that was acquired), "dsi257", "dsi515", or the name of `table`.
    table : (ndarray (m,), ndarray (m, 3)), optional
        b-values and b-vectors (world RAS+ of the output) to evaluate instead.

    Returns
    -------
    Lattice or None
        One b=0 volume, then the points by |q|. None where `why_not` gives a reason.
    """
    if why_not(grid, acquired.scheme):
        return None
    weighted = ~acquired.dwi.is_b0
    prescribed = acquired.dwi.bvals[weighted], acquired.dwi.bvecs[weighted]
    points = np.zeros((0, 3), int) if table else _points(prescribed, grid)
    bvals, bvecs = table or _gradients(points, prescribed)
    dwi, inside = preprocessed.dwi, preprocessed.mask.data > 0.5
    brain = dwi.data[:, inside]
    sample = brain[:, :: max(1, brain.shape[1] // SAMPLE)].cpu().numpy().astype(float)
    moment, q = sample @ sample.T / max(sample.shape[1], 1), dwi.q
    target, weights = np.sqrt(bvals)[:, None] * bvecs, np.ones(len(q))
    prediction = predict_at(target, q, moment)
    weights = _weights(np.sqrt(np.mean((sample - prediction.left_out @ sample) ** 2, axis=1)), dwi.bvals)
    prediction = predict_at(target, q, moment, weights)
    left_out = np.sqrt(np.mean((sample - prediction.left_out @ sample) ** 2, axis=1))
    values = _apply(prediction.matrix, dwi.data)
    n = len(bvals)
    series = DWI(values, dwi.grid, bvals, bvecs, np.zeros(n, int), np.zeros(n, int), dwi.b0_threshold)
    extrapolated = prediction.outside | (prediction.uncertainty > 1)
    model = f"3dSHORE, radial order {prediction.order}, scale {prediction.zeta:.0f} s/mm², with the series' own prior"
    return Lattice(series, points, prediction.uncertainty, extrapolated, prediction.noise, left_out, model)


def _points(prescribed: tuple[np.ndarray, np.ndarray], grid: str) -> np.ndarray:
    """Lattice coordinates, the origin first: of the prescribed points, or of a half or full ball."""
    if grid == "dsi515":
        return ball(RADIUS_5)
    if grid == "dsi257":
        return np.concatenate([np.zeros((1, 3), int), half_ball(RADIUS_5)])
    acquired = lattice_points(np.sqrt(prescribed[0])[:, None] * prescribed[1])
    if acquired is None:
        raise InputError("--q-grid acquired: the b-vectors are on no lattice; choose dsi257, dsi515 or a table")
    distinct = np.unique(acquired, axis=0)
    order = np.argsort((distinct**2).sum(1), kind="stable")
    return np.concatenate([np.zeros((1, 3), int), distinct[order]])


def _gradients(points: np.ndarray, prescribed: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """b-values and b-vectors of lattice points along the world axes.

    The lattice has the step of the acquired one if they have about the same radius; else its outermost points have the
    largest prescribed b-value.
    """
    bvals, bvecs = prescribed
    squared, acquired = (points**2).sum(1), lattice_points(np.sqrt(bvals)[:, None] * bvecs)
    step = float(bvals.max()) / squared.max()
    if acquired is not None:
        radius = (acquired**2).sum(1)
        if squared.max() - 3 <= radius.max() <= squared.max():
            step = float(np.sum(bvals * radius) / np.sum(radius**2))
    length = np.sqrt(squared)
    return step * squared, points / np.where(length > 0, length, 1.0)[:, None]


def _weights(errors: np.ndarray, bvals: np.ndarray, neighbours: int = 15) -> np.ndarray:
    """Weights (n,) of volumes by their leave-one-out errors: 1, or less where much above that of similar b-values."""
    order = np.argsort(bvals, kind="stable")
    typical = np.empty(len(errors))
    for rank, volume in enumerate(order):
        first = max(0, min(rank - neighbours // 2, len(errors) - neighbours))
        typical[volume] = np.median(errors[order[first : first + neighbours]])
    return np.minimum(1.0, (WORSE * typical / np.maximum(errors, 1e-12)) ** 2)


def _apply(matrix: np.ndarray, data: torch.Tensor) -> torch.Tensor:
    """`matrix` (m, n) times a series (n, i, j, k): (m, i, j, k) float32, not below zero."""
    weights = torch.as_tensor(matrix, dtype=torch.float32, device=data.device)
    flat, out = data.reshape(len(data), -1), torch.empty(len(matrix), data[0].numel(), device=data.device)
    for start in range(0, flat.shape[1], CHUNK):
        out[:, start : start + CHUNK] = (weights @ flat[:, start : start + CHUNK]).clamp_(min=0)
    return out.reshape(len(matrix), *data.shape[1:])
