"""A diffusion-weighted series."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.summary import Summarised


@dataclass(frozen=True, eq=False, repr=False)
class DWI(Summarised):
    """Diffusion-weighted volumes on one grid.

    Attributes
    ----------
    data : Tensor, (n, i, j, k), float32
        Intensities, volume axis first.
    grid : Grid
    bvals : ndarray, (n,), float64
        s/mm².
    bvecs : ndarray, (n, 3), float64
        Unit vectors in world RAS+; zero for volumes without a direction.
    run : ndarray, (n,), int
        Index of the run of the unit for each volume.
    blip : ndarray, (n,), int
        Index of the `Blip` of the unit for each volume (0 or 1).
    b0_threshold : float
        b-values at or below this (s/mm²) count as b=0.
    signed : bool
        Whether intensities are the real part of complex data, which noise makes negative, and not magnitudes.
    """

    data: torch.Tensor
    grid: Grid
    bvals: np.ndarray
    bvecs: np.ndarray
    run: np.ndarray
    blip: np.ndarray
    b0_threshold: float = 100.0
    signed: bool = False

    def __len__(self) -> int:
        return len(self.bvals)

    @property
    def is_b0(self) -> np.ndarray:
        """Whether each volume counts as b=0, (n,) bool."""
        return self.bvals <= self.b0_threshold

    @property
    def q(self) -> np.ndarray:
        """q-vectors (n, 3) up to the constant 1/(2 pi sqrt(tau)): sqrt(b) times the b-vector."""
        return np.sqrt(np.maximum(self.bvals, 0))[:, None] * self.bvecs

    def select(self, volumes: np.ndarray) -> DWI:
        """Select volumes by an index array, in that order, or by a boolean array."""
        index = np.flatnonzero(volumes) if np.asarray(volumes).dtype == bool else np.asarray(volumes)
        return DWI(
            self.data[torch.as_tensor(index, device=self.data.device)],
            self.grid,
            self.bvals[index],
            self.bvecs[index],
            self.run[index],
            self.blip[index],
            self.b0_threshold,
            self.signed,
        )

    def with_data(self, data: torch.Tensor) -> DWI:
        """Replace the intensities by others of the same shape."""
        return replace(self, data=data)

    def volume(self, index: int) -> Volume:
        """One volume with its grid."""
        return Volume(self.data[index], self.grid)

    def to(self, device: torch.device | str) -> DWI:
        """Move the intensities to a device."""
        return self.with_data(self.data.to(device))
