"""Processing of the structural image: bias field, brain mask, ACPC pose, tissue segmentation, normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy
from dsiprep.data.template import Template
from dsiprep.data.transform import Affine, Chain
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import nearest_rotation
from dsiprep.ops.image.displacement_field import chain_displacement, prefilter
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.bias_field import n4_bias
from dsiprep.ops.intensity.brain_mask import brain_mask_dwiref
from dsiprep.ops.intensity.tissue_segmentation import segment_tissue
from dsiprep.ops.registration.diffeomorphic import register_diffeomorphic
from dsiprep.ops.registration.head_size import human_size_factor, scale_volume
from dsiprep.ops.registration.linear import register_linear
from dsiprep.settings import AnatomySettings
from dsiprep.stages.anatomy_scaling import restore_size, scale_template
from dsiprep.stages.structural_average import average_images
from dsiprep.stages.structural_brain import (
    check_user_mask,
    compare_with_template,
    dilated_template_mask,
    extract_brain,
)

METHODS = {
    "brain": (
        "The brain was extracted from the T1w image with the deepbet network [@fisch2024], and the mask was compared "
        "with that of the template after affine registration."
    ),
    "T1w": (
        "The T1w image was brought into ACPC space (anterior-posterior commissure) by the rigid part (polar "
        "decomposition about the anterior commissure) of an affine registration to the template that maximises "
        "normalised mutual information [@studholme1999; @mattes2003], and resampled with cubic B-splines [@unser1999]."
    ),
    "n4": ("The structural image was corrected for the receive bias field with N4 [@tustison2010]."),
    "tissue": (
        "Cerebrospinal fluid, grey matter and white matter were segmented with a Gaussian mixture model whose "
        "weights depend on the tissue priors of the template [@ashburner2005] and, through a Markov random "
        "field, on neighbouring voxels [@zhang2001]."
    ),
    "normalize": (
        "The brain was registered to the template with an affine transform followed by a greedy diffeomorphic "
        "transform that maximises local cross-correlation [@avants2008; @yushkevich2016]."
    ),
    "none": (
        "No structural image was used: the b=0 reference was brought into the orientation of ACPC space "
        "(anterior-posterior commissure) by a rigid registration to the template's brain that maximises normalised "
        "mutual information [@studholme1999; @mattes2003]."
    ),
}

__all__ = ["METHODS", "ExternalSteps", "normalise_brain", "process_anatomy"]

MIN_VOXEL_MM = 0.8
N4_SPACING_MM = 4.0  # voxel spacing at which N4 estimates the bias field
MARGIN_MM = 5.0  # around the head, on each side
MIN_COMPONENT = 0.05  # relative to the largest component of the head; smaller ones are noise


@dataclass(frozen=True)
class ExternalSteps:
    """Third-party replacements for steps of the stage; None selects dsiprep's own implementation.

    Attributes
    ----------
    brain : callable
        Structural image -> brain mask.
    tissue : callable
        Image, mask, priors (3, i, j, k) or None -> fractions of CSF, GM and WM, and a label volume.
    normalise : callable
        Brain, template, dilated brain mask of the template, transform (4, 4) of template points to ACPC, settings ->
        the chains from ACPC to the template and back.
    """

    brain: Callable[[Volume], Volume] | None = None
    tissue: Callable[[Volume, Volume, torch.Tensor | None], tuple[torch.Tensor | None, Volume | None]] | None = None
    normalise: Callable[[Volume, Template, Volume, np.ndarray, AnatomySettings], tuple[Chain, Chain]] | None = None


def process_anatomy(
    images: tuple[Volume, ...],
    dwiref: Volume | None,
    dwiref_mask: Volume | None,
    template: Template,
    settings: AnatomySettings,
    mask: Volume | None = None,
    steps: ExternalSteps | None = None,
) -> Anatomy:
    """Bring the structural image into ACPC space, extract the brain, segment tissue and normalise to the template.

    Heads of other species are scaled to human size for the processing, and scaled back in the result.

    Parameters
    ----------
    images : tuple of Volume
        Native images of `settings.modality`, possibly none; several are averaged according to `settings.reference`.
    dwiref, dwiref_mask : Volume or None
        Undistorted b=0 reference and its brain mask, used if there is no structural image or `settings.modality` is
        "none". The mask is computed if it is None.
    template : Template
        In ACPC-like coordinates, with the anterior commissure at the origin.
    settings : AnatomySettings
    mask : Volume, optional
        Brain mask of the (average) structural image, on any grid; computed if it is None.
    steps : ExternalSteps, optional
        Third-party replacements for some of the steps.

    Returns
    -------
    Anatomy

    Raises
    ------
    InputError
        If there is neither a structural image nor a b=0 reference, an image is empty, or `mask` cannot be its brain.
    """
    structural = bool(images) and settings.modality != "none"
    if not structural and dwiref is None:
        raise InputError("there is neither a structural image nor a b=0 reference: one of them is required")
    factor = human_size_factor(template.mask)
    if factor != 1 and structural and mask is None:
        raise InputError(
            f"the brain of {template.name} is not of human size, and only human brains can be extracted "
            "automatically: give the brain mask of the structural image with --anat-mask"
        )
    scaled_template = scale_template(template, factor)
    if structural:
        scaled_images = tuple(scale_volume(image, factor) for image in images)
        user_mask = None if mask is None else scale_volume(mask, factor)
        anatomy = _from_structural(scaled_images, scaled_template, settings, user_mask, steps or ExternalSteps())
        return restore_size(anatomy, factor)
    assert dwiref is not None
    brain = dwiref_mask or brain_mask_dwiref(dwiref)
    anatomy = _from_dwiref(scale_volume(dwiref, factor), scale_volume(brain, factor), scaled_template)
    return restore_size(anatomy, factor)


def _from_structural(
    images: tuple[Volume, ...],
    template: Template,
    settings: AnatomySettings,
    user_mask: Volume | None,
    steps: ExternalSteps,
) -> Anatomy:
    device = images[0].data.device
    native, poses, average_notes = average_images(images, unbiased=settings.reference != "first-lex")
    mask, mask_notes = _brain_mask(native, template, settings, user_mask, steps)
    if settings.biascorrect == "n4":
        native = Volume(native.data / n4_bias(native, mask, _n4_shrink(native.grid)).data, native.grid)
    brain = Volume(native.data * mask.data, native.grid)
    region = dilated_template_mask(template)
    native_to_template = register_linear(brain, template.brain, dof=12, fixed_mask=region, moving_mask=mask).matrix
    agreement_notes = compare_with_template(native, mask, template, native_to_template)
    pose = _rigid_about_origin(native_to_template)
    grid = _output_grid(native, pose)
    image = Volume(resample_onto(native.data[None], native.grid, grid, pose, cubic=True)[0].clamp(min=0), grid)
    inside = Volume((resample_onto(mask.data[None], mask.grid, grid, pose)[0] > 0.5).float(), grid)
    brain = Volume(image.data * inside.data, grid)
    normalise = steps.normalise if steps.normalise and settings.normalize else _normalise
    forward, back = normalise(brain, template, region, np.linalg.inv(pose) @ native_to_template, settings)
    tissue, labels = (steps.tissue or _segment)(image, inside, _priors(template, back, grid, device))
    return Anatomy(
        modality=settings.modality,
        image=image,
        mask=inside,
        tissue=tissue,
        anat_to_acpc=Affine(pose, "anat", "ACPC"),
        acpc_to_template=forward if settings.normalize else None,
        template_to_acpc=back if settings.normalize else None,
        template=template.name,
        template_origin=template.origin,
        template_image=template.brain if settings.normalize else None,
        warped=_warp(brain, forward, template.brain.grid) if settings.normalize else None,
        notes=(*average_notes, *mask_notes, *agreement_notes, *_template_notes(template, settings)),
        orig_to_anat=poses,
        labels=labels,
    )


def _from_dwiref(dwiref: Volume, mask: Volume, template: Template) -> Anatomy:
    """Use the b=0 reference as structural image; its ACPC pose is a rigid registration to the template."""
    brain = Volume(dwiref.data * (mask.data > 0.5), dwiref.grid)
    region = dilated_template_mask(template)
    fit = register_linear(brain, template.brain, dof=6, fixed_mask=region, moving_mask=mask)
    grid = _output_grid(dwiref, fit.matrix)
    image = resample_onto(dwiref.data[None].float(), dwiref.grid, grid, fit.matrix, cubic=True)[0].clamp(min=0)
    inside = (resample_onto(mask.data[None].float(), mask.grid, grid, fit.matrix)[0] > 0.5).float()
    return Anatomy(
        modality="none",
        image=Volume(image, grid),
        mask=Volume(inside, grid),
        tissue=None,
        anat_to_acpc=Affine(fit.matrix, "anat", "ACPC"),
        acpc_to_template=None,
        template_to_acpc=None,
        template=template.name,
        template_origin=template.origin,
        template_image=None,
        warped=None,
        notes=(
            "No structural image was used. ACPC space (anterior-posterior commissure) is defined by a rigid "
            f"registration of the b=0 reference to {template.name}; there is no tissue segmentation and no "
            "normalisation.",
        ),
    )


def _brain_mask(
    native: Volume, template: Template, settings: AnatomySettings, user_mask: Volume | None, steps: ExternalSteps
) -> tuple[Volume, tuple[str, ...]]:
    """Brain mask on the grid of the structural image, and notes on its reliability."""
    if user_mask is not None:
        return check_user_mask(user_mask, native, template), ()
    return extract_brain(native, settings.modality) if steps.brain is None else (steps.brain(native), ())


def _segment(image: Volume, mask: Volume, priors: torch.Tensor | None) -> tuple[torch.Tensor | None, Volume | None]:
    return None if priors is None else segment_tissue(image, mask, priors), None


def _n4_shrink(grid: Grid) -> int:
    return max(1, round(N4_SPACING_MM / float(grid.voxel_sizes.mean())))


def _rigid_about_origin(matrix: np.ndarray) -> np.ndarray:
    """Rigid part of a template-to-native affine that maps the origin (anterior commissure) to the same point."""
    pose = matrix.copy()
    pose[:3, :3] = nearest_rotation(matrix[:3, :3])
    return pose


def _output_grid(native: Volume, pose: np.ndarray) -> Grid:
    """An LPS+ grid around the whole head, with the voxel sizes of the native image along the nearest axes."""
    alignment = pose[:3, :3].T @ native.grid.directions
    nearest = np.abs(alignment).argmax(axis=1)
    sizes = np.maximum(native.grid.voxel_sizes[nearest], MIN_VOXEL_MM)
    inverse = np.linalg.inv(pose)
    points = native.grid.to_world(_head_voxels(native)) @ inverse[:3, :3].T + inverse[:3, 3]
    low = np.floor((points.min(0) - MARGIN_MM) / sizes) * sizes
    high = np.ceil((points.max(0) + MARGIN_MM) / sizes) * sizes
    i, j, k = (int(n) for n in np.round((high - low) / sizes) + 1)
    affine = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
    affine[:3, 3] = high[0], high[1], low[2]
    return Grid((i, j, k), affine)


def _head_voxels(native: Volume) -> np.ndarray:
    """Indices of the voxels of the head, (m, 3), without air and isolated noise."""
    data = native.numpy()
    smooth = ndimage.gaussian_filter(data, 1.5 / native.grid.voxel_sizes)
    components, count = ndimage.label(smooth > 0.08 * np.percentile(smooth, 99))
    if count == 0:
        return np.array([[0, 0, 0], np.asarray(data.shape) - 1])
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    return np.argwhere((sizes > MIN_COMPONENT * sizes.max())[components])


def _normalise(
    brain: Volume, template: Template, region: Volume, initial: np.ndarray, settings: AnatomySettings
) -> tuple[Chain, Chain]:
    """ACPC to template and back; only the affine transform if `settings.normalize` is False."""
    affine = Affine(initial, "ACPC", template.name)
    if not settings.normalize:
        return Chain((affine,), "ACPC", template.name), Chain((affine.inverse(),), template.name, "ACPC")
    device = brain.data.device
    finest = max(settings.finest_mm, float(template.brain.grid.voxel_sizes.max()))
    fit = register_diffeomorphic(
        brain, template.brain.to(device), initial, fixed_mask=region.to(device), finest_mm=finest
    )
    return (
        Chain((fit.forward, affine), "ACPC", template.name),
        Chain((affine.inverse(), prefilter(fit.inverse)), template.name, "ACPC"),
    )


def _priors(template: Template, back: Chain, grid: Grid, device: torch.device) -> torch.Tensor | None:
    """The template's tissue priors on the grid of the structural image; None if it has none."""
    if template.tissue is None:
        return None
    displacement = chain_displacement(back, grid, device)
    return resample_onto(template.tissue.to(device), template.brain.grid, grid, displacement=displacement)


def _template_notes(template: Template, settings: AnatomySettings) -> tuple[str, ...]:
    """Notes on a template other than the requested one, or without tissue priors."""
    no_priors = f"{template.name} has no tissue priors, so there is no tissue segmentation."
    notes = (template.note if settings.normalize else "", "" if template.tissue is not None else no_priors)
    return tuple(note for note in notes if note)


def _warp(brain: Volume, chain: Chain, grid: Grid) -> Volume:
    displacement = chain_displacement(chain, grid, brain.data.device)
    return Volume(resample_onto(brain.data[None], brain.grid, grid, displacement=displacement)[0], grid)


def normalise_brain(
    image: Volume, mask: Volume, template: Template, settings: AnatomySettings | None = None
) -> tuple[Chain, Chain]:
    """ACPC to template and back for a structural image with a known brain mask: affine, then diffeomorphic.

    Parameters
    ----------
    image, mask : Volume
        Structural image near ACPC space and its brain mask (above 0.5), on one grid.
    template : Template
    settings : AnatomySettings, optional

    Returns
    -------
    forward, back : Chain
        `forward` maps points of the template to ACPC, `back` points of ACPC to the template.
    """
    brain = Volume(image.data * (mask.data > 0.5), image.grid)
    region = dilated_template_mask(template)
    initial = register_linear(brain, template.brain, dof=12, fixed_mask=region, moving_mask=mask).matrix
    return _normalise(brain, template, region, initial, settings or AnatomySettings())
