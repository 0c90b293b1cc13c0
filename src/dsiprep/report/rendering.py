"""From a canvas of slices to a PNG: colour maps, contours, orientation letters, colour bars.

CachedResult apart from what the pictures mean (`figures.py`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from dsiprep.report.slice_layout import ACROSS, LETTERS, NORMAL, Layout

WIDTH = 1240  # pixels; more would only cost space
DPI = 100
BRAIN, WHITE, GREY, FLUID = "#ffb000", "#4cc9f0", "#ff5d8f", "#7bd389"
QUIET = "#cccccc"
OUTLINE = [patheffects.withStroke(linewidth=2.2, foreground="black")]

# Signed maps on black: nothing is black, more is brighter, blue below and red above.
SIGNED = LinearSegmentedColormap.from_list(
    "signed", ["#d7f3ff", "#35b5f2", "#1451b8", "#000000", "#b3261e", "#f58b2a", "#fff3c4"]
)


@dataclass(frozen=True, eq=False)
class Contour:
    """The outline of a canvas (mask or probability) at one half, in one colour."""

    canvas: np.ndarray
    colour: str
    width: float = 1.1
    level: float = 0.5


@dataclass(frozen=True)
class Bar:
    """A colour bar: colour map, limits and unit."""

    colours: str | Colormap
    limits: tuple[float, float]
    label: str


def colour(canvas: np.ndarray, limits: tuple[float, float], colours: str | Colormap = "gray") -> np.ndarray:
    """A canvas (h, w) through a colour map to RGB (h, w, 3), uint8."""
    low, high = limits
    scaled = np.clip((canvas - low) / max(high - low, 1e-12), 0, 1)
    chosen = colormaps[colours] if isinstance(colours, str) else colours
    return chosen(np.nan_to_num(scaled), bytes=True)[..., :3]


def blacken(layout: Layout, rgb: np.ndarray) -> np.ndarray:
    """The same RGB with black between the tiles, where a colour map would have put its own zero."""
    inside = np.zeros(rgb.shape[:2], bool)
    for tile in layout.tiles:
        inside[tile.y : tile.y + tile.height, tile.x : tile.x + tile.width] = True
    return np.where(inside[..., None], rgb, 0).astype(np.uint8)


def picture(
    layout: Layout,
    rgb: np.ndarray,
    contours: Sequence[Contour] = (),
    bars: Sequence[Bar] = (),
    sticks: tuple[np.ndarray, np.ndarray] | None = None,
    hue: bool = False,
) -> bytes:
    """Slices as a PNG with letters for left, right, front, back, top and bottom.

    Parameters
    ----------
    layout : Layout
    rgb : ndarray, (h, w, 3), uint8
        Colours on the layout's canvas.
    contours : sequence of Contour
        Outlines on the same canvas.
    bars : sequence of Bar
        Colour bars in the right margin, from the top.
    sticks : (ndarray (m, 2, 2), ndarray (m, 3)), optional
        Line segments in canvas coordinates, and their colours.
    hue : bool
        Whether hue has a meaning of its own, as in maps of direction: colours are then kept true.

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
    large = Image.fromarray(blacken(layout, rgb)).resize((width, height), Image.Resampling.BICUBIC)
    ax.imshow(np.asarray(large), extent=(0, layout.width, layout.height, 0), aspect="auto", interpolation="none")
    for contour in contours:
        _outline(ax, contour)
    if sticks is not None:
        from matplotlib.collections import LineCollection

        ax.add_collection(LineCollection(list(sticks[0]), colors=sticks[1], linewidths=1.3))
    ax.set_xlim(0, layout.width)
    ax.set_ylim(layout.height, 0)
    _letters(ax, layout, scale)
    for index, bar in enumerate(bars):
        _bar(figure, bar, (width + 12) / (width + margin), index, len(bars))
    return encode(figure, "hue" if hue else "ramp" if bars else "grey")


def _outline(ax: Axes, contour: Contour) -> None:
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


def _letters(ax: Axes, layout: Layout, scale: float) -> None:
    """Orientation at the ends of each row, the cut of each slice, and what a row shows."""

    def write(x: float, y: float, text: str, size: float, bright: str, **place: Any) -> None:
        ax.text(x, y, text, color=bright, fontsize=size, path_effects=OUTLINE, clip_on=False, **place)

    pad = 5 / scale
    for group in layout.groups:
        first, last = group.tiles[0], group.tiles[-1]
        across, up = ACROSS[group.plane]
        middle, right = first.y + first.height / 2, last.x + last.width - pad
        write(first.x + pad, middle, LETTERS[across][0], 11, "white", ha="left", va="center", weight="bold")
        write(right, middle, LETTERS[across][1], 11, "white", ha="right", va="center", weight="bold")
        # On the last slice: the first one bears the group's name.
        centre, bottom = last.x + last.width / 2, first.y + first.height - pad
        write(centre, first.y + pad, LETTERS[up][1], 9, QUIET, ha="center", va="top", weight="bold")
        write(centre, bottom, LETTERS[up][0], 9, QUIET, ha="center", va="bottom", weight="bold")
        name = "xyz"[NORMAL[group.plane]]
        for tile in group.tiles:
            x, y = tile.x + tile.width - pad, tile.y + tile.height - pad
            write(x, y, f"{name} {round(tile.position):+d}", 7.5, QUIET, ha="right", va="bottom")
        if group.tag:
            write(first.x + pad, first.y + pad, group.tag, 10, "white", ha="left", va="top", weight="bold")


def _bar(figure: Figure, bar: Bar, left: float, index: int, count: int) -> None:
    """One upright colour bar in the right margin."""
    share = 1 / count
    pixels = figure.get_size_inches()[1] * DPI * share
    length = min(220, 0.72 * pixels) / pixels
    bottom = 1 - (index + 0.5) * share - length * share / 2
    ax = figure.add_axes((left, bottom, 0.011, length * share))
    ramp = np.linspace(0, 1, 128)[:, None]
    ax.imshow(ramp, cmap=bar.colours, aspect="auto", origin="lower", extent=(0, 1, *bar.limits))
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.tick_params(axis="y", colors="#e8e8e8", labelsize=8, length=2)
    ax.locator_params(axis="y", nbins=5)
    ax.set_title(bar.label, color="#e8e8e8", fontsize=8.5, loc="left", pad=7)
    for spine in ax.spines.values():
        spine.set_edgecolor("#909090")


def encode(figure: Figure, kind: str) -> bytes:
    """A figure as a small PNG.

    `kind` is "grey" (64 greys; outlines in colour make it 96 colours, the most frequent ones), "ramp" (160 colours
    spread over all that occur, for colour maps) or "hue" (each channel in 32 steps, no palette).
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    if kind == "hue":
        image = Image.fromarray(np.round((pixels >> 3) * (255 / 31)).astype(np.uint8))
    elif np.ptp(pixels.astype(np.int16), axis=2).max() == 0:
        # The eye does not tell 64 greys from 256 in a noisy image; a file is a third smaller for it.
        image = Image.fromarray(pixels[..., 0] >> 2).convert("P")
        image.putpalette(np.repeat(np.round(np.arange(64) * 255 / 63).astype(np.uint8), 3).tobytes())
    else:
        method = Image.Quantize.MAXCOVERAGE if kind == "ramp" else Image.Quantize.MEDIANCUT
        image = Image.fromarray(pixels).quantize(160 if kind == "ramp" else 96, method, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    return out.getvalue()
