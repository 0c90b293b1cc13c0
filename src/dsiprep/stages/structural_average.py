"""Several structural images of a person as one: rigidly aligned, scaled to one brightness, averaged."""

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
        "The T1w images were rigidly aligned to the first one by correlation, scaled to one brightness and averaged."
    ),
    "unbiased": (
        "The T1w images were scaled to one brightness, rigidly aligned by correlation and averaged in the space midway "
        "between them [@reuter2012], so that none of them is privileged; values far from the median of three or more "
        "were left out."
    ),
}

__all__ = ["METHODS", "average_images"]

MOST_ROUNDS = 4  # of averaging and aligning to the average
AT_REST_MM = 0.05  # mean movement in the head between rounds that ends them
HEAD_MM = 60.0  # from the middle of the head: where movement is measured
COVERED = 0.99  # share of a voxel that lies inside an image that counts there
FAR_OFF = 3.0  # robust standard deviations from the median beyond which a value counts for nothing


def average_images(images: tuple[Volume, ...], unbiased: bool) -> tuple[Volume, tuple[Affine, ...], tuple[str, ...]]:
    """One image from several of the same contrast.

    Parameters
    ----------
    images : tuple of Volume
        At least one; each in scanner coordinates of its own session.
    unbiased : bool
        Average in the space midway between all images, to which each of them is resampled once; otherwise in the
        space of the first, which is not resampled.

    Returns
    -------
    average : Volume
        Brightness as in the first image.
    poses : tuple of Affine
        For each image: points of the average to points of it.
    notes : tuple of str
        How they were put together; empty for one image.

    Raises
    ------
    InputError
        If an image has the same value everywhere.

    References
    ----------
    The midway space is that of Reuter et al. 2012, doi 10.1016/j.neuroimage.2012.02.084.
    """
    clean = [Volume(torch.nan_to_num(image.data.float()), image.grid) for image in images]
    levels = [_brightness(image) for image in clean]
    if len(clean) == 1:
        return clean[0], (Affine(np.eye(4), "orig", "anat"),), ()
    scaled = [Volume(image.data * (levels[0] / level), image.grid) for image, level in zip(clean, levels, strict=True)]
    matrices = np.stack([np.eye(4), *(_align(image, scaled[0], None) for image in scaled[1:])])
    if unbiased:
        average, matrices = _midway(scaled, matrices)
        note = f"{len(images)} structural images were averaged in the space midway between them."
    else:
        average = _mean(scaled, matrices, scaled[0].grid)
        note = f"{len(images)} structural images were aligned to the first and averaged."
    return average, tuple(Affine(matrix, "orig", "anat") for matrix in matrices), (note,)


def _align(image: Volume, fixed: Volume, start: np.ndarray | None) -> np.ndarray:
    """Rigid, points of the fixed image to points of the image; without a start, from anywhere."""
    return register_linear(image, fixed, dof=6, metric="cc", initial=start, search=start is None).matrix


def _midway(images: list[Volume], matrices: np.ndarray) -> tuple[Volume, np.ndarray]:
    """Average, and points of it to points of each image, until the images rest on their average."""
    centres = np.stack([_head_centre(image) for image in images])
    middle = centres.mean(axis=0)
    grid = _finest(images, middle - centres[0])
    corners = middle + HEAD_MM * np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    matrices = _centred(matrices, middle)
    for _ in range(MOST_ROUNDS):
        average = _mean(images, matrices, grid)
        aligned = np.stack([_align(image, average, m) for image, m in zip(images, matrices, strict=True)])
        aligned = _centred(aligned, middle)
        moved = point_displacement(aligned, matrices, corners).mean()
        matrices = aligned
        if moved < AT_REST_MM:
            break
    return _mean(images, matrices, grid), matrices


def _centred(matrices: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """The same poses of the images to each other, seen from where their mean turn and shift are none.

    Mean is meant in the parameters of turn and shift about the middle of the head.
    """
    for _ in range(10):
        mean = rigid_parameters(matrices, middle).mean(axis=0)
        matrices = matrices @ np.linalg.inv(rigid_matrix(mean, middle))
    return matrices


def _finest(images: list[Volume], shift: np.ndarray) -> Grid:
    """The first image's field of view, shifted by `shift` mm, with the smallest voxels that any image has."""
    finest = min((image.grid for image in images), key=lambda grid: float(np.prod(grid.voxel_sizes)))
    grid = images[0].grid if finest is images[0].grid else images[0].grid.at_spacing(float(finest.voxel_sizes.max()))
    affine = grid.affine.copy()
    affine[:3, 3] += shift
    return Grid(grid.shape, affine)


def _head_centre(image: Volume) -> np.ndarray:
    data = image.numpy()
    return image.grid.to_world(np.argwhere(data > data.mean()).mean(axis=0))


def _mean(images: list[Volume], matrices: np.ndarray, grid: Grid) -> Volume:
    """Mean over the images that cover a voxel; from three on, without values far from the median."""
    values, weights = [], []
    for image, matrix in zip(images, matrices, strict=True):
        inside = resample_onto(torch.ones_like(image.data)[None], image.grid, grid, matrix)[0] > COVERED
        same = image.grid.matches(grid) and np.array_equal(matrix, np.eye(4))
        brought = (
            image.data
            if same
            else resample_onto(image.data[None], image.grid, grid, matrix, cubic=True)[0].clamp(min=0)
        )
        values.append(brought)
        weights.append(torch.ones_like(inside, dtype=torch.float32) if same else inside.float())
    stack, weight = torch.stack(values), torch.stack(weights)
    if len(images) > 2:
        away = (stack - stack.median(dim=0).values).abs() * weight
        spread = 1.4826 * away.median(dim=0).values
        usual = spread[spread > 0].median() if bool((spread > 0).any()) else torch.tensor(1.0)
        weight = weight * (away <= FAR_OFF * torch.maximum(spread, usual))
    total = weight.sum(dim=0)
    return Volume((weight * stack).sum(dim=0) / total.clamp(min=1), grid)


def _brightness(volume: Volume) -> float:
    data = volume.numpy()
    bright = data[data > data.mean()]
    if bright.size == 0:
        raise InputError("a structural image has the same value everywhere: replace the file or leave it out")
    return float(np.median(bright))
