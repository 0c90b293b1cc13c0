"""The files of one unit as they were read, before anything was done to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.acquisition import PhaseEncoding
from dsiprep.data.grid import Grid, Volume


@dataclass(frozen=True, eq=False)
class RawRun:
    """One DWI run.

    Attributes
    ----------
    name : str
        File name, for messages and for the confounds table.
    data : Tensor, (n, i, j, k), float32
    grid : Grid
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors in world RAS+; zero for volumes without a direction.
    pe : PhaseEncoding or None
        In the voxel axes of this file.
    slice_times : tuple of float
        When slice 0, 1, ... along k was excited, in s; empty where unknown.
    """

    name: str
    data: torch.Tensor
    grid: Grid
    bvals: np.ndarray
    bvecs: np.ndarray
    pe: PhaseEncoding | None
    slice_times: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class RawEpi:
    """b=0 volumes (m, i, j, k) that show the distortion of another phase encoding."""

    name: str
    data: torch.Tensor
    grid: Grid
    pe: PhaseEncoding


@dataclass(frozen=True, eq=False)
class RawFieldmap:
    """A gradient-echo fieldmap.

    Attributes
    ----------
    name : str
        File name, for messages.
    field : Volume
        Off-resonance: Hz, or, where `echo_difference` is known, the phase in radians, wrapped into -pi to pi.
    magnitude : Volume
        On the same grid.
    echo_difference : float or None
        s.
    """

    name: str
    field: Volume
    magnitude: Volume
    echo_difference: float | None


@dataclass(frozen=True, eq=False)
class RawUnit:
    """All runs of a unit, and the reversed b=0 images that belong to them."""

    name: str
    runs: tuple[RawRun, ...]
    epis: tuple[RawEpi, ...] = ()
