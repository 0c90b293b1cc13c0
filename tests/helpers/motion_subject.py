"""A small synthetic head of smooth analytic shapes, whose signal is exact in any pose without interpolation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.ops.image.affine import rigid_matrix, rigid_parameters
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from helpers.grids import make_grid

CENTRE = np.array([3.0, -5.0, 8.0])
RADIUS = 45.0


@dataclass(frozen=True)
class Subject:
    """A series, its rough mask and its true poses (points of the reference to points of each volume)."""

    dwi: DWI
    mask: Volume
    transforms: np.ndarray


def tissue(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fractions of free water and isotropic tissue, (m,), and fibre vectors, (m, 3), at head points (m, 3)."""
    rng = np.random.default_rng(5)
    x = points - CENTRE
    head = 1 / (1 + np.exp((np.linalg.norm(x / [1, 1.15, 0.9], axis=-1) - RADIUS) / 3))
    blobs = np.zeros((2, len(points)))
    for number in range(60):
        middle, size = rng.uniform(-0.8, 0.8, 3) * RADIUS, rng.uniform(7, 12)
        blobs[number % 2] += np.exp(-((x - middle) ** 2).sum(-1) / (2 * size**2))
    fibres = head * np.clip(blobs[0], 0, 1)
    water = (head - fibres) * np.clip(blobs[1], 0, 1)
    azimuth = 3 * np.sin(x @ [0.05, 0.03, -0.04])
    elevation = 2 * np.cos(x @ [-0.03, 0.05, 0.03])
    plane = np.cos(elevation)
    direction = np.stack([np.cos(azimuth) * plane, np.sin(azimuth) * plane, np.sin(elevation)], axis=-1)
    return water, head - fibres - water, fibres[:, None] * direction


def signal(points: np.ndarray, b: float, g: np.ndarray) -> np.ndarray:
    """Intensity of head points (m, 3) for a b-value and a gradient in the frame of the head, (m,)."""
    water, grey, fibres = tissue(points)
    fraction = np.linalg.norm(fibres, axis=-1)
    cos2 = (fibres @ g) ** 2 / np.maximum(fraction, 1e-9) ** 2
    white = 0.6 * np.exp(-b * 1.7e-3 * cos2) + 0.4 * np.exp(-b * (4e-4 + 1.2e-3 * cos2))
    return 1000 * (2 * water * np.exp(-b * 3e-3) + 1.1 * grey * np.exp(-b * 8e-4) + fraction * white)


def directions(count: int) -> np.ndarray:
    """Unit vectors (count, 3) spread evenly over half a sphere, in random order."""
    index = np.arange(count)
    z = 1 - (index + 0.5) / count
    angle = index * np.pi * (1 + 5**0.5)
    radius = np.sqrt(1 - z**2)
    spread = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
    return np.random.default_rng(3).permutation(spread)


def scheme(count: int, rings: tuple[float, ...], b0_every: int) -> tuple[np.ndarray, np.ndarray]:
    """b-values and b-vectors: b=0 first, and again after every `b0_every` directions (0: only first)."""
    bvals, bvecs = [0.0], [np.zeros(3)]
    for number, g in enumerate(directions(count)):
        if b0_every and number and number % b0_every == 0:
            bvals.append(0.0)
            bvecs.append(np.zeros(3))
        bvals.append(rings[number % len(rings)])
        bvecs.append(g)
    return np.array(bvals), np.array(bvecs)


def make_subject(
    orientation: str = "LAS",
    count: int = 40,
    rings: tuple[float, ...] = (1000.0, 2000.0, 3000.0),
    b0_every: int = 10,
    moved: float = 0.3,
    spacing: tuple[float, float, float] = (5.0, 5.0, 5.0),
    noise: float = 30.0,
    largest: tuple[float, float] = (4.0, 5.0),
) -> Subject:
    """Simulate a series in which a fraction `moved` of the volumes moved by up to `largest` (mm, degrees) per axis."""
    rng = np.random.default_rng(11)
    bvals, bvecs = scheme(count, rings, b0_every)
    n = len(bvals)
    parameters = rng.uniform(-1, 1, (n, 6)) * (rng.random(n) < moved)[:, None]
    parameters[0] = 0
    parameters[:, :3] *= np.deg2rad(largest[1])
    parameters[:, 3:] *= largest[0]
    transforms = rigid_matrix(parameters, CENTRE)
    world_extent = np.array([118.0, 130, 108])
    grid = make_grid(orientation, (2, 2, 2), spacing)
    sides = np.abs(grid.directions.T @ world_extent) / grid.voxel_sizes
    shape = tuple(int(s) for s in np.round(sides))
    grid = make_grid(orientation, (shape[0], shape[1], shape[2]), spacing)
    voxels = np.argwhere(np.ones(grid.shape, bool))
    data = np.empty((n, *grid.shape), np.float32)
    for v in range(n):
        head = np.linalg.inv(transforms[v])
        points = grid.to_world(voxels) @ head[:3, :3].T + head[:3, 3]
        clean = signal(points, bvals[v], rotate_bvecs(bvecs[v], transforms[v])).reshape(grid.shape)
        data[v] = np.hypot(clean + noise * rng.standard_normal(grid.shape), noise * rng.standard_normal(grid.shape))
    dwi = DWI(torch.from_numpy(data), grid, bvals, bvecs, np.zeros(n, int), np.zeros(n, int))
    inside = np.linalg.norm((grid.to_world(voxels) - CENTRE) / [1, 1.15, 0.9], axis=1) < RADIUS + 5
    mask = Volume(torch.from_numpy(inside.reshape(grid.shape).astype(np.float32)), grid)
    return Subject(dwi, mask, transforms)


def errors(estimated: np.ndarray, subject: Subject) -> tuple[float, float]:
    """Rotation (degrees) and translation (mm) errors of estimated transforms.

    Root mean square over diffusion-weighted volumes and axes, after removal of their mean rigid offset.
    """
    weighted = ~subject.dwi.is_b0
    difference = np.linalg.inv(subject.transforms[weighted]) @ estimated[weighted]
    for _ in range(3):
        offset = rigid_matrix(rigid_parameters(difference, CENTRE).mean(axis=0), CENTRE)
        difference = difference @ np.linalg.inv(offset)
    parameters = rigid_parameters(difference, CENTRE)
    rotation = np.rad2deg(np.sqrt((parameters[:, :3] ** 2).mean()))
    return float(rotation), float(np.sqrt((parameters[:, 3:] ** 2).mean()))
