"""Fields of the gradient coils, and what a scanner has corrected of their nonlinearity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsiprep.data.summary import Summarised
from dsiprep.data.transform import DisplacementField

__all__ = ["CORRECTIONS", "CoilFields", "GradientCoil", "GradientNonlinearity", "ScannerCorrections"]

CORRECTIONS = ("none", "2d", "3d")  # of positions by the scanner: not at all, within slices, in all directions


@dataclass(frozen=True, eq=False, repr=False)
class GradientCoil(Summarised):
    """Nonlinear part of the fields of three gradient coils, in solid spherical harmonics.

    The position along axis a that coil a encodes at x is x_a + d_a(x), where

    d_a = R0 sum_nm (r / R0)^n N_nm P_nm(cos theta) (A_nm cos m phi + B_nm sin m phi).

    P_nm is without the Condon-Shortley phase; N_n0 = 1 and, for m > 0, N_nm² = (2n + 1) (n - m)! / (2 (n + m)!)
    (Siemens). Coordinates and axes are left, anterior and inferior, from the isocentre.

    Attributes
    ----------
    radius : float
        R0 in mm.
    cosine, sine : ndarray, (3, n + 1, n + 1)
        A_nm and B_nm of the coils x, y, z.
    """

    radius: float
    cosine: np.ndarray
    sine: np.ndarray


CoilFields = GradientCoil | DisplacementField  # a displacement field holds d in mm RAS+, on a grid in the scanner


@dataclass(frozen=True)
class ScannerCorrections:
    """What the scanner corrected, each of `CORRECTIONS`: series, EPI references, fieldmap, structural images.

    `slice_axis` is the voxel axis across slices of the series and of its references.
    """

    series: str = "none"
    epis: str = "none"
    fieldmap: str = "none"
    structural: tuple[str, ...] = ()
    slice_axis: int = 2


@dataclass(frozen=True, eq=False, repr=False)
class GradientNonlinearity(Summarised):
    """Fields of the gradient coils, and what the scanner corrected of their effect on the images of a unit."""

    fields: CoilFields
    corrections: ScannerCorrections
