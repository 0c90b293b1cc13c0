"""Images of a blip-up/blip-down pair in common units, at every level of the resolution pyramid."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.errors import InputError
from dsiprep.ops.image.filters import gaussian, resized
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.pepolar.pair_model import Images, Pair, make_pair
from dsiprep.stages.pair_geometry import PairGeometry

__all__ = ["COARSEST_MM", "brains_and_brightness", "finite_mean", "normalised", "pair_at", "pyramid"]

COARSEST_MM = 8.0
LEAST_SHARE = 0.5  # of the brain that the images of the second blip must cover


def finite_mean(volumes: torch.Tensor) -> torch.Tensor:
    """Mean of volumes (m, i, j, k), with non-finite values replaced by zero."""
    return torch.nan_to_num(volumes.float(), posinf=0.0, neginf=0.0).mean(0)


def brains_and_brightness(
    before: tuple[torch.Tensor, ...], geometry: PairGeometry, mask: Volume
) -> tuple[tuple[torch.Tensor, ...], list[float]]:
    """Mask of each blip with the phase-encoding axis last, and the brightness of each image."""
    masks = (mask, mask if geometry.same_grid else _mask_of_second(mask, geometry))
    brains = tuple(geometry.ordered(m.data.to(before[0].device) > 0.5, b) for b, m in enumerate(masks))
    return brains, [brightness(b, m) for b, m in zip(before, masks, strict=True)]


def normalised(both: tuple[torch.Tensor, ...], units: list[float], mask: Volume, geometry: PairGeometry) -> Images:
    """Images of both blips with the phase-encoding axis last, scaled so that the brain of the first is about 1.

    `units` is the brightness of the b=0 images of both blips. Dividing by it keeps their ratio of gains.
    """
    relative = brightness(both[0], mask) / units[0]
    first, second = (geometry.ordered(v, b) / (units[b] * relative) for b, v in enumerate(both))
    return first, second


def pyramid(images: list[Images], geometry: PairGeometry, brains: tuple[torch.Tensor, ...]) -> list[Pair]:
    """The pair at every pyramid level, coarsest first; `images` are b=0, then further contrasts."""
    finest = float(np.prod(geometry.grids[0].voxel_sizes) ** (1 / 3))
    steps = max(0, round(float(np.log2(COARSEST_MM / finest))))
    spacings = [*np.geomspace(COARSEST_MM, finest, steps + 1)[:-1], 0.0]
    return [pair_at(images, geometry, brains, float(spacing)) for spacing in spacings]


def pair_at(images: list[Images], geometry: PairGeometry, brains: tuple[torch.Tensor, ...], spacing: float) -> Pair:
    """The pair with voxels of `spacing` mm; as acquired if that is 0 or less than the voxel size."""
    grids = geometry.grid(0), geometry.grid(1)
    coarse = [grid.at_spacing(tuple(np.maximum(grid.voxel_sizes, spacing))) if spacing else grid for grid in grids]

    def reduced(both: tuple[torch.Tensor, ...]) -> Images:
        first, second = (_downsampled(v, g, c) for v, g, c in zip(both, grids, coarse, strict=True))
        return first, second

    shown, masks = [reduced(both) for both in images], [b > 0.5 for b in reduced(tuple(b.float() for b in brains))]
    centre = grids[0].to_world(np.argwhere(brains[0].cpu().numpy()).mean(0))
    other = None if geometry.same_grid else (coarse[1], masks[1])
    return make_pair(shown[0], masks[0], coarse[0], geometry.scales, centre, shown[1:], other)


def _mask_of_second(mask: Volume, geometry: PairGeometry) -> Volume:
    """The brain mask on the grid of blip 1, by scanner coordinates."""
    other = geometry.grids[1]
    data = resample_onto(mask.data[None].float(), mask.grid, other)[0] > 0.5
    share = int(data.sum()) * abs(np.linalg.det(other.affine)) / np.linalg.det(mask.grid.affine)
    if abs(share) < LEAST_SHARE * int((mask.data > 0.5).sum()):
        raise InputError(
            "the images of the second phase encoding cover less than half of the brain in the first; give whole-brain "
            "images of one session in the same scanner coordinates"
        )
    return Volume(data.float(), other)


def brightness(image: torch.Tensor, mask: Volume) -> float:
    """Median intensity of the brain, or the largest absolute intensity if that is not positive."""
    median = float(image[mask.data.to(image.device) > 0.5].median())
    return median if median > 0 else float(image.abs().max())


def _downsampled(image: torch.Tensor, grid: Grid, coarse: Grid) -> torch.Tensor:
    if coarse is grid:
        return image
    ratio = coarse.voxel_sizes / grid.voxel_sizes
    widths = (0.5 * np.sqrt(np.maximum(ratio**2 - 1, 0))).tolist()
    return resized(gaussian(image[None], widths)[0], coarse.shape)
