"""What the verdicts measure beyond image_qc.tsv: alignment, mask, ringing, noise floor, convergence.

All of it is computed from the results that are written, so that a fault of the stage that made a result is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.dwi import DWI
from dsiprep.data.grid import Volume
from dsiprep.data.results import Acquired, Anatomy, Denoised, Distortion, Motion, Preprocessed
from dsiprep.ops.registration.similarity import mutual_information, to_bins
from dsiprep.report.plots import poses_by_iteration
from dsiprep.report.slice_layout import sample_at

POINTS = 20_000  # samples of the similarity
COARSE_MM, FINE_MM, REACH_MM = 4.0, 0.5, 24.0  # steps and reach of the search for a better position
MARGIN_MM = 6.0  # around the brain, whose edge carries most of the contrast between b=0 and T1w
BRAIN_B = (700.0, 3000.0)  # s/mm²: free water and muscle have lost most of their signal, brain tissue has not
BRAIN_SIGNAL = 0.45  # of the median in the mask
NECK_MM = 20.0  # above the lowest point of the mask; below it, spinal cord and mask look alike
RAYLEIGH_MEAN = np.sqrt(np.pi / 2)  # mean magnitude of pure noise, in standard deviations of one channel
HEAD_RADIUS_MM = 50.0
NEAR, STRONG_EDGE, FLAT = 6, 0.15, 0.35  # voxels; of the median signal; steps of a flat place over the nearby edge
LEAST_PLACES = 200


def best_offset(fixed: Volume, moving: Volume, mask: Volume) -> tuple[float, np.ndarray]:
    """Translation (mm) after which `moving` resembles `fixed` most, by normalised mutual information.

    Parameters
    ----------
    fixed, moving : Volume
        In the same space, of any contrast.
    mask : Volume
        Brain of `fixed`, 0 or 1.

    Returns
    -------
    distance : float
        0 for images that are aligned; the search reaches about `REACH_MM`.
    shift : ndarray, (3,)
        World RAS+ mm.
    """
    near = ndimage.distance_transform_edt(mask.numpy() < 0.5, sampling=mask.grid.voxel_sizes) <= MARGIN_MM
    inside = np.argwhere(near)
    points = mask.grid.to_world(inside[:: max(1, len(inside) // POINTS)])
    values = sample_at(fixed, points)
    bins = to_bins(values, *np.percentile(values, (0.5, 99.5)))
    low, high = np.percentile(sample_at(moving, points), (0.5, 99.5))
    weights = np.ones(len(points), np.float32)

    def similarity(shift: np.ndarray) -> float:
        return mutual_information(bins, sample_at(moving, points + shift), weights, float(low), float(high))[0]

    shift = _climb(similarity)
    return float(np.linalg.norm(shift)), shift


def _climb(similarity: Callable[[np.ndarray], float]) -> np.ndarray:
    """The nearest maximum of a function of a translation (3,), by steps along the axes that become smaller."""
    shift, best, step = np.zeros(3), similarity(np.zeros(3)), COARSE_MM
    while step >= FINE_MM:
        trials = [shift + sign * step * axis for axis in np.eye(3) for sign in (1, -1)]
        scores = [similarity(trial) for trial in trials]
        if max(scores) > best and np.linalg.norm(shift) < REACH_MM:
            best, shift = max(scores), trials[int(np.argmax(scores))]
        else:
            step /= 2
    return shift


def brain_signal_outside(preprocessed: Preprocessed) -> float | None:
    """Percentage of brain-like signal outside the brain mask; None without volumes between 700 and 3000 s/mm².

    At these b-values cerebrospinal fluid, eyes and muscle are dark and fat is suppressed, so that what is as bright as
    the brain and continuous with it is brain. The spinal cord below the mask does not count.
    """
    dwi, mask = preprocessed.dwi, preprocessed.mask.numpy() > 0.5
    chosen = np.flatnonzero((dwi.bvals >= BRAIN_B[0]) & (dwi.bvals <= BRAIN_B[1]))
    if not len(chosen) or not mask.any():
        return None
    mean = np.zeros(mask.shape, np.float32)
    for v in chosen[:: max(1, len(chosen) // 24)]:
        mean += dwi.volume(int(v)).numpy()
    bright = ndimage.binary_opening(mean > BRAIN_SIGNAL * np.median(mean[mask]))
    parts, count = ndimage.label(bright)
    if not count:
        return None
    largest = np.bincount(parts[mask], minlength=count + 1)[1:].argmax() + 1
    height = preprocessed.mask.grid.to_world(np.argwhere(mask))[:, 2].min() + NECK_MM
    corners = np.argwhere(np.ones(mask.shape, bool))
    above = (preprocessed.mask.grid.to_world(corners)[:, 2] > height).reshape(mask.shape)
    brain = (parts == largest) & above
    outside = brain & ~ndimage.binary_dilation(mask)
    return float(100 * outside.sum() / max(int(brain.sum()), 1))


def mask_millilitres(mask: Volume) -> float:
    """Volume of a mask in ml."""
    return float((mask.numpy() > 0.5).sum() * np.prod(mask.grid.voxel_sizes) / 1000)


def noise_floor_ratio(acquired: Acquired, denoised: Denoised) -> float | None:
    """Median signal in the brain at the highest b-values over the mean magnitude of pure noise; None without noise.

    References
    ----------
    Gudbjartsson and Patz 1995, doi 10.1002/mrm.1910340618.
    """
    inside = acquired.mask.numpy() > 0.5
    if denoised.noise is None or not inside.any():
        return None
    sigma = denoised.noise.numpy()[inside]
    if np.median(sigma) <= 0:
        return None
    bvals = acquired.dwi.bvals
    highest = np.flatnonzero(bvals >= 0.95 * bvals.max())[:5]
    signal = np.mean([acquired.dwi.volume(int(v)).numpy()[inside] for v in highest], axis=0)
    return float(np.median(signal / np.maximum(sigma, 1e-12)) / RAYLEIGH_MEAN)


def b0_signal_to_noise(acquired: Acquired, denoised: Denoised) -> float | None:
    """Median over the brain of one b=0 volume over the noise standard deviation; None where no noise was found."""
    inside = acquired.mask.numpy() > 0.5
    if denoised.noise is None or not inside.any():
        return None
    sigma = float(np.median(denoised.noise.numpy()[inside]))
    b0 = acquired.dwi.volume(int(np.argmin(acquired.dwi.bvals))).numpy()[inside]
    return float(np.median(b0)) / sigma if sigma > 0 else None


def ringing(dwi: DWI, mask: Volume, slice_axis: int) -> float | None:
    """Amplitude of the oscillation near edges of a b=0 image over the height of the edges, in the plane of the slices.

    Truncated k-space makes the image oscillate from voxel to voxel near edges, so that second differences h along an
    axis have the same sign two voxels apart, while those of anatomy and noise do not. The root of their mean product is
    taken over places within `NEAR` voxels of a strong edge that are not on one themselves. None without such places.

    Parameters
    ----------
    dwi : DWI
        Before anything is interpolated.
    mask : Volume
        Brain, 0 or 1.
    slice_axis : int
        Voxel axis that is left out.
    """
    image = dwi.volume(int(np.argmin(dwi.bvals))).numpy().astype(float)
    inside = mask.numpy() > 0.5
    if not inside.any():
        return None
    least = STRONG_EDGE * float(np.median(image[inside]))
    axes = [axis for axis in range(3) if axis != slice_axis and image.shape[axis] >= 8]
    found = [_oscillation(np.moveaxis(image, axis, 0), np.moveaxis(inside, axis, 0), least) for axis in axes]
    known = [value for value in found if value is not None]
    return max(known) if known else None


def _oscillation(image: np.ndarray, inside: np.ndarray, least: float) -> float | None:
    """`ringing` along the first axis; `least` is the smallest step that counts as a strong edge."""
    steps = np.abs(np.diff(image, axis=0))
    nearby = ndimage.maximum_filter1d(steps, 2 * NEAR + 1, axis=0)
    h = 2 * image[1:-1] - image[:-2] - image[2:]
    count = len(h) - 2  # pairs of h that are two voxels apart, from the five voxels i to i + 4
    own = np.max([steps[k : k + count] for k in range(4)], axis=0)
    edge = nearby[1 : 1 + count]
    chosen = inside[1 : 1 + count] & inside[3 : 3 + count] & (edge > least) & (own < FLAT * edge)
    if chosen.sum() < LEAST_PLACES:
        return None
    product = float(np.mean(h[:-2][chosen] * h[2:][chosen]))
    return float(np.sqrt(max(product, 0.0) / np.mean(edge[chosen] ** 2)))


def phase_encoding_misfit(distortion: Distortion, mask: Volume) -> float | None:
    """Root mean square difference between the two phase encodings after correction over before; None without a pair."""
    if len(distortion.before) < 2:
        return None
    inside, misfits = mask.numpy() > 0.5, []
    for pair in (distortion.before, distortion.after):
        up, down = (volume.numpy()[inside] for volume in pair)
        misfits.append(float(np.sqrt(np.mean((up / up.mean() - down / down.mean()) ** 2))))
    return misfits[1] / misfits[0] if misfits[0] > 0 else None


def still_moving(motions: tuple[Motion, ...], least_mm: float = 0.1) -> float | None:
    """Percentage of volumes that moved by more than `least_mm` in the last round; None with fewer than two rounds."""
    changes = []
    for motion in motions:
        poses = poses_by_iteration(motion.trace)
        if len(poses) > 1 and poses[-1][1].shape == poses[-2][1].shape:
            difference = poses[-1][1] - poses[-2][1]
            rotation = HEAD_RADIUS_MM * np.linalg.norm(difference[:, 3:], axis=1)
            changes.append(np.hypot(np.linalg.norm(difference[:, :3], axis=1), rotation))
    return float(100 * np.mean(np.concatenate(changes) > least_mm)) if changes else None


def coregistration_offset(preprocessed: Preprocessed, anatomy: Anatomy) -> tuple[float, np.ndarray] | None:
    """Distance (mm) of the b=0 reference from where it resembles the structural image most; None without one."""
    if anatomy.modality == "none" or not bool((anatomy.mask.data > 0.5).any()):
        return None
    reference = preprocessed.dwiref
    fixed = Volume(torch.as_tensor(anatomy.image.numpy()), anatomy.image.grid)
    return best_offset(fixed, reference, anatomy.mask)
