"""What each point of the head would give without motion, distortion or noise, for any diffusion gradient."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from dsiprep.compiled import compiled
from dsiprep.data.grid import Grid
from dsiprep.phantom.head import Head, slabs

# b=0 signal of a full voxel, relative to grey matter: T2-weighted EPI with fat suppression
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
# Isotropic diffusion: (share, mm²/s)
GREY = ((0.7, 0.9e-3), (0.3, 0.25e-3))
FREE = ((1.0, 3.0e-3),)
SOFT = ((1.0, 1.4e-3),)
LIPID = ((1.0, 0.05e-3),)
# One bundle of fibres: (share, mm²/s along, mm²/s across); the first, narrow, allows for a little dispersion
BUNDLE = np.array([[0.6, 1.8e-3, 0.1e-3], [0.4, 1.5e-3, 0.6e-3]])
SCALE = 800.0  # intensity of grey matter at b=0


@dataclass(frozen=True, eq=False)
class Tissue:
    """The head as a diffusion MRI source, on a grid of the head frame.

    Attributes
    ----------
    grid : Grid
    isotropic : dict of ndarray, (i, j, k)
        b=0 signal of free water, grey matter, soft tissue and lipid.
    fibre_voxels : ndarray, (m,), int
        Flat indices of the voxels with white matter.
    fibres : ndarray, (m, 2, 3)
        Unit directions of two bundles in the head frame.
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
        models = {"free": FREE, "grey": GREY, "soft": SOFT, "lipid": LIPID}
        out = np.zeros(self.grid.shape, np.float32)
        for name, image in self.isotropic.items():
            out += image * np.float32(sum(share * np.exp(-bval * d) for share, d in models[name]))
        _add_bundles(out.reshape(-1), self.fibre_voxels, self.fibres, self.weights, float(bval), bvec, BUNDLE)
        return out


def make_tissue(head: Head, grid: Grid) -> Tissue:
    """Read the head on a grid of its own frame and give it fibres."""
    maps = head.maps(grid, ("csf", "fluid", "gm", "wm", "muscle", "fat", "marrow", "bone"))
    b0 = {name: np.float32(SCALE * AMPLITUDE[name]) * image for name, image in maps.items()}
    isotropic = {
        "free": b0["csf"] + b0["fluid"],
        "grey": b0["gm"],
        "soft": b0["muscle"],
        "lipid": b0["fat"] + b0["marrow"] + b0["bone"],
    }
    where = np.flatnonzero(maps["wm"] > 0.01)
    index = np.stack(np.unravel_index(where, grid.shape), -1)
    fibres, shares = fibres_at(head, grid.to_world(index))
    white = b0["wm"].ravel()[where]
    rest = b0["wm"].copy()
    rest.ravel()[where] = 0
    isotropic["grey"] += rest
    return Tissue(grid, isotropic, where, fibres.astype(np.float32), (white[:, None] * shares).astype(np.float32))


def fibres_at(head: Head, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions (n, 2, 3) in the head frame and shares (n, 2) of the two bundles at head points (n, 3).

    The first bundle runs like callosum and corona radiata, from side to side in the middle and upwards at the
    sides, and like the pyramidal tract below; the second like association fibres, in arcs from front to back.
    """
    rotation = np.linalg.inv(head.pose)[:3, :3]
    u, _, vt = np.linalg.svd(rotation)
    directions = np.empty((len(points), 2, 3))
    shares = np.empty((len(points), 2))
    for start in range(0, len(points), 500_000):
        part = slice(start, start + 500_000)
        template, shares[part] = _template_fibres(head.to_template(points[part]))
        directions[part] = template @ (u @ vt)  # rows d become (u vt)' d: template to head
    return directions, shares


def _template_fibres(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y, z = t.T
    above = np.clip((z + 5) / 20, 0, 1)
    side = np.where(x >= 0, 1.0, -1.0)
    first = np.stack([(45 - z) * above, 0.2 * y * above, side * (np.abs(x) + 60 * (1 - above))], -1)
    second = np.stack([0.3 * x + 12 * side, -(z + 5), y + 20], -1)
    both = np.stack([first, second], 1)
    both /= np.maximum(np.linalg.norm(both, axis=-1, keepdims=True), 1e-9)
    lateral = np.clip((np.abs(x) - 12) / 25, 0, 1) * above
    share = 0.6 * lateral
    return both, np.stack([1 - share, share], -1)


def fibre_image(head: Head, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Directions (i, j, k, 2, 3) and shares (i, j, k, 2) on a head-frame grid; zero outside white matter."""
    white = head.maps(grid, ("wm",))["wm"] > 0.5
    directions = np.zeros((*grid.shape, 2, 3), np.float32)
    shares = np.zeros((*grid.shape, 2), np.float32)
    for rows, points in slabs(grid):
        inside = white[rows]
        found, part = fibres_at(head, points[inside.ravel()])
        directions[rows][inside], shares[rows][inside] = found, part
    return directions, shares


@compiled(parallel=True)
def _add_bundles(
    out: np.ndarray,
    where: np.ndarray,
    fibres: np.ndarray,
    weights: np.ndarray,
    bval: float,
    bvec: np.ndarray,
    bundle: np.ndarray,
) -> None:
    for m in numba.prange(where.shape[0]):
        total = 0.0
        for p in range(2):
            cosine = fibres[m, p, 0] * bvec[0] + fibres[m, p, 1] * bvec[1] + fibres[m, p, 2] * bvec[2]
            along = cosine * cosine
            for c in range(bundle.shape[0]):
                attenuation = np.exp(-bval * (bundle[c, 2] + (bundle[c, 1] - bundle[c, 2]) * along))
                total += weights[m, p] * bundle[c, 0] * attenuation
        out[where[m]] += total
