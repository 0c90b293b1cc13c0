"""Images of a tilting head: poses, distortion and a field that changes with pitch and roll, composed at every point.

A point x of the undistorted head appears in volume v, of blip b, at y + e_v(y) with y = A_v x + w_v(x) d_b and
w_v = u_b + s_b t_v . f: the pose A_v, the displacement u_b of the resting field along the phase-encoding axis d_b,
fixed in the scanner, and what the two angles t_v add to it; f holds two fields in mm per degree for s = 1. Intensities
are multiplied by the Jacobian determinants of the displacements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.transform import EddyCurrents
from dsiprep.ops.image.epi_resampling import SampledDisplacement, warp_volume
from dsiprep.ops.image.point_set import PointSet
from dsiprep.ops.image.smooth_field import SplineBasis

__all__ = ["TiltedSeries", "pitch_and_roll"]

MAIN_FIELD = np.array([0.0, 0.0, 1.0])  # direction in the scanner, RAS+


@dataclass(frozen=True, eq=False)
class TiltedSeries:
    """A series, and its transforms as estimated so far.

    Attributes
    ----------
    data : Tensor, (n, i, j, k)
    grid : Grid
    points : PointSet
        The brain in the undistorted reference, on `grid`.
    transforms : ndarray, (n, 4, 4)
        A: points of the undistorted reference to points of each volume.
    eddy : EddyCurrents or None
        Of all volumes.
    resting : tuple of SampledDisplacement
        u of each blip on `grid`, whose `direction` is d, towards higher voxel indices.
    scales : ndarray, (blips,)
        s: displacement in mm along d where the fields have 1 mm.
    blip_of : ndarray, (n,), int
    origin : ndarray, (2,)
        Pitch and roll (degrees) at which the field is the resting field.
    basis : SplineBasis
        Of the fields, on `grid`.
    coefficients : ndarray, (2, count)
        Of f: pitch and roll, mm per degree.
    """

    data: torch.Tensor
    grid: Grid
    points: PointSet
    transforms: np.ndarray
    eddy: EddyCurrents | None
    resting: tuple[SampledDisplacement, ...]
    scales: np.ndarray
    blip_of: np.ndarray
    origin: np.ndarray
    basis: SplineBasis
    coefficients: np.ndarray

    @property
    def tilts(self) -> np.ndarray:
        """s t: displacement of each volume in mm where the fields have 1 mm per degree, (n, 2)."""
        return (pitch_and_roll(self.transforms) - self.origin) * self.scales[self.blip_of][:, None]

    def at_points(self, images: np.ndarray) -> np.ndarray:
        """Values of images (f, i, j, k) at the points, (f, m)."""
        i, j, k = self.points.voxels.astype(int).T
        return images[:, i, j, k]

    def on_grid(self, values: np.ndarray) -> np.ndarray:
        """Images (f, i, j, k) of values (f, m) at the points; zero elsewhere."""
        out = np.zeros((len(values), *self.grid.shape), np.float32)
        i, j, k = self.points.voxels.astype(int).T
        out[:, i, j, k] = values
        return out

    def displacements(self, volumes: np.ndarray) -> list[SampledDisplacement]:
        """w of the given volumes on the grid."""
        values, tilts = self.basis.evaluate(self.coefficients), self.tilts
        along = np.stack([self.basis.evaluate(self.coefficients, axis) for axis in range(3)], axis=1)
        slopes = np.einsum("ab,fbijk->faijk", self.basis.knots.axes, along)
        out = []
        for v in volumes:
            resting = self.resting[self.blip_of[v]]
            length, slope = (torch.as_tensor(np.tensordot(tilts[v], x, axes=1)).float() for x in (values, slopes))
            vector = torch.as_tensor(resting.direction).float()[:, None, None, None] * length
            out.append(SampledDisplacement(resting.displacement + vector, resting.slope + slope, resting.direction))
        return out

    def sample(self, volumes: np.ndarray) -> torch.Tensor:
        """The given volumes at the points, (len(volumes), m); NaN outside the field of view."""
        out, (i, j, k) = torch.empty(len(volumes), len(self.points)), self.points.voxels.astype(int).T
        reached = torch.empty(self.grid.shape, dtype=torch.bool)
        for row, (v, displacement) in enumerate(zip(volumes, self.displacements(volumes), strict=True)):
            matrix, eddy = self.transforms[v], None if self.eddy is None else self.eddy.take(np.array([v]))
            chain = (self.grid, self.grid, matrix, displacement, matrix[:3, :3], eddy)
            warped = warp_volume(self.data[int(v)], *chain, signed=True, reached=reached)
            out[row] = torch.where(reached, warped, torch.nan)[i, j, k]
        return out


def pitch_and_roll(transforms: np.ndarray) -> np.ndarray:
    """Tilt of the head in the main field, degrees, (n, 2): pitch (about the x axis) and roll (about the y axis).

    The direction of the main field, z of the scanner, in a head turned by R is R' z; a turn about z does not change it.

    Parameters
    ----------
    transforms : ndarray, (n, 4, 4)
        Points of the head to points of the scanner, RAS+.
    """
    direction = MAIN_FIELD @ transforms[:, :3, :3]
    return np.rad2deg(np.arcsin(np.clip(np.stack([direction[:, 1], -direction[:, 0]], axis=1), -1, 1)))
