"""Rendering of a canvas of slices as PNG: colour maps, contours, orientation labels and colour bars.

What the figures show is defined in `slice_figures`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from dsiprep.report.slice_layout import IN_PLANE_AXES, NORMAL_AXIS, ORIENTATION_LABELS, Layout

WIDTH = 1240  # pixels; a larger figure only takes more space
DPI = 100
BRAIN_COLOUR, WHITE_MATTER_COLOUR, GREY_MATTER_COLOUR = "#ffb000", "#4cc9f0", "#ff5d8f"
MUTED = "#cccccc"
TEXT_OUTLINE = [patheffects.withStroke(linewidth=2.2, foreground="black")]

# For signed maps on black: zero is black, negative values are blue, positive values red, larger ones brighter.
SIGNED_COLOURMAP = LinearSegmentedColormap.from_list(
    "signed", ["#d7f3ff", "#35b5f2", "#1451b8", "#000000", "#b3261e", "#f58b2a", "#fff3c4"]
)


@dataclass(frozen=True, eq=False)
class Contour:
    """A contour line of a canvas (mask or probability) at `level`."""

    canvas: np.ndarray
    colour: str
    width: float = 1.1
    level: float = 0.5


@dataclass(frozen=True)
class ColourBar:
    """A colour bar: colour map, limits and label."""

    colourmap: str | Colormap
    limits: tuple[float, float]
    label: str


def apply_colourmap(canvas: np.ndarray, limits: tuple[float, float], colourmap: str | Colormap = "gray") -> np.ndarray:
    """Map a canvas (h, w) to RGB (h, w, 3), uint8."""
    low, high = limits
    scaled = np.clip((canvas - low) / max(high - low, 1e-12), 0, 1)
    to_rgba = colormaps[colourmap] if isinstance(colourmap, str) else colourmap
    return to_rgba(np.nan_to_num(scaled), bytes=True)[..., :3]


def _blacken_gaps(layout: Layout, rgb: np.ndarray) -> np.ndarray:
    """Set the gaps between tiles to black: colour maps need not map zero to black."""
    inside = np.zeros(rgb.shape[:2], bool)
    for tile in layout.tiles:
        inside[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = True
    return np.where(inside[..., None], rgb, 0).astype(np.uint8)


def render_png(
    layout: Layout,
    rgb: np.ndarray,
    contours: Sequence[Contour] = (),
    bars: Sequence[ColourBar] = (),
    segments: tuple[np.ndarray, np.ndarray] | None = None,
    keep_hue: bool = False,
) -> bytes:
    """Render slices with orientation labels as PNG.

    Parameters
    ----------
    layout : Layout
    rgb : ndarray, (h, w, 3), uint8
        Image on the layout's canvas.
    contours : sequence of Contour
        Contours on the same canvas.
    bars : sequence of ColourBar
        Colour bars in the right margin, from top to bottom.
    segments : (ndarray (m, 2, 2), ndarray (m, 3)), optional
        Line segments in canvas coordinates, and their colours.
    keep_hue : bool
        Whether hue carries information, as in directional maps. The image is then not reduced to a palette.

    Returns
    -------
    bytes
        PNG.
    """
    scale = min(WIDTH / layout.width, 6.0)
    width, height = round(layout.width * scale), round(layout.height * scale)
    margin = 92 if bars else 0
    figure = Figure(figsize=((width + margin) / DPI, height / DPI), dpi=DPI, facecolor="black")
    ax = figure.add_axes((0, 0, width / (width + margin), 1))
    ax.set_axis_off()
    large = Image.fromarray(_blacken_gaps(layout, rgb)).resize((width, height), Image.Resampling.BICUBIC)
    ax.imshow(np.asarray(large), extent=(0, layout.width, layout.height, 0), aspect="auto", interpolation="none")
    for contour in contours:
        _draw_contour(ax, contour)
    if segments is not None:
        from matplotlib.collections import LineCollection

        ax.add_collection(LineCollection(list(segments[0]), colors=segments[1], linewidths=1.3))
    ax.set_xlim(0, layout.width)
    ax.set_ylim(layout.height, 0)
    _draw_labels(ax, layout, scale)
    for index, bar in enumerate(bars):
        _draw_colour_bar(figure, bar, (width + 12) / (width + margin), index, len(bars))
    return _encode_png(figure, "hue" if keep_hue else "ramp" if bars else "grey")


def _draw_contour(ax: Axes, contour: Contour) -> None:
    canvas = contour.canvas
    if canvas.max() <= contour.level or canvas.min() >= contour.level:
        return
    height, width = canvas.shape
    ax.contour(
        np.arange(width) + 0.5,
        np.arange(height) + 0.5,
        canvas,
        levels=[contour.level],
        colors=[contour.colour],
        linewidths=contour.width,
        alpha=0.95,
    )


def _draw_labels(ax: Axes, layout: Layout, scale: float) -> None:
    """Draw orientation labels, the position of each slice in mm, and the tag of each group."""

    def write(
        x: float, y: float, text: str, size: float, colour: str, ha: str, va: str, weight: str = "normal"
    ) -> None:
        ax.text(
            x, y, text, color=colour, fontsize=size, path_effects=TEXT_OUTLINE, clip_on=False, ha=ha, va=va,
            weight=weight,
        )  # fmt: skip

    pad = 5 / scale
    for group in layout.groups:
        first, last = group.tiles[0], group.tiles[-1]
        across, up = IN_PLANE_AXES[group.plane]
        middle, right = first.y + first.height / 2, last.x + last.width - pad
        write(first.x + pad, middle, ORIENTATION_LABELS[across][0], 11, "white", ha="left", va="center", weight="bold")
        write(right, middle, ORIENTATION_LABELS[across][1], 11, "white", ha="right", va="center", weight="bold")
        # On the last slice, because the first one carries the group's tag.
        centre, bottom = last.x + last.width / 2, first.y + first.height - pad
        write(centre, first.y + pad, ORIENTATION_LABELS[up][1], 9, MUTED, ha="center", va="top", weight="bold")
        write(centre, bottom, ORIENTATION_LABELS[up][0], 9, MUTED, ha="center", va="bottom", weight="bold")
        name = "xyz"[NORMAL_AXIS[group.plane]]
        for tile in group.tiles:
            x, y = tile.x + tile.width - pad, tile.y + tile.height - pad
            write(x, y, f"{name} {round(tile.position):+d}", 7.5, MUTED, ha="right", va="bottom")
        if group.tag:
            write(first.x + pad, first.y + pad, group.tag, 10, "white", ha="left", va="top", weight="bold")


def _draw_colour_bar(figure: Figure, bar: ColourBar, left: float, index: int, count: int) -> None:
    """Draw one of `count` vertical colour bars in the right margin."""
    share = 1 / count
    pixels = figure.get_size_inches()[1] * DPI * share
    length = min(220, 0.72 * pixels) / pixels
    bottom = 1 - (index + 0.5) * share - length * share / 2
    ax = figure.add_axes((left, bottom, 0.011, length * share))
    ramp = np.linspace(0, 1, 128)[:, None]
    ax.imshow(ramp, cmap=bar.colourmap, aspect="auto", origin="lower", extent=(0, 1, *bar.limits))
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.tick_params(axis="y", colors="#e8e8e8", labelsize=8, length=2)
    ax.locator_params(axis="y", nbins=5)
    ax.set_title(bar.label, color="#e8e8e8", fontsize=8.5, loc="left", pad=7)
    for spine in ax.spines.values():
        spine.set_edgecolor("#909090")


def _encode_png(figure: Figure, kind: str) -> bytes:
    """Encode a figure as a compact PNG.

    `kind` is "grey" (64 grey levels, or 96 colours chosen by frequency if there are coloured contours), "ramp" (160
    colours that cover the range of those present, for colour maps) or "hue" (32 levels per channel, no palette).
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    if kind == "hue":
        image = Image.fromarray(np.round((pixels >> 3) * (255 / 31)).astype(np.uint8))
    elif np.ptp(pixels.astype(np.int16), axis=2).max() == 0:
        # In noisy images 64 grey levels look the same as 256, and the file is a third smaller.
        image = Image.fromarray(pixels[..., 0] >> 2).convert("P")
        image.putpalette(np.repeat(np.round(np.arange(64) * 255 / 63).astype(np.uint8), 3).tobytes())
    else:
        method = Image.Quantize.MAXCOVERAGE if kind == "ramp" else Image.Quantize.MEDIANCUT
        image = Image.fromarray(pixels).quantize(160 if kind == "ramp" else 96, method, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
