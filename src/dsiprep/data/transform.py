"""Point maps in the world, RAS+ mm.

`from-A_to-B` brings images of A onto B, so it maps points of B to points of A. A variable that holds one is
named after the image it moves: `dwiref_to_t1w` takes a point of the T1w and says where to read in the dwiref.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.grid import Grid


@dataclass(frozen=True, eq=False)
class Affine:
    """Points of `target` to points of `source`: x -> matrix @ [x, 1].

    Attributes
    ----------
    matrix : ndarray, (4, 4), float64
        World RAS+ mm of the target image to world RAS+ mm of the source image.
    source, target : str
        The names of the two spaces, as in `from-<source>_to-<target>`.
    """

    matrix: np.ndarray
    source: str
    target: str

    def inverse(self) -> Affine:
        """The transform that brings images of `target` onto `source`."""
        return Affine(np.linalg.inv(self.matrix), self.target, self.source)


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """x -> x + u(x) for points of `grid`.

    Attributes
    ----------
    data : Tensor, (3, i, j, k), float32
        u in mm along world R, A, S.
    grid : Grid
        Where u is given; u is zero outside.
    """

    data: torch.Tensor
    grid: Grid


@dataclass(frozen=True, eq=False)
class Chain:
    """Several maps as one: points of `target` go through `steps[0]`, then `steps[1]`, ..., into `source`."""

    steps: tuple[Affine | DisplacementField, ...]
    source: str
    target: str
