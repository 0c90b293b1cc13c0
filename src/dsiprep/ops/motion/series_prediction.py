"""Every volume of a series predicted from the others: b=0 volumes by their mean, the others by a signal model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.data.dwi import DWI
from dsiprep.ops.motion.volume_agreement import volume_weights
from dsiprep.ops.qspace.prediction import choose_model_for, predict

__all__ = ["PredictedSeries", "predict_series"]


@dataclass(frozen=True, eq=False)
class PredictedSeries:
    """Predictions of n volumes at m points.

    Attributes
    ----------
    values : Tensor, (n, m)
    matrix : ndarray, (n, n)
        Weight of each volume (column) in the prediction of each volume (row); that of the mean b=0 in predictions of
        diffusion-weighted volumes is left out.
    """

    values: torch.Tensor
    matrix: np.ndarray


def predict_series(dwi: DWI, observed: torch.Tensor, transforms: np.ndarray, wanted: str) -> PredictedSeries:
    """Predict each volume from the others; volumes that fit poorly count less.

    Parameters
    ----------
    dwi : DWI
        For its gradients; of its volumes `observed` (n, m) are samples.
    observed : Tensor, (n, m)
    transforms : ndarray, (n, 4, 4)
        Head poses.
    wanted : str
        Signal model, as in `choose_model`.
    """
    b0, weighted = np.flatnonzero(dwi.is_b0), np.flatnonzero(~dwi.is_b0)
    predicted, matrix = torch.empty_like(observed), np.zeros((len(observed), len(observed)))
    predicted[b0], reference, matrix[np.ix_(b0, b0)] = _mean_of_others(observed[b0])
    samples, model = observed[weighted], choose_model_for(dwi.bvals[weighted], wanted)
    bvals, bvecs, poses = dwi.bvals[weighted], dwi.bvecs[weighted], transforms[weighted]
    rough = predict(samples, reference, model, bvals, bvecs, poses, np.ones(len(weighted)))
    weights = volume_weights(samples, rough.values, bvals)
    fine = predict(samples, reference, model, bvals, bvecs, poses, weights)
    predicted[weighted], matrix[np.ix_(weighted, weighted)] = fine.values, fine.matrix.cpu().numpy()
    return PredictedSeries(predicted, matrix)


def _mean_of_others(b0s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Mean of the other b=0 volumes for each, (n, m), of all, (1, m), and weights; a single one is its own mean."""
    if len(b0s) == 1:
        return b0s, b0s, np.zeros((1, 1))
    rough = (b0s.sum(0) - b0s) / (len(b0s) - 1)
    weights = volume_weights(b0s, rough, np.zeros(len(b0s)))
    others = weights * (1 - np.eye(len(b0s)))
    others /= others.sum(axis=1, keepdims=True)
    column = torch.as_tensor(weights).to(b0s)[:, None]
    return torch.as_tensor(others).to(b0s) @ b0s, (column * b0s).sum(0, keepdim=True) / column.sum(), others
