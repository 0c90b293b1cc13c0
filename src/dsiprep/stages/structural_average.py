"""Average of several structural images of one subject: rigid alignment, intensity scaling, averaging."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Grid, Volume
from dsiprep.data.transform import Affine
from dsiprep.errors import InputError
from dsiprep.ops.image.affine import point_displacement, rigid_matrix, rigid_parameters
from dsiprep.ops.image.interpolation import resample_onto
from dsiprep.ops.registration.linear import register_linear

METHODS = {
    "several": (
        "The T1w images were rigidly aligned to the first one by maximising their correlation, scaled to the same "
        "intensity and averaged."
    ),
    "unbiased": (
        "The T1w images were scaled to the same intensity, rigidly aligned by maximising their correlation and "
        "averaged in the space midway between them [@reuter2012], so that no image is favoured. With three or more "
        "images, values far from the median were excluded."
    ),
}

__all__ = ["METHODS", "average_images"]

MAX_ROUNDS = 4  # of averaging and aligning to the average
TOLERANCE_MM = 0.05  # stop when the mean displacement in the head between rounds is smaller
HEAD_MM = 60.0  # half-width of the cube about the centre of the head at whose corners displacement is measured
MIN_COVERAGE = 0.99  # fraction of a voxel inside the field of view for an image to contribute to it
MAX_DEVIATION = 3.0  # robust standard deviations from the median; values further away are excluded


def average_images(images: tuple[Volume, ...], unbiased: bool) -> tuple[Volume, tuple[Affine, ...], tuple[str, ...]]:
    """Average several structural images of the same contrast.

    Parameters
    ----------
    images : tuple of Volume
        At least one, each in the scanner coordinates of its own session.
    unbiased : bool
        Average in the space midway between all images, onto which each of them is resampled once; otherwise in the
        space of the first, which is not resampled.

    Returns
    -------
    average : Volume
        On the intensity scale of the first image.
    poses : tuple of Affine
        For each image, points of the average to points of that image.
    notes : tuple of str
        How the images were combined; empty for a single image.

    Raises
    ------
    InputError
        If an image is constant.

    References
    ----------
    Midway space: Reuter et al. 2012 (doi 10.1016/j.neuroimage.2012.02.084).
    """
    clean = [Volume(torch.nan_to_num(image.data.float()), image.grid) for image in images]
    brightness = [_brightness(image) for image in clean]
    if len(clean) == 1:
        return clean[0], (Affine(np.eye(4), "orig", "anat"),), ()
    scaled = [Volume(image.data * (brightness[0] / b), image.grid) for image, b in zip(clean, brightness, strict=True)]
    matrices = np.stack([np.eye(4), *(_align(image, scaled[0], None) for image in scaled[1:])])
    if unbiased:
        average, matrices = _average_midway(scaled, matrices)
        note = f"{len(images)} structural images were averaged in the space midway between them."
    else:
        average = _average(scaled, matrices, scaled[0].grid)
        note = f"{len(images)} structural images were aligned to the first and averaged."
    return average, tuple(Affine(matrix, "orig", "anat") for matrix in matrices), (note,)


def _align(image: Volume, fixed: Volume, start: np.ndarray | None) -> np.ndarray:
    """Rigid transform of points of `fixed` to points of `image`; searches over poses if `start` is None."""
    return register_linear(image, fixed, dof=6, metric="cc", initial=start, search=start is None).matrix


def _average_midway(images: list[Volume], matrices: np.ndarray) -> tuple[Volume, np.ndarray]:
    """Average in the midway space, and points of it to points of each image; iterates until the poses converge."""
    centres = np.stack([_head_centre(image) for image in images])
    centre = centres.mean(axis=0)
    grid = _average_grid(images, centre - centres[0])
    corners = centre + HEAD_MM * np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    matrices = _centre_poses(matrices, centre)
    for _ in range(MAX_ROUNDS):
        average = _average(images, matrices, grid)
        aligned = np.stack([_align(image, average, m) for image, m in zip(images, matrices, strict=True)])
        aligned = _centre_poses(aligned, centre)
        displacement = point_displacement(aligned, matrices, corners).mean()
        matrices = aligned
        if displacement < TOLERANCE_MM:
            break
    return _average(images, matrices, grid), matrices


def _centre_poses(matrices: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Poses relative to the space in which their mean rigid parameters about `centre` are zero.

    The poses of the images relative to each other are unchanged.
    """
    for _ in range(10):
        mean = rigid_parameters(matrices, centre).mean(axis=0)
        matrices = matrices @ np.linalg.inv(rigid_matrix(mean, centre))
    return matrices


def _average_grid(images: list[Volume], shift: np.ndarray) -> Grid:
    """The first image's field of view, shifted by `shift` mm, with the voxel size of the finest image."""
    finest = min((image.grid for image in images), key=lambda grid: float(np.prod(grid.voxel_sizes)))
    grid = images[0].grid if finest is images[0].grid else images[0].grid.at_spacing(float(finest.voxel_sizes.max()))
    affine = grid.affine.copy()
    affine[:3, 3] += shift
    return Grid(grid.shape, affine)


def _head_centre(image: Volume) -> np.ndarray:
    """Centroid of the voxels brighter than the mean; world mm, (3,)."""
    data = image.numpy()
    return image.grid.to_world(np.argwhere(data > data.mean()).mean(axis=0))


def _average(images: list[Volume], matrices: np.ndarray, grid: Grid) -> Volume:
    """Mean over the images that cover a voxel; with three or more, values far from the median are excluded."""
    values, weights = [], []
    for image, matrix in zip(images, matrices, strict=True):
        inside = resample_onto(torch.ones_like(image.data)[None], image.grid, grid, matrix)[0] > MIN_COVERAGE
        identical = image.grid.matches(grid) and np.array_equal(matrix, np.eye(4))
        resampled = (
            image.data
            if identical
            else resample_onto(image.data[None], image.grid, grid, matrix, cubic=True)[0].clamp(min=0)
        )
        values.append(resampled)
        weights.append(torch.ones_like(inside, dtype=torch.float32) if identical else inside.float())
    stack, weight = torch.stack(values), torch.stack(weights)
    if len(images) > 2:
        deviation = (stack - stack.median(dim=0).values).abs() * weight
        spread = 1.4826 * deviation.median(dim=0).values
        typical = spread[spread > 0].median() if bool((spread > 0).any()) else torch.tensor(1.0)
        weight = weight * (deviation <= MAX_DEVIATION * torch.maximum(spread, typical))
    total = weight.sum(dim=0)
    return Volume((weight * stack).sum(dim=0) / total.clamp(min=1), grid)


def _brightness(volume: Volume) -> float:
    """Median intensity of the voxels brighter than the mean."""
    data = volume.numpy()
    bright = data[data > data.mean()]
    if bright.size == 0:
        raise InputError("a structural image has the same value in every voxel: replace or remove the file")
    return float(np.median(bright))
