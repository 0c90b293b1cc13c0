"""Facts on gradient nonlinearity: how far it displaces the brain, and by how much it changes b-values."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.results import UnitResults
from dsiprep.ops.image.gradient_nonlinearity import encoding_error
from dsiprep.report.page_parts import Fact

__all__ = ["b_value_range", "nonlinearity_facts"]

DONE = {"none": "not corrected by the scanner", "2d": "corrected within slices by the scanner"}
DONE["3d"] = "corrected by the scanner"


def nonlinearity_facts(results: UnitResults) -> tuple[Fact, ...]:
    """Size of the displacement and of the deviation of the gradients in the brain; empty if they are not known."""
    nonlinearity, preprocessed = results.nonlinearity, results.preprocessed
    if nonlinearity is None or preprocessed.deviation is None:
        return ()
    inside = np.argwhere(preprocessed.mask.numpy() > 0.5)[::20]
    points = preprocessed.dwi.grid.to_world(inside)
    matrix = results.coregistration.dwiref_to_acpc.matrix
    displacement, _ = encoding_error(nonlinearity.fields, points @ matrix[:3, :3].T + matrix[:3, 3])
    largest = float(np.linalg.norm(displacement, axis=1).max())
    low, high = b_value_range(preprocessed.deviation[:, torch.as_tensor(preprocessed.mask.numpy() > 0.5)])
    return (
        Fact(
            "Displacement by gradient nonlinearity",
            f"up to {largest:.1f} mm in the brain",
            f"{DONE[nonlinearity.corrections.series]} in the series; what was left has been corrected",
        ),
        Fact(
            "b-values in the brain",
            f"{100 * low:+.1f} % to {100 * high:+.1f} % of the prescribed ones",
            "by gradient nonlinearity, over 98 % of the brain, mean over directions; desc-graddev_dwimap has the "
            "gradients of each voxel, which models have to use",
        ),
    )


def b_value_range(deviation: torch.Tensor) -> tuple[float, float]:
    """1st and 99th percentile of the relative change of b, mean over directions, for L (9, n) by rows."""
    acting = deviation.reshape(3, 3, -1).double() + torch.eye(3, dtype=torch.float64)[:, :, None]
    change = ((acting**2).sum((0, 1)) / 3 - 1).numpy()
    low, high = np.percentile(change, [1, 99])
    return float(low), float(high)
