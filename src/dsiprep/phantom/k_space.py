"""Images from k-space: truncated, partly sampled along the phase-encoding axis, complex, with white noise.

The simulated image is scanned on a grid that is finer in the plane of the slices. Its k-space, cut to what the coarse
grid can hold, is what a scanner samples; the missing half of partial Fourier sampling is left at zero. The truth that
does not ring is the mean within each coarse voxel.
"""

from __future__ import annotations

import numpy as np

from dsiprep.data.grid import Grid

REFINEMENT = 3  # fine voxels per voxel along each axis of the plane
PHASE_TERMS = 6  # 1, x, y, x², xy, y²
STATIC_PHASE = 1.0  # rad, standard deviation of each coefficient of the phase that all volumes share
MOTION_PHASE = 1.5  # rad, of each linear coefficient of a diffusion-weighted volume


def fine_grid(grid: Grid) -> Grid:
    """The grid with `REFINEMENT` times as many voxels along i and j, between the same outer faces."""
    step = np.diag([1 / REFINEMENT, 1 / REFINEMENT, 1.0, 1.0])
    step[:2, 3] = (1 / REFINEMENT - 1) / 2
    return Grid((grid.shape[0] * REFINEMENT, grid.shape[1] * REFINEMENT, grid.shape[2]), grid.affine @ step)


def draw_phase(fine: Grid, diffusion_weighted: bool, static: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth phase in rad on a fine grid, (i, j, k): shared terms `static` (6,), and motion of each slice."""
    x = np.linspace(-1, 1, fine.shape[0], dtype=np.float32)[:, None] * np.ones(fine.shape[1], np.float32)
    y = np.linspace(-1, 1, fine.shape[1], dtype=np.float32)[None] * np.ones_like(x)
    coefficients = np.repeat(static[:, None], fine.shape[2], 1)
    if diffusion_weighted:
        coefficients[0] += rng.uniform(-np.pi, np.pi, fine.shape[2])
        coefficients[1:3] += MOTION_PHASE * rng.standard_normal((2, fine.shape[2]))
        coefficients[3:] += 0.2 * MOTION_PHASE * rng.standard_normal((3, fine.shape[2]))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y])
    return np.tensordot(terms, coefficients.astype(np.float32), (0, 0))


def sample(
    fine: np.ndarray,
    phase: np.ndarray,
    axis: int,
    fraction: float,
    sigma: float,
    rng: np.random.Generator,
    refinement: int = REFINEMENT,
) -> np.ndarray:
    """Complex image (i, j, k) from the k-space of a fine image.

    Parameters
    ----------
    fine, phase : ndarray, (i * refinement, j * refinement, k)
        Magnitude and phase (rad) of the object.
    axis : int
        Of phase encoding, 0 or 1.
    fraction : float
        Part of k-space that is sampled along `axis`: all positive frequencies, and some of the negative ones.
    sigma : float
        Noise standard deviation of real and imaginary part of an image from full k-space.
    rng : Generator
    refinement : int
        Fine voxels per voxel along each axis of the plane.
    """
    spectrum = np.fft.fft2(fine * np.exp(1j * phase), axes=(0, 1)) / refinement**2
    shape = fine.shape[0] // refinement, fine.shape[1] // refinement, fine.shape[2]
    rows, columns = (np.rint(np.fft.fftfreq(n) * n).astype(int) for n in shape[:2])
    spectrum = spectrum[np.ix_(rows, columns, np.arange(shape[2]))]
    between = 1j * np.pi * (refinement - 1)  # the centre of a voxel lies between those of fine ones
    spectrum *= np.exp(between * (rows[:, None] / fine.shape[0] + columns[None] / fine.shape[1]))[..., None]
    if sigma:
        scale = sigma * np.sqrt(shape[0] * shape[1])
        spectrum += scale * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))
    sampled = (rows[:, None, None], columns[None, :, None])[axis] >= -(fraction - 0.5) * shape[axis]
    return np.fft.ifft2(spectrum * sampled, axes=(0, 1)).astype(np.complex64)
