"""Nonlinear registration of two volumes: greedy diffeomorphic, driven by local cross-correlation.

At every step the force is smoothed, scaled to a fraction of a voxel, composed with what was found so far, and
the whole is smoothed a little: small smooth maps composed do not fold. One body serves CPU and GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import DisplacementField
from dsiprep.ops.field import invert, jacobian_determinant
from dsiprep.ops.filter import gaussian, gradient, resample_to_spacing
from dsiprep.ops.sample import pull, sample_linear, voxel_points
from dsiprep.ops.similarity import local_correlation

__all__ = ["DiffeomorphicFit", "register_diffeomorphic"]

LEVELS = ((4.0, 50), (2.0, 35), (1.0, 20))  # voxel size over the finest, iterations
WINDOW = 2  # half-width of the correlation's cube, voxels
UPDATE_SIGMA = 1.732  # of the force, voxels
TOTAL_SIGMA = 0.5  # of the whole displacement, voxels, at every iteration
STEP = 0.6  # longest displacement of an update, voxels
MARGIN_MM = 12.0  # around the mask, for forces at its edge and smoothing beyond


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
    finest_mm: float = 1.5,
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
    mover = _scaled(_onto(moving, box, np.asarray(initial, float)))
    weights = Volume(pull(mask.data[None].float(), mask.grid, box)[0], box)
    u = torch.zeros(3, 1, 1, 1, device=fixed.data.device)
    grid = Grid((1, 1, 1), box.affine)
    for factor, iterations in LEVELS:
        level = [resample_to_spacing(v, finest_mm * factor) for v in (still, mover, weights)]
        u = _carried(u, grid, level[0].grid)
        grid = level[0].grid
        u, similarity = _descend(u, level[1].data, level[0].data, level[2].data, iterations)
    linear = torch.as_tensor(grid.affine[:3, :3], dtype=torch.float32, device=u.device)
    forward = _without_folds(DisplacementField(torch.einsum("ab,bijk->aijk", linear, u), grid))
    inverse = invert(forward)
    return DiffeomorphicFit(_placed(forward, corner, whole), _placed(inverse, corner, whole), similarity)


def _descend(
    u: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, weights: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, float]:
    """Iterations of one level; u in voxels, (3, i, j, k)."""
    grid = Grid((u.shape[1], u.shape[2], u.shape[3]), np.eye(4))
    points = voxel_points(grid, grid).to(u.device)
    rim = _rim(u)
    score = torch.zeros_like(fixed)
    for iteration in range(iterations):
        warped = sample_linear(moving[None], points + u)
        score, derivative = local_correlation(fixed, warped[0], weights, WINDOW)
        force = gaussian(gradient(warped)[0] * derivative, UPDATE_SIGMA, truncate=3.0) * rim
        longest = float(force.norm(dim=0).max())
        if longest == 0:
            break
        force *= STEP * (1 - 0.5 * iteration / iterations) / longest
        u = force + sample_linear(u, points + force)
        u = gaussian(u, TOTAL_SIGMA, truncate=3.0) * rim
    return u, float((score * weights).sum() / weights.sum().clamp(min=1e-6))


def _rim(u: torch.Tensor) -> torch.Tensor:
    """1 inside, 0 on the outermost voxels: the field is zero outside its grid, so it must end at zero."""
    rim = torch.zeros(u.shape[1:], device=u.device)
    rim[1:-1, 1:-1, 1:-1] = 1
    return rim


def _box_around(mask: Volume, whole: Grid) -> tuple[tuple[int, int, int], Grid]:
    """The part of `whole` that holds the mask and a margin: its first voxel, and its grid."""
    inside = np.argwhere(mask.numpy() > 0.5)
    if len(inside) == 0:
        return (0, 0, 0), whole
    # both grids share their axes, so a box of one is a box of the other
    ends = whole.to_voxels(mask.grid.to_world(np.stack([inside.min(axis=0), inside.max(axis=0)])))
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
    smooth = resample_to_spacing(volume, (i, j, k))
    return Volume(pull(smooth.data[None], smooth.grid, box, matrix, cubic=True)[0], box)


def _scaled(volume: Volume) -> Volume:
    """Intensities from 0 to about 1."""
    data = volume.data.clamp(min=0)
    bright = data[data > data.mean()]
    high = float(bright.median()) * 1.5 if bright.numel() else 1.0
    return Volume(data / max(high, 1e-12), volume.grid)


def _carried(u: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    """A displacement in voxels of one level in voxels of the next."""
    ratio = torch.as_tensor(source.voxel_sizes / target.voxel_sizes, dtype=torch.float32, device=u.device)
    return pull(u, source, target) * ratio[:, None, None, None]


def _without_folds(field: DisplacementField) -> DisplacementField:
    """The field, smoothed further until no voxel's volume vanishes."""
    for _ in range(20):
        if float(jacobian_determinant(field).min()) > 0.02:
            break
        field = DisplacementField(gaussian(field.data, 1.0) * _rim(field.data), field.grid)
    return field


def _placed(field: DisplacementField, corner: tuple[int, int, int], whole: Grid) -> DisplacementField:
    """The field on the whole grid, zero outside its box."""
    data = torch.zeros(3, *whole.shape, device=field.data.device)
    (i, j, k), (ni, nj, nk) = corner, field.grid.shape
    data[:, i : i + ni, j : j + nj, k : k + nk] = field.data
    return DisplacementField(data, whole)
