"""Orientation distribution functions (ODFs) as glyphs over colour-coded FA, drawn from the preprocessed series.

A glyph is the outline of the ODF's surface as seen along the normal of the slice: in each of `SECTORS` directions of
the plane, the largest extent of the surface, in the colour of the direction that reaches it. All glyphs of a figure are
painted at once, pixel by pixel, because tens of thousands of polygons would take minutes.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dsiprep.data.results import Preprocessed
from dsiprep.ops.qspace.tensor import main_directions
from dsiprep.report.slice_figures import tensor_volumes
from dsiprep.report.slice_layout import IN_PLANE_AXES, Layout, Tile, View, sample_at

DIRECTIONS = 720  # on the sphere, about 7 degrees apart
SECTORS = 36
CELL = 12  # pixels per voxel
SAMPLING_LENGTH = 1.25  # ratio of the mean diffusion distance; DSI Studio's default
DIFFUSIVITY = 0.0025  # mm²/s, of free water, which sets the diffusion distance
LEAST_DIRECTIONS = 15
QUALITY = 80


def sphere(count: int) -> np.ndarray:
    """Unit vectors spread evenly on the sphere along a Fibonacci spiral, (count, 3)."""
    index = np.arange(count) + 0.5
    polar, azimuth = np.arccos(1 - 2 * index / count), np.pi * (1 + 5**0.5) * index
    return np.stack([np.cos(azimuth) * np.sin(polar), np.sin(azimuth) * np.sin(polar), np.cos(polar)], -1)


def gqi_matrix(bvals: np.ndarray, bvecs: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Matrix (m, n) from signals (n,) to the ODF of generalised q-sampling imaging along `directions` (m, 3).

    References
    ----------
    Yeh, Wedeen and Tseng 2010, equation 9, doi 10.1109/TMI.2010.2045126.
    """
    length = np.sqrt(6 * DIFFUSIVITY * np.maximum(bvals, 0))
    return np.sinc(SAMPLING_LENGTH * length * (directions @ bvecs.T) / np.pi)


def odf_figure(preprocessed: Preprocessed) -> bytes | None:
    """Glyphs in the middle slice of each plane as WebP; None without b=0 or with too few directions."""
    dwi = preprocessed.dwi
    if (~dwi.is_b0).sum() < LEAST_DIRECTIONS or not dwi.is_b0.any() or not tensor_volumes(dwi.bvals, dwi.is_b0).any():
        return None
    view = View.of(preprocessed.mask, margin=4.0)
    layout = Layout.middle_slices(view)
    points, indices = layout.points()
    keep = sample_at(preprocessed.mask, points) > 0.5
    if not keep.any():
        return None
    points, indices = points[keep], indices[keep]
    signals = np.stack([sample_at(dwi.volume(v), points) for v in range(len(dwi))])
    directions = sphere(DIRECTIONS)
    bvals, bvecs = np.where(dwi.is_b0, 0, dwi.bvals), np.where(dwi.is_b0[:, None], 0, dwi.bvecs)
    odf = (gqi_matrix(bvals, bvecs, directions).astype(np.float32) @ signals).T
    canvas = _background(layout, signals, bvals, bvecs, dwi.is_b0, indices)
    for tile in layout.tiles:
        rows, columns = np.divmod(indices, layout.width)
        here = (columns >= tile.x) & (columns < tile.x + tile.width) & (rows >= tile.y) & (rows < tile.y + tile.height)
        _paint(canvas, tile, odf[here], directions @ view.axes, directions, rows[here], columns[here])
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, "WEBP", quality=QUALITY)
    return out.getvalue()


def _background(
    layout: Layout, signals: np.ndarray, bvals: np.ndarray, bvecs: np.ndarray, is_b0: np.ndarray, indices: np.ndarray
) -> np.ndarray:
    """Colour-coded FA, dimmed, each voxel `CELL` pixels wide, (h, w, 3) uint8."""
    used = tensor_volumes(bvals, is_b0) | is_b0
    fa, direction = main_directions(signals[used], bvals[used], bvecs[used])
    colours = np.clip(110 * np.abs(direction) * fa[:, None], 0, 255)
    small = np.zeros((layout.height * layout.width, 3), np.uint8)
    small[indices] = colours.astype(np.uint8)
    return small.reshape(layout.height, layout.width, 3).repeat(CELL, 0).repeat(CELL, 1)


def _outlines(odf: np.ndarray, local: np.ndarray, plane: str) -> tuple[np.ndarray, np.ndarray]:
    """Extent of each glyph per sector, (voxels, SECTORS), 0 to 1, and the direction that reaches it, (voxels, SECTORS).

    The smallest value of each ODF is subtracted, and voxels with less contrast than most are drawn smaller.
    """
    contrast = odf - odf.min(1, keepdims=True)
    largest = contrast.max(1)
    typical = max(float(np.percentile(largest, 90)), 1e-12)
    radius = contrast / np.maximum(largest, 1e-12)[:, None] * np.clip(largest / typical, 0.2, 1)[:, None] ** 0.5
    across, up = IN_PLANE_AXES[plane]
    inside = np.hypot(local[:, across], local[:, up])
    sector = (np.arctan2(local[:, up], local[:, across]) / (2 * np.pi) * SECTORS).round().astype(int) % SECTORS
    extent, reached = np.zeros((len(odf), SECTORS), np.float32), np.zeros((len(odf), SECTORS), np.int32)
    for s in range(SECTORS):
        members = np.flatnonzero(sector == s)
        projected = radius[:, members] * inside[members]
        best = projected.argmax(1)
        extent[:, s] = projected[np.arange(len(odf)), best]
        reached[:, s] = members[best]
    return extent, reached


def _paint(
    canvas: np.ndarray,
    tile: Tile,
    odf: np.ndarray,
    local: np.ndarray,
    directions: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
) -> None:
    """Paint the glyphs of one slice; the edge of each is blended over one pixel."""
    if not len(odf):
        return
    extent, reached = _outlines(odf, local, tile.plane)
    y, x = np.mgrid[0:CELL, 0:CELL].reshape(2, -1) - (CELL - 1) / 2
    distance = np.hypot(x, y)
    angle = (np.arctan2(-y, x) / (2 * np.pi) * SECTORS) % SECTORS
    lower = np.floor(angle).astype(int) % SECTORS
    share = angle - np.floor(angle)
    reach = extent[:, lower] * (1 - share) + extent[:, (lower + 1) % SECTORS] * share
    cover = np.clip(0.52 * CELL * reach - distance + 0.5, 0, 1)[..., None]
    nearest = angle.round().astype(int) % SECTORS
    colours = np.abs(directions)[reached[:, nearest]]
    colours = 255 * np.clip(colours / colours.max(-1, keepdims=True) * (0.65 + 0.35 * reach[..., None]), 0, 1)
    pixel_rows = (rows[:, None] * CELL + np.arange(CELL * CELL)[None] // CELL).ravel()
    pixel_columns = (columns[:, None] * CELL + np.arange(CELL * CELL)[None] % CELL).ravel()
    below = canvas[pixel_rows, pixel_columns].reshape(len(odf), CELL * CELL, 3)
    canvas[pixel_rows, pixel_columns] = (below * (1 - cover) + colours * cover).astype(np.uint8).reshape(-1, 3)
