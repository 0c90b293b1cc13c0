"""Smoothing, box sums and derivatives of volumes, and alias-free resampling to another voxel size.

On the CPU, separable passes run in Numba, line by line and without temporaries; other devices use tensor operations.
A test verifies that both agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch.nn import functional

from dsiprep.compiled import compiled
from dsiprep.data.grid import Volume
from dsiprep.ops.image.interpolation import resample_onto

__all__ = ["FWHM", "box_sum", "gaussian", "gaussian_kernel", "gradient", "resample_to_spacing", "resized"]

FWHM = 2.3548200450309493  # full width at half maximum of a Gaussian of sigma 1


def gaussian(volumes: torch.Tensor, sigma: float | Sequence[float], truncate: float = 4.0) -> torch.Tensor:
    """Smooth volumes with a Gaussian; edge voxels are replicated beyond the field of view.

    Parameters
    ----------
    volumes : Tensor, (n, i, j, k), float32
    sigma : float or three floats
        Standard deviation in voxels along i, j, k; zero leaves an axis unsmoothed.
    truncate : float
        Half-width of the kernel in sigmas.

    Returns
    -------
    Tensor, (n, i, j, k), float32
        Like `scipy.ndimage.gaussian_filter(mode="nearest")` applied to each volume; always a copy.
    """
    result = volumes.detach().float()
    for axis, width in enumerate(np.broadcast_to(np.asarray(sigma, float), 3), start=1):
        if width > 0 and result.shape[axis] > 1:
            result = _convolve_axis(result, axis, gaussian_kernel(float(width), truncate))
    return result.clone() if result.data_ptr() == volumes.data_ptr() else result


def gradient(volumes: torch.Tensor) -> torch.Tensor:
    """Derivatives along i, j, k per voxel: central differences, one-sided at the edges.

    Parameters
    ----------
    volumes : Tensor, (n, i, j, k)

    Returns
    -------
    Tensor, (n, 3, i, j, k), float32
        Like `numpy.gradient`; zero along an axis of one voxel.
    """
    volumes = volumes.detach().float()
    if _uses_numba(volumes):
        return torch.from_numpy(_gradient_loop(np.ascontiguousarray(volumes.numpy())))
    out = torch.zeros(volumes.shape[0], 3, *volumes.shape[1:], device=volumes.device)
    for axis in range(3):
        if volumes.shape[axis + 1] > 1:
            out[:, axis] = torch.gradient(volumes, dim=axis + 1)[0]
    return out


def box_sum(volumes: torch.Tensor, radius: int) -> torch.Tensor:
    """Sums over cubes of side 2 * radius + 1 voxels; voxels outside the volume count as zero.

    Parameters
    ----------
    volumes : Tensor, (n, i, j, k), float32
    radius : int
        Voxels.

    Returns
    -------
    Tensor, (n, i, j, k), float32
    """
    volumes = volumes.detach().float()
    if _uses_numba(volumes):
        array = np.ascontiguousarray(volumes.numpy())
        return torch.from_numpy(_box_sum_loop(array, radius))
    result = volumes
    for axis in (1, 2, 3):
        size = [1, 1, 1]
        size[axis - 1] = 2 * radius + 1
        pad = [s // 2 for s in size]
        weight = torch.ones(1, 1, *size, device=volumes.device)
        result = functional.conv3d(result[:, None], weight, padding=pad)[:, 0]
    return result


def resample_to_spacing(volume: Volume, spacing_mm: float | tuple[float, float, float]) -> Volume:
    """Resample a volume to voxels of about `spacing_mm` in the same field of view, smoothing before downsampling.

    The squared full width at half maximum of the Gaussian is the difference of the squared voxel sizes.

    Parameters
    ----------
    volume : Volume
    spacing_mm : float or three floats
        mm along i, j, k.

    Returns
    -------
    Volume
    """
    target = volume.grid.at_spacing(spacing_mm)
    ratio = target.voxel_sizes / volume.grid.voxel_sizes
    sigma = np.sqrt(np.maximum(ratio**2 - 1, 0)) / FWHM
    smooth = gaussian(volume.data[None], sigma.tolist(), truncate=3.0)
    return Volume(resample_onto(smooth, volume.grid, target)[0], target)


def resized(image: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Interpolate an image (i, j, k) linearly to another number of voxels between the same outer faces."""
    return functional.interpolate(image[None, None], size=shape, mode="trilinear", align_corners=False)[0, 0]


def _uses_numba(tensor: torch.Tensor) -> bool:
    """Whether the Numba loops process this tensor."""
    return tensor.device.type == "cpu"


def gaussian_kernel(sigma: float, truncate: float) -> np.ndarray:
    """Kernel of `gaussian` along one axis: an odd number of float32 weights that sum to 1."""
    radius = int(truncate * sigma + 0.5)
    x = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (x / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _convolve_axis(volumes: torch.Tensor, axis: int, kernel: np.ndarray) -> torch.Tensor:
    """Convolve volumes (n, i, j, k) with a 1-D kernel along a tensor axis, edges replicated."""
    if _uses_numba(volumes):
        shape = volumes.shape
        lines = np.ascontiguousarray(volumes.numpy()).reshape(int(np.prod(shape[:axis])), shape[axis], -1)
        loop = _convolve_last_axis if axis == 3 else _convolve_middle_axis
        return torch.from_numpy(loop(lines, kernel).reshape(shape))
    radius = len(kernel) // 2
    pad = [0, 0, 0, 0, 0, 0]
    pad[2 * (3 - axis)] = pad[2 * (3 - axis) + 1] = radius
    size = [1, 1, 1, 1, 1]
    size[axis + 1] = len(kernel)
    weight = torch.as_tensor(kernel, device=volumes.device).reshape(size)
    return functional.conv3d(functional.pad(volumes[:, None], pad, mode="replicate"), weight)[:, 0]


@compiled(parallel=True)
def _convolve_middle_axis(lines: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve (outer, size, inner) along `size`, whole rows of `inner` at a time."""
    outer, size, inner = lines.shape
    radius = len(kernel) // 2
    out = np.empty((outer, size, inner), np.float32)
    for row in numba.prange(outer * size):
        o, x = row // size, row % size
        target = out[o, x]
        target[:] = kernel[radius] * lines[o, x]
        for t in range(1, radius + 1):
            low, high = lines[o, max(x - t, 0)], lines[o, min(x + t, size - 1)]
            w = kernel[radius + t]
            for i in range(inner):
                target[i] += w * (low[i] + high[i])
    return out


@compiled(parallel=True)
def _convolve_last_axis(lines: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve (rows, size, 1) along `size`, padding each row once."""
    rows, size, _ = lines.shape
    radius = len(kernel) // 2
    out = np.empty((rows, size, 1), np.float32)
    for row in numba.prange(rows):
        padded = np.empty(size + 2 * radius, np.float32)
        padded[:radius] = lines[row, 0, 0]
        padded[radius : radius + size] = lines[row, :, 0]
        padded[radius + size :] = lines[row, size - 1, 0]
        target = np.zeros(size, np.float32)
        for t in range(2 * radius + 1):
            w = kernel[t]
            for x in range(size):
                target[x] += w * padded[x + t]
        out[row, :, 0] = target
    return out


@compiled(parallel=True)
def _gradient_loop(volumes: np.ndarray) -> np.ndarray:
    n, ni, nj, nk = volumes.shape
    out = np.zeros((n, 3, ni, nj, nk), np.float32)
    for row in numba.prange(n * ni):
        v, i = row // ni, row % ni
        i0, i1 = max(i - 1, 0), min(i + 1, ni - 1)
        for j in range(nj):
            j0, j1 = max(j - 1, 0), min(j + 1, nj - 1)
            wi, wj = np.float32(1 / max(i1 - i0, 1)), np.float32(1 / max(j1 - j0, 1))
            for k in range(nk):
                k0, k1 = max(k - 1, 0), min(k + 1, nk - 1)
                out[v, 0, i, j, k] = (volumes[v, i1, j, k] - volumes[v, i0, j, k]) * wi
                out[v, 1, i, j, k] = (volumes[v, i, j1, k] - volumes[v, i, j0, k]) * wj
                out[v, 2, i, j, k] = (volumes[v, i, j, k1] - volumes[v, i, j, k0]) / max(k1 - k0, 1)
    return out


@compiled(parallel=True)
def _box_sum_loop(volumes: np.ndarray, radius: int) -> np.ndarray:
    """Separable box sums: along i first, then along j and k within each plane."""
    n, ni, nj, nk = volumes.shape
    out = np.empty((n, ni, nj, nk), np.float32)
    for row in numba.prange(n * ni):
        v, i = row // ni, row % ni
        slab = np.zeros((nj, nk), np.float32)
        for a in range(max(i - radius, 0), min(i + radius, ni - 1) + 1):
            slab += volumes[v, a]
        _box_sum_plane(slab, out[v, i], radius)
    return out


@compiled()
def _box_sum_plane(plane: np.ndarray, out: np.ndarray, radius: int) -> None:
    nj, nk = plane.shape
    rows = np.zeros(nk, np.float32)
    padded = np.zeros(nk + 2 * radius, np.float32)
    for j in range(nj):
        rows[:] = 0
        for b in range(max(j - radius, 0), min(j + radius, nj - 1) + 1):
            rows += plane[b]
        padded[radius : radius + nk] = rows
        target = out[j]
        target[:] = 0
        for t in range(2 * radius + 1):
            for k in range(nk):
                target[k] += padded[k + t]
