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

VERSION = 1
METHODS = {
    "mi": (
        "The undistorted b=0 reference was registered to the structural image with a rigid (or, where asked "
        "for, an affine) transform that maximises normalised mutual information [@studholme1999; "
        "@mattes2003] in the brain and 6 mm around it, from 8 to 2 mm resolution. The search started from the "
        "scanner's coordinates and from aligned centres of mass, each in 27 orientations, and took the best."
    ),
    "none": (
        "No structural image was used: the b=0 reference was itself brought to ACPC space, and that rigid "
        "transform serves as the coregistration."
    ),
}

MARGIN_MM = 6.0  # the edge of the brain tells more than its inside, where b=0 and T1w are both grey

__all__ = ["METHODS", "VERSION", "coregister"]


def coregister(dwiref: Volume, dwiref_mask: Volume, anatomy: Anatomy, settings: CoregisterSettings) -> Coregistration:
    """Align the undistorted b=0 reference with the structural image in ACPC space.

    Parameters
    ----------
    dwiref : Volume
        Undistorted, in scanner coordinates (world RAS+ mm).
    dwiref_mask : Volume
        Brain in it, 0 or 1.
    anatomy : Anatomy
        `image` and `mask` are in ACPC space. Where `modality` is "none" the image is the dwiref itself.
    settings : CoregisterSettings

    Returns
    -------
    Coregistration
        `dwiref_to_acpc` maps points of ACPC to points of the dwiref. The scores are normalised mutual
        information, 1 (the images tell nothing of each other) to 2.
    """
    start = np.asarray(anatomy.anat_to_acpc.matrix, float)
    if anatomy.modality == "none":
        return Coregistration(Affine(start, "dwiref", "ACPC"), 1.0, 1.0, "none")
    fit = register_linear(
        dwiref,
        anatomy.image,
        dof=settings.dof,
        metric="mi",
        fixed_mask=_with_margin(anatomy.mask),
        moving_mask=dwiref_mask,
        initial=start,
        search=True,
    )
    return Coregistration(Affine(fit.matrix, "dwiref", "ACPC"), fit.score_before, fit.score_after, fit.metric)


def _with_margin(mask: Volume) -> Volume:
    """The mask and `MARGIN_MM` around it."""
    outside = mask.numpy() < 0.5
    if outside.all():
        return Volume(torch.ones_like(mask.data), mask.grid)
    near = ndimage.distance_transform_edt(outside, sampling=mask.grid.voxel_sizes) <= MARGIN_MM
    return Volume(torch.from_numpy(near.astype(np.float32)), mask.grid)
