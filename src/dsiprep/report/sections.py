"""What each result shows: one function per stage, from results to a card of the page.

Every card says what is seen and what to look for. Nothing is judged by colour: numbers come with their meaning, and
what could not be done is said first.
"""

from __future__ import annotations

import numpy as np

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid
from dsiprep.data.results import Motion, UnitResults
from dsiprep.ops.affine import rigid_parameters
from dsiprep.report import figures, plots
from dsiprep.report.album import Album, Fact, Picture, Section

OUTLIER_Z = 4.0
ORDER = "RAS"
WORDS = {"R": "left-right", "A": "posterior-anterior", "S": "inferior-superior"}
BLIPS = {"up": "blip-up", "down": "blip-down", "only": "the only phase encoding"}
STAGES = {
    "acquisition": "Reading",
    "denoise": "Denoising",
    "motion": "Head motion",
    "distortion": "Distortion",
    "anatomy": "Anatomy",
    "coregister": "Coregistration",
    "resample": "Resampling",
    "quality": "Quality",
}
METHODS = {
    "dwidenoise": "MP-PCA",
    "none": "none",
    "drbuddi": "blip-up/blip-down (DRBUDDI model)",
    "3dSHORE": "SHORELine, 3dSHORE model",
    "tensor": "SHORELine, tensor model",
}


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(str(n) for n in shape)


def _millimetres(grid: Grid) -> str:
    return " × ".join(f"{size:.3g}" for size in grid.voxel_sizes) + " mm"


def _encoding(pe: PhaseEncoding | None, grid: Grid) -> str:
    """ "j- (A to P), readout 0.0512 s": the axis in anatomical words, so that nobody has to know the file's axes."""
    if pe is None:
        return "unknown"
    along = grid.directions[:, pe.axis] * pe.polarity
    main = int(np.argmax(np.abs(along)))
    ends = ("LR", "PA", "IS")[main]
    way = f"{ends[0]} to {ends[1]}" if along[main] > 0 else f"{ends[1]} to {ends[0]}"
    time = "readout time unknown" if pe.readout_time is None else f"readout {1000 * pe.readout_time:.3g} ms"
    return f"{pe.direction} ({way}), {time}"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if np.isfinite(value) else "not available"
    return "not available" if value is None else str(value)


def _stages(seconds: dict[str, float]) -> tuple[tuple[str, float], ...]:
    """Seconds by stage, with the parts of one stage (motion of each blip) added up."""
    total: dict[str, float] = {}
    for name, value in seconds.items():
        label = STAGES.get(name.split("-")[0].split("_")[0], name)
        total[label] = total.get(label, 0.0) + value
    return tuple(total.items())


def duration(seconds: float) -> str:
    """ "41 s", "6 min 12 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def summary(results: UnitResults, album: Album) -> Section:
    """What was done, how long it took, and the numbers people ask for first."""
    acquired, out = results.acquired, results.preprocessed
    stages = {
        "Head motion": [note for motion in results.motions for note in motion.notes],
        "Distortion": list(results.distortion.notes) if results.distortion else [results.distortion_reason],
        "Anatomy": list(results.anatomy.notes),
        "Quality": list(results.quality.notes),
    }
    models = " and ".join(dict.fromkeys(motion.model.split(":")[0] for motion in results.motions))
    corrected = METHODS.get(results.distortion.method, results.distortion.method) if results.distortion else "not done"
    seconds = sum(results.seconds.values())
    facts = (
        Fact("Sampling", acquired.scheme.description),
        Fact("Volumes", f"{len(acquired.dwi)} ({int(acquired.dwi.is_b0.sum())} b=0) in {len(results.unit.runs)} run(s)"),
        Fact("Acquired grid", f"{_times(acquired.dwi.grid.shape)} voxels of {_millimetres(acquired.dwi.grid)}"),
        *(
            Fact(f"Phase encoding, {BLIPS.get(blip.name, blip.name)}", _encoding(blip.pe, acquired.dwi.grid))
            for blip in acquired.blips
        ),
        Fact("Denoising", METHODS.get(results.denoised.method, results.denoised.method)),
        Fact("Head motion", METHODS.get(models, models)),
        Fact("Distortion", corrected),
        Fact("Structural image", results.anatomy.modality),
        Fact("Template", results.anatomy.template if results.anatomy.acpc_to_template else "not normalised"),
        Fact("Output grid", f"{_times(out.dwi.grid.shape)} voxels of {_millimetres(out.dwi.grid)}, ACPC space, LPS+"),
        Fact("Interpolation", f"{out.interpolation}, once"),
        Fact("Computed on", results.device),
        Fact("Wall time", duration(seconds)),
    )
    return Section(
        "summary",
        "Summary",
        "What was acquired and what was done to it. Nothing here is a verdict: look at the pictures below before "
        "you use the data, and read the notes first.",
        facts=facts,
        notes=tuple(f"{stage}: {note}" for stage, notes in stages.items() for note in notes),
        shares=_stages(results.seconds),
        tables=(("Numbers to begin with", ("Measure", "Value", "What it means"), _headline(results)),),
    )


def _headline(results: UnitResults) -> tuple[tuple[str, ...], ...]:
    table = results.quality.table
    flagged = int((np.abs(np.nan_to_num(results.quality.slice_z)) > OUTLIER_Z).sum())
    total = int(np.isfinite(results.quality.slice_z).sum())
    ndc = f"{_number(table.get('raw_neighbor_corr'))} → {_number(table.get('t1_neighbor_corr'))}"
    r2 = np.concatenate([motion.r2 for motion in results.motions]) if results.motions else np.array([np.nan])
    score = results.coregistration
    rows = [
        ("Mean FD", f"{_number(table.get('mean_fd'))} mm", "Head movement from one volume to the next, on average"),
        ("Largest FD", f"{_number(table.get('max_fd'))} mm", "The largest single movement"),
        (
            "Neighbouring-DWI correlation, raw → out",
            ndc,
            "Likeness of volumes with neighbouring q-vectors; rises as volumes come to lie on each other, "
            "but with smoothing too",
        ),
        ("Outlier slices", f"{flagged} of {total}", f"Slices whose residual lies beyond |z| = {OUTLIER_Z:g}"),
        ("Median R² with the prediction", f"{np.nanmedian(r2):.3f}", "How well each volume follows from all others"),
        (
            f"Coregistration ({score.metric})",
            f"{_number(score.score_before)} → {_number(score.score_after)}",
            "Agreement of b=0 and structural image before and after; compare it between your own subjects",
        ),
        ("Mask overlap", _number(table.get("t1_dice_distance")), "Dice of the DWI and structural brain masks, 1 is equal"),
    ]
    return tuple(row for row in rows if "not available" not in row[1])


def acquisition(results: UnitResults, album: Album) -> Section:
    """Which files were put together, and where they sample q-space."""
    unit, acquired = results.unit, results.acquired
    rows = []
    for number, run in enumerate(unit.runs):
        volumes = int((acquired.dwi.run == number).sum())
        scale = acquired.scales[number] if number < len(acquired.scales) else 1.0
        rows.append((run.image.name, "DWI", _encoding(run.pe, acquired.dwi.grid), str(volumes), f"{scale:.3f}"))
    rows += [(epi.image.name, "EPI reference", _encoding(epi.pe, acquired.dwi.grid), "", "") for epi in unit.epis]
    rows += [(path.name, "T1w", "", "", "") for path in unit.t1w]
    return Section(
        "acquisition",
        "Acquisition",
        "The files that were processed together, and the points of q-space they sample, in scanner axes before any "
        "correction. Look for gaps, for a missing half of the sphere, and for b=0 volumes (▲) spread over the series.",
        album.still(
            "sampling",
            plots.sampling(acquired.dwi, acquired.scheme),
            f"Points of q-space coloured by b-value: {acquired.scheme.description}.",
            "q-space as acquired, coloured by b-value; |q| is proportional to √b. Below: b-values in order of "
            "acquisition.",
            "Antipodal points fall on each other in a full-sphere scheme only from the outside; here both are drawn.",
        ),
        notes=unit.notes,
        tables=(("Files", ("File", "Kind", "Phase encoding", "Volumes", "Scaled by"), tuple(rows)),),
    )


def denoising(results: UnitResults, album: Album) -> Section:
    """What denoising took away."""
    denoised = results.denoised
    if denoised.noise is None and denoised.dwi.data.data_ptr() == results.acquired.dwi.data.data_ptr():
        return Section("denoising", "Denoising", denoised.method)
    frames, removed = figures.denoising(results.acquired, denoised)
    pictures = album.turning(
        "denoise",
        frames,
        "Axial slices of a b=0 volume and of the volume of highest b, before and after denoising.",
        f"A b=0 volume and the volume of highest b, before and after {name}, in one window.",
    ) + album.still(
        "denoiseRemoved",
        removed,
        "What denoising removed: the difference of the two frames above.",
        "What was removed. It should look like noise.",
        "Anatomy here (gyri, ventricles, the rim of the brain) means that signal was removed.",
    )
    facts: tuple[Fact, ...] = ()
    if denoised.noise is not None:
        pictures += album.still(
            "noise",
            figures.noise_level(denoised.noise, results.acquired.mask),
            "Map of the estimated standard deviation of the noise.",
            "The estimated noise level σ: smooth, higher where the coils are far away or parallel imaging is hard.",
        )
        inside = results.acquired.mask.numpy() > 0.5
        sigma = float(np.median(denoised.noise.numpy()[inside])) if inside.any() else float("nan")
        b0 = results.acquired.dwi.data[int(np.argmin(results.acquired.dwi.bvals))].cpu().numpy()[inside]
        facts = (
            Fact("Median σ in the brain", f"{sigma:.3g}", "in units of the image"),
            Fact("b=0 signal over σ", f"{np.median(b0) / max(sigma, 1e-9):.1f}", "signal to noise of one b=0 volume"),
        )
    lead = "Noise that does not repeat between volumes is removed before anything is interpolated."
    return Section("denoising", "Denoising", lead, pictures, facts)


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
    pictures: tuple[Picture, ...] = ()
    for result in results.motions:
        outliers[result.volumes] = (np.abs(np.nan_to_num(result.slice_z)) > OUTLIER_Z).sum(1)
    fd = np.asarray(results.quality.confounds.get("framewise_displacement", np.full(len(dwi), np.nan)), float)
    parameters = motion_parameters(results.motions, len(dwi))
    pictures += album.still(
        "motion",
        plots.motion(parameters, fd, dwi.bvals, outliers, dwi.is_b0),
        "Curves of translation, rotation and framewise displacement over all volumes.",
        "Position of the head in every volume, against the reference of its phase encoding; R, A, S in red, "
        "green, blue.",
        "A slow drift is normal. Spikes that return at every high b-value point to the registration rather than "
        "to the head.",
    )
    for result in results.motions:
        pictures += _one_motion(results, result, album, len(results.motions) > 1)
    finite = fd[np.isfinite(fd)]
    facts = (
        Fact("Mean FD", f"{finite.mean():.2f} mm" if len(finite) else "not available"),
        Fact("Volumes above 0.5 mm FD", f"{int((finite > 0.5).sum())} of {len(dwi)}"),
        Fact("Largest translation", f"{np.nanmax(np.linalg.norm(parameters[:, :3], axis=1)):.2f} mm"),
        Fact("Largest rotation", f"{np.nanmax(np.linalg.norm(parameters[:, 3:], axis=1)):.2f}°"),
        Fact("Volumes with outlier slices", f"{int((outliers > 0).sum())}"),
    )
    models = " ".join(dict.fromkeys(result.model for result in results.motions))
    lead = (
        f"Each volume is predicted from all others and registered to its prediction, and this is repeated (model: "
        f"{models}). Look at the mean image before and after: edges should become sharp."
    )
    notes = tuple(note for result in results.motions for note in result.notes)
    return Section("motion", "Head motion", lead, pictures, facts, notes)


def _one_motion(results: UnitResults, result: Motion, album: Album, several: bool) -> tuple[Picture, ...]:
    """The pictures of one blip."""
    dwi = results.acquired.dwi
    blip = results.acquired.blips[int(dwi.blip[result.volumes[0]])]
    tail = blip.name.capitalize() if several else ""
    of = f", {BLIPS.get(blip.name, blip.name)}" if several else ""
    bvals, is_b0 = dwi.bvals[result.volumes], dwi.is_b0[result.volumes]
    pictures: tuple[Picture, ...] = ()
    if not is_b0.all():
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
    pictures += album.still(
        f"convergence{tail}",
        plots.convergence(result, bvals, is_b0),
        "Change of pose between rounds, and agreement of volumes with their prediction against b-value.",
        f"Left: how far volumes still moved between rounds. Right: agreement of each volume with its prediction{of}.",
        "Agreement falls with b as noise takes over; a volume far below its neighbours of the same b deserves a look.",
    )
    axis = ORDER[int(np.argmax(np.abs(result.dwiref.grid.directions[:, result.slice_axis])))]
    pictures += album.still(
        f"slices{tail}",
        plots.slices(result.slice_z, OUTLIER_Z, bvals, is_b0, f"{'ijk'[result.slice_axis]} ({WORDS[axis]})"),
        "Heat map of the z-score of each slice in each volume.",
        f"Residual of each slice against its prediction{of}; slices beyond |z| = {OUTLIER_Z:g} are boxed.",
        "Signal dropout from sudden motion shows as dark blue slices; a whole dark column is a bad volume.",
    )
    return pictures


def distortion(results: UnitResults, album: Album) -> Section:
    """What undoing the distortion did, or why it was not done."""
    found, title = results.distortion, "Susceptibility distortion"
    lead = (
        "Near air (above the nose and ears) the field of the magnet bends, and EPI is stretched or piled up along the "
        "phase-encoding axis. Flicker before and after: the outlines of the structural image should fit after, "
        "not before."
    )
    if found is None:
        reason = f"Not corrected: {results.distortion_reason}"
        return Section("distortion", title, "Distortion was not corrected in these data.", notes=(reason,))
    mask, blips = results.motions[0].mask, results.acquired.blips
    pictures: tuple[Picture, ...] = ()
    for number, blip in enumerate(blips[: len(found.before)]):
        pictures += album.turning(
            f"sdc{blip.name.capitalize()}",
            figures.unwarping(found, number, mask, results.anatomy, results.coregistration),
            f"b=0 of the {BLIPS[blip.name]} images before and after correction, with outlines of the structural image.",
            f"{BLIPS[blip.name].capitalize()}, {_encoding(blip.pe, results.acquired.dwi.grid)}. Outlines from the "
            "structural image: brain (yellow) and white matter (blue).",
        )
    if len(found.before) > 1:
        pictures += album.turning(
            "sdcDifference",
            figures.blip_difference(found, mask),
            "Difference of the blip-up and blip-down b=0 images before and after correction.",
            "Blip-up minus blip-down. Black is agreement.",
            "Red and blue bands in front and at the temples should vanish; what is left is motion, noise, or signal "
            "that was lost in the acquisition.",
        )
    axis = blips[0].pe.vector(results.acquired.dwi.grid) if blips[0].pe else np.array([0.0, 1.0, 0.0])
    content, unit = figures.field(found, mask, axis / np.linalg.norm(axis))
    pictures += album.still(
        "fieldmap",
        content,
        "Map of the estimated off-resonance field.",
        f"The estimated field in {unit}, smooth and strongest above the sinuses and ear canals.",
    )
    pictures += album.still(
        "sdcDescent", plots.descent(found.trace), "Cost over iterations.", "The cost of the fit, from coarse to fine."
    )
    return Section("distortion", title, lead, pictures, _field_facts(results), (*found.notes,))


def _field_facts(results: UnitResults) -> tuple[Fact, ...]:
    found = results.distortion
    assert found is not None
    inside = results.motions[0].mask.numpy() > 0.5
    size = np.linalg.norm(found.fields[0].data.cpu().numpy(), axis=0)[inside]
    facts = [
        Fact("Why this method", results.distortion_reason),
        Fact("Displacement in the brain", f"median {np.median(size):.2f} mm, 99 % below {np.percentile(size, 99):.1f} mm"),
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
        lead = "There is no structural image: the b=0 reference was brought to ACPC orientation and stands in for it."
    else:
        lead = (
            "The structural image in ACPC space. The outlines must follow the brain's surface and the border of grey "
            "and white matter; dura or eyes inside the yellow line, or cortex outside it, spoil the coregistration."
        )
    pictures = album.still(
        "anat",
        figures.structure(found),
        "Structural image with outlines of brain and tissues, three planes.",
        "ACPC space. Outlines: brain (yellow)" + (", cortex (pink), white matter (blue)." if found.tissue is not None else "."),
        "The midline should stand upright, and the line from front to back of the corpus callosum lie level.",
    )  # fmt: skip
    if found.template_image is not None and found.warped is not None:
        pictures += album.turning(
            "template",
            figures.normalisation(found.template_image, found.warped),
            "Template and normalised brain of the subject, three planes.",
            f"{found.template} and the subject's brain brought onto it, under the outline of the template.",
            "Ventricles and large sulci should stay in place as the pictures change.",
        )
    facts = (Fact("Structural image", found.modality), Fact("Grid", f"{_times(found.image.grid.shape)} voxels of {_millimetres(found.image.grid)}"))  # fmt: skip
    return Section("anatomy", "Anatomy", lead, pictures, facts, found.notes)


def coregistration(results: UnitResults, album: Album) -> Section:
    """The b=0 reference on the structural image."""
    found = results.coregistration
    if results.anatomy.modality == "none":
        return Section("coregistration", "Coregistration", "Without a structural image there was nothing to register to.")
    pictures = album.turning(
        "coreg",
        figures.coregistration(results.preprocessed, results.anatomy),
        "b=0 reference and structural image in turn, under outlines of brain and white matter.",
        "The b=0 reference (corrected, ACPC) and the structural image under one set of outlines.",
        "Follow the rim of the brain, the ventricles and the central sulcus as the pictures change: nothing should jump.",
    )
    parameters = rigid_parameters(found.dwiref_to_acpc.matrix, results.anatomy.image.grid.centre)
    facts = (
        Fact(f"{found.metric}", f"{found.score_before:.4g} → {found.score_after:.4g}", "before → after"),
        Fact("Rotation", f"{np.degrees(np.linalg.norm(parameters[:3])):.1f}°", "of the head from scanner to ACPC axes"),
        Fact("Translation", f"{np.linalg.norm(parameters[3:]):.1f} mm"),
    )
    lead = "How well the corrected b=0 lies on the structural image. All later results lean on this step."
    return Section("coregistration", "Coregistration", lead, pictures, facts)


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
    pictures += album.still(
        "colorFA",
        figures.colour_fa(found),
        "Fractional anisotropy coloured by fibre direction, three planes.",
        "Fractional anisotropy coloured by direction (tensor of the low-b volumes): red left-right, green "
        "front-back, blue up-down.",
        "The corpus callosum must be red in its middle, the cingulum green, the corticospinal tract blue. Other "
        "colours mean that b-vectors were permuted.",
    )
    pictures += album.still(
        "sticks",
        figures.fibre_sticks(found),
        "Principal directions drawn as sticks over fractional anisotropy.",
        "The same directions as sticks. Colour cannot show a flipped sign, sticks can.",
        "In the coronal view sticks of the callosum should run along its arch and up into both hemispheres; sticks "
        "that cross the arch mean a flipped b-vector axis.",
    )
    contrast = figures.contrast(results.quality, found.mask)
    pictures += album.still(
        "contrast",
        contrast,
        "Maps of contrast to noise and temporal signal to noise.",
        "Contrast to noise (spread of the model over spread of its residual) and temporal signal to noise of b=0.",
    )
    facts = (
        Fact("Grid", f"{_times(found.dwi.grid.shape)} voxels of {_millimetres(found.dwi.grid)}"),
        Fact("Volumes", str(len(found.dwi))),
        Fact("Interpolation", found.interpolation, "all transforms at once"),
    )
    lead = (
        "The preprocessed series in ACPC space. The two pictures of fibre direction check what no number can: that "
        "b-vectors and images agree."
    )
    return Section("output", "Output", lead, pictures, facts)


MEANINGS = {
    "neighbor_corr": "Correlation of volumes with neighbouring q-vectors",
    "masked_neighbor_corr": "The same inside the brain mask",
    "dwi_contrast": "Likeness of neighbouring over likeness of perpendicular volumes",
    "num_bad_slices": "Slices that fall out of line with their neighbours",
    "coherence_index": "How far fibre directions agree with the next voxel's; falls where b-vectors are wrong",
    "num_directions": "Diffusion-weighted volumes",
    "max_b": "Largest b-value, s/mm²",
    "mean_fd": "Mean framewise displacement, mm",
    "max_fd": "Largest framewise displacement, mm",
    "max_rotation": "Largest rotation from the reference",
    "max_translation": "Largest translation from the reference, mm",
    "max_rel_rotation": "Largest rotation between volumes that follow each other",
    "max_rel_translation": "Largest translation between volumes that follow each other, mm",
    "t1_dice_distance": "Dice overlap of DWI and structural brain mask",
    "mni_dice_distance": "Dice overlap of normalised and template brain mask",
}


def quality(results: UnitResults, album: Album) -> Section:
    """The row of image_qc.tsv with meanings."""
    rows = []
    for name, value in results.quality.table.items():
        if value is None or name.endswith("_id") or name == "file_name":
            continue
        stem = name.removeprefix("raw_").removeprefix("t1_") if name not in MEANINGS else name
        where = {"raw": "as acquired", "t1": "preprocessed"}.get(name.split("_")[0], "") if name not in MEANINGS else ""
        meaning = MEANINGS.get(stem, "")
        rows.append((name, _number(value), f"{meaning}, {where}" if meaning and where else meaning))
    return Section(
        "quality",
        "Quality table",
        "The row of image_qc.tsv. Compare these numbers within one protocol and one scanner; they have no limits that "
        "hold everywhere.",
        notes=results.quality.notes,
        tables=(("image_qc.tsv", ("Column", "Value", "Meaning"), tuple(rows)),),
    )


SECTIONS = (summary, acquisition, denoising, motion, distortion, anatomy, coregistration, output, quality)
