"""Marchenko-Pastur PCA denoising: what of a local patch cannot be told from noise is taken out.

One body serves all devices: patches are gathered, decomposed and put back in batches. On the CPU each batch
goes to a thread of its own, since LAPACK gains nothing from several threads on matrices of this size.
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
BATCH_VALUES = 2_000_000  # numbers of the patches that one CPU thread holds at a time


def mppca(
    data: torch.Tensor, mask: torch.Tensor | None = None, window: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Denoise a series by thresholding the principal components of overlapping patches.

    Each patch (its mean over voxels taken out) keeps the components that stand out of the Marchenko-Pastur
    distribution of pure noise, shrunk to what they would be without it. Patches lie on a lattice with a step
    of half their width; where they overlap, those with fewer components weigh more. Voxels that are zero in
    all volumes are no samples, so that padding does not lower the noise level.

    Parameters
    ----------
    data : Tensor, (n, i, j, k), float32
        At least two volumes; noise independent between voxels and volumes.
    mask : Tensor, (i, j, k), optional
        Where to denoise; all voxels by default. Samples are taken from outside it, too.
    window : int
        Width of the patch in voxels; 0 takes `default_window`. Along shorter axes the patch spans the axis.

    Returns
    -------
    denoised : Tensor, (n, i, j, k)
        Zero outside the mask.
    sigma : Tensor, (i, j, k)
        Standard deviation of the noise.
    rank : Tensor, (i, j, k)
        How many components were kept, the mean included: average over the patches that hold the voxel.

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
    data = data.float()
    n, shape = data.shape[0], tuple(data.shape[1:])
    width = window or default_window(n)
    widths = [min(width, size) for size in shape]
    starts = [_starts(size, w, max(1, width // 2)) for size, w in zip(shape, widths, strict=True)]
    inside = torch.ones(shape, dtype=torch.bool, device=data.device) if mask is None else mask.to(data.device) > 0
    needed = _needed(inside.cpu().numpy(), starts, widths)
    denoised = torch.zeros_like(data)
    maps = torch.zeros(3, *shape, device=data.device)  # weight, sigma, rank
    with _threads(data.device) as pool:
        for row, first in enumerate(starts[0]):
            if needed[row].any():
                planes = slice(int(first), int(first) + widths[0])
                index = _patch_index(needed[row], starts, widths, shape).to(data.device)
                _slab(data[:, planes], index, denoised[:, planes], maps[:, planes], pool)
    weight = maps[0].clamp(min=torch.finfo(torch.float32).tiny)
    keep = inside & (maps[0] > 0)
    denoised *= keep / weight
    return denoised, maps[1] / weight * keep, maps[2] / weight * keep


def default_window(volumes: int) -> int:
    """The smallest odd width whose cube holds at least as many voxels as there are volumes; at least 3."""
    width = 3
    while width**3 < volumes:
        width += 2
    return width


def marchenko_pastur(eigenvalues: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> tuple:
    """How many eigenvalues are noise, and the variance of that noise.

    Parameters
    ----------
    eigenvalues : Tensor, (b, d)
        Of X X', ascending; X is the smaller way round. Values before the last `rows` are ignored.
    rows, columns : Tensor, (b,), int
        The smaller and the larger dimension of the matrix X, in degrees of freedom.

    Returns
    -------
    noise : Tensor, (b,), int
        Number of noise components.
    variance : Tensor, (b,)
        Unbiased: the noise has (rows - k) (columns - k) degrees of freedom beside k components of signal.
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


def _starts(size: int, width: int, step: int) -> np.ndarray:
    """First voxels of the patches along one axis; the last patch ends with the axis."""
    return np.unique(np.append(np.arange(0, size - width + 1, step), size - width))


def _needed(inside: np.ndarray, starts: list[np.ndarray], widths: list[int]) -> np.ndarray:
    """Which patches of the lattice have a voxel of the mask nearest to their centre, (ti, tj, tk) bool."""
    counts = inside.astype(np.int64)
    for axis, (first, width) in enumerate(zip(starts, widths, strict=True)):
        edges = np.append(0, (first[1:] + first[:-1] + width) // 2)
        counts = np.add.reduceat(counts, edges, axis=axis)
    return counts > 0


def _patch_index(
    needed: np.ndarray, starts: list[np.ndarray], widths: list[int], shape: tuple[int, ...]
) -> torch.Tensor:
    """Voxels of the patches of one slab, (patches, voxels), counted along i, j, k within the slab."""
    within = np.stack(np.meshgrid(*(np.arange(w) for w in widths), indexing="ij")).reshape(3, -1)
    within = (within[0] * shape[1] + within[1]) * shape[2] + within[2]
    j, k = np.nonzero(needed)
    corner = starts[1][j] * shape[2] + starts[2][k]
    return torch.from_numpy(corner[:, None] + within[None])


def _slab(
    data: torch.Tensor,
    index: torch.Tensor,
    denoised: torch.Tensor,
    maps: torch.Tensor,
    pool: ThreadPoolExecutor | None,
) -> None:
    """Denoise the patches of one slab and add them, weighted, to `denoised` and `maps`."""
    n, shape = data.shape[0], data.shape[1:]
    voxels = data.reshape(n, -1).T.contiguous()
    valid = (voxels != 0).any(1).float()
    total = torch.zeros_like(voxels)
    sums = torch.zeros(voxels.shape[0], 3, device=data.device)

    def add(where: torch.Tensor, found: Estimate) -> None:
        patches, variance, rank = found
        weight = (1 / (1 + rank))[:, None] * valid[where]
        patches *= weight[..., None]
        total.index_add_(0, where.reshape(-1), patches.reshape(-1, n))
        row = torch.stack([weight, weight * variance.sqrt()[:, None], weight * rank[:, None]], dim=-1)
        sums.index_add_(0, where.reshape(-1), row.reshape(-1, 3))

    for where, found in _estimates(voxels, valid, index, pool):
        add(where, found)
    denoised += total.T.reshape(n, *shape)
    maps += sums.T.reshape(3, *shape)


def _estimates(
    voxels: torch.Tensor, valid: torch.Tensor, index: torch.Tensor, pool: ThreadPoolExecutor | None
) -> Iterator[tuple[torch.Tensor, Estimate]]:
    values = index.shape[1] * voxels.shape[1]
    if pool is not None:
        batches = index.split(max(1, BATCH_VALUES // values))
        yield from zip(batches, pool.map(partial(_denoise, voxels, valid), batches), strict=True)
        return
    side = min(index.shape[1], voxels.shape[1])
    found: list[tuple[torch.Tensor, Estimate]] = []

    def chunk(part: slice) -> torch.Tensor:
        found.append((index[part], _denoise(voxels, valid, index[part])))
        return index[part]

    in_chunks(chunk, len(index), 4 * (4 * values + 6 * side * side), voxels.device)
    yield from found


def _denoise(voxels: torch.Tensor, valid: torch.Tensor, index: torch.Tensor) -> Estimate:
    """Patches (b, m, n) without their noise, its variance (b,) and the number of components kept (b,)."""
    patches, sample = voxels[index], valid[index]
    count = sample.sum(1).long()
    mean = patches.sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]
    patches = (patches - mean) * sample[..., None]
    n = voxels.shape[1]
    tall = index.shape[1] >= n
    gram = patches.mT @ patches if tall else patches @ patches.mT
    values, vectors = torch.linalg.eigh(gram)
    freedom = (count - 1).clamp(min=0)
    rows, columns = freedom.clamp(max=n), freedom.clamp(min=n)
    noise, variance = marchenko_pastur(values, rows, columns)
    kept = rows - noise
    most = int(kept.max())
    side = values.shape[1]
    if most < side:
        place = torch.arange(side - most, side, device=voxels.device)[None]
        basis = vectors[:, :, side - most :] * (place >= (side - kept)[:, None])[:, None]
        scaled = basis * _shrinkage(values[:, side - most :], variance, rows, columns)[:, None]
        patches = (patches @ scaled) @ basis.mT if tall else scaled @ (basis.mT @ patches)
    return patches + mean, variance.float(), (kept + 1).float()


def _shrinkage(values: torch.Tensor, variance: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What to multiply components by, (b, d), for the least squared error: noise has made each larger."""
    aspect = (rows / columns.clamp(min=1)).double()[:, None]
    noise = (variance * columns)[:, None].clamp(min=torch.finfo(torch.float64).tiny)
    squared = (values.double() / noise).clamp(min=torch.finfo(torch.float64).tiny)
    inner = ((squared - aspect - 1) ** 2 - 4 * aspect).clamp(min=0)
    return (inner.sqrt() / squared).nan_to_num(1.0, 1.0).float()


@contextmanager
def _threads(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """On the CPU a pool of as many workers as torch has threads, each with one; None on other devices."""
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
