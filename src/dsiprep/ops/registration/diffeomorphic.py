"""Nonlinear registration of two volumes: greedy diffeomorphic, driven by local cross-correlation.

At every step the force is smoothed, added to what is left of the step before (momentum), shortened to a fraction
of a voxel, composed with what was found so far, and the whole is smoothed a little: small smooth maps composed do
not fold. Correlation has no unit, so the force itself is a displacement of the right size: steps die away where
the images agree, and images that are the same stay where they are.
On the CPU an iteration runs in the loops of `diffeomorphic_loops`, near the mask only; on other devices the same
sums are tensor operations. A test holds both to the same field.
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

LEVELS = ((4.0, 40), (2.0, 30), (1.0, 12))  # voxel size over the finest, iterations
WINDOW = 2  # half-width of the correlation's cube, voxels
UPDATE_SIGMA = 1.732  # of the force, voxels
TOTAL_SIGMA = 0.8  # of the whole displacement, voxels, at every iteration
TRUNCATE = 3.0  # half-width of both kernels in sigmas
MOMENTUM = 0.8  # share of a step that goes on in the next one
LONGEST = 0.4  # which no step reaches, voxels
MARGIN_MM = 12.0  # around the mask, for forces at its edge and smoothing beyond
LEAST_SIZE = 8  # voxels along the shortest axis below which a coarse level is left out
LEAST_VOLUME = 0.05  # Jacobian determinant, below which the field is smoothed


@dataclass(frozen=True, eq=False)
class DiffeomorphicFit:
    """A nonlinear registration.

    Attributes
    ----------
    forward : DisplacementField
        A point y of the fixed image lies at initial @ (y + u(y)) in the moving one.
    inverse : DisplacementField
        Undoes `forward`: z -> z + v(z) with v(z) + u(z + v(z)) = 0. A point m of the moving image lies at
        z + v(z) in the fixed one, where z = inverse(initial) @ m.
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
    """Find the smooth invertible displacement that aligns `moving`, brought over by `initial`, with `fixed`.

    Parameters
    ----------
    moving, fixed : Volume
        Of the same contrast or of contrasts that vary together locally; on one device.
    initial : ndarray, (4, 4)
        World points of the fixed image to world points of the moving image.
    fixed_mask : Volume, optional
        Where the images are compared; by default where the fixed image is not zero.
    finest_mm : float
        Voxel size of the last level and of the fields.

    Returns
    -------
    DiffeomorphicFit
        Fields over the whole field of view of the fixed image.

    References
    ----------
    Avants et al. 2008 (doi 10.1016/j.media.2007.06.004);
    Joshi et al. 2004 (doi 10.1016/j.neuroimage.2004.07.068);
    Yushkevich et al. 2016 (doi 10.1016/j.jalz.2016.06.205).
    """
    whole = fixed.grid.at_spacing(finest_mm)
    mask = fixed_mask if fixed_mask is not None else Volume((fixed.data != 0).float(), fixed.grid)
    corner, box = _box_around(mask, whole)
    still = _scaled(_onto(fixed, box, np.eye(4)))
    blind = _blind(moving, box, np.asarray(initial, float))
    mover = _scaled(_onto(moving, box, np.asarray(initial, float)))
    mover = Volume(mover.data * (1 - blind.data), box)
    weights = Volume(resample_onto(mask.data[None].float(), mask.grid, box)[0], box)
    u = torch.zeros(3, 1, 1, 1, device=fixed.data.device)
    grid = Grid((1, 1, 1), box.affine)
    for level, iterations in _pyramid((still, mover, weights, blind), finest_mm):
        u = _carried(u, grid, level[0].grid)
        grid = level[0].grid
        image, seen = _known(level[1].data, level[3].data)
        u, similarity = _descend(u, image, level[0].data, level[2].data * seen, iterations)
    u = _without_folds(u)
    linear = torch.as_tensor(grid.affine[:3, :3], dtype=torch.float32, device=u.device)
    forward = DisplacementField(torch.einsum("ab,bijk->aijk", linear, u), grid)
    del u, image, level, still, mover, weights, blind  # half the memory: the inverse takes as much again
    inverse = invert(forward)
    return DiffeomorphicFit(_placed(forward, corner, whole), _placed(inverse, corner, whole), similarity)


def _pyramid(volumes: tuple[Volume, ...], finest_mm: float) -> list[tuple[list[Volume], int]]:
    """The volumes at every level, each made from the next finer one, and the iterations there; coarse to fine."""
    levels: list[tuple[list[Volume], int]] = []
    for factor, iterations in reversed(LEVELS):
        finer = levels[-1][0] if levels else list(volumes)
        level = finer if factor == 1 else [resample_to_spacing(v, finest_mm * factor) for v in finer]
        if levels and min(level[0].grid.shape) < LEAST_SIZE:
            break
        levels.append((level, iterations))
    return levels[::-1]


def _descend(
    u: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, weights: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, float]:
    """Iterations of one level; u in voxels, (3, i, j, k). Also the mean squared correlation at the last one."""
    body = _descend_loops if u.device.type == "cpu" else _descend_tensors
    return body(u, moving, fixed, weights * _rim(weights[None]), iterations)


def _descend_loops(
    u: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, weights: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, float]:
    """The body for the CPU; u is overwritten."""
    m, f, w = (np.ascontiguousarray(t.numpy(), np.float32) for t in (moving, fixed, weights))
    smooth, polish = (gaussian_kernel(sigma, TRUNCATE) for sigma in (UPDATE_SIGMA, TOTAL_SIGMA))
    seen, moved = _spans(_near(weights, WINDOW + 1)), _spans(_near(weights, WINDOW + len(smooth) // 2))
    now = u.numpy()
    then, force, step = now.copy(), np.zeros_like(now), np.zeros_like(now)
    warped, score = m.copy(), 0.0  # where the volume ends nothing is moved
    for _ in range(iterations):
        warp_loop(m, now, seen, warped)
        score = correlation_loop(f, warped, w, WINDOW, VARIANCE_FLOOR, seen, force)
        smooth_loop(force, smooth, moved, MOMENTUM, step)
        compose_loop(now, step, LONGEST, moved, then)
        smooth_loop(then, polish, moved, 0.0, now)
    return u, score


def _descend_tensors(
    u: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, weights: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, float]:
    """The body for other devices."""
    grid = Grid((u.shape[1], u.shape[2], u.shape[3]), np.eye(4))
    points = voxel_points(grid, grid).to(u.device)
    near = _near(weights, WINDOW + len(gaussian_kernel(UPDATE_SIGMA, TRUNCATE)) // 2)
    near = (near.cumsum(2) > 0) & (near.flip(2).cumsum(2).flip(2) > 0)  # one span a row, as the loops have it
    rim, total = _rim(u), weights.sum().clamp(min=1e-6)
    step, score = torch.zeros_like(u), torch.zeros((), device=u.device)
    for _ in range(iterations):
        warped = sample_linear(moving[None], points + u)
        scores, derivative = local_correlation(fixed, warped[0], weights, WINDOW)
        score = (scores * weights).sum() / total
        force = gradient(warped)[0] * derivative * rim
        step = MOMENTUM * step + gaussian(force, UPDATE_SIGMA, TRUNCATE) * near
        update = step / (1 + step.square().sum(dim=0) / LONGEST**2).sqrt()
        u = torch.where(near, gaussian(update + sample_linear(u, points + update), TOTAL_SIGMA, TRUNCATE), u)
    return u, float(score)


def _near(weights: torch.Tensor, reach: int) -> torch.Tensor:
    """Voxels within a cube of `reach` around one that counts, those on the faces of the volume left out."""
    counts = (weights > 0).float()[None]
    return (box_sum(counts, reach)[0] > 0.5) & (_rim(counts) > 0)


def _spans(near: torch.Tensor) -> np.ndarray:
    """First voxel along k, and the one after the last, of every row; (2, i, j)."""
    inside = near.numpy()
    some = inside.any(axis=2)
    first = np.where(some, inside.argmax(axis=2), 0)
    last = np.where(some, inside.shape[2] - inside[:, :, ::-1].argmax(axis=2), 0)
    return np.stack([first, last])


def _rim(u: torch.Tensor) -> torch.Tensor:
    """1 inside, 0 on the outermost voxels."""
    rim = torch.zeros(u.shape[1:], device=u.device)
    rim[1:-1, 1:-1, 1:-1] = 1
    return rim


def _blind(moving: Volume, box: Grid, initial: np.ndarray) -> Volume:
    """1 where the moving image does not reach: its zeros there are no anatomy."""
    seen = resample_onto(torch.ones_like(moving.data, dtype=torch.float32)[None], moving.grid, box, initial)[0]
    return Volume((seen < 0.999).float(), box)


def _known(image: torch.Tensor, blind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The image without the edge that its zeros make where it ends, and the voxels whose cube it covers."""
    seen = box_sum(blind[None], WINDOW + 1)[0] < 0.5
    if bool(seen.all()):
        return image, seen
    known = 1 - blind
    beyond = gaussian(torch.stack([image, known]), 2.0, truncate=4.0)
    filled = torch.where(known > 0.5, image / known.clamp(min=0.5), beyond[0] / beyond[1].clamp(min=1e-4))
    return filled, seen


def _box_around(mask: Volume, whole: Grid) -> tuple[tuple[int, int, int], Grid]:
    """The part of `whole` that holds the mask and a margin: its first voxel, and its grid."""
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


def _onto(volume: Volume, box: Grid, matrix: np.ndarray) -> Volume:
    """The volume, smoothed to the box's voxel size if that is larger, read at the points of the box."""
    size = float(box.voxel_sizes.mean())
    i, j, k = (max(size, float(s)) for s in volume.grid.voxel_sizes)
    if not np.allclose((i, j, k), volume.grid.voxel_sizes, rtol=1e-3):
        volume = resample_to_spacing(volume, (i, j, k))
    steps = np.linalg.inv(volume.grid.affine) @ matrix @ box.affine
    between = not np.allclose(steps, np.round(steps), atol=1e-4)  # voxel on voxel: nothing to interpolate
    return Volume(resample_onto(volume.data[None], volume.grid, box, matrix, cubic=between)[0], box)


def _scaled(volume: Volume) -> Volume:
    """Intensities from 0 to about 1."""
    data = volume.data.clamp(min=0)
    bright = data[data > data.mean()]
    high = float(bright.median()) * 1.5 if bright.numel() else 1.0
    return Volume(data / max(high, 1e-12), volume.grid)


def _carried(u: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    """A displacement in voxels of one level in voxels of the next; zero outside the grid, so zero at its end."""
    ratio = torch.as_tensor(source.voxel_sizes / target.voxel_sizes, dtype=torch.float32, device=u.device)
    u = resample_onto(u, source, target)
    u *= ratio[:, None, None, None]
    u *= _rim(u)
    return u


def _without_folds(u: torch.Tensor) -> torch.Tensor:
    """The field in voxels, smoothed where a voxel's volume all but vanishes, until none does."""
    for attempt in range(20):
        folded = _folded(u)
        if not bool(folded.any()):
            break
        near = (box_sum(folded[None], 2 + attempt // 2) > 0.5).float()
        share = gaussian(near, 1.5)[0] * _rim(u)
        i, j, k = (slice(int(w.min()), int(w.max()) + 1) for w in torch.nonzero(share, as_tuple=True))
        part = u[:, i, j, k]
        u[:, i, j, k] = torch.lerp(part, gaussian(part, 1.0), share[i, j, k])
    return u


def _folded(u: torch.Tensor) -> torch.Tensor:
    """1 where the volume of a voxel falls below `LEAST_VOLUME`."""
    if u.device.type == "cpu":
        return torch.from_numpy(volume_loop(u.numpy(), LEAST_VOLUME))
    grid = Grid((u.shape[1], u.shape[2], u.shape[3]), np.eye(4))
    return (jacobian_determinant(DisplacementField(u, grid)) < LEAST_VOLUME) * _rim(u)


def _placed(field: DisplacementField, corner: tuple[int, int, int], whole: Grid) -> DisplacementField:
    """The field on the whole grid, zero outside its box."""
    data = torch.zeros(3, *whole.shape, device=field.data.device)
    (i, j, k), (ni, nj, nk) = corner, field.grid.shape
    data[:, i : i + ni, j : j + nj, k : k + nk] = field.data
    return DisplacementField(data, whole)
