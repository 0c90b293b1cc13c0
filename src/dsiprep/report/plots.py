"""Line and scatter plots as SVG that adapt to the reader's light or dark colour scheme.

Text is kept as text, which is selectable, searchable and compact. Axes are coloured as in maps of fibre direction:
red left-right, green anterior-posterior, blue superior-inferior.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from dsiprep.data.acquisition import SamplingScheme
from dsiprep.data.dwi import DWI
from dsiprep.data.results import Drift, Motion

FOREGROUND, MUTED, BACKGROUND = "#1f2530", "#69727f", "#fefefe"
AXIS_COLOURS = ("#e5484d", "#2f9e5b", "#3f7fdb")
FD_COLOUR = "#b45bd6"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dsiprep",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": FOREGROUND,
    "axes.titlecolor": FOREGROUND,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": FOREGROUND,
    "ytick.labelcolor": FOREGROUND,
    "grid.color": MUTED,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": FOREGROUND,
    "text.color": FOREGROUND,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
# In a dark colour scheme the browser replaces these colours, which matplotlib writes as inline styles.
DARK_SCHEME_STYLE = (
    "<style>text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif}"
    "@media (prefers-color-scheme: dark){"
    f'[style*="fill: {FOREGROUND}"]{{fill:#e6e9ee!important}}'
    f'[style*="stroke: {FOREGROUND}"]{{stroke:#e6e9ee!important}}'
    f'[style*="stroke: {MUTED}"]{{stroke:#8d97a5!important}}[style*="fill: {MUTED}"]{{fill:#8d97a5!important}}'
    f'[style*="fill: {BACKGROUND}"]{{fill:#161b22!important}}'
    "}</style>"
)
# Unlike those of viridis, both ends are visible on a white and on a dark background.
B_VALUE_COLOURMAP = LinearSegmentedColormap.from_list(
    "b", ["#6d4fc4", "#3f7fdb", "#22a08c", "#7fb23a", "#e6a117", "#e0601c"]
)
LONG_DECIMAL = re.compile(r"\d+\.\d{3,}")


def svg(figure: Figure) -> bytes:
    """A figure as SVG with styles for dark colour schemes; identical figures give identical bytes."""
    out = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Two decimals suffice for coordinates, which are inside tags; text is outside and stays unchanged.
    text = re.sub(r"<[^>]*>", lambda tag: LONG_DECIMAL.sub(lambda m: f"{float(m.group()):.2f}", tag.group()), text)
    return re.sub(r"(<svg\b[^>]*>)", lambda m: m.group(1) + DARK_SCHEME_STYLE, text, count=1, flags=re.DOTALL).encode()


def _b_value_norm(bvals: np.ndarray) -> Normalize:
    return Normalize(0, max(float(np.max(bvals)), 1.0))


def _b_value_colour_bar(figure: Figure, ax: Axes | list[Axes], norm: Normalize) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, B_VALUE_COLOURMAP), ax=ax, pad=0.02, fraction=0.025, aspect=28)
    bar.set_label("b (s/mm²)")
    bar.outline.set_visible(False)


def sampling(dwi: DWI, scheme: SamplingScheme) -> bytes:
    """q-space samples as acquired, in an oblique view and three projections, and the b-value of each volume."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        grid = figure.add_gridspec(2, 4, height_ratios=(3, 1), width_ratios=(1.25, 1, 1, 1))
        norm = _b_value_norm(dwi.bvals)
        top = [figure.add_subplot(grid[0, column]) for column in range(4)]
        _oblique_view(top[0], dwi, norm)
        for ax, (across, up) in zip(top[1:], ((0, 1), (0, 2), (1, 2)), strict=True):
            _projection(ax, dwi, norm, across, up)
        _b_value_colour_bar(figure, top, norm)
        _b_value_series(figure.add_subplot(grid[1, :]), dwi, norm)
        return svg(figure)


def _oblique_view(ax: Axes, dwi: DWI, norm: Normalize) -> None:
    """All samples viewed from behind, left and above, with the three axes; nearer samples are larger."""
    azimuth, elevation = np.radians(25), np.radians(22)
    across = np.array([np.cos(azimuth), -np.sin(azimuth), 0])
    towards_viewer = np.array(
        [-np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation)]
    )
    rotation = np.stack([across, np.cross(towards_viewer, across), towards_viewer])
    extent = float(np.abs(dwi.q).max() or 1) * 1.15
    for d, name in enumerate("RAS"):
        tip = rotation @ (np.eye(3)[d] * extent)
        ax.plot([-tip[0], tip[0]], [-tip[1], tip[1]], color=AXIS_COLOURS[d], linewidth=1.1, zorder=1)
        ax.text(tip[0] * 1.08, tip[1] * 1.08, name, color=AXIS_COLOURS[d], ha="center", va="center", weight="bold")
    projected = dwi.q @ rotation.T
    order = np.argsort(projected[:, 2])
    # Depth is shown by three marker sizes only: matplotlib writes one shape per size, which keeps the file small.
    for part, size in zip(np.array_split(order, 3), (13, 21, 31), strict=True):
        ax.scatter(projected[part, 0], projected[part, 1], s=size, c=dwi.bvals[part], cmap=B_VALUE_COLOURMAP, norm=norm,
                   edgecolors=BACKGROUND, linewidths=0.4, zorder=2)  # fmt: skip
    ax.set(xlim=(-extent * 1.05, extent * 1.05), ylim=(-extent * 1.05, extent * 1.05), aspect="equal")
    ax.set_title("q-space, as acquired")
    ax.set_axis_off()


def _projection(ax: Axes, dwi: DWI, norm: Normalize, across: int, up: int) -> None:
    """Projection of the samples along one axis; where points overlap, the one with the lowest b-value is shown."""
    extent = float(np.abs(dwi.q).max() or 1) * 1.15
    order = np.argsort(dwi.bvals, kind="stable")
    cells = np.round(dwi.q[order][:, [across, up]] / extent * 150)
    shown = order[np.unique(cells, axis=0, return_index=True)[1]]
    ax.scatter(dwi.q[shown, across], dwi.q[shown, up], s=17, c=dwi.bvals[shown], cmap=B_VALUE_COLOURMAP, norm=norm,
               edgecolors=BACKGROUND, linewidths=0.4)  # fmt: skip
    axis_labels = ("L ↔ R", "P ↔ A", "I ↔ S")
    ax.set(
        xlim=(-extent, extent),
        ylim=(-extent, extent),
        aspect="equal",
        xlabel=axis_labels[across],
        ylabel=axis_labels[up],
    )
    ax.set(xticks=[0], yticks=[0], xticklabels=[], yticklabels=[])
    ax.set_title({1: "from above", 2: "from the front" if across == 0 else "from the side"}[up])
    ax.grid(True)


def _b_value_series(ax: Axes, dwi: DWI, norm: Normalize) -> None:
    """b-value of each volume in order of acquisition, with the boundaries between runs."""
    index = np.arange(len(dwi))
    colours = B_VALUE_COLOURMAP(norm(dwi.bvals))
    ax.vlines(
        index,
        0,
        np.maximum(dwi.bvals, float(dwi.bvals.max()) * 0.02),
        colors=colours,
        linewidth=min(2.4, 620 / len(index)),
    )
    ax.scatter(
        index[dwi.is_b0], np.zeros(int(dwi.is_b0.sum())), marker="^", s=18, color=FOREGROUND, zorder=3, clip_on=False
    )
    for boundary in np.flatnonzero(np.diff(dwi.run)):
        ax.axvline(boundary + 0.5, color=MUTED, linestyle=":", linewidth=1)
    ax.set(
        xlim=(-1, len(index)), ylim=(0, None), xlabel="volume (▲ b=0; dotted line: start of a run)", ylabel="b (s/mm²)"
    )


def signal_drift(drift: Drift, run: np.ndarray) -> bytes:
    """Signal of volumes relative to the first of their run, as measured and as fitted."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.4), layout="constrained")
        ax, index = figure.add_subplot(), np.arange(len(run))
        ax.scatter(index, drift.measured, s=14, color=AXIS_COLOURS[2], edgecolors="none")
        for number in np.unique(run):
            ax.plot(index[run == number], drift.gains[run == number], color=FOREGROUND, linewidth=1.4)
        ax.grid(axis="y")
        ax.set(xlim=(-1, len(run)), xlabel="volume", ylabel="signal, relative")
        return svg(figure)


def motion(parameters: np.ndarray, fd: np.ndarray, bvals: np.ndarray, outliers: np.ndarray, is_b0: np.ndarray) -> bytes:
    """Translation, rotation, framewise displacement, outlier slices and b-value of each volume.

    Parameters
    ----------
    parameters : ndarray, (n, 6)
        Translation (mm) along, then rotation (degrees) about, right, anterior and superior.
    fd : ndarray, (n,)
        Framewise displacement in mm; NaN where undefined, as in the first volume of a run.
    bvals : ndarray, (n,)
        b-values in s/mm².
    outliers : ndarray, (n,)
        Number of outlier slices.
    is_b0 : ndarray, (n,), bool
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 6.0), layout="constrained")
        axes = figure.subplots(5, 1, sharex=True, height_ratios=(3, 3, 2.2, 1.3, 0.5))
        index = np.arange(len(bvals))
        for ax, first, title, unit, labels in (
            (axes[0], 0, "Translation", "mm", ("right", "anterior", "superior")),
            (axes[1], 3, "Rotation", "degrees", ("R axis", "A axis", "S axis")),
        ):
            for d, label in enumerate(labels):
                ax.plot(index, parameters[:, first + d], color=AXIS_COLOURS[d], linewidth=1.2, label=label)
            ax.set_title(title)
            ax.set_ylabel(unit)
            ax.legend(ncols=3, loc="upper right", bbox_to_anchor=(1, 1.24), fontsize=8.5, handlelength=1.2)
        axes[2].fill_between(index, np.nan_to_num(fd), step="mid", color=FD_COLOUR, alpha=0.35, linewidth=0)
        axes[2].step(index, fd, where="mid", color=FD_COLOUR, linewidth=0.9)
        mean = float(np.nanmean(fd)) if np.isfinite(fd).any() else 0.0
        axes[2].axhline(mean, color=FOREGROUND, linestyle="--", linewidth=0.8)
        axes[2].set_title(f"Framewise displacement, mean {mean:.2f} mm")
        axes[2].set(ylabel="mm", ylim=(0, max(0.1, float(np.nanmax(np.nan_to_num(fd))) * 1.12)))
        axes[3].bar(index, outliers, width=1.0, color="#e07b1f")
        axes[3].set_title(f"Outlier slices, {int(outliers.sum())} in total")
        axes[3].set(ylabel="slices", ylim=(0, max(3, int(outliers.max(initial=0)) + 1)))
        _b_value_strip(axes[4], bvals, is_b0)
        for ax in axes[:4]:
            ax.grid(True, axis="y")
        return svg(figure)


def _b_value_strip(ax: Axes, bvals: np.ndarray, is_b0: np.ndarray) -> None:
    """b-values as a strip of colours, with b=0 volumes marked."""
    from matplotlib.collections import PolyCollection

    norm = _b_value_norm(bvals)
    boxes = [[(v - 0.5, 0), (v + 0.5, 0), (v + 0.5, 1), (v - 0.5, 1)] for v in range(len(bvals))]
    ax.add_collection(PolyCollection(boxes, facecolors=B_VALUE_COLOURMAP(norm(bvals)), linewidths=0))
    ax.scatter(
        np.flatnonzero(is_b0), np.full(int(is_b0.sum()), -0.35), marker="^", s=14, color=FOREGROUND, clip_on=False
    )
    ax.set(xlim=(-0.5, len(bvals) - 0.5), ylim=(0, 1), yticks=[])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(f"volume; colour: b-value from 0 (violet) to {bvals.max():.0f} s/mm² (orange); ▲ b=0", labelpad=6)
    for spine in ax.spines.values():
        spine.set_visible(False)


def poses_by_iteration(trace: Sequence[dict[str, Any]]) -> list[tuple[int, np.ndarray]]:
    """Poses of a motion trace by iteration, [(iteration, (volumes, 6))]: translations (mm), then rotations (rad)."""
    names = ("shiftX", "shiftY", "shiftZ", "rotateX", "rotateY", "rotateZ")
    rows = [row for row in trace if "iter_num" in row and all(name in row for name in names)]
    numbers = sorted({int(row["iter_num"]) for row in rows})
    poses = [[[row[name] for name in names] for row in rows if int(row["iter_num"]) == n] for n in numbers]
    return [(n, np.array(group, float)) for n, group in zip(numbers, poses, strict=True)]


def motion_convergence(result: Motion, bvals: np.ndarray, is_b0: np.ndarray) -> bytes:
    """Change of pose between iterations, and agreement with the prediction against b-value."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.2, 1.2))
        _pose_changes(left, poses_by_iteration(result.trace))
        norm = _b_value_norm(bvals)
        for ax, values, title in (
            (middle, result.r2, "R² of the prediction"),
            (right, result.xcorr, "Correlation with the prediction"),
        ):
            shown = np.isfinite(values)
            ax.scatter(
                bvals[shown], values[shown], c=bvals[shown], cmap=B_VALUE_COLOURMAP, norm=norm, s=17,
                edgecolors=BACKGROUND, linewidths=0.4,
            )  # fmt: skip
            ax.set(xlabel="b (s/mm²)", title=title)
            highest = float(np.max(values[shown], initial=0))
            ax.set_ylim(top=1.02 if highest <= 1 else None)
            ax.grid(True)
        return svg(figure)


def _pose_changes(ax: Axes, poses: list[tuple[int, np.ndarray]]) -> None:
    """Mean and maximum change of pose between successive iterations, with the weights of framewise displacement."""
    ax.set_title("Change of pose between iterations")
    changes = [
        (iteration, np.abs(after - before) @ np.array([1, 1, 1, 50, 50, 50.0]))
        for (_, before), (iteration, after) in pairwise(poses)
        if before.shape == after.shape
    ]
    if not changes:
        ax.text(0.5, 0.5, "only one iteration", ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
        return
    iterations = [iteration for iteration, _ in changes]
    floor = 1e-4
    largest = [max(change.max(), floor) for _, change in changes]
    mean = [max(change.mean(), floor) for _, change in changes]
    ax.semilogy(iterations, largest, "o-", color=AXIS_COLOURS[0], label="maximum", ms=4)
    ax.semilogy(iterations, mean, "o-", color=AXIS_COLOURS[2], label="mean", ms=4)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="iteration", ylabel="mm", xticks=iterations)
    ax.legend(fontsize=8.5)
    ax.grid(True)


def slice_residuals(
    slice_z: np.ndarray, outliers: np.ndarray | None, bvals: np.ndarray, is_b0: np.ndarray, axis: str
) -> bytes:
    """Heat map of the residual z-scores of slices, (n, slices), with outlier slices, (n, slices) bool, marked."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        ax, strip = figure.subplots(2, 1, sharex=True, height_ratios=(9, 0.5))
        shown = ax.imshow(
            slice_z.T, cmap="RdBu_r", vmin=-6, vmax=6, origin="lower", aspect="auto", interpolation="nearest"
        )
        volume, position = np.nonzero(np.zeros(slice_z.shape) if outliers is None else outliers)
        ax.scatter(volume, position, marker="s", s=16, facecolors="none", edgecolors=FOREGROUND, linewidths=0.8)
        ax.set(ylabel=f"slice along {axis}")
        ax.set_title(f"Outlier slices: {len(volume)}")
        bar = figure.colorbar(shown, ax=[ax, strip], pad=0.01, fraction=0.02, aspect=30)
        bar.set_label("residual (z-score)")
        bar.outline.set_visible(False)
        _b_value_strip(strip, bvals, is_b0)
        return svg(figure)


def distortion_convergence(trace: Sequence[dict[str, float]]) -> bytes | None:
    """Change of the displacement per iteration, by pyramid level; None if fewer than two changes were recorded."""
    rows = [row for row in trace if np.isfinite(row.get("change_mm", np.nan))]
    if len(rows) < 2:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.4), layout="constrained")
        ax = figure.subplots()
        levels = np.array([row.get("level", 0) for row in rows])
        change = np.maximum([row["change_mm"] for row in rows], 1e-4)
        for number, level in enumerate(dict.fromkeys(levels.tolist())):
            index = np.flatnonzero(levels == level)
            ax.semilogy(index, change[index], "o-", color=AXIS_COLOURS[(2, 1, 0)[number % 3]], markersize=4)
            label_position: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(f"level {number + 1}", (index[0], change[index[0]]), color=FOREGROUND, **label_position)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(
            xlabel="iteration",
            ylabel="mm",
            title="Change of the displacement per iteration, from coarse to fine pyramid levels",
        )
        ax.grid(True)
        return svg(figure)
