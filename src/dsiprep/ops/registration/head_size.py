"""Heads of another size than a person's, enlarged to it: lengths in mm that fit people then fit a mouse."""

from __future__ import annotations

import numpy as np

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import Affine, Chain, DisplacementField

__all__ = ["enlarge_affine", "enlarge_chain", "enlarge_matrix", "enlarge_volume", "enlargement"]

LEAST_ML, MOST_ML = 300.0, 2500.0  # brains of people, newborns too
USUAL_ML = 1400.0


def enlargement(mask: Volume) -> float:
    """The factor by which a brain has to be enlarged to have a person's size; 1 where it has it.

    Parameters
    ----------
    mask : Volume
        0 or 1: the brain of a template.
    """
    millilitres = float((mask.data > 0.5).sum()) * float(np.prod(mask.grid.voxel_sizes)) / 1000
    if millilitres == 0 or LEAST_ML <= millilitres <= MOST_ML:
        return 1.0
    return float((USUAL_ML / millilitres) ** (1 / 3))


def enlarge_volume(volume: Volume, by: float) -> Volume:
    """The same voxels, `by` times as large, in a world that many times as large."""
    affine = volume.grid.affine.copy()
    affine[:3] *= by
    return Volume(volume.data, Grid(volume.grid.shape, affine))


def enlarge_matrix(matrix: np.ndarray, by: float) -> np.ndarray:
    """What a map (4, 4) of world points becomes where both worlds are enlarged."""
    enlarged = np.array(matrix, float)
    enlarged[:3, 3] *= by
    return enlarged


def enlarge_affine(affine: Affine, by: float) -> Affine:
    """`enlarge_matrix` with the names of its spaces."""
    return Affine(enlarge_matrix(affine.matrix, by), affine.source, affine.target)


def enlarge_chain(chain: Chain, by: float) -> Chain:
    """What a chain becomes where both its worlds are enlarged."""
    return Chain(tuple(_enlarge_step(step, by) for step in chain.steps), chain.source, chain.target)


def _enlarge_step(step: Affine | DisplacementField, by: float) -> Affine | DisplacementField:
    if isinstance(step, Affine):
        return enlarge_affine(step, by)
    grown = enlarge_volume(Volume(step.data[0], step.grid), by)
    return DisplacementField(step.data * by, grown.grid)
