"""Framewise displacement of a series of poses."""

from __future__ import annotations

import numpy as np

__all__ = ["framewise_displacement"]

SPHERE_MM = 50.0  # radius on which rotations are converted to mm


def framewise_displacement(parameters: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Framewise displacement: sum of absolute changes in translation and, on a sphere of 50 mm radius, in rotation.

    Parameters
    ----------
    parameters : ndarray, (n, 6)
        Translations in mm, rotations in radians.
    run : ndarray, (n,), int

    Returns
    -------
    ndarray, (n,)
        In mm; NaN in the first volume of each run.

    References
    ----------
    Power et al. 2012, doi 10.1016/j.neuroimage.2011.10.018.
    """
    steps = np.abs(np.diff(parameters, axis=0)) * np.array([1, 1, 1, SPHERE_MM, SPHERE_MM, SPHERE_MM])
    steps[run[1:] != run[:-1]] = np.nan
    return np.append(np.nan, steps.sum(1))
