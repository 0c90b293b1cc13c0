"""Prediction of each volume of a series from the others: choice of the signal model, and the prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.ops.qspace.bvec_rotation import rotate_bvecs
from dsiprep.ops.qspace.shore import (
    choose_zeta,
    leave_one_out,
    near_neighbours,
    shell_size,
    shore_basis,
    shore_prior,
    shore_size,
)
from dsiprep.ops.qspace.tensor import tensor_basis, tensor_prediction

__all__ = ["Model", "Prediction", "choose_model", "choose_model_for", "predict"]

STABLE_STEP = 1.4  # below the limit of 2 at which the iterations diverge


@dataclass(frozen=True)
class Model:
    """A signal model: "3dSHORE" with its radial order, "tensor", "none" or "off"; `note` explains the choice."""

    name: str
    note: str = ""
    order: int = 0


@dataclass(frozen=True, eq=False)
class Prediction:
    """Volumes predicted from the other volumes.

    Attributes
    ----------
    values : Tensor, (n, m)
        Predicted intensities.
    matrix : Tensor, (n, n)
        Weight of each volume (column) in the prediction of each volume (row).
    logarithmic : bool
        Whether `matrix` applies to the logarithms of intensities.
    """

    values: torch.Tensor
    matrix: torch.Tensor
    logarithmic: bool

    @property
    def relaxation(self) -> float:
        """Fraction of the step towards the predictions, at most 1, with which the iterations converge.

        With P the matrix, residual displacements d become P d after a full step and d - s (1 - P) d after a fraction s
        of it. They decay if s times the largest eigenvalue of 1 - P is below 2. A full step can exceed that limit if
        the model has nearly as many parameters as there are volumes.
        """
        size = len(self.matrix)
        largest = np.abs(np.linalg.eigvals(np.eye(size) - self.matrix.cpu().numpy())).max()
        return float(min(1.0, STABLE_STEP / largest))

    def change(self, volumes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Linearised change of predictions `values` (n, 1, k) for changes of the volumes (n, c, k); (n, c, k)."""
        if not self.logarithmic:
            return torch.einsum("vw,wck->vck", self.matrix, volumes)
        floor = values.clamp(min=1e-3 * float(values.max()))
        return floor * torch.einsum("vw,wck->vck", self.matrix, volumes / floor)


def choose_model(count: int, n_bvalues: int, wanted: str) -> Model:
    """Choose 3dSHORE with the highest radial order that the number of volumes supports; the tensor only on request.

    With few directions a tensor has nearly as many parameters as there are volumes, so predictions follow the noise
    and displacement of single volumes. The prior of 3dSHORE prevents that. On a single shell, radial functions of the
    same l coincide, and only the number of angular functions counts.

    Parameters
    ----------
    count : int
        Diffusion-weighted volumes.
    n_bvalues : int
        Distinct b-values, including b=0.
    wanted : str
        "auto", "3dSHORE", "tensor" or "none".
    """
    if wanted == "none" or count == 0:
        return Model("none", "motion from b=0 volumes only" if count else "no diffusion-weighted volumes")
    if wanted == "tensor":
        return _tensor_model(count, "as requested")
    shells = f"{n_bvalues} b-values" if n_bvalues > 2 else "one b-value besides b=0"
    for order in (6, 4, 2):
        if count + 1 > (shore_size(order) if n_bvalues > 2 else 1 + shell_size(order)):
            limit = "" if order == 6 else f", limited by {count} directions"
            return Model("3dSHORE", f"{shells}, radial order {order}{limit}", order)
    return Model("none", f"{count} directions are too few for 3dSHORE: motion from b=0 volumes only")


def choose_model_for(bvals: np.ndarray, wanted: str) -> Model:
    """`choose_model` for diffusion-weighted volumes of b-values (n,), which are rounded to 100 s/mm²."""
    return choose_model(len(bvals), 1 + len(np.unique(np.round(bvals / 100))), wanted)


def _tensor_model(count: int, reason: str) -> Model:
    if count < 7:
        return Model("none", f"{reason}, but {count} directions are too few for a tensor: motion from b=0 volumes only")
    return Model("tensor", reason)


def predict(
    observed: torch.Tensor,
    reference: torch.Tensor,
    model: Model,
    bvals: np.ndarray,
    bvecs: np.ndarray,
    transforms: np.ndarray,
    weights: np.ndarray,
) -> Prediction:
    """Predict every diffusion-weighted volume from the others and the mean b=0.

    Parameters
    ----------
    observed : Tensor, (n, m)
        Volumes sampled at the points of the reference.
    reference : Tensor, (1, m)
        Mean b=0 at the same points.
    model : Model
        "3dSHORE" or "tensor".
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        As applied by the scanner, world RAS+.
    transforms : ndarray, (n, 4, 4)
        Head poses, as in `Motion.transforms`; b-vectors are rotated into the frame of the reference head.
    weights : ndarray, (n,)
        Weight of each volume, 0 to 1.

    Returns
    -------
    Prediction
    """
    bvals = np.append(bvals, 0)
    bvecs = np.vstack([rotate_bvecs(bvecs, transforms), np.zeros(3)])
    q = np.sqrt(bvals)[:, None] * bvecs
    samples = torch.cat([observed, reference])
    left_out, weights = near_neighbours(q), np.append(weights, 1.0)
    if model.name == "tensor":
        matrix = leave_one_out(tensor_basis(bvals, bvecs), np.full(7, 1e-6), left_out, weights)
        values = tensor_prediction(samples, matrix)[:-1].contiguous()
    else:
        moment = (samples @ samples.T / samples.shape[1]).cpu().numpy().astype(float)
        basis = shore_basis(q, model.order, choose_zeta(moment, q, model.order, weights))
        matrix = leave_one_out(basis, shore_prior(moment, basis, model.order, weights), left_out, weights)
        values = torch.as_tensor(matrix[:-1], dtype=torch.float32, device=observed.device) @ samples
    between_volumes = torch.as_tensor(matrix[:-1, :-1], dtype=torch.float32, device=observed.device)
    return Prediction(values, between_volumes, model.name == "tensor")
