"""Results about q-space: the check of the b-table, the series on a lattice, and the quality of the samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsiprep.data.dwi import DWI
from dsiprep.data.summary import Summarised

__all__ = ["GradientCheck", "Lattice", "QSpaceQuality"]


@dataclass(frozen=True, eq=False, repr=False)
class GradientCheck(Summarised):
    """Agreement of the b-table with the brain.

    Attributes
    ----------
    answer : str
        "right", "wrong" or "undecided": whether the b-vectors are in the frame of the image.
    why : str
        Why nothing could be compared; empty if the frames were compared.
    remedy : str
        Rows x, y, z of the right b-vectors in terms of the given ones ("-x y z"); empty if they are right or unknown.
    rotation : ndarray, (3, 3)
        From the given to the right b-vectors in world RAS+, up to sign; the identity without a remedy.
    lengths : tuple of (str, float)
        Mean streamline length in mm of each frame: the given one first, then from the longest.
    ratio : float
        Length of the given frame over that of its best rival.
    z : float
        Their difference in standard errors over blocks of the brain.
    order : float
        Fraction of pairs of volumes in which the signal falls with b.
    misfits : tuple of int
        Volumes whose signal does not fit their b-value.
    corrected : bool
        Whether the b-vectors were corrected.
    """

    answer: str
    why: str
    remedy: str
    rotation: np.ndarray
    lengths: tuple[tuple[str, float], ...]
    ratio: float
    z: float
    order: float
    misfits: tuple[int, ...]
    corrected: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Lattice(Summarised):
    """The preprocessed series evaluated on a lattice in q-space.

    Attributes
    ----------
    dwi : DWI
        One volume per point; b-vectors along the world axes of the output space.
    points : ndarray, (n, 3), int
        Lattice coordinates; zero for b=0. Empty for a table given as a file.
    uncertainty : ndarray, (n,)
        Standard deviation of each point in units of the noise of one acquired volume.
    extrapolated : ndarray, (n,), bool
        Points beyond the acquired q-space, or less certain than an acquired volume.
    noise : float
        Noise standard deviation of acquired volumes in the brain, in units of intensity, by the model.
    left_out : ndarray, (m,)
        RMS error in the brain of each acquired volume predicted from the others.
    model : str
        What was fitted, for log and report.
    """

    dwi: DWI
    points: np.ndarray
    uncertainty: np.ndarray
    extrapolated: np.ndarray
    noise: float
    left_out: np.ndarray
    model: str


@dataclass(frozen=True, eq=False, repr=False)
class QSpaceQuality(Summarised):
    """Quality of the samples in q-space; intensities are relative to the median b=0 signal of the brain.

    Attributes
    ----------
    signal : ndarray, (n, 3)
        10th, 50th and 90th percentile over the brain of each volume.
    floor : float
        Mean of pure noise in magnitude images.
    at_floor : float
        Fraction of samples of high b (3000 s/mm², or half of the largest) below two standard deviations of the noise.
    left_out : ndarray, (n,)
        RMS difference of each volume from its prediction from the others.
    noise : float
        Standard deviation of the noise left in the preprocessed series, by the same model.
    offset : ndarray, (n,)
        Distance of each sample from its lattice point in lattice steps; NaN without a lattice and for b=0.
    prescribed, lost : int
        Lattice points that were prescribed, and those that no sample lies within half a step of any more.
    antipodal : float or None
        RMS difference of antipodal samples over that of noise alone; None if none were acquired.
    """

    signal: np.ndarray
    floor: float
    at_floor: float
    left_out: np.ndarray
    noise: float
    offset: np.ndarray
    prescribed: int
    lost: int
    antipodal: float | None
