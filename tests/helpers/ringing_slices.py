"""Piecewise constant slices, their truth that does not ring, and what a scanner makes of them."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from dsiprep.phantom.k_space import sample

FINE = 4


def ellipses(shape: tuple[int, int] = (60, 72), count: int = 3) -> np.ndarray:
    """A head of ellipses on a fine grid, (FINE * i, FINE * j, count): 100 inside, with brighter and darker parts."""
    x, y = (np.linspace(-1, 1, n * FINE) for n in shape)
    slices = []
    for turn in np.linspace(0.1, 0.6, count):
        u, v = x[:, None] * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x[:, None] * np.sin(turn)
        head = 100.0 * (u**2 / 0.62 + v**2 / 0.72 < 1)
        head += 150 * ((u - 0.2) ** 2 / 0.02 + v**2 / 0.09 < 1) + 150 * ((u + 0.25) ** 2 / 0.02 + v**2 / 0.09 < 1)
        head -= 60 * (u**2 + (v - 0.55) ** 2 < 0.02)
        slices.append(head)
    return np.stack(slices, -1).astype(np.float32)


def truth_of(fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxel means, and flat places within the head: the object is constant over three by three voxels."""
    i, j, k = fine.shape
    blocks = fine.reshape(i // FINE, FINE, j // FINE, FINE, k)
    high, low = (
        f(b, (3, 3, 1))
        for f, b in ((ndimage.maximum_filter, blocks.max((1, 3))), (ndimage.minimum_filter, blocks.min((1, 3))))
    )
    return blocks.mean((1, 3)), (high == low) & (low > 0)


def scanned(
    fine: np.ndarray, fraction: float = 1.0, sigma: float = 0.0, axis: int = 1, phase: float = 0.0
) -> np.ndarray:
    """Complex images (i, j, k) whose phase has this slope (rad from the centre to the edge) along both axes."""
    x, y = (np.linspace(-1, 1, n)[:, None, None] for n in fine.shape[:2])
    slope = phase * (x + y[:, 0][None] + 0.5 * x * y[:, 0][None]) * np.ones(fine.shape)
    return sample(fine, slope, axis, fraction, sigma, np.random.default_rng(3), FINE)


def rms(error: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt((np.asarray(error, float) ** 2).mean()))
