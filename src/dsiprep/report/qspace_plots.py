"""Plots of the b-table check and of the quality of samples in q-space, as SVG."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsiprep.data.qspace import GradientCheck, QSpaceQuality
from dsiprep.report.plots import AXIS_COLOURS, BACKGROUND, FOREGROUND, MUTED, STYLE, svg

RIGHT, OTHER, FLOOR = AXIS_COLOURS[1], "#b8bfc9", AXIS_COLOURS[0]


def frame_lengths(check: GradientCheck) -> bytes | None:
    """Streamline length in each frame of the b-vectors, the given one highlighted; None if none were compared."""
    if not check.lengths:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.6), layout="constrained")
        ax = figure.subplots()
        rows = sorted(check.lengths, key=lambda row: -row[1])
        given = check.lengths[0][0]
        colours = [RIGHT if name == given else OTHER for name, _ in rows]
        ax.bar(range(len(rows)), [length for _, length in rows], color=colours, width=0.75)
        ax.set_xticks(range(len(rows)), [name for name, _ in rows], rotation=60, ha="right", fontsize=7.5)
        ax.set(xlim=(-0.7, len(rows) - 0.3), ylabel="mm", title="Mean streamline length; green: b-vectors as given")
        ax.grid(True, axis="y")
        return svg(figure)


def signal_and_places(quality: QSpaceQuality, bvals: np.ndarray, is_b0: np.ndarray) -> bytes:
    """Signal against |q| with the noise floor, error of prediction of each sample, and distance from the lattice."""
    q, weighted = np.sqrt(bvals), ~is_b0
    on_lattice = bool(np.isfinite(quality.offset).any())
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.3), layout="constrained")
        axes = figure.subplots(1, 3 if on_lattice else 2)
        _signal(axes[0], quality, q)
        _errors(axes[1], quality, q, weighted)
        if on_lattice:
            _places(axes[2], quality, q, weighted)
        for ax in axes:
            ax.set_xlabel("|q| = √b (√(s/mm²))")
            ax.set_xlim(left=0)
            ax.grid(True)
        return svg(figure)


def _signal(ax: Axes, quality: QSpaceQuality, q: np.ndarray) -> None:
    ax.vlines(q, quality.signal[:, 0], quality.signal[:, 2], colors=OTHER, linewidth=0.8, zorder=1)
    ax.scatter(q, quality.signal[:, 1], s=13, color=AXIS_COLOURS[2], edgecolors=BACKGROUND, linewidths=0.3, zorder=2)
    ax.axhline(quality.floor, color=FLOOR, linestyle="--", linewidth=1)
    ax.annotate("noise floor", (0, quality.floor), xytext=(4, -3), textcoords="offset points", color=FOREGROUND,
                ha="left", va="top", fontsize=8)  # fmt: skip
    ax.set_yscale("log")
    ax.set_title("Signal in the brain / b=0")


def _errors(ax: Axes, quality: QSpaceQuality, q: np.ndarray, weighted: np.ndarray) -> None:
    ax.scatter(q[weighted], quality.left_out[weighted], s=13, color=AXIS_COLOURS[2], edgecolors=BACKGROUND,
               linewidths=0.3)  # fmt: skip
    ax.axhline(quality.noise, color=MUTED, linestyle="--", linewidth=1)
    ax.annotate("noise left in the series", (0, quality.noise), xytext=(4, -3), textcoords="offset points",
                color=FOREGROUND, ha="left", va="top", fontsize=8)  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_title("Error of prediction / b=0")


def _places(ax: Axes, quality: QSpaceQuality, q: np.ndarray, weighted: np.ndarray) -> None:
    off = quality.offset > 0.5
    for chosen, colour in ((weighted & ~off, AXIS_COLOURS[2]), (weighted & off, FLOOR)):
        ax.scatter(
            q[chosen], quality.offset[chosen], s=13, color=colour, edgecolors=BACKGROUND, linewidths=0.3, clip_on=False
        )
    ax.axhline(0.5, color=FLOOR, linestyle="--", linewidth=1)
    ax.set_ylim(0, max(0.6, float(np.nanmax(quality.offset)) * 1.05))
    ax.set_title("Distance from the lattice (steps)")
