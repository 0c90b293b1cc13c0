"""Report section on head motion: estimates, realignment, and agreement with the predictions."""

from __future__ import annotations

import numpy as np

from dsiprep.data.results import Motion, UnitResults
from dsiprep.ops.image.affine import rigid_parameters
from dsiprep.report import plots, slice_figures
from dsiprep.report.page_parts import Fact, FigureWriter, Picture, Section
from dsiprep.report.slice_motion_part import slice_motion_facts, slice_motion_pictures
from dsiprep.report.wording import BLIPS, OUTLIER_HANDLING

AXIS_NAMES = ("left-right", "posterior-anterior", "inferior-superior")


def motion_parameters(motions: tuple[Motion, ...], count: int) -> np.ndarray:
    """Translation (mm) and rotation (degrees) of each volume about the centre of the dwiref, (n, 6)."""
    values = np.full((count, 6), np.nan)
    for result in motions:
        parameters = rigid_parameters(result.transforms, result.dwiref.grid.centre)
        values[result.volumes] = np.concatenate([parameters[:, 3:], np.degrees(parameters[:, :3])], axis=1)
    return values


def motion(results: UnitResults, figures: FigureWriter) -> Section:
    """Head motion estimates and their agreement with the images."""
    dwi = results.acquired.dwi
    outliers = np.zeros(len(dwi))
    for result in results.motions:
        if result.outlier_slices is not None:
            outliers[result.volumes] = result.outlier_slices.sum(1)
    fd = np.asarray(results.quality.confounds.get("framewise_displacement", np.full(len(dwi), np.nan)), float)
    parameters = motion_parameters(results.motions, len(dwi))
    pictures = figures.single(
        "motion",
        plots.motion(parameters, fd, dwi.bvals, outliers, dwi.is_b0),
        "Line plots of translation, rotation, framewise displacement and outlier slices over all volumes.",
        "Estimated head motion of each volume relative to the reference of its phase encoding, framewise displacement "
        "(FD) and number of outlier slices.",
        "Slow drift is common. Spikes that recur at every high b-value suggest registration error rather than head "
        "motion.",
    )
    for result in results.motions:
        pictures += _blip_pictures(results, result, figures)
    facts = _motion_facts(results, fd, parameters, int(outliers.sum()))
    facts += slice_motion_facts(results) + _b0_shift_facts(results.motions) + _eddy_facts(results.motions)
    notes = tuple(dict.fromkeys(note for result in results.motions for note in result.notes))
    return Section("motion", "Head motion", _motion_lead(results.motions), pictures, facts, notes)


def _motion_lead(motions: tuple[Motion, ...]) -> str:
    models = {result.model for result in motions}
    if models & {"none", "off"}:
        return "Estimated pose of the head in each volume, and the agreement between volumes after realignment."
    return (
        "In each iteration, every diffusion-weighted volume is predicted from all others "
        f"({' and '.join(sorted(models))} model) and registered to its prediction. Compare the mean images before and "
        "after realignment: edges should become sharper."
    )


def _motion_facts(results: UnitResults, fd: np.ndarray, parameters: np.ndarray, outliers: int) -> tuple[Fact, ...]:
    """FD (n,), motion parameters (n, 6) and the number of outlier slices in summary."""
    finite = fd[np.isfinite(fd)]
    return (
        Fact("Mean framewise displacement (FD)", f"{finite.mean():.2f} mm" if len(finite) else "not available"),
        Fact("Volumes with FD above 0.5 mm", f"{int((finite > 0.5).sum())} of {len(fd)}"),
        Fact("Maximum translation", f"{np.nanmax(np.linalg.norm(parameters[:, :3], axis=1)):.2f} mm"),
        Fact("Maximum rotation", f"{np.nanmax(np.linalg.norm(parameters[:, 3:], axis=1)):.2f}°"),
        Fact("Outlier slices", str(outliers), OUTLIER_HANDLING[results.settings.motion.outliers]),
    )


def _b0_shift_facts(motions: tuple[Motion, ...]) -> tuple[Fact, ...]:
    """How far the diffusion-weighted volumes as a group lay from b=0, where that was measured."""
    shifts = [result.b0_shift for result in motions if result.b0_shift is not None]
    measured = [float(np.nanmax(shift.measured)) for shift in shifts if np.isfinite(shift.measured).any()]
    if not measured:
        return ()
    applied = max(float(shift.applied.max()) for shift in shifts)
    remark = f"corrected by {applied:.2f} mm" if applied else "not significant, so not corrected"
    return (Fact("Diffusion against b=0", f"{max(measured):.2f} mm measured", remark),)


def _eddy_facts(motions: tuple[Motion, ...]) -> tuple[Fact, ...]:
    """The largest eddy-current displacement in the brain, where eddy currents were modelled."""
    largest = []
    for result in motions:
        if result.eddy is not None:
            brain = result.mask.grid.to_world(np.argwhere(result.mask.numpy() > 0.5)[::200])
            displacements = [result.eddy.displacement(v, brain) for v in range(len(result.volumes))]
            largest.append(float(np.linalg.norm(displacements, axis=-1).max()))
    return (Fact("Maximum eddy-current displacement", f"{max(largest):.2f} mm", "in the brain"),) if largest else ()


def _blip_pictures(results: UnitResults, result: Motion, figures: FigureWriter) -> tuple[Picture, ...]:
    """Motion figures of one blip, which is named in captions and file names where there are several."""
    dwi = results.acquired.dwi
    blip = results.acquired.blips[int(dwi.blip[result.volumes[0]])]
    several = len(results.motions) > 1
    name_suffix = blip.name.capitalize() if several else ""
    volume = f"{BLIPS.get(blip.name, blip.name)} volume" if several else "volume"
    pictures: tuple[Picture, ...] = slice_motion_pictures(result, figures, name_suffix)
    if not dwi.is_b0[result.volumes].all():
        pictures += figures.multiple(
            f"hmc{name_suffix}",
            slice_figures.realignment(results.denoised.dwi, result),
            "Mean of all diffusion-weighted volumes before and after realignment, three planes.",
            f"Mean of all diffusion-weighted {volume}s before and after realignment, without correction of "
            "susceptibility distortion.",
            "After realignment, grey and white matter should be better separated; a double or blurred edge indicates "
            "residual motion.",
        )
    pictures += figures.single(
        f"dwiref{name_suffix}",
        slice_figures.b0_reference(result),
        "b=0 reference image with the outline of the brain mask, three planes.",
        f"The b=0 reference image (dwiref) to which all {volume}s were aligned, with the outline of the brain mask.",
        "This mask may be generous, but it must not exclude any part of the brain.",
    )
    return pictures + _prediction_pictures(results, result, figures, name_suffix, volume)


def _prediction_pictures(
    results: UnitResults, result: Motion, figures: FigureWriter, name_suffix: str, volume: str
) -> tuple[Picture, ...]:
    """Agreement of the volumes and slices of one blip with their predictions."""
    dwi = results.acquired.dwi
    bvals, is_b0 = dwi.bvals[result.volumes], dwi.is_b0[result.volumes]
    pictures = figures.single(
        f"convergence{name_suffix}",
        plots.motion_convergence(result, bvals, is_b0),
        "Change of pose between rounds, and agreement of each volume with its prediction against b-value.",
        "Left: change of head pose between successive rounds, from coarse voxels to those of the series. Middle and "
        "right: agreement of each "
        f"diffusion-weighted {volume} with its prediction.",
        "Agreement decreases with b-value as noise dominates. Inspect volumes that lie far below others of the same "
        "b-value.",
    )
    slice_axis = int(np.argmax(np.abs(result.dwiref.grid.directions[:, result.slice_axis])))
    axis_label = f"{'ijk'[result.slice_axis]} ({AXIS_NAMES[slice_axis]})"
    pictures += figures.single(
        f"slices{name_suffix}",
        plots.slice_residuals(result.slice_z, result.outlier_slices, bvals, is_b0, axis_label),
        "Heat map of the residual z-score of each slice in each volume.",
        f"Residual of each slice of each {volume} relative to its prediction, as a robust z-score. Outlier slices are "
        "marked with squares.",
        "Signal dropout caused by sudden motion appears as dark blue slices; an entirely blue column indicates a "
        "corrupted volume.",
    )
    return pictures
