"""Volumes that saw the same gradient under different phase encodings, and how they become one."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["AT_MOST", "ENOUGH", "LOW_B", "combine", "low_b_pairs", "merged_gradients", "same_gradients"]

SAME_B = 50.0  # s/mm², or 2 %, whichever is more
SAME_DIRECTION = 1.5  # degrees; antipodes are the same
LOW_B = 1300.0  # s/mm²: above, too much of a magnitude image is noise, which no Jacobian scales
ENOUGH, AT_MOST = 12, 32  # pairs


def same_gradients(bvals: np.ndarray, bvecs: np.ndarray, group: np.ndarray, is_b0: np.ndarray) -> list[tuple[int, ...]]:
    """Volumes to be made one: of each group at most one.

    Parameters
    ----------
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors as asked of the scanner, world RAS+.
    group : ndarray, (n,), int
        Phase encoding of each volume.
    is_b0 : ndarray, (n,), bool
        b=0 volumes go together in the order in which they come.

    Returns
    -------
    list of tuple of int
        All volumes once, in order of the first of each tuple; one that has no partner stands alone.
    """
    left = np.ones(len(bvals), bool)
    cosine = np.abs(bvecs @ bvecs.T)
    near = np.abs(bvals[:, None] - bvals) <= np.maximum(SAME_B, 0.02 * bvals[:, None])
    alike = (near & (cosine >= np.cos(np.deg2rad(SAME_DIRECTION))) & ~is_b0 & ~is_b0[:, None]) | (
        is_b0 & is_b0[:, None]
    )
    found = []
    for v in range(len(bvals)):
        if not left[v]:
            continue
        together = [v]
        for other in np.unique(group[group != group[v]]):
            fits = np.flatnonzero(left & alike[v] & (group == other))
            if len(fits):  # the nearest in direction; the first b=0
                together.append(int(fits[0 if is_b0[v] else np.argmax(cosine[v, fits])]))
        left[together] = False
        found.append(tuple(together))
    return found


def low_b_pairs(bvals: np.ndarray, bvecs: np.ndarray, group: np.ndarray, is_b0: np.ndarray) -> list[tuple[int, int]]:
    """Diffusion-weighted volumes of low b that groups 0 and 1 have in common.

    Parameters
    ----------
    bvals, bvecs, group, is_b0
        As of `same_gradients`.

    Returns
    -------
    list of (int, int)
        A volume of group 0 and its partner of group 1, from the lowest b, not above `LOW_B`; at most `AT_MOST`, and
        none where there are fewer than `ENOUGH`: the mean of a few depends on how the head lay to their gradients.
    """
    found = [
        (pair[0], pair[1]) if group[pair[0]] == 0 else (pair[1], pair[0])
        for pair in same_gradients(bvals, bvecs, group, is_b0)
        if len(pair) == 2 and not is_b0[pair[0]] and max(bvals[list(pair)]) <= LOW_B
    ]
    found.sort(key=lambda pair: float(bvals[pair[0]]))
    return found[:AT_MOST] if len(found) >= ENOUGH else []


def merged_gradients(
    bvals: np.ndarray, bvecs: np.ndarray, groups: list[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean b-value and mean axis of each group of volumes, (m,) and (m, 3); a zero vector stays zero."""
    values = np.array([bvals[list(g)].mean() for g in groups])
    axes = np.zeros((len(groups), 3))
    for row, members in enumerate(groups):
        vectors = bvecs[list(members)]
        total = (vectors * np.where(vectors @ vectors[0] < 0, -1.0, 1.0)[:, None]).sum(0)
        length = np.linalg.norm(total)
        axes[row] = total / length if length > 0 else 0.0
    return values, axes


def combine(
    data: torch.Tensor, groups: list[tuple[int, ...]], weights: dict[int, torch.Tensor] | None, kind: np.ndarray
) -> torch.Tensor:
    """Weighted means of groups of volumes, in the memory of `data`.

    Parameters
    ----------
    data : Tensor, (n, i, j, k)
        Is written over.
    groups : list of tuple of int
        From `same_gradients`: no group comes later than any of its volumes stands, so nothing is read too late.
    weights : dict of Tensor, (i, j, k), or None
        By kind; all the same by default.
    kind : ndarray, (n,), int

    Returns
    -------
    Tensor, (m, i, j, k)
        The first m volumes of `data`.
    """
    for row, members in enumerate(groups):
        if len(members) == 1:
            merged = data[members[0]]
        elif weights is None:
            merged = data[list(members)].mean(0)
        else:
            shares = [weights[int(kind[v])] for v in members]
            total = torch.stack([w * data[v] for w, v in zip(shares, members, strict=True)]).sum(0)
            merged = total / torch.stack(shares).sum(0)
        data[row] = merged
    return data[: len(groups)]
