"""Report sections of the processing stages, each built from the results of one stage.

Every figure has a caption and, where useful, a hint on what to look for. Values are given with their meaning rather
than with a verdict, and notes on steps that could not be done are shown first.
"""

from __future__ import annotations

import numpy as np

from dsiprep.data.results import Blip, Distortion, Preprocessed, UnitResults
from dsiprep.ops.image.affine import rigid_parameters
from dsiprep.report import plots, slice_figures
from dsiprep.report.displacement_arrows import displacement_arrows
from dsiprep.report.fibre_glyphs import odf_figure
from dsiprep.report.motion_section import motion
from dsiprep.report.moving_field_part import moving_field_facts, moving_field_pictures
from dsiprep.report.overview import acquisition, quality, summary
from dsiprep.report.page_parts import Fact, FigureWriter, Picture, Section
from dsiprep.report.qspace_quality_section import gradients, qspace_quality
from dsiprep.report.qspace_section import qspace
from dsiprep.report.wording import BLIPS, SIMILARITIES, describe_grid, encoding


def denoising(results: UnitResults, figures: FigureWriter) -> Section:
    """Denoised images, the removed signal and the estimated noise level."""
    denoised = results.denoised
    if denoised.noise is None:
        return Section("denoising", "Denoising", denoised.method)
    frames, removed = slice_figures.removal(results.acquired.dwi, denoised.dwi, results.acquired.mask)
    pictures = figures.multiple(
        "denoise",
        frames,
        "Axial slices of a b=0 volume and of the volume with the highest b-value, before and after denoising.",
        "A b=0 volume and the volume with the highest b-value, before and after denoising with the same intensity "
        "window.",
    )
    pictures += figures.single(
        "denoiseRemoved",
        removed,
        "Signal removed by denoising: the difference between the images before and after denoising.",
        "Signal removed by denoising (before minus after). It should resemble random noise.",
        "Visible anatomy, such as gyri, ventricles or the edge of the brain, indicates that signal was removed.",
    )
    pictures += figures.single(
        "noise",
        slice_figures.noise_level(denoised.noise, results.acquired.mask),
        "Map of the estimated noise standard deviation.",
        "Estimated noise standard deviation. It should be smooth, with higher values far from the receive coils and "
        "where parallel imaging amplifies noise.",
    )
    lead = "Denoising is applied before motion and distortion correction."
    return Section("denoising", "Denoising", f"{lead} {denoised.method}", pictures, _noise_facts(results))


def unringing(results: UnitResults, figures: FigureWriter) -> Section:
    """Images before and after the removal of Gibbs ringing, and what was removed."""
    result, title = results.unringed, "Gibbs ringing"
    if not result.applied:
        return Section("unringing", title, result.description)
    frames, removed = slice_figures.removal(results.denoised.dwi, result.dwi, results.acquired.mask)
    pictures = figures.multiple(
        "unringing",
        frames,
        "Axial slices of a b=0 volume and of the volume with the highest b-value, before and after unringing.",
        "A b=0 volume and the volume with the highest b-value, before and after the removal of Gibbs ringing.",
    )
    pictures += figures.single(
        "unringingRemoved",
        removed,
        "Signal removed by unringing: the difference between the images before and after.",
        "Removed signal (before minus after): bands along edges, alternately bright and dark, that get weaker away "
        "from the edge.",
        "Bands far from any edge, or a blurred copy of the anatomy, indicate that k-space was not sampled as assumed.",
    )
    return Section("unringing", title, result.description, pictures)


def _noise_facts(results: UnitResults) -> tuple[Fact, ...]:
    """Median noise and signal-to-noise ratio within the approximate brain mask."""
    acquired, noise = results.acquired, results.denoised.noise
    inside = acquired.mask.numpy() > 0.5
    if noise is None or not inside.any():
        return ()
    sigma = float(np.median(noise.numpy()[inside]))
    b0 = acquired.dwi.volume(int(np.argmin(acquired.dwi.bvals))).numpy()[inside]
    ratio = f"{np.median(b0) / sigma:.1f}" if sigma > 0 else "no noise detected"
    return (
        Fact("Median noise standard deviation in the brain", f"{sigma:.3g}", "in units of image intensity"),
        Fact(
            "Signal-to-noise ratio at b=0",
            ratio,
            "median signal of one b=0 volume divided by the median noise standard deviation, both in the brain",
        ),
    )


def distortion(results: UnitResults, figures: FigureWriter) -> Section:
    """Effect of the susceptibility distortion correction, or the reason why it was not applied."""
    result, title = results.distortion, "Susceptibility distortion"
    if result is None:
        lead = "Susceptibility distortion was not corrected."
        notes, facts = (*results.warnings, results.distortion_reason), moving_field_facts(results)
        return Section("distortion", title, lead, moving_field_pictures(results, figures), facts, notes)
    lead = (
        "Near air-filled cavities, such as the sinuses and ear canals, the static magnetic field is inhomogeneous, "
        "and echo-planar images are stretched or compressed along the phase-encoding axis."
    )
    if results.anatomy.modality != "none":
        lead += " After correction, the b=0 images should match the outlines from the structural image."
    mask = results.motions[0].mask
    pictures = _blip_corrections(results, result, figures)
    axis = results.acquired.dwi.grid.affine[:3, results.unit.runs[0].axis or 0]
    content, unit = slice_figures.fieldmap(result, mask, axis / np.linalg.norm(axis))
    quantity = "off-resonance field" if unit == "Hz" else "displacement along the phase-encoding axis"
    pictures += figures.single(
        "fieldmap",
        content,
        f"Map of the estimated {quantity}.",
        f"Estimated {quantity} in {unit}.",
        "It should be smooth and largest near the sinuses and ear canals.",
    )
    pictures += figures.single(
        "displacement",
        displacement_arrows(result, mask, axis / np.linalg.norm(axis)),
        "Arrows of the displacement over the corrected b=0 image, three planes.",
        "Displacement of the signal in the first phase encoding, at true length over the corrected b=0 image: from "
        "where it belongs to where it was acquired. Colours give the sign along the phase-encoding axis.",
        "All arrows lie along the phase-encoding axis; neighbours should agree.",
    )
    pictures += figures.single(
        "sdcDescent",
        plots.distortion_convergence(result.trace),
        "Change of the estimated displacement per iteration, by pyramid level.",
        "Change of the estimated displacement per iteration. The estimate should converge at each pyramid level.",
    )
    pictures += moving_field_pictures(results, figures)
    facts = _distortion_facts(results, result) + moving_field_facts(results)
    return Section("distortion", title, lead, pictures, facts, result.notes)


def _blip_corrections(results: UnitResults, result: Distortion, figures: FigureWriter) -> tuple[Picture, ...]:
    """b=0 images of each blip before and after correction, and the difference between blips."""
    mask = results.motions[0].mask
    blips = results.acquired.blips[: len(result.before)]
    pictures: tuple[Picture, ...] = ()
    for index, blip in enumerate(blips):
        pictures += figures.multiple(
            f"sdc{blip.name.capitalize()}",
            slice_figures.distortion_correction(result, index, mask, results.anatomy, results.coregistration),
            f"b=0 image ({BLIPS.get(blip.name, blip.name)}) before and after distortion correction.",
            _correction_caption(results, blip),
        )
    if len(result.before) > 1:
        pictures += figures.multiple(
            "sdcDifference",
            slice_figures.blip_difference(result, mask),
            "Difference between the blip-up and blip-down b=0 images before and after distortion correction.",
            "Difference between the blip-up and blip-down b=0 images (blip-up minus blip-down, in percent of the mean "
            "intensity); black indicates agreement.",
            "Red and blue bands in frontal and temporal regions should disappear. Remaining differences reflect "
            "motion, noise or signal dropout in the acquisition.",
        )
    return pictures


def _correction_caption(results: UnitResults, blip: Blip) -> str:
    """Blip, phase encoding and the outlines that are drawn."""
    name = f" ({BLIPS.get(blip.name, blip.name)})" if len(results.acquired.blips) > 1 else ""
    caption = (
        f"b=0 image{name} before and after distortion correction. "
        f"Phase encoding: {encoding(blip.pe, results.acquired.dwi.grid)}."
    )
    if results.anatomy.modality == "none":
        return caption
    white_matter = "" if results.anatomy.tissue is None else " and white matter (blue)"
    return f"{caption} Outlines from the structural image: brain (yellow){white_matter}."


def _distortion_facts(results: UnitResults, result: Distortion) -> tuple[Fact, ...]:
    """Magnitude of the displacement and range of the field in the brain."""
    inside = results.motions[0].mask.numpy() > 0.5
    size = np.linalg.norm(result.fields[0].data.cpu().numpy(), axis=0)[inside]
    facts = [
        Fact("Choice of method", results.distortion_reason),
        Fact(
            "Displacement in the brain",
            f"median {np.median(size):.2f} mm, 99th percentile {np.percentile(size, 99):.1f} mm",
        ),
    ]
    if result.fieldmap_hz is not None:
        hz = result.fieldmap_hz.numpy()[inside]
        low, high = np.percentile(hz, [0.5, 99.5])
        facts.append(
            Fact("Off-resonance field in the brain", f"{low:.0f} to {high:.0f} Hz", "0.5th to 99.5th percentile")
        )
    return tuple(facts)


def anatomy(results: UnitResults, figures: FigureWriter) -> Section:
    """The structural image, its tissue classes and its normalisation to the template."""
    result = results.anatomy
    if result.modality == "none":
        lead = "No structural image was available: the b=0 reference, rotated to ACPC space, is used in its place."
    else:
        lead = (
            "The structural image in ACPC space. The outlines should follow the brain surface and the boundary "
            "between grey and white matter. Dura or eyes inside the yellow outline, or cortex outside it, impair the "
            "coregistration."
        )
    outlines = "brain (yellow)" if result.tissue is None else "brain (yellow), cortex (pink), white matter (blue)"
    image = "Structural image" if result.modality != "none" else "b=0 reference"
    pictures = figures.single(
        "anat",
        slice_figures.structural_image(result),
        f"{image} with outlines of the brain and tissue classes, three planes.",
        f"{image} in ACPC space. Outlines: {outlines}.",
        "The midline should be vertical, and the line through the anterior and posterior commissures horizontal.",
    )
    if result.template_image is not None and result.warped is not None:
        pictures += figures.multiple(
            "template",
            slice_figures.normalisation(result.template_image, result.warped),
            "Template and normalised brain of the subject, three planes.",
            f"The {result.template} template and the subject's brain normalised to it, with the outline of the "
            "template brain.",
            "Ventricles and large sulci should stay in place when switching between the images.",
        )
    facts = (Fact("Structural image", result.modality), Fact("Grid", describe_grid(result.image.grid)))
    return Section("anatomy", "Anatomy", lead, pictures, facts, result.notes)


def coregistration(results: UnitResults, figures: FigureWriter) -> Section:
    """Alignment of the b=0 reference with the structural image, or with the b=0 reference of another series."""
    result, title = results.coregistration, "Coregistration"
    between_b0 = results.anatomy.modality == "none"
    if result.metric == "none":
        lead = "There is no structural image: the b=0 reference of this series was itself rotated to ACPC space."
        return Section("coregistration", title, lead)
    target = f"b=0 reference of {result.target_unit}" if between_b0 else "structural image"
    exception = ", except for distortion that affects only one of the two series" if between_b0 else ""
    pictures = figures.multiple(
        "coreg",
        slice_figures.coregistration(results.preprocessed, results.anatomy),
        f"b=0 reference and {target} with the same outlines of the brain.",
        f"The distortion-corrected b=0 reference image (dwiref) and the {target} in ACPC space, with the same "
        "outlines.",
        "The edge of the brain, the ventricles and the central sulcus should stay in place when switching between "
        f"the images{exception}.",
    )
    anat_from_acpc, centre = np.asarray(results.anatomy.anat_to_acpc.matrix), results.anatomy.image.grid.centre
    parameters = rigid_parameters(
        result.dwiref_to_acpc.matrix @ np.linalg.inv(anat_from_acpc), anat_from_acpc[:3] @ [*centre, 1]
    )
    facts = (
        Fact(SIMILARITIES[result.metric], f"{result.score_before:.4g} → {result.score_after:.4g}", "before → after"),
        Fact(
            "Rotation",
            f"{np.degrees(np.linalg.norm(parameters[:3])):.1f}°",
            f"between the {target} and the b=0 reference",
        ),
        Fact("Translation", f"{np.linalg.norm(parameters[3:]):.1f} mm", "at the centre of the image"),
    )
    lead = (
        f"Alignment of the distortion-corrected b=0 reference with the {target}. The position of the preprocessed "
        "series in ACPC space depends on this step."
    )
    return Section("coregistration", title, lead, pictures, facts, result.notes)


def output(results: UnitResults, figures: FigureWriter) -> Section:
    """The preprocessed series and a check of its b-vectors."""
    result = results.preprocessed
    pictures = figures.single(
        "means",
        slice_figures.mean_images(result),
        "Mean b=0 image and mean images of ranges of b-values, with the outline of the brain mask, axial slices.",
        "Mean images of b=0 and of ranges of b-values, with the outline of the final brain mask (yellow).",
        "Edges should be as sharp at high b-values as at b=0, and the mask should include the whole brain and little "
        "else.",
    )
    pictures += _fibre_pictures(result, figures)
    pictures += figures.single(
        "contrast",
        slice_figures.cnr_and_tsnr(results.quality, result.mask),
        "Maps of the contrast-to-noise ratio and the temporal signal-to-noise ratio.",
        "Contrast-to-noise ratio (CNR), the standard deviation of the model fit divided by that of its residual, and "
        "temporal signal-to-noise ratio (tSNR) of the b=0 volumes.",
    )
    facts = (
        Fact("Grid", describe_grid(result.dwi.grid)),
        Fact("Volumes", str(len(result.dwi))),
        Fact("Interpolation", result.interpolation),
    )
    lead = (
        "The preprocessed series in ACPC space. The figures of fibre directions help to verify that b-vectors and "
        "images are consistent, which summary metrics alone cannot show."
    )
    return Section("output", "Preprocessed series", lead, pictures, facts)


def _fibre_pictures(result: Preprocessed, figures: FigureWriter) -> tuple[Picture, ...]:
    """Fibre directions, which reveal inconsistent b-vectors."""
    pictures = figures.single(
        "colorFA",
        slice_figures.colour_fa(result),
        "Fractional anisotropy coloured by fibre direction, three planes.",
        "Fractional anisotropy (FA) coloured by principal diffusion direction (tensor fit to volumes with low "
        "b-values): red left-right, green anterior-posterior, blue superior-inferior.",
        "The corpus callosum should be red at the midline, the cingulum green and the corticospinal tract blue. Other "
        "colours indicate permuted b-vector components.",
    )
    pictures += figures.single(
        "sticks",
        slice_figures.fibre_sticks(result),
        "Principal diffusion directions drawn as line segments on fractional anisotropy.",
        "The same directions drawn as line segments, which reveal sign errors that the colours cannot show.",
        "In the coronal view, the segments of the corpus callosum should follow its arch and continue upwards into "
        "both hemispheres; segments that cross the arch indicate a flipped b-vector axis.",
    )
    pictures += figures.single(
        "odf",
        odf_figure(result),
        "Orientation distribution functions drawn as glyphs over fractional anisotropy, three planes.",
        "Orientation distribution functions (generalised q-sampling imaging of all volumes) over FA coloured by "
        "direction; left is left. Open the picture for its full size.",
        "Glyphs should point along the bundle from voxel to voxel; where bundles cross, as lateral of the ventricles, "
        "they should have several lobes.",
    )
    return pictures


SECTIONS = (
    summary,
    acquisition,
    gradients,
    denoising,
    unringing,
    motion,
    qspace,
    distortion,
    anatomy,
    coregistration,
    output,
    qspace_quality,
    quality,
)
