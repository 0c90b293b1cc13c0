"""A blip-up/blip-down pair of a smooth analytic head.

The simulation is independent of the correction: it moves signal along oversampled lines rather than interpolating
images.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Blip, Distortion
from dsiprep.settings import DistortionSettings
from dsiprep.stages.distortion import correct_distortion

READOUT = 0.05  # s
SIZE = 4.0  # mm
CENTRE = np.array([3.0, -12.0, 8.0])  # of the head, world RAS+ mm


def make_grid(codes: str, tilt: float = 0.0, sizes: tuple[float, float, float] = (SIZE,) * 3) -> Grid:
    """A grid around the head whose voxel axes point to `codes`, rotated by `tilt` degrees."""
    directions = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    extent = np.array([132.0, 156.0, 116.0])
    affine, shape = np.eye(4), []
    for column, code in enumerate(codes):
        world_axis, sign = directions[code]
        affine[:3, column] = 0
        affine[world_axis, column] = sign * sizes[column]
        shape.append(round(extent[world_axis] / sizes[column]))
    affine[:3, :3] = Rotation.from_rotvec(np.deg2rad(tilt) * np.array([0.6, -0.64, 0.48])).as_matrix() @ affine[:3, :3]
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid((shape[0], shape[1], shape[2]), affine)


def head(points: np.ndarray) -> np.ndarray:
    """Intensity of a head made of ellipsoids at world points (..., 3)."""
    x, y, z = np.moveaxis(np.asarray(points) - CENTRE, -1, 0)

    def blob(c: tuple[float, float, float], r: tuple[float, float, float], softness: float = 3.0) -> np.ndarray:
        distance = np.sqrt(((x - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((z - c[2]) / r[2]) ** 2)
        return 1 / (1 + np.exp(np.clip((distance - 1) * min(r) / softness * 4, -50, 50)))

    folds = 1 + 0.15 * np.sin(x / 6 + 0.3) * np.sin(y / 7) * np.sin(z / 6 + 1)
    image = 60 * blob((0, 0, 0), (52, 64, 46)) * folds
    for side in (-1, 1):
        image += 70 * blob((side * 11, 2, 8), (7, 22, 8)) - 20 * blob((side * 27, -8, 4), (11, 30, 20))
        image += 35 * blob((side * 32, 30, -12), (9, 9, 11))
    return image + 45 * blob((4, -42, -16), (16, 9, 9)) + 30 * blob((0, 44, 20), (14, 7, 12))


def field_mm(points: np.ndarray, axis: np.ndarray, amplitude: float) -> np.ndarray:
    """Displacement of blip-up along `axis` in mm at world points (..., 3).

    It has a strong peak near the edge of the head, a weaker one, and a slow wave.
    """
    p = np.asarray(points) - CENTRE

    def peak(c: np.ndarray, r: float) -> np.ndarray:
        return np.exp(-0.5 * ((p - c) ** 2).sum(-1) / r**2)

    wave = np.sin(p @ np.array([0.015, 0.02, 0.01]) + 0.4)
    strong = 40 * axis + np.array([4.0, -3.0, -14.0])
    return amplitude * (peak(strong, 15) - 0.6 * peak(np.array([-34.0, 5.0, -18.0]), 14) + 0.12 * wave)


def acquire(
    grid: Grid, axis: int, scale: float, pose: np.ndarray, amplitude: float, polarity_axis: np.ndarray
) -> np.ndarray:
    """Image of the head at `pose`, its signal displaced by scale * field along +axis, (i, j, k)."""
    oversampling = 12
    ranges = [np.arange(n, dtype=float) for n in grid.shape]
    ranges[axis] = (np.arange(grid.shape[axis] * oversampling) + 0.5) / oversampling - 0.5
    voxels = np.stack(np.meshgrid(*ranges, indexing="ij"), -1)
    world = grid.to_world(voxels)
    inverse = np.linalg.inv(pose)
    points = world @ inverse[:3, :3].T + inverse[:3, 3]
    mass = np.moveaxis(head(points), axis, -1) / oversampling
    position = voxels[..., axis] + scale * field_mm(points, polarity_axis, amplitude) / grid.voxel_sizes[axis]
    position = np.moveaxis(position, axis, -1).reshape(-1, mass.shape[-1])
    fine = (position + 0.5) * oversampling - 0.5
    n = mass.shape[-1]
    out = np.zeros((len(position), n))
    line = np.arange(len(position))[:, None]
    base = np.floor(fine).astype(int)
    for side in (0, 1):
        cell = base + side
        share = mass.reshape(-1, n) * (1 - np.abs(fine - cell))
        inside = (cell >= 0) & (cell < n)
        np.add.at(out, (np.broadcast_to(line, cell.shape)[inside], cell[inside]), share[inside])
    shape = [grid.shape[a] for a in range(3) if a != axis]
    return np.moveaxis(out.reshape(*shape, grid.shape[axis], oversampling).sum(-1), -1, axis)


def rigid(rotation: tuple[float, float, float], translation: np.ndarray) -> np.ndarray:
    """Rotation by degrees about the head's centre, followed by a translation in mm."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(np.deg2rad(rotation)).as_matrix()
    pose[:3, 3] = CENTRE + translation - pose[:3, :3] @ CENTRE
    return pose


class Case:
    """A simulated pair with its ground truth."""

    def __init__(
        self,
        grid: Grid,
        axis: int,
        first: int = 1,
        amplitude: float = 6.0,
        pose: np.ndarray | None = None,
        readouts: tuple[float | None, float | None] = (READOUT, READOUT),
        noise: float = 0.0,
        gain: float = 1.0,
        second: tuple[Grid, PhaseEncoding] | None = None,
    ) -> None:
        """`second` is the grid of the second image and its phase encoding, whose readout time is in `readouts`."""
        self.grid, self.axis, self.pose = grid, axis, np.eye(4) if pose is None else pose
        other, pe = second or (grid, PhaseEncoding(axis, -first))
        times = [1.0 if r is None else r / READOUT for r in readouts]
        polarity_axis = grid.directions[:, axis] * np.sign(grid.directions[:, axis].sum())
        stretch = other.voxel_sizes[pe.axis] / grid.voxel_sizes[axis]
        self.scales = (first * times[0], pe.polarity * times[1] * stretch)
        world = grid.to_world(np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1))
        self.field = field_mm(world, polarity_axis, amplitude)
        self.truth = acquire(grid, axis, 0.0, np.eye(4), amplitude, polarity_axis)
        self.brain = self.truth > 35
        rng = np.random.default_rng(3)
        images = [
            acquire(g, a, s, p, amplitude, polarity_axis) + noise * rng.standard_normal(g.shape)
            for g, a, s, p in zip((grid, other), (axis, pe.axis), self.scales, (np.eye(4), self.pose), strict=True)
        ]
        images[1] *= gain
        self.images = tuple(torch.from_numpy(i.astype(np.float32))[None] for i in images)
        self.blips = tuple(
            Blip(name, PhaseEncoding(a, p, t), torch.zeros(0, *g.shape), g if second else None)
            for name, g, a, p, t in zip(
                ("up", "down"), (grid, other), (axis, pe.axis), (first, pe.polarity), readouts, strict=True
            )
        )
        self.mask = Volume(torch.from_numpy(ndimage.binary_dilation(self.brain).astype(np.float32)), grid)

    def correct(self) -> Distortion:
        return correct_distortion(self.blips, self.images, self.grid, self.mask, DistortionSettings())

    def errors(self, result: Distortion) -> np.ndarray:
        """Absolute error of the estimated field in the brain, relative to its median error, mm."""
        unit = self.grid.directions[:, self.axis]
        found = np.einsum("c,cijk->ijk", unit, result.fields[0].data.numpy()) / self.scales[0]
        error = (found - self.field)[self.brain]
        return np.abs(error - np.median(error))


def correlation(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    return float(np.corrcoef(a[where], b[where])[0, 1])
