"""Matching and averaging of volumes with the same gradient but different phase encoding."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["LOW_B", "MAX_PAIRS", "MIN_PAIRS", "combine", "low_b_pairs", "merged_gradients", "same_gradients"]

SAME_B = 50.0  # s/mm², or 2 %, whichever is larger
SAME_DIRECTION = 1.5  # degrees; antipodes are the same direction
LOW_B = 1300.0  # s/mm²: at higher b, magnitude images are mostly noise, which does not scale with the Jacobian
MIN_PAIRS, MAX_PAIRS = 12, 32


def same_gradients(bvals: np.ndarray, bvecs: np.ndarray, group: np.ndarray, is_b0: np.ndarray) -> list[tuple[int, ...]]:
    """Group matching volumes, with at most one of each phase encoding.

    Parameters
    ----------
    bvals : ndarray, (n,)
        s/mm².
    bvecs : ndarray, (n, 3)
        Unit vectors as prescribed on the scanner, world RAS+.
    group : ndarray, (n,), int
        Index of the phase encoding of each volume.
    is_b0 : ndarray, (n,), bool
        b=0 volumes are matched in order of acquisition.

    Returns
    -------
    list of tuple of int
        Each volume once, in order of the first of each tuple; a volume without a partner forms its own tuple.
    """
    unassigned = np.ones(len(bvals), bool)
    cosine = np.abs(bvecs @ bvecs.T)
    same_b = np.abs(bvals[:, None] - bvals) <= np.maximum(SAME_B, 0.02 * bvals[:, None])
    matches = (same_b & (cosine >= np.cos(np.deg2rad(SAME_DIRECTION))) & ~is_b0 & ~is_b0[:, None]) | (
        is_b0 & is_b0[:, None]
    )
    groups = []
    for v in range(len(bvals)):
        if not unassigned[v]:
            continue
        members = [v]
        for other in np.unique(group[group != group[v]]):
            partners = np.flatnonzero(unassigned & matches[v] & (group == other))
            if len(partners):  # the closest direction, or the first b=0
                members.append(int(partners[0 if is_b0[v] else np.argmax(cosine[v, partners])]))
        unassigned[members] = False
        groups.append(tuple(members))
    return groups


def low_b_pairs(bvals: np.ndarray, bvecs: np.ndarray, group: np.ndarray, is_b0: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of low-b diffusion-weighted volumes with the same gradient in groups 0 and 1.

    Parameters
    ----------
    bvals, bvecs, group, is_b0
        As in `same_gradients`.

    Returns
    -------
    list of (int, int)
        A volume of group 0 and its partner in group 1, sorted by b, up to `LOW_B`. At most `MAX_PAIRS`, and none if
        there are fewer than `MIN_PAIRS`: a mean over few directions depends on the orientation of the head.
    """
    pairs = [
        (pair[0], pair[1]) if group[pair[0]] == 0 else (pair[1], pair[0])
        for pair in same_gradients(bvals, bvecs, group, is_b0)
        if len(pair) == 2 and not is_b0[pair[0]] and max(bvals[list(pair)]) <= LOW_B
    ]
    pairs.sort(key=lambda pair: float(bvals[pair[0]]))
    return pairs[:MAX_PAIRS] if len(pairs) >= MIN_PAIRS else []


def merged_gradients(
    bvals: np.ndarray, bvecs: np.ndarray, groups: list[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean b-value (m,) and mean axis (m, 3) of each group of volumes; zero vectors stay zero."""
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
    """Average groups of volumes in place, optionally with weights.

    Parameters
    ----------
    data : Tensor, (n, i, j, k)
        Overwritten.
    groups : list of tuple of int
        From `same_gradients`: a group's index never exceeds those of its volumes, so none is overwritten before use.
    weights : dict of Tensor, (i, j, k), or None
        Weight map of each kind; equal weights if None.
    kind : ndarray, (n,), int
        Kind of each volume, a key of `weights`.

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
            maps = [weights[int(kind[v])] for v in members]
            total = torch.stack([w * data[v] for w, v in zip(maps, members, strict=True)]).sum(0)
            merged = total / torch.stack(maps).sum(0)
        data[row] = merged
    return data[: len(groups)]
