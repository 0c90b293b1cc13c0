"""Tensor prediction compared with noise-free signals and with DIPY."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dsiprep.ops.qspace.shore import leave_one_out, near_neighbours
from dsiprep.ops.qspace.tensor import main_directions, tensor_basis, tensor_prediction

RIDGE = np.full(7, 1e-6)


def shell(count: int = 20, b: float = 1000.0) -> tuple[np.ndarray, np.ndarray]:
    """Directions spread over a hemisphere, with a b=0 at the end."""
    index = np.arange(count)
    z = 1 - (index + 0.5) / count
    angle = index * np.pi * (1 + 5**0.5)
    radius = np.sqrt(1 - z**2)
    bvecs = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
    return np.append(np.full(count, b), 0), np.vstack([bvecs, np.zeros(3)])


def tensors(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random diffusion tensors, (count, 3, 3) in mm²/s."""
    rotations = Rotation.random(count, random_state=rng).as_matrix()
    values = rng.uniform(2e-4, 2e-3, (count, 3))
    return np.einsum("nab,nb,ncb->nac", rotations, values, rotations)


def test_tensor_signals_are_predicted_exactly() -> None:
    bvals, bvecs = shell()
    d = tensors(50, np.random.default_rng(0))
    signals = 900 * np.exp(-bvals[:, None] * np.einsum("na,mab,nb->nm", bvecs, d, bvecs))
    near = near_neighbours(np.sqrt(bvals)[:, None] * bvecs)
    matrix = leave_one_out(tensor_basis(bvals, bvecs), RIDGE, near)
    predicted = tensor_prediction(torch.from_numpy(signals).float(), matrix)
    # the b=0 is extrapolated; the others are exact up to the small ridge
    np.testing.assert_allclose(predicted.numpy()[:-1], signals[:-1], rtol=2e-3)


def test_leave_one_out_matches_dipy_fit_without_the_volume() -> None:
    dti = pytest.importorskip("dipy.reconst.dti")
    from dipy.core.gradients import gradient_table

    rng = np.random.default_rng(1)
    bvals, bvecs = shell()
    d = tensors(10, rng)
    signals = 900 * np.exp(-bvals[:, None] * np.einsum("na,mab,nb->nm", bvecs, d, bvecs))
    signals *= rng.uniform(0.95, 1.05, signals.shape)
    basis = tensor_basis(bvals, bvecs)
    matrix = leave_one_out(basis, np.full(7, 1e-9), np.eye(len(bvals), dtype=bool))
    predicted = np.exp(matrix[4] @ np.log(signals))
    used = np.arange(len(bvals)) != 4
    model = dti.TensorModel(gradient_table(bvals[used], bvecs=bvecs[used]), fit_method="OLS")
    fit = model.fit(signals[used].T)
    apparent = np.einsum("a,mab,b->m", bvecs[4], fit.quadratic_form, bvecs[4])
    # DIPY's own S0 estimate
    log_s0 = np.log(signals[used]) - basis[used][:, 1:] @ np.stack(
        [fit.quadratic_form[:, i, j] * 1e3 for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))]
    )
    np.testing.assert_allclose(predicted, np.exp(log_s0.mean(0) - bvals[4] * apparent), rtol=1e-3)


def test_prediction_of_zero_and_negative_signals_is_finite_and_bounded() -> None:
    bvals, bvecs = shell(8)
    near = np.eye(len(bvals), dtype=bool)
    signals = torch.zeros(len(bvals), 3)
    signals[:, 1] = -5
    signals[-1, 2] = 100
    predicted = tensor_prediction(signals, leave_one_out(tensor_basis(bvals, bvecs), RIDGE, near))
    assert torch.isfinite(predicted).all()
    assert predicted.max() <= 150


@pytest.mark.parametrize("low", [400, 1500])
def test_directions_and_anisotropy_match_dipy(low: float) -> None:
    """With more voxels than one chunk, and at high b-values."""
    from dipy.core.gradients import gradient_table
    from dipy.reconst.dti import TensorModel

    rng = np.random.default_rng(3)
    bvecs = rng.normal(size=(40, 3))
    bvecs /= np.linalg.norm(bvecs, axis=1, keepdims=True)
    bvals = np.where(np.arange(40) < 4, 0.0, rng.uniform(low, low + 900, 40))
    bvecs[:4] = 0
    frames = np.linalg.qr(rng.normal(size=(25, 3, 3)))[0]
    true_tensors = frames * np.array([1.6e-3, 5e-4, 2e-4]) @ frames.transpose(0, 2, 1)
    signal = 900 * np.exp(-bvals[:, None] * np.einsum("ni,mij,nj->nm", bvecs, true_tensors, bvecs))
    signal += rng.normal(0, 4, signal.shape)
    reference = TensorModel(gradient_table(bvals, bvecs=bvecs), fit_method="WLS").fit(signal.T)
    fa, direction = main_directions(np.tile(signal, (1, 801)), bvals, bvecs)
    for part in (slice(0, 25), slice(-25, None)):
        np.testing.assert_allclose(fa[part], reference.fa, atol=0.01)
        assert np.abs(np.einsum("mi,mi->m", direction[part], reference.evecs[:, :, 0])).min() > 0.999
