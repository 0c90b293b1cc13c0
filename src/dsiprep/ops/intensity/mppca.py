"""Marchenko-Pastur PCA denoising: removal of components of local patches that are indistinguishable from noise.

One implementation serves all devices: patches are gathered, decomposed and added back in batches. On the CPU each batch
runs in its own thread, since LAPACK gains nothing from several threads on matrices of this size.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from dsiprep.device import in_chunks

__all__ = ["default_window", "marchenko_pastur", "mppca"]

Estimate = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
BATCH_VALUES = 2_000_000  # patch values that one CPU thread holds at a time


def mppca(
    data: torch.Tensor, mask: torch.Tensor | None = None, window: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Denoise a series by thresholding the principal components of overlapping patches.

    After removal of its mean over voxels, each patch keeps the components above the Marchenko-Pastur distribution of
    pure noise, shrunk to their noise-free size. Patches are placed in steps of half their width; where they overlap,
    those with fewer components have more weight. Voxels that are zero in all volumes are not samples, so that
    zero padding does not lower the noise estimate.

    Parameters
    ----------
    data : Tensor, (n, i, j, k), float32 or complex64
        At least two volumes, with noise independent between voxels and volumes.
    mask : Tensor, (i, j, k), optional
        Voxels to denoise, all by default. Patches that contain one of them are denoised entirely, so that the result
        reaches beyond the mask, from fewer patches, by up to a patch width.
    window : int
        Patch width in voxels; 0 selects `default_window`. A patch spans axes shorter than that.

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
    Cordero-Grande et al. 2019, NeuroImage 200:391, doi 10.1016/j.neuroimage.2019.06.039 (the unbiased
        estimator).
    Gavish & Donoho 2017, IEEE Trans Inf Theory 63:2137, doi 10.1109/TIT.2017.2653801 (shrinkage of
        components).
    Manjon et al. 2013, PLoS ONE 8:e73021, doi 10.1371/journal.pone.0073021 (overlapping patches, their
        weights).
    """
    data = data if data.is_complex() else data.float()
    n, shape = data.shape[0], tuple(data.shape[1:])
    width = window or default_window(n)
    widths = [min(width, size) for size in shape]
    starts = [_patch_starts(size, w, max(1, width // 2)) for size, w in zip(shape, widths, strict=True)]
    inside = torch.ones(shape, dtype=torch.bool, device=data.device) if mask is None else mask.to(data.device) > 0
    needed = _patches_in_mask(inside.cpu().numpy(), starts, widths)
    denoised = torch.zeros_like(data)
    maps = torch.zeros(3, *shape, device=data.device)  # weight, sigma, rank
    with _thread_pool(data.device) as pool:
        for row, first in enumerate(starts[0]):
            if needed[row].any():
                planes = slice(int(first), int(first) + widths[0])
                index = _patch_index(needed[row], starts, widths, shape).to(data.device)
                _denoise_slab(data[:, planes], index, denoised[:, planes], maps[:, planes], pool)
    weight = maps[0].clamp(min=torch.finfo(torch.float32).tiny)
    denoised /= weight
    sigma = maps[1] / weight
    return denoised, sigma / 2**0.5 if data.is_complex() else sigma, maps[2] / weight


def default_window(volumes: int) -> int:
    """Smallest odd width, at least 3, whose cube has at least as many voxels as there are volumes."""
    width = 3
    while width**3 < volumes:
        width += 2
    return width


def marchenko_pastur(eigenvalues: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> tuple:
    """Number of noise eigenvalues, and the noise variance.

    Parameters
    ----------
    eigenvalues : Tensor, (b, d)
        Eigenvalues of X X', ascending, with X oriented so that rows <= columns. All but the last `rows` are ignored.
    rows, columns : Tensor, (b,), int
        The smaller and larger dimension of X, in degrees of freedom.

    Returns
    -------
    noise : Tensor, (b,), int
        Number of noise components.
    variance : Tensor, (b,)
        Unbiased: noise has (rows - k) (columns - k) degrees of freedom besides k signal components.
    """
    values = eigenvalues.double().clamp(min=0)
    size = values.shape[1]
    rank = torch.arange(size, device=values.device)[None] - (size - rows[:, None])  # 0 at the smallest
    valid = rank >= 0
    smallest = values.gather(1, (size - rows).clamp(0, size - 1)[:, None])
    count = rank + 1
    freedom = (columns[:, None] - rows[:, None] + count).clamp(min=1).double()
    count = count.clamp(min=1).double()
    from_sum = (values * valid).cumsum(1) / (count * freedom)
    from_width = (values - smallest) / (4 * torch.sqrt(count * freedom))
    is_noise = (from_width < from_sum) & valid
    noise = torch.where(is_noise, rank + 1, 0).amax(1)
    last = (size - rows + noise - 1).clamp(0, size - 1)
    variance = torch.where(noise > 0, from_sum.gather(1, last[:, None])[:, 0], 0.0)
    return noise, variance


def _patch_starts(size: int, width: int, step: int) -> np.ndarray:
    """First voxels of the patches along one axis; the last patch ends at the end of the axis."""
    return np.unique(np.append(np.arange(0, size - width + 1, step), size - width))


def _patches_in_mask(inside: np.ndarray, starts: list[np.ndarray], widths: list[int]) -> np.ndarray:
    """Which patches (ti, tj, tk) are the closest one to some voxel of the mask, bool."""
    counts = inside.astype(np.int64)
    for axis, (first, width) in enumerate(zip(starts, widths, strict=True)):
        edges = np.append(0, (first[1:] + first[:-1] + width) // 2)
        counts = np.add.reduceat(counts, edges, axis=axis)
    return counts > 0


def _patch_index(
    needed: np.ndarray, starts: list[np.ndarray], widths: list[int], shape: tuple[int, ...]
) -> torch.Tensor:
    """Flat voxel indices, within a slab, of the patches of the slab, (patches, voxels)."""
    within = np.stack(np.meshgrid(*(np.arange(w) for w in widths), indexing="ij")).reshape(3, -1)
    within = (within[0] * shape[1] + within[1]) * shape[2] + within[2]
    j, k = np.nonzero(needed)
    corner = starts[1][j] * shape[2] + starts[2][k]
    return torch.from_numpy(corner[:, None] + within[None])


def _denoise_slab(
    data: torch.Tensor,
    index: torch.Tensor,
    denoised: torch.Tensor,
    maps: torch.Tensor,
    pool: ThreadPoolExecutor | None,
) -> None:
    """Denoise the patches of one slab and add them, weighted, to `denoised` and `maps` in place."""
    n, shape = data.shape[0], data.shape[1:]
    voxels = data.reshape(n, -1).T.contiguous()
    valid = (voxels != 0).any(1).float()
    total = torch.zeros_like(voxels)
    sums = torch.zeros(voxels.shape[0], 3, device=data.device)

    def add(voxel_index: torch.Tensor, estimate: Estimate) -> None:
        patches, variance, rank = estimate
        weight = (1 / (1 + rank))[:, None] * valid[voxel_index]
        patches *= weight[..., None]
        total.index_add_(0, voxel_index.reshape(-1), patches.reshape(-1, n))
        row = torch.stack([weight, weight * variance.sqrt()[:, None], weight * rank[:, None]], dim=-1)
        sums.index_add_(0, voxel_index.reshape(-1), row.reshape(-1, 3))

    for voxel_index, estimate in _denoised_batches(voxels, valid, index, pool):
        add(voxel_index, estimate)
    denoised += total.T.reshape(n, *shape)
    maps += sums.T.reshape(3, *shape)


def _denoised_batches(
    voxels: torch.Tensor, valid: torch.Tensor, index: torch.Tensor, pool: ThreadPoolExecutor | None
) -> Iterator[tuple[torch.Tensor, Estimate]]:
    """Batches of patches: their voxel indices and denoised estimates, by threads or in chunks that fit in memory."""
    values = index.shape[1] * voxels.shape[1]
    if pool is not None:
        batches = index.split(max(1, BATCH_VALUES // values))
        yield from zip(batches, pool.map(partial(_denoise, voxels, valid), batches), strict=True)
        return
    side = min(index.shape[1], voxels.shape[1])
    estimates: list[tuple[torch.Tensor, Estimate]] = []

    def chunk(part: slice) -> torch.Tensor:
        estimates.append((index[part], _denoise(voxels, valid, index[part])))
        return index[part]

    in_chunks(chunk, len(index), 4 * (4 * values + 6 * side * side), voxels.device)
    yield from estimates


def _denoise(voxels: torch.Tensor, valid: torch.Tensor, index: torch.Tensor) -> Estimate:
    """Denoised patches (b, m, n), their noise variance (b,) and number of components kept (b,)."""
    patches, sample = voxels[index], valid[index]
    count = sample.sum(1).long()
    mean = patches.sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]
    patches = (patches - mean) * sample[..., None]
    n = voxels.shape[1]
    tall = index.shape[1] >= n
    gram = patches.mH @ patches if tall else patches @ patches.mH
    values, vectors = torch.linalg.eigh(gram)
    freedom = (count - 1).clamp(min=0)
    rows, columns = freedom.clamp(max=n), freedom.clamp(min=n)
    noise, variance = marchenko_pastur(values, rows, columns)
    kept = rows - noise
    most = int(kept.max())
    side = values.shape[1]
    if most < side:
        component = torch.arange(side - most, side, device=voxels.device)[None]
        basis = vectors[:, :, side - most :] * (component >= (side - kept)[:, None])[:, None]
        scaled = basis * _shrinkage(values[:, side - most :], variance, rows, columns)[:, None]
        patches = (patches @ scaled) @ basis.mH if tall else scaled @ (basis.mH @ patches)
    return patches + mean, variance.float(), (kept + 1).float()


def _shrinkage(values: torch.Tensor, variance: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Factors (b, d) that shrink noise-inflated components for the least squared error."""
    aspect = (rows / columns.clamp(min=1)).double()[:, None]
    noise = (variance * columns)[:, None].clamp(min=torch.finfo(torch.float64).tiny)
    squared = (values.double() / noise).clamp(min=torch.finfo(torch.float64).tiny)
    inner = ((squared - aspect - 1) ** 2 - 4 * aspect).clamp(min=0)
    return (inner.sqrt() / squared).nan_to_num(1.0, 1.0).float()


@contextmanager
def _thread_pool(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """On the CPU, a pool of as many single-threaded workers as torch has threads; None on other devices."""
    if device.type != "cpu":
        yield None
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)
