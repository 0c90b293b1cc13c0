"""How far the diffusion-weighted volumes were found to lie from b=0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class B0Shift:
    """Rigid displacement of the brain between groups of diffusion-weighted volumes and the b=0 reference.

    Attributes
    ----------
    measured : ndarray, (n,)
        Mean displacement (mm) over the brain by which mutual information would move the range of b-values to which the
        volume belongs; NaN in b=0 volumes and ranges that were not measured.
    applied : ndarray, (n,)
        What was applied of it; 0 where it was not significant.
    """

    measured: np.ndarray
    applied: np.ndarray

    def merge(self, later: B0Shift) -> B0Shift:
        """The larger values of two measurements, of which the second was made after the first was applied."""
        return B0Shift(np.fmax(self.measured, later.measured), np.maximum(self.applied, later.applied))
