"""Rigid and affine registration of two volumes, of the same or of different contrasts.

Coarse to fine, with analytic gradients and no random numbers: the same images give the same matrix. The
sampling runs on the CPU, where a whole pair takes seconds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numba
import numpy as np
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from dsiprep.compiled import compiled
from dsiprep.data.grid import Volume
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.filters import FWHM, gaussian, resample_to_spacing
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.registration.similarity import correlation, mutual_information, to_bins

__all__ = ["LinearFit", "register_linear"]

LEVELS = ((8.0, 4.0, 16), (4.0, 3.0, 24), (2.0, 2.0, 32))  # width of the smoothing and voxels in mm, bins
MOST_POINTS = 250_000
TURN_DEGREES = 25.0  # between the starts of the search; each finds its optimum from about 20 degrees off
LEAST_OVERLAP = 0.3  # of the fixed points inside the moving image, below which a pose is no candidate
RADIUS_MM = 60.0  # turns radians into mm at the surface of a brain, so that all parameters weigh alike


@dataclass(frozen=True, eq=False)
class LinearFit:
    """A linear registration.

    Attributes
    ----------
    matrix : ndarray, (4, 4), float64
        World points of the fixed image to world points of the moving image, RAS+ mm.
    score_before, score_after : float
        At the initial matrix and at the result, at the finest level; larger is better.
    metric : str
        "mi" (normalised mutual information, 1 to 2) or "cc" (correlation, -1 to 1).
    """

    matrix: np.ndarray
    score_before: float
    score_after: float
    metric: str


@dataclass(frozen=True, eq=False)
class _Level:
    """One resolution: fixed samples at points relative to `centre`, and the moving volume to read them in."""

    points: np.ndarray
    fixed: np.ndarray
    bins: np.ndarray
    centre: np.ndarray
    moving: np.ndarray
    to_voxel: np.ndarray
    limits: tuple[float, float]
    count: int
    metric: str


def register_linear(
    moving: Volume,
    fixed: Volume,
    *,
    dof: int = 6,
    metric: str = "mi",
    fixed_mask: Volume | None = None,
    moving_mask: Volume | None = None,
    initial: np.ndarray | None = None,
    search: bool = True,
) -> LinearFit:
    """Find the rigid or affine map that aligns `moving` with `fixed`.

    Parameters
    ----------
    moving, fixed : Volume
    dof : int
        6 (rigid) or 12 (affine).
    metric : str
        "mi" for different contrasts, "cc" for the same contrast.
    fixed_mask : Volume, optional
        Where the images are compared (above 0.5); everywhere by default.
    moving_mask : Volume, optional
        Gives the centre and the intensity range of the moving image; nothing is left out by it.
    initial : ndarray, (4, 4), optional
        Fixed world points to moving world points; identity by default.
    search : bool
        Start from `initial` and from aligned centres of mass, each in 27 orientations, and keep the best.

    Returns
    -------
    LinearFit

    Raises
    ------
    ValueError
        If `dof` or `metric` is not one of those above.

    References
    ----------
    Mattes et al. 2003 (doi 10.1109/TMI.2003.809072); Jenkinson et al. 2002 (doi 10.1006/nimg.2002.1132).
    """
    if dof not in (6, 12) or metric not in ("mi", "cc"):
        raise ValueError(f"dof {dof} and metric {metric!r}: dof is 6 or 12, metric is mi or cc")
    start = np.eye(4) if initial is None else np.asarray(initial, float)
    finest = LEVELS[-1][1]
    masks = (fixed_mask, moving_mask)
    base_fixed, base_moving = _at(fixed, finest), _at(moving, finest)
    levels = [_level(base_moving, base_fixed, masks, parameters, metric) for parameters in LEVELS]
    candidates = [start]
    if search:
        candidates = _searched(levels[0], start, _centre(base_moving, moving_mask))
    for number, level in enumerate(levels):
        fits = [_optimise(level, base, 6 if number == 0 else dof) for base in candidates]
        fits.sort(key=lambda fit: -fit[0])
        candidates = [fit[1] for fit in fits[: 2 if number == 0 else 1]]
        if number == 0:
            candidates.append(start)  # where the coarse images mislead, the header may still be right
    before, after = _evaluate(levels[-1], start)[0], fits[0][0]
    return LinearFit(candidates[0], before, after, metric)


def _level(
    moving: Volume,
    fixed: Volume,
    masks: tuple[Volume | None, Volume | None],
    parameters: tuple[float, float, int],
    metric: str,
) -> _Level:
    """Fixed points stand denser than the smoothing needs: a histogram is only as good as it is full."""
    width, spacing, bins = parameters
    coarse_fixed, coarse_moving = (_at(_smoothed(v, width), spacing) for v in (fixed, moving))
    inside = np.ones(coarse_fixed.grid.shape, bool)
    if masks[0] is not None:
        inside = _on_grid(masks[0], coarse_fixed) > 0.5
    voxels = np.argwhere(inside)
    step = -(-len(voxels) // MOST_POINTS)
    voxels = voxels[:: max(step, 1)]
    world = coarse_fixed.grid.to_world(voxels)
    values = coarse_fixed.numpy()[tuple(voxels.T)].astype(np.float32)
    data = np.ascontiguousarray(coarse_moving.numpy(), np.float32)
    sample = data if masks[1] is None else data[_on_grid(masks[1], coarse_moving) > 0.5]
    low, high = np.percentile(values, (0.5, 99.5))
    limits = np.percentile(sample if sample.size else data, (0.5, 99.5))
    if masks[1] is not None:
        limits[0] = min(limits[0], float(np.percentile(data, 0.5)))  # what surrounds the brain counts too
    centre = world.mean(axis=0)
    return _Level(
        points=np.ascontiguousarray((world - centre).T, np.float32),
        fixed=values,
        bins=to_bins(values, float(low), float(high), bins),
        centre=centre,
        moving=data,
        to_voxel=np.linalg.inv(coarse_moving.grid.affine),
        limits=(float(limits[0]), float(limits[1])),
        count=bins,
        metric=metric,
    )


def _at(volume: Volume, mm: float) -> Volume:
    """The volume with voxels of `mm`, along each axis whose voxels are not larger already."""
    i, j, k = (max(mm, float(size)) for size in volume.grid.voxel_sizes)
    return resample_to_spacing(volume.to("cpu"), (i, j, k))


def _smoothed(volume: Volume, width: float) -> Volume:
    """Smoothed to a full width at half maximum of `width` mm, counting what a voxel smooths already."""
    sigma = np.sqrt(np.maximum((width / volume.grid.voxel_sizes) ** 2 - 1, 0)) / FWHM
    return Volume(gaussian(volume.data[None], sigma.tolist(), truncate=3.0)[0], volume.grid)


def _on_grid(mask: Volume, target: Volume) -> np.ndarray:
    return resample_onto(mask.data[None].float().cpu(), mask.grid, target.grid)[0].numpy()


def _centre(volume: Volume, mask: Volume | None) -> np.ndarray:
    """Centre of mass of the mask, or of what is brighter than the mean; world mm, (3,)."""
    chosen = volume if mask is None else mask
    data = chosen.numpy()
    foreground = np.argwhere(data > (data.mean() if mask is None else 0.5))
    middle = (np.asarray(data.shape) - 1) / 2 if len(foreground) == 0 else foreground.mean(axis=0)
    return chosen.grid.to_world(middle)


def _searched(level: _Level, start: np.ndarray, moving_centre: np.ndarray) -> list[np.ndarray]:
    """The three best poses of the coarsest level, each from a few steps of its own."""
    bright = level.fixed > level.fixed.mean()
    fixed_centre = level.centre + level.points[:, bright].mean(axis=1)
    centred = start.copy()
    centred[:3, 3] = moving_centre - start[:3, :3] @ fixed_centre
    rough = replace(level, points=level.points[:, ::2].copy(), fixed=level.fixed[::2], bins=level.bins[::2].copy())
    angles = np.radians((-TURN_DEGREES, 0.0, TURN_DEGREES))
    fits = []
    for base, turn in itertools.product((start, centred), itertools.product(angles, repeat=3)):
        about = np.eye(4)
        about[:3, :3] = Rotation.from_euler("xyz", turn).as_matrix()
        about[:3, 3] = level.centre - about[:3, :3] @ level.centre
        fits.append(_optimise(rough, base @ about, 6, steps=12))
    fits.sort(key=lambda fit: -fit[0])
    distinct: list[np.ndarray] = []
    for _, matrix in fits:
        if all(_apart(matrix, other, level) > 4 for other in distinct):
            distinct.append(matrix)
    return [start, *distinct[:3]]


def _apart(first: np.ndarray, second: np.ndarray, level: _Level) -> float:
    """Mean distance in mm between where two matrices send the fixed points."""
    some = level.points[:, ::50] + level.centre[:, None]
    difference = (first - second)[:3]
    return float(np.linalg.norm(difference[:, :3] @ some + difference[:, 3:], axis=0).mean())


def _optimise(level: _Level, base: np.ndarray, dof: int, steps: int = 60) -> tuple[float, np.ndarray]:
    """Climb from `base` over small maps applied before it; gives the score and the matrix."""

    def cost(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        score, by_matrix = _evaluate(level, base @ _small_map(parameters, level.centre))
        nudges = np.concatenate([parameters + h * np.eye(dof) for h in (1e-3, -1e-3)])
        matrices = np.stack([_small_map(p, level.centre) for p in nudges])
        slope = (base @ (matrices[:dof] - matrices[dof:]) / 2e-3)[:, :3]
        return -score, -np.einsum("ab,pab->p", by_matrix, slope)

    options = {"maxiter": steps, "ftol": 1e-7, "gtol": 1e-7}
    result = minimize(cost, np.zeros(dof), jac=True, method="L-BFGS-B", options=options)
    return -float(result.fun), base @ _small_map(result.x, level.centre)


def _small_map(parameters: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """A map near the identity about `centre`; parameters in mm: rigid (6,), or matrix and shift (12,)."""
    if len(parameters) == 6:
        return rigid_matrix(np.concatenate([parameters[:3] / RADIUS_MM, parameters[3:]]), centre)
    matrix = np.eye(4)
    matrix[:3, :3] += parameters[:9].reshape(3, 3) / RADIUS_MM
    matrix[:3, 3] = parameters[9:] + centre - matrix[:3, :3] @ centre
    return matrix


def _evaluate(level: _Level, matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """The score at a matrix, and its derivative by the upper three rows, (3, 4)."""
    full = level.to_voxel @ matrix
    full[:3, 3] += full[:3, :3] @ level.centre
    values, slopes, weights = _sample_loop(level.moving, level.points, full[:3])
    if weights.mean(dtype=float) < LEAST_OVERLAP:
        return (1.0 if level.metric == "mi" else 0.0), np.zeros((3, 4))  # as of independent images
    if level.metric == "mi":
        score, force = mutual_information(level.bins, values, weights, *level.limits, level.count)
    else:
        score, force = correlation(level.fixed, values, weights)
    pushed = slopes * force
    by_voxel = np.empty((3, 4))
    by_voxel[:, :3] = pushed @ level.points.T
    by_voxel[:, 3] = pushed.sum(axis=1, dtype=float)
    by_voxel[:, :3] += np.outer(by_voxel[:, 3], level.centre)
    return score, level.to_voxel[:3, :3].T @ by_voxel


@compiled(parallel=True)
def _sample_loop(
    volume: np.ndarray, points: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trilinear values, their slopes per voxel, and weights that fade over the outermost voxel."""
    ni, nj, nk = volume.shape
    m = points.shape[1]
    values, slopes, weights = np.zeros(m, np.float32), np.zeros((3, m), np.float32), np.zeros(m, np.float32)
    for p in numba.prange(m):
        a, b, c = points[0, p], points[1, p], points[2, p]
        x = matrix[0, 0] * a + matrix[0, 1] * b + matrix[0, 2] * c + matrix[0, 3]
        y = matrix[1, 0] * a + matrix[1, 1] * b + matrix[1, 2] * c + matrix[1, 3]
        z = matrix[2, 0] * a + matrix[2, 1] * b + matrix[2, 2] * c + matrix[2, 3]
        if not (x > 0 and y > 0 and z > 0 and x < ni - 1 and y < nj - 1 and z < nk - 1):
            continue
        i, j, k = int(x), int(y), int(z)
        x, y, z = x - i, y - j, z - k
        v000, v001 = volume[i, j, k], volume[i, j, k + 1]
        v010, v011 = volume[i, j + 1, k], volume[i, j + 1, k + 1]
        v100, v101 = volume[i + 1, j, k], volume[i + 1, j, k + 1]
        v110, v111 = volume[i + 1, j + 1, k], volume[i + 1, j + 1, k + 1]
        v00, v01 = v000 + z * (v001 - v000), v010 + z * (v011 - v010)
        v10, v11 = v100 + z * (v101 - v100), v110 + z * (v111 - v110)
        v0, v1 = v00 + y * (v01 - v00), v10 + y * (v11 - v10)
        values[p] = v0 + x * (v1 - v0)
        slopes[0, p] = v1 - v0
        slopes[1, p] = (1 - x) * (v01 - v00) + x * (v11 - v10)
        d0 = (1 - y) * (v001 - v000) + y * (v011 - v010)
        d1 = (1 - y) * (v101 - v100) + y * (v111 - v110)
        slopes[2, p] = (1 - x) * d0 + x * d1
        edge = min(min(min(x + i, ni - 1 - x - i), min(y + j, nj - 1 - y - j)), min(z + k, nk - 1 - z - k))
        weights[p] = min(edge, 1.0)
    return values, slopes, weights
