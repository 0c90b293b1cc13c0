"""Slices: which of them one shot acquires, when it does, and what is left of them where it failed."""

from __future__ import annotations

import numpy as np

REPETITION_TIME = 4.2  # s
MULTIBAND = 2
LEFT = (0.2, 0.5)  # of a lost slice's signal, at least and at most
B0 = 50.0  # s/mm²; only diffusion weighting makes a jerk of the head cost signal


def shots(slices: int) -> np.ndarray:
    """The number of the shot that acquires each slice: `MULTIBAND` slices by one where their number allows it.

    Parameters
    ----------
    slices : int

    Returns
    -------
    ndarray, (slices,) int
        From 0, without gaps; slices of one number are excited together.
    """
    return np.arange(slices) % (slices // MULTIBAND if slices % MULTIBAND == 0 else slices)


def slice_timing(slices: int) -> list[float]:
    """Start of each slice in s: shots are interleaved, slices of one shot start together."""
    shot = shots(slices)
    count = int(shot.max()) + 1
    starts = np.empty(count)
    starts[[*range(0, count, 2), *range(1, count, 2)]] = np.arange(count) * (REPETITION_TIME / count)
    return [round(float(start), 6) for start in starts[shot]]


def kept_signal(bvals: np.ndarray, slices: int, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """What is left of each slice where the head jerked during some shots.

    Parameters
    ----------
    bvals : ndarray, (n,)
        s/mm²; b=0 volumes lose nothing.
    slices : int
        Of each volume.
    fraction : float
        Chance of a shot of a diffusion-weighted volume to fail, which is also the expected fraction of lost slices.
    rng : Generator

    Returns
    -------
    ndarray, (n, slices)
        1, or between the two of `LEFT` for all slices of a failed shot, each by itself: how much signal a slice
        loses depends on how fast the head moved there.
    """
    shot = shots(slices)
    failed = (rng.random((len(bvals), int(shot.max()) + 1)) < fraction) & (bvals[:, None] > B0)
    return np.where(failed[:, shot], rng.uniform(*LEFT, (len(bvals), slices)), 1.0)
