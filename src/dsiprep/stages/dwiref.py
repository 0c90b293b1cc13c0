"""The b=0 reference image (dwiref) with the least distortion, and its brain mask."""

from __future__ import annotations

from dsiprep.data.results import Distortion, Motion, Reference
from dsiprep.ops.intensity.brain_mask import brain_mask_b0

__all__ = ["reference_image"]


def reference_image(motion: Motion, distortion: Distortion | None) -> Reference:
    """The undistorted b=0 reference, or that of motion correction if distortion is not corrected.

    Parameters
    ----------
    motion : Motion
        Of the first blip.
    distortion : Distortion or None

    Returns
    -------
    Reference
    """
    if distortion is None:
        return Reference(motion.dwiref, motion.mask)
    return Reference(distortion.dwiref, brain_mask_b0(distortion.dwiref))
