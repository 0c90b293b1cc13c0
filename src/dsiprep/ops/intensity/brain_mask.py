"""Brain masks: fast intensity-based masks of mean b=0 images, and masks of any image by the deepbet network.

Radii are in mm, so that masks do not depend on voxel size or orientation.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
import torch
from scipy import ndimage

from dsiprep.data.grid import Grid, Volume
from dsiprep.ops.image.interpolation import resample_onto

__all__ = ["brain_mask_b0", "brain_mask_dwiref", "brain_mask_t1w", "brain_mask_t2w", "otsu"]

WORKING_MM = 3.0  # voxel size of the intensity-based mask
SMOOTH_MM = 1.5
NECK_MM = 7.0  # erosion that separates the brain from eyes and neck
MARGIN_MM = 3.0
MARGIN_LEVEL = 0.3  # threshold of the mask smoothed by MARGIN_MM: 1.5 mm outside the 0.5 contour
CLOSE_MM = 6.0
STRAND_MM = 4.0  # opening that removes strands of scalp and vessels
BIAS_MM = 25.0
LEAST_VOXELS = 12  # along each axis; the network is not run on smaller images
LEAST_ML = 300.0  # brain volume; a smaller mask is not a human brain
AGREE_DICE = 0.8  # least overlap of the network's mask and the intensity-based one
CLIP = 1.6  # times the median of the brain: CSF is clipped here for the bias estimate
# From T2w or b=0 intensity, in units of the brain's median, to T1w intensity: white matter bright, CSF and skull dark
AS_T1W = ((0.0, 0.85, 1.1, 2.0), (0.0, 110.0, 75.0, 25.0))
RIM_MM = 3.0  # distance from the network's surface within which intensity decides; also the radius of the opening
RIM_LEVEL = 0.6  # of the intensity of white matter
SULCUS_MM = 2.5  # half the width of dark gaps (vessels, sinuses) that are closed


def brain_mask_b0(volume: Volume) -> Volume:
    """Fast, generous brain mask of a mean b=0 image, without holes.

    Parameters
    ----------
    volume : Volume
        Mean b=0: T2*-weighted EPI, possibly distorted or covering part of the head; any voxel size and orientation.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid. All ones if the image is too small or too uniform.
    """
    working = _working_volume(volume)
    smooth = _smooth(working.numpy(), working.grid)
    mask = _intensity_mask(smooth, working.grid) if smooth.max() > smooth.min() else None
    if mask is None or not mask.any():
        return Volume(torch.ones_like(volume.data, dtype=torch.float32), volume.grid)
    soft = ndimage.gaussian_filter(mask.astype(np.float32), MARGIN_MM / working.grid.voxel_sizes, mode="nearest")
    resampled = resample_onto(torch.from_numpy(soft)[None], working.grid, volume.grid)[0]
    return Volume((resampled > MARGIN_LEVEL).float().to(volume.data.device), volume.grid)


def _working_volume(volume: Volume) -> Volume:
    """The image with isotropic voxels of `WORKING_MM`; as it is if its voxels are isotropic and not much smaller."""
    sizes = volume.grid.voxel_sizes
    if np.allclose(sizes, sizes[0], rtol=0.05) and sizes[0] > 0.8 * WORKING_MM:
        return Volume(volume.data.float().cpu(), volume.grid)
    data = np.nan_to_num(volume.numpy().astype(np.float32))
    sigma = np.where(sizes < WORKING_MM, 0.4 * WORKING_MM / sizes, 0)
    data = ndimage.gaussian_filter(data, sigma, mode="nearest")
    grid = volume.grid.at_spacing(WORKING_MM)
    return Volume(resample_onto(torch.from_numpy(data)[None], volume.grid, grid)[0], grid)


def _smooth(data: np.ndarray, grid: Grid) -> np.ndarray:
    """Smooth by `SMOOTH_MM` (standard deviation), NaN and negative values set to zero."""
    data = np.maximum(np.nan_to_num(data), 0)
    return ndimage.gaussian_filter(data, SMOOTH_MM / grid.voxel_sizes, mode="nearest")


def _intensity_mask(smooth: np.ndarray, grid: Grid) -> np.ndarray | None:
    """Brain mask in two passes: the first mask gives the receive bias, the bias-corrected image the final one."""
    first = _bright_tissue(smooth, grid)
    if first is None:
        return None
    return _bright_tissue(smooth / _receive_bias(smooth, first, grid), grid)


def _receive_bias(smooth: np.ndarray, brain: np.ndarray, grid: Grid) -> np.ndarray:
    """Local mean inside the brain, extrapolated outside it: head coils can be less sensitive at the centre."""
    sigma = BIAS_MM / grid.voxel_sizes
    weight = ndimage.gaussian_filter(brain.astype(np.float32), sigma, mode="constant")
    local = ndimage.gaussian_filter(smooth * brain, sigma, mode="constant")
    mean = float(smooth[brain].mean())
    return np.maximum((local + 0.1 * mean) / (weight + 0.1), 0.2 * mean)


def _bright_tissue(smooth: np.ndarray, grid: Grid) -> np.ndarray | None:
    """Bright tissue, separated from eyes and neck by erosion, dilated back and filled; None if there is none."""
    bright = smooth > _threshold(smooth)
    depth = ndimage.distance_transform_edt(bright, sampling=grid.voxel_sizes)
    core = _largest(depth > min(NECK_MM, 0.5 * float(depth.max())))
    if core is None:
        return None
    radius = min(NECK_MM, 0.5 * float(depth.max())) + MARGIN_MM
    dilated = ndimage.distance_transform_edt(~core, sampling=grid.voxel_sizes) <= radius
    return _without_strands(_fill(bright & dilated, grid), grid)


def _threshold(smooth: np.ndarray) -> float:
    """Otsu threshold between background and brain, with CSF and eyes clipped so that they do not raise it."""
    value = otsu(smooth)
    for _ in range(3):
        clip = 1.5 * float(np.median(smooth[smooth > value]))
        value = otsu(np.minimum(smooth, clip))
    return 0.9 * value


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """Threshold that best separates two classes by Otsu's method.

    Otsu 1979, doi 10.1109/TSMC.1979.4310076.
    """
    counts, edges = np.histogram(values, bins)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    total = np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1 + int(np.argmax(np.nan_to_num(between)))])


def _largest(mask: np.ndarray) -> np.ndarray | None:
    """Largest connected component; None for an empty mask."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return None
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))


def _without_strands(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Open by `STRAND_MM` to remove strands of scalp and vessels; the edge of the field of view is not eroded."""
    core = _largest(ndimage.distance_transform_edt(mask, sampling=grid.voxel_sizes) > STRAND_MM)
    if core is None:
        return mask
    return mask & (ndimage.distance_transform_edt(~core, sampling=grid.voxel_sizes) <= STRAND_MM)


def _fill(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Close by `CLOSE_MM`, then fill holes of 2-D slices along each axis, where two of the three axes agree."""
    pad = 1 + int(np.ceil(CLOSE_MM / grid.voxel_sizes.min()))
    padded = np.pad(mask, pad)
    near = ndimage.distance_transform_edt(~padded, sampling=grid.voxel_sizes) <= CLOSE_MM
    closed = ndimage.distance_transform_edt(near, sampling=grid.voxel_sizes) > CLOSE_MM
    closed = closed[pad:-pad, pad:-pad, pad:-pad] | mask
    votes = np.zeros(mask.shape, np.uint8)
    for axis in range(3):
        structure = ndimage.generate_binary_structure(3, 1)
        structure[(slice(None),) * axis + ([0, 2],)] = False
        votes += ndimage.binary_fill_holes(closed, structure)
    return ndimage.binary_fill_holes(votes >= 2)


def brain_mask_t1w(volume: Volume) -> Volume:
    """Brain mask of a T1w image by the deepbet network, with ventricles and CSF out to the skull.

    Parameters
    ----------
    volume : Volume
        T1w of a whole head, any voxel size and orientation.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid and device. All zeros if the network finds no brain.

    References
    ----------
    Fisch et al. 2024, doi 10.1016/j.compmedimag.2023.102302 (deepbet).
    """
    return _as_mask(_largest_filled(_Network(volume).probability(volume.numpy()) > 0.5), volume)


def brain_mask_t2w(volume: Volume) -> Volume:
    """Brain mask of a T2w image, with the surrounding CSF, by the same network, which was trained on T1w images only.

    The network is applied to the image itself and to the image remapped to T1w contrast, and both outputs are
    averaged, as they seldom fail at the same place.

    Parameters
    ----------
    volume : Volume
        T2w of a whole head, any voxel size and orientation.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid and device. All zeros if the network finds no brain.
    """
    probability, _ = _averaged_probability(volume)
    return _as_mask(_largest_filled(probability > 0.5), volume)


def brain_mask_dwiref(volume: Volume) -> Volume:
    """Brain mask of a mean b=0 image, with the surrounding CSF: `brain_mask_t2w` refined at the edge of bright tissue.

    Slower than `brain_mask_b0` (two network runs, seconds) and tighter.

    Parameters
    ----------
    volume : Volume
        Mean b=0 with fat suppression, so that all bright voxels near the surface of the brain belong to it.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid and device. `brain_mask_b0` if the image is very small, or if the two
        overlap so little (Dice below `AGREE_DICE`) that the image cannot be of a human brain.
    """
    rough = brain_mask_b0(volume)
    if min(volume.grid.shape) < LEAST_VOXELS:
        return rough
    probability, corrected = _averaged_probability(volume)
    first = _largest_filled(probability > 0.5)
    if not first.any():
        return rough
    refined = _refined_surface(first, corrected, volume.grid)
    bright = rough.numpy() > 0.5
    if 2 * np.sum(refined & bright) < AGREE_DICE * (np.sum(refined) + np.sum(bright)):
        return rough
    return _as_mask(refined, volume)


class _Network:
    """The deepbet network, for images on the grid and device of a volume."""

    def __init__(self, volume: Volume) -> None:
        from deepbet import BrainExtraction

        self.axes, flipped = volume.grid.ras_axes()
        self.flipped = tuple(np.flatnonzero(flipped))
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.network = BrainExtraction(no_gpu=volume.data.device.type != "cuda")

    def probability(self, image: np.ndarray) -> np.ndarray:
        """Brain probability, 0 to 1, float32 (i, j, k); all zeros if no head is found."""
        ras = np.flip(np.nan_to_num(image.astype(np.float32)).transpose(self.axes), self.flipped)
        try:
            output = self.network.run_model(np.array(ras, np.float32))
        except (AssertionError, ValueError):  # deepbet raises these for an empty bounding box
            return np.zeros(image.shape, np.float32)
        return np.ascontiguousarray(np.flip(output, self.flipped).transpose(np.argsort(self.axes)), np.float32)


def _averaged_probability(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Mean brain probability of the image and its T1w-like remapping, and the bias-corrected image."""
    network, image = _Network(volume), np.nan_to_num(volume.numpy().astype(np.float32))
    probability = network.probability(image)
    brain = _largest_filled(probability > 0.5)
    if brain.sum() * np.prod(volume.grid.voxel_sizes) < LEAST_ML * 1000:
        brain = brain_mask_b0(volume).numpy() > 0.5
    median = max(float(np.median(image[brain])), 1e-12)
    corrected = image / _receive_bias(np.clip(image, 0, CLIP * median), brain, volume.grid)
    remapped = np.interp(corrected / max(float(np.median(corrected[brain])), 1e-12), *AS_T1W).astype(np.float32)
    return (probability + network.probability(remapped)) / 2, corrected


def _refined_surface(first: np.ndarray, corrected: np.ndarray, grid: Grid) -> np.ndarray:
    """Redefine the mask by intensity within `RIM_MM` of the surface of `first`, then smooth its surface."""
    box = tuple(
        slice(max(0, int(occupied[0]) - pad), int(occupied[-1]) + 1 + pad)
        for occupied, pad in zip(
            (np.flatnonzero(first.any(axis=tuple(b for b in range(3) if b != a))) for a in range(3)),
            np.ceil(2 * RIM_MM / grid.voxel_sizes).astype(int),
            strict=True,
        )
    )
    inside, bright = first[box], ndimage.gaussian_filter(corrected[box], 0.5 / grid.voxel_sizes)
    depth = ndimage.distance_transform_edt(inside, sampling=grid.voxel_sizes)
    height = ndimage.distance_transform_edt(~inside, sampling=grid.voxel_sizes)
    deep = depth >= RIM_MM
    white = float(np.percentile(bright[deep if deep.any() else inside], 25))
    kept = deep | ((bright > RIM_LEVEL * white) & (height <= RIM_MM))
    refined = np.zeros_like(first)
    refined[box] = _smooth_surface(kept, grid)
    return refined if refined.any() else first


def _smooth_surface(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Close, open and fill a mask; the edge of the array is not a surface."""
    pad, sizes = 1 + int(np.ceil(RIM_MM / grid.voxel_sizes.min())), grid.voxel_sizes
    padded = np.pad(mask, pad, mode="edge")
    near = ndimage.distance_transform_edt(~padded, sampling=sizes) <= SULCUS_MM
    closed = ndimage.distance_transform_edt(near, sampling=sizes) > SULCUS_MM
    core = _largest(ndimage.distance_transform_edt(closed, sampling=sizes) > RIM_MM)
    if core is None:
        return mask
    opened = closed & (ndimage.distance_transform_edt(~core, sampling=sizes) <= RIM_MM)
    return np.asarray(ndimage.binary_fill_holes(opened)[pad:-pad, pad:-pad, pad:-pad])


def _largest_filled(mask: np.ndarray) -> np.ndarray:
    """Largest connected component, with holes filled."""
    component = _largest(mask)
    return mask if component is None else np.asarray(ndimage.binary_fill_holes(component))


def _as_mask(mask: np.ndarray, volume: Volume) -> Volume:
    """A boolean array as a float32 volume with the grid and device of `volume`."""
    return Volume(torch.from_numpy(mask.astype(np.float32)).to(volume.data.device), volume.grid)
