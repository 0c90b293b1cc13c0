"""Denoising by principal components of local patches: those above the Marchenko-Pastur distribution of noise are kept.

One implementation serves all devices. The noise level is estimated first, and overlapping patches are denoised with it.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from dsiprep.ops.intensity.leading_components import leading_components
from dsiprep.ops.intensity.magnitude_noise import MagnitudeNoise
from dsiprep.ops.intensity.noise_level import (
    centred,
    default_window,
    degrees_of_freedom,
    gram,
    noise_edge,
    noise_level,
    samples,
)
from dsiprep.ops.intensity.patches import in_batches, patch_grid, thread_pool
from dsiprep.ops.intensity.residual_signal import restore_signal

__all__ = ["SHRINKAGE", "mppca"]

Estimate = tuple[torch.Tensor, torch.Tensor]
# Share of the noise of kept components that remains in the average of overlapping patches, for which they are shrunk
SHRINKAGE = {"none": 0.0, "overlap": 0.5, "single": 1.0}
TINY = 1e-30


def mppca(
    data: torch.Tensor,
    mask: torch.Tensor | None = None,
    window: int = 0,
    sigma: torch.Tensor | None = None,
    shrinkage: str = "none",
    magnitude: MagnitudeNoise | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Denoise a series by thresholding the principal components of overlapping patches.

    After removal of its mean over voxels, each patch keeps the components above the Marchenko-Pastur distribution of
    pure noise. Patches are placed in steps of half their width; where they overlap, those with fewer components have
    more weight. Voxels that are zero in all volumes are not samples, so that zero padding does not lower the noise.

    Signal that adjacent voxels share is then put back from the residual (`restore_signal`).

    Shrinking kept components lowers the error by a few percent, and takes a share of the noise variance of each
    component out of the signal, which becomes visible in the difference from the data.

    Parameters
    ----------
    data : Tensor, (n, i, j, k), float32 or complex64
        At least two volumes, with noise independent between voxels and volumes.
    mask : Tensor, (i, j, k), optional
        Voxels to denoise, all by default. Patches that contain one of them are denoised entirely, so that the result
        reaches beyond the mask, from fewer patches, by up to a patch width.
    window : int
        Patch width in voxels; 0 selects `default_window`. A patch spans axes shorter than that.
    sigma : Tensor, (i, j, k), optional
        Noise standard deviation; from `noise_level` by default.
    shrinkage : str
        "none"; "overlap", with the least error of the average of overlapping patches; or "single", with the least
        error of each patch.
    magnitude : MagnitudeNoise, optional
        Stabilise the variance of magnitudes with `sigma`, denoise, and return amplitudes.

    Returns
    -------
    denoised : Tensor, (n, i, j, k)
        Zero where no patch was denoised.
    sigma : Tensor, (i, j, k)
        Noise standard deviation, of complex data that of the real part; zero where no patch was denoised.
    rank : Tensor, (i, j, k)
        Number of components kept, mean included: weighted average over the patches that contain the voxel, zero
        where no patch was denoised.

    References
    ----------
    Veraart et al. 2016, NeuroImage 142:394, doi 10.1016/j.neuroimage.2016.08.016 (Marchenko-Pastur PCA).
    Gavish & Donoho 2014, IEEE Trans Inf Theory 60:5040, doi 10.1109/TIT.2014.2323359 (noise from the median).
    Gavish & Donoho 2017, IEEE Trans Inf Theory 63:2137, doi 10.1109/TIT.2017.2653801 (shrinkage).
    Manjon et al. 2013, PLoS ONE 8:e73021, doi 10.1371/journal.pone.0073021 (overlapping patches, their
        weights).
    Ma et al. 2020, NeuroImage 215:116852, doi 10.1016/j.neuroimage.2020.116852 (magnitudes with stabilised
        variance).
    """
    n, shape = data.shape[0], tuple(data.shape[1:])
    width = window or default_window(n)
    sigma = noise_level(data, mask, width, magnitude) if sigma is None else sigma
    grid = patch_grid(shape, width, max(1, width // 2), mask)
    denoised = torch.zeros(data.shape, dtype=data.dtype if data.is_complex() else torch.float32, device=data.device)
    maps = torch.zeros(2, *shape, device=data.device)  # weight, rank
    size = int(np.prod(grid.widths))
    needs = 16 * size * n + 24 * min(size, n) ** 2
    with thread_pool(data.device) as pool:
        for planes, index in grid.slabs(data.device):
            voxels, valid = samples(data[:, planes])
            level = sigma[planes].reshape(-1)
            work = partial(_denoise, voxels, valid, level, SHRINKAGE[shrinkage], magnitude)
            total = torch.zeros_like(voxels)
            sums = torch.zeros(len(voxels), 2, device=data.device)
            for part, estimate in in_batches(work, index, needs, pool):
                _add(total, sums, part, valid, estimate)
            denoised[:, planes] += total.T.reshape(n, *data[0, planes].shape)
            maps[:, planes] += sums.T.reshape(2, *data[0, planes].shape)
    weight = maps[0].clamp(min=torch.finfo(torch.float32).tiny)
    denoised /= weight
    sigma = torch.where(maps[0] > 0, sigma, 0.0)

    def observed(v: int) -> torch.Tensor:
        return data[v] if magnitude is None else magnitude.stabilise(data[v] / sigma.clamp(min=TINY))

    unit = sigma if magnitude is None else torch.ones_like(sigma)
    restore_signal(denoised, observed, unit, (maps[0] > 0) & (data != 0).any(0))
    if magnitude is not None:
        for volume in denoised:
            volume.copy_(magnitude.destabilise(volume).mul_(sigma))
    return denoised, sigma / 2**0.5 if data.is_complex() else sigma, maps[1] / weight


def _denoise(
    voxels: torch.Tensor,
    valid: torch.Tensor,
    level: torch.Tensor,
    remaining: float,
    magnitude: MagnitudeNoise | None,
    index: torch.Tensor,
) -> Estimate:
    """Denoised patches (b, m, n) and their number of components kept, the mean included, (b,)."""
    patches, mean, count = centred(voxels, valid, level, magnitude, index)
    rows, columns = degrees_of_freedom(count, voxels.shape[1])
    square = valid if magnitude is not None else valid * level**2
    variance = (square[index].sum(1) / count.clamp(min=1)).double()
    edge = noise_edge(variance, rows, columns)
    values, vectors = leading_components(gram(patches), edge)
    side = values.shape[1]
    kept = (values.double() > edge[:, None]).sum(1).minimum(rows)
    most = int(kept.max())
    component = torch.arange(side - most, side, device=voxels.device)[None]
    basis = vectors[:, :, side - most :] * (component >= (side - kept)[:, None])[:, None]
    scaled = basis
    if remaining:
        scaled = basis * _shrinkage(values[:, side - most :], variance, rows, columns, remaining)[:, None]
    tall = patches.shape[1] >= patches.shape[2]
    patches = (patches @ scaled) @ basis.mH if tall else scaled @ (basis.mH @ patches)
    return patches + mean, (kept + 1).float()


def _shrinkage(
    values: torch.Tensor, variance: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, remaining: float
) -> torch.Tensor:
    """Factors (b, d) on noise-inflated components for the least squared error of the average of overlapping patches.

    A component of true size s (noise 1) is found at the size y, in directions whose cosines with the true ones have the
    product c. Of f y times that component, f y c lies along the true one, and the rest is noise, of which the average
    over patches retains the share r: (s - f y c)² + r (f y)² (1 - c²) is least for f = s c / (y (c² + r (1 - c²))).
    """
    aspect = (rows / columns.clamp(min=1)).double()[:, None]
    noise = (variance * columns)[:, None].clamp(min=TINY)
    found = (values.double() / noise).clamp(min=TINY)  # y²
    excess = found - aspect - 1
    true = ((excess + (excess**2 - 4 * aspect).clamp(min=0).sqrt()) / 2).clamp(min=TINY)  # s²
    aligned = ((true**2 - aspect).clamp(min=0) / true) ** 2 / ((true + aspect) * (true + 1))  # c²
    factor = (true * aligned / found).sqrt() / (aligned + remaining * (1 - aligned)).clamp(min=TINY)
    return factor.nan_to_num(1.0, 1.0).float()


def _add(total: torch.Tensor, sums: torch.Tensor, index: torch.Tensor, valid: torch.Tensor, estimate: Estimate) -> None:
    """Add weighted patches to voxels (m, n), and their weight and rank to `sums` (m, 2), in place."""
    patches, rank = estimate
    weight = (1 / (1 + rank))[:, None] * valid[index]
    total.index_add_(0, index.reshape(-1), (patches * weight[..., None]).reshape(-1, total.shape[1]))
    row = torch.stack([weight, weight * rank[:, None]], dim=-1)
    sums.index_add_(0, index.reshape(-1), row.reshape(-1, 2))
