"""CSF, grey and white matter in a T1w: a Gaussian mixture with an atlas prior and smooth neighbourhoods."""

from __future__ import annotations

import numba
import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Volume

__all__ = ["segment_tissue"]

SMOOTHNESS = 0.4  # weight of a neighbour at 1 mm; more of it swallows sulci
TISSUE_OF = (0, 1, 2, 1)  # CSF, GM, WM, and deep grey matter
DEEP_LEVEL = 0.5  # of the way from cortex to WM: how bright thalamus, putamen, caudate and pallidum are on average
DEEP_MM, DEEP_RAMP_MM = 22.0, 4.0  # from the brain's surface to where grey matter may be deep; width of the change
DEEP_SHARE = 0.8  # of the grey matter there
TRUST = 0.5  # in how much of each tissue there seems to be, against the atlas; 1 lets WM creep into cortex
PRIOR_FLOOR = 0.1  # least prior of each tissue: the atlas lies a few mm off, and must not draw the borders
POOLED = 0.5  # share of the common variance in each (all of it without an atlas): a class of mixed voxels would widen
WIDENING = 1.3  # of grey matter's Gaussian at the end: cortex is a sheet of few voxels, mixed on both its sides
LAST_ROUNDS = 4
MOST_ROUNDS = 40
TOLERANCE = 2e-4


def segment_tissue(volume: Volume, mask: Volume, priors: torch.Tensor | None = None) -> torch.Tensor:
    """Probabilities of CSF, GM and WM in a T1w without bias.

    Expectation-maximisation: one Gaussian per tissue, and with an atlas one more for deep grey matter, which is
    tied between cortex and WM lest it becomes one of them; each voxel is weighed by its six expected neighbours (mean
    field) and the atlas prior. How much of each tissue there is, against the prior, is fitted too.

    Parameters
    ----------
    volume : Volume
        T1w, bias-corrected.
    mask : Volume
        Brain (above 0.5).
    priors : Tensor, (3, i, j, k), optional
        Prior probabilities of CSF, GM, WM on the same grid; without them brightness alone decides.

    Returns
    -------
    Tensor, (3, i, j, k), float32
        Sums to 1 in the mask, 0 outside.

    References
    ----------
    Zhang et al. 2001, doi 10.1109/42.906424; Ashburner & Friston 2005, doi 10.1016/j.neuroimage.2005.02.018.
    """
    inside = mask.numpy() > 0.5
    result = np.zeros((3, *inside.shape), np.float32)
    if inside.sum() >= 3:
        box = _box(inside)
        image = np.nan_to_num(volume.numpy()[box].astype(np.float32))
        prior = None if priors is None else priors.detach().cpu().numpy()[(slice(None), *box)]
        sizes = volume.grid.voxel_sizes
        found = _expectation_maximisation(image, inside[box], _prepared(prior, inside[box], sizes), sizes)
        merged = np.zeros((3, *image.shape), np.float32)
        for number in range(found.shape[-1]):
            merged[TISSUE_OF[number]] += found[..., number]
        result[(slice(None), *box)] = merged
    return torch.from_numpy(result).to(volume.data.device)


def _box(inside: np.ndarray) -> tuple[slice, ...]:
    where = [np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(slice(int(w[0]), int(w[-1]) + 1) for w in where)


def _prepared(prior: np.ndarray | None, inside: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
    """Priors of all Gaussians, (i, j, k, 4), that sum to one and never forbid; outside the atlas's tissue is CSF."""
    if prior is None:
        return None
    made = np.moveaxis(np.clip(prior, 0, 1), 0, -1).astype(np.float32)
    made[..., 0] += np.clip(1 - made.sum(-1), 0, 1)
    made /= made.sum(-1, keepdims=True)
    made = (1 - 3 * PRIOR_FLOOR) * made + PRIOR_FLOOR
    depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=sizes)[1:-1, 1:-1, 1:-1]
    deep = DEEP_SHARE * made[..., 1] / (1 + np.exp((DEEP_MM - depth) / DEEP_RAMP_MM)).astype(np.float32)
    made[..., 1] -= deep
    return np.concatenate([made, deep[..., None]], axis=-1)


def _expectation_maximisation(
    image: np.ndarray, inside: np.ndarray, prior: np.ndarray | None, sizes: np.ndarray
) -> np.ndarray:
    """Probability of each Gaussian, (i, j, k, 4), or (i, j, k, 3) without a prior."""
    image = image / max(float(np.percentile(image[inside], 95)), 1e-12)
    bonds = (SMOOTHNESS / sizes).astype(np.float32)
    if prior is None:
        now = _by_brightness(image, inside)
        given = np.full(now.shape, 1 / 3, np.float32)
    else:
        now, given = prior * inside[..., None], prior
    now, model = _fitted(image, inside, given, now, bonds, atlas=prior is not None)
    if prior is None:
        return now
    model[1, 1::2] *= WIDENING**2
    for _ in range(LAST_ROUNDS):
        now, _, _ = _round(image, inside, given, now, model, bonds)
    return now


def _fitted(
    image: np.ndarray, inside: np.ndarray, prior: np.ndarray, now: np.ndarray, bonds: np.ndarray, atlas: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and the model: means, variances and shares of the Gaussians, (3, 4) or (3, 3)."""
    share, pooled = np.ones(now.shape[-1]), POOLED if atlas else 1.0
    means, variances = _gaussians(image, now, inside)
    for _ in range(MOST_ROUNDS):
        if atlas:
            means[3], variances[3] = means[1] + DEEP_LEVEL * (means[2] - means[1]), variances[1]
        model = np.stack([means, variances, share])
        now, sums, change = _round(image, inside, prior, now, model, bonds)
        total = np.maximum(sums[:, 0], 1e-6)
        means = sums[:, 1] / total
        variances = np.maximum(sums[:, 2] / total - means**2, 1e-4)
        variances = pooled * (total @ variances / total.sum()) + (1 - pooled) * variances
        share = (total / np.maximum(sums[:, 3], 1e-6)) ** TRUST if atlas else total / total.sum()
        if change < TOLERANCE:
            break
    return now, model


def _by_brightness(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """First probabilities from 3-means of the brightness, (i, j, k, 3)."""
    values = image[inside]
    centres = np.percentile(values, (10, 45, 85))
    for _ in range(50):
        nearest = np.abs(values[:, None] - centres).argmin(1)
        moved = np.array([values[nearest == c].mean() if (nearest == c).any() else centres[c] for c in range(3)])
        if np.allclose(moved, centres, atol=1e-5):
            break
        centres = moved
    start = np.zeros((*image.shape, 3), np.float32)
    start[inside] = np.eye(3, dtype=np.float32)[nearest]
    return start


def _gaussians(image: np.ndarray, weights: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    w, x = weights[inside].astype(float), image[inside].astype(float)
    total = np.maximum(w.sum(0), 1e-6)
    means = w.T @ x / total
    return means, np.maximum(w.T @ x**2 / total - means**2, 1e-4)


@numba.njit(parallel=True, fastmath=True, cache=True)
def _round(
    image: np.ndarray,
    inside: np.ndarray,
    prior: np.ndarray,
    before: np.ndarray,
    model: np.ndarray,
    bonds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, float]:
    """New probabilities from the old ones; per tissue the sums of w, w x, w x^2 and of prior; mean change."""
    ni, nj, nk, count = before.shape
    after = np.zeros_like(before)
    by_slab = np.zeros((ni, count, 4))
    changed = np.zeros(ni)
    voxels = np.zeros(ni)
    for i in numba.prange(ni):
        p = np.zeros(count)
        for j in range(nj):
            for k in range(nk):
                if not inside[i, j, k]:
                    continue
                x = image[i, j, k]
                mixed = 0.0
                for c in range(count):
                    mixed += prior[i, j, k, c] * model[2, c]
                    p[c] = _neighbours(before, i, j, k, c, bonds) + np.log(prior[i, j, k, c] * model[2, c])
                    p[c] -= 0.5 * ((x - model[0, c]) ** 2 / model[1, c] + np.log(model[1, c]))
                largest = p.max()
                for c in range(count):
                    p[c] = np.exp(p[c] - largest)
                total = p.sum()
                voxels[i] += 1
                for c in range(count):
                    w = p[c] / total
                    changed[i] += abs(w - before[i, j, k, c]) / count
                    after[i, j, k, c] = w
                    by_slab[i, c, 0] += w
                    by_slab[i, c, 1] += w * x
                    by_slab[i, c, 2] += w * x * x
                    by_slab[i, c, 3] += prior[i, j, k, c] / mixed
    return after, by_slab.sum(0), changed.sum() / max(voxels.sum(), 1.0)


@numba.njit(inline="always", fastmath=True)
def _neighbours(p: np.ndarray, i: int, j: int, k: int, c: int, bonds: np.ndarray) -> float:
    """Probability of tissue `c` in the six neighbours, weighted by their bonds; nothing beyond the edges."""
    ni, nj, nk, _ = p.shape
    total = 0.0
    if i > 0:
        total += bonds[0] * p[i - 1, j, k, c]
    if i < ni - 1:
        total += bonds[0] * p[i + 1, j, k, c]
    if j > 0:
        total += bonds[1] * p[i, j - 1, k, c]
    if j < nj - 1:
        total += bonds[1] * p[i, j + 1, k, c]
    if k > 0:
        total += bonds[2] * p[i, j, k - 1, c]
    if k < nk - 1:
        total += bonds[2] * p[i, j, k + 1, c]
    return total
