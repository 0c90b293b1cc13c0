"""The structural image: bias, brain, ACPC pose, tissue, and the way to the template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy
from dsiprep.data.template import Template
from dsiprep.data.transform import Affine, Chain
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import nearest_rotation
from dsiprep.ops.image.displacement_field import chain_displacement, fit_between
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.bias_field import n4_bias
from dsiprep.ops.intensity.brain_mask import brain_mask_b0, brain_mask_dwiref, brain_mask_t1w, brain_mask_t2w
from dsiprep.ops.intensity.tissue_segmentation import segment_tissue
from dsiprep.ops.registration.diffeomorphic import register_diffeomorphic
from dsiprep.ops.registration.head_size import enlarge_affine, enlarge_chain, enlarge_volume, enlargement
from dsiprep.ops.registration.linear import register_linear
from dsiprep.settings import AnatomySettings
from dsiprep.stages.structural_average import average_images

METHODS = {
    "brain": (
        "The brain was found in the T1w image by the deepbet network [@fisch2024] and compared with the "
        "mask of the template, brought over by an affine registration."
    ),
    "T1w": (
        "The T1w image was brought to ACPC space by the rigid part (polar decomposition about the anterior "
        "commissure) of an affine registration to the template that maximises normalised mutual information "
        "[@studholme1999; @mattes2003], with cubic B-splines [@unser1999]."
    ),
    "n4": ("Intensities of the structural image were corrected for receive bias with N4 [@tustison2010]."),
    "tissue": (
        "Cerebrospinal fluid, grey matter and white matter were segmented with a Gaussian mixture whose "
        "weights depend on the tissue priors of the template [@ashburner2005] and, through a Markov random "
        "field, on neighbouring voxels [@zhang2001]."
    ),
    "normalize": (
        "The brain was registered to the template with an affine transform and a greedy diffeomorphic one "
        "that maximises local cross-correlation [@avants2008; @yushkevich2016]."
    ),
    "none": (
        "No structural image was used: the b=0 reference was rigidly registered to the template's brain "
        "with normalised mutual information [@studholme1999; @mattes2003], which gave it the orientation of"
        " ACPC space."
    ),
}

__all__ = ["METHODS", "Steps", "normalise_brain", "process_anatomy"]

LEAST_VOXEL_MM = 0.8
SHRINK_MM = 4.0  # distance of the voxels that N4 sees
MARGIN_MM = 5.0  # around the head, on each side
AGREE_DICE = 0.9  # below it the two brain masks are worth a look
LEAST_BRAIN_ML, MOST_BRAIN_ML = 300.0, 2500.0  # no human brain outside of it
LEAST_OVERLAP = 0.9  # of a given mask inside the field of view
LEAST_SHARE, MOST_SHARE = 0.15, 2.0  # of the template's brain: from the newborn's to the largest
LEAST_PIECE = 0.05  # of the largest piece of the head; smaller ones are noise
DILATION_MM = 4.0  # around the template's brain where its registration compares: the rim carries the size


@dataclass(frozen=True)
class Steps:
    """What programs that people own can do in place of dsiprep; None leaves it to dsiprep.

    Attributes
    ----------
    brain : callable
        Structural image -> brain mask.
    tissue : callable
        Image, mask, priors (3, i, j, k) where there are any -> shares of CSF, GM, WM, and a volume of labels.
    normalise : callable
        Brain, template, the mask around its brain, points of the template to ACPC (4, 4), settings -> the chains
        from ACPC to the template and back.
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
    steps: Steps | None = None,
) -> Anatomy:
    """Bring the structural image to ACPC space and find brain, tissue and template in it.

    Parameters
    ----------
    images : tuple of Volume
        Native images of `settings.modality`, possibly none; several are averaged as `settings.reference` says.
    dwiref, dwiref_mask : Volume or None
        The undistorted b=0 reference and its brain, which stand in where there is no structural image, or
        `settings.modality` is "none"; the mask is found where it is None.
    template : Template
        Its world is ACPC-like, with the anterior commissure at the origin.
    settings : AnatomySettings
    mask : Volume, optional
        The brain in the (average) structural image, on any grid; found where it is None.
    steps : Steps, optional
        Programs that do some of the work.

    Returns
    -------
    Anatomy

    Raises
    ------
    InputError
        If there is neither a structural image nor a b=0 reference, an image is empty, or `mask` is not its brain.
    """
    structural = bool(images) and settings.modality != "none"
    if not structural and dwiref is None:
        raise InputError("no structural image and no b=0 reference: give one of them")
    by = enlargement(template.mask)
    if by != 1 and structural and mask is None:
        raise InputError(
            f"the brain of {template.name} has not the size of a person's, and only people's brains can be found: give "
            "the brain mask of the structural image with --anat-mask"
        )
    large = [enlarge_volume(image, by) for image in images]
    one = _enlarged(template, by)
    if structural:
        given = None if mask is None else enlarge_volume(mask, by)
        return _as_large_as_it_was(_from_t1w(tuple(large), one, settings, given, steps or Steps()), by)
    assert dwiref is not None
    brain = dwiref_mask or brain_mask_dwiref(dwiref)
    return _as_large_as_it_was(_from_dwiref(enlarge_volume(dwiref, by), enlarge_volume(brain, by), one), by)


def _enlarged(template: Template, by: float) -> Template:
    return replace(template, brain=enlarge_volume(template.brain, by), mask=enlarge_volume(template.mask, by))


def _as_large_as_it_was(found: Anatomy, by: float) -> Anatomy:
    """Lengths as they were before everything was enlarged."""
    if by == 1:
        return found
    small, there, back = 1 / by, found.acpc_to_template, found.template_to_acpc
    return replace(
        found,
        image=enlarge_volume(found.image, small),
        mask=enlarge_volume(found.mask, small),
        template_image=None if found.template_image is None else enlarge_volume(found.template_image, small),
        warped=None if found.warped is None else enlarge_volume(found.warped, small),
        acpc_to_template=None if there is None else enlarge_chain(there, small),
        template_to_acpc=None if back is None else enlarge_chain(back, small),
        anat_to_acpc=enlarge_affine(found.anat_to_acpc, small),
        orig_to_anat=tuple(enlarge_affine(pose, small) for pose in found.orig_to_anat),
        labels=None if found.labels is None else enlarge_volume(found.labels, small),
        enlarged=by,
    )


def _from_t1w(
    images: tuple[Volume, ...], template: Template, settings: AnatomySettings, given: Volume | None, steps: Steps
) -> Anatomy:
    device = images[0].data.device
    native, poses, notes = average_images(images, unbiased=settings.reference != "first-lex")
    mask, doubt = _mask(native, template, settings, given, steps)
    if settings.biascorrect == "n4":
        native = Volume(native.data / n4_bias(native, mask, _shrink(native.grid)).data, native.grid)
    brain = Volume(native.data * mask.data, native.grid)
    rim = _rim(template)
    to_template = register_linear(brain, template.brain, dof=12, fixed_mask=rim, moving_mask=mask).matrix
    opinion = _second_opinion(native, mask, template, to_template)
    pose = _rigid_about_origin(to_template)
    grid = _output_grid(native, pose)
    image = Volume(resample_onto(native.data[None], native.grid, grid, pose, cubic=True)[0].clamp(min=0), grid)
    inside = Volume((resample_onto(mask.data[None], mask.grid, grid, pose)[0] > 0.5).float(), grid)
    brain = Volume(image.data * inside.data, grid)
    normalise = steps.normalise if steps.normalise and settings.normalize else _normalise
    forward, back = normalise(brain, template, rim, np.linalg.inv(pose) @ to_template, settings)
    tissue, labels = (steps.tissue or _tissue)(image, inside, _priors(template, back, grid, device))
    return Anatomy(
        modality=settings.modality,
        image=image,
        mask=inside,
        tissue=tissue,
        anat_to_acpc=Affine(pose, "anat", "ACPC"),
        acpc_to_template=forward if settings.normalize else None,
        template_to_acpc=back if settings.normalize else None,
        template=template.name,
        template_image=template.brain if settings.normalize else None,
        warped=_brought(brain, forward, template.brain.grid) if settings.normalize else None,
        notes=(*notes, *doubt, *opinion, *_on_template(template, settings)),
        orig_to_anat=poses,
        labels=labels,
    )


def _from_dwiref(dwiref: Volume, mask: Volume, template: Template) -> Anatomy:
    """The b=0 reference as its own structural image: a rigid registration to the template gives the pose."""
    brain = Volume(dwiref.data * (mask.data > 0.5), dwiref.grid)
    fit = register_linear(brain, template.brain, dof=6, fixed_mask=_rim(template), moving_mask=mask)
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
        template_image=None,
        warped=None,
        notes=(
            "No structural image was used. The b=0 reference stands in for it: ACPC is a rigid alignment of "
            f"the b=0 reference to {template.name}, without tissue segmentation and without normalisation.",
        ),
    )


def _brain(native: Volume, modality: str) -> tuple[Volume, tuple[str, ...]]:
    """The brain by the network; where it finds nothing of a brain's size, by brightness, and a note."""
    mask = brain_mask_t2w(native) if modality == "T2w" else brain_mask_t1w(native)
    millilitres = float(mask.data.sum()) * float(np.prod(native.grid.voxel_sizes)) / 1000
    if LEAST_BRAIN_ML <= millilitres <= MOST_BRAIN_ML:
        return mask, ()
    return brain_mask_b0(native), (
        f"The network found no brain in the {modality} image ({millilitres:.0f} ml): the mask is a rough one by "
        "brightness. Check the outlines in the report.",
    )


def _mask(
    native: Volume, template: Template, settings: AnatomySettings, given: Volume | None, steps: Steps
) -> tuple[Volume, tuple[str, ...]]:
    """The brain as it was given, or as it is found, and what is to be doubted of it."""
    if given is not None:
        return _taken(given, native, template), ()
    return _brain(native, settings.modality) if steps.brain is None else (steps.brain(native), ())


def _taken(given: Volume, native: Volume, template: Template) -> Volume:
    """A mask that came with the data, on the grid of the structural image, after a look at it."""
    moved = Volume(given.data.to(native.data.device).float(), given.grid)
    inside = (resample_onto(moved.data[None], moved.grid, native.grid)[0] > 0.5).float()
    voxel = [float(np.prod(grid.voxel_sizes)) / 1000 for grid in (given.grid, native.grid)]
    whole, left = float((moved.data > 0.5).sum()) * voxel[0], float(inside.sum()) * voxel[1]
    if whole == 0:
        raise InputError("--anat-mask: the mask is empty; give one that is 1 (or above 0.5) in the brain")
    if left < LEAST_OVERLAP * whole:
        raise InputError(
            f"--anat-mask: only {100 * left / whole:.0f} % of the mask lies in the structural image; give one in the "
            "scanner coordinates of that image, not in those of a template"
        )
    usual = float(template.mask.data.sum()) * float(np.prod(template.mask.grid.voxel_sizes)) / 1000
    if not LEAST_SHARE * usual <= left <= MOST_SHARE * usual:
        raise InputError(
            f"--anat-mask: the mask holds {left:.3g} ml, the brain of {template.name} {usual:.3g} ml; give the mask of "
            "the brain, or a template of this species with --anatomical-template"
        )
    if float((native.data * inside).sum()) <= 0:
        raise InputError("--anat-mask: the structural image is empty inside the mask; give the mask of this image")
    return Volume(inside, native.grid)


def _tissue(image: Volume, mask: Volume, priors: torch.Tensor | None) -> tuple[torch.Tensor | None, Volume | None]:
    return None if priors is None else segment_tissue(image, mask, priors), None


def _second_opinion(native: Volume, mask: Volume, template: Template, to_template: np.ndarray) -> tuple[str, ...]:
    """A note where the template's mask, fitted to the whole head, disagrees with the mask."""
    fit = register_linear(native, template.brain, dof=12, fixed_mask=template.mask, initial=to_template, search=False)
    inverse = np.linalg.inv(fit.matrix)
    near = (
        resample_onto(template.mask.data[None].to(mask.data.device), template.mask.grid, native.grid, inverse)[0] > 0.5
    )
    both = float((mask.data * near).sum())
    dice = 2 * both / max(float(mask.data.sum() + near.sum()), 1.0)
    if dice >= AGREE_DICE:
        return ()
    return (
        f"Brain mask: the network and the mask of {template.name} agree only to Dice {dice:.2f}. Check the "
        "outlines in the report.",
    )


def _rim(template: Template) -> Volume:
    """The template's brain and a few mm around it."""
    data = template.mask.data[None, None]
    for axis, size in enumerate(template.mask.grid.voxel_sizes):
        reach = [0, 0, 0]
        reach[axis] = round(DILATION_MM / float(size))
        data = functional.max_pool3d(data, [2 * r + 1 for r in reach], stride=1, padding=reach)
    return Volume(data[0, 0], template.mask.grid)


def _shrink(grid: Grid) -> int:
    return max(1, round(SHRINK_MM / float(grid.voxel_sizes.mean())))


def _rigid_about_origin(matrix: np.ndarray) -> np.ndarray:
    """The rigid part of template-to-native: the origin (AC) goes where the affine sends it."""
    pose = matrix.copy()
    pose[:3, :3] = nearest_rotation(matrix[:3, :3])
    return pose


def _output_grid(native: Volume, pose: np.ndarray) -> Grid:
    """An LPS+ grid around the whole head, with the voxel sizes of the native image along the nearest axes."""
    turn = pose[:3, :3].T @ native.grid.directions
    nearest = np.abs(turn).argmax(axis=1)
    sizes = np.maximum(native.grid.voxel_sizes[nearest], LEAST_VOXEL_MM)
    inverse = np.linalg.inv(pose)
    points = native.grid.to_world(_head_voxels(native)) @ inverse[:3, :3].T + inverse[:3, 3]
    low = np.floor((points.min(0) - MARGIN_MM) / sizes) * sizes
    high = np.ceil((points.max(0) + MARGIN_MM) / sizes) * sizes
    i, j, k = (int(n) for n in np.round((high - low) / sizes) + 1)
    affine = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
    affine[:3, 3] = high[0], high[1], low[2]
    return Grid((i, j, k), affine)


def _head_voxels(native: Volume) -> np.ndarray:
    """Voxels of what is not air, (m, 3), without specks of noise."""
    data = native.numpy()
    smooth = ndimage.gaussian_filter(data, 1.5 / native.grid.voxel_sizes)
    labels, count = ndimage.label(smooth > 0.08 * np.percentile(smooth, 99))
    if count == 0:
        return np.array([[0, 0, 0], np.asarray(data.shape) - 1])
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.argwhere((sizes > LEAST_PIECE * sizes.max())[labels])


def _normalise(
    brain: Volume, template: Template, rim: Volume, initial: np.ndarray, settings: AnatomySettings
) -> tuple[Chain, Chain]:
    """ACPC to template and back; affine only where the diffeomorphic part is not wanted."""
    there = Affine(initial, "ACPC", template.name)
    if not settings.normalize:
        return Chain((there,), "ACPC", template.name), Chain((there.inverse(),), template.name, "ACPC")
    device = brain.data.device
    finest = max(settings.finest_mm, float(template.brain.grid.voxel_sizes.max()))
    fit = register_diffeomorphic(brain, template.brain.to(device), initial, fixed_mask=rim.to(device), finest_mm=finest)
    return (
        Chain((fit.forward, there), "ACPC", template.name),
        Chain((there.inverse(), fit_between(fit.inverse)), template.name, "ACPC"),
    )


def _priors(template: Template, back: Chain, grid: Grid, device: torch.device) -> torch.Tensor | None:
    """The template's tissues on the grid of the structural image, where it has them."""
    if template.tissue is None:
        return None
    way = chain_displacement(back, grid, device)
    return resample_onto(template.tissue.to(device), template.brain.grid, grid, displacement=way)


def _on_template(template: Template, settings: AnatomySettings) -> tuple[str, ...]:
    """What is to be known of a template that is not the usual one."""
    bare = f"{template.name} came without tissue priors, so there is no tissue segmentation."
    notes = (template.note if settings.normalize else "", "" if template.tissue is not None else bare)
    return tuple(note for note in notes if note)


def _brought(brain: Volume, chain: Chain, grid: Grid) -> Volume:
    displacement = chain_displacement(chain, grid, brain.data.device)
    return Volume(resample_onto(brain.data[None], brain.grid, grid, displacement=displacement)[0], grid)


def normalise_brain(
    image: Volume, mask: Volume, template: Template, settings: AnatomySettings | None = None
) -> tuple[Chain, Chain]:
    """ACPC to template and back, for a structural image whose brain is known: affine, then diffeomorphic.

    Parameters
    ----------
    image, mask : Volume
        Structural image near ACPC space, and its brain (above 0.5), on one grid.
    template : Template
    settings : AnatomySettings, optional

    Returns
    -------
    forward, back : Chain
        `forward` maps points of the template to ACPC, `back` points of ACPC to the template.
    """
    brain = Volume(image.data * (mask.data > 0.5), image.grid)
    rim = _rim(template)
    start = register_linear(brain, template.brain, dof=12, fixed_mask=rim, moving_mask=mask).matrix
    return _normalise(brain, template, rim, start, settings or AnatomySettings())
