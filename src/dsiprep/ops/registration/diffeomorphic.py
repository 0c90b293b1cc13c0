"""Nonlinear registration of two volumes: greedy diffeomorphic, driven by local cross-correlation.

Each iteration smooths the force, adds a share of the previous step (momentum), limits the step to a fraction of a
voxel, composes it with the current displacement and smooths the result slightly: a composition of small smooth maps
does not fold. Correlation is dimensionless, so the force serves as a displacement without further scaling: steps vanish
where the images agree, and identical images are left in place.
On the CPU an iteration runs in the kernels of `diffeomorphic_kernels`, near the mask only; on other devices the same
sums are tensor operations. A test checks that both give the same field.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.image.displacement_field import invert, jacobian_determinant
from dsiprep.ops.image.filters import box_sum, gaussian, gaussian_kernel, gradient, resample_to_spacing
from dsiprep.ops.image.interpolation import resample_onto, sample_linear, voxel_points
from dsiprep.ops.registration.diffeomorphic_kernels import (
    compose_loop,
    correlation_loop,
    smooth_loop,
    volume_loop,
    warp_loop,
)
from dsiprep.ops.registration.similarity import VARIANCE_FLOOR, local_correlation

__all__ = ["DiffeomorphicFit", "register_diffeomorphic"]

LEVELS = ((4.0, 40), (2.0, 30), (1.0, 12))  # voxel size relative to the finest level, iterations; coarse to fine
WINDOW = 2  # half-width of the correlation window, voxels
UPDATE_SIGMA = 1.732  # smoothing of the force, voxels
TOTAL_SIGMA = 0.8  # smoothing of the total displacement after every iteration, voxels
TRUNCATE = 3.0  # half-width of both smoothing kernels in sigmas
MOMENTUM = 0.8  # share of the previous step that is added to the next one
MAX_STEP = 0.4  # upper limit of a step, approached asymptotically, voxels
MARGIN_MM = 12.0  # around the mask, for the windows at its edge and the reach of the smoothing
MIN_LEVEL_SIZE = 8  # voxels along the shortest axis; coarser levels are skipped
MIN_JACOBIAN = 0.05  # Jacobian determinant below which the field is smoothed locally


@dataclass(frozen=True, eq=False)
class DiffeomorphicFit:
    """Result of a nonlinear registration.

    Attributes
    ----------
    forward : DisplacementField
        u: a point y of the fixed image corresponds to initial @ (y + u(y)) in the moving image.
    inverse : DisplacementField
        v, the inverse of `forward`: v(z) + u(z + v(z)) = 0. A point m of the moving image corresponds to z + v(z) in
        the fixed image, where z = inverse(initial) @ m.
    similarity : float
        Mean squared local correlation in the mask, 0 to 1.
    """

    forward: DisplacementField
    inverse: DisplacementField
    similarity: float


def register_diffeomorphic(
    moving: Volume,
    fixed: Volume,
    initial: np.ndarray,
    *,
    fixed_mask: Volume | None = None,
    finest_mm: float = 1.0,
) -> DiffeomorphicFit:
    """Find the smooth invertible displacement that aligns `moving`, pre-aligned by `initial`, with `fixed`.

    Parameters
    ----------
    moving, fixed : Volume
        Same contrast, or contrasts that are locally correlated; on the same device.
    initial : ndarray, (4, 4)
        World points of the fixed image to world points of the moving image.
    fixed_mask : Volume, optional
        Where the images are compared; by default, where the fixed image is not zero.
    finest_mm : float
        Voxel size of the finest level and of the resulting fields.

    Returns
    -------
    DiffeomorphicFit
        Displacement fields over the whole field of view of the fixed image.

    References
    ----------
    Avants et al. 2008 (doi 10.1016/j.media.2007.06.004);
    Joshi et al. 2004 (doi 10.1016/j.neuroimage.2004.07.068);
    Yushkevich et al. 2016 (doi 10.1016/j.jalz.2016.06.205).
    """
    whole = fixed.grid.at_spacing(finest_mm)
    mask = fixed_mask if fixed_mask is not None else Volume((fixed.data != 0).float(), fixed.grid)
    corner, region = _region_around(mask, whole)
    fixed_image = _normalise_intensity(_resample_to_region(fixed, region, np.eye(4)))
    outside = _outside_field_of_view(moving, region, np.asarray(initial, float))
    moving_image = _normalise_intensity(_resample_to_region(moving, region, np.asarray(initial, float)))
    moving_image = Volume(moving_image.data * (1 - outside.data), region)
    weights = Volume(resample_onto(mask.data[None].float(), mask.grid, region)[0], region)
    u, grid, similarity = _optimise_levels((fixed_image, moving_image, weights, outside), finest_mm)
    del fixed_image, moving_image, weights, outside  # free memory for the inversion, which needs as much again
    u = _unfold(u)
    linear = torch.as_tensor(grid.affine[:3, :3], dtype=torch.float32, device=u.device)
    forward = DisplacementField(torch.einsum("ab,bijk->aijk", linear, u), grid)
    del u
    inverse = invert(forward)
    return DiffeomorphicFit(_embed(forward, corner, whole), _embed(inverse, corner, whole), similarity)


def _optimise_levels(
    volumes: tuple[Volume, Volume, Volume, Volume], finest_mm: float
) -> tuple[torch.Tensor, Grid, float]:
    """Optimise from the coarsest to the finest level.

    Parameters
    ----------
    volumes : tuple of Volume
        Fixed image, moving image, weights, and 1 outside the field of view of the moving image; on one grid.
    finest_mm : float
        Voxel size of that grid.

    Returns
    -------
    u : Tensor, (3, i, j, k)
        Displacement in voxels of the finest level.
    grid : Grid
        Of the finest level.
    similarity : float
    """
    u = torch.zeros(3, 1, 1, 1, device=volumes[0].data.device)
    grid, similarity = Grid((1, 1, 1), volumes[0].grid.affine), 0.0
    for (fixed, moving, weights, outside), iterations in _pyramid(volumes, finest_mm):
        u = _to_next_level(u, grid, fixed.grid)
        grid = fixed.grid
        image, covered = _extrapolate(moving.data, outside.data)
        u, similarity = _optimise_level(u, image, fixed.data, weights.data * covered, iterations)
    return u, grid, similarity


def _pyramid(volumes: tuple[Volume, ...], finest_mm: float) -> list[tuple[list[Volume], int]]:
    """Volumes and iterations at every level, coarse to fine; each level is computed from the next finer one."""
    levels: list[tuple[list[Volume], int]] = []
    for factor, iterations in reversed(LEVELS):
        finer = levels[-1][0] if levels else list(volumes)
        level = finer if factor == 1 else [resample_to_spacing(v, finest_mm * factor) for v in finer]
        if levels and min(level[0].grid.shape) < MIN_LEVEL_SIZE:
            break
        levels.append((level, iterations))
    return levels[::-1]


def _optimise_level(
    u: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, weights: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, float]:
    """Iterate at one level; returns u in voxels, (3, i, j, k), and the mean squared correlation at the end."""
    optimise = _optimise_level_loops if u.device.type == "cpu" else _optimise_level_tensors
    return optimise(u, moving, fixed, weights * _interior(weights[None]), iterations)


def _optimise_level_loops(
    u: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, weights: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, float]:
    """`_optimise_level` on the CPU; overwrites u."""
    m, f, w = (np.ascontiguousarray(t.numpy(), np.float32) for t in (moving, fixed, weights))
    force_kernel, total_kernel = (gaussian_kernel(sigma, TRUNCATE) for sigma in (UPDATE_SIGMA, TOTAL_SIGMA))
    force_spans = _row_spans(_near_weights(weights, WINDOW + 1))
    update_spans = _row_spans(_near_weights(weights, WINDOW + len(force_kernel) // 2))
    current = u.numpy()
    composed, force, step = current.copy(), np.zeros_like(current), np.zeros_like(current)
    warped, score = m.copy(), 0.0  # the displacement is zero on the outermost voxels, which are never written
    for _ in range(iterations):
        warp_loop(m, current, force_spans, warped)
        score = correlation_loop(f, warped, w, WINDOW, VARIANCE_FLOOR, force_spans, force)
        smooth_loop(force, force_kernel, update_spans, MOMENTUM, step)
        compose_loop(current, step, MAX_STEP, update_spans, composed)
        smooth_loop(composed, total_kernel, update_spans, 0.0, current)
    return u, score


def _optimise_level_tensors(
    u: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, weights: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, float]:
    """`_optimise_level` on other devices."""
    grid = Grid((u.shape[1], u.shape[2], u.shape[3]), np.eye(4))
    points = voxel_points(grid, grid).to(u.device)
    near = _near_weights(weights, WINDOW + len(gaussian_kernel(UPDATE_SIGMA, TRUNCATE)) // 2)
    near = (near.cumsum(2) > 0) & (near.flip(2).cumsum(2).flip(2) > 0)  # one contiguous span per row, as in the loops
    interior, total = _interior(u), weights.sum().clamp(min=1e-6)
    step, score = torch.zeros_like(u), torch.zeros((), device=u.device)
    for _ in range(iterations):
        warped = sample_linear(moving[None], points + u)
        scores, derivative = local_correlation(fixed, warped[0], weights, WINDOW)
        score = (scores * weights).sum() / total
        force = gradient(warped)[0] * derivative * interior
        step = MOMENTUM * step + gaussian(force, UPDATE_SIGMA, TRUNCATE) * near
        update = step / (1 + step.square().sum(dim=0) / MAX_STEP**2).sqrt()
        u = torch.where(near, gaussian(update + sample_linear(u, points + update), TOTAL_SIGMA, TRUNCATE), u)
    return u, float(score)


def _near_weights(weights: torch.Tensor, reach: int) -> torch.Tensor:
    """Interior voxels with a non-zero weight at most `reach` voxels away along every axis."""
    weighted = (weights > 0).float()[None]
    return (box_sum(weighted, reach)[0] > 0.5) & (_interior(weighted) > 0)


def _row_spans(near: torch.Tensor) -> np.ndarray:
    """First voxel along k and one past the last voxel in every row, (2, i, j)."""
    inside = near.numpy()
    occupied = inside.any(axis=2)
    first = np.where(occupied, inside.argmax(axis=2), 0)
    last = np.where(occupied, inside.shape[2] - inside[:, :, ::-1].argmax(axis=2), 0)
    return np.stack([first, last])


def _interior(u: torch.Tensor) -> torch.Tensor:
    """1 inside, 0 on the outermost voxels."""
    interior = torch.zeros(u.shape[1:], device=u.device)
    interior[1:-1, 1:-1, 1:-1] = 1
    return interior


def _outside_field_of_view(moving: Volume, region: Grid, initial: np.ndarray) -> Volume:
    """1 outside the field of view of the moving image, where its zeros are not anatomy."""
    inside = resample_onto(torch.ones_like(moving.data, dtype=torch.float32)[None], moving.grid, region, initial)[0]
    return Volume((inside < 0.999).float(), region)


def _extrapolate(image: torch.Tensor, outside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Extend the image smoothly beyond its field of view, which avoids a false edge there.

    Also returns the voxels whose correlation window lies within the field of view.
    """
    covered = box_sum(outside[None], WINDOW + 1)[0] < 0.5
    if bool(covered.all()):
        return image, covered
    inside = 1 - outside
    smoothed = gaussian(torch.stack([image, inside]), 2.0, truncate=4.0)
    filled = torch.where(inside > 0.5, image / inside.clamp(min=0.5), smoothed[0] / smoothed[1].clamp(min=1e-4))
    return filled, covered


def _region_around(mask: Volume, whole: Grid) -> tuple[tuple[int, int, int], Grid]:
    """First voxel and grid of the part of `whole` that contains the mask and a margin."""
    inside = np.argwhere(mask.numpy() > 0.5)
    if len(inside) == 0:
        return (0, 0, 0), whole
    bounds = np.stack([inside.min(axis=0), inside.max(axis=0)])
    corners = np.stack(np.meshgrid(*bounds.T), axis=-1).reshape(-1, 3)
    ends = whole.to_voxels(mask.grid.to_world(corners))
    margin = MARGIN_MM / whole.voxel_sizes
    low = np.maximum(0, np.floor(ends.min(axis=0) - margin)).astype(int)
    high = np.minimum(np.asarray(whole.shape) - 1, np.ceil(ends.max(axis=0) + margin)).astype(int)
    affine = whole.affine.copy()
    affine[:3, 3] = whole.to_world(low)
    shape = high - low + 1
    return (int(low[0]), int(low[1]), int(low[2])), Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _resample_to_region(volume: Volume, region: Grid, matrix: np.ndarray) -> Volume:
    """Resample a volume onto the region, smoothed first if the region's voxels are larger."""
    size = float(region.voxel_sizes.mean())
    i, j, k = (max(size, float(s)) for s in volume.grid.voxel_sizes)
    if not np.allclose((i, j, k), volume.grid.voxel_sizes, rtol=1e-3):
        volume = resample_to_spacing(volume, (i, j, k))
    steps = np.linalg.inv(volume.grid.affine) @ matrix @ region.affine
    off_grid = not np.allclose(steps, np.round(steps), atol=1e-4)  # False if voxel centres coincide
    return Volume(resample_onto(volume.data[None], volume.grid, region, matrix, cubic=off_grid)[0], region)


def _normalise_intensity(volume: Volume) -> Volume:
    """Scale intensities to the range from 0 to about 1."""
    data = volume.data.clamp(min=0)
    bright = data[data > data.mean()]
    upper = float(bright.median()) * 1.5 if bright.numel() else 1.0
    return Volume(data / max(upper, 1e-12), volume.grid)


def _to_next_level(u: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    """Convert a displacement from voxels of one level to voxels of the next; zero on the outermost voxels."""
    ratio = torch.as_tensor(source.voxel_sizes / target.voxel_sizes, dtype=torch.float32, device=u.device)
    u = resample_onto(u, source, target)
    u *= ratio[:, None, None, None]
    u *= _interior(u)
    return u


def _unfold(u: torch.Tensor) -> torch.Tensor:
    """Smooth the field (in voxels) locally until no Jacobian determinant is below `MIN_JACOBIAN`, at most 20 times."""
    for attempt in range(20):
        folds = _find_folds(u)
        if not bool(folds.any()):
            break
        neighbourhood = (box_sum(folds[None], 2 + attempt // 2) > 0.5).float()
        blend = gaussian(neighbourhood, 1.5)[0] * _interior(u)
        i, j, k = (slice(int(w.min()), int(w.max()) + 1) for w in torch.nonzero(blend, as_tuple=True))
        part = u[:, i, j, k]
        u[:, i, j, k] = torch.lerp(part, gaussian(part, 1.0), blend[i, j, k])
    return u


def _find_folds(u: torch.Tensor) -> torch.Tensor:
    """1 where the Jacobian determinant is below `MIN_JACOBIAN`."""
    if u.device.type == "cpu":
        return torch.from_numpy(volume_loop(u.numpy(), MIN_JACOBIAN))
    grid = Grid((u.shape[1], u.shape[2], u.shape[3]), np.eye(4))
    return (jacobian_determinant(DisplacementField(u, grid)) < MIN_JACOBIAN) * _interior(u)


def _embed(field: DisplacementField, corner: tuple[int, int, int], whole: Grid) -> DisplacementField:
    """The field on the whole grid, zero outside its region."""
    data = torch.zeros(3, *whole.shape, device=field.data.device)
    (i, j, k), (ni, nj, nk) = corner, field.grid.shape
    data[:, i : i + ni, j : j + nj, k : k + nk] = field.data
    return DisplacementField(data, whole)
