"""Layout of slices from volumes of any orientation in one figure.

A `View` is aligned with the grid axes nearest to right, anterior and superior, so that an LAS, PSR or oblique
acquisition is shown in its own voxels, merely flipped and permuted. All other volumes are sampled at the same points,
through an affine if they are in another space, so that figures of the same view can be compared by switching between
them. The orientation is neurological (left is left), and every row is labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy.ndimage import map_coordinates

from dsiprep.data.grid import Grid, Volume

PLANES = ("axial", "coronal", "sagittal")
NORMAL_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}
IN_PLANE_AXES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
ORIENTATION_LABELS = {0: ("L", "R"), 1: ("P", "A"), 2: ("I", "S")}
GAP = 3


def display_axes(grid: Grid) -> np.ndarray:
    """Orthonormal display axes of a grid: its voxel axes nearest to right, anterior and superior.

    Parameters
    ----------
    grid : Grid
        Any orientation, including oblique and sheared.

    Returns
    -------
    ndarray, (3, 3)
        One direction per column, in world RAS+: the grid's own axes, permuted and flipped.
    """
    u, _, vt = np.linalg.svd(grid.directions)
    axes = u @ vt
    best = max(permutations(range(3)), key=lambda order: sum(abs(axes[d, a]) for d, a in enumerate(order)))
    ordered = axes[:, list(best)]
    return ordered * np.where(np.diag(ordered) < 0, -1.0, 1.0)


@dataclass(frozen=True, eq=False)
class View:
    """Positions and extent of the slices of a figure.

    Attributes
    ----------
    axes : ndarray, (3, 3)
        Display axes (right, anterior, superior) in world RAS+, one per column.
    low, high : ndarray, (3,)
        Bounds of the displayed box along these axes, mm.
    pixel : float
        Isotropic pixel size, mm.
    positions : tuple of three ndarrays
        Positions of the sagittal, coronal and axial slices along axis 0, 1 and 2, mm.
    """

    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    pixel: float
    positions: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def of(cls, mask: Volume, columns: int | tuple[int, int, int] = 7, margin: float = 10.0) -> View:
        """The view of the region inside a mask, with slices through voxel centres of its grid.

        Parameters
        ----------
        mask : Volume
            0 or 1. With an empty mask the whole grid is shown.
        columns : int or three ints
            Number of slices per plane, or of sagittal, coronal and axial slices.
        margin : float
            Margin around the mask, mm.
        """
        grid, axes = mask.grid, display_axes(mask.grid)
        inside = np.argwhere(mask.numpy() > 0.5)
        if len(inside) == 0:
            inside = np.array([[0, 0, 0], np.asarray(grid.shape) - 1])
        points = grid.to_world(inside) @ axes
        # Percentiles, so that isolated voxels of the mask do not enlarge the view.
        low, high = np.percentile(points, (0.05, 99.95), axis=0)
        corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        edge = grid.to_world(corners * (np.asarray(grid.shape) - 1)) @ axes
        voxel_axes = np.abs(axes.T @ grid.directions).argmax(1)
        sizes, first = grid.voxel_sizes[voxel_axes], edge.min(0)
        counts = (columns,) * 3 if isinstance(columns, int) else columns
        x, y, z = (_slice_positions(low[d], high[d], counts[d], first[d], sizes[d]) for d in range(3))
        pixel = float(np.clip(sizes.min(), np.max(high - low) / 200, None))
        first_pixel = np.floor((np.maximum(low - margin, first) - first) / pixel) * pixel + first
        return cls(axes, first_pixel, np.minimum(high + margin, edge.max(0)), pixel, (x, y, z))

    def ticks(self, axis: int) -> np.ndarray:
        """Pixel positions along a display axis, mm."""
        return np.arange(self.low[axis], self.high[axis] + self.pixel / 2, self.pixel)

    def points(self, plane: str, position: float) -> np.ndarray:
        """World RAS+ coordinates (mm) of the pixels of a slice, (h, w, 3), top row first."""
        across, up = IN_PLANE_AXES[plane]
        v, u = np.meshgrid(self.ticks(up)[::-1], self.ticks(across), indexing="ij")
        local = np.zeros((*u.shape, 3))
        local[..., across], local[..., up], local[..., NORMAL_AXIS[plane]] = u, v, position
        return local @ self.axes.T


def _slice_positions(low: float, high: float, count: int, first: float, size: float) -> np.ndarray:
    """`count` positions between 12 % and 90 % of an extent, rounded to slice centres."""
    span = high - low
    positions = low + span * np.linspace(0.12, 0.90, count) if count > 1 else np.array([low + span / 2])
    return first + np.round((positions - first) / size) * size


def sample_at(volume: Volume, points: np.ndarray, order: int = 1, via: np.ndarray | None = None) -> np.ndarray:
    """Sample a volume at world points (..., 3), zero outside; `via` (4, 4) maps the points to its space."""
    if via is not None:
        points = points @ via[:3, :3].T + via[:3, 3]
    # Rounded so that points on the outermost slices do not fall outside by floating-point error.
    voxels = np.round(np.moveaxis(volume.grid.to_voxels(points), -1, 0), 6)
    return map_coordinates(volume.numpy(), voxels, order=order, mode="constant", output=np.float32)


@dataclass(frozen=True)
class Tile:
    """One slice: its plane, its position in mm, and its rectangle on the canvas in pixels from the top left."""

    plane: str
    position: float
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Group:
    """Adjacent tiles of one plane that show one volume; `tag` names it where a figure shows several volumes."""

    plane: str
    tag: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """Arrangement of the slices of a view on a canvas of `width` x `height` pixels."""

    view: View
    groups: tuple[Group, ...]
    width: int
    height: int

    @classmethod
    def rows(cls, view: View, planes: tuple[str, ...] = PLANES, tags: tuple[str, ...] = ()) -> Layout:
        """One centred row, which is one group, per entry of `planes`, with all slices of the view in that plane."""
        sizes = [len(view.ticks(axis)) for axis in range(3)]
        widths = [len(view.positions[NORMAL_AXIS[p]]) * (sizes[IN_PLANE_AXES[p][0]] + GAP) - GAP for p in planes]
        total, y, groups = max(widths), 0, []
        for plane, width, tag in zip(planes, widths, tags or ("",) * len(planes), strict=True):
            w, h = sizes[IN_PLANE_AXES[plane][0]], sizes[IN_PLANE_AXES[plane][1]]
            left = (total - width) // 2
            tiles = tuple(
                Tile(plane, float(position), left + number * (w + GAP), y, w, h)
                for number, position in enumerate(view.positions[NORMAL_AXIS[plane]])
            )
            groups.append(Group(plane, tag, tiles))
            y += h + GAP
        return cls(view, tuple(groups), total, y - GAP)

    @classmethod
    def middle_slices(cls, view: View) -> Layout:
        """The middle slice of each plane, side by side."""
        sizes = [len(view.ticks(axis)) for axis in range(3)]
        height, x, groups = max(sizes[1], sizes[2]), 0, []
        for plane in PLANES:
            w, h = sizes[IN_PLANE_AXES[plane][0]], sizes[IN_PLANE_AXES[plane][1]]
            positions = view.positions[NORMAL_AXIS[plane]]
            tile = Tile(plane, float(positions[len(positions) // 2]), x, (height - h) // 2, w, h)
            groups.append(Group(plane, "", (tile,)))
            x += w + GAP
        return cls(view, tuple(groups), x - GAP, height)

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles in order of the groups."""
        return tuple(tile for group in self.groups for tile in group.tiles)

    def paint(self, volume: Volume, order: int = 1, via: np.ndarray | None = None) -> np.ndarray:
        """Sample one volume on all tiles, (height, width) float32; zero between tiles."""
        return self.paint_groups([volume] * len(self.groups), order, via)

    def paint_groups(self, volumes: Sequence[Volume], order: int = 1, via: np.ndarray | None = None) -> np.ndarray:
        """Sample one volume per group, (height, width) float32; zero between tiles."""
        canvas = np.zeros((self.height, self.width), np.float32)
        for group, volume in zip(self.groups, volumes, strict=True):
            for tile in group.tiles:
                points = self.view.points(tile.plane, tile.position)
                canvas[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = sample_at(
                    volume, points, order, via
                )
        return canvas

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """World coordinates of the pixels of all tiles, (m, 3), and their indices in the flattened canvas, (m,)."""
        points, indices = [], []
        index = np.arange(self.height * self.width).reshape(self.height, self.width)
        for tile in self.tiles:
            points.append(self.view.points(tile.plane, tile.position).reshape(-1, 3))
            indices.append(index[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width].ravel())
        return np.concatenate(points), np.concatenate(indices)

    def scatter(self, values: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Canvas (height, width, ...) with values (m, ...) at the flat indices returned by `points`."""
        canvas = np.zeros((self.height * self.width, *values.shape[1:]), np.float32)
        canvas[indices] = values
        return canvas.reshape(self.height, self.width, *values.shape[1:])


def window(canvas: np.ndarray, inside: np.ndarray | None = None, top: float = 99.5) -> tuple[float, float]:
    """Intensity window of an image: zero, or a low percentile if negative, to a high percentile inside the mask."""
    values = canvas[inside > 0.5] if inside is not None and (inside > 0.5).any() else canvas[canvas != 0]
    values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    high = float(np.percentile(values, top))
    low = min(0.0, float(np.percentile(values, 0.5)))
    return low, high if high > low else low + 1.0


def symmetric(canvas: np.ndarray, inside: np.ndarray | None = None, top: float = 99.5) -> tuple[float, float]:
    """Symmetric limits of a signed map: plus and minus a high percentile of its absolute value."""
    high = window(np.abs(canvas), inside, top)[1]
    return -high, high
