"""Tensors that are mapped into memory from files, and memory given back when it is not needed."""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from pathlib import Path

import numpy as np
import torch

__all__ = ["file_of", "map_tensor", "release_memory"]

# the file of each mapped tensor, by the address of its values
_files: dict[int, tuple[weakref.ref[torch.Tensor], Path]] = {}


def map_tensor(path: Path) -> torch.Tensor:
    """The tensor of a .npy file, read where and when it is needed; changes stay in memory."""
    tensor = torch.from_numpy(np.load(path, mmap_mode="c"))  # copy-on-write: torch asks for writable memory
    address = tensor.data_ptr()
    _files[address] = weakref.ref(tensor, lambda _: _files.pop(address, None)), path
    return tensor


def file_of(tensor: torch.Tensor) -> Path | None:
    """The file that a tensor was mapped from, whatever its shape is now; None if it was not."""
    mapped, path = _files.get(tensor.data_ptr(), (lambda: None, None))
    return None if mapped() is None else path


def release_memory() -> None:
    """Give memory back that is not needed now: what the allocator keeps, and what was read of mapped files.

    Changes to mapped tensors are lost.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for address, (mapped, _) in list(_files.items()):
        if (tensor := mapped()) is not None:
            begin = address - address % mmap.PAGESIZE
            size = address - begin + tensor.numel() * tensor.element_size()
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)
