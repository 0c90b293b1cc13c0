"""Removal of Gibbs ringing by local subvoxel shifts, in the plane in which k-space was sampled.

A step that is sampled halfway between the zeros of its sinc rings, and one that is sampled at the zeros does not. So
each line is shifted by up to half a voxel; of these shifts, each voxel takes the one at which its neighbours to one
side vary least, and is interpolated linearly back to its place. Ringing along one axis is separated from that along
the other in k-space first.

Lines are shifted exactly by a quarter of a voxel, and by less with an interpolator fitted to what is left of the band.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np
import torch

from dsiprep.compiled import compiled

__all__ = ["unring"]

STEPS = 20  # shifts per half voxel
OVERSAMPLING = 4  # samples per voxel of the finely sampled lines
TAPS = 4  # of the interpolator between them
COMPARED = 3  # differences between neighbours, from the nearest neighbour on
MARGIN = COMPARED + 2  # voxels by which periodic lines are continued at both ends


def unring(planes: torch.Tensor) -> torch.Tensor:
    """Remove Gibbs ringing from images whose k-space was sampled fully, truncated, and not filtered.

    Parameters
    ----------
    planes : Tensor, (m, i, j), float32
        Slices as reconstructed, before any interpolation.

    Returns
    -------
    Tensor, (m, i, j)

    References
    ----------
    Kellner et al. 2016, Magn Reson Med 76:1574, doi 10.1002/mrm.26054.
    """
    along_i = torch.fft.irfft2(torch.fft.rfft2(planes) * _separation(planes), s=planes.shape[1:])
    along_j = planes - along_i
    return _unring_lines(along_i) + _unring_lines(along_j.mT.contiguous()).mT


def _separation(planes: torch.Tensor) -> torch.Tensor:
    """Weight in k-space of the part of an image that holds its ringing along i; the rest holds that along j."""
    _, rows, columns = planes.shape
    i = 1 + np.cos(2 * np.pi * np.fft.fftfreq(rows))[:, None]
    j = 1 + np.cos(2 * np.pi * np.fft.rfftfreq(columns))[None]
    both = i + j
    weight = np.where(both > 1e-9, j / np.where(both > 1e-9, both, 1), 0.5)  # 0/0 where both are at their highest
    return torch.as_tensor(weight, dtype=torch.float32, device=planes.device)


def _unring_lines(images: torch.Tensor) -> torch.Tensor:
    """Unring (m, x, y) along x."""
    fine = torch.matmul(torch.as_tensor(_refinement(images.shape[1]), device=images.device), images)
    table = _interpolator()
    if images.device.type == "cpu":
        out = np.empty(tuple(images.shape), np.float32)
        _least_variation(fine.numpy(), table, out)
        return torch.from_numpy(out)
    return _least_variation_torch(fine, table)


@cache
def _refinement(size: int) -> np.ndarray:
    """Matrix (OVERSAMPLING * size, size) that samples a periodic line at quarters of a voxel, float32."""
    k = np.fft.fftfreq(size) * size
    points = np.arange(size * OVERSAMPLING) / OVERSAMPLING
    waves = np.cos(2 * np.pi / size * k[None, None, :] * (points[:, None, None] - np.arange(size)[None, :, None]))
    return (waves.sum(-1) / size).astype(np.float32)


@cache
def _interpolator() -> np.ndarray:
    """Weights (2 * STEPS + 1, 1 + TAPS) of all shifts: the first sample, relative to a voxel's own, then its weights.

    Weights are least squares over the band, which fills 1/OVERSAMPLING of the fine lines' spectrum, with errors divided
    by frequency, as the amplitude of edges is; constants are exact.
    """
    table = np.empty((2 * STEPS + 1, 1 + TAPS), np.float32)
    frequency = np.linspace(0, np.pi / OVERSAMPLING, 65)
    weight = np.tile(1 / np.maximum(frequency, 1e-4), 2)
    for row, step in enumerate(range(-STEPS, STEPS + 1)):
        position = step / (2 * STEPS) * OVERSAMPLING
        first = int(np.floor(position)) - TAPS // 2 + 1
        distance = np.arange(first, first + TAPS) - position
        waves = np.concatenate([np.cos(frequency[:, None] * distance), np.sin(frequency[:, None] * distance)])
        wanted = np.r_[np.ones(65), np.zeros(65)]
        table[row] = [first, *np.linalg.lstsq(waves * weight[:, None], wanted * weight, rcond=None)[0]]
    return table


@compiled(parallel=True)
def _least_variation(fine: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` (m, x, y) from finely sampled lines (m, OVERSAMPLING * x, y); as `_least_variation_torch`."""
    images, size, lanes = out.shape
    for m in numba.prange(images):
        padded = np.empty(((size + 2 * MARGIN) * OVERSAMPLING, lanes), np.float32)
        for row in range(padded.shape[0]):
            padded[row] = fine[m, (row - MARGIN * OVERSAMPLING) % (size * OVERSAMPLING)]
        shifted = np.empty((size + COMPARED, lanes), np.float32)
        least = np.full((size, lanes), np.float32(3e38))
        chosen = np.zeros((size, lanes), np.int32)
        for step in range(table.shape[0]):
            start = int(table[step, 0]) + MARGIN * OVERSAMPLING
            a, b, c, d = table[step, 1], table[step, 2], table[step, 3], table[step, 4]
            for x in range(size + COMPARED):
                r = start + OVERSAMPLING * x
                for y in range(lanes):
                    shifted[x, y] = (
                        a * padded[r, y] + b * padded[r + 1, y] + c * padded[r + 2, y] + d * padded[r + 3, y]
                    )
            for x in range(size):
                for y in range(lanes):
                    variation = (
                        abs(shifted[x + 1, y] - shifted[x, y])
                        + abs(shifted[x + 2, y] - shifted[x + 1, y])
                        + abs(shifted[x + 3, y] - shifted[x + 2, y])
                    )
                    better = variation < least[x, y]
                    least[x, y] = variation if better else least[x, y]
                    chosen[x, y] = step if better else chosen[x, y]
        for x in range(size):
            left, right = (x - COMPARED - 1) % size, (x + 1) % size
            for y in range(lanes):
                step = chosen[left, y] if least[left, y] < least[right, y] else chosen[right, y]
                r = int(table[step, 0]) + OVERSAMPLING * (x + MARGIN)
                share = abs(step - STEPS) / (2 * STEPS)
                other = r - OVERSAMPLING if step > STEPS else r + OVERSAMPLING
                value = 0.0
                for t in range(TAPS):
                    value += table[step, 1 + t] * ((1 - share) * padded[r + t, y] + share * padded[other + t, y])
                out[m, x, y] = value


def _least_variation_torch(fine: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """Unringed lines (m, x, y) from finely sampled ones (m, OVERSAMPLING * x, y); as `_least_variation`."""
    least = torch.full_like(fine[:, ::OVERSAMPLING], torch.inf)
    from_left, from_right = torch.zeros_like(least), torch.zeros_like(least)  # values of the voxels beyond the window
    for step, (first, *weights) in enumerate(table.tolist()):
        rows = [torch.roll(fine, -int(first) - t, 1)[:, ::OVERSAMPLING] for t in range(TAPS)]
        shifted = sum((w * row for w, row in zip(weights, rows, strict=True)), torch.zeros_like(least))
        change = (shifted.roll(-1, 1) - shifted).abs()
        variation = change + change.roll(-1, 1) + change.roll(-2, 1)
        share, towards = abs(step - STEPS) / (2 * STEPS), 1 if step > STEPS else -1
        value = (1 - share) * shifted + share * shifted.roll(towards, 1)
        better = variation < least
        least = torch.where(better, variation, least)
        from_left = torch.where(better, value.roll(-COMPARED - 1, 1), from_left)
        from_right = torch.where(better, value.roll(1, 1), from_right)
    left_is_less = least.roll(COMPARED + 1, 1) < least.roll(-1, 1)
    return torch.where(left_is_less, from_left.roll(COMPARED + 1, 1), from_right.roll(-1, 1))
