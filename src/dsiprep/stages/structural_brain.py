"""Brain mask of the structural image: extraction, check of a mask given by the user, comparison with the template."""

from __future__ import annotations

import numpy as np
from torch.nn import functional

from dsiprep.data.grid import Volume
from dsiprep.data.template import Template
from dsiprep.errors import InputError
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.brain_mask import brain_mask_b0, brain_mask_t1w, brain_mask_t2w
from dsiprep.ops.registration.linear import register_linear

__all__ = ["check_user_mask", "compare_with_template", "dilated_template_mask", "extract_brain"]

MIN_DICE = 0.9  # below it, a note asks the user to check the brain mask
MIN_BRAIN_ML, MAX_BRAIN_ML = 300.0, 2500.0  # plausible volume of a human brain
MIN_OVERLAP = 0.9  # fraction of a user's mask inside the field of view
MIN_RELATIVE_VOLUME, MAX_RELATIVE_VOLUME = 0.15, 2.0  # of the template's brain: from newborns to the largest brains
DILATION_MM = 4.0  # around the template's brain: the brain surface determines the scale of the registration


def extract_brain(native: Volume, modality: str) -> tuple[Volume, tuple[str, ...]]:
    """Brain mask by the network; if its volume is implausible, a mask by intensity and a note.

    Parameters
    ----------
    native : Volume
        Structural image.
    modality : str
        "T1w" or "T2w".
    """
    mask = brain_mask_t2w(native) if modality == "T2w" else brain_mask_t1w(native)
    millilitres = float(mask.data.sum()) * float(np.prod(native.grid.voxel_sizes)) / 1000
    if MIN_BRAIN_ML <= millilitres <= MAX_BRAIN_ML:
        return mask, ()
    return brain_mask_b0(native), (
        f"The network found no plausible brain in the {modality} image ({millilitres:.0f} ml), so a rough mask "
        "based on intensity is used. Check its outline in the report.",
    )


def check_user_mask(mask: Volume, native: Volume, template: Template) -> Volume:
    """A brain mask given by the user, resampled onto the grid of the structural image.

    Parameters
    ----------
    mask : Volume
        Brain (above 0.5), on any grid.
    native : Volume
        Structural image.
    template : Template
        Defines the plausible range of brain volumes.

    Raises
    ------
    InputError
        If the mask is empty, lies outside the image, has an implausible volume, or covers no signal.
    """
    moved = Volume(mask.data.to(native.data.device).float(), mask.grid)
    inside = (resample_onto(moved.data[None], moved.grid, native.grid)[0] > 0.5).float()
    total_voxel_ml, inside_voxel_ml = (float(np.prod(grid.voxel_sizes)) / 1000 for grid in (mask.grid, native.grid))
    total_ml, inside_ml = float((moved.data > 0.5).sum()) * total_voxel_ml, float(inside.sum()) * inside_voxel_ml
    if total_ml == 0:
        raise InputError("--anat-mask: the mask is empty; it must be 1 (or above 0.5) in the brain")
    if inside_ml < MIN_OVERLAP * total_ml:
        raise InputError(
            f"--anat-mask: only {100 * inside_ml / total_ml:.0f} % of the mask lies inside the structural image; the "
            "mask must be in the scanner coordinates of that image, not in template space"
        )
    template_ml = float(template.mask.data.sum()) * float(np.prod(template.mask.grid.voxel_sizes)) / 1000
    if not MIN_RELATIVE_VOLUME * template_ml <= inside_ml <= MAX_RELATIVE_VOLUME * template_ml:
        raise InputError(
            f"--anat-mask: the mask has a volume of {inside_ml:.3g} ml, the brain of {template.name} {template_ml:.3g} "
            "ml; use a mask of the brain, or a template of this species (--anatomical-template)"
        )
    if float((native.data * inside).sum()) <= 0:
        raise InputError("--anat-mask: the structural image is zero inside the mask; use the mask of this image")
    return Volume(inside, native.grid)


def compare_with_template(
    native: Volume, mask: Volume, template: Template, native_to_template: np.ndarray
) -> tuple[str, ...]:
    """A note if the brain mask disagrees with the template's mask, affinely registered to the unmasked image.

    Parameters
    ----------
    native, mask : Volume
        Structural image and its brain mask, on one grid.
    template : Template
    native_to_template : ndarray, (4, 4)
        World points of the template to world points of the structural image: start of the registration.
    """
    fit = register_linear(
        native, template.brain, dof=12, fixed_mask=template.mask, initial=native_to_template, search=False
    )
    template_mask = template.mask.data[None].to(mask.data.device)
    warped = resample_onto(template_mask, template.mask.grid, native.grid, np.linalg.inv(fit.matrix))[0] > 0.5
    intersection = float((mask.data * warped).sum())
    dice = 2 * intersection / max(float(mask.data.sum() + warped.sum()), 1.0)
    if dice >= MIN_DICE:
        return ()
    return (
        f"Brain mask: the mask found in the image and that of {template.name} agree only to a Dice overlap of "
        f"{dice:.2f}. Check the outlines in the report.",
    )


def dilated_template_mask(template: Template) -> Volume:
    """The template's brain mask dilated by `DILATION_MM` along each axis."""
    data = template.mask.data[None, None]
    for axis, size in enumerate(template.mask.grid.voxel_sizes):
        radius = [0, 0, 0]
        radius[axis] = round(DILATION_MM / float(size))
        data = functional.max_pool3d(data, [2 * r + 1 for r in radius], stride=1, padding=radius)
    return Volume(data[0, 0], template.mask.grid)
