"""Slice acquisition: simultaneously excited slices, slice timing and signal dropout."""

from __future__ import annotations

import numpy as np

REPETITION_TIME = 4.2  # s
MULTIBAND = 2
DROPOUT_SIGNAL = (0.2, 0.5)  # range of the remaining signal fraction of an outlier slice
B0_LIMIT = 50.0  # s/mm²; sudden head motion causes dropout only with diffusion weighting


def shots(slices: int) -> np.ndarray:
    """Index of the shot that acquires each slice, with `MULTIBAND` slices per shot if `slices` is a multiple of it.

    Parameters
    ----------
    slices : int
        Number of slices.

    Returns
    -------
    ndarray, (slices,) int
        Consecutive from 0; slices with the same index are excited together.
    """
    return np.arange(slices) % (slices // MULTIBAND if slices % MULTIBAND == 0 else slices)


def slice_timing(slices: int) -> list[float]:
    """Start time of each slice in s, with interleaved shots; slices of one shot start together."""
    shot = shots(slices)
    count = int(shot.max()) + 1
    starts = np.empty(count)
    starts[[*range(0, count, 2), *range(1, count, 2)]] = np.arange(count) * (REPETITION_TIME / count)
    return [round(float(start), 6) for start in starts[shot]]


def remaining_signal(bvals: np.ndarray, slices: int, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Remaining signal fraction of each slice after sudden head motion during some shots.

    Parameters
    ----------
    bvals : ndarray, (n,)
        s/mm²; b=0 volumes have no dropout.
    slices : int
        Number of slices per volume.
    fraction : float
        Probability of dropout for each shot of a diffusion-weighted volume, and thus the expected fraction of outlier
        slices.
    rng : Generator

    Returns
    -------
    ndarray, (n, slices)
        1, or, for all slices of an affected shot, drawn from `DROPOUT_SIGNAL` independently, because the dropout of a
        slice depends on the local speed of the head.
    """
    shot = shots(slices)
    affected = (rng.random((len(bvals), int(shot.max()) + 1)) < fraction) & (bvals[:, None] > B0_LIMIT)
    return np.where(affected[:, shot], rng.uniform(*DROPOUT_SIGNAL, (len(bvals), slices)), 1.0)
