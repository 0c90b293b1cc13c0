"""Point maps in the world, RAS+ mm.

`from-A_to-B` brings images of A onto B, so it maps points of B to points of A. A variable that holds one is
named after the image it moves: `dwiref_to_t1w` takes a point of the T1w and says where to read in the dwiref.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from dsiprep.data.grid import Grid

EDDY_MM = 100.0  # scanner coordinates are counted in these
EDDY_TERMS = {  # name in the confounds table, and the term
    "1": "1", "i": "i", "j": "j", "k": "k", "ii": "i²", "jj": "j²", "kk": "k²", "ij": "i j", "ik": "i k", "jk": "j k",
}  # fmt: skip


Array = TypeVar("Array", np.ndarray, torch.Tensor)


def eddy_terms(x: Array, y: Array, z: Array) -> list[Array]:
    """The ten terms of the eddy-current polynomial, in the order of `EDDY_TERMS`, at scanner coordinates / 100 mm.

    `dsiprep.ops.image.eddy_displacement.displace_voxel` is the same polynomial in Numba; a test holds them equal.
    """
    return [x * 0 + 1, x, y, z, x * x, y * y, z * z, x * y, x * z, y * z]


@dataclass(frozen=True, eq=False)
class Affine:
    """Points of `target` to points of `source`: x -> matrix @ [x, 1].

    Attributes
    ----------
    matrix : ndarray, (4, 4), float64
        World RAS+ mm of the target image to world RAS+ mm of the source image.
    source, target : str
        The names of the two spaces, as in `from-<source>_to-<target>`.
    """

    matrix: np.ndarray
    source: str
    target: str

    def inverse(self) -> Affine:
        """The transform that brings images of `target` onto `source`."""
        return Affine(np.linalg.inv(self.matrix), self.target, self.source)


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """x -> x + u(x) for points of `grid`.

    Attributes
    ----------
    data : Tensor, (3, i, j, k), float32
        u in mm along world R, A, S.
    grid : Grid
        Where u is given; u is zero outside.
    """

    data: torch.Tensor
    grid: Grid


@dataclass(frozen=True, eq=False)
class EddyCurrents:
    """x -> x + e_v(x) d, another one in every volume v: what eddy currents do along the phase-encoding axis d.

    e_v is a polynomial in scanner coordinates s = axes' (x - centre) / 100 mm, a point's place along i, j, k.

    Attributes
    ----------
    coefficients : ndarray, (n, 10)
        Of 1, s1, s2, s3, s1², s2², s3², s1 s2, s1 s3, s2 s3, in mm.
    axes : ndarray, (3, 3)
        Unit vectors of the volumes' voxel axes in world RAS+, one per column.
    centre : ndarray, (3,)
        World RAS+ mm.
    along : int
        Which voxel axis d is; e counts towards higher indices.
    """

    coefficients: np.ndarray
    axes: np.ndarray
    centre: np.ndarray
    along: int

    def take(self, volumes: np.ndarray) -> EddyCurrents:
        """Those of some volumes."""
        return EddyCurrents(self.coefficients[volumes], self.axes, self.centre, self.along)

    def displacement(self, volume: int, points: np.ndarray) -> np.ndarray:
        """e_v d at world points (..., 3) in mm RAS+, (..., 3)."""
        s = (np.asarray(points, float) - self.centre) @ self.axes / EDDY_MM
        x, y, z = np.moveaxis(s, -1, 0)
        terms = np.stack(eddy_terms(x, y, z), axis=-1)
        return (terms @ self.coefficients[volume])[..., None] * self.axes[:, self.along]


@dataclass(frozen=True, eq=False)
class Chain:
    """Several maps as one: points of `target` go through `steps[0]`, then `steps[1]`, ..., into `source`."""

    steps: tuple[Affine | DisplacementField, ...]
    source: str
    target: str
