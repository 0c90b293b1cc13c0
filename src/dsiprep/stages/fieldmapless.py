"""Susceptibility distortion without a fieldmap: the b=0 image against the tissues of the structural image.

Point x of the undistorted head is found in the b=0 image at x + f(x) e: e the phase-encoding axis, f in mm. What is
read there has to be what the tissues p_k at P x predict, sum a_k(x) p_k(P x): P the rigid pose of the structural image,
and a_k weights that drift. f and P minimise

    sum rho(I(x + f e) - sum a_k p_k(P x)) / sigma²  +  w |grad f|²  +  k psi(lap f)  +  sum d^4 / (1 - d²)

with Cauchy's rho, psi quadratic at first and linear beyond, and d the squeezing of neighbours. Intensities are not
modulated by the Jacobian determinant: squeezed signal and a coil that is near look alike, and the weights follow both.

Two shells around the brain count as tissues whose weights do not drift: masks of structural images end a little inside
or outside of where the b=0 image does, all around the brain, and without the shells that looks like displacement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy, Coregistration, Distortion
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import rigid_matrix
from dsiprep.ops.image.filters import FWHM, gaussian, resample_to_spacing, resized
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.tissue_contrast import predicted_contrast
from dsiprep.ops.pepolar.gre_fieldmap import without_folds
from dsiprep.ops.pepolar.normal_equations import NormalEquations, conjugate_gradients, percentile_99
from dsiprep.ops.pepolar.pose_derivatives import across_axis, rigid_columns
from dsiprep.ops.pepolar.regularisation import add_penalties, along, barrier
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines
from dsiprep.ops.registration.head_size import enlarge_matrix, enlarge_volume
from dsiprep.stages.fieldmap import apply_shift

METHODS = {
    "fieldmapless": (
        "Susceptibility distortion was estimated without a fieldmap: a smooth displacement along the phase-encoding "
        "axis brought the b=0 image to what the tissues of the structural image predict, a sum of cerebrospinal fluid, "
        "grey and white matter with weights that drift from place to place. The displacement, the rigid pose of the "
        "structural image and the weights were found together, from coarse to fine, by Gauss-Newton steps on a robust "
        "squared difference with penalties on the field's gradient and Laplacian and a barrier against folding "
        "[@burger2013]."
    )
}
"""Burger et al. 2013: doi 10.1137/110835955."""

LEVELS = ((8.0, 10.0), (6.0, 8.0), (4.2, 6.0), (3.0, 4.0))  # voxel size, and the window of the weights, mm
SHELLS = ((0.0, 2.0), (2.0, 4.0))  # mm around the brain
TISSUES = 3
RIM_MM = 5.0  # around the brain: its edge tells of the displacement, eyes and scalp do not
RIM = 0.16  # share of the brain that a Gaussian of that width finds at that distance from a plane edge
RAMP = 0.05  # of that share, from voxels that do not count to those that count fully: no voxel comes in with a jump
POSE_PRIOR = (1e4, 1e4, 1e4, 1.0, 1.0)  # per rad² and mm²: holds a pose that nothing tells of
WEAK, STIFF = 0.1, 10.0  # weights of the squared gradient, per mm³, and of the squared Laplacian, per mm³ in mm²
KINK = 0.02  # 1/mm; Laplacians beyond it cost in proportion only
ALIKE = 3.0  # neighbours whose misfit is one and the same: contrast, not noise, is what is left
OUTLIER = 3.0
MISFIT = 0.03  # of the brain's intensity: no prediction is better
STEPS, SETTLED = 30, 0.1  # mm
LEAST_COVERED = 0.5

__all__ = ["METHODS", "correct_without_fieldmap"]


@dataclass(frozen=True, eq=False)
class Level:
    """The b=0 image and the tissues at one voxel size.

    Attributes
    ----------
    lines : Tensor, (a, b, y)
        The image in units of the brain's median: spline coefficients along the last, the phase-encoding, axis.
    grid : Grid
    maps : Tensor, (5, i, j, k)
        Tissues and shells on their own grid `source`, as smooth as `grid` shows them.
    window : float
        mm.
    """

    lines: torch.Tensor
    grid: Grid
    maps: torch.Tensor
    source: Grid
    window: float


def correct_without_fieldmap(
    pe: PhaseEncoding, b0: Volume, mask: Volume, anatomy: Anatomy, start: Coregistration
) -> Distortion:
    """Displacement field of one phase encoding from the tissues of the structural image.

    Parameters
    ----------
    pe : PhaseEncoding
        Without a readout time there is no field in Hz; only the axis matters to all else.
    b0 : Volume
        Mean of its aligned b=0 volumes, distorted.
    mask : Volume
        Brain in it, 0 or 1, roughly.
    anatomy : Anatomy
        With tissues.
    start : Coregistration
        Of the distorted b=0 image.

    Returns
    -------
    Distortion
        One blip; `poses[0]` is the identity. A translation of the head along the phase-encoding axis looks as a
        constant field does: the pose is taken to be right along that axis.

    Raises
    ------
    InputError
        If there are no tissues, or they do not lie on the brain.
    """
    if anatomy.tissue is None:
        raise InputError(
            f"{anatomy.template} has no tissue priors, and correction without a fieldmap needs the tissues of the "
            "structural image; name another --anatomical-template, or run with --sdc-anat-reference none"
        )
    by, order = anatomy.enlarged, [*(a for a in range(3) if a != pe.axis), pe.axis]
    grid = enlarge_volume(b0, by).grid.permuted(order)
    maps = anatomy.tissue.to(b0.data.device).float()
    source = enlarge_volume(anatomy.image, by).grid
    pose = np.linalg.inv(enlarge_matrix(start.dwiref_to_acpc.matrix, by))
    brain = (mask.data.to(maps.device) > 0.5).permute(order)
    image = b0.data.float().permute(order).contiguous()
    covered = float((resample_onto(maps, source, grid, pose).sum(0)[brain] > 0.5).float().mean())
    if not covered > LEAST_COVERED:
        raise InputError(
            f"the structural image could not be aligned with the distorted b=0: its brain covers {covered:.0%} of the "
            "other's; run with --sdc-anat-reference none"
        )
    maps = torch.cat([maps, _shells(maps, source)])
    field, trace, notes = _estimate(image / image[brain].median().clamp(min=1e-12), grid, maps, source, pose)
    shift = (field / float(grid.voxel_sizes[2])).permute(np.argsort(order).tolist()).cpu().numpy()
    return apply_shift(b0.data.float().cpu(), without_folds(shift, pe.axis), b0.grid, pe, trace, "fieldmapless", notes)


def _shells(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What lies around the brain of tissue maps (3, i, j, k): a map for each of `SHELLS`."""
    outside = ndimage.distance_transform_edt(maps.sum(0).cpu().numpy() <= 0.5, sampling=grid.voxel_sizes)
    free = 1 - maps.sum(0)
    shells = [torch.from_numpy((outside > near) & (outside <= far)).to(maps.device) for near, far in SHELLS]
    return torch.stack([free * shell for shell in shells])


def _estimate(
    image: torch.Tensor, grid: Grid, maps: torch.Tensor, source: Grid, pose: np.ndarray
) -> tuple[torch.Tensor, list[dict[str, float]], tuple[str, ...]]:
    """The field in mm on `grid`, the trace, and notes; `pose` leads from points of the image to points of the maps."""
    field, first = torch.zeros(1, 1, 1, device=image.device), pose
    trace: list[dict[str, float]] = []
    for number, (spacing, window) in enumerate(LEVELS):
        level = _level(image, grid, maps, source, spacing, window)
        field = _unfolded(resized(field, level.grid.shape), level.grid)
        for iteration in range(STEPS):
            field, pose, row = _step(level, field, pose)
            trace.append({"level": number, "iteration": iteration, **row})
            if row["change_mm"] < SETTLED:
                break
    angle = np.degrees(np.arccos(np.clip((np.trace(pose[:3, :3] @ first[:3, :3].T) - 1) / 2, -1, 1)))
    told = f"With the distortion taken into account, the structural image lies {angle:.1f} degrees from where it was."
    return resized(field, grid.shape), trace, (told,)


def _level(image: torch.Tensor, grid: Grid, maps: torch.Tensor, source: Grid, spacing: float, window: float) -> Level:
    """Both images at a voxel size; no finer than the b=0 image is."""
    i, j, k = np.maximum(grid.voxel_sizes, spacing)
    small = resample_to_spacing(Volume(image, grid), (float(i), float(j), float(k)))
    ratio = small.grid.voxel_sizes.mean() / source.voxel_sizes
    smooth = gaussian(maps, (np.sqrt(np.maximum(ratio**2 - 1, 0)) / FWHM).tolist())
    return Level(line_coefficients(small.data), small.grid, smooth, source, window)


def _unfolded(field: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The field made smaller until nothing folds."""
    while not bool(torch.isfinite(barrier(field, 1 / float(grid.voxel_sizes[2]))[0])):
        field = 0.9 * field
    return field


def _step(level: Level, field: torch.Tensor, pose: np.ndarray) -> tuple[torch.Tensor, np.ndarray, dict[str, float]]:
    """One Gauss-Newton step of field and pose together, at most a voxel long, the weights of the tissues held."""
    grid, h = level.grid, float(level.grid.voxel_sizes[2])
    maps = resample_onto(level.maps, level.source, grid, pose)
    brain = maps[:TISSUES].sum(0)
    value, slope, inside = sample_lines(level.lines, field / h)
    near = gaussian(brain[None], (RIM_MM / grid.voxel_sizes).tolist())[0]
    share = ((near - RIM) / RAMP).clamp(0, 1) * inside
    predicted, spread = predicted_contrast(value, maps, TISSUES, share, (level.window / grid.voxel_sizes).tolist())
    rest, variance = value - predicted, max(spread, MISFIT) ** 2
    weight = share / (ALIKE * variance * (1 + rest**2 / (OUTLIER**2 * variance)))
    centre = grid.to_world(np.argwhere((brain > 0.5).cpu().numpy()).mean(0))
    columns, moves = _pose_columns(predicted, grid, centre)
    normal, right = _equations(field, grid, (slope / h, weight, rest), columns)
    step, turn, inner_steps = conjugate_gradients(normal, right, share > 0, tolerance=0.05)
    length = min(1.0, h / max(float(step.abs().max()), 1e-12))
    while not bool(torch.isfinite(barrier(field + length * step, 1 / h)[0])):
        length /= 2
    row = {
        "cost": float((weight * rest**2).mean()),
        "step": length,
        "inner": inner_steps,
        "change_mm": percentile_99(length * step.abs()[share > 0]),
    }
    parameters = moves @ (length * turn.double().cpu().numpy())
    return field + length * step, pose @ rigid_matrix(parameters, centre), row


def _equations(
    field: torch.Tensor, grid: Grid, data: tuple[torch.Tensor, torch.Tensor, torch.Tensor], columns: torch.Tensor
) -> tuple[NormalEquations, tuple[torch.Tensor, torch.Tensor]]:
    """The matrix of the next step and minus the gradient; `data` are slope per mm, weight and residual."""
    slope, weight, rest = data
    sizes, volume = grid.voxel_sizes, float(np.prod(grid.voxel_sizes))
    weak = WEAK * volume
    force = slope * weight * rest
    curvature, bent = add_penalties(force, field, sizes, 1 / float(sizes[2]), (weak, STIFF * volume, KINK))
    weighted = weight * columns
    pose = columns.flatten(1) @ weighted.flatten(1).T + torch.diag(torch.tensor(POSE_PRIOR, device=field.device))
    still = torch.zeros_like(slope)
    normal = NormalEquations(slope, still, weight, curvature, slope * weighted, pose, sizes, (weak, bent))
    return normal, (-force, -(weighted.flatten(1) @ rest.reshape(-1)))


def _pose_columns(predicted: torch.Tensor, grid: Grid, centre: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Derivatives of the residual by the pose, (5, a, b, y), and what its parameters are in those of `rigid_matrix`.

    A rotation vector about `centre` and two translations across the phase-encoding axis: one along it looks as a
    constant field does.
    """
    moves = np.block([[np.eye(3), np.zeros((3, 2))], [np.zeros((3, 3)), across_axis(grid)]])
    turn = torch.as_tensor(np.linalg.inv(grid.affine[:3, :3]).T, dtype=torch.float32, device=predicted.device)
    slopes = -torch.einsum("ab,bijk->aijk", turn, torch.stack([along(predicted, axis) for axis in range(3)]))
    arms = grid.affine.copy()
    arms[:3, 3] -= centre
    return rigid_columns(slopes, arms, grid), moves
