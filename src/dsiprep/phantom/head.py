"""The head of the phantom: the ICBM152 brain, deformed and posed, with CSF, skull, scalp, eyes, sinuses and neck.

Template points are in MNI152NLin2009aSym space and head points in the space of the T1w, both in RAS+ mm.
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
from dsiprep.phantom.interpolation import interpolate

TEMPLATE = "MNI152NLin2009aSym"
BRAIN_CENTRE = np.array([0.0, -18.0, 6.0])  # of the template brain, mm
CORD = np.array([0.0, -38.0])  # x, y of the spinal cord below the brainstem of the template, mm

# Tissue fractions that `Head.maps` returns, besides "t1" and "brain"
TISSUES = ("csf", "gm", "wm", "fluid", "bone", "marrow", "fat", "muscle", "air")

# Ellipsoids of the face and neck: centre and radii in mm, template space
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
    """The head of one subject as continuous maps.

    Attributes
    ----------
    pose : ndarray, (4, 4)
        Affine from deformed template points y to head points.
    deformation : ndarray, (3, i, j, k)
        Displacement u in mm on `deformation_grid`: template point = y + u(y).
    atlas : dict of ndarray
        Maps on `atlas_grid` (1 mm): t1, gm, wm and brain, each 0 to 1.
    distance : ndarray
        Signed distance in mm to the inner surface of the skull, on `wide_grid` (2 mm); positive outside.
    texture : ndarray
        Smooth noise of unit variance, on `wide_grid`.
    """

    pose: np.ndarray
    deformation: np.ndarray
    deformation_grid: Grid
    atlas: dict[str, np.ndarray]
    atlas_grid: Grid
    distance: np.ndarray
    texture: np.ndarray
    wide_grid: Grid

    @cached_property
    def centre(self) -> np.ndarray:
        """Centre of the brain in the head frame, mm, (3,)."""
        return self.to_head(BRAIN_CENTRE[None])[0]

    def to_template(self, points: np.ndarray) -> np.ndarray:
        """Map head points (n, 3) to template points (n, 3)."""
        inverse = np.linalg.inv(self.pose)
        deformed = points @ inverse[:3, :3].T + inverse[:3, 3]
        return deformed + self._deformation_at(deformed)

    def to_head(self, points: np.ndarray) -> np.ndarray:
        """Map template points (n, 3) to head points (n, 3) by fixed-point iteration, accurate to 0.001 mm."""
        deformed = np.array(points, float)
        for _ in range(100):
            change = points - self._deformation_at(deformed) - deformed
            deformed = deformed + change
            if np.abs(change).max() < 1e-3:
                break
        return deformed @ self.pose[:3, :3].T + self.pose[:3, 3]

    def brain_points(self, every: int = 5) -> np.ndarray:
        """Head points (n, 3) of the brain, from every `every`-th template voxel along each axis."""
        index = np.argwhere(self.atlas["brain"][::every, ::every, ::every] > 0.5) * every
        return self.to_head(self.atlas_grid.to_world(index))

    def box(self, extent: np.ndarray, spacing: float) -> Grid:
        """A grid along the axes of the head frame, centred on the brain; `extent` and `spacing` in mm."""
        shape = np.ceil(np.asarray(extent) / spacing).astype(int)
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = self.centre - (shape - 1) / 2 * spacing
        return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)

    def maps(self, grid: Grid, names: tuple[str, ...] = ("t1", "brain", *TISSUES)) -> dict[str, np.ndarray]:
        """Tissue fractions, "brain" and "t1", each 0 to 1, on a grid in the head frame, float32 (i, j, k)."""
        out = {name: np.zeros(grid.shape, np.float32) for name in names}
        for rows, points in slabs(grid):
            fractions = self._fractions(self.to_template(points))
            for name in names:
                out[name][rows] = fractions[name].reshape(-1, *grid.shape[1:])
        return out

    def _deformation_at(self, points: np.ndarray) -> np.ndarray:
        return np.stack(
            [interpolate(component, self.deformation_grid, points, nearest=True) for component in self.deformation], -1
        )

    def _fractions(self, t: np.ndarray) -> dict[str, np.ndarray]:
        """All maps at template points (n, 3); tissues assigned first take precedence."""
        brain, gm, wm, t1 = (interpolate(self.atlas[n], self.atlas_grid, t) for n in ("brain", "gm", "wm", "t1"))
        distance = interpolate(self.distance, self.wide_grid, t, nearest=True)
        texture = interpolate(self.texture, self.wide_grid, t, nearest=True)
        remaining = 1 - brain
        out = {"t1": t1, "brain": brain, "gm": gm, "wm": wm, "csf": np.clip(brain - gm - wm, 0, 1)}

        def assign(fraction: np.ndarray) -> np.ndarray:
            nonlocal remaining
            assigned = remaining * fraction
            remaining = remaining - assigned
            return assigned

        cord_distance = np.linalg.norm(t[:, :2] - CORD, axis=1)
        is_neck = ramp(-66 - t[:, 2])
        out["wm"] = out["wm"] + assign(ramp(5 - cord_distance) * is_neck)
        out["csf"] = out["csf"] + assign(np.maximum(ramp(2.5 - distance), ramp(8 - cord_distance) * is_neck))
        out["fluid"] = assign(_union(EYES, t))
        out["air"] = assign(_union(AIR, t))
        out["marrow"] = assign(ramp(distance - 4.5) * ramp(7.5 - distance) * 0.8)
        out["bone"] = assign(np.maximum(ramp(9 - distance), ramp(14 - cord_distance) * is_neck * 0.8))
        depth = np.maximum(15 - distance, np.maximum(_depth(*FACE, t), _depth(*NECK, t)))
        inside = ramp(depth)
        fat_fraction = np.maximum(ramp(6 - depth), ramp(texture - 1.0, 0.5))
        out["fat"] = assign(inside * fat_fraction)
        out["muscle"] = assign(inside)
        out["air"] = out["air"] + remaining
        return out


def make_head(rng: np.random.Generator, deformation: float = 4.0) -> Head:
    """Draw a random subject: a smooth deformation with a standard deviation of `deformation` / 2 mm, and a pose.

    The pose consists of up to 6 degrees about and 12 mm along each axis, and scale factors from 0.95 to 1.05.
    """
    atlas, grid = load_atlas()
    wide = Grid((124, 142, 136), np.array([[2.0, 0, 0, -123], [0, 2, 0, -150], [0, 0, 2, -140], [0, 0, 0, 1]]))
    coarse = wide.at_spacing(4.0)
    field = np.stack([_smooth_noise(rng, coarse, 22.0) for _ in range(3)])
    distance = _skull_distance(atlas["brain"], grid, wide)
    pose = np.eye(4)
    pose[:3, :3] = _rotation(rng.uniform(-6, 6, 3)) @ np.diag(rng.uniform(0.95, 1.05, 3))
    pose[:3, 3] = rng.uniform(-12, 12, 3) + BRAIN_CENTRE - pose[:3, :3] @ BRAIN_CENTRE
    return Head(pose, 0.5 * deformation * field, coarse, atlas, grid, distance, _smooth_noise(rng, wide, 4.0), wide)


def load_atlas() -> tuple[dict[str, np.ndarray], Grid]:
    """The ICBM152 2009a symmetric T1 brain and tissues bundled with nilearn, 1 mm, each 0 to 1, float32.

    The tissue maps are an average of 152 subjects; squaring before normalising makes them as sharp as those of a single
    subject.
    """
    spec = find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise InputError("the phantom uses the brain bundled with nilearn, which is not installed; pip install nilearn")
    folder = Path(spec.origin).parent / "datasets" / "data"
    files = [folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in ("t1", "gm", "wm")]
    images = [nib.Nifti1Image.from_filename(file) for file in files]
    t1, gm, wm = (np.asanyarray(image.dataobj).astype(np.float32) / 255 for image in images)
    brain = (t1 > 0.02).astype(np.float32)
    csf = np.clip(brain - gm - wm, 0, 1)
    total = gm**2 + wm**2 + csf**2 + 1e-6
    gm, wm = brain * gm**2 / total, brain * wm**2 / total
    sharp = 0.28 * (brain - gm - wm) + 0.66 * gm + 0.98 * wm
    maps = {"t1": 0.5 * (t1 * brain + sharp), "gm": gm, "wm": wm, "brain": brain}
    contiguous = {name: np.ascontiguousarray(image, np.float32) for name, image in maps.items()}
    return contiguous, Grid(t1.shape, np.asarray(images[0].affine, float))


def slabs(grid: Grid, points_each: int = 1_000_000) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the world points of a grid in slabs along its first axis: the slice of rows, and points (n, 3)."""
    rows = max(1, points_each // int(np.prod(grid.shape[1:])))
    for start in range(0, grid.shape[0], rows):
        stop = min(grid.shape[0], start + rows)
        axes = (np.arange(start, stop), np.arange(grid.shape[1]), np.arange(grid.shape[2]))
        voxels = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        yield slice(start, stop), grid.to_world(voxels)


def ramp(x: np.ndarray, width: float = 1.0) -> np.ndarray:
    """A step at zero from 0 to 1, linear over `width` mm."""
    return np.clip(0.5 + x / width, 0, 1)


def _union(ellipsoids: tuple, points: np.ndarray) -> np.ndarray:
    return np.max([ramp(_depth(centre, radii, points)) for centre, radii in ellipsoids], axis=0)


def _depth(centre: tuple, radii: tuple, points: np.ndarray) -> np.ndarray:
    """Approximate depth of points inside an ellipsoid in mm; negative outside."""
    scaled = sum(((points[:, a] - centre[a]) / radii[a]) ** 2 for a in range(3))
    return (1 - np.sqrt(scaled)) * min(radii)


def _skull_distance(brain: np.ndarray, grid: Grid, wide: Grid, closing: float = 12.0) -> np.ndarray:
    """Signed distance in mm to the surface of the morphologically closed brain, negative inside, on `wide`."""
    mask = np.zeros(wide.shape, bool)
    for rows, points in slabs(wide):
        mask[rows] = interpolate(brain, grid, points).reshape(-1, *wide.shape[1:]) > 0.5
    spacing = wide.voxel_sizes
    dilated = distance_transform_edt(~mask, sampling=spacing) <= closing
    closed = distance_transform_edt(dilated, sampling=spacing) > closing
    signed = distance_transform_edt(~closed, sampling=spacing) - distance_transform_edt(closed, sampling=spacing)
    return gaussian_filter(signed.astype(np.float32), 1.0)


def _smooth_noise(rng: np.random.Generator, grid: Grid, sigma_mm: float) -> np.ndarray:
    """Noise smoothed with a Gaussian of standard deviation `sigma_mm`, scaled to unit standard deviation."""
    noise = gaussian_filter(rng.standard_normal(grid.shape, np.float32), sigma_mm / grid.voxel_sizes)
    return noise / noise.std()


def _rotation(degrees: np.ndarray) -> np.ndarray:
    return Rotation.from_rotvec(np.deg2rad(degrees)).as_matrix()
