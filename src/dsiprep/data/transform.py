"""Spatial transforms as point maps in world RAS+ mm.

A transform `from-A_to-B` resamples images of A onto B, so it maps points of B to points of A. Variables are named
likewise: `dwiref_to_t1w` maps a point of the T1w image to the point of the dwiref at which to sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.summary import Summarised

EDDY_MM = 100.0  # unit of the scanner coordinates of `eddy_terms`, mm
EDDY_TERMS = {  # name in the confounds table: term
    "1": "1", "i": "i", "j": "j", "k": "k", "ii": "i²", "jj": "j²", "kk": "k²", "ij": "i j", "ik": "i k", "jk": "j k",
}  # fmt: skip


Array = TypeVar("Array", np.ndarray, torch.Tensor)


def eddy_terms(x: Array, y: Array, z: Array) -> list[Array]:
    """The ten terms of the eddy-current polynomial, in the order of `EDDY_TERMS`, at scanner coordinates / 100 mm.

    Array and tensor version of the polynomial of `dsiprep.ops.image.eddy_displacement.displace_voxel` (Numba); a test
    verifies that both agree.
    """
    return [x * 0 + 1, x, y, z, x * x, y * y, z * z, x * y, x * z, y * z]


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Summarised):
    """Affine map of points of `target` to points of `source`: x -> matrix @ [x, 1].

    Attributes
    ----------
    matrix : ndarray, (4, 4), float64
        World RAS+ mm of the target image to world RAS+ mm of the source image.
    source, target : str
        Names of the two spaces, as in `from-<source>_to-<target>`.
    """

    matrix: np.ndarray
    source: str
    target: str

    def inverse(self) -> Affine:
        """The transform that resamples images of `target` onto `source`."""
        return Affine(np.linalg.inv(self.matrix), self.target, self.source)


@dataclass(frozen=True, eq=False, repr=False)
class DisplacementField(Summarised):
    """Displacement field x -> x + u(x) for points of `grid`.

    Attributes
    ----------
    data : Tensor, (3, i, j, k), float32
        u in mm along world R, A, S.
    grid : Grid
        Grid on which u is sampled; u is zero outside.
    """

    data: torch.Tensor
    grid: Grid


@dataclass(frozen=True, eq=False, repr=False)
class EddyCurrents(Summarised):
    """Eddy-current displacement x -> x + e_v(x) d of every volume v along the phase-encoding axis d.

    e_v is a polynomial in the scanner coordinates s = axes' (x - centre) / 100 mm along i, j, k.

    Attributes
    ----------
    coefficients : ndarray, (n, 10)
        Coefficients, in mm, of 1, s1, s2, s3, s1², s2², s3², s1 s2, s1 s3, s2 s3.
    axes : ndarray, (3, 3)
        Unit vectors of the voxel axes of the volumes in world RAS+, as columns.
    centre : ndarray, (3,)
        Origin of the scanner coordinates, world RAS+ mm.
    along : int
        Voxel axis of d; positive e displaces towards higher indices.
    """

    coefficients: np.ndarray
    axes: np.ndarray
    centre: np.ndarray
    along: int

    def take(self, volumes: np.ndarray) -> EddyCurrents:
        """Select volumes by an index array."""
        return EddyCurrents(self.coefficients[volumes], self.axes, self.centre, self.along)

    def displacement(self, volume: int, points: np.ndarray) -> np.ndarray:
        """Displacement e_v(x) d in mm RAS+, (..., 3), of volume v at world points (..., 3)."""
        s = (np.asarray(points, float) - self.centre) @ self.axes / EDDY_MM
        x, y, z = np.moveaxis(s, -1, 0)
        terms = np.stack(eddy_terms(x, y, z), axis=-1)
        return (terms @ self.coefficients[volume])[..., None] * self.axes[:, self.along]


@dataclass(frozen=True, eq=False, repr=False)
class Chain(Summarised):
    """A sequence of maps: `steps[0]`, then `steps[1]`, ..., map points of `target` to points of `source`."""

    steps: tuple[Affine | DisplacementField, ...]
    source: str
    target: str
