"""Images of one unit as read from file, before any processing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.acquisition import KSpace, PhaseEncoding
from dsiprep.data.grid import Grid, Volume
from dsiprep.data.summary import Summarised


@dataclass(frozen=True, eq=False, repr=False)
class RawRun(Summarised):
    """One DWI run.

    Attributes
    ----------
    name : str
        File name, for messages and the confounds table.
    data : Tensor, (n, i, j, k), float32
    grid : Grid
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors in world RAS+; zero for volumes without a direction.
    pe : PhaseEncoding or None
        In the voxel axes of the file; None where unknown.
    slice_times : tuple of float
        Excitation time of each slice along `slice_axis` in s; empty where unknown.
    slice_axis : int or None
        Voxel axis across slices; None where the sidecar does not give it.
    k_space : KSpace or None
        None if the series is not as it was sampled.
    phase : Tensor, (n, i, j, k), float32, or None
        Phase in radians of complex data, of which `data` is the magnitude.
    """

    name: str
    data: torch.Tensor
    grid: Grid
    bvals: np.ndarray
    bvecs: np.ndarray
    pe: PhaseEncoding | None
    slice_times: tuple[float, ...] = ()
    slice_axis: int | None = None
    k_space: KSpace | None = None
    phase: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class RawEpi(Summarised):
    """b=0 volumes (m, i, j, k) of fmap/ and their phase encoding."""

    name: str
    data: torch.Tensor
    grid: Grid
    pe: PhaseEncoding
    k_space: KSpace | None = None


@dataclass(frozen=True, eq=False, repr=False)
class RawFieldmap(Summarised):
    """A gradient-echo fieldmap.

    Attributes
    ----------
    name : str
        File name, for messages.
    field : Volume
        Off-resonance in Hz or, if `echo_difference` is given, the phase difference in radians, wrapped to -pi to pi.
    magnitude : Volume
        Magnitude image on the same grid.
    echo_difference : float or None
        Difference of the echo times in s; None for a field in Hz.
    notes : tuple of str
        How stored values were read, for the report.
    """

    name: str
    field: Volume
    magnitude: Volume
    echo_difference: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class RawUnit(Summarised):
    """All runs of a unit, and its EPI references."""

    name: str
    runs: tuple[RawRun, ...]
    epis: tuple[RawEpi, ...] = ()
