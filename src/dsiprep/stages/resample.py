"""Resampling with all transforms composed: each raw volume is interpolated once onto the output grid in ACPC space."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.dwi import DWI
from dsiprep.data.gradient_coil import GradientNonlinearity
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.results import Anatomy, Coregistration, Distortion, Motion, MovingField, Preprocessed
from dsiprep.data.transform import DisplacementField
from dsiprep.errors import SettingsError
from dsiprep.ops.image.epi_resampling import SampledDisplacement, add_displacements, sample_displacement, warp_volume
from dsiprep.ops.image.gradient_nonlinearity import remaining_warp
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.image.scanner_warp import NO_WARP, ScannerWarp, scanner_warp
from dsiprep.ops.intensity.bias_field import n4_bias
from dsiprep.ops.intensity.brain_mask import brain_mask_dwiref
from dsiprep.ops.motion.slice_samples import volume_in_mean_pose
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.ops.qspace.matching_gradients import combine, merged_gradients, same_gradients
from dsiprep.settings import ResampleSettings
from dsiprep.stages.gradient_nonlinearity import deviation_on_grid, unwarp

METHODS = {
    "resample": (
        "Head motion, eddy currents, distortion, coregistration and the rotation to ACPC space were composed, and each "
        "volume was resampled once with cubic B-splines [@unser1999]. Intensities were multiplied by the Jacobian "
        "determinant of eddy currents (of the affine, if poses are affine) and distortion, and b-vectors were rotated "
        "with their volumes [@leemans2009]. The brain in the mean b=0 image was extracted with the deepbet network "
        "[@fisch2024], applied to the image as it is and with its intensities remapped to those of a T1w image; the "
        "surface of the mask was then moved to the nearby edge of the bright tissue."
    ),
    "n4": (
        "The receive bias field was estimated with N4 [@tustison2010] on the mean b=0 image, and all volumes were "
        "divided by it."
    ),
    "none": "The receive bias field was not corrected.",
    "concat": "The corrected series of the session were scaled to the same mean b=0 intensity and concatenated.",
    "average": (
        "Corrected volumes with the same b-value and b-vector but different phase encodings were averaged, together "
        "with their b-vectors."
    ),
    "least-squares": (
        "Corrected volumes with the same b-value and b-vector but different phase encodings were combined by least "
        "squares: the intensity that best explains the acquired voxels of all images at each point, equivalent to an "
        "average weighted by the reciprocal of the Jacobian determinant."
    ),
}

MARGIN_MM = 10.0  # around the brain, on each side
DILATION_MM = 6.0  # largest distance of the DWI brain mask from the structural brain
N4_SHRINK = 3
LEAST_COVERED = 0.9  # of the volumes; where fewer have data, and where no b=0 has, there is no brain
MIN_JACOBIAN = 0.1  # limits the weight of strongly compressed voxels in the least-squares combination

log = logging.getLogger("dsiprep")


@dataclass(frozen=True, eq=False)
class _BlipTransforms:
    """Transforms from ACPC space to the volumes of one blip.

    Attributes
    ----------
    motion : Motion
    volumes : ndarray, (n,), int
        Indices in the series.
    brain : ndarray, (m, 3)
        Brain voxels as points of ACPC.
    matrices : ndarray, (n, 4, 4)
        Points of ACPC to points of each volume, without the distortion.
    linear : ndarray, (n, 3, 3)
        Linear part of the transform from the undistorted dwiref to each volume.
    distortion : DisplacementField or None
    pose : ndarray, (4, 4)
        Pose of the head in this blip.
    scanner : ScannerWarp
        Gradient nonlinearity.
    """

    motion: Motion
    volumes: np.ndarray
    brain: np.ndarray
    matrices: np.ndarray
    linear: np.ndarray
    distortion: DisplacementField | None
    pose: np.ndarray
    scanner: ScannerWarp


def resample(
    dwi: DWI,
    motions: tuple[Motion, ...],
    distortion: Distortion | None,
    coregistration: Coregistration,
    anatomy: Anatomy,
    settings: ResampleSettings,
    bias: str = "n4",
    nonlinearity: GradientNonlinearity | None = None,
    moving: MovingField | None = None,
) -> Preprocessed:
    """Resample the series into ACPC space in one interpolation, and compute its brain mask.

    Parameters
    ----------
    dwi : DWI
        Denoised series on the acquired grid.
    motions : tuple of Motion
        One per blip with DWI volumes; together they cover all volumes of `dwi`.
    distortion : Distortion or None
    coregistration : Coregistration
    anatomy : Anatomy
    settings : ResampleSettings
        `resolution`: isotropic voxel size of the output in mm.
    bias : str
        "n4", or "none" to skip the correction.
    nonlinearity : GradientNonlinearity, optional
        Of which `dwi` has the effects and the images of `motions` and `distortion` do not.
    moving : MovingField, optional
        What pitch and roll add to the displacement of each volume; in volumes with motion within, at their mean pose.

    Returns
    -------
    Preprocessed
        On an LPS+ grid around the brain, with b-vectors in ACPC world coordinates. With `merge` "average" or
        "least-squares", volumes of different blips with the same nominal gradient are merged.

    Raises
    ------
    SettingsError
        If the resolution is not positive, or volumes are to be merged and the blips share no gradient.
    """
    if settings.resolution <= 0:
        raise SettingsError(
            f"--output-resolution {settings.resolution:g}: the voxel size of the output in mm must be positive"
        )
    to_dwiref = coregistration.dwiref_to_acpc.matrix
    per_blip = [_blip_transforms(dwi, motion, distortion, to_dwiref, nonlinearity) for motion in motions]
    brain = np.concatenate([_mask_points(anatomy.mask), *(blip.brain for blip in per_blip)])
    grid = _output_grid(brain, settings.resolution)
    data = torch.zeros(len(dwi), *grid.shape, device=dwi.data.device)
    bvecs, groups = np.array(dwi.bvecs, float), _groups_to_merge(dwi, settings)
    weights: dict[int, torch.Tensor] = {}
    covered, b0_covered = torch.zeros(grid.shape), torch.zeros(grid.shape, dtype=torch.bool)
    reached = torch.empty_like(b0_covered)
    for blip in per_blip:
        bvecs[blip.volumes] = rotate_bvecs(dwi.bvecs[blip.volumes], blip.matrices)
        sampled = None if blip.distortion is None else sample_displacement(blip.distortion, grid, to_dwiref)
        number = int(dwi.blip[blip.volumes[0]])
        per_degree = [sample_displacement(f, grid, to_dwiref) for f in moving.displacements(number)] if moving else []
        if settings.merge == "least-squares" and sampled is not None:
            weights[number] = _inverse_jacobian(blip, sampled, data.device)
        for row, v in enumerate(blip.volumes):
            volume, scanner = _volume_to_sample(blip, row, dwi)
            eddy = None if blip.motion.eddy is None else blip.motion.eddy.take(np.array([row]))
            to_volume, linear = blip.matrices[row], blip.linear[row]
            bent = add_displacements(sampled, per_degree, moving.tilts[v]) if moving else sampled
            warped = warp_volume(volume, dwi.grid, grid, to_volume, bent, linear, eddy, dwi.signed, scanner, reached)
            density = blip.motion.density(row)
            data[int(v)] = warped if density == 1 else warped * density
            covered += reached
            b0_covered |= reached & bool(dwi.is_b0[int(v)])
    series = DWI(data, grid, dwi.bvals, bvecs, dwi.run, dwi.blip, dwi.b0_threshold, dwi.signed)
    if groups:
        series = merge_volumes(series, groups, weights if len(weights) > 1 else None, dwi.blip)
    coverage = Volume(covered / len(dwi), grid)
    finished = finish(series, anatomy, bias, coverage, _enough(coverage, b0_covered), groups)
    if nonlinearity is None:
        return finished
    to_volumes = np.concatenate([blip.matrices for blip in per_blip])
    return replace(finished, deviation=deviation_on_grid(nonlinearity.fields, grid, to_volumes))


def _volume_to_sample(blip: _BlipTransforms, row: int, dwi: DWI) -> tuple[torch.Tensor, ScannerWarp]:
    """A volume in one pose, with outlier slices replaced if that is wanted, and the warp that is left in it.

    Slices were replaced, and poses of slices estimated, where gradient nonlinearity had been removed, which takes those
    volumes a second interpolation.
    """
    motion, scanner = blip.motion, blip.scanner
    volume = dwi.data[int(blip.volumes[row])]
    moves = motion.slices is not None and bool(motion.slices.moving[row])
    if scanner is not NO_WARP and (moves or motion.replaces(row)):
        volume, scanner = unwarp(volume[None], dwi.grid, scanner, dwi.signed)[0], NO_WARP
    if moves:
        return volume_in_mean_pose(volume, dwi.grid, motion, row, blip.pose, blip.distortion), scanner
    return motion.with_replaced_slices(row, volume), scanner


def _enough(coverage: Volume, b0_covered: torch.Tensor) -> torch.Tensor:
    """Where nearly all volumes and a b=0 have data, (i, j, k) bool; a series without b=0 needs none."""
    return (coverage.data >= LEAST_COVERED) & (b0_covered if bool(b0_covered.any()) else True)


def _inverse_jacobian(blip: _BlipTransforms, sampled: SampledDisplacement, device: torch.device) -> torch.Tensor:
    """Reciprocal of the Jacobian determinant of a blip's distortion on the output grid, limited by `MIN_JACOBIAN`."""
    direction = np.linalg.solve(blip.pose[:3, :3], sampled.direction)
    jacobian = 1 + torch.einsum("a,aijk->ijk", torch.as_tensor(direction, device=device).float(), sampled.slope)
    return 1 / jacobian.clamp(min=MIN_JACOBIAN)


def _groups_to_merge(dwi: DWI, settings: ResampleSettings) -> tuple[tuple[int, ...], ...]:
    """Groups of volumes that are merged into one each; empty if no merging is requested."""
    if settings.merge not in ("average", "least-squares") or len(set(dwi.blip.tolist())) < 2:
        return ()
    groups = same_gradients(dwi.bvals, dwi.bvecs, dwi.blip, dwi.is_b0)
    if not any(len(group) > 1 and not dwi.is_b0[group[0]] for group in groups):
        raise SettingsError(
            f"--distortion-group-merge {settings.merge}: the phase encodings share no b-value and b-vector; use "
            "concat or none"
        )
    return tuple(groups)


def merge_volumes(
    series: DWI, groups: tuple[tuple[int, ...], ...], weights: dict[int, torch.Tensor] | None, owner: np.ndarray
) -> DWI:
    """One volume per group; `owner` is the blip or part of each volume, the key of its weights."""
    bvals, bvecs = merged_gradients(series.bvals, series.bvecs, list(groups))
    data, first = combine(series.data, list(groups), weights, owner), [group[0] for group in groups]
    run, blip = series.run[first], series.blip[first]
    return DWI(data, series.grid, bvals, bvecs, run, blip, series.b0_threshold, series.signed)


def _blip_transforms(
    dwi: DWI,
    motion: Motion,
    distortion: Distortion | None,
    to_dwiref: np.ndarray,
    nonlinearity: GradientNonlinearity | None,
) -> _BlipTransforms:
    pose, field, scanner = np.eye(4), None, NO_WARP
    if distortion is not None:
        blip = int(dwi.blip[motion.volumes[0]])
        pose, field = distortion.poses[blip], distortion.fields[blip]
        field = DisplacementField(field.data.to(dwi.data.device), field.grid)
    if nonlinearity is not None:
        done, along = nonlinearity.corrections, _phase_axis(motion, field, dwi.grid)
        warp = remaining_warp(nonlinearity.fields, dwi.grid, done.series, done.slice_axis)
        scanner = scanner_warp(warp, dwi.grid, along)
    to_volumes = motion.transforms @ pose
    back = np.linalg.inv(pose @ to_dwiref)
    brain = _mask_points(motion.mask) @ back[:3, :3].T + back[:3, 3]
    return _BlipTransforms(
        motion, motion.volumes, brain, to_volumes @ to_dwiref, to_volumes[:, :3, :3], field, pose, scanner
    )


def _phase_axis(motion: Motion, field: DisplacementField | None, grid: Grid) -> int | None:
    """Voxel axis along which eddy currents and off-resonance displace; None if neither was estimated."""
    if motion.eddy is not None:
        return motion.eddy.along
    if field is None:
        return None
    along = torch.einsum(
        "ab,aijk->bijk", torch.as_tensor(grid.directions, device=field.data.device).float(), field.data
    )
    return int((along**2).sum((1, 2, 3)).argmax())


def _mask_points(mask: Volume) -> np.ndarray:
    """World points of the voxels in a mask, (m, 3)."""
    return mask.grid.to_world(np.argwhere(mask.numpy() > 0.5))


def _output_grid(points: np.ndarray, resolution: float) -> Grid:
    """LPS+ grid around points of ACPC, with voxel centres at multiples of the resolution."""
    first = np.floor((points.min(0) - MARGIN_MM) / resolution)
    last = np.ceil((points.max(0) + MARGIN_MM) / resolution)
    shape = (last - first + 1).astype(int)
    affine = np.diag([-resolution, -resolution, resolution, 1.0])
    affine[:3, 3] = resolution * np.array([last[0], last[1], first[2]])
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def finish(
    series: DWI,
    anatomy: Anatomy,
    bias: str,
    coverage: Volume | None,
    enough: torch.Tensor | None,
    sources: tuple[tuple[int, ...], ...] = (),
) -> Preprocessed:
    """Compute the mean b=0 and its brain mask where there is `enough` data, and correct the bias field in place."""
    lowest = series.is_b0 if series.is_b0.any() else series.bvals == series.bvals.min()
    index = torch.as_tensor(np.flatnonzero(lowest), device=series.data.device)
    reference = Volume(series.data[index].mean(0), series.grid)
    mask = _brain_mask(reference, anatomy)
    if enough is not None:
        mask = Volume(mask.data * enough.to(mask.data.device), mask.grid)
    if bias == "n4":
        field = n4_bias(reference, mask, N4_SHRINK)
        series.data.div_(field.data)
        reference = Volume(reference.data / field.data, series.grid)
    return Preprocessed(series, reference, mask, "cubic B-spline, once, with Jacobian modulation", sources, coverage)


def _brain_mask(reference: Volume, anatomy: Anatomy) -> Volume:
    """Brain mask of the mean b=0, limited to `DILATION_MM` around the structural brain mask."""
    mask = brain_mask_dwiref(reference)
    if anatomy.modality == "none":
        return mask
    structural = (
        resample_onto(anatomy.mask.data[None].float(), anatomy.mask.grid, reference.grid)[0].cpu().numpy() > 0.5
    )
    near = ndimage.distance_transform_edt(~structural, sampling=reference.grid.voxel_sizes) <= DILATION_MM
    combined = (mask.numpy() > 0.5) & near
    if combined.sum() < 0.5 * structural.sum():
        log.warning("the DWI brain mask does not overlap with the structural brain mask, which is used instead")
        combined = structural & (reference.numpy() > 0)
    return Volume(torch.from_numpy(combined.astype(np.float32)).to(reference.data.device), reference.grid)
