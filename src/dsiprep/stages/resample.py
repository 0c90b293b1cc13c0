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
from dsiprep.errors import InputError, SettingsError
from dsiprep.ops.image.affine import rotate_bvecs
from dsiprep.ops.image.epi_resampling import sample_displacement, warp_volume
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.intensity.bias_field import n4_bias
from dsiprep.ops.intensity.brain_mask import brain_mask_dwiref
from dsiprep.ops.qspace.matching_gradients import combine, merged_gradients, same_gradients
from dsiprep.settings import ResampleSettings

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
    "concat": "Corrected series of the session were brought to the same mean b=0 intensity and joined.",
    "average": (
        "Corrected volumes of the same b-value and b-vector under different phase encodings were averaged, and so were "
        "their b-vectors."
    ),
    "least-squares": (
        "Corrected volumes of the same b-value and b-vector under different phase encodings were made one: the "
        "intensity that best explains, by least squares, the voxels of either image that saw a point, which means "
        "weights of one over the Jacobian determinant."
    ),
}

MARGIN_MM = 10.0  # around the brain, on each side
DILATION_MM = 6.0  # how far the brain of the DWI may reach out of the structural brain
SHRINK = 3
LEAST_JACOBIAN = 0.1  # where an image is squeezed further, its weight grows no more

log = logging.getLogger("dsiprep")


@dataclass(frozen=True, eq=False)
class _BlipTransforms:
    """Where the volumes of one blip are read."""

    motion: Motion
    volumes: np.ndarray
    brain: np.ndarray  # (m, 3), points of the brain in ACPC
    matrices: np.ndarray  # (n, 4, 4), points of ACPC to points of each volume, but for the distortion
    linear: np.ndarray  # (n, 3, 3), from the undistorted dwiref to each volume
    distortion: DisplacementField | None
    pose: np.ndarray  # (4, 4), of the head in this blip


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
        On an LPS+ grid around the brain; b-vectors in the world of ACPC. With `merge` "average" or
        "least-squares", volumes of different blips that were asked for the same gradient are one.

    Raises
    ------
    SettingsError
        If the resolution is not positive, or pairs are to be merged and two blips share no gradient.
    """
    if settings.resolution <= 0:
        raise SettingsError(f"--output-resolution {settings.resolution:g}: give the voxel size of the output in mm")
    to_dwiref = coregistration.dwiref_to_acpc.matrix
    per_blip = [_blip_transforms(dwi, motion, distortion, to_dwiref) for motion in motions]
    grid = _output_grid(np.concatenate([_brain(anatomy.mask), *(blip.brain for blip in per_blip)]), settings.resolution)
    data = torch.zeros(len(dwi), *grid.shape, device=dwi.data.device)
    bvecs, groups = np.array(dwi.bvecs, float), _pairs(dwi, settings)
    weights: dict[int, torch.Tensor] = {}
    for blip in per_blip:
        bvecs[blip.volumes] = rotate_bvecs(dwi.bvecs[blip.volumes], blip.matrices)
        met = None if blip.distortion is None else sample_displacement(blip.distortion, grid, to_dwiref)
        if settings.merge == "least-squares" and met is not None:
            pose = torch.as_tensor(np.linalg.solve(blip.pose[:3, :3], met.direction), device=data.device).float()
            jacobian = 1 + torch.einsum("a,aijk->ijk", pose, met.slope)
            weights[int(dwi.blip[blip.volumes[0]])] = 1 / jacobian.clamp(min=LEAST_JACOBIAN)
        for row, v in enumerate(blip.volumes):
            volume = blip.motion.with_replaced_slices(row, dwi.data[int(v)])
            eddy = None if blip.motion.eddy is None else blip.motion.eddy.take(np.array([row]))
            data[int(v)] = warp_volume(volume, dwi.grid, grid, blip.matrices[row], met, blip.linear[row], eddy)
    series = DWI(data, grid, dwi.bvals, bvecs, dwi.run, dwi.blip, dwi.b0_threshold)
    if groups:
        series = _merged(series, groups, weights if len(weights) > 1 else None, dwi.blip)
    return _finish(series, anatomy, bias, groups)


def _pairs(dwi: DWI, settings: ResampleSettings) -> tuple[tuple[int, ...], ...]:
    """Volumes that become one; empty where nothing is to be merged."""
    if settings.merge not in ("average", "least-squares") or len(set(dwi.blip.tolist())) < 2:
        return ()
    groups = same_gradients(dwi.bvals, dwi.bvecs, dwi.blip, dwi.is_b0)
    if not any(len(group) > 1 and not dwi.is_b0[group[0]] for group in groups):
        raise SettingsError(
            f"--distortion-group-merge {settings.merge}: the two phase encodings share no b-value and b-vector; "
            "use concat or none"
        )
    return tuple(groups)


def _merged(
    series: DWI, groups: tuple[tuple[int, ...], ...], weights: dict[int, torch.Tensor] | None, kind: np.ndarray
) -> DWI:
    bvals, bvecs = merged_gradients(series.bvals, series.bvecs, list(groups))
    data, first = combine(series.data, list(groups), weights, kind), [group[0] for group in groups]
    return DWI(data, series.grid, bvals, bvecs, series.run[first], series.blip[first], series.b0_threshold)


def join(
    parts: tuple[Preprocessed, ...],
    asked: tuple[DWI, ...],
    anatomy: Anatomy,
    merge: str = "concat",
    harmonize_b0: bool = True,
) -> Preprocessed:
    """Several corrected series of one head in one ACPC space as one series.

    Parameters
    ----------
    parts : tuple of Preprocessed
        Of one resolution; their grids may reach to different ends of the head.
    asked : tuple of DWI
        The series that each came from: its b-vectors are those asked of the scanner, in world RAS+.
    anatomy : Anatomy
    merge : str
        "concat", or "average" or "least-squares" to average volumes of different parts with the same gradient.
    harmonize_b0 : bool
        Scale parts so that their mean b=0 in the brain is the same.

    Returns
    -------
    Preprocessed
        On a grid that holds all of them; nothing is interpolated. `sources` counts the volumes of all `asked`.

    Raises
    ------
    InputError
        If the grids differ by more than whole voxels.
    """
    grid = _common_grid([part.dwi.grid for part in parts])
    mask = torch.stack([_placed(part.mask.data[None], part.mask.grid, grid)[0] for part in parts]).amin(0) > 0.5
    data = torch.cat([_placed(part.dwi.data, part.dwi.grid, grid) for part in parts])
    counts = [len(part.dwi) for part in parts]
    owner = np.repeat(np.arange(len(parts)), counts)
    bvals, bvecs = (np.concatenate([getattr(part.dwi, name) for part in parts]) for name in ("bvals", "bvecs"))
    starts = np.cumsum([0, *(len(dwi) for dwi in asked)])
    own = [part.sources or tuple((v,) for v in range(len(part.dwi))) for part in parts]
    sources = tuple(tuple(int(v + start) for v in s) for start, rows in zip(starts, own, strict=False) for s in rows)
    series = DWI(data, grid, bvals, bvecs, owner, owner, parts[0].dwi.b0_threshold)
    if harmonize_b0:
        _harmonize(series, owner, mask)
    if merge != "concat":
        firsts = [s[0] for s in sources]
        asked_bvals, asked_bvecs = (np.concatenate([getattr(a, name) for a in asked]) for name in ("bvals", "bvecs"))
        groups = same_gradients(asked_bvals[firsts], asked_bvecs[firsts], owner, series.is_b0)
        sources = tuple(tuple(v for row in group for v in sources[row]) for group in groups)
        series = _merged(series, tuple(groups), None, owner)
    return _finish(series, anatomy, "none", sources)


def _common_grid(grids: list[Grid]) -> Grid:
    """The grid that reaches as far as all of these do; they share their voxel centres."""
    first = grids[0].affine
    corners = np.stack([np.linalg.solve(first[:3, :3], grid.affine[:3, 3] - first[:3, 3]) for grid in grids])
    same = all(np.allclose(grid.affine[:3, :3], first[:3, :3], atol=1e-4) for grid in grids)
    if not same or np.abs(corners - np.round(corners)).max() > 0.01:
        raise InputError("outputs to be joined do not lie on one voxel lattice; use --distortion-group-merge none")
    low = np.round(corners).astype(int)
    least = low.min(0)
    shape = (low + [grid.shape for grid in grids]).max(0) - least
    affine = first.copy()
    affine[:3, 3] += first[:3, :3] @ least
    return Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)


def _placed(data: torch.Tensor, grid: Grid, target: Grid) -> torch.Tensor:
    """Volumes (n, i, j, k) on the larger grid of the same lattice, zero beyond their own."""
    if grid.shape == target.shape:
        return data
    start = np.round(np.linalg.solve(target.affine, grid.affine[:, 3])[:3]).astype(int)
    out = torch.zeros(len(data), *target.shape, dtype=data.dtype)
    i, j, k = (slice(int(s), int(s) + n) for s, n in zip(start, grid.shape, strict=True))
    out[:, i, j, k] = data
    return out


def _harmonize(series: DWI, owner: np.ndarray, mask: torch.Tensor) -> None:
    """Scale parts in place to one mean b=0; a part without b=0 stays."""
    means = np.full(int(owner.max()) + 1, np.nan)
    for part in range(len(means)):
        chosen = np.flatnonzero((owner == part) & series.is_b0)
        if len(chosen):
            means[part] = float(torch.stack([series.data[int(v)][mask].mean() for v in chosen]).mean())
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
    brain = _brain(motion.mask) @ back[:3, :3].T + back[:3, 3]
    return _BlipTransforms(motion, motion.volumes, brain, to_volumes @ to_dwiref, to_volumes[:, :3, :3], field, pose)


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


def _finish(series: DWI, anatomy: Anatomy, bias: str, sources: tuple[tuple[int, ...], ...] = ()) -> Preprocessed:
    """The mean b=0, its brain, and the series without receive bias (divided in place)."""
    lowest = series.is_b0 if series.is_b0.any() else series.bvals == series.bvals.min()
    index = torch.as_tensor(np.flatnonzero(lowest), device=series.data.device)
    reference = Volume(series.data[index].mean(0), series.grid)
    mask = _mask(reference, anatomy)
    if bias == "n4":
        field = n4_bias(reference, mask, SHRINK)
        series.data.div_(field.data)
        reference = Volume(reference.data / field.data, series.grid)
    return Preprocessed(series, reference, mask, "cubic B-spline, once, with Jacobian modulation", sources)


def _mask(reference: Volume, anatomy: Anatomy) -> Volume:
    """The brain of the mean b=0, but no further out of the structural brain than `DILATION_MM`."""
    mask = brain_mask_dwiref(reference)
    if anatomy.modality == "none":
        return mask
    structural = (
        resample_onto(anatomy.mask.data[None].float(), anatomy.mask.grid, reference.grid)[0].cpu().numpy() > 0.5
    )
    near = ndimage.distance_transform_edt(~structural, sampling=reference.grid.voxel_sizes) <= DILATION_MM
    both = (mask.numpy() > 0.5) & near
    if both.sum() < 0.5 * structural.sum():
        log.warning("the brain found in the DWI is not where the structural brain is: the latter is taken as mask")
        both = structural & (reference.numpy() > 0)
    return Volume(torch.from_numpy(both.astype(np.float32)).to(reference.data.device), reference.grid)
