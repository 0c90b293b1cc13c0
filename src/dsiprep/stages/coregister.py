"""Coregistration of the b=0 reference with the structural image."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Volume
from dsiprep.data.results import Anatomy, Coregistration
from dsiprep.data.transform import Affine
from dsiprep.ops.registration.head_size import scale_matrix, scale_volume
from dsiprep.ops.registration.linear import LinearFit, register_linear
from dsiprep.settings import CoregisterSettings

METHODS = {
    "mi": (
        "The undistorted b=0 reference was registered to the structural image with a rigid (or, if requested, affine) "
        "transform that maximises normalised mutual information [@studholme1999; @mattes2003] in the brain and 6 mm "
        "around it, at resolutions from 8 to 2 mm. The search started from scanner coordinates and from aligned "
        "centres of mass, each in 27 orientations, and from the best overlap of the two brain masks; the result with "
        "the highest score was used."
    ),
    "cc": (
        "Without a structural image, the b=0 reference of one series of the subject was brought into ACPC space. Those "
        "of the other series were registered to it with a rigid transform that maximises their correlation in the "
        "brain and 6 mm around it, at the same resolutions and with the same search."
    ),
    "none": (
        "No structural image was used: the rigid transform that brings the b=0 reference into ACPC space serves as the "
        "coregistration."
    ),
}

MIN_CORRELATION, MIN_INFORMATION = 0.6, 1.01  # below these, alignment has failed; real heads give 0.88 and 1.03
MARGIN_MM = 6.0  # around the brain, whose edge has more contrast than its interior in b=0 and T1w images

__all__ = ["METHODS", "coregister"]


def coregister(
    dwiref: Volume, dwiref_mask: Volume, anatomy: Anatomy, settings: CoregisterSettings, target_unit: str = ""
) -> Coregistration:
    """Register the undistorted b=0 reference to the structural image in ACPC space, or to another b=0 reference.

    Parameters
    ----------
    dwiref : Volume
        Undistorted, in scanner coordinates (world RAS+ mm).
    dwiref_mask : Volume
        Brain mask of the dwiref, 0 or 1.
    anatomy : Anatomy
        `image` and `mask` are in ACPC space. If `modality` is "none", the image is a b=0 reference.
    settings : CoregisterSettings
    target_unit : str
        Name of the unit whose b=0 reference is `anatomy.image`; empty if that is `dwiref` itself or a structural
        image.

    Returns
    -------
    Coregistration
        `dwiref_to_acpc` maps points of ACPC to points of the dwiref. The scores are normalised mutual information,
        from 1 (independent images) to 2, or, between b=0 references, correlation.
    """
    start = np.asarray(anatomy.anat_to_acpc.matrix, float)
    if anatomy.modality == "none" and not target_unit:
        return Coregistration(Affine(start, "dwiref", "ACPC"), float("nan"), float("nan"), "none")
    same_contrast, factor = anatomy.modality == "none", anatomy.magnification
    dwiref, dwiref_mask, image, mask = (
        scale_volume(volume, factor) for volume in (dwiref, dwiref_mask, anatomy.image, anatomy.mask)
    )
    region, start = _dilate(mask), scale_matrix(start, factor)
    align = partial(
        register_linear,
        dwiref,
        image,
        dof=6 if same_contrast else settings.dof,
        metric="cc" if same_contrast else "mi",
        fixed_mask=region,
        moving_mask=dwiref_mask,
    )
    from_images = align(initial=start, search=True)
    # with partial brain coverage, coarse images can mislead the search; the shapes of the two brain masks do not
    masks = register_linear(dwiref_mask, mask, dof=6, metric="cc", fixed_mask=region, initial=start)
    from_masks = align(initial=masks.matrix, search=False)
    score_before, best = from_images.score_before, max((from_images, from_masks), key=lambda fit: fit.score_after)
    transform = Affine(scale_matrix(best.matrix, 1 / factor), "dwiref", "ACPC")
    notes = _agreement_notes(score_before, best)
    return Coregistration(transform, score_before, best.score_after, best.metric, target_unit, notes)


def _agreement_notes(score_before: float, best: LinearFit) -> tuple[str, ...]:
    """A note if the similarity is low, or no better than in scanner coordinates."""
    minimum = MIN_CORRELATION if best.metric == "cc" else MIN_INFORMATION
    if best.score_after >= minimum and best.score_after >= score_before:
        return ()
    return (
        f"The b=0 reference agrees poorly with the image it was registered to (score {best.score_after:.3f}, "
        f"{score_before:.3f} in scanner coordinates). Check the images under Coregistration before using the data.",
    )


def _dilate(mask: Volume) -> Volume:
    """The mask dilated by `MARGIN_MM`; everywhere if it is empty."""
    outside = mask.numpy() < 0.5
    if outside.all():
        return Volume(torch.ones_like(mask.data), mask.grid)
    near = ndimage.distance_transform_edt(outside, sampling=mask.grid.voxel_sizes) <= MARGIN_MM
    return Volume(torch.from_numpy(near.astype(np.float32)), mask.grid)
