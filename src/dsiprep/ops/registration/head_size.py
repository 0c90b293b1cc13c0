"""Uniform scaling of heads of other species to human size, so that lengths in mm chosen for humans apply to them."""

from __future__ import annotations

import numpy as np

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import Affine, Chain, DisplacementField

__all__ = ["human_size_factor", "scale_affine", "scale_chain", "scale_matrix", "scale_volume"]

MIN_HUMAN_ML, MAX_HUMAN_ML = 300.0, 2500.0  # volume of human brains, newborns included
TYPICAL_HUMAN_ML = 1400.0


def human_size_factor(mask: Volume) -> float:
    """Scale factor that brings a brain to human size; 1 if it already has it.

    Parameters
    ----------
    mask : Volume
        0 or 1: the brain of a template.
    """
    millilitres = float((mask.data > 0.5).sum()) * float(np.prod(mask.grid.voxel_sizes)) / 1000
    if millilitres == 0 or MIN_HUMAN_ML <= millilitres <= MAX_HUMAN_ML:
        return 1.0
    return float((TYPICAL_HUMAN_ML / millilitres) ** (1 / 3))


def scale_volume(volume: Volume, factor: float) -> Volume:
    """Scale the world coordinates of a volume about the origin; the voxel values are unchanged."""
    affine = volume.grid.affine.copy()
    affine[:3] *= factor
    return Volume(volume.data, Grid(volume.grid.shape, affine))


def scale_matrix(matrix: np.ndarray, factor: float) -> np.ndarray:
    """Transform (4, 4) between world points after both spaces have been scaled."""
    scaled = np.array(matrix, float)
    scaled[:3, 3] *= factor
    return scaled


def scale_affine(affine: Affine, factor: float) -> Affine:
    """`scale_matrix` for an `Affine`; the names of its spaces are kept."""
    return Affine(scale_matrix(affine.matrix, factor), affine.source, affine.target)


def scale_chain(chain: Chain, factor: float) -> Chain:
    """Chain of transforms after both of its spaces have been scaled."""
    return Chain(tuple(_scale_step(step, factor) for step in chain.steps), chain.source, chain.target)


def _scale_step(step: Affine | DisplacementField, factor: float) -> Affine | DisplacementField:
    if isinstance(step, Affine):
        return scale_affine(step, factor)
    scaled = scale_volume(Volume(step.data[0], step.grid), factor)
    return DisplacementField(step.data * factor, scaled.grid)
