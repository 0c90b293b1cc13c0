"""The displacement that both blips share: what only a structural image can tell of a blip-up/blip-down pair.

Displacements s_0 f + g and s_1 f + g leave both images as alike as s_0 f and s_1 f do, to first order: g moves the
undistorted image as a whole. It is where the two fields differ by more than opposite signs explain, as when the head
turned and its field with it. A structural image, undistorted and of any contrast, sees it; the prior is strong, for
contrasts never match and what looks like displacement may be anatomy.
"""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.ops.image.filters import gaussian
from dsiprep.ops.pepolar.normal_equations import NormalEquations, conjugate_gradients
from dsiprep.ops.pepolar.regularisation import along, barrier, laplacian, transposed_along
from dsiprep.ops.pepolar.sampling import line_coefficients, sample_lines

__all__ = ["common_displacement", "local_linear_fit"]

WINDOW_MM = 8.0  # standard deviation of the window in which contrasts are compared
WEAK, STIFF = 0.2, 2000.0  # weights of squared gradient and Laplacian, per mm³ and in mm²: smoother than the field
RIM_MM = 4.0
ALIKE = 20.0  # neighbours whose misfit is one and the same: contrast, not noise, is what is left
MISFIT = 0.03  # of the brain's intensity: no structural image predicts better
STEPS, SETTLED = 8, 0.03  # mm


def local_linear_fit(
    image: torch.Tensor, structural: torch.Tensor, inner: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """An image as a linear function of another that changes from place to place.

    Squared local correlation is what such a fit explains, so its residual is that measure without its pole, and the
    sign of the contrast does not matter.

    Parameters
    ----------
    image, structural : Tensor, (a, b, y)
    inner : Tensor, (a, b, y), bool
        What is looked at.
    grid : Grid

    Returns
    -------
    predicted, variance : Tensor, (a, b, y)
        The local fit, and the mean square that it leaves.
    """
    w = inner.float()
    moments = torch.stack([w, w * image, w * structural, w * image * structural, w * structural**2, w * image**2])
    count, m, s, ms, ss, mm = gaussian(moments.contiguous(), (WINDOW_MM / grid.voxel_sizes).tolist())
    m, s, ms, ss, mm = (v / count.clamp(min=1e-4) for v in (m, s, ms, ss, mm))
    both, spread = ms - m * s, (ss - s * s).clamp(min=0)
    slope = both / (spread + 1e-4)
    return m + slope * (structural - s), (mm - m * m - slope * both).clamp(min=0)


def common_displacement(
    image: torch.Tensor, structural: torch.Tensor, inner: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, list[dict[str, float]]]:
    """Displacement along the last axis that makes an image a local function of a structural one.

    Parameters
    ----------
    image : Tensor, (a, b, y)
        Mean of the corrected pair, in units of the brain's median.
    structural : Tensor, (a, b, y)
        At the same points, any contrast, in units of the brain's median.
    inner : Tensor, (a, b, y), bool
        Brain.
    grid : Grid
        Phase-encoding axis last.

    Returns
    -------
    g : Tensor, (a, b, y)
        mm; the image is read at x + g(x) and multiplied by 1 + dg/dy. What an error of the structural pose would
        look like is taken out.
    trace : list of dict
        Iteration, change in mm and misfit of each Gauss-Newton step.
    """
    a, b, y = image.shape
    h, volume = float(grid.voxel_sizes[2]), float(np.prod(grid.voxel_sizes))
    inner = _deep(inner, grid)
    lines = line_coefficients(image)
    stiff, none = torch.full_like(image, STIFF * volume), torch.zeros(0, device=image.device)
    g, trace = torch.zeros_like(image), []
    for iteration in range(STEPS):
        value, slope, inside = sample_lines(lines, g / h)
        jacobian = 1 + along(g, 2) / h
        predicted, variance = local_linear_fit(value * jacobian, structural, inner, grid)
        rest, spread = value * jacobian - predicted, variance + MISFIT**2
        weight = inside * inner.float() / (ALIKE * spread * (1 + rest**2 / (9 * spread)))
        level, tilt, weighted = slope * jacobian / h, value / h, weight * rest
        curvature = barrier(g, 1 / h)[2]
        normal = NormalEquations(level, tilt, weight, curvature, none[:, None, None, None].expand(0, a, b, y),
                        none[:, None].expand(0, 0), grid.voxel_sizes, (WEAK * volume, stiff))  # fmt: skip
        force = level * weighted + transposed_along(tilt * weighted)
        force += laplacian(stiff * laplacian(g, grid.voxel_sizes) - WEAK * volume * g, grid.voxel_sizes)
        step, _, _ = conjugate_gradients(normal, (-force, none), inner, tolerance=0.05)
        while not bool(torch.isfinite(barrier(g + step, 1 / h)[0])):
            step = step / 2
        g = g + step
        moved = float(step.abs()[inner].max())
        trace.append({"iteration": iteration, "change_mm": moved, "cost": float(variance[inner].mean())})
        if moved < SETTLED:
            break
    return _without_pose(g, inner), trace


def _deep(inner: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The brain less its rim: outside of it another relation holds between the contrasts."""
    soft = gaussian(inner.float()[None].contiguous(), (RIM_MM / grid.voxel_sizes).tolist())[0]
    deep = inner & (soft > 0.84)  # one standard deviation from a plane edge
    return deep if bool(deep.any()) else inner


def _without_pose(g: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Less what a small error of the structural image's pose looks like: a constant and slopes along a and b."""
    axes = [torch.linspace(-1, 1, n, device=g.device) for n in g.shape[:2]]
    terms = torch.stack([torch.ones_like(g), axes[0][:, None, None].expand_as(g), axes[1][:, None].expand_as(g)])
    columns = terms[:, inner].double()
    amounts = torch.linalg.solve(
        columns @ columns.T + 1e-6 * torch.eye(3, device=g.device), columns @ g[inner].double()
    )
    return g - torch.einsum("t,tabc->abc", amounts.float(), terms)
