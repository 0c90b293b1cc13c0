"""Receive bias: the smooth, multiplicative brightness of the coils, by N4."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Volume

__all__ = ["n4_bias"]

SPLINE_MM = 200.0  # distance of the control points at the coarsest of the levels
LEAST_VOXELS = 8  # along an axis of the shrunk image; smaller images have no bias that could be told from anatomy
MARGIN_MM = 10.0  # around the mask, on each side
ITERATIONS = (50, 50, 40, 30)
TOLERANCE = 1e-3
FIELD_LIMIT = 5.0


def n4_bias(volume: Volume, mask: Volume | None = None, shrink: int = 4) -> Volume:
    """The multiplicative bias field of an image; dividing by it flattens the image.

    Parameters
    ----------
    volume : Volume
        Any contrast; voxels at or below zero are left out.
    mask : Volume, optional
        Where the tissue is (above 0.5); everything brighter than a tenth of the 99th percentile by default.
    shrink : int
        Only every `shrink`-th voxel is used for the estimate, fewer are left out along short axes.

    Returns
    -------
    Volume
        The field on the grid of `volume`, float32, mean 1 in the mask; all ones where nothing can be fitted.

    References
    ----------
    Tustison et al. 2010, doi 10.1109/TMI.2010.2046908.
    """
    data = np.nan_to_num(volume.numpy().astype(np.float32))
    inside = _inside(data, mask)
    steps = [int(min(shrink, max(1, n // LEAST_VOXELS))) for n in data.shape]
    if inside.sum() < 100 or min(data.shape) < LEAST_VOXELS or np.ptp(data[inside]) == 0:
        return Volume(torch.ones_like(volume.data, dtype=torch.float32), volume.grid)
    field = np.exp(_log_field_around(data, inside, volume.grid.voxel_sizes, steps))
    field = np.clip(field / np.median(field[inside]), 1 / FIELD_LIMIT, FIELD_LIMIT)
    field /= field[inside].mean(dtype=float)
    return Volume(torch.from_numpy(field.astype(np.float32)).to(volume.data.device), volume.grid)


def _inside(data: np.ndarray, mask: Volume | None) -> np.ndarray:
    if mask is None:
        return data > max(0.0, 0.1 * float(np.percentile(data, 99)))
    return (mask.numpy() > 0.5) & (data > 0)


def _log_field_around(data: np.ndarray, inside: np.ndarray, sizes: np.ndarray, steps: list[int]) -> np.ndarray:
    """The field of a box around the mask, carried on beyond it as it is at the box's faces."""
    box, beyond = [], []
    for axis, size in enumerate(sizes):
        where = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = max(int(np.ceil(MARGIN_MM / size)), LEAST_VOXELS // 2)
        low, high = max(0, int(where[0]) - margin), min(inside.shape[axis], int(where[-1]) + 1 + margin)
        box.append(slice(low, high))
        beyond.append((low, inside.shape[axis] - high))
    return np.pad(_log_field(data[tuple(box)], inside[tuple(box)], sizes, steps), beyond, mode="edge")


def _log_field(data: np.ndarray, inside: np.ndarray, sizes: np.ndarray, steps: list[int]) -> np.ndarray:
    """The logarithm of the field, at full resolution, from an estimate on the shrunk image."""
    import SimpleITK as sitk  # noqa: N813

    def image(array: np.ndarray) -> sitk.Image:
        made = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        made.SetSpacing([float(size) for size in sizes])
        return made

    full, within = image(data), image(inside.astype(np.uint8))
    correction = sitk.N4BiasFieldCorrectionImageFilter()
    correction.SetMaximumNumberOfIterations(list(ITERATIONS))
    correction.SetConvergenceThreshold(TOLERANCE)
    correction.SetNumberOfControlPoints(
        [int(np.ceil(n * s / SPLINE_MM)) + 3 for n, s in zip(data.shape, sizes, strict=True)]
    )
    correction.SetNumberOfThreads(torch.get_num_threads())
    correction.Execute(sitk.Shrink(full, steps), sitk.Shrink(within, steps))
    return sitk.GetArrayFromImage(correction.GetLogBiasFieldAsImage(full)).T
