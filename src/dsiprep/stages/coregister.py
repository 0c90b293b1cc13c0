"""The b=0 reference onto the structural image."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Volume
from dsiprep.data.results import Anatomy, Coregistration
from dsiprep.data.transform import Affine
from dsiprep.ops.linear import register_linear
from dsiprep.settings import CoregisterSettings

VERSION = 2
METHODS = {
    "mi": (
        "The undistorted b=0 reference was registered to the structural image with a rigid (or, where asked "
        "for, an affine) transform that maximises normalised mutual information [@studholme1999; "
        "@mattes2003] in the brain and 6 mm around it, from 8 to 2 mm resolution. The search started from the "
        "scanner's coordinates and from aligned centres of mass, each in 27 orientations, and took the best."
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

MARGIN_MM = 6.0  # the edge of the brain tells more than its inside, where b=0 and T1w are both grey

__all__ = ["METHODS", "VERSION", "coregister"]


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
    alike = anatomy.modality == "none"
    fit = register_linear(
        dwiref,
        anatomy.image,
        dof=6 if alike else settings.dof,
        metric="cc" if alike else "mi",
        fixed_mask=_with_margin(anatomy.mask),
        moving_mask=dwiref_mask,
        initial=start,
        search=True,
    )
    return Coregistration(Affine(fit.matrix, "dwiref", "ACPC"), fit.score_before, fit.score_after, fit.metric, led_by)


def _with_margin(mask: Volume) -> Volume:
    """The mask and `MARGIN_MM` around it."""
    outside = mask.numpy() < 0.5
    if outside.all():
        return Volume(torch.ones_like(mask.data), mask.grid)
    near = ndimage.distance_transform_edt(outside, sampling=mask.grid.voxel_sizes) <= MARGIN_MM
    return Volume(torch.from_numpy(near.astype(np.float32)), mask.grid)
