"""Result of the stage that estimates how the off-resonance field changes with the pose of the head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.grid import Grid
from dsiprep.data.summary import Summarised
from dsiprep.data.transform import DisplacementField


@dataclass(frozen=True, eq=False, repr=False)
class MovingField(Summarised):
    """Change of the off-resonance field with pitch and roll, and poses that were estimated with it.

    In volume v of blip b, it adds the displacement tilts[v] . derivatives(x) directions[b] to u_b(x) of `Distortion`.

    Attributes
    ----------
    derivatives : Tensor, (2, i, j, k), or None
        Change per degree of pitch and of roll, as displacement (mm) along the phase-encoding axis of the first blip,
        positive for positive off-resonance. None if the field is taken to move rigidly with the head.
    grid : Grid
        That of the dwiref.
    directions : ndarray, (blips, 3)
        Displacement in mm RAS+ in each blip where `derivatives` are 1 mm.
    tilts : ndarray, (n, 2)
        Pitch and roll of each volume of the series in degrees, from the pose to which `Distortion` belongs.
    transforms : ndarray, (n, 4, 4)
        `Motion.transforms` of all volumes of the series, those of turned volumes estimated with the fields.
    mm_per_hz : float or None
        Displacement in the first blip per Hz; None without a known readout time.
    reason : str
        What was decided, and why.
    size_mm : float
        95th percentile over the brain of the change by 6 degrees, the larger of pitch and roll; 0 if there is none.
    evidence : float
        Variance of the derivatives in the brain over that of the same fit along the two other axes; NaN if it was not
        measured.
    residuals : tuple of float
        Mean absolute residual of turned volumes, relative to their mean prediction: (with a rigid field, after).
    """

    derivatives: torch.Tensor | None
    grid: Grid
    directions: np.ndarray
    tilts: np.ndarray
    transforms: np.ndarray
    mm_per_hz: float | None
    reason: str
    size_mm: float = 0.0
    evidence: float = float("nan")
    residuals: tuple[float, ...] = ()

    def per_degree(self) -> tuple[torch.Tensor | None, str]:
        """The derivatives in Hz per degree, or in mm per degree without a readout time, and their unit."""
        if self.mm_per_hz is None or self.derivatives is None:
            return self.derivatives, "mm/degree"
        return self.derivatives / self.mm_per_hz, "Hz/degree"

    def displacements(self, blip: int) -> tuple[DisplacementField, ...]:
        """Displacement (mm RAS+) in a blip per degree of pitch and of roll; none if the field moves rigidly."""
        if self.derivatives is None:
            return ()
        direction = torch.as_tensor(self.directions[blip]).float()[:, None, None, None]
        return tuple(DisplacementField(direction * field, self.grid) for field in self.derivatives)
