"""Slices of volumes of any orientation, laid out as one picture that people read without thinking.

A `View` looks along the axes of a grid that lie nearest to right, anterior and superior, so an LAS, PSR or
oblique acquisition is shown in its own voxels, only flipped and permuted. Every other volume is sampled at
the same points (through an affine if it lives in another space), so pictures of one view can be flickered
against each other. Left of the head is left of the picture (neurological), and every row says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy.ndimage import map_coordinates

from dsiprep.data.grid import Grid, Volume

PLANES = ("axial", "coronal", "sagittal")
NORMAL = {"axial": 2, "coronal": 1, "sagittal": 0}
ACROSS = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
LETTERS = {0: ("L", "R"), 1: ("P", "A"), 2: ("I", "S")}
GAP = 3


def display_axes(grid: Grid) -> np.ndarray:
    """Orthonormal directions nearest to right, anterior, superior along which a grid is shown.

    Parameters
    ----------
    grid : Grid
        Any orientation, oblique and sheared too.

    Returns
    -------
    ndarray, (3, 3)
        One direction per column, in world RAS+: the grid's own axes, permuted and flipped.
    """
    u, _, vt = np.linalg.svd(grid.directions)
    axes = u @ vt
    best = max(permutations(range(3)), key=lambda order: sum(abs(axes[d, a]) for d, a in enumerate(order)))
    chosen = axes[:, list(best)]
    return chosen * np.where(np.diag(chosen) < 0, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class View:
    """Where slices are cut and how far they reach.

    Attributes
    ----------
    axes : ndarray, (3, 3)
        Display right, anterior, superior in world RAS+, one per column.
    low, high : ndarray, (3,)
        Ends of the shown box along these axes, mm.
    pixel : float
        Size of a picture element, mm; the same in every direction.
    positions : tuple of three ndarrays
        Where sagittal, coronal and axial slices are cut, mm along axis 0, 1, 2.
    """

    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    pixel: float
    positions: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, mask: Volume, columns: int | tuple[int, int, int] = 7, margin: float = 10.0) -> View:
        """The slices through what a mask holds, cut through voxel centres of its grid.

        Parameters
        ----------
        mask : Volume
            0 or 1; an empty one shows the whole grid.
        columns : int or three ints
            Slices per plane; three: sagittal, coronal, axial.
        margin : float
            Border around the mask, mm.
        """
        grid, axes = mask.grid, display_axes(mask.grid)
        inside = np.argwhere(mask.numpy() > 0.5)
        if len(inside) == 0:
            inside = np.array([[0, 0, 0], np.asarray(grid.shape) - 1])
        points = grid.to_world(inside) @ axes
        # Percentiles: one stray voxel of a mask must not widen the picture.
        low, high = np.percentile(points, (0.05, 99.95), axis=0)
        corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        edge = grid.to_world(corners * (np.asarray(grid.shape) - 1)) @ axes
        steps = np.abs(axes.T @ grid.directions).argmax(1)
        sizes, first = grid.voxel_sizes[steps], edge.min(0)
        counts = (columns,) * 3 if isinstance(columns, int) else columns
        cuts = [_positions(low[d], high[d], counts[d], first[d], sizes[d]) for d in range(3)]
        pixel = float(np.clip(sizes.min(), np.max(high - low) / 200, None))
        first_pixel = np.floor((np.maximum(low - margin, first) - first) / pixel) * pixel + first
        return cls(axes, first_pixel, np.minimum(high + margin, edge.max(0)), pixel, (cuts[0], cuts[1], cuts[2]))

    def ticks(self, axis: int) -> np.ndarray:
        """Positions of the picture elements along a display axis, mm."""
        return np.arange(self.low[axis], self.high[axis] + self.pixel / 2, self.pixel)

    def points(self, plane: str, position: float) -> np.ndarray:
        """World RAS+ mm of every picture element of a slice, (h, w, 3), top row first."""
        across, up = ACROSS[plane]
        v, u = np.meshgrid(self.ticks(up)[::-1], self.ticks(across), indexing="ij")
        local = np.zeros((*u.shape, 3))
        local[..., across], local[..., up], local[..., NORMAL[plane]] = u, v, position
        return local @ self.axes.T


def _positions(low: float, high: float, count: int, first: float, size: float) -> np.ndarray:
    """`count` slices between 12 % and 90 % of an extent, moved onto slice centres."""
    span = high - low
    wanted = low + span * np.linspace(0.12, 0.90, count) if count > 1 else np.array([low + span / 2])
    return first + np.round((wanted - first) / size) * size


def sample_at(volume: Volume, points: np.ndarray, order: int = 1, via: np.ndarray | None = None) -> np.ndarray:
    """Values of a volume at world points (..., 3), zero outside; `via` (4, 4) is applied to points first."""
    if via is not None:
        points = points @ via[:3, :3].T + via[:3, 3]
    # Sampling just on a slice must not fall outside by rounding.
    voxels = np.round(np.moveaxis(volume.grid.to_voxels(points), -1, 0), 6)
    return map_coordinates(volume.numpy(), voxels, order=order, mode="constant", output=np.float32)


@dataclass(frozen=True)
class Tile:
    """One slice of a picture: where it lies (in picture elements, from the top left) and what it cuts."""

    plane: str
    position: float
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Group:
    """Neighbouring tiles of one plane that show one thing; `tag` names it where there are several things."""

    plane: str
    tag: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """Slices of a view arranged on one canvas of `width` by `height` picture elements."""

    view: View
    groups: tuple[Group, ...]
    width: int
    height: int

    @classmethod
    def rows(cls, view: View, planes: tuple[str, ...] = PLANES, tags: tuple[str, ...] = ()) -> Layout:
        """One row, and group, per plane named, centred, with as many slices as the view has."""
        sizes = [len(view.ticks(axis)) for axis in range(3)]
        widths = [len(view.positions[NORMAL[p]]) * (sizes[ACROSS[p][0]] + GAP) - GAP for p in planes]
        total, y, groups = max(widths), 0, []
        for plane, width, tag in zip(planes, widths, tags or ("",) * len(planes), strict=True):
            w, h = sizes[ACROSS[plane][0]], sizes[ACROSS[plane][1]]
            left = (total - width) // 2
            tiles = tuple(
                Tile(plane, float(position), left + number * (w + GAP), y, w, h)
                for number, position in enumerate(view.positions[NORMAL[plane]])
            )
            groups.append(Group(plane, tag, tiles))
            y += h + GAP
        return cls(view, tuple(groups), total, y - GAP)

    @classmethod
    def trio(cls, view: View) -> Layout:
        """The middle slice of each plane, large, side by side."""
        sizes = [len(view.ticks(axis)) for axis in range(3)]
        height, x, groups = max(sizes[1], sizes[2]), 0, []
        for plane in PLANES:
            w, h = sizes[ACROSS[plane][0]], sizes[ACROSS[plane][1]]
            cuts = view.positions[NORMAL[plane]]
            tile = Tile(plane, float(cuts[len(cuts) // 2]), x, (height - h) // 2, w, h)
            groups.append(Group(plane, "", (tile,)))
            x += w + GAP
        return cls(view, tuple(groups), x - GAP, height)

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles, group after group."""
        return tuple(tile for group in self.groups for tile in group.tiles)

    def paint(self, volume: Volume, order: int = 1, via: np.ndarray | None = None) -> np.ndarray:
        """A volume on the whole layout, (height, width) float32; zero between the tiles."""
        return self.paint_groups([volume] * len(self.groups), order, via)

    def paint_groups(self, volumes: Sequence[Volume], order: int = 1, via: np.ndarray | None = None) -> np.ndarray:
        """One volume per group, (height, width) float32; zero between the tiles."""
        canvas = np.zeros((self.height, self.width), np.float32)
        for group, volume in zip(self.groups, volumes, strict=True):
            for tile in group.tiles:
                points = self.view.points(tile.plane, tile.position)
                canvas[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = sample_at(
                    volume, points, order, via
                )
        return canvas

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """World points of all tiles, (m, 3), and their places in the flattened canvas, (m,)."""
        points, places = [], []
        index = np.arange(self.height * self.width).reshape(self.height, self.width)
        for tile in self.tiles:
            points.append(self.view.points(tile.plane, tile.position).reshape(-1, 3))
            places.append(index[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width].ravel())
        return np.concatenate(points), np.concatenate(places)

    def scatter(self, values: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Values (m, ...) at the places that `points` gave, as a canvas (height, width, ...)."""
        canvas = np.zeros((self.height * self.width, *values.shape[1:]), np.float32)
        canvas[places] = values
        return canvas.reshape(self.height, self.width, *values.shape[1:])


def window(canvas: np.ndarray, inside: np.ndarray | None = None, top: float = 99.5) -> tuple[float, float]:
    """Black and white of a magnitude image: 0 or a low percentile, and a high percentile inside."""
    chosen = canvas[inside > 0.5] if inside is not None and (inside > 0.5).any() else canvas[canvas != 0]
    chosen = chosen[np.isfinite(chosen)]
    if chosen.size == 0:
        return 0.0, 1.0
    high = float(np.percentile(chosen, top))
    low = min(0.0, float(np.percentile(chosen, 0.5)))
    return low, high if high > low else low + 1.0


def symmetric(canvas: np.ndarray, inside: np.ndarray | None = None, top: float = 99.5) -> tuple[float, float]:
    """Limits of a signed map: plus and minus a high percentile of its size."""
    high = window(np.abs(canvas), inside, top)[1]
    return -high, high
