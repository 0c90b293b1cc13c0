"""The part of the off-resonance field that changes as the head tilts in the main field, from its susceptibility.

The field of a susceptibility distribution is that of its dipoles along the main field, whose direction in the head
changes with pitch and roll. It is evaluated in Fourier space and is exact for any tilt, independently of the code that
estimates a linear function of the angles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from dsiprep.data.grid import Grid
from dsiprep.phantom.head import Head
from dsiprep.phantom.interpolation import interpolate

__all__ = ["DEGREES", "MovingField", "dipole_components", "make_moving_field", "tilted_change"]

MAIN_FIELD = np.array([0.0, 0.0, 1.0])  # direction in the scanner, RAS+
DEGREES = 6.0  # tilt at which the setting gives the size of the change
SMOOTHING_MM = 4.0  # of the susceptibility
PERCENTILE = 95  # of the change in the brain
PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))


@dataclass(frozen=True, eq=False)
class MovingField:
    """Field of a susceptibility distribution for any direction of the main field.

    Attributes
    ----------
    components : ndarray, (6, i, j, k), float32
        Hz: the field along a direction n in the head is a constant less the sum of n_a n_b components[ab] over `PAIRS`,
        those of unequal axes twice.
    grid : Grid
        In the head.
    reference : ndarray, (3, 3)
        Rotation from the head to the scanner at which the change is zero.
    """

    components: np.ndarray
    grid: Grid
    reference: np.ndarray

    def change(self, rotation: np.ndarray) -> np.ndarray:
        """Change of the field (Hz) in a head turned by `rotation` (3, 3), head to scanner; (i, j, k) float32."""
        return tilted_change(self.components, rotation, self.reference).astype(np.float32)


def tilted_change(components: np.ndarray, rotation: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Change of the field (Hz) between two rotations (3, 3) of the head, for components (6, ...) of `MovingField`."""
    now, before = rotation.T @ MAIN_FIELD, reference.T @ MAIN_FIELD
    weights = [(1 if a == b else 2) * (before[a] * before[b] - now[a] * now[b]) for a, b in PAIRS]
    return np.tensordot(np.array(weights), components, axes=1)


def make_moving_field(head: Head, grid: Grid, reference: np.ndarray, size_mm: float, mm_per_hz: float) -> MovingField:
    """The field of the air in and around a head.

    Parameters
    ----------
    head : Head
    grid : Grid
        In the head frame, along its axes.
    reference : ndarray, (3, 3)
        Rotation from the head to the scanner at which the change is zero.
    size_mm : float
        Displacement that the change by 6 degrees of pitch or of roll, whichever is larger, exceeds in 5 % of the brain.
    mm_per_hz : float
        Displacement per Hz.
    """
    tissue = 1 - head.maps(grid, ("air",))["air"]
    components = dipole_components(gaussian_filter(tissue, SMOOTHING_MM / grid.voxel_sizes), grid)
    unscaled, points = MovingField(components, grid, reference), head.brain_points(3)
    sizes = []
    for axis in np.eye(3)[:2]:  # about the x and y axes of the scanner
        change = unscaled.change(Rotation.from_rotvec(np.deg2rad(DEGREES) * axis).as_matrix() @ reference)
        sizes.append(np.percentile(np.abs(interpolate(change, grid, points)), PERCENTILE))
    return MovingField(components * np.float32(size_mm / mm_per_hz / max(sizes)), grid, reference)


def dipole_components(susceptibility: np.ndarray, grid: Grid) -> np.ndarray:
    """`MovingField.components` of a susceptibility (i, j, k), relative to the main field, for one along RAS axes."""
    k = [np.fft.fftfreq(n, spacing) for n, spacing in zip(grid.shape, grid.voxel_sizes, strict=True)]
    waves = np.stack(np.meshgrid(*k, indexing="ij"))
    squared = (waves**2).sum(0)
    squared[0, 0, 0] = np.inf
    spectrum = np.fft.fftn(susceptibility) / squared
    return np.stack([np.fft.ifftn(waves[a] * waves[b] * spectrum).real for a, b in PAIRS]).astype(np.float32)
