"""How far fibre directions can be followed through an image, for each flip and permutation of the b-vectors.

A flip or permutation M of the b-vectors turns every fitted tensor D into M D M', so the tensors are fitted once. g and
-g are the same gradient: of the 48 signed permutations, 24 differ.
"""

from __future__ import annotations

from itertools import permutations, product

import numba
import numpy as np

from dsiprep.compiled import compiled

__all__ = ["axis_frames", "describe_frame", "streamline_lengths"]

LEAST_FA = 0.15  # at which streamlines end
LEAST_COSINE = 0.5  # of the angle between successive steps
STEP_MM = 1.0
LONGEST_MM = 100.0  # in each of the two senses


def axis_frames() -> np.ndarray:
    """The 24 rotations of the axes onto each other, (24, 3, 3), the identity first, the fewest changed axes next."""
    found = []
    for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        matrix = np.zeros((3, 3))
        matrix[range(3), order] = signs
        if np.linalg.det(matrix) > 0:
            found.append(matrix)
    return np.array(sorted(found, key=lambda matrix: (describe_frame(matrix).count("-"), -np.abs(np.trace(matrix)))))


def describe_frame(matrix: np.ndarray) -> str:
    """The rows x, y, z of new b-vectors in terms of the old: "-x y z"; antipodes are the same, the fewest signs win."""
    rows = [("xyz"[int(np.argmax(np.abs(row)))], row.sum() < 0) for row in matrix]
    if sum(negative for _, negative in rows) > 1:
        rows = [(axis, not negative) for axis, negative in rows]
    return " ".join(("-" if negative else "") + axis for axis, negative in rows)


def streamline_lengths(
    fa: np.ndarray, directions: np.ndarray, voxel_sizes: np.ndarray, seeds: np.ndarray, frames: np.ndarray
) -> np.ndarray:
    """Length of the streamline through each seed, with the directions turned by each frame.

    Streamlines follow the direction of the nearest voxel in steps of 1 mm, and end at low anisotropy, where the
    direction turns by more than 60 degrees, or after 100 mm on either side.

    Parameters
    ----------
    fa : ndarray, (i, j, k)
        Fractional anisotropy; zero outside the brain.
    directions : ndarray, (i, j, k, 3)
        Unit vectors along the voxel axes.
    voxel_sizes : ndarray, (3,)
        mm.
    seeds : ndarray, (m, 3)
        Voxel coordinates.
    frames : ndarray, (f, 3, 3)

    Returns
    -------
    ndarray, (m, f)
        mm.

    References
    ----------
    Mori et al. 1999, doi 10.1002/1531-8249(199902)45:2<265::aid-ana21>3.0.co;2-3 (streamlines). Jeurissen et al. 2014,
    doi 10.1016/j.media.2014.05.012 (their length tells right b-vectors from wrong ones).
    """
    out = np.empty((len(seeds), len(frames)))
    fa, directions = np.ascontiguousarray(fa, np.float32), np.ascontiguousarray(directions, np.float32)
    step = STEP_MM / np.asarray(voxel_sizes, float)
    for index, frame in enumerate(frames):
        out[:, index] = _follow(fa, directions, np.ascontiguousarray(frame, np.float32), step, seeds)
    return out


@compiled(parallel=True)
def _follow(
    fa: np.ndarray, directions: np.ndarray, frame: np.ndarray, step: np.ndarray, seeds: np.ndarray
) -> np.ndarray:
    """Streamline lengths in mm, (m,); `step` is one step in voxels along each axis."""
    out = np.zeros(len(seeds))
    for s in numba.prange(len(seeds)):
        for sense in range(2):
            at, heading, length = seeds[s].copy(), np.zeros(3), 0.0
            while length <= LONGEST_MM:
                i, j, k = int(np.floor(at[0] + 0.5)), int(np.floor(at[1] + 0.5)), int(np.floor(at[2] + 0.5))
                if i < 0 or j < 0 or k < 0 or i >= fa.shape[0] or j >= fa.shape[1] or k >= fa.shape[2]:
                    break
                if fa[i, j, k] < LEAST_FA:
                    break
                cosine, ahead = 0.0, np.zeros(3)
                for a in range(3):
                    for b in range(3):
                        ahead[a] += frame[a, b] * directions[i, j, k, b]
                    cosine += heading[a] * ahead[a]
                if length == 0:
                    cosine = 1.0 - 2.0 * sense
                if abs(cosine) < LEAST_COSINE:
                    break
                sign = 1.0 if cosine > 0 else -1.0
                for a in range(3):
                    heading[a] = sign * ahead[a]
                    at[a] += step[a] * heading[a]
                length += STEP_MM
            out[s] += max(length - STEP_MM, 0.0)
    return out
