"""Where the brain is: in a mean b=0 image fast by its brightness and shape; in any image well by a small network.

Radii are in mm, so that any voxel size and any orientation give the same brain.
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

WORKING_MM = 3.0
SMOOTH_MM = 1.5
NECK_MM = 7.0
MARGIN_MM = 3.0
GENEROUS = 0.3  # of the mask smoothed by MARGIN_MM: 1.5 mm outside of where 0.5 is
CLOSE_MM = 6.0
WISP_MM = 4.0
BIAS_MM = 25.0
LEAST_VOXELS = 12  # along an axis, below which the network is not asked
LEAST_ML = 300.0  # of brain; less than that is no human brain
AGREE_DICE = 0.8  # between the network's brain and the bright one
CLIP = 1.6  # times the brain's median: CSF is no brighter than this for the estimate of the bias
# From a T2w's or b=0's brightness, the brain's median being 1, to a T1w's: white matter brightest, CSF dark, skull dark
AS_T1W = ((0.0, 0.85, 1.1, 2.0), (0.0, 110.0, 75.0, 25.0))
RIM_MM = 3.0  # from the network's surface to where brightness decides; and what is thinner than twice that is cut off
RIM_LEVEL = 0.6  # of white matter's brightness
SULCUS_MM = 2.5  # half the width of dark gaps (vessels, sinuses) that are closed


def brain_mask_b0(volume: Volume) -> Volume:
    """Brain in a mean b=0 image, generous and without holes, in a fraction of a second.

    Parameters
    ----------
    volume : Volume
        Mean b=0: T2*-weighted EPI, distorted, any voxel size and orientation, partial heads too.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid. All ones where the image is too small or too flat to tell.
    """
    working = _working_volume(volume)
    smooth = _smooth(working.numpy(), working.grid)
    found = _brain(smooth, working.grid) if smooth.max() > smooth.min() else None
    if found is None or not found.any():
        return Volume(torch.ones_like(volume.data, dtype=torch.float32), volume.grid)
    soft = ndimage.gaussian_filter(found.astype(np.float32), MARGIN_MM / working.grid.voxel_sizes, mode="nearest")
    back = resample_onto(torch.from_numpy(soft)[None], working.grid, volume.grid)[0]
    return Volume((back > GENEROUS).float().to(volume.data.device), volume.grid)


def _working_volume(volume: Volume) -> Volume:
    """The image on a grid with one voxel size, so that one structuring radius fits all axes."""
    sizes = volume.grid.voxel_sizes
    if np.allclose(sizes, sizes[0], rtol=0.05) and sizes[0] > 0.8 * WORKING_MM:
        return Volume(volume.data.float().cpu(), volume.grid)
    data = np.nan_to_num(volume.numpy().astype(np.float32))
    sigma = np.where(sizes < WORKING_MM, 0.4 * WORKING_MM / sizes, 0)
    data = ndimage.gaussian_filter(data, sigma, mode="nearest")
    grid = volume.grid.at_spacing(WORKING_MM)
    return Volume(resample_onto(torch.from_numpy(data)[None], volume.grid, grid)[0], grid)


def _smooth(data: np.ndarray, grid: Grid) -> np.ndarray:
    data = np.maximum(np.nan_to_num(data), 0)
    return ndimage.gaussian_filter(data, SMOOTH_MM / grid.voxel_sizes, mode="nearest")


def _brain(smooth: np.ndarray, grid: Grid) -> np.ndarray | None:
    """A first brain gives the receive bias; the image without it gives the brain."""
    first = _cut_out(smooth, grid)
    if first is None:
        return None
    return _cut_out(smooth / _brightness(smooth, first, grid), grid)


def _brightness(smooth: np.ndarray, brain: np.ndarray, grid: Grid) -> np.ndarray:
    """Local mean inside the brain, carried on outside it: a head coil can be dark in the middle."""
    sigma = BIAS_MM / grid.voxel_sizes
    weight = ndimage.gaussian_filter(brain.astype(np.float32), sigma, mode="constant")
    local = ndimage.gaussian_filter(smooth * brain, sigma, mode="constant")
    mean = float(smooth[brain].mean())
    return np.maximum((local + 0.1 * mean) / (weight + 0.1), 0.2 * mean)


def _cut_out(smooth: np.ndarray, grid: Grid) -> np.ndarray | None:
    """Bright tissue, cut off from eyes and neck by erosion, grown back, filled."""
    bright = smooth > _threshold(smooth)
    depth = ndimage.distance_transform_edt(bright, sampling=grid.voxel_sizes)
    core = _largest(depth > min(NECK_MM, 0.5 * float(depth.max())))
    if core is None:
        return None
    reach = min(NECK_MM, 0.5 * float(depth.max())) + MARGIN_MM
    grown = ndimage.distance_transform_edt(~core, sampling=grid.voxel_sizes) <= reach
    return _without_wisps(_fill(bright & grown, grid), grid)


def _threshold(smooth: np.ndarray) -> float:
    """Between background and brain: Otsu, with CSF and eyes clipped so that they do not drag it up."""
    value = otsu(smooth)
    for _ in range(3):
        clip = 1.5 * float(np.median(smooth[smooth > value]))
        value = otsu(np.minimum(smooth, clip))
    return 0.9 * value


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """The threshold that separates two classes best.

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
    labels, count = ndimage.label(mask)
    if count == 0:
        return None
    return labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))


def _without_wisps(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Opened by `WISP_MM`: strands of scalp and vessel go; the edge of the field of view is no surface."""
    core = _largest(ndimage.distance_transform_edt(mask, sampling=grid.voxel_sizes) > WISP_MM)
    if core is None:
        return mask
    return mask & (ndimage.distance_transform_edt(~core, sampling=grid.voxel_sizes) <= WISP_MM)


def _fill(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Closed by `CLOSE_MM`, then filled slice by slice along each axis, where two of the three agree."""
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
    """Brain in a T1w by the deepbet network: with ventricles and the CSF around it, out to the skull.

    Parameters
    ----------
    volume : Volume
        T1w of a whole head, any voxel size and orientation.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid and device. All zeros where the network finds nothing.

    References
    ----------
    Fisch et al. 2024, doi 10.1016/j.compmedimag.2023.102302 (deepbet).
    """
    return _as_mask(_solid(_Network(volume).share(volume.numpy()) > 0.5), volume)


def brain_mask_t2w(volume: Volume) -> Volume:
    """Brain in a T2w, with the CSF around it, by the same network, which knows T1w images only.

    It is shown the image as it is and with its brightness remapped to a T1w's, and the mean of both answers is taken:
    where one errs the other seldom does.

    Parameters
    ----------
    volume : Volume
        T2w of a whole head, any voxel size and orientation.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid and device. All zeros where the network finds nothing.
    """
    share, _ = _seen_twice(volume)
    return _as_mask(_solid(share > 0.5), volume)


def brain_mask_dwiref(volume: Volume) -> Volume:
    """Brain in a mean b=0 image, with the CSF around it: `brain_mask_t2w`, moved to the rim of what is bright.

    Slower than `brain_mask_b0` (two runs of the network, seconds), and closer.

    Parameters
    ----------
    volume : Volume
        Mean b=0, with fat suppressed: then all that is bright near the brain's rim belongs to it.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid and device. `brain_mask_b0` where the two overlap so little
        (Dice below `AGREE_DICE`) that the network cannot have seen a human brain, and where the image is very small.
    """
    rough = brain_mask_b0(volume)
    if min(volume.grid.shape) < LEAST_VOXELS:
        return rough
    share, flat = _seen_twice(volume)
    first = _solid(share > 0.5)
    if not first.any():
        return rough
    found = _to_the_rim(first, flat, volume.grid)
    bright = rough.numpy() > 0.5
    if 2 * np.sum(found & bright) < AGREE_DICE * (np.sum(found) + np.sum(bright)):
        return rough
    return _as_mask(found, volume)


class _Network:
    """deepbet, loaded, for images on the grid and the device of a volume."""

    def __init__(self, volume: Volume) -> None:
        from deepbet import BrainExtraction

        self.axes, flipped = volume.grid.ras_axes()
        self.flipped = tuple(np.flatnonzero(flipped))
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.network = BrainExtraction(no_gpu=volume.data.device.type != "cuda")

    def share(self, image: np.ndarray) -> np.ndarray:
        """How sure it is of brain, 0 to 1, float32 (i, j, k); zeros where it finds no head."""
        ras = np.flip(np.nan_to_num(image.astype(np.float32)).transpose(self.axes), self.flipped)
        try:
            sure = self.network.run_model(np.array(ras, np.float32))
        except (AssertionError, ValueError):  # its words for an empty bounding box
            return np.zeros(image.shape, np.float32)
        return np.ascontiguousarray(np.flip(sure, self.flipped).transpose(np.argsort(self.axes)), np.float32)


def _seen_twice(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """The network's mean answer to the image and to its remapped self, and the image without bias."""
    network, image = _Network(volume), np.nan_to_num(volume.numpy().astype(np.float32))
    as_is = network.share(image)
    brain = _solid(as_is > 0.5)
    if brain.sum() * np.prod(volume.grid.voxel_sizes) < LEAST_ML * 1000:
        brain = brain_mask_b0(volume).numpy() > 0.5
    level = max(float(np.median(image[brain])), 1e-12)
    flat = image / _brightness(np.clip(image, 0, CLIP * level), brain, volume.grid)
    remapped = np.interp(flat / max(float(np.median(flat[brain])), 1e-12), *AS_T1W).astype(np.float32)
    return (as_is + network.share(remapped)) / 2, flat


def _to_the_rim(first: np.ndarray, flat: np.ndarray, grid: Grid) -> np.ndarray:
    """Near the surface of `first` what is bright is brain, whatever the network says; then thin strands go."""
    box = tuple(
        slice(max(0, int(w[0]) - pad), int(w[-1]) + 1 + pad)
        for w, pad in zip(
            (np.flatnonzero(first.any(axis=tuple(b for b in range(3) if b != a))) for a in range(3)),
            np.ceil(2 * RIM_MM / grid.voxel_sizes).astype(int),
            strict=True,
        )
    )
    inside, bright = first[box], ndimage.gaussian_filter(flat[box], 0.5 / grid.voxel_sizes)
    depth = ndimage.distance_transform_edt(inside, sampling=grid.voxel_sizes)
    height = ndimage.distance_transform_edt(~inside, sampling=grid.voxel_sizes)
    deep = depth >= RIM_MM
    white = float(np.percentile(bright[deep if deep.any() else inside], 25))
    kept = deep | ((bright > RIM_LEVEL * white) & (height <= RIM_MM))
    found = np.zeros_like(first)
    found[box] = _smooth_surface(kept, grid)
    return found if found.any() else first


def _smooth_surface(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """Closed, opened and filled; the field of view's edge is no surface."""
    pad, sizes = 1 + int(np.ceil(RIM_MM / grid.voxel_sizes.min())), grid.voxel_sizes
    padded = np.pad(mask, pad, mode="edge")
    near = ndimage.distance_transform_edt(~padded, sampling=sizes) <= SULCUS_MM
    closed = ndimage.distance_transform_edt(near, sampling=sizes) > SULCUS_MM
    core = _largest(ndimage.distance_transform_edt(closed, sampling=sizes) > RIM_MM)
    if core is None:
        return mask
    opened = closed & (ndimage.distance_transform_edt(~core, sampling=sizes) <= RIM_MM)
    return np.asarray(ndimage.binary_fill_holes(opened)[pad:-pad, pad:-pad, pad:-pad])


def _solid(mask: np.ndarray) -> np.ndarray:
    """The largest piece, without holes."""
    piece = _largest(mask)
    return mask if piece is None else np.asarray(ndimage.binary_fill_holes(piece))


def _as_mask(found: np.ndarray, volume: Volume) -> Volume:
    return Volume(torch.from_numpy(found.astype(np.float32)).to(volume.data.device), volume.grid)
