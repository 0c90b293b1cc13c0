"""What each result shows: one function per stage, from results to a card of the page.

Every card says what is seen and what to look for. Nothing is judged by colour: numbers come with their
meaning, and what could not be done is said first.
"""

from __future__ import annotations

import numpy as np

from dsiprep.data.results import Distortion, Motion, Preprocessed, UnitResults
from dsiprep.ops.image.affine import rigid_parameters
from dsiprep.report import plots
from dsiprep.report import slice_figures as figures
from dsiprep.report.overview import acquisition, quality, summary
from dsiprep.report.page_parts import Album, Fact, Picture, Section
from dsiprep.report.wording import BLIPS, LOST, SCORES, encoding, in_words

AXES = ("left-right", "posterior-anterior", "inferior-superior")


def denoising(results: UnitResults, album: Album) -> Section:
    """What denoising took away."""
    denoised = results.denoised
    if denoised.noise is None:
        return Section("denoising", "Denoising", denoised.method)
    frames, removed = figures.denoising(results.acquired, denoised)
    pictures = album.turning(
        "denoise",
        frames,
        "Axial slices of a b=0 volume and of the volume of highest b, before and after denoising.",
        "A b=0 volume and the volume of highest b, before and after, in one window.",
    )
    pictures += album.still(
        "denoiseRemoved",
        removed,
        "What denoising removed: the difference of the two frames above.",
        "What was removed. It should look like noise.",
        "Anatomy here (gyri, ventricles, the rim of the brain) means that signal was removed.",
    )
    pictures += album.still(
        "noise",
        figures.noise_level(denoised.noise, results.acquired.mask),
        "Map of the estimated standard deviation of the noise.",
        "The estimated noise level (standard deviation): smooth, higher where the coils are far away or "
        "parallel imaging is hard.",
    )
    lead = "Noise that does not repeat between volumes is removed before anything is interpolated."
    return Section("denoising", "Denoising", f"{lead} {denoised.method}", pictures, _noise_facts(results))


def _noise_facts(results: UnitResults) -> tuple[Fact, ...]:
    """Noise and signal to noise inside the rough mask."""
    acquired, noise = results.acquired, results.denoised.noise
    inside = acquired.mask.numpy() > 0.5
    if noise is None or not inside.any():
        return ()
    sigma = float(np.median(noise.numpy()[inside]))
    b0 = acquired.dwi.volume(int(np.argmin(acquired.dwi.bvals))).numpy()[inside]
    ratio = f"{np.median(b0) / sigma:.1f}" if sigma > 0 else "no noise found"
    return (
        Fact("Median noise in the brain", f"{sigma:.3g}", "standard deviation, in units of the image"),
        Fact("b=0 signal over noise", ratio, "median in the brain, one b=0 volume"),
    )


def motion_parameters(motions: tuple[Motion, ...], count: int) -> np.ndarray:
    """Translation (mm) and rotation (degrees) of every volume about the centre of the dwiref, (n, 6)."""
    values = np.full((count, 6), np.nan)
    for motion in motions:
        parameters = rigid_parameters(motion.transforms, motion.dwiref.grid.centre)
        values[motion.volumes] = np.concatenate([parameters[:, 3:], np.degrees(parameters[:, :3])], axis=1)
    return values


def motion(results: UnitResults, album: Album) -> Section:
    """Where the head was, and how well that is known."""
    dwi = results.acquired.dwi
    outliers = np.zeros(len(dwi))
    for result in results.motions:
        if result.outlier_slices is not None:
            outliers[result.volumes] = result.outlier_slices.sum(1)
    fd = np.asarray(results.quality.confounds.get("framewise_displacement", np.full(len(dwi), np.nan)), float)
    parameters = motion_parameters(results.motions, len(dwi))
    pictures = album.still(
        "motion",
        plots.motion(parameters, fd, dwi.bvals, outliers, dwi.is_b0),
        "Curves of translation, rotation and framewise displacement over all volumes.",
        "Position of the head in every volume, against the reference of its phase encoding.",
        "A slow drift is normal. Spikes that return at every high b-value point to the registration rather "
        "than to the head.",
    )
    for result in results.motions:
        pictures += _one_motion(results, result, album)
    finite = fd[np.isfinite(fd)]
    facts = (
        Fact("Mean FD", f"{finite.mean():.2f} mm" if len(finite) else "not available"),
        Fact("Volumes above 0.5 mm FD", f"{int((finite > 0.5).sum())} of {len(dwi)}"),
        Fact("Largest translation", f"{np.nanmax(np.linalg.norm(parameters[:, :3], axis=1)):.2f} mm"),
        Fact("Largest rotation", f"{np.nanmax(np.linalg.norm(parameters[:, 3:], axis=1)):.2f}°"),
        Fact("Slices that lost signal", f"{int(outliers.sum())}", LOST[results.settings.motion.outliers]),
        *_bending(results.motions),
    )
    models = {result.model for result in results.motions}
    lead = "Where the head was in every volume, and how well volumes agree once they are put back."
    if not models & {"none", "off"}:
        lead = (
            f"Each volume is predicted from all others ({' and '.join(sorted(models))} model), registered to "
            "its prediction, and this is repeated. Look at the mean image before and after: edges should "
            "become sharp."
        )
    notes = tuple(note for result in results.motions for note in result.notes)
    return Section("motion", "Head motion", lead, pictures, facts, notes)


def _bending(motions: tuple[Motion, ...]) -> tuple[Fact, ...]:
    """The largest displacement of the brain by eddy currents."""
    largest = []
    for motion in motions:
        if motion.eddy is not None:
            brain = motion.mask.grid.to_world(np.argwhere(motion.mask.numpy() > 0.5)[::200])
            moved = [motion.eddy.displacement(v, brain) for v in range(len(motion.volumes))]
            largest.append(float(np.linalg.norm(moved, axis=-1).max()))
    return (Fact("Largest displacement by eddy currents", f"{max(largest):.2f} mm"),) if largest else ()


def _one_motion(results: UnitResults, result: Motion, album: Album) -> tuple[Picture, ...]:
    """The pictures of one blip; its name is told where there are several."""
    dwi = results.acquired.dwi
    blip = results.acquired.blips[int(dwi.blip[result.volumes[0]])]
    several = len(results.motions) > 1
    tail = blip.name.capitalize() if several else ""
    of = f", {BLIPS.get(blip.name, blip.name)}" if several else ""
    pictures: tuple[Picture, ...] = ()
    if not dwi.is_b0[result.volumes].all():
        pictures += album.turning(
            f"hmc{tail}",
            figures.realignment(results.denoised.dwi, result),
            "Mean of all diffusion-weighted volumes before and after realignment, three planes.",
            f"Mean of all diffusion-weighted volumes{of}, as acquired and realigned (still distorted).",
            "Grey and white matter should separate more clearly after; a doubled or blurred rim is motion left.",
        )
    pictures += album.still(
        f"dwiref{tail}",
        figures.reference(result),
        "b=0 reference with the outline of the brain mask, three planes.",
        f"The b=0 reference that all volumes were aligned to{of}, with the brain mask.",
        "The mask may be generous here; it must not cut into the brain.",
    )
    return pictures + _agreement(results, result, album, (tail, of))


def _agreement(results: UnitResults, result: Motion, album: Album, names: tuple[str, str]) -> tuple[Picture, ...]:
    """How well volumes and slices of one blip agree with their predictions."""
    tail, of = names
    dwi = results.acquired.dwi
    bvals, is_b0 = dwi.bvals[result.volumes], dwi.is_b0[result.volumes]
    pictures = album.still(
        f"convergence{tail}",
        plots.convergence(result, bvals, is_b0),
        "Change of pose between rounds, and agreement of volumes with their prediction against b-value.",
        f"Left: how far volumes still moved between rounds. Right: agreement of each volume with its prediction{of}.",
        "Agreement falls with b as noise takes over; a volume far below its neighbours of the same b deserves a look.",
    )
    axis = AXES[int(np.argmax(np.abs(result.dwiref.grid.directions[:, result.slice_axis])))]
    pictures += album.still(
        f"slices{tail}",
        plots.slices(result.slice_z, result.outlier_slices, bvals, is_b0, f"{'ijk'[result.slice_axis]} ({axis})"),
        "Heat map of the z-score of each slice in each volume.",
        f"Residual of each slice against its prediction{of}; slices that lost signal are boxed.",
        "Signal dropout from sudden motion shows as dark blue slices; a whole dark column is a bad volume.",
    )
    return pictures


def distortion(results: UnitResults, album: Album) -> Section:
    """What undoing the distortion did, or why it was not done."""
    found, title = results.distortion, "Susceptibility distortion"
    if found is None:
        lead = "Distortion was not corrected in these data."
        return Section("distortion", title, lead, notes=(results.distortion_reason,))
    lead = (
        "Near air (above the nose and ears) the field of the magnet bends, and EPI is stretched or piled "
        "up along the phase-encoding axis. Flicker before and after: the outlines of the structural image "
        "should fit after, not before."
    )
    mask = results.motions[0].mask
    pictures = _blips(results, found, album)
    axis = results.acquired.dwi.grid.affine[:3, results.unit.runs[0].axis or 0]
    content, unit = figures.field(found, mask, axis / np.linalg.norm(axis))
    pictures += album.still(
        "fieldmap",
        content,
        "Map of the estimated off-resonance field.",
        f"The estimated field in {unit}.",
        "It should be smooth, and strongest above the sinuses and ear canals.",
    )
    pictures += album.still(
        "sdcDescent",
        plots.descent(found.trace),
        "Change of the displacement over iterations, by level.",
        "How much the displacement still changed: each level should come to rest.",
    )
    return Section("distortion", title, lead, pictures, _field_facts(results, found), found.notes)


def _blips(results: UnitResults, found: Distortion, album: Album) -> tuple[Picture, ...]:
    """Before and after for each blip, and how the blips differ."""
    mask, grid = results.motions[0].mask, results.acquired.dwi.grid
    source = "structural image" if results.anatomy.modality != "none" else ""
    outlines = f" Outlines from the {source}: brain (yellow) and white matter (blue)." if source else ""
    pictures: tuple[Picture, ...] = ()
    for index, blip in enumerate(results.acquired.blips[: len(found.before)]):
        name = BLIPS.get(blip.name, blip.name)
        pictures += album.turning(
            f"sdc{blip.name.capitalize()}",
            figures.unwarping(found, index, mask, results.anatomy, results.coregistration),
            f"b=0 of the {name} images before and after correction.",
            f"{name.capitalize()}, {encoding(blip.pe, grid)}.{outlines}",
        )
    if len(found.before) > 1:
        pictures += album.turning(
            "sdcDifference",
            figures.blip_difference(found, mask),
            "Difference of the blip-up and blip-down b=0 images before and after correction.",
            "Blip-up minus blip-down. Black is agreement.",
            "Red and blue bands in front and at the temples should vanish; what is left is motion, noise, "
            "or signal that was lost in the acquisition.",
        )
    return pictures


def _field_facts(results: UnitResults, found: Distortion) -> tuple[Fact, ...]:
    """Sizes of displacement and field inside the brain."""
    inside = results.motions[0].mask.numpy() > 0.5
    size = np.linalg.norm(found.fields[0].data.cpu().numpy(), axis=0)[inside]
    facts = [
        Fact("Why this method", results.distortion_reason),
        Fact(
            "Displacement in the brain",
            f"median {np.median(size):.2f} mm, 99 % below {np.percentile(size, 99):.1f} mm",
        ),
    ]
    if found.fieldmap_hz is not None:
        hz = found.fieldmap_hz.numpy()[inside]
        low, high = np.percentile(hz, [0.5, 99.5])
        facts.append(Fact("Field in the brain", f"{low:.0f} to {high:.0f} Hz"))
    return tuple(facts)


def anatomy(results: UnitResults, album: Album) -> Section:
    """The structural image, its tissues, and its way to the template."""
    found = results.anatomy
    if found.modality == "none":
        lead = "There is no structural image: the b=0 reference, turned to ACPC space, stands in for it."
    else:
        lead = (
            "The structural image in ACPC space. The outlines must follow the brain's surface and the "
            "border of grey and white matter; dura or eyes inside the yellow line, or cortex outside it, "
            "spoil the coregistration."
        )
    outlines = "brain (yellow)" if found.tissue is None else "brain (yellow), cortex (pink), white matter (blue)"
    pictures = album.still(
        "anat",
        figures.structure(found),
        "Structural image with outlines of brain and tissues, three planes.",
        f"ACPC space. Outlines: {outlines}.",
        "The midline should stand upright, and the line from front to back of the corpus callosum lie level.",
    )
    if found.template_image is not None and found.warped is not None:
        pictures += album.turning(
            "template",
            figures.normalisation(found.template_image, found.warped),
            "Template and normalised brain of the subject, three planes.",
            f"{found.template} and the subject's brain brought onto it, under the outline of the template.",
            "Ventricles and large sulci should stay in place as the pictures change.",
        )
    facts = (Fact("Structural image", found.modality), Fact("Grid", in_words(found.image.grid)))
    return Section("anatomy", "Anatomy", lead, pictures, facts, found.notes)


def coregistration(results: UnitResults, album: Album) -> Section:
    """The b=0 reference on the structural image."""
    found, title = results.coregistration, "Coregistration"
    alike = results.anatomy.modality == "none"
    if found.metric == "none":
        lead = "Without a structural image, the b=0 reference of this series was itself turned to ACPC space."
        return Section("coregistration", title, lead)
    onto = f"b=0 reference of {found.led_by}" if alike else "structural image"
    pictures = album.turning(
        "coreg",
        figures.coregistration(results.preprocessed, results.anatomy),
        f"b=0 reference and {onto} in turn, under outlines of the brain.",
        f"The b=0 reference (corrected, ACPC) and the {onto} under one set of outlines.",
        "Follow the rim of the brain, the ventricles and the central sulcus as the pictures change: "
        "nothing should jump" + (", but for distortion that only one of the two series has." if alike else "."),
    )
    there, middle = np.asarray(results.anatomy.anat_to_acpc.matrix), results.anatomy.image.grid.centre
    moved = rigid_parameters(found.dwiref_to_acpc.matrix @ np.linalg.inv(there), there[:3] @ [*middle, 1])
    facts = (
        Fact(SCORES[found.metric], f"{found.score_before:.4g} → {found.score_after:.4g}", "before → after"),
        Fact("Rotation", f"{np.degrees(np.linalg.norm(moved[:3])):.1f}°", f"of the head between the {onto} and this"),
        Fact("Translation", f"{np.linalg.norm(moved[3:]):.1f} mm", "at the middle of the head"),
    )
    lead = f"How well the corrected b=0 lies on the {onto}. All later results lean on this step."
    return Section("coregistration", title, lead, pictures, facts, found.notes)


def output(results: UnitResults, album: Album) -> Section:
    """The preprocessed series, and whether its b-vectors are right."""
    found = results.preprocessed
    pictures = album.still(
        "means",
        figures.means(found),
        "Mean b=0 image and mean images of bands of b-value, with the brain mask, axial slices.",
        "Mean images of b=0 and of bands of b, with the final brain mask (yellow).",
        "Edges should be as sharp at high b as at b=0; the mask should hold the brain, all of it and little else.",
    )
    pictures += _fibres(found, album)
    pictures += album.still(
        "contrast",
        figures.contrast(results.quality, found.mask),
        "Maps of contrast to noise and temporal signal to noise.",
        "Contrast to noise (spread of the model over spread of its residual) and temporal signal to noise of b=0.",
    )
    facts = (
        Fact("Grid", in_words(found.dwi.grid)),
        Fact("Volumes", str(len(found.dwi))),
        Fact("Interpolation", found.interpolation),
    )
    lead = (
        "The preprocessed series in ACPC space. The two pictures of fibre direction check what no number "
        "can: that b-vectors and images agree."
    )
    return Section("output", "Output", lead, pictures, facts)


def _fibres(found: Preprocessed, album: Album) -> tuple[Picture, ...]:
    """Fibre directions: whether b-vectors and images agree."""
    pictures = album.still(
        "colorFA",
        figures.colour_fa(found),
        "Fractional anisotropy coloured by fibre direction, three planes.",
        "Fractional anisotropy coloured by direction (tensor of the low-b volumes): red left-right, green "
        "front-back, blue up-down.",
        "The corpus callosum must be red in its middle, the cingulum green, the corticospinal tract blue. "
        "Other colours mean that b-vectors were permuted.",
    )
    pictures += album.still(
        "sticks",
        figures.fibre_sticks(found),
        "Principal directions drawn as sticks over fractional anisotropy.",
        "The same directions as sticks. Colour cannot show a flipped sign, sticks can.",
        "In the coronal view sticks of the callosum should run along its arch and up into both "
        "hemispheres; sticks that cross the arch mean a flipped b-vector axis.",
    )
    return pictures


SECTIONS = (summary, acquisition, denoising, motion, distortion, anatomy, coregistration, output, quality)
