"""The displacement by the off-resonance field as arrows over the corrected b=0 image."""

from __future__ import annotations

import numpy as np

from dsiprep.data.grid import Volume
from dsiprep.data.results import Distortion
from dsiprep.report.rendering import ColourBar, apply_colourmap, render_png
from dsiprep.report.slice_layout import IN_PLANE_AXES, Layout, View, sample_at, symmetric, window

SPACING_MM = 6.0  # between arrows
LEAST_MM = 0.5  # shorter arrows cannot be seen
HEAD = 0.35  # length of the arrow's head relative to its shaft
HEAD_ANGLE = np.radians(26)


def displacement_arrows(distortion: Distortion, mask: Volume, axis: np.ndarray) -> bytes:
    """Arrows from where signal belongs to where it appears in the first phase encoding, at true length, as PNG.

    Parameters
    ----------
    distortion : Distortion
    mask : Volume
        Brain on the grid of the field, 0 or 1.
    axis : ndarray, (3,)
        Unit vector along the phase-encoding axis, whose displacements colour the arrows, world RAS+.
    """
    view = View.of(mask, columns=3)
    layout = Layout.rows(view)
    canvas, inside = layout.paint(distortion.dwiref), layout.paint(mask)
    field = distortion.fields[0]
    components = [Volume(field.data[d].cpu().float(), field.grid) for d in range(3)]
    step = max(1, round(SPACING_MM / view.pixel))
    starts, ends, along = [], [], []
    for tile in layout.tiles:
        points = view.points(tile.plane, tile.position)[step // 2 :: step, step // 2 :: step]
        rows, columns = np.mgrid[step // 2 : tile.height : step, step // 2 : tile.width : step]
        vectors = np.stack([sample_at(component, points) for component in components], -1)
        local = vectors @ view.axes / view.pixel
        across, up = IN_PLANE_AXES[tile.plane]
        shown = (sample_at(mask, points) > 0.5) & (np.linalg.norm(vectors, axis=-1) > LEAST_MM)
        start = np.stack([columns + tile.x + 0.5, rows + tile.y + 0.5], -1)[shown]
        starts.append(start)
        ends.append(start + np.stack([local[..., across], -local[..., up]], -1)[shown])
        along.append((vectors @ axis)[shown])
    values = np.concatenate(along)
    limits = symmetric(values[None], None, 99) if len(values) else (-1.0, 1.0)
    shafts = np.stack([np.concatenate(starts), np.concatenate(ends)], 1)
    colours = apply_colourmap(values[None], limits, "coolwarm")[0] / 255
    grey = apply_colourmap(canvas, window(canvas, inside, 99.5)) // 2
    bar = ColourBar("coolwarm", limits, "mm")
    return render_png(layout, grey, bars=[bar], segments=(_arrows(shafts), np.tile(colours, (3, 1))))


def _arrows(shafts: np.ndarray) -> np.ndarray:
    """Segments of shafts (m, 2, 2) and of both sides of their heads, (3 m, 2, 2)."""
    start, end = shafts[:, 0], shafts[:, 1]
    back = HEAD * (start - end)
    sides = []
    for angle in (HEAD_ANGLE, -HEAD_ANGLE):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        sides.append(np.stack([end, end + back @ turn.T], 1))
    return np.concatenate([shafts, *sides])
