"""CSF, grey and white matter in a T1w or T2w: a Gaussian mixture with an atlas prior and smooth neighbourhoods."""

from __future__ import annotations

import numba
import numpy as np
import torch
from scipy import ndimage

from dsiprep.compiled import compiled, inlined
from dsiprep.data.grid import Volume

__all__ = ["segment_tissue"]

SMOOTHNESS = 0.4  # weight of a neighbour at 1 mm; more of it swallows sulci
# CSF, GM and WM of each Gaussian: the three, deep grey matter, and voxels of both CSF and cortex
TISSUES_OF = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0], [0.5, 0.5, 0]], np.float32)
DEEP_LEVEL = 0.5  # of the way from cortex to WM: how bright thalamus, putamen, caudate and pallidum are on average
DEEP_MM, DEEP_RAMP_MM = 22.0, 4.0  # from the brain's surface to where grey matter may be deep; width of the change
DEEP_SHARE = 0.8  # of the grey matter there
MIXED_SHARE, MIXED_VARIANCE = 0.25, 0.25  # of CSF and cortex where both may be; of the squared half distance of both
MOST_GREY = 0.25  # of the way from WM to CSF in a T2w: brighter cortex would be voxels of fluid
TRUST = 0.5  # in how much of each tissue there seems to be, against the atlas; 1 lets WM creep into cortex
PRIOR_FLOOR = 0.1  # least prior of each tissue: the atlas lies a few mm off, and must not draw the borders
POOLED = 0.5  # share of the common variance in each (all of it without an atlas): a class of mixed voxels would widen
WIDENING = 1.3  # of grey matter's Gaussian at the end: cortex is a sheet of few voxels, mixed on both its sides
LAST_ROUNDS = 4
MOST_ROUNDS = 40
TOLERANCE = 2e-4


def segment_tissue(volume: Volume, mask: Volume, priors: torch.Tensor | None = None) -> torch.Tensor:
    """Probabilities of CSF, GM and WM in a T1w or T2w without bias.

    Expectation-maximisation: one Gaussian per tissue, and with an atlas one more for deep grey matter, which is
    tied between cortex and WM lest it becomes one of them; each voxel is weighed by its six expected neighbours (mean
    field) and the atlas prior. How much of each tissue there is, against the prior, is fitted too. Where CSF is the
    brightest, as in a T2w, voxels of both CSF and cortex outshine cortex: they get a Gaussian halfway between both, and
    the atlas alone says how much there is.

    Parameters
    ----------
    volume : Volume
        T1w or T2w, bias-corrected.
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
        sizes, prepared = volume.grid.voxel_sizes, None
        if priors is not None:
            prior = np.moveaxis(np.clip(priors.detach().cpu().numpy()[(slice(None), *box)], 0, 1), 0, -1)
            prepared = _prepared(prior.astype(np.float32), inside[box], sizes)
            if _bright_fluid(image, prior * inside[box][..., None]):
                prepared = _with_mixed(prepared)
        found = _expectation_maximisation(image, inside[box], prepared, sizes)
        result[(slice(None), *box)] = np.moveaxis(found @ TISSUES_OF[: found.shape[-1]], -1, 0)
    return torch.from_numpy(result).to(volume.data.device)


def _box(inside: np.ndarray) -> tuple[slice, ...]:
    where = [np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(slice(int(w[0]), int(w[-1]) + 1) for w in where)


def _bright_fluid(image: np.ndarray, prior: np.ndarray) -> bool:
    """Whether CSF is brighter than WM where the atlas (i, j, k, 3) has them."""
    fluid, _, white = np.tensordot(image, prior, 3) / np.maximum(prior.sum((0, 1, 2)), 1e-6)
    return bool(fluid > white)


def _with_mixed(prior: np.ndarray) -> np.ndarray:
    """Priors (i, j, k, 5): voxels of both CSF and cortex take from each, most where both are likely."""
    made = prior.copy()
    mixed = MIXED_SHARE * 2 * np.sqrt(made[..., 0] * made[..., 1])
    mixed = np.minimum(mixed, 0.9 * (made[..., 0] + made[..., 1]))
    for tissue in (0, 1):
        made[..., tissue] -= np.minimum(mixed / 2, 0.95 * made[..., tissue])
    made = np.concatenate([made, mixed[..., None]], axis=-1)
    return np.asarray(made / made.sum(-1, keepdims=True), np.float32)


def _prepared(made: np.ndarray, inside: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Priors of Gaussians, (i, j, k, 4), that sum to one and never forbid; outside the atlas's tissue is CSF."""
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
    """Probability of each Gaussian, (i, j, k, 4 or 5), or (i, j, k, 3) without a prior."""
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
    model[1, [1, 3]] *= WIDENING**2
    for _ in range(LAST_ROUNDS):
        now, _, _ = _round(image, inside, given, now, model, bonds)
    return now


def _fitted(
    image: np.ndarray, inside: np.ndarray, prior: np.ndarray, now: np.ndarray, bonds: np.ndarray, atlas: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and the model: means, variances and shares of the Gaussians, (3, 3 to 5)."""
    count = now.shape[-1]
    share, (pooled, trust) = np.ones(count), (POOLED, TRUST) if count == 4 else (1.0, 0.0)
    own = slice(0, min(count, 4))
    means, variances = _gaussians(image, now, inside)
    for _ in range(MOST_ROUNDS):
        if atlas:
            if count > 4:
                means[1] = min(means[1], means[2] + MOST_GREY * (means[0] - means[2]))
                means[4] = (means[0] + means[1]) / 2
                variances[4] = (variances[0] + variances[1]) / 2 + MIXED_VARIANCE * ((means[0] - means[1]) / 2) ** 2
            means[3], variances[3] = means[1] + DEEP_LEVEL * (means[2] - means[1]), variances[1]
        model = np.stack([means, variances, share])
        now, sums, change = _round(image, inside, prior, now, model, bonds)
        total = np.maximum(sums[:, 0], 1e-6)
        means = sums[:, 1] / total
        variances = np.maximum(sums[:, 2] / total - means**2, 1e-4)
        together = total[own] @ variances[own] / total[own].sum()
        variances = pooled * together + (1 - pooled) * variances
        share = (total / np.maximum(sums[:, 3], 1e-6)) ** trust if atlas else total / total.sum()
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


@compiled(parallel=True)
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


@inlined
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
