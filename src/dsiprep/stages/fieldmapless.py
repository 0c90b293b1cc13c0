"""Susceptibility distortion without a fieldmap: the b=0 image is matched to the tissues of the structural image.

Point x of the undistorted head is found in the b=0 image at x + f(x) e, where e is the phase-encoding axis and f is in
mm. The intensity there is predicted as sum a_k(x) p_k(P x) from the tissue probabilities p_k, where P is the rigid pose
of the structural image and the weights a_k vary smoothly in space. f and P minimise

    sum rho(I(x + f e) - sum a_k p_k(P x)) / sigma²  +  w |grad f|²  +  k psi(lap f)  +  sum d^4 / (1 - d²)

with Cauchy's rho, psi quadratic near 0 and linear beyond, and d the difference of f between neighbours along e, in
voxels. Intensities are not modulated by the Jacobian determinant: compressed signal and receive bias look alike, and
the weights follow both.

Two shells around the brain are treated as tissues with spatially constant weights. Brain masks of structural images end
slightly inside or outside the edge of the b=0 image, all around the brain, and without the shells this mismatch looks
like displacement.
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
from dsiprep.ops.pepolar.pose_derivatives import rigid_derivatives, transverse_axes
from dsiprep.ops.pepolar.regularisation import Smoothness, add_penalties, barrier, central_difference
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines
from dsiprep.ops.registration.head_size import scale_matrix, scale_volume
from dsiprep.stages.fieldmap import apply_shift

METHODS = {
    "fieldmapless": (
        "Susceptibility distortion was estimated without a fieldmap: a smooth displacement along the phase-encoding "
        "axis matched the b=0 image to a prediction from the tissues of the structural image, a sum of cerebrospinal "
        "fluid, grey and white matter with spatially varying weights. The displacement, the rigid pose of the "
        "structural image and the weights were estimated together, from coarse to fine, by Gauss-Newton steps on a "
        "robust squared difference with penalties on the field's gradient and Laplacian and a barrier against folding "
        "[@burger2013]."
    )
}
"""Burger et al. 2013: doi 10.1137/110835955."""

LEVELS = ((8.0, 10.0), (6.0, 8.0), (4.2, 6.0), (3.0, 4.0))  # voxel size and window of the weights, mm
SHELLS = ((0.0, 2.0), (2.0, 4.0))  # mm around the brain
TISSUES = 3
RIM_MM = 5.0  # around the brain: its edge shows the displacement, eyes and scalp do not
RIM_SHARE = 0.16  # share of brain in a Gaussian window of that width, at that distance from a plane edge
RAMP = 0.05  # of that share: voxels gain weight gradually, so that none enters abruptly
POSE_PRIOR = (1e4, 1e4, 1e4, 1.0, 1.0)  # per rad² and mm²: keeps a pose that the data do not determine
GRADIENT_WEIGHT, LAPLACIAN_WEIGHT = 0.1, 10.0  # of the squared gradient, per mm³, and Laplacian, per mm³ in mm²
LINEAR_LAPLACIAN = 0.02  # 1/mm; the penalty is linear beyond
CORRELATED_VOXELS = 3.0  # voxels that share one residual: what remains is contrast rather than noise
OUTLIER = 3.0  # standard deviations
MODEL_ERROR = 0.03  # of the brain's intensity: no prediction is better
MAX_STEPS, CONVERGED_MM = 30, 0.1
MIN_COVERED = 0.5

__all__ = ["METHODS", "correct_without_fieldmap"]


@dataclass(frozen=True, eq=False)
class TissueMaps:
    """Probabilities of tissues and shells (5, i, j, k), on their own grid."""

    maps: torch.Tensor
    grid: Grid


@dataclass(frozen=True, eq=False)
class TissueLevel:
    """The b=0 image and the tissues at one voxel size.

    Attributes
    ----------
    lines : Tensor, (a, b, y)
        The image in units of the brain's median: spline coefficients along the last axis, that of phase encoding.
    grid : Grid
        Of the image.
    tissues : TissueMaps
        Smoothed to the resolution of `grid`.
    window : float
        Of the tissues' weights, mm.
    """

    lines: torch.Tensor
    grid: Grid
    tissues: TissueMaps
    window: float


def correct_without_fieldmap(
    pe: PhaseEncoding, b0: Volume, mask: Volume, anatomy: Anatomy, start: Coregistration
) -> Distortion:
    """Displacement field of one phase encoding from the tissues of the structural image.

    Parameters
    ----------
    pe : PhaseEncoding
        Only the axis affects the displacement; without a readout time there is no field in Hz.
    b0 : Volume
        Mean of its aligned b=0 volumes, distorted.
    mask : Volume
        Rough brain mask of it, 0 or 1.
    anatomy : Anatomy
        With tissues.
    start : Coregistration
        Of the distorted b=0 image.

    Returns
    -------
    Distortion
        One blip; `poses[0]` is the identity. A translation of the head along the phase-encoding axis has the same
        effect as a constant field: the initial pose is assumed to be correct along that axis.

    Raises
    ------
    InputError
        If there are no tissues, or they do not overlap the brain.
    """
    if anatomy.tissue is None:
        raise InputError(
            f"{anatomy.template} has no tissue priors, and correction without a fieldmap needs the tissues of the "
            "structural image; choose another --anatomical-template, or run with --sdc-anat-reference none"
        )
    factor, order = anatomy.magnification, [*(a for a in range(3) if a != pe.axis), pe.axis]
    grid = scale_volume(b0, factor).grid.permuted(order)
    maps = anatomy.tissue.to(b0.data.device).float()
    source = scale_volume(anatomy.image, factor).grid
    pose = np.linalg.inv(scale_matrix(start.dwiref_to_acpc.matrix, factor))
    brain = (mask.data.to(maps.device) > 0.5).permute(order)
    image = b0.data.float().permute(order).contiguous()
    covered = float((resample_onto(maps, source, grid, pose).sum(0)[brain] > 0.5).float().mean())
    if not covered > MIN_COVERED:
        raise InputError(
            "the structural image could not be aligned with the distorted b=0 image: its brain covers "
            f"{covered:.0%} of the brain in b=0; run with --sdc-anat-reference none"
        )
    tissues = TissueMaps(torch.cat([maps, _shells(maps, source)]), source)
    field, trace, notes = _estimate(image / image[brain].median().clamp(min=1e-12), grid, tissues, pose)
    shift = (field / float(grid.voxel_sizes[2])).permute(np.argsort(order).tolist()).cpu().numpy()
    return apply_shift(b0.data.float().cpu(), without_folds(shift, pe.axis), b0.grid, pe, trace, "fieldmapless", notes)


def _shells(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Maps of the `SHELLS` around the brain of tissue maps (3, i, j, k)."""
    distance = ndimage.distance_transform_edt(maps.sum(0).cpu().numpy() <= 0.5, sampling=grid.voxel_sizes)
    not_tissue = 1 - maps.sum(0)
    shells = [torch.from_numpy((distance > near) & (distance <= far)).to(maps.device) for near, far in SHELLS]
    return torch.stack([not_tissue * shell for shell in shells])


def _estimate(
    image: torch.Tensor, grid: Grid, tissues: TissueMaps, pose: np.ndarray
) -> tuple[torch.Tensor, list[dict[str, float]], tuple[str, ...]]:
    """The field in mm on `grid`, the trace, and notes; `pose` maps points of the image to points of the tissues."""
    field, initial_pose = torch.zeros(1, 1, 1, device=image.device), pose
    trace: list[dict[str, float]] = []
    for number, (spacing, window) in enumerate(LEVELS):
        level = _level(image, grid, tissues, spacing, window)
        field = _shrink_until_unfolded(resized(field, level.grid.shape), level.grid)
        for iteration in range(MAX_STEPS):
            field, pose, row = _gauss_newton_step(level, field, pose)
            trace.append({"level": number, "iteration": iteration, **row})
            if row["change_mm"] < CONVERGED_MM:
                break
    angle = np.degrees(np.arccos(np.clip((np.trace(pose[:3, :3] @ initial_pose[:3, :3].T) - 1) / 2, -1, 1)))
    note = f"Joint estimation with the distortion rotated the structural image by {angle:.1f} degrees."
    return resized(field, grid.shape), trace, (note,)


def _level(image: torch.Tensor, grid: Grid, tissues: TissueMaps, spacing: float, window: float) -> TissueLevel:
    """Image and tissues at a voxel size of `spacing` mm, but no finer than that of the image."""
    i, j, k = np.maximum(grid.voxel_sizes, spacing)
    coarse = resample_to_spacing(Volume(image, grid), (float(i), float(j), float(k)))
    ratio = coarse.grid.voxel_sizes.mean() / tissues.grid.voxel_sizes
    smooth = gaussian(tissues.maps, (np.sqrt(np.maximum(ratio**2 - 1, 0)) / FWHM).tolist())
    return TissueLevel(line_coefficients(coarse.data), coarse.grid, TissueMaps(smooth, tissues.grid), window)


def _shrink_until_unfolded(field: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The field scaled down until nothing folds."""
    while not bool(torch.isfinite(barrier(field, 1 / float(grid.voxel_sizes[2]))[0])):
        field = 0.9 * field
    return field


def _gauss_newton_step(
    level: TissueLevel, field: torch.Tensor, pose: np.ndarray
) -> tuple[torch.Tensor, np.ndarray, dict[str, float]]:
    """Update field and pose together, by at most a voxel and with fixed tissue weights; the last item is the trace."""
    grid, h = level.grid, float(level.grid.voxel_sizes[2])
    maps = resample_onto(level.tissues.maps, level.tissues.grid, grid, pose)
    brain = maps[:TISSUES].sum(0)
    value, slope, inside = sample_lines(level.lines, field / h)
    brain_share = gaussian(brain[None], (RIM_MM / grid.voxel_sizes).tolist())[0]
    share = ((brain_share - RIM_SHARE) / RAMP).clamp(0, 1) * inside
    predicted, spread = predicted_contrast(value, maps, TISSUES, share, (level.window / grid.voxel_sizes).tolist())
    residual, variance = value - predicted, max(spread, MODEL_ERROR) ** 2
    weight = share / (CORRELATED_VOXELS * variance * (1 + residual**2 / (OUTLIER**2 * variance)))
    centre = grid.to_world(np.argwhere((brain > 0.5).cpu().numpy()).mean(0))
    columns, to_rigid = _pose_derivatives(predicted, grid, centre)
    normal, right_hand_side = _equations(field, grid, (slope / h, weight, residual), columns)
    step, pose_step, inner_iterations = conjugate_gradients(normal, right_hand_side, share > 0, tolerance=0.05)
    length = min(1.0, h / max(float(step.abs().max()), 1e-12))
    while not bool(torch.isfinite(barrier(field + length * step, 1 / h)[0])):
        length /= 2
    row = {
        "cost": float((weight * residual**2).mean()),
        "step": length,
        "inner": inner_iterations,
        "change_mm": percentile_99(length * step.abs()[share > 0]),
    }
    parameters = to_rigid @ (length * pose_step.double().cpu().numpy())
    return field + length * step, pose @ rigid_matrix(parameters, centre), row


def _equations(
    field: torch.Tensor, grid: Grid, data: tuple[torch.Tensor, torch.Tensor, torch.Tensor], columns: torch.Tensor
) -> tuple[NormalEquations, tuple[torch.Tensor, torch.Tensor]]:
    """Matrix of the next step, and the negative gradient; `data` are the image's slope per mm, weight and residual."""
    slope, weight, residual = data
    spacing, volume = grid.voxel_sizes, float(np.prod(grid.voxel_sizes))
    smoothness = Smoothness(GRADIENT_WEIGHT * volume, LAPLACIAN_WEIGHT * volume, LINEAR_LAPLACIAN)
    field_gradient = slope * weight * residual
    curvature, laplacian_weight = add_penalties(field_gradient, field, spacing, 1 / float(spacing[2]), smoothness)
    weighted = weight * columns
    pose = columns.flatten(1) @ weighted.flatten(1).T + torch.diag(torch.tensor(POSE_PRIOR, device=field.device))
    normal = NormalEquations(
        slope,
        torch.zeros_like(slope),
        weight,
        curvature,
        slope * weighted,
        pose,
        spacing,
        smoothness.gradient_weight,
        laplacian_weight,
    )
    return normal, (-field_gradient, -(weighted.flatten(1) @ residual.reshape(-1)))


def _pose_derivatives(predicted: torch.Tensor, grid: Grid, centre: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """Derivatives of the residual with respect to five pose parameters, (5, a, b, y), and their conversion matrix.

    The pose parameters are a rotation vector about `centre` and two translations across the phase-encoding axis; a
    translation along it has the same effect as a constant field. The matrix converts them to the six parameters of
    `rigid_matrix`.
    """
    to_rigid = np.block([[np.eye(3), np.zeros((3, 2))], [np.zeros((3, 3)), transverse_axes(grid)]])
    to_world = torch.as_tensor(np.linalg.inv(grid.affine[:3, :3]).T, dtype=torch.float32, device=predicted.device)
    differences = torch.stack([central_difference(predicted, axis) for axis in range(3)])
    gradient = -torch.einsum("ab,bijk->aijk", to_world, differences)
    lever_arms = grid.affine.copy()
    lever_arms[:3, 3] -= centre
    return rigid_derivatives(gradient, lever_arms, grid), to_rigid
