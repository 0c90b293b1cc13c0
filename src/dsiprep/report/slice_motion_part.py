"""What the report says about motion within volumes: poses by shot, where they were needed, and what they explained."""

from __future__ import annotations

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from dsiprep.data.results import Motion, UnitResults
from dsiprep.ops.image.affine import rigid_parameters
from dsiprep.report.page_parts import Fact, FigureWriter, Picture
from dsiprep.report.plots import AXIS_COLOURS, MUTED, STYLE, svg

__all__ = ["moved_within", "slice_motion_facts", "slice_motion_pictures"]

RADIUS_MM = 60.0  # at which rotations are converted to displacements, for the table of facts


def moved_within(motion: Motion) -> bool:
    """Whether any volume has poses of its own for its shots."""
    return motion.slices is not None and bool(motion.slices.moving.any())


def slice_motion_pictures(result: Motion, figures: FigureWriter, suffix: str) -> tuple[Picture, ...]:
    """Pose traces by shot; none where every volume has one pose."""
    if not moved_within(result):
        return ()
    return figures.single(
        f"shots{suffix}",
        shot_traces(result),
        "Line plots of translation and rotation of every shot; volumes that moved within themselves are shaded.",
        "Pose of the head in each shot, in order of acquisition. Shaded volumes have a pose for each shot, others one "
        "pose.",
        "Moves should be steps or ramps that lead from one resting pose to the next. A pose that swings with every "
        "second shot speaks for wrong slice times.",
    )


def slice_motion_facts(results: UnitResults) -> tuple[Fact, ...]:
    """How many volumes moved within themselves, how far, and how clearly."""
    estimated = [result for result in results.motions if result.slices is not None]
    if not estimated:
        return ()
    total = sum(len(result.volumes) for result in estimated)
    moved = [
        (result, int(row)) for result in estimated if result.slices for row in np.flatnonzero(result.slices.moving)
    ]
    count = f"{len(moved)} of {total}"
    if not moved:
        return (Fact("Volumes with motion within", count),)
    ranges = [_range_mm(result, row) for result, row in moved]
    odds = np.concatenate([result.slices.evidence[result.slices.moving] for result in estimated if result.slices])
    gaps = sum(len(result.slices.gaps) for result in estimated if result.slices)
    return (
        Fact("Volumes with motion within", count, "a pose for each shot (slice-to-volume)"),
        Fact("Motion within these volumes", f"{np.median(ranges):.1f} mm, at most {max(ranges):.1f} mm"),
        Fact("Evidence for more than one pose", f"log odds {np.median(odds):.0f}, at least {odds.min():.0f}"),
        Fact("Voxels of brain taken from the prediction", f"{gaps / len(moved):.0f} in each of these volumes"),
    )


def _range_mm(result: Motion, row: int) -> float:
    """Largest displacement between two shots of a volume, rotations at `RADIUS_MM`."""
    assert result.slices is not None
    parameters = rigid_parameters(result.slices.poses[row], result.dwiref.grid.centre)
    parameters[:, :3] *= RADIUS_MM
    return float(np.linalg.norm(parameters[:, None] - parameters, axis=-1).max())


def shot_traces(result: Motion) -> bytes:
    """Translation (mm) and rotation (degrees) of every shot, in order of acquisition."""
    assert result.slices is not None
    slices = result.slices
    count, shots = slices.poses.shape[:2]
    parameters = rigid_parameters(slices.poses.reshape(-1, 4, 4), result.dwiref.grid.centre)
    values = np.concatenate([parameters[:, 3:], np.degrees(parameters[:, :3])], axis=1)
    time = np.arange(count * shots) / shots
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True)
        for ax, first, title, unit, labels in (
            (axes[0], 0, "Translation by shot", "mm", ("right", "anterior", "superior")),
            (axes[1], 3, "Rotation by shot", "degrees", ("R axis", "A axis", "S axis")),
        ):
            for volume in np.flatnonzero(slices.moving):
                ax.axvspan(volume, volume + 1, color=MUTED, alpha=0.2, linewidth=0)
            for d, label in enumerate(labels):
                ax.plot(time, values[:, first + d], color=AXIS_COLOURS[d], linewidth=1.0, label=label)
            ax.set_title(title)
            ax.set_ylabel(unit)
            ax.grid(True, axis="y")
            ax.legend(ncols=3, loc="upper right", bbox_to_anchor=(1, 1.24), fontsize=8.5, handlelength=1.2)
        axes[1].set(xlim=(0, count), xlabel="volume")
        return svg(figure)
