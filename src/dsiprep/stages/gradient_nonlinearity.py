"""Gradient nonlinearity: images for the estimation of motion and distortion, and the gradients in each voxel.

The series itself is not touched here: `resample` composes the warp with all other transforms.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.data.gradient_coil import CoilFields, GradientNonlinearity
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.raw import RawFieldmap
from dsiprep.data.results import Acquired, Blip
from dsiprep.ops.image.affine import mean_rigid, nearest_rotation
from dsiprep.ops.image.epi_resampling import warp_volume
from dsiprep.ops.image.gradient_nonlinearity import gradient_deviation, remaining_warp
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.image.scanner_warp import ScannerWarp, scanner_warp

__all__ = [
    "deviation_on_grid",
    "straighten_b0s",
    "straighten_fieldmap",
    "straighten_mask",
    "straighten_series",
    "straighten_structural",
    "unwarp",
]

METHODS = {
    "warp": (
        "The nonlinearity of the gradients was computed from the spherical harmonics of the scanner's coils "
        "[@janke2004]. Motion and distortion were estimated in images from which its displacements {left} had been "
        "removed, and they were composed with all other transforms in the resampling of the series, with their "
        "Jacobian determinant. "
    ),
    "done": "Displacements by gradient nonlinearity had been corrected in three dimensions by the scanner. ",
    "gradients": (
        "The deviation of the diffusion gradients from the prescribed ones in each voxel [@bammer2003] is written in "
        "the layout of the Human Connectome Project [@glasser2013], for the mean position of the head in the "
        "scanner."
    ),
}
LEFT = {"none": "in three dimensions", "2d": "across the slices, which the scanner does not correct,"}
POINTS_AT_ONCE = 200_000
EVERY_MM = 4.0  # spacing at which the deviation is evaluated; linear interpolation is then accurate to 0.0002


def straighten_series(acquired: Acquired, nonlinearity: GradientNonlinearity) -> Acquired:
    """The series, its mask and its EPI references without displacements by gradient nonlinearity, and without phase."""
    done, fields = nonlinearity.corrections, nonlinearity.fields
    warp = _warp_on(fields, acquired.dwi.grid, done.series, done.slice_axis)
    data, mask = unwarp(acquired.dwi.data, acquired.dwi.grid, warp, acquired.dwi.signed), acquired.mask
    blips = tuple(_straighten_blip(blip, acquired.dwi.grid, nonlinearity) for blip in acquired.blips)
    if warp is not None:
        mask = Volume((unwarp(mask.data[None], mask.grid, warp, density=False)[0] > 0.5).float(), mask.grid)
    return replace(acquired, dwi=acquired.dwi.with_data(data), mask=mask, blips=blips, phase=None)


def straighten_b0s(b0s: DWI, nonlinearity: GradientNonlinearity) -> DWI:
    """The same for the b=0 volumes of the series."""
    done = nonlinearity.corrections
    warp = _warp_on(nonlinearity.fields, b0s.grid, done.series, done.slice_axis)
    return b0s.with_data(unwarp(b0s.data, b0s.grid, warp, b0s.signed))


def straighten_structural(images: tuple[Volume, ...], nonlinearity: GradientNonlinearity) -> tuple[Volume, ...]:
    """Structural images without displacements by gradient nonlinearity, resampled once on their own grids."""
    done = nonlinearity.corrections.structural
    return tuple(_straighten(image, nonlinearity.fields, kind) for image, kind in zip(images, done, strict=True))


def straighten_mask(mask: Volume | None, nonlinearity: GradientNonlinearity) -> Volume | None:
    """A brain mask (0 or 1) that was drawn on the first structural image, straightened as that image is, or None."""
    if mask is None:
        return None
    straight = _straighten(mask, nonlinearity.fields, nonlinearity.corrections.structural[0], density=False)
    return Volume((straight.data > 0.5).float(), mask.grid)


def straighten_fieldmap(fieldmap: RawFieldmap, nonlinearity: GradientNonlinearity) -> RawFieldmap:
    """A gradient-echo fieldmap without displacements by gradient nonlinearity.

    A wrapped phase difference is resampled as a complex number of unit magnitude.
    """
    fields, done = nonlinearity.fields, nonlinearity.corrections.fieldmap
    magnitude = _straighten(fieldmap.magnitude, fields, done)
    if fieldmap.echo_difference is None:
        field = _straighten(fieldmap.field, fields, done, density=False, signed=True)
    else:
        parts = (Volume(part(fieldmap.field.data), fieldmap.field.grid) for part in (torch.sin, torch.cos))
        sine, cosine = (_straighten(part, fields, done, density=False, signed=True).data for part in parts)
        field = Volume(torch.atan2(sine, cosine), fieldmap.field.grid)
    return replace(fieldmap, field=field, magnitude=magnitude)


def deviation_on_grid(fields: CoilFields, grid: Grid, to_volumes: np.ndarray) -> torch.Tensor:
    """Mean over volumes of the gradient deviation L that the head experiences.

    In volume v a point x of the grid lies at M_v x in the scanner, and with R_v the rotation of M_v its tissue
    experiences (I + R_v' L(M_v x) R_v) g where a gradient g, turned into the head, is prescribed. The mean over volumes
    is replaced by the value at their mean position; single volumes differ from it in proportion to the motion.

    Parameters
    ----------
    fields : GradientCoil or DisplacementField
    grid : Grid
    to_volumes : ndarray, (n, 4, 4)
        M_v, points of the grid's world to points of the scanner.

    Returns
    -------
    Tensor, (9, i, j, k), float32
        L in world RAS+ axes of the grid, row by row: xx, xy, xz, yx and so on.
    """
    rigid = np.array(to_volumes, float)
    rigid[:, :3, :3] = nearest_rotation(rigid[:, :3, :3])
    pose = mean_rigid(rigid)
    coarse = grid.at_spacing(tuple(np.maximum(EVERY_MM, grid.voxel_sizes)))
    points = coarse.to_world(np.moveaxis(np.indices(coarse.shape), 0, -1).reshape(-1, 3))
    scanner = points @ pose[:3, :3].T + pose[:3, 3]
    turned = pose[:3, :3].T @ gradient_deviation(fields, scanner) @ pose[:3, :3]
    table = torch.from_numpy(np.ascontiguousarray(turned.reshape(-1, 9).T, np.float32)).reshape(9, *coarse.shape)
    return resample_onto(table, coarse, grid, cubic=True)


def _straighten_blip(blip: Blip, series: Grid, nonlinearity: GradientNonlinearity) -> Blip:
    if not len(blip.epis):
        return blip
    done, grid = nonlinearity.corrections, blip.grid or series
    warp = _warp_on(nonlinearity.fields, grid, done.epis, done.slice_axis)
    return replace(blip, epis=unwarp(blip.epis, grid, warp))


def _straighten(image: Volume, fields: CoilFields, done: str, density: bool = True, signed: bool = False) -> Volume:
    """One image; in those corrected within slices, slices are taken to lie across the axis of the largest voxels."""
    axis = int(np.argmax(image.grid.voxel_sizes))
    warp = _warp_on(fields, image.grid, done, axis)
    return Volume(unwarp(image.data[None], image.grid, warp, signed, density)[0], image.grid)


def _warp_on(fields: CoilFields, grid: Grid, done: str, slice_axis: int) -> ScannerWarp | None:
    field = remaining_warp(fields, grid, done, slice_axis)
    return None if field is None else scanner_warp(field, grid)


def unwarp(
    volumes: torch.Tensor, grid: Grid, warp: ScannerWarp | None, signed: bool = False, density: bool = True
) -> torch.Tensor:
    """Volumes (n, i, j, k) resampled on their own grid, multiplied by the Jacobian determinant if `density` is set."""
    if warp is None:
        return volumes
    if not density:
        values = warp.values.copy()
        values[3] = 1
        warp = ScannerWarp(values, warp.frame)
    out = torch.empty_like(volumes, dtype=torch.float32)
    for v, volume in enumerate(volumes):
        out[v] = warp_volume(volume, grid, grid, np.eye(4), signed=signed, scanner=warp)
    return out
