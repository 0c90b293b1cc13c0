"""Segmentation of CSF, grey and white matter: a Gaussian mixture with an atlas prior and a Markov random field."""

from __future__ import annotations

import numba
import numpy as np
import torch
from scipy import ndimage

from dsiprep.compiled import compiled, inlined
from dsiprep.data.grid import Volume

__all__ = ["segment_tissue"]

SMOOTHNESS = 0.4  # weight of a neighbour at 1 mm; larger values close sulci
# Fractions of CSF, GM and WM in each class: these three, deep grey matter, and partial volume of CSF and cortex
TISSUE_FRACTIONS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0], [0.5, 0.5, 0]], np.float32)
DEEP_LEVEL = 0.5  # of the way from cortex to WM: mean intensity of thalamus, putamen, caudate and pallidum
DEEP_MM, DEEP_RAMP_MM = 22.0, 4.0  # depth below the brain surface from which grey matter may be deep; width of the ramp
DEEP_FRACTION = 0.8  # of the grey matter there
MIXED_FRACTION = 0.25  # of CSF and cortex where both are likely
MIXED_VARIANCE = 0.25  # of the squared half distance of their means
MAX_GREY = 0.25  # of the way from WM to CSF in a T2w: brighter "cortex" would be CSF
PROPORTION_WEIGHT = 0.5  # of the estimated tissue proportions against the atlas; 1 lets WM grow into cortex
PRIOR_FLOOR = 0.1  # least prior of each tissue: the atlas is a few mm off and must not determine the borders
POOLED = 0.5  # weight of the common variance (1 without an atlas); else a class of mixed voxels would widen
GREY_WIDENING = 1.3  # of the grey-matter Gaussian at the end: thin cortex has partial volume on both sides
FINAL_ITERATIONS = 4
MAX_ITERATIONS = 40
TOLERANCE = 2e-4


def segment_tissue(volume: Volume, mask: Volume, priors: torch.Tensor | None = None) -> torch.Tensor:
    """Segment a bias-corrected T1w or T2w image into probabilities of CSF, GM and WM.

    Expectation-maximisation with one Gaussian per tissue. With an atlas there is one more for deep grey matter, tied
    between cortex and WM so that it does not merge with either. Each voxel is weighted by the expected labels of its
    six neighbours (mean field) and the atlas prior. The proportions of the tissues relative to the prior are estimated,
    too. If CSF is brightest, as in a T2w, voxels of CSF and cortex are brighter than cortex: they have their own
    Gaussian halfway between the two, and the atlas alone determines the proportions.

    Parameters
    ----------
    volume : Volume
        T1w or T2w, bias-corrected.
    mask : Volume
        Brain mask (above 0.5).
    priors : Tensor, (3, i, j, k), optional
        Prior probabilities of CSF, GM, WM on the same grid; without them, intensity alone decides.

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
        sizes, class_prior = volume.grid.voxel_sizes, None
        if priors is not None:
            prior = np.moveaxis(np.clip(priors.detach().cpu().numpy()[(slice(None), *box)], 0, 1), 0, -1)
            class_prior = _class_prior(prior.astype(np.float32), inside[box], sizes)
            if _csf_is_bright(image, prior * inside[box][..., None]):
                class_prior = _with_mixed_class(class_prior)
        classes = _expectation_maximisation(image, inside[box], class_prior, sizes)
        result[(slice(None), *box)] = np.moveaxis(classes @ TISSUE_FRACTIONS[: classes.shape[-1]], -1, 0)
    return torch.from_numpy(result).to(volume.data.device)


def _box(inside: np.ndarray) -> tuple[slice, ...]:
    """Bounding box of a mask."""
    occupied = [np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return tuple(slice(int(index[0]), int(index[-1]) + 1) for index in occupied)


def _csf_is_bright(image: np.ndarray, prior: np.ndarray) -> bool:
    """Whether CSF is brighter than WM, their means weighted by the atlas (i, j, k, 3)."""
    csf, _, white = np.tensordot(image, prior, 3) / np.maximum(prior.sum((0, 1, 2)), 1e-6)
    return bool(csf > white)


def _with_mixed_class(prior: np.ndarray) -> np.ndarray:
    """Priors (i, j, k, 5) with a class of mixed CSF and cortex, taken from both, most where both are likely."""
    result = prior.copy()
    mixed = MIXED_FRACTION * 2 * np.sqrt(result[..., 0] * result[..., 1])
    mixed = np.minimum(mixed, 0.9 * (result[..., 0] + result[..., 1]))
    for tissue in (0, 1):
        result[..., tissue] -= np.minimum(mixed / 2, 0.95 * result[..., tissue])
    result = np.concatenate([result, mixed[..., None]], axis=-1)
    return np.asarray(result / result.sum(-1, keepdims=True), np.float32)


def _class_prior(prior: np.ndarray, inside: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Priors of the classes, (i, j, k, 4), positive, summing to 1, with CSF outside the tissue of the atlas.

    `prior` (i, j, k, 3) is overwritten.
    """
    prior[..., 0] += np.clip(1 - prior.sum(-1), 0, 1)
    prior /= prior.sum(-1, keepdims=True)
    prior = (1 - 3 * PRIOR_FLOOR) * prior + PRIOR_FLOOR
    depth = ndimage.distance_transform_edt(np.pad(inside, 1), sampling=sizes)[1:-1, 1:-1, 1:-1]
    deep = DEEP_FRACTION * prior[..., 1] / (1 + np.exp((DEEP_MM - depth) / DEEP_RAMP_MM)).astype(np.float32)
    prior[..., 1] -= deep
    return np.concatenate([prior, deep[..., None]], axis=-1)


def _expectation_maximisation(
    image: np.ndarray, inside: np.ndarray, prior: np.ndarray | None, sizes: np.ndarray
) -> np.ndarray:
    """Probability of each class, (i, j, k, 4 or 5), or (i, j, k, 3) without a prior."""
    image = image / max(float(np.percentile(image[inside], 95)), 1e-12)
    inside = np.ascontiguousarray(inside)  # and all arrays below, so that one kernel serves them all
    coupling = (SMOOTHNESS / sizes).astype(np.float32)
    if prior is None:
        posterior = _initial_by_intensity(image, inside)
        fixed_prior = np.full(posterior.shape, 1 / 3, np.float32)
    else:
        fixed_prior = np.ascontiguousarray(prior)
        posterior = fixed_prior * inside[..., None]
    posterior, model = _fitted(image, inside, fixed_prior, posterior, coupling, atlas=prior is not None)
    if prior is None:
        return posterior
    model[1, [1, 3]] *= GREY_WIDENING**2
    for _ in range(FINAL_ITERATIONS):
        posterior, _, _ = _update_loop(image, inside, fixed_prior, posterior, model, coupling)
    return posterior


def _fitted(
    image: np.ndarray,
    inside: np.ndarray,
    prior: np.ndarray,
    posterior: np.ndarray,
    coupling: np.ndarray,
    atlas: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities, and the model: means, variances and proportions of the classes, (3, 3 to 5)."""
    count = posterior.shape[-1]
    proportion, (pooled, exponent) = np.ones(count), (POOLED, PROPORTION_WEIGHT) if count == 4 else (1.0, 0.0)
    unmixed = slice(0, min(count, 4))
    means, variances = _weighted_moments(image, posterior, inside)
    model = np.empty((3, count))
    for _ in range(MAX_ITERATIONS):
        if atlas:
            if count > 4:
                means[1] = min(means[1], means[2] + MAX_GREY * (means[0] - means[2]))
                means[4] = (means[0] + means[1]) / 2
                variances[4] = (variances[0] + variances[1]) / 2 + MIXED_VARIANCE * ((means[0] - means[1]) / 2) ** 2
            means[3], variances[3] = means[1] + DEEP_LEVEL * (means[2] - means[1]), variances[1]
        model[:] = means, variances, proportion
        posterior, by_slab, change = _update_loop(image, inside, prior, posterior, model, coupling)
        sums = by_slab.sum(0)
        total = np.maximum(sums[:, 0], 1e-6)
        means = sums[:, 1] / total
        variances = np.maximum(sums[:, 2] / total - means**2, 1e-4)
        common = total[unmixed] @ variances[unmixed] / total[unmixed].sum()
        variances = pooled * common + (1 - pooled) * variances
        proportion = (total / np.maximum(sums[:, 3], 1e-6)) ** exponent if atlas else total / total.sum()
        if change < TOLERANCE:
            break
    return posterior, model


def _initial_by_intensity(image: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Initial probabilities (i, j, k, 3) from 3-means clustering of the intensities."""
    values = image[inside]
    centres, nearest = np.percentile(values, (10, 45, 85)), np.zeros(len(values), int)
    for _ in range(50):
        nearest = np.abs(values[:, None] - centres).argmin(1)
        updated = np.array([values[nearest == c].mean() if (nearest == c).any() else centres[c] for c in range(3)])
        if np.allclose(updated, centres, atol=1e-5):
            break
        centres = updated
    result = np.zeros((*image.shape, 3), np.float32)
    result[inside] = np.eye(3, dtype=np.float32)[nearest]
    return result


def _weighted_moments(image: np.ndarray, weights: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of the classes from probabilities `weights`."""
    w, x = weights[inside].astype(float), image[inside].astype(float)
    total = np.maximum(w.sum(0), 1e-6)
    means = w.T @ x / total
    return means, np.maximum(w.T @ x**2 / total - means**2, 1e-4)


@compiled(parallel=True)
def _update_loop(
    image: np.ndarray,
    inside: np.ndarray,
    prior: np.ndarray,
    before: np.ndarray,
    model: np.ndarray,
    coupling: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Updated probabilities w; per plane and class sums of w, w x, w x² and normalised prior; mean absolute change."""
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
                normaliser = 0.0
                for c in range(count):
                    normaliser += prior[i, j, k, c] * model[2, c]
                    p[c] = _neighbour_field(before, i, j, k, c, coupling) + np.log(prior[i, j, k, c] * model[2, c])
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
                    by_slab[i, c, 3] += prior[i, j, k, c] / normaliser
    return after, by_slab, changed.sum() / max(voxels.sum(), 1.0)


@inlined
def _neighbour_field(p: np.ndarray, i: int, j: int, k: int, c: int, coupling: np.ndarray) -> float:
    """Sum of the probability of class `c` over the six neighbours, weighted by the coupling; zero beyond the edges."""
    ni, nj, nk, _ = p.shape
    total = 0.0
    if i > 0:
        total += coupling[0] * p[i - 1, j, k, c]
    if i < ni - 1:
        total += coupling[0] * p[i + 1, j, k, c]
    if j > 0:
        total += coupling[1] * p[i, j - 1, k, c]
    if j < nj - 1:
        total += coupling[1] * p[i, j + 1, k, c]
    if k > 0:
        total += coupling[2] * p[i, j, k - 1, c]
    if k < nk - 1:
        total += coupling[2] * p[i, j, k + 1, c]
    return total
