"""Overlapping patches of a series: where they lie, work on them in batches, and weighted averages of the results.

On the CPU each batch runs in its own thread, since LAPACK gains nothing from several threads on matrices of this size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from dsiprep.device import in_chunks

__all__ = ["PatchGrid", "in_batches", "patch_grid", "thread_pool"]

BATCH_VALUES = 2_000_000  # patch values that one CPU thread holds at a time
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """Patches in steps along each axis, the last of which ends at the end of the axis.

    Attributes
    ----------
    shape, widths : tuple of int
        Of the image and of a patch, in voxels.
    starts : tuple of ndarray of int
        First voxel of the patches along each axis.
    needed : ndarray, (ti, tj, tk) bool
        Which patches are the closest one to some voxel of the mask.
    """

    shape: tuple[int, int, int]
    widths: tuple[int, int, int]
    starts: tuple[np.ndarray, np.ndarray, np.ndarray]
    needed: np.ndarray

    def slabs(self, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        """Planes along the first axis, and the flat voxel indices within them of their patches, (patches, voxels)."""
        within = np.stack(np.meshgrid(*(np.arange(w) for w in self.widths), indexing="ij")).reshape(3, -1)
        offsets = (within[0] * self.shape[1] + within[1]) * self.shape[2] + within[2]
        for row, first in enumerate(self.starts[0]):
            j, k = np.nonzero(self.needed[row])
            if len(j):
                corner = self.starts[1][j] * self.shape[2] + self.starts[2][k]
                index = torch.from_numpy(corner[:, None] + offsets[None]).to(device)
                yield slice(int(first), int(first) + self.widths[0]), index


def patch_grid(shape: tuple[int, ...], width: int, step: int, mask: torch.Tensor | None) -> PatchGrid:
    """Place patches of a width in steps; they span axes that are shorter. Without a mask (i, j, k) all are needed."""
    widths = tuple(min(width, size) for size in shape)
    pairs = zip(shape, widths, strict=True)
    starts = tuple(np.unique(np.append(np.arange(0, size - w + 1, step), size - w)) for size, w in pairs)
    inside = np.ones(shape, bool) if mask is None else mask.cpu().numpy() > 0
    counts = inside.astype(np.int64)
    for axis, (first, w) in enumerate(zip(starts, widths, strict=True)):
        edges = np.append(0, (first[1:] + first[:-1] + w) // 2)
        counts = np.add.reduceat(counts, edges, axis=axis)
    return PatchGrid(shape, widths, starts, counts > 0)  # type: ignore[arg-type]


def in_batches(
    work: Callable[[torch.Tensor], T],
    index: torch.Tensor,
    bytes_each: int,
    pool: ThreadPoolExecutor | None,
) -> Iterator[tuple[torch.Tensor, T]]:
    """Call `work` on the indices of batches of patches, by threads or in chunks that fit in memory.

    Parameters
    ----------
    work : Tensor -> result
        Takes flat voxel indices, (patches, voxels).
    index : Tensor, (patches, voxels)
    bytes_each : int
        Peak memory of one patch.
    pool : ThreadPoolExecutor or None
        From `thread_pool`.
    """
    if pool is not None:
        batches = index.split(max(1, 16 * BATCH_VALUES // bytes_each))
        yield from zip(batches, pool.map(work, batches), strict=True)
        return
    results: list[tuple[torch.Tensor, T]] = []

    def chunk(part: slice) -> torch.Tensor:
        results.append((index[part], work(index[part])))
        return index[part]

    in_chunks(chunk, len(index), bytes_each, index.device)
    yield from results


@contextmanager
def thread_pool(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """On the CPU, a pool of as many single-threaded workers as torch has threads; None on other devices."""
    if device.type != "cpu":
        yield None
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)
