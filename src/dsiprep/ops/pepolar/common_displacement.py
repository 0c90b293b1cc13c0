"""Displacement shared by both blips of a blip-up/blip-down pair, estimated from a structural image.

Displacements s_0 f + g and s_1 f + g make the two corrected images agree as well as s_0 f and s_1 f do, to first order:
g moves the undistorted image as a whole, so the pair itself does not determine it. It is non-zero where the
displacements of the two blips are not exact opposites, for example because the field changed when the head turned. An
undistorted structural image of any contrast determines g. The prior is strong, because contrasts never match exactly
and apparent displacement may be anatomy.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.image.filters import gaussian
from dsiprep.ops.pepolar.normal_equations import NormalEquations, conjugate_gradients
from dsiprep.ops.pepolar.regularisation import barrier, central_difference, central_difference_transpose, laplacian
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines

__all__ = ["common_displacement", "local_linear_fit"]

WINDOW_MM = 8.0  # standard deviation of the window in which contrasts are compared
GRADIENT_WEIGHT = 0.2  # of the squared gradient, per mm³
LAPLACIAN_WEIGHT = 2000.0  # of the squared Laplacian, per mm³ in mm²: smoother than the field
RIM_MM = 4.0
CORRELATED_VOXELS = 20.0  # voxels that share one residual: what remains is contrast rather than noise
MODEL_ERROR = 0.03  # of the brain's intensity: no structural image predicts better
MAX_STEPS, CONVERGED_MM = 8, 0.03


def common_displacement(
    image: torch.Tensor, structural: torch.Tensor, brain: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Displacement along the last axis that makes an image a local linear function of a structural image.

    Parameters
    ----------
    image : Tensor, (a, b, y)
        Mean of the corrected pair, in units of the brain's median.
    structural : Tensor, (a, b, y)
        At the same points, any contrast, in units of the brain's median.
    brain : Tensor, (a, b, y), bool
    grid : Grid
        Phase-encoding axis last.

    Returns
    -------
    g : Tensor, (a, b, y)
        mm; the image is sampled at x + g(x) and multiplied by 1 + dg/dy. The part that a small error of the structural
        image's pose would explain is removed.
    trace : list of dict
        Iteration, change in mm and misfit of each Gauss-Newton step.
    """
    h = float(grid.voxel_sizes[2])
    region = _without_rim(brain, grid)
    lines = line_coefficients(image)
    g, trace = torch.zeros_like(image), []
    for iteration in range(MAX_STEPS):
        step, misfit = _gauss_newton_step(g, lines, structural, region, grid)
        while not bool(torch.isfinite(barrier(g + step, 1 / h)[0])):
            step = step / 2
        g = g + step
        largest_change = float(step.abs()[region].max())
        trace.append({"iteration": iteration, "change_mm": largest_change, "cost": misfit})
        if largest_change < CONVERGED_MM:
            break
    return _without_pose_error(g, region), trace


def local_linear_fit(
    image: torch.Tensor, structural: torch.Tensor, region: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predict an image as a linear function of another, fitted in a Gaussian window around each voxel.

    The fraction of variance that the fit explains is the squared local correlation, so the sign of the contrast does
    not matter. Unlike the correlation itself, the residual has no pole.

    Parameters
    ----------
    image, structural : Tensor, (a, b, y)
    region : Tensor, (a, b, y), bool
        Voxels that are fitted.
    grid : Grid

    Returns
    -------
    predicted, variance : Tensor, (a, b, y)
        The local fit, and the mean square of its residual.
    """
    w = region.float()
    moments = torch.stack([w, w * image, w * structural, w * image * structural, w * structural**2, w * image**2])
    count, m, s, ms, ss, mm = gaussian(moments.contiguous(), (WINDOW_MM / grid.voxel_sizes).tolist())
    m, s, ms, ss, mm = (v / count.clamp(min=1e-4) for v in (m, s, ms, ss, mm))
    covariance, structural_variance = ms - m * s, (ss - s * s).clamp(min=0)
    slope = covariance / (structural_variance + 1e-4)
    return m + slope * (structural - s), (mm - m * m - slope * covariance).clamp(min=0)


def _gauss_newton_step(
    g: torch.Tensor, lines: torch.Tensor, structural: torch.Tensor, region: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, float]:
    """The step (a, b, y) in mm, and the misfit before it; `lines` are the image's spline coefficients along lines."""
    a, b, y = g.shape
    h, volume = float(grid.voxel_sizes[2]), float(np.prod(grid.voxel_sizes))
    value, slope, inside = sample_lines(lines, g / h)
    jacobian = 1 + central_difference(g, 2) / h
    predicted, variance = local_linear_fit(value * jacobian, structural, region, grid)
    residual, expected = value * jacobian - predicted, variance + MODEL_ERROR**2
    weight = inside * region.float() / (CORRELATED_VOXELS * expected * (1 + residual**2 / (9 * expected)))
    by_field, by_slope, weighted = slope * jacobian / h, value / h, weight * residual
    laplacian_weight = torch.full_like(g, LAPLACIAN_WEIGHT * volume)
    no_pose = torch.zeros(0, device=g.device)
    normal = NormalEquations(
        by_field,
        by_slope,
        weight,
        barrier(g, 1 / h)[2],
        no_pose[:, None, None, None].expand(0, a, b, y),
        no_pose[:, None].expand(0, 0),
        grid.voxel_sizes,
        GRADIENT_WEIGHT * volume,
        laplacian_weight,
    )
    gradient = by_field * weighted + central_difference_transpose(by_slope * weighted)
    penalised = laplacian_weight * laplacian(g, grid.voxel_sizes) - GRADIENT_WEIGHT * volume * g
    gradient += laplacian(penalised, grid.voxel_sizes)
    step, _, _ = conjugate_gradients(normal, (-gradient, no_pose), region, tolerance=0.05)
    return step, float(variance[region].mean())


def _without_rim(brain: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The mask without its rim, where the relation between the contrasts changes."""
    smooth = gaussian(brain.float()[None].contiguous(), (RIM_MM / grid.voxel_sizes).tolist())[0]
    interior = brain & (smooth > 0.84)  # one standard deviation from a plane edge
    return interior if bool(interior.any()) else brain


def _without_pose_error(g: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Remove what a small error of the structural image's pose looks like: a constant and slopes along a and b."""
    axes = [torch.linspace(-1, 1, n, device=g.device) for n in g.shape[:2]]
    terms = torch.stack([torch.ones_like(g), axes[0][:, None, None].expand_as(g), axes[1][:, None].expand_as(g)])
    columns = terms[:, region].double()
    amounts = torch.linalg.solve(
        columns @ columns.T + 1e-6 * torch.eye(3, device=g.device), columns @ g[region].double()
    )
    return g - torch.einsum("t,tabc->abc", amounts.float(), terms)
