"""A diffusion-weighted series."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume


@dataclass(frozen=True, eq=False)
class DWI:
    """Diffusion-weighted volumes on one grid.

    Attributes
    ----------
    data : Tensor, (n, i, j, k), float32
        Intensities, volume first.
    grid : Grid
    bvals : ndarray, (n,), float64
        s/mm².
    bvecs : ndarray, (n, 3), float64
        Unit vectors in world RAS+; zero for volumes without a direction.
    run : ndarray, (n,), int
        Which run of the unit each volume came from.
    blip : ndarray, (n,), int
        Which `Blip` of the unit each volume belongs to (0 or 1).
    b0_threshold : float
        b-values at or below this (s/mm²) count as b=0.
    """

    data: torch.Tensor
    grid: Grid
    bvals: np.ndarray
    bvecs: np.ndarray
    run: np.ndarray
    blip: np.ndarray
    b0_threshold: float = 100.0

    def __len__(self) -> int:
        return len(self.bvals)

    @property
    def is_b0(self) -> np.ndarray:
        """Which volumes count as b=0, (n,) bool."""
        return self.bvals <= self.b0_threshold

    @property
    def q(self) -> np.ndarray:
        """q-vectors up to the constant 1/(2 pi sqrt(tau)): sqrt(b) times the b-vector, (n, 3)."""
        return np.sqrt(np.maximum(self.bvals, 0))[:, None] * self.bvecs

    def select(self, volumes: np.ndarray) -> DWI:
        """The volumes at an index or boolean array, in that order, (m, i, j, k)."""
        index = np.flatnonzero(volumes) if np.asarray(volumes).dtype == bool else np.asarray(volumes)
        return DWI(
            self.data[torch.as_tensor(index, device=self.data.device)],
            self.grid,
            self.bvals[index],
            self.bvecs[index],
            self.run[index],
            self.blip[index],
            self.b0_threshold,
        )

    def with_data(self, data: torch.Tensor) -> DWI:
        """The same series with other intensities of the same shape."""
        return replace(self, data=data)

    def volume(self, index: int) -> Volume:
        """One volume on the grid."""
        return Volume(self.data[index], self.grid)

    def to(self, device: torch.device | str) -> DWI:
        """The same series with its intensities on another device."""
        return self.with_data(self.data.to(device))
