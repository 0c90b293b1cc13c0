"""Whether the b-table agrees with the brain: b-vectors with the course of fibres, b-values with the fall of the signal.

The check is made before anything uses a b-vector. Motion correction only needs them up to a flip or permutation, as its
predictions depend on angles between gradients, but not the rotation of b-vectors with the head. It needs no alignment
either: the right frame and the 23 others are compared on the same images.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.qspace import GradientCheck
from dsiprep.data.results import Acquired
from dsiprep.ops.image.point_set import average_blocks
from dsiprep.ops.qspace.fibre_continuity import axis_frames, describe_frame, streamline_lengths
from dsiprep.ops.qspace.tensor import main_directions

__all__ = ["METHODS", "check_gradients", "doubt_gradients", "with_corrected_gradients"]

METHODS = {
    "checked": (
        "The b-vectors were checked against the brain: the mean length of streamlines through the principal "
        "directions of diffusion tensors was compared between the b-vectors as given and their 23 other flips and "
        "permutations [@jeurissen2014; @schilling2019]."
    ),
    "corrected": "As another frame was clearly better, the b-vectors were corrected before processing.",
}

FINEST_MM = 2.0  # smaller voxels are averaged: their directions are noisier, and fibres no better followed
TENSOR_B = 2500.0  # s/mm²; above it the signal is too non-Gaussian for a tensor
LEAST_DIRECTIONS = 6
ENOUGH_DIRECTIONS = 12  # below which volumes of higher b are taken, too
SEEDS = 6000
SEED_FA = 0.2
BLOCK_MM = 30.0  # parts of the brain that count as independent
LEAST_BLOCKS = 8
CERTAIN_Z = 3.5  # one-sided 0.02 % for one comparison, 0.5 % for the 23 of a series
LEAST_RATIO = 1.2  # of streamline lengths, for geometry that makes a wrong frame better, though not by much
TISSUE_D = 0.7e-3  # mm²/s, mean diffusivity of brain tissue
CLEAR_FALL = 0.2  # of the signal at b=0, between two b-values that are compared
IN_ORDER = 0.97  # fraction of clear comparisons in which the signal falls with b, below which the order is doubted


def check_gradients(acquired: Acquired, axes: np.ndarray) -> GradientCheck:
    """Compare the b-table with the images.

    Parameters
    ----------
    acquired : Acquired
        As read, before any correction.
    axes : ndarray, (3, 3)
        Axes of the b-vector file in world RAS+, one per column: voxel axes up to sign.

    Returns
    -------
    GradientCheck
        `answer` is "right" if the streamlines of the given frame are longer than those of every other by a factor of
        1.2 and by 3.5 standard errors over blocks of the brain; "wrong" if they are shorter than those of the best
        frame by as much; else "undecided".

    References
    ----------
    Jeurissen et al. 2014, doi 10.1016/j.media.2014.05.012. Schilling et al. 2019, doi 10.1016/j.mri.2019.01.018.
    """
    order, misfits = _order_of_volumes(acquired.dwi, acquired.mask)
    frames = axis_frames()
    lengths, blocks, why = _lengths_by_frame(acquired, frames, axes)
    if why:
        return GradientCheck("undecided", why, "", np.eye(3), (), 1.0, 0.0, order, misfits)
    mean = lengths.mean(0)
    ranking = np.argsort(-mean, kind="stable")
    best = int(ranking[0])
    rival = int(ranking[1]) if best == 0 else best
    ratio, z = mean[0] / max(mean[rival], 1e-9), _separation(lengths[:, 0] - lengths[:, rival], blocks)
    if best == 0:
        weakest = min(_separation(lengths[:, 0] - lengths[:, other], blocks) for other in range(1, len(frames)))
        z = min(z, weakest)
    answer = "right" if ratio >= LEAST_RATIO and z >= CERTAIN_Z else "undecided"
    answer = "wrong" if 1 / max(ratio, 1e-9) >= LEAST_RATIO and -z >= CERTAIN_Z else answer
    found = best if answer == "wrong" and _stands_out(lengths, blocks, best) else 0
    ranked = tuple((describe_frame(frames[f]), float(mean[f])) for f in (0, *(f for f in ranking if f)))
    rotation, remedy = axes @ frames[found] @ axes.T, describe_frame(frames[found]) if found else ""
    return GradientCheck(answer, "", remedy, rotation, ranked, float(ratio), float(z), order, misfits)


def with_corrected_gradients(acquired: Acquired, check: GradientCheck) -> Acquired:
    """The series with the b-vectors that fit the brain; unchanged if the check did not find them."""
    dwi = acquired.dwi
    return replace(acquired, dwi=replace(dwi, bvecs=dwi.bvecs @ check.rotation.T)) if check.remedy else acquired


def doubt_gradients(check: GradientCheck) -> tuple[str, ...]:
    """What must not be overlooked about the b-table of a unit: sentences for report and terminal."""
    sentences = []
    if check.answer == "wrong":
        shorter = f"streamlines are {1 / max(check.ratio, 1e-9):.2f} times as long in another frame"
        if check.corrected:
            sentences.append(
                f"The b-vectors were WRONG and have been corrected: the rows x y z of .bvec became {check.remedy} "
                f"({shorter}). Correct the files of this protocol, and check left and right."
            )
        elif check.remedy:
            sentences.append(
                f"The b-vectors are WRONG: {shorter}. The rows x y z of .bvec should be {check.remedy}: correct the "
                "file, or run with --bvec-check fix."
            )
        else:
            sentences.append(f"The b-vectors are WRONG: {shorter}, but several frames fit. Correct .bvec.")
    if check.order < IN_ORDER:
        which = ", ".join(map(str, check.misfits[:8])) + (", ..." if len(check.misfits) > 8 else "")
        sentences.append(
            f"The signal falls with the b-value in only {check.order:.0%} of the clear comparisons between volumes"
            + (f"; volumes {which} (from 0) do not fit their b-values" if check.misfits else "")
            + ". Check that .bval is in the order of the volumes."
        )
    return tuple(sentences)


def _stands_out(lengths: np.ndarray, blocks: np.ndarray, best: int) -> bool:
    """Whether the best frame is as clearly better than every other as it is than the given one."""
    mean = lengths.mean(0)
    others = [other for other in range(lengths.shape[1]) if other != best]
    return all(
        mean[best] >= LEAST_RATIO * mean[other]
        and _separation(lengths[:, best] - lengths[:, other], blocks) >= CERTAIN_Z
        for other in others
    )


def _separation(difference: np.ndarray, blocks: np.ndarray) -> float:
    """Sum of differences of single streamlines over its standard error, from the sums in `blocks`."""
    sums = np.bincount(blocks, difference)
    n = len(sums)
    error = np.sqrt(n / (n - 1) * ((sums - sums.mean()) ** 2).sum())
    return float(sums.sum() / max(error, 1e-9))


def _lengths_by_frame(acquired: Acquired, frames: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """Streamline lengths (seeds, frames), the block of each seed, and why there are none."""
    dwi, empty = acquired.dwi, np.zeros((0, len(frames)))
    used = _volumes_for_tensor(dwi)
    if (used & ~dwi.is_b0).sum() < LEAST_DIRECTIONS:
        return empty, np.zeros(0, int), f"fewer than {LEAST_DIRECTIONS} diffusion-weighted volumes"
    data, grid = average_blocks(dwi.data[torch.as_tensor(used)].cpu(), dwi.grid, FINEST_MM)
    mask, _ = average_blocks(acquired.mask.data[None].float().cpu(), dwi.grid, FINEST_MM)
    inside = ndimage.binary_erosion(mask[0].numpy() > 0.5)
    fa, directions = np.zeros(grid.shape), np.zeros((*grid.shape, 3))
    if inside.any():
        fitted = main_directions(data.numpy()[:, inside], dwi.bvals[used], dwi.bvecs[used])
        fa[inside], directions[inside] = fitted[0], fitted[1] @ axes
    white = np.argwhere(fa > SEED_FA)
    rng = np.random.default_rng(0)
    seeds = white[rng.choice(len(white), min(SEEDS, len(white)), replace=False)]
    _, blocks = np.unique((seeds * grid.voxel_sizes // BLOCK_MM).astype(int), axis=0, return_inverse=True)
    if len(seeds) < SEEDS / 20 or blocks.max(initial=0) + 1 < LEAST_BLOCKS:
        return empty, np.zeros(0, int), "too little white matter in the image"
    points = np.clip(seeds + rng.uniform(-0.5, 0.5, seeds.shape), 0, np.asarray(grid.shape) - 1.0)
    signs = np.sign(np.sum(axes * grid.directions, axis=0))  # of the voxel axes along those of the b-vectors
    along = np.diag(signs) @ frames @ np.diag(signs)
    lengths = streamline_lengths(fa, directions * signs, grid.voxel_sizes, points, along)
    return lengths, blocks.ravel(), ""


def _volumes_for_tensor(dwi: DWI) -> np.ndarray:
    """b=0 and the diffusion-weighted volumes up to `TENSOR_B`, or the lowest ones if these are few, (n,) bool."""
    weighted = np.sort(dwi.bvals[~dwi.is_b0])
    if not len(weighted):
        return dwi.is_b0
    limit = max(TENSOR_B, float(weighted[min(ENOUGH_DIRECTIONS, len(weighted)) - 1]))
    return dwi.bvals <= limit


def _order_of_volumes(dwi: DWI, mask: Volume) -> tuple[float, tuple[int, ...]]:
    """Fraction of pairs of volumes in which the higher b has the lower signal, and the volumes that mostly do not fit.

    Only pairs count whose signal differs by a fifth of that at b=0 for the diffusivity of brain tissue. 1 without any.
    """
    inside = (mask.data > 0.5).cpu()
    signal = np.array([float(volume[inside].median()) for volume in dwi.data.cpu()])
    expected = np.exp(-np.where(dwi.is_b0, 0.0, dwi.bvals) * TISSUE_D)
    clear = expected[:, None] - expected > CLEAR_FALL  # row has the lower b, column the higher
    falls = clear & (signal[:, None] > signal)
    compared = clear.sum(0) + clear.sum(1)
    fitting = (falls.sum(0) + falls.sum(1)) / np.maximum(compared, 1)
    misfits = np.flatnonzero((compared > 0) & (fitting < 0.5))
    return float(falls.sum() / clear.sum()) if clear.any() else 1.0, tuple(int(v) for v in misfits)
