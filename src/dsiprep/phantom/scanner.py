"""Simulate an echo-planar image of a head at a pose, with its off-resonance field and eddy currents.

The off-resonance field moves with the head; the phase-encoding axis and the eddy currents are fixed in the scanner.
Signal is conserved: the signal of each segment of a line is spread over the displaced segment. The code is independent
of the code that corrects these effects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from scipy.spatial.transform import Rotation

from dsiprep.compiled import compiled, inlined
from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.phantom.gradient_coil import Coil
from dsiprep.phantom.interpolation import trilinear

READOUT_TIME = 0.05  # s
EDDY_SCALE = 100.0  # mm; unit of the scanner coordinates in the polynomial
EDDY_TERMS = "1, x, y, z, xy, xz, yz, x²-y², 2z²-x²-y²; scanner coordinates in units of 100 mm"
NOISE_WIDTH = 45.0  # mm
OVERSAMPLING = 2  # points per voxel along each axis
AXES = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
FIELD_OF_VIEW = (200.0, 236.0, 176.0)  # mm, left-right, anterior-posterior, superior-inferior


@dataclass(frozen=True, eq=False)
class Source:
    """The scanned object: an image and an off-resonance field in Hz, each on its own grid in the head frame."""

    image: np.ndarray
    image_grid: Grid
    field: np.ndarray
    field_grid: Grid


def scanner_grid(orientation: str, resolution: float, centre: np.ndarray) -> Grid:
    """Isotropic grid centred on `centre`, with slices along the third axis; oblique is LAS, tilted by 18 degrees."""
    codes = "LAS" if orientation == "oblique" else orientation
    directions = np.zeros((3, 3))
    extent = np.zeros(3)
    for column, code in enumerate(codes):
        row, sign = AXES[code]
        directions[row, column] = sign
        extent[column] = FIELD_OF_VIEW[row]
    if orientation == "oblique":
        directions = Rotation.from_rotvec(np.deg2rad([15.0, 4.0, 9.0])).as_matrix() @ directions
    shape = 2 * np.ceil(extent / (2 * resolution)).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = directions * resolution
    affine[:3, 3] = centre - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def phase_encoding(grid: Grid, direction: str) -> PhaseEncoding:
    """Phase encoding towards anterior ("PA") or posterior ("AP"), along the voxel axis closest to that direction."""
    axis = int(np.argmax(np.abs(grid.directions[1])))
    anterior = int(np.sign(grid.directions[1, axis]))
    return PhaseEncoding(axis, anterior if direction == "PA" else -anterior, READOUT_TIME)


def eddy_basis(points: np.ndarray) -> np.ndarray:
    """Terms 1, x, y, z, xy, xz, yz, x²-y², 2z²-x²-y² of scanner points (n, 3) in units of 100 mm: (n, 9)."""
    x, y, z = np.asarray(points, float).T / EDDY_SCALE
    return np.stack([np.ones_like(x), x, y, z, x * y, x * z, y * z, x * x - y * y, 2 * z * z - x * x - y * y], -1)


def scan(
    source: Source,
    grid: Grid,
    pe: PhaseEncoding,
    pose: np.ndarray,
    eddy: np.ndarray | None = None,
    oversampling: int = OVERSAMPLING,
    coil: Coil | None = None,
) -> np.ndarray:
    """Simulate one noise-free image.

    Parameters
    ----------
    source : Source
    grid : Grid
        Grid of the image.
    pe : PhaseEncoding
        With a readout time; with 0 or None, the field has no effect.
    pose : ndarray, (4, 4)
        From head points to scanner points, mm RAS+.
    eddy : ndarray, (9,), optional
        Coefficients of `eddy_basis` for the displacement in mm towards higher indices along the phase-encoding axis.
    oversampling : int
        Points per voxel along each axis.
    coil : Coil, optional
        With nonlinear fields: lines are those that the gradients encode, and a point of a line shows the signal and the
        field at its true position.

    Returns
    -------
    ndarray, (i, j, k), float32
        Mean signal within each voxel.
    """
    order = [a for a in range(3) if a != pe.axis] + [pe.axis]
    shape = tuple(grid.shape[a] for a in order)
    affine = grid.affine[:, [*order, 3]]
    to_head = np.linalg.inv(pose) @ affine
    size = float(grid.voxel_sizes[pe.axis])
    coefficients = np.zeros(9) if eddy is None else np.asarray(eddy, float) / size
    shift_per_hz = float(pe.readout_time or 0.0) * pe.polarity
    reach = np.abs(source.field).max() * abs(shift_per_hz) + 4 * np.abs(coefficients).sum()
    out = np.zeros(shape, np.float32)
    _push_lines(
        out,
        source.image,
        np.linalg.inv(source.image_grid.affine) @ to_head,
        source.field,
        np.linalg.inv(source.field_grid.affine) @ to_head,
        affine / EDDY_SCALE,
        (shift_per_hz, int(np.ceil(reach)) + 1, oversampling),
        coefficients,
        *_true_positions(coil, affine),
    )
    return np.ascontiguousarray(np.moveaxis(out, (0, 1, 2), order))


def _true_positions(coil: Coil | None, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Table (4, i, j, k) of shifts from encoded to true positions, in voxels, and density; its voxels from ours."""
    if coil is None:
        return np.zeros((4, 0, 0, 0), np.float32), np.eye(4)
    shift = np.einsum("ab,bijk->aijk", np.linalg.inv(affine)[:3, :3], coil.inverse[:3])
    return np.concatenate([shift, coil.inverse[3:]]).astype(np.float32), np.linalg.inv(coil.grid.affine) @ affine


def noise_map(grid: Grid, centre: np.ndarray, level: float, variation: float) -> np.ndarray:
    """Noise standard deviation, (i, j, k) float32: `level` far from the centre (mm), there `variation` times more.

    As with parallel imaging, whose noise is highest in the middle of the head; the transition is a Gaussian of 45 mm.
    """
    axes = np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij")
    squared = ((grid.to_world(np.stack(axes, -1)) - centre) ** 2).sum(-1)
    return (level * (1 + variation * np.exp(-squared / (2 * NOISE_WIDTH**2)))).astype(np.float32)


def add_noise(image: np.ndarray, sigma: float | np.ndarray, rng: np.random.Generator, coils: int = 1) -> np.ndarray:
    """Magnitude of the image plus complex Gaussian noise, float32: Rician, or the root sum of squares of several coils.

    Parameters
    ----------
    image : ndarray
    sigma : float or ndarray
        Noise standard deviation of the real and imaginary parts, the same in all coils.
    rng : Generator
    coils : int
        Without correlation. The signal lies in one of them, which has the same distribution (non-central chi of twice
        as many degrees of freedom) as signal spread over all.
    """
    sigma = np.asarray(sigma, np.float32)
    real = image + sigma * rng.standard_normal(image.shape, np.float32)
    square = real * real
    for _ in range(2 * coils - 1):
        other = sigma * rng.standard_normal(image.shape, np.float32)
        square += other * other
    return np.sqrt(square)


@inlined
def _value_at(values: np.ndarray, m: np.ndarray, a: float, b: float, p: float) -> float:
    return trilinear(
        values,
        m[0, 0] * a + m[0, 1] * b + m[0, 2] * p + m[0, 3],
        m[1, 0] * a + m[1, 1] * b + m[1, 2] * p + m[1, 3],
        m[2, 0] * a + m[2, 1] * b + m[2, 2] * p + m[2, 3],
    )


@inlined
def _eddy_displacement(c: np.ndarray, m: np.ndarray, a: float, b: float, p: float) -> float:
    x = m[0, 0] * a + m[0, 1] * b + m[0, 2] * p + m[0, 3]
    y = m[1, 0] * a + m[1, 1] * b + m[1, 2] * p + m[1, 3]
    z = m[2, 0] * a + m[2, 1] * b + m[2, 2] * p + m[2, 3]
    linear = c[0] + c[1] * x + c[2] * y + c[3] * z + c[4] * x * y + c[5] * x * z + c[6] * y * z
    return linear + c[7] * (x * x - y * y) + c[8] * (2 * z * z - x * x - y * y)


@inlined
def _true_position(table: np.ndarray, m: np.ndarray, at: np.ndarray) -> float:
    """Replace the encoded position `at` (3,), in voxels, by the true one; return the density of the signal."""
    if table.shape[1] == 0:
        return 1.0
    a, b, p = at[0], at[1], at[2]
    at[0] = a + _value_at(table[0], m, a, b, p)
    at[1] = b + _value_at(table[1], m, a, b, p)
    at[2] = p + _value_at(table[2], m, a, b, p)
    return _value_at(table[3], m, a, b, p)


@inlined
def _spread(line: np.ndarray, amount: float, first: float, second: float) -> None:
    """Distribute an amount of signal over the voxels between two points of a line."""
    low, high = min(first, second) + 0.5, max(first, second) + 0.5
    density = amount / max(high - low, 1e-9)
    for voxel in range(max(0, int(np.floor(low))), min(line.size, int(np.floor(high)) + 1)):
        overlap = min(high, voxel + 1.0) - max(low, float(voxel))
        if overlap > 0:
            line[voxel] += density * overlap


@inlined
def _end(
    field: np.ndarray,
    to_field: np.ndarray,
    world: np.ndarray,
    shift: float,
    eddy: np.ndarray,
    table: np.ndarray,
    to_table: np.ndarray,
    at: np.ndarray,
) -> float:
    """Where the end of a cell at the encoded position `at` (3,) appears along its line, in voxels."""
    e = at[2]
    _true_position(table, to_table, at)
    a, b, p = at[0], at[1], at[2]
    return e + shift * _value_at(field, to_field, a, b, p) + _eddy_displacement(eddy, world, a, b, p)


@compiled(parallel=True)
def _push_lines(
    out: np.ndarray,
    image: np.ndarray,
    to_image: np.ndarray,
    field: np.ndarray,
    to_field: np.ndarray,
    world: np.ndarray,
    steps: tuple,
    eddy: np.ndarray,
    table: np.ndarray,
    to_table: np.ndarray,
) -> None:
    """Move the signal of each cell of a finely divided line to the displaced interval between the cell's ends."""
    shift, pad, s = steps
    for line in numba.prange(out.shape[0] * out.shape[1]):
        row, column = line // out.shape[1], line % out.shape[1]
        at = np.empty(3)
        for sub in range(s * s):
            a = row + (sub // s + 0.5) / s - 0.5
            b = column + (sub % s + 0.5) / s - 0.5
            end_of, end = -1000000, 0.0  # the cell whose start is `end`
            for cell in range(-pad * s, (out.shape[2] + pad) * s):
                at[0], at[1], at[2] = a, b, (cell + 0.5) / s - 0.5
                density = _true_position(table, to_table, at)
                value = _value_at(image, to_image, at[0], at[1], at[2])
                if value <= 0:
                    continue
                if end_of != cell:
                    at[0], at[1], at[2] = a, b, cell / s - 0.5
                    end = _end(field, to_field, world, shift, eddy, table, to_table, at)
                start = end
                at[0], at[1], at[2] = a, b, (cell + 1) / s - 0.5
                end = _end(field, to_field, world, shift, eddy, table, to_table, at)
                end_of = cell + 1
                _spread(out[row, column], value * density / (s * s * s), start, end)
