"""N4 estimation of the receive (B1-) bias field."""

from __future__ import annotations

import numpy as np
import torch

from dsiprep.data.grid import Volume

__all__ = ["n4_bias"]

SPLINE_MM = 200.0  # spacing of the control points at the coarsest level
LEAST_VOXELS = 8  # along each axis of the shrunk image; in smaller images bias is indistinguishable from anatomy
MARGIN_MM = 10.0  # around the mask, on each side
ITERATIONS = (50, 50, 40, 30)  # per level
TOLERANCE = 1e-3
FIELD_LIMIT = 5.0  # largest ratio to the median, and its inverse the smallest


def n4_bias(volume: Volume, mask: Volume | None = None, shrink: int = 4) -> Volume:
    """Estimate the multiplicative bias field of an image; divide by it to correct the image.

    Parameters
    ----------
    volume : Volume
        Any contrast; voxels at or below zero are ignored.
    mask : Volume, optional
        Tissue (above 0.5); by default voxels brighter than a tenth of the 99th percentile.
    shrink : int
        Subsampling factor of the estimate; smaller along short axes.

    Returns
    -------
    Volume
        The field on the grid of `volume`, float32, mean 1 in the mask; all ones if it cannot be estimated.

    References
    ----------
    Tustison et al. 2010, doi 10.1109/TMI.2010.2046908.
    """
    data = np.nan_to_num(volume.numpy().astype(np.float32))
    inside = _inside(data, mask)
    steps = [int(min(shrink, max(1, n // LEAST_VOXELS))) for n in data.shape]
    if inside.sum() < 100 or min(data.shape) < LEAST_VOXELS or np.ptp(data[inside]) == 0:
        return Volume(torch.ones_like(volume.data, dtype=torch.float32), volume.grid)
    field = np.exp(_log_field_in_box(data, inside, volume.grid.voxel_sizes, steps))
    field = np.clip(field / np.median(field[inside]), 1 / FIELD_LIMIT, FIELD_LIMIT)
    field /= field[inside].mean(dtype=float)
    return Volume(torch.from_numpy(field.astype(np.float32)).to(volume.data.device), volume.grid)


def _inside(data: np.ndarray, mask: Volume | None) -> np.ndarray:
    """Voxels used for the estimate, bool."""
    if mask is None:
        return data > max(0.0, 0.1 * float(np.percentile(data, 99)))
    return (mask.numpy() > 0.5) & (data > 0)


def _log_field_in_box(data: np.ndarray, inside: np.ndarray, sizes: np.ndarray, steps: list[int]) -> np.ndarray:
    """Log field estimated in a box around the mask, extended beyond it by edge values."""
    box, padding = [], []
    for axis, size in enumerate(sizes):
        occupied = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        margin = max(int(np.ceil(MARGIN_MM / size)), LEAST_VOXELS // 2)
        low, high = max(0, int(occupied[0]) - margin), min(inside.shape[axis], int(occupied[-1]) + 1 + margin)
        box.append(slice(low, high))
        padding.append((low, inside.shape[axis] - high))
    return np.pad(_log_field(data[tuple(box)], inside[tuple(box)], sizes, steps), padding, mode="edge")


def _log_field(data: np.ndarray, inside: np.ndarray, sizes: np.ndarray, steps: list[int]) -> np.ndarray:
    """Log field at full resolution, estimated on the shrunk image."""
    import SimpleITK as sitk  # noqa: N813

    def image(array: np.ndarray) -> sitk.Image:
        result = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        result.SetSpacing([float(size) for size in sizes])
        return result

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
