"""Report section on q-space: where the samples lie after correction for head motion, and how well each is predicted."""

from __future__ import annotations

import json

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsiprep.data.results import UnitResults
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.report.page_parts import FigureWriter, Section
from dsiprep.report.plots import BACKGROUND, FOREGROUND, MUTED, STYLE, svg
from dsiprep.report.volume_animation import volume_animation

ERROR_COLOURMAP = "viridis_r"
TITLES = {(0, 1): "from above", (0, 2): "from the front", (1, 2): "from the side"}
LABELS = ("L ↔ R", "P ↔ A", "I ↔ S")


def qspace(results: UnitResults, figures: FigureWriter) -> Section:
    """q-space samples as acquired and in the frame of the head, with their errors and lost slices."""
    dwi = results.acquired.dwi
    after, error, lost = _samples(results)
    turned = np.degrees(_angles(dwi.bvecs, after))[~dwi.is_b0]
    lost_volumes = int((lost > 0).sum())
    lead = (
        f"A volume in which the head was turned samples another direction of q-space. The directions moved by up to "
        f"{turned.max(initial=0):.1f}° (mean {turned.mean() if len(turned) else 0:.1f}°); {lost_volumes} of {len(dwi)} "
        "volumes have slices with signal dropout."
    )
    pictures = figures.single(
        "qspace",
        _projections(dwi.q, after, error, lost),
        "Three projections of the q-space samples after correction for head motion, coloured by their error.",
        "q-space samples in the frame of the head, coloured by the part of their variance that the other volumes do "
        "not predict (1 - R²); lines lead to the position as acquired, rings mark volumes with lost slices.",
        "Samples that stand out from neighbours of the same b-value deserve a look. Gaps after rotation are directions "
        "that were not measured.",
    )
    pictures += figures.single(
        "volumes",
        volume_animation(results.preprocessed),
        "Animation of the middle slices of all preprocessed volumes in order of b-value.",
        "All preprocessed volumes in order of b-value, each in its own intensity window.",
        "Nothing but the contrast should change: jumps are residual motion, bands are lost slices.",
        folded=True,
    )
    return Section("qspace", "q-space", lead, pictures, interactive=_as_json(dwi.q, after, dwi.bvals, error, lost))


def _samples(results: UnitResults) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q after rotation (n, 3), 1 - R² (n,), NaN where unknown, and the share of lost slices (n,)."""
    dwi = results.acquired.dwi
    after, error, lost = dwi.q.copy(), np.full(len(dwi), np.nan), np.zeros(len(dwi))
    for motion in results.motions:
        length = np.linalg.norm(dwi.q[motion.volumes], axis=1, keepdims=True)
        after[motion.volumes] = length * rotate_bvecs(dwi.bvecs[motion.volumes], motion.transforms)
        error[motion.volumes] = 1 - motion.r2
        if motion.outlier_slices is not None:
            lost[motion.volumes] = motion.outlier_slices.mean(1)
    error[dwi.is_b0] = np.nan
    return after, error, lost


def _angles(bvecs: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Angle between each b-vector and its sample after rotation, rad."""
    unit = after / np.maximum(np.linalg.norm(after, axis=1, keepdims=True), 1e-12)
    return np.arccos(np.clip((unit * bvecs).sum(1), -1, 1))


def _projections(before: np.ndarray, after: np.ndarray, error: np.ndarray, lost: np.ndarray) -> bytes:
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize

    norm = Normalize(0, max(float(np.nanmax(error)) if np.isfinite(error).any() else 1.0, 0.05))
    extent = float(np.abs(after).max() or 1) * 1.12
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.9), layout="constrained")
        axes: list[Axes] = list(figure.subplots(1, 3))
        for ax, (across, up) in zip(axes, TITLES, strict=True):
            pairs = np.stack([before[:, [across, up]], after[:, [across, up]]], 1)
            ax.add_collection(LineCollection(list(pairs), colors=MUTED, linewidths=0.6))
            x, y, marked = after[:, across], after[:, up], lost > 0
            ax.scatter(x, y, s=15, c=np.nan_to_num(error), cmap=ERROR_COLOURMAP, norm=norm, edgecolors=BACKGROUND,
                       linewidths=0.3, zorder=2)  # fmt: skip
            ax.scatter(x[marked], y[marked], s=46, facecolors="none", edgecolors=FOREGROUND, linewidths=0.9)
            ax.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[])
            ax.set(xlabel=LABELS[across], ylabel=LABELS[up], title=TITLES[across, up])
        bar = figure.colorbar(ScalarMappable(norm, ERROR_COLOURMAP), ax=axes, pad=0.02, fraction=0.02, aspect=28)
        bar.set_label("1 - R²")
        bar.outline.set_visible(False)
        return svg(figure)


def _as_json(before: np.ndarray, after: np.ndarray, bvals: np.ndarray, error: np.ndarray, lost: np.ndarray) -> str:
    """One row per volume for the interactive plot: q before and after relative to the largest, b, error, lost share."""
    scale = max(float(np.abs(before).max()), 1e-12)
    rows = []
    for v in range(len(bvals)):
        measured = round(float(error[v]), 3) if np.isfinite(error[v]) else None
        coordinates = np.round(np.concatenate([before[v], after[v]]) / scale, 3).tolist()
        rows.append([*coordinates, round(float(bvals[v])), measured, round(float(lost[v]), 3)])
    return json.dumps(rows, separators=(",", ":"))
