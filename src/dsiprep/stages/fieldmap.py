"""Correction of susceptibility distortion with a gradient-echo fieldmap, aligned with the head in the DWI."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawFieldmap
from dsiprep.data.results import Blip, Distortion
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import point_displacement
from dsiprep.ops.image.epi_resampling import sample_displacement, warp_volume
from dsiprep.ops.intensity.brain_mask import brain_mask_b0
from dsiprep.ops.pepolar.gre_fieldmap import smooth_field, unwrapped_hz, without_folds
from dsiprep.ops.registration.linear import register_linear

METHODS = {
    "gre": (
        "Susceptibility distortion was corrected with a gradient-echo fieldmap. Its phase was unwrapped "
        "[@herraez2002], and the field was despiked, smoothed with weights from the magnitude image and extrapolated "
        "beyond the brain. The field was aligned by a rigid registration of the magnitude image to the corrected b=0 "
        "reference where that clearly increased mutual information [@mattes2003], and by scanner coordinates "
        "otherwise. It was multiplied by the readout time to give displacements along the phase-encoding axis "
        "[@jezzard1995]."
    ),
}
"""Herráez 2002: doi 10.1364/AO.41.007437. Mattes 2003: doi 10.1109/TMI.2003.809072. Jezzard and Balaban 1995: doi
10.1002/mrm.1910340111."""

MAX_ROUNDS = 2
LEAST_AGREEMENT = 0.98  # of the mutual information without correction; wrong axes and signs give 0.84 to 0.97 of it
MIN_SCORE_RATIO = 1.15  # of mutual information over independence; a smaller increase is no evidence of motion of 2 mm

__all__ = ["METHODS", "apply_shift", "correct_with_fieldmap"]


def correct_with_fieldmap(blip: Blip, b0: torch.Tensor, grid: Grid, mask: Volume, fieldmap: RawFieldmap) -> Distortion:
    """Displacement field of one phase encoding from a measured field.

    Parameters
    ----------
    blip : Blip
        With a direction and a readout time.
    b0 : Tensor, (m, i, j, k)
        Its aligned b=0 volumes on `grid`.
    grid : Grid
    mask : Volume
        Brain in them, 0 or 1.
    fieldmap : RawFieldmap
        On its own grid; the head may be in a slightly different pose.

    Returns
    -------
    Distortion
        One blip; `poses[0]` is the identity. Displacements that would fold the image are smoothed until none does.
        `doubt` is set if the image agrees less with the magnitude image than without correction.

    Raises
    ------
    InputError
        If the readout time is unknown, or the fieldmap does not cover the brain.

    References
    ----------
    Jezzard and Balaban 1995, doi 10.1002/mrm.1910340111.
    """
    pe = _require_readout(blip.pe)
    image = b0.float().cpu().mean(0)
    brain = brain_mask_b0(fieldmap.magnitude)
    hertz = fieldmap.field
    if fieldmap.echo_difference is not None:
        hertz = unwrapped_hz(hertz, brain, fieldmap.echo_difference)
    smooth = smooth_field(hertz, fieldmap.magnitude, brain)
    matrix, trace = np.eye(4), []
    for number in range(MAX_ROUNDS):
        corrected = apply_shift(image, _shift(smooth, grid, matrix, pe), grid, pe)
        fit = register_linear(
            fieldmap.magnitude, corrected.dwiref, fixed_mask=mask, moving_mask=brain, initial=matrix, search=False
        )
        accepted = fit.score_after - 1 > MIN_SCORE_RATIO * (fit.score_before - 1)
        row = {"level": 0, "iteration": number, "cost": -fit.score_after, "step": float(accepted)}
        trace.append({**row, "change_mm": _largest_displacement(fit.matrix, matrix, mask)})
        if not accepted:
            break
        matrix = fit.matrix
    if not _covers_brain(smooth.grid, matrix, mask):
        raise InputError(f"{fieldmap.name}: it covers less than half of the brain; run with --ignore fieldmaps")
    result = apply_shift(image, _shift(smooth, grid, matrix, pe), grid, pe, trace, "gre", fieldmap.notes)

    def agreement(corrected: Volume) -> float:
        fit = register_linear(
            fieldmap.magnitude, corrected, fixed_mask=mask, moving_mask=brain, initial=matrix, search=False
        )
        return fit.score_after - 1

    before, after = agreement(result.before[0]), agreement(result.after[0])
    if after >= LEAST_AGREEMENT * before:
        return result
    opposite = replace(pe, polarity=-pe.polarity)
    reversed_sign = agreement(apply_shift(image, _shift(smooth, grid, matrix, opposite), grid, opposite).dwiref)
    return replace(result, doubt=_doubt(fieldmap.name, pe, before, after, reversed_sign))


def _doubt(name: str, pe: PhaseEncoding, before: float, after: float, reversed_sign: float) -> str:
    remedy = "the opposite sign makes it agree better" if reversed_sign > before else "another axis may be right"
    return (
        f"Distortion is NOT corrected: displacements by {name} along {pe.direction} make the b=0 image agree less with "
        f"the magnitude image than it did (mutual information {after:.3f} instead of {before:.3f}), so "
        f"PhaseEncodingDirection is probably wrong: {remedy}. Correct the sidecar, or use --sdc-method drbuddi to "
        "correct with the fieldmap nevertheless."
    )


def apply_shift(
    image: torch.Tensor,
    shift: np.ndarray,
    grid: Grid,
    pe: PhaseEncoding,
    trace: list[dict[str, float]] | None = None,
    method: str = "",
    notes: tuple[str, ...] = (),
) -> Distortion:
    """Resample an image through a displacement along the phase-encoding axis, and return both as a `Distortion`.

    Parameters
    ----------
    image : Tensor, (i, j, k)
    shift : ndarray, (i, j, k)
        Voxels towards higher indices along the phase-encoding axis, for this blip.
    grid : Grid
        Of both.
    pe : PhaseEncoding
    trace, method, notes
        As in `Distortion`.
    """
    step = torch.as_tensor(pe.vector(grid), dtype=torch.float32)
    voxels = torch.from_numpy(np.ascontiguousarray(shift, np.float32))
    field = DisplacementField(voxels * step[:, None, None, None], grid)
    displacement = sample_displacement(field, grid, np.eye(4)) if bool(voxels.any()) else None
    after = Volume(warp_volume(image.contiguous(), grid, grid, np.eye(4), displacement), grid)
    hertz = None if pe.readout_time is None else Volume(voxels / (pe.readout_time * pe.polarity), grid)
    before = Volume(image, grid)
    return Distortion(np.eye(4)[None], (field,), hertz, after, (before,), (after,), trace or [], method, notes)


def _require_readout(pe: PhaseEncoding | None) -> PhaseEncoding:
    if pe is None or pe.readout_time is None:
        raise InputError(
            "a GRE fieldmap needs PhaseEncodingDirection and TotalReadoutTime of the DWI; add them to its sidecar, or "
            "run with --ignore fieldmaps"
        )
    return pe


def _shift(smooth: Volume, grid: Grid, matrix: np.ndarray, pe: PhaseEncoding) -> np.ndarray:
    """Displacement in voxels along the phase-encoding axis, with the field's edge values repeated beyond its grid."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid.shape), indexing="ij"), -1)
    points = grid.to_world(index) @ matrix[:3, :3].T + matrix[:3, 3]
    voxels = np.moveaxis(smooth.grid.to_voxels(points), -1, 0)
    hertz = ndimage.map_coordinates(smooth.numpy(), voxels, order=1, mode="nearest")
    return without_folds(hertz * (float(pe.readout_time or 0) * pe.polarity), pe.axis)


def _covers_brain(source: Grid, matrix: np.ndarray, mask: Volume) -> bool:
    """Whether at least half of the brain is within the fieldmap's grid."""
    points = mask.grid.to_world(np.argwhere(mask.numpy() > 0.5)) @ matrix[:3, :3].T + matrix[:3, 3]
    return bool(source.contains(points).mean() >= 0.5)


def _largest_displacement(first: np.ndarray, second: np.ndarray, mask: Volume) -> float:
    """Largest distance in mm between the positions that two matrices give a sample of the brain's points."""
    points = mask.grid.to_world(np.argwhere(mask.numpy() > 0.5)[::97])
    return float(point_displacement(first[None], second[None], points).max())
