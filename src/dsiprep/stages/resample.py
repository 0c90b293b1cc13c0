"""All transforms as one: every volume is read once from its raw grid onto the output grid in ACPC space."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy, Coregistration, Distortion, Motion, Preprocessed
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import SettingsError
from dsiprep.ops.affine import rotate_bvecs
from dsiprep.ops.bias import n4_bias
from dsiprep.ops.mask import brain_mask_dwiref
from dsiprep.ops.sample import pull
from dsiprep.ops.warp import distorted_at, warp_volume
from dsiprep.settings import ResampleSettings

VERSION = 3

METHODS = {
    "resample": (
        "Head motion, eddy currents, distortion, coregistration and the rotation to ACPC were composed, and each "
        "volume was resampled once with cubic B-splines [@unser1999]. Intensities were multiplied by the Jacobian "
        "determinant of the distortion, and b-vectors were rotated with their volumes [@leemans2009]. The brain in the "
        "mean b=0 image was found by the deepbet network [@fisch2024], which was shown the image as it is and with its "
        "brightness remapped to that of a T1w; its surface was moved to the rim of the bright tissue near it."
    ),
    "n4": ("Receive bias was estimated with N4 [@tustison2010] on the mean b=0 image and divided out of all volumes."),
    "none": "Receive bias was not corrected.",
}

MARGIN_MM = 10.0  # around the brain, on each side
DILATION_MM = 6.0  # how far the brain of the DWI may reach out of the structural brain
SHRINK = 3

log = logging.getLogger("dsiprep")


@dataclass(frozen=True, eq=False)
class _Way:
    """Where the volumes of one blip are read."""

    motion: Motion
    volumes: np.ndarray
    brain: np.ndarray  # (m, 3), points of the brain in ACPC
    matrices: np.ndarray  # (n, 4, 4), points of ACPC to points of each volume, but for the distortion
    linear: np.ndarray  # (n, 3, 3), from the undistorted dwiref to each volume
    distortion: DisplacementField | None


def resample(
    dwi: DWI,
    motions: tuple[Motion, ...],
    distortion: Distortion | None,
    coregistration: Coregistration,
    anatomy: Anatomy,
    settings: ResampleSettings,
    bias: str = "n4",
) -> Preprocessed:
    """Bring the series into ACPC space in one interpolation, and find its brain.

    Parameters
    ----------
    dwi : DWI
        Denoised, on the grid of the scanner.
    motions : tuple of Motion
        One per blip that has volumes; together they cover all volumes of `dwi`.
    distortion : Distortion or None
    coregistration : Coregistration
    anatomy : Anatomy
    settings : ResampleSettings
        `resolution` is the isotropic voxel size of the output in mm.
    bias : str
        "n4", or "none" to leave intensities as they are.

    Returns
    -------
    Preprocessed
        On an LPS+ grid around the brain; b-vectors in the world of ACPC.

    Raises
    ------
    SettingsError
        If the resolution is not positive.
    """
    if settings.resolution <= 0:
        raise SettingsError(f"--output-resolution {settings.resolution:g}: give the voxel size of the output in mm")
    to_dwiref = coregistration.dwiref_to_acpc.matrix
    ways = [_way(dwi, motion, distortion, to_dwiref) for motion in motions]
    grid = _output_grid(np.concatenate([_brain(anatomy.mask), *(way.brain for way in ways)]), settings.resolution)
    data = torch.zeros(len(dwi), *grid.shape, device=dwi.data.device)
    bvecs = np.array(dwi.bvecs, float)
    for way in ways:
        bvecs[way.volumes] = rotate_bvecs(dwi.bvecs[way.volumes], way.matrices)
        met = None if way.distortion is None else distorted_at(way.distortion, grid, to_dwiref)
        for row, v in enumerate(way.volumes):
            volume = way.motion.mended(row, dwi.data[int(v)])
            eddy = None if way.motion.eddy is None else way.motion.eddy.take(np.array([row]))
            data[int(v)] = warp_volume(volume, dwi.grid, grid, way.matrices[row], met, way.linear[row], eddy)
    series = DWI(data, grid, dwi.bvals, bvecs, dwi.run, dwi.blip, dwi.b0_threshold)
    return _finish(series, anatomy, bias)


def _way(dwi: DWI, motion: Motion, distortion: Distortion | None, to_dwiref: np.ndarray) -> _Way:
    pose, field = np.eye(4), None
    if distortion is not None:
        blip = int(dwi.blip[motion.volumes[0]])
        pose, field = distortion.poses[blip], distortion.fields[blip]
        field = DisplacementField(field.data.to(dwi.data.device), field.grid)
    to_volumes = motion.transforms @ pose
    back = np.linalg.inv(pose @ to_dwiref)
    brain = _brain(motion.mask) @ back[:3, :3].T + back[:3, 3]
    return _Way(motion, motion.volumes, brain, to_volumes @ to_dwiref, to_volumes[:, :3, :3], field)


def _brain(mask: Volume) -> np.ndarray:
    """World points of the voxels of a mask, (m, 3)."""
    return mask.grid.to_world(np.argwhere(mask.numpy() > 0.5))


def _output_grid(points: np.ndarray, resolution: float) -> Grid:
    """The LPS+ grid around points of ACPC, its voxel centres on multiples of the resolution."""
    first = np.floor((points.min(0) - MARGIN_MM) / resolution)
    last = np.ceil((points.max(0) + MARGIN_MM) / resolution)
    shape = (last - first + 1).astype(int)
    affine = np.diag([-resolution, -resolution, resolution, 1.0])
    affine[:3, 3] = resolution * np.array([last[0], last[1], first[2]])
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _finish(series: DWI, anatomy: Anatomy, bias: str) -> Preprocessed:
    """The mean b=0, its brain, and the series without receive bias (divided in place)."""
    lowest = series.is_b0 if series.is_b0.any() else series.bvals == series.bvals.min()
    index = torch.as_tensor(np.flatnonzero(lowest), device=series.data.device)
    reference = Volume(series.data[index].mean(0), series.grid)
    mask = _mask(reference, anatomy)
    if bias == "n4":
        field = n4_bias(reference, mask, SHRINK)
        series.data.div_(field.data)
        reference = Volume(reference.data / field.data, series.grid)
    return Preprocessed(series, reference, mask, "cubic B-spline, once, with Jacobian modulation")


def _mask(reference: Volume, anatomy: Anatomy) -> Volume:
    """The brain of the mean b=0, but no further out of the structural brain than `DILATION_MM`."""
    mask = brain_mask_dwiref(reference)
    if anatomy.modality == "none":
        return mask
    structural = pull(anatomy.mask.data[None].float(), anatomy.mask.grid, reference.grid)[0].cpu().numpy() > 0.5
    near = ndimage.distance_transform_edt(~structural, sampling=reference.grid.voxel_sizes) <= DILATION_MM
    both = (mask.numpy() > 0.5) & near
    if both.sum() < 0.5 * structural.sum():
        log.warning("the brain found in the DWI is not where the structural brain is: the latter is taken as mask")
        both = structural & (reference.numpy() > 0)
    return Volume(torch.from_numpy(both.astype(np.float32)).to(reference.data.device), reference.grid)
