"""Patch2Self compared with DIPY's."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.ops.intensity.patch2self import patch2self


def noisy_series(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mixture of three components in 40 volumes of which 8 have no diffusion weighting, with noise: data, truth, b."""
    rng = np.random.default_rng(seed)
    bvals = np.r_[np.zeros(8), rng.uniform(500, 3000, 32)]
    mixture = rng.gamma(2, 50, (40, 3)) * np.where(bvals[:, None] == 0, 3, 1)
    truth = np.einsum("nc,cm->nm", mixture, rng.uniform(0.2, 1, (3, 10 * 11 * 12))).reshape(40, 10, 11, 12)
    return (truth + rng.normal(scale=15, size=truth.shape)).astype(np.float32), truth, bvals


def test_agrees_with_dipy() -> None:
    from dipy.denoise.patch2self import patch2self as dipy_patch2self

    """On volumes without their mean: DIPY's regression loses it, as it centres its input in place."""
    data, truth, bvals = noisy_series()
    mean = data.mean((1, 2, 3), keepdims=True)
    data, truth = data - mean, truth - mean
    theirs = dipy_patch2self(
        np.moveaxis(data, 0, -1), bvals, model="ols", b0_threshold=50, shift_intensity=False,
        clip_negative_vals=False, b0_denoising=True, version=1,
    )  # fmt: skip
    mask = torch.ones(data.shape[1:])
    ours = patch2self(torch.from_numpy(data), mask, bvals <= 50).numpy()
    difference = np.abs(np.moveaxis(theirs, -1, 0) - ours)
    assert difference.max() < 1e-3 * np.abs(truth).max()
    assert ((ours - truth) ** 2).mean() < 0.5 * ((data - truth) ** 2).mean()


def test_single_volumes_and_few_voxels() -> None:
    data, _, bvals = noisy_series()
    is_b0 = np.arange(len(bvals)) == 0
    mask = torch.zeros(data.shape[1:])
    mask[:2, :2, :2] = 1
    found = patch2self(torch.from_numpy(data), mask, is_b0)
    assert torch.equal(found[0], torch.from_numpy(data[0]))
    assert bool(found.isfinite().all())
