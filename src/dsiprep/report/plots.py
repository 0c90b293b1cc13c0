"""Curves and scatter plots as SVG that turn light on dark with the reader's screen.

Text stays text (selectable, searchable, small). One set of colours is used throughout: R-L red, A-P green,
S-I blue, as in the colour maps of fibre direction.
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
from dsiprep.data.results import Motion

INK, SOFT, PAPER = "#1f2530", "#69727f", "#fefefe"
AXES = ("#e5484d", "#2f9e5b", "#3f7fdb")
FD = "#b45bd6"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dsiprep",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": SOFT,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}
# Stand-in colours are exchanged by the reader's browser; matplotlib writes them as inline styles.
DARK = (
    "<style>text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif}"
    "@media (prefers-color-scheme: dark){"
    f'[style*="fill: {INK}"]{{fill:#e6e9ee!important}}[style*="stroke: {INK}"]{{stroke:#e6e9ee!important}}'
    f'[style*="stroke: {SOFT}"]{{stroke:#8d97a5!important}}[style*="fill: {SOFT}"]{{fill:#8d97a5!important}}'
    f'[style*="fill: {PAPER}"]{{fill:#161b22!important}}'
    "}</style>"
)
# Neither end is lost on white paper or on a dark screen, as viridis' would be.
B_COLOURS = LinearSegmentedColormap.from_list("b", ["#6d4fc4", "#3f7fdb", "#22a08c", "#7fb23a", "#e6a117", "#e0601c"])


LONG = re.compile(r"\d+\.\d{3,}")


def svg(figure: Figure) -> bytes:
    """A figure as SVG text with the rule for dark screens, the same bytes for the same picture."""
    out = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    text = out.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Coordinates need two decimals; the numbers that people read stand outside the tags.
    text = re.sub(r"<[^>]*>", lambda tag: LONG.sub(lambda m: f"{float(m.group()):.2f}", tag.group()), text)
    return re.sub(r"(<svg\b[^>]*>)", lambda m: m.group(1) + DARK, text, count=1, flags=re.DOTALL).encode()


def _b_norm(bvals: np.ndarray) -> Normalize:
    return Normalize(0, max(float(np.max(bvals)), 1.0))


def _b_bar(figure: Figure, ax: Axes | list[Axes], norm: Normalize) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(norm, B_COLOURS), ax=ax, pad=0.02, fraction=0.025, aspect=28)
    bar.set_label("b (s/mm²)")
    bar.outline.set_visible(False)


def sampling(dwi: DWI, scheme: SamplingScheme) -> bytes:
    """Where q-space was sampled: from an angle and along each axis, as acquired, and b over the series."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        grid = figure.add_gridspec(2, 4, height_ratios=(3, 1), width_ratios=(1.25, 1, 1, 1))
        norm = _b_norm(dwi.bvals)
        top = [figure.add_subplot(grid[0, column]) for column in range(4)]
        _oblique(top[0], dwi, norm)
        for ax, (across, up) in zip(top[1:], ((0, 1), (0, 2), (1, 2)), strict=True):
            _projection(ax, dwi, norm, across, up)
        _b_bar(figure, top, norm)
        _b_series(figure.add_subplot(grid[1, :]), dwi, norm)
        return svg(figure)


def _oblique(ax: Axes, dwi: DWI, norm: Normalize) -> None:
    """All points from behind, left and above, nearer ones larger, with the three axes."""
    turn, lift = np.radians(25), np.radians(22)
    across = np.array([np.cos(turn), -np.sin(turn), 0])
    towards = np.array([-np.sin(turn) * np.cos(lift), -np.cos(turn) * np.cos(lift), np.sin(lift)])
    frame = np.stack([across, np.cross(towards, across), towards])
    reach = float(np.abs(dwi.q).max() or 1) * 1.15
    for d, name in enumerate("RAS"):
        tip = frame @ (np.eye(3)[d] * reach)
        ax.plot([-tip[0], tip[0]], [-tip[1], tip[1]], color=AXES[d], linewidth=1.1, zorder=1)
        ax.text(tip[0] * 1.08, tip[1] * 1.08, name, color=AXES[d], ha="center", va="center", weight="bold")
    seen = dwi.q @ frame.T
    order = np.argsort(seen[:, 2])
    # Three sizes stand for depth: one drawn shape each keeps the file small.
    for part, size in zip(np.array_split(order, 3), (13, 21, 31), strict=True):
        ax.scatter(seen[part, 0], seen[part, 1], s=size, c=dwi.bvals[part], cmap=B_COLOURS, norm=norm,
                   edgecolors=PAPER, linewidths=0.4, zorder=2)  # fmt: skip
    ax.set(xlim=(-reach * 1.05, reach * 1.05), ylim=(-reach * 1.05, reach * 1.05), aspect="equal")
    ax.set_title("q-space, as acquired")
    ax.set_axis_off()


def _projection(ax: Axes, dwi: DWI, norm: Normalize, across: int, up: int) -> None:
    """q along one axis; where points hide behind each other, the one of lowest b is shown."""
    reach = float(np.abs(dwi.q).max() or 1) * 1.15
    order = np.argsort(dwi.bvals, kind="stable")
    places = np.round(dwi.q[order][:, [across, up]] / reach * 150)
    shown = order[np.unique(places, axis=0, return_index=True)[1]]
    ax.scatter(dwi.q[shown, across], dwi.q[shown, up], s=17, c=dwi.bvals[shown], cmap=B_COLOURS, norm=norm,
               edgecolors=PAPER, linewidths=0.4)  # fmt: skip
    ends = ("L ↔ R", "P ↔ A", "I ↔ S")
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel=ends[across], ylabel=ends[up])
    ax.set(xticks=[0], yticks=[0], xticklabels=[], yticklabels=[])
    ax.set_title({1: "from above", 2: "from the front" if across == 0 else "from the side"}[up])
    ax.grid(True)


def _b_series(ax: Axes, dwi: DWI, norm: Normalize) -> None:
    """b-value of each volume in order, with the borders of the runs."""
    index = np.arange(len(dwi))
    colours = B_COLOURS(norm(dwi.bvals))
    ax.vlines(
        index,
        0,
        np.maximum(dwi.bvals, float(dwi.bvals.max()) * 0.02),
        colors=colours,
        linewidth=min(2.4, 620 / len(index)),
    )
    ax.scatter(index[dwi.is_b0], np.zeros(int(dwi.is_b0.sum())), marker="^", s=18, color=INK, zorder=3, clip_on=False)
    for border in np.flatnonzero(np.diff(dwi.run)):
        ax.axvline(border + 0.5, color=SOFT, linestyle=":", linewidth=1)
    ax.set(xlim=(-1, len(index)), ylim=(0, None), xlabel="volume (▲ b=0; dotted: a new run)", ylabel="b (s/mm²)")


def motion(parameters: np.ndarray, fd: np.ndarray, bvals: np.ndarray, outliers: np.ndarray, is_b0: np.ndarray) -> bytes:
    """Translation, rotation, framewise displacement and outlier slices over the series, b-values beneath.

    Parameters
    ----------
    parameters : ndarray, (n, 6)
        Translation in mm, rotation in degrees, along R, A, S.
    fd : ndarray, (n,)
        mm; the first value may be NaN.
    bvals, outliers : ndarray, (n,)
        s/mm²; number of outlier slices.
    is_b0 : ndarray, (n,), bool
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 6.0), layout="constrained")
        axes = figure.subplots(5, 1, sharex=True, height_ratios=(3, 3, 2.2, 1.3, 0.5))
        index = np.arange(len(bvals))
        for ax, first, title, unit in (
            (axes[0], 0, "Translation", "mm"),
            (axes[1], 3, "Rotation", "degrees"),
        ):
            for d, name in enumerate(("right", "anterior", "superior")):
                label = f"about {name}" if first else name
                ax.plot(index, parameters[:, first + d], color=AXES[d], linewidth=1.2, label=label)
            ax.set_title(title)
            ax.set_ylabel(unit)
            ax.legend(ncols=3, loc="upper right", bbox_to_anchor=(1, 1.24), fontsize=8.5, handlelength=1.2)
        axes[2].fill_between(index, np.nan_to_num(fd), step="mid", color=FD, alpha=0.35, linewidth=0)
        axes[2].step(index, fd, where="mid", color=FD, linewidth=0.9)
        mean = float(np.nanmean(fd)) if np.isfinite(fd).any() else 0.0
        axes[2].axhline(mean, color=INK, linestyle="--", linewidth=0.8)
        axes[2].set_title(f"Framewise displacement, mean {mean:.2f} mm")
        axes[2].set(ylabel="mm", ylim=(0, max(0.1, float(np.nanmax(np.nan_to_num(fd))) * 1.12)))
        axes[3].bar(index, outliers, width=1.0, color="#e07b1f")
        axes[3].set_title(f"Outlier slices, {int(outliers.sum())} in all")
        axes[3].set(ylabel="slices", ylim=(0, max(3, int(outliers.max(initial=0)) + 1)))
        _strip(axes[4], bvals, is_b0)
        for ax in axes[:4]:
            ax.grid(True, axis="y")
        return svg(figure)


def _strip(ax: Axes, bvals: np.ndarray, is_b0: np.ndarray) -> None:
    """b-values as one coloured line under a series."""
    from matplotlib.collections import PolyCollection

    norm = _b_norm(bvals)
    boxes = [[(v - 0.5, 0), (v + 0.5, 0), (v + 0.5, 1), (v - 0.5, 1)] for v in range(len(bvals))]
    ax.add_collection(PolyCollection(boxes, facecolors=B_COLOURS(norm(bvals)), linewidths=0))
    ax.scatter(np.flatnonzero(is_b0), np.full(int(is_b0.sum()), -0.35), marker="^", s=14, color=INK, clip_on=False)
    ax.set(xlim=(-0.5, len(bvals) - 0.5), ylim=(0, 1), yticks=[])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(f"volume; colour: b from 0 (violet) to {bvals.max():.0f} s/mm² (orange), ▲ b=0", labelpad=6)
    for spine in ax.spines.values():
        spine.set_visible(False)


def rounds(trace: Sequence[dict[str, Any]]) -> list[tuple[int, np.ndarray]]:
    """Poses by round of a motion trace, [(round, (volumes, 6))]: shifts in mm, then rotations."""
    names = ("shiftX", "shiftY", "shiftZ", "rotateX", "rotateY", "rotateZ")
    rows = [row for row in trace if "iter_num" in row and all(name in row for name in names)]
    numbers = sorted({int(row["iter_num"]) for row in rows})
    groups = [[[row[name] for name in names] for row in rows if int(row["iter_num"]) == n] for n in numbers]
    return [(n, np.array(group, float)) for n, group in zip(numbers, groups, strict=True)]


def convergence(result: Motion, bvals: np.ndarray, is_b0: np.ndarray) -> bytes:
    """How far poses moved between rounds, and agreement with the prediction against b."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.2, 1.2))
        _steps(left, rounds(result.trace))
        norm = _b_norm(bvals)
        for ax, values, title in (
            (middle, result.r2, "R² with the prediction"),
            (right, result.xcorr, "Correlation with the prediction"),
        ):
            shown = np.isfinite(values)
            ax.scatter(
                bvals[shown], values[shown], c=bvals[shown], cmap=B_COLOURS, norm=norm, s=17,
                edgecolors=PAPER, linewidths=0.4,
            )  # fmt: skip
            ax.set(xlabel="b (s/mm²)", title=title)
            high = float(np.max(values[shown], initial=0))
            ax.set_ylim(top=1.02 if high <= 1 else None)
            ax.grid(True)
        return svg(figure)


def _steps(ax: Axes, groups: list[tuple[int, np.ndarray]]) -> None:
    """Mean and largest change of pose from each round to the next, as FD counts it."""
    ax.set_title("Change of pose between rounds")
    pairs = [
        (b, np.abs(after - before) @ np.array([1, 1, 1, 50, 50, 50.0]))
        for (_, before), (b, after) in pairwise(groups)
        if before.shape == after.shape
    ]
    if not pairs:
        ax.text(0.5, 0.5, "one round: nothing to compare", ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
        return
    numbers = [n for n, _ in pairs]
    floor = 1e-4
    ax.semilogy(numbers, [max(s.max(), floor) for _, s in pairs], "o-", color=AXES[0], label="largest", ms=4)
    ax.semilogy(numbers, [max(s.mean(), floor) for _, s in pairs], "o-", color=AXES[2], label="mean", ms=4)
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="round", ylabel="mm", xticks=numbers)
    ax.legend(fontsize=8.5)
    ax.grid(True)


def slices(slice_z: np.ndarray, lost: np.ndarray | None, bvals: np.ndarray, is_b0: np.ndarray, axis: str) -> bytes:
    """z-scores of slices, volumes across, with the lost ones (n, slices) boxed."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        ax, strip = figure.subplots(2, 1, sharex=True, height_ratios=(9, 0.5))
        shown = ax.imshow(
            slice_z.T, cmap="RdBu_r", vmin=-6, vmax=6, origin="lower", aspect="auto", interpolation="nearest"
        )
        volume, cut = np.nonzero(np.zeros(slice_z.shape) if lost is None else lost)
        ax.scatter(volume, cut, marker="s", s=16, facecolors="none", edgecolors=INK, linewidths=0.8)
        ax.set(ylabel=f"slice along {axis}")
        ax.set_title(f"Slices that lost signal: {len(volume)}")
        bar = figure.colorbar(shown, ax=[ax, strip], pad=0.01, fraction=0.02, aspect=30)
        bar.set_label("z of the residual")
        bar.outline.set_visible(False)
        _strip(strip, bvals, is_b0)
        return svg(figure)


def descent(trace: Sequence[dict[str, float]]) -> bytes | None:
    """How far the displacement still moved from one iteration to the next, by level; None where not recorded."""
    rows = [row for row in trace if np.isfinite(row.get("change_mm", np.nan))]
    if len(rows) < 2:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.4), layout="constrained")
        ax = figure.subplots()
        levels = np.array([row.get("level", 0) for row in rows])
        change = np.maximum([row["change_mm"] for row in rows], 1e-4)
        for number, level in enumerate(dict.fromkeys(levels.tolist())):
            at = np.flatnonzero(levels == level)
            ax.semilogy(at, change[at], "o-", color=AXES[(2, 1, 0)[number % 3]], markersize=4)
            place: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(f"level {number + 1}", (at[0], change[at[0]]), color=INK, **place)
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set(xlabel="iteration", ylabel="mm", title="Change of the displacement per iteration, coarse to fine")
        ax.grid(True)
        return svg(figure)
