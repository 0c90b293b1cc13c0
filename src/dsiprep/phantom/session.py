"""The scan session of the phantom: head poses, off-resonance field, eddy currents and signal dropout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.errors import SettingsError
from dsiprep.ops.image.affine import mean_rigid, rigid_matrix
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.phantom.gradient_coil import Coil, make_coil
from dsiprep.phantom.head import Head, slabs
from dsiprep.phantom.interpolation import interpolate
from dsiprep.phantom.k_space import fine_grid
from dsiprep.phantom.motion_within import moving_volumes, slice_poses
from dsiprep.phantom.moving_field import MovingField, make_moving_field
from dsiprep.phantom.scanner import (
    FIELD_OF_VIEW,
    READOUT_TIME,
    Source,
    eddy_basis,
    phase_encoding,
    scan,
    scanner_grid,
)
from dsiprep.phantom.settings import DEGREES_PER_MM, PhantomSettings
from dsiprep.phantom.signal import Tissue
from dsiprep.phantom.slice_acquisition import remaining_signal

N_EPIS = 3
DRIFT = 0.1  # fraction of the largest motion
SAME_GRADIENT = 0.01  # distance of unit vectors in the head up to which slices share a simulated signal
WARM_UP = 0.5  # time constant of the drift of the centre frequency as gradients heat, relative to the session
# Gaussian sources of the off-resonance field: centre (template mm), width (mm), weight. The first three are above the
# sinuses and the ear canals
FIELD_SOURCES = (
    ((0, 58, -18), 17.0, 1.0),
    ((48, -18, -32), 15.0, 0.7),
    ((-48, -18, -32), 15.0, 0.65),
    ((0, 20, 10), 40.0, -0.35),
    ((20, -60, 60), 30.0, -0.25),
    ((-25, -90, 0), 28.0, 0.2),
)


@dataclass(frozen=True, eq=False)
class Session:
    """One diffusion scan of a head.

    Attributes
    ----------
    grid : Grid
        Grid of the DWI.
    pe, reversed_pe : PhaseEncoding
        Phase encoding of the DWI (PA) and of the b=0 images of the fieldmap (AP).
    bvals : ndarray, (n,)
    bvecs : ndarray, (n, 3)
        In world RAS+ of the scanner.
    poses, epi_poses : ndarray, (n, 4, 4)
        From head points to scanner points, per volume of the DWI and of the fieldmap.
    moved : ndarray, (n,) bool
        Volumes with head motion other than drift and jitter.
    eddy : ndarray, (n, 9)
        Eddy-current displacement along the phase-encoding axis in mm, coefficients of `scanner.eddy_basis`.
    signal_fraction : ndarray, (n, slices)
        Remaining fraction of the signal of each slice.
    gain : ndarray, (n,)
        Signal of each volume relative to the first, as it drifts.
    slice_poses : ndarray, (n, slices, 4, 4), or None
        From head points to scanner points for each slice, of which `poses` are the means; None without motion within
        volumes.
    field : ndarray, (i, j, k)
        Off-resonance field in Hz on `field_grid`, a grid in the head frame.
    coil : Coil or None
        Nonlinear gradients; None for linear ones.
    moving_field : MovingField or None
        What the tilt of the head adds to `field`, on `field_grid`; None if nothing.
    """

    grid: Grid
    pe: PhaseEncoding
    reversed_pe: PhaseEncoding
    bvals: np.ndarray
    bvecs: np.ndarray
    poses: np.ndarray
    epi_poses: np.ndarray
    moved: np.ndarray
    eddy: np.ndarray
    signal_fraction: np.ndarray
    gain: np.ndarray
    field: np.ndarray
    field_grid: Grid
    coil: Coil | None = None
    slice_poses: np.ndarray | None = None
    moving_field: MovingField | None = None

    @property
    def head_bvecs(self) -> np.ndarray:
        """b-vectors in world RAS+ of the head frame, rotated by the pose of each volume, (n, 3)."""
        return rotate_bvecs(self.bvecs, self.poses)

    def acquire(self, tissue: Tissue, volume: int) -> np.ndarray:
        """Noise-free image of one volume of the DWI, (i, j, k) float32."""
        poses, gradient = self.poses[volume], (self.bvals[volume], self.bvecs[volume], self.eddy[volume])
        if self.slice_poses is not None and moving_volumes(self.slice_poses[volume][None])[0]:
            image = self._by_slice(tissue, self.slice_poses[volume], *gradient)
        else:
            image = self.image(tissue, poses, self.pe, *gradient)
        return image * (self.gain[volume] * self.signal_fraction[volume]).astype(np.float32)

    def ideal(self, tissue: Tissue, bval: float, bvec: np.ndarray) -> np.ndarray:
        """Undistorted, noise-free image at the pose of the first volume, (i, j, k) float32."""
        linear = replace(self, coil=None)
        return linear.image(tissue, self.poses[0], replace(self.pe, readout_time=0.0), bval, bvec)

    def image(
        self,
        tissue: Tissue,
        pose: np.ndarray,
        pe: PhaseEncoding,
        bval: float = 0.0,
        bvec: np.ndarray | None = None,
        eddy: np.ndarray | None = None,
    ) -> np.ndarray:
        """Simulate one noise-free image; `bvec` is in the scanner frame and is rotated into the head frame."""
        prescribed = np.zeros(3) if bvec is None else bvec
        if self.coil is None or bval == 0:
            signal = tissue.signal(bval, pose[:3, :3].T @ prescribed)
        else:
            signal = tissue.signal_of(bval, self.coil.gradients(prescribed, pose, tissue.grid))
        source = Source(signal, tissue.grid, self.field_at(pose), self.field_grid)
        return scan(source, self.grid, pe, pose, eddy, coil=self.coil)

    def field_at(self, pose: np.ndarray) -> np.ndarray:
        """Off-resonance field (Hz) of a head at `pose`, on `field_grid`."""
        return self.field if self.moving_field is None else self.field + self.moving_field.change(pose[:3, :3])

    def _by_slice(
        self, tissue: Tissue, poses: np.ndarray, bval: float, bvec: np.ndarray, eddy: np.ndarray
    ) -> np.ndarray:
        """Simulate one noise-free image whose slices have poses of their own, (slices, 4, 4)."""
        out = np.zeros(self.grid.shape, np.float32)
        gradients = poses[:, :3, :3].transpose(0, 2, 1) @ bvec
        left = np.ones(len(poses), bool)
        while left.any():
            first = gradients[np.flatnonzero(left)[0]]
            near = left & (np.linalg.norm(gradients - first, axis=1) <= SAME_GRADIENT)
            signal = tissue.signal(bval, gradients[near].mean(0))
            for number in np.flatnonzero(near):
                source = Source(signal, tissue.grid, self.field_at(poses[number]), self.field_grid)
                out[..., number] = scan(source, self._slice_grid(int(number)), self.pe, poses[number], eddy)[..., 0]
            left &= ~near
        return out

    def _slice_grid(self, number: int) -> Grid:
        """Grid of one slice."""
        affine = self.grid.affine.copy()
        affine[:3, 3] += number * affine[:3, 2]
        return Grid((self.grid.shape[0], self.grid.shape[1], 1), affine)

    def refined(self) -> Session:
        """The same session on a grid that is finer in the plane of the slices, for images from k-space."""
        fine = fine_grid(self.grid)
        ratio = fine.shape[self.pe.axis] / self.grid.shape[self.pe.axis]
        encodings = [replace(pe, readout_time=(pe.readout_time or 0) * ratio) for pe in (self.pe, self.reversed_pe)]
        return replace(self, grid=fine, pe=encodings[0], reversed_pe=encodings[1])


def plan_session(
    head: Head, table: tuple[np.ndarray, np.ndarray], settings: PhantomSettings, rng: np.random.Generator
) -> Session:
    """Draw the random parameters of a session with the b-table `table` from `schemes.load_scheme`.

    Raises
    ------
    SettingsError
        If the distortion would fold the image.
    """
    start_pose = rigid_matrix(_rigid_vectors(rng.uniform(-4, 4, (1, 6)), 1.0)[0], head.centre)
    grid = scanner_grid(settings.orientation, settings.resolution, head.centre + rng.uniform(-2, 2, 3))
    pe = phase_encoding(grid, "PA")
    bvals, bvecs = table[0], from_fsl(table[1], grid) if "," in settings.scheme else table[1]
    motion, moved = _motion(len(bvals), settings, rng)
    epi_motion = DRIFT * (rng.uniform(-1, 1, 6) + rng.uniform(-0.05, 0.05, (N_EPIS, 6))) * settings.max_motion
    mm_per_hz = float(grid.voxel_sizes[pe.axis]) * READOUT_TIME
    field, field_grid = make_field(head, settings.distortion, mm_per_hz)
    tilted = (head, field_grid, start_pose[:3, :3], settings.moving_field, mm_per_hz)
    points = head.brain_points() @ start_pose[:3, :3].T + start_pose[:3, 3]
    session = Session(
        grid=grid,
        pe=pe,
        reversed_pe=phase_encoding(grid, "AP"),
        bvals=bvals,
        bvecs=bvecs,
        poses=rigid_matrix(_rigid_vectors(motion), head.centre) @ start_pose,
        epi_poses=rigid_matrix(_rigid_vectors(epi_motion), head.centre) @ start_pose,
        moved=moved,
        eddy=_eddy_currents(bvals, bvecs, points, settings, rng),
        signal_fraction=remaining_signal(bvals, grid.shape[2], settings.dropout, rng),
        gain=1 - settings.signal_drift * np.linspace(0, 1, len(bvals)) ** 0.7,
        field=field,
        field_grid=field_grid,
        coil=make_coil(points, settings.gradient_nonlinearity) if settings.gradient_nonlinearity else None,
        moving_field=make_moving_field(*tilted) if settings.moving_field else None,
    )
    if not (settings.moved_within or settings.steady):
        return session
    by_slice = slice_poses(session.poses, grid.shape[2], points, settings, rng.spawn(1)[0])
    return replace(session, slice_poses=by_slice, poses=np.stack([mean_rigid(poses) for poses in by_slice]))


def make_field(head: Head, largest_mm: float, mm_per_hz: float) -> tuple[np.ndarray, Grid]:
    """Off-resonance field in Hz on a 3 mm grid in the head frame, with zero mean in the brain, and the grid.

    Parameters
    ----------
    largest_mm : float
        Largest displacement in the brain.
    mm_per_hz : float
        Displacement per Hz: voxel size times readout time.

    Raises
    ------
    SettingsError
        If the distortion would fold the image.
    """
    grid = head.box(np.asarray(FIELD_OF_VIEW) + 100, 3.0)
    field = np.zeros(grid.shape, np.float32)
    for rows, points in slabs(grid):
        template = head.to_template(points)
        values = sum(
            weight * np.exp(-((template - centre) ** 2).sum(1) / (2 * width**2))
            for centre, width, weight in FIELD_SOURCES
        )
        field[rows] = values.reshape(-1, *grid.shape[1:])
    inside = interpolate(field, grid, head.brain_points(3))
    field = (field - inside.mean()) * (largest_mm / mm_per_hz / np.abs(inside - inside.mean()).max())
    steepest = mm_per_hz * max(float(np.abs(np.gradient(field, 3.0, axis=a)).max()) for a in range(3))
    if steepest > 0.9:
        raise SettingsError(
            f"--distortion {largest_mm}: the image would fold; use at most {0.8 / steepest * largest_mm:.1f}"
        )
    return field.astype(np.float32), grid


def _rigid_vectors(motion: np.ndarray, degrees_per_mm: float = DEGREES_PER_MM) -> np.ndarray:
    """Rotation vectors (rad) and translations (mm) from six values in mm, the first three as rotations."""
    return np.concatenate([np.deg2rad(degrees_per_mm) * motion[..., :3], motion[..., 3:]], axis=-1)


def to_fsl(bvecs: np.ndarray, grid: Grid) -> np.ndarray:
    """Convert b-vectors (n, 3) from world RAS+ to FSL's frame: the image axes, the first reversed if right-handed."""
    components = bvecs @ grid.directions
    return components * ([-1, 1, 1] if np.linalg.det(grid.affine[:3, :3]) > 0 else [1, 1, 1])


def from_fsl(bvecs: np.ndarray, grid: Grid) -> np.ndarray:
    """Convert b-vectors (n, 3) from FSL's frame to world RAS+, the inverse of `to_fsl`."""
    components = bvecs * ([-1, 1, 1] if np.linalg.det(grid.affine[:3, :3]) > 0 else [1, 1, 1])
    return components @ np.linalg.inv(grid.directions)


def _motion(count: int, settings: PhantomSettings, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Motion parameters in mm per volume, (n, 6), and the moved volumes, (n,); the first volume does not move."""
    time = np.linspace(0, 1, count)[:, None]
    drift = sum(rng.normal(size=6) * np.sin(np.pi * k * time / 2) / k for k in (1, 2, 3))
    drift = DRIFT * settings.max_motion * drift / max(float(np.abs(drift).max()), 1e-9)
    moved = np.zeros(count, bool)
    moved[1 + rng.choice(count - 1, round(settings.moved * (count - 1)), replace=False)] = True
    jumps = rng.uniform(-settings.max_motion, settings.max_motion, (count, 6))
    jitter = settings.jitter * rng.spawn(1)[0].normal(size=(count, 6))
    jitter[0] = 0
    return drift + moved[:, None] * jumps + jitter, moved


def _eddy_currents(
    bvals: np.ndarray, bvecs: np.ndarray, points: np.ndarray, settings: PhantomSettings, rng: np.random.Generator
) -> np.ndarray:
    """Coefficients (n, 9): eddy currents, linear in the gradient and largest at the given points, shifts and drift."""
    response = rng.normal(size=(9, 3)) * np.array([0.3, 1, 1, 1, 0.4, 0.4, 0.4, 0.4, 0.2])[:, None]
    strength = np.sqrt(bvals / max(float(bvals.max()), 1.0))
    coefficients = (strength[:, None] * bvecs) @ response.T
    largest = np.abs(eddy_basis(points) @ coefficients.T).max()
    coefficients = coefficients * (settings.eddy / max(float(largest), 1e-9))
    if settings.eddy_constant:
        shift = strength * (bvecs @ rng.spawn(1)[0].normal(size=3))
        coefficients[:, 0] += settings.eddy_constant * shift / np.abs(shift).max()
    if settings.drift:
        warmth = 1 - np.exp(-np.linspace(0, 1, len(bvals)) / WARM_UP)
        coefficients[:, 0] += settings.drift * warmth / warmth[-1]
    return coefficients
