"""What a b-table is, told from the table alone: shells, a Cartesian lattice (DSI), part of one, or other.

On a lattice every q-vector, sqrt(b) times the b-vector, is a whole-number combination of three orthogonal
steps of one length. The lattice may be turned against the world (an oblique field of view), so the turn is
searched too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
from scipy.spatial import cKDTree

from dsiprep.data.acquisition import SamplingScheme

MAX_RADIUS = 10.5  # in steps; protocols in use have 3 to 10
MIN_RADIUS = 1.9
MIN_RINGS = 4
MIN_POINTS = 12
LATTICE_RMS = 0.2  # in steps; points anywhere would have 0.5
FULL = 0.95
SAME_B = 75.0  # s/mm²
SAME_Q = 0.02  # of the largest q


def recognise(bvals: np.ndarray, bvecs: np.ndarray, b0_threshold: float = 100.0) -> SamplingScheme:
    """Name the sampling scheme of a b-table.

    Parameters
    ----------
    bvals : ndarray, (n,)
        s/mm²; as scanners round and scale them.
    bvecs : ndarray, (n, 3)
        Unit vectors, any frame.
    b0_threshold : float
        b-values at or below this (s/mm²) count as b=0.

    Returns
    -------
    SamplingScheme
        Repeated samples count once.

    References
    ----------
    Wedeen et al. 2005, doi 10.1002/mrm.20642 (DSI's lattice).
    """
    bvals, bvecs = np.asarray(bvals, float), np.asarray(bvecs, float)
    weighted = bvals > b0_threshold
    n_b0 = int((~weighted).sum())
    if not weighted.any():
        return SamplingScheme("b0-only", False, (), 0, n_b0, 0.0, f"b=0 only, {_count(n_b0, 'volume')}")
    b = bvals[weighted]
    q = np.sqrt(b)[:, None] * bvecs[weighted]
    lattice = lattice_points(q)
    if lattice is not None:
        return _describe_lattice(lattice, b, n_b0)
    return _describe_shells(b, q, n_b0)


def lattice_points(q: np.ndarray) -> np.ndarray | None:
    """The whole-number coordinates of q-vectors (n, 3), (n, 3) int, or None if they lie on no lattice.

    Among lattices that fit, the coarsest is taken.
    """
    distinct = q[_distinct(q)]
    if len(distinct) < MIN_POINTS or np.linalg.matrix_rank(distinct, tol=0.05 * np.abs(distinct).max()) < 3:
        return None
    for axes in _candidates(distinct):
        axes = _refined(distinct, axes)
        points = q @ axes
        if _fits(points) and len(_rings(points)) >= MIN_RINGS:
            return np.round(points).astype(int)
    return None


def _fits(points: np.ndarray) -> bool:
    """Whether coordinates in steps are near whole numbers, none zero, within a radius that is in use."""
    whole = np.round(points)
    radius = np.sqrt((whole**2).sum(1))
    if radius.min() < 0.5 or not MIN_RADIUS <= radius.max() <= MAX_RADIUS:
        return False
    off = np.sqrt(((points - whole) ** 2).sum(1))
    return bool(np.sqrt((off**2).mean()) < LATTICE_RMS and np.quantile(off, 0.9) < 1.6 * LATTICE_RMS)


def _candidates(q: np.ndarray) -> Iterator[np.ndarray]:
    """Matrices (3, 3) that take q to lattice coordinates: coarse before fine, aligned before turned."""
    steps = _steps(q)
    for step in steps:
        yield np.eye(3) / step
    norms = np.linalg.norm(q, axis=1)
    for step in steps:
        # whatever the turn, a lattice has many lengths, and shells have few
        if len(np.unique(np.round((norms / step) ** 2))) >= MIN_RINGS:
            yield from (turn / step for turn in _turns(q / step))


def _steps(q: np.ndarray) -> np.ndarray:
    """Lengths of a step, from long to short, of which the shortest vectors can be a lattice point."""
    norms = np.sort(np.linalg.norm(q, axis=1))
    shortest = norms[norms < 1.1 * norms[0]].mean()
    steps = shortest / np.sqrt([1, 2, 3, 4, 5, 6, 8, 9])
    steps = (steps[:, None] * np.array([1.015, 1.0, 0.985])).ravel()
    radius = norms[-1] / steps
    return steps[(radius > MIN_RADIUS) & (radius < MAX_RADIUS)]


def _turns(points: np.ndarray, pairs: int = 8) -> Iterator[np.ndarray]:
    """Rotations (3, 3) that put two short vectors onto lattice points, and most others near some."""
    norms = np.linalg.norm(points, axis=1)
    order = np.argsort(norms)
    short = points[order[: max(MIN_POINTS, len(points) // 3)]]
    tried = 0
    for first, second in ((a, b) for s, b in enumerate(order) for a in order[:s]):
        u, v = points[first], points[second]
        if abs(u @ v) > 0.9 * norms[first] * norms[second]:
            continue
        tried += 1
        if tried > pairs:
            return
        found = np.array(list(_frames_of(u, v))).reshape(-1, 3, 3)
        turned = short @ found
        off = np.linalg.norm(turned - np.round(turned), axis=-1)
        yield from found[(off < 1.6 * LATTICE_RMS).mean(1) > 0.75]


def _frames_of(u: np.ndarray, v: np.ndarray) -> Iterator[np.ndarray]:
    norm_u, norm_v = float(np.linalg.norm(u)), float(np.linalg.norm(v))
    ends = _points_of(norm_v, folded=False)
    for start in _points_of(norm_u, folded=True):
        angles = ends @ start / (np.linalg.norm(ends, axis=1) * np.linalg.norm(start))
        for end in ends[np.abs(angles - u @ v / (norm_u * norm_v)) < 0.06]:
            yield _frame(u, v) @ _frame(start, end).T
            yield _frame(u, v) * np.array([1, 1, -1]) @ _frame(start, end).T  # mirrored: a lattice too


def _points_of(norm: float, folded: bool) -> np.ndarray:
    """Lattice points of about that length; folded: up to order and signs of the coordinates."""
    reach = int(np.ceil(norm)) + 1
    grid = np.array(list(product(range(reach + 1) if folded else range(-reach, reach + 1), repeat=3)), float)
    length = np.linalg.norm(grid, axis=1)
    keep = (np.abs(length**2 - round(norm**2)) < 0.5) & (length > 0)
    if folded:
        keep &= (grid[:, 0] >= grid[:, 1]) & (grid[:, 1] >= grid[:, 2])
    return grid[keep]


def _frame(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Orthonormal columns: along u, in the plane of u and v, and across."""
    first = u / np.linalg.norm(u)
    third = np.cross(u, v)
    third = third / np.linalg.norm(third)
    return np.stack([first, np.cross(third, first), third], 1)


def _refined(q: np.ndarray, axes: np.ndarray, rounds: int = 6) -> np.ndarray:
    """Scale and turn fitted to the nearest lattice points; short vectors first: they cannot be miscounted."""
    radius = np.linalg.norm(q @ axes, axis=1)
    turned = not np.allclose(axes, np.diag(np.diag(axes)))
    for limit in np.linspace(min(2.5, radius.max()), radius.max() + 0.01, rounds):
        near = radius <= limit
        if near.sum() < 4:
            continue
        whole = np.round(q[near] @ axes)
        if turned:
            u, _, vt = np.linalg.svd(q[near].T @ whole)
            axes = u @ vt * np.linalg.norm(axes[:, 0])
        predicted = q[near] @ axes
        total = float((predicted * predicted).sum())
        axes = axes * (float((predicted * whole).sum()) / total if (whole != 0).any() else 1.0)
    return axes


def _rings(points: np.ndarray) -> np.ndarray:
    return np.unique((np.round(points) ** 2).sum(1).astype(int))


def _distinct(q: np.ndarray) -> np.ndarray:
    """Indices of one sample of each kind."""
    limit = SAME_Q * np.linalg.norm(q, axis=1).max()
    first = np.ones(len(q), bool)
    first[[max(pair) for pair in cKDTree(q).query_pairs(limit)]] = False
    return np.flatnonzero(first)


def _describe_lattice(points: np.ndarray, b: np.ndarray, n_b0: int) -> SamplingScheme:
    chosen = {tuple(point) for point in points.tolist()}
    pairs = {max(point, (-point[0], -point[1], -point[2])) for point in chosen}
    half = len(chosen) - len(pairs) < 0.05 * len(pairs)
    squared = (points**2).sum(1)
    in_ball = _ball_size(int(squared.max()))
    full = len(pairs) >= FULL * in_ball / 2
    rings = tuple(round(float(b[squared == ring].mean())) for ring in np.unique(squared))
    radius = f"{np.sqrt(squared.max()):.3g}"
    top = round(float(b.max()))
    if full:
        sphere = "half" if half else "full"
        where = f"on a lattice of radius {radius} ({sphere} sphere)"
        text = f"Cartesian DSI, {len(chosen)} directions {where}, b to {top}"
    else:
        side = "no antipodes" if half else "both halves of q-space"
        text = (
            f"Compressed-sensing DSI, {len(chosen)} of the {in_ball} points of a lattice of radius {radius} "
            f"({side}), b to {top}"
        )
    kind = "DSI" if full else "CS-DSI"
    return SamplingScheme(kind, half, tuple(map(float, rings)), len(chosen), n_b0, float(b.max()), text)


def _ball_size(squared_radius: int) -> int:
    """Lattice points within a ball, without its centre."""
    reach = int(np.sqrt(squared_radius))
    axis = np.arange(-reach, reach + 1) ** 2
    return int(((axis[:, None, None] + axis[:, None] + axis) <= squared_radius).sum()) - 1


def _describe_shells(b: np.ndarray, q: np.ndarray, n_b0: int) -> SamplingScheme:
    kept = _distinct(q)
    labels = _clusters(b)
    counts = np.bincount(labels[kept])
    centres = [float(b[labels == label].mean()) for label in range(labels.max() + 1)]
    spread = max(float(np.ptp(b[labels == label])) / centre for label, centre in enumerate(centres))
    top, n = round(float(b.max())), len(kept)
    values = tuple(float(round(centre / 5) * 5) for centre in centres)
    if len(centres) == 1 and spread < 0.2:
        text = f"Single shell, {_count(n, 'direction')} at b {values[0]:.0f}"
        return SamplingScheme("single-shell", False, values, n, n_b0, float(b.max()), text)
    populous = counts[counts >= 6].sum() >= 0.9 * counts.sum()
    if len(centres) <= 7 and populous and spread < 0.2:
        shells = ", ".join(f"{count} at b {value:.0f}" for count, value in zip(counts, values, strict=True))
        text = f"Multi-shell, {n} directions: {shells}"
        return SamplingScheme("multi-shell", False, values, n, n_b0, float(b.max()), text)
    text = f"Other q-space sampling, {_count(n, 'direction')}, b to {top}"
    return SamplingScheme("other", False, values, n, n_b0, float(b.max()), text)


def _clusters(b: np.ndarray) -> np.ndarray:
    """Which cluster each b-value is in, counted from the lowest: a gap starts a new one."""
    order = np.argsort(b)
    gaps = np.diff(b[order]) > np.maximum(SAME_B, 0.05 * b[order][1:])
    labels = np.empty(len(b), int)
    labels[order] = np.concatenate([[0], np.cumsum(gaps)])
    return labels


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
