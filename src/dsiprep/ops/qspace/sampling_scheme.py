"""Recognition of the sampling scheme from the b-table alone: shells, a Cartesian lattice (DSI), part of one, or other.

On a lattice every q-vector, sqrt(b) times the b-vector, is an integer combination of three orthogonal steps of equal
length. The lattice may be rotated relative to the world axes (an oblique field of view), so its rotation is searched
for, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import numpy as np
from scipy.spatial import cKDTree

from dsiprep.data.acquisition import SamplingScheme

MAX_RADIUS = 10.5  # in lattice steps; published protocols have 3 to 10
MIN_RADIUS = 1.9
MIN_RINGS = 4  # distinct lengths of lattice points; shells have few
MIN_POINTS = 12
LATTICE_RMS = 0.2  # distance to lattice points in steps; random points have 0.5
FULL = 0.95  # fraction of the points in the ball above which a lattice counts as fully sampled
SAME_B = 75.0  # s/mm²
SAME_Q = 0.02  # fraction of the largest |q|


def recognise(bvals: np.ndarray, bvecs: np.ndarray, b0_threshold: float = 100.0) -> SamplingScheme:
    """Recognise the sampling scheme of a b-table.

    Parameters
    ----------
    bvals : ndarray, (n,)
        s/mm², possibly rounded or scaled by the scanner.
    bvecs : ndarray, (n, 3)
        Unit vectors in any frame.
    b0_threshold : float
        b-values at or below this (s/mm²) count as b=0.

    Returns
    -------
    SamplingScheme
        Repeated samples are counted once.

    References
    ----------
    Wedeen et al. 2005, doi 10.1002/mrm.20642 (lattice sampling in DSI).
    """
    bvals, bvecs = np.asarray(bvals, float), np.asarray(bvecs, float)
    return _recognise(bvals.tobytes(), bvecs.tobytes(), b0_threshold)


@lru_cache(maxsize=64)
def _recognise(bvals_bytes: bytes, bvecs_bytes: bytes, b0_threshold: float) -> SamplingScheme:
    """As `recognise`, for tables that are compared by their contents: the subjects of a study share a few."""
    bvals, bvecs = np.frombuffer(bvals_bytes), np.frombuffer(bvecs_bytes).reshape(-1, 3)
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
    """Lattice coordinates (n, 3) int of q-vectors (n, 3), or None if they do not fit a lattice.

    If several lattices fit, the coarsest is used.
    """
    distinct = q[_distinct(q)]
    if len(distinct) < MIN_POINTS or np.linalg.matrix_rank(distinct, tol=0.05 * np.abs(distinct).max()) < 3:
        return None
    for axes in _candidate_lattices(distinct):
        axes = _refined(distinct, axes)
        points = q @ axes
        if _fits(points) and len(_rings(points)) >= MIN_RINGS:
            return np.round(points).astype(int)
    return None


def _fits(points: np.ndarray) -> bool:
    """Whether lattice coordinates are close to integers, none at the origin, with a plausible largest radius."""
    whole = np.round(points)
    radius = np.sqrt((whole**2).sum(1))
    if radius.min() < 0.5 or not MIN_RADIUS <= radius.max() <= MAX_RADIUS:
        return False
    distance = np.sqrt(((points - whole) ** 2).sum(1))
    return bool(np.sqrt((distance**2).mean()) < LATTICE_RMS and np.quantile(distance, 0.9) < 1.6 * LATTICE_RMS)


def _candidate_lattices(q: np.ndarray) -> Iterator[np.ndarray]:
    """Matrices (3, 3) that map q to lattice coordinates: coarse before fine, axis-aligned before rotated."""
    steps = _candidate_steps(q)
    for step in steps:
        yield np.eye(3) / step
    norms = np.linalg.norm(q, axis=1)
    for step in steps:
        # a lattice has many distinct |q| whatever its rotation, shells have few
        if len(np.unique(np.round((norms / step) ** 2))) >= MIN_RINGS:
            yield from (rotation / step for rotation in _candidate_rotations(q / step))


def _candidate_steps(q: np.ndarray) -> np.ndarray:
    """Step lengths, in descending order, for which the shortest q-vectors can be lattice points."""
    norms = np.sort(np.linalg.norm(q, axis=1))
    shortest = norms[norms < 1.1 * norms[0]].mean()
    steps = shortest / np.sqrt([1, 2, 3, 4, 5, 6, 8, 9])
    steps = (steps[:, None] * np.array([1.015, 1.0, 0.985])).ravel()
    radius = norms[-1] / steps
    return steps[(radius > MIN_RADIUS) & (radius < MAX_RADIUS)]


def _candidate_rotations(points: np.ndarray, pairs: int = 8) -> Iterator[np.ndarray]:
    """Orthogonal matrices (3, 3) that map two short vectors onto lattice points and most short ones close to some."""
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
        rotations = np.array(list(_rotations_onto_lattice(u, v))).reshape(-1, 3, 3)
        rotated = short @ rotations
        distance = np.linalg.norm(rotated - np.round(rotated), axis=-1)
        yield from rotations[(distance < 1.6 * LATTICE_RMS).mean(1) > 0.75]


def _rotations_onto_lattice(u: np.ndarray, v: np.ndarray) -> Iterator[np.ndarray]:
    """Orthogonal matrices (3, 3) that map u and v onto lattice points of about their lengths and angle."""
    norm_u, norm_v = float(np.linalg.norm(u)), float(np.linalg.norm(v))
    images_v = _lattice_points_of_length(norm_v, unique=False)
    for image_u in _lattice_points_of_length(norm_u, unique=True):
        cosines = images_v @ image_u / (np.linalg.norm(images_v, axis=1) * np.linalg.norm(image_u))
        for image_v in images_v[np.abs(cosines - u @ v / (norm_u * norm_v)) < 0.06]:
            yield _frame(u, v) @ _frame(image_u, image_v).T
            yield _frame(u, v) * np.array([1, 1, -1]) @ _frame(image_u, image_v).T  # a mirrored lattice is a lattice


def _lattice_points_of_length(norm: float, unique: bool) -> np.ndarray:
    """Lattice points of about the given length; `unique` keeps one per set of permuted and sign-flipped coordinates."""
    reach = int(np.ceil(norm)) + 1
    grid = np.array(list(product(range(reach + 1) if unique else range(-reach, reach + 1), repeat=3)), float)
    length = np.linalg.norm(grid, axis=1)
    keep = (np.abs(length**2 - round(norm**2)) < 0.5) & (length > 0)
    if unique:
        keep &= (grid[:, 0] >= grid[:, 1]) & (grid[:, 1] >= grid[:, 2])
    return grid[keep]


def _frame(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Orthonormal columns: along u, in the plane of u and v, and normal to it."""
    first = u / np.linalg.norm(u)
    third = np.cross(u, v)
    third = third / np.linalg.norm(third)
    return np.stack([first, np.cross(third, first), third], 1)


def _refined(q: np.ndarray, axes: np.ndarray, rounds: int = 6) -> np.ndarray:
    """Refine scale and rotation on the nearest lattice points, short vectors first: theirs are unambiguous."""
    radius = np.linalg.norm(q @ axes, axis=1)
    rotated = not np.allclose(axes, np.diag(np.diag(axes)))
    for limit in np.linspace(min(2.5, radius.max()), radius.max() + 0.01, rounds):
        used = radius <= limit
        if used.sum() < 4:
            continue
        whole = np.round(q[used] @ axes)
        if rotated:
            u, _, vt = np.linalg.svd(q[used].T @ whole)
            axes = u @ vt * np.linalg.norm(axes[:, 0])
        predicted = q[used] @ axes
        total = float((predicted * predicted).sum())
        axes = axes * (float((predicted * whole).sum()) / total if (whole != 0).any() else 1.0)
    return axes


def _rings(points: np.ndarray) -> np.ndarray:
    """Distinct squared lengths of lattice points."""
    return np.unique((np.round(points) ** 2).sum(1).astype(int))


def _distinct(q: np.ndarray) -> np.ndarray:
    """Indices of samples without repeats."""
    limit = SAME_Q * np.linalg.norm(q, axis=1).max()
    first = np.ones(len(q), bool)
    first[[max(pair) for pair in cKDTree(q).query_pairs(limit)]] = False
    return np.flatnonzero(first)


def _describe_lattice(points: np.ndarray, b: np.ndarray, n_b0: int) -> SamplingScheme:
    """Describe a scheme with lattice coordinates `points` (n, 3) and b-values `b`, b=0 excluded."""
    sampled = {tuple(point) for point in points.tolist()}
    pairs = {max(point, (-point[0], -point[1], -point[2])) for point in sampled}
    half = len(sampled) - len(pairs) < 0.05 * len(pairs)
    squared = (points**2).sum(1)
    in_ball = _ball_size(int(squared.max()))
    full = len(pairs) >= FULL * in_ball / 2
    rings = tuple(round(float(b[squared == ring].mean())) for ring in np.unique(squared))
    radius = f"{np.sqrt(squared.max()):.3g}"
    top = round(float(b.max()))
    if full:
        sphere = "half" if half else "full"
        lattice = f"on a lattice of radius {radius} ({sphere} sphere)"
        text = f"Cartesian DSI, {len(sampled)} directions {lattice}, b to {top}"
    else:
        side = "no antipodes" if half else "both halves of q-space"
        text = (
            f"Compressed-sensing DSI, {len(sampled)} of the {in_ball} points of a lattice of radius {radius} "
            f"({side}), b to {top}"
        )
    kind = "DSI" if full else "CS-DSI"
    return SamplingScheme(kind, half, tuple(map(float, rings)), len(sampled), n_b0, float(b.max()), text)


def _ball_size(squared_radius: int) -> int:
    """Number of lattice points in a ball, without its centre."""
    reach = int(np.sqrt(squared_radius))
    axis = np.arange(-reach, reach + 1) ** 2
    return int(((axis[:, None, None] + axis[:, None] + axis) <= squared_radius).sum()) - 1


def _describe_shells(b: np.ndarray, q: np.ndarray, n_b0: int) -> SamplingScheme:
    """Describe a scheme that is not on a lattice: one shell, several shells, or other."""
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
    """Cluster index of each b-value, from the lowest; a gap starts a new cluster."""
    order = np.argsort(b)
    gaps = np.diff(b[order]) > np.maximum(SAME_B, 0.05 * b[order][1:])
    labels = np.empty(len(b), int)
    labels[order] = np.concatenate([[0], np.cumsum(gaps)])
    return labels


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
