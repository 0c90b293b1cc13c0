"""How volumes of a series are predicted from each other: the choice of model, and the prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsiprep.ops.image.affine import rotate_bvecs
from dsiprep.ops.qspace.shore import leave_one_out, near_neighbours, shell_size, shore_basis, shore_prior, shore_size
from dsiprep.ops.qspace.tensor import tensor_basis, tensor_prediction

__all__ = ["Model", "Prediction", "choose_model", "predict"]

SETTLING = 1.4  # of the 2 from which on rounds do not come to rest


@dataclass(frozen=True)
class Model:
    """How volumes are predicted from each other: "3dSHORE" with its radial order, "tensor", "none" or "off"."""

    name: str
    note: str = ""
    order: int = 0


@dataclass(frozen=True, eq=False)
class Prediction:
    """Volumes as the others predict them.

    Attributes
    ----------
    values : Tensor, (n, m)
    matrix : Tensor, (n, n)
        What each volume (column) has to do with the prediction of each (row): of intensities, or of their logarithms.
    logarithmic : bool
    """

    values: torch.Tensor
    matrix: torch.Tensor
    logarithmic: bool

    @property
    def relaxation(self) -> float:
        """How far volumes may go towards their predictions in one round for rounds to come to rest.

        Displacements d that are left become P d where volumes go all the way, P the matrix, and d - s (1 - P) d where
        they go a share s of it. That dies away if s times the largest eigenvalue of 1 - P is below 2, which it is not
        where a model has nearly as many parameters as there are volumes.
        """
        size = len(self.matrix)
        largest = np.abs(np.linalg.eigvals(np.eye(size) - self.matrix.cpu().numpy())).max()
        return float(min(1.0, SETTLING / largest))

    def change(self, volumes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """How predictions change when volumes change by (n, c, k), which is (n, c, k); `values` (n, 1, k) are there."""
        if not self.logarithmic:
            return torch.einsum("vw,wck->vck", self.matrix, volumes)
        floor = values.clamp(min=1e-3 * float(values.max()))
        return floor * torch.einsum("vw,wck->vck", self.matrix, volumes / floor)


def choose_model(count: int, rings: int, wanted: str) -> Model:
    """3dSHORE, of as high a radial order as there are volumes for; the tensor only if asked for.

    A tensor of few directions has nearly as many parameters as there are volumes, so that predictions follow single
    volumes with all their noise and displacement. The prior of 3dSHORE keeps them from that. On one shell, radial
    functions of the same l are alike, and what counts is how many functions of direction there are.

    Parameters
    ----------
    count : int
        Diffusion-weighted volumes.
    rings : int
        b-values, b=0 counted.
    wanted : str
        "auto", "3dSHORE", "tensor" or "none".
    """
    if wanted == "none" or count == 0:
        return Model("none", "b=0 volumes only" if count else "there are only b=0 volumes")
    if wanted == "tensor":
        return _tensor(count, "as asked for")
    shells = f"{rings} b-values" if rings > 2 else "one b-value besides b=0"
    for order in (6, 4, 2):
        if count + 1 > (shore_size(order) if rings > 2 else 1 + shell_size(order)):
            few = "" if order == 6 else f", as there are only {count} directions"
            return Model("3dSHORE", f"{shells}, radial order {order}{few}", order)
    return Model("none", f"{count} directions are too few for 3dSHORE: b=0 volumes only")


def _tensor(count: int, why: str) -> Model:
    if count < 7:
        return Model("none", f"{why}, and {count} directions are too few for a tensor: b=0 volumes only")
    return Model("tensor", why)


def predict(
    seen: torch.Tensor,
    reference: torch.Tensor,
    model: Model,
    bvals: np.ndarray,
    bvecs: np.ndarray,
    transforms: np.ndarray,
    weights: np.ndarray,
) -> Prediction:
    """Every diffusion-weighted volume from the others and the mean b=0.

    Parameters
    ----------
    seen : Tensor, (n, m)
        Volumes at the points of the reference.
    reference : Tensor, (1, m)
        Mean b=0.
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        As played out, world RAS+; they are turned with `transforms` (n, 4, 4), for the head turned in them.
    weights : ndarray, (n,)
        How far each volume is to be believed.

    Returns
    -------
    Prediction
    """
    bvals = np.append(bvals, 0)
    bvecs = np.vstack([rotate_bvecs(bvecs, transforms), np.zeros(3)])
    q = np.sqrt(bvals)[:, None] * bvecs
    samples = torch.cat([seen, reference])
    near, believed = near_neighbours(q), np.append(weights, 1.0)
    if model.name == "tensor":
        matrix = leave_one_out(tensor_basis(bvals, bvecs), np.full(7, 1e-6), near, believed)
        values = tensor_prediction(samples, matrix)[:-1].contiguous()
    else:
        basis = shore_basis(q, model.order)
        moment = (samples @ samples.T / samples.shape[1]).cpu().numpy().astype(float)
        matrix = leave_one_out(basis, shore_prior(moment, basis, model.order, believed), near, believed)
        values = torch.as_tensor(matrix[:-1], dtype=torch.float32, device=seen.device) @ samples
    among = torch.as_tensor(matrix[:-1, :-1], dtype=torch.float32, device=seen.device)
    return Prediction(values, among, model.name == "tensor")
