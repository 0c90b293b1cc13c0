"""The b=0 reference onto the structural image."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Volume
from dsiprep.data.results import Anatomy, Coregistration
from dsiprep.data.transform import Affine
from dsiprep.ops.registration.head_size import enlarge_matrix, enlarge_volume
from dsiprep.ops.registration.linear import LinearFit, register_linear
from dsiprep.settings import CoregisterSettings

METHODS = {
    "mi": (
        "The undistorted b=0 reference was registered to the structural image with a rigid (or, where asked "
        "for, an affine) transform that maximises normalised mutual information [@studholme1999; "
        "@mattes2003] in the brain and 6 mm around it, from 8 to 2 mm resolution. The search started from the "
        "scanner's coordinates and from aligned centres of mass, each in 27 orientations, and from where the two brain "
        "masks overlap best; the best of all was taken."
    ),
    "cc": (
        "Without a structural image, the b=0 reference of one series of the person was brought to ACPC space. Those "
        "of the other series were registered to it with a rigid transform that maximises their correlation in the "
        "brain and 6 mm around it, with the same resolutions and the same search."
    ),
    "none": (
        "No structural image was used: the b=0 reference was itself brought to ACPC space, and that rigid "
        "transform serves as the coregistration."
    ),
}

LEAST_CORRELATION, LEAST_INFORMATION = 0.6, 1.01  # below, something is wrong: real heads gave 0.88 and 1.03
MARGIN_MM = 6.0  # the edge of the brain tells more than its inside, where b=0 and T1w are both grey

__all__ = ["METHODS", "coregister"]


def coregister(
    dwiref: Volume, dwiref_mask: Volume, anatomy: Anatomy, settings: CoregisterSettings, led_by: str = ""
) -> Coregistration:
    """Align the undistorted b=0 reference with the structural image in ACPC space, or with another b=0 reference.

    Parameters
    ----------
    dwiref : Volume
        Undistorted, in scanner coordinates (world RAS+ mm).
    dwiref_mask : Volume
        Brain in it, 0 or 1.
    anatomy : Anatomy
        `image` and `mask` are in ACPC space. Where `modality` is "none" the image is a b=0 reference.
    settings : CoregisterSettings
    led_by : str
        Name of the series whose b=0 reference `anatomy.image` is; empty where it is `dwiref` itself, or a
        structural image.

    Returns
    -------
    Coregistration
        `dwiref_to_acpc` maps points of ACPC to points of the dwiref. The scores are normalised mutual
        information, 1 (the images tell nothing of each other) to 2, or, between b=0 references, correlation.
    """
    start = np.asarray(anatomy.anat_to_acpc.matrix, float)
    if anatomy.modality == "none" and not led_by:
        return Coregistration(Affine(start, "dwiref", "ACPC"), float("nan"), float("nan"), "none")
    alike, by = anatomy.modality == "none", anatomy.enlarged
    dwiref, dwiref_mask, image, mask = (
        enlarge_volume(volume, by) for volume in (dwiref, dwiref_mask, anatomy.image, anatomy.mask)
    )
    near, start = _with_margin(mask), enlarge_matrix(start, by)
    align = partial(
        register_linear,
        dwiref,
        image,
        dof=6 if alike else settings.dof,
        metric="cc" if alike else "mi",
        fixed_mask=near,
        moving_mask=dwiref_mask,
    )
    fit = align(initial=start, search=True)
    # where part of the brain was not scanned, coarse images can mislead; the shapes of the two brains do not
    shapes = register_linear(dwiref_mask, mask, dof=6, metric="cc", fixed_mask=near, initial=start)
    by_shape = align(initial=shapes.matrix, search=False)
    before, best = fit.score_before, max((fit, by_shape), key=lambda found: found.score_after)
    way = Affine(enlarge_matrix(best.matrix, 1 / by), "dwiref", "ACPC")
    return Coregistration(way, before, best.score_after, best.metric, led_by, _doubts(before, best))


def _doubts(before: float, best: LinearFit) -> tuple[str, ...]:
    """A note where the images hardly agree, or the search found nothing better than the header."""
    least = LEAST_CORRELATION if best.metric == "cc" else LEAST_INFORMATION
    if best.score_after >= least and best.score_after >= before:
        return ()
    return (
        f"The b=0 reference agrees badly with what it was registered to ({best.score_after:.3f}, {before:.3f} as the "
        "scanner's coordinates had it). Look at the pictures under Coregistration before you use the data.",
    )


def _with_margin(mask: Volume) -> Volume:
    """The mask and `MARGIN_MM` around it."""
    outside = mask.numpy() < 0.5
    if outside.all():
        return Volume(torch.ones_like(mask.data), mask.grid)
    near = ndimage.distance_transform_edt(outside, sampling=mask.grid.voxel_sizes) <= MARGIN_MM
    return Volume(torch.from_numpy(near.astype(np.float32)), mask.grid)
