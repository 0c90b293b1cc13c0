"""Read derivatives and ground truth. Transforms are read with SimpleITK, independently of the code that writes them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import map_coordinates

from dsiprep.errors import InputError

LPS = np.array([-1.0, -1.0, 1.0])
SLICE_POSES = "slice_head_to_scanner.npy"  # of phantoms that move within volumes


class MissingDerivativeError(Exception):
    """A derivative is missing; the scores that depend on it are omitted, with this message as the reason."""


@dataclass(frozen=True, eq=False)
class Image:
    """Voxels (i, j, k[, n]) and the affine to world RAS+."""

    data: np.ndarray
    affine: np.ndarray

    def at(self, points: np.ndarray, order: int = 1) -> np.ndarray:
        """Sample at world points (n, 3) in mm RAS+: (n,) or (n, m); outside, the value of the nearest voxel."""
        inverse = np.linalg.inv(self.affine)
        voxels = (points @ inverse[:3, :3].T + inverse[:3, 3]).T
        if self.data.ndim == 3:
            return map_coordinates(self.data, voxels, order=order, mode="nearest")
        channels = [self.data[..., m] for m in range(self.data.shape[3])]
        return np.stack([map_coordinates(c, voxels, order=order, mode="nearest") for c in channels], -1)

    def covers(self, points: np.ndarray) -> np.ndarray:
        """Whether world points (n, 3) are within the outermost voxel centres, (n,) bool."""
        inverse = np.linalg.inv(self.affine)
        voxels = points @ inverse[:3, :3].T + inverse[:3, 3]
        return np.all((voxels >= 0) & (voxels <= np.array(self.data.shape[:3]) - 1), axis=1)

    def points(self, mask: np.ndarray, count: int = 4000) -> np.ndarray:
        """World points (n, 3) of about `count` evenly chosen voxels of `mask`."""
        index = np.argwhere(mask)
        index = index[:: max(1, len(index) // count)]
        return index @ self.affine[:3, :3].T + self.affine[:3, 3]


def read_image(path: Path) -> Image:
    """Read a NIfTI image as float32."""
    image = nib.Nifti1Image.from_filename(path)
    return Image(np.asarray(image.dataobj, np.float32), np.asarray(image.affine, float))


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground-truth folder of a phantom."""

    folder: Path
    table: dict[str, Any]

    @property
    def poses(self) -> np.ndarray:
        """From head points to scanner points, (n, 4, 4)."""
        return np.asarray(self.table["head_to_scanner"], float)

    @property
    def slice_poses(self) -> np.ndarray:
        """From head points to scanner points for each slice, (n, slices, 4, 4)."""
        path = self.folder / SLICE_POSES
        if path.is_file():
            return np.load(path)
        return np.repeat(self.poses[:, None], self.table["grid_shape"][2], axis=1)

    @property
    def moved_within(self) -> np.ndarray:
        """Volumes during which the head moved, (n,) bool."""
        if not (self.folder / SLICE_POSES).is_file():
            return np.zeros(len(self.poses), bool)
        return np.ptp(self.slice_poses, axis=1).max(axis=(1, 2)) > 1e-9

    @property
    def bvals(self) -> np.ndarray:
        """b-values in s/mm², (n,)."""
        return np.asarray(self.table["bvals"], float)

    @property
    def centre(self) -> np.ndarray:
        """Centre of the brain in the head frame, mm, (3,)."""
        return np.asarray(self.table["brain_centre"], float)

    def image(self, name: str) -> Image:
        """Read one of the ground-truth images."""
        return read_image(self.folder / f"{name}.nii.gz")

    def brain_points(self) -> np.ndarray:
        """About 4000 brain points in the head frame, (n, 3)."""
        mask = self.image("T1w_brain_mask")
        return mask.points(mask.data > 0.5)

    @property
    def mm_per_hz(self) -> np.ndarray:
        """Displacement per Hz of off-resonance, mm in world RAS+, (3,)."""
        direction = self.table["phase_encoding_direction"]
        column = np.asarray(self.table["grid_affine"], float)[:3, "ijk".index(direction[0])]
        return column * self.table["readout_time_s"] * (-1 if direction.endswith("-") else 1)

    def eddy(self, volume: int, points: np.ndarray) -> np.ndarray:
        """Eddy-current displacement of scanner points (n, 3), mm towards higher indices, (n,)."""
        x, y, z = points.T / 100
        terms = [np.ones_like(x), x, y, z, x * y, x * z, y * z, x * x - y * y, 2 * z * z - x * x - y * y]
        return np.asarray(self.table["eddy_mm"][volume], float) @ np.stack(terms)

    def distorted(self, points: np.ndarray, field: Image, pose: np.ndarray) -> np.ndarray:
        """Apparent scanner positions of head points (n, 3) for a head at `pose`, without eddy currents."""
        true = apply(pose, points)
        apparent = true + (field.at(points) + self.field_change(points, pose))[:, None] * self.mm_per_hz
        return apparent + self.gradient_displacement.at(true) if self.gradient_displacement else apparent

    @cached_property
    def moving_field(self) -> Image | None:
        """Six components (Hz) of a field that changes with the tilt of the head; None if it moves rigidly."""
        known = (self.folder / "moving_field_hz.nii.gz").is_file()
        return self.image("moving_field_hz") if known else None

    def field_change(self, points: np.ndarray, pose: np.ndarray) -> np.ndarray:
        """Change of the field (Hz) at head points (n, 3) for a head at `pose`, (n,).

        The dipoles of a susceptibility make the field -n' F n along the direction n of the main field.
        """
        if self.moving_field is None:
            return np.zeros(len(points))
        xx, yy, zz, xy, xz, yz = self.moving_field.at(points).T
        forms = np.moveaxis(np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]), -1, 0)
        now, before = (np.asarray(m, float)[2, :3] for m in (pose, self.table["moving_field_reference"]))
        return np.einsum("a,nab,b->n", before, forms, before) - np.einsum("a,nab,b->n", now, forms, now)

    @property
    def tilt(self) -> np.ndarray:
        """Angle (degrees) of the head to the main field, z of the scanner, from that of the first volume, (n,)."""
        directions = self.poses[:, 2, :3]
        return np.rad2deg(np.arccos(np.clip(directions @ directions[0], -1, 1)))

    @cached_property
    def gradient_displacement(self) -> Image | None:
        """Displacement of scanner points by nonlinear gradients, mm RAS+; None if they were linear."""
        known = (self.folder / "gradient_displacement.nii.gz").is_file()
        return self.image("gradient_displacement") if known else None


def read_truth(folder: Path) -> Truth:
    """Open the ground truth of a phantom.

    Raises
    ------
    InputError
        If the folder has no ground truth.
    """
    path = Path(folder) / "truth.json"
    if not path.is_file():
        raise InputError(f"{folder}: no truth.json; give the truth folder that `dsiprep-tools phantom` wrote")
    return Truth(Path(folder), json.loads(path.read_text()))


def find(derivatives: Path, pattern: str) -> Path:
    """The only file under `derivatives` that matches; raises a MissingDerivativeError unless there is exactly one."""
    found = sorted(path for path in Path(derivatives).rglob(pattern) if path.is_file())
    if len(found) != 1:
        raise MissingDerivativeError(f"not compared: {len(found) or 'no'} {'files' if found else 'file'} {pattern}")
    return found[0]


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply an affine (4, 4) to points (n, 3)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def read_mapping(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Read any ITK transform as a map of RAS+ points (n, 3)."""
    import SimpleITK

    transform = SimpleITK.ReadTransform(str(path))

    def mapping(points: np.ndarray) -> np.ndarray:
        mapped = [transform.TransformPoint(point) for point in (np.asarray(points, float) * LPS).tolist()]
        return np.asarray(mapped) * LPS

    return mapping


def read_matrix(path: Path) -> np.ndarray:
    """Read a linear ITK transform as a (4, 4) matrix on RAS+ points, from the images of four points."""
    return _matrix_of(read_mapping(path))


def read_mappings(path: Path) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Read a text file of ITK transforms, each as a map of RAS+ points (n, 3)."""
    maps = []
    with tempfile.TemporaryDirectory() as folder:
        single = Path(folder) / "single.txt"
        for block in path.read_text().split("#Transform ")[1:]:
            body = block.split("\n", 1)[1]
            single.write_text(f"#Insight Transform File V1.0\n#Transform 0\n{body}")
            maps.append(read_mapping(single))
    return maps


def read_matrices(path: Path) -> np.ndarray:
    """Read a text file of linear ITK transforms, (n, 4, 4) on RAS+ points."""
    return np.stack([_matrix_of(mapping) for mapping in read_mappings(path)])


def linear_part(mapping: Callable[[np.ndarray], np.ndarray], distance: float = 1e5) -> np.ndarray:
    """Matrix (4, 4) of a map outside its displacement fields, evaluated `distance` mm away along each axis."""
    return _matrix_of(mapping, np.array([distance, distance, distance]))


def _matrix_of(mapping: Callable[[np.ndarray], np.ndarray], origin: np.ndarray | None = None) -> np.ndarray:
    start = np.zeros(3) if origin is None else origin
    spacing = 100.0
    mapped = mapping(np.concatenate([start[None], start + spacing * np.eye(3)]))
    matrix = np.eye(4)
    matrix[:3, :3] = (mapped[1:] - mapped[0]).T / spacing
    matrix[:3, 3] = mapped[0] - matrix[:3, :3] @ start
    return matrix


def read_image_affine(path: Path) -> np.ndarray:
    """Affine (4, 4) of a NIfTI image, read without its voxels."""
    return np.asarray(nib.Nifti1Image.from_filename(path).affine, float)
