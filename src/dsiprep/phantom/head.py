"""A person's head: the ICBM152 brain, bent, posed, and given CSF, skull, scalp, eyes, sinuses and a neck.

Template points are those of MNI152NLin2009aSym; head points are those of the T1w. Both are RAS+ mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial.transform import Rotation

from dsiprep.data.grid import Grid
from dsiprep.errors import InputError
from dsiprep.phantom.interpolation import read

TEMPLATE = "MNI152NLin2009aSym"
BRAIN_CENTRE = np.array([0.0, -18.0, 6.0])  # of the template's brain
CORD = np.array([0.0, -38.0])  # x, y of the spinal cord under the template's brainstem

# Fractions of one voxel: what `Head.maps` gives besides "t1"
TISSUES = ("csf", "gm", "wm", "fluid", "bone", "marrow", "fat", "muscle", "air")

# Solids of the face and neck: centre and radii in mm
AIR = (
    ((0, 66, -55), (11, 20, 20)),
    ((28, 50, -70), (12, 14, 14)),
    ((-28, 50, -70), (12, 14, 14)),
    ((0, 76, -22), (14, 5, 8)),
    ((0, 22, -48), (9, 10, 8)),
    ((60, -26, -44), (7, 8, 9)),
    ((-60, -26, -44), (7, 8, 9)),
    ((0, 6, -105), (9, 8, 40)),
)
EYES = (((32, 64, -40), (12.5, 12.5, 12.5)), ((-32, 64, -40), (12.5, 12.5, 12.5)))
FACE = ((0, 28, -72), (62, 70, 62))
NECK = ((0, -30, -150), (52, 58, 120))


@dataclass(frozen=True, eq=False)
class Head:
    """One person's head as continuous maps.

    Attributes
    ----------
    pose : ndarray, (4, 4)
        Affine from bent template points y to head points.
    bend : ndarray, (3, i, j, k)
        Displacement in mm on `bend_grid`: template point = y + bend(y).
    atlas : dict of ndarray
        Maps on `atlas_grid` (1 mm): t1 (0 to 1), gm, wm, brain (0 to 1).
    distance : ndarray
        Signed distance in mm to the inside of the skull, on `wide_grid` (2 mm); positive outside.
    texture : ndarray
        Smooth noise, unit variance, on `wide_grid`.
    """

    pose: np.ndarray
    bend: np.ndarray
    bend_grid: Grid
    atlas: dict[str, np.ndarray]
    atlas_grid: Grid
    distance: np.ndarray
    texture: np.ndarray
    wide_grid: Grid

    @cached_property
    def centre(self) -> np.ndarray:
        """Where the middle of the brain is in the head frame, mm, (3,)."""
        return self.to_head(BRAIN_CENTRE[None])[0]

    def to_template(self, points: np.ndarray) -> np.ndarray:
        """Head points (n, 3) to template points (n, 3)."""
        inverse = np.linalg.inv(self.pose)
        bent = points @ inverse[:3, :3].T + inverse[:3, 3]
        return bent + self._bend_at(bent)

    def to_head(self, points: np.ndarray) -> np.ndarray:
        """Template points (n, 3) to head points (n, 3), by fixed-point iteration to below 0.001 mm."""
        bent = np.array(points, float)
        for _ in range(100):
            step = points - self._bend_at(bent) - bent
            bent = bent + step
            if np.abs(step).max() < 1e-3:
                break
        return bent @ self.pose[:3, :3].T + self.pose[:3, 3]

    def brain_points(self, every: int = 5) -> np.ndarray:
        """Head points of the brain, (n, 3), those of each `every`-th template voxel along each axis."""
        index = np.argwhere(self.atlas["brain"][::every, ::every, ::every] > 0.5) * every
        return self.to_head(self.atlas_grid.to_world(index))

    def box(self, extent: np.ndarray, spacing: float) -> Grid:
        """A grid along the axes of the head frame, around the middle of the brain."""
        shape = np.ceil(np.asarray(extent) / spacing).astype(int)
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = self.centre - (shape - 1) / 2 * spacing
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)

    def maps(self, grid: Grid, names: tuple[str, ...] = ("t1", "brain", *TISSUES)) -> dict[str, np.ndarray]:
        """Tissue fractions, "brain" and "t1" (0 to 1) on a grid of the head frame, float32 (i, j, k)."""
        out = {name: np.zeros(grid.shape, np.float32) for name in names}
        for rows, points in slabs(grid):
            fractions = self._fractions(self.to_template(points))
            for name in names:
                out[name][rows] = fractions[name].reshape(-1, *grid.shape[1:])
        return out

    def _bend_at(self, points: np.ndarray) -> np.ndarray:
        return np.stack([read(component, self.bend_grid, points, nearest=True) for component in self.bend], -1)

    def _fractions(self, t: np.ndarray) -> dict[str, np.ndarray]:
        """All maps at template points (n, 3). What is named first has the right of way."""
        brain, gm, wm, t1 = (read(self.atlas[n], self.atlas_grid, t) for n in ("brain", "gm", "wm", "t1"))
        distance = read(self.distance, self.wide_grid, t, nearest=True)
        texture = read(self.texture, self.wide_grid, t, nearest=True)
        left = 1 - brain
        out = {"t1": t1, "brain": brain, "gm": gm, "wm": wm, "csf": np.clip(brain - gm - wm, 0, 1)}

        def take(amount: np.ndarray) -> np.ndarray:
            nonlocal left
            taken = left * amount
            left = left - taken
            return taken

        below = np.linalg.norm(t[:, :2] - CORD, axis=1)
        neck_bones = step(-66 - t[:, 2])
        out["wm"] = out["wm"] + take(step(5 - below) * neck_bones)
        out["csf"] = out["csf"] + take(np.maximum(step(2.5 - distance), step(8 - below) * neck_bones))
        out["fluid"] = take(_any(EYES, t))
        out["air"] = take(_any(AIR, t))
        out["marrow"] = take(step(distance - 4.5) * step(7.5 - distance) * 0.8)
        out["bone"] = take(np.maximum(step(9 - distance), step(14 - below) * neck_bones * 0.8))
        depth = np.maximum(15 - distance, np.maximum(_depth(*FACE, t), _depth(*NECK, t)))
        inside = step(depth)
        fatty = np.maximum(step(6 - depth), step(texture - 1.0, 0.5))
        out["fat"] = take(inside * fatty)
        out["muscle"] = take(inside)
        out["air"] = out["air"] + left
        return out


def make_head(rng: np.random.Generator, bend: float = 4.0) -> Head:
    """Draw a person: a smooth deformation with a standard deviation of `bend` / 2 mm, sizes and a pose.

    The pose has up to 6 degrees about, and 12 mm along each axis, and scales from 0.95 to 1.05.
    """
    atlas, grid = load_atlas()
    wide = Grid((124, 142, 136), np.array([[2.0, 0, 0, -123], [0, 2, 0, -150], [0, 0, 2, -140], [0, 0, 0, 1]]))
    coarse = wide.at_spacing(4.0)
    field = np.stack([_smooth_noise(rng, coarse, 22.0) for _ in range(3)])
    distance = _skull_distance(atlas["brain"], grid, wide)
    pose = np.eye(4)
    pose[:3, :3] = _rotation(rng.uniform(-6, 6, 3)) @ np.diag(rng.uniform(0.95, 1.05, 3))
    pose[:3, 3] = rng.uniform(-12, 12, 3) + BRAIN_CENTRE - pose[:3, :3] @ BRAIN_CENTRE
    return Head(pose, 0.5 * bend * field, coarse, atlas, grid, distance, _smooth_noise(rng, wide, 4.0), wide)


def load_atlas() -> tuple[dict[str, np.ndarray], Grid]:
    """The ICBM152 2009a symmetric T1 brain and tissues that nilearn carries, 1 mm, each 0 to 1, float32.

    The tissue maps are an average of 152 people; squaring before normalising makes them as crisp as one
    person's.
    """
    spec = find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise InputError("the phantom's brain is read from the package nilearn, which is not installed")
    folder = Path(spec.origin).parent / "datasets" / "data"
    files = [folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in ("t1", "gm", "wm")]
    images = [nib.Nifti1Image.from_filename(file) for file in files]
    t1, gm, wm = (np.asanyarray(image.dataobj).astype(np.float32) / 255 for image in images)
    brain = (t1 > 0.02).astype(np.float32)
    csf = np.clip(brain - gm - wm, 0, 1)
    total = gm**2 + wm**2 + csf**2 + 1e-6
    gm, wm = brain * gm**2 / total, brain * wm**2 / total
    crisp = 0.28 * (brain - gm - wm) + 0.66 * gm + 0.98 * wm
    maps = {"t1": 0.5 * (t1 * brain + crisp), "gm": gm, "wm": wm, "brain": brain}
    contiguous = {name: np.ascontiguousarray(image, np.float32) for name, image in maps.items()}
    return contiguous, Grid(t1.shape, np.asarray(images[0].affine, float))


def slabs(grid: Grid, points_each: int = 1_000_000) -> Iterator[tuple[slice, np.ndarray]]:
    """World points of a grid in slabs along its first axis: the rows, and (n, 3) points."""
    rows = max(1, points_each // int(np.prod(grid.shape[1:])))
    for start in range(0, grid.shape[0], rows):
        stop = min(grid.shape[0], start + rows)
        axes = (np.arange(start, stop), np.arange(grid.shape[1]), np.arange(grid.shape[2]))
        voxels = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        yield slice(start, stop), grid.to_world(voxels)


def step(x: np.ndarray, width: float = 1.0) -> np.ndarray:
    """0 below zero, 1 above, a ramp of `width` mm between."""
    return np.clip(0.5 + x / width, 0, 1)


def _any(solids: tuple, points: np.ndarray) -> np.ndarray:
    return np.max([step(_depth(centre, radii, points)) for centre, radii in solids], axis=0)


def _depth(centre: tuple, radii: tuple, points: np.ndarray) -> np.ndarray:
    """About how many mm inside an ellipsoid the points are; negative outside."""
    scaled = sum(((points[:, a] - centre[a]) / radii[a]) ** 2 for a in range(3))
    return (1 - np.sqrt(scaled)) * min(radii)


def _skull_distance(brain: np.ndarray, grid: Grid, wide: Grid, closing: float = 12.0) -> np.ndarray:
    """Distance in mm to the brain with its sulci and hollows closed, negative inside, on `wide`."""
    mask = np.zeros(wide.shape, bool)
    for rows, points in slabs(wide):
        mask[rows] = read(brain, grid, points).reshape(-1, *wide.shape[1:]) > 0.5
    spacing = wide.voxel_sizes
    grown = distance_transform_edt(~mask, sampling=spacing) <= closing
    closed = distance_transform_edt(grown, sampling=spacing) > closing
    signed = distance_transform_edt(~closed, sampling=spacing) - distance_transform_edt(closed, sampling=spacing)
    return gaussian_filter(signed.astype(np.float32), 1.0)


def _smooth_noise(rng: np.random.Generator, grid: Grid, sigma_mm: float) -> np.ndarray:
    """Noise smoothed over `sigma_mm`, unit standard deviation."""
    noise = gaussian_filter(rng.standard_normal(grid.shape, np.float32), sigma_mm / grid.voxel_sizes)
    return noise / noise.std()


def _rotation(degrees: np.ndarray) -> np.ndarray:
    return Rotation.from_rotvec(np.deg2rad(degrees)).as_matrix()
