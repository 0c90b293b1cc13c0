"""Where the brain is: in a mean b=0 image by its brightness and shape, in a T1w by a small network.

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
from dsiprep.ops.sample import pull

__all__ = ["brain_mask_b0", "brain_mask_t1w"]

WORKING_MM = 3.0
SMOOTH_MM = 1.5
NECK_MM = 7.0
MARGIN_MM = 3.0
GENEROUS = 0.3  # of the mask smoothed by MARGIN_MM: 1.5 mm outside of where 0.5 is
CLOSE_MM = 6.0
WISP_MM = 4.0
BIAS_MM = 25.0


def brain_mask_b0(volume: Volume) -> Volume:
    """Brain in a mean b=0 image, generous and without holes.

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
    back = pull(torch.from_numpy(soft)[None], working.grid, volume.grid)[0]
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
    return Volume(pull(torch.from_numpy(data)[None], volume.grid, grid)[0], grid)


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
    """Brain in a T1w by the deepbet network.

    Parameters
    ----------
    volume : Volume
        T1w of a whole head, any voxel size and orientation.

    Returns
    -------
    Volume
        0 or 1, float32, on the same grid and device.

    References
    ----------
    Fisch et al. 2024, doi 10.1016/j.compmedimag.2023.102302 (deepbet).
    """
    import nibabel as nib
    from deepbet import BrainExtraction

    image = nib.Nifti1Image(np.nan_to_num(volume.numpy().astype(np.float32)), volume.grid.affine)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        network = BrainExtraction(no_gpu=volume.data.device.type != "cuda")
        _, mask, _ = network.run(image)
    data = torch.from_numpy((np.asarray(mask.dataobj) > 0.5).astype(np.float32))
    return Volume(data.to(volume.data.device), volume.grid)
