"""Diffusion signal of the head without motion, distortion or noise, for any diffusion gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from dsiprep.compiled import compiled
from dsiprep.data.grid import Grid
from dsiprep.phantom.head import Head, slabs

# b=0 signal of a pure voxel, relative to grey matter: T2-weighted EPI with fat suppression
AMPLITUDE = {
    "csf": 2.2,
    "fluid": 2.0,
    "gm": 1.0,
    "wm": 0.75,
    "muscle": 0.35,
    "fat": 0.12,
    "marrow": 0.08,
    "bone": 0.02,
}
# Isotropic compartments: (signal fraction, diffusivity in mm²/s)
GREY = ((0.7, 0.9e-3), (0.3, 0.25e-3))
FREE = ((1.0, 3.0e-3),)
SOFT = ((1.0, 1.4e-3),)
LIPID = ((1.0, 0.05e-3),)
ISOTROPIC = {"free": FREE, "grey": GREY, "soft": SOFT, "lipid": LIPID}
# Compartments of a fibre bundle: (signal fraction, axial and radial diffusivity in mm²/s); a narrow and a wider
# one together mimic slight dispersion
BUNDLE = np.array([[0.6, 1.8e-3, 0.1e-3], [0.4, 1.5e-3, 0.6e-3]])
SCALE = 800.0  # intensity of grey matter at b=0


@dataclass(frozen=True, eq=False)
class Tissue:
    """Diffusion model of the head on a grid in the head frame.

    Attributes
    ----------
    grid : Grid
    isotropic : dict of ndarray, (i, j, k)
        b=0 signal of free water, grey matter, soft tissue and lipid.
    fibre_voxels : ndarray, (m,), int
        Flat indices of the voxels with white matter.
    fibres : ndarray, (m, 2, 3)
        Unit directions of the two bundles in the head frame.
    weights : ndarray, (m, 2)
        b=0 signal of each bundle.
    """

    grid: Grid
    isotropic: dict[str, np.ndarray]
    fibre_voxels: np.ndarray
    fibres: np.ndarray
    weights: np.ndarray

    def signal(self, bval: float, bvec: np.ndarray) -> np.ndarray:
        """The noise-free image on the grid, (i, j, k) float32, for a gradient in the head frame.

        Parameters
        ----------
        bval : float
            s/mm².
        bvec : ndarray, (3,)
            Unit vector in world RAS+ of the head frame.
        """
        out = np.zeros(self.grid.shape, np.float32)
        for name, image in self.isotropic.items():
            out += image * np.float32(sum(fraction * np.exp(-bval * d) for fraction, d in ISOTROPIC[name]))
        _add_bundles(out.reshape(-1), self.fibre_voxels, self.fibres, self.weights, float(bval), bvec, BUNDLE)
        return out

    def signal_of(self, bval: float, gradients: np.ndarray) -> np.ndarray:
        """The image for a gradient that differs from voxel to voxel, (i, j, k) float32.

        Parameters
        ----------
        bval : float
            s/mm², for a gradient of unit length.
        gradients : ndarray, (3, i, j, k)
            In world RAS+ of the head frame.
        """
        b = np.float32(bval) * (gradients**2).sum(0)
        out = np.zeros(self.grid.shape, np.float32)
        for name, image in self.isotropic.items():
            out += image * sum(np.float32(fraction) * np.exp(np.float32(-d) * b) for fraction, d in ISOTROPIC[name])
        white = self.fibre_voxels
        each = gradients.reshape(3, -1)[:, white].T
        length = np.linalg.norm(each, axis=1)
        unit, values = each / np.maximum(length, 1e-9)[:, None], bval * length**2
        cosine = np.einsum("mpa,ma->mp", self.fibres, unit)
        for share, axial, radial in BUNDLE:
            attenuation = np.exp(-values[:, None] * (radial + (axial - radial) * cosine**2))
            out.reshape(-1)[white] += share * (self.weights * attenuation).sum(1)
        return out


def make_tissue(head: Head, grid: Grid) -> Tissue:
    """Sample the head on a grid in its own frame and add fibre bundles to white matter."""
    maps = head.maps(grid, ("csf", "fluid", "gm", "wm", "muscle", "fat", "marrow", "bone"))
    b0 = {name: np.float32(SCALE * AMPLITUDE[name]) * image for name, image in maps.items()}
    isotropic = {
        "free": b0["csf"] + b0["fluid"],
        "grey": b0["gm"],
        "soft": b0["muscle"],
        "lipid": b0["fat"] + b0["marrow"] + b0["bone"],
    }
    fibre_voxels = np.flatnonzero(maps["wm"] > 0.01)
    index = np.stack(np.unravel_index(fibre_voxels, grid.shape), -1)
    fibres, fractions = fibres_at(head, grid.to_world(index))
    white = b0["wm"].ravel()[fibre_voxels]
    without_fibres = b0["wm"].copy()
    without_fibres.ravel()[fibre_voxels] = 0
    isotropic["grey"] += without_fibres
    weights = (white[:, None] * fractions).astype(np.float32)
    return Tissue(grid, isotropic, fibre_voxels, fibres.astype(np.float32), weights)


def fibres_at(head: Head, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions (n, 2, 3) in the head frame and signal fractions (n, 2) of the two bundles at head points (n, 3).

    The first bundle resembles the corpus callosum and the corona radiata, left-right near the midline and ascending
    laterally, and the pyramidal tract below; the second resembles association fibres, in anterior-posterior arcs.
    """
    rotation = np.linalg.inv(head.pose)[:3, :3]
    u, _, vt = np.linalg.svd(rotation)
    directions = np.empty((len(points), 2, 3))
    fractions = np.empty((len(points), 2))
    for start in range(0, len(points), 500_000):
        part = slice(start, start + 500_000)
        template, fractions[part] = _template_fibres(head.to_template(points[part]))
        directions[part] = template @ (u @ vt)  # rows d become (u vt)' d: template to head
    return directions, fractions


def _template_fibres(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions and signal fractions as `fibres_at`, at template points and in the template frame."""
    x, y, z = t.T
    above = np.clip((z + 5) / 20, 0, 1)
    side = np.where(x >= 0, 1.0, -1.0)
    first = np.stack([(45 - z) * above, 0.2 * y * above, side * (np.abs(x) + 60 * (1 - above))], -1)
    second = np.stack([0.3 * x + 12 * side, -(z + 5), y + 20], -1)
    both = np.stack([first, second], 1)
    both /= np.maximum(np.linalg.norm(both, axis=-1, keepdims=True), 1e-9)
    lateral = np.clip((np.abs(x) - 12) / 25, 0, 1) * above
    second_fraction = 0.6 * lateral
    return both, np.stack([1 - second_fraction, second_fraction], -1)


def fibre_image(head: Head, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Directions (i, j, k, 2, 3) and signal fractions (i, j, k, 2) on a grid in the head frame; zero outside WM."""
    white = head.maps(grid, ("wm",))["wm"] > 0.5
    directions = np.zeros((*grid.shape, 2, 3), np.float32)
    fractions = np.zeros((*grid.shape, 2), np.float32)
    for rows, points in slabs(grid):
        inside = white[rows]
        directions[rows][inside], fractions[rows][inside] = fibres_at(head, points[inside.ravel()])
    return directions, fractions


@compiled(parallel=True)
def _add_bundles(
    out: np.ndarray,
    voxels: np.ndarray,
    fibres: np.ndarray,
    weights: np.ndarray,
    bval: float,
    bvec: np.ndarray,
    bundle: np.ndarray,
) -> None:
    """Add the signal of both bundles to the flat image `out`."""
    for m in numba.prange(voxels.shape[0]):
        total = 0.0
        for p in range(2):
            cosine = fibres[m, p, 0] * bvec[0] + fibres[m, p, 1] * bvec[1] + fibres[m, p, 2] * bvec[2]
            along = cosine * cosine
            for c in range(bundle.shape[0]):
                attenuation = np.exp(-bval * (bundle[c, 2] + (bundle[c, 1] - bundle[c, 2]) * along))
                total += weights[m, p] * bundle[c, 0] * attenuation
        out[voxels[m]] += total
