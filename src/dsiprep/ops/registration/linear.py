"""Rigid and affine registration of two volumes, of the same or of different contrasts.

Coarse-to-fine optimisation with analytic gradients and without random sampling, so results are reproducible. Runs on
the CPU, where one pair takes seconds.
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

LEVELS = ((8.0, 4.0, 16), (4.0, 3.0, 24), (2.0, 2.0, 32))  # smoothing FWHM and voxel size in mm, histogram bins
MAX_POINTS = 250_000
SEARCH_DEGREES = 25.0  # between the starting orientations; each converges from about 20 degrees away
DISTINCT_MM = 4.0  # mean distance above which two poses of the search count as different
MIN_OVERLAP = 0.3  # fraction of the fixed points inside the moving image; poses below it are rejected
RADIUS_MM = 60.0  # converts radians to mm at the surface of a brain, so that all parameters have the same scale


@dataclass(frozen=True, eq=False)
class LinearFit:
    """Result of a linear registration.

    Attributes
    ----------
    matrix : ndarray, (4, 4), float64
        World points of the fixed image to world points of the moving image, RAS+ mm.
    score_before, score_after : float
        Similarity at the initial matrix and at the result, at the finest level; larger is better.
    metric : str
        "mi" (normalised mutual information, 1 to 2) or "cc" (correlation, -1 to 1).
    """

    matrix: np.ndarray
    score_before: float
    score_after: float
    metric: str


@dataclass(frozen=True, eq=False)
class _Level:
    """One pyramid level: fixed samples at points relative to `centre`, and the moving volume to interpolate.

    Attributes
    ----------
    points : ndarray, (3, m), float32
        World points minus `centre`.
    fixed : ndarray, (m,), float32
        Fixed intensities at the points.
    fixed_bins : ndarray, (m,), int32
        Histogram bins of the fixed intensities.
    centre : ndarray, (3,)
        Mean of the world points.
    moving : ndarray, (i, j, k), float32
    to_voxel : ndarray, (4, 4)
        World points of the moving image to its voxels.
    limits : tuple of float
        Intensity range of the moving image for the histogram.
    bins : int
        Number of histogram bins.
    metric : str
    """

    points: np.ndarray
    fixed: np.ndarray
    fixed_bins: np.ndarray
    centre: np.ndarray
    moving: np.ndarray
    to_voxel: np.ndarray
    limits: tuple[float, float]
    bins: int
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
    """Find the rigid or affine transform that aligns `moving` with `fixed`.

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
        Defines the centre and the intensity range of the moving image; does not exclude any voxels.
    initial : ndarray, (4, 4), optional
        World points of the fixed image to world points of the moving image; identity by default.
    search : bool
        Start from `initial` and from aligned centres of mass, each in 27 orientations, and keep the best result.

    Returns
    -------
    LinearFit

    Raises
    ------
    ValueError
        If `dof` or `metric` is not one of the values above.

    References
    ----------
    Mattes et al. 2003 (doi 10.1109/TMI.2003.809072); Jenkinson et al. 2002 (doi 10.1006/nimg.2002.1132).
    """
    if dof not in (6, 12) or metric not in ("mi", "cc"):
        raise ValueError(f"dof {dof} and metric {metric!r}: dof must be 6 or 12, and metric mi or cc")
    start = np.eye(4) if initial is None else np.asarray(initial, float)
    finest = LEVELS[-1][1]
    masks = (fixed_mask, moving_mask)
    base_fixed, base_moving = _coarsened(fixed, finest), _coarsened(moving, finest)
    levels = [_level(base_moving, base_fixed, masks, parameters, metric) for parameters in LEVELS]
    candidates = [start]
    if search:
        candidates = _search_poses(levels[0], start, _centre(base_moving, moving_mask))
    fits: list[tuple[float, np.ndarray]] = []
    for number, level in enumerate(levels):
        fits = [_optimise(level, base, 6 if number == 0 else dof) for base in candidates]
        fits.sort(key=lambda fit: -fit[0])
        candidates = [fit[1] for fit in fits[: 2 if number == 0 else 1]]
        if number == 0:
            candidates.append(start)  # the header may be right where the coarse images mislead
    before, after = _evaluate(levels[-1], start)[0], fits[0][0]
    return LinearFit(candidates[0], before, after, metric)


def _level(
    moving: Volume,
    fixed: Volume,
    masks: tuple[Volume | None, Volume | None],
    parameters: tuple[float, float, int],
    metric: str,
) -> _Level:
    """Sample both images for one of `LEVELS`.

    The fixed points are denser than the smoothing requires, because the joint histogram needs many samples.
    """
    width, spacing, bins = parameters
    coarse_fixed, coarse_moving = (_coarsened(_smoothed(v, width), spacing) for v in (fixed, moving))
    inside = np.ones(coarse_fixed.grid.shape, bool)
    if masks[0] is not None:
        inside = _on_grid(masks[0], coarse_fixed) > 0.5
    voxels = np.argwhere(inside)
    step = -(-len(voxels) // MAX_POINTS)
    voxels = voxels[:: max(step, 1)]
    world = coarse_fixed.grid.to_world(voxels)
    values = coarse_fixed.numpy()[tuple(voxels.T)].astype(np.float32)
    data = np.ascontiguousarray(coarse_moving.numpy(), np.float32)
    foreground = data if masks[1] is None else data[_on_grid(masks[1], coarse_moving) > 0.5]
    low, high = np.percentile(values, (0.5, 99.5))
    limits = np.percentile(foreground if foreground.size else data, (0.5, 99.5))
    if masks[1] is not None:
        limits[0] = min(
            limits[0], float(np.percentile(data, 0.5))
        )  # keep the darker surroundings of the brain in range
    centre = world.mean(axis=0)
    return _Level(
        points=np.ascontiguousarray((world - centre).T, np.float32),
        fixed=values,
        fixed_bins=to_bins(values, float(low), float(high), bins),
        centre=centre,
        moving=data,
        to_voxel=np.linalg.inv(coarse_moving.grid.affine),
        limits=(float(limits[0]), float(limits[1])),
        bins=bins,
        metric=metric,
    )


def _coarsened(volume: Volume, mm: float) -> Volume:
    """The volume resampled to voxels of `mm` along each axis where they are smaller."""
    i, j, k = (max(mm, float(size)) for size in volume.grid.voxel_sizes)
    return resample_to_spacing(volume.to("cpu"), (i, j, k))


def _smoothed(volume: Volume, width: float) -> Volume:
    """The volume smoothed to a FWHM of `width` mm, allowing for the smoothing by the voxels themselves."""
    sigma = np.sqrt(np.maximum((width / volume.grid.voxel_sizes) ** 2 - 1, 0)) / FWHM
    return Volume(gaussian(volume.data[None], sigma.tolist(), truncate=3.0)[0], volume.grid)


def _on_grid(mask: Volume, target: Volume) -> np.ndarray:
    """The mask interpolated at the voxels of `target`."""
    return resample_onto(mask.data[None].float().cpu(), mask.grid, target.grid)[0].numpy()


def _centre(volume: Volume, mask: Volume | None) -> np.ndarray:
    """Centroid of the mask, or of the voxels brighter than the mean; world mm, (3,)."""
    source = volume if mask is None else mask
    data = source.numpy()
    foreground = np.argwhere(data > (data.mean() if mask is None else 0.5))
    centroid = (np.asarray(data.shape) - 1) / 2 if len(foreground) == 0 else foreground.mean(axis=0)
    return source.grid.to_world(centroid)


def _search_poses(level: _Level, start: np.ndarray, moving_centre: np.ndarray) -> list[np.ndarray]:
    """The start and the three best distinct poses at the coarsest level, each after a few iterations."""
    bright = level.fixed > level.fixed.mean()
    fixed_centre = level.centre + level.points[:, bright].mean(axis=1)
    centred = start.copy()
    centred[:3, 3] = moving_centre - start[:3, :3] @ fixed_centre
    sparse = replace(
        level, points=level.points[:, ::2].copy(), fixed=level.fixed[::2], fixed_bins=level.fixed_bins[::2].copy()
    )
    angles = np.radians((-SEARCH_DEGREES, 0.0, SEARCH_DEGREES))
    fits = []
    for base, euler in itertools.product((start, centred), itertools.product(angles, repeat=3)):
        rotation = np.eye(4)
        rotation[:3, :3] = Rotation.from_euler("xyz", euler).as_matrix()
        rotation[:3, 3] = level.centre - rotation[:3, :3] @ level.centre
        fits.append(_optimise(sparse, base @ rotation, 6, steps=12))
    fits.sort(key=lambda fit: -fit[0])
    distinct: list[np.ndarray] = []
    for _, matrix in fits:
        if all(_mean_distance(matrix, other, level) > DISTINCT_MM for other in distinct):
            distinct.append(matrix)
    return [start, *distinct[:3]]


def _mean_distance(first: np.ndarray, second: np.ndarray, level: _Level) -> float:
    """Mean distance in mm between the images of the fixed points under two matrices."""
    points = level.points[:, ::50] + level.centre[:, None]
    difference = (first - second)[:3]
    return float(np.linalg.norm(difference[:, :3] @ points + difference[:, 3:], axis=0).mean())


def _optimise(level: _Level, base: np.ndarray, dof: int, steps: int = 60) -> tuple[float, np.ndarray]:
    """Maximise the score over small transforms applied before `base`; returns the score and the matrix."""

    def cost(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        score, by_matrix = _evaluate(level, base @ _small_transform(parameters, level.centre))
        perturbed = np.concatenate([parameters + h * np.eye(dof) for h in (1e-3, -1e-3)])
        matrices = np.stack([_small_transform(p, level.centre) for p in perturbed])
        by_parameter = (base @ (matrices[:dof] - matrices[dof:]) / 2e-3)[:, :3]
        return -score, -np.einsum("ab,pab->p", by_matrix, by_parameter)

    options = {"maxiter": steps, "ftol": 1e-7, "gtol": 1e-7}
    result = minimize(cost, np.zeros(dof), jac=True, method="L-BFGS-B", options=options)
    return -float(result.fun), base @ _small_transform(result.x, level.centre)


def _small_transform(parameters: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """A transform near the identity about `centre`; parameters in mm: rigid (6,), or matrix and translation (12,)."""
    if len(parameters) == 6:
        return rigid_matrix(np.concatenate([parameters[:3] / RADIUS_MM, parameters[3:]]), centre)
    matrix = np.eye(4)
    matrix[:3, :3] += parameters[:9].reshape(3, 3) / RADIUS_MM
    matrix[:3, 3] = parameters[9:] + centre - matrix[:3, :3] @ centre
    return matrix


def _evaluate(level: _Level, matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """The score at a matrix, and its derivative with respect to the upper three rows, (3, 4)."""
    full = level.to_voxel @ matrix
    full[:3, 3] += full[:3, :3] @ level.centre
    values, slopes, weights = _sample_loop(level.moving, level.points, full[:3])
    if weights.mean(dtype=float) < MIN_OVERLAP:
        return (1.0 if level.metric == "mi" else 0.0), np.zeros((3, 4))  # the score of independent images
    if level.metric == "mi":
        score, derivative = mutual_information(level.fixed_bins, values, weights, *level.limits, level.bins)
    else:
        score, derivative = correlation(level.fixed, values, weights)
    by_point = slopes * derivative
    by_voxel = np.empty((3, 4))
    by_voxel[:, :3] = by_point @ level.points.T
    by_voxel[:, 3] = by_point.sum(axis=1, dtype=float)
    by_voxel[:, :3] += np.outer(by_voxel[:, 3], level.centre)
    return score, level.to_voxel[:3, :3].T @ by_voxel


@compiled(parallel=True)
def _sample_loop(
    volume: np.ndarray, points: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trilinear values, their derivatives per voxel, and weights that fall to 0 across the outermost voxel."""
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
