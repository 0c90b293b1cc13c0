"""Resampling with all transforms composed: each raw volume is interpolated once onto the output grid in ACPC space."""

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
from dsiprep.errors import InputError, SettingsError
from dsiprep.ops.image.epi_resampling import SampledDisplacement, field_of_view, sample_displacement, warp_volume
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.bias_field import n4_bias
from dsiprep.ops.intensity.brain_mask import brain_mask_dwiref
from dsiprep.ops.motion.slice_samples import volume_in_mean_pose
from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.ops.qspace.matching_gradients import combine, merged_gradients, same_gradients
from dsiprep.settings import ResampleSettings

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
    """

    motion: Motion
    volumes: np.ndarray
    brain: np.ndarray
    matrices: np.ndarray
    linear: np.ndarray
    distortion: DisplacementField | None
    pose: np.ndarray


def resample(
    dwi: DWI,
    motions: tuple[Motion, ...],
    distortion: Distortion | None,
    coregistration: Coregistration,
    anatomy: Anatomy,
    settings: ResampleSettings,
    bias: str = "n4",
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
    per_blip = [_blip_transforms(dwi, motion, distortion, to_dwiref) for motion in motions]
    brain = np.concatenate([_mask_points(anatomy.mask), *(blip.brain for blip in per_blip)])
    grid = _output_grid(brain, settings.resolution)
    data = torch.zeros(len(dwi), *grid.shape, device=dwi.data.device)
    bvecs, groups = np.array(dwi.bvecs, float), _groups_to_merge(dwi, settings)
    weights: dict[int, torch.Tensor] = {}
    covered, b0_covered = torch.zeros(grid.shape), torch.zeros(grid.shape, dtype=torch.bool)
    for blip in per_blip:
        bvecs[blip.volumes] = rotate_bvecs(dwi.bvecs[blip.volumes], blip.matrices)
        sampled = None if blip.distortion is None else sample_displacement(blip.distortion, grid, to_dwiref)
        if settings.merge == "least-squares" and sampled is not None:
            weights[int(dwi.blip[blip.volumes[0]])] = _inverse_jacobian(blip, sampled, data.device)
        for row, v in enumerate(blip.volumes):
            volume = _acquired_volume(dwi, blip, row)
            eddy = None if blip.motion.eddy is None else blip.motion.eddy.take(np.array([row]))
            to_volume, linear = blip.matrices[row], blip.linear[row]
            warped = warp_volume(volume, dwi.grid, grid, to_volume, sampled, linear, eddy, dwi.signed)
            density = blip.motion.density(row)
            data[int(v)] = warped if density == 1 else warped * density
            reached = field_of_view(dwi.grid, grid, blip.matrices[row], sampled, eddy).cpu()
            covered += reached
            b0_covered |= reached & bool(dwi.is_b0[int(v)])
    series = DWI(data, grid, dwi.bvals, bvecs, dwi.run, dwi.blip, dwi.b0_threshold, dwi.signed)
    if groups:
        series = _merge(series, groups, weights if len(weights) > 1 else None, dwi.blip)
    coverage = Volume(covered / len(dwi), grid)
    return _finish(series, anatomy, bias, coverage, _enough(coverage, b0_covered), groups)


def _acquired_volume(dwi: DWI, blip: _BlipTransforms, row: int) -> torch.Tensor:
    """A volume in one pose, (i, j, k), with outlier slices replaced if that is wanted."""
    motion = blip.motion
    if motion.slices is not None and motion.slices.moving[row]:
        return volume_in_mean_pose(dwi, motion, row, blip.pose, blip.distortion)
    return motion.with_replaced_slices(row, dwi.data[int(motion.volumes[row])])


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


def _merge(
    series: DWI, groups: tuple[tuple[int, ...], ...], weights: dict[int, torch.Tensor] | None, owner: np.ndarray
) -> DWI:
    """One volume per group; `owner` is the blip or part of each volume, the key of its weights."""
    bvals, bvecs = merged_gradients(series.bvals, series.bvecs, list(groups))
    data, first = combine(series.data, list(groups), weights, owner), [group[0] for group in groups]
    run, blip = series.run[first], series.blip[first]
    return DWI(data, series.grid, bvals, bvecs, run, blip, series.b0_threshold, series.signed)


def join(
    parts: tuple[Preprocessed, ...],
    nominal: tuple[DWI, ...],
    anatomy: Anatomy,
    merge: str = "concat",
    harmonize_b0: bool = True,
) -> Preprocessed:
    """Join several corrected series of one subject in the same ACPC space into one series.

    Parameters
    ----------
    parts : tuple of Preprocessed
        At the same resolution; their grids may cover different parts of the head.
    nominal : tuple of DWI
        The series each part was computed from, with the nominal b-vectors in world RAS+.
    anatomy : Anatomy
    merge : str
        "concat", or "average" or "least-squares" to average volumes of different parts with the same gradient.
    harmonize_b0 : bool
        Scale the parts to the same mean b=0 in the brain.

    Returns
    -------
    Preprocessed
        On a grid that covers all of them, without interpolation. `sources` indexes the volumes of all `nominal` series.

    Raises
    ------
    InputError
        If the grids are not offset by whole voxels.
    """
    grid = _common_grid([part.dwi.grid for part in parts])
    mask = torch.stack([_embed(part.mask.data[None], part.mask.grid, grid)[0] for part in parts]).amin(0) > 0.5
    data = torch.cat([_embed(part.dwi.data, part.dwi.grid, grid) for part in parts])
    counts = [len(part.dwi) for part in parts]
    owner = np.repeat(np.arange(len(parts)), counts)
    bvals, bvecs = (np.concatenate([getattr(part.dwi, name) for part in parts]) for name in ("bvals", "bvecs"))
    starts = np.cumsum([0, *(len(dwi) for dwi in nominal)])
    part_sources = [part.sources or tuple((v,) for v in range(len(part.dwi))) for part in parts]
    sources = tuple(
        tuple(int(v + start) for v in s) for start, rows in zip(starts, part_sources, strict=False) for s in rows
    )
    signed = any(part.dwi.signed for part in parts)
    series = DWI(data, grid, bvals, bvecs, owner, owner, parts[0].dwi.b0_threshold, signed)
    if harmonize_b0:
        _harmonise_b0(series, owner, mask)
    if merge != "concat":
        firsts = [s[0] for s in sources]
        nominal_bvals, nominal_bvecs = (
            np.concatenate([getattr(dwi, name) for dwi in nominal]) for name in ("bvals", "bvecs")
        )
        groups = same_gradients(nominal_bvals[firsts], nominal_bvecs[firsts], owner, series.is_b0)
        sources = tuple(tuple(v for row in group for v in sources[row]) for group in groups)
        series = _merge(series, tuple(groups), None, owner)
    return _finish(series, anatomy, "none", *_joined_coverage(parts, counts, grid), sources)


def _joined_coverage(
    parts: tuple[Preprocessed, ...], counts: list[int], grid: Grid
) -> tuple[Volume | None, torch.Tensor | None]:
    """Coverage of all volumes together, and where every part has enough data; None if it is unknown for a part."""
    maps = [_embed(part.coverage.data[None], part.dwi.grid, grid)[0] for part in parts if part.coverage]
    if len(maps) < len(parts):
        return None, None
    total = sum((each * count for each, count in zip(maps, counts, strict=True)), torch.zeros(grid.shape))
    return Volume(total / sum(counts), grid), torch.stack(maps).amin(0) >= LEAST_COVERED


def _common_grid(grids: list[Grid]) -> Grid:
    """The smallest grid that covers all of these, which must share one voxel lattice."""
    first = grids[0].affine
    corners = np.stack([np.linalg.solve(first[:3, :3], grid.affine[:3, 3] - first[:3, 3]) for grid in grids])
    same = all(np.allclose(grid.affine[:3, :3], first[:3, :3], atol=1e-4) for grid in grids)
    if not same or np.abs(corners - np.round(corners)).max() > 0.01:
        raise InputError(
            "the outputs cannot be joined because they are not on one voxel lattice; use --distortion-group-merge none"
        )
    low = np.round(corners).astype(int)
    lowest = low.min(0)
    shape = (low + [grid.shape for grid in grids]).max(0) - lowest
    affine = first.copy()
    affine[:3, 3] += first[:3, :3] @ lowest
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _embed(data: torch.Tensor, grid: Grid, target: Grid) -> torch.Tensor:
    """Volumes (n, i, j, k) on a larger grid of the same lattice, zero outside their own grid."""
    if grid.shape == target.shape:
        return data
    start = np.round(np.linalg.solve(target.affine, grid.affine[:, 3])[:3]).astype(int)
    out = torch.zeros(len(data), *target.shape, dtype=data.dtype)
    i, j, k = (slice(int(s), int(s) + n) for s, n in zip(start, grid.shape, strict=True))
    out[:, i, j, k] = data
    return out


def _harmonise_b0(series: DWI, owner: np.ndarray, mask: torch.Tensor) -> None:
    """Scale the parts in place to the same mean b=0; parts without b=0 volumes are unchanged."""
    means = np.full(int(owner.max()) + 1, np.nan)
    for part in range(len(means)):
        b0 = np.flatnonzero((owner == part) & series.is_b0)
        if len(b0):
            means[part] = float(torch.stack([series.data[int(v)][mask].mean() for v in b0]).mean())
    means[~(means > 0)] = np.nan
    factors = np.where(np.isfinite(means), np.nanmean(means) / means, 1.0)
    for v, part in enumerate(owner):
        series.data[v].mul_(float(factors[part]))


def _blip_transforms(dwi: DWI, motion: Motion, distortion: Distortion | None, to_dwiref: np.ndarray) -> _BlipTransforms:
    pose, field = np.eye(4), None
    if distortion is not None:
        blip = int(dwi.blip[motion.volumes[0]])
        pose, field = distortion.poses[blip], distortion.fields[blip]
        field = DisplacementField(field.data.to(dwi.data.device), field.grid)
    to_volumes = motion.transforms @ pose
    back = np.linalg.inv(pose @ to_dwiref)
    brain = _mask_points(motion.mask) @ back[:3, :3].T + back[:3, 3]
    return _BlipTransforms(motion, motion.volumes, brain, to_volumes @ to_dwiref, to_volumes[:, :3, :3], field, pose)


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


def _finish(
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
